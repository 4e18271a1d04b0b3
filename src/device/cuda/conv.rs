//! Launches of `kernels/conv*.cu`.
//!
//! In f32 the plain arithmetic units work on the tensors as they are. In bf16 the tensor cores do, on copies with the
//! channels last; the tile depends on the shape and the chip, the bits of the result on the shape and on which kernels
//! the architecture takes.

mod hopper;
mod hopper_pointwise;
mod hopper_weight;

use super::launch::{Launch, Ptr};
use super::operands::{ADD, Operands, pick};
use super::queue::Queue;
use crate::base::{DType, Error, Result};
use crate::graph::{ConvSizes, ConvTile, RowParts, Window, conv_bias_parts, conv_regions, is_channels_last};

/// Threads of a block that multiplies.
const THREADS: u32 = 128;
/// Threads of the other blocks.
const SUM_THREADS: usize = 256;
/// Channels and positions of a block of `conv2d_channels_last_bf16`.
const LAYOUT_TILE: usize = 64;
/// Stages of the ring in shared memory, and bytes of a row or column of a tile in one.
const STAGES: usize = 4;
const STAGE_ROW_BYTES: usize = 64;
/// Bytes of a `Place` in `gpu/conv.cuh`.
const PLACE_BYTES: usize = 16;
/// Rows and columns of a padded image that kernels count: below the row that stands for nowhere.
const MOST_ROWS: usize = 1 << 29;

/// x (N, C, H, W), weight (O, C, kh, kw), (bias (O)) -> out (N, O, H', W').
pub(super) fn forward(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let s = ConvSizes::new(window, o.in_axes(0), o.out_axes(0));
    let (mut weight, bias, dtype) = (o.input(1), o.optional_input(2), o.in_dtype(0));
    let begins = conv_regions(&o.step.op, dtype, &s);
    if dtype == DType::Bf16 {
        weight = channels_last(q, o.scratch().plus(begins[1]), weight, s.out_channels, s.in_channels, s.taps())?;
        if s.is_pointwise() {
            return pointwise(q, o.output(0), o.input(0), weight, bias, &s);
        }
    }
    for (first, mut s) in rounds(&s, dtype) {
        let mut x = o.input(0).plus(first * image_bytes(dtype, s.in_channels, s.plane()));
        let out = o.output(0).plus(first * image_bytes(dtype, s.out_channels, s.out_plane()));
        let (kernel, tile) = if dtype == DType::Bf16 {
            x = image_channels_last(q, o.scratch().plus(begins[0]), x, &s)?;
            s = s.copied();
            if hopper::launch(q, out, [x, weight, bias], &s, false)? {
                continue;
            }
            let names = ["conv2d_forward_square_bf16", "conv2d_forward_flat_bf16", "conv2d_forward_small_bf16"];
            tensor_core_tile(q, names, s.out_channels, s.out_pixels(), 1)
        } else {
            ("conv2d_forward_f32", ConvTile::PLAIN)
        };
        let launch = product(kernel, tile, tile.count(s.out_channels, s.out_pixels()));
        q.launch(launch.ptr(out).ptr(x).ptr(weight).ptr(bias).bytes(&sizes(&s)?, 4))?;
    }
    Ok(())
}

/// d_out (N, O, H', W'), weight (O, C, kh, kw) -> d_x (N, C, H, W).
pub(super) fn grad_input(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let s = ConvSizes::new(window, o.out_axes(0), o.in_axes(0));
    let (mut weight, dtype) = (o.input(1), o.in_dtype(0));
    let begins = conv_regions(&o.step.op, dtype, &s);
    if dtype == DType::Bf16 {
        let columns = s.in_channels * s.taps();
        weight = channels_last(q, o.scratch().plus(begins[1]), weight, 1, s.out_channels, columns)?;
        if s.is_pointwise() {
            return pointwise(q, o.output(0), o.input(0), weight, Ptr::NULL, &s.exchanged());
        }
        if hopper_pointwise::launch_spread(q, o.output(0), [o.input(0), weight], &s)? {
            return Ok(());
        }
    }
    // Pixels by row and column modulo the stride: every class is given the tiles of the largest, that of 0 and 0.
    let classes = s.height.min(window.stride) * s.width.min(window.stride);
    for (first, s) in rounds(&s, dtype) {
        let mut d_out = o.input(0).plus(first * image_bytes(dtype, s.out_channels, s.out_plane()));
        let d_x = o.output(0).plus(first * image_bytes(dtype, s.in_channels, s.plane()));
        let pixels = s.batch * s.height.div_ceil(window.stride) * s.width.div_ceil(window.stride);
        let (kernel, tile) = if dtype == DType::Bf16 {
            d_out = channels_last(q, o.scratch().plus(begins[0]), d_out, s.batch, s.out_channels, s.out_plane())?;
            if hopper::launch(q, d_x, [d_out, weight, Ptr::NULL], &s, true)? {
                continue;
            }
            let names =
                ["conv2d_grad_input_square_bf16", "conv2d_grad_input_flat_bf16", "conv2d_grad_input_small_bf16"];
            tensor_core_tile(q, names, s.in_channels, pixels, classes)
        } else {
            ("conv2d_grad_input_f32", ConvTile::PLAIN)
        };
        let launch = product(kernel, tile, classes * tile.count(s.in_channels, pixels));
        q.launch(launch.ptr(d_x).ptr(d_out).ptr(weight).bytes(&sizes(&s)?, 4))?;
    }
    Ok(())
}

/// d_out (N, O, H', W'), x (N, C, H, W) -> d_weight (O, C, kh, kw) f32.
pub(super) fn grad_weight(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let s = ConvSizes::new(window, o.in_axes(1), o.in_axes(0));
    let dtype = o.in_dtype(0);
    let begins = conv_regions(&o.step.op, dtype, &s);
    let partials = o.scratch().plus(begins[2]);
    let RowParts { parts: most_parts, rows: part_pixels } = s.weight_parts(dtype);
    let (tile, columns) = (s.weight_tile(dtype), s.weight_columns(dtype));
    let tiles = tile.count(s.out_channels, columns);
    if dtype != DType::Bf16 {
        let partials = if most_parts > 1 { partials } else { Ptr::NULL };
        let launch = Launch::new("conv2d_grad_weight_f32", [tiles, most_parts, 1], THREADS).ptr(o.output(0));
        let launch = launch.ptr(partials).ptr(o.input(0)).ptr(o.input(1)).ptr(q.now).bytes(&sizes(&s)?, 4);
        q.launch(launch.long(part_pixels).int(o.accumulator(0)))?;
        return if most_parts > 1 { add_parts(q, o, &s, partials, most_parts, o.accumulator(0)) } else { Ok(()) };
    }
    let pointwise = s.is_pointwise();
    let kernel = match (pointwise, tile == ConvTile::FLAT) {
        (false, false) => "conv2d_grad_weight_square_bf16",
        (false, true) => "conv2d_grad_weight_flat_bf16",
        (true, false) => "conv2d_grad_weight_pointwise_square_bf16",
        (true, true) => "conv2d_grad_weight_pointwise_flat_bf16",
    };
    for (first, mut s) in rounds(&s, dtype) {
        let mut d_out = o.input(0).plus(first * image_bytes(dtype, s.out_channels, s.out_plane()));
        let mut x = o.input(1).plus(first * image_bytes(dtype, s.in_channels, s.plane()));
        let accumulator = if first == 0 { o.accumulator(0) } else { ADD };
        if !pointwise {
            d_out = channels_last(q, o.scratch().plus(begins[0]), d_out, s.batch, s.out_channels, s.out_plane())?;
            x = image_channels_last(q, o.scratch().plus(begins[1]), x, &s)?;
            s = s.copied();
        }
        let hopper = if pointwise { hopper_pointwise::launch_weight } else { hopper_weight::launch };
        if let Some(parts) = hopper(q, partials, [d_out, x], &s, most_parts)? {
            add_parts(q, o, &s, partials, parts, accumulator)?;
            continue;
        }
        let parts = s.out_pixels().div_ceil(part_pixels).max(1);
        let launch = Launch::new(kernel, [tiles, parts, 1], THREADS).shared(ring_bytes(tile));
        q.launch(launch.ptr(partials).ptr(d_out).ptr(x).bytes(&sizes(&s)?, 4).long(part_pixels))?;
        add_parts(q, o, &s, partials, parts, accumulator)?;
    }
    Ok(())
}

/// partials (parts, O, weight_columns) -> d_weight (O, C, kh, kw).
fn add_parts(
    q: &mut Queue,
    o: &Operands,
    s: &ConvSizes,
    partials: Ptr,
    parts: usize,
    accumulator: usize,
) -> Result<()> {
    let columns = s.weight_columns(o.in_dtype(0));
    // Elements from a channel to the next in a part, and from a tap to the next.
    let (channel_pitch, tap_pitch) =
        if o.in_dtype(0) == DType::Bf16 { (1, columns.checked_div(s.taps()).unwrap_or(0)) } else { (s.taps(), 1) };
    // Where channels follow each other a warp has 8 of them under 4 taps.
    let warps = s.out_channels * s.in_channels.div_ceil(8) * s.taps().div_ceil(4);
    let threads = if tap_pitch == 1 || s.taps() == 1 { o.out_elems(0) } else { warps * 32 };
    let blocks = threads.div_ceil(SUM_THREADS);
    let sum = Launch::new("conv2d_grad_weight_sum", [blocks, 1, 1], SUM_THREADS as u32);
    let sum = sum.ptr(o.output(0)).ptr(partials).ptr(q.now).int(s.out_channels).int(s.in_channels).int(s.taps());
    q.launch(sum.long(columns).int(channel_pitch).int(tap_pitch).int(parts).int(accumulator))
}

/// d_out (N, O, H', W') -> d_bias (O) f32.
pub(super) fn grad_bias(q: &mut Queue, o: &Operands) -> Result<()> {
    let axes = o.in_axes(0);
    let (batch, channels, positions) = (axes[0], axes[1], axes[2..].iter().product::<usize>());
    let RowParts { parts, rows } = conv_bias_parts(batch * positions);
    let partials = if parts > 1 { o.scratch() } else { Ptr::NULL };
    let kernel = pick(o.in_dtype(0), "conv2d_grad_bias_f32", "conv2d_grad_bias_bf16");
    let launch = Launch::new(kernel, [channels * parts, 1, 1], SUM_THREADS as u32).ptr(o.output(0)).ptr(partials);
    let launch = launch.ptr(o.input(0)).ptr(q.now).int(batch).int(channels).int(positions);
    q.launch(launch.long(rows).int(o.accumulator(0)))?;
    if parts == 1 {
        return Ok(());
    }
    let sum = Launch::new("conv2d_grad_bias_sum", [channels.div_ceil(SUM_THREADS / 32), 1, 1], SUM_THREADS as u32);
    let sum = sum.ptr(o.output(0)).ptr(partials).ptr(q.now);
    q.launch(sum.int(channels).int(parts).int(o.accumulator(0)))
}

/// x (N, C, plane), weight (O, C'), bias (O) or null -> out (N, O, plane), by `kernels/conv_pointwise.cu`.
fn pointwise(q: &mut Queue, out: Ptr, x: Ptr, weight: Ptr, bias: Ptr, s: &ConvSizes) -> Result<()> {
    if hopper_pointwise::launch(q, out, [x, weight, bias], s)? {
        return Ok(());
    }
    let names = ["conv2d_pointwise_square_bf16", "conv2d_pointwise_flat_bf16", "conv2d_pointwise_small_bf16"];
    let (kernel, tile) = tensor_core_tile(q, names, s.out_channels, s.out_pixels(), 1);
    let launch = product(kernel, tile, tile.count(s.out_channels, s.out_pixels()));
    q.launch(launch.ptr(out).ptr(x).ptr(weight).ptr(bias).bytes(&sizes(s)?, 4))
}

/// The first image of each round, and the sizes of what it works on. There is one round at least.
fn rounds(s: &ConvSizes, dtype: DType) -> impl Iterator<Item = (u64, ConvSizes)> {
    let (s, images) = (*s, s.images_at_once(dtype));
    let firsts = (0..s.batch.div_ceil(images).max(1)).map(move |round| round * images);
    firsts.map(move |first| (first as u64, s.with_batch(images.min(s.batch - first))))
}

/// Bytes of an image.
fn image_bytes(dtype: DType, channels: usize, plane: usize) -> u64 {
    (channels * plane) as u64 * dtype.bytes()
}

/// A launch of a product of channels and pixels.
fn product(kernel: &'static str, tile: ConvTile, blocks: usize) -> Launch {
    let shared = if tile == ConvTile::PLAIN { 0 } else { ring_bytes(tile) + (tile.columns * PLACE_BYTES) as u32 };
    Launch::new(kernel, [blocks, 1, 1], THREADS).shared(shared)
}

/// Bytes of the ring of stages in shared memory.
fn ring_bytes(tile: ConvTile) -> u32 {
    (STAGES * (tile.rows + tile.columns) * STAGE_ROW_BYTES) as u32
}

/// The kernel, by its tile, for `classes` products of (channels, pixels): small tiles where large ones leave
/// multiprocessors idle. `names` are those with square, flat and small tiles.
fn tensor_core_tile(
    q: &Queue,
    names: [&'static str; 3],
    channels: usize,
    pixels: usize,
    classes: usize,
) -> (&'static str, ConvTile) {
    let tile = ConvTile::covering(channels, pixels);
    if classes * tile.count(channels, pixels) < q.multiprocessors() {
        (names[2], ConvTile::SMALL)
    } else if tile == ConvTile::FLAT {
        (names[1], tile)
    } else {
        (names[0], tile)
    }
}

/// `from` (batch, channels, positions) with its channels last and padded, in `to`; `from` itself where that is the
/// same.
fn channels_last(q: &mut Queue, to: Ptr, from: Ptr, batch: usize, channels: usize, positions: usize) -> Result<Ptr> {
    if is_channels_last(channels, positions) {
        return Ok(from);
    }
    let blocks = batch * channels.div_ceil(LAYOUT_TILE) * positions.div_ceil(LAYOUT_TILE);
    let launch = Launch::new("conv2d_channels_last_bf16", [blocks, 1, 1], SUM_THREADS as u32);
    q.launch(launch.ptr(to).ptr(from).long(batch).int(channels).long(positions))?;
    Ok(to)
}

/// x (N, C, H, W) with its channels last, in `to`: what [`ConvSizes::copied`] has of it.
fn image_channels_last(q: &mut Queue, to: Ptr, x: Ptr, s: &ConvSizes) -> Result<Ptr> {
    let copied = s.copied();
    if copied.plane() == s.plane() {
        return channels_last(q, to, x, s.batch, s.in_channels, s.plane());
    }
    let blocks = s.batch * s.in_channels.div_ceil(LAYOUT_TILE) * copied.plane().div_ceil(LAYOUT_TILE);
    let launch = Launch::new("conv2d_channels_last_strided_bf16", [blocks, 1, 1], SUM_THREADS as u32);
    let launch = launch.ptr(to).ptr(x).long(s.batch).int(s.in_channels).long(copied.plane()).long(s.plane());
    q.launch(launch.int(copied.width).int(s.width).int(s.window.stride))?;
    Ok(to)
}

/// `ConvSizes` in `gpu/conv.cuh`.
///
/// # Errors
/// When an axis, a filter or a padded image is larger than kernels count.
fn sizes(s: &ConvSizes) -> Result<[u8; 44]> {
    let Window { kernel: [kernel_h, kernel_w], stride, padding } = s.window;
    let rows = [s.height, s.width, kernel_h, kernel_w].into_iter().max().unwrap_or(0) + 2 * padding;
    let filter = s.in_channels.max(s.out_channels).next_multiple_of(8) * s.taps().max(1);
    if rows > MOST_ROWS || i32::try_from(filter).is_err() {
        return Err(Error::bad(format!("conv2d: {s:?} has more than kernels count")));
    }
    let image = [s.batch, s.in_channels, s.height, s.width, s.out_channels, s.out_height, s.out_width];
    let mut bytes = [0; 44];
    for (to, size) in bytes.chunks_exact_mut(4).zip(image.into_iter().chain([kernel_h, kernel_w, stride, padding])) {
        let size = i32::try_from(size).map_err(|_| Error::bad(format!("conv2d: {s:?} has an axis of 2^31 or more")))?;
        to.copy_from_slice(&size.to_ne_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(source: &str, line: String) {
        assert!(source.contains(&line), "no {line}");
    }

    #[test]
    fn kernels_have_the_same_tiles() {
        let plain = include_str!("../../../kernels/conv.cu");
        let ConvTile { rows, columns } = ConvTile::PLAIN;
        has(plain, format!("constexpr int ROWS = {rows}, COLUMNS = {columns}, STEPS = 16, THREADS = {THREADS};"));
        let tensor = include_str!("../../../kernels/gpu/conv_mma.cuh");
        has(
            tensor,
            format!("constexpr int MMA_THREADS = {THREADS}, STAGES = {STAGES}, STAGE_STEPS = {}", STAGE_ROW_BYTES / 2),
        );
        let tiles =
            [("Square", ConvTile::SQUARE, 2, 2), ("Flat", ConvTile::FLAT, 1, 4), ("Small", ConvTile::SMALL, 2, 2)];
        for (name, tile, down, across) in tiles {
            let (rows, columns) = (tile.rows / down, tile.columns / across);
            has(tensor, format!("using {name} = WarpTiling<{down}, {across}, {rows}, {columns}>;"));
        }
        let layout = include_str!("../../../kernels/conv_layout.cu");
        has(layout, format!("constexpr int TILE = {LAYOUT_TILE}, THREADS = {SUM_THREADS};"));
        has(include_str!("../../../kernels/conv_sums.cu"), format!("constexpr int THREADS = {SUM_THREADS};"));
    }
}
