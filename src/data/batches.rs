//! Ready-made minibatches from a safetensors file, in the file's order.
//!
//! Every tensor has the leading axes (step, batch). One step's rows are read at a time, straight into the minibatch, so
//! the file may be larger than memory. Neither the header (see [`tensorfile`](crate::base::tensorfile)) nor the values
//! are trusted: integers that do not fit an i32 and pixels that are not finite are errors.

use super::{Batch, IGNORED, InputSpec, Source, files, names};
use crate::base::tensorfile::{Element, TensorEntry, TensorIndex, quoted};
use crate::base::{DType, Error, Result, Shape};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

/// Which file, and how its labels are aligned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchesOptions {
    /// A safetensors file with `labels`, as I64 or I32, or as F32 for a regression, and either `input_ids` (and perhaps
    /// `attention_mask`) as I64 or I32, or `pixel_values` as F32.
    pub path: PathBuf,
    /// Samples in a minibatch; where given, the file's number must equal it.
    pub batch: Option<usize>,
    /// Whether the file's labels are aligned with the tokens, as transformers' language models take them, and have to
    /// be shifted here: `labels[t] = file[t + 1]`, the last one [`IGNORED`]. Labels of shape (step, batch) and F32
    /// labels cannot be shifted.
    pub shift_labels: bool,
}

/// Makes minibatch i from step i of a file.
pub struct BatchesSource {
    name: String,
    path: PathBuf,
    file: File,
    spec: InputSpec,
    steps: u64,
    tensors: Vec<Stored>,
    shift_labels: bool,
    /// One step of a tensor of 64-bit integers, before conversion to 32 bits.
    wide: Vec<i64>,
}

/// One tensor of the file.
struct Stored {
    start_bytes: u64,
    element: Element,
}

impl BatchesSource {
    /// Reads and checks the file's header.
    ///
    /// # Errors
    /// When the file is missing or damaged, a tensor is missing, unknown, of another type or of a shape that does not
    /// match the others, or the minibatch size differs from the one asked for. Messages name the file and the tensor.
    pub fn open(options: &BatchesOptions) -> Result<BatchesSource> {
        let path = options.path.clone();
        let name = path.display().to_string();
        let (file, file_bytes) = files::open(&path)?;
        let index = TensorIndex::read(&file, file_bytes, &path)?;
        let bad = |what: String| Error::bad(format!("{name}: {what}"));
        let layout = Layout::of(&index, options).map_err(bad)?;
        let spec = InputSpec::new(layout.tensors, layout.batch).map_err(|e| bad(e.to_string()))?;
        let spec = InputSpec { samples: Some(layout.steps * layout.batch as u64), batches: Some(layout.steps), ..spec };
        Ok(BatchesSource {
            name,
            path,
            file,
            spec,
            steps: layout.steps,
            tensors: layout.stored,
            shift_labels: options.shift_labels,
            wide: Vec::new(),
        })
    }
}

/// How the file's tensors form minibatches.
struct Layout {
    steps: u64,
    batch: usize,
    tensors: Vec<(String, DType, Shape)>,
    stored: Vec<Stored>,
}

impl Layout {
    fn of(index: &TensorIndex, options: &BatchesOptions) -> std::result::Result<Layout, String> {
        const KNOWN: [&str; 4] = [names::INPUT_IDS, names::ATTENTION_MASK, names::PIXEL_VALUES, names::LABELS];
        if let Some(unknown) = index.entries().iter().find(|entry| !KNOWN.contains(&entry.name.as_str())) {
            let name = quoted(&unknown.name);
            return Err(format!("tensor {name} is none that a model takes ({})", KNOWN.join(", ")));
        }
        let [ids, mask, pixels, labels] = KNOWN.map(|name| index.get(name));
        let labels = labels.ok_or("there is no tensor 'labels'")?;
        let (main, axes) = match (ids, pixels) {
            (Some(ids), None) => (ids, 3),
            (None, Some(pixels)) => (pixels, 5),
            (None, None) => return Err("there is neither a tensor 'input_ids' nor 'pixel_values'".into()),
            (Some(_), Some(_)) => return Err("there are both 'input_ids' and 'pixel_values'; one is taken".into()),
        };
        if main.shape.axes().len() != axes {
            let want = if axes == 3 { "(step, batch, time)" } else { "(step, batch, channel, height, width)" };
            return Err(format!("tensor '{}': shape {} is not {want}", main.name, main.shape));
        }
        let (steps, batch) = (main.shape.axes()[0], main.shape.axes()[1]);
        if let Some(want) = options.batch.filter(|&want| want != batch) {
            return Err(format!("tensor '{}': has {batch} samples in a minibatch, batch is {want}", main.name));
        }
        if steps == 0 {
            return Err(format!("tensor '{}': shape {} holds no step", main.name, main.shape));
        }
        if let Some(mask) = mask.filter(|mask| mask.shape != main.shape || ids.is_none()) {
            return Err(format!("tensor '{}': shape {} is not that of 'input_ids'", mask.name, mask.shape));
        }
        let numbers = labels.element == Element::F32;
        if numbers && !matches!(labels.shape.axes(), [s, b, _, ..] if [*s, *b] == [steps, batch]) {
            return Err(format!("tensor 'labels': shape {} of F32 is not {steps}x{batch} and columns", labels.shape));
        }
        let per_token = !numbers && ids.is_some() && labels.shape == main.shape;
        if !numbers && !per_token && labels.shape.axes() != [steps, batch] {
            let or_tokens = if ids.is_some() { format!(", nor {}", main.shape) } else { String::new() };
            return Err(format!("tensor 'labels': shape {} is not {steps}x{batch}{or_tokens}", labels.shape));
        }
        if options.shift_labels && numbers {
            return Err("tensor 'labels': F32 is not I64 or I32: what is shifted are tokens".into());
        }
        if options.shift_labels && !per_token {
            return Err(format!("tensor 'labels': shape {} has no axis of time to shift along", labels.shape));
        }
        let mut layout = Layout { steps: steps as u64, batch, tensors: Vec::new(), stored: Vec::new() };
        for entry in [Some(main), mask, Some(labels)].into_iter().flatten() {
            layout.push(entry)?;
        }
        Ok(layout)
    }

    fn push(&mut self, entry: &TensorEntry) -> std::result::Result<(), String> {
        let (floats, integers, want) = match entry.name.as_str() {
            names::PIXEL_VALUES => (true, false, "F32"),
            names::LABELS => (true, true, "I64, I32 or F32"),
            _ => (false, true, "I64 or I32"),
        };
        let dtype = match entry.element {
            Element::F32 if floats => DType::F32,
            Element::I64 | Element::I32 if integers => DType::I32,
            other => return Err(format!("tensor '{}': element type {other} is not {want}", entry.name)),
        };
        self.tensors.push((entry.name.clone(), dtype, Shape::new(&entry.shape.axes()[2..])));
        self.stored.push(Stored { start_bytes: entry.start_bytes, element: entry.element });
        Ok(())
    }
}

impl Source for BatchesSource {
    fn spec(&self) -> &InputSpec {
        &self.spec
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        if index >= self.steps {
            return Err(Error::bad(format!(
                "{}: holds {} minibatches, number {index} is asked for",
                self.name, self.steps
            )));
        }
        batch.conform(&self.spec);
        for (tensor, stored) in batch.tensors.iter_mut().zip(&self.tensors) {
            let elems = tensor.shape.elems();
            // Cannot overflow: it is below the file's length, against which the header was checked.
            let start = stored.start_bytes + index * elems as u64 * stored.element.bytes();
            let fault = tensor.fill_from(stored.element, &mut self.wide, |bytes| {
                let read = self.file.seek(SeekFrom::Start(start)).and_then(|_| self.file.read_exact(bytes));
                read.map_err(|e| Error::io("read", &self.path, e))
            })?;
            if let Some((at, what)) = fault {
                let (tensor, at) = (&tensor.name, tensor.shape.position(at));
                let message = format!("{}: tensor '{tensor}': step {index}, position {at}: {what}", self.name);
                return Err(Error::bad(message));
            }
            if self.shift_labels && tensor.name == names::LABELS {
                let time = tensor.shape.cols();
                for row in tensor.as_i32_mut().chunks_exact_mut(time) {
                    row.copy_within(1.., 0);
                    row[time - 1] = IGNORED;
                }
            }
        }
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        self.steps
    }
}

#[cfg(test)]
#[path = "batches_tests.rs"]
mod tests;
