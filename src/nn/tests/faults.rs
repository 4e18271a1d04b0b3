//! Directories that are damaged or not ours: every message names the file and the key or tensor.

use super::directories::{Raw, raw, save_again, write};
use super::*;
use crate::base::Shape;
use crate::nn::{open, tensors};
use safetensors::tensor::Dtype;
use std::path::Path;
use tempfile::TempDir;

/// A copy of a case's model directory.
fn copy(case: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), case, &raw(case));
    dir
}

/// Checks what opening a case says after `change` was made to its tensors.
#[track_caller]
fn refused_tensors(case: &str, change: impl FnOnce(&mut Raw), parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = raw(case);
    change(&mut tensors);
    write(dir.path(), case, &tensors);
    refused(open(dir.path()), &[parts, &["model.safetensors: tensor "]].concat());
}

#[track_caller]
fn refused_config(config: impl AsRef<[u8]>, parts: &[&str]) {
    let dir = copy("gpt2");
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    refused(open(dir.path()), &[parts, &["config.json: "]].concat());
}

#[test]
fn tensors_that_are_not_the_networks() {
    let (table, bias) = ("transformer.wte.weight", "transformer.h.1.attn.c_attn.bias");
    let remove = |name: &'static str| move |t: &mut Raw| drop(t.remove(name));
    refused_tensors("gpt2", remove(table), &[table, "is missing; want 97x32"]);
    refused_tensors("gpt2", |t| t.retain(|name, _| !name.contains("h.2")), &["h.2.ln_1.weight", "11 more", "want 32"]);
    refused_tensors("gpt2", |t| t.get_mut(table).unwrap().1 = vec![32, 97], &[table, "is 32x97, want 97x32"]);
    refused_tensors("gpt2", |t| t.get_mut(bias).unwrap().1 = vec![1, 96], &[bias, "is 1x96, want 96"]);
    refused_tensors("gpt2", |t| t.get_mut(bias).unwrap().0 = Dtype::I32, &[bias, "is I32, want F32"]);
    let more = |name: &'static str| move |t: &mut Raw| drop(t.insert(name.into(), (Dtype::F32, vec![1], vec![0; 4])));
    refused_tensors("gpt2", more("transformer.h.3.ln_1.weight"), &["transformer.h.3.ln_1.weight", "no such tensor"]);
    refused_tensors("gpt2", more("wte.weight"), &["wte.weight", "no such tensor"]);
    refused_tensors("gpt2", more("h.0.attn.bias2"), &["h.0.attn.bias2"]);
    refused_tensors("gpt2", more("h.x.attn.bias"), &["h.x.attn.bias"]);
    refused_tensors("gpt2", more("a\n\u{1b}[31m"), &["a\\n"]);
    refused_tensors("resnet", more("resnet.pooler.weight"), &["resnet.pooler.weight"]);
    let two = |t: &mut Raw| {
        more("b")(t);
        more("a")(t);
    };
    refused_tensors("gpt2", two, &["tensor a:", "1 more, such as b"]);
    let head = |change: fn(&mut (Dtype, Vec<usize>, Vec<u8>))| {
        move |t: &mut Raw| {
            let mut head = t[table].clone();
            change(&mut head);
            t.insert("lm_head.weight".into(), head);
        }
    };
    refused_tensors("gpt2", head(|h| *h.2.last_mut().unwrap() ^= 1), &["lm_head.weight", "other values", table]);
    refused_tensors("gpt2", head(|h| h.1 = vec![32, 97]), &["lm_head.weight", "other axes"]);
    refused_tensors("gpt2", head(|h| h.0 = Dtype::I32), &["lm_head.weight", "other elements"]);
    let counter = "resnet.embedder.embedder.normalization.num_batches_tracked";
    refused_tensors("resnet", |t| t.get_mut(counter).unwrap().0 = Dtype::F64, &[counter, "F64, want a scalar I64"]);
    refused_tensors("resnet", |t| t.get_mut(counter).unwrap().2 = vec![255; 8], &[counter, "is -1, want a count"]);
    refused_tensors("resnet", more("resnet.x.num_batches_tracked"), &["resnet.x.num_batches_tracked"]);
}

/// Its root would be no number.
#[test]
fn a_running_variance_below_0_is_refused_where_it_is_read() {
    let name = "resnet.embedder.embedder.normalization.running_var";
    let read = |first: f32| {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors = raw("resnet");
        let (_, axes, bytes) = tensors.get_mut(name).unwrap();
        bytes[..4].copy_from_slice(&first.to_le_bytes());
        let shape = Shape::new(axes.clone());
        write(dir.path(), "resnet", &tensors);
        open(dir.path()).unwrap().tensor(name, &shape).map(drop)
    };
    read(0.0).unwrap();
    refused(
        read(-1e-3),
        &["model.safetensors: tensor ", name, "element 0 (F32) is -0.001", "a variance of at least 0"],
    );
    refused(read(f32::INFINITY), &[name, "element 0 (F32) is inf in f32"]);
}

/// Older files have no counts of batches; they are 0 then.
#[test]
fn counts_may_be_missing() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = raw("resnet");
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    write(dir.path(), "resnet", &tensors);
    let pretrained = open(dir.path()).unwrap();
    assert!(pretrained.form.counters.values().all(|&count| count == 0));
    let saved = tempfile::tempdir().unwrap();
    save_again(&pretrained, saved.path()).unwrap();
    assert!(open(saved.path()).unwrap().form.counters.values().all(|&count| count == 0));
}

#[test]
fn numbers_that_are_not_finite_name_their_tensor() {
    let name = "transformer.h.0.ln_1.weight";
    let values: [(Dtype, Vec<u8>, &str); 4] = [
        (Dtype::F32, f32::NAN.to_le_bytes().into(), "NaN"),
        (Dtype::F32, f32::NEG_INFINITY.to_le_bytes().into(), "-inf"),
        (Dtype::F16, vec![0, 0x7c], "inf"),
        (Dtype::F64, 1e300f64.to_le_bytes().into(), "inf"),
    ];
    for (dtype, value, shown) in values {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors = raw("gpt2");
        let mut bytes = vec![0; 31 * value.len()];
        bytes.extend(value);
        tensors.insert(name.into(), (dtype, vec![32], bytes));
        write(dir.path(), "gpt2", &tensors);
        let pretrained = open(dir.path()).unwrap();
        let what = [name, "model.safetensors", "element 31", shown];
        refused(pretrained.tensor(name, &Shape::from([32])), &what);
    }
    let dir = copy("gpt2");
    let pretrained = open(dir.path()).unwrap();
    refused(pretrained.tensor(name, &Shape::from([31])), &["model.safetensors", name, "is 32, want 31"]);
    refused(
        pretrained.tensor("lm_head.weight", &Shape::from([31])),
        &["model.safetensors", "lm_head.weight", "missing"],
    );
}

#[test]
fn configs_that_are_none() {
    let good = std::fs::read_to_string(fixture("gpt2").join("model/config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from));
        good.replace(from, to)
    };
    refused_config("", &["is no JSON"]);
    refused_config("{", &["is no JSON", "line 1"]);
    refused_config([0xff, 0xfe], &["is not UTF-8"]);
    refused_config("[]", &["want a JSON object, got []"]);
    refused_config("[".repeat(100_000), &["is no JSON", "recursion"]);
    refused_config("{}", &["model_type: is missing"]);
    refused_config(r#"{"model_type": 1}"#, &["model_type: want a string, got 1"]);
    refused_config(r#"{"model_type": "gpt3"}"#, &["model_type", "'gpt3'", "did you mean gpt2?"]);
    refused_config(r#"{"model_type": "gpt2"}"#, &["architectures: is missing", "GPT2LMHeadModel"]);
    refused_config(with("GPT2LMHeadModel", "GPT2Model"), &["architectures", "GPT2Model", "only [\"GPT2LMHeadModel\"]"]);
    refused_config(with("\"n_head\": 4", "\"n_head\": 5"), &["n_embd", "32 is no multiple of n_head, 5"]);
    refused_config(with("\"n_head\": 4", "\"n_head\": 1e999"), &["is no JSON", "out of range"]);
    refused_config(with("gelu_new", "mish"), &["activation_function", "\"mish\""]);
    let dir = copy("gpt2");
    let config = std::fs::File::create(dir.path().join("config.json")).unwrap();
    config.set_len(20 << 20).unwrap();
    refused(open(dir.path()), &["config.json: 20971520 bytes"]);
}

#[test]
fn directories_that_are_none() {
    refused(open(Path::new("/nowhere/at all")), &["/nowhere/at all/config.json: no such file"]);
    refused(open(&fixture("gpt2").join("case.json")), &["no such file"]);
    let dir = copy("gpt2");
    let weights = dir.path().join("model.safetensors");
    std::fs::remove_file(&weights).unwrap();
    refused(open(dir.path()), &["model.safetensors: no such file"]);
    std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    refused(open(dir.path()), &["model.safetensors: no such file; only pytorch_model.bin is there"]);
    std::fs::rename(dir.path().join("pytorch_model.bin"), dir.path().join("pytorch_model.bin.index.json")).unwrap();
    refused(open(dir.path()), &["model.safetensors: no such file; only pytorch_model.bin.index.json is there"]);
    std::fs::create_dir(&weights).unwrap();
    refused(open(dir.path()), &["model.safetensors: is no regular file"]);
}

/// Whatever is cut from or flipped in the weights' header, opening and reading them ends in an error or in finite
/// numbers.
#[test]
fn damaged_weights_do_no_harm() {
    let good = std::fs::read(fixture("resnet/model/model.safetensors")).unwrap();
    let dir = copy("resnet");
    let path = dir.path().join("model.safetensors");
    let check = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        match open(dir.path()) {
            Err(Error::BadInput(message)) => assert!(message.contains("model.safetensors: "), "{message}"),
            Err(other) => panic!("{other:?}"),
            Ok(pretrained) => {
                for (name, shape) in tensors(pretrained.network.as_ref()).unwrap() {
                    match pretrained.tensor(&name, &shape) {
                        Ok(values) => assert!(values.iter().all(|x| x.is_finite())),
                        Err(e) => assert!(e.to_string().contains(&name), "{e}"),
                    }
                }
            }
        }
    };
    for len in (0..good.len()).step_by(1023) {
        check(&good[..len]);
    }
    for at in (0..15_000).step_by(97) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        check(&bytes);
    }
}
