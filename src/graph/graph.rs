//! A traced model: values, nodes, layers, and what they share.

use super::kinds::Init;
use super::op::Op;
use crate::base::{DType, Shape};
use std::ops::Range;

/// A tensor in a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u32);

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// An output of a node.
    Node {
        /// The node's index.
        node: usize,
        /// Which of its outputs.
        output: usize,
    },
    /// A parameter, by its index.
    Parameter(usize),
    /// A running statistic, by its index.
    State(usize),
    /// An input of the batch, by its index.
    Input(usize),
    /// All or some of another value's elements with another shape; never a view of a view.
    View {
        /// The other value.
        of: Value,
        /// The index of its first element shown.
        first: usize,
    },
}

/// A value's description.
#[derive(Clone, Debug)]
pub struct ValueInfo {
    /// Its shape.
    pub shape: Shape,
    /// Its element type.
    pub dtype: DType,
    /// Where it comes from.
    pub source: Source,
}

/// One op with its operands.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// Inputs, in the op's order.
    pub inputs: Vec<Value>,
    /// Outputs, in the op's order.
    pub outputs: Vec<Value>,
    /// The layer it belongs to.
    pub layer: usize,
}

/// A tensor of weights.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its name in files.
    pub name: String,
    /// Its value in the graph.
    pub value: Value,
    /// Its shape.
    pub shape: Shape,
    /// Its initial values.
    pub init: Init,
    /// The layers that use it, in order; the first owns it.
    pub layers: Vec<usize>,
    /// It is not trained: it has no gradient and no moments, and no layer owns it.
    pub frozen: bool,
}

/// A tensor that a layer keeps from step to step without a gradient: BatchNorm's running statistics.
#[derive(Clone, Debug)]
pub struct State {
    /// Its name in files.
    pub name: String,
    /// Its value in the graph.
    pub value: Value,
    /// Its shape.
    pub shape: Shape,
    /// Every element's initial value.
    pub start: f64,
    /// The layer that owns it.
    pub layer: usize,
}

/// An input tensor of every microbatch.
#[derive(Clone, Debug)]
pub struct Input {
    /// Its name in batches.
    pub name: String,
    /// Its value in the graph.
    pub value: Value,
    /// Its shape for one microbatch.
    pub shape: Shape,
    /// Its element type.
    pub dtype: DType,
}

/// A stretch of the model between two places where a cut may fall.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// The previous layer's output; `None` for the first.
    pub input: Option<Value>,
    /// The boundary activation that it passes on; `None` for the last layer once it contains the loss.
    pub output: Option<Value>,
}

/// The gradient of one use of a parameter: what one layer's backward pass adds to its accumulator.
#[derive(Clone, Debug)]
pub struct ParameterGradient {
    /// Index of the parameter.
    pub parameter: usize,
    /// The layer whose use this is.
    pub layer: usize,
    /// The gradient.
    pub value: Value,
}

/// A traced model, and after [`super::differentiate`] its gradient.
///
/// Nodes are in an order in which every input precedes its use: the forward pass layer by layer, up to `forward_nodes`,
/// then the backward pass from the last layer to the first. Forward nodes' indices at tracing key their random numbers,
/// whatever the cut.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Element type of weights and activations. Sums (statistics, losses, parameters' gradients) have the type
    /// [`DType::wide`].
    pub float: DType,
    /// All values.
    pub values: Vec<ValueInfo>,
    /// All nodes: forward, then backward.
    pub nodes: Vec<Node>,
    /// Parameters in order of first use.
    pub parameters: Vec<Parameter>,
    /// Running statistics.
    pub states: Vec<State>,
    /// The batch's tensors.
    pub inputs: Vec<Input>,
    /// The layers, in order.
    pub layers: Vec<Layer>,
    /// Output of the last layer before the loss: the logits.
    pub logits: Option<Value>,
    /// The loss of a microbatch, one element.
    pub loss: Option<Value>,
    /// How many of `nodes` are forward.
    pub forward_nodes: usize,
    /// Per layer, the gradient of its input (the boundary gradient that its backward pass passes on).
    pub input_gradients: Vec<Option<Value>>,
    /// Gradients of parameters, one for each use, in the order of layers.
    pub parameter_gradients: Vec<ParameterGradient>,
    /// Whether its programs run on a device whose kernels need scratch in the workspace (see [`super::scratch_bytes`]).
    pub scratch: bool,
    /// Whether f32 products may round their factors to tf32 (10 bits of fraction), on a device that supports it.
    pub tf32: bool,
    /// Rows of logits that are computed at a time, whatever the size of the vocabulary; `None` leaves the choice to
    /// [`super::split_loss`].
    pub loss_rows: Option<usize>,
    /// Nodes of the parts in which the loss runs, in order; empty where it runs whole (see [`super::split_loss`]).
    pub loss_parts: Vec<LossPart>,
}

/// Some rows of the logits: the nodes that compute them and their loss, and those that use their gradient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LossPart {
    /// The product that computes the logits comes first.
    pub forward: Range<usize>,
    /// Empty before [`super::differentiate`] is called.
    pub backward: Range<usize>,
}

impl Graph {
    /// A value's description.
    pub fn info(&self, value: Value) -> &ValueInfo {
        &self.values[value.0 as usize]
    }

    /// The value whose elements a view shows; itself for any other.
    pub fn root(&self, value: Value) -> Value {
        match self.info(value).source {
            Source::View { of, .. } => of,
            _ => value,
        }
    }

    /// Bytes of a value.
    pub fn bytes(&self, value: Value) -> u64 {
        let info = self.info(value);
        info.shape.elems() as u64 * info.dtype.bytes()
    }

    /// The node that computes a value, if one does.
    pub fn producer(&self, value: Value) -> Option<usize> {
        match self.info(self.root(value)).source {
            Source::Node { node, .. } => Some(node),
            _ => None,
        }
    }

    /// Freezes the parameters for whose names `frozen` returns true. Call it before [`super::differentiate`].
    pub fn freeze(&mut self, frozen: impl Fn(&str) -> bool) {
        self.parameters.iter_mut().for_each(|p| p.frozen |= frozen(&p.name));
    }

    /// Removes the nodes that are not to be kept; no other node may read their outputs.
    pub(super) fn keep_nodes(&mut self, keep: &[bool]) {
        let mut moved = vec![0usize; self.nodes.len()];
        let mut next = 0;
        for (n, &kept) in keep.iter().enumerate() {
            moved[n] = next;
            next += usize::from(kept);
        }
        let mut n = 0;
        self.nodes.retain(|_| {
            n += 1;
            keep[n - 1]
        });
        for info in &mut self.values {
            if let Source::Node { node, .. } = &mut info.source {
                *node = moved[*node];
            }
        }
    }

    /// Number of parameter elements, shared ones counted once.
    pub fn parameter_elems(&self) -> usize {
        self.parameters.iter().map(|p| p.shape.elems()).sum()
    }

    /// The forward nodes of a layer range, which are contiguous.
    pub fn forward_of(&self, layers: Range<usize>) -> Range<usize> {
        let nodes = &self.nodes[..self.forward_nodes];
        let before = |layer: usize| nodes.partition_point(|n| n.layer < layer);
        before(layers.start)..before(layers.end)
    }

    /// The backward nodes of a layer range, which are contiguous.
    pub fn backward_of(&self, layers: Range<usize>) -> Range<usize> {
        let nodes = &self.nodes[self.forward_nodes..];
        let from = |layer: usize| self.forward_nodes + nodes.partition_point(|n| n.layer >= layer);
        from(layers.end)..from(layers.start)
    }

    /// The gradients of parameters' uses in a layer range, which are contiguous.
    pub fn gradients_of(&self, layers: Range<usize>) -> &[ParameterGradient] {
        let before = |layer: usize| self.parameter_gradients.partition_point(|g| g.layer < layer);
        &self.parameter_gradients[before(layers.start)..before(layers.end)]
    }
}
