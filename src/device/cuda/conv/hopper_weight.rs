//! Launches of `kernels/conv_hopper_weight.cu`: the weight gradient on the warpgroup products of sm_90a.
//!
//! Boxes of pixels and parts of them, and so the order of every sum, are chosen by the shape alone.

use super::super::launch::{BoxMapSpec, Launch, Ptr};
use super::super::queue::Queue;
use super::sizes;
use crate::base::Result;
use crate::graph::ConvSizes;

/// Pixels of a box, and channels.
const BOX_PIXELS: usize = 64;
const BOX_CHANNELS: usize = 64;
const BOX_BYTES: usize = BOX_PIXELS * BOX_CHANNELS * 2;
/// Fewest channels of x and of out for which boxes are worth it.
const LEAST_CHANNELS: usize = 32;
/// Threads of a block.
const THREADS: u32 = 384;
/// Elements along an axis of a bulk copy's box, and how far apart they may lie.
const MOST_BOXED: usize = 256;
const MOST_APART: usize = 8;
/// Bytes of shared memory for the ring.
const SHARED_BYTES: usize = 226 << 10;
/// What parts are chosen for: an H100's multiprocessors, whatever the chip has.
const MULTIPROCESSORS: usize = 132;
/// Cycles in which the L2 brings a multiprocessor a box while all of them ask, cycles in which a tile's sums leave, and
/// bytes that the memory writes or reads in one.
const BOX_CYCLES: usize = BOX_BYTES / 50;
const LEAVING_CYCLES: usize = 3000;
const BYTES_A_CYCLE: usize = 1700;
/// The tiles: output channels, blocks of columns, cycles of the tensor cores for a step, kernel.
const TILES: [(usize, usize, usize, &str); 3] = [
    (128, 4, 1024, "conv2d_grad_weight_hopper_128x256_bf16"),
    (128, 3, 768, "conv2d_grad_weight_hopper_128x192_bf16"),
    (64, 6, 768, "conv2d_grad_weight_hopper_64x384_bf16"),
];

/// How a weight gradient is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    kernel: &'static str,
    /// Output channels of a tile, and blocks of columns.
    rows: usize,
    blocks: usize,
    /// (images, rows, columns) of a box of pixels.
    boxed: [usize; 3],
    /// Boxes across an image and down, all boxes, those of a part, and parts.
    across: usize,
    down: usize,
    boxes: usize,
    part_boxes: usize,
    parts: usize,
    row_tiles: usize,
    column_tiles: usize,
}

impl Cut {
    /// The quickest with at most so many parts.
    fn of(s: &ConvSizes, most_parts: usize) -> Option<Cut> {
        let stride = s.window.stride;
        let channels = s.in_channels.min(s.out_channels);
        if channels < LEAST_CHANNELS || s.out_pixels() * s.plane() * s.taps() == 0 || stride > MOST_APART {
            return None;
        }
        let [images, rows, cols] = boxed(s)?;
        let (across, down) = (s.out_width.div_ceil(cols), s.out_height.div_ceil(rows));
        let boxes = across * down * s.batch.div_ceil(images);
        i32::try_from(boxes).ok()?;
        let blocks_of_columns = s.taps() * s.in_channels.div_ceil(BOX_CHANNELS);
        let part_bytes = s.out_channels * blocks_of_columns * BOX_CHANNELS * 8;
        let cuts = TILES.iter().flat_map(|&(tile_rows, blocks, product_cycles, kernel)| {
            (1..=most_parts.min(boxes)).map(move |parts| {
                let part_boxes = boxes.div_ceil(parts);
                let (row_tiles, column_tiles) =
                    (s.out_channels.div_ceil(tile_rows), blocks_of_columns.div_ceil(blocks));
                let parts = boxes.div_ceil(part_boxes);
                // Channels and columns beyond the last are not brought.
                let boxes_a_step = s.out_channels.div_ceil(BOX_CHANNELS).div_ceil(row_tiles)
                    + blocks_of_columns.div_ceil(column_tiles);
                let step_cycles = product_cycles.max(boxes_a_step * BOX_CYCLES);
                let rounds = (row_tiles * column_tiles * parts).div_ceil(MULTIPROCESSORS);
                let cycles = rounds * (part_boxes * step_cycles + LEAVING_CYCLES) + parts * part_bytes / BYTES_A_CYCLE;
                let boxed = [images, rows, cols];
                (
                    cycles,
                    Cut {
                        kernel,
                        rows: tile_rows,
                        blocks,
                        boxed,
                        across,
                        down,
                        boxes,
                        part_boxes,
                        parts,
                        row_tiles,
                        column_tiles,
                    },
                )
            })
        });
        cuts.min_by_key(|&(cycles, _)| cycles).map(|(_, cut)| cut)
    }

    fn shared_bytes(&self) -> usize {
        let step = (self.rows / 64 + self.blocks) * BOX_BYTES;
        SHARED_BYTES / step * step
    }
}

/// The box of [`BOX_PIXELS`] output pixels, powers of two of (images, rows, columns), that leaves the fewest of them
/// without one; of equals the widest.
fn boxed(s: &ConvSizes) -> Option<[usize; 3]> {
    let powers = |most: usize| (0..=most.ilog2()).map(|power| 1 << power);
    let all = powers(BOX_PIXELS)
        .flat_map(|cols| powers(BOX_PIXELS / cols).map(move |rows| [BOX_PIXELS / cols / rows, rows, cols]));
    let moved = all.filter(|[_, rows, cols]| rows.max(cols) * s.window.stride <= MOST_BOXED);
    moved.min_by_key(|&[images, rows, cols]| {
        let boxes = s.batch.div_ceil(images) * s.out_height.div_ceil(rows) * s.out_width.div_ceil(cols);
        (boxes, BOX_PIXELS - cols, BOX_PIXELS - rows)
    })
}

/// d_out, x with their channels last -> partials, in as many parts as it says, at most `most_parts`. `None` where other
/// kernels have to do.
pub(super) fn launch(
    q: &mut Queue,
    partials: Ptr,
    [d_out, x]: [Ptr; 2],
    s: &ConvSizes,
    most_parts: usize,
) -> Result<Option<usize>> {
    if q.arch() != 90 {
        return Ok(None);
    }
    let Some(cut) = Cut::of(s, most_parts) else { return Ok(None) };
    let [images, rows, cols] = cut.boxed;
    let mut map = |base: Ptr, channels: usize, [height, width]: [usize; 2], apart: usize| {
        let pitch = channels.next_multiple_of(8) as u64;
        q.box_map(&BoxMapSpec {
            base,
            sizes: [pitch, width as u64, height as u64, s.batch as u64],
            pitch_bytes: [2 * pitch, 2 * pitch * width as u64, 2 * pitch * (width * height) as u64],
            boxed: [BOX_CHANNELS, cols * apart, rows * apart, images].map(|elems| elems as u32),
            apart: [1, apart as u32, apart as u32, 1],
        })
    };
    let d_out = map(d_out, s.out_channels, [s.out_height, s.out_width], 1)?;
    let x = map(x, s.in_channels, [s.height, s.width], s.window.stride)?;
    let counts = [
        images,
        rows,
        cols,
        cut.across,
        cut.down,
        cut.boxes,
        cut.part_boxes,
        cut.parts,
        cut.row_tiles,
        cut.column_tiles,
    ];
    let mut bytes = [0; 40];
    for (to, count) in bytes.chunks_exact_mut(4).zip(counts) {
        to.copy_from_slice(&(count as i32).to_ne_bytes());
    }
    let blocks = (cut.row_tiles * cut.column_tiles * cut.parts).min(q.multiprocessors());
    let launch = Launch::new(cut.kernel, [blocks, 1, 1], THREADS).shared(cut.shared_bytes() as u32);
    q.launch(launch.ptr(partials).map(&d_out).map(&x).bytes(&sizes(s)?, 4).bytes(&bytes, 4))?;
    Ok(Some(cut.parts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Window;

    /// Square images and filters, the padding of which keeps the image's size.
    fn conv(
        batch: usize,
        in_channels: usize,
        side: usize,
        out_channels: usize,
        kernel: usize,
        stride: usize,
    ) -> ConvSizes {
        let window = Window { kernel: [kernel; 2], stride, padding: kernel / 2 };
        let [height, width] = window.out(side, side).expect("the padded image holds the filter");
        ConvSizes::new(&window, &[batch, in_channels, side, side], &[batch, out_channels, height, width])
    }

    #[test]
    fn boxes_waste_no_pixels_of_common_images() {
        for (side, want) in [(56, [1, 8, 8]), (28, [4, 4, 4]), (14, [16, 2, 2]), (7, [64, 1, 1])] {
            assert_eq!(boxed(&conv(128, 64, side, 64, 3, 1)), Some(want), "{side}");
        }
    }

    #[test]
    fn parts_cover_the_boxes_and_none_is_empty() {
        for s in [
            conv(1, 32, 1, 32, 1, 1),
            conv(64, 64, 56, 64, 3, 1),
            conv(128, 256, 14, 256, 3, 1),
            conv(128, 512, 7, 512, 3, 1),
            conv(3, 40, 57, 130, 5, 2),
        ] {
            for most in [1, 2, 4, 15, 128] {
                let cut = Cut::of(&s, most).expect("there are boxes");
                assert!(cut.parts <= most && cut.parts * cut.part_boxes >= cut.boxes, "{s:?} {cut:?}");
                assert!((cut.parts - 1) * cut.part_boxes < cut.boxes, "{s:?} {cut:?}");
                assert!(cut.shared_bytes() <= 227 << 10, "{cut:?}");
            }
        }
        assert!(Cut::of(&conv(8, 3, 224, 64, 7, 2), 128).is_none(), "three channels");
        assert!(Cut::of(&conv(0, 64, 56, 64, 3, 1), 1).is_none(), "no images");
    }

    #[test]
    fn tiles_follow_the_channels() {
        let tile = |s: ConvSizes, most| Cut::of(&s, most).map(|cut| (cut.rows, cut.blocks, cut.parts));
        assert_eq!(tile(conv(64, 64, 56, 64, 3, 1), 128), Some((64, 6, 66)));
        assert_eq!(tile(conv(128, 128, 28, 128, 3, 1), 59), Some((128, 3, 22)));
        assert_eq!(tile(conv(128, 256, 14, 256, 3, 1), 15), Some((128, 4, 7)));
        assert_eq!(tile(conv(128, 512, 7, 512, 3, 1), 4), Some((128, 3, 1)));
    }

    #[test]
    fn kernels_have_the_same_sizes() {
        let source = concat!(
            include_str!("../../../../kernels/conv_hopper_weight.cu"),
            include_str!("../../../../kernels/gpu/gemm_ring.cuh"),
            include_str!("../../../../kernels/gpu/conv_hopper.cuh"),
        );
        let mut lines = vec![
            format!("constexpr int CONV_THREADS = {THREADS};"),
            format!("STEP = {BOX_PIXELS};"),
            format!("constexpr int BOX_BYTES = {BOX_CHANNELS} * STEP * 2;"),
            format!("STAGES = ({} * 1024 - BYTES_BESIDE) / BYTES;", SHARED_BYTES >> 10),
        ];
        lines.extend(TILES.map(|(rows, blocks, _, kernel)| format!("CONV_HOPPER_WEIGHT({kernel}, {rows}, {blocks})")));
        for line in lines {
            assert!(source.contains(&line), "no {line}");
        }
    }
}
