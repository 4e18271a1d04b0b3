//! Model directories: what was read is written back to the byte, whatever way the file names and types its tensors.

use super::*;
use crate::base::Shape;
use crate::graph::{Activation, Builder, Graph, Init, Mode, WeightLayout};
use crate::nn::layers::Linear;
use crate::nn::{Form, Inputs, Labels, Pretrained, init, open, open_own, save, tensors};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::json;
use std::path::Path;

/// A file's tensors, to be changed and written.
pub type Raw = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub fn raw(case: &str) -> Raw {
    let bytes = std::fs::read(fixture(case).join("model/model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

/// Writes a directory with a case's config.json and these tensors.
pub fn write(dir: &Path, case: &str, tensors: &Raw) {
    std::fs::copy(fixture(case).join("model/config.json"), dir.join("config.json")).unwrap();
    write_tensors(&dir.join("model.safetensors"), tensors);
}

pub fn write_tensors(path: &Path, tensors: &Raw) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

pub fn save_again(pretrained: &Pretrained, dir: &Path) -> Result<()> {
    let shapes: BTreeMap<String, Shape> = tensors(pretrained.network.as_ref())?.into_iter().collect();
    save(dir, &pretrained.form, &mut |name| pretrained.tensor(name, &shapes[name]))
}

fn read(dir: &Path, name: &str) -> Vec<u8> {
    std::fs::read(dir.join(name)).unwrap()
}

/// Checks that `dir` reads the same after a round trip, and gives the bytes of its second writing.
fn round_trip(dir: &Path) -> Vec<u8> {
    let other = tempfile::tempdir().unwrap();
    save_again(&open(dir).unwrap(), other.path()).unwrap();
    let third = tempfile::tempdir().unwrap();
    save_again(&open(other.path()).unwrap(), third.path()).unwrap();
    let bytes = read(other.path(), "model.safetensors");
    assert_eq!(bytes, read(third.path(), "model.safetensors"));
    assert_eq!(read(dir, "config.json"), read(third.path(), "config.json"));
    bytes
}

#[test]
fn what_transformers_wrote_is_written_back_to_the_byte() {
    for case in CASES {
        let model = fixture(case).join("model");
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("a/b");
        save_again(&open(&model).unwrap(), &inside).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&inside).unwrap().map(|e| e.unwrap().file_name()).collect();
        let mut want: Vec<_> = std::fs::read_dir(&model).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        want.sort();
        assert_eq!(names, want, "{case}");
        for name in names {
            assert!(read(&inside, name.to_str().unwrap()) == read(&model, name.to_str().unwrap()), "{case}: {name:?}");
        }
    }
}

/// As the first GPT-2 files are: no prefix, causal masks beside the weights, a copy of the tied head.
#[test]
fn old_names_buffers_and_tied_heads_are_taken() {
    let plain = raw("gpt2");
    let mut old: Raw = plain
        .iter()
        .map(|(name, tensor)| (name.strip_prefix("transformer.").unwrap().into(), tensor.clone()))
        .collect();
    let names: Vec<String> = old.keys().cloned().collect();
    old.insert("lm_head.weight".into(), old["wte.weight"].clone());
    for layer in 0..3 {
        old.insert(format!("h.{layer}.attn.bias"), (Dtype::U8, vec![1, 1, 24, 24], vec![1; 576]));
        old.insert(format!("h.{layer}.attn.masked_bias"), (Dtype::F32, vec![], (-1e4f32).to_le_bytes().to_vec()));
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "gpt2", &old);
    let bytes = round_trip(dir.path());
    let saved = TensorFile::parse(&bytes, "saved").unwrap();
    let saved_names: Vec<&str> = saved.tensors().map(|t| t.entry.name.as_str()).collect();
    assert_eq!(saved_names, names);
    for name in &names {
        assert_eq!(saved.get(name).unwrap().bytes, old[name].2, "{name}");
    }
}

/// As transformers 4 wrote BERT: positions' numbers beside the weights, copies of the tied decoder.
#[test]
fn berts_tied_decoder_is_taken_where_it_is_the_same() {
    let mut old = raw("bert");
    let names: Vec<String> = old.keys().cloned().collect();
    old.insert("cls.predictions.decoder.weight".into(), old["bert.embeddings.word_embeddings.weight"].clone());
    old.insert("cls.predictions.decoder.bias".into(), old["cls.predictions.bias"].clone());
    old.insert("bert.embeddings.position_ids".into(), (Dtype::I64, vec![1, 1], vec![0; 8]));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "bert", &old);
    let bytes = round_trip(dir.path());
    let saved = TensorFile::parse(&bytes, "saved").unwrap();
    let saved_names: Vec<&str> = saved.tensors().map(|t| t.entry.name.as_str()).collect();
    assert_eq!(saved_names, names);
    old.get_mut("cls.predictions.decoder.bias").unwrap().2[0] ^= 1;
    write(dir.path(), "bert", &old);
    refused(open(dir.path()), &["cls.predictions.decoder.bias", "other values than cls.predictions.bias"]);
}

/// As google-bert/bert-base-uncased is: TensorFlow's names of norms, the head of the second task, which BertForMaskedLM
/// has not.
#[test]
fn berts_first_files_are_taken() {
    let plain = raw("bert");
    let old_of =
        |name: &str| name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
    let mut old: Raw = plain.iter().map(|(name, tensor)| (old_of(name), tensor.clone())).collect();
    let names: Vec<String> = old.keys().cloned().collect();
    assert_eq!(names.iter().filter(|name| name.ends_with("gamma")).count(), 2 * 2 + 2);
    let others = ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "cls.seq_relationship.bias"];
    for name in others {
        old.insert(name.into(), (Dtype::F32, vec![2], vec![0; 8]));
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "bert", &old);
    let pretrained = open(dir.path()).unwrap();
    assert_eq!(pretrained.unused, others);
    for (name, shape) in tensors(pretrained.network.as_ref()).unwrap() {
        let got: Vec<u8> = pretrained.tensor(&name, &shape).unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(got, plain[&name].2, "{name}");
    }
    let bytes = round_trip(dir.path());
    let saved = TensorFile::parse(&bytes, "saved").unwrap();
    let saved_names: Vec<&str> = saved.tensors().map(|t| t.entry.name.as_str()).collect();
    assert_eq!(saved_names, names);
    assert!(open(&fixture("bert").join("model")).unwrap().unused.is_empty());
}

#[test]
fn other_types_are_converted_and_kept() {
    let plain = raw("gpt2");
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F64] {
        let mut other = plain.clone();
        let mut narrowed = BTreeMap::new();
        for (name, (of, _, bytes)) in &mut other {
            let values = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
            let (new, back): (Vec<Vec<u8>>, Vec<f32>) = values
                .map(|x| match dtype {
                    Dtype::F16 => (f16::from_f32(x).to_le_bytes().to_vec(), f16::from_f32(x).to_f32()),
                    Dtype::BF16 => (bf16::from_f32(x).to_le_bytes().to_vec(), bf16::from_f32(x).to_f32()),
                    _ => (f64::from(x).to_le_bytes().to_vec(), x),
                })
                .unzip();
            (*of, *bytes) = (dtype, new.concat());
            narrowed.insert(name.clone(), back);
        }
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "gpt2", &other);
        let pretrained = open(dir.path()).unwrap();
        for (name, shape) in tensors(pretrained.network.as_ref()).unwrap() {
            assert_eq!(pretrained.tensor(&name, &shape).unwrap(), narrowed[&name], "{name}");
        }
        let bytes = round_trip(dir.path());
        for tensor in TensorFile::parse(&bytes, "saved").unwrap().tensors() {
            assert_eq!(tensor.bytes, other[&tensor.entry.name].2, "{}", tensor.entry.name);
        }
    }
}

/// A model without a directory is saved in f32 under its own names, with counts from 0, and is the same when opened.
#[test]
fn new_models_are_saved_and_opened() {
    let small = [
        ("gpt2", json!({ "vocab_size": 31, "n_positions": 7, "n_embd": 6, "n_layer": 1, "n_head": 3 })),
        (
            "bert",
            json!({ "vocab_size": 31, "max_position_embeddings": 7, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 5 }),
        ),
        (
            "vit",
            json!({ "image_size": 7, "patch_size": 3, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 5, "num_labels": 3 }),
        ),
        ("resnet", json!({ "embedding_size": 5, "hidden_sizes": [7, 9], "depths": [1, 2], "num_labels": 3 })),
    ];
    for (family, config) in small {
        let network = strict(family, config).unwrap();
        let graph = network.trace(Mode::Evaluation, DType::F32, 1, &network.inputs()).unwrap();
        let mut values = BTreeMap::new();
        for (i, p) in graph.parameters.iter().enumerate() {
            values.insert(p.name.clone(), init::initial(p, i, 7));
        }
        for state in &graph.states {
            values.insert(state.name.clone(), init::initial_state(state));
        }
        let mut form = Form::of(&*network).unwrap();
        form.counters.values_mut().take(1).for_each(|count| *count = 12);
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &form, &mut |name| Ok(values[name].clone())).unwrap();
        let pretrained = open(dir.path()).unwrap();
        assert_eq!(pretrained.form, form);
        assert_eq!(pretrained.form.counters.values().sum::<i64>(), if family == "resnet" { 12 } else { 0 });
        for (name, shape) in tensors(pretrained.network.as_ref()).unwrap() {
            assert_eq!(pretrained.tensor(&name, &shape).unwrap(), values[&name], "{name}");
        }
        round_trip(dir.path());
        assert!(!dir.path().join("generation_config.json").exists());
    }
}

/// A save that fails leaves what was there, and nothing else.
#[test]
fn failed_saves_leave_the_old_files() {
    let dir = tempfile::tempdir().unwrap();
    let pretrained = open(&fixture("gpt2").join("model")).unwrap();
    save_again(&pretrained, dir.path()).unwrap();
    let listing = || -> BTreeMap<_, _> {
        let entries = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
        entries.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    };
    let before = listing();
    let mut form = pretrained.form.clone();
    form.config.push(' ');
    let shapes: BTreeMap<String, Shape> = tensors(pretrained.network.as_ref()).unwrap().into_iter().collect();
    let last = "transformer.wte.weight";
    let attempt = |bad: &dyn Fn(Vec<f32>) -> Result<Vec<f32>>| {
        save(dir.path(), &form, &mut |name| {
            let values = pretrained.tensor(name, &shapes[name])?;
            if name == last { bad(values) } else { Ok(values) }
        })
    };
    refused(attempt(&|_| Err(Error::bad("gone"))), &["gone"]);
    refused(attempt(&|values| Ok(values[1..].to_vec())), &["model.safetensors", last, "3103 elements, want 97x32"]);
    refused(attempt(&|values| Ok(vec![f32::NAN; values.len()])), &["model.safetensors", last, "element 0 is NaN"]);
    assert_eq!(before, listing());
    // A directory that cannot be made.
    let file = dir.path().join("config.json");
    assert!(matches!(save_again(&pretrained, &file), Err(Error::Io { .. })));
}

/// A disk that is full when the weights are written: the old files stay, and the half file goes.
#[test]
#[cfg(target_os = "linux")]
fn full_disks_leave_the_old_files() {
    let model = fixture("gpt2").join("model");
    let pretrained = open(&model).unwrap();
    let dir = tempfile::tempdir().unwrap();
    save_again(&pretrained, dir.path()).unwrap();
    // What is written under the temporary name goes to a device without room.
    std::os::unix::fs::symlink("/dev/full", dir.path().join(".model.safetensors.part")).unwrap();
    match save_again(&pretrained, dir.path()) {
        Err(Error::Io { what, source }) => {
            assert!(what.contains("cannot write"), "{what}");
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        }
        other => panic!("{other:?}"),
    }
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        assert_eq!(read(dir.path(), name), read(&model, name), "{name}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
}

/// What someone who embeds the crate writes: a network of their own.
struct Perceptron;

impl Network for Perceptron {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &["features", "labels"])?;
        let mut b = Builder::new(mode, float);
        let x = inputs.declare(&mut b, "features", &[33], false)?.ok_or_else(|| Error::bad("features are missing"))?;
        let linear = |outputs, activation| Linear {
            outputs,
            layout: WeightLayout::OutIn,
            weight: Init::Normal(0.1),
            bias: Some(Init::Constant(0.0)),
            activation,
        };
        let hidden = b.layer("hidden", |b, _| linear(31, Activation::Relu).trace(b, x, "hidden"))?;
        let logits = b.layer("out", |b, _| linear(3, Activation::None).trace(b, hidden, "out"))?;
        if let Some(labels) = inputs.declare(&mut b, "labels", &[], true)? {
            b.cross_entropy(logits, labels)?;
        }
        b.finish()
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new("features", [33], DType::F32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: false, classes: 3, vocab: None }
    }

    fn config(&self) -> Value {
        json!({ "model_type": "perceptron" })
    }
}

#[test]
fn networks_of_ones_own_are_saved_too() {
    let dir = tempfile::tempdir().unwrap();
    let files = vec![("merges.txt".to_string(), b"\r\n\xff".to_vec()), ("vocab.json".to_string(), vec![])];
    let form = Form { files: files.clone(), ..Form::of(&Perceptron).unwrap() };
    let shapes: BTreeMap<String, Shape> = tensors(&Perceptron).unwrap().into_iter().collect();
    save(dir.path(), &form, &mut |name| Ok(vec![0.5; shapes[name].elems()])).unwrap();
    let bytes = read(dir.path(), "model.safetensors");
    let file = TensorFile::parse(&bytes, "saved").unwrap();
    let found: Vec<_> = file.tensors().map(|t| (t.entry.name.as_str(), t.entry.shape.to_string())).collect();
    let want = [("hidden.bias", "31"), ("hidden.weight", "31x33"), ("out.bias", "3"), ("out.weight", "3x31")];
    assert_eq!(found, want.map(|(name, shape)| (name, shape.to_string())));
    assert_eq!(read(dir.path(), "config.json"), b"{\n  \"model_type\": \"perceptron\"\n}\n");
    files.iter().for_each(|(name, bytes)| assert_eq!(read(dir.path(), name), *bytes, "{name}"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4, "nothing else is left there");
    // One that cannot be written leaves what was there.
    let bad = Form { files: vec![("vocab.json".into(), vec![1]), ("no/such".into(), vec![1])], ..form.clone() };
    assert!(save(dir.path(), &bad, &mut |name| Ok(vec![0.5; shapes[name].elems()])).is_err());
    files.iter().for_each(|(name, bytes)| assert_eq!(read(dir.path(), name), *bytes, "{name}"));
    refused(open(dir.path()), &["config.json", "model_type", "'perceptron'"]);
}

/// A directory, or one of its files alone, whatever type its tensors have and whatever else lies there.
#[test]
fn networks_of_ones_own_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let number = |name: &str, i: usize| (i as f32 + 0.5) / 64.0 - name.len() as f32;
    let shapes: BTreeMap<String, Shape> = tensors(&Perceptron).unwrap().into_iter().collect();
    let values = |name: &str| (0..shapes[name].elems()).map(|i| number(name, i)).collect::<Vec<f32>>();
    for element in [Element::F32, Element::BF16, Element::F16, Element::F64] {
        let mut form = Form::of(&Perceptron).unwrap();
        form.tensors.iter_mut().for_each(|tensor| tensor.element = element);
        save(dir.path(), &form, &mut |name| Ok(values(name))).unwrap();
        let file = dir.path().join("weights of mine");
        std::fs::copy(dir.path().join("model.safetensors"), &file).unwrap();
        std::fs::remove_file(dir.path().join("config.json")).unwrap();
        for path in [dir.path(), &file] {
            let read = open_own(path, Box::new(Perceptron)).unwrap();
            assert_eq!((&read.form, read.dir()), (&form, dir.path()), "{element}");
            for (name, shape) in &shapes {
                let kept = |x: f32| match element {
                    Element::BF16 => bf16::from_f32(x).to_f32(),
                    Element::F16 => f16::from_f32(x).to_f32(),
                    _ => x,
                };
                let want: Vec<f32> = values(name).into_iter().map(kept).collect();
                assert_eq!(read.tensor(name, shape).unwrap(), want, "{element}: {name}");
            }
        }
    }
}

#[test]
fn files_that_are_not_those_of_ones_own_network_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own.safetensors");
    let numbers = |axes: &[usize]| (Dtype::F32, axes.to_vec(), vec![0; 4 * axes.iter().product::<usize>()]);
    let good: Raw =
        tensors(&Perceptron).unwrap().into_iter().map(|(name, shape)| (name, numbers(shape.axes()))).collect();
    let own = |change: &dyn Fn(&mut Raw)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        write_tensors(&path, &tensors);
        open_own(&path, Box::new(Perceptron))
    };
    let (bias, weight) = ("hidden.bias", "out.weight");
    let nan = own(&|t| t.get_mut(bias).unwrap().2[8..12].copy_from_slice(&f32::NAN.to_le_bytes())).unwrap();
    refused(nan.tensor(bias, &Shape::from([31])), &["own.safetensors: tensor hidden.bias: element 2 (F32) is NaN"]);
    refused(nan.tensor("no.such", &Shape::from([31])), &["own.safetensors: tensor no.such: is missing; want 31"]);
    for (change, says) in [
        (&(|t: &mut Raw| drop(t.remove(bias))) as &dyn Fn(&mut Raw), "tensor hidden.bias: is missing; want 31"),
        (&|t| t.retain(|name, _| name == bias), "tensor hidden.weight: is missing, as are 2 more; want 31x33"),
        (&|t| drop(t.insert(weight.into(), numbers(&[31, 3]))), "tensor out.weight: is 31x3, want 3x31"),
        (&|t| t.get_mut(bias).unwrap().0 = Dtype::I32, "tensor hidden.bias: is I32, want F32, F16, BF16 or F64"),
        (&|t| drop(t.insert("head".into(), numbers(&[2]))), "tensor head: the network has no such tensor (2)"),
        // What a family's files leave out, or hold besides, is nothing that others' may.
        (&|t| drop(t.insert("transformer.head".into(), numbers(&[2]))), "tensor transformer.head: the network has no"),
    ] {
        refused(own(change), &["own.safetensors: ", says]);
    }
    std::fs::write(&path, b"text, not tensors").unwrap();
    refused(open_own(&path, Box::new(Perceptron)), &["own.safetensors: ", "is it a safetensors file?"]);
    std::fs::remove_file(&path).unwrap();
    refused(open_own(&path, Box::new(Perceptron)), &["own.safetensors: no such file"]);
    refused(open_own(dir.path(), Box::new(Perceptron)), &["model.safetensors: no such file"]);
}
