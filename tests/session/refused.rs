//! What a session refuses because it does not fit: data, options, plans, and what was begun behind its back.

use super::common::small::Small;
use super::common::stated;
use super::{options, plain_sgd, session};
use hydra::base::{DType, Error, Result, Shape};
use hydra::data::{Batch, InputSpec, Source, labelled, names};
use hydra::device::{DeviceSpec, FleetMemory, start_fleet};
use hydra::engine::StepInput;
use hydra::graph::{Activation, Builder, Graph, Init, Mode, WeightLayout};
use hydra::nn::{InputShape, Labels, Network};
use hydra::spill::{Placed, PlanOptions, Spread};
use hydra::train::{
    Fleet, ModelToTrain, Observer, Session, TrainOptions, Weights, batch_inputs, inputs_of, prepare, trace_model,
};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Numbers by name and axes, all 0.5 or class 0.
struct Plain(InputSpec);

impl Plain {
    fn of(batch: usize, tensors: &[(&str, DType, &[usize])]) -> Plain {
        let tensor = |&(name, dtype, axes): &(&str, DType, &[usize])| (name.to_string(), dtype, Shape::new(axes));
        Plain(InputSpec::new(tensors.iter().map(tensor).collect(), batch).expect("sizes above 0"))
    }
}

impl Source for Plain {
    fn spec(&self) -> &InputSpec {
        &self.0
    }

    fn fill(&mut self, _: u64, batch: &mut Batch) -> Result<()> {
        batch.conform(&self.0);
        batch.tensors.iter_mut().filter(|t| t.dtype == DType::F32).for_each(|t| t.as_f32_mut().fill(0.5));
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        2
    }
}

/// A regression from 4 numbers to 6, which says what it reads whatever it is asked for.
struct Stubborn;

impl Network for Stubborn {
    fn trace(&self, mode: Mode, float: DType, batch: usize, _: &[InputShape]) -> Result<Graph> {
        let mut b = Builder::new(mode, float);
        let x = b.input(names::PIXEL_VALUES, [batch, 4], float)?;
        let targets = b.input(names::LABELS, [batch, 6], float)?;
        let y = b.layer("layer", |b, _| {
            let weight = b.parameter("weight", [4, 6], Init::Constant(0.5))?;
            b.linear(x, weight, None, Activation::None, WeightLayout::InOut)
        })?;
        b.mean_squared_error(y, targets)?;
        b.finish()
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new(names::PIXEL_VALUES, [4], DType::F32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: false, classes: 1, vocab: None }
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

/// As many numbers under other axes have other rows, by which a loss is divided.
#[test]
fn a_network_that_reads_other_axes_than_the_data_have_is_refused() {
    let options = TrainOptions { batch: 4, microbatch: 2, ..TrainOptions::new(2) };
    let source = |labels| Plain::of(4, &[(names::PIXEL_VALUES, DType::F32, &[4]), (names::LABELS, DType::F32, labels)]);
    assert!(prepare(&Stubborn, &source(&[6]), &options, &stated()).is_ok());
    for (labels, found) in [(&[2, 3][..], "2x2x3"), (&[6, 1], "2x6x1"), (&[5], "2x5"), (&[], "2")] {
        let error = trace_model(&Stubborn, &inputs_of(&source(labels)), &options).expect_err("refused").to_string();
        assert_eq!(error, format!("input labels: the network reads 2x6 a microbatch, the data bring {found}"));
    }
    let unlabelled = Plain::of(4, &[(names::PIXEL_VALUES, DType::F32, &[4])]);
    let error = prepare(&Stubborn, &unlabelled, &options, &stated()).expect_err("refused").to_string();
    assert_eq!(error, "input labels: the network reads it, the data do not bring it");
}

#[test]
fn data_of_other_axes_than_the_model_was_planned_for_are_refused() {
    let small = Small::resnet(&[6], &[1], [8, 8]);
    let options = TrainOptions { batch: 4, microbatch: 2, ..TrainOptions::new(2) };
    let source = |axes| Plain::of(4, &[(names::PIXEL_VALUES, DType::F32, axes), (names::LABELS, DType::I32, &[])]);
    let says = |found| format!("pixel_values: is {found} in the batch, the model reads 2x3x8x8 a microbatch");
    let start = |axes| {
        let planned = small.plan(&options).expect("a plan");
        Session::new(Weights::Random, planned, Box::new(source(axes)), None, options.clone()).expect("a session")
    };
    let error = start(&[8, 8, 3]).wait_step().expect_err("refused");
    assert!(matches!(error, Error::BadInput(_)));
    assert_eq!(error.to_string(), says("4x8x8x3"));
    let mut session = start(&[3, 8, 8]);
    let error = session.wait_evaluation(&mut source(&[24, 8, 1])).expect_err("refused").to_string();
    assert_eq!(error, says("4x24x8x1"));
    assert!(session.wait_evaluation(&mut source(&[3, 8, 8])).expect("the model's").is_finite());
    // A type, or a shape, that the elements do not have.
    let mut batch = Batch::default();
    source(&[3, 8, 8]).fill(0, &mut batch).expect("numbers");
    batch.tensors[1].dtype = DType::F64;
    let graph = &session.engine().model(0).train;
    let error = batch_inputs(graph, &batch).expect_err("refused").to_string();
    assert_eq!(error, "labels: a minibatch holds f32 or i32, not f64");
    assert_eq!(labelled(&batch).expect_err("refused").to_string(), error);
}

#[test]
fn options_that_the_model_was_not_planned_with_are_refused() {
    let small = Small::gpt(14, 2, 2, 9, 0.0);
    let with = options(&small, DType::F32);
    let frozen = |start: &str| vec![start.to_string()];
    let refused = |of: &TrainOptions, options: &TrainOptions| {
        let planned = small.plan(of).expect("a plan");
        let started = Session::new(Weights::Random, planned, small.source(options.batch, 5), None, options.clone());
        started.expect_err("refused").to_string()
    };
    for (options, says) in [
        (TrainOptions { dtype: DType::Bf16, ..with.clone() }, "dtype is bf16, the model is f32"),
        (TrainOptions { microbatch: 4, ..with.clone() }, "microbatch is 4, input_ids is 2x9"),
        (TrainOptions { batch: 8, ..with.clone() }, "a batch has 4 microbatches, of the model 2"),
        (
            TrainOptions { frozen: frozen("transformer.wte"), ..with.clone() },
            "frozen is [\"transformer.wte\"], the model has transformer.wte.weight trained",
        ),
        (TrainOptions { optimizer: plain_sgd(0.1), ..with.clone() }, "the optimizer has 0 moments, the plan keeps 2"),
    ] {
        assert_eq!(refused(&with, &options), format!("the options are not those of the model: {says}"));
    }
    let partly = TrainOptions { frozen: frozen("transformer.wte"), ..with.clone() };
    assert!(refused(&partly, &with).ends_with("frozen is [], the model has transformer.wte.weight frozen"));
}

#[test]
fn a_plan_of_another_model_is_refused() {
    let [small, wide, deep] = [(14, 1), (18, 1), (14, 2)].map(|(width, layers)| Small::gpt(width, 2, layers, 9, 0.0));
    let options = TrainOptions { batch: 4, microbatch: 2, ..TrainOptions::new(2) };
    let (model, plan) = small.plan(&options).expect("a plan");
    for other in [&wide, &deep] {
        let (of_other, plan_of_other) = other.plan(&options).expect("a plan");
        for planned in [(model.clone(), plan_of_other), (of_other, plan.clone())] {
            let source = small.source(options.batch, 5);
            let error = Session::new(Weights::Random, planned, source, None, options.clone()).expect_err("refused");
            assert_eq!(error.to_string(), "the plan is of another model");
        }
    }
}

#[test]
fn a_session_crosses_to_no_other_device() {
    let small = Small::gpt(14, 2, 2, 9, 0.0);
    let options = TrainOptions { batch: 4, ..TrainOptions::new(2) };
    let crossing = PlanOptions { spread: Spread::Stages { pipelined: false }, ..PlanOptions::default() };
    let error = small.plan(&TrainOptions { plan: crossing.clone(), ..options.clone() }).expect_err("refused");
    assert_eq!(error.to_string(), "plan.spread: a model that has a device to itself spreads over no other");
    let model = small.model(&options);
    let plan = hydra::spill::Plan::new(&model, &crossing, &stated()).expect("a plan").into();
    let source = small.source(options.batch, 5);
    let error = Session::new(Weights::Random, (model, plan), source, None, options).expect_err("refused");
    assert_eq!(error.to_string(), "the plan crosses devices, and a session has one");
}

/// Begun with the engine, it is waited for there; then the session goes on.
#[test]
fn what_was_begun_by_hand_is_not_waited_for() {
    let small = Small::gpt(14, 2, 2, 9, 0.0);
    let options = TrainOptions { batch: 4, microbatch: 2, ..TrainOptions::new(3) };
    let mut batch = Batch::default();
    small.source(4, 5).fill(0, &mut batch).expect("random data");
    for evaluates in [false, true] {
        let mut session = session(&small, &options);
        let model = session.engine().model(0).clone();
        let inputs = batch_inputs(&model.train, &batch).expect("the model's");
        let rule = options.optimizer.rule(0, 0.0);
        let engine = session.engine_mut();
        if evaluates {
            engine.begin_evaluation(0, &inputs, 1.0).expect("nothing else has begun");
        } else {
            let input = StepInput { step: 0, inputs, loss_scale: 0.1, rule, clip: None };
            engine.begin_step(0, &input).expect("nothing else has begun");
        }
        let says = "1 steps or evaluations are in flight, of which 0 were begun here: who begins one with the engine \
                    waits for it there";
        assert_eq!(session.wait_step().expect_err("not its own").to_string(), says);
        assert_eq!(session.run(&mut (), &AtomicBool::new(false)).expect_err("not its own").to_string(), says);
        let held_out = session.wait_evaluation(small.held_out(4).as_mut());
        assert_eq!(held_out.expect_err("not its own").to_string(), says);
        match evaluates {
            true => drop(session.engine_mut().wait_begun_evaluation(0).expect("its end")),
            false => drop(session.engine_mut().wait_step(0).expect("its end")),
        }
        assert_eq!(session.wait_step().expect("its own").map(|report| report.result.step), Some(0));
    }
}

#[test]
fn weights_that_were_to_come_and_did_not_are_missed() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = options(&small, DType::F32);
    let later = || {
        let planned = small.plan(&options).expect("a plan");
        let source = small.source(options.batch, options.seed);
        Session::new(Weights::Later, planned, source, None, options.clone()).expect("a session")
    };
    let dir = tempfile::tempdir().expect("a folder");
    let says = "the weights were to come from a checkpoint, and none came";
    let mut session = later();
    assert_eq!(session.resume(&dir.path().join("none")).expect("nothing is there"), None);
    assert_eq!(session.wait_step().expect_err("no weights").to_string(), says);
    assert_eq!(later().run(&mut (), &AtomicBool::new(false)).expect_err("no weights").to_string(), says);
    let path = dir.path().join("checkpoint.safetensors");
    super::session(&small, &options).wait_checkpoint(&path).expect("written");
    let mut session = later();
    assert_eq!(session.resume(&path).expect("of this run"), Some(0));
    assert!(session.wait_step().expect("a step").is_some());
}

#[test]
fn a_file_beside_the_model_stays_in_its_directory() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = options(&small, DType::F32);
    let mut session = session(&small, &options);
    let dir = tempfile::tempdir().expect("a folder");
    let mut form = hydra::nn::Form::of(small.network.as_ref()).expect("a form");
    let inside = dir.path().join("model");
    for name in ["../escaped.txt", "..", "", "a/b", "/tmp/escaped.txt"] {
        form.files = vec![(name.to_string(), b"x".to_vec())];
        let error = session.wait_save(&inside, &form, Weights::Random).expect_err("refused").to_string();
        assert!(error.contains("is no plain file name"), "{error}");
        assert!(!inside.exists() && !Path::new(&dir.path().join("escaped.txt")).exists());
    }
    form.files = vec![("notes.txt".to_string(), b"x".to_vec())];
    session.wait_save(&inside, &form, Weights::Random).expect("saved");
    assert!(inside.join("notes.txt").exists());
}

/// A fleet of two on one device.
fn two(small: &Small, options: &TrainOptions, arenas: usize) -> Result<Fleet> {
    let placed: Vec<Placed> = (0..2)
        .map(|_| {
            let (model, plan) = small.plan(options).expect("a plan");
            Placed::alone(model, plan)
        })
        .collect();
    let map = hydra::spill::FleetMap::new(&placed, 1);
    let arena_bytes = map.arena_bytes.into_iter().cycle().take(arenas).collect();
    let memory = FleetMemory { arena_bytes, host_bytes: map.host_bytes, ..FleetMemory::default() };
    let device = start_fleet(&[DeviceSpec::default()], memory)?;
    let model = |placed| ModelToTrain {
        weights: Weights::Random,
        placed,
        source: small.source(options.batch, 5),
        valid: None,
        options: options.clone(),
    };
    Fleet::new(placed.into_iter().map(model).collect(), device, None)
}

#[test]
fn every_device_has_an_arena() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = TrainOptions { batch: 2, ..TrainOptions::new(1) };
    for arenas in [0, 2] {
        let error = two(&small, &options, arenas).expect_err("refused").to_string();
        assert_eq!(error, format!("1 devices, and arena_bytes of {arenas}"));
    }
    let fleet = two(&small, &options, 1).expect("a fleet");
    assert!(format!("{fleet:?}").starts_with("Fleet { engine: Engine { models: 2, devices: 1, failed: false, .. }"));
}

#[test]
#[should_panic(expected = "no observer of model 1, of 1")]
fn every_model_has_an_observer() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let mut fleet = two(&small, &TrainOptions { batch: 2, ..TrainOptions::new(1) }, 1).expect("a fleet");
    let mut observers: Vec<&mut dyn Observer> = Vec::new();
    let mut one = ();
    observers.push(&mut one);
    let _ = fleet.run(&mut observers, &AtomicBool::new(false));
}
