//! Several models and devices through the program: what is trained, what is simulated, what becomes of a model that
//! fails.

use super::{GPT, Job, hydra};
use hydra::train::metrics::{Row, read_rows};
use hydra::train::read_selection;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;

/// The GPT of the other tests under another name, with `keys` added.
pub(super) fn model(name: &str, keys: &str) -> String {
    format!("{}{keys}\n", GPT.replace("\"m\"", &format!("\"{name}\"")))
}

pub(super) const TWO_CORES: &str = "[[device]]\nkind = 'host'\ncount = 2\nthreads = 1\n";

#[test]
fn models_trained_together_are_those_trained_one_after_another() {
    let models = model("a", "optimizer = { lr = 0.01 }")
        + &model("b", "optimizer = { kind = 'sgd', lr = 0.1 }")
        + &model("c", "");
    let job = Job::new(&(TWO_CORES.to_string() + &models));
    let ran = job.hydra(&["train", "--set", "run.out=together"]).fine();
    assert!(ran.out.contains("3 models on 2 devices, sharded-lrtf"), "{}", ran.out);
    assert!(!ran.out.contains("best: "), "they are no search: {}", ran.out);
    let alone = ["train", "--set", "run.out=alone", "--set", "run.policy=one-at-a-time"];
    job.hydra(&alone).fine();
    // So little memory that shards of all three visit both devices.
    let budget = job.hydra(&["plan", "--json"]).fine().json()["smallest_device_bytes"].as_u64().expect("bytes");
    let memory = format!("device.0.memory={budget}");
    let slow = ["--set", "device.0.link=50 MB/s", "--set", "run.policy=locality-lrtf"];
    job.hydra(&[&["train", "--set", "run.out=tight", "--set", &memory], &slow[..]].concat()).fine();
    // A step's seconds are those of what bound it, beside other models too.
    let rows = read_rows(&job.at("tight/a/metrics.jsonl")).expect("rows");
    let steps: Vec<_> = rows.iter().filter_map(|row| if let Row::Step(row) = row { Some(row) } else { None }).collect();
    assert!(steps.iter().all(|row| (row.bound().total() - row.secs).abs() < 1e-6), "{steps:?}");
    assert!(steps.iter().map(|row| row.bound().h2d).sum::<f64>() > 0.0, "{steps:?}");
    for name in ["a", "b", "c"] {
        let weights = |run: &str| fs::read(job.at(&format!("{run}/{name}/model/model.safetensors"))).expect("weights");
        assert!(weights("together") == weights("alone"), "{name}: other bits together");
        assert!(weights("tight") == weights("alone"), "{name}: other bits in little memory");
    }
    let plan = job.json("tight/plan.json");
    assert_eq!((plan["devices"].as_u64(), plan["policy"].as_str()), (Some(2), Some("locality-lrtf")));
    let peak = plan["device_peak_bytes"].as_u64().expect("bytes");
    assert!(plan["models"].as_array().expect("a list").len() == 3 && peak <= budget, "{plan}");
    let below = format!("device.0.memory={}", budget - 1);
    let refused = job.hydra(&["train", "--set", "run.out=none", "--set", &below]);
    refused.fails(2, &["the models together need", &budget.to_string()]);
    assert!(refused.err.contains(&format!("memory = {budget}")), "{refused:?}");
    // The same run again has nothing to do but to write what it may have had no time for; another is refused.
    let results = fs::read(job.at("alone/results.csv")).expect("results.csv");
    fs::remove_file(job.at("alone/results.csv")).expect("it is there");
    assert!(job.hydra(&[&alone[..], &["--resume", "auto"]].concat()).fine().out.contains("nothing to do"));
    assert!(fs::read(job.at("alone/results.csv")).expect("results.csv") == results);
    let said = job.hydra(&[&alone[..], &["--resume", "auto", "--json"]].concat()).fine().json();
    let models = said["models"].as_array().expect("a list");
    assert!(models.len() == 3 && models.iter().all(|m| m["status"] == "done" && m["steps"] == 4), "{said}");
    job.hydra(&alone).bad(&["holds a run already"]);
}

#[test]
fn one_model_on_two_devices_has_the_bits_of_one() {
    let cut = model("m", "optimizer = { lr = 0.01 }")
        .replace("microbatch = 2", "")
        .replace("batch = 4", "batch = 4\nmicrobatch = 1");
    let job = Job::new(&(TWO_CORES.to_string() + &cut));
    let locality = ["--set", "run.policy=locality-lrtf"];
    for pipeline in ["always", "never"] {
        let out = format!("run.out={pipeline}");
        let set = format!("run.pipeline={pipeline}");
        let ran = job.hydra(&[&["train", "--set", &out, "--set", &set][..], &locality].concat()).fine();
        assert_eq!(ran.out.contains("go on from device to device"), pipeline == "always", "{}", ran.out);
        assert_eq!(ran.out.contains("1 device of 2 idle"), pipeline == "never", "{}", ran.out);
    }
    let weights = |run: &str| fs::read(job.at(&format!("{run}/m/model/model.safetensors"))).expect("weights");
    assert!(weights("always") == weights("never"), "other bits on two devices");
}

#[test]
fn one_that_fails_ends_with_its_reason_and_the_others_go_on() {
    let hot = "optimizer = { kind = 'sgd', lr = 1e30 }";
    let job = Job::new(&(model("fine", "") + &model("hot", hot).replace("steps = 4", "steps = 9")));
    let ran = job.hydra(&["train"]);
    ran.fails(2, &["1 of 2 models failed", "hot", "the loss is"]);
    let results = fs::read_to_string(job.at("runs/job/results.csv")).expect("results.csv");
    let row = |name: &str| results.lines().find(|l| l.starts_with(name)).expect("a row").to_string();
    assert!(row("fine,").contains(",done,") && row("hot,").contains(",failed,"), "{results}");
    assert!(job.at("runs/job/fine/model/model.safetensors").exists() && !job.at("runs/job/hot/model").exists());
    let said = job.hydra(&["train", "--json", "--set", "run.out=again"]).json();
    assert!(said["models"][0]["model"].as_str().is_some_and(|model| model.ends_with("again/fine/model")), "{said}");
    assert!(said["models"][1]["status"] == "failed" && said["models"][1]["model"].is_null(), "{said}");
}

#[test]
fn a_search_ends_models_early_and_names_the_best() {
    let search = "search = { lr = [0.01, 0.001, 0.0001], stop = { kind = 'asha', first = 2, eta = 2 } }";
    let job = Job::new(&model("m", search).replace("steps = 4", "steps = 8"));
    let ran = job.hydra(&["train", "--json"]).fine();
    let models = ran.json()["models"].as_array().expect("a list").clone();
    assert_eq!(models.len(), 3);
    let of = |status: &str| models.iter().filter(|m| m["status"] == status).count();
    assert!(of("done") >= 1 && of("stopped") >= 1 && of("done") + of("stopped") == 3, "{models:?}");
    for model in &models {
        let steps = model["steps"].as_u64().expect("steps");
        assert!(if model["status"] == "done" { steps == 8 } else { [2, 4].contains(&steps) }, "{model}");
        assert!(std::path::Path::new(model["model"].as_str().expect("a path")).join("model.safetensors").exists());
    }
    let results = fs::read_to_string(job.at("runs/job/results.csv")).expect("results.csv");
    assert!(results.starts_with("name,lr,status,reason,steps_done,"), "{results}");
    let told = job.hydra(&["train", "--set", "run.out=told"]).fine().out;
    assert!(told.contains("best: m-lr="), "{told}");
    // A run that goes on remembers who was stopped; one that lost its steps is compared with those that were there
    // before it.
    let stopped = models.iter().find(|m| m["status"] == "stopped").expect("a stopped one");
    let name = stopped["name"].as_str().expect("a name");
    let record = job.at("runs/job/selection.jsonl");
    let before = fs::read_to_string(&record).expect("a record");
    assert!(before.contains(name));
    fs::remove_file(job.at(&format!("runs/job/{name}/checkpoint.safetensors"))).expect("a checkpoint");
    // As after a power cut.
    fs::write(&record, format!("{before}\0\0\0\n\0\0")).expect("a damaged record");
    let again = job.hydra(&["train", "--resume", "auto", "--json"]).fine();
    assert!(again.err.contains("selection.jsonl: 1 of its lines are damaged"), "{again:?}");
    assert_eq!(fs::read_to_string(&record).expect("a record"), before, "what is reported again is there once");
    let again = again.json();
    for (before, after) in models.iter().zip(again["models"].as_array().expect("a list")) {
        for key in ["name", "status", "steps", "reason", "loss"] {
            assert_eq!(before[key], after[key], "{key}: {before} {after}");
        }
    }
    // Nothing in the run's directory but models has a name that a model may have.
    hydra(&["report", &job.at("runs/job").display().to_string()]).fine();
    let there = fs::read_dir(job.at("runs/job")).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let is_models = |name: &String| models.iter().any(|model| model["name"] == name.as_str());
    let others: Vec<String> = there.map(|name| name.into_string().expect("a name")).filter(|n| !is_models(n)).collect();
    assert!(others.iter().any(|name| name.starts_with("trace-until-")) && others.len() == 9, "{others:?}");
    for name in others {
        job.hydra(&["plan", "--set", &format!("model.0.name={name:?}")]).bad(&["has another use for"]);
    }
    // There are no losses in a simulation.
    job.hydra(&["simulate"]).bad(&["job.toml: model.0.search.stop: ", "survivors"]);
}

#[test]
fn one_model_that_runs_out_of_patience_is_stopped() {
    let search = "search = { stop = { kind = 'patience', evaluations = 1 } }\noptimizer = { lr = 0 }\n";
    let text = "valid = { fraction = 0.2, every = 1 }";
    let text = model("m", &format!("{search}{text}"))
        .replace("vocab_size = 61, ", "")
        .replace("random = true", "text = 'corpus.txt', tokenizer = 'bytes', context = 16");
    let job = Job::new(&text);
    fs::write(job.at("corpus.txt"), "The quick brown fox jumps over the lazy dog. ".repeat(40)).expect("corpus");
    let ran = job.hydra(&["train"]).fine();
    assert!(ran.out.contains("m: stopped, 2 steps done in "), "{ran:?}");
}

/// Steps and losses by model of a run's validations, and of what was reported to the rule of its search.
fn judged(job: &Job, run: &str) -> [BTreeMap<String, Vec<(u64, u32)>>; 2] {
    let (mut valid, mut reported) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
    for row in read_selection(&job.at(run).join("selection.jsonl")).expect("reports").0 {
        reported.entry(row.model.clone()).or_default().push((row.step, row.metric().to_bits()));
    }
    for name in reported.keys() {
        let rows = read_rows(&job.at(run).join(name).join("metrics.jsonl")).expect("rows");
        let of = |row| if let Row::Valid(row) = row { Some((row.step, row.valid_loss.to_bits())) } else { None };
        valid.insert(name.clone(), rows.into_iter().filter_map(of).collect());
    }
    [valid, reported]
}

/// Where there is held-out data, its loss is what a search goes by: at the rungs, or as often as it is looked at.
#[test]
fn a_search_goes_by_held_out_losses_where_there_are_any() {
    let text = model("m", "optimizer = { lr = 0.01 }")
        .replace("vocab_size = 61, ", "")
        .replace("random = true", "text = 'corpus.txt', tokenizer = 'bytes', context = 16")
        .replace("steps = 4", "steps = 8");
    // One after another, so that the first is there to be compared with.
    let job = Job::new(&format!("[run]\npolicy = 'one-at-a-time'\n{text}"));
    fs::write(job.at("corpus.txt"), "The quick brown fox jumps over the lazy dog. ".repeat(40)).expect("corpus");
    // What learns nothing is never better than it was.
    for (kind, stop, every, rows, stopped_after) in
        [("asha", "first = 2, eta = 2", 50, &[2, 4, 8][..], 2), ("patience", "evaluations = 1", 3, &[3, 6, 8], 6)]
    {
        let out = format!("run.out={kind}");
        let valid = format!("model.0.valid={{ fraction = 0.2, every = {every} }}");
        let search = format!("model.0.search={{ lr = [0.01, 0], stop = {{ kind = '{kind}', {stop} }} }}");
        let sets = ["--json", "--set", &out, "--set", &valid, "--set", &search];
        let said = job.hydra(&[&["train"], &sets[..]].concat()).fine().json();
        let (learns, rests) = ("m-lr=0.01", "m-lr=0");
        let [valid, reported] = judged(&job, kind);
        assert_eq!(valid, reported, "{kind}");
        for (at, (name, status, last)) in
            [(learns, "done", 8), (rests, "stopped", stopped_after)].into_iter().enumerate()
        {
            let row = &said["models"][at];
            assert!(row["name"] == name && row["status"] == status && row["steps"] == last, "{kind}: {row}");
            let steps: Vec<u64> = reported[name].iter().map(|row| row.0).collect();
            let want: Vec<u64> = rows.iter().copied().filter(|step| *step <= last).collect();
            assert_eq!(steps, want, "{kind}: {name}");
        }
        // Judged by itself alone, one that lost its steps makes them again, and is reported once all the same.
        if kind == "patience" {
            fs::remove_file(job.at(kind).join(rests).join("checkpoint.safetensors")).expect("a checkpoint");
            job.hydra(&[&["train", "--resume", "auto"], &sets[..]].concat()).fine();
            assert_eq!(judged(&job, kind), [valid, reported]);
        }
    }
}

/// By default a pipeline holds as many microbatches as there are devices, and is faster than stages that wait for each
/// other.
#[test]
fn a_pipeline_is_filled_with_microbatches() {
    let sim =
        "[[device]]\nkind = 'sim'\ncount = 4\nflops = '2 GFLOP/s'\nmemory_bandwidth = '400 MB/s'\nlink = '400 MB/s'\n";
    let job = Job::new(&(sim.to_string() + &model("m", "").replace("batch = 4\nmicrobatch = 2", "batch = 8")));
    let gpipe = ["--json", "--set", "run.policy=gpipe"];
    let microbatch = |sets: &[&str]| {
        let plan = job.hydra(&[&["plan"], &gpipe[..], sets].concat()).fine().json();
        plan["models"][0]["microbatch"].as_u64().expect("samples")
    };
    assert_eq!(microbatch(&[]), 2);
    assert_eq!(microbatch(&["--set", "device.0.count=3"]), 4, "3 do not divide the batch");
    assert_eq!(microbatch(&["--set", "run.pipeline_microbatches=8"]), 1);
    let three = ["--set", "run.pipeline_microbatches=3"];
    job.hydra(&[&["plan"], &gpipe[..], &three].concat())
        .bad(&["model.0.batch: run.pipeline_microbatches = 3 does not divide the batch of 8"]);
    let makespan_secs = |policy: &str| {
        let figures = job.hydra(&["simulate", "--json", "--policy", policy]).fine().json();
        figures["makespan_secs"].as_f64().expect("seconds")
    };
    let (piped, waiting) = (makespan_secs("gpipe"), makespan_secs("model-parallel"));
    assert!(piped < 0.8 * waiting, "{piped} {waiting}");
}

#[test]
fn simulations_say_what_the_schedule_comes_to() {
    let sim = "[[device]]\nkind = 'sim'\ncount = 2\nprofile = 'v100'\n";
    let job = Job::new(&(sim.to_string() + &model("a", "") + &model("b", "") + &model("c", "")));
    let figures = job.hydra(&["simulate", "--json"]).fine().json();
    let secs = |key: &str| figures[key].as_f64().expect("seconds");
    assert!(secs("makespan_secs") >= secs("bound_secs") && secs("bound_secs") > 0.0, "{figures}");
    assert_eq!(figures["utilisation"].as_array().map(Vec::len), Some(2));
    assert_eq!(figures["policy"], "sharded-lrtf");
    for policy in ["fifo", "random", "round-robin", "srtf", "locality-lrtf", "model-parallel", "gpipe", "task-parallel"]
    {
        let ran = job.hydra(&["simulate", "--json", "--policy", policy]).fine().json();
        assert_eq!(ran["policy"], policy);
        let secs = |key: &str| ran[key].as_f64().expect("seconds");
        assert!(secs("makespan_secs") >= secs("bound_secs") && secs("bound_secs") > 0.0, "{ran}");
    }
    let slow = job.hydra(&["simulate", "--json", "--set", "host.link=1 MB/s"]).fine().json();
    assert!(
        slow["makespan_secs"].as_f64().expect("seconds") > secs("makespan_secs"),
        "over a link that all share: {slow}"
    );
    assert!(!job.at("runs").exists(), "nothing is written");
    let out = job.at("out").display().to_string();
    let text = job.hydra(&["simulate", "--out", &out, "--devices", "4"]).fine().out;
    assert!(text.contains("no schedule of these plans ends before"), "{text}");
    assert!(text.contains("1 device of 4 idle"), "{text}");
    for file in ["schedule.svg", "trace.json", "simulation.json"] {
        assert!(job.at("out").join(file).exists(), "{file}");
    }
    let table =
        job.hydra(&["simulate", "--json", "--sweep", "policy=fifo,srtf", "--sweep", "devices=1,2,3"]).fine().json();
    assert_eq!(table["sweep"].as_array().map(Vec::len), Some(6));
    job.hydra(&["train"]).bad(&["device.0.kind", "\"sim\" has a clock and no arithmetic"]);
}

/// What a model's weights take once to come to where they stay is no part of a step.
#[test]
fn no_step_is_predicted_to_be_shorter_than_its_bound() {
    let device = "[[device]]\nkind = 'sim'\nprofile = 'v100'\n";
    let slow = format!("{device}link = '10 MB/s'\n");
    let (a, b) = (model("a", ""), model("b", "optimizer = { kind = 'sgd' }"));
    let jobs = [device.to_string() + &slow + &a, slow.repeat(2) + &a + &b].map(|job| Job::new(&job));
    let policies = ["gpipe", "model-parallel", "locality-lrtf", "one-at-a-time"];
    for (job, policy) in jobs.iter().flat_map(|job| policies.map(|policy| (job, policy))) {
        let plan = job.hydra(&["plan", "--json", "--set", &format!("run.policy={policy}")]).fine().json();
        for model in plan["models"].as_array().expect("a list") {
            let secs = |key: &str| model[key].as_f64().expect("seconds");
            assert!(secs("bound_secs") <= secs("step_secs"), "{policy}: {model}");
            let all = |key: &str| plan[key].as_f64().expect("seconds");
            let stays = !model["shards"][0]["device"].is_null();
            assert!(!stays || secs("bound_secs") <= all("bound_secs"), "{policy}: {plan}");
            assert!(all("bound_secs") <= all("step_secs"), "{policy}: {plan}");
        }
    }
}

#[test]
fn the_host_memory_that_is_named_depends_on_no_rate_and_does() {
    let device = "[[device]]\nkind = 'sim'\nprofile = 'v100'\nmemory = 300000\ncount = 2\n[host]\nmemory = 1\n";
    let models = model("a", "") + &model("b", "optimizer = { kind = 'sgd', clip = 1.0 }");
    let job = Job::new(&(device.to_string() + &models.replace("n_layer = 2", "n_layer = 6")));
    for policy in ["gpipe", "model-parallel", "locality-lrtf", "one-at-a-time"] {
        let plan = |sets: &[&str]| {
            let policy = format!("run.policy={policy}");
            let sets = [&[policy.as_str()], sets].concat();
            job.hydra(&sets.iter().fold(vec!["plan"], |args, set| [&args[..], &["--set", set]].concat()))
        };
        let mut named = Vec::new();
        for link in ["device.0.link=100 KB/s", "device.0.link=900 GB/s"] {
            let refused = plan(&[link]);
            refused.fails(2, &["the host's store needs", "[host] memory = "]);
            let (_, after) = refused.err.split_once("[host] memory = ").expect("what is needed");
            let bytes: String = after.chars().take_while(char::is_ascii_digit).collect();
            plan(&[link, &format!("host.memory={bytes}")]).fine();
            named.push(bytes);
        }
        assert_eq!(named[0], named[1], "{policy}");
    }
}

#[test]
fn bad_fleets() {
    let job = Job::new(&(model("a", "") + &model("a", "")));
    job.hydra(&["train"]).bad(&["model.1.name", "model.0 has the name"]);
    let job = Job::new(&(TWO_CORES.to_string() + &model("a", "") + &model("b", "")));
    for (args, says) in [
        (&["simulate", "--policy", "lifo"][..], "run.policy"),
        (&["simulate", "--devices", "0"], "device.0.count"),
        (&["simulate", "--slots", "0"], "run.slots"),
        (&["simulate", "--sweep", "colour=red"], "--sweep colour"),
        (&["simulate", "--sweep", "devices"], "--sweep devices"),
        (&["train", "--set", "device.0.count=0"], "device.0.count"),
        (&["train", "--set", "model.0.search={ colour = [1, 2] }"], "model.0.search"),
        (&["train", "--set", "run.pipeline_microbatches=2"], "run.pipeline_microbatches"),
        (&["train", "--set", "run.pipeline=always"], "run.pipeline"),
        (
            &[
                "plan",
                "--set",
                "run.pipeline=always",
                "--set",
                "run.policy=locality-lrtf",
                "--set",
                "model.0.microbatch=4",
                "--set",
                "model.1.microbatch=4",
            ],
            "job.toml: run.pipeline: ",
        ),
        // No memory would do.
        (
            &[
                "plan",
                "--set",
                "run.pipeline=always",
                "--set",
                "run.policy=locality-lrtf",
                "--set",
                "model.0.microbatch=4",
                "--set",
                "model.1.microbatch=4",
                "--set",
                "device.0.memory=1",
            ],
            "job.toml: run.pipeline: ",
        ),
        (&["plan", "--set", "device.0.count=70000"], "70000 devices"),
    ] {
        job.hydra(args).bad(&[says]);
    }
    // One number for two kinds of devices.
    let two_kinds = "[[device]]\nkind = 'sim'\nprofile = 'v100'\n".repeat(2);
    let kinds = Job::new(&(two_kinds + &model("a", "")));
    for args in [&["--devices", "4"][..], &["--sweep", "devices=1,2"], &["--devices", "4", "--sweep", "slots=1,2"]] {
        kinds.hydra(&[&["simulate"], args].concat()).bad(&[args[0], "has 2 [[device]] tables", "device.0.count"]);
    }
    kinds.hydra(&["simulate", "--set", "device.1.count=3"]).fine();
    // Whole models on a device of 1 KiB: each is named.
    let tiny = ["--set", "device.0.memory=1024"];
    for (policy, says) in [("task-parallel", "fit whole on no device"), ("srtf", "the models together need")] {
        let policy = format!("run.policy={policy}");
        let refused = job.hydra(&[&["train", "--set", &policy], &tiny[..]].concat());
        refused.fails(2, &[says]);
        assert!(refused.err.contains("smallest budget that works"), "{refused:?}");
    }
    assert!(!job.at("runs").exists());
}

impl super::Ran {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// What comes before the first step and after the last, over a slow link, is none of a steady step's.
#[test]
fn a_step_of_models_together_is_predicted_as_it_is_simulated() {
    let devices = "[[device]]\nkind = 'sim'\ncount = 2\nflops = '1 TFLOP/s'\nmemory_bandwidth = '100 GB/s'\n";
    let job = Job::new(&(devices.to_string() + &model("a", "") + &model("b", "")));
    for link in ["1 GB/s", "10 MB/s"] {
        let link = format!("device.0.link={link}");
        let secs = |command: &str, steps: u64, key: &str| {
            let [a, b] = [0, 1].map(|model| format!("model.{model}.steps={steps}"));
            let json = job.hydra(&[command, "--json", "--set", &link, "--set", &a, "--set", &b]).fine().json();
            json[key].as_f64().expect("seconds")
        };
        let makespan = |steps| secs("simulate", steps, "makespan_secs");
        let step = (makespan(300) - makespan(100)) / 200.0;
        let (predicted, bound) = (secs("plan", 100, "step_secs"), secs("plan", 100, "bound_secs"));
        assert!(bound <= 1.000_001 * step, "{link}: no less than {bound}, and {step} is");
        assert!((predicted / step - 1.0).abs() < 0.02, "{link}: {predicted} predicted, {step} simulated");
    }
}
