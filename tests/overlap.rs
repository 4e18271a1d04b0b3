//! Copies run beside the arithmetic: shown on a virtual clock against bounds, and on the order of events with real threads.
//!
//! Bound A is what the busiest lane has to do in a step; bound B is the same visits under the same slots by a recurrence that shares no
//! code with the engine (`overlap/bound.rs`). Nothing here looks at wall time.

#[path = "overlap/bound.rs"]
mod bound;
#[path = "overlap/models.rs"]
mod models;

use hydra::device::sim::CostModel;
use hydra::spill::{Model, Plan, PlanOptions, Recompute};
use models::{Chain, MEASURED, Random, WARM, run_simulated};
use std::sync::Arc;

/// One random case: how close the engine came.
struct Share {
    seed: u64,
    of_a: f64,
    of_b: f64,
    what: String,
}

/// A random cost model whose lanes take between much less and much more than compute does.
fn random_cost(random: &mut Random, model: &Model) -> CostModel {
    let flops = random.factor(1e9, 1e13);
    let mut cost = CostModel::stated(flops, flops * random.factor(0.02, 1.0), 1.0);
    let free = PlanOptions { resident: Some(true), ..PlanOptions::default() };
    let whole = Plan::new(model, &PlanOptions { cut: Some(vec![0..model.layers()]), ..free }, &cost).expect("no budget");
    let compute = whole.shards[0].backward_secs(&cost) * model.microbatches as f64;
    let bytes = model.layout.parameter_bytes as f64;
    cost.h2d_bytes_per_sec = 2.0 * bytes / compute * random.factor(0.05, 50.0);
    cost.d2h_bytes_per_sec = cost.h2d_bytes_per_sec * random.factor(0.5, 2.0);
    cost.host_update_bytes_per_sec = 8.0 * bytes / compute * random.factor(0.3, 30.0);
    if random.whole(0, 1) == 1 {
        cost.copy_secs = bytes / model.layers() as f64 / cost.h2d_bytes_per_sec * random.factor(0.001, 0.05);
    }
    cost
}

fn case(seed: u64) -> Share {
    let mut random = Random(seed);
    let chain = Chain::random(&mut random);
    let model = chain.model();
    let cost = random_cost(&mut random, &model);
    let clip = random.whole(0, 2) == 0;
    let mut options = PlanOptions {
        slots: random.whole(1, 4),
        moments: random.whole(0, 2),
        recompute: [Recompute::Auto, Recompute::Auto, Recompute::Always][random.whole(0, 2)],
        ..PlanOptions::default()
    };
    let free = Plan::new(&model, &PlanOptions { resident: Some(true), ..options.clone() }, &cost).expect("no budget");
    let most = free.arena.bytes;
    options.resident = (random.whole(0, 9) > 0).then_some(false);
    options.boundaries_stay = [None, None, None, Some(false)][random.whole(0, 3)];
    let smallest = Plan::new(&model, &options, &cost).expect("no budget").smallest_device_bytes;
    let part = random.part();
    options.device_budget = Some(smallest + (most.saturating_sub(smallest) as f64 * part * part) as u64);
    let plan = Arc::new(Plan::new(&model, &options, &cost).expect("at least the smallest"));
    let steady = run_simulated(&model, &plan, &cost, clip.then_some(1.0));
    let bound = bound::step_secs(&model, &plan, &cost, clip, WARM as usize, MEASURED as usize);
    let what = format!(
        "{} shards of {} layers, {} microbatches, clip {clip}, {:?}, busy {:?}, step {:.3e}",
        plan.shards.len(),
        model.layers(),
        model.microbatches,
        plan.choice,
        steady.busy.iter().map(|l| (l.lane.to_string(), (l.busy_secs / steady.secs * 1e3).round() / 1e3)).collect::<Vec<_>>(),
        steady.secs
    );
    Share { seed, of_a: steady.busiest_secs() / steady.secs, of_b: bound / steady.secs, what }
}

fn spread(name: &str, mut shares: Vec<f64>) -> String {
    shares.sort_by(f64::total_cmp);
    let at = |part: f64| shares[((shares.len() - 1) as f64 * part) as usize];
    format!("{name}: least {:.4}, 1 % {:.4}, median {:.4}, most {:.4}", at(0.0), at(0.01), at(0.5), at(1.0))
}

#[test]
fn random_models_come_close_to_the_recurrence() {
    let count = std::env::var("OVERLAP_CASES").ok().and_then(|v| v.parse().ok()).unwrap_or(1000u64);
    if let Ok(seed) = std::env::var("OVERLAP_SEED") {
        for seed in seed.split(',') {
            let share = case(seed.parse().unwrap());
            println!("seed {}: {:.4} of B, {:.4} of A: {}", share.seed, share.of_b, share.of_a, share.what);
        }
        return;
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let mut shares: Vec<Share> = std::thread::scope(|scope| {
        let run = |t: u64| scope.spawn(move || (0..count).filter(|s| s % threads == t).map(case).collect::<Vec<_>>());
        let running: Vec<_> = (0..threads).map(run).collect();
        running.into_iter().flat_map(|r| r.join().expect("a case panicked")).collect()
    });
    println!("{}", spread("share of A", shares.iter().map(|s| s.of_a).collect()));
    println!("{}", spread("share of B", shares.iter().map(|s| s.of_b).collect()));
    shares.sort_by(|a, b| a.of_b.total_cmp(&b.of_b));
    let short: Vec<&Share> = shares.iter().filter(|s| s.of_b < 0.97).collect();
    for share in short.iter().take(10) {
        println!("seed {}: {:.4} of B, {:.4} of A: {}", share.seed, share.of_b, share.of_a, share.what);
    }
    assert!(short.is_empty(), "{} of {count} cases are below 0.97 of B", short.len());
}

/// The turn of the step with equal shards that recompute, on a link that fetches a shard in the time of its forward.
#[test]
fn two_slots_hide_the_turn_of_the_step() {
    for layers in [8, 16, 32] {
        let chain = Chain::equal(layers, 1024, 512);
        let model = chain.model();
        let mut cost = CostModel::stated(1e12, 1e14, 1.0);
        cost.host_update_bytes_per_sec = 50e9;
        let options = PlanOptions {
            resident: Some(false),
            recompute: Recompute::Always,
            boundaries_stay: Some(true),
            cut: Some((0..layers).map(|l| l..l + 1).collect()),
            ..PlanOptions::default()
        };
        let shape = Plan::new(&model, &options, &cost).expect("no budget");
        let rate = shape.shards[1].fetch_bytes() as f64 / shape.shards[1].forward_secs(&cost);
        (cost.h2d_bytes_per_sec, cost.d2h_bytes_per_sec) = (rate, rate);
        let mut of_a = Vec::new();
        for slots in [1, 2] {
            let plan = Arc::new(Plan::new(&model, &PlanOptions { slots, ..options.clone() }, &cost).expect("no budget"));
            for clip in [None, Some(1.0)] {
                let steady = run_simulated(&model, &plan, &cost, clip);
                of_a.push(steady.busiest_secs() / steady.secs);
            }
        }
        println!("{layers} shards: {of_a:.4?} of A with 1 slot, 1 slot and clipping, 2 slots, 2 slots and clipping");
        assert!(of_a[2] >= 0.93 && of_a[2] > 1.2 * of_a[0], "{layers} shards: {of_a:?}");
    }
}
