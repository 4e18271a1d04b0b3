//! A job on many machines: each trains its part, by the scripts that are there for clusters too.

use super::many::{TWO_CORES, model};
use super::{Job, Ran};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Three models, one of them a search, whose run is in `all`.
fn job(steps: u64) -> Job {
    let steps = |model: String| model.replace("steps = 4", &format!("steps = {steps}"));
    let models = [model("a", ""), model("b", "search = { lr = [0.01, 0.001] }"), model("c", "")].map(steps).concat();
    Job::new(&format!("[run]\nout = 'all'\n{TWO_CORES}{models}"))
}

const NAMES: [&str; 4] = ["a", "b-lr=0.01", "b-lr=1e-3", "c"];

fn weights(job: &Job, run: &str, name: &str) -> Vec<u8> {
    fs::read(job.at(&format!("{run}/{name}/model/model.safetensors"))).unwrap_or_else(|e| panic!("{run}/{name}: {e}"))
}

#[test]
fn parts_of_a_job_have_the_bits_of_the_whole() {
    let job = job(4);
    job.hydra(&["train", "--set", "run.out=whole"]).fine();
    for (part, names) in [("0/3", &[NAMES[0], NAMES[3]][..]), ("1/3", &[NAMES[1]]), ("2/3", &[NAMES[2]])] {
        let set = format!("run.part={part}");
        let plan = job.hydra(&["plan", "--json", "--set", &set]).fine().json();
        assert_eq!(plan["models"].as_array().map(Vec::len), Some(names.len()), "{part}");
        job.hydra(&["train", "--set", &set]).fine();
        job.hydra(&["train", "--set", &set]).bad(&["holds a run already"]);
        for name in names {
            let run = format!("all/part-{}", part.replace('/', "-of-"));
            assert!(weights(&job, &run, name) == weights(&job, "whole", name), "{name}: other bits in part {part}");
        }
    }
    job.hydra(&["train", "--set", "run.part=4/5"]).bad(&["run.part: 4/5 has no model: there are 4"]);
}

/// Slurm's part, played: its variables, and a program that only writes down what it is asked for.
fn slurm(job: &Job, index: usize) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_hydra")).parent().expect("a folder");
    let path = format!("{}:{}:{}", job.at("bin").display(), program.display(), std::env::var("PATH").expect("PATH"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/cluster/slurm.sh");
    let mut command = Command::new("bash");
    command.arg(script).arg(job.at("job.toml")).arg("2").env("PATH", path).stdout(Stdio::null()).stderr(Stdio::piped());
    command.env("SLURM_ARRAY_JOB_ID", "7").env("SLURM_ARRAY_TASK_ID", index.to_string());
    command
}

#[test]
fn a_task_of_slurm_that_is_told_to_end_is_queued_again_and_goes_on() {
    use std::os::unix::fs::PermissionsExt;
    let job = job(300);
    fs::create_dir(job.at("bin")).expect("a folder");
    let asked = job.at("asked");
    let scontrol = format!("#!/bin/sh\necho \"$@\" >> '{}'\n", asked.display());
    fs::write(job.at("bin/scontrol"), scontrol).expect("a program");
    fs::set_permissions(job.at("bin/scontrol"), fs::Permissions::from_mode(0o755)).expect("permissions");

    let mut child = slurm(&job, 1).spawn().expect("bash");
    let rows = || fs::read_to_string(job.at("all/part-1-of-2/c/metrics.jsonl")).map_or(0, |text| text.lines().count());
    let began = Instant::now();
    while rows() < 10 && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait().expect("its state").is_none(), "it ends before it is told to");
    }
    // The script alone gets the signal, as by --signal=B:TERM.
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    let ran: Ran = child.wait_with_output().expect("an end").into();
    ran.fails(75, &["after a checkpoint"]);
    assert_eq!(fs::read_to_string(&asked).expect("asked"), "requeue 7_1\n");
    for index in [1, 0] {
        let ran: Ran = slurm(&job, index).output().expect("bash").into();
        ran.fine();
    }
    assert_eq!(fs::read_to_string(&asked).expect("asked"), "requeue 7_1\n", "what is done is not queued again");
    job.hydra(&["train", "--set", "run.out=whole"]).fine();
    for (i, name) in NAMES.iter().enumerate() {
        let run = format!("all/part-{}-of-2", i % 2);
        assert!(weights(&job, &run, name) == weights(&job, "whole", name), "{name}: other bits in parts");
    }
}
