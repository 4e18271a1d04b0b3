//! An engine by a loop of one's own, a step at a time: what dropout drops, what clipping leaves, and what of its state
//! may be written and read when.

use super::common::small::{Driver, Small};
use super::common::{Outcome, difference, gather_of};
use super::{options, plain_sgd, session};
use hydra::base::{DType, IGNORED};
use hydra::data::{Batch, names};
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::device::{AdamwRule, SgdRule, UpdateRule};
use hydra::engine::{Engine, EngineOptions, StepInput, Stored};
use hydra::graph::{Activation, Builder, Init, Mode, WeightLayout};
use hydra::spill::{Model, Plan, PlanOptions, Updates};
use hydra::train::{TrainOptions, Weights};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

pub fn driver(small: &Small, options: &TrainOptions) -> Driver {
    let (model, plan): (Arc<Model>, Arc<Plan>) = small.plan(options).expect("a plan");
    let spec = HostSpec { arena_bytes: plan.arena.bytes, ..HostSpec::default() };
    let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, ..HostConfig::default() };
    Driver::new(small, (model, plan), Box::new(HostDevice::new(&config).expect("a device")), options)
}

/// The loss of a step on `samples`, as often as the minibatch has room for them.
fn loss_of(driver: &mut Driver, step: u64, samples: &Batch) -> u32 {
    let repeat = |batch: &mut Batch| {
        for (tensor, samples) in batch.tensors.iter_mut().zip(&samples.tensors) {
            let samples = samples.as_i32();
            tensor.as_i32_mut().chunks_exact_mut(samples.len()).for_each(|part| part.copy_from_slice(samples));
        }
    };
    driver.begin(step, repeat).expect("a step");
    driver.engine.wait_step(0).expect("its end").loss.to_bits()
}

/// Weights, moments and running statistics of an engine at rest.
pub fn state_of(engine: &Engine) -> Outcome {
    let mut outcome = Outcome::default();
    gather_of(engine, 0, &mut outcome);
    outcome
}

/// Writes them back.
pub fn write_state(engine: &mut Engine, state: &Outcome) {
    let (model, moments) = (Arc::clone(engine.model(0)), engine.plan(0).updates.moments);
    let values = |name: &str| -> Vec<f32> { state.tensors[name].iter().map(|&bits| f32::from_bits(bits)).collect() };
    for (i, p) in model.train.parameters.iter().enumerate() {
        engine.write_parameter(0, Stored::Weight, i, &values(&p.name)).expect("at rest");
        for m in 0..moments {
            let values = values(&format!("{}.moment{m}", p.name));
            engine.write_parameter(0, Stored::Moment(m), i, &values).expect("at rest");
        }
    }
    for (i, s) in model.train.states.iter().enumerate() {
        engine.write_state(0, i, &values(&s.name)).expect("at rest");
    }
}

/// By a learning rate of 0, on the same samples: all that is left to differ is what is dropped, and without dropout
/// nothing does.
#[test]
fn dropout_differs_by_step_microbatch_and_seed() {
    for dropout in [0.0, 0.5] {
        let small = Small::gpt(14, 2, 2, 9, dropout);
        let of = |seed: u64, batch: usize| {
            let optimizer = plain_sgd(0.0);
            driver(&small, &TrainOptions { seed, batch, microbatch: 2, optimizer, ..TrainOptions::new(7) })
        };
        let mut samples = Batch::default();
        small.source(2, 9).fill(0, &mut samples).expect("random data");
        let (mut one, mut twice, mut reseeded) = (of(1, 2), of(1, 4), of(2, 2));
        write_state(&mut reseeded.engine, &state_of(&one.engine));
        let first = loss_of(&mut one, 0, &samples);
        for (what, other) in [
            ("another step", loss_of(&mut one, 1, &samples)),
            ("a second microbatch", loss_of(&mut twice, 0, &samples)),
            ("another seed", loss_of(&mut reseeded, 0, &samples)),
        ] {
            assert_eq!(other != first, dropout > 0.0, "{what}, dropout {dropout}");
        }
        assert_eq!(loss_of(&mut of(1, 2), 0, &samples), first, "the same again");
    }
}

/// What was kept before the first step and is written back at rest trains to the same bits, wherever the steps between
/// have left their own.
#[test]
fn state_that_is_written_at_rest_is_gone_on_from() {
    let run = |driver: &mut Driver| {
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for step in 0..3 {
            driver.begin(step, |_| ()).expect("a step");
            let result = driver.engine.wait_step(0).expect("its end");
            losses.push(result.loss.to_bits());
            norms.push(result.grad_norm.to_bits());
        }
        let early = driver.engine.read_parameter(0, Stored::Weight, 0).expect_err("not at home").to_string();
        assert!(early.contains("steps were begun since it was at home; wait_home comes first"), "{early}");
        let values = vec![0.0; driver.engine.model(0).train.parameters[0].shape.elems()];
        let early = driver.engine.write_parameter(0, Stored::Weight, 0, &values).expect_err("not at home").to_string();
        assert!(early.contains("is written before the first step, or after wait_home"), "{early}");
        driver.engine.wait_home(0).expect("at rest");
        Outcome { losses, norms, ..state_of(&driver.engine) }
    };
    for (small, dtype) in
        [(Small::gpt(18, 2, 2, 9, 0.1), DType::Bf16), (Small::resnet(&[6, 9], &[1, 1], [13, 11]), DType::F32)]
    {
        for (resident, clip) in [(true, None), (false, None), (false, Some(0.5))] {
            let plan = PlanOptions { resident: Some(resident), ..PlanOptions::default() };
            let options = TrainOptions { seed: 5, batch: 4, microbatch: 2, dtype, clip, plan, ..TrainOptions::new(3) };
            let mut driver = driver(&small, &options);
            let first = state_of(&driver.engine);
            let want = run(&mut driver);
            assert!(want.tensors != first.tensors);
            write_state(&mut driver.engine, &first);
            assert_eq!(difference(&run(&mut driver), &want), None, "{dtype}, resident {resident}, clip {clip:?}");
        }
    }
}

/// By plain SGD at a learning rate of 1 a step moves the weights by the gradient itself, or what clipping leaves of it.
#[test]
fn clipping_scales_by_the_global_norm() {
    let small = Small::gpt(18, 2, 2, 9, 0.1);
    for resident in [true, false] {
        let of = |clip: Option<f64>| {
            let plan = PlanOptions { resident: Some(resident), ..PlanOptions::default() };
            let optimizer = plain_sgd(1.0);
            TrainOptions { seed: 5, batch: 4, microbatch: 2, optimizer, clip, plan, ..TrainOptions::new(1) }
        };
        let first = state_of(session(&small, &of(None)).engine());
        let moved = |after: &Outcome| {
            let value = |bits: u32| f64::from(f32::from_bits(bits));
            let elems = first.tensors.iter().flat_map(|(name, before)| before.iter().zip(&after.tensors[name]));
            elems.map(|(&before, &after)| (value(after) - value(before)).powi(2)).sum::<f64>().sqrt()
        };
        // Weights of about 1 are rounded to f32 when they have moved.
        let near =
            |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-4, "resident {resident}: {got}, not {want}");
        let free = small.train(&of(None)).expect("a run");
        let norm = f64::from_bits(free.norms[0]);
        near(moved(&free), norm);
        let clipped = small.train(&of(Some(norm / 4.0))).expect("a run");
        assert_eq!(clipped.norms, free.norms, "it is told as it was before");
        near(moved(&clipped), norm / 4.0);
        let far = small.train(&of(Some(1e9))).expect("a run");
        assert_eq!(difference(&far, &free), None, "resident {resident}: nothing to clip");
    }
}

/// Past every check of the data, as a loop of one's own may: kernels read by these numbers.
#[test]
fn ids_and_labels_beside_what_reads_them_are_refused() {
    let small = Small::gpt(14, 2, 2, 9, 0.0);
    let mut driver = driver(&small, &options(&small, DType::F32));
    for (name, value, want) in [
        (names::INPUT_IDS, 61, "input_ids: value 61 at (3, 8) is not in 0..61"),
        (names::INPUT_IDS, IGNORED, "input_ids: value -100 at (3, 8) is not in 0..61"),
        (names::LABELS, 61, "labels: value 61 at (3, 8) is not in 0..61, nor -100"),
        (names::LABELS, -1, "labels: value -1 at (3, 8) is not in 0..61, nor -100"),
    ] {
        let spoil = |batch: &mut Batch| {
            let tensor = batch.tensors.iter_mut().find(|t| t.name == name).expect("there");
            *tensor.as_i32_mut().last_mut().expect("elements") = value;
        };
        let error = driver.begin(0, spoil).expect_err("refused").to_string();
        assert_eq!(error, format!("step 0: {want}"));
        let inputs: Vec<&[u8]> = driver.batch.tensors.iter().map(|t| t.bytes()).collect();
        let error = driver.engine.wait_evaluation(0, &inputs, 1.0).expect_err("refused").to_string();
        assert_eq!(error, format!("evaluation: {want}"));
    }
    // Nothing has begun, and what is in range goes on.
    driver.begin(0, |_| ()).expect("in range");
    assert!(driver.engine.wait_step(0).expect("a step").loss.is_finite());
    assert!(driver.engine.read_state(0, 0).is_err() && driver.engine.write_state(0, 0, &[]).is_err());
}

/// What is ids in training is labels in evaluation, and the other way round: each is held to what reads it.
#[test]
fn an_evaluation_is_held_to_its_own_ranges() {
    let graph = |mode, ids_first: bool| {
        let mut b = Builder::new(mode, DType::F32);
        let [first, second] = ["first", "second"].map(|name| b.input(name, [6], DType::I32).expect("a new input"));
        let (ids, labels) = if ids_first { (first, second) } else { (second, first) };
        let logits = b.layer("layer", |b, _| {
            let table = b.parameter("table", [5, 8], Init::Constant(0.5))?;
            let weight = b.parameter("weight", [8, 50], Init::Constant(0.5))?;
            let x = b.embedding(ids, table)?;
            b.linear(x, weight, None, Activation::None, WeightLayout::InOut)
        });
        b.cross_entropy(logits.expect("a layer"), labels).expect("a loss");
        b.finish().expect("a graph")
    };
    let model = Model::new(graph(Mode::Training, true), Some(graph(Mode::Evaluation, false)), 1);
    let model = Arc::new(model.expect("one set of parameters"));
    let plan = Arc::new(Plan::new(&model, &PlanOptions::default(), &super::common::stated()).expect("a plan"));
    let spec = HostSpec { arena_bytes: plan.arena.bytes, ..HostSpec::default() };
    let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, ..HostConfig::default() };
    let device = Box::new(HostDevice::new(&config).expect("a device"));
    let mut engine = Engine::new(Arc::clone(&model), plan, device, EngineOptions::new(0, &model));
    Weights::Random.write(&mut engine, 0, 1).expect("nothing has begun");
    let (small, large) = ([4i32; 6], [49i32; 6]);
    let [small, large] = [&small, &large].map(|ids| bytemuck::cast_slice(ids));
    assert!(engine.wait_evaluation(0, &[large, small], 1.0).expect("in range").is_finite());
    let error = engine.wait_evaluation(0, &[small, large], 1.0).expect_err("beside the table").to_string();
    assert_eq!(error, "evaluation: second: value 49 at (0) is not in 0..5");
}

/// What a step would do to the weights without a word.
#[test]
fn numbers_of_a_step_that_cannot_be_meant_are_refused() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let mut driver = driver(&small, &options(&small, DType::F32));
    small.source(4, 5).fill(0, &mut driver.batch).expect("random data");
    let good = AdamwRule { update: 1, lr: 1e-3, betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.1 };
    let sgd = SgdRule { update: 1, lr: 0.1, momentum: 0.9, nesterov: false, weight_decay: 0.0 };
    let plain = || StepInput {
        step: 0,
        inputs: driver.batch.tensors.iter().map(|t| t.bytes()).collect(),
        loss_scale: 0.1,
        rule: UpdateRule::Adamw(good),
        clip: None,
    };
    let adamw = |rule| StepInput { rule: UpdateRule::Adamw(rule), ..plain() };
    let by_sgd = |rule| StepInput { rule: UpdateRule::Sgd(rule), ..plain() };
    let below_1 = "want a number from 0 up to, not including, 1";
    for (input, says) in [
        (StepInput { loss_scale: f64::NAN, ..plain() }, "loss_scale is NaN, want a number above 0".to_string()),
        (StepInput { loss_scale: 0.0, ..plain() }, "loss_scale is 0, want a number above 0".into()),
        (StepInput { clip: Some(f64::NAN), ..plain() }, "clip is NaN, want a number above 0, or none".into()),
        (StepInput { clip: Some(-1.0), ..plain() }, "clip is -1, want a number above 0, or none".into()),
        (StepInput { clip: Some(0.0), ..plain() }, "clip is 0, want a number above 0, or none".into()),
        (adamw(AdamwRule { update: 0, ..good }), "rule.update is 0, want 1 or more".into()),
        (adamw(AdamwRule { lr: f64::NAN, ..good }), "rule.lr is NaN, want 0 or more".into()),
        (adamw(AdamwRule { lr: -1.0, ..good }), "rule.lr is -1, want 0 or more".into()),
        (adamw(AdamwRule { epsilon: -1.0, ..good }), "rule.epsilon is -1, want 0 or more".into()),
        (adamw(AdamwRule { weight_decay: f64::INFINITY, ..good }), "rule.weight_decay is inf, want 0 or more".into()),
        (adamw(AdamwRule { betas: (0.9, 1.0), ..good }), format!("rule.betas.1 is 1, {below_1}")),
        (by_sgd(SgdRule { lr: f64::NAN, ..sgd }), "rule.lr is NaN, want 0 or more".into()),
        (by_sgd(SgdRule { momentum: 1.5, ..sgd }), format!("rule.momentum is 1.5, {below_1}")),
        (by_sgd(SgdRule { update: 0, ..sgd }), "rule.update is 0, want 1 or more".into()),
    ] {
        let error = driver.engine.begin_step(0, &input).expect_err("refused").to_string();
        assert_eq!(error, format!("step 0: {says}"));
    }
    for step in [u64::MAX, u64::MAX - 1, u64::MAX - 2] {
        let error = driver.engine.begin_step(0, &StepInput { step, ..plain() }).expect_err("refused").to_string();
        assert_eq!(error, format!("step {step}: is kept for evaluations and what belongs to no step"));
    }
    driver.begin(0, |_| ()).expect("nothing has begun");
    assert!(driver.engine.wait_step(0).expect("a step").loss.is_finite());
}

/// A model of an engine and a device of so many bytes less than the plan says.
fn short_of(model: Model, arena_less: u64, host_less: u64) -> Engine {
    let model = Arc::new(model);
    let plan =
        Plan::new(&model, &PlanOptions { updates: Updates::PLAIN, ..PlanOptions::default() }, &super::common::stated());
    let plan = Arc::new(plan.expect("a plan"));
    let spec = HostSpec { arena_bytes: plan.arena.bytes - arena_less, ..HostSpec::default() };
    let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes - host_less, ..HostConfig::default() };
    let options = EngineOptions::new(0, &model);
    Engine::new(model, plan, Box::new(HostDevice::new(&config).expect("a device")), options)
}

fn small_graph(mode: Mode) -> hydra::graph::Graph {
    let mut b = Builder::new(mode, DType::F32);
    let x = b.input("x", [3, 4], DType::F32).expect("a new input");
    let labels = b.input("labels", [3], DType::I32).expect("a new input");
    let logits = b.layer("layer", |b, _| {
        let weight = b.parameter("weight", [4, 5], Init::Constant(0.5))?;
        b.linear(x, weight, None, Activation::None, WeightLayout::InOut)
    });
    b.cross_entropy(logits.expect("a layer"), labels).expect("a loss");
    b.finish().expect("a graph")
}

#[test]
fn a_model_that_only_evaluates_takes_no_step() {
    let mut engine = short_of(Model::evaluation(small_graph(Mode::Evaluation)).expect("a layer"), 0, 0);
    Weights::Random.write(&mut engine, 0, 1).expect("nothing has begun");
    let (x, labels) = ([0.5f32; 12], [1i32; 3]);
    let inputs: Vec<&[u8]> = vec![bytemuck::cast_slice(&x), bytemuck::cast_slice(&labels)];
    let rule = plain_sgd(0.1).rule(0, 0.1);
    let step = StepInput { step: 0, inputs: inputs.clone(), loss_scale: 1.0, rule, clip: None };
    assert_eq!(engine.begin_step(0, &step).expect_err("refused").to_string(), "step 0: the model only evaluates");
    assert!(engine.wait_evaluation(0, &inputs, 1.0).expect("an evaluation").is_finite());
}

#[test]
fn a_device_that_is_too_small_for_the_plan_is_named() {
    let start = |arena_less, host_less| {
        let model = Model::new(small_graph(Mode::Training), None, 1).expect("a loss");
        let started = catch_unwind(AssertUnwindSafe(|| drop(short_of(model, arena_less, host_less))));
        started.map_err(|panic| panic.downcast_ref::<String>().expect("words").clone())
    };
    assert_eq!(start(0, 0), Ok(()));
    assert!(start(1, 0).expect_err("a panic").starts_with("the arena of device 0 has "));
    assert!(start(0, 1).expect_err("a panic").starts_with("the host's store has "));
}
