//! Where parameters and running statistics lie: one flat order for the whole model, so that a shard is a contiguous
//! range.
//!
//! Invariant: the flat order depends on the model alone, never on the cut. Parameters are ordered by the layer that
//! owns them (the first that uses them), then by first use; the frozen ones, which no shard owns, come after all
//! others. Every tensor starts at a multiple of [`ALIGNMENT`](super::ALIGNMENT); padding bytes are 0. Even an empty
//! parameter takes [`ALIGNMENT`](super::ALIGNMENT) bytes, so that a start belongs to one parameter and one shard.
//!
//! Gradients and moments, which have an element for each of a weight's, lie in the same order; where their elements are
//! wider, every offset is the weight's times [`ModelLayout::wide_ratio`].

use super::graph::Graph;
use super::place::ALIGNMENT;
use crate::base::align_up;
use std::ops::Range;

/// The flat order of a model's parameters, in bytes of the graph's float type, and of its states, in bytes of the wide
/// one.
#[derive(Clone, Debug)]
pub struct ModelLayout {
    /// Parameters that are trained, in flat order.
    pub order: Vec<usize>,
    /// Those of them that several layers use, in the graph's order.
    pub shared: Vec<usize>,
    /// Parameters that are not trained, in the graph's order.
    pub frozen: Vec<usize>,
    /// Start of each parameter, by its index in the graph.
    pub parameter: Vec<u64>,
    /// Range of the trained parameters that each layer owns.
    pub layers: Vec<Range<u64>>,
    /// Bytes of all parameters that are trained.
    pub parameter_bytes: u64,
    /// Range of the frozen parameters that each layer is the first to use.
    pub frozen_layers: Vec<Range<u64>>,
    /// Bytes of all parameters, frozen ones included.
    pub weight_bytes: u64,
    /// Start of each state, by its index in the graph.
    pub state: Vec<u64>,
    /// Range of the states that each layer owns.
    pub state_layers: Vec<Range<u64>>,
    /// Bytes of all states.
    pub state_bytes: u64,
    /// Bytes of a gradient's or a moment's element divided by those of a weight's: 2 for bf16 weights, else 1.
    pub wide_ratio: u64,
}

impl ModelLayout {
    /// Lays out a model.
    pub fn new(graph: &Graph) -> Self {
        let mut layout = ModelLayout {
            order: Vec::new(),
            shared: (0..graph.parameters.len())
                .filter(|&p| !graph.parameters[p].frozen && graph.parameters[p].layers.len() > 1)
                .collect(),
            frozen: (0..graph.parameters.len()).filter(|&p| graph.parameters[p].frozen).collect(),
            parameter: vec![0; graph.parameters.len()],
            layers: Vec::new(),
            parameter_bytes: 0,
            frozen_layers: Vec::new(),
            weight_bytes: 0,
            state: vec![0; graph.states.len()],
            state_layers: Vec::new(),
            state_bytes: 0,
            wide_ratio: graph.float.wide().bytes() / graph.float.bytes(),
        };
        for layer in 0..graph.layers.len() {
            let start = layout.parameter_bytes;
            for (i, p) in graph.parameters.iter().enumerate().filter(|(_, p)| p.layers[0] == layer && !p.frozen) {
                layout.order.push(i);
                layout.parameter[i] = layout.parameter_bytes;
                layout.parameter_bytes += align_up(graph.bytes(p.value).max(1), ALIGNMENT);
            }
            layout.layers.push(start..layout.parameter_bytes);
            let start = layout.state_bytes;
            for (i, s) in graph.states.iter().enumerate().filter(|(_, s)| s.layer == layer) {
                layout.state[i] = layout.state_bytes;
                layout.state_bytes += align_up(graph.bytes(s.value), ALIGNMENT);
            }
            layout.state_layers.push(start..layout.state_bytes);
        }
        layout.weight_bytes = layout.parameter_bytes;
        for layer in 0..graph.layers.len() {
            let start = layout.weight_bytes;
            for (i, p) in graph.parameters.iter().enumerate().filter(|(_, p)| p.layers[0] == layer && p.frozen) {
                layout.parameter[i] = layout.weight_bytes;
                layout.weight_bytes += align_up(graph.bytes(p.value).max(1), ALIGNMENT);
            }
            layout.frozen_layers.push(start..layout.weight_bytes);
        }
        layout
    }
}

/// A use of a shared parameter outside its owner's layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedUse {
    /// Index of the parameter.
    pub parameter: usize,
    /// The layer that uses it.
    pub layer: usize,
    /// Start of this use's gradient accumulator in the shard's gradients, in bytes of these.
    pub gradient: u64,
    /// Start of a copy of the weight in the shard's weights; `None` where the shard owns the parameter.
    pub borrowed: Option<u64>,
}

/// How one shard's weights, states and gradients lie on a device.
///
/// Weights are the shard's own range of the flat order, then copies of the parameters it borrows from other shards,
/// then the frozen parameters that its layers use. Gradients are those of its own range, then an accumulator for every
/// further use of a shared parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardLayout {
    /// The shard's layers.
    pub layers: Range<usize>,
    /// Its own range of the model's parameters.
    pub own: Range<u64>,
    /// Its own range of the model's states.
    pub states: Range<u64>,
    /// Uses of shared parameters by layers that do not own them, in the order of layers.
    pub shared: Vec<SharedUse>,
    /// Frozen parameters that its layers use, each with its start in the shard's weights.
    pub frozen: Vec<(usize, u64)>,
    /// Bytes of weights, borrowed and frozen ones included.
    pub weight_bytes: u64,
    /// Bytes of gradients, shared uses included.
    pub gradient_bytes: u64,
}

impl ShardLayout {
    /// The layout of the shard that holds `layers`.
    pub fn new(graph: &Graph, model: &ModelLayout, layers: Range<usize>) -> Self {
        let own = model.layers[layers.start].start..model.layers[layers.end - 1].end;
        let states = model.state_layers[layers.start].start..model.state_layers[layers.end - 1].end;
        let mut shard = ShardLayout {
            weight_bytes: own.end - own.start,
            gradient_bytes: (own.end - own.start) * model.wide_ratio,
            layers: layers.clone(),
            own,
            states,
            shared: Vec::new(),
            frozen: Vec::new(),
        };
        for layer in layers.clone() {
            for (parameter, p) in model.shared.iter().map(|&p| (p, &graph.parameters[p])) {
                if p.layers[0] == layer || !p.layers.contains(&layer) {
                    continue;
                }
                let bytes = align_up(graph.bytes(p.value), ALIGNMENT);
                let before = shard.shared.iter().find(|u| u.parameter == parameter).and_then(|u| u.borrowed);
                let borrowed = if layers.contains(&p.layers[0]) {
                    None
                } else if before.is_some() {
                    before
                } else {
                    shard.weight_bytes += bytes;
                    Some(shard.weight_bytes - bytes)
                };
                shard.shared.push(SharedUse { parameter, layer, gradient: shard.gradient_bytes, borrowed });
                shard.gradient_bytes += bytes * model.wide_ratio;
            }
        }
        // Ordered by the first of these layers that uses each.
        let first_use = |&i: &usize| Some((*graph.parameters[i].layers.iter().find(|l| layers.contains(l))?, i));
        let mut frozen: Vec<(usize, usize)> = model.frozen.iter().filter_map(first_use).collect();
        frozen.sort_unstable();
        for (_, i) in frozen {
            shard.frozen.push((i, shard.weight_bytes));
            shard.weight_bytes += align_up(graph.bytes(graph.parameters[i].value).max(1), ALIGNMENT);
        }
        shard
    }

    /// Start of a parameter in the shard's weights.
    pub fn weight(&self, model: &ModelLayout, parameter: usize) -> Option<u64> {
        let at = model.parameter[parameter];
        if self.own.contains(&at) {
            return Some(at - self.own.start);
        }
        if let Some(&(_, at)) = self.frozen.iter().find(|&&(frozen, _)| frozen == parameter) {
            return Some(at);
        }
        self.shared.iter().find(|u| u.parameter == parameter)?.borrowed
    }

    /// Start of the accumulator of one layer's use of a parameter in the shard's gradients.
    pub fn gradient(&self, model: &ModelLayout, parameter: usize, layer: usize) -> Option<u64> {
        if let Some(shared) = self.shared.iter().find(|u| u.parameter == parameter && u.layer == layer) {
            return Some(shared.gradient);
        }
        let at = model.parameter[parameter];
        self.own.contains(&at).then(|| (at - self.own.start) * model.wide_ratio)
    }
}
