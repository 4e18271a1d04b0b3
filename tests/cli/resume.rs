//! Runs that go on: what is kept of the parts before, and what is said where something of them is gone.

use super::inbox::{Running, steps};
use super::many::{TWO_CORES, model};
use super::{GPT, Job, taken_apart, tensor_file};
use hydra::train::metrics::read_rows;
use serde_json::Value;
use std::fs;
use std::process::Command;

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

/// Its checkpoint is gone, and with it all that the trace tells of.
#[test]
fn the_trace_of_a_run_that_begins_anew_takes_the_place_of_the_older() {
    let job = Job::new(GPT);
    job.hydra(&["train"]).fine();
    for _ in 0..2 {
        fs::remove_file(job.at("runs/job/m/checkpoint.safetensors")).expect("a checkpoint");
        goes_on(&job, "auto", &[]).fine();
        let files = fs::read_dir(job.at("runs/job")).expect("a folder").map(|f| f.expect("a file").file_name());
        let traces: Vec<_> = files.filter(|name| name.to_string_lossy().starts_with("trace")).collect();
        assert_eq!(traces, ["trace.json"]);
    }
    assert!(job.json("runs/job/trace.json")["traceEvents"].as_array().expect("events").len() > 10);
}

/// A run that went on from a model's end and failed has no part in what the model came to.
#[test]
fn steps_beyond_the_checkpoint_of_a_model_that_is_done_are_dropped() {
    for others in ["", "b"] {
        let mut text = model("m", "optimizer = { kind = 'sgd', lr = 0.01 }");
        if !others.is_empty() {
            text += &model(others, "");
        }
        let job = Job::new(&text);
        let first = job.hydra(&["train", "--json"]).fine().json();
        let metrics = || fs::read_to_string(job.at("runs/job/m/metrics.jsonl")).expect("metrics");
        let before = metrics();
        let failed = goes_on(&job, "auto", &["model.0.steps=9", "model.0.lr=1e30"]);
        assert!(failed.code != 0 && metrics().lines().count() > 4, "{failed:?}");
        // The other has something left to do, or nothing has.
        let sets: &[&str] = if others.is_empty() { &[] } else { &["--set", "model.1.steps=5"] };
        let again = job.hydra(&[&["train", "--resume", "auto", "--json"], sets].concat()).fine().json();
        for key in ["status", "steps", "loss", "secs"] {
            assert_eq!(again["models"][0][key], first["models"][0][key], "{key}: {again}");
        }
        assert_eq!(metrics(), before);
    }
}

/// Half floats end at 65504, and AdamW's first step moves every weight by the learning rate.
#[test]
fn what_a_model_has_learnt_that_cannot_be_saved_is_in_a_checkpoint() {
    let job = Job::fixture("gpt2");
    let weights = job.at("model/model.safetensors");
    let kept = fs::read(&weights).expect("weights");
    let (header, data) = taken_apart(&kept);
    let halves: Vec<(String, Vec<usize>, Vec<u8>)> = header
        .as_object()
        .expect("tensors")
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, tensor)| {
            assert_eq!(tensor["dtype"], "F32", "{name}");
            let list = |key: &str| -> Vec<usize> { serde_json::from_value(tensor[key].clone()).expect("numbers") };
            let at = list("data_offsets");
            let floats = data[at[0]..at[1]].as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
            (name.clone(), list("shape"), floats.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect())
        })
        .collect();
    let entries: Vec<(&str, &str, &[usize], Vec<u8>)> =
        halves.iter().map(|(name, shape, bytes)| (name.as_str(), "F16", &shape[..], bytes.clone())).collect();
    fs::write(&weights, tensor_file(&entries)).expect("weights");
    // Nobody can go on from what is not finite.
    let sets = ["run.out=infinite", "model.0.steps=1", "model.0.lr=3e38", "model.0.weight_decay=100"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let infinite = job.hydra(&[&["train"], &sets[..]].concat());
    assert!(infinite.code == 2 && infinite.err.contains("which is no finite F16"), "{infinite:?}");
    assert!(job.at("infinite/m/metrics.jsonl").exists() && !job.at("infinite/m/checkpoint.safetensors").exists());
    let sets = ["model.0.steps=1", "model.0.lr=1e5"];
    let first = job.hydra(&["train", "--json", "--set", sets[0], "--set", sets[1]]);
    assert!(first.code == 2 && first.err.contains("which is no finite F16"), "{first:?}");
    assert!(
        first.err.contains("a checkpoint after 1 steps is there, from which --resume auto tries again"),
        "{first:?}"
    );
    let row = &first.json()["models"][0];
    assert!(job.at("runs/job/m/model").exists() && row["status"] == "failed" && row["model"].is_null(), "{row}");
    // As f32 they can be: nothing is trained again.
    fs::write(&weights, kept).expect("weights");
    let metrics = fs::read(job.at("runs/job/m/metrics.jsonl")).expect("metrics");
    goes_on(&job, "require", &sets).fine();
    assert!(fs::read(job.at("runs/job/m/metrics.jsonl")).expect("metrics") == metrics);
    hydra::nn::open(&job.at("runs/job/m/model")).expect("the saved model loads");
    assert!(goes_on(&job, "require", &sets).fine().out.contains("nothing to do"));
}

#[test]
fn a_model_that_was_renamed_is_told_and_not_lost() {
    let job = Job::new(GPT);
    job.hydra(&["train"]).fine();
    let renamed = "model.0.name=m2";
    goes_on(&job, "require", &[renamed]).bad(&["runs/job", "models that the job has not: \"m\"", "is it \"m2\" now?"]);
    assert!(!job.at("runs/job/m2").exists());
    // Nothing is near to it.
    let other = goes_on(&job, "require", &["model.0.name=something-else"]);
    other.bad(&["models that the job has not: \"m\""]);
    assert!(!other.err.contains("is it"), "{other:?}");
    let ran = goes_on(&job, "auto", &[renamed]).fine();
    assert_eq!(ran.err.lines().count(), 1, "{ran:?}");
    assert!(
        ran.err.starts_with("warning: ") && ran.err.contains("\"m\"; they are left as they are; is it \"m2\""),
        "{ran:?}"
    );
    assert!(job.at("runs/job/m/checkpoint.safetensors").exists() && ran.out.contains("m2: 4 steps done"));
}

#[test]
fn an_interrupted_run_prints_its_object_too() {
    let endless = steps(&model("endless", ""), 2_000_000_000);
    for (text, run) in [(endless.clone(), "alone"), (format!("{TWO_CORES}{}{endless}", model("short", "")), "both")] {
        let job = Job::new(&text);
        let out = format!("run.out={run}");
        let mut running = Running::start(&job, "first", &["--json", "--set", &out]);
        let rows = |name: &str| read_rows(&job.at(&format!("{run}/{name}/metrics.jsonl"))).map_or(0, |rows| rows.len());
        let saved = |name: &str| run == "alone" || job.at(&format!("{run}/{name}/checkpoint.safetensors")).exists();
        running.wait_until("a step, and the end of the short one", || rows("endless") > 0 && saved("short"));
        Command::new("kill").args(["-TERM", &running.child.id().to_string()]).status().expect("kill");
        let ran = running.wait_end();
        ran.fails(75, &["interrupted at step", "after a checkpoint"]);
        let said = ran.json();
        let models = said["models"].as_array().expect("a list");
        let of = |name: &str| models.iter().find(|row| row["name"] == name).expect("a row");
        let row = of("endless");
        assert!(row["status"] == "interrupted" && row["model"].is_null() && row["steps"] == rows("endless"), "{said}");
        assert!(row["loss"].as_f64().is_some() && models.len() == if run == "alone" { 1 } else { 2 }, "{said}");
        if run == "both" {
            assert!(of("short")["status"] == "done" && of("short")["model"].as_str().is_some(), "{said}");
        }
    }
}

/// `nohup` starts a program so that it ignores SIGHUP, and a shell without job control what it puts into the background
/// so that it ignores SIGINT.
#[test]
fn a_signal_that_a_run_was_started_to_ignore_stays_ignored() {
    let job = Job::new(&steps(&model("m", ""), 2_000_000_000));
    for (ignored, mask, asks) in [("HUP,INT", 0b11, "TERM"), ("TERM", 1 << 14, "HUP"), ("HUP,TERM", 1 << 14 | 1, "INT")]
    {
        let mut env = Command::new("env");
        // Whoever started the tests may ignore some too.
        let ignore = format!("--ignore-signal={ignored}");
        env.args(["--default-signal=HUP,INT,TERM", &ignore, env!("CARGO_BIN_EXE_hydra")]);
        let set = format!("run.out={asks}");
        let mut running = Running::start_by(env, &job, asks, &["--set", &set]);
        let rows = || read_rows(&job.at(&format!("{asks}/m/metrics.jsonl"))).map_or(0, |rows| rows.len());
        running.wait_until("a step", || rows() > 0);
        let id = running.child.id().to_string();
        let status = fs::read_to_string(format!("/proc/{id}/status")).expect("the program is there");
        let ignores = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a line");
        let ignores = u64::from_str_radix(ignores.trim(), 16).expect("a mask");
        assert_eq!(ignores & (1 << 14 | 0b11), mask, "{ignored}");
        let send = |signal: &str| Command::new("kill").args(["-s", signal, &id]).status().expect("kill");
        for signal in ignored.split(',') {
            send(signal);
        }
        let before = rows();
        running.wait_until("further steps", || rows() > before + 20);
        send(asks);
        running.wait_end().fails(75, &["interrupted at step", "after a checkpoint"]);
    }
}

/// What is lost is not begun anew in silence.
#[test]
fn a_checkpoint_that_is_missing_among_others_is_told() {
    let job = Job::new(&(model("m", "") + &model("n", "")));
    job.hydra(&["train"]).fine();
    let metrics = || fs::read_to_string(job.at("runs/job/n/metrics.jsonl")).expect("metrics");
    let before = metrics();
    fs::remove_file(job.at("runs/job/n/checkpoint.safetensors")).expect("a checkpoint");
    let more = ["model.0.steps=5", "model.1.steps=5"];
    goes_on(&job, "require", &more).bad(&["n: has trained and has no checkpoint in ", "runs/job/n; --resume require"]);
    assert_eq!(metrics(), before);
    let ran = goes_on(&job, "auto", &more).fine();
    assert!(ran.err.starts_with("warning: n: has trained and has no checkpoint in "), "{ran:?}");
    assert!(ran.err.lines().count() == 1 && metrics().lines().count() == 5, "{ran:?}");
    // One that has not begun has nothing to go on from.
    let text = fs::read_to_string(job.at("job.toml")).expect("a job") + &model("late", "");
    fs::write(job.at("job.toml"), text).expect("a job");
    let ran = goes_on(&job, "require", &more).fine();
    assert!(ran.err.is_empty() && job.at("runs/job/late/checkpoint.safetensors").exists(), "{ran:?}");
}

/// It lies in the folder still, and is not what the run has come to.
#[test]
fn the_model_of_an_earlier_end_is_not_that_of_an_interrupted_run() {
    let job = Job::new(&format!("{TWO_CORES}{}{}", model("m", ""), model("k", "")));
    job.hydra(&["train"]).fine();
    assert!(job.at("runs/job/results.csv").exists());
    let sets = ["--json", "--resume", "auto", "--set", "model.0.steps=2000000000"];
    let mut running = Running::start(&job, "second", &sets);
    let rows = || read_rows(&job.at("runs/job/m/metrics.jsonl")).map_or(0, |rows| rows.len());
    running.wait_until("a further step", || rows() > 4);
    Command::new("kill").args(["-TERM", &running.child.id().to_string()]).status().expect("kill");
    let ran = running.wait_end();
    ran.fails(75, &["interrupted at step"]);
    let row = &ran.json()["models"][0];
    assert!(row["status"] == "interrupted" && row["model"].is_null(), "{row}");
    assert!(!job.at("runs/job/results.csv").exists(), "it would be the earlier end's");
}

#[test]
fn a_model_that_is_saved_is_done_though_its_last_checkpoint_is_not() {
    let job = Job::new(&steps(GPT, 400));
    let mut running = Running::start(&job, "run", &["--json"]);
    running.wait_until("a step", || read_rows(&job.at("runs/job/m/metrics.jsonl")).is_ok_and(|rows| !rows.is_empty()));
    fs::create_dir(job.at("runs/job/m/checkpoint.safetensors")).expect("a folder in the way");
    let ran = running.wait_end();
    assert!(ran.err.contains("m: the model is saved, and its last checkpoint is not"), "{ran:?}");
    let row = &ran.fine().json()["models"][0];
    assert!(row["status"] == "done" && row["model"].is_string(), "{row}");
}

#[test]
fn a_warmup_that_never_ends_is_told() {
    let warms = |steps| format!("{}schedule = {{ kind = 'cosine', warmup = {steps} }}\n", GPT);
    for (warmup, warns) in [(4, false), (5, true)] {
        let job = Job::new(&warms(warmup));
        for command in ["plan", "train"] {
            let ran = job.hydra(&[command]).fine();
            let says = "job.toml: model.0.schedule.warmup: 5 steps of warm-up are more than all 4 steps";
            assert!(ran.err.lines().count() == usize::from(warns) && ran.err.contains(says) == warns, "{ran:?}");
        }
    }
}

#[test]
fn rows_of_metrics_that_are_gone_are_counted() {
    let job = Job::new(GPT);
    job.hydra(&["train"]).fine();
    let metrics = job.at("runs/job/m/metrics.jsonl");
    let whole = fs::read_to_string(&metrics).expect("metrics");
    let lines: Vec<&str> = whole.lines().collect();
    let garbage = format!("{}\nnonsense \u{0}\n{}\n", lines[0], lines[3]);
    let torn = format!("{}\n{}\n{}", lines[0], lines[1], &lines[2][..9]);
    let (checkpoint, kept) = (job.at("runs/job/m/checkpoint.safetensors"), job.at("kept"));
    fs::copy(&checkpoint, &kept).expect("a copy");
    for (text, missing, steps) in [
        (Some(whole.as_str()), 0, vec![0, 1, 2, 3, 4]),
        (Some(&garbage), 2, vec![0, 3, 4]),
        (Some(&torn), 2, vec![0, 1, 4]),
        (Some(""), 4, vec![4]),
        (None, 4, vec![4]),
    ] {
        fs::copy(&kept, &checkpoint).expect("a copy");
        match text {
            Some(text) => fs::write(&metrics, text).expect("metrics"),
            None => fs::remove_file(&metrics).expect("it is there"),
        }
        let ran = goes_on(&job, "auto", &["model.0.steps=5"]).fine();
        let warnings: Vec<&str> = ran.err.lines().collect();
        match missing {
            0 => assert!(warnings.is_empty(), "{ran:?}"),
            missing => {
                assert!(warnings.len() == 1 && warnings[0].starts_with("warning: "), "{ran:?}");
                let says = format!("m/metrics.jsonl: {missing} of the rows of 4 steps are missing");
                assert!(warnings[0].contains(&says), "{ran:?}");
            }
        }
        let rows = fs::read_to_string(&metrics).expect("metrics");
        let row = |line: &str| serde_json::from_str::<Value>(line).expect("a row")["step"].as_u64().expect("a step");
        assert_eq!(rows.lines().map(row).collect::<Vec<_>>(), steps);
    }
}

#[test]
fn what_is_frozen_is_in_no_checkpoint_and_must_be_the_same() {
    for key in ["frozen=['transformer.wte', 'transformer.h.0.']", "lora={ rank = 2, targets = ['attn.c_attn'] }"] {
        let job = Job::fixture("gpt2");
        let set = format!("model.0.{key}");
        let train = |run: &str, steps: u64, more: &[&str]| {
            let (out, steps) = (format!("run.out={run}"), format!("model.0.steps={steps}"));
            job.hydra(&[&["train", "--set", &out, "--set", &steps, "--set", &set][..], more].concat())
        };
        train("whole", 3, &[]).fine();
        train("parts", 2, &[]).fine();
        let checkpoint = fs::metadata(job.at("parts/m/checkpoint.safetensors")).expect("a checkpoint").len();
        let weights = |run: &str| fs::read(job.at(&format!("{run}/m/model/model.safetensors"))).expect("weights");
        if key.starts_with("lora") {
            assert!(checkpoint < weights("parts").len() as u64 / 2, "{checkpoint} bytes");
        }
        // Another table of words, by one bit of its last number; then the same as it was.
        let file = job.at("model/model.safetensors");
        let first = fs::read(&file).expect("weights");
        let (header, _) = super::taken_apart(&first);
        let end = header["transformer.wte.weight"]["data_offsets"][1].as_u64().expect("an offset") as usize;
        let start = 8 + u64::from_le_bytes(first[..8].try_into().expect("eight bytes")) as usize;
        let mut other = first.clone();
        other[start + end - 2] ^= 1;
        fs::write(&file, other).expect("weights");
        let says = ["checkpoint.safetensors", "the frozen weights are others than those that it was trained with"];
        train("parts", 3, &["--resume", "require"]).bad(&says);
        fs::write(&file, first).expect("weights");
        train("parts", 3, &["--resume", "require"]).fine();
        assert!(weights("parts") == weights("whole"), "{key}: other bits");
    }
}
