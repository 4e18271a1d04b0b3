//! The disk tier through the program: the same model with a part of the host's memory, what a plan says of it, and what
//! is refused.

use super::many::{TWO_CORES, model};
use super::settings::check_lanes;
use super::{GPT, Job, TAKES_NOTHING, code_of_nothing, hydra};
use std::fs;

/// Wide enough for its state to be most of what the host has.
fn wide() -> String {
    GPT.replace("n_layer = 2, n_embd = 32", "n_layer = 5, n_embd = 96") + "optimizer = { lr = 0.01, clip = 1.0 }\n"
}

fn weights(job: &Job, run: &str, model: &str) -> Vec<u8> {
    fs::read(job.at(&format!("{run}/{model}/model/model.safetensors"))).expect("weights")
}

const DISK: &str = "host.disk={ path = 'spill', memory = '64 MiB' }";
const SLOW_DISK: &str = "host.disk={ path = 'spill', memory = '64 MiB', link = '50 MB/s' }";

#[test]
fn little_host_memory_and_a_disk_give_the_same_model() {
    let job = Job::new(&wide());
    let smallest = job.hydra(&["plan", "--json"]).fine().json()["smallest_device_bytes"].as_u64().expect("bytes");
    let device = format!("device.0.memory={}", 2 * smallest);
    job.hydra(&["train", "--set", "run.out=whole", "--set", &device]).fine();
    let wants = job.json("whole/plan.json")["host_bytes"].as_u64().expect("bytes");
    let mut seen = Vec::new();
    for percent in [90, 60, 40, 25] {
        let (run, host) = (format!("at{percent}"), wants * percent / 100);
        let out = format!("run.out={run}");
        let memory = format!("host.memory={host}");
        let sets = ["--set", &out, "--set", &device, "--set", &memory];
        job.hydra(&[&["train"], &sets[..]].concat()).fails(2, &["the host's store needs", "or disk = {"]);
        assert!(!job.at(&run).exists());
        let disk = if percent == 90 { SLOW_DISK } else { DISK };
        let ran = job.hydra(&[&["train", "--set", disk], &sets[..]].concat()).fine();
        if percent == 90 {
            check_lanes(&job, &run, &["host disk read", "host disk write"], 50e6);
        }
        assert!(ran.out.contains(", disk ") && ran.out.contains("(moments"), "{}", ran.out);
        let plan = job.json(&format!("{run}/plan.json"));
        assert!(plan["host_bytes"].as_u64().is_some_and(|bytes| bytes <= host), "{plan}");
        assert_eq!(plan["models"][0]["disk_bytes"], plan["disk_bytes"]);
        let tiers = plan["models"][0]["shards"].as_array().expect("shards").last().expect("one")["tiers"].clone();
        assert_eq!(tiers["moments"], "disk", "{plan}");
        seen.push(format!("{} {}", tiers["gradients"], tiers["weights"]));
        assert!(weights(&job, &run, "m") == weights(&job, "whole", "m"), "{percent} %: other bits");
        assert_eq!(fs::read_dir(job.at("spill")).expect("a folder").count(), 0, "nothing is left behind");
    }
    assert!(
        seen.contains(&"\"pageable\" \"pageable\"".into()) && seen.contains(&"\"disk\" \"disk\"".into()),
        "{seen:?}"
    );
    hydra(&["report", &job.at("at25").display().to_string()]).fine();
    let page = fs::read_to_string(job.at("at25/report.html")).expect("page");
    assert!(page.contains("disk read") && page.contains("disk write"), "the schedule shows the disk's lanes");
}

#[test]
fn a_plan_says_what_the_disk_does() {
    let job = Job::new(&wide());
    let all = job.hydra(&["plan", "--json"]).fine().json();
    let (wants, device) =
        (all["host_bytes"].as_u64().expect("bytes"), all["smallest_device_bytes"].as_u64().expect("bytes"));
    let (memory, device) = (format!("host.memory={}", wants / 3), format!("device.0.memory={}", 2 * device));
    let plan = |disk: &str| {
        let disk = format!("host.disk={{ path = 'spill', {disk} }}");
        job.hydra(&["plan", "--set", &memory, "--set", &device, "--set", &disk])
    };
    let text = plan("memory = '64 MiB'").fine().out;
    assert!(text.contains("the disk is taken to read and write 953.67 MiB/s"), "{text}");
    let text = plan("memory = '64 MiB', link = '10 MB/s'").fine().out;
    assert!(text.contains("bound by disk") && !text.contains("is taken to"), "{text}");
    plan("memory = '100 KiB'").fails(2, &["the disk tier needs", "its budget is 100.00 KiB"]);
    assert!(!job.at("spill").exists(), "a plan writes nothing");
}

#[test]
fn a_disk_that_cannot_be_used_is_refused_before_the_first_step() {
    let job = Job::new(&wide());
    let wants = job.hydra(&["plan", "--json"]).fine().json()["host_bytes"].as_u64().expect("bytes");
    let memory = format!("host.memory={}", wants * 2 / 3);
    let smallest = job.hydra(&["plan", "--json"]).fine().json()["smallest_device_bytes"].as_u64().expect("bytes");
    let device = format!("device.0.memory={}", 2 * smallest);
    for path in ["job.toml", "job.toml/spill"] {
        let disk = format!("host.disk={{ path = '{path}', memory = '64 MiB' }}");
        job.hydra(&["train", "--set", &memory, "--set", &device, "--set", &disk]).fails(2, &["disk tier", path]);
    }
    let disk = format!("host.disk={{ path = '{TAKES_NOTHING}', memory = '64 MiB' }}");
    let ran = job.hydra(&["train", "--set", &memory, "--set", &device, "--set", &disk]);
    ran.fails(code_of_nothing(), &[TAKES_NOTHING]);
    // Where nothing need go there, nobody looks at the folder.
    job.hydra(&["train", "--set", "host.disk={ path = 'job.toml', memory = 1 }"]).fine();
}

#[test]
fn several_models_share_the_disk_and_go_on_from_it() {
    let models =
        model("a", "optimizer = { lr = 0.01 }") + &model("b", "optimizer = { kind = 'sgd', momentum = 0.9, lr = 0.1 }");
    let job = Job::new(&(TWO_CORES.to_string() + &models));
    let all = job.hydra(&["plan", "--json"]).fine().json();
    let smallest = all["smallest_device_bytes"].as_u64().expect("bytes");
    let device = format!("device.0.memory={smallest}");
    job.hydra(&["train", "--set", "run.out=whole", "--set", &device]).fine();
    let wants = job.json("whole/plan.json")["host_bytes"].as_u64().expect("bytes");
    let memory = format!("host.memory={}", wants * 3 / 4);
    let sets = ["--set", &device, "--set", &memory, "--set", DISK];
    // A part of the steps, and the rest from the checkpoint.
    job.hydra(
        &[&["train", "--set", "run.out=part", "--set", "model.0.steps=2", "--set", "model.1.steps=3"], &sets[..]]
            .concat(),
    )
    .fine();
    let rest = job.hydra(&[&["train", "--set", "run.out=part", "--resume", "require"], &sets[..]].concat()).fine();
    assert!(rest.out.contains("disk"), "{}", rest.out);
    for name in ["a", "b"] {
        assert!(weights(&job, "part", name) == weights(&job, "whole", name), "{name}: other bits");
    }
}
