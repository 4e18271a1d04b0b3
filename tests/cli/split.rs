//! A model whose weights are split over several files is trained and run as the whole one.

use super::{Job, copy_folder, hydra, i64s, taken_apart, tensor_file, tensors};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const INDEX: &str = "model.safetensors.index.json";

/// Deals the weights of a directory out to three files, in the order of their names, and removes the one they were in.
fn split(dir: &Path) {
    let whole = dir.join("model.safetensors");
    let (header, data) = taken_apart(&fs::read(&whole).expect("weights"));
    let mut parts = vec![(Map::new(), Vec::new()); 3];
    let mut map = Map::new();
    let entries = header.as_object().expect("an object").iter().filter(|(name, _)| *name != "__metadata__");
    for (n, (name, entry)) in entries.enumerate() {
        let offset = |i: usize| entry["data_offsets"][i].as_u64().expect("an offset") as usize;
        let (header, bytes) = &mut parts[n % 3];
        let start = bytes.len();
        bytes.extend_from_slice(&data[offset(0)..offset(1)]);
        let entry = json!({ "dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [start, bytes.len()] });
        header.insert(name.clone(), entry);
        map.insert(name.clone(), format!("model-{:05}-of-00003.safetensors", n % 3 + 1).into());
    }
    for (n, (header, data)) in parts.into_iter().enumerate() {
        let file = tensors(&Value::Object(header).to_string(), &data);
        fs::write(dir.join(format!("model-{:05}-of-00003.safetensors", n + 1)), file).expect("a part");
    }
    let index = json!({ "metadata": { "total_size": data.len() }, "weight_map": map });
    fs::write(dir.join(INDEX), index.to_string()).expect("an index");
    fs::remove_file(whole).expect("gone");
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).expect("a folder").map(|entry| entry.expect("an entry"));
    entries.map(|e| (e.file_name().to_string_lossy().into(), fs::read(e.path()).expect("a file"))).collect()
}

#[test]
fn a_split_model_is_trained_to_the_bytes_of_the_whole_one() {
    for case in ["gpt2", "resnet-basic"] {
        let job = Job::fixture(case);
        copy_folder(&job.at("model"), &job.at("split"));
        split(&job.at("split"));
        job.hydra(&["train", "--set", "model.0.steps=2", "--set", "run.out=a"]).fine();
        job.hydra(&["train", "--set", "model.0.steps=2", "--set", "run.out=b", "--set", "model.0.from=split"]).fine();
        let (whole, parts) = (files(&job.at("a/m/model")), files(&job.at("b/m/model")));
        assert!(parts.contains_key("model.safetensors") && !parts.contains_key(INDEX), "{case}: {:?}", parts.keys());
        assert!(whole == parts, "{case}: other bytes");
    }
}

#[test]
fn a_split_model_has_the_logits_of_the_whole_one_or_is_refused() {
    let job = Job::fixture("gpt2");
    let ids = tensor_file(&[("input_ids", "I64", &[2, 3], i64s(&[1, 2, 3, 50, 60, 70]))]);
    fs::write(job.at("x.safetensors"), ids).expect("input");
    let path = |name: &str| job.at(name).display().to_string();
    let forward = |output: &str| {
        hydra(&["forward", &path("model"), "--input", &path("x.safetensors"), "--output", &path(output)])
    };
    forward("whole.safetensors").fine();
    split(&job.at("model"));
    forward("split.safetensors").fine();
    let logits = |name: &str| fs::read(job.at(name)).expect("logits");
    assert!(logits("whole.safetensors") == logits("split.safetensors"));

    let part = "model-00002-of-00003.safetensors";
    fs::rename(job.at("model").join(part), job.at(part)).expect("moved");
    let missing = format!("model/{part}: no such file");
    forward("none.safetensors").bad(&[&missing]);
    job.hydra(&["train"]).bad(&[&missing]);
    let index = job.json(&format!("model/{INDEX}")).to_string().replace(part, &format!("../{part}"));
    fs::write(job.at("model").join(INDEX), index).expect("an index");
    job.hydra(&["plan"]).bad(&[INDEX, &format!("'../{part}', which is no plain file name")]);
    assert!(!job.at("none.safetensors").exists() && !job.at("runs").exists());
}
