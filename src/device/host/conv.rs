//! Two-dimensional convolution as matrix products over im2col tiles (Chellapilla, Puri & Simard 2006; the tiling follows Chetlur et al.
//! 2014, "cuDNN: Efficient Primitives for Deep Learning", arXiv:1410.0759, section 3).
//!
//! With K = C * kernel_h * kernel_w and a tile of output positions, the im2col matrix (K, tile) is written to this thread's scratch and
//! multiplied there, so that the whole matrix never exists. A tile is a range of one image's positions or, where images are small,
//! several whole images. Tiles and blocks of channels depend on the sizes alone, each part of a result is computed by one thread,
//! and sums over tiles run in tile order.
//!
//! `x`: `(N, C, H, W)`; `weight`: `(O, C, kernel_h, kernel_w)`; `out`: `(N, O, out_height, out_width)`; `bias`: `(O)`.

use super::{
    gemm::{Matrix, Threads, gemm},
    im2col::{Tile, Tiling, add_columns, gather_columns},
    parallel::{expect_len, simd, with_scratch},
    planes::{Disjoint, Planes},
    real::Real,
};
use rayon::prelude::*;
use std::ops::Range;

/// Sizes of a convolution, one group, no dilation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvSizes {
    /// Images (N).
    pub batch: usize,
    /// Channels of `x` (C).
    pub in_channels: usize,
    /// Rows of an image of `x` (H).
    pub height: usize,
    /// Columns of an image of `x` (W).
    pub width: usize,
    /// Channels of `out` (O).
    pub out_channels: usize,
    /// Rows of a filter.
    pub kernel_h: usize,
    /// Columns of a filter.
    pub kernel_w: usize,
    /// Step of the filter, in both directions; at least 1.
    pub stride: usize,
    /// Rows and columns of zeros on each side.
    pub padding: usize,
    /// Rows of an image of `out`: `(height + 2 padding - kernel_h) / stride + 1`.
    pub out_height: usize,
    /// Columns of an image of `out`: `(width + 2 padding - kernel_w) / stride + 1`.
    pub out_width: usize,
}

impl ConvSizes {
    /// Elements of a plane of `x`.
    pub fn positions(&self) -> usize {
        self.height * self.width
    }

    /// Elements of a plane of `out`.
    pub fn out_positions(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Weights of one filter in one input channel.
    pub fn taps(&self) -> usize {
        self.kernel_h * self.kernel_w
    }

    /// Weights of one filter (K).
    pub fn filter_elems(&self) -> usize {
        self.in_channels * self.taps()
    }

    /// Whether the im2col matrix of an image is the image itself.
    fn is_pointwise(&self) -> bool {
        self.kernel_h == 1 && self.kernel_w == 1 && self.stride == 1 && self.padding == 0
    }

    fn check_lens(&self, x: usize, weight: usize, out: usize) {
        expect_len("conv", "x", x, self.batch * self.in_channels * self.positions());
        expect_len("conv", "weight", weight, self.out_channels * self.filter_elems());
        expect_len("conv", "out", out, self.batch * self.out_channels * self.out_positions());
    }
}

/// Tasks that a call is cut into where its sizes allow: enough to keep a dozen threads even.
const TASKS: usize = 16;
/// Rows of a matrix product below which cutting it further costs more than an idle thread.
const BLOCK_ROWS: usize = 48;

/// Ranges of channels, of nearly equal size.
#[derive(Clone, Copy)]
struct Blocks {
    channels: usize,
    size: usize,
}

impl Blocks {
    /// Cuts `channels` of `rows` matrix rows each into about `wanted` blocks of at least [`BLOCK_ROWS`] rows.
    fn new(channels: usize, rows: usize, wanted: usize) -> Self {
        let most = (channels * rows / BLOCK_ROWS).clamp(1, channels.max(1));
        Blocks { channels, size: channels.div_ceil(wanted.clamp(1, most)).max(1) }
    }

    fn count(&self) -> usize {
        self.channels.div_ceil(self.size)
    }

    fn range(&self, index: usize) -> Range<usize> {
        let start = index * self.size;
        start..(start + self.size).min(self.channels)
    }
}

/// `out[n,o,p] = bias[o] + sum over k of weight[o,k] * im2col(x)[n,k,p]`. Overwrites `out`.
pub fn forward<T: Real>(out: &mut [T], x: &[T], weight: &[T], bias: Option<&[T]>, sizes: &ConvSizes) {
    sizes.check_lens(x.len(), weight.len(), out.len());
    if let Some(bias) = bias {
        expect_len("conv", "bias", bias.len(), sizes.out_channels);
    }
    if out.is_empty() {
        return;
    }
    let (k, positions) = (sizes.filter_elems(), sizes.out_positions());
    let tiling = Tiling::new::<T>(sizes, k);
    let blocks = Blocks::new(sizes.out_channels, 1, TASKS.div_ceil(tiling.count()));
    let out = Disjoint::new(out);
    (0..tiling.count() * blocks.count()).into_par_iter().with_max_len(1).for_each(|task| {
        let tile = tiling.tile(task / blocks.count());
        let block = blocks.range(task % blocks.count());
        let width = tile.width();
        with_scratch::<T, _>((k + block.len()) * width, |scratch| {
            let (columns, product) = scratch.split_at_mut(k * width);
            let columns = columns_of(columns, x, &tile, 0..sizes.in_channels, sizes);
            let filters = Matrix::rows(&weight[block.start * k..block.end * k], k);
            gemm(product, width, filters, columns, [block.len(), width, k], false, Threads::One);
            for (row, channel) in block.enumerate() {
                let bias = bias.map_or(T::ZERO, |bias| bias[channel]);
                for (at, image) in tile.images.clone().enumerate() {
                    let start = (image * sizes.out_channels + channel) * positions + tile.positions.start;
                    // SAFETY: tiles and blocks of channels share no element of `out`, and a task visits each of its own once.
                    let out = unsafe { out.range(start, tile.positions.len()) };
                    let product = &product[row * width + at * tile.positions.len()..][..out.len()];
                    simd(
                        #[inline(always)]
                        || {
                            for (out, &product) in out.iter_mut().zip(product) {
                                *out = product + bias;
                            }
                        },
                    );
                }
            }
        });
    });
}

/// The im2col matrix of a tile and a range of input channels, `(channels * taps, tile)`: gathered into `scratch`, or `x` itself.
fn columns_of<'a, T: Real>(
    scratch: &'a mut [T],
    x: &'a [T],
    tile: &Tile,
    channels: Range<usize>,
    sizes: &ConvSizes,
) -> Matrix<'a, T> {
    if sizes.is_pointwise() && tile.images.len() == 1 {
        return image_rows(x, tile, channels, sizes.in_channels, sizes.positions());
    }
    gather_columns(scratch, x, tile, channels, sizes);
    Matrix::rows(scratch, tile.width())
}

/// The values of one image's channels at a tile's positions, as they lie in memory: `(channels, tile)`.
fn image_rows<'a, T>(
    data: &'a [T],
    tile: &Tile,
    channels: Range<usize>,
    all_channels: usize,
    positions: usize,
) -> Matrix<'a, T> {
    let image = tile.images.start * all_channels * positions;
    let end = image + channels.end * positions;
    let start = (image + channels.start * positions + tile.positions.start).min(end);
    Matrix::rows(&data[start..end], positions)
}

/// The gradient at a tile's outputs for a range of output channels, `(channels, tile)`: copied to `scratch` where the tile has
/// several images, otherwise as it lies in `d_y`.
fn outputs_of<'a, T: Real>(
    scratch: &'a mut [T],
    d_y: &'a [T],
    tile: &Tile,
    channels: Range<usize>,
    sizes: &ConvSizes,
) -> Matrix<'a, T> {
    let positions = sizes.out_positions();
    if tile.images.len() == 1 {
        return image_rows(d_y, tile, channels, sizes.out_channels, positions);
    }
    let width = tile.width();
    for (row, channel) in channels.enumerate() {
        for (at, image) in tile.images.clone().enumerate() {
            let start = (image * sizes.out_channels + channel) * positions;
            scratch[row * width + at * positions..][..positions].copy_from_slice(&d_y[start..start + positions]);
        }
    }
    Matrix::rows(scratch, width)
}

/// `d_x = col2im(weight^T d_y)`: every output's gradient, times the filter, added where the filter lay. Overwrites `d_x`.
pub fn grad_input<T: Real>(d_x: &mut [T], d_y: &[T], weight: &[T], sizes: &ConvSizes) {
    sizes.check_lens(d_x.len(), weight.len(), d_y.len());
    if d_x.is_empty() {
        return;
    }
    let (k, taps) = (sizes.filter_elems(), sizes.taps());
    // One task adds all tiles of its images and channels, in order. The channels are cut for the threads' sake, the tiles for the scratch's.
    let groups = Tiling::new::<T>(sizes, k).image_groups();
    let blocks = Blocks::new(sizes.in_channels, taps, TASKS.div_ceil(groups));
    let tiling = Tiling::new::<T>(sizes, blocks.size * taps + sizes.out_channels).with_groups_of(groups);
    let d_x = Disjoint::new(d_x);
    (0..groups * blocks.count()).into_par_iter().with_max_len(1).for_each(|task| {
        let (group, channels) = (task / blocks.count(), blocks.range(task % blocks.count()));
        let rows = channels.len() * taps;
        let filters =
            Matrix { data: &weight[(channels.start * taps).min(weight.len())..], row_stride: 1, col_stride: k };
        for image in tiling.images(group) {
            let start = (image * sizes.in_channels + channels.start) * sizes.positions();
            // SAFETY: groups of images and blocks of channels share no element of `d_x`; no other range of this task is alive.
            unsafe { d_x.range(start, channels.len() * sizes.positions()) }.fill(T::ZERO);
        }
        for tile in tiling.tiles_of(group) {
            let width = tile.width();
            with_scratch::<T, _>((rows + sizes.out_channels) * width, |scratch| {
                let (columns, outputs) = scratch.split_at_mut(rows * width);
                let outputs = outputs_of(outputs, d_y, &tile, 0..sizes.out_channels, sizes);
                gemm(columns, width, filters, outputs, [rows, width, sizes.out_channels], false, Threads::One);
                for (at, image) in tile.images.clone().enumerate() {
                    let start = (image * sizes.in_channels + channels.start) * sizes.positions();
                    // SAFETY: as above.
                    let d_x = unsafe { d_x.range(start, channels.len() * sizes.positions()) };
                    add_columns(d_x, columns, at, &tile, sizes);
                }
            });
        }
    });
}

/// `d_weight[o,k] = sum over n, p of d_y[n,o,p] * im2col(x)[n,k,p]`. Overwrites `d_w`, or adds to it when `accumulate`.
pub fn grad_weight<T: Real>(d_w: &mut [T], d_y: &[T], x: &[T], accumulate: bool, sizes: &ConvSizes) {
    sizes.check_lens(x.len(), d_w.len(), d_y.len());
    if d_w.is_empty() {
        return;
    }
    let (k, taps) = (sizes.filter_elems(), sizes.taps());
    // A block of input channels costs no gathering twice, a block of output channels does: the latter only where the former are few.
    let inputs = Blocks::new(sizes.in_channels, taps, TASKS);
    let outputs = Blocks::new(sizes.out_channels, 1, TASKS.div_ceil(inputs.count()));
    let tiling = Tiling::new::<T>(sizes, inputs.size * taps + outputs.size);
    let d_w = Disjoint::new(d_w);
    (0..inputs.count() * outputs.count()).into_par_iter().with_max_len(1).for_each(|task| {
        let (channels, block) = (inputs.range(task / outputs.count()), outputs.range(task % outputs.count()));
        let (rows, most) = (channels.len() * taps, tiling.greatest_width());
        with_scratch::<T, _>((rows + block.len()) * most + block.len() * rows, |scratch| {
            let (sum, scratch) = scratch.split_at_mut(block.len() * rows);
            let (columns, d_outs) = scratch.split_at_mut(rows * most);
            if tiling.count() == 0 {
                sum.fill(T::ZERO);
            }
            for index in 0..tiling.count() {
                let tile = tiling.tile(index);
                let width = tile.width();
                let columns = columns_of(&mut columns[..rows * width], x, &tile, channels.clone(), sizes);
                let d_out = outputs_of(&mut d_outs[..block.len() * width], d_y, &tile, block.clone(), sizes);
                let product = [block.len(), rows, width];
                gemm(sum, rows, d_out, columns.transposed(), product, index > 0, Threads::One);
            }
            for (sum, channel) in sum.chunks(rows).zip(block) {
                // SAFETY: blocks of input and output channels share no element of `d_w`.
                let d_w = unsafe { d_w.range(channel * k + channels.start * taps, rows) };
                if accumulate {
                    for (d_w, &sum) in d_w.iter_mut().zip(sum) {
                        *d_w += sum;
                    }
                } else {
                    d_w.copy_from_slice(sum);
                }
            }
        });
    });
}

/// `d_bias[o] = sum over n, p of d_y[n,o,p]`, summed in f64. Overwrites `d_b`, or adds to it when `accumulate`.
pub fn grad_bias<T: Real>(d_b: &mut [T], d_y: &[T], accumulate: bool, sizes: &ConvSizes) {
    expect_len("conv", "d_bias", d_b.len(), sizes.out_channels);
    expect_len("conv", "d_y", d_y.len(), sizes.batch * sizes.out_channels * sizes.out_positions());
    let walk = Planes::new(sizes.batch, sizes.out_channels, sizes.out_positions());
    d_b.par_iter_mut().enumerate().for_each(|(channel, d_b)| {
        let [sum] = walk.sums(
            channel,
            d_y,
            d_y,
            #[inline(always)]
            |d_y, _| [d_y.to_f64()],
        );
        let sum = T::from_f64(sum);
        *d_b = if accumulate { *d_b + sum } else { sum };
    });
}

#[cfg(test)]
mod tests;
