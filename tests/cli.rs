//! The program itself: exit codes, what it prints, what it writes, and what it leaves alone when the input is at fault.

#[path = "cli/cluster.rs"]
mod cluster;
mod common;
#[path = "cli/disk.rs"]
mod disk;
#[path = "cli/inbox.rs"]
mod inbox;
#[path = "cli/many.rs"]
mod many;
#[path = "cli/paths.rs"]
mod paths;
#[path = "cli/resume.rs"]
mod resume;
#[path = "cli/settings.rs"]
mod settings;
#[path = "cli/split.rs"]
mod split;
#[path = "cli/tokenizer.rs"]
mod tokenizer;

use common::fixture;
use hydra::train::metrics::{Row, read_rows};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GPT: &str = r#"
[[model]]
name = "m"
family = "gpt2"
config = { n_layer = 2, n_embd = 32, n_head = 2, n_positions = 16, vocab_size = 61, bos_token_id = 0, eos_token_id = 0 }
data = { random = true }
batch = 4
microbatch = 2
steps = 4
"#;

/// A folder with a job in it.
struct Job {
    folder: TempDir,
}

impl Job {
    /// A folder with the job `text`; its devices have rates that were measured once.
    fn new(text: &str) -> Job {
        Job::measured(&with_rates(text))
    }

    /// The same as it is: whoever plans measures its devices.
    fn measured(text: &str) -> Job {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("job.toml"), text).expect("job.toml");
        Job { folder }
    }

    /// The fixture `case` with its own batches.
    fn fixture(case: &str) -> Job {
        let job = Job::measured("");
        copy_folder(&fixture(case).join("model"), &job.at("model"));
        fs::copy(fixture(case).join("batches.safetensors"), job.at("batches.safetensors")).expect("batches");
        let batch = if case == "gpt2" { 2 } else { batch_of(case) };
        let text = format!(
            "[[model]]\nname = 'm'\nfrom = 'model'\ndata = {{ batches = 'batches.safetensors' }}\nbatch = {batch}\nsteps = 3\n"
        );
        fs::write(job.at("job.toml"), text).expect("job.toml");
        job
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn hydra(&self, args: &[&str]) -> Ran {
        let mut all = vec![args[0].to_string(), self.at("job.toml").display().to_string()];
        all.extend(args[1..].iter().map(|a| a.to_string()));
        hydra(&all.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn json(&self, path: &str) -> Value {
        serde_json::from_slice(&fs::read(self.at(path)).expect(path)).expect("json")
    }
}

/// The job `text`, whose devices take their rates from a profile of this machine unless they are simulated.
fn with_rates(text: &str) -> String {
    static PROFILE: OnceLock<TempDir> = OnceLock::new();
    let folder = PROFILE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("here.json").display().to_string();
        hydra(&["devices", "--profile", &path]).fine();
        folder
    });
    let profile = format!("[[device]]\nprofile = '{}'\n", folder.path().join("here.json").display());
    match text.contains("[[device]]\n") {
        true if text.contains("kind = 'sim'") => text.to_string(),
        true => text.replace("[[device]]\n", &profile),
        false => profile + text,
    }
}

fn batch_of(case: &str) -> u64 {
    let bytes = fs::read(fixture(case).join("batches.safetensors")).expect("batches");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("header");
    header["labels"]["shape"][1].as_u64().expect("a batch")
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
        // Fixtures may be read-only; their copies are changed.
        let mut permissions = fs::metadata(to.join(entry.file_name())).expect("metadata").permissions();
        #[allow(clippy::permissions_set_readonly_false, reason = "a temporary file of the test")]
        permissions.set_readonly(false);
        fs::set_permissions(to.join(entry.file_name()), permissions).expect("permissions");
    }
}

/// What a run of the program gave.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        Ran { code: output.status.code().expect("an exit code"), out: text(output.stdout), err: text(output.stderr) }
    }
}

fn hydra(args: &[&str]) -> Ran {
    Command::new(env!("CARGO_BIN_EXE_hydra")).args(args).output().expect("the program runs").into()
}

impl Ran {
    #[track_caller]
    fn fine(self) -> Ran {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// The input is at fault: exit code 2 and one line that has all of `says`.
    #[track_caller]
    fn bad(&self, says: &[&str]) {
        self.fails(2, says);
        assert_eq!(self.err.lines().count(), 1, "{self:?}");
    }

    #[track_caller]
    fn fails(&self, code: i32, says: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        let first = self.err.lines().next().unwrap_or_default();
        assert!(first.starts_with("error: "), "{self:?}");
        for says in says {
            assert!(first.contains(says), "{says:?} is not in {self:?}");
        }
    }
}

/// A safetensors file from its header and its data.
fn tensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A safetensors file of little-endian integers or floats.
fn tensor_file(entries: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in entries {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.to_string(), json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
        data.extend_from_slice(bytes);
    }
    tensors(&Value::Object(header).to_string(), &data)
}

fn i64s(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Header and data of a safetensors file.
fn taken_apart(bytes: &[u8]) -> (Value, Vec<u8>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).expect("header"), bytes[8 + length..].to_vec())
}

/// A place in a file system that takes nothing, for root neither.
const TAKES_NOTHING: &str = "/sys/kernel/hydra";

/// The exit code of who writes there: where there is no such folder the input is at fault, and where it refuses the
/// machine is.
fn code_of_nothing() -> i32 {
    match fs::create_dir(TAKES_NOTHING).expect_err("it takes nothing").kind() {
        ErrorKind::NotFound => 2,
        _ => 1,
    }
}

#[test]
fn a_run_leaves_plan_metrics_trace_and_a_model_that_loads_again() {
    let job = Job::measured(GPT);
    let ran = job.hydra(&["train", "--json"]).fine();
    let said: Value = serde_json::from_str(&ran.out).expect("one JSON object");
    assert_eq!(said["models"][0]["steps"], 4);
    let plan = job.json("runs/job/plan.json");
    for key in ["device_peak_bytes", "smallest_device_bytes", "shards", "step_secs", "bound_secs"] {
        assert!(plan[key].as_f64().is_some_and(|n| n > 0.0), "{key}: {plan}");
    }
    let shard = &plan["models"][0]["shards"][0];
    for key in ["layers", "bytes", "tiers", "forward_secs", "backward_secs"] {
        assert!(!shard[key].is_null(), "{key}: {shard}");
    }
    let rows = read_rows(&job.at("runs/job/m/metrics.jsonl")).expect("rows");
    let steps = rows.iter().filter_map(|r| if let Row::Step(r) = r { Some(r) } else { None });
    assert_eq!(steps.map(|r| r.step).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let from = format!("# Relative paths start from {:?}.\n", job.folder.path());
    assert_eq!(fs::read_to_string(job.at("runs/job/job.toml")).expect("job"), from + GPT);
    assert!(job.json("runs/job/trace.json")["traceEvents"].as_array().expect("events").len() > 10);
    hydra::nn::open(&job.at("runs/job/m/model")).expect("the saved model loads");

    let before = fs::read(job.at("runs/job/plan.json")).expect("plan");
    job.hydra(&["train"]).bad(&["runs/job", "holds a run already", "--resume auto"]);
    assert_eq!(fs::read(job.at("runs/job/plan.json")).expect("plan"), before);
    for resume in ["auto", "require"] {
        let again = job.hydra(&["train", "--resume", resume]).fine();
        assert!(again.out.contains("nothing to do"), "{again:?}");
    }
    let fewer = job.hydra(&["train", "--resume", "auto", "--set", "model.0.steps=2"]);
    fewer.bad(&["checkpoint.safetensors", "after 4 steps, the job has 2"]);

    let report = hydra(&["report", &job.at("runs/job").display().to_string()]).fine();
    assert!(report.out.contains("report.html"), "{report:?}");
    assert!(fs::read_to_string(job.at("runs/job/report.html")).expect("page").contains("<svg"));
}

/// Two billion rows of an embedding, with all that goes with them, are terabytes.
#[test]
fn what_the_machine_has_no_memory_for_is_told_by_a_plan_and_not_begun() {
    let text = GPT.replace("vocab_size = 61", "vocab_size = 2_000_000_000");
    let job = Job::new(&format!("[host]\nmemory = '1000 TiB'\n{text}"));
    let says = "m: the machine has ";
    let plan = job.hydra(&["plan"]).fine();
    assert!(plan.err.starts_with(&format!("warning: {says}")) && plan.err.lines().count() == 1, "{plan:?}");
    for memory in [None, Some("device.0.memory=100 TiB")] {
        let sets: Vec<&str> = memory.into_iter().flat_map(|memory| ["--set", memory]).collect();
        let refused = job.hydra(&[&["train"], &sets[..]].concat());
        refused.fails(1, &[says, "the least that works, it does not fit either"]);
    }
    assert!(!job.at("runs").exists());
}

#[test]
fn encoders_are_trained_from_seeded_weights_and_load_again() {
    let sizes = "hidden_size = 24, num_hidden_layers = 2, num_attention_heads = 3, intermediate_size = 40";
    for (family, config, data, elems) in [
        ("bert", "vocab_size = 61, max_position_embeddings = 21", "context = 17", 61 * 24),
        ("vit", "image_size = 13, patch_size = 4, num_labels = 5", "image = [3, 13, 13]", 5 * 24),
    ] {
        let job = Job::new(&format!(
            "[[model]]\nname = 'm'\nfamily = '{family}'\nconfig = {{ {sizes}, {config} }}\ndata = {{ random = true, {data} }}\nbatch = 4\nmicrobatch = 2\nsteps = 3\n"
        ));
        job.hydra(&["plan"]).fine();
        job.hydra(&["train"]).fine();
        let rows = read_rows(&job.at("runs/job/m/metrics.jsonl")).expect("rows");
        assert_eq!(rows.iter().filter(|r| matches!(r, Row::Step(r) if r.loss.is_finite())).count(), 3, "{family}");
        let saved = hydra::nn::open(&job.at("runs/job/m/model")).expect("the saved model loads");
        let head = if family == "bert" { "bert.embeddings.word_embeddings.weight" } else { "classifier.weight" };
        let shape = &saved.form.tensors.iter().find(|t| t.name == head).expect("the head").shape;
        assert_eq!(saved.tensor(head, shape).expect("values").len(), elems);
    }
    let text = GPT
        .replace("n_layer = 2, n_embd = 32, n_head = 2, n_positions = 16, ", "")
        .replace("family = \"gpt2\"", "family = \"bert\"")
        .replace("random = true", "text = 'job.toml', tokenizer = 'bytes', context = 8");
    Job::new(&text).hydra(&["train"]).bad(&["job.toml: model.0.data.text: ", "random = true"]);
    let images = ["plan", "--set", "model.0.data={ random = true, context = 4 }"];
    Job::fixture("vit").hydra(&images).bad(&["job.toml: model.0.data.context: the model takes images"]);
}

#[test]
fn plain_lines_and_validation() {
    let text = "The quick brown fox jumps over the lazy dog. ".repeat(40);
    let model = GPT
        .replace("vocab_size = 61, ", "")
        .replace("random = true", "text = 'corpus.txt', tokenizer = 'bytes', context = 16");
    let job = Job::new(&format!("[run]\nout = 'out'\n{model}valid = {{ fraction = 0.2, every = 2 }}\n"));
    fs::write(job.at("corpus.txt"), text).expect("corpus");
    let ran = job.hydra(&["train"]).fine();
    assert!(ran.out.contains("step 4 of 4"), "{ran:?}");
    assert_eq!(ran.out.matches("held-out loss").count(), 3, "{ran:?}");
    assert!(!ran.out.contains('\u{1b}'), "no escape codes in a pipe: {ran:?}");
    let config = job.json("out/m/model/config.json");
    assert_eq!(config["vocab_size"], 256, "the tokenizer's");
    // An epoch is the minibatches there are.
    let plan = job.hydra(&["plan", "--json", "--set", "model.0.steps=1"]).fine();
    let plan: Value = serde_json::from_str(&plan.out).expect("json");
    assert_eq!(plan["models"][0]["steps"], 1);
    fs::write(job.at("held.txt"), "Held out. ".repeat(9)).expect("text");
    let own = job.hydra(&["train", "--set", "run.out=own", "--set", "model.0.valid={ text = 'held.txt', every = 9 }"]);
    assert_eq!(own.fine().out.matches("held-out loss").count(), 2);
}

/// A terminal that can only be written to line by line.
#[test]
fn a_terminal_without_bars_gets_lines() {
    let job = Job::new(GPT);
    let on_terminal = |term: &str| {
        let train =
            format!("{} train {} --set run.out={term}", env!("CARGO_BIN_EXE_hydra"), job.at("job.toml").display());
        let ran: Ran = Command::new("script")
            .args(["-qec", &train, "/dev/null"])
            .env("TERM", term)
            .stdin(Stdio::null())
            .output()
            .expect("script, of util-linux")
            .into();
        ran.fine().out
    };
    let lines = on_terminal("dumb");
    assert!(lines.contains("m: step 1 of 4  loss ") && lines.contains("m: step 4 of 4  loss "), "{lines}");
    assert!(!lines.contains('\u{1b}'), "{lines}");
    assert!(!on_terminal("xterm").contains("m: step 1 of 4"));
}

#[test]
fn a_device_that_states_a_profile_is_not_measured() {
    let job = Job::measured(&format!("[host]\nmemory = '1 GiB'\n[[device]]\nprofile = 'rates.json'\n{GPT}"));
    job.hydra(&["plan"]).bad(&["device.0.profile", "rates.json", "cannot be read"]);
    let rates = job.at("rates.json").display().to_string();
    hydra(&["devices", "--profile", &rates]).fine();
    let plan = job.hydra(&["plan", "--json"]).fine().out;
    assert_eq!(job.hydra(&["plan", "--json"]).fine().out, plan, "nothing was measured in between");
    let half = |cost: &mut Value| match cost {
        Value::Number(rate) => *cost = json!(rate.as_f64().expect("a rate") / 2.0),
        _ => panic!("{cost} is no rate"),
    };
    let mut cost = job.json("rates.json");
    cost["rates"].as_array_mut().expect("rates").iter_mut().for_each(|rate| half(&mut rate["work_per_sec"]));
    fs::write(job.at("rates.json"), cost.to_string()).expect("rates.json");
    let step_secs = |plan: &Value| plan["step_secs"].as_f64().expect("seconds");
    let plan: Value = serde_json::from_str(&plan).expect("json");
    let slower = job.hydra(&["plan", "--json"]).fine().json();
    assert!(step_secs(&slower) > step_secs(&plan), "{slower} {plan}");
    job.hydra(&["train"]).fine();
    assert_eq!(step_secs(&job.json("runs/job/plan.json")), step_secs(&slower));
    fs::write(job.at("rates.json"), "{}").expect("rates.json");
    job.hydra(&["train", "--set", "run.out=again"]).bad(&["device.0.profile", "is no profile"]);
    // What no device has is refused by name.
    for (field, value) in [
        ("memory_bytes_per_sec", json!(0)),
        ("memory_bytes_per_sec", json!(1e-300)),
        ("rates.0.work_per_sec", json!(1e300)),
        ("copy_secs", json!(1e308)),
        ("h2d_bytes_per_sec", json!(-1)),
        ("d2h_bytes_per_sec", json!(-0.0)),
        ("device_update_bytes_per_sec", json!(-1e9)),
        ("host_norm_bytes_per_sec", json!(0)),
        ("op_secs", json!(-1e-6)),
        ("hand_over_secs", json!(-1)),
        ("rates.1.work_per_sec", json!(0)),
        ("cores.count", json!(0)),
        ("cores.copy_bytes_per_sec", json!(-1)),
    ] {
        let mut bad = cost.clone();
        let cores = json!({ "count": 1, "copy_bytes_per_sec": 1e9 });
        bad.as_object_mut().expect("an object").insert("cores".into(), cores);
        *bad.pointer_mut(&format!("/{}", field.replace('.', "/"))).expect("it is there") = value;
        fs::write(job.at("rates.json"), bad.to_string()).expect("rates.json");
        job.hydra(&["plan"]).bad(&["job.toml: device.0.profile: ", &format!("rates.json: {field}: want ")]);
    }
}

#[test]
fn plan_is_text_or_what_plan_json_holds_and_writes_nothing() {
    let job = Job::new(&format!("[[device]]\nkind = 'sim'\nprofile = 'v100'\nmemory = '200 KiB'\n{GPT}"));
    let text = job.hydra(&["plan"]).fine();
    for says in ["shard", "device memory", "smallest budget that works", "a step", "what would help"] {
        assert!(text.out.contains(says), "{says}: {}", text.out);
    }
    assert!(!job.at("runs").exists());
    let said: Value = serde_json::from_str(&job.hydra(&["plan", "--json"]).fine().out).expect("json");
    job.hydra(&["plan", "--out", &job.at("plans").display().to_string()]).fine();
    assert_eq!(job.json("plans/plan.json"), said);
    job.hydra(&["train"]).bad(&["device.0.kind", "\"sim\"", "host"]);
    job.hydra(&["plan", "--set", "device.0.profile=v10"]).bad(&["device.0.profile", "v10", "did you mean \"v100\""]);
    job.hydra(&["plan", "--set", "device.0.profile=V100"]).bad(&["device.0.profile", "did you mean \"v100\""]);
}

/// What `plan` says would help, each promise held against the plan of a job that has that thing: its name, and how to
/// set it. Three at least are worth a line.
fn keeps_what_it_promises(job: &Job, things: &[(&str, &str)]) -> String {
    let step_secs = |sets: &[&str]| -> f64 {
        let ran = job.hydra(&[&["plan", "--json"], sets].concat()).fine();
        let plan: Value = serde_json::from_str(&ran.out).expect("one JSON object");
        plan["step_secs"].as_f64().expect("seconds")
    };
    let text = job.hydra(&["plan"]).fine().out;
    let (_, help) = text.split_once("what would help:\n").expect("it is said");
    let (before, mut kept) = (step_secs(&[]), 0);
    for (what, set) in things {
        let gain = before / step_secs(&["--set", set]);
        let line = help.lines().find(|line| line.trim_start().starts_with(what));
        let said = line.map(|line| line.contains(&format!("  {gain:.2} times as fast  ")));
        assert_eq!(said, (gain >= 1.03).then_some(true), "{what}: {gain} {help}");
        kept += usize::from(said.is_some());
    }
    assert!(kept >= 3, "{help}");
    help.to_string()
}

/// A link that carries the optimizer's state sooner than the host updates it; with clipping the host has to.
#[test]
fn a_plan_says_which_updates_a_device_makes() {
    let model =
        "name = 'gpt'\nfamily = 'gpt2'\nsteps = 10\nbatch = 8\ndtype = 'bf16'\ndata = { random = true, context = 512 }";
    let device = "kind = 'sim'\nprofile = 'h100'\nmemory = '2 GiB'";
    let job = Job::measured(&format!("[[device]]\n{device}\n[[model]]\n{model}\n"));
    let text = |set: &[&str]| job.hydra(&[&["plan"], set].concat()).fine().out;
    let json = |set: &[&str]| job.hydra(&[&["plan", "--json"], set].concat()).fine().json()["models"][0].clone();
    // After the backward, or with clipping before the next forward.
    for set in [&[][..], &["--set", "model.0.optimizer.clip=1"]] {
        let (text, json) = (text(set), json(set));
        assert!(text.contains("updates of the first") || text.contains("updates on the device"), "{text}");
        assert!(json["device_updates"].as_u64() > json["resting_shards"].as_u64(), "{json}");
    }
    // With one slot nothing moves beside the arithmetic, and nothing is gained.
    let one = ["--set", "run.slots=1"];
    assert!(!text(&one).contains("updates of"), "{}", text(&one));
    assert_eq!(json(&one)["device_updates"], json(&one)["resting_shards"], "what rests is updated where it is");
}

#[test]
fn a_plan_for_one_model_says_what_would_help_and_keeps_it() {
    let sim = "[[device]]\nkind = 'sim'\nmemory = '200 KiB'\nlink = '4 MB/s'\nflops = '2 GFLOP/s'\nmemory_bandwidth = '400 MB/s'\n";
    let job = Job::new(&format!("{sim}{}", GPT.replace("n_layer = 2", "n_layer = 4")));
    keeps_what_it_promises(
        &job,
        &[
            ("a link twice as fast", "device.0.link=8 MB/s"),
            ("twice the device memory", "device.0.memory=400 KiB"),
            ("all the device memory", "device.0.memory=1 GiB"),
            ("slots = 3", "run.slots=3"),
        ],
    );
}

#[test]
fn a_plan_for_several_devices_says_what_would_help_and_keeps_it() {
    let sim = "[run]\npolicy = 'locality-lrtf'\npipeline = 'always'\n[[device]]\nkind = 'sim'\ncount = 2\nmemory = '200 KiB'\n\
               link = '4 MB/s'\nflops = '2 GFLOP/s'\nmemory_bandwidth = '400 MB/s'\n";
    let model =
        GPT.replace("n_layer = 2", "n_layer = 4").replace("batch = 4\nmicrobatch = 2", "batch = 8\nmicrobatch = 1");
    let job = Job::new(&format!("{sim}{model}"));
    let text = job.hydra(&["plan"]).fine().out;
    assert!(text.contains("go on from device to device"), "{text}");
    let help = keeps_what_it_promises(
        &job,
        &[
            ("links twice as fast", "device.0.link=8 MB/s"),
            ("twice the device memory", "device.0.memory=400 KiB"),
            ("one device more", "device.0.count=3"),
            ("slots = 3", "run.slots=3"),
        ],
    );
    assert!(!help.contains("recompute"), "it is \"auto\" already: {help}");
    let quick = ["--set", "device.0.link=60 MB/s", "--set", "device.0.memory=600 KiB"];
    let always = job.hydra(&[&["plan", "--set", "run.recompute=always"], &quick[..]].concat()).fine().out;
    assert!(always.contains("  recompute = \"auto\"  "), "{always}");
}

#[test]
fn a_budget_that_is_too_small_is_refused_with_one_that_works() {
    let job = Job::new(&format!("[[device]]\nmemory = '1 KiB'\n{GPT}"));
    let refused = job.hydra(&["train"]);
    refused.fails(2, &["m: device memory", "the budget is 1024 bytes"]);
    assert!(refused.err.contains("workspace") && refused.err.lines().count() > 4, "{refused:?}");
    assert!(!job.at("runs").exists(), "a refused job leaves nothing");
    job.hydra(&["plan"]).fails(2, &["m: device memory"]);
    // What is advised is something else than what the job says already.
    let advice = |sets: &[&str]| {
        // A device that need not be measured.
        let sim = ["device.0.kind=sim", "device.0.profile=v100"];
        let sets: Vec<&str> = sim.iter().chain(sets).flat_map(|set| ["--set", set]).collect();
        let err = job.hydra(&[&["plan"], &sets[..]].concat()).err;
        let last = err.lines().last().expect("a line").to_string();
        last.split_once("; ").map(|(_, advice)| advice.to_string())
    };
    assert_eq!(advice(&[]).as_deref(), Some("fewer slots or a smaller microbatch may need less"));
    let never = "fewer slots, a smaller microbatch or recompute = \"auto\" may need less";
    assert_eq!(advice(&["run.recompute=never"]).as_deref(), Some(never));
    let one = ["run.slots=1", "model.0.microbatch=1"];
    assert_eq!(advice(&one), None);
    let small = ["plan", "--set", "run.slots=1", "--set", "device.0.memory=1 KiB"];
    let needs = job.hydra(&small).err;
    assert!(needs.contains(" and 1 weight slot:"), "{needs}");
    assert_eq!(
        advice(&[&one[..], &["run.recompute=always"]].concat()).as_deref(),
        Some("recompute = \"auto\" may need less")
    );
    let (_, after) = refused.err.split_once("memory = ").expect("the smallest budget is printed");
    let smallest: u64 = after.chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("bytes");
    let less = format!("device.0.memory={}", smallest - 1);
    job.hydra(&["train", "--set", &less]).fails(2, &["m: device memory"]);
    job.hydra(&["train", "--set", &format!("device.0.memory={smallest}")]).fine();
    let plan = job.json("runs/job/plan.json");
    assert_eq!(plan["smallest_device_bytes"], smallest);
    assert_eq!(plan["device_peak_bytes"], smallest);
    job.hydra(&["plan", "--set", "host={ memory = 1000 }", "--set", "device.0.memory=1000000"])
        .fails(2, &["host's store", "1000 bytes"]);
}

#[test]
fn a_signal_while_a_job_is_prepared_ends_it_at_once_and_leaves_nothing() {
    // A plan for so large a model takes a while.
    let model =
        GPT.replace("n_layer = 2, n_embd = 32", "n_layer = 48, n_embd = 1600").replace("n_head = 2", "n_head = 25");
    let job = Job::new(&format!("[[device]]\nmemory = '2 GiB'\n{model}"));
    let child = Command::new(env!("CARGO_BIN_EXE_hydra"))
        .args(["train", &job.at("job.toml").display().to_string(), "--set", "run.out=never"])
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let status = format!("/proc/{}/status", child.id());
    let heeds = || {
        let status = fs::read_to_string(&status).expect("the program is there");
        // Whoever waits for a signal blocks it.
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).expect("a line");
        u64::from_str_radix(blocked.trim(), 16).expect("a mask") >> (15 - 1) & 1 == 1
    };
    let began = Instant::now();
    while !heeds() {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not heed signals");
        std::thread::sleep(Duration::from_millis(1));
    }
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    let ran: Ran = child.wait_with_output().expect("an end").into();
    ran.fails(75, &["interrupted at the job's preparation, with nothing new to keep"]);
    assert!(!job.at("never").exists());
}

#[test]
fn a_run_that_was_stopped_goes_on_with_the_same_bits() {
    let model = GPT
        .replace("steps = 4", "steps = 300")
        .replace("random = true", "text = 'corpus.txt', tokenizer = 'bytes', context = 16");
    let model = model.replace("vocab_size = 61, ", "return_dict = true, ");
    let clip = "optimizer = { clip = 0.5, lr = 1e-3 }\nvalid = { fraction = 0.2, every = 10 }\n";
    let job = Job::new(&format!("[run]\nseed = 9\nout = 'whole'\n[[device]]\nmemory = '260 KiB'\n{model}{clip}"));
    fs::write(job.at("corpus.txt"), "The quick brown fox jumps over the lazy dog. ".repeat(40)).expect("corpus");
    job.hydra(&["train"]).fine();
    let mut stops = 0;
    for attempt in 0..100 {
        let child = Command::new(env!("CARGO_BIN_EXE_hydra"))
            .args(["train", &job.at("job.toml").display().to_string(), "--set", "run.out=parts", "--resume"])
            .arg(if stops == 0 { "auto" } else { "require" })
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program runs");
        let rows = || fs::read_to_string(job.at("parts/m/metrics.jsonl")).map_or(0, |text| text.lines().count());
        let (before, began) = (rows(), Instant::now());
        // The first two are stopped once they have trained; the others may finish.
        while attempt < 2 && rows() < before + 15 && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(2));
        }
        if attempt < 2 {
            // Twice at once, as `timeout` does it: to its child, and to the child's group.
            let both = format!("kill -TERM {0}; kill -TERM {0}", child.id());
            Command::new("sh").args(["-c", &both]).stderr(Stdio::null()).status().expect("kill");
        }
        let ran: Ran = child.wait_with_output().expect("an end").into();
        if ran.code == 0 {
            break;
        }
        ran.fails(75, &["interrupted at step", "after a checkpoint"]);
        assert!(!job.at("parts/m/model").exists());
        stops += 1;
    }
    assert!(stops > 0, "the run ended before it could be stopped");
    let weights = |run: &str| fs::read(job.at(run).join("m/model/model.safetensors")).expect("weights");
    assert!(weights("whole") == weights("parts"), "other bits after {stops} stops");
    let losses = |run: &str| -> Vec<(u64, u32, u64)> {
        let rows = read_rows(&job.at(run).join("m/metrics.jsonl")).expect("rows");
        let bits = |row: Row| match row {
            Row::Step(r) => (r.step, r.loss.to_bits(), r.grad_norm.to_bits()),
            Row::Valid(r) => (r.step, r.valid_loss.to_bits(), 0),
        };
        rows.into_iter().map(bits).collect()
    };
    assert_eq!(losses("whole"), losses("parts"));

    // What must be the same is compared, and nothing is touched where it is not.
    for (set, says) in [
        ("run.seed=10", "seed is 9 in the checkpoint, 10 in the job"),
        ("model.0.microbatch=4", "microbatch is 2 in the checkpoint, 4 in the job"),
        ("model.0.config.n_embd=16", "weight/transformer.wte.weight"),
        ("model.0.config.n_head=4", "config.n_head is 2 in the checkpoint, 4 in the job"),
        ("model.0.config.activation_function=relu", "config.activation_function is \"gelu_new\" in the checkpoint"),
        ("model.0.config.layer_norm_epsilon=1e-6", "config.layer_norm_epsilon is 0.00001 in the checkpoint, 1e-6 in"),
        ("model.0.config.resid_pdrop=0.5", "config.resid_pdrop is 0.1 in the checkpoint, 0.5 in the job"),
        ("model.0.optimizer={ kind = 'sgd' }", "optimizer.kind is adamw in the checkpoint, sgd in the job"),
    ] {
        job.hydra(&["train", "--resume", "auto", "--set", "run.out=parts", "--set", set])
            .bad(&["parts/m/checkpoint.safetensors", says]);
    }
    // More steps go on from the last; of other data it is said.
    let more = |steps: &str, sets: &[&str]| {
        let more = ["train", "--resume", "require", "--set", "run.out=parts", "--set", steps];
        job.hydra(&[&more[..], sets].concat()).fine()
    };
    // Nothing that the network computes has to do with this.
    let ran = more("model.0.steps=303", &["--set", "model.0.config.return_dict=false"]);
    assert!(ran.out.contains("303 steps done") && ran.err.is_empty(), "{ran:?}");
    fs::write(job.at("corpus.txt"), "The lazy dog. ".repeat(100)).expect("corpus");
    let sets = ["--set", "model.0.data.context=8", "--set", "model.0.valid.every=9"];
    let ran = more("model.0.steps=305", &sets);
    assert_eq!(ran.err.lines().count(), 1, "{ran:?}");
    for says in [
        "m: goes on from step 303 with other settings than before: data.context = 8 (was 16)",
        "data.text = 1400 bytes with CRC-32 ",
        " (was 1800 bytes with CRC-32 ",
        "valid.every = 9 (was 10)",
    ] {
        assert!(ran.err.contains(says), "{says}: {ran:?}");
    }
    fs::write(job.at("parts/m/checkpoint.safetensors"), b"damaged").expect("a damaged checkpoint");
    job.hydra(&["train", "--resume", "auto", "--set", "run.out=parts"]).bad(&["checkpoint.safetensors", "too few"]);
}

#[test]
fn a_signal_ends_a_validation_and_the_run_that_goes_on_does_it_again() {
    let model = GPT
        .replace("vocab_size = 61, ", "")
        .replace("random = true", "text = 'corpus.txt', tokenizer = 'bytes', context = 16")
        .replace("steps = 4", "steps = 2\nvalid = { text = 'held.txt', every = 9 }");
    let job = Job::new(&model);
    fs::write(job.at("corpus.txt"), "The quick brown fox jumps over the lazy dog. ".repeat(40)).expect("corpus");
    // More than can be looked at in the time that this test has.
    fs::write(job.at("held.txt"), "Held out. ".repeat(3_000_000)).expect("text");
    let child = Command::new(env!("CARGO_BIN_EXE_hydra"))
        .args(["train", &job.at("job.toml").display().to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let rows = || read_rows(&job.at("runs/job/m/metrics.jsonl")).unwrap_or_default();
    let began = Instant::now();
    while rows().len() < 2 {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not train");
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(100));
    let asked = Instant::now();
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    let ran: Ran = child.wait_with_output().expect("an end").into();
    ran.fails(75, &["interrupted at step 2, after a checkpoint"]);
    assert!(asked.elapsed() < Duration::from_secs(20), "it has looked at all that is held out");
    assert!(!job.at("runs/job/m/model").exists() && rows().len() == 2);
    fs::write(job.at("held.txt"), "Held out. ".repeat(9)).expect("text");
    let ran = job.hydra(&["train", "--resume", "require"]).fine();
    assert!(ran.out.contains("m: 2 steps done") && ran.out.contains("held-out loss"), "{ran:?}");
    assert!(ran.err.contains("valid.text = 90 bytes"), "{ran:?}");
    let kinds: Vec<bool> = rows().iter().map(|row| matches!(row, Row::Step(_))).collect();
    assert_eq!(kinds, [true, true, false]);
    assert!(job.at("runs/job/m/model/model.safetensors").exists());
    assert!(job.hydra(&["train", "--resume", "auto"]).fine().out.contains("nothing to do"));
}

#[test]
fn a_run_goes_on_with_another_learning_rate_and_says_so() {
    let job = Job::new(
        &format!("{}{GPT}optimizer = {{ kind = 'sgd', momentum = 0.9 }}\n", two_models()).replacen("\"m\"", "\"k\"", 1),
    );
    job.hydra(&["train"]).fine();
    let on = |sets: &[&str]| {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        job.hydra(&[&["train", "--resume", "auto"], &sets[..]].concat())
    };
    // What has no step to go is of no account.
    assert_eq!(on(&["model.0.lr=0.5"]).fine().err, "");
    on(&["model.2.steps=5", "model.2.optimizer={ kind = 'sgd' }"])
        .bad(&["m/checkpoint.safetensors", "optimizer.momentum is 0.9"]);
    on(&["model.1.steps=5", "model.1.optimizer={ kind = 'sgd' }"])
        .bad(&["n/checkpoint.safetensors", "optimizer.kind is adamw"]);
    let rows = "model.1.loss_rows=8";
    let ran = on(&["model.0.lr=0.5", "model.1.lr=0.002", "model.1.steps=5", "model.2.steps=6", rows]).fine();
    assert_eq!(
        ran.err,
        "warning: n: goes on from step 3 with other settings than before: optimizer.lr = 0.002 (was 0.001), loss_rows = 8 (was none)\n",
    );
    let rows = read_rows(&job.at("runs/job/n/metrics.jsonl")).expect("rows");
    let rates = rows.iter().filter_map(|row| if let Row::Step(row) = row { Some(row.lr) } else { None });
    assert_eq!(rates.collect::<Vec<_>>(), [0.001, 0.001, 0.001, 0.002, 0.002]);
}

#[test]
fn resume_require_needs_a_run() {
    let job = Job::new(GPT);
    job.hydra(&["train", "--resume", "require"]).bad(&["runs/job", "holds no run to resume"]);
    assert!(!job.at("runs").exists());
    job.hydra(&["train", "--resume", "auto"]).fine();
}

/// Two models that differ in length.
fn two_models() -> String {
    format!("{GPT}{}", GPT.replace("\"m\"", "\"n\"").replace("steps = 4", "steps = 3"))
}

#[test]
fn several_models_tell_their_progress_in_json_lines() {
    let job = Job::new(&format!("[[device]]\ncount = 2\nthreads = 1\n{}", two_models()));
    let ran = job.hydra(&["train"]).fine();
    let lines = ran.out.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect();
    let progress: Vec<&Value> = lines.iter().filter(|line| line["event"] == "progress").collect();
    let last = *progress.last().expect("a line at the end");
    assert!(last["models"].as_array().expect("models").iter().all(|m| m["step"] == m["steps"]), "{last}");
    assert!(last["devices"].as_array().expect("devices").iter().all(|d| d["runs"].is_null() && d["next"].is_null()));
    for line in progress {
        for (model, (name, steps)) in line["models"].as_array().expect("models").iter().zip([("m", 4), ("n", 3)]) {
            assert_eq!((model["name"].as_str(), model["steps"].as_u64()), (Some(name), Some(steps)));
            let (done, loss) = (model["step"].as_u64().expect("a step"), model["loss"].as_f64());
            assert!(done <= steps && loss.is_some() == (done > 0), "{line}");
        }
        let devices = line["devices"].as_array().expect("devices");
        assert_eq!(devices.iter().map(|d| d["device"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(1)]);
        for device in devices {
            assert!((0.0..=1.0).contains(&device["idle_share"].as_f64().expect("a share")), "{line}");
            for unit in [&device["runs"], &device["next"]] {
                let is_unit = |text: &str| text.starts_with("m shard ") || text.starts_with("n shard ");
                assert!(unit.is_null() || unit.as_str().is_some_and(is_unit), "{line}");
            }
        }
    }
    assert!(!ran.out.contains(" of 4  loss"), "no lines of text beside them: {ran:?}");
    // One object is all that --json prints, and one model alone has lines of text.
    let ran = job.hydra(&["train", "--json", "--set", "run.out=again"]).fine();
    let said: Value = serde_json::from_str(&ran.out).expect("one JSON object");
    assert_eq!(said["models"].as_array().map(Vec::len), Some(2));
    let page = hydra(&["report", &job.at("again").display().to_string()]).fine();
    assert!(page.out.contains("report.html"));
    let page = fs::read_to_string(job.at("again/report.html")).expect("page");
    for says in ["<td>m</td>", "<td>done</td>", "<td>device 1</td>"] {
        assert!(page.contains(says), "{says}");
    }
}

#[test]
fn a_job_is_rehearsed_before_it_is_simulated() {
    let job = Job::new(
        "[run]
policy = 'locality-lrtf'
[[device]]
kind = 'sim'
count = 2
memory = '900 KiB'
link = '4 MB/s'
flops = '2 GFLOP/s'
memory_bandwidth = '100 MB/s'
[[model]]
name = 'gpt'
family = 'gpt2'
config = { n_layer = 6, n_embd = 64, n_head = 4, n_positions = 32, vocab_size = 256 }
data = { random = true, context = 32 }
batch = 4
steps = 12
optimizer = { kind = 'sgd', lr = 1e-3 }
search = { lr = [5e-3, 4e-3, 3e-3, 2e-3, 1e-3] }
",
    );
    let simulate = |rehearse: &str| -> Value {
        let ran = job.hydra(&["simulate", "--json", "--set", &format!("run.rehearse={rehearse}")]).fine();
        serde_json::from_str(&ran.out).expect("one JSON object")
    };
    let (plain, rehearsed) = (simulate("false"), simulate("true"));
    let secs = |figures: &Value| figures["makespan_secs"].as_f64().expect("seconds");
    let gain = rehearsed["rehearsal"]["gain"].as_f64().expect("a part");
    assert!(plain["rehearsal"].is_null() && gain > 0.01 && rehearsed["rehearsal"]["tries"].as_u64() > Some(7));
    assert!((secs(&rehearsed) / secs(&plain) - (1.0 - gain)).abs() < 1e-9, "{rehearsed}");
    let ran = job.hydra(&["simulate"]).fine();
    assert!(ran.out.contains("rehearsals the best ends") && ran.out.contains("run.rehearse"), "{}", ran.out);
    // Others have nothing to lean to.
    let ran = job.hydra(&["simulate", "--policy", "sharded-lrtf"]).fine();
    assert!(!ran.out.contains("rehears"), "{}", ran.out);
}

#[test]
fn sweeps_are_tables_and_plots() {
    let job = Job::new(&format!("[[device]]\nkind = 'sim'\nprofile = 'v100'\nmemory = '1 MiB'\n{}", two_models()));
    let out = job.at("sweep").display().to_string();
    let policies = ["--sweep", "policy=fifo,srtf"];
    let ran = job.hydra(&["simulate", policies[0], policies[1], "--sweep", "devices=1,2,3", "--out", &out]).fine();
    assert!(ran.out.contains("sweep.csv") && ran.out.contains("sweep.svg"), "{ran:?}");
    let read = |file: &str| fs::read_to_string(job.at("sweep").join(file)).expect(file);
    assert_eq!(read("sweep.csv").lines().count(), 7);
    let svg = read("sweep.svg");
    // A line for each policy, over three numbers of devices.
    assert_eq!((svg.matches("class=\"curve\"").count(), svg.matches("<circle").count()), (2, 6), "{svg}");
    assert!(
        svg.contains(">policy=fifo</text>") && svg.contains(">policy=srtf</text>") && svg.contains("class=\"bound\"")
    );
    job.hydra(&["simulate", policies[0], policies[1], "--out", &out]).fine();
    let svg = read("sweep.svg");
    assert_eq!((svg.matches("class=\"curve\"").count(), svg.matches("<circle").count()), (0, 2), "{svg}");
    assert!(svg.contains(">fifo</text>") && svg.contains(">policy</text>"));
    // Sizes are numbers too; one that is too small leaves its place empty.
    let memory = "memory=1 KiB,64 MiB,128 MiB";
    job.hydra(&["simulate", "--sweep", memory, "--sweep", "slots=2", "--out", &out]).fine();
    let svg = read("sweep.svg");
    assert_eq!((svg.matches("class=\"curve\"").count(), svg.matches("<circle").count()), (1, 2), "{svg}");
    assert!(svg.contains(">memory</text>") && svg.contains("Makespan, slots=2"));
}

#[test]
fn a_sweep_does_what_all_options_say_or_fails() {
    let job = Job::new(&format!("[[device]]\nkind = 'sim'\nprofile = 'v100'\nmemory = '1 MiB'\n{}", two_models()));
    let rows = |args: &[&str]| -> Vec<Value> {
        let ran = job.hydra(&[&["simulate", "--json"], args].concat()).fine();
        let said: Value = serde_json::from_str(&ran.out).expect("one JSON object");
        said["sweep"].as_array().expect("a list").clone()
    };
    // An option beside a sweep holds for every row: one at a time, a second device is of no use.
    let of = |policy: &str| {
        let rows = rows(&["--policy", policy, "--sweep", "devices=1,2"]);
        rows.iter().map(|row| row["makespan_secs"].as_f64().expect("seconds")).collect::<Vec<_>>()
    };
    let (alone, together) = (of("one-at-a-time"), of("fifo"));
    assert!(alone[0] == alone[1] && together[0] > together[1], "{alone:?} {together:?}");
    // A row says what a simulation of its own says.
    let row = &rows(&["--policy", "srtf", "--sweep", "devices=2", "--sweep", "memory=2 MiB"])[0];
    let own =
        job.hydra(&["simulate", "--json", "--policy", "srtf", "--devices", "2", "--set", "device.0.memory=2 MiB"]);
    let own = own.fine().json();
    for key in ["makespan_secs", "bound_secs", "utilisation", "policy"] {
        assert!(!row[key].is_null() && row[key] == own[key], "{key}: {row} {own}");
    }
    assert_eq!((&row["devices"], &row["memory"]), (&json!(2), &json!("2 MiB")));
    // All words and flags of a job may be swept.
    let both = rows(&["--policy", "locality-lrtf", "--sweep", "pipeline=auto,never", "--sweep", "rehearse=true,false"]);
    let pairs: Vec<_> = both.iter().map(|row| (row["pipeline"].as_str(), row["rehearse"].as_str())).collect();
    let pair = |pipeline, rehearse| (Some(pipeline), Some(rehearse));
    assert_eq!(pairs, [pair("auto", "true"), pair("auto", "false"), pair("never", "true"), pair("never", "false")]);
    assert!(both.iter().all(|row| row["makespan_secs"].as_f64() > Some(0.0)), "{both:?}");
    for (args, says) in [
        (&["--policy", "fifo", "--sweep", "policy=srtf,random"][..], "--policy fifo is there too"),
        (&["--devices", "2", "--sweep", "devices=1,2"], "--devices 2 is there too"),
        (&["--slots", "1", "--sweep", "slots=2"], "--slots 1 is there too"),
        (&["--sweep", "slots=2", "--sweep", "slots=3"], "--sweep slots: is there twice"),
        (&["--sweep", "policy=fifo,srtf,fifo"], "--sweep policy: fifo is there twice"),
        (&["--policy", "fi\"fo"], "run.policy: want one of"),
        (&["--sweep", "policy=fi\"fo"], "run.policy: want one of"),
        (&["--sweep", "pipeline=sometimes"], "run.pipeline"),
        (&["--sweep", "rehearse=2"], "run.rehearse"),
    ] {
        job.hydra(&[&["simulate"], args].concat()).bad(&[says]);
    }
    // Values that do not go together are a row, unless none do.
    let always = rows(&["--policy", "locality-lrtf", "--sweep", "devices=1,2", "--sweep", "pipeline=always"]);
    let why = always[0]["reason"].as_str().unwrap_or_default();
    assert!(why.contains("run.pipeline") && always[1]["makespan_secs"].as_f64() > Some(0.0), "{always:?}");
    job.hydra(&["simulate", "--policy", "locality-lrtf", "--devices", "1", "--sweep", "pipeline=always"])
        .bad(&["run.pipeline"]);
    // What does not fit is a row, unless nothing does: then the rows are there all the same.
    let out = job.at("sweep").display().to_string();
    let csv = || fs::read_to_string(job.at("sweep/sweep.csv")).expect("sweep.csv");
    job.hydra(&["simulate", "--sweep", "memory=1 KiB,2 MiB", "--out", &out]).fine();
    assert_eq!(csv().matches("the models together need").count(), 1, "{}", csv());
    let ran = job.hydra(&["simulate", "--sweep", "memory=1 KiB,2 KiB", "--out", &out]);
    ran.bad(&["--sweep: none of 2 combinations fits; the first: device memory: the models together need"]);
    assert_eq!(csv().matches("the models together need").count(), 2, "{}", csv());
    assert_eq!(ran.out.matches("the models together need").count(), 2, "{ran:?}");
    let ran = job.hydra(&["simulate", "--json", "--sweep", "memory=1 KiB"]);
    ran.bad(&["--sweep: its one combination does not fit: device memory"]);
    let said: Value = serde_json::from_str(&ran.out).expect("one JSON object");
    assert!(said["sweep"][0]["reason"].as_str().is_some_and(|why| why.contains("device memory")), "{said}");
}

#[test]
#[cfg(target_os = "linux")]
fn what_cannot_be_printed_is_a_failure_and_what_nobody_reads_is_none() {
    let job = Job::new(&format!("[[device]]\nkind = 'sim'\nprofile = 'v100'\n{GPT}"));
    let prints_to = |job: &Job, args: &[&str], out: Stdio| -> Ran {
        let mut program = Command::new(env!("CARGO_BIN_EXE_hydra"));
        program.arg(args[0]).arg(job.at("job.toml")).args(&args[1..]).stdout(out).stderr(Stdio::piped());
        program.spawn().expect("the program runs").wait_with_output().expect("an end").into()
    };
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").expect("it is there"));
    for args in [&["plan"][..], &["plan", "--json"], &["simulate", "--json"], &["simulate", "--sweep", "slots=1,2"]] {
        prints_to(&job, args, full()).fails(1, &["cannot write to standard output"]);
    }
    let host = Job::new(GPT);
    prints_to(&host, &["train", "--json"], full()).fails(1, &["cannot write to standard output"]);
    assert!(host.at("runs/job/m/model/model.safetensors").exists(), "what was trained is there");
    // A pipe whose reader has gone.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let ran = prints_to(&job, &["plan"], writer.into());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
}

#[test]
fn what_is_not_built_in_is_said() {
    let job = Job::new(GPT);
    fs::write(job.at("job.toml"), format!("[[device]]\nkind = 'host'\n{GPT}")).expect("job");
    for (set, says) in [
        ("device.0.kind=cuda", "device.0.kind: \"cuda\" is not built in"),
        ("device.0.kind=emulated", "device.0.kind: \"emulated\" is not built in"),
        ("model.0.dtype=tf32", "model.0.dtype: tf32 goes with kind = \"cuda\", not \"host\""),
    ] {
        job.hydra(&["plan", "--set", set]).bad(&["job.toml", says]);
    }
}

#[test]
fn bad_jobs() {
    let job = Job::new(&GPT.replace("batch = 4", "bacth = 4"));
    job.hydra(&["train"]).bad(&["job.toml", "model.0.bacth", "did you mean `batch`"]);
    let job = Job::new(GPT);
    hydra(&["train", "/no/such/job.toml"]).bad(&["/no/such/job.toml"]);
    for (set, says) in [
        ("run.sede=1", "did you mean `seed`"),
        ("model.0.config.n_emb=32", "n_emb"),
        ("model.0.config.n_layer=1000000000000", "n_layer"),
        ("model.0.config.n_head=3", "n_head"),
        ("model.0.family=gtp2", "did you mean gpt2"),
        ("model.0.family=GPT2", "did you mean gpt2"),
        ("device.0.memory=99999999999 TiB", "job.toml: device.0.memory: \"99999999999 TiB\" is too large"),
        ("model.0.data={ batches = 'none.safetensors' }", "none.safetensors: no such file"),
        ("model.0.data={ images = 'none', labels = 'none' }", "none: no such file"),
        ("model.0.data={ random = true, context = 17 }", "17"),
        ("model.0.data={ random = true, image = [3, 8, 8] }", "job.toml: model.0.data.image: the model takes tokens"),
        ("model.0.data={ text = 'job.toml', tokenizer = 'bytes', context = 8 }", "vocab_size is 61"),
        ("model.0.data={ text = 'job.toml', tokenizer = 't.json', context = 8 }", "data.tokenizer"),
        ("model.0.valid={ fraction = 0.5 }", "valid.fraction"),
        ("model.0.microbatch=3", "does not divide"),
        ("model.0.loss_rows=0", "job.toml: model.0.loss_rows: "),
        ("model.0.loss_rows=0.5", "job.toml: model.0.loss_rows: "),
    ] {
        job.hydra(&["train", "--set", set]).bad(&[says]);
        assert!(!job.at("runs").exists(), "{set}");
    }
    // Of a model that takes no text, its classes are of no account.
    let text = "model.0.data={ text = 'job.toml', tokenizer = 'bytes', context = 8 }";
    Job::fixture("vit")
        .hydra(&["plan", "--set", text])
        .bad(&["job.toml: model.0.data.text: the model takes images, not text"]);
    Job::fixture("vit")
        .hydra(&["plan", "--set", "model.0.loss_rows=64"])
        .bad(&["job.toml: model.0.loss_rows: is for models over tokens; leave it out"]);
    // A vocabulary that does not fit would be told first.
    let missing = "model.0.data={ text = 'none.txt', tokenizer = 'bytes', context = 16 }";
    job.hydra(&["train", "--set", missing, "--set", "model.0.config.vocab_size=256"]).bad(&["none.txt: no such file"]);
    job.hydra(&["train", "--set", "run.out=job.toml"]).bad(&["job.toml", "is a file"]);
    job.hydra(&["train", "--set", "run.out=."]).bad(&["holds no run", "job.toml is there already"]);
    assert_eq!(fs::read_to_string(job.at("job.toml")).expect("job"), with_rates(GPT));
    job.hydra(&["train", "--set", "run.out=/dev/null/x"]).bad(&["/dev/null/x"]);
    job.hydra(&["train", "--set", &format!("run.out={TAKES_NOTHING}")]).fails(code_of_nothing(), &[TAKES_NOTHING]);
    for usage in [&["trian"][..], &["train"], &[]] {
        let ran = hydra(usage);
        assert_eq!(ran.code, 2);
        assert!(ran.err.starts_with("error: "), "{ran:?}");
    }
}

#[test]
fn bad_models() {
    let check = |what: &str, mutate: &dyn Fn(&Job), says: &[&str]| {
        let job = Job::fixture("gpt2");
        mutate(&job);
        for command in ["train", "plan"] {
            let ran = job.hydra(&[command]);
            assert!(ran.code == 2, "{what}: {ran:?}");
            ran.bad(says);
        }
        assert!(!job.at("runs").exists(), "{what}");
    };
    let weights = "model/model.safetensors";
    let rewrite = |job: &Job, change: &dyn Fn(&mut Value, &mut Vec<u8>)| {
        let (mut header, mut data) = taken_apart(&fs::read(job.at(weights)).expect("weights"));
        change(&mut header, &mut data);
        fs::write(job.at(weights), tensors(&header.to_string(), &data)).expect("weights");
    };
    const LN: &str = "transformer.ln_f.bias";
    let truncate = |job: &Job| rewrite(job, &|_, data| data.truncate(data.len() - 1));
    check("truncated", &truncate, &["model.safetensors", "truncated"]);
    check("overlong", &|job| rewrite(job, &|_, data| data.push(0)), &["model.safetensors", "1 bytes follow"]);
    let overlap = |job: &Job| {
        rewrite(job, &|header, _| {
            let other = header["transformer.ln_f.weight"]["data_offsets"].clone();
            header[LN]["data_offsets"] = other;
        });
    };
    check("overlapping", &overlap, &["model.safetensors", "transformer.ln_f"]);
    let twice = |job: &Job| {
        let (header, data) = taken_apart(&fs::read(job.at(weights)).expect("weights"));
        let entry = header[LN].to_string();
        let text = header.to_string().replacen('{', &format!("{{\"{LN}\":{entry},"), 1);
        fs::write(job.at(weights), tensors(&text, &data)).expect("weights");
    };
    check("duplicate key", &twice, &["model.safetensors", LN, "occurs twice"]);
    let dtype = |job: &Job| rewrite(job, &|header, _| header[LN]["dtype"] = "I32".into());
    check("wrong dtype", &dtype, &["model.safetensors", LN, "I32", "want F32"]);
    let missing = |job: &Job| rewrite(job, &|header, _| header[LN]["dtype"] = "F99".into());
    check("unknown dtype", &missing, &["model.safetensors", LN, "F99"]);
    check("no weights", &|job| fs::remove_file(job.at(weights)).expect("gone"), &["model.safetensors", "no such file"]);
    check("no config", &|job| fs::remove_file(job.at("model/config.json")).expect("gone"), &["config.json"]);
    let config = |key: &'static str, value: Value| {
        move |job: &Job| {
            let mut config = job.json("model/config.json");
            config[key] = value.clone();
            fs::write(job.at("model/config.json"), config.to_string()).expect("config");
        }
    };
    let sizeless = |job: &Job| {
        let mut config = job.json("model/config.json");
        config.as_object_mut().expect("an object").remove("n_embd");
        fs::write(job.at("model/config.json"), config.to_string()).expect("config");
    };
    check("no size", &sizeless, &["model.safetensors", "768"]);
    check("null size", &config("n_embd", Value::Null), &["config.json", "n_embd: is null"]);
    check("absurd size", &config("n_embd", json!(1u64 << 50)), &["config.json", "n_embd"]);
    check("negative size", &config("n_layer", json!(-1)), &["config.json", "n_layer"]);
    check("no JSON", &|job| fs::write(job.at("model/config.json"), "{").expect("config"), &["config.json", "JSON"]);
    let nan = |job: &Job| {
        rewrite(job, &|header, data| {
            let at = header[LN]["data_offsets"][0].as_u64().expect("an offset") as usize;
            data[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        });
    };
    let job = Job::fixture("gpt2");
    nan(&job);
    job.hydra(&["train"]).bad(&["model.safetensors", LN, "NaN"]);
    assert!(!job.at("runs").exists());
}

#[test]
fn bad_batches() {
    let job = Job::fixture("gpt2");
    job.hydra(&["train", "--set", "model.0.batch=3"]).bad(&["batches.safetensors", "batch is 3"]);
    job.hydra(&["train", "--set", "model.0.steps=99"]).bad(&["model.0.steps", "99 steps are more than"]);
    let write = |ids: &[i64], labels: &[i64]| {
        let file =
            tensor_file(&[("input_ids", "I64", &[1, 2, 4], i64s(ids)), ("labels", "I64", &[1, 2, 4], i64s(labels))]);
        fs::write(job.at("batches.safetensors"), file).expect("batches");
    };
    let train = || job.hydra(&["train", "--set", "model.0.steps=1"]);
    write(&[1, 2, 3, 4, 5, 6, 97, 8], &[1; 8]);
    train().bad(&["input_ids", "97", "(1, 2)"]);
    assert!(!job.at("runs").exists(), "a job at fault before its first step leaves nothing");
    write(&[1; 8], &[1, 2, 3, 4, 5, 6, 7, 97]);
    train().bad(&["labels", "97"]);
    write(&[1; 8], &[-100; 8]);
    train().bad(&["no position"]);
    write(&[1 << 40; 8], &[1; 8]);
    train().bad(&["input_ids", "1099511627776"]);
    write(&[1; 8], &[1; 8]);
    train().fine();
    let file =
        tensor_file(&[("input_ids", "F32", &[1, 2, 4], vec![0; 32]), ("labels", "I64", &[1, 2, 4], i64s(&[1; 8]))]);
    fs::write(job.at("batches.safetensors"), file).expect("batches");
    train().bad(&["input_ids", "F32"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_the_layer() {
    let job = Job::new(&GPT.replace("steps = 4", "steps = 40\noptimizer = { kind = 'sgd', lr = 1e30 }"));
    let ran = job.hydra(&["train"]);
    assert_eq!(fs::read_dir(job.at("runs/job/m")).expect("folder").count(), 1, "metrics alone");
    ran.bad(&["m: the loss is", "at step", "the first layer whose output is not finite is"]);
    let rows = read_rows(&job.at("runs/job/m/metrics.jsonl")).expect("the steps before are kept");
    assert!(!rows.is_empty() && rows.len() < 40);
    assert!(!job.at("runs/job/m/model").exists());
    // The one object of --json comes all the same.
    let ran = job.hydra(&["train", "--json", "--set", "run.out=again"]);
    ran.bad(&["m: the loss is"]);
    let said = ran.json();
    let row = &said["models"][0];
    assert!(said["run"].as_str().is_some_and(|run| run.ends_with("again")), "{said}");
    assert!(row["status"] == "failed" && row["model"].is_null() && row["steps"] == rows.len(), "{said}");
    assert!(row["reason"].as_str().is_some_and(|why| why.contains("the loss is")), "{said}");
    assert!(row.as_object().is_some_and(|row| row.contains_key("model")), "{said}");
}

#[test]
fn a_fault_in_a_later_batch_leaves_the_steps_before_it() {
    let job = Job::fixture("gpt2");
    let mut ids = vec![1; 5 * 2 * 4];
    // Its last one is of step 3, which is begun while step 2 is in flight.
    ids[4 * 8 - 1] = 1000;
    let shape = &[5, 2, 4][..];
    let write = |ids: &[i64]| {
        let file = tensor_file(&[("input_ids", "I64", shape, i64s(ids)), ("labels", "I64", shape, i64s(&[1; 40]))]);
        fs::write(job.at("batches.safetensors"), file).expect("batches");
    };
    write(&ids);
    let text = fs::read_to_string(job.at("job.toml")).expect("job.toml").replace("steps = 3", "steps = 5");
    fs::write(job.at("job.toml"), with_rates(&text)).expect("job.toml");
    let first = job.hydra(&["train"]);
    assert!(first.code == 2 && first.err.contains("m: step 3: input_ids: value 1000"), "{first:?}");
    assert!(
        first.err.contains("a checkpoint after 3 steps is there, from which --resume auto tries again"),
        "{first:?}"
    );
    let rows = || read_rows(&job.at("runs/job/m/metrics.jsonl")).expect("rows").len();
    assert_eq!(rows(), 3);
    assert!(!job.at("runs/job/m/model").exists());
    // Mended, it goes on from there.
    ids[4 * 8 - 1] = 1;
    write(&ids);
    let said = job.hydra(&["train", "--resume", "require"]).fine();
    assert!(!said.out.contains("step 1 of 5") && rows() == 5, "{said:?}");
}

#[test]
fn forward_writes_logits_whole_or_not_at_all() {
    let job = Job::fixture("gpt2");
    let (model, input, output) = (job.at("model"), job.at("x.safetensors"), job.at("y.safetensors"));
    let forward = |bytes: Vec<u8>, output: &Path| {
        fs::write(&input, bytes).expect("input");
        let path = |p: &Path| p.display().to_string();
        hydra(&["forward", &path(&model), "--input", &path(&input), "--output", &path(output)])
    };
    let ids = |n: i64| i64s(&(0..6).map(|i| i * n).collect::<Vec<_>>());
    let good = tensor_file(&[("input_ids", "I64", &[2, 3], ids(1)), ("attention_mask", "I64", &[2, 3], i64s(&[1; 6]))]);
    forward(good, &output).fine();
    let (header, data) = taken_apart(&fs::read(&output).expect("logits"));
    assert_eq!(header["logits"]["shape"], json!([2, 3, 97]));
    assert_eq!(data.len(), 2 * 3 * 97 * 4);
    // The mask of ones changes nothing, nor does the type of the ids.
    let narrow: Vec<u8> = (0..6i32).flat_map(i32::to_le_bytes).collect();
    forward(tensor_file(&[("input_ids", "I32", &[2, 3], narrow)]), &output).fine();
    assert_eq!(taken_apart(&fs::read(&output).expect("logits")).1, data);
    // A key that is masked is seen by nobody of its sample.
    let mask = i64s(&[1, 1, 1, 1, 0, 1]);
    let masked = tensor_file(&[("input_ids", "I64", &[2, 3], ids(1)), ("attention_mask", "I64", &[2, 3], mask)]);
    forward(masked, &output).fine();
    let (first, masked) = (data.len() / 2, taken_apart(&fs::read(&output).expect("logits")).1);
    assert!(masked[..first] == data[..first] && masked[first..] != data[first..]);

    let kept = fs::read(&output).expect("logits");
    for (bytes, says) in [
        (tensor_file(&[("input_ids", "I64", &[2, 3], ids(50))]), "input_ids: value 100 at (0, 2)"),
        (
            tensor_file(&[("input_ids", "I64", &[2, 3], i64s(&[1 << 33; 6]))]),
            "position (0, 0): 8589934592 does not fit 32 bits",
        ),
        (tensor_file(&[("input_ids", "F32", &[2, 3], vec![0; 24])]), "element type F32"),
        (tensor_file(&[("input_ids", "I64", &[0, 3], vec![])]), "holds no batch"),
        (tensor_file(&[("input_ids", "I64", &[6], ids(1))]), "input_ids"),
        (tensor_file(&[("input_ids", "I64", &[1, 6], ids(1)), ("ids", "I64", &[1], i64s(&[1]))]), "tensor 'ids'"),
        (tensor_file(&[("attention_mask", "I64", &[2, 3], i64s(&[1; 6]))]), "neither"),
        (tensor_file(&[("pixel_values", "F32", &[1, 1, 1, 1], vec![0; 4])]), "pixel_values"),
        (tensor_file(&[("input_ids", "I64", &[1, 25], i64s(&[1; 25]))]), "25"),
        (vec![0; 7], "too few"),
    ] {
        forward(bytes, &output).bad(&["x.safetensors", says]);
    }
    assert_eq!(fs::read(&output).expect("logits"), kept, "nothing was overwritten");
    let good = tensor_file(&[("input_ids", "I64", &[2, 3], ids(1))]);
    forward(good, &job.at("none/y.safetensors")).bad(&["none/y.safetensors"]);
}

/// How they were made into inputs is saved with the model, unless the model says that itself.
#[test]
fn a_model_of_images_says_how_they_are_scaled() {
    let model = "
[[model]]
name = 'm'
family = 'vit'
config = { image_size = 4, num_channels = 1, patch_size = 2, hidden_size = 8, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 8 }
data = { images = 'images', labels = 'labels' }
batch = 2
steps = 1
";
    let job = Job::new(model);
    let idx = |magic: u32, axes: &[u32], values: &[u8]| {
        let words = std::iter::once(magic).chain(axes.iter().copied());
        [&words.flat_map(u32::to_be_bytes).collect::<Vec<u8>>()[..], values].concat()
    };
    fs::write(job.at("images"), idx(0x803, &[2, 4, 4], &[7; 32])).expect("images");
    fs::write(job.at("labels"), idx(0x801, &[2], &[0, 1])).expect("labels");
    job.hydra(&["train", "--set", "run.out=first"]).fine();
    let file = "m/model/preprocessor_config.json";
    let says = job.json(&format!("first/{file}"));
    assert_eq!((&says["image_mean"], &says["image_std"]), (&json!([0.5]), &json!([0.5])));
    assert_eq!((&says["rescale_factor"], &says["size"]), (&json!(1.0 / 255.0), &json!({ "height": 4, "width": 4 })));
    assert!(says["do_rescale"] == true && says["do_normalize"] == true && says["do_resize"] == false, "{says}");

    fs::write(job.at(&format!("first/{file}")), "{\"own\": 1}").expect("written");
    let (family, rest) = model.split_once("family = 'vit'\nconfig").expect("a family");
    let rest = rest.split_once('\n').expect("a line").1;
    fs::write(job.at("job.toml"), with_rates(&format!("{family}from = 'first/m/model'\n{rest}"))).expect("job.toml");
    job.hydra(&["train", "--set", "run.out=second"]).fine();
    assert_eq!(job.json(&format!("second/{file}")), json!({ "own": 1 }));
}

#[test]
fn logits_that_are_not_finite_are_a_failure_and_not_written() {
    let job = Job::fixture("vit");
    let (model, input, output) = (job.at("model"), job.at("x.safetensors"), job.at("y.safetensors"));
    let forward = |pixel: f32| {
        let pixels = std::iter::repeat_n(pixel, 3 * 14 * 14).flat_map(f32::to_le_bytes).collect();
        fs::write(&input, tensor_file(&[("pixel_values", "F32", &[1, 3, 14, 14], pixels)])).expect("input");
        let path = |p: &Path| p.display().to_string();
        hydra(&["forward", &path(&model), "--input", &path(&input), "--output", &path(&output)])
    };
    forward(3e38).fails(1, &["the logits are not finite: ", " at (0, 0)"]);
    assert!(!output.exists());
    forward(1.0).fine();
    assert!(output.exists());
}

#[test]
fn devices_always_ends_well() {
    let text = hydra(&["devices"]).fine();
    for says in ["host", "cores", "GFLOP/s", "cuda", "not here"] {
        assert!(text.out.contains(says), "{says}: {text:?}");
    }
    let said: Value = serde_json::from_str(&hydra(&["devices", "--json"]).fine().out).expect("json");
    assert_eq!(said["devices"][0]["kind"], "host");
    assert!(said["devices"][2]["why"].as_str().expect("why").contains("cuda"));
}

/// A microbatch is a batch to those that normalise over one, as it is to torch.
#[test]
fn images_train_and_count_their_batches() {
    let job = Job::fixture("resnet-basic");
    let counts = |path: &str| -> BTreeMap<String, i64> {
        let (header, data) = taken_apart(&fs::read(job.at(path)).expect("weights"));
        let header = header.as_object().expect("an object").iter();
        let count = |entry: &Value| {
            let at = entry["data_offsets"][0].as_u64().expect("an offset") as usize;
            i64::from_le_bytes(data[at..at + 8].try_into().expect("8 bytes"))
        };
        let counters = header.filter(|(name, _)| name.ends_with("num_batches_tracked"));
        counters.map(|(name, entry)| (name.clone(), count(entry))).collect()
    };
    let before = counts("model/model.safetensors");
    assert!(!before.is_empty());
    for (microbatch, batches) in [(6, 2), (3, 4)] {
        let (out, size) = (format!("run.out=of{microbatch}"), format!("model.0.microbatch={microbatch}"));
        job.hydra(&["train", "--set", "model.0.steps=2", "--set", &out, "--set", &size]).fine();
        let want: BTreeMap<String, i64> = before.iter().map(|(name, count)| (name.clone(), count + batches)).collect();
        assert_eq!(counts(&format!("of{microbatch}/m/model/model.safetensors")), want);
    }
}
