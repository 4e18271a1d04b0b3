//! The small choices that ops are parameterised by.

use serde::{Deserialize, Serialize};

/// The function after a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Activation {
    /// The identity.
    None,
    /// max(x, 0).
    Relu,
    /// GELU approximated by tanh: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's `gelu_new` (Hendrycks &
    /// Gimpel 2016, arXiv:1606.08415).
    GeluTanh,
    /// Exact GELU: 0.5 x (1 + erf(x / sqrt 2)).
    GeluErf,
    /// SiLU, or swish: x / (1 + exp(-x)) (Elfwing, Uchibe & Doya 2017, arXiv:1702.03118).
    Silu,
}

impl Activation {
    /// Every one.
    pub const ALL: [Activation; 5] =
        [Activation::None, Activation::Relu, Activation::GeluTanh, Activation::GeluErf, Activation::Silu];
}

/// The memory layout of a linear layer's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WeightLayout {
    /// (inputs, outputs): GPT-2's `Conv1D`.
    InOut,
    /// (outputs, inputs): torch's `Linear`.
    OutIn,
}

/// A parameter's initial values when no file provides them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Init {
    /// Every element the same.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in plus or minus this bound.
    Uniform(f64),
}

/// Whether the graph is for training (dropout on, batch statistics) or for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Dropout drops; BatchNorm uses the batch's statistics and updates the running ones.
    Training,
    /// Dropout is the identity; BatchNorm uses the running statistics.
    Evaluation,
}
