//! Reverse mode: appends to a graph the nodes of its gradient.
//!
//! Nodes are visited from the loss back; each op's rule (see `gradient`) emits nodes of the same layer, and
//! contributions to one value are added in that fixed order. Every layer's part is self-contained: the gradient that it
//! passes to the layer before it, and those that it adds to its parameters' accumulators, are outputs of its own nodes,
//! so a cut between any two layers computes the same bits.
//!
//! A value's gradient has the value's element type, a parameter's gradient the wide one ([`DType::wide`]): a
//! contribution of another type is converted by a copy before it is added.

use super::fuse;
use super::gradient;
use super::graph::{Graph, Node, ParameterGradient, Source, Value, ValueInfo};
use super::op::Op;
use crate::base::{DType, Error, Result, Shape};

/// Appends the gradient of `graph.loss` with respect to every parameter that is not frozen. Layers before the first
/// trained one have no backward pass.
///
/// # Errors
/// When the graph has no loss or already has its gradient, a layer's output does not reach the loss, or all parameters
/// are frozen. Where an op has no gradient, or a wrong one, the message names its layer.
pub fn differentiate(graph: &mut Graph) -> Result<()> {
    if !graph.input_gradients.is_empty() {
        return Err(Error::bad("differentiate: the graph has its gradient already"));
    }
    let loss = graph.loss.ok_or_else(|| Error::bad("differentiate: the graph has no loss"))?;
    // The gradient of every row's loss is the step's loss scale, which the loss' own gradient op applies.
    let losses = match graph.producer(loss).map(|n| &graph.nodes[n]) {
        Some(Node { op: Op::LossSum, inputs, .. }) => graph.root(inputs[0]),
        _ => return Err(Error::bad("differentiate: the loss is no sum over rows")),
    };
    if !graph.parameters.is_empty() && graph.parameters.iter().all(|p| p.frozen) {
        return Err(Error::bad("differentiate: all parameters are frozen"));
    }
    let mut sweep = Sweep { needed: needed(graph), gradients: vec![None; graph.values.len()], layer: 0, graph };
    let layers = sweep.graph.layers.len();
    sweep.graph.input_gradients = vec![None; layers];
    for layer in (0..layers).rev() {
        sweep.layer = layer;
        for node in (0..sweep.graph.forward_nodes).rev() {
            if sweep.graph.nodes[node].layer == layer {
                sweep.node(node, losses).map_err(|error| match error {
                    Error::BadInput(message) => {
                        Error::BadInput(format!("layer {}: {message}", sweep.graph.layers[layer].name))
                    }
                    other => other,
                })?;
            }
        }
        sweep.close_layer(layer)?;
    }
    sweep.graph.parameter_gradients.reverse();
    drop_unused(graph);
    fuse::input_gradients(graph);
    Ok(())
}

/// For each root value, whether it depends on a trained parameter.
fn needed(graph: &Graph) -> Vec<bool> {
    let mut needed = vec![false; graph.values.len()];
    for parameter in graph.parameters.iter().filter(|p| !p.frozen) {
        needed[parameter.value.0 as usize] = true;
    }
    for node in &graph.nodes {
        if node.inputs.iter().any(|&v| needed[graph.root(v).0 as usize]) {
            node.outputs.iter().for_each(|v| needed[v.0 as usize] = true);
        }
    }
    needed
}

/// One walk over the graph; gradient rules add nodes through it.
pub(super) struct Sweep<'a> {
    pub(super) graph: &'a mut Graph,
    needed: Vec<bool>,
    /// The gradient of each root value accumulated so far.
    gradients: Vec<Option<Value>>,
    layer: usize,
}

impl Sweep<'_> {
    fn node(&mut self, node: usize, losses: Value) -> Result<()> {
        let Node { op, inputs, outputs, .. } = self.graph.nodes[node].clone();
        if op.has_side_effect() || !outputs.iter().any(|v| self.needed[v.0 as usize]) {
            return Ok(());
        }
        if let Op::Custom(custom) = &op
            && let Some(output) = (1..outputs.len()).find(|&i| self.gradients[outputs[i].0 as usize].is_some())
        {
            let name = custom.0.name();
            return Err(Error::bad(format!(
                "{name}: the loss depends on its output {output}, and its gradient is given output 0's alone"
            )));
        }
        if outputs[0] != losses && self.gradients[outputs[0].0 as usize].is_none() {
            return Ok(());
        }
        let d_out = self.gradients[outputs[0].0 as usize].map(|d| self.shaped_like(d, outputs[0]));
        gradient::emit(self, &op, &inputs, &outputs, d_out)
    }

    /// Whether the gradient of `value` is needed.
    pub(super) fn wants(&self, value: Value) -> bool {
        self.needed[self.graph.root(value).0 as usize]
    }

    /// Appends a node of the current layer and returns its outputs, whose types are the op's (see
    /// [`Op::output_dtype`]).
    pub(super) fn push(&mut self, op: Op, inputs: Vec<Value>, shapes: Vec<Shape>) -> Vec<Value> {
        let float = self.graph.float;
        let dtypes: Vec<DType> = (0..shapes.len()).map(|output| op.output_dtype(output, float)).collect();
        self.push_typed(op, inputs, shapes.into_iter().zip(dtypes).collect())
    }

    fn push_typed(&mut self, op: Op, inputs: Vec<Value>, outputs: Vec<(Shape, DType)>) -> Vec<Value> {
        let node = self.graph.nodes.len();
        let outputs: Vec<Value> = outputs
            .into_iter()
            .enumerate()
            .map(|(output, (shape, dtype))| {
                self.graph.values.push(ValueInfo { shape, dtype, source: Source::Node { node, output } });
                self.gradients.push(None);
                self.needed.push(false);
                Value(self.graph.values.len() as u32 - 1)
            })
            .collect();
        self.graph.nodes.push(Node { op, inputs, outputs: outputs.clone(), layer: self.layer });
        outputs
    }

    /// Appends a node with one output.
    pub(super) fn push_one(&mut self, op: Op, inputs: Vec<Value>, shape: Shape) -> Value {
        self.push(op, inputs, vec![shape])[0]
    }

    /// `gradient` with the shape of `value`: the two differ where a view was differentiated.
    fn shaped_like(&mut self, gradient: Value, value: Value) -> Value {
        let shape = self.graph.info(value).shape.clone();
        let info = self.graph.info(gradient);
        if info.shape == shape {
            return gradient;
        }
        let (dtype, root) = (info.dtype, self.graph.root(gradient));
        self.graph.values.push(ValueInfo { shape, dtype, source: Source::View { of: root, first: 0 } });
        self.gradients.push(None);
        self.needed.push(false);
        Value(self.graph.values.len() as u32 - 1)
    }

    /// Adds `gradient` to the gradient of `value` so far.
    pub(super) fn contribute(&mut self, value: Value, gradient: Value) {
        let root = self.graph.root(value);
        if !self.needed[root.0 as usize] {
            return;
        }
        let info = self.graph.info(root);
        let dtype = if let Source::Parameter(_) = info.source { info.dtype.wide() } else { info.dtype };
        let gradient = if self.graph.info(gradient).dtype == dtype { gradient } else { self.copy(gradient, dtype) };
        let sum = match self.gradients[root.0 as usize] {
            None => gradient,
            Some(before) => {
                let shape = self.graph.info(before).shape.clone();
                self.push_typed(Op::Add, vec![before, gradient], vec![(shape, dtype)])[0]
            }
        };
        self.gradients[root.0 as usize] = Some(sum);
    }

    /// Finishes a layer: makes its input's gradient and each of its parameters' gradients an output of one of the
    /// layer's own nodes.
    fn close_layer(&mut self, layer: usize) -> Result<()> {
        if let Some(input) = self.graph.layers[layer].input
            && self.wants(input)
        {
            let root = self.graph.root(input);
            let gradient = self.gradients[root.0 as usize].ok_or_else(|| {
                Error::bad(format!("layer {}: its input does not reach the loss", self.graph.layers[layer].name))
            })?;
            let own = self.own(gradient, layer, false);
            self.gradients[root.0 as usize] = Some(own);
            self.graph.input_gradients[layer] = Some(own);
        }
        for parameter in (0..self.graph.parameters.len()).rev() {
            let of = &self.graph.parameters[parameter];
            if of.frozen || !of.layers.contains(&layer) {
                continue;
            }
            let value = self.graph.parameters[parameter].value;
            let own = match self.gradients[value.0 as usize].take() {
                // Another of the layer's parameters may get the same gradient later, so `own` must not return it
                // uncopied.
                Some(gradient) => {
                    let root = self.graph.root(gradient);
                    let alone = !self.graph.parameters.iter().any(|p| {
                        self.gradients[p.value.0 as usize].is_some_and(|other| self.graph.root(other) == root)
                    });
                    let dtype = self.graph.info(gradient).dtype;
                    if alone { self.own(gradient, layer, true) } else { self.copy(gradient, dtype) }
                }
                None => {
                    let shape = self.graph.parameters[parameter].shape.clone();
                    self.push_one(Op::Zero, vec![], shape)
                }
            };
            self.graph.parameter_gradients.push(ParameterGradient { parameter, layer, value: own });
        }
        Ok(())
    }

    /// `gradient` itself where it is an output of this layer's backward pass that nobody else reads and, for a
    /// parameter, one that can accumulate; otherwise a copy of it.
    fn own(&mut self, gradient: Value, layer: usize, accumulates: bool) -> Value {
        let root = self.graph.root(gradient);
        let fits = match self.graph.info(root).source {
            Source::Node { node, output } => {
                let read = accumulates
                    && self.graph.nodes[self.graph.forward_nodes..]
                        .iter()
                        .any(|n| n.inputs.iter().any(|&v| self.graph.root(v) == root));
                let taken = self.graph.parameter_gradients.iter().any(|p| p.value == root)
                    || self.graph.input_gradients[layer] == Some(root);
                let op = &self.graph.nodes[node].op;
                node >= self.graph.forward_nodes
                    && self.graph.nodes[node].layer == layer
                    && !read
                    && !taken
                    && (!accumulates || op.accumulates(output))
            }
            _ => false,
        };
        if fits {
            return root;
        }
        let dtype = self.graph.info(gradient).dtype;
        self.copy(gradient, dtype)
    }

    /// A copy of `gradient` as `dtype`.
    fn copy(&mut self, gradient: Value, dtype: DType) -> Value {
        let shape = self.graph.info(gradient).shape.clone();
        self.push_typed(Op::Copy, vec![gradient], vec![(shape, dtype)])[0]
    }
}

/// Removes backward nodes whose outputs are all unused.
fn drop_unused(graph: &mut Graph) {
    let mut used = vec![false; graph.values.len()];
    for value in
        graph.parameter_gradients.iter().map(|p| p.value).chain(graph.input_gradients.iter().flatten().copied())
    {
        used[value.0 as usize] = true;
    }
    let mut keep = vec![true; graph.nodes.len()];
    for n in (graph.forward_nodes..graph.nodes.len()).rev() {
        let node = &graph.nodes[n];
        keep[n] = node.outputs.iter().any(|v| used[v.0 as usize]);
        if keep[n] {
            for &input in &node.inputs {
                used[graph.root(input).0 as usize] = true;
            }
        }
    }
    graph.keep_nodes(&keep);
}
