//! Copies run beside the arithmetic: shown on a virtual clock against bounds, and on the order of events with real
//! threads.
//!
//! Bound A is what the busiest lane has to do in a step; bound B is the same visits under the same slots by a
//! recurrence that shares no code with the engine (`overlap/bound.rs`). Nothing here looks at wall time.

#[path = "overlap/bound.rs"]
mod bound;
#[path = "overlap/models.rs"]
mod models;
#[path = "overlap/recording.rs"]
mod recording;

use hydra::base::{DType, LaneKind};
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::device::sim::CostModel;
use hydra::engine::{Engine, EngineOptions, StepInput, Stored, plan_alone, predict};
use hydra::graph::{Activation, Builder, Init, Mode, WeightLayout};
use hydra::spill::{Model, Plan, PlanOptions, Recompute, Updates};
use hydra::trace::{Event, Keep, Recorder, RecorderOptions, What, read_trace};
use models::{Chain, MEASURED, Random, WARM, rule, run_simulated};
use recording::{Log, Recording};
use std::sync::Arc;

/// One random case: how close the engine came.
struct Share {
    /// Where some shards rest: seconds of a step, of those with none at rest.
    of_visiting: Option<f64>,
    /// Where the device updates shards that visit: seconds of a step, of those in which the host updates them.
    of_host: Option<f64>,
    /// Seconds of a step as estimated, of those that it takes.
    of_estimate: f64,
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
    let whole =
        Plan::new(model, &PlanOptions { cut: Some(std::iter::once(0..model.layers()).collect()), ..free }, &cost)
            .expect("no budget");
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
        updates: Updates { moments: random.whole(0, 2), clips: clip },
        recompute: [Recompute::Auto, Recompute::Auto, Recompute::Always][random.whole(0, 2)],
        ..PlanOptions::default()
    };
    let free = Plan::new(&model, &PlanOptions { resident: Some(true), ..options.clone() }, &cost).expect("no budget");
    let most = free.arena.bytes;
    options.resident = (random.whole(0, 3) > 0).then_some(false);
    options.boundaries_stay = [None, None, None, Some(false)][random.whole(0, 3)];
    let smallest = Plan::new(&model, &options, &cost).expect("no budget").smallest_device_bytes;
    let part = random.part();
    options.device_budget = Some(smallest + (most.saturating_sub(smallest) as f64 * part * part) as u64);
    let chosen = plan_alone(&model, &options, &cost).expect("at least the smallest");
    // The recurrence knows updates by the host, and of shards at rest.
    options.visiting_updates = Some(0);
    let plan = Arc::new(Plan::new(&model, &options, &cost).expect("at least the smallest"));
    let steady = run_simulated(&model, &plan, &cost, clip.then_some(1.0));
    let predicted = predict(&model, &plan, &cost).expect("nothing fails");
    assert!(
        (predicted.step_secs / steady.secs - 1.0).abs() < 0.01,
        "seed {seed}: {predicted:?}, a step takes {}",
        steady.secs
    );
    assert!(
        (predicted.bound_secs / steady.busiest_secs() - 1.0).abs() < 0.01,
        "seed {seed}: {predicted:?}, A is {}",
        steady.busiest_secs()
    );
    let bound = bound::step_secs(&model, &plan, &cost, clip, WARM as usize, MEASURED as usize);
    let what = format!(
        "{} shards of {} layers, {} microbatches, clip {clip}, {:?}, busy {:?}, step {:.3e}",
        plan.shards.len(),
        model.layers(),
        model.microbatches,
        plan.choice,
        steady
            .busy
            .iter()
            .map(|l| (l.lane.to_string(), (l.busy_secs / steady.secs * 1e3).round() / 1e3))
            .collect::<Vec<_>>(),
        steady.secs
    );
    let of_host = (chosen.choice.visiting_updates > 0)
        .then(|| run_simulated(&model, &chosen, &cost, clip.then_some(1.0)).secs / steady.secs);
    let of_visiting = Some(PlanOptions { resting: Some(0), ..options }).filter(|_| plan.choice.resting > 0);
    let of_visiting = of_visiting.and_then(|options| {
        // The smallest budgets may be too small for plans in which all visit.
        let visiting = Arc::new(Plan::new(&model, &options, &cost).ok()?);
        Some(steady.secs / run_simulated(&model, &visiting, &cost, clip.then_some(1.0)).secs)
    });
    let of = |secs: f64| secs / steady.secs;
    let (of_estimate, of_a, of_b) = (of(plan.estimated_secs), of(steady.busiest_secs()), of(bound));
    Share { seed, of_visiting, of_host, of_estimate, of_a, of_b, what }
}

fn spread(name: &str, mut shares: Vec<f64>) -> String {
    shares.sort_by(f64::total_cmp);
    let at = |part: f64| shares[((shares.len() - 1) as f64 * part) as usize];
    format!("{name}: least {:.4}, 1 % {:.4}, median {:.4}, most {:.4}", at(0.0), at(0.01), at(0.5), at(1.0))
}

#[test]
fn random_models_come_close_to_the_recurrence() {
    let count = 1000;
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
    let resting: Vec<f64> = shares.iter().filter_map(|s| s.of_visiting).collect();
    assert!(resting.len() * 20 > shares.len(), "some shards rest in {} of {count} cases", resting.len());
    let here: Vec<f64> = shares.iter().filter_map(|s| s.of_host).collect();
    assert!(here.len() * 10 > shares.len(), "the device updates what visits in {} of {count} cases", here.len());
    let (least, most) = here.iter().fold((f64::MAX, 0.0f64), |(least, most), &x| (least.min(x), most.max(x)));
    println!("{}", spread("seconds where the device updates what visits, of those where the host does", here));
    assert!(least < 0.6 && most < 1.01, "updates on the device make a step {least} to {most} times as long");
    let longest = resting.iter().copied().fold(0.0, f64::max);
    println!("{}", spread("seconds where some rest, of those where none does", resting));
    assert!(longest < 1.1, "with some at rest a step takes {longest} of what it takes with none");
    // With single entries of rings a copy that has time may have begun when one that has none becomes possible.
    assert!(short.len() * 200 < shares.len(), "{} of {count} cases are below 0.97 of B", short.len());
    assert!(shares[0].of_b > 0.9, "seed {} comes to {} of B", shares[0].seed, shares[0].of_b);
    let mut estimates: Vec<f64> = shares.iter().map(|s| s.of_estimate).collect();
    println!("{}", spread("estimated seconds, of those that a step takes", estimates.clone()));
    estimates.sort_by(|a, b| a.ln().abs().total_cmp(&b.ln().abs()));
    let (median, most) = (estimates[estimates.len() / 2], estimates[estimates.len() - 1]);
    assert!(
        median.ln().abs() < 0.03 && most.ln().abs() < 0.7,
        "estimates are off by {median} in the median, {most} at most"
    );
    // The recurrence would be no bound if it were slower than what it bounds. It is a schedule too, whose updates on
    // the host come in another order where there is one slot.
    let last = shares.last().expect("cases");
    assert!(last.of_b < 1.04, "seed {}: {} of the recurrence: {}", last.seed, last.of_b, last.what);
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
            visiting_updates: Some(0),
            cut: Some((0..layers).map(|l| l..l + 1).collect()),
            ..PlanOptions::default()
        };
        let shape = Plan::new(&model, &options, &cost).expect("no budget");
        let rate = shape.shards[1].fetch_bytes() as f64 / shape.shards[1].forward_secs(&cost);
        (cost.h2d_bytes_per_sec, cost.d2h_bytes_per_sec) = (rate, rate);
        let mut of_a = Vec::new();
        for slots in [1, 2] {
            let plan =
                Arc::new(Plan::new(&model, &PlanOptions { slots, ..options.clone() }, &cost).expect("no budget"));
            for clip in [None, Some(1.0)] {
                let steady = run_simulated(&model, &plan, &cost, clip);
                of_a.push(steady.busiest_secs() / steady.secs);
            }
        }
        println!("{layers} shards: {of_a:.4?} of A with 1 slot, 1 slot and clipping, 2 slots, 2 slots and clipping");
        assert!(of_a[2] >= 0.93 && of_a[2] > 1.2 * of_a[0], "{layers} shards: {of_a:?}");
    }
}

/// What a run on the host device leaves.
struct Ran {
    events: Vec<Event>,
    log: Log,
    /// Bits of losses, norms, weights and moments.
    bits: Vec<u64>,
}

/// A plan for equal shards of one layer each, or with everything on the device.
fn equal_plan(model: &Model, slots: Option<usize>) -> Arc<Plan> {
    let layers = model.layers();
    let options = PlanOptions {
        slots: slots.unwrap_or(2),
        visiting_updates: Some(0),
        resident: Some(slots.is_none()),
        recompute: Recompute::Always,
        cut: Some((0..layers).map(|l| l..l + 1).collect()),
        ..PlanOptions::default()
    };
    Arc::new(Plan::new(model, &options, &CostModel::stated(1e11, 2e10, 1e10)).expect("no budget"))
}

/// Trains a few steps on the host device with a recorder beside the engine and a recording of every task's memory below
/// it.
fn run_on_host(chain: &Chain, slots: Option<usize>, link: Option<f64>, clip: Option<f64>, steps: u64) -> Ran {
    let model = chain.model();
    let plan = equal_plan(&model, slots);
    // With room behind the plan's end, where nothing may be written.
    let arena_bytes = plan.arena.bytes + 4096;
    let config = HostConfig {
        devices: vec![HostSpec { arena_bytes, link_bytes_per_sec: link, threads: None }],
        host_bytes: plan.host.bytes,
        poison: true,
        ..HostConfig::default()
    };
    let (device, log) = Recording::new(HostDevice::new(&config).expect("memory and threads"));
    let mut engine =
        Engine::new(Arc::clone(&model), Arc::clone(&plan), Box::new(device), EngineOptions::new(1, &model));
    let mut random = Random(7);
    let mut floats =
        |count: usize, by: f64| -> Vec<f32> { (0..count).map(|_| ((random.part() - 0.5) * by) as f32).collect() };
    for (i, parameter) in model.train.parameters.iter().enumerate() {
        let values = floats(parameter.shape.elems(), 0.1);
        engine.write_parameter(0, Stored::Weight, i, &values).unwrap();
        engine.write_parameter(0, Stored::Moment(0), i, &vec![0.0; values.len()]).unwrap();
        engine.write_parameter(0, Stored::Moment(1), i, &vec![0.0; values.len()]).unwrap();
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("trace.json");
    let keep = Keep { first: steps, last: 0, total_steps: steps };
    engine.record(Recorder::create(&path, RecorderOptions::new(keep, vec![], vec!["chain".into()])).expect("a file"));
    let rows = chain.rows * chain.microbatches;
    let x = floats(rows * chain.input, 2.0);
    let labels: Vec<i32> = (0..rows as i32).map(|r| r % 5).collect();
    let mut bits = Vec::new();
    let mut wait = |engine: &mut Engine| {
        let result = engine.wait_step(0).expect("nothing fails");
        bits.extend([u64::from(result.loss.to_bits()), result.grad_norm.to_bits()]);
    };
    for step in 0..steps {
        if engine.steps_in_flight(0) == 2 {
            wait(&mut engine);
        }
        let inputs = vec![bytemuck::cast_slice(&x), bytemuck::cast_slice(&labels)];
        let input =
            StepInput { step, inputs, loss_scale: 1.0 / rows as f64, rule: rule(plan.updates.moments, step + 1), clip };
        engine.begin_step(0, &input).expect("fewer than two in flight");
    }
    while engine.steps_in_flight(0) > 0 {
        wait(&mut engine);
    }
    engine.wait_home(0).expect("nothing fails");
    assert_eq!(engine.high_water_bytes(0), plan.arena.bytes, "predicted peak against touched bytes");
    for i in 0..model.train.parameters.len() {
        for what in [Stored::Weight, Stored::Moment(0), Stored::Moment(1)] {
            bits.extend(engine.read_parameter(0, what, i).unwrap().into_iter().map(|v| u64::from(v.to_bits())));
        }
    }
    let summary = engine.take_recorder().expect("given above").finish().expect("the file is whole");
    assert_eq!(summary.dropped, 0);
    drop(engine);
    let written = log.unpoisoned_bytes();
    assert!((plan.arena.bytes - 4096..=plan.arena.bytes).contains(&written), "{written} of {}", plan.arena.bytes);
    Ran { events: read_trace(&path).expect("our own file"), log, bits }
}

/// Of the forward visits after the first step, how many had the next shard's fetch begin before they ended, and how
/// many there were.
fn fetches_ahead(events: &[Event], shards: usize) -> (usize, usize) {
    let steps = events.iter().map(|e| e.step).max().expect("events") + 1;
    let first_start = |what, step, shard: usize| {
        let of = events.iter().filter(|e| e.name.what == what && e.step == step && usize::from(e.name.shard) == shard);
        of.map(|e| e.start_secs).fold(f64::INFINITY, f64::min)
    };
    let forward_end = |step, shard: usize| {
        let mut of = events.iter().filter(|e| e.name.what == What::Forward && e.step == step);
        of.find(|e| usize::from(e.name.shard) == shard).expect("every shard but the last goes forward").end_secs
    };
    let visits = (1..steps).flat_map(|step| (0..shards - 1).map(move |shard| (step, shard)));
    let ahead =
        |&(step, shard): &(u32, usize)| first_start(What::FetchWeights, step, shard + 1) < forward_end(step, shard);
    (visits.clone().filter(ahead).count(), visits.count())
}

#[test]
fn the_next_shard_comes_while_one_computes_and_no_byte_is_touched_too_soon() {
    let chain = Chain::equal(9, 512, 384);
    // The link that fetches a shard in the time of its forward, from a run without a limit.
    let free = run_on_host(&chain, Some(2), None, None, 2);
    let mut forwards: Vec<f64> = free.events.iter().filter(|e| e.name.what == What::Forward).map(Event::secs).collect();
    forwards.sort_by(f64::total_cmp);
    let link = (512.0 * 512.0 * 4.0) / forwards[forwards.len() / 2];
    for slots in [1, 2, 3] {
        let ran = run_on_host(&chain, Some(slots), Some(link), None, 4);
        ran.log.check();
        let (ahead, visits) = fetches_ahead(&ran.events, 9);
        println!("{slots} slots: {ahead} of {visits} fetches began before the forward before them ended");
        match slots {
            1 => assert_eq!(ahead, 0, "one slot is no double buffering"),
            _ => assert!(ahead * 10 >= visits * 9, "{slots} slots: {ahead} of {visits}"),
        }
        let pieces = ran.events.iter().filter(|e| e.name.what == What::SpillGradient && e.step == 1).count();
        assert_eq!(pieces, if slots == 1 { 9 } else { 36 }, "1 MiB leaves in four pieces where there is a second slot");
        assert!(ran.events.iter().any(|e| e.lane.kind == LaneKind::HostMath), "updates run on the host");
    }
}

#[test]
fn pieces_change_no_bit() {
    // The second layer's weight is cut in the middle; the third is too small to be cut.
    let chain =
        Chain { rows: 33, input: 400, layers: vec![vec![513, 700], vec![1023], vec![31], vec![600]], microbatches: 2 };
    for clip in [None, Some(0.05)] {
        let whole = run_on_host(&chain, None, None, clip, 3);
        for slots in [1, 2, 3] {
            let spilled = run_on_host(&chain, Some(slots), None, clip, 3);
            spilled.log.check();
            assert!(spilled.bits == whole.bits, "{slots} slots, clip {clip:?}: other bits");
        }
    }
}

/// Logits lie in the workspace until they have left, and all programs of a device have one workspace.
#[test]
fn logits_leave_before_anything_else_is_computed_in_their_place() {
    const ROWS: usize = 64;
    // What the first layer needs for itself is larger than the last one's logits.
    let mut b = Builder::new(Mode::Evaluation, DType::F32);
    let x = b.input("x", [ROWS, 16], DType::F32).expect("a new input");
    let widths = [[16, 4096, 16], [16, 16, 700]];
    widths.into_iter().enumerate().fold(x, |x, (l, [from, hidden, to])| {
        let layer = b.layer(format!("layer {l}"), |b, _| {
            let up = b.parameter(format!("{l}.up"), [from, hidden], Init::Normal(0.1))?;
            let down = b.parameter(format!("{l}.down"), [hidden, to], Init::Normal(0.1))?;
            let x = b.linear(x, up, None, Activation::GeluTanh, WeightLayout::InOut)?;
            b.linear(x, down, None, Activation::None, WeightLayout::InOut)
        });
        layer.expect("widths follow each other")
    });
    let model = Arc::new(Model::evaluation(b.finish().expect("layers")).expect("layers"));
    let cut = Some(vec![0..1, 1..2]);
    let options = PlanOptions { updates: Updates::PLAIN, cut, resident: Some(true), ..PlanOptions::default() };
    let plan = Arc::new(Plan::new(&model, &options, &CostModel::stated(1e11, 2e10, 1e10)).expect("no budget"));
    // So slow that a product is done long before the logits have left.
    let spec = HostSpec { arena_bytes: plan.arena.bytes, link_bytes_per_sec: Some(1e7), threads: Some(1) };
    let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, poison: true, ..HostConfig::default() };
    let (device, log) = Recording::new(HostDevice::new(&config).expect("memory and threads"));
    let mut engine =
        Engine::new(Arc::clone(&model), Arc::clone(&plan), Box::new(device), EngineOptions::new(1, &model));
    for (i, parameter) in model.train.parameters.iter().enumerate() {
        engine.write_parameter(0, Stored::Weight, i, &vec![0.01; parameter.shape.elems()]).expect("nothing has begun");
    }
    let x = [1f32; ROWS * 16];
    for _ in 0..2 {
        engine.begin_evaluation(0, &[bytemuck::cast_slice(&x)], 1.0).expect("fewer than two in flight");
    }
    for _ in 0..2 {
        engine.wait_begun_evaluation(0).expect("nothing fails");
    }
    log.check();
}
