//! A model that ends before its time: its state is that of its last whole step, or cannot be read; and what may be
//! written while the steps after have begun.

use super::common::small::Small;
use super::common::{Outcome, difference, gather_of};
use super::driven::{driver, state_of, write_state};
use super::{options, plain_sgd};
use hydra::base::{DType, Error, Result};
use hydra::data::{Batch, InputSpec, Source, names};
use hydra::engine::{Ended, Engine, Stored};
use hydra::nn::{Form, open_own};
use hydra::spill::PlanOptions;
use hydra::train::{
    Observer, Schedule, Session, StepReport, TrainOptions, Weights, save_model, wait_forward, write_checkpoint,
};
use std::sync::atomic::AtomicBool;

/// Minibatch `at` is one of which no more can be read, or has an infinite pixel.
struct Faulty {
    source: Box<dyn Source>,
    at: u64,
    torn: bool,
}

impl Source for Faulty {
    fn spec(&self) -> &InputSpec {
        self.source.spec()
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        self.source.fill(index, batch)?;
        match self.torn {
            _ if index != self.at => {}
            true => return Err(Error::bad("torn")),
            false => batch.tensors.iter_mut().filter(|t| t.name == names::PIXEL_VALUES).for_each(|t| {
                t.as_f32_mut()[0] = f32::INFINITY;
            }),
        }
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        self.source.batches_per_epoch()
    }
}

/// Has had enough after so many steps, or of validations.
struct Enough {
    steps: u64,
    valid: bool,
    told: u64,
}

impl Observer for Enough {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.told = report.result.step + 1;
        if self.told >= self.steps { Err(Error::bad("enough")) } else { Ok(()) }
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        if self.valid { Err(Error::bad("enough")) } else { Ok(()) }
    }
}

/// What ends a model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Observer,
    ObserverOfValidation,
    Data,
    DataStepByStep,
    HeldOutData,
}

const ENDS: [End; 5] = [End::Observer, End::ObserverOfValidation, End::Data, End::DataStepByStep, End::HeldOutData];

/// A model that ends in the middle of nine steps, and why.
fn ended(small: &Small, options: &TrainOptions, end: End) -> (Session, Error) {
    let never = u64::MAX;
    let options = TrainOptions { valid_every: if end == End::Observer { 50 } else { 4 }, ..options.clone() };
    let torn = |source, at| Box::new(Faulty { source, at, torn: true });
    let data = matches!(end, End::Data | End::DataStepByStep);
    let source = torn(small.source(options.batch, options.seed), if data { 3 } else { never });
    // Of three minibatches the second, while the first is on its way.
    let valid = torn(small.held_out(options.batch), if end == End::HeldOutData { 1 } else { never });
    let planned = small.plan(&options).expect("a plan");
    let mut session = Session::new(Weights::Random, planned, source, Some(valid), options).expect("a session");
    if end == End::DataStepByStep {
        loop {
            match session.wait_step() {
                Ok(report) => assert!(report.is_some(), "it fails before its end"),
                Err(error) => return (session, error),
            }
        }
    }
    let steps = if end == End::Observer { 3 } else { never };
    let mut enough = Enough { steps, valid: end == End::ObserverOfValidation, told: 0 };
    let error = session.run(&mut enough, &AtomicBool::new(false)).expect_err("it has to end");
    let told = if end == End::Observer { 3 } else { session.steps_done() };
    assert_eq!(enough.told, told, "{end:?}");
    (session, error)
}

/// Plans to look under, with clipping and without.
fn plans() -> [(PlanOptions, Option<f64>); 5] {
    let of = |resident| PlanOptions { resident: Some(resident), ..PlanOptions::default() };
    let by_device = PlanOptions { visiting_updates: Some(usize::MAX), ..of(false) };
    [(of(true), None), (of(true), Some(0.1)), (of(false), None), (of(false), Some(0.1)), (by_device, Some(0.1))]
}

#[test]
fn what_its_observer_or_its_data_has_ended_is_saved_as_its_last_step_left_it() {
    let (gpt, resnet) = (Small::gpt(18, 2, 2, 9, 0.1), Small::resnet(&[6, 9], &[1, 1], [13, 11]));
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("checkpoint.safetensors");
    for (small, dtype) in [(&gpt, DType::F32), (&gpt, DType::Bf16), (&resnet, DType::F32)] {
        let tight = options(small, dtype).plan;
        for (plan, clip) in plans().into_iter().chain([(tight, Some(0.5))]) {
            let base = options(small, dtype);
            let options = TrainOptions { schedule: Schedule::Constant, steps: 9, plan, clip, ..base };
            let of_steps = |steps| small.train(&TrainOptions { steps, ..options.clone() }).expect("a run").tensors;
            let whole = [3, 4].map(of_steps);
            for end in ENDS {
                let what = format!("{end:?}, {dtype}, {:?}, clip {clip:?}", options.plan);
                let (mut session, error) = ended(small, &options, end);
                let why = if matches!(end, End::Observer | End::ObserverOfValidation) { "enough" } else { "torn" };
                assert_eq!(error.to_string(), why, "{what}");
                let said = session.wait_step().expect_err("it has failed").to_string();
                assert_eq!(said, format!("the model has failed before: {why}"), "{what}");
                // What its observer is not told has begun and ended.
                let done = if matches!(end, End::Data | End::DataStepByStep) { 3 } else { 4 };
                assert_eq!(session.steps_done(), done, "{what}");
                session.wait_checkpoint(&path).unwrap_or_else(|error| panic!("{what}: {error}"));
                let mut left = Outcome::default();
                gather_of(session.engine(), 0, &mut left);
                assert!(left.tensors == whole[done as usize - 3], "{what}");
                let mut other = super::session(small, &TrainOptions { valid_every: 50, ..options.clone() });
                assert_eq!(other.resume(&path).expect("of this run"), Some(done), "{what}");
            }
        }
    }
    // And the model itself, after which nothing is stale that the engine gives by itself.
    let options = options(&gpt, DType::F32);
    let (mut session, _) = ended(&gpt, &options, End::Observer);
    let form = Form::of(gpt.network.as_ref()).expect("a form");
    let early =
        save_model(dir.path(), &form, (session.engine(), 0), Weights::Random, None, 4).expect_err("not at home");
    assert!(early.to_string().contains("wait_home comes first"), "{early}");
    session.wait_save(dir.path(), &form, Weights::Random).expect("saved");
    let saved = open_own(dir.path(), Small::gpt(18, 2, 2, 9, 0.1).network).expect("its own tensors");
    let mut batch = Batch::default();
    gpt.source(2, 77).fill(0, &mut batch).expect("random data");
    let of_saved = wait_forward(gpt.network.as_ref(), Weights::Pretrained(&saved), &batch).expect("logits");
    assert!(session.wait_forward(gpt.network.as_ref(), &batch).expect("logits") == of_saved);
}

/// Weights are those of the last good step; running statistics are those of no step, and there is no checkpoint.
#[test]
fn what_is_not_finite_leaves_the_step_before_it_or_cannot_be_read() {
    let small = Small::resnet(&[6, 9], &[1, 1], [13, 11]);
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("checkpoint.safetensors");
    let options = TrainOptions { schedule: Schedule::Constant, ..options(&small, DType::F32) };
    let source = Faulty { source: small.source(options.batch, options.seed), at: 3, torn: false };
    let planned = small.plan(&options).expect("a plan");
    let mut session =
        Session::new(Weights::Random, planned, Box::new(source), None, options.clone()).expect("a session");
    let error = session.run(&mut (), &AtomicBool::new(false)).expect_err("a pixel is infinite");
    assert!(matches!(error, Error::NotFinite { step: 3, .. }) && session.steps_done() == 3, "{error}");
    let early = session.engine().read_parameter(0, Stored::Weight, 0).expect_err("not at home").to_string();
    assert!(early.contains("wait_home comes first"), "{early}");
    let early = write_checkpoint(&path, session.engine(), 0, &options, 3).expect_err("not at home").to_string();
    assert!(early.contains("wait_home comes first"), "{early}");
    session.engine_mut().wait_home(0).expect("weights are whole");
    let want = small.train(&TrainOptions { steps: 3, ..options }).expect("a run").tensors;
    for (i, parameter) in session.engine().model(0).train.parameters.iter().enumerate() {
        let values = session.engine().read_parameter(0, Stored::Weight, i).expect("at home");
        assert!(values.iter().map(|x| x.to_bits()).eq(want[&parameter.name].iter().copied()), "{}", parameter.name);
    }
    let says = "the step whose loss is not finite has changed it";
    let states = session.engine().read_state(0, 0).expect_err("changed").to_string();
    assert!(states.contains(says), "{states}");
    let refused = session.wait_checkpoint(&path).expect_err("states are of no step").to_string();
    assert!(refused.contains(says) && !path.exists(), "{refused}");
    let mut batch = Batch::default();
    small.source(2, 77).fill(0, &mut batch).expect("random data");
    let refused = session.wait_forward(small.network.as_ref(), &batch).expect_err("states are of no step").to_string();
    assert!(refused.contains(says), "{refused}");

    // Of a model without running statistics all of it is left.
    let small = Small::gpt(14, 2, 2, 9, 0.1);
    let options = TrainOptions {
        optimizer: plain_sgd(1e30),
        clip: None,
        schedule: Schedule::Constant,
        ..super::options(&small, DType::F32)
    };
    let mut session = super::session(&small, &options);
    session.run(&mut (), &AtomicBool::new(false)).expect_err("the rate is too large");
    session.wait_checkpoint(&path).expect("written");
    let want = small.train(&TrainOptions { steps: session.steps_done(), ..options }).expect("a run").tensors;
    assert!(state_of(session.engine()).tensors == want);
}

#[test]
fn one_that_is_cancelled_in_the_middle_of_a_step_cannot_be_read() {
    let small = Small::gpt(18, 2, 2, 9, 0.1);
    for (plan, clip) in plans() {
        let what = format!("{plan:?}, clip {clip:?}");
        let options = TrainOptions { seed: 5, batch: 4, microbatch: 2, plan, clip, ..TrainOptions::new(3) };
        let begun = || {
            let mut driver = driver(&small, &options);
            driver.begin(0, |_| ()).expect("a step");
            driver.engine.wait_step(0).expect("its end");
            driver.begin(1, |_| ()).expect("a step");
            driver
        };
        let told = |engine: &mut Engine| {
            let untold = engine.wait_home(0).expect_err("not told").to_string();
            assert!(untold.contains("wait_step tells why"), "{what}: {untold}");
            let ended = engine.wait_any().expect("an end");
            assert!(matches!(ended, Ended::Model(0, Error::Cancelled)), "{what}: {ended:?}");
        };
        let mut middle = begun();
        middle.engine.cancel(0).expect("no device fails");
        told(&mut middle.engine);
        for error in [
            middle.engine.wait_home(0).expect_err("of no step"),
            middle.engine.read_parameter(0, Stored::Weight, 0).expect_err("of no step"),
        ] {
            assert!(error.to_string().contains("in the middle of a step"), "{what}: {error}");
        }
        // At rest the step is whole, though its updates may wait for the next one.
        let mut rests = begun();
        rests.engine.wait_step(0).expect("its end");
        rests.engine.cancel(0).expect("no device fails");
        told(&mut rests.engine);
        let early = rests.engine.read_parameter(0, Stored::Weight, 0).expect_err("not at home").to_string();
        assert!(early.contains("wait_home comes first"), "{what}: {early}");
        rests.engine.wait_home(0).expect("it is whole");
        let mut want = begun();
        want.engine.wait_step(0).expect("its end");
        want.engine.wait_home(0).expect("at rest");
        assert_eq!(difference(&state_of(&rests.engine), &state_of(&want.engine)), None, "{what}");
    }
}

/// A session has begun the step after the one it told of: with that at home too, what is written then is what the next
/// one begins with.
#[test]
fn state_is_written_though_a_step_is_still_to_be_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("checkpoint.safetensors");
    let rest = |session: &mut Session| {
        let mut got = Outcome::default();
        while let Some(report) = session.wait_step().expect("a step") {
            if report.result.step >= 4 {
                super::note(&mut got, &report);
            }
        }
        session.engine_mut().wait_home(0).expect("at rest");
        got.tensors = state_of(session.engine()).tensors;
        got
    };
    let small = Small::resnet(&[6, 9], &[1, 1], [13, 11]);
    for (plan, clip) in plans() {
        let what = format!("{plan:?}, clip {clip:?}");
        let options = TrainOptions { plan, clip, ..options(&small, DType::F32) };
        let mut session = super::session(&small, &options);
        let first = state_of(session.engine());
        write_checkpoint(&path, session.engine(), 0, &options, 4).expect("written");
        for _ in 0..3 {
            session.wait_step().expect("a step");
        }
        let early = session.engine_mut().write_parameter(0, Stored::Weight, 0, &[]).expect_err("no elements");
        assert!(early.to_string().contains("0 elements"), "{what}: {early}");
        session.engine_mut().wait_home(0).expect("at rest");
        write_state(session.engine_mut(), &first);
        let got = rest(&mut session);
        let mut other = super::session(&small, &options);
        assert_eq!(other.resume(&path).expect("of this run"), Some(4));
        assert_eq!(difference(&got, &rest(&mut other)), None, "{what}");
    }
}

/// Nobody waits for what cannot come.
#[test]
fn a_wait_with_nothing_in_flight_is_over_at_once() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let mut driver = driver(&small, &options(&small, DType::F32));
    assert_eq!(driver.engine.wait_any().expect_err("nothing has begun").to_string(), "nothing is in flight");
    driver.begin(0, |_| ()).expect("and nothing has failed");
    assert!(matches!(driver.engine.wait_any().expect("an end"), Ended::Step(0, _)));
}
