//! Launches of `kernels/column_sum.cu`: sums down the columns of a matrix, for every family that needs them.

use super::launch::{Launch, Ptr};
use super::operands::pick;
use super::queue::Queue;
use crate::base::{DType, Result};
use crate::graph::{COLUMN_TILE, RowParts, row_parts};

/// Columns of a block of `column_sum_finish`.
const FINISH_TILE: usize = 32;

/// `out (cols) f32 = ` the sums down the columns of `x` (rows, cols), rows `pitch` apart, or `+=` for an `accumulator`
/// when `Now::accumulate` is set. `scratch` has [`crate::graph::column_sum_bytes`] bytes.
pub(super) fn launch(
    q: &mut Queue,
    out: Ptr,
    accumulator: usize,
    x: Ptr,
    dtype: DType,
    [rows, cols, pitch]: [usize; 3],
    scratch: Ptr,
) -> Result<()> {
    let RowParts { parts, rows: per_part } = row_parts(rows, cols);
    let kernel = pick(dtype, "column_sum_f32", "column_sum_bf16");
    let sums = Launch::new(kernel, [cols.div_ceil(COLUMN_TILE), parts, 1], 256);
    q.launch(sums.ptr(scratch).ptr(x).long(rows).int(cols).int(pitch).long(per_part))?;
    finish(q, [(out, accumulator), (Ptr::NULL, 0)], parts, cols, scratch)
}

/// Adds up partial sums (parts, cols), which lie after one another in `partials`, for one output or two: an address and
/// whether it is an accumulator. A null output has no partials.
pub(super) fn finish(q: &mut Queue, outs: [(Ptr, usize); 2], parts: usize, cols: usize, partials: Ptr) -> Result<()> {
    let count = if outs[1].0 == Ptr::NULL { 1 } else { 2 };
    let finish = Launch::new("column_sum_finish", [cols.div_ceil(FINISH_TILE), count, 1], 512);
    let finish = finish.ptr(outs[0].0).ptr(outs[1].0).ptr(partials).int(parts).int(cols);
    q.launch(finish.int(outs[0].1).int(outs[1].1).ptr(q.now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_the_same_tile() {
        let source = include_str!("../../../kernels/column_sum.cu");
        assert!(source.contains(&format!("constexpr int TILE = {COLUMN_TILE};")));
    }
}
