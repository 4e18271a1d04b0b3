//! Promise 4: every wait has an owner. What does not end is named with those who wait for it, what fails ends the run, and nothing hangs.

mod common;

use common::small::{Driver, Small};
use hydra::base::Error;
use hydra::device::Device;
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::spill::PlanOptions;
use hydra::train::TrainOptions;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Runs `body` on a thread of its own and fails the test where it does not end in time: a hang is what these tests look for.
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
    let (model, plan) = small.plan(&options).expect("a plan");
    let spec = HostSpec { arena_bytes: plan.arena.bytes, link_bytes_per_sec: link, threads: None };
    let config = HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, withhold, ..HostConfig::default() };
    let device = HostDevice::new(&config).expect("a device");
    Driver::new(&small, (model, plan), Box::new(device), &options)
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

/// Withholds the `number`-th completion of a lane and checks what the message says. The lanes are compute, to the device, from the
/// device, arithmetic of the host.
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

/// Ids beyond the table and labels beyond the classes, written past every check.
#[test]
fn a_panic_on_a_lane_ends_the_run() {
    for resident in [false, true] {
        for (tensor, at) in [("input_ids", 0), ("input_ids", 2), ("labels", 1)] {
            let what = format!("resident {resident}, {tensor} of step {at}");
            let name = what.clone();
            within(60, &what, move || {
                let mut driver = driver(resident, None, None);
                let mut error = None;
                for step in 0..4 {
                    let spoil = |batch: &mut hydra::data::Batch| {
                        let spoilt = batch.tensors.iter_mut().find(|t| t.name == tensor && step == at);
                        if let Some(tensor) = spoilt {
                            *tensor.as_i32_mut().last_mut().expect("elements") = 1_000_000;
                        }
                    };
                    error = driver.begin(step, spoil).err();
                    while error.is_none() && driver.engine.steps_in_flight(0) == 2 {
                        error = driver.engine.wait_step(0).err();
                    }
                    if error.is_some() {
                        break;
                    }
                }
                let error = error.unwrap_or_else(|| panic!("{name}: nothing happened"));
                assert!(matches!(error, Error::Device(_)), "{name}: {error}");
                assert!(error.to_string().contains("a task panicked: "), "{name}: {error}");
                assert!(driver.engine.wait_step(0).is_err() && driver.engine.wait_idle().is_err());
                // The drop is inside the time too.
            });
        }
    }
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
