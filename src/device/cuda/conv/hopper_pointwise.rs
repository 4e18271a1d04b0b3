//! Launches of `kernels/conv_hopper_pointwise.cu`: filters of one tap on images as they lie, on the warpgroup products
//! of sm_90a.

use super::super::launch::{BoxMapSpec, Launch, Ptr, TensorMap};
use super::super::queue::Queue;
use super::sizes;
use crate::base::Result;
use crate::graph::{ConvSizes, Window};

/// Pixels of a strip, and of a step of channels.
const STRIP: usize = 64;
/// Strips that a warpgroup multiplies at a time.
const STRIPS_A_BOX: usize = 4;
/// Fewest channels of x and of out for which steps of [`STRIP`] are worth it.
const LEAST_CHANNELS: usize = 32;
/// Threads of a block.
const THREADS: u32 = 384;
/// Bytes of shared memory for a ring and sums that leave, and of the latter.
const SHARED_BYTES: usize = 226 << 10;
const LEAVING_BYTES: usize = 8 * 16 * 32 * 2;
/// Output channels of a tile of the weight gradient; input channels and kernel.
const WEIGHT_ROWS: usize = 128;
const WEIGHT_TILES: [(usize, &str); 3] = [
    (64, "conv2d_grad_weight_pointwise_hopper_64_bf16"),
    (128, "conv2d_grad_weight_pointwise_hopper_128_bf16"),
    (256, "conv2d_grad_weight_pointwise_hopper_256_bf16"),
];
/// What parts are chosen for: an H100's multiprocessors, whatever the chip has; bytes that each is brought in a cycle,
/// cycles in which a tile's sums leave, and bytes that the memory writes or reads in one.
const MULTIPROCESSORS: usize = 132;
const BYTES_A_CYCLE_EACH: usize = 20;
const LEAVING_CYCLES: usize = 3000;
const BYTES_A_CYCLE: usize = 1700;

/// Whether planes of pixels can be copied in boxes, and channels are enough for them.
fn suits(q: &Queue, s: &ConvSizes) -> bool {
    let work = s.batch * s.plane() != 0;
    let counted = i32::try_from(s.plane()).is_ok() && i32::try_from(s.batch * s.plane().div_ceil(STRIP)).is_ok();
    q.arch() == 90 && s.in_channels.min(s.out_channels) >= LEAST_CHANNELS && work && counted
}

/// A tensor (batch, channels, plane) in boxes of a strip of so many channels.
fn images(q: &mut Queue, base: Ptr, s: &ConvSizes, channels: usize, boxed: usize) -> Result<TensorMap> {
    let (plane, batch, all) = (s.plane() as u64, s.batch as u64, channels as u64);
    q.box_map(&BoxMapSpec {
        base,
        sizes: [plane, all, batch, 1],
        pitch_bytes: [2 * plane, 2 * plane * all, 2 * plane * all * batch],
        boxed: [STRIP as u32, boxed as u32, 1, 1],
        apart: [1; 4],
    })
}

fn words<const BYTES: usize>(counts: &[usize]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (to, count) in bytes.chunks_exact_mut(4).zip(counts) {
        to.copy_from_slice(&(*count as i32).to_ne_bytes());
    }
    bytes
}

/// x (N, C, plane), weight (O, C'), bias (O) or null -> out (N, O, plane); whether it was queued. It is not where other
/// kernels are better, or have to do: they add in the same order, so this may depend on the number of multiprocessors.
pub(super) fn launch(q: &mut Queue, out: Ptr, operands: [Ptr; 3], s: &ConvSizes) -> Result<bool> {
    spread(q, out, operands, s, 0)
}

/// d_out (N, O, H', W'), weight (C, O') -> d_x (N, C, H, W) of a filter of one tap and stride 2; whether it was queued.
pub(super) fn launch_spread(q: &mut Queue, d_x: Ptr, [d_out, weight]: [Ptr; 2], s: &ConvSizes) -> Result<bool> {
    let Window { kernel, stride, padding } = s.window;
    let one_tap = kernel == [1, 1] && stride == 2 && padding == 0;
    let whole_words = s.out_plane().is_multiple_of(8) && s.out_width.is_multiple_of(4) && s.width == 2 * s.out_width;
    if !(one_tap && whole_words) {
        return Ok(false);
    }
    spread(q, d_x, [d_out, weight, Ptr::NULL], &s.copied().exchanged(), s.height)
}

/// The same with pixels spread over planes of so many rows, unless it is 0.
fn spread(q: &mut Queue, out: Ptr, [x, weight, bias]: [Ptr; 3], s: &ConvSizes, height: usize) -> Result<bool> {
    if !suits(q, s) {
        return Ok(false);
    }
    let (kernel, channels) = if s.out_channels <= 64 {
        ("conv2d_pointwise_hopper_64_bf16", 64)
    } else {
        ("conv2d_pointwise_hopper_128_bf16", 128)
    };
    let (strips, boxes) = (s.plane().div_ceil(STRIP), 128 / channels);
    let (groups, channel_tiles) =
        ((strips * s.batch).div_ceil(STRIPS_A_BOX * boxes), s.out_channels.div_ceil(channels));
    let tiles = groups * channel_tiles;
    if tiles * 2 < q.multiprocessors() {
        return Ok(false);
    }
    let x = images(q, x, s, s.in_channels, STRIP)?;
    let pitch = s.in_channels.next_multiple_of(8) as u64;
    let rows = s.out_channels as u64;
    let weight = q.box_map(&BoxMapSpec {
        base: weight,
        sizes: [pitch, rows, 1, 1],
        pitch_bytes: [2 * pitch, 2 * pitch * rows, 2 * pitch * rows],
        boxed: [STRIP as u32, channels as u32, 1, 1],
        apart: [1; 4],
    })?;
    let step = (channels + boxes * STRIPS_A_BOX * STRIP) * STRIP * 2;
    let shared = (SHARED_BYTES - LEAVING_BYTES) / step * step + LEAVING_BYTES;
    let launch = Launch::new(kernel, [tiles.min(q.multiprocessors()), 1, 1], THREADS).shared(shared as u32);
    let launch = launch.ptr(out).map(&x).map(&weight).ptr(bias).bytes(&sizes(s)?, 4);
    q.launch(launch.bytes(&words::<16>(&[strips, groups, channel_tiles, height]), 4))?;
    Ok(true)
}

/// How a weight gradient is cut: strips of a part, and parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    strips: usize,
    parts: usize,
}

/// The quickest of at most so many parts, by the shape alone.
fn parts_of(s: &ConvSizes, columns: usize, most_parts: usize) -> Parts {
    let strips = s.batch * s.plane().div_ceil(STRIP);
    let tiles = s.out_channels.div_ceil(WEIGHT_ROWS) * s.in_channels.div_ceil(columns);
    let step_cycles = (columns * 4).max((WEIGHT_ROWS + columns) * STRIP * 2 / BYTES_A_CYCLE_EACH);
    let part_cycles = s.out_channels * s.in_channels * 8 / BYTES_A_CYCLE;
    let cuts = (1..=most_parts.min(strips)).map(|parts| {
        let part_strips = strips.div_ceil(parts);
        let parts = strips.div_ceil(part_strips);
        let rounds = (tiles * parts).div_ceil(MULTIPROCESSORS);
        let cycles = rounds * (part_strips * step_cycles + LEAVING_CYCLES) + parts * part_cycles;
        (cycles, Parts { strips: part_strips, parts })
    });
    cuts.min_by_key(|&(cycles, _)| cycles).map_or(Parts { strips, parts: 1 }, |(_, cut)| cut)
}

/// d_out (N, O, plane), x (N, C, plane) -> partials, in as many parts as it says, at most `most_parts`. `None` where
/// other kernels have to do.
pub(super) fn launch_weight(
    q: &mut Queue,
    partials: Ptr,
    [d_out, x]: [Ptr; 2],
    s: &ConvSizes,
    most_parts: usize,
) -> Result<Option<usize>> {
    if !suits(q, s) {
        return Ok(None);
    }
    let (columns, kernel) =
        *WEIGHT_TILES.iter().find(|(columns, _)| *columns >= s.in_channels).unwrap_or(&WEIGHT_TILES[2]);
    let Parts { strips: part_strips, parts } = parts_of(s, columns, most_parts);
    let (row_tiles, column_tiles) = (s.out_channels.div_ceil(WEIGHT_ROWS), s.in_channels.div_ceil(columns));
    let strips = s.plane().div_ceil(STRIP);
    let d_out = images(q, d_out, s, s.out_channels, WEIGHT_ROWS)?;
    let x = images(q, x, s, s.in_channels, columns)?;
    let step = (WEIGHT_ROWS + columns) * STRIP * 2;
    let blocks = (row_tiles * column_tiles * parts).min(q.multiprocessors());
    let launch = Launch::new(kernel, [blocks, 1, 1], THREADS).shared((SHARED_BYTES / step * step) as u32);
    let counts = [strips, s.batch * strips, part_strips, parts, row_tiles, column_tiles];
    let launch = launch.ptr(partials).map(&d_out).map(&x).bytes(&sizes(s)?, 4);
    q.launch(launch.bytes(&words::<24>(&counts), 4))?;
    Ok(Some(parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_strips_and_none_is_empty() {
        let window = Window { kernel: [1; 2], stride: 1, padding: 0 };
        for (batch, in_channels, side, out_channels) in [(128, 64, 56, 256), (128, 512, 28, 128), (1, 32, 4, 32)] {
            let s = ConvSizes::new(&window, &[batch, in_channels, side, side], &[batch, out_channels, side, side]);
            let strips = batch * (side * side).div_ceil(STRIP);
            for most in [1, 2, 15, 128] {
                for (columns, _) in WEIGHT_TILES {
                    let cut = parts_of(&s, columns, most);
                    assert!(cut.parts <= most && cut.parts * cut.strips >= strips, "{s:?} {cut:?}");
                    assert!((cut.parts - 1) * cut.strips < strips, "{s:?} {cut:?}");
                }
            }
        }
    }

    #[test]
    fn kernels_have_the_same_sizes() {
        let source = concat!(
            include_str!("../../../../kernels/conv_hopper_pointwise.cu"),
            include_str!("../../../../kernels/gpu/conv_hopper.cuh"),
        );
        let mut lines = vec![
            format!("constexpr int CONV_THREADS = {THREADS};"),
            format!("constexpr int STRIP = {STRIP}, PIXELS = {STRIPS_A_BOX} * STRIP;"),
            format!("STAGES = ({} * 1024 - BYTES_BESIDE) / BYTES;", SHARED_BYTES >> 10),
            format!("struct WeightSteps : StepRing<({WEIGHT_ROWS} + COLUMNS) * ROW_BYTES, 0>"),
            "constexpr int CONSUMER_WARPS = 8;".into(),
            "LEAVING_BYTES = 16 * PIECE * 2;".into(),
        ];
        lines.extend(WEIGHT_TILES.map(|(columns, kernel)| format!("POINTWISE_WEIGHT({kernel}, {columns})")));
        for line in lines {
            assert!(source.contains(&line), "no {line}");
        }
    }
}
