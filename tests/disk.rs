//! What the disk tier promises besides the same bits (`same_bits`, `fleet`): host memory within its budget with as
//! little on the disk as will do, and on the virtual clock a step that is about as long as the slower of the disk and
//! the rest.

mod common;

use common::small::{Driver, Small};
use common::stated;
use hydra::base::Error;
use hydra::device::DiskSpec;
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::device::sim::CostModel;
use hydra::engine::{Stored, plan_alone, predict};
use hydra::spill::{HomeBudgets, Model, OnDisk, Plan, PlanOptions, Updates};
use hydra::train::{TrainOptions, write_checkpoint};
use std::path::Path;
use std::sync::Arc;

fn model(microbatches: usize) -> Arc<Model> {
    let options = TrainOptions { batch: 2 * microbatches, microbatch: 2, ..TrainOptions::new(1) };
    Small::gpt(64, 2, 6, 16, 0.0).model(&options)
}

/// Seconds of a step and of its busiest lane, with all state on its way and this much of it on a disk of such a rate,
/// and all updates by the host; with some by the device, if that is chosen, it is no longer.
fn step(model: &Arc<Model>, on_disk: OnDisk, clips: bool, bytes_per_sec: f64) -> (f64, f64) {
    let updates = Updates { clips, ..Updates::default() };
    let mut options = PlanOptions { resident: Some(false), on_disk: Some(on_disk), updates, ..PlanOptions::default() };
    let cost = CostModel { disk_bytes_per_sec: Some(bytes_per_sec), ..stated() };
    let secs = |plan: &Arc<Plan>| predict(model, plan, &cost).expect("no stall");
    let chosen = secs(&plan_alone(model, &options, &cost).expect("no budget")).step_secs;
    options.visiting_updates = Some(0);
    let prediction = secs(&plan_alone(model, &options, &cost).expect("no budget"));
    assert!(chosen < 1.001 * prediction.step_secs, "{chosen:e} is chosen before {prediction:?}");
    (prediction.step_secs, prediction.bound_secs)
}

#[test]
fn a_step_is_as_long_as_the_slower_of_the_disk_and_the_rest() {
    for (clips, microbatches) in [(false, 1), (false, 4), (true, 1), (true, 4)] {
        let model = model(microbatches);
        let (without, _) = step(&model, OnDisk::Nothing, clips, 1.0);
        for on_disk in OnDisk::ALL.into_iter().filter(|&on_disk| on_disk > OnDisk::Nothing) {
            let what = format!("{on_disk:?} on the disk, clips {clips}, {microbatches} microbatches");
            let (fast, _) = step(&model, on_disk, clips, 1e11);
            assert!(fast < 1.06 * without, "{what}: {fast:e} with a fast disk, {without:e} with none");
            let (slow, busiest) = step(&model, on_disk, clips, 1e8);
            // With the norm, moments are read when all gradients have been written: 16 bytes a parameter one after
            // another, and reads alone are 12. Weights on the disk are read for the next forward when they have been
            // written, too.
            let chain = match on_disk {
                OnDisk::Gradients if clips => 16.0 / 12.0,
                OnDisk::Weights if clips => 1.05,
                _ => 1.0,
            };
            assert!(slow < 1.06 * chain * busiest, "{what}: {slow:e} with a slow disk, which works {busiest:e}");
            for bytes_per_sec in [3e8, 1e9, 3e9, 1e10] {
                let (secs, busiest) = step(&model, on_disk, clips, bytes_per_sec);
                let limit = 1.06 * chain * (busiest + without);
                assert!(secs < limit, "{what}: {secs:e} at {bytes_per_sec:e}, busiest lane {busiest:e}");
            }
        }
    }
}

#[test]
fn host_memory_is_within_its_budget_and_no_more_is_on_the_disk_than_must_be() {
    let model = model(2);
    const DEVICE: u64 = 600_000;
    let plan = |host: u64, disk: u64| {
        let (device_budget, homes) = (Some(DEVICE), HomeBudgets { host: Some(host), disk });
        let options = PlanOptions { device_budget, homes, ..PlanOptions::default() };
        Plan::new(&model, &options, &stated())
    };
    let most = plan(u64::MAX, 0).expect("no budget").host.bytes;
    let mut seen = Vec::new();
    for part in 1..=40 {
        let budget = most * part / 40;
        match plan(budget, u64::MAX) {
            Ok(found) => {
                assert!(found.host.bytes <= budget && found.arena.bytes <= DEVICE);
                let needs = found.host.disk_bytes;
                assert_eq!(needs > 0, found.choice.on_disk > OnDisk::Nothing);
                seen.push(found.choice.on_disk);
                if needs > 1 {
                    let error = refused(plan(budget, needs - 1));
                    assert!(
                        error.contains("the disk tier needs") && error.contains(&format!("({needs} bytes)")),
                        "{error}"
                    );
                }
            }
            Err(error) => {
                assert!(seen.is_empty(), "{budget} bytes are too few, and fewer were not: {error}");
                let error = refused(Err(error));
                assert!(error.contains("even with moments, gradients and weights on the disk"), "{error}");
            }
        }
    }
    assert!(seen.is_sorted_by(|a, b| a >= b), "more memory, less on the disk: {seen:?}");
    seen.dedup();
    assert_eq!(seen.len(), OnDisk::ALL.len(), "{seen:?}");
    assert!(refused(plan(most / 2, 0)).contains("disk = { path = \"spill\""));
}

#[track_caller]
fn refused(plan: hydra::base::Result<Plan>) -> String {
    match plan {
        Err(error @ Error::OutOfBudget { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Takes all bytes from the disk tier's file in `folder`, which has no name: what is read from it then is missing, as
/// from a disk that fails.
fn lose_the_file_in(folder: &Path) {
    let folder = folder.canonicalize().expect("a folder");
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("descriptors").filter_map(Result::ok);
    let of_folder: Vec<_> = descriptors
        .map(|d| d.path())
        .filter(|d| std::fs::read_link(d).is_ok_and(|to| to.starts_with(&folder)))
        .collect();
    let [file] = &of_folder[..] else { panic!("one file in {}: {of_folder:?}", folder.display()) };
    std::fs::OpenOptions::new().write(true).truncate(true).open(file).expect("the file opens");
}

#[test]
fn a_disk_that_fails_in_the_middle_ends_the_step_and_is_named() {
    // With these a step begins by reading; gradients would be written first, and the file be as long as before.
    for on_disk in [OnDisk::UpdateState, OnDisk::Weights] {
        let small = Small::gpt(16, 2, 4, 16, 0.0);
        let dir = tempfile::tempdir().expect("a folder");
        let plan = PlanOptions { resident: Some(false), on_disk: Some(on_disk), ..PlanOptions::default() };
        let options = TrainOptions {
            batch: 4,
            microbatch: 2,
            clip: Some(1.0),
            patience_secs: 20.0,
            disk: Some(dir.path().into()),
            plan,
            ..TrainOptions::new(4)
        };
        let (model, plan) = small.plan(&options).expect("a plan");
        let bytes = plan.host.disk_bytes;
        let config = HostConfig {
            devices: vec![HostSpec { arena_bytes: plan.arena.bytes, ..HostSpec::default() }],
            host_bytes: plan.host.bytes,
            disk: Some(DiskSpec { path: dir.path().into(), bytes, bytes_per_sec: None }),
            poison: true,
            ..HostConfig::default()
        };
        let device = HostDevice::new(&config).expect("a device");
        let mut driver = Driver::new(&small, (model, plan), Box::new(device), &options);
        driver.begin(0, |_| ()).expect("a step");
        driver.engine.wait_step(0).expect("a step");
        driver.engine.wait_home(0).expect("all that it wrote");
        lose_the_file_in(dir.path());
        let folder = dir.path().display().to_string();
        let read = driver.engine.read_parameter(0, Stored::Moment(0), 0).expect_err("there is nothing to read");
        assert!(read.to_string().contains(&folder), "{on_disk:?}: {read}");
        let checkpoint = dir.path().join("checkpoint.safetensors");
        let written =
            write_checkpoint(&checkpoint, &driver.engine, 0, &options, 1).expect_err("there is nothing to read");
        assert_eq!(written.to_string(), read.to_string());
        let mut ended = driver.begin(1, |_| ());
        if ended.is_ok() {
            ended = driver.engine.wait_step(0).map(|_| ());
        }
        // A step's losses may be there before the disk is.
        let error = ended.and_then(|()| driver.engine.wait_home(0)).expect_err("the disk has failed").to_string();
        assert!(error.contains("read the disk tier in") && error.contains(&folder), "{on_disk:?}: {error}");
        assert!(driver.begin(2, |_| ()).is_err(), "{on_disk:?}: what has failed does no more");
    }
}
