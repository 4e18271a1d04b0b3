//! Which rows lie further apart than they are long, for devices whose kernels take that.

use super::graph::{Graph, Node, Value};
use super::kinds::Activation;
use super::op::Op;
use crate::base::DType;
use std::collections::HashSet;

/// Columns that a row of `cols` has room for where rows are to start at multiples of 16 bytes: what bulk copies of bf16 need.
pub(super) fn padded_cols(cols: usize) -> usize {
    cols.next_multiple_of(8)
}

/// Logits and their gradients in bf16 whose rows are an odd number of elements long, as those over a vocabulary of 50,257 are, for a device
/// whose kernels can take rows that lie further apart. Products of such rows take half the time when they start at multiples of 16 bytes.
pub(super) fn padded(graph: &Graph) -> HashSet<Value> {
    if !graph.scratch || graph.float != DType::Bf16 {
        return HashSet::new();
    }
    let takes = |op: &Op, operand: usize| match op {
        Op::CrossEntropy | Op::CrossEntropyGrad | Op::LinearGradInput { .. } => operand == 0,
        Op::LinearGradWeight { .. } => operand == 1,
        _ => false,
    };
    let makes = |node: &Node| match node.op {
        Op::Linear { activation, residual, .. } => activation == Activation::None && !residual,
        Op::CrossEntropyGrad => true,
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
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Shape;
    use crate::graph::{
        Buffer, Builder, Init, Kind, Mode, ModelLayout, Program, ShardLayout, WeightLayout, differentiate,
    };

    /// Rows of logits and of their gradient in the program of a head over 10 classes.
    fn pitches(float: DType, scratch: bool, bias: bool) -> HashSet<usize> {
        let mut b = Builder::new(Mode::Training, float);
        let logits = b.layer("head", |b, _| {
            let x = b.input("x", [4, 16], float)?;
            let weight = b.parameter("weight", [16, 10], Init::Normal(1.0))?;
            let bias = if bias { Some(b.parameter("bias", [10], Init::Constant(0.0))?) } else { None };
            b.linear(x, weight, bias, Activation::None, WeightLayout::InOut)
        });
        let labels = b.input("labels", [4], DType::I32).unwrap();
        b.cross_entropy(logits.unwrap(), labels).unwrap();
        let mut graph = b.finish().unwrap();
        differentiate(&mut graph).unwrap();
        graph.scratch = scratch;
        let layout = ModelLayout::new(&graph);
        let shard = ShardLayout::new(&graph, &layout, 0..1);
        let program = Program::new(&graph, &layout, &shard, Kind::Last { recompute: false });
        let buffers = program.steps.iter().flat_map(|s| s.inputs.iter().chain(s.outputs.iter().flatten()));
        let rows: Vec<&Buffer> = buffers.filter(|b| b.shape == Shape::from([4, 10])).collect();
        assert!(rows.iter().all(|b| b.bytes() == (4 * b.pitch) as u64 * float.bytes()));
        rows.into_iter().map(|b| b.pitch).collect()
    }

    #[test]
    fn logits_of_odd_width_are_padded_for_kernels() {
        for (float, scratch, pitch) in [(DType::Bf16, true, 16), (DType::F32, true, 10), (DType::Bf16, false, 10)] {
            for bias in [false, true] {
                assert_eq!(pitches(float, scratch, bias), HashSet::from([pitch]), "{float} {scratch} {bias}");
            }
        }
    }
}
