//! Layers that several families share: each names its parameters under a prefix and traces one or two ops.
//!
//! None holds weights; a layer is a description that is traced and forgotten.

use crate::base::Result;
use crate::graph::{Activation, AttentionOptions, Builder, Init, Value, WeightLayout};

/// Batch normalisation's epsilon and momentum, the new value's share in the running statistics: torch's defaults.
const BATCHNORM: (f64, f64) = (1e-5, 0.1);

/// `x` (.., K) times `{name}.weight`, plus `{name}.bias`, through an activation -> (.., N).
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// N.
    pub outputs: usize,
    /// The weight's layout in its file.
    pub layout: WeightLayout,
    /// The weight's initial values.
    pub weight: Init,
    /// The bias' initial values; `None` for no bias.
    pub bias: Option<Init>,
    /// Fused after the bias.
    pub activation: Activation,
}

impl Linear {
    /// Makes a layer like torch's `nn.Linear`: weight (N, K), and a bias that starts at 0.
    pub fn new(outputs: usize, weight: Init, activation: Activation) -> Linear {
        Linear { outputs, layout: WeightLayout::OutIn, weight, bias: Some(Init::Constant(0.0)), activation }
    }

    /// Traces the layer.
    ///
    /// # Errors
    /// When a parameter already exists with another shape.
    pub fn trace(&self, b: &mut Builder, x: Value, name: &str) -> Result<Value> {
        let (k, n) = (b.shape(x).cols(), self.outputs);
        let shape = match self.layout {
            WeightLayout::InOut => [k, n],
            WeightLayout::OutIn => [n, k],
        };
        let weight = b.parameter(format!("{name}.weight"), shape, self.weight)?;
        let bias = self.bias.map(|init| b.parameter(format!("{name}.bias"), [n], init)).transpose()?;
        b.linear(x, weight, bias, self.activation, self.layout)
    }
}

/// Layer normalisation over the last axis with `{name}.weight`, initially 1, and `{name}.bias`, initially 0.
///
/// # Errors
/// When a parameter already exists with another shape.
pub fn layernorm(b: &mut Builder, x: Value, name: &str, epsilon: f64) -> Result<Value> {
    let width = b.shape(x).cols();
    let weight = b.parameter(format!("{name}.weight"), [width], Init::Constant(1.0))?;
    let bias = b.parameter(format!("{name}.bias"), [width], Init::Constant(0.0))?;
    b.layernorm(x, weight, bias, epsilon)
}

/// Normalisation by the root mean square of the last axis, with `{name}.weight`, initially 1.
///
/// # Errors
/// When the parameter already exists with another shape.
pub fn rmsnorm(b: &mut Builder, x: Value, name: &str, epsilon: f64) -> Result<Value> {
    let width = b.shape(x).cols();
    let weight = b.parameter(format!("{name}.weight"), [width], Init::Constant(1.0))?;
    b.rmsnorm(x, weight, epsilon)
}

/// Self-attention of `x` (B, T, C) -> (B, T, C), with `linear` as each of `{name}.query`, `{name}.key` and
/// `{name}.value`, as in BERT and ViT; `mask` (B, T) is 1 where a key may be seen.
///
/// # Errors
/// When a parameter already exists with another shape, or the heads do not divide the width.
pub fn self_attention(
    b: &mut Builder,
    x: Value,
    name: &str,
    linear: Linear,
    mask: Option<Value>,
    options: AttentionOptions,
) -> Result<Value> {
    let q = linear.trace(b, x, &format!("{name}.query"))?;
    let k = linear.trace(b, x, &format!("{name}.key"))?;
    let v = linear.trace(b, x, &format!("{name}.value"))?;
    b.attention(q, k, v, mask, options)
}

/// Rows of `{name}.weight` (V, C) at `ids` (..) -> (.., C).
///
/// # Errors
/// When the parameter already exists with another shape, or the ids are no integers.
pub fn embedding(b: &mut Builder, ids: Value, name: &str, table: [usize; 2], init: Init) -> Result<Value> {
    let table = b.parameter(format!("{name}.weight"), table, init)?;
    b.embedding(ids, table)
}

/// A convolution without bias, padded by half its kernel, then batch normalisation and an activation:
/// (N, C, H, W) -> (N, O, H', W'). Its parameters are `{name}.convolution` and `{name}.normalization`.
#[derive(Clone, Copy, Debug)]
pub struct ConvNorm {
    /// O.
    pub outputs: usize,
    /// Height and width of the kernel.
    pub kernel: usize,
    /// Step in both axes.
    pub stride: usize,
    /// After the normalisation.
    pub activation: Activation,
}

impl ConvNorm {
    /// Traces the layer. The initial weight is normal with variance 2 / (O kh kw), which keeps the gradient's size
    /// through ReLU (He, Zhang, Ren & Sun 2015, arXiv:1502.01852, section 2.2, backward case).
    ///
    /// # Errors
    /// When `x` is no image, or too small for the kernel.
    pub fn trace(&self, b: &mut Builder, x: Value, name: &str) -> Result<Value> {
        let ConvNorm { outputs, kernel, stride, activation } = *self;
        let channels = b.shape(x).axes().get(1).copied().unwrap_or(0);
        let deviation = (2.0 / (outputs * kernel * kernel) as f64).sqrt();
        let shape = [outputs, channels, kernel, kernel];
        let weight = b.parameter(format!("{name}.convolution.weight"), shape, Init::Normal(deviation))?;
        let x = b.conv2d(x, weight, None, stride, kernel / 2)?;
        let (epsilon, momentum) = BATCHNORM;
        let x = b.batchnorm(x, &format!("{name}.normalization"), epsilon, momentum)?;
        if activation == Activation::None { Ok(x) } else { b.activation(x, activation) }
    }
}
