//! HYDRA's picture of why shards should be scheduled alone: three models of two shards on two devices.

use super::models::Chain;
use hydra::device::sim::CostModel;
use hydra::engine::{SimulateOptions, plan_alone, simulate};
use hydra::sched::{LocalityLrtf, LowerBound, by_name};
use hydra::spill::{
    Baseline, FleetDevice, FleetModel, HomeBudgets, Lined, PlanOptions, Recompute, Updates, place_baseline,
    plan_anywhere, plan_fleet, plan_pipelined,
};

/// Enough steps that the ends, where one device has nothing left to do, do not count.
const STEPS: u64 = 8;

/// A model of two shards for each of `steps`, all equal but for these.
fn models(steps: &[u64], microbatches: usize) -> Vec<FleetModel> {
    let model = Chain { microbatches, ..Chain::equal(2, 256, 256) }.model();
    let options = PlanOptions { updates: Updates::PLAIN, cut: Some(vec![0..1, 1..2]), ..PlanOptions::default() };
    let of = |(i, &steps): (usize, &u64)| FleetModel {
        name: format!("model {i}"),
        model: model.clone(),
        options: options.clone(),
        steps,
    };
    steps.iter().enumerate().map(of).collect()
}

/// The makespan on two devices in the picture's seconds, which has four units of a second in each model's step. Here
/// the last shard's forward and backward are one, and units are unequal.
fn in_seconds(models: &[FleetModel], lined: &Lined, policy: Option<&str>, cost: &CostModel) -> f64 {
    let options = SimulateOptions {
        policy: policy.and_then(|name| by_name(name, 1)),
        lines: lined.lines.clone(),
        ..SimulateOptions::new(models.iter().map(|m| m.steps).collect(), vec![cost.clone(); 2])
    };
    let makespan_secs = simulate(&lined.placed, options).expect("nothing fails").makespan_secs;
    let microbatch_secs: f64 = lined.placed[0].plan.shards.iter().map(|s| s.step_secs(cost)).sum();
    makespan_secs / (STEPS as f64 * models[0].model.microbatches as f64 * microbatch_secs / 4.0)
}

#[track_caller]
fn near(got: f64, want: f64, part: f64) {
    assert!((got / want - 1.0).abs() < part, "{got}, not {want}");
}

fn two_devices(cost: &CostModel) -> Vec<FleetDevice> {
    vec![FleetDevice { budget: None, cost: cost.clone() }; 2]
}

#[test]
fn three_models_on_two_devices_take_twelve_eight_and_six() {
    let cost = arithmetic_alone();
    let devices = two_devices(&cost);
    // A stage of model-parallelism works on whole minibatches, in however many microbatches they come.
    for microbatches in [1, 2] {
        let models = models(&[STEPS; 3], microbatches);
        let baseline = |baseline| {
            let lined = place_baseline(baseline, &models, &devices, plan_alone).expect("no budget");
            in_seconds(&models, &lined, None, &cost)
        };
        near(baseline(Baseline::ModelParallel), 12.0, 1e-3);
        near(baseline(Baseline::TaskParallel), 8.0, 1e-3);
        let anywhere = Lined {
            placed: plan_anywhere(&models, &devices).expect("a plan").placed,
            lines: Vec::new(),
            smallest_device_bytes: 0,
        };
        for policy in ["sharded-lrtf", "locality-lrtf"] {
            near(in_seconds(&models, &anywhere, Some(policy), &cost), 6.0, 0.02);
        }
    }
}

/// The longest goes first, wherever it stands, so that the short ones fill up what it leaves.
#[test]
fn task_parallel_begins_with_the_longest() {
    let cost = arithmetic_alone();
    for (steps, want_lines, want_secs) in [
        (&[4, 4, 8][..], [&[2][..], &[0, 1]], 4.0),
        (&[8, 4, 4], [&[0], &[1, 2]], 4.0),
        (&[4, 6, 4, 6, 4], [&[1, 0, 4], &[3, 2]], 7.0),
    ] {
        let models = models(steps, 1);
        let lined =
            place_baseline(Baseline::TaskParallel, &models, &two_devices(&cost), plan_alone).expect("no budget");
        assert_eq!(lined.lines, want_lines, "{steps:?}");
        near(in_seconds(&models, &lined, None, &cost), want_secs, 1e-3);
    }
}

/// A cost model in which copies and updates take next to nothing.
fn arithmetic_alone() -> CostModel {
    let mut cost = CostModel::stated(1e6, 1e12, 1e15);
    (cost.host_update_bytes_per_sec, cost.device_update_bytes_per_sec) = (1e15, 1e15);
    cost
}

#[test]
fn the_smallest_budget_that_is_named_works_and_a_byte_less_does_not() {
    for recompute in [Recompute::Auto, Recompute::Always, Recompute::Never] {
        let model = Chain { microbatches: 2, ..Chain::equal(6, 64, 33) }.model();
        let options = PlanOptions { updates: Updates::PLAIN, slots: 4, recompute, ..PlanOptions::default() };
        let of = |i: usize| FleetModel {
            name: format!("model {i}"),
            model: model.clone(),
            options: options.clone(),
            steps: STEPS,
        };
        let models: Vec<FleetModel> = (0..2).map(of).collect();
        // `None`: turns, or no turns where all stay where they are.
        for baseline in Baseline::NAMES.map(|(_, baseline)| Some(baseline)).into_iter().chain([None]) {
            let smallest = |budget: Option<u64>| {
                let devices = vec![FleetDevice { budget, cost: arithmetic_alone() }; 2];
                match baseline {
                    Some(baseline) => {
                        place_baseline(baseline, &models, &devices, plan_alone).map(|l| l.smallest_device_bytes)
                    }
                    None => plan_fleet(&models, &devices, HomeBudgets::default()).map(|p| p.smallest_device_bytes),
                }
            };
            let what = format!("{baseline:?}, {recompute:?}");
            let least = smallest(None).expect("no budget");
            assert_eq!(smallest(Some(least)).expect(&what), least, "{what}");
            assert!(smallest(Some(least - 1)).is_err(), "{what}: {least} is not the smallest");
        }
    }
}

#[test]
fn fewer_models_than_devices_go_on_microbatch_by_microbatch() {
    let cost = arithmetic_alone();
    let chain = |layers: usize| Chain { microbatches: 8, ..Chain::equal(layers, 64, 64) };
    let run = |models: &[FleetModel], devices: usize, pipelines: bool| {
        let spec = vec![FleetDevice { budget: None, cost: cost.clone() }; devices];
        let placed = match pipelines {
            true => plan_pipelined(models, &spec).expect("a plan").expect("a model that bounds the makespan").placed,
            false => plan_anywhere(models, &spec).expect("a plan").placed,
        };
        let options = SimulateOptions {
            policy: Some(Box::new(LocalityLrtf { pipelines, ..LocalityLrtf::default() })),
            ..SimulateOptions::new(models.iter().map(|m| m.steps).collect(), vec![cost.clone(); devices])
        };
        simulate(&placed, options).expect("nothing fails")
    };
    let model = |layers: usize, steps: u64| FleetModel {
        name: format!("{layers} layers"),
        model: chain(layers).model(),
        // However fine units are, all of them do the same.
        options: PlanOptions { updates: Updates::PLAIN, recompute: Recompute::Always, ..PlanOptions::default() },
        steps,
    };
    // One model on as many devices as it likes: a pipeline of 8 microbatches, filled and emptied every step.
    let one = [model(16, STEPS)];
    let (alone, piped) = (run(&one, 1, false).makespan_secs, run(&one, 16, true));
    assert!(piped.makespan_secs < alone / 4.0, "{} of {alone}", piped.makespan_secs);
    assert!(
        piped.bounds.greatest == LowerBound::Chain && piped.bounds.gap(piped.makespan_secs) < 1e-6,
        "{:?}",
        piped.bounds
    );
    // On two devices it is 1.8 times as fast, the rest goes into filling and emptying; three devices are kept busy by
    // two models.
    let two = run(&one, 2, true).makespan_secs;
    assert!(two < alone / 1.79, "{two} of {alone}");
    let pair = [model(16, STEPS), model(12, STEPS)];
    let (apart, together) = (run(&pair, 3, false), run(&pair, 3, true));
    assert!(together.bounds.gap(together.makespan_secs) < 0.1, "{} of {:?}", together.makespan_secs, together.bounds);
    assert!(together.makespan_secs < 0.7 * apart.makespan_secs, "{}", together.makespan_secs / apart.makespan_secs);
    // Whole minibatches cannot go on in parts.
    let whole = FleetModel { model: Chain::equal(16, 64, 512).model(), ..model(16, STEPS) };
    let spec = vec![FleetDevice { budget: None, cost: cost.clone() }; 2];
    assert!(plan_pipelined(&[whole], &spec).expect("a plan").is_none());
}
