//! Models that come to a running program, and go: by files in the run's inbox, which are taken or refused.

use super::many::{TWO_CORES, model};
use super::{Job, Ran, copy_folder, hydra};
use hydra::train::metrics::{Row, read_rows};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Ends a program that a failed test leaves behind.
pub(super) struct Running {
    pub(super) child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has mostly ended by itself.
        let _ = self.child.kill();
    }
}

impl Running {
    /// Starts training; what it prints goes into files, so that it never waits for a reader.
    pub(super) fn start(job: &Job, name: &str, args: &[&str]) -> Running {
        Running::start_by(Command::new(env!("CARGO_BIN_EXE_hydra")), job, name, args)
    }

    /// The same by a command that gives way to the program.
    pub(super) fn start_by(mut command: Command, job: &Job, name: &str, args: &[&str]) -> Running {
        let (out, err) = (job.at(&format!("{name}.out")), job.at(&format!("{name}.err")));
        let to = |path: &Path| Stdio::from(File::create(path).expect("a file"));
        let child = command
            .args(["train", &job.at("job.toml").display().to_string()])
            .args(args)
            .stdout(to(&out))
            .stderr(to(&err))
            .spawn()
            .expect("the program starts");
        Running { child, out, err }
    }

    /// Waits until `done`, while the program runs.
    #[track_caller]
    pub(super) fn wait_until(&mut self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            let ended = self.child.try_wait().expect("its status");
            assert!(ended.is_none(), "it ended before {what}: {}", fs::read_to_string(&self.err).expect("stderr"));
            assert!(Instant::now() < deadline, "no {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    pub(super) fn wait_end(mut self) -> Ran {
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            match self.child.try_wait().expect("its status") {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "it does not end"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let read = |path: &PathBuf| fs::read_to_string(path).expect("what it printed");
        Ran { code: status.code().expect("an exit code"), out: read(&self.out), err: read(&self.err) }
    }
}

pub(super) fn steps(text: &str, steps: u64) -> String {
    text.replace("steps = 4", &format!("steps = {steps}"))
}

/// Writes a file beside the inbox and moves it in, as a user is told to.
fn drop_in(job: &Job, run: &str, name: &str, text: &str) {
    fs::write(job.at("dropped"), text).expect("a file");
    fs::rename(job.at("dropped"), job.at(&format!("{run}/inbox/{name}"))).expect("the inbox is there");
}

#[test]
fn models_come_and_go_and_leave_the_bits_of_all_alone() {
    let a = steps(&model("a", "optimizer = { lr = 0.01 }"), 90);
    let b = steps(&model("b", ""), 70);
    let c = steps(&model("c", "optimizer = { kind = 'sgd', lr = 0.1 }").replace("n_embd = 32", "n_embd = 24"), 110);
    // Goes on until it is cancelled, so that nothing here depends on how fast the others are.
    let endless = steps(&model("endless", "").replace("n_layer = 2", "n_layer = 1"), 2_000_000_000);
    let job = Job::new(&format!("{TWO_CORES}{a}{b}{endless}"));
    // So little memory that no model is whole on a device.
    let mut first = Running::start(&job, "first", &["--set", "device.0.memory=400 KiB"]);
    let rows = |name: &str| read_rows(&job.at(&format!("runs/job/{name}/metrics.jsonl"))).map_or(0, |rows| rows.len());
    first.wait_until("a step of a", || rows("a") > 0);
    let inbox = |name: &str| job.at(&format!("runs/job/inbox/{name}"));
    let peak = || job.json("runs/job/plan.json")["device_peak_bytes"].as_u64().expect("bytes");
    let filled = peak();
    drop_in(&job, "runs/job", "broken.toml", "[[model]\n");
    drop_in(&job, "runs/job", "twin.toml", &a);
    drop_in(&job, "runs/job", "device.toml", &format!("{TWO_CORES}{}", model("d", "")));
    drop_in(&job, "runs/job", "wide.toml", &model("wide", "").replace("n_embd = 32", "n_embd = 512"));
    drop_in(&job, "runs/job", "nobody.cancel", "");
    fs::create_dir(inbox("folder.toml")).expect("a folder");
    std::os::unix::fs::symlink("/no/such/file", inbox("link.cancel")).expect("a link");
    drop_in(&job, "runs/job", "c.toml", &c);
    first.wait_until("a step of c", || rows("c") > 0);
    for (file, why) in [
        ("broken.toml", "no valid TOML"),
        ("twin.toml", "job.toml has the name \"a\" too"),
        ("device.toml", "device: unknown key"),
        ("wide.toml", "device memory"),
        ("nobody.cancel", "no model called \"nobody\""),
        ("folder.toml", "folder.toml: is a folder, and no file"),
        ("link.cancel", "link.cancel: is a link that leads nowhere, and no file"),
    ] {
        first.wait_until("the refusal of all", || inbox(&format!("{file}.refused")).symlink_metadata().is_ok());
        let reason = fs::read_to_string(inbox(&format!("{file}.reason"))).expect("a reason");
        assert!(reason.contains(why), "{file}: {reason}");
        assert!(!inbox(file).exists() && !job.at("runs/job/wide").exists());
    }
    assert!(inbox("c.toml.taken").exists() && !inbox("c.toml").exists());
    Command::new("kill").args(["-TERM", &first.child.id().to_string()]).status().expect("kill");
    let first = first.wait_end();
    assert_eq!(first.code, 75, "{first:?}");
    let warnings: Vec<&str> = first.err.lines().filter(|line| line.starts_with("warning: refused: ")).collect();
    assert_eq!(warnings.len(), 7, "a line for each: {first:?}");
    let notes = |ran: &Ran| -> Vec<String> {
        ran.err.lines().filter_map(|line| line.strip_prefix("note: ")).map(String::from).collect()
    };
    assert_eq!(notes(&first), [format!("c: has joined the run ({})", inbox("c.toml").display())]);
    // Each that goes on, with the steps that it has.
    let last = first.err.lines().last().expect("a line");
    let at: Vec<&str> = last.strip_prefix("error: interrupted at ").expect(last).split(", ").collect();
    let step = |name: &str| at.iter().find_map(|at| at.strip_suffix(&format!(" of {name}"))?.strip_prefix("step "));
    for name in ["endless", "c"] {
        assert_eq!(step(name).and_then(|step| step.parse().ok()), Some(rows(name)), "{last}");
    }
    assert!(last.ends_with(", after a checkpoint"), "{last}");
    let plan = job.json("runs/job/plan.json");
    let names: Vec<&Value> = plan["models"].as_array().expect("a list").iter().map(|m| &m["name"]).collect();
    assert_eq!(names, ["a", "b", "endless", "c"]);
    // What the budget has left over is filled before c comes and after.
    assert!((filled..=400 << 10).contains(&peak()), "{} after {filled} bytes", peak());

    // On with all the memory that they want, where each has a home; beside those that stay at home another comes, and
    // one that fails.
    let e = steps(&model("e", "optimizer = { lr = 0.02 }").replace("n_layer = 2", "n_layer = 3"), 20);
    let mut second = Running::start(&job, "second", &["--resume", "auto"]);
    let trained = rows("endless");
    second.wait_until("a step of endless", || rows("endless") > trained);
    drop_in(&job, "runs/job", "e.toml", &e);
    drop_in(&job, "runs/job", "hot.toml", &steps(&model("hot", "optimizer = { kind = 'sgd', lr = 1e30 }"), 9));
    second.wait_until("the end of a, b, c and e", || {
        let saved = |name: &&str| job.at(&format!("runs/job/{name}/model/model.safetensors")).exists();
        ["a", "b", "c", "e"].iter().all(saved) && inbox("hot.toml.taken").exists()
    });
    // One whose weights are no numbers, by a path from the inbox.
    copy_folder(&job.at("runs/job/a/model"), &job.at("damaged"));
    let weights = job.at("damaged/model.safetensors");
    let mut bytes = fs::read(&weights).expect("weights");
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).expect("weights");
    let damaged = "[[model]]\nname = 'nan'\nfrom = '../../../damaged'\ndata = { random = true }\nsteps = 2\n";
    drop_in(&job, "runs/job", "nan.toml", damaged);
    second.wait_until("the refusal of damaged weights", || inbox("nan.toml.refused").exists());
    let reason = fs::read_to_string(inbox("nan.toml.reason")).expect("a reason");
    assert!(reason.contains("is NaN in f32"), "{reason}");
    drop_in(&job, "runs/job", "endless.cancel", "");
    let second = second.wait_end();
    assert_eq!(second.code, 2, "{second:?}");
    let notes = notes(&second);
    assert!(notes.len() == 3 && notes[0].starts_with("e: has joined the run ("), "{notes:?}");
    assert!(notes[1].starts_with("hot: has joined the run ("), "{notes:?}");
    let steps = rows("endless");
    assert_eq!(notes[2], format!("endless: has left the run after {steps} of 2000000000 steps"));
    let error = second.err.lines().last().expect("a line");
    assert!(error.starts_with("error: 1 of 6 models failed; hot: the loss is "), "{error}");
    assert!(inbox("endless.cancel.taken").exists());
    let line = second.out.lines().rfind(|line| line.contains("\"progress\"")).expect("a line of progress");
    let line: Value = serde_json::from_str(line).expect("json");
    for model in line["models"].as_array().expect("a list") {
        let name = model["name"].as_str().expect("a name");
        let (status, reason) = match name {
            "endless" => ("cancelled", None),
            "hot" => ("failed", Some("the loss is")),
            _ => ("done", None),
        };
        assert_eq!(model["status"], status, "{line}");
        let told = model["reason"].as_str();
        assert!(told.is_some() == reason.is_some() && told.unwrap_or("").contains(reason.unwrap_or("")), "{line}");
    }
    // Once more: what has ended is left as it is, what has failed may have a better machine now.
    let third = job.hydra(&["train", "--resume", "auto"]);
    let lines: Vec<&str> = third.err.lines().collect();
    assert!(third.code == 2 && lines.len() == 2, "{third:?}");
    assert!(lines[0].starts_with("warning: hot: has trained and has no checkpoint in "), "{third:?}");
    assert!(lines[1].starts_with("error: 1 of 6 models failed; hot: "), "{third:?}");
    let results = fs::read_to_string(job.at("runs/job/results.csv")).expect("results.csv");
    let row = |name: &str| results.lines().find(|l| l.starts_with(name)).expect("a row").to_string();
    for (name, steps) in [("a", 90), ("b", 70), ("c", 110), ("e", 20)] {
        assert!(row(&format!("{name},")).starts_with(&format!("{name},done,,{steps},4.")), "with its loss: {results}");
    }
    // Seconds are those of all steps, in whichever part of the run they were done.
    for name in ["a", "b", "c", "e", "endless"] {
        let all = read_rows(&job.at(&format!("runs/job/{name}/metrics.jsonl"))).expect("rows");
        let want = all.iter().map(Row::secs).sum::<f64>();
        let secs: f64 = row(&format!("{name},")).split(',').nth(6).and_then(|s| s.parse().ok()).expect("seconds");
        assert!(secs == want && secs > 0.0, "{name}: {want} {results}");
    }
    let done: u64 = row("endless,").split(',').nth(3).and_then(|steps| steps.parse().ok()).expect("steps");
    assert!(row("endless,").contains(",cancelled,") && done == rows("endless") as u64, "{results}");
    hydra::nn::open(&job.at("runs/job/endless/model")).expect("what it has learnt is saved");
    hydra(&["report", &job.at("runs/job").display().to_string()]).fine();
    let page = fs::read_to_string(job.at("runs/job/report.html")).expect("a page");
    assert!(page.contains("c: steps 0 to 109 in ") && page.contains("<td>cancelled</td>"), "{page}");

    fs::write(job.at("job.toml"), format!("{a}{b}{c}{e}")).expect("job.toml");
    job.hydra(&["train", "--set", "run.out=alone", "--set", "run.policy=one-at-a-time"]).fine();
    for name in ["a", "b", "c", "e"] {
        let weights = |run: &str| fs::read(job.at(&format!("{run}/{name}/model/model.safetensors"))).expect("weights");
        assert!(weights("runs/job") == weights("alone"), "{name}: other bits");
    }
}

#[test]
fn a_run_of_one_model_takes_no_other_but_is_cancelled() {
    let job = Job::new(&model("m", ""));
    fs::create_dir_all(job.at("runs/job/inbox")).expect("an inbox");
    drop_in(&job, "runs/job", "n.toml", &model("n", ""));
    drop_in(&job, "runs/job", "m.cancel", "");
    // Files that have just changed may still be written to, and are left for the next look, before which this run would
    // end.
    std::thread::sleep(Duration::from_millis(300));
    let ran = job.hydra(&["train"]).fine();
    assert!(ran.out.contains("m: cancelled, 0 steps done"), "{ran:?}");
    let reason = fs::read_to_string(job.at("runs/job/inbox/n.toml.reason")).expect("a reason");
    assert!(reason.contains("one that begins with two takes others"), "{reason}");
    assert!(job.at("runs/job/inbox/m.cancel.taken").exists() && !job.at("runs/job/m/model").exists());
    // Who wants it back takes the cancellation away.
    fs::remove_file(job.at("runs/job/inbox/m.cancel.taken")).expect("it is there");
    let ran = job.hydra(&["train", "--resume", "auto"]).fine();
    assert!(ran.out.contains("m: 4 steps done"), "{ran:?}");
}

#[test]
fn a_cancelled_model_that_was_not_saved_is_saved_by_the_run_that_goes_on() {
    let job = Job::new(&steps(&model("m", ""), 2_000_000_000));
    let mut first = Running::start(&job, "first", &[]);
    let rows = || read_rows(&job.at("runs/job/m/metrics.jsonl")).map_or(0, |rows| rows.len());
    first.wait_until("a step", || rows() > 0);
    Command::new("kill").args(["-TERM", &first.child.id().to_string()]).status().expect("kill");
    assert_eq!(first.wait_end().code, 75);
    // As if the program had died between reading this and saving the model.
    let (done, taken) = (rows(), job.at("runs/job/inbox/m.cancel.taken"));
    fs::write(&taken, "").expect("a file");
    let ran = job.hydra(&["train", "--resume", "auto"]).fine();
    assert!(ran.out.contains(&format!("m: cancelled, {done} steps done")), "{ran:?}");
    assert_eq!(rows(), done, "no step of it is trained");
    hydra::nn::open(&job.at("runs/job/m/model")).expect("what it has learnt is saved");
    let ran = job.hydra(&["train", "--resume", "auto"]).fine();
    assert!(ran.out.contains("nothing to do"), "{ran:?}");
}
