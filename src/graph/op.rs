//! The ops: what each reads and writes.
//!
//! The order of inputs and outputs is stated once, here, on each variant. Rules about an op live beside this file:
//! shapes and construction in `builder`, arithmetic and traffic in `cost`, gradients in `gradient`. Parentheses mark
//! optional operands.

use super::custom::Custom;
use super::kinds::{Activation, WeightLayout};
use crate::base::DType;
use std::f64::consts::TAU;

/// One operation on contiguous row-major tensors.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// ids (..) i32, table (V, C) -> out (.., C).
    Embedding {
        /// The id whose row gets no gradient.
        padding: Option<usize>,
    },
    /// d_out (.., C), ids (..) -> d_table (V, C).
    EmbeddingGrad {
        /// The id whose row gets 0.
        padding: Option<usize>,
    },
    /// x (B, T, C), table (P, C) with P >= T -> out = x + table[..T].
    AddPosition,
    /// d_out (B, T, C) -> d_table (P, C); rows from T on get 0.
    AddPositionGrad,
    /// x (.., K), weight, (bias (N)), (residual (.., N)) -> out (.., N), (pre (.., N): before the activation).
    Linear {
        /// Fused after the bias.
        activation: Activation,
        /// The weight's layout.
        layout: WeightLayout,
        /// A residual is the last input, added after the bias. Never with an activation.
        residual: bool,
    },
    /// d_pre (.., N), weight, (pre or addend (.., K)) -> d_x (.., K).
    LinearGradInput {
        /// The weight's layout.
        layout: WeightLayout,
        /// The activation that computed x from the last input, if any: then the output is the gradient of that input.
        activation: Activation,
        /// The last input is added: the contribution of x's other readers to its gradient. Never with an activation.
        adds: bool,
    },
    /// x (.., K), d_pre (.., N) -> d_weight, (d_bias (N)).
    LinearGradWeight {
        /// The weight's layout.
        layout: WeightLayout,
        /// Whether the bias' gradient is computed.
        bias: bool,
        /// Both gradients are added to the existing values: other rows of the same microbatch came before.
        adds: bool,
    },
    /// x -> out, elementwise.
    Activation(Activation),
    /// d_out, x -> d_x, elementwise; x is the activation's input.
    ActivationGrad(Activation),
    /// gate, up of one shape -> activation(gate) * up: a gated linear unit (Shazeer 2020, arXiv:2002.05202).
    Glu(Activation),
    /// d_out, gate, up -> d_gate, d_up.
    GluGrad(Activation),
    /// a, b of one shape -> a + b.
    Add,
    /// x -> out: each element times this number; its gradient is the same op on d_out.
    Scale(f64),
    /// x -> out: each element is dropped with probability `p` or scaled by 1/(1-p); its gradient is the same op on
    /// d_out.
    Dropout {
        /// Probability of dropping.
        p: f64,
        /// The forward op's number in the model's graph, which keys its random numbers.
        stream: u32,
    },
    /// x (.., C), weight (C), bias (C) -> out (.., C), mean (rows), rstd (rows).
    LayerNorm {
        /// Added to the variance.
        epsilon: f64,
    },
    /// d_out, x, weight, mean, rstd -> d_x, d_weight, d_bias.
    LayerNormGrad,
    /// x (.., C), weight (C) -> out (.., C), rstd (rows): LayerNorm without a mean and a bias.
    RmsNorm {
        /// Added to the mean of the squares.
        epsilon: f64,
    },
    /// d_out, x, weight, rstd -> d_x, d_weight.
    RmsNormGrad,
    /// x (B, T, R) with R >= H D -> out: the first H heads of width D of position t rotated by t's angles, the rest
    /// copied. Its gradient is the inverse rotation of d_out.
    Rotary(Rotation),
    /// qkv (B, T, (H + 2 Hkv) D) packed, or q (B, Tq, H D), k, v (B, Tk, Hkv D); (mask (B, Tk) i32: 1 = attend)
    /// -> out (B, Tq, H D), lse (B, H, Tq).
    Attention(AttentionKind),
    /// d_out, out, lse, then Attention's inputs -> d_qkv, or d_q, d_k, d_v.
    AttentionGrad(AttentionKind),
    /// logits (.., V), labels (..) i32 -> row_losses (rows): -log softmax at the label. A row with label -100 does not
    /// count: its loss is 0.
    CrossEntropy,
    /// logits (.., V), labels (..) -> d_logits (.., V), written over the logits if this is their last use, (row_losses
    /// (rows), as of `CrossEntropy`, whose step it takes over if it directly follows it).
    CrossEntropyGrad,
    /// predictions (.., C), targets (.., C) -> row_losses (rows): the mean of squared differences.
    MeanSquaredError,
    /// predictions (.., C), targets (.., C) -> d_predictions (.., C), written over the predictions if this is their
    /// last use.
    MeanSquaredErrorGrad,
    /// row_losses (rows) -> loss (1): their sum, times the step's loss scale.
    LossSum,
    /// x (N, C, H, W), weight (O, C, kh, kw), (bias (O)) -> out (N, O, H', W').
    Conv2d(Window),
    /// d_out, weight -> d_x (N, C, H, W).
    Conv2dGradInput(Window),
    /// d_out, x -> d_weight.
    Conv2dGradWeight(Window),
    /// d_out (N, O, H', W') -> d_bias (O).
    Conv2dGradBias,
    /// x (N, C, ..), weight (C), bias (C) -> out, mean (C), rstd (C), var (C): the batch's own statistics.
    BatchNorm {
        /// Added to the variance.
        epsilon: f64,
    },
    /// mean (C), var (C) of `count` values a channel; running_mean and running_var are updated in place. No output.
    UpdateRunning {
        /// The new value's share.
        momentum: f64,
        /// Values a channel, for the unbiased variance.
        count: usize,
    },
    /// x, weight, bias, running_mean, running_var -> out.
    BatchNormEval {
        /// Added to the variance.
        epsilon: f64,
    },
    /// d_out, x, weight, mean, rstd -> d_x, d_weight, d_bias.
    BatchNormGrad,
    /// x (N, C, H, W) -> out, argmax i32: the place of the maximum in its plane.
    MaxPool(Window),
    /// d_out, argmax -> d_x.
    MaxPoolGrad(Window),
    /// x (N, C, H, W) -> out; padding counts as zeros in the mean, as torch's default.
    AvgPool(Window),
    /// d_out -> d_x.
    AvgPoolGrad(Window),
    /// x -> out with its axes in the order `axes`, copied.
    Transpose {
        /// Output axis i is input axis `axes[i]`.
        axes: Vec<usize>,
    },
    /// x (B, T, C) -> out (B, T', C): row t of each sequence becomes row t + `by`, where that exists; rows to which
    /// none is shifted are 0. Its gradient is the shift by -`by`, on d_out.
    Shift {
        /// Rows down; up where it is negative.
        by: isize,
    },
    /// x -> out, copied: where a value needs a buffer of its own.
    Copy,
    /// A custom op: its inputs -> its outputs.
    Custom(Custom),
    /// Nothing -> out, all 0: the gradient of a parameter that the loss does not depend on.
    Zero,
}

/// What an attention op computes, besides its shapes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionKind {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub width: usize,
    /// Multiplies the scores.
    pub scale: f64,
    /// A query sees keys up to its own position.
    pub causal: bool,
    /// One packed tensor instead of three.
    pub packed: bool,
    /// A mask is the last input.
    pub masked: bool,
    /// Probability of dropping an attention weight, and the number that keys its random numbers.
    pub dropout: Option<(f64, u32)>,
}

/// How a rotary position embedding rotates heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotation {
    /// Heads that are rotated; the rest of a row after them is copied.
    pub heads: usize,
    /// Width of a head, even: elements i and i + width/2 are rotated as a pair.
    pub width: usize,
    /// Without `scaling`, they are rotated by t * base^(-2i/width) at position t.
    pub base: f64,
    /// How these angles are scaled.
    pub scaling: RotaryScaling,
    /// Rotates by the negative angle, with the same stretch: the gradient.
    pub back: bool,
}

/// How rotary angles are reduced, for contexts longer than a model was pretrained on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    #[default]
    None,
    /// All divided by one factor (Chen, Wong, Chen & Tian 2023, "Extending context window by positional interpolation",
    /// arXiv:2306.15595).
    Linear {
        /// 1 or more.
        factor: f64,
    },
    /// Llama 3.1's: pairs that turn less than `low` times over `positions` are slowed by the factor, those that turn
    /// more than `high` times not at all, and those between by a share that is linear in their turns.
    Llama3 {
        /// 1 or more.
        factor: f64,
        /// Turns; below `high`.
        low: f64,
        /// Turns.
        high: f64,
        /// The context length of pretraining.
        positions: usize,
    },
    /// YaRN (Peng, Quesnelle, Fan & Shippole 2023, arXiv:2309.00071): pairs that turn less than `low` times over
    /// `positions` are slowed by the factor, those that turn more than `high` times not at all, and those between by a
    /// share that is linear in the pair's index. Rotated heads are also scaled by `stretch`, which sharpens the scores.
    Yarn {
        /// 1 or more.
        factor: f64,
        /// Turns, `beta_slow`; below `high`.
        low: f64,
        /// Turns, `beta_fast`.
        high: f64,
        /// The context length of pretraining.
        positions: usize,
        /// Whether the first and the last pair between are rounded to whole indices.
        whole: bool,
        /// The factor of queries and keys, above 0.
        stretch: f64,
    },
}

/// How the frequencies of a rotation are slowed, as numbers: the frequency f of pair i, in radians per position,
/// becomes f (k + (1 - k) slowed) with `k = clamp(constant + slope f + along i, 0, 1)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slowing {
    /// The factor of the share 1 - k.
    pub slowed: f64,
    /// k of frequency 0 in pair 0.
    pub constant: f64,
    /// The increase of k per unit of frequency.
    pub slope: f64,
    /// The increase of k per pair.
    pub along: f64,
}

impl Rotation {
    /// Angle of pair `i` at position 1, in radians.
    pub fn frequency(&self, i: usize) -> f64 {
        let frequency = (i as f64 * self.per_pair()).exp2();
        let Slowing { slowed, constant, slope, along } = self.slowing();
        let kept = (constant + slope * frequency + along * i as f64).clamp(0.0, 1.0);
        frequency * (kept + (1.0 - kept) * slowed)
    }

    /// How frequencies are slowed.
    pub fn slowing(&self) -> Slowing {
        match self.scaling {
            RotaryScaling::None => Slowing { slowed: 1.0, ..Slowing::default() },
            RotaryScaling::Linear { factor } => Slowing { slowed: 1.0 / factor, ..Slowing::default() },
            RotaryScaling::Llama3 { factor, low, high, positions } => {
                let (slope, turns) = (1.0 / (high - low), positions as f64 / TAU);
                Slowing { slowed: 1.0 / factor, constant: -low * slope, slope: turns * slope, along: 0.0 }
            }
            RotaryScaling::Yarn { factor, low, high, positions, whole, .. } => {
                // The index of the pair that turns `turns` times.
                let pair = |turns: f64| (positions as f64 / (turns * TAU)).log2() / -self.per_pair();
                let (first, last) = (pair(high), pair(low));
                let (first, last) = if whole { (first.floor(), last.ceil()) } else { (first, last) };
                let (first, last) = (first.max(0.0), last.min(self.width as f64 - 1.0));
                let pairs = if first == last { 0.001 } else { last - first };
                Slowing { slowed: 1.0 / factor, constant: 1.0 + first / pairs, slope: 0.0, along: -1.0 / pairs }
            }
        }
    }

    /// The factor of rotated heads.
    pub fn stretch(&self) -> f64 {
        match self.scaling {
            RotaryScaling::None | RotaryScaling::Linear { .. } | RotaryScaling::Llama3 { .. } => 1.0,
            RotaryScaling::Yarn { stretch, .. } => stretch,
        }
    }

    /// log2 of the ratio of a pair's frequency to that of the pair before, without scaling.
    pub fn per_pair(&self) -> f64 {
        -2.0 / self.width.max(1) as f64 * self.base.log2()
    }
}

/// A window that slides over an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Step in both axes.
    pub stride: usize,
    /// Rows and columns added on every side.
    pub padding: usize,
}

impl Window {
    /// The output's height and width, or `None` where the kernel does not fit.
    pub fn out(&self, height: usize, width: usize) -> Option<[usize; 2]> {
        let along = |size: usize, kernel: usize| {
            let padded = self.padding.checked_mul(2)?.checked_add(size)?;
            Some(padded.checked_sub(kernel)?.checked_div(self.stride)? + 1)
        };
        Some([along(height, self.kernel[0])?, along(width, self.kernel[1])?])
    }
}

impl Op {
    /// The op's name in messages and tables.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embedding { .. } => "embedding",
            Op::EmbeddingGrad { .. } => "embedding_grad",
            Op::AddPosition => "add_position",
            Op::AddPositionGrad => "add_position_grad",
            Op::Linear { .. } => "linear",
            Op::LinearGradInput { .. } => "linear_grad_input",
            Op::LinearGradWeight { .. } => "linear_grad_weight",
            Op::Activation(_) => "activation",
            Op::ActivationGrad(_) => "activation_grad",
            Op::Glu(_) => "glu",
            Op::GluGrad(_) => "glu_grad",
            Op::Add => "add",
            Op::Scale(_) => "scale",
            Op::Dropout { .. } => "dropout",
            Op::LayerNorm { .. } => "layernorm",
            Op::LayerNormGrad => "layernorm_grad",
            Op::RmsNorm { .. } => "rmsnorm",
            Op::RmsNormGrad => "rmsnorm_grad",
            Op::Rotary(_) => "rotary",
            Op::Attention(_) => "attention",
            Op::AttentionGrad(_) => "attention_grad",
            Op::CrossEntropy => "cross_entropy",
            Op::CrossEntropyGrad => "cross_entropy_grad",
            Op::MeanSquaredError => "mean_squared_error",
            Op::MeanSquaredErrorGrad => "mean_squared_error_grad",
            Op::LossSum => "loss_sum",
            Op::Conv2d(_) => "conv2d",
            Op::Conv2dGradInput(_) => "conv2d_grad_input",
            Op::Conv2dGradWeight(_) => "conv2d_grad_weight",
            Op::Conv2dGradBias => "conv2d_grad_bias",
            Op::BatchNorm { .. } => "batchnorm",
            Op::UpdateRunning { .. } => "update_running",
            Op::BatchNormEval { .. } => "batchnorm_eval",
            Op::BatchNormGrad => "batchnorm_grad",
            Op::MaxPool(_) => "max_pool",
            Op::MaxPoolGrad(_) => "max_pool_grad",
            Op::AvgPool(_) => "avg_pool",
            Op::AvgPoolGrad(_) => "avg_pool_grad",
            Op::Transpose { .. } => "transpose",
            Op::Shift { .. } => "shift",
            Op::Copy => "copy",
            Op::Custom(custom) => custom.0.name(),
            Op::Zero => "zero",
        }
    }

    /// Whether a forward op's input holds integers: ids, labels, a mask.
    pub fn reads_integers(&self, input: usize) -> bool {
        match self {
            Op::Embedding { .. } => input == 0,
            Op::CrossEntropy => input == 1,
            Op::Attention(kind) => kind.masked && input == if kind.packed { 1 } else { 3 },
            _ => false,
        }
    }

    /// The element type of a forward op's input, in a model of `float`.
    pub fn input_dtype(&self, input: usize, float: DType) -> DType {
        match self {
            _ if self.reads_integers(input) => DType::I32,
            Op::UpdateRunning { .. } | Op::LossSum => float.wide(),
            Op::BatchNormEval { .. } if input >= 3 => float.wide(),
            _ => float,
        }
    }

    /// The element type of an output, in a model of `float`: statistics, losses and parameters' gradients are wide. A
    /// sum or a copy in the backward pass has the type of the gradient that it is part of.
    pub fn output_dtype(&self, output: usize, float: DType) -> DType {
        match self {
            Op::MaxPool(_) if output == 1 => DType::I32,
            Op::CrossEntropy
            | Op::MeanSquaredError
            | Op::LossSum
            | Op::EmbeddingGrad { .. }
            | Op::AddPositionGrad
            | Op::LinearGradWeight { .. }
            | Op::Conv2dGradWeight(_)
            | Op::Conv2dGradBias
            | Op::Zero => float.wide(),
            Op::LayerNorm { .. }
            | Op::LayerNormGrad
            | Op::RmsNorm { .. }
            | Op::RmsNormGrad
            | Op::Attention(_)
            | Op::CrossEntropyGrad
            | Op::BatchNorm { .. }
            | Op::BatchNormGrad
                if output > 0 =>
            {
                float.wide()
            }
            _ => float,
        }
    }

    /// The input that output 0 may overwrite if this is that input's last use, for an op with `inputs` inputs.
    pub fn in_place_input(&self, inputs: usize) -> Option<usize> {
        match self {
            Op::Activation(_)
            | Op::ActivationGrad(_)
            | Op::Glu(_)
            | Op::GluGrad(_)
            | Op::Add
            | Op::Scale(_)
            | Op::Dropout { .. }
            | Op::AddPosition
            | Op::Rotary(_)
            | Op::CrossEntropyGrad
            | Op::MeanSquaredErrorGrad => Some(0),
            Op::Linear { residual, .. } if *residual => Some(inputs - 1),
            Op::LinearGradInput { activation, adds, .. } if *adds || *activation != Activation::None => {
                Some(inputs - 1)
            }
            _ => None,
        }
    }

    /// Whether the output can be added to the existing values, so that it can accumulate a parameter's gradient over
    /// microbatches.
    pub fn accumulates(&self, output: usize) -> bool {
        match self {
            Op::EmbeddingGrad { .. }
            | Op::AddPositionGrad
            | Op::LinearGradWeight { .. }
            | Op::Conv2dGradWeight(_)
            | Op::Conv2dGradBias
            | Op::Copy
            | Op::Zero => true,
            Op::LayerNormGrad | Op::RmsNormGrad | Op::BatchNormGrad => output > 0,
            _ => false,
        }
    }

    /// Whether the op can omit this output when nothing reads it.
    pub fn output_is_optional(&self, output: usize) -> bool {
        matches!(self, Op::Linear { .. } | Op::CrossEntropyGrad) && output == 1
    }

    /// Whether the op changes the shard's state: it runs once a microbatch and is left out of recomputation.
    pub fn has_side_effect(&self) -> bool {
        matches!(self, Op::UpdateRunning { .. })
    }
}
