//! Networks against PyTorch's reference cases under tests/fixtures, and against hostile configs and files.

mod configs;
mod directories;
mod faults;
mod oracle;
mod reference;
mod split;
mod traces;

use crate::base::tensorfile::{Element, TensorFile};
use crate::base::{DType, Error, Result};
use crate::nn::families::build;
use crate::nn::{InputShape, Network};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The reference cases that are here.
const CASES: [&str; 10] =
    ["gpt2", "llama", "mistral", "qwen2", "qwen3", "yarn", "resnet", "resnet-basic", "bert", "vit"];

fn fixture(case: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).join(case)
}

/// A tensor of a reference file, whatever its type.
#[derive(Clone, Debug)]
struct Tensor {
    element: Element,
    axes: Vec<usize>,
    values: Vec<f64>,
}

/// All tensors of a reference file.
fn tensors_of(case: &str, file: &str) -> BTreeMap<String, Tensor> {
    let path = fixture(case).join(file);
    let bytes = std::fs::read(&path).unwrap();
    let read = TensorFile::parse(&bytes, &path.display().to_string()).unwrap();
    read.tensors()
        .map(|tensor| {
            let values = match tensor.entry.element {
                Element::F32 => tensor.bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
                Element::F64 => tensor.bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
                Element::I64 => tensor.bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect(),
                other => panic!("{other}"),
            };
            let (element, axes) = (tensor.entry.element, tensor.entry.shape.axes().to_vec());
            (tensor.entry.name.clone(), Tensor { element, axes, values })
        })
        .collect()
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn strict(family: &str, config: Value) -> Result<Box<dyn Network>> {
    build(family, &object(config), true)
}

/// Inputs of a language model with labels.
fn text(context: usize) -> Vec<InputShape> {
    ["input_ids", "labels"].map(|name| InputShape::new(name, [context], DType::I32)).into()
}

/// Inputs of an image classifier with labels.
fn images(axes: [usize; 3]) -> Vec<InputShape> {
    vec![InputShape::new("pixel_values", axes, DType::F32), InputShape::new("labels", [], DType::I32)]
}

/// The message of what must be bad input, in one line that holds every one of `parts`.
#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) -> String {
    match result {
        Err(Error::BadInput(message)) => {
            assert!(!message.contains('\n') && message.len() < 1000, "{message}");
            for part in parts {
                assert!(message.contains(part), "'{part}' is not in: {message}");
            }
            message
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("was taken, want an error with {parts:?}"),
    }
}
