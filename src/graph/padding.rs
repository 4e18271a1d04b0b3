//! Which rows have padding between them, for devices whose kernels support it.

use super::graph::{Graph, Node, Value};
use super::kinds::Activation;
use super::op::Op;
use crate::base::DType;
use std::collections::HashSet;

/// The padded width of a row of `cols` columns whose rows start at multiples of 16 bytes, as bulk copies of bf16 need.
pub(super) fn padded_cols(cols: usize) -> usize {
    cols.next_multiple_of(8)
}

/// Logits and their gradients in bf16 whose width is not a multiple of 8, such as those over a vocabulary of 50,257,
/// for a device whose kernels support padded rows. Products of such rows take half the time when they start at
/// multiples of 16 bytes.
pub(super) fn padded(graph: &Graph) -> HashSet<Value> {
    if !graph.scratch || graph.float != DType::Bf16 {
        return HashSet::new();
    }
    let takes = |op: &Op, operand: usize| match op {
        Op::CrossEntropy
        | Op::CrossEntropyGrad
        | Op::MeanSquaredError
        | Op::MeanSquaredErrorGrad
        | Op::LinearGradInput { .. } => operand == 0,
        Op::LinearGradWeight { .. } => operand == 1,
        _ => false,
    };
    let makes = |node: &Node| match node.op {
        Op::Linear { activation, residual, .. } => activation == Activation::None && !residual,
        Op::CrossEntropyGrad | Op::MeanSquaredErrorGrad => true,
        _ => false,
    };
    let made = graph.nodes.iter().filter(|node| makes(node)).map(|node| node.outputs[0]);
    let mut found: HashSet<Value> = made.filter(|&v| !graph.info(v).shape.cols().is_multiple_of(8)).collect();
    for node in &graph.nodes {
        for (operand, &value) in node.inputs.iter().enumerate() {
            if !takes(&node.op, operand) || graph.root(value) != value {
                found.remove(&graph.root(value));
            }
        }
    }
    // A loss' kernel takes a single pitch, for both its input and its gradient.
    for node in &graph.nodes {
        if matches!(node.op, Op::CrossEntropyGrad | Op::MeanSquaredErrorGrad) {
            let both = [graph.root(node.inputs[0]), node.outputs[0]];
            if !both.iter().all(|v| found.contains(v)) {
                both.iter().for_each(|v| _ = found.remove(v));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{Result, Shape};
    use crate::graph::{
        Area, Buffer, Builder, Init, Kind, Mode, ModelLayout, Program, ShardLayout, WeightLayout, differentiate,
    };

    /// `x` (4, 16) times a weight of 10 columns.
    fn product(b: &mut Builder, x: Value, name: &str, bias: bool) -> Result<Value> {
        let weight = b.parameter(format!("{name}.weight"), [16, 10], Init::Normal(1.0))?;
        let bias = if bias { Some(b.parameter(format!("{name}.bias"), [10], Init::Constant(0.0))?) } else { None };
        b.linear(x, weight, bias, Activation::None, WeightLayout::InOut)
    }

    /// Rows of what a head computes and of its gradient in the head's program, under one loss or the other.
    fn pitches(
        (float, scratch, squared): (DType, bool, bool),
        head: impl Fn(&mut Builder, Value) -> Result<Value>,
    ) -> HashSet<usize> {
        let mut b = Builder::new(Mode::Training, float);
        let x = b.input("x", [4, 16], float).unwrap();
        let out = b.layer("head", |b, _| head(b, x)).unwrap();
        if squared {
            let targets = b.input("targets", [4, 10], float).unwrap();
            b.mean_squared_error(out, targets).unwrap();
        } else {
            let labels = b.input("labels", [4], DType::I32).unwrap();
            b.cross_entropy(out, labels).unwrap();
        }
        let mut graph = b.finish().unwrap();
        differentiate(&mut graph).unwrap();
        graph.scratch = scratch;
        let layout = ModelLayout::new(&graph);
        let shard = ShardLayout::new(&graph, &layout, 0..1);
        let program = Program::new(&graph, &layout, &shard, Kind::Last { recompute: false });
        let buffers = program.steps.iter().flat_map(|s| s.inputs.iter().chain(s.outputs.iter().flatten()));
        let made = buffers.filter(|b| b.area != Area::Inputs && b.shape == Shape::from([4, 10]));
        let rows: Vec<&Buffer> = made.collect();
        assert!(rows.iter().all(|b| b.bytes() == (4 * b.pitch) as u64 * float.bytes()));
        rows.into_iter().map(|b| b.pitch).collect()
    }

    #[test]
    fn products_of_odd_width_are_padded_for_kernels() {
        for (float, scratch, pitch) in [(DType::Bf16, true, 16), (DType::F32, true, 10), (DType::Bf16, false, 10)] {
            for (bias, squared) in [(false, false), (true, false), (false, true), (true, true)] {
                let found = pitches((float, scratch, squared), |b, x| product(b, x, "head", bias));
                assert_eq!(found, HashSet::from([pitch]), "{float}, scratch {scratch}, bias {bias}, squared {squared}");
            }
        }
    }

    /// The sum of two products is not padded, and so its gradient is not, whoever reads that.
    #[test]
    fn a_gradient_has_the_rows_of_what_it_is_of() {
        for squared in [false, true] {
            let found = pitches((DType::Bf16, true, squared), |b, x| {
                let (y, z) = (product(b, x, "y", false)?, product(b, x, "z", true)?);
                b.add(y, z)
            });
            assert_eq!(found, HashSet::from([10]), "squared {squared}");
        }
    }
}
