//! From an op of a program to its body: takes the operands apart and calls the op's file.
//!
//! Bodies compute in f32 or f64. An op with bf16 operands runs on f32 copies of them (see `widen`), and what it writes
//! is rounded to the nearest bf16, ties to even: as on a device that computes in f32 and stores bf16.

use super::loss_sum::loss_sum;
use super::operands::Operands;
use super::parallel::SharedScratch;
use super::real::Real;
use super::strided::{Rows, RowsMut};
use super::{
    activation, attention, batchnorm, conv, cross_entropy, custom, elementwise, embedding, glu, linear,
    mean_squared_error, norm, optimizer, pool, rotary, transpose, widen,
};
use crate::base::DType;
use crate::device::Scalars;
use crate::graph::{Activation, AttentionKind, ConvSizes, Op, Window};
use batchnorm::BatchnormSizes;
use pool::PoolSizes;

/// Runs one op. With `check`, tells whether output 0 is finite; otherwise true.
pub(super) fn run_step(o: &Operands, scalars: &Scalars, check: bool, scratch: &mut SharedScratch) -> bool {
    let check = check && o.step.ends_layer;
    let buffers = || o.step.inputs.iter().chain(o.step.outputs.iter().flatten());
    if buffers().any(|b| b.dtype == DType::F64) {
        body::<f64>(o, scalars, scratch);
        return !check || optimizer::is_finite(o.output::<f64>(0));
    }
    if buffers().any(|b| b.dtype == DType::Bf16) {
        widen::inputs(o);
        body::<f32>(o, scalars, scratch);
        widen::outputs(o);
    } else {
        body::<f32>(o, scalars, scratch);
    }
    !check || optimizer::is_finite(o.output::<f32>(0))
}

fn body<T: Real>(o: &Operands, scalars: &Scalars, scratch: &mut SharedScratch) {
    let adds = || o.adds_to(0, scalars);
    match &o.step.op {
        Op::Embedding { .. } => embedding::forward::<T>(o.output(0), o.input(0), o.input(1), o.out_cols()),
        Op::EmbeddingGrad { padding } => {
            let &[rows, cols] = o.out_axes(0) else { unreachable!("a table is a matrix") };
            embedding::grad::<T>(o.output(0), o.input(0), o.input(1), *padding, adds(), rows, cols);
        }
        Op::AddPosition => {
            let &[b, t, c] = o.in_axes(0) else { unreachable!("checked by the builder") };
            elementwise::add_position::<T>(o.output(0), o.unless_in_place(0), o.input(1), b, t, c);
        }
        Op::AddPositionGrad => {
            let &[b, t, c] = o.in_axes(0) else { unreachable!("checked by the builder") };
            elementwise::add_position_grad::<T>(o.output(0), o.input(0), adds(), b, t, o.out_axes(0)[0], c);
        }
        Op::Linear { activation, layout, residual } => {
            let (rows, inputs) = o.rows_cols(0);
            let operands = o.step.inputs.len() - usize::from(*residual);
            let bias = (operands > 2).then(|| o.input(2));
            let residual = residual.then(|| o.input_to_the_end(operands));
            linear::forward::<T>(
                o.output(0),
                o.optional_output(1),
                o.input(0),
                o.input(1),
                bias,
                residual,
                *activation,
                *layout,
                rows,
                inputs,
                o.out_cols(),
            );
        }
        Op::LinearGradInput { layout, activation, adds } => {
            let (rows, outputs) = o.rows_cols(0);
            let pre = (*activation != Activation::None).then(|| (o.input_to_the_end(2), *activation));
            let addend = adds.then(|| o.input_to_the_end(2));
            linear::grad_input::<T>(
                o.output(0),
                o.input(0),
                o.input(1),
                pre,
                addend,
                *layout,
                rows,
                o.out_cols(),
                outputs,
            );
        }
        Op::LinearGradWeight { layout, bias, adds: more } => {
            let (rows, inputs) = o.rows_cols(0);
            let (_, outputs) = o.rows_cols(1);
            let adds = |i| *more || o.adds_to(i, scalars);
            linear::grad_weight::<T>(o.output(0), o.input(0), o.input(1), adds(0), *layout, rows, inputs, outputs);
            if *bias {
                linear::grad_bias::<T>(o.output(1), o.input(1), adds(1), rows, outputs);
            }
        }
        Op::Activation(kind) => activation::forward::<T>(o.output(0), o.unless_in_place(0), *kind),
        Op::ActivationGrad(kind) => activation::grad::<T>(o.output(0), o.unless_in_place(0), o.input(1), *kind),
        Op::Glu(kind) => glu::forward::<T>(o.output(0), o.unless_in_place(0), o.input(1), *kind),
        Op::GluGrad(kind) => {
            glu::grad::<T>(o.output(0), o.output(1), o.unless_in_place(0), o.input(1), o.input(2), *kind);
        }
        Op::Add => elementwise::add::<T>(o.output(0), o.unless_in_place(0), o.input(1)),
        Op::Scale(by) => elementwise::scale::<T>(o.output(0), o.unless_in_place(0), *by),
        Op::Dropout { p, stream } => {
            elementwise::dropout::<T>(o.output(0), o.unless_in_place(0), *p, scalars.stream(*stream));
        }
        Op::LayerNorm { epsilon } => {
            let (rows, cols) = o.rows_cols(0);
            norm::forward::<T>(
                o.output(0),
                o.output(1),
                o.output(2),
                o.input(0),
                o.input(1),
                o.input(2),
                rows,
                cols,
                *epsilon,
            );
        }
        Op::LayerNormGrad => {
            let adds = o.adds_to_both::<T>(scalars);
            let (rows, cols) = o.rows_cols(1);
            norm::grad::<T>(
                o.output(0),
                o.output(1),
                o.output(2),
                o.input(0),
                o.input(1),
                o.input(2),
                o.input(3),
                o.input(4),
                adds,
                rows,
                cols,
            );
        }
        Op::RmsNorm { epsilon } => {
            let (rows, cols) = o.rows_cols(0);
            norm::rms_forward::<T>(o.output(0), o.output(1), o.input(0), o.input(1), rows, cols, *epsilon);
        }
        Op::RmsNormGrad => {
            let adds = o.adds_to(1, scalars);
            let (rows, cols) = o.rows_cols(1);
            norm::rms_grad::<T>(
                o.output(0),
                o.output(1),
                o.input(0),
                o.input(1),
                o.input(2),
                o.input(3),
                adds,
                rows,
                cols,
            );
        }
        Op::Rotary(rotation) => {
            let &[_, positions, cols] = o.in_axes(0) else { unreachable!("checked by the builder") };
            rotary::turn::<T>(o.output(0), o.unless_in_place(0), rotation, positions, cols);
        }
        Op::Attention(kind) => attention_forward::<T>(o, kind, scalars),
        Op::AttentionGrad(kind) => attention_grad::<T>(o, kind, scalars),
        Op::CrossEntropy => {
            let (rows, cols) = o.rows_cols(0);
            cross_entropy::forward::<T>(o.output(0), o.input(0), o.input(1), rows, cols);
        }
        Op::CrossEntropyGrad => {
            let (rows, cols) = o.rows_cols(0);
            cross_entropy::grad::<T>(
                o.output(0),
                o.optional_output(1),
                o.unless_in_place(0),
                o.input(1),
                scalars.loss_scale,
                rows,
                cols,
            );
        }
        Op::MeanSquaredError => {
            let (rows, cols) = o.rows_cols(0);
            mean_squared_error::forward::<T>(o.output(0), o.input(0), o.input(1), rows, cols);
        }
        Op::LossSum => loss_sum::<T>(o.output(0), o.input(0), scalars.loss_scale),
        Op::MeanSquaredErrorGrad => {
            let (x, scale) = (o.unless_in_place(0), scalars.loss_scale);
            mean_squared_error::grad::<T>(o.output(0), x, o.input(1), scale, o.out_cols());
        }
        Op::Conv2d(window) => {
            let bias = (o.step.inputs.len() > 2).then(|| o.input(2));
            let sizes = ConvSizes::new(window, o.in_axes(0), o.out_axes(0));
            conv::forward::<T>(o.output(0), o.input(0), o.input(1), bias, &sizes, scratch);
        }
        Op::Conv2dGradInput(window) => {
            let sizes = ConvSizes::new(window, o.out_axes(0), o.in_axes(0));
            conv::grad_input::<T>(o.output(0), o.input(0), o.input(1), &sizes, scratch);
        }
        Op::Conv2dGradWeight(window) => {
            let sizes = ConvSizes::new(window, o.in_axes(1), o.in_axes(0));
            conv::grad_weight::<T>(o.output(0), o.input(0), o.input(1), adds(), &sizes, scratch);
        }
        Op::Conv2dGradBias => {
            let window = Window { kernel: [1, 1], stride: 1, padding: 0 };
            let sizes = ConvSizes::new(&window, o.in_axes(0), o.in_axes(0));
            conv::grad_bias::<T>(o.output(0), o.input(0), adds(), &sizes);
        }
        Op::BatchNorm { epsilon } => {
            let sizes = batchnorm_sizes(o.in_axes(0));
            batchnorm::forward_train::<T>(
                o.output(0),
                o.output(1),
                o.output(3),
                o.output(2),
                o.input(0),
                o.input(1),
                o.input(2),
                &sizes,
                *epsilon,
            );
        }
        Op::UpdateRunning { momentum, count } => {
            let state = |i: usize| {
                let buffer = &o.step.inputs[i];
                // SAFETY: running statistics are this unit's alone; no input or output lies over them.
                bytemuck::cast_slice_mut::<u8, T>(unsafe { o.arena.slice_mut(o.offset(buffer), buffer.bytes()) })
            };
            batchnorm::update_running::<T>(state(2), state(3), o.input(0), o.input(1), *count, *momentum);
        }
        Op::BatchNormEval { epsilon } => {
            let sizes = batchnorm_sizes(o.in_axes(0));
            batchnorm::forward_eval::<T>(
                o.output(0),
                o.input(0),
                o.input(1),
                o.input(2),
                o.input(3),
                o.input(4),
                &sizes,
                *epsilon,
            );
        }
        Op::BatchNormGrad => {
            let adds = o.adds_to_both::<T>(scalars);
            let sizes = batchnorm_sizes(o.in_axes(1));
            batchnorm::grad::<T>(
                o.output(0),
                o.output(1),
                o.output(2),
                o.input(0),
                o.input(1),
                o.input(2),
                o.input(3),
                o.input(4),
                adds,
                &sizes,
            );
        }
        Op::MaxPool(window) => {
            let sizes = pool_sizes(window, o.in_axes(0), o.out_axes(0));
            pool::max_forward::<T>(o.output(0), o.output(1), o.input(0), &sizes);
        }
        Op::MaxPoolGrad(window) => {
            let sizes = pool_sizes(window, o.out_axes(0), o.in_axes(1));
            pool::max_grad::<T>(o.output(0), o.input(0), o.input(1), &sizes);
        }
        Op::Shift { by } => {
            let (&[b, t, c], &[_, rows, _]) = (o.in_axes(0), o.out_axes(0)) else {
                unreachable!("checked by the builder")
            };
            elementwise::shift::<T>(o.output(0), o.input(0), *by, b, t, rows, c);
        }
        Op::AvgPool(window) => {
            let sizes = pool_sizes(window, o.in_axes(0), o.out_axes(0));
            pool::avg_forward::<T>(o.output(0), o.input(0), &sizes, true);
        }
        Op::AvgPoolGrad(window) => {
            let sizes = pool_sizes(window, o.out_axes(0), o.in_axes(0));
            pool::avg_grad::<T>(o.output(0), o.input(0), &sizes, true);
        }
        Op::Transpose { axes } => transpose::transpose::<T>(o.output(0), o.input(0), o.in_axes(0), axes),
        Op::Custom(op) => custom::run(op.0.as_ref(), o),
        Op::Copy => {
            let out = o.output::<T>(0);
            if adds() {
                optimizer::add_assign(out, o.input(0));
            } else {
                out.copy_from_slice(o.input(0));
            }
        }
        Op::Zero => {
            if !adds() {
                o.output::<T>(0).fill(T::ZERO);
            }
        }
    }
}

fn pool_sizes(window: &Window, x: &[usize], out: &[usize]) -> PoolSizes {
    let (&[n, c, height, width], &[_, _, out_height, out_width]) = (x, out) else {
        unreachable!("images have four axes, as the builder checks")
    };
    let [kernel_h, kernel_w] = window.kernel;
    let Window { stride, padding, .. } = *window;
    PoolSizes { planes: n * c, height, width, kernel_h, kernel_w, stride, padding, out_height, out_width }
}

fn batchnorm_sizes(x: &[usize]) -> BatchnormSizes {
    BatchnormSizes { batch: x[0], channels: x[1], positions: x[2..].iter().product() }
}

/// Attention's inputs, which begin at operand `first`.
fn attention_inputs<'a, T: Real>(
    o: &Operands<'a>,
    kind: &AttentionKind,
    first: usize,
    scalars: &Scalars,
) -> attention::Inputs<'a, T> {
    let AttentionKind { heads, kv_heads, width, packed, .. } = *kind;
    let q_axes = o.in_axes(first);
    let rows =
        |operand: usize, offset: usize| Rows { data: o.input::<T>(operand), offset, stride: o.in_axes(operand)[2] };
    let (q, k, v, keys, tensors) = if packed {
        let (k, v) = (heads * width, (heads + kv_heads) * width);
        (rows(first, 0), rows(first, k), rows(first, v), q_axes[1], 1)
    } else {
        (rows(first, 0), rows(first + 1, 0), rows(first + 2, 0), o.in_axes(first + 1)[1], 3)
    };
    attention::Inputs {
        q,
        k,
        v,
        key_mask: kind.masked.then(|| o.input::<i32>(first + tensors)),
        sizes: attention::Sizes { batch: q_axes[0], heads, kv_heads, queries: q_axes[1], keys, width },
        scale: kind.scale,
        causal: kind.causal,
        dropout: kind.dropout.map(|(p, op)| (p, scalars.stream(op))),
    }
}

fn attention_forward<T: Real>(o: &Operands, kind: &AttentionKind, scalars: &Scalars) {
    attention::forward::<T>(o.output(0), o.output(1), &attention_inputs(o, kind, 0, scalars));
}

fn attention_grad<T: Real>(o: &Operands, kind: &AttentionKind, scalars: &Scalars) {
    let inputs = attention_inputs::<T>(o, kind, 3, scalars);
    let AttentionKind { heads, kv_heads, width, .. } = *kind;
    let (q, kv) = (heads * width, kv_heads * width);
    let [d_q, d_k, d_v] = if kind.packed {
        RowsMut::split(o.output(0), q + 2 * kv, [0..q, q..q + kv, q + kv..q + 2 * kv])
    } else {
        [RowsMut::whole(o.output(0), q), RowsMut::whole(o.output(1), kv), RowsMut::whole(o.output(2), kv)]
    };
    attention::backward::<T>(d_q, d_k, d_v, o.input(0), o.input(1), o.input(2), &inputs);
}
