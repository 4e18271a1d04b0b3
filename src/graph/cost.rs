//! What an op costs: floating-point operations and bytes that must cross the memory bus at least once.
//!
//! Both are counts of the mathematics, not of an implementation: a multiply-add is two operations, every input is read once and
//! every output written once. A cost model turns them into seconds.

use super::graph::{Graph, Node};
use super::op::Op;

/// The kind of work, which decides the rate that it runs at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Matrix products.
    Gemm,
    /// Fused attention.
    Attention,
    /// Convolution.
    Conv,
    /// Elementwise arithmetic with transcendental functions (activations, softmax over the vocabulary, dropout).
    Transcendental,
    /// Everything else: bound by memory.
    Memory,
}

/// The cost of one op.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: u64,
    /// The kind of work.
    pub family: Family,
    /// Elements of the largest operand, by which elementwise work is counted.
    pub elems: u64,
    /// Rows, columns and depth of the matrix product that dominates; zeros where none does.
    pub gemm: [usize; 3],
}

/// The cost of `node`.
pub fn cost(graph: &Graph, node: &Node) -> Cost {
    let shape = |i: usize| &graph.info(node.inputs[i]).shape;
    let elems = |i: usize| shape(i).elems() as f64;
    let out = || graph.info(node.outputs[0]).shape.elems() as f64;
    let touched = node.inputs.iter().chain(&node.outputs);
    let bytes = touched.clone().map(|&v| graph.bytes(v)).sum();
    let largest = touched.map(|&v| graph.info(v).shape.elems() as u64).max().unwrap_or(0);
    let mut gemm = [0; 3];
    let (family, flops) = match &node.op {
        Op::Linear { .. } => {
            gemm = [shape(0).rows(), graph.info(node.outputs[0]).shape.cols(), shape(0).cols()];
            (Family::Gemm, 2.0 * out() * shape(0).cols() as f64)
        }
        Op::LinearGradInput { .. } => {
            gemm = [shape(0).rows(), graph.info(node.outputs[0]).shape.cols(), shape(0).cols()];
            (Family::Gemm, 2.0 * out() * shape(0).cols() as f64)
        }
        Op::LinearGradWeight { .. } => {
            gemm = [shape(0).cols(), shape(1).cols(), shape(0).rows()];
            (Family::Gemm, 2.0 * out() * shape(0).rows() as f64)
        }
        Op::Attention(kind) | Op::AttentionGrad(kind) => {
            let backward = matches!(node.op, Op::AttentionGrad(_));
            let lse = if backward { shape(2) } else { &graph.info(node.outputs[1]).shape };
            let queries = lse.cols();
            let key = if backward { 3 } else { 0 } + usize::from(!kind.packed);
            let keys = shape(key).axes()[1];
            let pairs = lse.rows() as f64 * queries as f64 * keys as f64 * if kind.causal { 0.5 } else { 1.0 };
            // Forward: scores and output; backward: scores again, then four products.
            (Family::Attention, pairs * kind.width as f64 * if backward { 10.0 } else { 4.0 })
        }
        Op::Conv2d(_) | Op::Conv2dGradInput(_) | Op::Conv2dGradWeight(_) => {
            let (image, weight) = match node.op {
                Op::Conv2d(_) => (out(), shape(1)),
                Op::Conv2dGradInput(_) => (elems(0), shape(1)),
                _ => (elems(0), &graph.info(node.outputs[0]).shape),
            };
            let [o, c, kh, kw] = weight.axes() else { unreachable!("a convolution's weight has four axes") };
            gemm = [*o, c * kh * kw, if *o > 0 { image as usize / o } else { 0 }];
            (Family::Conv, 2.0 * image * (c * kh * kw) as f64)
        }
        Op::Activation(_) | Op::ActivationGrad(_) | Op::Dropout { .. } => (Family::Transcendental, 10.0 * elems(0)),
        Op::CrossEntropy | Op::CrossEntropyGrad => (Family::Transcendental, 5.0 * elems(0)),
        Op::LayerNorm { .. } | Op::BatchNorm { .. } | Op::BatchNormEval { .. } => (Family::Memory, 8.0 * elems(0)),
        Op::LayerNormGrad | Op::BatchNormGrad => (Family::Memory, 12.0 * elems(0)),
        _ => (Family::Memory, largest as f64),
    };
    Cost { flops, bytes, family, elems: largest, gemm }
}
