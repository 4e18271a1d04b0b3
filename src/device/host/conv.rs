//! Two-dimensional convolution as matrix products over im2col tiles (Chellapilla, Puri & Simard 2006; the tiling
//! follows Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", arXiv:1410.0759, section 3).
//!
//! With K = C * kernel_h * kernel_w and a tile of output positions, the im2col matrix (K, tile) is written to scratch
//! and multiplied there, so that the whole matrix never exists. A tile is a range of one image's positions or, where
//! images are small, several whole images.
//!
//! Where there are many tiles (of the gradient of x: groups of images), every thread takes one after another. Where
//! there are few, in deep layers, all threads gather, multiply and scatter one tile together, so that none gathers what
//! another one has. The gradient of few weights is summed by each thread over tiles of its own and then over threads'
//! parts; that of many by all threads together, tile after tile. Which it is, the tiles and the parts depend on the
//! sizes alone, and so do the bits.
//!
//! `x`: `(N, C, H, W)`; `weight`: `(O, C, kernel_h, kernel_w)`; `out`: `(N, O, out_height, out_width)`; `bias`: `(O)`.

use super::{
    gemm::{Matrix, Threads, gemm},
    im2col::{Room, Tile, Tiling, add_columns, copy_rows, gather_columns, window_elems},
    parallel::{CHUNK, SharedScratch, expect_len, for_each_index, simd, with_scratch},
    planes::{Disjoint, Planes},
    real::Real,
};
use crate::graph::{ConvSizes, Window};
use rayon::prelude::*;
use std::ops::Range;

impl ConvSizes {
    /// Weights of one filter (K).
    pub(super) fn filter_elems(&self) -> usize {
        self.in_channels * self.taps()
    }

    /// Whether the im2col matrix of an image is the image itself.
    fn is_the_image(&self) -> bool {
        self.window == Window { kernel: [1, 1], stride: 1, padding: 0 }
    }

    fn check_lens(&self, x: usize, weight: usize, out: usize) {
        expect_len("conv", "x", x, self.batch * self.in_channels * self.plane());
        expect_len("conv", "weight", weight, self.out_channels * self.filter_elems());
        expect_len("conv", "out", out, self.batch * self.out_channels * self.out_plane());
    }
}

/// Parts that work is cut into where its sizes allow: enough to keep a dozen threads even.
const PARTS: usize = 16;
/// A tile that one thread takes: in half a core's second-level cache on common machines, and no wider than gains
/// something.
const ROOM_OF_ONE: Room = Room { bytes: 1 << 20, columns: 512 };
/// A tile that all threads take together: in a part of a third-level cache, wide enough to pay for their meeting.
const ROOM_OF_ALL: Room = Room { bytes: 4 << 20, columns: 2048 };
/// Weights up to which threads sum their gradient apart, each over tiles of its own.
const SUMMED_APART: usize = 1 << 16;

/// `out[n,o,p] = bias[o] + sum over k of weight[o,k] * im2col(x)[n,k,p]`. Overwrites `out`.
pub fn forward<T: Real>(
    out: &mut [T],
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    sizes: &ConvSizes,
    shared: &mut SharedScratch,
) {
    sizes.check_lens(x.len(), weight.len(), out.len());
    if let Some(bias) = bias {
        expect_len("conv", "bias", bias.len(), sizes.out_channels);
    }
    if out.is_empty() {
        return;
    }
    let out = Disjoint::new(out);
    let tiling = Tiling::new::<T>(sizes, ROOM_OF_ONE);
    if tiling.count() >= PARTS {
        return for_each_index(tiling.count(), |index| {
            let tile = Work::new(tiling.tile(index), sizes, Threads::One);
            with_scratch(tile.scratch_elems(), |scratch| tile.forward(&out, x, weight, bias, scratch));
        });
    }
    let tiling = Tiling::new::<T>(sizes, ROOM_OF_ALL);
    for index in 0..tiling.count() {
        let tile = Work::new(tiling.tile(index), sizes, Threads::All);
        tile.forward(&out, x, weight, bias, shared.take(tile.scratch_elems()));
    }
}

/// `d_x = col2im(weight^T d_y)`: every output's gradient, times the filter, added where the filter lay. Overwrites
/// `d_x`.
pub fn grad_input<T: Real>(d_x: &mut [T], d_y: &[T], weight: &[T], sizes: &ConvSizes, shared: &mut SharedScratch) {
    sizes.check_lens(d_x.len(), weight.len(), d_y.len());
    if d_x.is_empty() || d_y.is_empty() || weight.is_empty() {
        return d_x.fill(T::ZERO);
    }
    let d_x = Disjoint::new(d_x);
    let tiling = Tiling::new::<T>(sizes, ROOM_OF_ONE);
    if tiling.image_groups() >= PARTS {
        // All tiles of an image by one thread.
        return for_each_index(tiling.image_groups(), |group| {
            for tile in tiling.tiles_of(group) {
                let tile = Work::new(tile, sizes, Threads::One);
                with_scratch(tile.scratch_elems(), |scratch| tile.grad_input(&d_x, d_y, weight, scratch));
            }
        });
    }
    let tiling = Tiling::new::<T>(sizes, ROOM_OF_ALL);
    for index in 0..tiling.count() {
        let tile = Work::new(tiling.tile(index), sizes, Threads::All);
        tile.grad_input(&d_x, d_y, weight, shared.take(tile.scratch_elems()));
    }
}

/// `d_weight[o,k] = sum over n, p of d_y[n,o,p] * im2col(x)[n,k,p]`. Overwrites `d_w`, or adds to it when `accumulate`.
pub fn grad_weight<T: Real>(
    d_w: &mut [T],
    d_y: &[T],
    x: &[T],
    accumulate: bool,
    sizes: &ConvSizes,
    shared: &mut SharedScratch,
) {
    sizes.check_lens(x.len(), d_w.len(), d_y.len());
    if d_w.is_empty() {
        return;
    }
    let tiling = Tiling::new::<T>(sizes, ROOM_OF_ONE);
    if tiling.count() == 0 {
        if !accumulate {
            d_w.fill(T::ZERO);
        }
    } else if d_w.len() <= SUMMED_APART {
        let (elems, tiles) = (d_w.len(), tiling.count().div_ceil(PARTS));
        let sums = shared.take::<T>(tiling.count().div_ceil(tiles) * elems);
        sums.par_chunks_mut(elems).enumerate().with_max_len(1).for_each(|(part, sum)| {
            for index in part * tiles..((part + 1) * tiles).min(tiling.count()) {
                let tile = Work::new(tiling.tile(index), sizes, Threads::One);
                let accumulate = index > part * tiles;
                with_scratch(tile.scratch_elems(), |scratch| tile.grad_weight(sum, d_y, x, accumulate, scratch));
            }
        });
        d_w.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, d_w)| {
            for (part, sum) in sums.chunks_exact(elems).enumerate() {
                let sum = &sum[chunk * CHUNK..][..d_w.len()];
                match accumulate || part > 0 {
                    true => d_w.iter_mut().zip(sum).for_each(|(d_w, &sum)| *d_w += sum),
                    false => d_w.copy_from_slice(sum),
                }
            }
        });
    } else {
        let tiling = Tiling::new::<T>(sizes, ROOM_OF_ALL);
        for index in 0..tiling.count() {
            let tile = Work::new(tiling.tile(index), sizes, Threads::All);
            tile.grad_weight(d_w, d_y, x, accumulate || index > 0, shared.take(tile.scratch_elems()));
        }
    }
}

/// A tile of a convolution and the threads that work on it.
struct Work<'a> {
    tile: Tile,
    sizes: &'a ConvSizes,
    threads: Threads,
    /// Weights of a filter, columns of the tile, and channels of the output.
    k: usize,
    width: usize,
    out_channels: usize,
    /// Elements of scratch for one part's window.
    window_elems: usize,
}

impl<'a> Work<'a> {
    fn new(tile: Tile, sizes: &'a ConvSizes, threads: Threads) -> Self {
        let window_elems = if sizes.is_the_image() { 0 } else { window_elems(&tile, sizes) };
        let (k, width, out_channels) = (sizes.filter_elems(), tile.width(), sizes.out_channels);
        Work { tile, sizes, threads, k, width, out_channels, window_elems }
    }

    /// Elements of scratch that the work takes: for the im2col matrix, for the output's channels at the tile, and for
    /// windows.
    fn scratch_elems(&self) -> usize {
        let windows = if self.threads == Threads::All { PARTS } else { 1 };
        (self.k + self.out_channels) * self.width + windows * self.window_elems
    }

    /// The scratch's three parts.
    fn split<'s, T>(&self, scratch: &'s mut [T]) -> [&'s mut [T]; 3] {
        let (columns, scratch) = scratch.split_at_mut(self.k * self.width);
        let (rows, windows) = scratch.split_at_mut(self.out_channels * self.width);
        [columns, rows, windows]
    }

    /// Calls `body(part, range)` for the ranges of `channels` channels that are one thread's.
    fn for_each_part(&self, channels: usize, body: impl Fn(usize, Range<usize>) + Sync + Send) {
        if channels == 0 {
            return;
        }
        if self.threads == Threads::One {
            return body(0, 0..channels);
        }
        let size = channels.div_ceil(PARTS);
        for_each_index(channels.div_ceil(size), |part| body(part, part * size..((part + 1) * size).min(channels)));
    }

    fn forward<T: Real>(&self, out: &Disjoint<T>, x: &[T], weight: &[T], bias: Option<&[T]>, scratch: &mut [T]) {
        let Work { ref tile, sizes, threads, k, width, out_channels, .. } = *self;
        let (positions, span) = (sizes.out_plane(), tile.positions.len());
        let [columns, product, windows] = self.split(scratch);
        let columns = self.columns(columns, windows, x);
        // SAFETY: tiles and channels share no element of `out`, and nobody takes two ranges of it at a time.
        let planes = |image: usize, channel: usize, rows: usize| unsafe {
            out.range((image * out_channels + channel) * positions + tile.positions.start, rows * span)
        };
        let add_bias = |out: &mut [T], channels: Range<usize>| {
            let Some(bias) = bias else { return };
            for (out, &bias) in out.chunks_exact_mut(span).zip(&bias[channels]) {
                simd(
                    #[inline(always)]
                    || out.iter_mut().for_each(|out| *out += bias),
                );
            }
        };
        let (whole, factors) = (span == positions, Matrix::rows(weight, k));
        if whole && tile.images.len() == 1 {
            let out = planes(tile.images.start, 0, out_channels);
            gemm(out, width, factors, columns, [out_channels, width, k], false, threads);
            return add_bias(out, 0..out_channels);
        }
        gemm(product, width, factors, columns, [out_channels, width, k], false, threads);
        let product = &*product;
        self.for_each_part(out_channels, |_, channels| {
            for (at, image) in tile.images.clone().enumerate() {
                // Rows of a whole image lie one behind the other.
                let rows = if whole { channels.len() } else { 1 };
                for channel in channels.clone().step_by(rows) {
                    let out = planes(image, channel, rows);
                    copy_rows(out, &product[channel * width + at * span..], [span, width], span, rows);
                    add_bias(out, channel..channel + rows);
                }
            }
        });
    }

    /// Adds to `d_x`, or, with the first tile of an image, overwrites it.
    fn grad_input<T: Real>(&self, d_x: &Disjoint<T>, d_y: &[T], weight: &[T], scratch: &mut [T]) {
        let Work { ref tile, sizes, threads, k, width, out_channels, window_elems, .. } = *self;
        let (positions, taps) = (sizes.plane(), sizes.taps());
        let [columns, rows, windows] = self.split(scratch);
        let rows = self.rows(rows, d_y, out_channels, sizes.out_plane());
        // SAFETY: images and channels share no element of `d_x`; one task at a time has an image's tiles, and of them
        // one range.
        let planes = |image: usize, channels: &Range<usize>| unsafe {
            d_x.range((image * sizes.in_channels + channels.start) * positions, channels.len() * positions)
        };
        let (factors, shape) = (Matrix::rows(weight, k).transposed(), [k, width, out_channels]);
        if sizes.is_the_image() && tile.images.len() == 1 {
            let d_x = &mut planes(tile.images.start, &(0..sizes.in_channels))[tile.positions.start..];
            return gemm(d_x, positions, factors, rows, shape, false, threads);
        }
        gemm(columns, width, factors, rows, shape, false, threads);
        let (columns, windows) = (&*columns, Disjoint::new(windows));
        self.for_each_part(sizes.in_channels, |part, channels| {
            // SAFETY: each part takes its own.
            let window = unsafe { windows.range(part * window_elems, window_elems) };
            let columns = &columns[channels.start * taps * width..channels.end * taps * width];
            for (at, image) in tile.images.clone().enumerate() {
                let d_x = planes(image, &channels);
                if sizes.is_the_image() {
                    copy_rows(d_x, &columns[at * positions..], [positions, width], positions, channels.len());
                    continue;
                }
                if tile.positions.start == 0 {
                    d_x.fill(T::ZERO);
                }
                add_columns(d_x, columns, window, at, tile, sizes);
            }
        });
    }

    /// Overwrites `sum`, or adds to it when `accumulate`.
    fn grad_weight<T: Real>(&self, sum: &mut [T], d_y: &[T], x: &[T], accumulate: bool, scratch: &mut [T]) {
        let Work { sizes, threads, k, width, out_channels, .. } = *self;
        let [columns, rows, windows] = self.split(scratch);
        let columns = self.columns(columns, windows, x);
        let rows = self.rows(rows, d_y, out_channels, sizes.out_plane());
        gemm(sum, k, rows, columns.transposed(), [out_channels, k, width], accumulate, threads);
    }

    /// The im2col matrix, `(K, tile)`: gathered into `scratch`, or `x` itself.
    fn columns<'s, T: Real>(&self, scratch: &'s mut [T], windows: &mut [T], x: &'s [T]) -> Matrix<'s, T> {
        let Work { ref tile, sizes, width, window_elems, .. } = *self;
        if sizes.is_the_image() {
            return self.rows(scratch, x, sizes.in_channels, sizes.plane());
        }
        let (columns, windows) = (Disjoint::new(scratch), Disjoint::new(windows));
        self.for_each_part(sizes.in_channels, |part, channels| {
            let rows = channels.start * sizes.taps()..channels.end * sizes.taps();
            // SAFETY: each part takes the rows of its own channels.
            let columns = unsafe { columns.range(rows.start * width, rows.len() * width) };
            // SAFETY: each part takes its own window.
            let window = unsafe { windows.range(part * window_elems, window_elems) };
            gather_columns(columns, window, x, tile, channels, sizes);
        });
        Matrix::rows(scratch, width)
    }

    /// `channels` channels of `data`, planes of `positions` elements, at the tile's positions, `(channels, tile)`:
    /// copied to `scratch` where the tile has several images, otherwise as they lie.
    fn rows<'s, T: Real>(
        &self,
        scratch: &'s mut [T],
        data: &'s [T],
        channels: usize,
        positions: usize,
    ) -> Matrix<'s, T> {
        let Work { ref tile, width, .. } = *self;
        if tile.images.len() == 1 {
            let image = &data[tile.images.start * channels * positions..][..channels * positions];
            return Matrix::rows(&image[tile.positions.start.min(image.len())..], positions);
        }
        let rows = Disjoint::new(scratch);
        self.for_each_part(channels, |_, channels_of| {
            // SAFETY: each part takes the rows of its own channels.
            let rows = unsafe { rows.range(channels_of.start * width, channels_of.len() * width) };
            for (at, image) in tile.images.clone().enumerate() {
                let data = &data[(image * channels + channels_of.start) * positions..];
                copy_rows(&mut rows[at * positions..], data, [width, positions], positions, channels_of.len());
            }
        });
        Matrix::rows(scratch, width)
    }
}

/// `d_bias[o] = sum over n, p of d_y[n,o,p]`, summed in f64. Overwrites `d_b`, or adds to it when `accumulate`.
pub fn grad_bias<T: Real>(d_b: &mut [T], d_y: &[T], accumulate: bool, sizes: &ConvSizes) {
    expect_len("conv", "d_bias", d_b.len(), sizes.out_channels);
    expect_len("conv", "d_y", d_y.len(), sizes.batch * sizes.out_channels * sizes.out_plane());
    let walk = Planes::new(sizes.batch, sizes.out_channels, sizes.out_plane());
    let block = walk.block();
    d_b.par_chunks_mut(block).enumerate().for_each(|(index, d_b)| {
        let channels = index * block..index * block + d_b.len();
        let sums = walk.sums(
            channels,
            d_y,
            d_y,
            |_| 0.0,
            #[inline(always)]
            |d_y, _, _| [d_y.to_f64()],
        );
        for (d_b, [sum]) in d_b.iter_mut().zip(sums) {
            let sum = T::from_f64(sum);
            *d_b = if accumulate { *d_b + sum } else { sum };
        }
    });
}

#[cfg(test)]
mod tests;
