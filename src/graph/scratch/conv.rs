//! Scratch of convolutions: channels-last copies of tensors, for the bf16 kernels, and partial sums of weight
//! gradients.

use super::{RowParts, parts_of};
use crate::base::DType;
use crate::graph::op::{Op, Window};

/// Blocks that a weight gradient is divided into where it has enough pixels: 4 on each of an H200's 132
/// multiprocessors.
const BLOCKS: usize = 528;
/// Most parts, so that adding them up stays short compared with computing them.
const MOST_PARTS: usize = 128;
/// Fewest pixels of a part.
const LEAST_PIXELS: usize = 256;
/// Values of one channel that a block of the bias gradient sums; a multiple of what one load moves.
const BIAS_PART: usize = 16_384;
/// Bytes that channels-last copies may take at once, unless a single image takes more: they are read again while they
/// are in the L2 cache, and the workspace stays small.
const COPY_BYTES: u64 = 32 << 20;
/// Channels of a group: as many as one asynchronous copy moves in bf16.
const GROUP: usize = 8;
/// Regions start at multiples of this many bytes, as tensors do.
const ALIGNMENT: u64 = 64;

/// A part of a product that one block computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvTile {
    /// Channels; output channels in the weight gradient.
    pub rows: usize,
    /// Pixels; taps of input channels in the weight gradient.
    pub columns: usize,
}

impl ConvTile {
    /// The tile of `kernels/conv.cu`.
    pub const PLAIN: ConvTile = ConvTile { rows: 64, columns: 128 };
    /// A tile of `kernels/conv_mma.cu` and `kernels/conv_mma_weight.cu`.
    pub const SQUARE: ConvTile = ConvTile { rows: 128, columns: 128 };
    /// A tile of the same kernels, for few rows.
    pub const FLAT: ConvTile = ConvTile { rows: 64, columns: 256 };
    /// A tile of `kernels/conv_mma.cu`, for few tiles.
    pub const SMALL: ConvTile = ConvTile { rows: 64, columns: 64 };

    /// Number of tiles that cover (rows, columns).
    pub fn count(&self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(self.rows) * columns.div_ceil(self.columns)
    }

    /// [`ConvTile::SQUARE`] or [`ConvTile::FLAT`]: both have the same area, and fewer tiles waste less of it.
    pub fn covering(rows: usize, columns: usize) -> ConvTile {
        if Self::FLAT.count(rows, columns) < Self::SQUARE.count(rows, columns) { Self::FLAT } else { Self::SQUARE }
    }
}

/// Sizes of a convolution: x (batch, in_channels, height, width), out (batch, out_channels, out_height, out_width).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvSizes {
    /// Images.
    pub batch: usize,
    /// Channels of x.
    pub in_channels: usize,
    /// Rows of an image of x.
    pub height: usize,
    /// Columns of an image of x.
    pub width: usize,
    /// Channels of out.
    pub out_channels: usize,
    /// Rows of an image of out.
    pub out_height: usize,
    /// Columns of an image of out.
    pub out_width: usize,
    /// The filter's size, stride and padding.
    pub window: Window,
}

impl ConvSizes {
    /// Makes sizes from the axes of x and out.
    pub fn new(window: &Window, x: &[usize], out: &[usize]) -> ConvSizes {
        ConvSizes {
            batch: x[0],
            in_channels: x[1],
            height: x[2],
            width: x[3],
            out_channels: out[1],
            out_height: out[2],
            out_width: out[3],
            window: *window,
        }
    }

    /// These sizes for another number of images.
    pub fn with_batch(&self, batch: usize) -> ConvSizes {
        ConvSizes { batch, ..*self }
    }

    /// Images that are processed at once: all of them, unless they are copied.
    pub fn images_at_once(&self, dtype: DType) -> usize {
        if dtype != DType::Bf16 || self.is_pointwise() {
            return self.batch.max(1);
        }
        let x = self.x_copy_bytes();
        let out = channels_last_bytes(self.batch, self.out_channels, self.out_plane());
        let rounds = usize::try_from(x.max(out).div_ceil(COPY_BYTES)).unwrap_or(usize::MAX);
        self.batch.div_ceil(rounds.clamp(1, self.batch.max(1))).max(1)
    }

    /// Whether the convolution is a matrix product of images as they are in memory, with planes of whole groups:
    /// `kernels/conv_pointwise.cu`.
    pub fn is_pointwise(&self) -> bool {
        let Window { kernel, stride, padding } = self.window;
        kernel == [1, 1] && stride == 1 && padding == 0 && self.plane().is_multiple_of(GROUP)
    }

    /// The convolution of x's channels-last copy: for a filter with one tap, the copy has only the pixels that the
    /// filter reads.
    pub fn copied(&self) -> ConvSizes {
        let Window { kernel, stride, padding } = self.window;
        if kernel != [1, 1] || stride == 1 || padding != 0 {
            return *self;
        }
        let window = Window { kernel, stride: 1, padding };
        ConvSizes { height: self.out_height, width: self.out_width, window, ..*self }
    }

    /// Bytes of x's copy; 0 where x itself can be used.
    fn x_copy_bytes(&self) -> u64 {
        let whole = channels_last_bytes(self.batch, self.in_channels, self.plane());
        if whole == 0 { 0 } else { (self.batch * self.copied().plane() * padded(self.in_channels) * 2) as u64 }
    }

    /// These sizes with x and out exchanged.
    pub fn exchanged(&self) -> ConvSizes {
        ConvSizes {
            in_channels: self.out_channels,
            height: self.out_height,
            width: self.out_width,
            out_channels: self.in_channels,
            out_height: self.height,
            out_width: self.width,
            ..*self
        }
    }

    /// Weights of one filter in one input channel.
    pub fn taps(&self) -> usize {
        self.window.kernel[0] * self.window.kernel[1]
    }

    /// Pixels of one channel of an image of x.
    pub fn plane(&self) -> usize {
        self.height * self.width
    }

    /// Pixels of one channel of an image of out.
    pub fn out_plane(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Pixels of one channel of out, over all images.
    pub fn out_pixels(&self) -> usize {
        self.batch * self.out_plane()
    }

    /// Columns of the weight gradient as a matrix; in bf16 every tap has its channels padded to whole groups.
    pub fn weight_columns(&self, dtype: DType) -> usize {
        self.taps() * if dtype == DType::Bf16 { padded(self.in_channels) } else { self.in_channels }
    }

    /// The tile of the weight gradient.
    pub fn weight_tile(&self, dtype: DType) -> ConvTile {
        match dtype {
            DType::Bf16 => ConvTile::covering(self.out_channels, self.weight_columns(dtype)),
            _ => ConvTile::PLAIN,
        }
    }

    /// How the pixels that a weight gradient sums over are divided into parts, for the images that are processed at
    /// once. Every part but the last has a multiple of 32 pixels.
    pub fn weight_parts(&self, dtype: DType) -> RowParts {
        let tiles = self.weight_tile(dtype).count(self.out_channels, self.weight_columns(dtype)).max(1);
        let pixels = self.with_batch(self.images_at_once(dtype).min(self.batch)).out_pixels();
        let wanted = pixels.div_ceil(LEAST_PIXELS).min(BLOCKS.div_ceil(tiles)).clamp(1, MOST_PARTS);
        let steps = parts_of(pixels.div_ceil(32).max(1), wanted);
        RowParts { parts: steps.parts, rows: steps.rows * 32 }
    }
}

/// How the values that a bias gradient sums in each channel are divided into parts.
pub fn conv_bias_parts(out_pixels: usize) -> RowParts {
    RowParts { parts: out_pixels.div_ceil(BIAS_PART).max(1), rows: BIAS_PART }
}

/// `channels` rounded up to whole groups.
fn padded(channels: usize) -> usize {
    channels.next_multiple_of(GROUP)
}

/// Whether a tensor (batch, channels, positions) is identical to its padded channels-last copy.
pub fn is_channels_last(channels: usize, positions: usize) -> bool {
    positions == 1 && channels.is_multiple_of(GROUP)
}

/// Bytes of the channels-last copy of a bf16 tensor (batch, channels, positions); 0 where the tensor itself can be
/// used.
fn channels_last_bytes(batch: usize, channels: usize, positions: usize) -> u64 {
    if is_channels_last(channels, positions) { 0 } else { (batch * positions * padded(channels) * 2) as u64 }
}

/// Where the regions of a convolution's scratch begin, in bytes, and where the last one ends. Each serves the images
/// that are processed at once, and is then reused for the next ones.
///
/// | op | first | second | third |
/// | --- | --- | --- | --- |
/// | `Conv2d` | x, channels last | weight (O, taps, C) | |
/// | `Conv2dGradInput` | d_out, channels last | weight (C, taps, O) | |
/// | `Conv2dGradWeight` | d_out, channels last | x, channels last | partial sums, f32 (parts, O, weight_columns) |
///
/// A pointwise convolution's images are not copied. In f32 there are only partial sums, and those only with several
/// parts.
pub fn conv_regions(op: &Op, dtype: DType, s: &ConvSizes) -> [u64; 4] {
    let s = s.with_batch(s.images_at_once(dtype).min(s.batch));
    let bf16 = dtype == DType::Bf16;
    let (x, out) = if bf16 && !s.is_pointwise() {
        (s.x_copy_bytes(), channels_last_bytes(s.batch, s.out_channels, s.out_plane()))
    } else {
        (0, 0)
    };
    let sizes = match op {
        Op::Conv2d(_) if bf16 => [x, channels_last_bytes(s.out_channels, s.in_channels, s.taps()), 0],
        Op::Conv2dGradInput(_) if bf16 => [out, channels_last_bytes(1, s.out_channels, s.in_channels * s.taps()), 0],
        Op::Conv2dGradWeight(_) => {
            let parts = s.weight_parts(dtype).parts;
            let partials = if bf16 || parts > 1 { parts * s.out_channels * s.weight_columns(dtype) * 4 } else { 0 };
            [out, x, partials as u64]
        }
        _ => [0; 3],
    };
    let mut begins = [0; 4];
    for (i, bytes) in sizes.into_iter().enumerate() {
        begins[i + 1] = begins[i] + bytes.next_multiple_of(ALIGNMENT);
    }
    begins
}

/// Bytes of a bias gradient's partial sums: f32 (O, parts), where there are several parts.
pub fn conv_bias_bytes(channels: usize, out_pixels: usize) -> u64 {
    let parts = conv_bias_parts(out_pixels).parts;
    if parts > 1 { (channels * parts * 4) as u64 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(
        batch: usize,
        in_channels: usize,
        side: usize,
        out_channels: usize,
        kernel: usize,
        stride: usize,
    ) -> ConvSizes {
        let window = Window { kernel: [kernel; 2], stride, padding: kernel / 2 };
        let [out_height, out_width] = window.out(side, side).expect("the padded image holds the filter");
        ConvSizes::new(&window, &[batch, in_channels, side, side], &[batch, out_channels, out_height, out_width])
    }

    #[test]
    fn parts_cover_the_pixels_and_none_is_empty() {
        for dtype in [DType::F32, DType::Bf16] {
            for s in [
                sizes(0, 3, 5, 4, 3, 1),
                sizes(1, 3, 1, 1, 1, 1),
                sizes(32, 3, 224, 64, 7, 2),
                sizes(256, 64, 56, 64, 3, 1),
                sizes(3, 512, 7, 2048, 1, 1),
                sizes(1, 1, 257, 1, 3, 1),
            ] {
                let RowParts { parts, rows } = s.weight_parts(dtype);
                let pixels = s.with_batch(s.images_at_once(dtype).min(s.batch)).out_pixels();
                assert!(rows % 32 == 0 && (1..=MOST_PARTS).contains(&parts), "{s:?}");
                assert!(parts * rows >= pixels, "{s:?}");
                assert!(parts == 1 || (parts - 1) * rows < pixels, "{s:?}");
            }
        }
    }

    #[test]
    fn copies_are_bounded_and_images_even() {
        let s = sizes(256, 64, 112, 64, 3, 1);
        let images = s.images_at_once(DType::Bf16);
        assert_eq!(images, 20, "of 13 rounds, 1.6 MB each");
        assert_eq!(s.images_at_once(DType::F32), 256);
        for op in [Op::Conv2d(s.window), Op::Conv2dGradInput(s.window)] {
            let bytes = conv_regions(&op, DType::Bf16, &s)[3];
            assert!(bytes < COPY_BYTES + 100_000, "{bytes}");
        }
        assert_eq!(sizes(0, 64, 112, 64, 3, 1).images_at_once(DType::Bf16), 1);
        assert_eq!(sizes(3, 64, 1120, 64, 3, 1).images_at_once(DType::Bf16), 1);
    }

    #[test]
    fn one_tap_reads_every_other_pixel() {
        let s = sizes(2, 16, 9, 8, 1, 2);
        assert_eq!(s.copied(), sizes(2, 16, 5, 8, 1, 1));
        assert_eq!(conv_regions(&Op::Conv2d(s.window), DType::Bf16, &s)[1], 2 * 5 * 5 * 16 * 2);
        let s = sizes(2, 16, 2, 8, 1, 2);
        assert_eq!(conv_regions(&Op::Conv2d(s.window), DType::Bf16, &s)[1], 2 * 16 * 2, "one pixel of four");
        let s = sizes(2, 16, 9, 8, 3, 2);
        assert_eq!(s.copied(), s);
    }

    #[test]
    fn few_rows_take_flat_tiles() {
        assert_eq!(ConvTile::covering(64, 100_000), ConvTile::FLAT);
        assert_eq!(ConvTile::covering(128, 100_000), ConvTile::SQUARE);
        assert_eq!(ConvTile::covering(192, 100_000), ConvTile::FLAT);
        assert_eq!(ConvTile::covering(64, 128), ConvTile::SQUARE);
    }

    #[test]
    fn a_pointwise_weight_needs_no_copy() {
        let window = Window { kernel: [1, 1], stride: 1, padding: 0 };
        let s = ConvSizes::new(&window, &[2, 64, 3, 3], &[2, 16, 3, 3]);
        assert_eq!(conv_regions(&Op::Conv2d(window), DType::Bf16, &s), [0, 2304, 2304, 2304]);
        assert_eq!(conv_regions(&Op::Conv2d(window), DType::F32, &s), [0; 4]);
        let s = ConvSizes::new(&window, &[2, 64, 4, 4], &[2, 16, 4, 4]);
        assert_eq!(conv_regions(&Op::Conv2d(window), DType::Bf16, &s), [0; 4]);
        assert_eq!(conv_regions(&Op::Conv2dGradInput(window), DType::Bf16, &s), [0, 0, 2048, 2048]);
    }
}
