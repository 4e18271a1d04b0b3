//! Writes Hugging Face model directories, so that transformers loads them and equal weights give equal bytes.
//!
//! Every file is written under another name, flushed to the disk and then renamed: a crash or a full disk leaves the
//! old files whole. Tensors are asked for one by one, so that a model larger than memory can be saved. The weights are
//! always one file, whatever its size: transformers maps it into memory, and prefers it to parts in the same directory.

use super::Network;
use super::parts::is_plain;
use super::safely::{Pending, sync_folder};
use crate::base::tensorfile::{Element, header, quoted};
use crate::base::{Error, Result, Shape};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Ends of the names of a running statistic and of its layer's count of training batches.
const RUNNING_MEAN: &str = "running_mean";
const COUNTER: &str = "num_batches_tracked";

/// One floating-point tensor of a model directory.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedTensor {
    /// Its name in the graph.
    pub name: String,
    /// Its name in the file.
    pub file_name: String,
    /// Its shape.
    pub shape: Shape,
    /// Its type in the file: F64, F32, F16 or BF16.
    pub element: Element,
}

/// A model directory's form: everything but the weights' values.
#[derive(Clone, Debug, PartialEq)]
pub struct Form {
    /// The text of config.json.
    pub config: String,
    /// The bytes of generation_config.json, where there is one.
    pub generation_config: Option<Vec<u8>>,
    /// Other files by their plain names, written as they are: a tokenizer's.
    pub files: Vec<(String, Vec<u8>)>,
    /// The parameters and running statistics.
    pub tensors: Vec<SavedTensor>,
    /// The counts of training batches that BatchNorm layers keep besides running statistics, by name.
    pub counters: BTreeMap<String, i64>,
}

impl Form {
    /// The form of a network that came from no directory: f32, with the graph's names, and the shapes for the network's
    /// default inputs. [`open_own`](super::open_own) reads back a directory of this form.
    ///
    /// # Errors
    /// When the network does not trace with its default inputs.
    pub fn of(network: &dyn Network) -> Result<Form> {
        let tensors: Vec<SavedTensor> = super::tensors(network)?
            .into_iter()
            .map(|(name, shape)| SavedTensor { file_name: name.clone(), name, shape, element: Element::F32 })
            .collect();
        let mut config = format!("{:#}", network.config());
        config.push('\n');
        let counters = counters(tensors.iter().map(|tensor| tensor.name.as_str()));
        Ok(Form { config, generation_config: None, files: Vec::new(), counters, tensors })
    }
}

/// The batch counts that belong to the running means among `tensors`, at 0.
fn counters<'a>(tensors: impl Iterator<Item = &'a str>) -> BTreeMap<String, i64> {
    let layers = tensors.filter_map(|name| name.strip_suffix(RUNNING_MEAN));
    layers.map(|layer| (format!("{layer}{COUNTER}"), 0)).collect()
}

/// Writes the directory `dir`, creating it if necessary.
///
/// `read` returns a tensor's elements by its name in the graph; it is called once for each, in the order of the file.
///
/// # Errors
/// What `read` returns; when a tensor's length is not its shape's, a value is not finite in the file's type, another
/// file's name is not a plain file name, or the operating system refuses.
pub fn save(dir: &Path, form: &Form, read: &mut dyn FnMut(&str) -> Result<Vec<f32>>) -> Result<()> {
    if let Some((name, _)) = form.files.iter().find(|(name, _)| !is_plain(name)) {
        return Err(Error::bad(format!("{}: {} is no plain file name", dir.display(), quoted(name))));
    }
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    // The weights come last: a config alone is no model, but weights with an old config would be a wrong one.
    let mut pending = vec![write(dir, "config.json", |out| out.bytes(form.config.as_bytes()))?];
    if let Some(bytes) = &form.generation_config {
        pending.push(write(dir, "generation_config.json", |out| out.bytes(bytes))?);
    }
    for (name, bytes) in &form.files {
        pending.push(write(dir, name, |out| out.bytes(bytes))?);
    }
    pending.push(write(dir, "model.safetensors", |out| weights(out, &form.counters, &form.tensors, read))?);
    pending.into_iter().try_for_each(Pending::commit)?;
    sync_folder(dir)
}

/// Writes adapters to the directory `dir` as Hugging Face's peft reads them: the text of adapter_config.json, and the
/// tensors, given by their names in the graph and their shapes, in f32.
///
/// # Errors
/// As [`save`].
pub fn save_adapters(
    dir: &Path,
    config: &str,
    tensors: &[(String, Shape)],
    read: &mut dyn FnMut(&str) -> Result<Vec<f32>>,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    // peft wraps the model twice.
    let tensor = |(name, shape): &(String, Shape)| SavedTensor {
        name: name.clone(),
        file_name: format!("base_model.model.{name}"),
        shape: shape.clone(),
        element: Element::F32,
    };
    let tensors: Vec<SavedTensor> = tensors.iter().map(tensor).collect();
    let config = write(dir, "adapter_config.json", |out| out.bytes(config.as_bytes()))?;
    let weights = write(dir, "adapter_model.safetensors", |out| weights(out, &BTreeMap::new(), &tensors, read))?;
    [config, weights].into_iter().try_for_each(Pending::commit)?;
    sync_folder(dir)
}

fn write(dir: &Path, name: &str, body: impl FnOnce(&mut Output) -> Result<()>) -> Result<Pending> {
    let target = dir.join(name);
    Pending::write(&target, |file| body(&mut Output { file, target: &target }))
}

/// One entry of the file.
enum Entry<'a> {
    Counter(&'a str, i64),
    Tensor(&'a SavedTensor),
}

impl Entry<'_> {
    /// Its name, element type and axes.
    fn info(&self) -> (&str, Element, &[usize]) {
        match self {
            Entry::Counter(name, _) => (name, Element::I64, &[]),
            Entry::Tensor(t) => (&t.file_name, t.element, t.shape.axes()),
        }
    }
}

fn weights(
    out: &mut Output,
    counters: &BTreeMap<String, i64>,
    tensors: &[SavedTensor],
    read: &mut dyn FnMut(&str) -> Result<Vec<f32>>,
) -> Result<()> {
    let counters = counters.iter().map(|(name, &count)| Entry::Counter(name, count));
    let mut entries: Vec<Entry> = counters.chain(tensors.iter().map(Entry::Tensor)).collect();
    // The safetensors crate's order: wide elements first, so that all are aligned, then by name.
    entries.sort_by(|a, b| {
        let ((a_name, a_element, _), (b_name, b_element, _)) = (a.info(), b.info());
        b_element.cmp(&a_element).then(a_name.cmp(b_name))
    });
    let metadata = BTreeMap::from([("format", "pt".to_string())]);
    out.bytes(&header(&metadata, entries.iter().map(Entry::info)))?;
    for entry in &entries {
        match entry {
            Entry::Counter(_, count) => out.bytes(&count.to_le_bytes())?,
            Entry::Tensor(tensor) => {
                let values = read(&tensor.name)?;
                if values.len() != tensor.shape.elems() {
                    let (found, want) = (values.len(), &tensor.shape);
                    return Err(out.fault(format!("tensor {}: has {found} elements, want {want}", tensor.file_name)));
                }
                elements(out, tensor, &values)?;
            }
        }
    }
    Ok(())
}

fn elements(out: &mut Output, tensor: &SavedTensor, values: &[f32]) -> Result<()> {
    let encode: fn(f32) -> ([u8; 8], bool) = match tensor.element {
        Element::F64 => |x| (f64::from(x).to_le_bytes(), x.is_finite()),
        Element::F16 => |x| (padded(f16::from_f32(x).to_le_bytes()), f16::from_f32(x).is_finite()),
        Element::BF16 => |x| (padded(bf16::from_f32(x).to_le_bytes()), bf16::from_f32(x).is_finite()),
        _ => |x| (padded(x.to_le_bytes()), x.is_finite()),
    };
    let width = tensor.element.bytes() as usize;
    for (i, &x) in values.iter().enumerate() {
        let (bytes, is_finite) = encode(x);
        if !is_finite {
            let (name, element) = (&tensor.file_name, tensor.element);
            return Err(out.fault(format!("tensor {name}: element {i} is {x}, which is no finite {element}")));
        }
        out.bytes(&bytes[..width])?;
    }
    Ok(())
}

fn padded<const N: usize>(bytes: [u8; N]) -> [u8; 8] {
    let mut all = [0; 8];
    all[..N].copy_from_slice(&bytes);
    all
}

/// A file being written, and its name in messages.
struct Output<'a> {
    file: &'a mut BufWriter<File>,
    target: &'a Path,
}

impl Output<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io("write", self.target, e))
    }

    fn fault(&self, what: String) -> Error {
        Error::bad(format!("{}: {what}", self.target.display()))
    }
}
