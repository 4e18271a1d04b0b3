//! Good and bad job files in tables.

use super::Part;
use super::device::Disk;
use super::model::{Data, Length, Precision, Source, Tokenizer, ValidPart};
use super::*;
use hydra::graph::LowRank;
use hydra::spill::{Baseline, Recompute};
use hydra::train::{Optimizer, Schedule};

/// A small model.
pub const MODEL: &str = "[[model]]\nname = 'a'\nfamily = 'gpt2'\ndata = { random = true }\nsteps = 3\n";

/// Every key that a job file may have, in the forms that do not exclude each other.
pub const WHOLE: &str = r#"
[run]
out = "runs/demo"
part = "0/1"
seed = 1
policy = "gpipe"
slots = 2
recompute = "always"
trace = { first = 2, last = 9 }
pipeline = "never"
rehearse = false
pipeline_microbatches = 4

[[device]]
kind = "host"
count = 2
memory = "64 MiB"
link = "2 GB/s"
threads = 1

[[device]]
kind = "sim"
flops = "60 TFLOP/s"
memory_bandwidth = "900 GB/s"
memory = 1024

[[device]]
kind = "sim"
profile = "v100"

[host]
memory = "4 GiB"
link = "20 GB/s"
disk = { path = "spill", memory = "16 GiB" }

[[model]]
name = "gpt"
family = "gpt2"
config = { n_layer = 6, dropout = 0.0, tie = true, act = "gelu", list = [1, { a = 2 }] }
dtype = "f32"
data = { text = ["corpus.txt", "/abs/more"], tokenizer = "bytes", context = 128 }
valid = { fraction = 0.1, every = 7 }
batch = 16
microbatch = 4
frozen = ["transformer.w", "transformer.h.0."]
steps = 200
optimizer = { kind = "adamw", lr = 3e-4, betas = [0.9, 0.95], eps = 1e-7, weight_decay = 0.1, clip = 1.0, decay = "matrices" }
schedule = { kind = "cosine", warmup = 20, min_lr = 3e-5 }

[[model]]
name = "resnet"
from = "hub/resnet"
data = { images = "t10k-images-idx3-ubyte.gz", labels = "labels.gz" }
epochs = 2
lora = { targets = ["classifier.1"], rank = 4, alpha = 6, dropout = 0.1 }
optimizer = { kind = "sgd", lr = 1, momentum = 0.9, nesterov = true }
schedule = { kind = "linear" }

[[model]]
name = "swept"
family = "gpt2"
data = { random = true }
batch = 16
microbatch = 4
steps = 200
optimizer = { lr = 3e-4 }
search = { lr = [1e-3, 3e-4], batch = [16, 32], draw = 3, stop = { kind = "asha", eta = 2, first = 20, survivors = [[0, 2], [2]] } }
"#;

pub fn check_with(text: &str, sets: &[&str]) -> Result<Job> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    let origin = Origin { file: "job.toml", folder: Path::new("/jobs") };
    read_job(origin, "job", text.to_string(), &sets)
}

pub fn check(text: &str) -> Result<Job> {
    check_with(text, &[])
}

pub fn good(text: &str) -> Job {
    check(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// The message of the error that `text` under `sets` gives; it must be bad input, on one line, and name the file.
pub fn fault(text: &str, sets: &[&str]) -> String {
    match check_with(text, sets) {
        Err(Error::BadInput(message)) => {
            assert_eq!(message.lines().count(), 1, "{message}");
            assert!(message.starts_with("job.toml: "), "{message}");
            message
        }
        Err(other) => panic!("not bad input: {other}"),
        Ok(_) => panic!("accepted: {text} {sets:?}"),
    }
}

#[test]
fn reads_every_key() {
    let job = good(WHOLE);
    let run = Run {
        out: "/jobs/runs/demo/part-0-of-1".into(),
        part: Some(Part { index: 0, count: 1 }),
        seed: 1,
        policy: Policy::Lines(Baseline::Gpipe),
        slots: Some(2),
        recompute: Recompute::Always,
        trace_first: 2,
        trace_last: 9,
        pipeline: Pipeline::Never,
        rehearse: false,
        pipeline_microbatches: Some(4),
    };
    assert_eq!(job.run, run);
    assert_eq!(job.source_text, WHOLE);
    let [host, sim, v100] = &job.devices[..] else { panic!("three devices") };
    assert_eq!((host.kind, host.count, host.memory), (DeviceKind::Host, 2, Some(64 << 20)));
    assert_eq!((host.link, host.threads), (Some(2e9), Some(1)));
    assert_eq!((sim.kind, sim.count, sim.memory), (DeviceKind::Sim, 1, Some(1024)));
    assert_eq!((sim.flops, sim.memory_bandwidth), (Some(6e13), Some(9e11)));
    assert_eq!(v100.profile.as_deref(), Some("v100"));
    let disk = Disk { path: "/jobs/spill".into(), memory: 16 << 30, link: None };
    assert_eq!(job.host, Host { memory: Some(4 << 30), link: Some(2e10), disk: Some(disk) });

    let [gpt, resnet, swept @ ..] = &job.models[..] else { panic!("two models and a search") };
    let Source::Family { family, config } = &gpt.source else { panic!("a family") };
    assert_eq!(family, "gpt2");
    let want = serde_json::json!({ "n_layer": 6, "dropout": 0.0, "tie": true, "act": "gelu", "list": [1, { "a": 2 }] });
    assert_eq!(serde_json::Value::Object(config.clone()), want);
    let paths = vec!["/jobs/corpus.txt".into(), "/abs/more".into()];
    assert_eq!(gpt.data, Data::Text { paths, tokenizer: Tokenizer::Bytes, context: 128 });
    assert_eq!(gpt.valid, Some(Valid { part: ValidPart::Fraction(0.1), every: 7 }));
    assert_eq!((gpt.batch, gpt.microbatch, gpt.length), (16, 4, Length::Steps(200)));
    assert_eq!(
        (&gpt.frozen[..], &resnet.frozen[..]),
        (&["transformer.w".into(), "transformer.h.0.".into()][..], &[][..])
    );
    let adamw =
        Optimizer::Adamw { lr: 3e-4, betas: (0.9, 0.95), epsilon: 1e-7, weight_decay: 0.1, decay_matrices_only: true };
    assert_eq!((gpt.optimizer, gpt.clip), (adamw, Some(1.0)));
    assert_eq!(gpt.schedule, Schedule::Cosine { warmup: 20, min_lr: 3e-5 });
    assert_eq!((gpt.at.as_str(), &gpt.searched, gpt.place("batch").as_str()), ("model.0", &vec![], "model.0.batch"));

    assert_eq!(resnet.source, Source::From("/jobs/hub/resnet".into()));
    let lora = LowRank { rank: 4, alpha: 6.0, dropout: 0.1, targets: vec!["classifier.1".into()] };
    assert_eq!((&gpt.lora, &resnet.lora), (&None, &Some(lora)));
    let images = vec!["/jobs/t10k-images-idx3-ubyte.gz".into()];
    assert_eq!(resnet.data, Data::Images { images, labels: Some("/jobs/labels.gz".into()) });
    assert_eq!(resnet.length, Length::Epochs(2));
    let sgd = Optimizer::Sgd { lr: 1.0, momentum: 0.9, nesterov: true, weight_decay: 0.0 };
    assert_eq!((resnet.optimizer, resnet.clip), (sgd, None));
    assert_eq!(resnet.schedule, Schedule::Linear { warmup: 0, min_lr: 0.0 });
    assert_eq!((swept.len(), job.searches.len()), (3, 1));
}

#[test]
fn defaults() {
    let job = good(MODEL);
    let run = Run {
        out: "/jobs/runs/job".into(),
        part: None,
        seed: 0,
        policy: Policy::Turns("sharded-lrtf"),
        slots: None,
        recompute: Recompute::Auto,
        trace_first: 5,
        trace_last: 20,
        pipeline: Pipeline::Auto,
        rehearse: true,
        pipeline_microbatches: None,
    };
    assert_eq!(job.run, run);
    let [device] = &job.devices[..] else { panic!("one device") };
    assert_eq!((device.kind, device.count, device.memory, device.link), (DeviceKind::Host, 1, None, None));
    assert_eq!(job.host, Host::default());
    let model = &job.models[0];
    assert_eq!((model.batch, model.microbatch, model.dtype), (1, 1, Precision::F32));
    assert_eq!((&model.valid, job.models.len(), &job.searches), (&None, 1, &vec![]));
    assert_eq!((model.optimizer, model.clip, model.schedule), (Optimizer::default(), None, Schedule::Constant));
    assert_eq!(
        good(&format!("{MODEL}valid = {{ fraction = 0.5 }}")).models[0].valid.as_ref().map(|v| v.every),
        Some(50)
    );
    assert_eq!(good(&format!("{MODEL}batch = 6")).models[0].microbatch, 6);
    for (trace, want) in
        [("{ first = 100 }", (100, 20)), ("{ last = 0 }", (5, 0)), ("{ first = 0, last = 30 }", (0, 30))]
    {
        let run = good(&format!("[run]\ntrace = {trace}\n{MODEL}")).run;
        assert_eq!((run.trace_first, run.trace_last), want, "{trace}");
    }
    for (word, policy) in Policy::words() {
        assert_eq!(good(&format!("[run]\npolicy = '{word}'\n{MODEL}")).run.policy, policy);
    }
}

/// Each text is a whole file.
#[test]
fn bad_files() {
    let with = |from: &str, to: &str| MODEL.replacen(from, to, 1);
    let device = |line: &str| format!("{MODEL}[[device]]\n{line}");
    let data = |table: &str| with("{ random = true }", table);
    for (text, want) in [
        (String::new(), "model: there is none; add a [[model]]"),
        ("\n[[model]\n".into(), "line 2, column "),
        ("model = []".into(), "there is none"),
        ("model = 3".into(), "model: want tables under [[model]], got 3"),
        ("model = [3]".into(), "model: want tables under [[model]]"),
        ("[model]\nname = 'a'".into(), "model: want tables under [[model]], got a table"),
        (format!("{MODEL}{MODEL}"), "model.1.name: model.0 has the name \"a\" too"),
        (format!("{MODEL}[runs]"), "runs: unknown key; did you mean `run`?"),
        (format!("{MODEL}[[model]]"), "model.1.name: is missing"),
        (with("'a'", "''"), "model.0.name: want a plain file name"),
        (with("'a'", "'../a'"), "model.0.name: want a plain file name in quotes, such as \"gpt\", got \"../a\""),
        (with("'a'", "'..'"), "model.0.name"),
        (with("'a'", "'.hidden'"), "model.0.name: \".hidden\" begins with a dot; write another"),
        (with("'a'", "'.plan.json.part'"), "model.0.name: \".plan.json.part\" begins with a dot"),
        (with("'a'", "\"a\\nb\""), "model.0.name"),
        (
            with("'a'", "'trace.json'"),
            "model.0.name: \"trace.json\" is a name that the run's directory has another use for",
        ),
        (with("'a'", "'inbox'"), "model.0.name: \"inbox\" is a name that the run's directory has another use for"),
        (with("'a'", "'report.html'"), "model.0.name"),
        (with("'a'", "'schedule.svg'"), "model.0.name"),
        (with("'a'", "'trace-until-12.json'"), "model.0.name"),
        (with("'a'", "7"), "model.0.name"),
        (with("steps = 3", ""), "model.0: steps or epochs is missing"),
        (with("steps = 3", "setps = 3"), "model.0.setps: unknown key; did you mean `steps`?"),
        (with("steps = 3", "steps = 0"), "model.0.steps"),
        (with("family = 'gpt2'", ""), "model.0: from or family is missing"),
        (with("family = 'gpt2'", "from = 'x'\nconfig = {}"), "model.0.config: is for family only"),
        (with("data = { random = true }", ""), "model.0.data: is missing"),
        (
            data("{ images = 'i' }") + "valid = { text = 'v.txt' }\n",
            "model.0.valid.text: goes with text as the training data only; write fraction = 0.1",
        ),
        (data("{}"), "model.0.data: want one of text, batches, random, images"),
        (data("{ random = false }"), "model.0.data.random: want true"),
        (data("{ random = true, text = 'x' }"), "model.0.data.random: text is there too"),
        (data("{ random = true, image = [3, 0, 4] }"), "model.0.data.image: want channels"),
        (data("{ random = true, image = [3, 224] }"), "model.0.data.image: want channels"),
        (data("{ random = true, image = [1, 2, 3], context = 4 }"), "model.0.data.image: context is there too"),
        (data("{ random = true, labels = 'x' }"), "model.0.data.labels: does not go with random"),
        (data("{ batches = 'b', context = 4 }"), "model.0.data.context: does not go with batches"),
        (data("{ text = [], tokenizer = 'bytes', context = 4 }"), "model.0.data.text: want a path"),
        (data("{ text = ['a', 3], tokenizer = 'bytes', context = 4 }"), "model.0.data.text: want a path"),
        (
            data("{ text = 'a', context = 4 }"),
            "model.0.data.tokenizer: is missing; write tokenizer = \"bytes\", or the path",
        ),
        (data("{ text = 'a', tokenizer = 3, context = 4 }"), "model.0.data.tokenizer: want \"bytes\""),
        (data("{ text = 'a', tokenizer = 'bytes' }"), "model.0.data.context: is missing"),
        (data("{ txt = 'a' }"), "model.0.data.txt: unknown key; did you mean `text`?"),
        (format!("run = 3\n{MODEL}"), "run: want a table"),
        (format!("[run]\nout = ''\n{MODEL}"), "run.out: want a path"),
        (format!("[run]\nseed = -1\n{MODEL}"), "run.seed: want a whole number of at least 0, got -1"),
        (format!("[run]\nslots = 0\n{MODEL}"), "run.slots"),
        (format!("[run]\npolicy = 'sharded_lrtf'\n{MODEL}"), "did you mean \"sharded-lrtf\"?"),
        (format!("[run]\nrecompute = true\n{MODEL}"), "run.recompute: want one of \"auto\""),
        (device("kind = 'gpu'"), "device.0.kind: want one of \"host\", \"cuda\""),
        (device("count = 0"), "device.0.count"),
        (device("memory = '64 parsecs'"), "device.0.memory: want a size above 0, such as \"64 MiB\""),
        (device("memory = '99999999999 TiB'"), "device.0.memory: \"99999999999 TiB\" is too large"),
        (device("memory = -1"), "device.0.memory"),
        (device("memory = 0"), "device.0.memory"),
        (device("memory = 1.5"), "device.0.memory"),
        (device("link = 2"), "device.0.link: want a bandwidth from 1 to 1e21 B/s in quotes"),
        (device("link = '1e-300 GB/s'"), "device.0.link: want a bandwidth from 1 to 1e21 B/s in quotes"),
        (device("kind = 'sim'\nflops = '1e300 TFLOP/s'"), "device.0.flops: want an arithmetic rate up to 1e21 FLOP/s"),
        (device(&format!("link = '{} TB/s'", "9".repeat(308))), "device.0.link"),
        (device("flops = '1 TFLOP/s'"), "device.0.flops: is for kind = \"sim\" only"),
        (device("kind = 'cuda'\nthreads = 1"), "device.0.threads: is for kind = \"host\" only"),
        (device("kind = 'cuda'\nlink = '1 GB/s'"), "device.0.link: is for"),
        (device("kind = 'sim'"), "device.0: a sim device needs its rates"),
        (device("kind = 'sim'\nflops = '1 TFLOP/s'"), "device.0: a sim device needs its rates"),
        (device("kind = 'sim'\nprofile = 'v100'\nflops = '1 TFLOP/s'"), "device.0.flops: profile is there too"),
        (format!("{MODEL}[host]\ndisk = {{ path = 'x' }}"), "host.disk.memory: is missing"),
        (format!("{MODEL}[host]\ndisk = {{ memory = 7 }}"), "host.disk.path: is missing"),
        (format!("{MODEL}[host]\nmemroy = 7"), "host.memroy: unknown key; did you mean `memory`?"),
        (format!("{}x = 1", "a.".repeat(100_000)), "no valid TOML"),
        (format!("a = {}", "[".repeat(100_000)), "no valid TOML"),
    ] {
        let message = fault(&text, &[]);
        assert!(message.contains(want), "{}\n got {message}\nwant {want}", text.chars().take(400).collect::<String>());
        assert!(message.len() < 400, "{message}");
    }
}

#[test]
fn loads_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.toml");
    std::fs::write(&path, MODEL).unwrap();
    let job = Job::load(&path, &["run.seed=3".to_string()]).unwrap();
    assert_eq!((job.run.seed, job.run.out), (3, folder.path().join("runs/small")));
    std::fs::write(&path, [b'a', 0xff]).unwrap();
    for (path, want) in
        [(path, "byte 1 is no UTF-8"), (folder.path().into(), "cannot read"), ("no/such".into(), "cannot read")]
    {
        let error = Job::load(&path, &[]).unwrap_err();
        assert!(matches!(error, Error::BadInput(_)) && error.to_string().contains(want), "{error}");
    }
}

#[test]
fn models_are_added_with_their_own_folder_and_refused_whole() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    let seed = "[run]\nseed = 7\n";
    let mut job = Job::load(&write("job.toml", &format!("{seed}{MODEL}")), &[]).unwrap();
    let text = "data = { text = 'corpus.txt', tokenizer = 'bytes', context = 8 }";
    let second = MODEL.replace("'a'", "'b'").replace("data = { random = true }", text);
    let search = "search = { lr = [0.1, 0.2], stop = { kind = 'asha', first = 1 } }\n";
    let third = MODEL.replace("'a'", "'c'") + search;
    job.add(&write("inbox/more.toml", &format!("{second}{third}"))).unwrap();
    let names: Vec<&str> = job.models.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c-lr=0.1", "c-lr=0.2"]);
    let Data::Text { paths, .. } = &job.models[1].data else { panic!("text") };
    assert_eq!(paths[..], [folder.path().join("inbox/corpus.txt")]);
    assert_eq!((job.searches.len(), job.searches[0].models.clone()), (1, 2..4));
    assert!(job.models[2].file.ends_with("more.toml") && job.models[2].at.starts_with("model.1.search: "));
    for (text, says) in [
        (format!("{}{MODEL}", MODEL.replace("'a'", "'d'")), "model.1.name: model.0 of"),
        (MODEL.replace("'a'", "'c-lr=0.2'"), "has the name \"c-lr=0.2\" too"),
        (MODEL.replace("'a'", "'inbox'"), "model.0.name"),
        (MODEL.replace("'a'", "'.hidden'"), "model.0.name: \".hidden\" begins with a dot"),
        (format!("{seed}{MODEL}"), "run: unknown key"),
        (MODEL.replace("'a'", "'d'") + "stepz = 1\n", "model.0.stepz"),
        (String::new(), "model: there is none"),
        ("[[model".into(), "no valid TOML"),
    ] {
        let error = job.add(&write("inbox/bad.toml", &text)).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("inbox/bad.toml: "), "{error}");
        assert_eq!((job.models.len(), job.searches.len()), (4, 1), "{text}");
    }
}
