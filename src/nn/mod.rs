//! Networks: what is traced into a graph, and how networks, including one's own, are read from and written to Hugging
//! Face directories.
//!
//! A network describes its forward computation against [`Builder`]; it knows nothing of shards, devices or where its
//! weights are. Parameters have the names that transformers gives them, so that a saved model loads there. Each family
//! decides where a cut may fall by where its layers begin and end.

pub mod families;
mod fields;
pub mod hub;
pub mod init;
pub mod layers;
mod parts;
pub(crate) mod safely;
mod save;

pub use families::{from_config, settings};
pub use hub::{Pretrained, open, open_own};
pub use save::{Form, SavedTensor, save, save_adapters};

use crate::base::{DType, Error, Result, Shape, nearest};
use crate::graph::{Builder, Graph, Mode, Value};

/// One input tensor of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputShape {
    /// `input_ids`, `attention_mask`, `pixel_values` or `labels`.
    pub name: String,
    /// The axes of one sample: (T) for ids, (C, H, W) for images, none for an image's label.
    pub axes: Vec<usize>,
    /// I32 for ids, masks and classes; a floating-point input is computed in the model's own type, whichever this is.
    pub dtype: DType,
}

impl InputShape {
    /// Makes an input from its parts.
    pub fn new(name: impl Into<String>, axes: impl Into<Vec<usize>>, dtype: DType) -> Self {
        InputShape { name: name.into(), axes: axes.into(), dtype }
    }
}

/// What a network's labels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Labels {
    /// Whether the label of a position is the input id of the next position. Labels are shifted before they reach the
    /// graph.
    pub shift: bool,
    /// Labels are below this, or -100. Ignored where labels are numbers, such as the targets of a regression.
    pub classes: usize,
    /// Input ids are below this, where the network takes ids.
    pub vocab: Option<usize>,
}

/// A model that can be traced.
pub trait Network: Send + Sync {
    /// Traces the model for microbatches of `batch` samples. With `labels` among the inputs the graph ends in the loss;
    /// without, in the logits.
    ///
    /// # Errors
    /// When an input is unknown or missing, has another type than the model takes, or has axes that do not fit it.
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph>;

    /// The model's default inputs, without `labels`: the longest context, the usual image.
    fn inputs(&self) -> Vec<InputShape>;

    /// What its labels are, and the limits of its ids.
    fn labels(&self) -> Labels;

    /// The config.json that describes it: an object.
    fn config(&self) -> serde_json::Value;
}

/// Names and shapes of all tensors that a network keeps in files: its parameters, then its running statistics.
///
/// # Errors
/// When the network does not trace with its default inputs.
pub fn tensors(network: &dyn Network) -> Result<Vec<(String, Shape)>> {
    let graph = network.trace(Mode::Evaluation, DType::F32, 1, &network.inputs())?;
    let parameters = graph.parameters.into_iter().map(|p| (p.name, p.shape));
    Ok(parameters.chain(graph.states.into_iter().map(|s| (s.name, s.shape))).collect())
}

/// The inputs of one trace by name, checked against what the network takes.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    batch: usize,
    float: DType,
    inputs: &'a [InputShape],
}

impl<'a> Inputs<'a> {
    /// Takes `inputs` for microbatches of `batch` samples of a model with elements of type `float`.
    ///
    /// # Errors
    /// When the batch or an axis is 0, or an input is not in `known` or is given twice.
    pub fn new(batch: usize, float: DType, inputs: &'a [InputShape], known: &[&str]) -> Result<Self> {
        if batch == 0 {
            return Err(Error::bad("a microbatch needs at least one sample"));
        }
        for (i, input) in inputs.iter().enumerate() {
            let name = input.name.as_str();
            if !known.contains(&name) {
                let hint =
                    nearest(name, known.iter().copied()).map_or(String::new(), |k| format!("; did you mean {k}?"));
                return Err(Error::bad(format!("input {name:?} is not taken, only {}{hint}", known.join(", "))));
            }
            if inputs[..i].iter().any(|other| other.name == name) {
                return Err(Error::bad(format!("input {name}: comes twice")));
            }
            if input.axes.contains(&0) {
                return Err(Error::bad(format!("input {name}: an axis of {} is 0", Shape::new(input.axes.clone()))));
            }
        }
        Ok(Inputs { batch, float, inputs })
    }

    /// The axes of one sample of a required input, which must have `N` of them.
    ///
    /// # Errors
    /// When the input is missing or has another number of axes.
    pub fn axes<const N: usize>(&self, name: &str) -> Result<[usize; N]> {
        let input = self.find(name).ok_or_else(|| Error::bad(format!("input {name}: is missing")))?;
        input.axes.as_slice().try_into().map_err(|_| {
            let shape = Shape::new(input.axes.clone());
            Error::bad(format!("input {name}: a sample is {shape}, want {N} axes"))
        })
    }

    /// Declares an input whose samples have `axes`, if it is there.
    ///
    /// # Errors
    /// When its axes differ, or it is floating-point where `integers` are wanted, or the reverse.
    pub fn declare(&self, b: &mut Builder, name: &str, axes: &[usize], integers: bool) -> Result<Option<Value>> {
        let Some(input) = self.find(name) else { return Ok(None) };
        if (input.dtype == DType::I32) != integers {
            let want = if integers { DType::I32 } else { self.float };
            return Err(Error::bad(format!("input {name}: is {}, want {want}", input.dtype)));
        }
        if input.axes != axes {
            let (found, want) = (Shape::new(input.axes.clone()), Shape::new(axes));
            return Err(Error::bad(format!("input {name}: a sample is {found}, want {want}")));
        }
        let dtype = if integers { DType::I32 } else { self.float };
        let shape: Vec<usize> = std::iter::once(self.batch).chain(axes.iter().copied()).collect();
        b.input(name, Shape(shape), dtype).map(Some)
    }

    fn find(&self, name: &str) -> Option<&'a InputShape> {
        self.inputs.iter().find(|input| input.name == name)
    }
}

#[cfg(test)]
mod tests;
