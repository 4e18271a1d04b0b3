//! Launches of `kernels/batchnorm.cu` and `batchnorm_grad.cu`: partial sums, a kernel that joins them, an elementwise
//! pass.

use super::launch::{Launch, Ptr};
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::{DType, Result};
use crate::graph::{COLUMN_TILE, ChannelParts, RowParts, channel_parts};

/// Threads of every block; channels that a block of the joining kernels takes, one a warp.
const THREADS: u32 = 256;
const CHANNELS: usize = 8;
/// Elements of a plane that a warp normalizes.
const FLAT_PIECE: usize = 4096;

/// x (N, C, ..), weight, bias -> out, mean, rstd, var.
pub(super) fn forward_train(q: &mut Queue, o: &Operands, epsilon: f64) -> Result<()> {
    let s = Sizes::of(o.in_axes(0));
    let dtype = o.in_dtype(0);
    let (mean, rstd) = (o.output(1), o.output(2));
    if s.planes() {
        let kernel = pick(dtype, "batchnorm_stats_planes_f32", "batchnorm_stats_planes_bf16");
        let stats = s.sums(kernel).ptr(o.scratch()).ptr(o.input(0)).long(s.images).int(s.channels).int(s.positions);
        q.launch(stats.long(s.parts.parts.rows))?;
    } else {
        let kernel = pick(dtype, "batchnorm_stats_columns_f32", "batchnorm_stats_columns_bf16");
        let stats = s.sums(kernel).ptr(o.scratch()).ptr(o.input(0)).long(s.images).long(s.cols());
        q.launch(stats.long(s.parts.parts.rows))?;
    }
    let finish = s.finish("batchnorm_stats_finish").ptr(mean).ptr(rstd).ptr(o.output(3)).ptr(o.scratch());
    q.launch(finish.int(s.parts.parts.parts).int(s.channels).int(s.parts.width).float(epsilon as f32))?;
    normalize(q, o, &s, mean, rstd, epsilon, 0)
}

/// mean (C), var (C) of `count` values a channel; running_mean, running_var change in place.
pub(super) fn update_running(q: &mut Queue, o: &Operands, momentum: f64, count: usize) -> Result<()> {
    let channels = o.step.inputs[0].shape.elems();
    let unbiased = count as f64 / count.saturating_sub(1).max(1) as f64;
    let update = Launch::new("batchnorm_update_running", [channels.div_ceil(THREADS as usize), 1, 1], THREADS);
    let update = update.ptr(o.input(2)).ptr(o.input(3)).ptr(o.input(0)).ptr(o.input(1));
    q.launch(update.int(channels).double(unbiased).double(momentum))
}

/// x (N, C, ..), weight, bias, running_mean, running_var -> out.
pub(super) fn forward_eval(q: &mut Queue, o: &Operands, epsilon: f64) -> Result<()> {
    let s = Sizes::of(o.in_axes(0));
    normalize(q, o, &s, o.input(3), o.input(4), epsilon, 1)
}

/// x, weight, bias, mean and rstd, or with `is_var` a variance -> out.
fn normalize(
    q: &mut Queue,
    o: &Operands,
    s: &Sizes,
    mean: Ptr,
    spread: Ptr,
    epsilon: f64,
    is_var: usize,
) -> Result<()> {
    let dtype = o.in_dtype(0);
    let operands = |launch: Launch| {
        let launch = launch.ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1)).ptr(o.input(2));
        launch.ptr(mean).ptr(spread)
    };
    let launch = if s.planes() {
        let kernel = pick(dtype, "batchnorm_normalize_planes_f32", "batchnorm_normalize_planes_bf16");
        let planes = s.images * s.channels;
        let pieces = planes * s.positions.div_ceil(FLAT_PIECE);
        let launch = operands(Launch::new(kernel, [pieces.div_ceil(CHANNELS), 1, 1], THREADS));
        launch.long(planes).int(s.channels).int(s.positions)
    } else {
        let kernel = pick(dtype, "batchnorm_normalize_columns_f32", "batchnorm_normalize_columns_bf16");
        let launch = operands(s.sums(kernel)).long(s.images).long(s.cols()).int(s.positions);
        launch.long(s.parts.parts.rows)
    };
    q.launch(launch.float(epsilon as f32).int(is_var))
}

/// d_out, x (N, C, ..), weight, mean, rstd -> d_x, d_weight, d_bias.
pub(super) fn grad(q: &mut Queue, o: &Operands) -> Result<()> {
    let s = Sizes::of(o.in_axes(1));
    let dtype = o.in_dtype(1);
    let (d_out, x, weight, mean, rstd) = (o.input(0), o.input(1), o.input(2), o.input(3), o.input(4));
    let RowParts { parts, rows } = s.parts.parts;
    let slopes = o.scratch().plus((2 * parts * s.channels * s.parts.width * 4) as u64);
    if s.planes() {
        let kernel = pick(dtype, "batchnorm_grad_planes_f32", "batchnorm_grad_planes_bf16");
        let sums = s.sums(kernel).ptr(o.scratch()).ptr(d_out).ptr(x).ptr(mean);
        q.launch(sums.long(s.images).int(s.channels).int(s.positions).long(rows))?;
    } else {
        let kernel = pick(dtype, "batchnorm_grad_columns_f32", "batchnorm_grad_columns_bf16");
        let sums = s.sums(kernel).ptr(o.scratch()).ptr(d_out).ptr(x).ptr(mean);
        q.launch(sums.long(s.images).long(s.cols()).int(s.positions).long(rows))?;
    }
    let finish = s.finish(pick(dtype, "batchnorm_grad_finish_f32", "batchnorm_grad_finish_bf16"));
    let finish = finish.ptr(o.output(1)).ptr(o.output(2)).ptr(slopes).ptr(o.scratch()).ptr(weight).ptr(rstd);
    let finish = finish.int(parts).int(s.channels).int(s.parts.width).double((s.images * s.positions) as f64);
    q.launch(finish.int(o.accumulator(1)).int(o.accumulator(2)).ptr(q.now))?;
    let input = s.elementwise(pick(dtype, "batchnorm_grad_input_f32", "batchnorm_grad_input_bf16"), dtype);
    let input = input.ptr(o.output(0)).ptr(d_out).ptr(x).ptr(mean).ptr(slopes);
    q.launch(input.long(s.elems()).int(s.channels).int(s.positions))
}

/// Sizes of a batch, and how its sums are divided.
struct Sizes {
    images: usize,
    channels: usize,
    positions: usize,
    parts: ChannelParts,
}

impl Sizes {
    fn of(x: &[usize]) -> Sizes {
        let positions = x[2..].iter().product();
        Sizes { images: x[0], channels: x[1], positions, parts: channel_parts(x[0], x[1], positions) }
    }

    /// Whether each plane is summed by itself.
    fn planes(&self) -> bool {
        self.parts.width != self.positions
    }

    fn cols(&self) -> usize {
        self.channels * self.positions
    }

    fn elems(&self) -> usize {
        self.images * self.cols()
    }

    /// A launch of a kernel that leaves partial sums.
    fn sums(&self, kernel: &'static str) -> Launch {
        let across = if self.planes() { self.channels } else { self.cols().div_ceil(COLUMN_TILE) };
        Launch::new(kernel, [across, self.parts.parts.parts, 1], THREADS)
    }

    /// A launch of a kernel that joins them.
    fn finish(&self, kernel: &'static str) -> Launch {
        Launch::new(kernel, [self.channels.div_ceil(CHANNELS), 1, 1], THREADS)
    }

    /// A launch of an elementwise kernel: a pack a thread.
    fn elementwise(&self, kernel: &'static str, dtype: DType) -> Launch {
        let pack = if dtype == DType::Bf16 { 8 } else { 4 };
        Launch::new(kernel, [self.elems().div_ceil(pack).div_ceil(THREADS as usize), 1, 1], THREADS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::PLANE_PIECE;

    #[test]
    fn kernels_have_the_same_sizes() {
        let source =
            concat!(include_str!("../../../kernels/gpu/batchnorm.cuh"), include_str!("../../../kernels/batchnorm.cu"));
        assert!(source.contains(&format!("constexpr int TILE = {COLUMN_TILE};")));
        assert!(source.contains(&format!("constexpr int PIECE = {PLANE_PIECE};")));
        assert!(source.contains(&format!("constexpr int FLAT_PIECE = {FLAT_PIECE};")));
        assert!(source.contains(&format!("constexpr int WARPS = {CHANNELS};")));
    }
}
