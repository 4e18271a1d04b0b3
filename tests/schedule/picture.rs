//! HYDRA's picture of why shards should be scheduled alone: three models of two shards on two devices.

use super::models::Chain;
use hydra::device::sim::CostModel;
use hydra::engine::{SimulateOptions, simulate};
use hydra::sched::by_name;
use hydra::spill::{Baseline, FleetDevice, FleetModel, Lined, PlanOptions, place_baseline, plan_anywhere};

/// Enough steps that the ends, where one device has nothing left to do, do not count.
const STEPS: u64 = 8;

/// Three equal models of two shards.
fn models(options: &PlanOptions) -> Vec<FleetModel> {
    let model = Chain::equal(2, 256, 256).model();
    let of = |i: usize| FleetModel {
        name: format!("model {i}"),
        model: model.clone(),
        options: options.clone(),
        steps: STEPS,
    };
    (0..3).map(of).collect()
}

fn makespan_secs(lined: &Lined, policy: Option<&str>, cost: &CostModel) -> f64 {
    let options = SimulateOptions {
        steps: vec![STEPS; 3],
        clips: vec![false; 3],
        costs: vec![cost.clone(); 2],
        shared_bytes_per_sec: None,
        arena_bytes: Vec::new(),
        policy: policy.and_then(|name| by_name(name, 1)),
        units: 2,
        lines: lined.lines.clone(),
        recorder: None,
    };
    simulate(&lined.placed, options).expect("nothing fails").makespan_secs
}

#[test]
fn three_models_on_two_devices_take_twelve_eight_and_six() {
    // Copies and updates cost next to nothing.
    let mut cost = CostModel::stated(1e6, 1e12, 1e15);
    (cost.host_update_bytes_per_sec, cost.device_update_bytes_per_sec) = (1e15, 1e15);
    let devices = vec![FleetDevice { budget: None, cost: cost.clone() }; 2];
    let options = PlanOptions { moments: 0, cut: Some(vec![0..1, 1..2]), ..PlanOptions::default() };
    let models = models(&options);
    // The picture has four units of a second in each model's step. Here the last shard's forward and backward are one, and units are unequal.
    let in_seconds = |lined: &Lined, policy: Option<&str>| {
        let step_secs: f64 = lined.placed[0].plan.shards.iter().map(|s| s.step_secs(&cost)).sum();
        makespan_secs(lined, policy, &cost) / (STEPS as f64 * step_secs / 4.0)
    };
    let near = |got: f64, want: f64, part: f64| assert!((got / want - 1.0).abs() < part, "{got}, not {want}");
    let baseline = |baseline| place_baseline(baseline, &models, &devices).expect("no budget");
    near(in_seconds(&baseline(Baseline::ModelParallel), None), 12.0, 1e-3);
    near(in_seconds(&baseline(Baseline::TaskParallel), None), 8.0, 1e-3);
    let anywhere = Lined { placed: plan_anywhere(&models, &devices).expect("a plan").placed, lines: Vec::new() };
    for policy in ["sharded-lrtf", "locality-lrtf"] {
        near(in_seconds(&anywhere, Some(policy)), 6.0, 0.02);
    }
}
