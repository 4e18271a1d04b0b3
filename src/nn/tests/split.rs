//! Weights in several files with an index: what a whole directory gives, or an error that names the file and the
//! tensor.

use super::directories::{Raw, raw, save_again, write, write_tensors};
use super::*;
use crate::base::Shape;
use crate::nn::{Pretrained, open, tensors};
use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::json;
use std::path::Path;
use std::sync::LazyLock;
use tempfile::TempDir;

const INDEX: &str = "model.safetensors.index.json";
const FILES: [&str; 3] =
    ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"];
const TABLE: &str = "transformer.wte.weight";

/// Writes a directory with a case's config.json and these tensors dealt out to three files; gives the index.
fn write_split(dir: &Path, case: &str, tensors: &Raw) -> Value {
    std::fs::copy(fixture(case).join("model/config.json"), dir.join("config.json")).unwrap();
    let mut parts = vec![Raw::new(); FILES.len()];
    let mut map = Map::new();
    for (n, (name, tensor)) in tensors.iter().enumerate() {
        parts[n % FILES.len()].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), FILES[n % FILES.len()].into());
    }
    for (part, file) in parts.iter().zip(FILES) {
        write_tensors(&dir.join(file), part);
    }
    let bytes: usize = tensors.values().map(|(_, _, bytes)| bytes.len()).sum();
    let index = json!({ "metadata": { "total_size": bytes }, "weight_map": map });
    write_index(dir, &index);
    index
}

fn write_index(dir: &Path, index: &Value) {
    std::fs::write(dir.join(INDEX), index.to_string()).unwrap();
}

/// The bits of all tensors of an open directory.
fn bits(pretrained: &Pretrained) -> BTreeMap<String, Vec<u32>> {
    let read =
        |name: &str, shape: &Shape| pretrained.tensor(name, shape).unwrap().into_iter().map(f32::to_bits).collect();
    tensors(pretrained.network.as_ref())
        .unwrap()
        .into_iter()
        .map(|(name, shape)| (name.clone(), read(&name, &shape)))
        .collect()
}

/// The files of a directory.
fn listing(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

/// Checks that three files with these tensors are read and saved as one file with them is.
#[track_caller]
fn same_as_whole(case: &str, given: &Raw) {
    let [split_dir, whole_dir, from_split, from_whole] = [(); 4].map(|()| tempfile::tempdir().unwrap());
    write_split(split_dir.path(), case, given);
    write(whole_dir.path(), case, given);
    let (split, whole) = (open(split_dir.path()).unwrap(), open(whole_dir.path()).unwrap());
    assert_eq!(split.form, whole.form, "{case}");
    assert!(bits(&split) == bits(&whole), "{case}: other bits");
    save_again(&split, from_split.path()).unwrap();
    save_again(&whole, from_whole.path()).unwrap();
    let saved = listing(from_split.path());
    assert_eq!(saved.keys().collect::<Vec<_>>(), ["config.json", "model.safetensors"], "{case}");
    assert!(saved == listing(from_whole.path()), "{case}: other bytes");
    let file = TensorFile::parse(&saved["model.safetensors"], "saved").unwrap();
    assert_eq!(file.index().metadata(), &BTreeMap::from([("format".to_string(), "pt".to_string())]));
}

/// GPT-2 as its first files were, with no prefix, causal masks and a copy of the tied head.
fn old_gpt2() -> Raw {
    let strip = |(name, tensor): (String, _)| (name.strip_prefix("transformer.").unwrap().to_string(), tensor);
    let mut old: Raw = raw("gpt2").into_iter().map(strip).collect();
    old.insert("lm_head.weight".into(), old["wte.weight"].clone());
    for layer in 0..3 {
        old.insert(format!("h.{layer}.attn.bias"), (Dtype::U8, vec![1, 1, 24, 24], vec![1; 576]));
    }
    old
}

#[test]
fn split_weights_are_those_of_one_file() {
    for case in CASES {
        same_as_whole(case, &raw(case));
    }
    same_as_whole("gpt2", &old_gpt2());
}

#[test]
fn a_copy_of_the_table_is_compared_across_files() {
    let mut old = old_gpt2();
    let head = "lm_head.weight";
    *old.get_mut(head).unwrap().2.last_mut().unwrap() ^= 1;
    let dir = tempfile::tempdir().unwrap();
    let index = write_split(dir.path(), "gpt2", &old);
    let file = |name: &str| index["weight_map"][name].as_str().unwrap();
    assert_ne!(file(head), file("wte.weight"));
    let says = format!("{}: tensor {head}: has other values than wte.weight", file(head));
    refused(open(dir.path()), &[&says]);
}

/// Converters leave out a tied head and keep its line; what a network does without may also be where no line says.
#[test]
fn an_index_may_be_outdated_about_what_the_network_does_without() {
    for case in ["gpt2", "resnet"] {
        let given = if case == "gpt2" { old_gpt2() } else { raw(case) };
        let spare = |name: &str| {
            name == "lm_head.weight" || name.ends_with(".attn.bias") || name.ends_with("num_batches_tracked")
        };
        let dir = tempfile::tempdir().unwrap();
        let mut index = write_split(dir.path(), case, &given);
        let whole = bits(&open(dir.path()).unwrap());
        let map = index["weight_map"].as_object_mut().unwrap();
        let lines = map.len();
        map.retain(|name, _| !spare(name));
        assert!(map.len() < lines);
        write_index(dir.path(), &index);
        let pretrained = open(dir.path()).unwrap();
        assert!(bits(&pretrained) == whole);

        let kept: Raw = given.into_iter().filter(|(name, _)| !spare(name)).collect();
        let mut index = write_split(dir.path(), case, &kept);
        let more = if case == "gpt2" {
            "lm_head.weight"
        } else {
            "resnet.embedder.embedder.normalization.num_batches_tracked"
        };
        index["weight_map"][more] = FILES[1].into();
        write_index(dir.path(), &index);
        assert!(bits(&open(dir.path()).unwrap()) == whole);
    }
}

/// transformers takes the one file where there is one, and so a model that is saved where its parts lie is the new one.
#[test]
fn one_file_goes_before_parts() {
    let dir = tempfile::tempdir().unwrap();
    write_split(dir.path(), "gpt2", &raw("gpt2"));
    let before = listing(dir.path());
    let mut other = raw("gpt2");
    other.get_mut(TABLE).unwrap().2.fill(0);
    let changed = tempfile::tempdir().unwrap();
    write(changed.path(), "gpt2", &other);
    save_again(&open(changed.path()).unwrap(), dir.path()).unwrap();
    assert!(bits(&open(dir.path()).unwrap())[TABLE].iter().all(|&bits| bits == 0));
    let mut after = listing(dir.path());
    after.remove("model.safetensors").unwrap();
    assert!(after == before);
    std::fs::write(dir.path().join(INDEX), "damaged").unwrap();
    open(dir.path()).unwrap();
}

/// What is open is read to the end, whatever takes the files' names meanwhile.
#[test]
#[cfg(unix)]
fn files_that_are_replaced_are_read_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    write_split(dir.path(), "gpt2", &raw("gpt2"));
    let pretrained = open(dir.path()).unwrap();
    let before = bits(&pretrained);
    for file in FILES {
        std::fs::write(dir.path().join("new"), "no weights").unwrap();
        std::fs::rename(dir.path().join("new"), dir.path().join(file)).unwrap();
    }
    assert!(bits(&pretrained) == before);
    refused(open(dir.path()), &[FILES[0]]);
}

#[test]
fn what_an_index_says_of_itself_is_not_compared() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = write_split(dir.path(), "gpt2", &raw("gpt2"));
    for metadata in [json!({ "total_size": 1 }), json!({ "total_size": 1.5e300, "more": [1] }), json!({}), Value::Null]
    {
        index["metadata"] = metadata;
        index["more"] = json!({ "weight_map": 1 });
        write_index(dir.path(), &index);
        open(dir.path()).unwrap();
    }
    index.as_object_mut().unwrap().remove("metadata");
    write_index(dir.path(), &index);
    open(dir.path()).unwrap();
}

/// Checks what opening says after `change` was made to the tensors before they were split, or to the directory after.
#[track_caller]
fn refused_split(change: impl FnOnce(&mut Raw), damage: impl FnOnce(&Path, &mut Value), parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = raw("gpt2");
    change(&mut tensors);
    let mut index = write_split(dir.path(), "gpt2", &tensors);
    damage(dir.path(), &mut index);
    write_index(dir.path(), &index);
    refused(open(dir.path()), parts);
}

#[test]
fn files_that_are_not_as_the_index_says() {
    let index = write_split(tempfile::tempdir().unwrap().path(), "gpt2", &raw("gpt2"));
    let file = |name: &str| FILES.into_iter().find(|file| index["weight_map"][name] == *file).unwrap();
    let other = |name: &str| FILES.into_iter().find(|&other| other != file(name)).unwrap();
    let refused_index = |damage: &dyn Fn(&Path, &mut Value), parts: &[&str]| refused_split(|_| {}, damage, parts);
    let place = |tensor: &'static str, name: String| {
        move |_: &Path, index: &mut Value| index["weight_map"][tensor] = name.clone().into()
    };
    let unplace = |tensor: &'static str| {
        move |_: &Path, index: &mut Value| drop(index["weight_map"].as_object_mut().unwrap().remove(tensor))
    };

    let says = format!("tensor none: weight_map places it in '{}', but no file has it", FILES[2]);
    refused_index(&place("none", FILES[2].into()), &["model.safetensors.index.json: ", &says]);
    let says = format!("weight_map places it in '{}', but it is in '{}'", other(TABLE), file(TABLE));
    refused_index(&place(TABLE, other(TABLE).into()), &["model.safetensors.index.json: tensor ", TABLE, &says]);
    let says =
        format!("{}: tensor {TABLE}: the weight_map of model.safetensors.index.json does not have it", file(TABLE));
    refused_index(&unplace(TABLE), &[&says]);
    let twice = |dir: &Path, _: &mut Value| {
        let tensors: Raw =
            raw("gpt2").into_iter().filter(|(name, _)| file(name) == FILES[2] || name == TABLE).collect();
        write_tensors(&dir.join(FILES[2]), &tensors);
    };
    assert_ne!(file(TABLE), FILES[2]);
    refused_index(&twice, &[&format!("{}: tensor {TABLE}: is in '{}' too", FILES[2], file(TABLE))]);
    let gone = |dir: &Path, _: &mut Value| std::fs::remove_file(dir.join(FILES[1])).unwrap();
    refused_index(&gone, &[&format!("{}: no such file", FILES[1])]);
    let folder = |dir: &Path, index: &mut Value| {
        gone(dir, index);
        std::fs::create_dir(dir.join(FILES[1])).unwrap();
    };
    refused_index(&folder, &[&format!("{}: is no regular file", FILES[1])]);
    let short = |dir: &Path, _: &mut Value| {
        let bytes = std::fs::read(dir.join(FILES[1])).unwrap();
        std::fs::write(dir.join(FILES[1]), &bytes[..bytes.len() - 1]).unwrap();
    };
    refused_index(&short, &[FILES[1], "truncated"]);
    let empty = |_: &Path, index: &mut Value| index["weight_map"] = json!({});
    refused_index(
        &empty,
        &["model.safetensors.index.json: tensor transformer.wte.weight: is missing, as are", "97x32"],
    );
}

/// What is at fault in a network's tensors is told as for one file, with the name of the part.
#[test]
fn tensors_that_are_not_the_networks_name_their_part() {
    let asis = |_: &Path, _: &mut Value| {};
    refused_split(|t| drop(t.remove(TABLE)), asis, &[&format!("{INDEX}: tensor {TABLE}: is missing; want 97x32")]);
    let narrow = |t: &mut Raw| t.get_mut(TABLE).unwrap().1 = vec![32, 97];
    refused_split(narrow, asis, &["model-0000", "-of-00003.safetensors: tensor ", TABLE, "is 32x97, want 97x32"]);
    let whole = |t: &mut Raw| t.get_mut(TABLE).unwrap().0 = Dtype::I32;
    refused_split(whole, asis, &["-of-00003.safetensors: tensor ", TABLE, "is I32, want F32"]);
    let more = |t: &mut Raw| drop(t.insert("a".into(), (Dtype::F32, vec![1], vec![0; 4])));
    refused_split(more, asis, &[&format!("{}: tensor a: the network has no such tensor", FILES[0])]);

    let dir = tempfile::tempdir().unwrap();
    let mut tensors = raw("gpt2");
    tensors.get_mut(TABLE).unwrap().2[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
    let index = write_split(dir.path(), "gpt2", &tensors);
    let says = format!("{}: tensor {TABLE}: element 1 (F32) is NaN", index["weight_map"][TABLE].as_str().unwrap());
    refused(open(dir.path()).unwrap().tensor(TABLE, &Shape::from([97, 32])), &[&says]);
}

/// No name leads out of the directory, and none to a place within that some systems would take for one outside.
#[test]
fn only_plain_names_are_opened() {
    let long = "x".repeat(256);
    let outside = tempfile::tempdir().unwrap();
    let absolute = outside.path().join("part");
    write_tensors(&absolute, &raw("gpt2"));
    let absolute = absolute.to_str().unwrap();
    for name in
        ["", ".", "..", "../part", absolute, "a/part", "./part", "part/", "a\\part", "C:part", "a\0", "a\n", &long]
    {
        let place = |_: &Path, index: &mut Value| index["weight_map"][TABLE] = name.into();
        let parts = ["model.safetensors.index.json: tensor ", TABLE, "weight_map has '", "which is no plain file name"];
        refused_split(|_| {}, place, &parts);
    }
}

#[test]
fn indexes_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let good = write_split(dir.path(), "gpt2", &raw("gpt2")).to_string();
    let twice = |key: &str| good.replacen(&format!("\"{key}\":"), &format!("\"{key}\":\"x\",\"{key}\":"), 1);
    for (text, says) in [
        (String::new(), "EOF"),
        ("{".into(), "EOF"),
        (good[..good.len() - 1].into(), "EOF"),
        (format!("{good}}}"), "trailing characters"),
        ("[]".into(), "invalid length 0"),
        ("{}".into(), "missing field `weight_map`"),
        (r#"{"weight_map":1}"#.into(), "invalid type: integer `1`"),
        (r#"{"weight_map":{"a":1}}"#.into(), "invalid type: integer `1`"),
        (r#"{"weight_map":{"a":null}}"#.into(), "invalid type: null"),
        (r#"{"weight_map":{},"weight_map":{}}"#.into(), "duplicate field `weight_map`"),
        (twice(TABLE), "key 'transformer.wte.weight' occurs twice"),
        // However deep it is: what is passed over takes no stack.
        (format!("{{\"metadata\":{}", "[".repeat(1 << 20)), "EOF"),
    ] {
        std::fs::write(dir.path().join(INDEX), text).unwrap();
        refused(open(dir.path()), &["model.safetensors.index.json: is no index of weights: ", says]);
    }
    std::fs::File::create(dir.path().join(INDEX)).unwrap().set_len(20 << 20).unwrap();
    refused(open(dir.path()), &["model.safetensors.index.json: 20971520 bytes are more than"]);
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    refused(open(dir.path()), &["model.safetensors.index.json: no such file"]);
}

/// A split model, its index and its bits.
static SPLIT: LazyLock<(TempDir, Value, BTreeMap<String, Vec<u32>>)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let index = write_split(dir.path(), "gpt2", &raw("gpt2"));
    let bits = bits(&open(dir.path()).unwrap());
    (dir, index, bits)
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is done to an index, it is refused in a line, or what is read is what was split.
    #[test]
    fn damaged_indexes_do_no_harm(
        moved in prop::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![prop::sample::select(&FILES[..]).prop_map(str::to_string), ".{0,8}"]),
            0..3,
        ),
        damage in prop::collection::vec(
            (any::<prop::sample::Index>(), 0usize..40, prop::collection::vec(any::<u8>(), 0..4)),
            0..3,
        ),
    ) {
        let (dir, index, whole) = &*SPLIT;
        let mut index = index.clone();
        let map = index["weight_map"].as_object_mut().unwrap();
        for (at, file) in moved {
            let place = map.values_mut().nth(at.index(whole.len())).unwrap();
            *place = file.into();
        }
        let mut bytes = index.to_string().into_bytes();
        for (at, len, with) in damage {
            let at = at.index(bytes.len());
            bytes.splice(at..(at + len).min(bytes.len()), with);
        }
        std::fs::write(dir.path().join(INDEX), bytes).unwrap();
        match open(dir.path()) {
            Ok(pretrained) => prop_assert!(bits(&pretrained) == *whole),
            Err(Error::BadInput(message)) => prop_assert!(!message.contains('\n') && message.len() < 1000, "{}", message),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
