//! Promise 4: every wait has an owner. What does not end is named with those who wait for it, what fails ends the run,
//! and nothing hangs.

mod common;

use common::small::{Driver, Small};
use hydra::base::{Error, Result, Shape};
use hydra::device::Device;
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::engine::Stored;
use hydra::graph::CustomOp;
use hydra::spill::{Placed, PlanOptions};
use hydra::train::{Fleet, ModelToTrain, Observer, TrainOptions, Weights};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Runs `body` on a thread of its own and fails the test where it does not end in time: a hang is what these tests look
/// for.
fn within<T: Send + 'static>(secs: u64, what: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(body());
    });
    match receiver.recv_timeout(Duration::from_secs(secs)) {
        Ok(result) => {
            let _ = thread.join();
            result
        }
        Err(RecvTimeoutError::Timeout) => panic!("{what}: still not over after {secs} s"),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the thread sends before it ends"),
        },
    }
}

/// Two microbatches of a GPT, on a device whose weights stay, or which they visit with every boundary tensor.
fn driver(resident: bool, link: Option<f64>, withhold: Option<(u16, u64)>) -> Driver {
    let small = Small::gpt(18, 2, 3, 11, 0.1);
    let options = TrainOptions {
        seed: 3,
        batch: 4,
        microbatch: 2,
        clip: Some(0.1),
        patience_secs: 1.0,
        plan: PlanOptions {
            resident: Some(resident),
            boundaries_stay: Some(resident),
            cut: (!resident).then(|| vec![0..2, 2..3, 3..5, 5..small_layers()]),
            ..PlanOptions::default()
        },
        ..TrainOptions::new(6)
    };
    driver_of(&small, &options, link, withhold)
}

fn driver_of(small: &Small, options: &TrainOptions, link: Option<f64>, withhold: Option<(u16, u64)>) -> Driver {
    let (model, plan) = small.plan(options).expect("a plan");
    let spec = HostSpec { arena_bytes: plan.arena.bytes, link_bytes_per_sec: link, threads: None };
    let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, withhold, ..HostConfig::default() };
    let device = HostDevice::new(&config).expect("a device");
    Driver::new(small, (model, plan), Box::new(device), options)
}

/// Layers of the GPT above: embeddings, attention and feed-forward of three blocks, head.
fn small_layers() -> usize {
    let small = Small::gpt(18, 2, 3, 11, 0.1);
    small.model(&TrainOptions::new(1)).layers()
}

/// Runs steps two at a time until one fails.
fn first_error(driver: &mut Driver) -> Option<Error> {
    for step in 0..driver.options.steps {
        if let Err(error) = driver.begin(step, |_| ()) {
            return Some(error);
        }
        if driver.engine.steps_in_flight(0) == 2
            && let Err(error) = driver.engine.wait_step(0)
        {
            return Some(error);
        }
    }
    driver.engine.wait_idle().err()
}

/// Withholds the `number`-th completion of a lane and checks what the message says. The lanes are compute, to the
/// device, from the device, arithmetic of the host.
fn check_withheld(resident: bool, lane: u16, number: u64) {
    let what = format!("resident {resident}, lane {lane}, completion {number}");
    let name = what.clone();
    let (message, secs, id) = within(60, &what, move || {
        let mut driver = driver(resident, None, Some((lane, number)));
        let began = Instant::now();
        let error = first_error(&mut driver).unwrap_or_else(|| panic!("{name}: ran to its end"));
        let secs = began.elapsed().as_secs_f64();
        let Error::Device(message) = error else { panic!("{name}: another error: {error}") };
        let again = driver.engine.wait_idle().expect_err("a run that has stalled is over").to_string();
        assert!(again.contains("failed before"), "{name}: {again}");
        // Other lanes may still be writing.
        let read = driver.engine.read_parameter(0, Stored::Weight, 0).expect_err("nothing is read then").to_string();
        assert!(read.contains("failed before"), "{name}: {read}");
        let config = HostConfig { devices: vec![HostSpec::default()], ..HostConfig::default() };
        let id = HostDevice::new(&config).expect("a device").lanes()[lane as usize].to_string();
        (message, secs, id)
    });
    println!("{what}: {message}\n");
    // Patience is a second; the rest is the work before the stall and a busy machine.
    assert!((1.0..20.0).contains(&secs), "{what}: {secs} s");
    assert!(message.starts_with("stalled: nothing has ended for 1 s"), "{what}: {message}");
    let line = message.lines().find(|l| l.trim_start().starts_with(&format!("{id}: "))).expect("a line for every lane");
    let (_, rest) = line.split_once(": ").expect("looked for just above");
    let (withheld, behind) = rest.split_once(" has not ended").unwrap_or_else(|| panic!("{what}: {message}"));
    // Somebody waits for the task itself, or for one that stands behind it on its lane.
    if !behind.contains("; waiting for it: ") {
        let waiters: Vec<&str> = message.lines().filter_map(|l| l.split_once(" waits for ")).map(|l| l.1).collect();
        let mut stuck = behind.trim_start_matches("; behind it on its lane: ").split("), ").filter(|n| !n.is_empty());
        let named = stuck.any(|n| waiters.iter().any(|w| w.contains(n)));
        assert!(named && !withheld.is_empty(), "{what}: nobody waits for it: {message}");
    }
}

#[test]
fn a_completion_that_does_not_come_is_named_with_who_waits_for_it() {
    for (lane, number) in [(0, 1), (0, 4), (1, 1), (1, 5), (1, 30), (2, 1), (2, 4), (2, 9), (3, 1), (3, 2), (3, 8)] {
        check_withheld(false, lane, number);
    }
    // Of a resident model only the arithmetic and the first copies are waited for by others.
    for (lane, number) in [(0, 2), (1, 1), (1, 3)] {
        check_withheld(true, lane, number);
    }
}

/// What an op does when its body is called for the `at`-th time.
#[derive(Debug)]
struct Trouble {
    calls: AtomicUsize,
    at: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Panics,
    Hangs,
    /// For so long.
    Computes(Duration),
}

/// Hands on what it is given.
#[derive(Debug)]
struct Pass;

impl CustomOp for Pass {
    fn name(&self) -> &'static str {
        "pass"
    }

    fn shapes(&self, inputs: &[&Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0].clone()])
    }

    fn host(&self, outputs: &mut [&mut [f32]], inputs: &[&[f32]], _: &[&Shape]) {
        outputs[0].copy_from_slice(inputs[0]);
    }
}

impl CustomOp for Trouble {
    fn name(&self) -> &'static str {
        "trouble"
    }

    fn shapes(&self, inputs: &[&Shape]) -> Result<Vec<Shape>> {
        Pass.shapes(inputs)
    }

    fn host(&self, outputs: &mut [&mut [f32]], inputs: &[&[f32]], shapes: &[&Shape]) {
        if self.calls.fetch_add(1, Ordering::Relaxed) == self.at {
            match self.kind {
                Kind::Panics => panic!("had enough"),
                // Longer than any test takes.
                Kind::Hangs => std::thread::sleep(Duration::from_secs(3600)),
                Kind::Computes(time) => {
                    let began = Instant::now();
                    while began.elapsed() < time {
                        std::hint::black_box(());
                    }
                }
            }
        }
        Pass.host(outputs, inputs, shapes);
    }

    fn gradient(&self) -> Option<Arc<dyn CustomOp>> {
        Some(Arc::new(Pass))
    }
}

/// A run whose op is in trouble at its `at`-th call.
fn in_trouble(resident: bool, at: usize, kind: Kind, patience_secs: f64) -> Driver {
    let small = Small::with_op(Arc::new(Trouble { calls: AtomicUsize::new(0), at, kind }));
    let plan = PlanOptions {
        resident: Some(resident),
        cut: (!resident).then(|| vec![0..1, 1..2, 2..3]),
        ..PlanOptions::default()
    };
    let options = TrainOptions { batch: 4, microbatch: 2, patience_secs, plan, ..TrainOptions::new(6) };
    driver_of(&small, &options, None, None)
}

/// Its first error, and what any further wait says.
fn error_of_trouble(resident: bool, at: usize, kind: Kind) -> (Error, String) {
    let mut driver = in_trouble(resident, at, kind, 1.0);
    let error = first_error(&mut driver).unwrap_or_else(|| panic!("call {at}: nothing happened"));
    (error, driver.engine.wait_idle().expect_err("the run is over").to_string())
}

#[test]
fn a_panic_on_a_lane_ends_the_run() {
    for (resident, at) in [(false, 0), (false, 5), (true, 0), (true, 4)] {
        // The drop is inside the time too.
        let (error, again) = within(60, "a panic", move || error_of_trouble(resident, at, Kind::Panics));
        let message = error.to_string();
        assert!(matches!(error, Error::Device(_)), "{message}");
        assert!(message.contains("a task panicked: ") && message.contains("had enough"), "{message}");
        assert!(message.contains("trouble of layer 1: "), "{message}");
        assert!(again.contains("failed before"), "{again}");
    }
}

/// Its thread never ends, so that a drop which waits for it would not let the error be heard.
#[test]
fn a_task_that_never_ends_is_named_and_left_to_itself() {
    for resident in [false, true] {
        let (error, again) = within(60, "the drop", move || error_of_trouble(resident, 3, Kind::Hangs));
        assert!(error.to_string().starts_with("stalled: nothing has ended for 1 s"), "{error}");
        assert!(again.contains("failed before"), "{again}");
    }
}

/// Whatever was predicted: a plan may be made by the rates of another machine.
#[test]
fn a_task_that_computes_for_longer_than_patience_lasts_is_no_hang() {
    let error_of = |kind| {
        within(60, "the run", move || first_error(&mut in_trouble(true, 3, kind, 2.0)).map(|error| error.to_string()))
    };
    assert_eq!(error_of(Kind::Computes(Duration::from_secs(6))), None);
    let hangs = error_of(Kind::Hangs).expect("it never ends");
    assert!(hangs.starts_with("stalled: nothing has ended for 2 s"), "{hangs}");
}

/// What comes home for a checkpoint or at the end is waited for by the loop that has an eye on every model; a device
/// that fails there is the run's fault, in its own words.
#[test]
fn a_stall_on_the_way_home_is_told_as_such() {
    let mut stalled = 0;
    for number in 1..8 {
        let message = within(60, "a run", move || {
            let small = Small::gpt(18, 2, 1, 11, 0.0);
            let plan = PlanOptions { resident: Some(true), ..PlanOptions::default() };
            let options = TrainOptions { batch: 2, microbatch: 2, patience_secs: 1.0, plan, ..TrainOptions::new(2) };
            let (model, plan) = small.plan(&options).expect("a plan");
            let spec = HostSpec { arena_bytes: plan.arena.bytes, ..HostSpec::default() };
            let withhold = Some((2, number));
            let config =
                HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, withhold, ..HostConfig::default() };
            let device = Box::new(HostDevice::new(&config).expect("a device"));
            let source = small.source(options.batch, options.seed);
            let placed = Placed::alone(model, plan);
            let fleet_model = ModelToTrain { weights: Weights::Random, placed, source, valid: None, options };
            let mut fleet = Fleet::new(vec![fleet_model], device, None).expect("a fleet");
            let mut nobody = ();
            let mut observer: Vec<&mut dyn Observer> = vec![&mut nobody];
            fleet.run(&mut observer, &AtomicBool::new(false)).err().map(|error| error.to_string())
        });
        let Some(message) = message else { continue };
        assert!(message.starts_with("stalled: nothing has ended for 1 s"), "completion {number}: {message}");
        stalled += usize::from(message.contains("spill state"));
    }
    assert!(stalled > 0, "none of them was on its way home");
}

/// At this rate the first copy takes a quarter of an hour.
#[test]
fn a_drop_waits_neither_for_a_slow_link_nor_for_steps_in_flight() {
    for (resident, link) in [(false, Some(10.0)), (true, Some(10.0)), (false, None), (true, None)] {
        within(20, "the drop", move || {
            let mut driver = driver(resident, link, None);
            driver.begin(0, |_| ()).expect("two steps may be in flight");
            driver.begin(1, |_| ()).expect("two steps may be in flight");
        });
    }
}
