//! From an op of a program to its family's launch code.

use super::operands::Operands;
use super::queue::Queue;
use super::{
    activation, attention, batchnorm, conv, cross_entropy, custom, elementwise, embedding, glu, linear, loss_sum,
    mean_squared_error, norm, pool, rotary, transpose,
};
use crate::base::Result;
use crate::graph::Op;

/// Queues the kernels of one op.
///
/// # Errors
/// When a size is beyond what kernels take, or the device has failed.
pub(super) fn launch_step(q: &mut Queue, o: &Operands) -> Result<()> {
    match &o.step.op {
        Op::Embedding { .. } => embedding::forward(q, o),
        Op::EmbeddingGrad { padding } => embedding::grad(q, o, *padding),
        Op::AddPosition => elementwise::add_position(q, o),
        Op::AddPositionGrad => elementwise::add_position_grad(q, o),
        Op::Linear { activation, layout, residual } => linear::forward(q, o, *activation, *layout, *residual),
        Op::LinearGradInput { layout, activation, adds } => linear::grad_input(q, o, *layout, *activation, *adds),
        Op::LinearGradWeight { layout, bias, .. } => linear::grad_weight(q, o, *layout, *bias),
        Op::Activation(kind) => activation::forward(q, o, *kind),
        Op::ActivationGrad(kind) => activation::grad(q, o, *kind),
        Op::Glu(kind) => glu::forward(q, o, *kind),
        Op::GluGrad(kind) => glu::grad(q, o, *kind),
        Op::Add => elementwise::add(q, o),
        Op::Scale(by) => elementwise::scale(q, o, *by),
        Op::Dropout { p, stream } => elementwise::dropout(q, o, *p, *stream),
        Op::LayerNorm { epsilon } => norm::forward(q, o, *epsilon),
        Op::LayerNormGrad => norm::grad(q, o),
        Op::RmsNorm { epsilon } => norm::rms_forward(q, o, *epsilon),
        Op::RmsNormGrad => norm::rms_grad(q, o),
        Op::Rotary(rotation) => rotary::turn(q, o, rotation),
        Op::Attention(kind) => attention::forward(q, o, kind),
        Op::AttentionGrad(kind) => attention::grad(q, o, kind),
        Op::CrossEntropy => cross_entropy::forward(q, o),
        Op::CrossEntropyGrad => cross_entropy::grad(q, o),
        Op::MeanSquaredError => mean_squared_error::forward(q, o),
        Op::MeanSquaredErrorGrad => mean_squared_error::grad(q, o),
        Op::LossSum => loss_sum::forward(q, o),
        Op::Conv2d(window) => conv::forward(q, o, window),
        Op::Conv2dGradInput(window) => conv::grad_input(q, o, window),
        Op::Conv2dGradWeight(window) => conv::grad_weight(q, o, window),
        Op::Conv2dGradBias => conv::grad_bias(q, o),
        Op::BatchNorm { epsilon } => batchnorm::forward_train(q, o, *epsilon),
        Op::UpdateRunning { momentum, count } => batchnorm::update_running(q, o, *momentum, *count),
        Op::BatchNormEval { epsilon } => batchnorm::forward_eval(q, o, *epsilon),
        Op::BatchNormGrad => batchnorm::grad(q, o),
        Op::MaxPool(window) => pool::max_forward(q, o, window),
        Op::MaxPoolGrad(window) => pool::max_grad(q, o, window),
        Op::AvgPool(window) => pool::avg_forward(q, o, window),
        Op::AvgPoolGrad(window) => pool::avg_grad(q, o, window),
        Op::Transpose { axes } => transpose::transpose(q, o, axes),
        Op::Shift { by } => elementwise::shift(q, o, *by),
        Op::Custom(op) => custom::launch(q, o, op.0.as_ref()),
        Op::Copy => elementwise::copy(q, o),
        Op::Zero => elementwise::zero(q, o),
    }
}
