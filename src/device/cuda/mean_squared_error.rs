//! Launches of `kernels/mean_squared_error.cu`.

use super::launch::Launch;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::Result;

/// Columns up to which a warp has a row, and the rows of a block then.
const WARP_COLS: usize = 1024;
const WARPS: usize = 8;

/// Most threads that share a row, and the columns that each of them shall have at the least.
const MOST_THREADS: usize = 512;
const COLS_EACH: usize = 16;

/// x (rows, cols), targets -> row_losses.
pub(super) fn forward(q: &mut Queue, o: &Operands) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let (threads, rows_each) = shares(cols);
    let kernel = pick(o.in_dtype(0), "mean_squared_error_forward_f32", "mean_squared_error_forward_bf16");
    let losses = Launch::new(kernel, [rows.div_ceil(rows_each), 1, 1], (threads * rows_each) as u32).ptr(o.output(0));
    q.launch(losses.ptr(o.input(0)).ptr(o.input(1)).long(rows).int(cols).int(o.pitch(0)).int(threads))
}

/// x (rows, cols), targets -> d_x, over x where it dies.
pub(super) fn grad(q: &mut Queue, o: &Operands) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let (threads, rows_each) = shares(cols);
    let kernel = pick(o.in_dtype(0), "mean_squared_error_grad_f32", "mean_squared_error_grad_bf16");
    let grad = Launch::new(kernel, [rows.div_ceil(rows_each), 1, 1], (threads * rows_each) as u32).ptr(o.output(0));
    let grad = grad.ptr(o.input(0)).ptr(o.input(1)).long(rows).int(cols).int(o.pitch(0)).int(threads);
    q.launch(grad.ptr(q.now))
}

/// Threads that share a row, and rows of a block.
fn shares(cols: usize) -> (usize, usize) {
    if cols <= WARP_COLS {
        return (32, WARPS);
    }
    (cols.div_ceil(COLS_EACH).next_multiple_of(32).min(MOST_THREADS), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_room_for_the_threads() {
        let source = include_str!("../../../kernels/mean_squared_error.cu");
        assert!(source.contains(&format!("constexpr int THREADS = {MOST_THREADS};")));
        // The kernel takes a row of 32 threads for a warp's.
        assert!([1, WARP_COLS, WARP_COLS + 1, 1 << 20].map(shares).iter().all(|&(t, rows)| (t == 32) == (rows > 1)));
    }
}
