//! Launches of `kernels/conv_hopper.cu`: convolutions on the warpgroup products of sm_90a, forward and data gradient.
//!
//! A tile's pixels are a box of (images, rows, columns), chosen here by shape and number of multiprocessors; sums have
//! one order whatever the box.

use super::super::launch::{BoxMapSpec, Launch, Ptr};
use super::super::queue::Queue;
use super::sizes;
use crate::base::Result;
use crate::graph::ConvSizes;

/// Channels of the source in a step.
const STEP: usize = 64;
/// Fewest channels of a source for which steps of [`STEP`] are worth it.
const LEAST_CHANNELS: usize = 32;
/// Its padded channels are a multiple of what one product adds up at a time: then sums have the order of
/// `kernels/conv_mma.cu` to the bit, and which of the two works may depend on the number of multiprocessors.
const ADDED_AT_ONCE: usize = 16;
/// Threads of a block.
const THREADS: u32 = 384;
/// Elements along an axis of a bulk copy's box, and how far apart they may lie.
const MOST_BOXED: usize = 256;
const MOST_APART: usize = 8;
/// Bytes of shared memory for steps and for sums that leave, and of the latter: 8 warps, 16 rows, 32 pixels.
const SHARED_BYTES: usize = 226 << 10;
const LEAVING_BYTES: usize = 8 * 16 * 32 * 2;
/// The tiles: channels, pixels of a box, kernel. With 64 channels a tile has two boxes.
const TILES: [(usize, usize, &str); 6] = [
    (128, 256, "conv2d_hopper_128x256_bf16"),
    (128, 224, "conv2d_hopper_128x224_bf16"),
    (128, 128, "conv2d_hopper_128x128_bf16"),
    (64, 256, "conv2d_hopper_64x256_bf16"),
    (64, 224, "conv2d_hopper_64x224_bf16"),
    (64, 128, "conv2d_hopper_64x128_bf16"),
];
/// What a tile takes beside its products, in columns of them.
const COLUMNS_BESIDE: usize = 24;

/// What a convolution writes: pixels of one class of (batch, channels, height, width).
#[derive(Clone, Copy, Debug)]
struct Target {
    batch: usize,
    channels: usize,
    width: usize,
    plane: usize,
    /// Classes of pixels by row and by column, and rows and columns of the largest.
    classes: [usize; 2],
    rows: usize,
    cols: usize,
    /// From a pixel of a class to the next, and between what those read.
    apart: usize,
    scale: usize,
}

impl Target {
    fn new(s: &ConvSizes, grad: bool) -> Target {
        let stride = s.window.stride;
        let batch = s.batch;
        if grad {
            let classes = [s.height.min(stride), s.width.min(stride)];
            let (rows, cols) = (s.height.div_ceil(stride), s.width.div_ceil(stride));
            let (channels, width, plane) = (s.in_channels, s.width, s.plane());
            Target { batch, channels, width, plane, classes, rows, cols, apart: stride, scale: 1 }
        } else {
            let (channels, width, plane) = (s.out_channels, s.out_width, s.out_plane());
            let (rows, cols) = (s.out_height, s.out_width);
            Target { batch, channels, width, plane, classes: [1; 2], rows, cols, apart: 1, scale: stride }
        }
    }
}

/// How a target is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    kernel: &'static str,
    /// Of a tile.
    channels: usize,
    pixels: usize,
    /// Its box of pixels.
    images: usize,
    rows: usize,
    cols: usize,
    /// Boxes across an image and down, and groups of a tile's boxes, of a class.
    across: usize,
    down: usize,
    groups: usize,
    /// Tiles of channels, and all tiles, each for all classes by column.
    channel_tiles: usize,
    tiles: usize,
}

impl Cut {
    /// The quickest: rounds of tiles over the multiprocessors, by what a tile takes; of equals the one with the fewest
    /// tiles, then with the most rows of an image, which share what taps read.
    fn of(t: &Target, multiprocessors: usize) -> Option<Cut> {
        if t.batch * t.channels * t.rows * t.cols == 0 || t.scale > MOST_APART {
            return None;
        }
        let mut best: Option<(usize, Cut)> = None;
        for (channels, pixels, kernel) in TILES {
            let most = pixels.min(MOST_BOXED / t.scale);
            let least_parts = t.cols.div_ceil(most);
            for parts in [least_parts, least_parts + 1] {
                let cols = t.cols.div_ceil(parts);
                for rows in (1..=t.rows.min(pixels / cols).min(MOST_BOXED / t.scale)).rev() {
                    let images = t.batch.min(pixels / (cols * rows));
                    let (across, down) = (t.cols.div_ceil(cols), t.rows.div_ceil(rows));
                    let groups = (across * down * t.batch.div_ceil(images)).div_ceil(128 / channels);
                    let channel_tiles = t.channels.div_ceil(channels);
                    let tiles = t.classes[0] * channel_tiles * groups;
                    // Of 64 channels, products wait for the L2.
                    let taken = (pixels + COLUMNS_BESIDE) * if channels == 64 { 5 } else { 4 };
                    let cost = tiles.div_ceil(multiprocessors) * taken;
                    if best.is_none_or(|(least, cut)| (cost, tiles) < (least, cut.tiles)) {
                        let cut = Cut {
                            kernel,
                            channels,
                            pixels,
                            images,
                            rows,
                            cols,
                            across,
                            down,
                            groups,
                            channel_tiles,
                            tiles,
                        };
                        best = Some((cost, cut));
                    }
                }
            }
        }
        let (_, cut) = best?;
        // Offsets within a box are 32 bits.
        let counted = i32::try_from(cut.images * t.channels * t.plane).is_ok() && i32::try_from(cut.tiles).is_ok();
        (counted && cut.tiles * 2 >= multiprocessors).then_some(cut)
    }

    /// Bytes of the largest word in which a box's pixels can be written: rows of it are such words, each within a row
    /// of the target, or follow each other there.
    fn word_bytes(&self, t: &Target) -> usize {
        let fits = |elems: usize| {
            let rows = self.cols.is_multiple_of(elems) && t.width.is_multiple_of(elems);
            let follow =
                self.cols == t.width && (self.cols * self.rows).is_multiple_of(elems) && t.plane.is_multiple_of(elems);
            t.apart == 1 && (rows || follow)
        };
        2 * [8, 4, 2].into_iter().find(|&elems| fits(elems)).unwrap_or(1)
    }

    fn shared_bytes(&self) -> usize {
        let step = (self.channels + 128 / self.channels * self.pixels) * STEP * 2;
        (SHARED_BYTES - LEAVING_BYTES) / step * step + LEAVING_BYTES
    }
}

/// source, weight with their channels last, (bias) -> target; whether it was queued. It is not where other kernels are
/// better, or have to do.
pub(super) fn launch(
    q: &mut Queue,
    target: Ptr,
    [source, weight, bias]: [Ptr; 3],
    s: &ConvSizes,
    grad: bool,
) -> Result<bool> {
    let (channels, height, width) =
        if grad { (s.out_channels, s.out_height, s.out_width) } else { (s.in_channels, s.height, s.width) };
    let pitch = channels.next_multiple_of(8);
    let suits = channels >= LEAST_CHANNELS && pitch.is_multiple_of(ADDED_AT_ONCE);
    if q.arch() != 90 || !suits || height * width * s.taps() == 0 {
        return Ok(false);
    }
    let t = Target::new(s, grad);
    let Some(cut) = Cut::of(&t, q.multiprocessors()) else { return Ok(false) };
    let pitch = pitch as u64;
    let boxed = [STEP, cut.cols * t.scale, cut.rows * t.scale, cut.images].map(|elems| elems as u32);
    let source = q.box_map(&BoxMapSpec {
        base: source,
        sizes: [pitch, width as u64, height as u64, s.batch as u64],
        pitch_bytes: [2 * pitch, 2 * pitch * width as u64, 2 * pitch * (width * height) as u64],
        boxed,
        apart: [1, t.scale as u32, t.scale as u32, 1],
    })?;
    let taps = s.taps() as u64;
    let weight = q.box_map(&BoxMapSpec {
        base: weight,
        sizes: [pitch, taps, t.channels as u64, 1],
        pitch_bytes: [2 * pitch, 2 * pitch * taps, 2 * pitch * taps * t.channels as u64],
        boxed: [STEP as u32, 1, cut.channels as u32, 1],
        apart: [1; 4],
    })?;
    let word = cut.word_bytes(&t);
    let counts = [
        cut.images,
        cut.rows,
        cut.cols,
        word,
        cut.across,
        cut.down,
        cut.groups,
        cut.channel_tiles,
        t.classes[0],
        t.classes[1],
    ];
    let mut bytes = [0; 40];
    for (to, count) in bytes.chunks_exact_mut(4).zip(counts) {
        to.copy_from_slice(&(count as i32).to_ne_bytes());
    }
    let blocks = cut.tiles.min(q.multiprocessors());
    let launch = Launch::new(cut.kernel, [blocks, 1, 1], THREADS).shared(cut.shared_bytes() as u32);
    let launch = launch.ptr(target).map(&source).map(&weight).ptr(bias).int(usize::from(grad));
    q.launch(launch.bytes(&sizes(s)?, 4).bytes(&bytes, 4))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target of stride 1 of square images.
    fn target(batch: usize, channels: usize, side: usize) -> Target {
        let (width, plane) = (side, side * side);
        Target { batch, channels, width, plane, classes: [1; 2], rows: side, cols: side, apart: 1, scale: 1 }
    }

    #[test]
    fn boxes_fill_tiles_and_rounds() {
        let of = |batch, channels, side| {
            let t = target(batch, channels, side);
            let cut = Cut::of(&t, 132).expect("there are tiles for half of the multiprocessors");
            (cut.channels, cut.pixels, [cut.images, cut.rows, cut.cols], cut.tiles, cut.word_bytes(&t))
        };
        assert_eq!(of(64, 64, 56), (64, 224, [1, 4, 56], 448, 16));
        assert_eq!(of(128, 128, 28), (128, 224, [2, 4, 28], 448, 16));
        assert_eq!(of(128, 256, 14), (128, 224, [8, 2, 14], 224, 8));
        assert_eq!(of(128, 512, 7), (128, 224, [32, 1, 7], 112, 2));
    }

    #[test]
    fn boxes_stay_within_what_copies_move() {
        for side in [1, 2, 7, 13, 57, 224, 255, 256, 257, 1000] {
            for scale in 1..=8 {
                let t = Target { scale, ..target(64, 64, side) };
                let Some(cut) = Cut::of(&t, 1) else { panic!("{t:?}") };
                assert!(cut.images * cut.rows * cut.cols <= cut.pixels, "{t:?} {cut:?}");
                assert!(cut.cols.max(cut.rows) * scale <= MOST_BOXED && cut.images <= MOST_BOXED, "{t:?} {cut:?}");
                assert!(cut.shared_bytes() <= 227 << 10, "{cut:?}");
            }
        }
        assert!(Cut::of(&Target { scale: 9, ..target(64, 64, 56) }, 132).is_none(), "elements lie too far apart");
        assert!(Cut::of(&target(1, 64, 7), 132).is_none(), "one tile");
        assert!(Cut::of(&target(0, 64, 7), 132).is_none(), "no images");
    }

    #[test]
    fn words_lie_within_rows_or_whole_images() {
        let t = target(8, 64, 56);
        let some = Cut::of(&t, 4).expect("there are tiles");
        let cut = |rows, cols| Cut { rows, cols, ..some };
        for (rows, cols, side, apart, bytes) in [
            (2, 56, 56, 1, 16),
            (2, 16, 48, 1, 16),
            (14, 14, 14, 1, 8),
            (3, 14, 14, 1, 4),
            (7, 7, 7, 1, 2),
            (2, 8, 12, 1, 8),
            (2, 56, 112, 2, 2),
        ] {
            let t = Target { apart, ..target(8, 64, side) };
            assert_eq!(cut(rows, cols).word_bytes(&t), bytes, "{rows} x {cols} of {side}");
        }
    }

    #[test]
    fn kernels_have_the_same_sizes() {
        let source = concat!(
            include_str!("../../../../kernels/conv_hopper.cu"),
            include_str!("../../../../kernels/gpu/gemm_ring.cuh"),
            include_str!("../../../../kernels/gpu/gemm_leave.cuh"),
            include_str!("../../../../kernels/gpu/conv_hopper.cuh"),
        );
        let mut lines = vec![
            format!("constexpr int CONV_THREADS = {THREADS};"),
            "constexpr int CONSUMER_WARPS = 8;".into(),
            format!("constexpr int TILE_M = 128, STEP = {STEP};"),
            "constexpr int PIECE = 32, PITCH".into(),
            "LEAVING_BYTES = 16 * PIECE * 2;".into(),
            format!("STAGES = ({} * 1024 - BYTES_BESIDE) / BYTES;", SHARED_BYTES >> 10),
        ];
        lines.extend(TILES.map(|(channels, pixels, kernel)| format!("CONV_HOPPER({kernel}, {channels}, {pixels})")));
        for line in lines {
            assert!(source.contains(&line), "no {line}");
        }
    }
}
