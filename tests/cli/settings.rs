//! What a job says of how its models are trained, and over which links, is what its runs do.

use super::{GPT, Job, batch_of, fixture, taken_apart};
use hydra::train::metrics::{Row, StepRow, read_rows};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The bytes of a safetensors file's tensors, by name.
fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let (header, data) = taken_apart(&fs::read(path).expect("weights"));
    let entries = header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__");
    let bytes = |entry: &serde_json::Value| {
        let at = |i: usize| entry["data_offsets"][i].as_u64().expect("an offset") as usize;
        data[at(0)..at(1)].to_vec()
    };
    entries.map(|(name, entry)| (name.clone(), bytes(entry))).collect()
}

/// Trains into `run`, and gives the rows of its model's steps.
fn train(job: &Job, run: &str, sets: &[&str]) -> Vec<StepRow> {
    let out = format!("run.out={run}");
    let sets: Vec<&str> = [&out[..]].iter().chain(sets).flat_map(|set| ["--set", set]).collect();
    job.hydra(&[&["train"], &sets[..]].concat()).fine();
    let rows = read_rows(&job.at(run).join("m/metrics.jsonl")).expect("rows");
    rows.into_iter().filter_map(|row| if let Row::Step(row) = row { Some(row) } else { None }).collect()
}

#[test]
fn what_is_frozen_is_saved_as_it_was_read() {
    let job = Job::fixture("gpt2");
    train(&job, "run", &["model.0.frozen=['transformer.h.0.']"]);
    let before = tensors(&job.at("model/model.safetensors"));
    let after = tensors(&job.at("run/m/model/model.safetensors"));
    assert!(after.keys().eq(before.keys()), "{:?}", after.keys());
    for (name, bytes) in &after {
        assert_eq!(*bytes == before[name], name.starts_with("transformer.h.0."), "{name}");
    }
    let refused = job.hydra(&["train", "--set", "run.out=none", "--set", "model.0.frozen=['transformer.x']"]);
    refused
        .bad(&["job.toml: model.0.frozen: no parameter's name begins with \"transformer.x\"; there is transformer."]);
    assert!(!job.at("none").exists());
}

#[test]
fn adapters_are_saved_by_themselves_and_in_the_weights() {
    let job = Job::fixture("gpt2");
    let lora = "model.0.lora={ rank = 2, alpha = 4, targets = ['c_attn', 'mlp.c_proj'] }";
    let rows = train(&job, "run", &[lora]);
    let before = tensors(&job.at("model/model.safetensors"));
    let after = tensors(&job.at("run/m/model/model.safetensors"));
    assert!(after.keys().eq(before.keys()), "{:?}", after.keys());
    let is_adapted = |name: &str| name.ends_with("attn.c_attn.weight") || name.ends_with("mlp.c_proj.weight");
    for (name, bytes) in &after {
        assert_eq!(*bytes != before[name], is_adapted(name), "{name}");
    }
    let adapters = tensors(&job.at("run/m/adapters/adapter_model.safetensors"));
    assert_eq!(adapters.len(), 2 * after.keys().filter(|name| is_adapted(name)).count());
    let config = std::fs::read_to_string(job.at("run/m/adapters/adapter_config.json")).expect("a config");
    assert!(config.contains("\"base_model_name_or_path\": \"") && config.contains("\"lora_alpha\": 4.0"), "{config}");
    // The saved model goes on as any other does, from the loss that it came to.
    let more = train(&job, "more", &[lora, &format!("model.0.from='{}'", job.at("run/m/model").display())]);
    assert!(rows[0].loss != more[0].loss);
    let refused = job.hydra(&["train", "--set", "run.out=none", "--set", "model.0.lora={ targets = ['q_proj'] }"]);
    refused.bad(&["job.toml: model.0: low rank: no linear layer's name ends with \"q_proj\"; there are c_attn"]);
    let other = "model.0.lora={ rank = 2, alpha = 5, targets = ['c_attn', 'mlp.c_proj'] }";
    let refused = job.hydra(&["train", "--resume", "auto", "--set", "run.out=run", "--set", other]);
    refused.bad(&["lora is {", "in the checkpoint"]);
}

#[test]
fn learning_rates_are_those_of_the_schedule() {
    let job = Job::new(&GPT.replace("steps = 4", "steps = 6"));
    for (kind, want) in
        [("linear", [5e-4, 1e-3, 1e-3, 7e-4, 4e-4, 1e-4]), ("cosine", [5e-4, 1e-3, 1e-3, 7.75e-4, 3.25e-4, 1e-4])]
    {
        let schedule = format!("model.0.schedule={{ kind = '{kind}', warmup = 2, min_lr = 1e-4 }}");
        let rates: Vec<f64> = train(&job, kind, &[&schedule]).iter().map(|row| row.lr).collect();
        let near = rates.len() == want.len() && rates.iter().zip(want).all(|(rate, want)| (rate - want).abs() < 1e-12);
        assert!(near, "{kind}: {rates:?}");
    }
}

/// On the batches of a file, so that data is the same by any seed.
#[test]
fn the_seed_draws_the_weights_and_clipping_changes_the_updates() {
    let text = GPT.replace("n_positions = 16, vocab_size = 61", "n_positions = 24, vocab_size = 97");
    let batch = batch_of("gpt2").to_string();
    let text = text
        .replace("random = true", "batches = 'batches.safetensors'")
        .replace("batch = 4", &format!("batch = {batch}"));
    let job = Job::new(&text.replace("microbatch = 2\n", ""));
    fs::copy(fixture("gpt2").join("batches.safetensors"), job.at("batches.safetensors")).expect("batches");
    let of = |run: &str, seed: u64, clip: &str| {
        let (seed, optimizer) =
            (format!("run.seed={seed}"), format!("model.0.optimizer={{ kind = 'sgd', lr = 0.1{clip} }}"));
        let rows = train(&job, run, &[&seed, &optimizer]);
        rows.iter().map(|row| row.loss.to_bits()).collect::<Vec<u32>>()
    };
    let (one, other, clipped) = (of("one", 1, ""), of("other", 2, ""), of("clipped", 1, ", clip = 1e-3"));
    assert_ne!(one[0], other[0], "other weights");
    assert_eq!(one[0], clipped[0], "the same weights and the same data");
    assert_ne!(one[1..], clipped[1..], "smaller updates");
}

/// Each lane of the trace that carried bytes at a stated rate took the time that they take.
#[track_caller]
pub(super) fn check_lanes(job: &Job, run: &str, lanes: &[&str], bytes_per_sec: f64) {
    let trace = job.json(&format!("{run}/trace.json"));
    let sums = trace["otherData"]["lanes"].as_array().expect("sums").iter();
    let mut seen = 0;
    for sum in sums.filter(|sum| lanes.contains(&sum["lane"].as_str().expect("a name"))) {
        let (bytes, secs) = (sum["bytes"].as_f64().expect("bytes"), sum["busy_secs"].as_f64().expect("seconds"));
        // A link makes up for a copy that ended late by the next one, so one may take a little less.
        assert!(bytes > 0.0 && secs > 0.5 * bytes / bytes_per_sec, "{sum}");
        seen += 1;
    }
    assert_eq!(seen, lanes.len(), "{trace}");
}

#[test]
fn copies_take_what_their_links_allow() {
    let job = Job::new(&format!("[[device]]\nkind = 'host'\n{}", GPT.replace("steps = 4", "steps = 1")));
    for (run, link) in [("own", "device.0.link=2 MB/s"), ("shared", "host.link=2 MB/s")] {
        train(&job, run, &[link]);
        check_lanes(&job, run, &["device 0 host to device", "device 0 device to host"], 2e6);
    }
}
