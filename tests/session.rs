//! A session step by step: the bits of one that runs through, whatever is asked of it in between; and what it refuses.

mod common;
#[path = "session/driven.rs"]
mod driven;
#[path = "session/ended.rs"]
mod ended;
#[path = "session/predicted.rs"]
mod predicted;
#[path = "session/refused.rs"]
mod refused;

use common::small::Small;
use common::{Outcome, difference, gather, gather_of};
use hydra::base::{DType, Error, IGNORED, Result, Shape};
use hydra::data::{Batch, InputSpec, Source, names};
use hydra::engine::Engine;
use hydra::nn::{self, Form};
use hydra::spill::PlanOptions;
use hydra::train::{Fleet, Observer, Optimizer, Schedule, Session, StepReport, TrainOptions, Weights};
use std::sync::atomic::AtomicBool;

/// Under a budget at which every shard is on its way.
fn options(small: &Small, dtype: DType) -> TrainOptions {
    let schedule = Schedule::Cosine { warmup: 2, min_lr: 1e-4 };
    let free =
        TrainOptions { seed: 5, batch: 4, microbatch: 2, clip: Some(0.5), schedule, dtype, ..TrainOptions::new(7) };
    let device_budget = Some(small.plan(&free).expect("a plan").1.smallest_device_bytes);
    TrainOptions { plan: PlanOptions { device_budget, ..PlanOptions::default() }, valid_every: 50, ..free }
}

/// Weights move by the gradient times `lr`, and by nothing else.
fn plain_sgd(lr: f64) -> Optimizer {
    Optimizer::Sgd { lr, momentum: 0.0, nesterov: false, weight_decay: 0.0 }
}

fn session(small: &Small, options: &TrainOptions) -> Session {
    small.session(small.plan(options).expect("a plan"), options).expect("a session")
}

fn note(outcome: &mut Outcome, report: &StepReport) {
    outcome.losses.push(report.result.loss.to_bits());
    outcome.norms.push(report.result.grad_norm.to_bits());
}

#[test]
fn steps_one_by_one_have_the_bits_of_a_run() {
    for (small, dtype) in
        [(Small::gpt(18, 2, 2, 9, 0.1), DType::F32), (Small::resnet(&[6, 9], &[1, 1], [13, 11]), DType::Bf16)]
    {
        let options = options(&small, dtype);
        let want = small.train(&options).expect("a run");
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("checkpoint.safetensors");
        let mut got = Outcome::default();

        let mut one = session(&small, &options);
        assert_eq!(one.resume(&path).expect("nothing is there"), None);
        let mut rates = Vec::new();
        for _ in 0..2 {
            let report = one.wait_step().expect("a step").expect("of seven");
            note(&mut got, &report);
            rates.push(report.lr);
        }
        assert_eq!(rates, [0, 1].map(|step| options.schedule.lr(options.optimizer.lr(), step, 7)));
        // A step has begun that nobody was told of: it ends first, and is told afterwards.
        let valid = one.wait_evaluation(small.held_out(options.batch).as_mut()).expect("an evaluation");
        assert_eq!((one.steps_done(), valid.is_finite()), (3, true));
        one.wait_checkpoint(&path).expect("written");
        note(&mut got, &one.wait_step().expect("told").expect("the third"));
        assert!(one.resume(&path).is_err_and(|error| error.to_string().contains("has begun already")));
        assert_eq!(one.steps_done(), 3);
        drop(one);

        let mut other = session(&small, &options);
        assert_eq!(other.resume(&path).expect("of this run"), Some(3));
        let again = other.wait_evaluation(small.held_out(options.batch).as_mut()).expect("an evaluation");
        assert_eq!(again.to_bits(), valid.to_bits());
        note(&mut got, &other.wait_step().expect("a step").expect("the fourth"));
        // The rest runs through; what has begun is told first.
        other.wait_evaluation(small.held_out(options.batch).as_mut()).expect("an evaluation");
        struct Rest<'a>(&'a mut Outcome);
        impl Observer for Rest<'_> {
            fn step(&mut self, report: &StepReport) -> Result<()> {
                note(self.0, report);
                Ok(())
            }
            fn valid(&mut self, _: u64, loss: f32, _: f64) -> Result<()> {
                self.0.valid.push(loss.to_bits());
                Ok(())
            }
        }
        other.run(&mut Rest(&mut got), &AtomicBool::new(false)).expect("a run");
        assert!(other.wait_step().expect("no failure").is_none());
        gather(other.engine(), &mut got);
        assert_eq!(difference(&got, &want), None);

        if dtype == DType::F32 {
            let form = Form::of(small.network.as_ref()).expect("a form");
            other.wait_save(dir.path(), &form, Weights::Random).expect("saved");
            let saved = nn::open(dir.path()).expect("a model");
            for (name, shape) in nn::tensors(saved.network.as_ref()).expect("a network") {
                let bits: Vec<u32> =
                    saved.tensor(&name, &shape).expect("there").into_iter().map(f32::to_bits).collect();
                assert!(got.tensors.iter().any(|(of, have)| of.ends_with(&name) && *have == bits), "{name}");
            }
        }
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = TrainOptions { schedule: Schedule::Constant, ..options(&small, DType::F32) };
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("checkpoint.safetensors");
    session(&small, &options).wait_checkpoint(&path).expect("written");
    for (other, says) in [
        (TrainOptions { seed: 6, ..options.clone() }, "seed is 5 in the checkpoint, 6 in the job"),
        (TrainOptions { microbatch: 1, ..options.clone() }, "microbatch is 2 in the checkpoint, 1 in the job"),
        (TrainOptions { optimizer: plain_sgd(0.1), ..options.clone() }, "optimizer.kind is adamw in the checkpoint"),
    ] {
        let mut session = session(&small, &other);
        let error = session.resume(&path).expect_err(says).to_string();
        assert!(error.contains(&path.display().to_string()) && error.contains(says), "{error}");
        assert_eq!(session.steps_done(), 0);
    }
    assert_eq!(session(&small, &options).resume(&path).expect("of this run"), Some(0));
}

#[test]
fn weights_that_are_given_are_begun_with_and_the_rest_is_drawn() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = options(&small, DType::F32);
    let given = |name: &str, shape: &Shape| -> Result<Option<Vec<f32>>> {
        Ok(name.ends_with("wpe.weight").then(|| (0..shape.elems()).map(|i| i as f32).collect()))
    };
    let first = |weights: Weights| {
        let source = small.source(options.batch, options.seed);
        let planned = small.plan(&options).expect("a plan");
        let session = Session::new(weights, planned, source, None, options.clone()).expect("a session");
        let mut outcome = Outcome::default();
        gather_of(session.engine(), 0, &mut outcome);
        outcome.tensors
    };
    let (mut want, got) = (first(Weights::Random), first(Weights::Given(&given)));
    let table = want.get_mut("transformer.wpe.weight").expect("a table of positions");
    *table = (0..table.len()).map(|i| (i as f32).to_bits()).collect();
    assert!(got == want);
}

/// Wrong names everywhere must not train from noise in silence.
#[test]
fn weights_of_which_none_is_given_are_refused() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = options(&small, DType::F32);
    let asked = std::cell::Cell::new(0);
    let none = |_: &str, _: &Shape| {
        asked.set(asked.get() + 1);
        Ok(None)
    };
    let source = small.source(options.batch, options.seed);
    let planned = small.plan(&options).expect("a plan");
    let Err(error) = Session::new(Weights::Given(&none), planned, source, None, options) else { panic!("it trains") };
    let said = error.to_string();
    assert!(matches!(error, Error::BadInput(_)), "{said}");
    assert!(said.contains(&format!("{} names", asked.get())) && said.contains("transformer.wte.weight"), "{said}");
}

/// In bf16 the engine keeps no lower half of what it does not train; the directory has it all the same.
#[test]
fn frozen_weights_of_a_bf16_model_are_saved_as_they_were() {
    let case = common::Case::open("gpt2");
    let frozen = vec!["transformer.wte".to_string(), "transformer.h.0.".to_string()];
    let options = TrainOptions { dtype: DType::Bf16, frozen, ..case.options() };
    let planned = case.plan(&options).expect("a plan");
    let first = Weights::Pretrained(&case.pretrained);
    let mut session = Session::new(first, planned, case.source(), None, options.clone()).expect("a session");
    session.run(&mut (), &AtomicBool::new(false)).expect("a run");
    let dir = tempfile::tempdir().expect("a folder");
    session.wait_save(dir.path(), &case.pretrained.form, first).expect("saved");
    let saved = nn::open(dir.path()).expect("a model");
    let (mut kept, mut changed) = (0, 0);
    for (name, shape) in nn::tensors(saved.network.as_ref()).expect("a network") {
        let [now, before] = [&saved, &case.pretrained].map(|of| of.tensor(&name, &shape).expect("there"));
        let is_frozen = options.frozen.iter().any(|start| name.starts_with(start));
        assert_eq!(now == before, is_frozen, "{name}");
        *(if is_frozen { &mut kept } else { &mut changed }) += 1;
    }
    assert!(kept > 2 && changed > 2, "{kept} kept, {changed} changed");
}

/// All steps by [`Session::wait_step`] and then a run, which has only the end to do.
#[test]
fn a_run_after_the_last_step_validates_and_ends() {
    let small = Small::gpt(18, 2, 1, 9, 0.0);
    let options = options(&small, DType::F32);
    let mut session = session(&small, &options);
    let mut steps = 0;
    while let Some(report) = session.wait_step().expect("a step") {
        assert_eq!(report.result.step, steps);
        steps += 1;
    }
    assert_eq!(steps, options.steps);
    let mut collect = common::Collect::default();
    session.run(&mut collect, &AtomicBool::new(false)).expect("the end");
    assert_eq!((collect.0.losses.len(), collect.0.valid.len()), (0, 1));
    // Asked for, it is the same; of two minibatches in flight neither is forgotten.
    let mut held_out = small.held_out(options.batch);
    assert!(held_out.batches_per_epoch() > 2);
    let valid = session.wait_evaluation(held_out.as_mut()).expect("an evaluation");
    assert_eq!(valid.to_bits(), collect.0.valid[0]);
}

/// What is due is due, whoever begins the steps: a validation that a resumed run owes waits for none, and one at a step
/// that was begun by hand is made. So it is with one that the observer wants, where it was asked.
#[test]
fn steps_by_hand_and_a_run_after_them_validate_when_it_is_due() {
    #[derive(Default)]
    struct Dues {
        steps: Vec<u64>,
        valid: Vec<u64>,
        /// After so many steps it wants one beside those that are due anyway.
        wants: Option<u64>,
    }
    impl Observer for Dues {
        fn step(&mut self, report: &StepReport) -> Result<()> {
            self.steps.push(report.result.step);
            Ok(())
        }
        fn valid(&mut self, step: u64, _: f32, _: f64) -> Result<()> {
            self.valid.push(step);
            Ok(())
        }
        fn wants_rest(&mut self, step: u64) -> bool {
            self.wants == Some(step)
        }
    }
    let small = Small::gpt(18, 2, 1, 9, 0.0);
    let options = TrainOptions { valid_every: 2, ..options(&small, DType::F32) };
    let go = AtomicBool::new(false);
    for (wants, want) in [(None, &[2, 4, 6, 7][..]), (Some(5), &[2, 4, 5, 6, 7])] {
        let mut fresh = session(&small, &options);
        fresh.wait_step().expect("a step");
        let mut dues = Dues { wants, ..Dues::default() };
        fresh.run(&mut dues, &go).expect("a run");
        assert_eq!(dues.valid, want);
    }

    let dir = tempfile::tempdir().expect("a folder");
    for done in [1, 2, 3] {
        let path = dir.path().join(format!("{done}.safetensors"));
        let mut first = session(&small, &TrainOptions { steps: done, schedule: Schedule::Constant, ..options.clone() });
        first.run(&mut (), &go).expect("a run");
        first.wait_checkpoint(&path).expect("written");
        for by_hand in [0, 1, 2] {
            let options = TrainOptions { schedule: Schedule::Constant, ..options.clone() };
            let mut second = session(&small, &options);
            assert_eq!(second.resume(&path).expect("of this run"), Some(done));
            for _ in 0..by_hand {
                second.wait_step().expect("a step").expect("of seven");
            }
            let mut dues = Dues { wants: (by_hand == 0).then_some(3), ..Dues::default() };
            second.run(&mut dues, &go).expect("a run");
            assert_eq!(dues.steps, (done + by_hand..7).collect::<Vec<u64>>());
            // By hand one step more has begun than was told.
            let begun = if by_hand == 0 { done } else { done + by_hand + 1 };
            let is_due = |step: u64| step.is_multiple_of(2) || step == 7 || dues.wants == Some(step);
            let want: Vec<u64> = (begun..8).filter(|&step| is_due(step)).collect();
            assert_eq!(dues.valid, want, "{by_hand} by hand after {done}");
        }
    }
}

/// Ended by its first validation, at which nothing has come home yet, it is saved with all that it has learnt.
#[test]
fn one_that_a_validation_ends_is_at_home_for_its_end() {
    #[derive(Default)]
    struct Enough {
        valid: usize,
        offered: Vec<u64>,
        ended: Option<Outcome>,
    }
    impl Observer for Enough {
        fn step(&mut self, _: &StepReport) -> Result<()> {
            Ok(())
        }
        fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
            self.valid += 1;
            Ok(())
        }
        fn wants_end(&mut self) -> bool {
            self.valid > 0
        }
        fn checkpoint(&mut self, step: u64, _: &Engine, _: usize) -> Result<()> {
            self.offered.push(step);
            Ok(())
        }
        fn ended(&mut self, engine: &Engine, _: usize) -> Result<()> {
            let mut outcome = Outcome::default();
            gather(engine, &mut outcome);
            self.ended = Some(outcome);
            Ok(())
        }
    }
    let small = Small::gpt(18, 2, 2, 9, 0.1);
    for resident in [true, false] {
        let plan = PlanOptions { resident: Some(resident), ..PlanOptions::default() };
        let short = TrainOptions { steps: 3, schedule: Schedule::Constant, plan, ..options(&small, DType::F32) };
        let mut want = small.train(&short).expect("a run");
        (want.losses, want.norms, want.valid) = Default::default();
        let mut enough = Enough::default();
        let long = TrainOptions { steps: 9, valid_every: 3, ..short };
        session(&small, &long).run(&mut enough, &AtomicBool::new(false)).expect("an end");
        assert_eq!(enough.offered, [3]);
        assert_eq!(difference(&enough.ended.expect("told of its end"), &want), None, "resident {resident}");
    }
}

#[test]
fn an_observer_may_set_the_learning_rate() {
    /// From step 3 on a part of what is scheduled.
    struct Part {
        part: f64,
        seen: Vec<f64>,
    }
    impl Observer for Part {
        fn step(&mut self, report: &StepReport) -> Result<()> {
            self.seen.push(report.lr);
            Ok(())
        }
        fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
            Ok(())
        }
        fn lr(&mut self, step: u64, scheduled: f64) -> f64 {
            if step < 3 { scheduled } else { self.part * scheduled }
        }
    }
    let small = Small::gpt(18, 2, 1, 9, 0.0);
    let with_schedule = options(&small, DType::F32);
    let without = TrainOptions { optimizer: plain_sgd(0.5), schedule: Schedule::Constant, ..with_schedule.clone() };
    for (options, part) in [(&with_schedule, 0.5), (&without, 0.0)] {
        let mut observer = Part { part, seen: Vec::new() };
        let mut session = session(&small, options);
        session.run(&mut observer, &AtomicBool::new(false)).expect("a run");
        let of = |step| options.schedule.lr(options.optimizer.lr(), step, 7) * if step < 3 { 1.0 } else { part };
        assert_eq!(observer.seen, (0..7).map(of).collect::<Vec<f64>>());
        // What is told is what was done: by 0 nothing is learnt any more.
        if part == 0.0 {
            let mut got = Outcome::default();
            gather(session.engine(), &mut got);
            let of_three = small.train(&TrainOptions { steps: 3, ..options.clone() }).expect("a run");
            assert!(got.tensors == of_three.tensors);
        }
    }
    struct Lost;
    impl Observer for Lost {
        fn step(&mut self, _: &StepReport) -> Result<()> {
            Ok(())
        }
        fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
            Ok(())
        }
        fn lr(&mut self, _: u64, _: f64) -> f64 {
            f64::NAN
        }
    }
    let lost = session(&small, &with_schedule).run(&mut Lost, &AtomicBool::new(false));
    assert_eq!(lost.expect_err("no rate").to_string(), "step 0: the learning rate is NaN, want 0 or more");
}

#[test]
fn a_session_that_has_failed_stays_so() {
    let small = Small::gpt(14, 2, 2, 9, 0.1);
    let options = TrainOptions {
        optimizer: plain_sgd(1e30),
        clip: None,
        schedule: Schedule::Constant,
        ..options(&small, DType::F32)
    };
    let mut session = session(&small, &options);
    let error = session.run(&mut (), &AtomicBool::new(false)).expect_err("no weights are left to train");
    let Error::NotFinite { step, loss, layer } = &error else { panic!("{error}") };
    assert!(*step <= 2 && !loss.is_finite() && layer.is_some(), "{error}");
    for again in [
        session.run(&mut (), &AtomicBool::new(false)),
        session.wait_step().map(drop),
        session.wait_evaluation(small.held_out(options.batch).as_mut()).map(drop),
    ] {
        assert_eq!(again.expect_err("it has failed").to_string(), format!("the model has failed before: {error}"));
    }
}

/// Nothing in it has a label.
struct Unlabelled(Box<dyn Source>);

impl Source for Unlabelled {
    fn spec(&self) -> &InputSpec {
        self.0.spec()
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        self.0.fill(index, batch)?;
        batch.tensors.iter_mut().filter(|t| t.name == names::LABELS).for_each(|t| t.as_i32_mut().fill(IGNORED));
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        self.0.batches_per_epoch()
    }
}

#[test]
fn held_out_data_without_a_label_has_no_loss() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = options(&small, DType::F32);
    let says = "no position of the held-out data has a label";
    let valid = || Box::new(Unlabelled(small.held_out(options.batch)));
    let planned = small.plan(&options).expect("a plan");
    let source = small.source(options.batch, options.seed);
    let mut session =
        Session::new(Weights::Random, planned, source, Some(valid()), options.clone()).expect("a session");
    assert_eq!(session.wait_evaluation(valid().as_mut()).expect_err("no loss").to_string(), says);
    let message = session.wait_evaluation(small.source(options.batch, 1).as_mut()).expect_err("no end").to_string();
    assert_eq!(message, "held-out data without an end: a validation would have none");
    // Neither has hurt the model; its own held-out data does.
    assert!(session.wait_evaluation(small.held_out(options.batch).as_mut()).expect("labels").is_finite());
    assert_eq!(session.run(&mut (), &AtomicBool::new(false)).expect_err("no loss").to_string(), says);
}

#[test]
fn absurd_options_are_refused() {
    let good = TrainOptions::new(1);
    assert!(good.check().is_ok());
    let data = |key| vec![(key, "v2".to_string())];
    for (options, says) in [
        (TrainOptions { batch: 6, microbatch: 4, ..good.clone() }, "microbatch 4 does not divide batch 6"),
        (TrainOptions { clip: Some(-1.0), ..good.clone() }, "clip is -1, want a number above 0, or none"),
        (TrainOptions { clip: Some(f64::NAN), ..good.clone() }, "clip is NaN, want a number above 0, or none"),
        (TrainOptions { dtype: DType::F64, ..good.clone() }, "dtype is f64, want f32 or bf16"),
        (TrainOptions { valid_every: 0, ..good.clone() }, "valid_every is 0, want 1 or more"),
        (TrainOptions { patience_secs: 0.0, ..good.clone() }, "patience_secs is 0, want more than 0"),
        (TrainOptions { data: data("seed"), ..good.clone() }, "data: the key \"seed\" begins neither with"),
    ] {
        let message = options.check().expect_err(says).to_string();
        assert!(message.starts_with(says), "{message}");
    }
    assert!(TrainOptions { data: data("data.text"), ..good }.check().is_ok());
}

/// A service trains on threads of its own.
#[test]
fn sessions_and_fleets_may_be_sent_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Session>();
    is_send::<Fleet>();
}
