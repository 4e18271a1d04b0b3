//! The loss in parts: logits over a large vocabulary are computed, used and discarded some rows at a time.
//!
//! Logits and their gradient are by far a language model's largest tensors: 3 GiB for 32 x 1024 tokens of GPT-2 in
//! bf16. So the product that computes them, the loss, its gradient and that product's two gradients run for some rows,
//! then for the next. Rows are independent except in the weight's gradient, to which the parts add in order. The number
//! of rows per part follows from shapes and type, or is set by the user, but never depends on the budget, so it changes
//! no bit from plan to plan.

use super::graph::{Graph, LossPart, Node, Source, Value, ValueInfo};
use super::kinds::Activation;
use super::op::Op;
use crate::base::{DType, Shape};
use std::collections::HashSet;

/// Number of columns from which on the logits are computed in parts.
const LARGE_VOCABULARY: usize = 8192;

/// A part's number of rows is a multiple of this, so that each part starts at an address aligned for 16-byte accesses.
const ROW_STEP: usize = 8;

/// Rows of a part. For each element, adding to the weight's gradient moves 8 bytes, and its product does 2 operations
/// per row. That is rows / 4 operations per byte, which must be well above the point where a device becomes
/// memory-bound: for an H200 some 180 in bf16 and 15 in f32.
fn rows_wanted(float: DType, cols: usize) -> usize {
    match float {
        _ if cols < LARGE_VOCABULARY => usize::MAX,
        DType::Bf16 => 2048,
        _ => 512,
    }
}

/// Splits the loss of a finished graph into even parts of at most [`Graph::loss_rows`] rows, in multiples of 8, where it
/// is the cross-entropy of a linear layer's output that nothing else reads. Call it last, after
/// [`super::differentiate`] where that is called.
pub fn split_loss(graph: &mut Graph) {
    let Some(Found { product, logits, backward }) = find(graph) else { return };
    let rows = graph.info(logits).shape.rows();
    let wanted = graph.loss_rows.unwrap_or_else(|| rows_wanted(graph.float, graph.info(logits).shape.cols())).max(1);
    if rows <= wanted {
        return;
    }
    let each = rows.div_ceil(rows.div_ceil(wanted)).next_multiple_of(ROW_STEP);
    let starts: Vec<usize> = (0..rows).step_by(each).collect();
    if starts.len() == 1 {
        return;
    }
    let mut old = std::mem::take(&mut graph.nodes);
    let after = old.split_off(graph.forward_nodes + backward);
    let gradient = old.split_off(graph.forward_nodes);
    let sum = old.pop();
    let forward = old.split_off(product);
    graph.nodes = old;
    let mut parts: Vec<Part> =
        starts.iter().map(|&start| Part { rows, start, end: rows.min(start + each), own: Vec::new() }).collect();
    let mut ranges = vec![LossPart { forward: 0..0, backward: 0..0 }; parts.len()];
    for (part, range) in parts.iter_mut().zip(&mut ranges) {
        range.forward = part.push(graph, &forward);
    }
    graph.nodes.extend(sum);
    graph.forward_nodes = graph.nodes.len();
    for (part, range) in parts.iter_mut().zip(&mut ranges) {
        range.backward = part.push(graph, &gradient);
    }
    graph.nodes.extend(after);
    graph.loss_parts = ranges;
    graph.logits = None;
    renumber(graph);
}

/// The nodes of a loss that can be split.
struct Found {
    /// Index of the linear layer: the last forward nodes are this layer, the rows' losses and their sum.
    product: usize,
    logits: Value,
    /// Number of nodes at the start of the backward pass that are the loss' gradient and the linear layer's gradients.
    backward: usize,
}

fn find(graph: &Graph) -> Option<Found> {
    let product = graph.forward_nodes.checked_sub(3)?;
    let [linear, losses, sum] = &graph.nodes[product..graph.forward_nodes] else { return None };
    const PLAIN: Activation = Activation::None;
    let logits = *linear.outputs.first()?;
    let is_product = matches!(linear.op, Op::Linear { activation: PLAIN, residual: false, .. });
    let is_loss = losses.op == Op::CrossEntropy && losses.inputs[0] == logits && sum.op == Op::LossSum;
    if !is_product || !is_loss || graph.loss != sum.outputs.first().copied() {
        return None;
    }
    // Every reader of the logits, or of their gradient, has to be among the nodes split.
    let readers = |of: Value| {
        let reads = move |node: &&Node| node.inputs.iter().any(|&v| graph.root(v) == of);
        graph.nodes.iter().filter(reads).count()
    };
    let backward = &graph.nodes[graph.forward_nodes..];
    let Some(first) = backward.first() else {
        return (readers(logits) == 1).then_some(Found { product, logits, backward: 0 });
    };
    let d_logits = (first.op == Op::CrossEntropyGrad && first.inputs[0] == logits).then(|| first.outputs[0])?;
    let gradients = backward[1..].iter().take_while(|node| match node.op {
        Op::LinearGradWeight { .. } => node.inputs[1] == d_logits,
        Op::LinearGradInput { .. } => node.inputs[0] == d_logits,
        _ => false,
    });
    let gradients = gradients.count();
    let alone = readers(logits) == 2 && readers(d_logits) == gradients;
    alone.then_some(Found { product, logits, backward: 1 + gradients })
}

/// Some rows.
struct Part {
    /// Rows of the whole logits.
    rows: usize,
    start: usize,
    end: usize,
    /// Pairs of a whole tensor and the part's own tensor: logits and their gradient.
    own: Vec<(Value, Value)>,
}

impl Part {
    /// Appends `nodes` for these rows and returns where they are.
    fn push(&mut self, graph: &mut Graph, nodes: &[Node]) -> std::ops::Range<usize> {
        let from = graph.nodes.len();
        for node in nodes {
            let Node { layer, .. } = *node;
            let op = match node.op {
                Op::LinearGradWeight { layout, bias, .. } => {
                    Op::LinearGradWeight { layout, bias, adds: self.start > 0 }
                }
                ref other => other.clone(),
            };
            let is_own = |output: usize| matches!(op, Op::Linear { .. } | Op::CrossEntropyGrad) && output == 0;
            let inputs = node.inputs.iter().enumerate().map(|(i, &v)| self.input(graph, &op, i, v)).collect();
            let outputs: Vec<Value> = node
                .outputs
                .iter()
                .enumerate()
                .map(|(i, &v)| match op {
                    _ if is_own(i) => self.add_own(graph, v),
                    // Parameters' gradients.
                    Op::LinearGradWeight { .. } => v,
                    _ => self.some_rows(graph, v),
                })
                .collect();
            graph.nodes.push(Node { op, inputs, outputs, layer });
        }
        from..graph.nodes.len()
    }

    fn input(&self, graph: &mut Graph, op: &Op, operand: usize, value: Value) -> Value {
        if let Some(&(_, own)) = self.own.iter().find(|(whole, _)| *whole == value) {
            return own;
        }
        let is_parameter = match op {
            Op::Linear { .. } => operand > 0,
            Op::LinearGradInput { .. } => operand == 1,
            _ => false,
        };
        if is_parameter { value } else { self.some_rows(graph, value) }
    }

    /// A tensor of its own with this part's rows of `whole`.
    fn add_own(&mut self, graph: &mut Graph, whole: Value) -> Value {
        let ValueInfo { shape, dtype, source } = graph.info(whole).clone();
        let shape = Shape::from([self.end - self.start, shape.cols()]);
        let own = push_value(graph, ValueInfo { shape, dtype, source });
        self.own.push((whole, own));
        own
    }

    /// A view of these rows of `whole`, which has a row, or one element, for each row of the logits.
    fn some_rows(&self, graph: &mut Graph, whole: Value) -> Value {
        let ValueInfo { shape, dtype, source } = graph.info(whole).clone();
        let cols = shape.elems() / self.rows;
        let rows = self.end - self.start;
        let shape = if shape.cols() == cols { Shape::from([rows, cols]) } else { Shape::from([rows]) };
        let before = if let Source::View { first, .. } = source { first } else { 0 };
        let source = Source::View { of: graph.root(whole), first: before + self.start * cols };
        push_value(graph, ValueInfo { shape, dtype, source })
    }
}

fn push_value(graph: &mut Graph, info: ValueInfo) -> Value {
    graph.values.push(info);
    Value(graph.values.len() as u32 - 1)
}

/// Updates each value's producing node; for values computed in parts, the first part's.
fn renumber(graph: &mut Graph) {
    let mut seen = HashSet::new();
    for (node, of) in graph.nodes.iter().enumerate() {
        for (output, &value) in of.outputs.iter().enumerate() {
            let root = match graph.values[value.0 as usize].source {
                Source::View { of, .. } => of,
                _ => value,
            };
            if seen.insert(root) {
                graph.values[root.0 as usize].source = Source::Node { node, output };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Result;
    use crate::graph::{
        Area, Builder, Init, Kind, Mode, ModelLayout, Program, ShardLayout, WeightLayout, differentiate,
    };

    /// `rows` tokens of a table of 6 columns, and a head over `classes` with a bias.
    fn graph(mode: Mode, [rows, classes]: [usize; 2], loss_rows: Option<usize>, frozen: &[&str]) -> Graph {
        let mut b = Builder::new(mode, DType::F32);
        let ids = b.input("ids", [rows], DType::I32).unwrap();
        b.layer("table", |b, _| {
            let table = b.parameter("table", [9, 6], Init::Normal(1.0))?;
            b.embedding(ids, table)
        })
        .unwrap();
        let head = |b: &mut Builder, x: Option<Value>| -> Result<Value> {
            let weight = b.parameter("weight", [6, classes], Init::Normal(1.0))?;
            let bias = b.parameter("bias", [classes], Init::Normal(1.0))?;
            b.linear(x.expect("the table"), weight, Some(bias), Activation::None, WeightLayout::InOut)
        };
        let logits = b.layer("head", head).unwrap();
        let labels = b.input("labels", [rows], DType::I32).unwrap();
        b.cross_entropy(logits, labels).unwrap();
        let mut graph = b.finish().unwrap();
        graph.loss_rows = loss_rows;
        graph.freeze(|name| frozen.contains(&name));
        if mode == Mode::Training {
            differentiate(&mut graph).unwrap();
        }
        split_loss(&mut graph);
        graph
    }

    fn program(graph: &Graph, kind: Kind) -> Program {
        let layout = ModelLayout::new(graph);
        let shard = ShardLayout::new(graph, &layout, 1..2);
        Program::new(graph, &layout, &shard, kind)
    }

    fn names(program: &Program) -> Vec<&'static str> {
        program.steps.iter().map(|step| step.op.name()).collect()
    }

    #[test]
    fn a_part_is_done_before_the_next_begins() {
        const PART: [&str; 4] = ["linear", "cross_entropy_grad", "linear_grad_weight", "linear_grad_input"];
        let graph = graph(Mode::Training, [20, 7], Some(8), &[]);
        let last = program(&graph, Kind::Last { recompute: false });
        assert_eq!(names(&last), [&PART[..], &PART, &PART, &["loss_sum"]].concat());
        let again = program(&graph, Kind::Last { recompute: true });
        let forward = &["linear", "cross_entropy"][..];
        let both = [forward, forward, forward, &["loss_sum"], &PART, &PART, &PART].concat();
        assert_eq!(names(&again), both);
        let adds: Vec<bool> = last
            .steps
            .iter()
            .filter_map(|step| if let Op::LinearGradWeight { adds, .. } = step.op { Some(adds) } else { None })
            .collect();
        assert_eq!(adds, [false, true, true]);
        for step in last.steps.iter().filter(|step| step.op == Op::CrossEntropyGrad) {
            assert_eq!(step.outputs[0].as_ref(), Some(&step.inputs[0]), "over the logits");
            assert!(step.outputs[1].is_some(), "with the losses of rows");
        }
        let ends = last.steps.iter().filter(|step| step.ends_layer).map(|step| step.op.name());
        assert_eq!(ends.collect::<Vec<_>>(), ["linear"; 3]);
        let x: Vec<u64> =
            last.steps.iter().filter(|step| step.op.name() == "linear").map(|step| step.inputs[0].offset).collect();
        assert_eq!(x, [0, 8 * 6 * 4, 16 * 6 * 4]);
        assert_eq!((last.bytes(Area::ActivationIn), last.bytes(Area::GradientOut)), (20 * 6 * 4, 20 * 6 * 4));
    }

    #[test]
    fn the_workspace_holds_one_part() {
        let whole = |graph: &Graph| program(graph, Kind::Last { recompute: false }).bytes(Area::Workspace);
        let [one, four] = [None, Some(16)].map(|rows| whole(&graph(Mode::Training, [64, 100], rows, &[])));
        let losses = 64 * 4;
        assert_eq!((one, four), (64 * 400 + losses, 16 * 400 + losses));
        let forward = |graph: &Graph| program(graph, Kind::Forward { keep: false }).bytes(Area::Workspace);
        let [one, four] = [None, Some(16)].map(|rows| forward(&graph(Mode::Evaluation, [64, 100], rows, &[])));
        assert_eq!((one, four), (64 * 400 + losses, 16 * 400 + losses));
    }

    #[test]
    fn parts_are_even_and_follow_from_the_vocabulary() {
        let parts = |sizes, rows| graph(Mode::Training, sizes, rows, &[]).loss_parts.len();
        assert_eq!(parts([512, 8192], None), 0);
        assert_eq!(parts([513, 8192], None), 2);
        assert_eq!(parts([5000, 8191], None), 0);
        assert_eq!(parts([9, 3], Some(8)), 2);
        assert_eq!(parts([17, 3], Some(10)), 2);
        assert_eq!(parts([16, 3], Some(1)), 2);
        assert_eq!(parts([8, 3], Some(5)), 0);
        assert_eq!(rows_wanted(DType::Bf16, 50_257), 2048);
    }

    #[test]
    fn frozen_weights_have_no_gradient_in_any_part() {
        let graph = graph(Mode::Training, [20, 7], Some(8), &["weight", "bias"]);
        let names = names(&program(&graph, Kind::Last { recompute: false }));
        assert_eq!(names.iter().filter(|name| **name == "linear_grad_input").count(), 3);
        assert!(!names.contains(&"linear_grad_weight"));
    }

    /// Without a gradient there are forward parts alone.
    #[test]
    fn an_evaluation_has_parts_too() {
        let graph = graph(Mode::Evaluation, [20, 7], Some(8), &[]);
        let names = names(&program(&graph, Kind::Forward { keep: false }));
        assert_eq!(
            names,
            ["linear", "cross_entropy", "linear", "cross_entropy", "linear", "cross_entropy", "loss_sum"]
        );
    }

    #[test]
    fn logits_that_others_read_stay_whole() {
        let mut b = Builder::new(Mode::Training, DType::F32);
        let x = b.input("x", [20, 6], DType::F32).unwrap();
        let logits = b.layer("head", |b, _| {
            let weight = b.parameter("weight", [6, 7], Init::Normal(1.0))?;
            let y = b.linear(x, weight, None, Activation::None, WeightLayout::InOut)?;
            b.activation(y, Activation::Relu)
        });
        let labels = b.input("labels", [20], DType::I32).unwrap();
        b.cross_entropy(logits.unwrap(), labels).unwrap();
        let mut graph = b.finish().unwrap();
        graph.loss_rows = Some(8);
        differentiate(&mut graph).unwrap();
        let before = graph.nodes.len();
        split_loss(&mut graph);
        assert!(graph.loss_parts.is_empty() && graph.nodes.len() == before && graph.logits.is_some());
    }
}
