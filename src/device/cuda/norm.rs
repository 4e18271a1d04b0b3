//! Launches of `kernels/norm.cu` and `norm_grad.cu`: layernorm, and rmsnorm, which is the same without a mean and a
//! bias.

use super::column_sum;
use super::launch::{Launch, Ptr};
use super::operands::Operands;
use super::queue::Queue;
use crate::base::{DType, Result};
use crate::graph::{NORM_COLUMNS, RowParts, norm_parts};

/// Warps of a block of the forward kernels that give rows to warps; packs a lane up to which the first takes them, two
/// rows a warp, and the second, one row a warp.
const FORWARD_WARPS: usize = 4;
const FORWARD_PACKS: [usize; 2] = [4, 8];
/// Columns up to which the gradient gives a row to a warp, with 8 rows a block.
const GRAD_NARROW: usize = 768;
/// Most threads that share a row, forward and in the gradient.
const FORWARD_THREADS: usize = 512;
const GRAD_THREADS: usize = 512;
/// Columns a thread of the gradient where several warps take a row; of both where 16-byte accesses do not fit.
const WIDE: usize = 16;
const SINGLE: usize = 8;
/// Most rows that a thread of the gradient has a place for.
const STAGES: usize = 3;

/// x (rows, cols), weight, bias -> out, mean, rstd.
pub(super) fn forward(q: &mut Queue, o: &Operands, epsilon: f64) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let kernels = match o.in_dtype(0) {
        DType::Bf16 => ["layernorm_forward_bf16", "layernorm_forward_long_bf16", "layernorm_forward_wide_bf16"],
        _ => ["layernorm_forward_f32", "layernorm_forward_long_f32", "layernorm_forward_wide_f32"],
    };
    let (out, x, weight, bias) = (o.output(0), o.input(0), o.input(1), o.input(2));
    let row = Row::new(o.in_dtype(0), cols, &[out, x, weight, bias]);
    let arguments = |launch: Launch| launch.ptr(out).ptr(o.output(1)).ptr(o.output(2)).ptr(x).ptr(weight).ptr(bias);
    row.forward(q, kernels, arguments, rows, cols, epsilon)
}

/// d_out, x (rows, cols), weight, mean, rstd -> d_x, d_weight, d_bias.
pub(super) fn grad(q: &mut Queue, o: &Operands) -> Result<()> {
    let (rows, cols) = o.rows_cols(1);
    let kernels = match o.in_dtype(1) {
        DType::Bf16 => ["layernorm_grad_bf16", "layernorm_grad_wide_bf16", "layernorm_grad_sums_bf16"],
        _ => ["layernorm_grad_f32", "layernorm_grad_wide_f32", "layernorm_grad_sums_f32"],
    };
    let (d_x, d_out, x, weight) = (o.output(0), o.input(0), o.input(1), o.input(2));
    let row = Row::new(o.in_dtype(1), cols, &[d_x, d_out, x, weight]);
    let arguments = |launch: Launch| launch.ptr(d_out).ptr(x).ptr(weight).ptr(o.input(3)).ptr(o.input(4));
    let sums = [(o.output(1), o.accumulator(1)), (o.output(2), o.accumulator(2))];
    row.grad(q, kernels, d_x, sums, arguments, rows, cols, o.scratch())
}

/// x (rows, cols), weight -> out, rstd.
pub(super) fn rms_forward(q: &mut Queue, o: &Operands, epsilon: f64) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let kernels = match o.in_dtype(0) {
        DType::Bf16 => ["rmsnorm_forward_bf16", "rmsnorm_forward_long_bf16", "rmsnorm_forward_wide_bf16"],
        _ => ["rmsnorm_forward_f32", "rmsnorm_forward_long_f32", "rmsnorm_forward_wide_f32"],
    };
    let (out, x, weight) = (o.output(0), o.input(0), o.input(1));
    let row = Row::new(o.in_dtype(0), cols, &[out, x, weight]);
    row.forward(q, kernels, |launch| launch.ptr(out).ptr(o.output(1)).ptr(x).ptr(weight), rows, cols, epsilon)
}

/// d_out, x (rows, cols), weight, rstd -> d_x, d_weight.
pub(super) fn rms_grad(q: &mut Queue, o: &Operands) -> Result<()> {
    let (rows, cols) = o.rows_cols(1);
    let kernels = match o.in_dtype(1) {
        DType::Bf16 => ["rmsnorm_grad_bf16", "rmsnorm_grad_wide_bf16", "rmsnorm_grad_sums_bf16"],
        _ => ["rmsnorm_grad_f32", "rmsnorm_grad_wide_f32", "rmsnorm_grad_sums_f32"],
    };
    let (d_x, d_out, x, weight) = (o.output(0), o.input(0), o.input(1), o.input(2));
    let row = Row::new(o.in_dtype(1), cols, &[d_x, d_out, x, weight]);
    let arguments = |launch: Launch| launch.ptr(d_out).ptr(x).ptr(weight).ptr(o.input(3));
    let sums = [(o.output(1), o.accumulator(1)), (Ptr::NULL, 0)];
    row.grad(q, kernels, d_x, sums, arguments, rows, cols, o.scratch())
}

/// How a row is shared out.
struct Row {
    /// By 16-byte accesses.
    packed: bool,
    /// Elements of one.
    pack: usize,
}

impl Row {
    fn new(dtype: DType, cols: usize, operands: &[Ptr]) -> Row {
        let pack = if dtype == DType::Bf16 { 8 } else { 4 };
        Row { packed: cols.is_multiple_of(pack) && operands.iter().all(|p| p.0.is_multiple_of(16)), pack }
    }

    /// Columns of a thread, `packed` where packs fit, and threads for one row.
    fn threads(&self, packed: usize, most: usize, cols: usize) -> (usize, usize) {
        let each = if self.packed { packed } else { SINGLE };
        (each, (cols.div_ceil(each).next_multiple_of(32)).clamp(32, most))
    }

    /// Queues the forward kernel of `[narrow, long, wide]` that fits; `arguments` gives it its operands.
    fn forward(
        &self,
        q: &mut Queue,
        [narrow, long, wide]: [&'static str; 3],
        arguments: impl Fn(Launch) -> Launch,
        rows: usize,
        cols: usize,
        epsilon: f64,
    ) -> Result<()> {
        let packs = cols.div_ceil(32 * self.pack);
        for (kernel, most, rows_each) in [(narrow, FORWARD_PACKS[0], 2), (long, FORWARD_PACKS[1], 1)] {
            if self.packed && packs <= most {
                let blocks = rows.div_ceil(FORWARD_WARPS * rows_each);
                let launch = Launch::new(kernel, [blocks, 1, 1], 32 * FORWARD_WARPS as u32);
                return q.launch(arguments(launch).long(rows).int(cols).float(epsilon as f32));
            }
        }
        let (_, threads) = self.threads(4 * self.pack, FORWARD_THREADS, cols);
        let launch = arguments(Launch::new(wide, [rows, 1, 1], threads as u32));
        q.launch(launch.int(cols).float(epsilon as f32).int(self.packed.into()))
    }

    /// Queues the gradient's kernels: of `[narrow, wide, sums]` those that fit, then the sum of their partial column
    /// sums. `outs` are the column sums wanted, with whether they are accumulators; `arguments` gives the kernels their
    /// inputs.
    fn grad(
        &self,
        q: &mut Queue,
        [narrow, wide, sums]: [&'static str; 3],
        d_x: Ptr,
        outs: [(Ptr, usize); 2],
        arguments: impl Fn(Launch) -> Launch,
        rows: usize,
        cols: usize,
        scratch: Ptr,
    ) -> Result<()> {
        let RowParts { parts, rows: per_part } = norm_parts(rows, cols);
        if self.packed && cols <= GRAD_NARROW {
            let each = cols.div_ceil(256).max(1) * 8;
            let (stages, bytes) = self.ring(q, 256, each);
            let launch = Launch::new(narrow, [1, parts, 1], 256).shared(bytes).ptr(d_x).ptr(scratch);
            q.launch(arguments(launch).long(rows).int(cols).long(per_part).int(stages))?;
        } else {
            let (each, threads) = self.threads(WIDE, GRAD_THREADS, cols);
            let tiles = cols.div_ceil(each * threads);
            let mut means = Ptr::NULL;
            if tiles > 1 {
                debug_assert!(cols > NORM_COLUMNS, "the scratch has no room for the rows' means");
                let which = if outs[1].0 == Ptr::NULL { 1 } else { 2 };
                means = scratch.plus((which * parts * cols * 4) as u64);
                let launch = Launch::new(sums, [rows, 1, 1], 512).ptr(means);
                q.launch(arguments(launch).int(cols))?;
            }
            let block = threads * (256 / threads).max(1);
            let (stages, bytes) = self.ring(q, block, each);
            let launch = Launch::new(wide, [tiles, parts, 1], block as u32).shared(bytes).ptr(d_x).ptr(scratch);
            let launch = arguments(launch).ptr(means).long(rows).int(cols).long(per_part);
            q.launch(launch.int(threads).int(stages))?;
        }
        column_sum::finish(q, outs, parts, cols, scratch)
    }

    /// Stages of the ring of a block of the gradient, with `each` columns of x and d_out a thread, and bytes of its
    /// shared memory: as much as lets the multiprocessor's registers be used, by 512 threads. Without packs there is no
    /// ring, but column sums are joined in its place.
    fn ring(&self, q: &Queue, block: usize, each: usize) -> (usize, u32) {
        // A block's share of what one block might have; the driver takes 1 KB of each, and 2 KB are the kernel's own.
        let room = ((q.shared_bytes() + 1024) / (512 / block).max(1)) - 1024 - 2048;
        let stage = block * 2 * each * 16 / self.pack;
        let stages = if self.packed { (room / stage).clamp(1, STAGES) } else { 0 };
        (stages, (stages * stage).max(block * each * 4) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_the_same_sizes() {
        let source = include_str!("../../../kernels/norm_grad.cu");
        for (name, value) in [("GRAD_THREADS", GRAD_THREADS), ("WIDE", WIDE), ("SINGLE", SINGLE)] {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
        let source = include_str!("../../../kernels/norm.cu");
        for (name, value) in
            [("FORWARD_WARPS", FORWARD_WARPS), ("FORWARD_THREADS", FORWARD_THREADS), ("SINGLE", SINGLE)]
        {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
        const { assert!(WIDE * GRAD_THREADS >= NORM_COLUMNS && SINGLE * GRAD_THREADS >= NORM_COLUMNS) };
    }
}
