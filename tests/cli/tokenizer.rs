//! Text that a tokenizer's files cut: what is trained, planned, saved and resumed, and what is refused.

use super::{GPT, Job, copy_folder, fixture};
use hydra::train::metrics::{Row, read_rows};
use std::fs;

/// The GPT of the other tests on corpus.txt, with `tokenizer` and the vocabulary of that.
fn model(tokenizer: &str) -> String {
    let data = format!("text = 'corpus.txt', {tokenizer}context = 16");
    GPT.replace("vocab_size = 61, ", "").replace("random = true", &data)
}

/// A job of `text` beside a corpus of 600 times `the cat`, and the fixture's tokenizer: both forms in `bpe`, the two
/// files in `two`.
fn job(text: &str) -> Job {
    let job = Job::new(text);
    fs::write(job.at("corpus.txt"), " the cat".repeat(600)).expect("corpus");
    copy_folder(&fixture("bpe"), &job.at("bpe"));
    copy_folder(&fixture("bpe"), &job.at("two"));
    fs::remove_file(job.at("two/tokenizer.json")).expect("removed");
    job
}

/// The bits of a model's losses.
fn losses(job: &Job, model: &str) -> Vec<u32> {
    let rows = read_rows(&job.at(model).join("metrics.jsonl")).expect("rows");
    rows.into_iter().filter_map(|row| if let Row::Step(r) = row { Some(r.loss.to_bits()) } else { None }).collect()
}

#[test]
fn both_forms_train_alike_and_go_with_the_model() {
    let job = job(&model("tokenizer = 'bpe', "));
    job.hydra(&["train", "--set", "run.out=one"]).fine();
    job.hydra(&["train", "--set", "run.out=again"]).fine();
    job.hydra(&["train", "--set", "run.out=two", "--set", "model.0.data.tokenizer=two"]).fine();
    job.hydra(&["train", "--set", "run.out=file", "--set", "model.0.data.tokenizer=bpe/tokenizer.json"]).fine();
    assert_eq!(losses(&job, "one/m").len(), 4);
    for run in ["again", "two", "file"] {
        assert_eq!(losses(&job, "one/m"), losses(&job, &format!("{run}/m")), "{run}");
    }
    for (run, from, names) in [
        ("one", "bpe", &["tokenizer.json", "tokenizer_config.json"][..]),
        ("again", "bpe", &["tokenizer.json", "tokenizer_config.json"]),
        ("two", "two", &["merges.txt", "tokenizer_config.json", "vocab.json"]),
    ] {
        let saved = job.at(run).join("m/model");
        let entries = fs::read_dir(&saved).expect("the model").map(|entry| entry.expect("an entry").file_name());
        let mut found: Vec<String> = entries.map(|name| name.into_string().expect("UTF-8")).collect();
        found.retain(|name| name != "config.json" && name != "model.safetensors");
        found.sort();
        assert_eq!(found, names, "{run}");
        for name in names {
            assert_eq!(fs::read(saved.join(name)).expect(name), fs::read(job.at(from).join(name)).expect(name));
        }
        assert_eq!(job.json(&format!("{run}/m/model/config.json"))["vocab_size"], 260, "the tokenizer's");
    }
    assert_eq!(
        fs::read(job.at("one/m/model/model.safetensors")).expect("weights"),
        fs::read(job.at("two/m/model/model.safetensors")).expect("weights")
    );

    // A model that comes from there brings its tokenizer along.
    let own = |run: &str, tokenizer: &str| {
        let text = model(tokenizer);
        let (sizes, rest) = text.split_once("family = \"gpt2\"\nconfig").expect("a family");
        let rest = rest.split_once('\n').expect("a line").1;
        fs::write(job.at("job.toml"), super::with_rates(&format!("{sizes}from = 'two/m/model'\n{rest}"))).expect("job");
        job.hydra(&["train", "--set", &format!("run.out={run}")]).fine();
        losses(&job, &format!("{run}/m"))
    };
    assert_eq!(own("left-out", ""), own("stated", "tokenizer = 'bpe', "));
    assert!(job.at("left-out/m/model/merges.txt").is_file());
    assert_ne!(own("bytes", "tokenizer = 'bytes', "), losses(&job, "left-out/m"));
    assert!(!job.at("bytes/m/model/merges.txt").exists(), "it is not what the text was cut by");
    fs::remove_file(job.at("two/m/model/merges.txt")).expect("removed");
    job.hydra(&["train"]).fine();
    let none =
        job.hydra(&["train", "--set", "run.out=none", "--set", "model.0.data={ text = 'corpus.txt', context = 16 }"]);
    none.bad(&["job.toml: model.0.data.tokenizer: is missing, and ", "two/m/model holds no tokenizer; write", "bytes"]);
}

#[test]
fn what_lies_beside_a_model_goes_with_it() {
    let job = job(&model("tokenizer = 'bpe', "));
    job.hydra(&["train", "--set", "run.out=first"]).fine();
    let beside = ["chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"];
    beside[..2].iter().for_each(|name| fs::write(job.at("first/m/model").join(name), "{}").expect("written"));
    fs::write(job.at("first/m/model/notes.txt"), "mine").expect("written");
    for (out, data, want) in [
        ("random", "{ random = true, context = 16 }", &beside[..]),
        ("own", "{ text = 'corpus.txt', context = 16 }", &beside),
        // The text was cut by another.
        ("bytes", "{ text = 'corpus.txt', tokenizer = 'bytes', context = 16 }", &beside[1..2]),
    ] {
        let text = format!("[[model]]\nname = 'm'\nfrom = 'first/m/model'\ndata = {data}\nbatch = 2\nsteps = 1\n");
        fs::write(job.at("job.toml"), super::with_rates(&text)).expect("job.toml");
        job.hydra(&["train", "--set", &format!("run.out={out}")]).fine();
        let folder = fs::read_dir(job.at(out).join("m/model")).expect("the model");
        let mut names: Vec<_> = folder.map(|entry| entry.expect("an entry").file_name()).collect();
        names.retain(|name| name != "config.json" && name != "model.safetensors");
        names.sort();
        assert_eq!(names, want, "{out}");
        for name in want {
            let bytes = |folder: &str| fs::read(job.at(folder).join("m/model").join(name)).expect(name);
            assert_eq!(bytes(out), bytes("first"), "{out}: {name}");
        }
    }
}

#[test]
fn epochs_are_of_tokens_and_models_have_vocabularies_of_their_own() {
    // 5 tokens each time: the, a space, and three letters.
    let text = model("tokenizer = 'bpe', ").replace("steps = 4", "epochs = 2");
    let other = model("tokenizer = 'bytes', ").replace("steps = 4", "epochs = 2").replace("\"m\"", "\"other\"");
    let job = job(&(text + &other));
    let plan = job.hydra(&["plan", "--json"]).fine().json();
    let steps = |m: usize| plan["models"][m]["steps"].as_u64();
    assert_eq!((steps(0), steps(1)), (Some(2 * (2999 / 16 / 4)), Some(2 * (4799 / 16 / 4))));
    job.hydra(&["simulate"]).fine();
    job.hydra(&["train", "--set", "model.0.epochs=1", "--set", "model.1.epochs=1"]).fine();
    assert_eq!(job.json("runs/job/m/model/config.json")["vocab_size"], 260);
    assert_eq!(job.json("runs/job/other/model/config.json")["vocab_size"], 256);
}

#[test]
fn a_run_keeps_its_tokenizer() {
    let job = job(&model("tokenizer = 'bpe', ").replace("bos_token_id", "vocab_size = 300, bos_token_id"));
    job.hydra(&["train"]).fine();
    assert_eq!(job.json("runs/job/m/model/config.json")["vocab_size"], 300, "more than the tokenizer's will do");
    for (tokenizer, says) in [("bytes", "bytes in the job"), ("two", "vocab.json and merges.txt with CRC-32")] {
        let set = format!("model.0.data.tokenizer={tokenizer}");
        job.hydra(&["train", "--resume", "require", "--set", "model.0.steps=6", "--set", &set]).bad(&[
            "m/checkpoint.safetensors",
            "tokenizer is tokenizer.json with CRC-32",
            says,
        ]);
    }
    let more = job.hydra(&["train", "--resume", "require", "--set", "model.0.steps=6"]).fine();
    assert!(more.err.is_empty(), "{more:?}");
    assert_eq!(losses(&job, "runs/job/m").len(), 6);
}

#[test]
fn bad_tokenizers() {
    let job = job(&model("tokenizer = 'bpe', "));
    fs::create_dir(job.at("empty")).expect("a folder");
    fs::write(job.at("damaged.json"), "{ \"model\"").expect("written");
    fs::write(
        job.at("panics.json"),
        r#"{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]}}"#,
    )
    .expect("written");
    fs::write(job.at("latin.txt"), b" the caf\xe9".repeat(300)).expect("written");
    let at = "job.toml: model.0.data.tokenizer: ";
    for (set, says) in [
        ("data.tokenizer=none", &[at, "none: no such file or folder"][..]),
        ("data.tokenizer=empty", &[at, "empty holds no tokenizer; write tokenizer = \"bytes\"", "merges.txt"]),
        ("data.tokenizer=damaged.json", &[at, "damaged.json: damaged JSON"]),
        ("data.tokenizer=panics.json", &[at, "panics.json: is no tokenizer", "contradicts itself"]),
        ("data.tokenizer=corpus.txt", &[at, "corpus.txt: damaged JSON"]),
        ("config.vocab_size=259", &["model.0.data: ", "0..260", "vocab_size is 259"]),
        ("data.text=latin.txt", &["latin.txt: byte 8 is not UTF-8"]),
        ("data.context=4000", &["corpus.txt: the text has 3000 tokens"]),
        ("valid={ text = 'latin.txt' }", &["latin.txt: byte 8 is not UTF-8"]),
    ] {
        for command in ["train", "plan", "simulate"] {
            job.hydra(&[command, "--set", &format!("model.0.{set}")]).bad(says);
        }
        assert!(!job.at("runs").exists(), "{set}");
    }
    // Before the text is cut.
    let small = ["plan", "--set", "model.0.data.text=latin.txt", "--set", "model.0.config.vocab_size=259"];
    job.hydra(&small)
        .bad(&["model.0.data: its tokens are 0..260, the model's vocab_size is 259; it must be at least 260"]);
    let missing = "model.0.data={ text = 'corpus.txt', context = 16 }";
    job.hydra(&["train", "--set", missing]).bad(&[at, "is missing; write tokenizer = \"bytes\", or the path"]);
}
