//! How a program is cut out of a graph: which nodes run, what is recomputed, and where each tensor lies.
//!
//! Slicing never changes an op, so a cut never changes a bit. A tensor that is also read or written outside the unit
//! has a fixed place; the others share the workspace according to their lifetimes (see `place`), and an output may take
//! over the buffer of an input whose last use is the same step.

use super::cost::{Cost, Family, cost};
use super::graph::{Graph, ParameterGradient, Source, Value};
use super::layout::{ModelLayout, ShardLayout};
use super::loss_step::join_loss_steps;
use super::op::Op;
use super::padding::{padded, padded_cols};
use super::place::{ALIGNMENT, Lifetime, place};
use super::program::{AREAS, Area, Buffer, Kind, Program, Step, UsedInput};
use super::scratch::scratch_bytes;
use crate::base::{DType, Shape, align_up};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

impl Program {
    /// Makes the program of `kind` for the shard with the layout `shard`.
    ///
    /// # Panics
    /// When `kind` does not fit the graph, such as a backward without a gradient.
    pub fn new(graph: &Graph, model: &ModelLayout, shard: &ShardLayout, kind: Kind) -> Program {
        Slice::new(graph, model, shard, kind).program()
    }
}

/// One computation of a value: a recomputed value is another instance.
type Instance = (Value, u8);

/// The nodes that a program runs, and where it finds its tensors.
struct Slice<'a> {
    graph: &'a Graph,
    model: &'a ModelLayout,
    shard: &'a ShardLayout,
    kind: Kind,
    /// Nodes to run, each with the instance of the values that it reads and writes.
    sequence: Vec<(usize, u8)>,
    saved: HashMap<Value, u64>,
    /// Where in the shard's gradients each parameter's gradient is accumulated.
    gradients: HashMap<Value, u64>,
    inputs: Vec<UsedInput>,
    /// Values that get [`padded_cols`] columns where they lie in the workspace.
    padded: HashSet<Value>,
}

impl<'a> Slice<'a> {
    fn new(graph: &'a Graph, model: &'a ModelLayout, shard: &'a ShardLayout, kind: Kind) -> Self {
        let layers = shard.layers.clone();
        let (forward, backward) = (graph.forward_of(layers.clone()), graph.backward_of(layers.clone()));
        let accumulator = |g: &ParameterGradient| {
            let offset = shard.gradient(model, g.parameter, g.layer).expect("each use has an accumulator");
            (g.value, offset)
        };
        let mut slice = Slice {
            graph,
            model,
            shard,
            kind,
            sequence: Vec::new(),
            saved: HashMap::new(),
            gradients: graph.gradients_of(layers).iter().map(accumulator).collect(),
            inputs: Vec::new(),
            padded: padded(graph),
        };
        let whole = matches!(kind, Kind::Backward { whole: true, .. } | Kind::Last { recompute: true });
        let needed = slice.needed_again(forward.clone(), backward.clone(), whole);
        match kind {
            Kind::Forward { .. } => slice.sequence.extend(forward.clone().map(|n| (n, 0))),
            Kind::Backward { kept, .. } => {
                if !kept {
                    slice.sequence.extend(needed.iter().map(|&n| (n, 0)));
                }
                slice.sequence.extend(backward.clone().map(|n| (n, 0)));
            }
            Kind::Last { recompute } => {
                slice.sequence.extend(forward.clone().map(|n| (n, 0)));
                let (from, again) = if recompute { (slice.sequence.len(), 1) } else { (0, 0) };
                if recompute {
                    slice.sequence.extend(needed.iter().map(|&n| (n, 1)));
                }
                let forward = slice.sequence.split_off(from);
                slice.sequence.extend(part_by_part(graph, &forward, backward.clone()).map(|n| (n, again)));
            }
        }
        if matches!(kind, Kind::Forward { keep: true } | Kind::Backward { kept: true, .. }) {
            slice.place_saved(forward, backward);
        }
        slice
    }

    /// The forward nodes that must be recomputed for `backward`, in order; with `whole`, all but the loss.
    fn needed_again(&self, forward: Range<usize>, backward: Range<usize>, whole: bool) -> Vec<usize> {
        let mut wanted = self.read_by(backward);
        let mut needed = Vec::new();
        for n in forward.rev() {
            let node = &self.graph.nodes[n];
            let is_loss = self.graph.loss.is_some_and(|loss| node.outputs.contains(&loss));
            let is_wanted = node.outputs.iter().any(|&v| wanted.contains(&self.graph.root(v))) || whole && !is_loss;
            if !node.op.has_side_effect() && is_wanted {
                wanted.extend(node.inputs.iter().map(|&v| self.graph.root(v)));
                needed.push(n);
            }
        }
        needed.reverse();
        needed
    }

    /// Assigns an offset in the saved area to each value that passes from forward to backward.
    fn place_saved(&mut self, forward: Range<usize>, backward: Range<usize>) {
        let read = self.read_by(backward);
        let mut end = 0;
        for n in forward {
            for value in self.graph.nodes[n].outputs.iter().map(|&v| self.graph.root(v)) {
                if read.contains(&value) && !self.saved.contains_key(&value) {
                    self.saved.insert(value, end);
                    end += align_up(self.graph.bytes(value), ALIGNMENT);
                }
            }
        }
    }

    /// The values that some of `nodes` read.
    fn read_by(&self, nodes: Range<usize>) -> HashSet<Value> {
        self.graph.nodes[nodes].iter().flat_map(|node| &node.inputs).map(|&v| self.graph.root(v)).collect()
    }

    /// Where a value lies outside the workspace, if it does.
    fn fixed(&mut self, (value, instance): Instance) -> Option<(Area, u64)> {
        let (graph, layers) = (self.graph, self.shard.layers.clone());
        match graph.info(value).source {
            Source::Parameter(p) => {
                let offset = self.shard.weight(self.model, p).expect("a shard's layout holds what its layers use");
                return Some((Area::Weights, offset));
            }
            Source::State(s) => return Some((Area::States, self.model.state[s] - self.shard.states.start)),
            Source::Input(i) => return Some((Area::Inputs, self.input(i))),
            Source::View { .. } => unreachable!("places are asked for roots"),
            Source::Node { .. } => {}
        }
        let root = |v: Option<Value>| v.map(|v| graph.root(v));
        if root(graph.layers[layers.start].input) == Some(value) {
            return Some((Area::ActivationIn, 0));
        }
        let last = layers.end == graph.layers.len();
        if matches!(self.kind, Kind::Forward { .. }) && root(graph.layers[layers.end - 1].output) == Some(value) {
            return Some((Area::ActivationOut, 0));
        }
        if graph.loss == Some(value) && instance == 0 {
            return Some((Area::Results, 0));
        }
        if let Some(&offset) = self.saved.get(&value) {
            return Some((Area::Saved, offset));
        }
        if graph.input_gradients.is_empty() {
            return None;
        }
        if !last && graph.input_gradients[layers.end] == Some(value) {
            return Some((Area::GradientIn, 0));
        }
        if graph.input_gradients[layers.start] == Some(value) {
            return Some((Area::GradientOut, 0));
        }
        self.gradients.get(&value).map(|&offset| (Area::Gradients, offset))
    }

    /// Offset of an input of the batch, assigned at the first call for it.
    fn input(&mut self, input: usize) -> u64 {
        if let Some(used) = self.inputs.iter().find(|u| u.input == input) {
            return used.offset;
        }
        let offset = self.inputs.last().map_or(0, |u| align_up(u.offset + u.bytes, ALIGNMENT));
        self.inputs.push(UsedInput { input, offset, bytes: self.graph.bytes(self.graph.inputs[input].value) });
        offset
    }

    fn program(mut self) -> Program {
        let sequence = std::mem::take(&mut self.sequence);
        let read_later = last_reads(self.graph, &sequence);
        let mut workspace = Workspace::default();
        let mut fixed: HashMap<Instance, (Area, u64)> = HashMap::new();
        let mut swapped = HashSet::new();
        for (at, &(n, instance)) in sequence.iter().enumerate() {
            let node = &self.graph.nodes[n];
            for &value in &node.inputs {
                let key = (self.graph.root(value), instance);
                match self.fixed(key) {
                    Some(place) => _ = fixed.insert(key, place),
                    None => workspace.read(key, at),
                }
            }
            for (output, &value) in node.outputs.iter().enumerate() {
                let key = (self.graph.root(value), instance);
                if node.op.output_is_optional(output)
                    && !read_later.contains_key(&key)
                    && !self.saved.contains_key(&key.0)
                {
                    continue;
                }
                if let Some(place) = self.fixed(key) {
                    fixed.insert(key, place);
                    continue;
                }
                let whole = output == 0 && key.0 == value;
                let over = whole.then(|| self.dying_input(&workspace, &read_later, n, instance, at)).flatten();
                match over {
                    Some((key_in, operand)) => {
                        if operand == 1 {
                            swapped.insert(at);
                        }
                        workspace.take_over(key, key_in, at);
                    }
                    None => workspace.write(key, self.room(key.0), at),
                }
            }
        }
        let scratch: Vec<Option<(usize, u64)>> = sequence
            .iter()
            .enumerate()
            .map(|(at, &(n, _))| {
                let bytes =
                    if self.graph.scratch { align_up(scratch_bytes(self.graph, &self.graph.nodes[n]), 4) } else { 0 };
                (bytes > 0).then(|| (workspace.reserve(bytes, at), bytes))
            })
            .collect();
        let (offsets, _) = place(&workspace.buffers);
        let locate = |value: Value, instance: u8| -> Option<Buffer> {
            let key = (self.graph.root(value), instance);
            let (area, offset) =
                fixed.get(&key).copied().or_else(|| workspace.of.get(&key).map(|&b| (Area::Workspace, offsets[b])))?;
            let info = self.graph.info(value);
            let first = if let Source::View { first, .. } = info.source { first as u64 } else { 0 };
            let buffer = Buffer::new(area, offset + first * info.dtype.bytes(), info.shape.clone(), info.dtype);
            let padded = area == Area::Workspace && self.padded.contains(&key.0);
            let pitch = if padded { padded_cols(buffer.pitch) } else { buffer.pitch };
            Some(Buffer { pitch, ..buffer })
        };
        let mut steps: Vec<Step> = sequence
            .iter()
            .enumerate()
            .map(|(at, &(n, instance))| {
                let node = &self.graph.nodes[n];
                let mut inputs: Vec<Buffer> = node
                    .inputs
                    .iter()
                    .map(|&v| locate(v, instance).expect("an input is written before it is read"))
                    .collect();
                if swapped.contains(&at) {
                    inputs.swap(0, 1);
                }
                Step {
                    op: node.op.clone(),
                    layer: node.layer,
                    inputs,
                    outputs: node.outputs.iter().map(|&v| locate(v, instance)).collect(),
                    scratch: scratch[at].map(|(buffer, bytes)| {
                        Buffer::new(Area::Workspace, offsets[buffer], Shape::from([bytes as usize / 4]), DType::I32)
                    }),
                    cost: cost(self.graph, node),
                    ends_layer: n < self.graph.forward_nodes && instance == 0 && self.ends_layer(n),
                }
            })
            .collect();
        self.save_handed_on(&mut steps);
        join_loss_steps(&mut steps);
        let mut area_bytes = [0; AREAS];
        for step in &steps {
            for buffer in step.inputs.iter().chain(step.outputs.iter().flatten()).chain(&step.scratch) {
                let end = &mut area_bytes[buffer.area as usize];
                *end = (*end).max(buffer.offset + buffer.bytes());
            }
        }
        Program::of_steps(steps, area_bytes, self.inputs, self.graph.tf32)
    }

    /// Bytes of a value in the workspace.
    fn room(&self, value: Value) -> u64 {
        let info = self.graph.info(value);
        match self.padded.contains(&value) {
            true => (info.shape.rows() * padded_cols(info.shape.cols())) as u64 * info.dtype.bytes(),
            false => self.graph.bytes(value),
        }
    }

    /// An input of node `n` whose last use is step `at` and that output 0 may overwrite, with its operand number.
    fn dying_input(
        &self,
        workspace: &Workspace,
        read_later: &HashMap<Instance, usize>,
        n: usize,
        instance: u8,
        at: usize,
    ) -> Option<(Instance, usize)> {
        let node = &self.graph.nodes[n];
        let first = node.op.in_place_input(node.inputs.len())?;
        // The host writes a product before it reads the value that joins it, so this would only cost a copy.
        if matches!(node.op, Op::Linear { .. } | Op::LinearGradInput { .. }) && !self.graph.scratch {
            return None;
        }
        let operands: &[usize] = if node.op == Op::Add { &[0, 1] } else { &[first] };
        operands.iter().copied().find_map(|operand| {
            let root = self.graph.root(node.inputs[operand]);
            let key = (root, instance);
            let alone = node.inputs.iter().filter(|&&v| self.graph.root(v) == root).count() == 1;
            let dies = read_later.get(&key) == Some(&at);
            let fits = self.room(root) == self.room(node.outputs[0]);
            (alone && dies && fits && workspace.of.contains_key(&key)).then_some((key, operand))
        })
    }

    fn ends_layer(&self, n: usize) -> bool {
        let node = &self.graph.nodes[n];
        let layer = &self.graph.layers[node.layer];
        let ends = layer.output.or(self.graph.logits).map(|v| self.graph.root(v));
        let ends_part = self.graph.loss_parts.iter().any(|part| part.forward.start == n);
        ends_part || node.outputs.first().is_some_and(|&v| Some(v) == ends)
    }

    /// Copies the boundary activation into the saved area if backward reads it too.
    fn save_handed_on(&self, steps: &mut Vec<Step>) {
        let Kind::Forward { keep: true } = self.kind else { return };
        let Some(output) = self.graph.layers[self.shard.layers.end - 1].output.map(|v| self.graph.root(v)) else {
            return;
        };
        let Some(&offset) = self.saved.get(&output) else { return };
        let info = self.graph.info(output);
        let from = Buffer::new(Area::ActivationOut, 0, info.shape.clone(), info.dtype);
        let to = Buffer { area: Area::Saved, offset, ..from.clone() };
        let bytes = 2 * from.bytes();
        let elems = from.shape.elems() as u64;
        steps.push(Step {
            op: Op::Copy,
            layer: self.shard.layers.end - 1,
            inputs: vec![from],
            outputs: vec![Some(to)],
            scratch: None,
            cost: Cost {
                flops: 0.0,
                bytes,
                family: Family::Memory,
                float: self.graph.float,
                tf32: false,
                elems,
                sizes: [bytes as usize, 1, 1],
            },
            ends_layer: false,
        });
    }
}

/// The nodes of `forward` and then those of `backward`, except that a loss' gradient follows it immediately, and each
/// part of the loss runs its backward nodes right after its forward ones.
fn part_by_part(graph: &Graph, forward: &[(usize, u8)], backward: Range<usize>) -> impl Iterator<Item = usize> {
    let mut order = Vec::with_capacity(forward.len() + backward.len());
    let mut rest = backward.clone();
    for &(n, _) in forward {
        order.push(n);
        if let Some(part) = graph.loss_parts.iter().find(|part| part.forward.end == n + 1) {
            order.extend(part.backward.clone());
            rest.start = part.backward.end;
        } else if graph.nodes[n].op == Op::CrossEntropy && !rest.is_empty() {
            order.push(rest.start);
            rest.start += 1;
        }
    }
    order.extend(rest);
    order.into_iter()
}

/// For each instance of a value that is read, the last step that reads it.
fn last_reads(graph: &Graph, sequence: &[(usize, u8)]) -> HashMap<Instance, usize> {
    let mut last = HashMap::new();
    for (at, &(n, instance)) in sequence.iter().enumerate() {
        for &value in &graph.nodes[n].inputs {
            last.insert((graph.root(value), instance), at);
        }
    }
    last
}

/// Buffers of the workspace and their lifetimes.
#[derive(Default)]
struct Workspace {
    buffers: Vec<Lifetime>,
    of: HashMap<Instance, usize>,
}

impl Workspace {
    /// Records that a step writes a value. Where a value is written in parts, or added to, the first step makes the
    /// buffer.
    fn write(&mut self, key: Instance, bytes: u64, at: usize) {
        if self.of.contains_key(&key) {
            return self.read(key, at);
        }
        self.of.insert(key, self.buffers.len());
        self.buffers.push(Lifetime { bytes, first: at, last: at });
    }

    /// A buffer for step `at` alone.
    fn reserve(&mut self, bytes: u64, at: usize) -> usize {
        self.buffers.push(Lifetime { bytes, first: at, last: at });
        self.buffers.len() - 1
    }

    fn read(&mut self, key: Instance, at: usize) {
        let buffer = *self.of.get(&key).expect("a value is written before it is read");
        self.buffers[buffer].last = at;
    }

    fn take_over(&mut self, key: Instance, from: Instance, at: usize) {
        let buffer = self.of[&from];
        self.buffers[buffer].last = at;
        self.of.insert(key, buffer);
    }
}
