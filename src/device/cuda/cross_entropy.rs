//! Launches of `kernels/cross_entropy.cu`.

use super::launch::Launch;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::Result;

/// Most threads that take a row.
const MOST_THREADS: usize = 768;

/// Elements that a thread has on their way at once: 3 accesses of 16 bytes.
const AT_ONCE: usize = 24;

/// logits (rows, cols), labels -> row_losses.
pub(super) fn forward(q: &mut Queue, o: &Operands) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let kernel = pick(o.in_dtype(0), "cross_entropy_forward_f32", "cross_entropy_forward_bf16");
    let losses = Launch::new(kernel, [rows, 1, 1], threads(cols)).ptr(o.output(0));
    q.launch(losses.ptr(o.input(0)).ptr(o.input(1)).int(cols).int(o.pitch(0)))
}

/// logits (rows, cols), labels -> d_logits, over the logits where they die; row_losses where wanted.
pub(super) fn grad(q: &mut Queue, o: &Operands) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let kernel = pick(o.in_dtype(0), "cross_entropy_grad_f32", "cross_entropy_grad_bf16");
    let grad = Launch::new(kernel, [rows, 1, 1], threads(cols)).ptr(o.output(0)).ptr(o.optional_output(1));
    q.launch(grad.ptr(o.input(0)).ptr(o.input(1)).int(cols).int(o.pitch(0)).ptr(q.now))
}

/// Threads for a row.
fn threads(cols: usize) -> u32 {
    cols.div_ceil(AT_ONCE).next_multiple_of(32).clamp(32, MOST_THREADS) as u32
}
