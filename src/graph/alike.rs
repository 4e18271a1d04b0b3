//! Which layers are alike: those with the same ops on tensors of the same shapes, which differ only in names, random
//! numbers and their place in the model.
//!
//! What a program needs and costs depends only on which layers are alike and their order, so a search over cuts has to
//! look at few programs. Two layers not clearly alike are treated as different.

use super::graph::{Graph, Source, Value};
use super::layout::ModelLayout;
use super::op::{AttentionKind, Op};
use super::padding::padded;
use crate::base::{DType, Shape};
use std::collections::HashSet;

/// For each layer, the first layer that is like it: itself where no earlier one is.
///
/// Shards of equally many layers, each like its counterpart, have programs of the same ops on buffers at the same
/// offsets, unless one of them is the model's last.
pub fn alike(graph: &Graph, layout: &ModelLayout) -> Vec<usize> {
    let padded = padded(graph);
    let mut found: Vec<(usize, Likeness)> = Vec::new();
    let mut first = Vec::new();
    for layer in 0..graph.layers.len() {
        let own = View { graph, layout, padded: &padded, layer }.likeness();
        let known = own.as_ref().and_then(|own| found.iter().find(|(_, other)| other == own)).map(|&(first, _)| first);
        first.push(known.unwrap_or(layer));
        if known.is_none() {
            found.extend(own.map(|own| (layer, own)));
        }
    }
    first
}

/// Where a layer finds a tensor: a [`Source`] with indices local to the layer.
#[derive(Clone, Debug, PartialEq)]
enum LayerSource {
    /// Output of one of its own nodes, forward ones first.
    Node(usize, usize),
    /// Its input.
    Before,
    /// The gradient of its output.
    After,
    /// Among its own parameters, frozen ones or running statistics: bytes from the first.
    Parameter(u64),
    Frozen(u64),
    State(u64),
    /// The batch's, by its index.
    Input(usize),
}

#[derive(Debug, PartialEq)]
struct Operand {
    source: LayerSource,
    shape: Shape,
    dtype: DType,
    /// The shape of the tensor that a view shows, and the first element shown.
    root: Shape,
    first: usize,
    is_padded: bool,
}

/// Everything in a layer that its part of a program depends on.
#[derive(Debug, PartialEq)]
struct Likeness {
    /// Ops without the numbers of their random streams, with inputs and outputs.
    nodes: Vec<(Op, Vec<Operand>, Vec<Operand>)>,
    forward_nodes: usize,
    own_bytes: u64,
    frozen_bytes: u64,
    state_bytes: u64,
    has_input: bool,
    output: Option<LayerSource>,
    /// The gradient that it passes on.
    input_gradient: Option<LayerSource>,
    loss: Option<LayerSource>,
    logits: Option<LayerSource>,
    parameter_gradients: Vec<(u64, LayerSource)>,
}

struct View<'a> {
    graph: &'a Graph,
    layout: &'a ModelLayout,
    padded: &'a HashSet<Value>,
    layer: usize,
}

impl View<'_> {
    /// The layer's likeness; `None` where it shares a parameter with another layer: what it borrows depends on the cut.
    fn likeness(&self) -> Option<Likeness> {
        let (graph, layout, l) = (self.graph, self.layout, self.layer);
        let layer = &graph.layers[l];
        let (forward, backward) = (graph.forward_of(l..l + 1), graph.backward_of(l..l + 1));
        let forward_nodes = forward.len();
        let mut nodes = Vec::new();
        for node in forward.chain(backward).map(|n| &graph.nodes[n]) {
            let inputs = node.inputs.iter().map(|&v| self.operand(v)).collect::<Option<Vec<_>>>()?;
            let outputs = node.outputs.iter().map(|&v| self.operand(v)).collect::<Option<Vec<_>>>()?;
            nodes.push((without_stream(&node.op), inputs, outputs));
        }
        let here =
            |value: Option<Value>| value.and_then(|v| self.source(v)).filter(|p| matches!(p, LayerSource::Node(..)));
        let mut parameter_gradients = Vec::new();
        for gradient in graph.gradients_of(l..l + 1) {
            let parameter = self.parameter(gradient.parameter)?;
            parameter_gradients.push((parameter, self.source(gradient.value)?));
        }
        Some(Likeness {
            nodes,
            forward_nodes,
            own_bytes: layout.layers[l].end - layout.layers[l].start,
            frozen_bytes: layout.frozen_layers[l].end - layout.frozen_layers[l].start,
            state_bytes: layout.state_layers[l].end - layout.state_layers[l].start,
            has_input: layer.input.is_some(),
            output: here(layer.output),
            input_gradient: here(graph.input_gradients.get(l).copied().flatten()),
            loss: here(graph.loss),
            logits: here(graph.logits),
            parameter_gradients,
        })
    }

    fn operand(&self, value: Value) -> Option<Operand> {
        let (info, root) = (self.graph.info(value), self.graph.root(value));
        Some(Operand {
            source: self.source(value)?,
            shape: info.shape.clone(),
            dtype: info.dtype,
            root: self.graph.info(root).shape.clone(),
            first: if let Source::View { first, .. } = info.source { first } else { 0 },
            is_padded: self.padded.contains(&root),
        })
    }

    fn source(&self, value: Value) -> Option<LayerSource> {
        let (graph, l) = (self.graph, self.layer);
        let root = graph.root(value);
        match graph.info(root).source {
            Source::Parameter(p) if graph.parameters[p].frozen => {
                let alone = graph.parameters[p].layers == [l];
                alone.then(|| LayerSource::Frozen(self.layout.parameter[p] - self.layout.frozen_layers[l].start))
            }
            Source::Parameter(p) => self.parameter(p).map(LayerSource::Parameter),
            Source::State(s) => {
                self.layout.state[s].checked_sub(self.layout.state_layers[l].start).map(LayerSource::State)
            }
            Source::Input(i) => Some(LayerSource::Input(i)),
            Source::Node { node, output } if graph.nodes[node].layer == l => {
                let (forward, backward) = (graph.forward_of(l..l + 1), graph.backward_of(l..l + 1));
                let at =
                    if forward.contains(&node) { node - forward.start } else { forward.len() + node - backward.start };
                Some(LayerSource::Node(at, output))
            }
            _ if graph.layers[l].input.is_some_and(|v| graph.root(v) == root) => Some(LayerSource::Before),
            _ if graph.input_gradients.get(l + 1).copied().flatten() == Some(root) => Some(LayerSource::After),
            _ => None,
        }
    }

    fn parameter(&self, parameter: usize) -> Option<u64> {
        let alone = self.graph.parameters[parameter].layers == [self.layer];
        alone.then(|| self.layout.parameter[parameter] - self.layout.layers[self.layer].start)
    }
}

/// The op with its random stream's number set to 0.
fn without_stream(op: &Op) -> Op {
    match op {
        Op::Dropout { p, .. } => Op::Dropout { p: *p, stream: 0 },
        Op::Attention(kind) => Op::Attention(AttentionKind { dropout: kind.dropout.map(|(p, _)| (p, 0)), ..*kind }),
        Op::AttentionGrad(kind) => {
            Op::AttentionGrad(AttentionKind { dropout: kind.dropout.map(|(p, _)| (p, 0)), ..*kind })
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Activation, Builder, Init, Mode, WeightLayout, differentiate};

    /// Layers of 3 columns by their activations; `tied` layers share their weight.
    fn model(layers: &[(Activation, f64)], tied: &[usize]) -> Vec<usize> {
        let mut b = Builder::new(Mode::Training, DType::F32);
        let mut x = b.input("x", [2, 3], DType::F32).unwrap();
        for (i, &(activation, p)) in layers.iter().enumerate() {
            let name = if tied.contains(&i) { "tied".to_string() } else { format!("w{i}") };
            x = b
                .layer(format!("{i}"), |b, _| {
                    let w = b.parameter(name, [3, 3], Init::Normal(1.0))?;
                    let y = b.linear(x, w, None, activation, WeightLayout::InOut)?;
                    let y = b.dropout(y, p)?;
                    b.add(x, y)
                })
                .unwrap();
        }
        let labels = b.input("labels", [2], DType::I32).unwrap();
        b.cross_entropy(x, labels).unwrap();
        let mut graph = b.finish().unwrap();
        differentiate(&mut graph).unwrap();
        alike(&graph, &ModelLayout::new(&graph))
    }

    #[test]
    fn the_same_ops_are_alike_whatever_their_streams() {
        use Activation::{GeluErf, Relu};
        let relu = (Relu, 0.1);
        // The first layer reads the batch, the second a layer's output; the last one has the loss.
        assert_eq!(model(&[relu; 6], &[]), [0, 1, 1, 1, 1, 5]);
        assert_eq!(model(&[relu, relu, (GeluErf, 0.1), relu, (Relu, 0.2), relu, relu], &[]), [0, 1, 2, 1, 4, 1, 6]);
        // Whose weight is shared is like nobody.
        assert_eq!(model(&[relu; 7], &[2, 4]), [0, 1, 2, 1, 4, 1, 6]);
    }
}
