//! The fixtures against PyTorch: losses and weights after AdamW steps, resident and under small budgets. On the host; where
//! `HYDRA_KERNEL_TESTS_DEVICE` names another device, on that (see `common::device`).

mod common;

use common::device::{Asked, asked};
use common::{Case, distance};
use hydra::spill::PlanOptions;

fn check(name: &str) {
    let case = Case::open(name);
    let mut options = case.options();
    match asked(None) {
        Asked::Nothing => {}
        Asked::Device(spec) => options.device = spec,
        Asked::Missing => return,
    }
    let whole = case.train(&options).expect("unconstrained run");
    let expected = case.expected();
    let limit = |key: &str| case.spec["tolerance"][key].as_f64().expect("a number");
    let losses: Vec<f32> = whole.losses.iter().map(|&b| f32::from_bits(b)).collect();
    let off = distance(&losses, &expected["losses"]);
    assert!(off < limit("losses"), "{name}: losses are off by {off:e}: {losses:?}");
    for (tensor, want) in expected.iter().filter_map(|(k, v)| Some((k.strip_prefix("after.")?, v))) {
        let got: Vec<f32> = whole.tensors[tensor].iter().map(|&b| f32::from_bits(b)).collect();
        let off = distance(&got, want);
        assert!(off < limit("weights"), "{name}: {tensor} is off by {off:e}");
    }
    let (_, plan) = case.plan(&options).expect("plan");
    let (peak, smallest) = (plan.arena.bytes, plan.smallest_device_bytes);
    assert!(smallest < peak, "{name}: {smallest} is no smaller than {peak}");
    for budget in [smallest, peak * 6 / 10, peak * 8 / 10] {
        let budget = budget.max(smallest);
        let spilled = hydra::train::TrainOptions {
            plan: PlanOptions { device_budget: Some(budget), ..PlanOptions::default() },
            ..options.clone()
        };
        let (_, plan) = case.plan(&spilled).expect("plan under a budget");
        assert!(plan.arena.bytes <= budget && plan.shards.len() > 1, "{name}: {} shards", plan.shards.len());
        assert!(case.train(&spilled).expect("spilled run") == whole, "{name}: other bits under {budget} bytes");
    }
    let short = hydra::train::TrainOptions {
        plan: PlanOptions { device_budget: Some(smallest - 1), ..PlanOptions::default() },
        ..options
    };
    let refused = case.plan(&short).expect_err("one byte less is too little");
    assert!(refused.to_string().contains(&smallest.to_string()), "{refused}");
}

#[test]
fn gpt2() {
    check("gpt2");
}

#[test]
fn llama() {
    check("llama");
}

#[test]
fn resnet_bottleneck() {
    check("resnet");
}

#[test]
fn resnet_basic() {
    check("resnet-basic");
}

#[test]
fn bert() {
    check("bert");
}

#[test]
fn vit() {
    check("vit");
}
