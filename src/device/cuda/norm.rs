//! Launches of `kernels/norm.cu`: layernorm, and rmsnorm, which is the same without a mean and a bias.

use super::column_sum;
use super::launch::{Launch, Ptr, Queue};
use super::operands::Operands;
use crate::base::{DType, Result};
use crate::graph::{NORM_COLUMNS, RowParts, norm_parts};

/// Rows of a block of the forward kernels that give a row to a warp, and columns up to which they do.
const FORWARD_ROWS: usize = 4;
const FORWARD_NARROW: usize = 1024;
/// Columns up to which the gradient's do, with 8 rows a block.
const GRAD_NARROW: usize = 768;
/// Most threads that share a row, forward and in the gradient.
const FORWARD_THREADS: usize = 640;
const GRAD_THREADS: usize = 512;
/// Columns a thread where 16-byte accesses do not fit.
const SINGLE: usize = 8;

/// x (rows, cols), weight, bias -> out, mean, rstd.
pub(super) fn forward(q: &mut Queue, o: &Operands, epsilon: f64) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    let kernels = match o.in_dtype(0) {
        DType::Bf16 => ["layernorm_forward_bf16", "layernorm_forward_wide_bf16"],
        _ => ["layernorm_forward_f32", "layernorm_forward_wide_f32"],
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
        DType::Bf16 => ["rmsnorm_forward_bf16", "rmsnorm_forward_wide_bf16"],
        _ => ["rmsnorm_forward_f32", "rmsnorm_forward_wide_f32"],
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

    /// Columns of a thread with so many packs, and threads for one row.
    fn threads(&self, packs: usize, most: usize, cols: usize) -> (usize, usize) {
        let each = if self.packed { packs * self.pack } else { SINGLE };
        (each, (cols.div_ceil(each).next_multiple_of(32)).clamp(32, most))
    }

    /// Queues the forward kernel of `[narrow, wide]` that fits; `arguments` gives it its operands.
    fn forward(
        &self,
        q: &mut Queue,
        [narrow, wide]: [&'static str; 2],
        arguments: impl Fn(Launch) -> Launch,
        rows: usize,
        cols: usize,
        epsilon: f64,
    ) -> Result<()> {
        if self.packed && cols <= FORWARD_NARROW {
            let launch = Launch::new(narrow, [rows.div_ceil(FORWARD_ROWS), 1, 1], 32 * FORWARD_ROWS as u32);
            return q.launch(arguments(launch).long(rows).int(cols).float(epsilon as f32));
        }
        let (_, threads) = self.threads(4, FORWARD_THREADS, cols);
        let launch = arguments(Launch::new(wide, [rows, 1, 1], threads as u32));
        q.launch(launch.int(cols).float(epsilon as f32).int(self.packed.into()))
    }

    /// Queues the gradient's kernels: of `[narrow, wide, sums]` those that fit, then the sum of their partial column sums.
    /// `outs` are the column sums wanted, with whether they are accumulators; `arguments` gives the kernels their inputs.
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
            let launch = Launch::new(narrow, [1, parts, 1], 256).ptr(d_x).ptr(scratch);
            q.launch(arguments(launch).long(rows).int(cols).long(per_part))?;
        } else {
            let (each, threads) = self.threads(2, GRAD_THREADS, cols);
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
            let launch = arguments(Launch::new(wide, [tiles, parts, 1], block as u32).ptr(d_x).ptr(scratch));
            let launch = launch.ptr(means).long(rows).int(cols).long(per_part);
            q.launch(launch.int(threads).int(self.packed.into()))?;
        }
        column_sum::finish(q, outs, parts, cols, scratch)
    }
}
