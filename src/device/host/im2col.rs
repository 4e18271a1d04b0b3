//! Tiles of a convolution's output positions, and the im2col matrix of a tile: row (channel, kernel row, kernel column), one column an
//! output position.
//!
//! A tile depends on the convolution's sizes alone, never on threads.

use super::{conv::ConvSizes, parallel::simd, real::Real};
use std::ops::Range;

/// Bytes that a tile's scratch should stay below: half a core's second-level cache on common machines.
const TILE_BYTES: usize = 1 << 20;
/// Columns of a tile: fewer make the matrix product slow, more gain nothing.
const LEAST_WIDTH: usize = 128;
const GREATEST_WIDTH: usize = 512;
/// Widths are multiples of this: a vector of f32.
const WIDTH_STEP: usize = 16;

/// Output positions that are computed together: a range of one image's, or all positions of several images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Images.
    pub(crate) images: Range<usize>,
    /// Output positions of each image.
    pub(crate) positions: Range<usize>,
}

impl Tile {
    /// Columns of the tile's matrix: image after image.
    pub(crate) fn width(&self) -> usize {
        self.images.len() * self.positions.len()
    }
}

/// How all output positions of a convolution are cut into tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiling {
    batch: usize,
    out_positions: usize,
    images_per_tile: usize,
    positions_per_tile: usize,
}

impl Tiling {
    /// The tiles for scratch of `rows` values of T a column.
    pub(crate) fn new<T>(sizes: &ConvSizes, rows: usize) -> Self {
        let fits = TILE_BYTES / (rows.max(1) * size_of::<T>());
        let width = fits.clamp(LEAST_WIDTH, GREATEST_WIDTH) / WIDTH_STEP * WIDTH_STEP;
        let out_positions = sizes.out_positions();
        let mut tiling = Tiling { batch: sizes.batch, out_positions, images_per_tile: 1, positions_per_tile: 1 };
        if out_positions > width {
            // Nearly equal tiles, each a whole number of vectors.
            let tiles = out_positions.div_ceil(width);
            tiling.positions_per_tile = out_positions.div_ceil(tiles).next_multiple_of(WIDTH_STEP);
        } else if out_positions > 0 {
            tiling.positions_per_tile = out_positions;
            let groups = sizes.batch.div_ceil(width / out_positions).max(1);
            tiling.images_per_tile = sizes.batch.div_ceil(groups).max(1);
        }
        tiling
    }

    /// The same positions a tile, but images grouped so that there are `groups` groups; a tile of several images has whole images.
    pub(crate) fn with_groups_of(self, groups: usize) -> Self {
        let images_per_tile = self.batch.div_ceil(groups.max(1)).max(1);
        if images_per_tile == 1 {
            return Tiling { images_per_tile, ..self };
        }
        Tiling { images_per_tile, positions_per_tile: self.out_positions.max(1), ..self }
    }

    /// Groups of images: tiles in the direction of images.
    pub(crate) fn image_groups(&self) -> usize {
        self.batch.div_ceil(self.images_per_tile)
    }

    fn tiles_per_group(&self) -> usize {
        self.out_positions.div_ceil(self.positions_per_tile)
    }

    /// Tiles altogether.
    pub(crate) fn count(&self) -> usize {
        self.image_groups() * self.tiles_per_group()
    }

    /// Columns of the widest tile.
    pub(crate) fn greatest_width(&self) -> usize {
        self.images_per_tile * self.positions_per_tile
    }

    /// The images of a group.
    pub(crate) fn images(&self, group: usize) -> Range<usize> {
        let start = group * self.images_per_tile;
        start..(start + self.images_per_tile).min(self.batch)
    }

    /// Tile `index`, below [`Tiling::count`].
    pub(crate) fn tile(&self, index: usize) -> Tile {
        let start = index % self.tiles_per_group() * self.positions_per_tile;
        Tile {
            images: self.images(index / self.tiles_per_group()),
            positions: start..(start + self.positions_per_tile).min(self.out_positions),
        }
    }

    /// The tiles of a group of images, in order.
    pub(crate) fn tiles_of(&self, group: usize) -> impl Iterator<Item = Tile> {
        let tiles = self.tiles_per_group();
        (group * tiles..(group + 1) * tiles).map(|index| self.tile(index))
    }
}

/// Writes the im2col matrix of a tile and a range of input channels, `(channels * taps, tile)`, all of it.
pub(crate) fn gather_columns<T: Real>(
    columns: &mut [T],
    x: &[T],
    tile: &Tile,
    channels: Range<usize>,
    sizes: &ConvSizes,
) {
    let (width, span) = (tile.width(), tile.positions.len());
    if width == 0 {
        return;
    }
    simd(
        #[inline(always)]
        || {
            for (row, columns) in columns.chunks_exact_mut(width).enumerate() {
                let tap = Tap::new(row, sizes);
                for (image, columns) in tile.images.clone().zip(columns.chunks_exact_mut(span)) {
                    let plane = image * sizes.in_channels + channels.start + tap.channel;
                    let x = &x[plane * sizes.positions()..(plane + 1) * sizes.positions()];
                    tap.for_each_run(
                        &tile.positions,
                        sizes,
                        #[inline(always)]
                        |run| match run {
                            Run::Outside { columns: to } => columns[to].fill(T::ZERO),
                            Run::Inside { columns: to, start } => {
                                let to = &mut columns[to];
                                if sizes.stride == 1 {
                                    to.copy_from_slice(&x[start..start + to.len()]);
                                } else {
                                    for (to, &x) in to.iter_mut().zip(x[start..].iter().step_by(sizes.stride)) {
                                        *to = x;
                                    }
                                }
                            }
                        },
                    );
                }
            }
        },
    );
}

/// Adds the columns that belong to the tile's `at`-th image to that image's channels, `d_x: (channels, H, W)`; the inverse of gathering.
///
/// Every place receives its addends in the order of the rows (kernel row, kernel column), then of the output positions.
pub(crate) fn add_columns<T: Real>(d_x: &mut [T], columns: &[T], at: usize, tile: &Tile, sizes: &ConvSizes) {
    let (width, span) = (tile.width(), tile.positions.len());
    if width == 0 {
        return;
    }
    simd(
        #[inline(always)]
        || {
            for (row, columns) in columns.chunks_exact(width).enumerate() {
                let tap = Tap::new(row, sizes);
                let columns = &columns[at * span..(at + 1) * span];
                let d_x = &mut d_x[tap.channel * sizes.positions()..(tap.channel + 1) * sizes.positions()];
                tap.for_each_run(
                    &tile.positions,
                    sizes,
                    #[inline(always)]
                    |run| {
                        if let Run::Inside { columns: from, start } = run {
                            let from = &columns[from];
                            if sizes.stride == 1 {
                                for (d_x, &from) in d_x[start..start + from.len()].iter_mut().zip(from) {
                                    *d_x += from;
                                }
                            } else {
                                for (d_x, &from) in d_x[start..].iter_mut().step_by(sizes.stride).zip(from) {
                                    *d_x += from;
                                }
                            }
                        }
                    },
                );
            }
        },
    );
}

/// One weight of a filter: a row of the im2col matrix.
struct Tap {
    /// Input channel, from the first of the block.
    channel: usize,
    /// Row and column in the filter.
    row: usize,
    col: usize,
    /// Output columns whose input column lies inside the image.
    inside: Range<usize>,
}

/// Neighbouring output positions of one output row, as a range of the tile's columns.
enum Run {
    /// The input lies in the padding.
    Outside { columns: Range<usize> },
    /// The input starts at `start` in its plane and moves on by the stride.
    Inside { columns: Range<usize>, start: usize },
}

impl Tap {
    #[inline(always)]
    fn new(row: usize, sizes: &ConvSizes) -> Self {
        let (channel, tap) = (row / sizes.taps(), row % sizes.taps());
        let (row, col) = (tap / sizes.kernel_w, tap % sizes.kernel_w);
        // 0 <= out_col * stride + col - padding < width
        let first = sizes.padding.saturating_sub(col).div_ceil(sizes.stride).min(sizes.out_width);
        let end = (sizes.width + sizes.padding).saturating_sub(col).div_ceil(sizes.stride).min(sizes.out_width);
        Tap { channel, row, col, inside: first..end.max(first) }
    }

    /// Calls `body` for the runs of `positions` in order; together they are all of `positions`.
    #[inline(always)]
    fn for_each_run(&self, positions: &Range<usize>, sizes: &ConvSizes, mut body: impl FnMut(Run)) {
        let mut at = positions.start;
        while at < positions.end {
            let (out_row, from) = (at / sizes.out_width, at % sizes.out_width);
            let to = (from + positions.end - at).min(sizes.out_width);
            let run_start = at - positions.start;
            let column = |out_col: usize| run_start + (out_col - from);
            at += to - from;
            let padded_row = out_row * sizes.stride + self.row;
            let rows = sizes.padding..sizes.padding + sizes.height;
            let (first, end) = (self.inside.start.clamp(from, to), self.inside.end.clamp(from, to));
            if !rows.contains(&padded_row) || first >= end {
                body(Run::Outside { columns: column(from)..column(to) });
                continue;
            }
            if from < first {
                body(Run::Outside { columns: column(from)..column(first) });
            }
            let start = (padded_row - sizes.padding) * sizes.width + first * sizes.stride + self.col - sizes.padding;
            body(Run::Inside { columns: column(first)..column(end), start });
            if end < to {
                body(Run::Outside { columns: column(end)..column(to) });
            }
        }
    }
}
