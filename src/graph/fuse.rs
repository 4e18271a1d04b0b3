//! Fusion: a linear layer's product and the elementwise op that is its only reader become one op, which saves a pass
//! over memory.
//!
//! A pair lies within one layer, and whether it is fused depends on that layer alone, so a cut between any two layers
//! computes the same bits.

use super::graph::{Graph, Node, Source, Value};
use super::kinds::Activation;
use super::op::Op;

/// Fuses each sum with a linear layer that has no activation: the other summand becomes the layer's residual. For
/// forward graphs that are not yet differentiated.
pub(super) fn residuals(graph: &mut Graph) {
    pairs(graph, |product, reader, operand| match (&product.op, &reader.op) {
        (&Op::Linear { activation: Activation::None, layout, residual: false }, Op::Add) => {
            Some((Op::Linear { activation: Activation::None, layout, residual: true }, reader.inputs[1 - operand]))
        }
        _ => None,
    });
}

/// Fuses the gradient of a linear layer's input with the gradient of the activation that computed this input, and then
/// with the sum of the contributions of the input's several readers.
pub(super) fn input_gradients(graph: &mut Graph) {
    const PLAIN: Activation = Activation::None;
    pairs(graph, |product, reader, operand| match (&product.op, &reader.op) {
        (&Op::LinearGradInput { layout, activation: PLAIN, adds: false }, &Op::ActivationGrad(activation)) => {
            (operand == 0).then(|| (Op::LinearGradInput { layout, activation, adds: false }, reader.inputs[1]))
        }
        _ => None,
    });
    pairs(graph, |product, reader, operand| match (&product.op, &reader.op) {
        (&Op::LinearGradInput { layout, activation: PLAIN, adds: false }, Op::Add) => {
            Some((Op::LinearGradInput { layout, activation: PLAIN, adds: true }, reader.inputs[1 - operand]))
        }
        _ => None,
    });
}

/// Replaces each pair of a product and its only reader by a fused op in the reader's place. `fused` receives both and
/// the operand number of the product, and returns the fused op and the value that joins the product's inputs.
fn pairs(graph: &mut Graph, fused: impl Fn(&Node, &Node, usize) -> Option<(Op, Value)>) {
    let uses = uses(graph);
    let mut keep = vec![true; graph.nodes.len()];
    for n in 0..graph.nodes.len() {
        let reader = &graph.nodes[n];
        let found = reader.inputs.iter().enumerate().find_map(|(operand, &value)| {
            let root = graph.root(value);
            let Source::Node { node, .. } = graph.info(root).source else { return None };
            let product = &graph.nodes[node];
            // If the reader sees the product, or shapes its output, as rows of another width, the product's columns
            // would not correspond to those of the value that joins it.
            let same = |other: Value| graph.info(other).shape.cols() == graph.info(root).shape.cols();
            let same_rows = same(value) && reader.outputs.first().is_some_and(|&out| same(out));
            let alone = uses[root.0 as usize] == 1 && product.layer == reader.layer;
            if !alone || !same_rows {
                return None;
            }
            let (op, joins) = fused(product, reader, operand)?;
            let inputs = product.inputs.iter().copied().chain([joins]).collect();
            Some((node, op, inputs))
        });
        if let Some((product, op, inputs)) = found {
            keep[product] = false;
            let reader = &mut graph.nodes[n];
            (reader.op, reader.inputs) = (op, inputs);
        }
    }
    graph.keep_nodes(&keep);
}

/// How often each root is read by nodes, passed on or kept.
fn uses(graph: &Graph) -> Vec<usize> {
    let mut uses = vec![0; graph.values.len()];
    let read = graph.nodes.iter().flat_map(|node| &node.inputs).copied();
    let handed_on = graph.layers.iter().filter_map(|layer| layer.output).chain(graph.logits).chain(graph.loss);
    let gradients = graph.parameter_gradients.iter().map(|g| g.value);
    for value in read.chain(handed_on).chain(graph.input_gradients.iter().flatten().copied()).chain(gradients) {
        uses[graph.root(value).0 as usize] += 1;
    }
    uses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{DType, Shape};
    use crate::graph::{Builder, Init, Kind, Mode, ModelLayout, Program, ShardLayout, WeightLayout, differentiate};

    const NONE: Activation = Activation::None;
    const GELU: Activation = Activation::GeluTanh;

    /// A model of two layers of 4 columns, the first of them `body` on a parameter (6, 4), the second a head, with its
    /// gradient.
    fn model(body: impl FnOnce(&mut Builder, Value) -> Value) -> Graph {
        let mut b = Builder::new(Mode::Training, DType::F32);
        let layer = |b: &mut Builder, _: Option<Value>| {
            let x = b.parameter("x", [6, 4], Init::Normal(1.0))?;
            Ok(body(b, x))
        };
        b.layer("body", layer).unwrap();
        let logits = b.layer("head", |b, x| Ok(linear(b, x.unwrap(), "head", NONE))).unwrap();
        let axes = b.shape(logits).axes().to_vec();
        let labels = b.input("labels", Shape(axes[..axes.len() - 1].to_vec()), DType::I32).unwrap();
        b.cross_entropy(logits, labels).unwrap();
        let mut graph = b.finish().unwrap();
        differentiate(&mut graph).unwrap();
        graph
    }

    fn linear(b: &mut Builder, x: Value, name: &str, activation: Activation) -> Value {
        let weight = b.parameter(name, [4, 4], Init::Normal(1.0)).unwrap();
        let bias = b.parameter(format!("{name} bias"), [4], Init::Normal(1.0)).unwrap();
        b.linear(x, weight, Some(bias), activation, WeightLayout::InOut).unwrap()
    }

    /// How many nodes are linear layers with a residual, input gradients with an activation's and such that add, sums
    /// and gradients of activations.
    fn counts(graph: &Graph) -> [usize; 5] {
        let count = |is: fn(&Op) -> bool| graph.nodes.iter().filter(|node| is(&node.op)).count();
        for (n, node) in graph.nodes.iter().enumerate() {
            for (output, &value) in node.outputs.iter().enumerate() {
                assert_eq!(graph.info(value).source, Source::Node { node: n, output });
            }
            let before = |&v: &Value| graph.producer(v).is_none_or(|from| from < n);
            assert!(node.inputs.iter().all(before), "{n}: {node:?}");
        }
        [
            count(|op| matches!(op, Op::Linear { residual: true, .. })),
            count(|op| matches!(op, Op::LinearGradInput { activation, .. } if *activation != NONE)),
            count(|op| matches!(op, Op::LinearGradInput { adds: true, .. })),
            count(|op| *op == Op::Add),
            count(|op| matches!(op, Op::ActivationGrad(_))),
        ]
    }

    #[test]
    fn a_block_is_fused() {
        let graph = model(|b, x| {
            let h = linear(b, x, "up", GELU);
            let y = linear(b, h, "down", NONE);
            b.add(y, x).unwrap()
        });
        // The two gradients of x are added by the one that comes later.
        assert_eq!(counts(&graph), [1, 1, 1, 0, 0]);
        let down = &graph.nodes[1];
        assert_eq!(down.inputs.last(), Some(&graph.parameters[0].value));
        assert_eq!((graph.layers[0].output, graph.forward_nodes), (Some(down.outputs[0]), 5));
    }

    #[test]
    fn kernels_write_over_what_joins_a_product() {
        let mut graph = model(|b, x| {
            let x = b.dropout(x, 0.1).unwrap();
            let h = linear(b, x, "up", GELU);
            let y = linear(b, h, "down", NONE);
            b.add(y, x).unwrap()
        });
        for scratch in [false, true] {
            graph.scratch = scratch;
            let layout = ModelLayout::new(&graph);
            let shard = ShardLayout::new(&graph, &layout, 0..2);
            let program = Program::new(&graph, &layout, &shard, Kind::Last { recompute: true });
            let over: Vec<bool> = program
                .steps
                .iter()
                .filter(|step| match step.op {
                    Op::Linear { residual, .. } => residual,
                    Op::LinearGradInput { activation, adds, .. } => adds || activation != NONE,
                    _ => false,
                })
                .map(|step| {
                    let (joins, out) = (step.inputs.last().unwrap(), step.outputs[0].as_ref().unwrap());
                    (joins.area, joins.offset) == (out.area, out.offset)
                })
                .collect();
            // The residual dies in the first forward, and is needed after the second.
            assert_eq!(over, [scratch, false, scratch, scratch]);
        }
    }

    #[test]
    fn what_another_reads_stays() {
        // The product is needed beside the sum; it is added to itself; it is what the layer hands on.
        let twice = |b: &mut Builder, x| {
            let y = linear(b, x, "w", NONE);
            let z = b.add(y, x).unwrap();
            b.add(z, y).unwrap()
        };
        assert_eq!(counts(&model(twice))[0], 0);
        let double = |b: &mut Builder, x| {
            let y = linear(b, x, "w", NONE);
            b.add(y, y).unwrap()
        };
        assert_eq!(counts(&model(double))[0], 0);
        let handed_on = |b: &mut Builder, x| {
            let y = linear(b, x, "w", NONE);
            b.add(y, x).unwrap();
            y
        };
        assert_eq!(counts(&model(handed_on))[0], 0);
        // Of an activation's output, which two read, the gradient is a sum first.
        let shared = |b: &mut Builder, x| {
            let h = linear(b, x, "up", GELU);
            let y = linear(b, h, "down", NONE);
            b.add(y, h).unwrap()
        };
        assert_eq!(counts(&model(shared)), [1, 0, 1, 0, 1]);
    }

    #[test]
    fn an_activation_or_a_cut_between_stays() {
        let before = |b: &mut Builder, x| {
            let y = linear(b, x, "w", GELU);
            b.add(y, x).unwrap()
        };
        assert_eq!(counts(&model(before))[0], 0);
        // The head's input gradient goes to another layer, where the activation is.
        assert_eq!(counts(&model(|b, x| linear(b, x, "w", GELU))), [0, 0, 0, 0, 1]);
    }

    #[test]
    fn a_view_of_other_rows_stays() {
        for (cols, fused) in [(4, 1), (8, 0)] {
            let graph = model(|b, x| {
                let shape = [24 / cols / 3, 3, cols];
                let h = linear(b, x, "up", GELU);
                let h = b.reshape(h, shape).unwrap();
                let h = b.reshape(h, [6, 4]).unwrap();
                let y = linear(b, h, "down", NONE);
                let (y, x) = (b.reshape(y, shape).unwrap(), b.reshape(x, shape).unwrap());
                let y = b.add(x, y).unwrap();
                b.reshape(y, [6, 4]).unwrap()
            });
            assert_eq!(counts(&graph)[0], fused, "{cols}");
        }
    }

    /// The gradient of what is read both as it is and as rows of another width has the shape of what came first: a
    /// product is not made over in that.
    #[test]
    fn a_sum_of_other_rows_stays() {
        for cols in [4, 8] {
            let graph = model(|b, x| {
                let a = linear(b, x, "gate", Activation::Silu);
                let g = b.reshape(x, [24 / cols, cols]).unwrap();
                let g = b.activation(g, Activation::Silu).unwrap();
                let g = b.reshape(g, [6, 4]).unwrap();
                b.glu(a, g, Activation::Silu).unwrap()
            });
            let products = graph.nodes.iter().filter(|node| matches!(node.op, Op::LinearGradInput { .. }));
            for node in products.clone() {
                assert_eq!(graph.info(node.outputs[0]).shape.cols(), 4, "{cols}: {node:?}");
            }
            let adds = products.filter(|node| matches!(node.op, Op::LinearGradInput { adds: true, .. })).count();
            assert_eq!(adds, usize::from(cols == 4), "{cols}");
        }
    }
}
