//! A loss that is not finite ends the run at that step, with the name of the first layer whose output is not finite,
//! and with the weights as they were before the step.

mod common;

use common::shuffled::Shuffled;
use common::small::{Driver, Small};
use hydra::base::{DType, Error, Result};
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::engine::{Engine, StepResult, Stored};
use hydra::spill::{PlanOptions, Recompute};
use hydra::train::{Observer, Optimizer, StepReport, TrainOptions};
use std::sync::atomic::AtomicBool;

/// Plans to look under: resident, everything on its way, and in between.
fn plans() -> Vec<(&'static str, PlanOptions)> {
    let base = PlanOptions::default();
    let spilled = PlanOptions { resident: Some(false), ..base.clone() };
    vec![
        ("resident", PlanOptions { resident: Some(true), ..base.clone() }),
        (
            "resident, one slot, recomputed",
            PlanOptions { resident: Some(true), recompute: Recompute::Always, slots: 1, ..base },
        ),
        ("spilled", PlanOptions { boundaries_stay: Some(false), ..spilled.clone() }),
        ("spilled, updates on the device", PlanOptions { visiting_updates: Some(3), ..spilled.clone() }),
        ("spilled, all updates on the device", PlanOptions { visiting_updates: Some(usize::MAX), ..spilled.clone() }),
        ("spilled, kept", PlanOptions { boundaries_stay: Some(true), recompute: Recompute::Never, ..spilled.clone() }),
        (
            "spilled, one slot",
            PlanOptions { slots: 1, boundaries_stay: Some(false), recompute: Recompute::Always, ..spilled },
        ),
    ]
}

/// Four microbatches of one step each; SGD, so that a spared weight is one that no update has touched.
fn options(plan: &PlanOptions, layers: usize) -> TrainOptions {
    // One shard for each layer but the last two, so that shards of one and of two layers come up.
    let cut = (plan.resident == Some(false)).then(|| {
        let mut cut: Vec<_> = (0..layers - 2).map(|l| l..l + 1).collect();
        cut.push(layers - 2..layers);
        cut
    });
    TrainOptions {
        seed: 2,
        batch: 6,
        microbatch: 2,
        optimizer: Optimizer::Sgd { lr: 0.01, momentum: 0.9, nesterov: false, weight_decay: 0.0 },
        clip: Some(1.0),
        patience_secs: 20.0,
        // The head's output comes in parts.
        loss_rows: Some(8),
        plan: PlanOptions { cut, ..plan.clone() },
        ..TrainOptions::new(8)
    }
}

fn driver(small: &Small, plan: &PlanOptions, link: Option<f64>) -> Driver {
    driver_of(small, plan, link, DType::F32)
}

fn driver_of(small: &Small, plan: &PlanOptions, link: Option<f64>, dtype: DType) -> Driver {
    let layers = small.model(&TrainOptions { batch: 2, microbatch: 2, ..TrainOptions::new(1) }).layers();
    let options = TrainOptions { dtype, ..options(plan, layers) };
    let (model, plan) = small.plan(&options).expect("a plan");
    let spec = HostSpec { arena_bytes: plan.arena.bytes, link_bytes_per_sec: link, threads: None };
    let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, poison: true, ..HostConfig::default() };
    let device = HostDevice::new(&config).expect("a device");
    Driver::new(small, (model, plan), Box::new(device), &options)
}

/// Bits of all weights and moments in the host's store.
fn state(engine: &Engine) -> Vec<Vec<u32>> {
    let kinds = std::iter::once(Stored::Weight).chain((0..engine.plan(0).updates.moments).map(Stored::Moment));
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    kinds
        .flat_map(|kind| (0..engine.model(0).train.parameters.len()).map(move |i| (kind, i)))
        .map(|(kind, i)| bits(engine.read_parameter(0, kind, i).unwrap()))
        .collect()
}

/// Runs until a step fails, two in flight; gives the steps that ended and the error.
fn until_error(driver: &mut Driver, change: impl Fn(u64, &mut hydra::data::Batch)) -> (Vec<StepResult>, Option<Error>) {
    let mut results = Vec::new();
    let mut run = |results: &mut Vec<StepResult>| -> Result<()> {
        for step in 0..driver.options.steps {
            let begun = driver.begin(step, |batch| change(step, batch));
            // What it was begun behind may have ended the model meanwhile, which is told in its turn.
            while driver.engine.is_ending(0) {
                results.push(driver.engine.wait_step(0)?);
            }
            begun?;
            if driver.engine.steps_in_flight(0) == 2 {
                results.push(driver.engine.wait_step(0)?);
            }
        }
        while driver.engine.steps_in_flight(0) > 0 {
            results.push(driver.engine.wait_step(0)?);
        }
        Ok(())
    };
    let error = run(&mut results).err();
    (results, error)
}

/// What a model that has ended has left is what the last good step did, to the bit. Of one whose weights are on the
/// device the step behind the bad one may have updated them, where the loss came late; then nothing is read.
fn check_left(driver: &mut Driver, want: &[Vec<u32>], what: &str) {
    match driver.engine.wait_home(0) {
        Ok(()) => assert!(state(&driver.engine) == want, "{what}: an update is missing, or one too many"),
        Err(error) => {
            assert!(driver.engine.plan(0).choice.resident, "{what}: {error}");
            assert!(error.to_string().contains("in the middle of a step"), "{what}: {error}");
            assert!(driver.engine.read_parameter(0, Stored::Weight, 0).is_err(), "{what}");
        }
    }
}

/// Plants an infinite weight in each layer in turn.
fn check_planted(small: &Small, dtype: DType) {
    let driver = |small: &Small, plan: &PlanOptions, link| driver_of(small, plan, link, dtype);
    for (what, plan) in plans() {
        let layers = driver(small, &plan, None).engine.model(0).train.layers.len();
        for layer in 0..layers {
            let mut driver = driver(small, &plan, None);
            let model = std::sync::Arc::clone(driver.engine.model(0));
            let name = &model.train.layers[layer].name;
            let Some(parameter) = model.train.parameters.iter().position(|p| p.layers[0] == layer) else { continue };
            let mut values = driver.engine.read_parameter(0, Stored::Weight, parameter).unwrap();
            values.fill(f32::INFINITY);
            driver.engine.write_parameter(0, Stored::Weight, parameter, &values).unwrap();
            let before = state(&driver.engine);
            let (results, error) = until_error(&mut driver, |_, _| ());
            let error = error.unwrap_or_else(|| panic!("{what}, {name}: no error"));
            assert_eq!(results.len(), 0, "{what}, {name}: {results:?}");
            assert!(matches!(error, Error::NotFinite { step: 0, .. }), "{what}, {name}: {error}");
            let message = error.to_string();
            assert!(message.contains(" at step 0; "), "{what}, {name}: {message}");
            let end = format!("the first layer whose output is not finite is {name}");
            assert!(message.ends_with(&end), "{what}, {name}: {message}");
            check_left(&mut driver, &before, &format!("{what}, {name}"));
            let again = driver.begin(1, |_| ()).is_err() && driver.engine.wait_step(0).is_err();
            assert!(again, "{what}: the run is over");
        }
    }
}

#[test]
fn the_layer_with_the_planted_weight_is_named_in_a_gpt() {
    check_planted(&Small::gpt(14, 2, 2, 9, 0.1), DType::F32);
    check_planted(&Small::gpt(14, 2, 2, 9, 0.1), DType::Bf16);
}

#[test]
fn the_layer_with_the_planted_weight_is_named_in_a_resnet() {
    check_planted(&Small::resnet(&[6, 9], &[1, 1], [13, 11]), DType::F32);
    check_planted(&Small::resnet(&[6, 9], &[1, 1], [13, 11]), DType::Bf16);
}

/// NaN among the pixels of the second microbatch of step 2, with step 3 in flight behind it, whose own loss is finite:
/// in host memory no update of either is to be seen.
#[test]
fn a_bad_pixel_stops_its_step_and_the_one_behind_it() {
    let small = Small::resnet(&[6, 9], &[1, 1], [13, 11]);
    for (what, plan) in plans() {
        // A slow link brings the loss to the host late, when the lanes are far into the next step.
        for link in [None, Some(3e6)] {
            let mut good = driver(&small, &plan, link);
            good.options.steps = 2;
            let (results, error) = until_error(&mut good, |_, _| ());
            assert!(error.is_none() && results.len() == 2);
            good.engine.wait_home(0).expect("it is well");
            let want = state(&good.engine);

            let mut driver = driver(&small, &plan, link);
            let (results, error) = until_error(&mut driver, |step, batch| {
                if step == 2 {
                    let pixels = batch.tensors.iter_mut().find(|t| t.name == "pixel_values").expect("images");
                    let middle = pixels.as_f32().len() / 2;
                    pixels.as_f32_mut()[middle] = f32::NAN;
                }
            });
            assert_eq!(results.iter().map(|r| r.step).collect::<Vec<_>>(), [0, 1], "{what}");
            let message = error.unwrap_or_else(|| panic!("{what}: no error")).to_string();
            let first = &driver.engine.model(0).train.layers[0].name;
            let end = format!("the loss is NaN at step 2; the first layer whose output is not finite is {first}");
            assert_eq!(message, end, "{what}");
            check_left(&mut driver, &want, what);
        }
    }
}

/// Without clipping a step's norms and updates give way to the next step's forward, and a device that clips makes
/// updates there; the loss of that may be known before them, or before they are at home. Whatever comes first, the
/// steps before are told, and their updates are whole.
#[test]
fn the_step_before_is_whole() {
    let small = Small::resnet(&[6, 9], &[1, 1], [13, 11]);
    let plans = plans();
    for (plan, clip) in [("spilled", None), ("spilled, updates on the device", Some(1.0))] {
        let plan = plans.iter().find(|(what, _)| *what == plan).expect("one of the plans");
        check_the_step_before(&small, plan, clip);
    }
}

fn check_the_step_before(small: &Small, (what, plan): &(&str, PlanOptions), clip: Option<f64>) {
    let of = |seed: u64, steps: u64| {
        let layers = small.model(&TrainOptions { batch: 2, microbatch: 2, ..TrainOptions::new(1) }).layers();
        let options = TrainOptions { clip, steps, ..options(plan, layers) };
        let (model, plan) = small.plan(&options).expect("a plan");
        let spec = HostSpec { arena_bytes: plan.arena.bytes, ..HostSpec::default() };
        let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, ..HostConfig::default() };
        let device = Shuffled::new(HostDevice::new(&config).expect("a device"), seed);
        // Norms that nobody waits for but the report come after the next step's loss.
        let device = if seed % 2 == 1 { device.with_late_norms() } else { device };
        Driver::new(small, (model, plan), Box::new(device), &options)
    };
    let mut good = of(0, 2);
    let (results, error) = until_error(&mut good, |_, _| ());
    assert!(error.is_none() && results.len() == 2);
    good.engine.wait_home(0).expect("it is well");
    let want = state(&good.engine);
    for seed in 0..12 {
        let mut driver = of(seed, 8);
        let (results, error) = until_error(&mut driver, |step, batch| {
            if step == 2 {
                let pixels = batch.tensors.iter_mut().find(|t| t.name == "pixel_values").expect("images");
                pixels.as_f32_mut()[0] = f32::NAN;
            }
        });
        assert_eq!(results.iter().map(|r| r.step).collect::<Vec<_>>(), [0, 1], "{what}, seed {seed}");
        assert!(matches!(error, Some(Error::NotFinite { step: 2, .. })), "{what}, seed {seed}: {error:?}");
        check_left(&mut driver, &want, &format!("{what}, seed {seed}"));
    }
}

/// The first microbatch breaks down in the second layer, where a large embedding is squared; the second one in the
/// first layer already.
#[test]
fn the_first_layer_is_the_first_of_all_microbatches() {
    let small = Small::gpt(14, 2, 2, 9, 0.0);
    for (what, plan) in plans() {
        let mut driver = driver(&small, &plan, None);
        let model = std::sync::Arc::clone(driver.engine.model(0));
        let table = model.train.parameters.iter().position(|p| p.name.ends_with("wte.weight")).expect("embeddings");
        let mut values = driver.engine.read_parameter(0, Stored::Weight, table).unwrap();
        let width = *model.train.parameters[table].shape.axes().last().expect("a matrix");
        values[7 * width..8 * width].fill(3e38);
        values[8 * width..9 * width].fill(f32::INFINITY);
        driver.engine.write_parameter(0, Stored::Weight, table, &values).unwrap();
        let (_, error) = until_error(&mut driver, |_, batch| {
            let ids = batch.tensors.iter_mut().find(|t| t.name == "input_ids").expect("ids").as_i32_mut();
            ids.iter_mut().for_each(|id| *id %= 7);
            let microbatch = ids.len() / 3;
            ids[1] = 7;
            ids[microbatch + 1] = 8;
        });
        let message = error.unwrap_or_else(|| panic!("{what}: no error")).to_string();
        let name = &model.train.layers[0].name;
        assert!(message.ends_with(&format!("whose output is not finite is {name}")), "{what}: {message}");
    }
}

/// The layer differs from model to model; the same one must be named whatever the plan.
#[test]
fn a_learning_rate_that_blows_up_is_stopped() {
    let small = Small::gpt(14, 2, 2, 9, 0.1);
    let mut messages = Vec::new();
    for (what, plan) in plans() {
        let mut driver = driver(&small, &plan, None);
        driver.options.optimizer = Optimizer::Sgd { lr: 1e30, momentum: 0.9, nesterov: false, weight_decay: 0.0 };
        let (results, error) = until_error(&mut driver, |_, _| ());
        assert!(results.iter().all(|r| r.loss.is_finite()) && results.len() <= 2, "{what}: {results:?}");
        messages.push(error.unwrap_or_else(|| panic!("{what}: no error")).to_string());
    }
    println!("{}", messages[0]);
    assert!(messages[0].contains("the first layer whose output is not finite is "), "{}", messages[0]);
    assert!(messages.iter().all(|m| *m == messages[0]), "{messages:?}");
}

/// As a caller sees it: the session ends with the error, and tells of no step from there on.
#[test]
fn a_session_ends_at_the_step() {
    struct Steps(u64);
    impl Observer for Steps {
        fn step(&mut self, report: &StepReport) -> Result<()> {
            assert!(report.result.loss.is_finite());
            self.0 = report.result.step + 1;
            Ok(())
        }
        fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
            panic!("nothing is validated after a failure");
        }
    }
    let small = Small::gpt(14, 2, 2, 9, 0.1);
    let layers = small.model(&TrainOptions { batch: 2, microbatch: 2, ..TrainOptions::new(1) }).layers();
    let options = TrainOptions {
        optimizer: Optimizer::Sgd { lr: 1e30, momentum: 0.0, nesterov: false, weight_decay: 0.0 },
        ..options(&PlanOptions::default(), layers)
    };
    let planned = small.plan(&options).expect("a plan");
    let mut session = small.session(planned, &options).expect("a session");
    let mut steps = Steps(0);
    let error = session.run(&mut steps, &AtomicBool::new(false)).expect_err("no weights are left to train");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains(&format!("at step {}; the first layer", steps.0)), "{error}");
    assert!(steps.0 <= 2, "{}", steps.0);
}
