//! Runs that go on: what is kept of the parts before, and what is said where something of them is gone.

use super::{GPT, Job};
use std::fs;

/// Trains on from the checkpoint, with `sets`.
fn goes_on(job: &Job, resume: &str, sets: &[&str]) -> super::Ran {
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    job.hydra(&[&["train", "--resume", resume], &sets[..]].concat())
}

#[test]
fn older_traces_are_kept_however_often_a_run_goes_on_from_a_step() {
    let job = Job::new(GPT);
    job.hydra(&["train"]).fine();
    let (checkpoint, kept) = (job.at("runs/job/m/checkpoint.safetensors"), job.at("kept"));
    let trace = |name: &str| fs::read(job.at("runs/job").join(name)).expect(name);
    fs::copy(&checkpoint, &kept).expect("a copy");
    // A start that is refused moves nothing.
    let first = trace("trace.json");
    fs::rename(job.at("runs/job/m/metrics.jsonl"), job.at("metrics")).expect("it is there");
    fs::create_dir(job.at("runs/job/m/metrics.jsonl")).expect("a folder");
    assert_ne!(goes_on(&job, "auto", &["model.0.steps=5"]).code, 0);
    assert!(trace("trace.json") == first && !job.at("runs/job/trace-until-4.json").exists());
    fs::remove_dir(job.at("runs/job/m/metrics.jsonl")).expect("it is empty");
    fs::rename(job.at("metrics"), job.at("runs/job/m/metrics.jsonl")).expect("it is there");
    let mut before = vec![first];
    for name in ["trace-until-4.json", "trace-until-4-2.json", "trace-until-4-3.json"] {
        fs::copy(&kept, &checkpoint).expect("a copy");
        goes_on(&job, "auto", &["model.0.steps=5"]).fine();
        assert!(trace(name) == *before.last().expect("one"), "{name}");
        before.push(trace("trace.json"));
    }
    assert!(trace("trace-until-4.json") == before[0] && trace("trace-until-4-2.json") == before[1]);
}
