//! Tiles of a convolution's output positions, and the im2col matrix of a tile: row (channel, kernel row, kernel
//! column), one column an output position.
//!
//! A tile depends on the convolution's sizes alone, never on threads.

use super::{
    parallel::{for_each_strided, vector_fn},
    real::Real,
};
use crate::graph::{ConvSizes, Window};
use std::ops::Range;

/// Columns of a tile below which the matrix product is slow.
const LEAST_WIDTH: usize = 128;
/// Widths of tiles that are parts of an image are multiples of this: a vector of f32.
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

/// What a tile may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// About as many bytes of matrices: K values of the im2col matrix and one of each output channel a column. Windows
    /// come on top.
    pub(crate) bytes: usize,
    /// Columns.
    pub(crate) columns: usize,
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
    /// Tiles for this room.
    pub(crate) fn new<T>(sizes: &ConvSizes, room: Room) -> Self {
        let fits = room.bytes / ((sizes.filter_elems() + sizes.out_channels).max(1) * size_of::<T>());
        let width = fits.clamp(LEAST_WIDTH, room.columns) / WIDTH_STEP * WIDTH_STEP;
        let out_positions = sizes.out_plane();
        let mut tiling = Tiling { batch: sizes.batch, out_positions, images_per_tile: 1, positions_per_tile: 1 };
        if out_positions > width {
            // Nearly equal tiles, each a whole number of vectors.
            let tiles = out_positions.div_ceil(width);
            tiling.positions_per_tile = out_positions.div_ceil(tiles).next_multiple_of(WIDTH_STEP);
        } else if out_positions > 0 {
            // One image where it is wide enough: it need not be copied.
            tiling.positions_per_tile = out_positions;
            let most = if out_positions >= LEAST_WIDTH { 1 } else { width / out_positions };
            let groups = sizes.batch.div_ceil(most).max(1);
            tiling.images_per_tile = sizes.batch.div_ceil(groups).max(1);
        }
        tiling
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

    /// The images of a group.
    fn images(&self, group: usize) -> Range<usize> {
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

/// What a tile's outputs read of an input channel, zeros of the padding included, as planes in which neighbouring
/// outputs read neighbouring places: one plane for each phase, `(row % stride, column % stride)` in the padded image.
struct Phases<'a> {
    sizes: &'a ConvSizes,
    /// First row of outputs, and the first column where the tile lies inside of one row.
    first_row: usize,
    first_col: usize,
    /// Rows and columns of a plane.
    rows: usize,
    cols: usize,
    /// Phases that some tap reads, of rows and of columns.
    row_phases: usize,
    col_phases: usize,
    /// The outputs: of a first row that is not whole, of whole rows, and of a last one that is not.
    parts: [Part; 3],
}

/// Rows of outputs, for each of which a tap reads a row of a plane.
#[derive(Clone, Copy)]
struct Part {
    /// Place of what the tap reads for the first one, from [`Phases::start`] on.
    place: usize,
    /// The first one's column in the tile.
    column: usize,
    /// Outputs of a row.
    len: usize,
    rows: usize,
}

impl<'a> Phases<'a> {
    #[inline(always)]
    fn new(tile: &Tile, sizes: &'a ConvSizes) -> Self {
        let Window { kernel: [kernel_h, kernel_w], stride, .. } = sizes.window;
        let (width, Range { start, end }) = (sizes.out_width, tile.positions.clone());
        let (first_row, start_col) = (start / width, start % width);
        let head = (width - start_col).min(end - start) % width;
        let (whole, tail) = ((end - start - head) / width, (end - start - head) % width);
        // A part of one row alone needs a part of the columns.
        let inside_row = head > 0 && whole == 0 && tail == 0;
        let first_col = if inside_row { start_col } else { 0 };
        let cols = if inside_row { head } else { width } + (kernel_w - 1) / stride;
        let head_rows = usize::from(head > 0);
        let parts = [
            Part { place: start_col - first_col, column: 0, len: head, rows: head_rows },
            Part { place: head_rows * cols, column: head, len: width, rows: whole },
            Part {
                place: (head_rows + whole) * cols,
                column: head + whole * width,
                len: tail,
                rows: usize::from(tail > 0),
            },
        ];
        Phases {
            sizes,
            first_row,
            first_col,
            rows: parts.iter().map(|part| part.rows).sum::<usize>() + (kernel_h - 1) / stride,
            cols,
            row_phases: kernel_h.min(stride),
            col_phases: kernel_w.min(stride),
            parts,
        }
    }

    /// Elements of one image's planes.
    fn elems(&self) -> usize {
        self.row_phases * self.col_phases * self.rows * self.cols
    }

    /// The place from which a tap reads for the first row's first output.
    #[inline(always)]
    fn start(&self, tap: usize) -> usize {
        let Window { kernel: [_, kernel_w], stride, .. } = self.sizes.window;
        let (row, col) = (tap / kernel_w, tap % kernel_w);
        let phase = (row % stride) * self.col_phases + col % stride;
        (phase * self.rows + row / stride) * self.cols + col / stride
    }

    /// Calls `body(place in the planes, place in the image's plane, elements of a row, rows)` for what of each phase
    /// lies inside the image. In the image an element lies `stride` places behind the one before, a row `stride` rows.
    #[inline(always)]
    fn for_each_phase(&self, mut body: impl FnMut(usize, usize, usize, usize)) {
        let (Window { stride, padding, .. }, ConvSizes { width, height, .. }) = (self.sizes.window, *self.sizes);
        // Those in 0..most with 0 <= index * stride + phase - padding < len
        let inside = |phase: usize, len: usize, most: usize| {
            let first = padding.saturating_sub(phase).div_ceil(stride).min(most);
            first..(len + padding).saturating_sub(phase).div_ceil(stride).clamp(first, most)
        };
        for row_phase in 0..self.row_phases {
            let first_row = self.first_row * stride + row_phase;
            let rows = inside(first_row, height, self.rows);
            for col_phase in 0..self.col_phases {
                let first_col = self.first_col * stride + col_phase;
                let cols = inside(first_col, width, self.cols);
                if rows.is_empty() || cols.is_empty() {
                    continue;
                }
                let place =
                    ((row_phase * self.col_phases + col_phase) * self.rows + rows.start) * self.cols + cols.start;
                let image_row = first_row + rows.start * stride - padding;
                let image_col = first_col + cols.start * stride - padding;
                body(place, image_row * width + image_col, cols.len(), rows.len());
            }
        }
    }

    /// Fills images' planes, all but the padding, from their planes of `x`, which lie `apart` elements apart.
    #[inline(always)]
    fn take<T: Real>(&self, planes: &mut [T], x: &[T], apart: usize) {
        let stride = self.sizes.window.stride;
        let row = self.sizes.width * stride;
        self.for_each_phase(
            #[inline(always)]
            |place, start, len, rows| {
                for (planes, x) in planes.chunks_exact_mut(self.elems()).zip(x.chunks(apart)) {
                    let (planes, x) = (&mut planes[place..], &x[start..]);
                    if stride == 1 {
                        each_row(planes, x, [self.cols, row], len, rows, |to, from| *to = from);
                        continue;
                    }
                    for (to, x) in planes.chunks_mut(self.cols).zip(x.chunks(row)).take(rows) {
                        let to = &mut to[..len];
                        for_each_strided(
                            x,
                            len,
                            stride,
                            #[inline(always)]
                            |i, _, x| to[i] = x,
                        );
                    }
                }
            },
        );
    }

    /// Adds an image's planes to the image's plane `d_x`.
    #[inline(always)]
    fn add_to<T: Real>(&self, d_x: &mut [T], planes: &[T]) {
        let stride = self.sizes.window.stride;
        let row = self.sizes.width * stride;
        self.for_each_phase(
            #[inline(always)]
            |place, start, len, rows| {
                let (d_x, planes) = (&mut d_x[start..], &planes[place..]);
                if stride == 1 {
                    return each_row(d_x, planes, [row, self.cols], len, rows, |to, from| *to += from);
                }
                for (d_x, from) in d_x.chunks_mut(row).zip(planes.chunks(self.cols)).take(rows) {
                    d_x.iter_mut().step_by(stride).zip(&from[..len]).for_each(|(d_x, &from)| *d_x += from);
                }
            },
        );
    }
}

/// Elements of scratch that [`gather_columns`] and [`add_columns`] need beside a tile's matrix.
pub(crate) fn window_elems(tile: &Tile, sizes: &ConvSizes) -> usize {
    match tile.width() {
        0 => 0,
        _ => tile.images.len() * Phases::new(tile, sizes).elems(),
    }
}

vector_fn! {
    /// Writes the im2col matrix of a tile and a range of input channels, `(channels * taps, tile)`, all of it. `window`
    /// is scratch of [`window_elems`].
    pub(crate) fn gather_columns<T: Real>(
        columns: &mut [T],
        window: &mut [T],
        x: &[T],
        tile: &Tile,
        channels: Range<usize>,
        sizes: &ConvSizes,
    ) {
        let (width, span) = (tile.width(), tile.positions.len());
        if width == 0 {
            return;
        }
        let layout = Phases::new(tile, sizes);
        window.fill(T::ZERO);
        for (row, channel) in channels.enumerate() {
            let apart = sizes.in_channels * sizes.plane();
            layout.take(window, &x[tile.images.start * apart + channel * sizes.plane()..], apart);
            for tap in 0..sizes.taps() {
                let start = layout.start(tap);
                let columns = &mut columns[(row * sizes.taps() + tap) * width..][..width];
                for (columns, planes) in columns.chunks_exact_mut(span).zip(window.chunks_exact(layout.elems())) {
                    for part in layout.parts.iter().filter(|part| part.rows > 0) {
                        let (to, from) = (&mut columns[part.column..], &planes[start + part.place..]);
                        each_row(to, from, [part.len, layout.cols], part.len, part.rows, |to, from| *to = from);
                    }
                }
            }
        }
    }
}

vector_fn! {
    /// Adds the columns that belong to the tile's `at`-th image to that image's channels, `d_x: (channels, H, W)`; the
    /// inverse of gathering. `window` is scratch of at least one image's share of [`window_elems`].
    ///
    /// Every place receives the sum of its addends of this tile, which are added in the order of the rows (kernel row,
    /// kernel column).
    pub(crate) fn add_columns<T: Real>(
        d_x: &mut [T],
        columns: &[T],
        window: &mut [T],
        at: usize,
        tile: &Tile,
        sizes: &ConvSizes,
    ) {
        let (width, span) = (tile.width(), tile.positions.len());
        if width == 0 {
            return;
        }
        let layout = Phases::new(tile, sizes);
        let window = &mut window[..layout.elems()];
        for (channel, d_x) in d_x.chunks_exact_mut(sizes.plane()).enumerate() {
            window.fill(T::ZERO);
            for tap in 0..sizes.taps() {
                let start = layout.start(tap);
                let columns = &columns[(channel * sizes.taps() + tap) * width + at * span..][..span];
                for part in layout.parts.iter().filter(|part| part.rows > 0) {
                    let (to, from) = (&mut window[start + part.place..], &columns[part.column..]);
                    each_row(to, from, [layout.cols, part.len], part.len, part.rows, |to, from| *to += from);
                }
            }
            layout.add_to(d_x, window);
        }
    }
}

vector_fn! {
    /// Copies `rows` rows of `len` elements, which lie `strides` apart in `to` and in `from`.
    pub(crate) fn copy_rows<T: Real>(to: &mut [T], from: &[T], strides: [usize; 2], len: usize, rows: usize) {
        each_row(to, from, strides, len, rows, |to, from| *to = from)
    }
}

/// Calls `body(to[i], from[i])` for the first `len` elements of each of `rows` rows, which lie `strides` apart in `to`
/// and in `from`.
#[inline(always)]
fn each_row<T: Real>(to: &mut [T], from: &[T], strides: [usize; 2], len: usize, rows: usize, body: impl Fn(&mut T, T)) {
    /// For rows of N elements: images of deep layers have few.
    #[inline(always)]
    fn short<'a, T: Real, const N: usize>(
        rows: impl Iterator<Item = (&'a mut [T], &'a [T])>,
        body: impl Fn(&mut T, T),
    ) {
        for (to, from) in rows {
            let (to, from) = (to.first_chunk_mut::<N>().expect("a row"), from.first_chunk::<N>().expect("a row"));
            for i in 0..N {
                body(&mut to[i], from[i]);
            }
        }
    }
    let pairs = to.chunks_mut(strides[0]).zip(from.chunks(strides[1])).take(rows);
    macro_rules! by_length {
        ($($n:literal)*) => {
            match len {
                $($n => short::<T, $n>(pairs, body),)*
                _ => pairs.for_each(
                    #[inline(always)]
                    |(to, from)| to[..len].iter_mut().zip(&from[..len]).for_each(|(to, &from)| body(to, from)),
                ),
            }
        };
    }
    by_length!(1 2 3 4 5 6 7 8 10 12 14 16)
}
