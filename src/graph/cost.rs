//! What an op costs: floating-point operations and bytes that must cross the memory bus at least once.
//!
//! Both are counts of the mathematics, not of an implementation: a multiply-add is two operations, every input is read
//! once and every output written once. A cost model turns them into seconds.

use super::graph::{Graph, Node};
use super::kinds::Activation;
use super::op::Op;
use crate::base::{DType, Shape};

/// The kind of work, which determines the rate it runs at. Kinds are distinguished where their rates on the host
/// differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// A linear layer's product.
    Gemm,
    /// A linear layer's product with a transcendental function fused after it.
    GemmActivation,
    /// The product that computes its input's gradient.
    GemmGradInput,
    /// The same, with the gradient of a transcendental function fused after it.
    GemmGradActivation,
    /// The product that computes its weight's gradient.
    GemmGradWeight,
    /// Fused attention.
    Attention,
    /// Its gradient.
    AttentionGrad,
    /// Convolution.
    Conv,
    /// The gradient of its input.
    ConvGradInput,
    /// The gradient of its weight.
    ConvGradWeight,
    /// Activations with a transcendental function, and their gradients.
    Activation,
    /// Dropout.
    Dropout,
    /// Softmax over the vocabulary, with the loss.
    Softmax,
    /// Normalisation.
    Norm,
    /// Its gradient.
    NormGrad,
    /// Sums over rows or positions: biases' gradients.
    Sum,
    /// Pooling, both directions, and copies that permute axes.
    Pool,
    /// Everything else: memory-bound.
    Memory,
}

/// The unit of work in which a family's rate is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Floating-point operations.
    Flops,
    /// Bytes read and written.
    Bytes,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 18] = [
        Family::Gemm,
        Family::GemmActivation,
        Family::GemmGradInput,
        Family::GemmGradActivation,
        Family::GemmGradWeight,
        Family::Attention,
        Family::AttentionGrad,
        Family::Conv,
        Family::ConvGradInput,
        Family::ConvGradWeight,
        Family::Activation,
        Family::Dropout,
        Family::Softmax,
        Family::Norm,
        Family::NormGrad,
        Family::Sum,
        Family::Pool,
        Family::Memory,
    ];

    /// Whether it is a linear layer's product, or one of its gradients' products.
    pub fn is_linear_product(self) -> bool {
        matches!(
            self,
            Family::Gemm
                | Family::GemmActivation
                | Family::GemmGradInput
                | Family::GemmGradActivation
                | Family::GemmGradWeight
        )
    }

    /// What its rate is measured in: flops or bytes.
    pub fn work(self) -> Work {
        match self {
            Family::Gemm
            | Family::GemmActivation
            | Family::GemmGradInput
            | Family::GemmGradActivation
            | Family::GemmGradWeight
            | Family::Attention
            | Family::AttentionGrad
            | Family::Conv
            | Family::ConvGradInput
            | Family::ConvGradWeight => Work::Flops,
            _ => Work::Bytes,
        }
    }
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
    /// Element type of the model's weights and activations.
    pub float: DType,
    /// Whether it is an f32 product whose factors may be rounded to tf32.
    pub tf32: bool,
    /// Elements of the largest operand, the measure of elementwise work.
    pub elems: u64,
    /// What the rate depends on. A product: rows, columns and depth. Attention: sequences times heads, keys, a head's
    /// width. A convolution: output channels, input channels times taps, output positions of an image. The rest: bytes,
    /// the last axis' size, 1.
    pub sizes: [usize; 3],
}

impl Cost {
    /// Flops or bytes, whichever the family is measured in.
    pub fn work(&self) -> f64 {
        match self.family.work() {
            Work::Flops => self.flops,
            Work::Bytes => self.bytes as f64,
        }
    }
}

/// The cost of `node`.
pub fn cost(graph: &Graph, node: &Node) -> Cost {
    let shape = |i: usize| &graph.info(node.inputs[i]).shape;
    let elems = |i: usize| shape(i).elems() as f64;
    let out = || graph.info(node.outputs[0]).shape.elems() as f64;
    let touched = node.inputs.iter().chain(&node.outputs);
    let bytes = match node.op {
        // Only the selected rows of the table.
        Op::Embedding { .. } => 2 * graph.bytes(node.outputs[0]) + graph.bytes(node.inputs[0]),
        _ => touched.clone().map(|&v| graph.bytes(v)).sum(),
    };
    let largest = touched.clone().map(|&v| graph.info(v).shape.elems() as u64).max().unwrap_or(0);
    let largest_cols = touched.map(|&v| &graph.info(v).shape).max_by_key(|s| s.elems()).map_or(1, Shape::cols);
    let mut sizes = [bytes as usize, largest_cols, 1];
    let (family, flops) = match &node.op {
        Op::Linear { .. } | Op::LinearGradInput { .. } => {
            sizes = [shape(0).rows(), graph.info(node.outputs[0]).shape.cols(), shape(0).cols()];
            let family = match node.op {
                Op::Linear { activation: Activation::None | Activation::Relu, .. } => Family::Gemm,
                Op::Linear { .. } => Family::GemmActivation,
                Op::LinearGradInput { activation: Activation::None | Activation::Relu, .. } => Family::GemmGradInput,
                _ => Family::GemmGradActivation,
            };
            (family, 2.0 * out() * shape(0).cols() as f64)
        }
        Op::LinearGradWeight { .. } => {
            sizes = [shape(0).cols(), shape(1).cols(), shape(0).rows()];
            let sums = (node.outputs.len() - 1) as f64 * elems(1);
            (Family::GemmGradWeight, 2.0 * out() * shape(0).rows() as f64 + sums)
        }
        Op::Attention(kind) | Op::AttentionGrad(kind) => {
            let backward = matches!(node.op, Op::AttentionGrad(_));
            let lse = if backward { shape(2) } else { &graph.info(node.outputs[1]).shape };
            let key = if backward { 3 } else { 0 } + usize::from(!kind.packed);
            let keys = shape(key).axes()[1];
            let pairs = lse.elems() as f64 * keys as f64 * if kind.causal { 0.5 } else { 1.0 };
            sizes = [lse.rows(), keys, kind.width];
            // Forward: scores and output; backward: scores again, then four products.
            let (family, products) = if backward { (Family::AttentionGrad, 10.0) } else { (Family::Attention, 4.0) };
            (family, pairs * kind.width as f64 * products)
        }
        Op::Conv2d(_) | Op::Conv2dGradInput(_) | Op::Conv2dGradWeight(_) => {
            let (family, image, weight) = match node.op {
                Op::Conv2d(_) => (Family::Conv, &graph.info(node.outputs[0]).shape, shape(1)),
                Op::Conv2dGradInput(_) => (Family::ConvGradInput, shape(0), shape(1)),
                _ => (Family::ConvGradWeight, shape(0), &graph.info(node.outputs[0]).shape),
            };
            let ([o, c, kh, kw], [_, _, h, w]) = (weight.axes(), image.axes()) else {
                unreachable!("weights and images have four axes, as the builder checks")
            };
            sizes = [*o, c * kh * kw, h * w];
            (family, 2.0 * image.elems() as f64 * (c * kh * kw) as f64)
        }
        Op::Activation(kind) | Op::ActivationGrad(kind) | Op::Glu(kind) | Op::GluGrad(kind) => {
            let cheap = matches!(kind, Activation::None | Activation::Relu);
            (if cheap { Family::Memory } else { Family::Activation }, 10.0 * elems(0))
        }
        Op::Custom(custom) => {
            let shapes: Vec<&Shape> = (0..node.inputs.len()).map(shape).collect();
            (Family::Memory, custom.0.flops(&shapes))
        }
        Op::Scale(_) => (Family::Memory, elems(0)),
        Op::Dropout { .. } => (Family::Dropout, 10.0 * elems(0)),
        Op::CrossEntropy | Op::CrossEntropyGrad => (Family::Softmax, 5.0 * elems(0)),
        Op::MeanSquaredError | Op::MeanSquaredErrorGrad => (Family::Memory, 3.0 * elems(0)),
        Op::LossSum => (Family::Sum, elems(0)),
        // Two multiplications and an addition per element; the sines and cosines are shared by all heads.
        Op::Rotary(_) => (Family::Memory, 3.0 * elems(0)),
        Op::LayerNorm { .. } | Op::RmsNorm { .. } | Op::BatchNorm { .. } | Op::BatchNormEval { .. } => {
            (Family::Norm, 8.0 * elems(0))
        }
        Op::LayerNormGrad | Op::RmsNormGrad | Op::BatchNormGrad => (Family::NormGrad, 12.0 * elems(0)),
        Op::Conv2dGradBias | Op::AddPositionGrad => (Family::Sum, elems(0)),
        Op::MaxPool(_) | Op::MaxPoolGrad(_) | Op::AvgPool(_) | Op::AvgPoolGrad(_) | Op::Transpose { .. } => {
            (Family::Pool, largest as f64)
        }
        _ => (Family::Memory, largest as f64),
    };
    let tf32 = graph.tf32 && graph.float == DType::F32 && family.is_linear_product();
    Cost { flops, bytes, family, float: graph.float, tf32, elems: largest, sizes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Builder, Init, Mode, WeightLayout, differentiate};

    /// Of a linear layer, a convolution and a norm only the linear layer's three products, and those in f32 alone.
    #[test]
    fn only_products_of_f32_are_marked_as_tf32() {
        let marked = |float: DType, tf32: bool| {
            let mut b = Builder::new(Mode::Training, float);
            let logits = b.layer("all", |b, _| {
                let x = b.input("image", [2, 3, 5, 5], float)?;
                let filter = b.parameter("filter", Shape::from([4, 3, 3, 3]), Init::Normal(0.02))?;
                let x = b.conv2d(x, filter, None, 1, 1)?;
                let x = b.batchnorm(x, "norm", 1e-5, 0.1)?;
                let x = b.global_avg_pool(x)?;
                let weight = b.parameter("weight", Shape::from([4, 7]), Init::Normal(0.02))?;
                b.linear(x, weight, None, Activation::None, WeightLayout::InOut)
            });
            let labels = b.input("labels", [2], DType::I32).unwrap();
            b.cross_entropy(logits.unwrap(), labels).unwrap();
            let mut graph = b.finish().unwrap();
            graph.tf32 = tf32;
            differentiate(&mut graph).unwrap();
            let costs = graph.nodes.iter().map(|node| cost(&graph, node));
            costs.filter(|cost| cost.tf32).map(|cost| cost.family).collect::<Vec<_>>()
        };
        assert_eq!(marked(DType::F32, true), [Family::Gemm, Family::GemmGradWeight, Family::GemmGradInput]);
        assert_eq!(marked(DType::F32, false), []);
        assert_eq!(marked(DType::Bf16, true), []);
    }
}
