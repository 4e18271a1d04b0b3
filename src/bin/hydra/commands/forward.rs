//! `hydra forward`: a model directory and a file of inputs in, a file of logits out.

use crate::print::{say, say_beside};
use crate::setup::note_unused;
use hydra::base::tensorfile::{Element, TensorFile, TensorView, header, quoted};
use hydra::base::{DType, Error, Result};
use hydra::data::{Batch, BatchTensor, names};
use hydra::nn;
use hydra::train::{Weights, wait_forward, write_safely};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

/// Runs the model in `model` on the tensors of `input` and writes `output`.
///
/// # Errors
/// When a file is missing or faulty, a tensor is not one that the model takes, or `output` is one of the files read or
/// cannot be written.
pub fn run(model: &Path, input: &Path, output: &Path, json: bool) -> Result<()> {
    let pretrained = nn::open(model)?;
    check_output(model, input, output)?;
    note_unused(model, &pretrained.unused);
    let file = input.display().to_string();
    let bytes = std::fs::read(input).map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Error::bad(format!("{file}: no such file")),
        ErrorKind::IsADirectory => Error::bad(format!("{file}: is a folder, a file is needed")),
        _ => Error::io("read", input, e),
    })?;
    let fault = |error: Error| match error {
        Error::BadInput(what) => Error::BadInput(format!("{file}: {what}")),
        other => other,
    };
    let batch = read_batch(&TensorFile::parse(&bytes, &file)?).map_err(fault)?;
    drop(bytes);
    let weights = Weights::Pretrained(&pretrained);
    let (shape, logits) = wait_forward(pretrained.network.as_ref(), weights, &batch).map_err(|error| match error {
        // Errors about the weights already name their file.
        Error::BadInput(what) if what.starts_with(&model.display().to_string()) => Error::BadInput(what),
        other => fault(other),
    })?;
    let header = header(&BTreeMap::new(), [("logits", Element::F32, shape.axes())]);
    // If the file goes to standard output, this line would become part of it.
    let say = |line: String| if is_stdout(output) { say_beside(line) } else { say(line) };
    write_safely(output, |out| {
        out.write_all(&header)?;
        logits.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
    })?;
    if json {
        say(json!({ "output": output.display().to_string(), "shape": shape.axes() }).to_string());
    } else {
        say(format!("logits {shape} f32 written to {}", output.display()));
    }
    Ok(())
}

/// Whether `path` leads to where standard output goes.
fn is_stdout(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let place = |path: &Path| std::fs::metadata(path).ok().map(|there| (there.dev(), there.ino()));
        place(path).is_some_and(|there| place(Path::new("/dev/stdout")) == Some(there))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Refuses to overwrite what is read: the input, and anything in the model's directory.
fn check_output(model: &Path, input: &Path, output: &Path) -> Result<()> {
    // A file that does not exist yet still belongs to its folder. If that is missing too, writing will report it.
    let folder = || output.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    let beside = || Some(folder()?.canonicalize().ok()?.join(output.file_name()?));
    let Some(place) = output.canonicalize().ok().or_else(beside) else { return Ok(()) };
    let fault = |what: &str| Err(Error::bad(format!("{}: {what}; name another file for the output", output.display())));
    if input.canonicalize().is_ok_and(|input| input == place) {
        return fault("is the input");
    }
    if model.canonicalize().is_ok_and(|model| place.starts_with(model)) {
        return fault("lies in the model's folder");
    }
    Ok(())
}

/// The file's tensors as a batch, in the order in which models name them.
fn read_batch(file: &TensorFile) -> Result<Batch> {
    const KNOWN: [&str; 3] = [names::INPUT_IDS, names::ATTENTION_MASK, names::PIXEL_VALUES];
    if let Some(unknown) = file.tensors().find(|t| !KNOWN.contains(&t.entry.name.as_str())) {
        let name = quoted(&unknown.entry.name);
        return Err(Error::bad(format!("tensor {name}: is none that is read, only {}", KNOWN.join(", "))));
    }
    if [names::INPUT_IDS, names::PIXEL_VALUES].iter().all(|name| file.get(name).is_none()) {
        return Err(Error::bad("there is neither a tensor 'input_ids' nor 'pixel_values'"));
    }
    let tensors = KNOWN.iter().filter_map(|name| file.get(name)).map(|t| read_tensor(&t));
    Ok(Batch { tensors: tensors.collect::<Result<_>>()? })
}

fn read_tensor(view: &TensorView) -> Result<BatchTensor> {
    let (name, shape) = (view.entry.name.as_str(), view.entry.shape.clone());
    let fault = |what: String| Error::bad(format!("tensor '{name}': {what}"));
    if shape.axes().is_empty() || shape.axes().contains(&0) {
        return Err(fault(format!("shape {shape} holds no batch")));
    }
    let (dtype, want) = if name == names::PIXEL_VALUES { (DType::F32, "F32") } else { (DType::I32, "I64 or I32") };
    let element = view.entry.element;
    if !matches!((dtype, element), (DType::F32, Element::F32) | (DType::I32, Element::I64 | Element::I32)) {
        return Err(fault(format!("element type {element} is not {want}")));
    }
    let mut tensor = BatchTensor::zeros(name, dtype, shape);
    let wrong = tensor.fill_from(element, &mut Vec::new(), |bytes| {
        bytes.copy_from_slice(view.bytes);
        Ok(())
    })?;
    match wrong {
        Some((at, what)) => Err(fault(format!("position {}: {what}", tensor.shape.position(at)))),
        None => Ok(tensor),
    }
}
