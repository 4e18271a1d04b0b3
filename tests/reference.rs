//! The fixtures against PyTorch: logits of the first batch, losses and weights after AdamW steps, resident and under
//! small budgets. On the host; where `HYDRA_KERNEL_TESTS_DEVICE` names another device, on that (see `common::device`),
//! but for the logits.

mod common;

use common::device::{Asked, asked};
use common::{Case, Outcome, distance, finish, fixture, floats_of};
use hydra::base::Shape;
use hydra::data::Batch;
use hydra::graph::LowRank;
use hydra::nn::{self, Pretrained};
use hydra::spill::PlanOptions;
use hydra::train::{Session, TrainOptions, Weights, save_adapters, wait_forward};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

fn floats(bits: &[u32]) -> Vec<f32> {
    bits.iter().map(|&b| f32::from_bits(b)).collect()
}

/// A case's first batch.
fn first_batch(case: &Case) -> Batch {
    let mut batch = Batch::default();
    case.source().fill(0, &mut batch).expect("a batch");
    batch
}

fn logits_of(pretrained: &Pretrained, batch: &Batch) -> Vec<f32> {
    wait_forward(pretrained.network.as_ref(), Weights::Pretrained(pretrained), batch).expect("logits").1
}

/// Losses and weights are PyTorch's, within the case's tolerance.
fn check_trained(case: &Case, what: &str, trained: &Outcome, expected: &BTreeMap<String, Vec<f32>>) {
    let losses = floats(&trained.losses);
    let off = distance(&losses, &expected["losses"]);
    assert!(off < case.tolerance("losses"), "{what}: losses are off by {off:e}: {losses:?}");
    for (tensor, want) in expected.iter().filter_map(|(k, v)| Some((k.strip_prefix("after.")?, v))) {
        let off = distance(&floats(&trained.tensors[tensor]), want);
        assert!(off < case.tolerance("weights"), "{what}: {tensor} is off by {off:e}");
    }
}

fn check(name: &str) {
    let case = Case::open(name);
    let mut options = case.options();
    match asked(None) {
        Asked::Nothing => {}
        Asked::Device(spec) => options.device = spec,
        Asked::Missing => return,
    }
    let expected = case.expected();
    let off = distance(&logits_of(&case.pretrained, &first_batch(&case)), &expected["logits"]);
    assert!(off < case.tolerance("logits"), "{name}: logits are off by {off:e}");

    let whole = case.train(&options).expect("unconstrained run");
    check_trained(&case, name, &whole, &expected);
    let (model, plan) = case.plan(&options).expect("plan");
    // Where nothing is normalised over the batch, samples may as well come one by one.
    if model.train.states.is_empty() {
        let one_by_one = TrainOptions { microbatch: 1, ..options.clone() };
        let trained = case.train(&one_by_one).expect("a run in microbatches");
        check_trained(&case, &format!("{name} in microbatches"), &trained, &expected);
    }
    let (peak, smallest) = (plan.arena.bytes, plan.smallest_device_bytes);
    assert!(smallest < peak, "{name}: {smallest} is no smaller than {peak}");
    for budget in [smallest, peak * 6 / 10, peak * 8 / 10] {
        let budget = budget.max(smallest);
        let spilled = TrainOptions {
            plan: PlanOptions { device_budget: Some(budget), ..PlanOptions::default() },
            ..options.clone()
        };
        let (_, plan) = case.plan(&spilled).expect("plan under a budget");
        assert!(plan.arena.bytes <= budget && plan.shards.len() > 1, "{name}: {} shards", plan.shards.len());
        assert!(case.train(&spilled).expect("spilled run") == whole, "{name}: other bits under {budget} bytes");
    }
    let short =
        TrainOptions { plan: PlanOptions { device_budget: Some(smallest - 1), ..PlanOptions::default() }, ..options };
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
fn mistral() {
    check("mistral");
}

#[test]
fn qwen2() {
    check("qwen2");
}

#[test]
fn qwen3() {
    check("qwen3");
}

/// A Qwen2 whose rotary angles are slowed, and stretched, by YaRN.
#[test]
fn yarn() {
    check("yarn");
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

/// Adapters as peft's: losses, what they become, the weights with them in, and the directory that peft reads; with the
/// same bits under the smallest budget.
fn check_low_rank(name: &str, alpha: f64, targets: &[&str]) {
    let case = Case::open(name);
    let expected = floats_of(&fixture(&format!("low-rank/{name}.safetensors")));
    let targets: Vec<String> = targets.iter().map(|target| target.to_string()).collect();
    let low_rank = LowRank { rank: 3, alpha, dropout: 0.0, targets };
    let mut options = TrainOptions { low_rank: Some(low_rank.clone()), ..case.options() };
    match asked(None) {
        Asked::Nothing => {}
        Asked::Device(spec) => options.device = spec,
        Asked::Missing => return,
    }
    let give = |name: &str, shape: &Shape| match expected.get(&format!("before.{name}")) {
        Some(adapter) => Ok(Some(adapter.clone())),
        None => case.pretrained.tensor(name, shape).map(Some),
    };
    let start = |options: &TrainOptions| {
        let planned = case.plan(options).expect("a plan");
        Session::new(Weights::Given(&give), planned, case.source(), None, options.clone()).expect("a session")
    };
    let of = |prefix: &str| {
        let named = expected.iter().filter_map(|(key, values)| Some((key.strip_prefix(prefix)?, values)));
        named.map(|(name, values)| (name.to_string(), values)).collect::<BTreeMap<_, _>>()
    };

    let smallest = case.plan(&options).expect("a plan").1.smallest_device_bytes;
    let mut whole = None;
    for (microbatch, device_budget) in [(options.batch, None), (options.batch, Some(smallest)), (1, None)] {
        let plan = PlanOptions { device_budget, ..PlanOptions::default() };
        let trained = finish(start(&TrainOptions { microbatch, plan, ..options.clone() })).expect("a run");
        let off = distance(&floats(&trained.losses), &expected["losses"]);
        assert!(off < 2e-6, "{name}: losses are off by {off:e}");
        for (tensor, want) in of("after.") {
            let off = distance(&floats(&trained.tensors[&tensor]), want);
            assert!(off < 2e-5, "{name}: {tensor} is off by {off:e}");
        }
        if microbatch == options.batch {
            assert!(whole.get_or_insert_with(|| trained.clone()) == &trained, "{name}: other bits when spilled");
        }
    }

    let mut session = start(&options);
    session.run(&mut (), &AtomicBool::new(false)).expect("a run");
    let folder = tempfile::tempdir().expect("a folder");
    session.wait_save(folder.path(), &case.pretrained.form, Weights::Given(&give)).expect("saved");
    let saved = nn::open(folder.path()).expect("a model");
    let merged = of("merged.");
    for (tensor, shape) in nn::tensors(saved.network.as_ref()).expect("tensors") {
        let (got, before) = (saved.tensor(&tensor, &shape), case.pretrained.tensor(&tensor, &shape));
        let (got, before) = (got.expect("saved"), before.expect("a weight"));
        match merged.get(&tensor) {
            Some(want) => assert!(distance(&got, want) < 2e-5 && got != before, "{name}: {tensor}"),
            None => assert_eq!(got, before, "{name}: {tensor}"),
        }
    }
    save_adapters(folder.path(), (session.engine(), 0), &low_rank, Some(case.pretrained.dir())).expect("saved");
    let saved = floats_of(&folder.path().join("adapter_model.safetensors"));
    assert_eq!(saved.len(), of("after.").len());
    for (tensor, want) in of("after.") {
        assert!(distance(&saved[&format!("base_model.model.{tensor}")], want) < 2e-5, "{name}: {tensor}");
    }
    let config = std::fs::read_to_string(folder.path().join("adapter_config.json")).expect("a config");
    let config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
    let says = (&config["r"], &config["lora_alpha"], &config["fan_in_fan_out"], &config["task_type"]);
    assert_eq!(says, (&3.into(), &alpha.into(), &(name == "gpt2").into(), &"CAUSAL_LM".into()));
}

#[test]
fn low_rank_beside_gpt2() {
    check_low_rank("gpt2", 7.5, &["c_attn", "c_fc", "c_proj"]);
}

#[test]
fn low_rank_beside_llama() {
    check_low_rank("llama", 3.0, &["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]);
}

/// Dropout is of training alone: a model that was trained with it has the logits that it has without.
#[test]
fn logits_know_no_dropout() {
    let mut case = Case::open("gpt2");
    let batch = first_batch(&case);
    let mut config = case.pretrained.network.config();
    let mut logits = |dropout: f64| {
        for key in ["resid_pdrop", "embd_pdrop", "attn_pdrop"] {
            config[key] = dropout.into();
        }
        case.pretrained.network = nn::from_config("gpt2", &config).expect("a network");
        logits_of(&case.pretrained, &batch)
    };
    assert!(logits(0.5) == logits(0.0));
}
