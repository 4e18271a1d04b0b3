//! Promise 1: the bits of weights, moments, losses, norms and running statistics follow from the model, the data and
//! the recipe alone (f32 or bf16 is part of it), never from budgets, cuts, slots, tiers, links, threads, or the order
//! in which things happen to end.

mod common;

use common::shuffled::Shuffled;
use common::small::{Driver, Small};
use common::{Outcome, difference, gather_of, stated};
use hydra::base::{DType, Error};
use hydra::device::DiskSpec;
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::graph::LowRank;
use hydra::spill::{BoundaryTier, OnDisk, PlanOptions, Recompute};
use hydra::train::{Optimizer, Schedule, TrainOptions, plan_model};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// What may change every bit: the reference run has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Recipe {
    bf16: bool,
    microbatches: usize,
    optimizer: usize,
    clip: bool,
    cosine: bool,
    /// Which of the lists of parameters that stay as they are.
    frozen: usize,
}

/// A model, and lists of parameters that may stay as they are, by the beginnings of their names; the first is empty.
struct Family {
    small: Small,
    /// Rows of logits that are made at a time.
    loss_rows: Option<usize>,
    frozen: [&'static [&'static str]; 4],
}

impl Recipe {
    fn options(self, family: &Family, microbatch: usize) -> TrainOptions {
        let adamw = |weight_decay, decay_matrices_only| Optimizer::Adamw {
            lr: 3e-3,
            betas: (0.9, 0.95),
            epsilon: 1e-8,
            weight_decay,
            decay_matrices_only,
        };
        let sgd = |momentum, nesterov| Optimizer::Sgd { lr: 0.05, momentum, nesterov, weight_decay: 0.01 };
        let optimizer =
            [adamw(0.1, false), adamw(0.1, true), adamw(0.0, false), sgd(0.0, false), sgd(0.9, false), sgd(0.9, true)];
        TrainOptions {
            seed: 5 + self.microbatches as u64,
            batch: microbatch * self.microbatches,
            microbatch,
            optimizer: optimizer[self.optimizer],
            schedule: if self.cosine { Schedule::Cosine { warmup: 2, min_lr: 1e-4 } } else { Schedule::Constant },
            // Below the norms that come up, so that it does clip.
            clip: self.clip.then_some(0.5),
            valid_every: 2,
            poison: true,
            dtype: if self.bf16 { DType::Bf16 } else { DType::F32 },
            loss_rows: family.loss_rows,
            frozen: family.frozen[self.frozen].iter().map(|start| start.to_string()).collect(),
            ..TrainOptions::new(5)
        }
    }
}

/// What must not change a bit.
#[derive(Clone, Debug)]
struct Regime {
    /// Between the smallest budget that works and what the fastest plan wants, if there is a budget.
    budget: Option<f64>,
    slots: usize,
    /// Whether a cut falls after each layer, if the cut is given.
    cut: Option<Vec<bool>>,
    resident: Option<bool>,
    resting: Option<usize>,
    visiting_updates: Option<usize>,
    boundaries_stay: Option<bool>,
    recompute: Recompute,
    link_bytes_per_sec: Option<f64>,
    threads: Option<usize>,
    /// Seed of a device that brings things about in another order.
    shuffle: Option<u64>,
    /// Room in the arena for kernels that want it.
    scratch: bool,
    on_disk: OnDisk,
}

fn recipes(bf16: bool) -> impl Strategy<Value = Recipe> {
    let frozen = prop_oneof![4 => Just(0usize), 3 => 1usize..4];
    (1usize..=4, 0usize..6, any::<bool>(), any::<bool>(), frozen).prop_map(
        move |(microbatches, optimizer, clip, cosine, frozen)| Recipe {
            bf16,
            microbatches,
            optimizer,
            clip,
            cosine,
            frozen,
        },
    )
}

fn regimes() -> impl Strategy<Value = Regime> {
    let link = prop_oneof![2 => Just(None), 3 => (7.0f64..10.0).prop_map(|log| Some(10f64.powf(log)))];
    let recompute = prop_oneof![Just(Recompute::Auto), Just(Recompute::Always), Just(Recompute::Never)];
    let budget = prop_oneof![1 => Just(None), 1 => Just(Some(0.0)), 3 => (0.0f64..1.0).prop_map(Some)];
    let cut = prop::option::of(prop::collection::vec(any::<bool>(), 16));
    let state = (prop::option::of(any::<bool>()), prop::option::of(0usize..6), prop::option::of(0usize..6));
    let tiers = (state, prop::option::of(any::<bool>()), recompute, any::<bool>());
    let on_disk = prop::sample::select(OnDisk::ALL.to_vec());
    let device = (link, prop::option::of(1usize..=3), prop::option::of(any::<u64>()), on_disk);
    (budget, 1usize..=4, cut, tiers, device).prop_map(|(budget, slots, cut, tiers, device)| {
        let ((resident, resting, visiting_updates), boundaries_stay, recompute, scratch) = tiers;
        let (link_bytes_per_sec, threads, shuffle, on_disk) = device;
        Regime {
            budget,
            slots,
            cut,
            resident,
            resting,
            visiting_updates,
            boundaries_stay,
            recompute,
            link_bytes_per_sec,
            threads,
            shuffle,
            scratch,
            on_disk,
        }
    })
}

/// Ranges of layers between cuts.
fn ranges(cuts: &[bool], layers: usize) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut start = 0;
    for end in 1..=layers {
        if end == layers || cuts[end - 1] {
            ranges.push(start..end);
            start = end;
        }
    }
    ranges
}

/// What the cases of a property have covered, so that a generator that has gone narrow shows.
#[derive(Debug, Default)]
struct Seen {
    shards: BTreeSet<usize>,
    resident: BTreeSet<bool>,
    resting: BTreeSet<usize>,
    visiting_updates: BTreeSet<usize>,
    /// A slot for large shards alone: of weights, and of gradients.
    large: BTreeSet<[bool; 2]>,
    activations_on_host: BTreeSet<bool>,
    kept: BTreeSet<bool>,
    /// With more than one shard.
    frozen: BTreeSet<usize>,
    /// Shards without a backward.
    idle: BTreeSet<bool>,
}

/// Trains a model by `recipe` under `regime`.
fn train(family: &Family, microbatch: usize, recipe: Recipe, regime: &Regime, seen: &mut Seen) -> Outcome {
    let small = &family.small;
    let mut options = recipe.options(family, microbatch);
    options.device =
        HostSpec { arena_bytes: 0, link_bytes_per_sec: regime.link_bytes_per_sec, threads: regime.threads }.into();
    let mut model = Arc::unwrap_or_clone(small.model(&options));
    model.train.scratch = regime.scratch;
    let model = Arc::new(model);
    options.disk = Some(std::env::temp_dir());
    options.plan = PlanOptions {
        slots: regime.slots,
        cut: regime.cut.as_ref().map(|cuts| ranges(cuts, model.layers())),
        resident: regime.resident,
        resting: regime.resting,
        visiting_updates: regime.visiting_updates,
        boundaries_stay: regime.boundaries_stay,
        recompute: regime.recompute,
        on_disk: Some(regime.on_disk),
        ..PlanOptions::default()
    };
    if let Some(part) = regime.budget {
        let most = plan_model(&model, &options, &stated()).expect("no budget").arena.bytes;
        options.plan.device_budget = Some(0);
        let Err(Error::OutOfBudget { smallest_device_bytes: least, .. }) = plan_model(&model, &options, &stated())
        else {
            panic!("no bytes are too few");
        };
        options.plan.device_budget = Some(least + (part * most.saturating_sub(least) as f64) as u64);
    }
    let plan = plan_model(&model, &options, &stated()).expect("the smallest budget works");
    seen.shards.insert(plan.shards.len());
    seen.resident.insert(plan.choice.resident);
    seen.resting.insert(plan.choice.resting);
    seen.visiting_updates.insert(plan.choice.visiting_updates);
    let slots = [&plan.arena.weight_slots, &plan.arena.gradient_slots];
    seen.large.insert(slots.map(|slots| !plan.choice.resident && slots.has_large(plan.choice.resting)));
    seen.activations_on_host.insert(plan.choice.activations != BoundaryTier::Device);
    seen.kept.extend(plan.shards.iter().map(|s| s.kept));
    seen.idle.extend(plan.shards.iter().map(|s| s.idles_back()));
    if plan.shards.len() > 1 {
        seen.frozen.insert(recipe.frozen);
    }
    match regime.shuffle {
        None => common::finish(small.session((model, plan), &options).expect("a session")).expect("a run"),
        Some(seed) => {
            let (link_bytes_per_sec, threads) = (regime.link_bytes_per_sec, regime.threads);
            let spec = HostSpec { arena_bytes: plan.arena.bytes, link_bytes_per_sec, threads };
            let (host_bytes, bytes) = (plan.host.bytes, plan.host.disk_bytes);
            let disk = (bytes > 0).then(|| DiskSpec { path: std::env::temp_dir(), bytes, bytes_per_sec: None });
            let config = HostConfig { devices: vec![spec], host_bytes, poison: true, disk, ..HostConfig::default() };
            let device = Shuffled::new(HostDevice::new(&config).expect("a device"), seed);
            let held_out = small.held_out(options.batch);
            Driver::new(small, (model, plan), Box::new(device), &options).run(held_out).expect("a run")
        }
    }
}

/// Compares `cases` random runs with the unconstrained run of the same recipe.
fn check(family: &Family, microbatch: usize, bf16: bool, cases: u32) -> Seen {
    let references: RefCell<BTreeMap<Recipe, Outcome>> = RefCell::default();
    let seen: RefCell<Seen> = RefCell::default();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 30, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let result = runner.run(&(recipes(bf16), regimes()), |(recipe, regime)| {
        let mut references = references.borrow_mut();
        let want = references.entry(recipe).or_insert_with(|| {
            let outcome = family.small.train(&recipe.options(family, microbatch)).expect("the unconstrained run");
            let finite = outcome.losses.iter().all(|&b| f32::from_bits(b).is_finite());
            assert!(finite && outcome.valid.len() == 3, "a run worth comparing: {:?}", outcome.losses);
            outcome
        });
        let got = train(family, microbatch, recipe, &regime, &mut seen.borrow_mut());
        prop_assert!(got == *want, "other bits: {}", difference(&got, want).unwrap_or_default());
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let (references, seen) = (references.into_inner(), seen.into_inner());
    // All that a recipe says tells, or its runs would be the same for want of a difference.
    let all_train = || references.iter().filter(|(recipe, _)| recipe.frozen == 0);
    for (a, one) in all_train() {
        for (b, other) in all_train().filter(|(b, _)| *b > a) {
            assert!(one.tensors != other.tensors, "the same bits by {a:?} and {b:?}");
        }
    }
    assert!(seen.frozen.len() == family.frozen.len() && seen.idle.len() == 2 && seen.large.len() >= 2, "{seen:?}");
    // Decay of all, of matrices or of nothing; momentum, and Nesterov's; all else the same.
    let (&recipe, _) = all_train().next().expect("some recipe trains all");
    let outcomes = [0, 1, 2, 3, 4, 5].map(|optimizer| {
        let recipe = Recipe { optimizer, ..recipe };
        let train = || family.small.train(&recipe.options(family, microbatch)).expect("the unconstrained run");
        references.get(&recipe).cloned().unwrap_or_else(train).tensors
    });
    let distinct = |i: usize| outcomes[..i].iter().all(|other| *other != outcomes[i]);
    assert!((0..outcomes.len()).all(distinct), "two optimizers leave the same bits");
    seen
}

/// Dropout of all three kinds, a tied head whose logits are made in three parts, odd widths, labels left out.
#[test]
fn gpt_has_the_same_bits_however_it_is_run() {
    let small = Small::gpt(26, 2, 3, 19, 0.1);
    // All before a layer, the tied table too; parts between others; all but the last norm.
    let frozen = [
        &[][..],
        &["transformer.w", "transformer.h.0"],
        &["transformer.wpe", "transformer.h.1.attn"],
        &["transformer.w", "transformer.h"],
    ];
    let family = Family { small, loss_rows: Some(16), frozen };
    for (bf16, cases) in [(false, 90), (true, 60)] {
        let seen = check(&family, 2, bf16, cases);
        println!("{seen:?}");
        assert!(seen.shards.len() >= 5 && seen.resident.len() == 2, "{seen:?}");
        assert!(seen.activations_on_host.len() == 2 && seen.kept.len() == 2 && seen.resting.len() >= 3, "{seen:?}");
        assert!(seen.visiting_updates.len() >= 3, "{seen:?}");
    }
}

/// Grouped heads, rotary positions, a gated MLP, an untied head in five parts.
#[test]
fn llama_has_the_same_bits_however_it_is_run() {
    let small = Small::llama(20, 2, 3, 19);
    let frozen = [&[][..], &["model.embed"], &["lm_head", "model.layers.1"], &["model.layers"]];
    let family = Family { small, loss_rows: Some(8), frozen };
    for (bf16, cases) in [(false, 40), (true, 30)] {
        let seen = check(&family, 2, bf16, cases);
        println!("{seen:?}");
        assert!(seen.shards.len() >= 5 && seen.resident.len() == 2, "{seen:?}");
        assert!(seen.activations_on_host.len() == 2 && seen.kept.len() == 2 && seen.resting.len() >= 2, "{seen:?}");
        assert!(seen.visiting_updates.len() >= 2, "{seen:?}");
    }
}

/// Batch normalization: running statistics are state of a shard, and recomputation must not change them.
#[test]
fn resnet_has_the_same_bits_however_it_is_run() {
    let small = Small::resnet(&[6, 10], &[1, 2], [19, 17]);
    let frozen = [&[][..], &["resnet.embedder"], &["resnet.encoder.stages.1"], &["resnet"]];
    let family = Family { small, loss_rows: None, frozen };
    for (bf16, cases) in [(false, 60), (true, 40)] {
        let seen = check(&family, 3, bf16, cases);
        println!("{seen:?}");
        assert!(seen.shards.len() >= 4 && seen.resident.len() == 2, "{seen:?}");
        assert!(seen.activations_on_host.len() == 2 && seen.kept.len() == 2 && seen.resting.len() >= 3, "{seen:?}");
        assert!(seen.visiting_updates.len() >= 3, "{seen:?}");
    }
}

/// A loss over numbers, whose targets come like any other input.
#[test]
fn a_denoiser_has_the_same_bits_however_it_is_run() {
    let small = Small::denoiser(27, 4, 31);
    let frozen = [&[][..], &["block.0", "block.1"], &["block.2.up"], &["block"]];
    let family = Family { small, loss_rows: None, frozen };
    for (bf16, cases) in [(false, 40), (true, 30)] {
        let seen = check(&family, 2, bf16, cases);
        println!("{seen:?}");
        assert!(seen.shards.len() >= 4 && seen.resident.len() == 2, "{seen:?}");
        assert!(seen.activations_on_host.len() == 2 && seen.kept.len() == 2 && seen.resting.len() >= 3, "{seen:?}");
        assert!(seen.visiting_updates.len() >= 3, "{seen:?}");
    }
}

/// One number of threads against another, with products large enough to be split and widths that split badly.
#[test]
fn threads_do_not_show() {
    let check = |small: Small, microbatch: usize, bf16: bool| {
        let family = Family { small, loss_rows: None, frozen: [&[]; 4] };
        let recipe = Recipe { bf16, microbatches: 2, optimizer: 0, clip: true, cosine: false, frozen: 0 };
        let mut runs = Vec::new();
        for threads in [None, Some(1), Some(2), Some(3)] {
            let device = HostSpec { threads, ..HostSpec::default() }.into();
            let options = TrainOptions { steps: 2, device, ..recipe.options(&family, microbatch) };
            runs.push(family.small.train(&options).expect("a run"));
        }
        for run in &runs[1..] {
            assert_eq!(difference(run, &runs[0]), None);
        }
    };
    for bf16 in [false, true] {
        check(Small::gpt(129, 3, 1, 67, 0.1), 5, bf16);
        check(Small::llama(132, 6, 1, 67), 5, bf16);
        check(Small::resnet(&[33, 65], &[1, 1], [33, 31]), 5, bf16);
        check(Small::denoiser(130, 1, 1031), 5, bf16);
    }
}

/// Updates on the device of shards that are large enough to be updated piece by piece, the tied table's gradients too,
/// with room for all of a shard's state or for a few pieces.
#[test]
fn state_that_visits_in_pieces_does_not_show() {
    let family = Family { small: Small::gpt_of(18000, 512, 4, 1, 5, 0.0), loss_rows: None, frozen: [&[]; 4] };
    let small = &family.small;
    for (bf16, optimizer, clip) in [(false, 0, true), (false, 3, false), (true, 4, true)] {
        let recipe = Recipe { bf16, microbatches: 2, optimizer, clip, cosine: false, frozen: 0 };
        let options = TrainOptions { steps: 3, valid_every: 2, ..recipe.options(&family, 1) };
        let want = small.train(&options).expect("a run");
        let mut slots = BTreeSet::new();
        for part in [0.0, 1.0] {
            let mut options = options.clone();
            let layers = small.model(&options).layers();
            options.plan.cut = Some((0..layers).map(|l| l..l + 1).collect());
            (options.plan.resident, options.plan.resting) = (Some(false), Some(0));
            options.plan.visiting_updates = Some(layers);
            let most = small.plan(&options).expect("no budget").1;
            let least = most.smallest_device_bytes;
            options.plan.device_budget = Some(least + (part * (most.arena.bytes - least) as f64) as u64);
            let plan = small.plan(&options).expect("it fits").1;
            assert!(plan.choice.visiting_updates == layers && plan.pieces(0).len() > 3, "{:?}", plan.pieces(0));
            slots.insert(plan.arena.update_slots.len());
            assert_eq!(difference(&small.train(&options).expect("a run"), &want), None, "{recipe:?}, {part}");
        }
        // Plain SGD has no state: gradients of the shared table alone visit.
        assert_eq!(slots.len(), if optimizer == 3 { 1 } else { 2 }, "{recipe:?}: {slots:?}");
    }
}

#[test]
fn what_is_trained_beside_frozen_parameters_gets_the_same_gradients() {
    for (dtype, frozen) in [
        (DType::F32, ["transformer.wte", "transformer.h.0"]),
        (DType::Bf16, ["transformer.wpe", "transformer.h.1.attn"]),
        (DType::F32, ["transformer.w", "transformer.h"]),
    ] {
        let small = Small::gpt(26, 2, 3, 19, 0.1);
        let options = TrainOptions { seed: 3, batch: 4, microbatch: 2, dtype, ..TrainOptions::new(1) };
        small.check_frozen(&options, &frozen);
        let host_bytes = |options: &TrainOptions| small.plan(options).expect("a plan").1.host.bytes;
        let partly = TrainOptions { frozen: frozen.map(String::from).to_vec(), ..options.clone() };
        assert!(host_bytes(&partly) < host_bytes(&options), "frozen parameters have no moments");
    }
    let options = TrainOptions { seed: 3, batch: 4, microbatch: 2, ..TrainOptions::new(1) };
    Small::llama(20, 2, 3, 19).check_frozen(&options, &["model.layers.1.self_attn", "lm_head"]);
    Small::resnet(&[6, 10], &[1, 2], [19, 17]).check_frozen(&options, &["resnet.encoder.stages.1"]);
}

/// Adapters with dropout, beside weights of both types, whatever is cut, kept, computed again or on the disk.
#[test]
fn low_rank_adapters_have_the_same_bits_however_they_are_run() {
    let targets = ["c_attn", "c_fc", "c_proj"].map(String::from).to_vec();
    for dtype in [DType::F32, DType::Bf16] {
        let small = Small::gpt(26, 2, 3, 19, 0.1);
        let low_rank = Some(LowRank { rank: 3, alpha: 7.0, dropout: 0.2, targets: targets.clone() });
        let options = TrainOptions { seed: 3, batch: 4, microbatch: 2, dtype, low_rank, ..TrainOptions::new(3) };
        let options = TrainOptions { clip: Some(0.5), valid_every: 2, disk: Some(std::env::temp_dir()), ..options };
        let whole = small.train(&options).expect("a run");
        let fresh = small.session(small.plan(&options).expect("a plan"), &options).expect("a session");
        let mut before = Outcome::default();
        gather_of(fresh.engine(), 0, &mut before);
        for (name, bits) in before.tensors.iter().filter(|(name, _)| !name.contains(".moment")) {
            assert_eq!(bits != &whole.tensors[name], name.contains(".lora_"), "{name}");
        }
        let layers = small.model(&options).layers();
        let base = PlanOptions { resident: Some(false), ..PlanOptions::default() };
        let one_each = Some((0..layers).map(|l| l..l + 1).collect());
        let plans = [
            PlanOptions { cut: one_each.clone(), recompute: Recompute::Always, slots: 1, ..base.clone() },
            PlanOptions { cut: one_each, on_disk: Some(OnDisk::Weights), slots: 3, ..base.clone() },
            PlanOptions { visiting_updates: Some(2), boundaries_stay: Some(false), ..base.clone() },
            PlanOptions {
                device_budget: Some(small.plan(&options).expect("a plan").1.smallest_device_bytes),
                ..PlanOptions::default()
            },
        ];
        for plan in plans {
            let trained = small.train(&TrainOptions { plan: plan.clone(), ..options.clone() }).expect("a run");
            assert_eq!(difference(&trained, &whole), None, "{dtype} {plan:?}");
        }
    }
}

#[test]
fn a_name_that_freezes_nothing_is_refused_and_so_is_a_model_without_anything_to_train() {
    let small = Small::gpt(26, 2, 1, 19, 0.0);
    for (frozen, want) in [
        ("transformer.h.7", "frozen: the name of no parameter begins with transformer.h.7"),
        ("", "all parameters are frozen"),
    ] {
        let options = TrainOptions { frozen: vec![frozen.into()], ..TrainOptions::new(1) };
        let inputs = hydra::train::inputs_of(small.source(1, 0).as_ref());
        let refused = hydra::train::trace_model(small.network.as_ref(), &inputs, &options).expect_err("refused");
        assert!(refused.to_string().contains(want), "{refused}");
    }
}
