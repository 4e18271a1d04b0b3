//! Launches of `kernels/pool_tile.cu` where a few rows of a plane fit into shared memory, else of `kernels/pool.cu`.

use super::launch::Launch;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::{Error, Result};
use crate::graph::Window;

/// Threads of a block.
const THREADS: usize = 256;

/// Elements of a window from which on a warp takes it.
const LARGE_WINDOW: usize = 32;

/// Shared memory of a block: for elements of x, or for gradients in f32.
const TILE_BYTES: usize = 26_624;
/// Windows of a block of the maximum's gradient.
const TILE_WINDOWS: usize = 8 * THREADS;
/// Most groups of windows that do not overlap, with a barrier after each.
const MOST_GROUPS: usize = 64;
/// Elements of a block of the average's gradient, in packs of 16 bytes.
const WHOLE_PACKS: usize = 4 * THREADS;
/// Blocks below which a block takes fewer planes than it might: 8 on each of an H200's 132 multiprocessors.
const BLOCKS: usize = 1056;

/// How planes are shared out over blocks: `Cut` in the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    /// Whole planes of a block; 1 where planes are cut.
    planes: usize,
    /// Parts of a plane.
    strips: usize,
    /// Rows of each but the last.
    rows: usize,
}

impl Cut {
    /// For planes of so many rows; `fits` says whether a block takes so many planes of so many of their rows.
    fn new(planes: usize, rows: usize, fits: impl Fn(usize, usize) -> bool) -> Option<Cut> {
        let most = planes.div_ceil(BLOCKS);
        if let Some(planes) = (1..=most).rev().find(|&planes| fits(planes, rows)) {
            return Some(Cut { planes, strips: 1, rows });
        }
        let strips = rows.div_ceil((1..rows).rev().find(|&rows| fits(1, rows))?);
        Some(Cut { planes: 1, strips, rows: rows.div_ceil(strips) })
    }

    /// Of what is pooled: windows of whole rows of `out`, whose places are in at most as many rows of `x`.
    fn forward(x: &[usize], out: &[usize], window: &Window, elem_bytes: usize) -> Option<Cut> {
        let room = TILE_BYTES / elem_bytes - 16 / elem_bytes;
        Cut::new(x[0] * x[1], out[2], |planes, rows| {
            let within = (rows - 1) * window.stride + window.kernel[0];
            planes * if rows == out[2] { x[2] } else { within.min(x[2]) } * x[3] <= room
        })
    }

    /// Of the maximum's gradient: rows of `x`, which windows in at most as many rows of `out` cover.
    fn grad(x: &[usize], out: &[usize], window: &Window) -> Option<Cut> {
        Cut::new(x[0] * x[1], x[2], |planes, rows| {
            let covering = (rows + window.kernel[0] - 2) / window.stride + 1;
            let out_rows = if rows == x[2] { out[2] } else { covering.min(out[2]) };
            planes * rows * x[3] + 4 <= TILE_BYTES / 4 && planes * out_rows * out[3] <= TILE_WINDOWS
        })
    }

    /// A launch; its last arguments are the planes, the kernels' `Sizes` and this.
    fn launch(&self, kernel: &'static str, planes: usize) -> Launch {
        Launch::new(kernel, [planes.div_ceil(self.planes) * self.strips, 1, 1], THREADS as u32)
    }

    fn sizes(&self, launch: Launch, window: &Window, x: &[usize], out: &[usize]) -> Result<Launch> {
        let launch = sizes(launch.long(x[0] * x[1]), window, x, out)?;
        let numbers = [self.planes, self.strips, self.rows].map(|n| n as i32);
        Ok(launch.bytes(bytemuck::cast_slice(&numbers), 4))
    }
}

/// x (N, C, H, W) -> out, argmax.
pub(super) fn max_forward(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let positions: usize = o.in_axes(0)[2..].iter().product();
    if i32::try_from(positions).is_err() {
        return Err(Error::bad(format!("max_pool: a plane of {positions} places")));
    }
    let (x, out) = (o.in_axes(0), o.out_axes(0));
    if o.out_elems(0) > 0
        && positions > 0
        && let Some(cut) = Cut::forward(x, out, window, o.in_dtype(0).bytes() as usize)
    {
        let kernel = pick(o.in_dtype(0), "max_pool_forward_tile_f32", "max_pool_forward_tile_bf16");
        let forward = cut.launch(kernel, x[0] * x[1]).ptr(o.output(0)).ptr(o.output(1)).ptr(o.input(0));
        return q.launch(cut.sizes(forward, window, x, out)?);
    }
    let kernel = pick(o.in_dtype(0), "max_pool_forward_f32", "max_pool_forward_bf16");
    let forward = launch(kernel, o, 1).ptr(o.output(0)).ptr(o.output(1)).ptr(o.input(0)).long(o.out_elems(0));
    q.launch(sizes(forward, window, x, out)?)
}

/// d_out, argmax -> d_x.
pub(super) fn max_grad(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let (x, out) = (o.out_axes(0), o.in_axes(0));
    let overlaps = window.kernel.map(|size| size.div_ceil(window.stride).next_power_of_two());
    if o.out_elems(0) > 0
        && out[2] * out[3] > 0
        && overlaps[0] * overlaps[1] <= MOST_GROUPS
        && let Some(cut) = Cut::grad(x, out, window)
    {
        let kernel = pick(o.in_dtype(0), "max_pool_grad_tile_f32", "max_pool_grad_tile_bf16");
        let grad = cut.launch(kernel, x[0] * x[1]).ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1));
        let grad = cut.sizes(grad, window, x, out)?.int(overlaps[0] - 1).int(overlaps[1] - 1);
        return q.launch(grad.int(overlaps[1].trailing_zeros() as usize));
    }
    let kernel = pick(o.in_dtype(0), "max_pool_grad_f32", "max_pool_grad_bf16");
    let grad = launch(kernel, o, 1).ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1)).long(o.out_elems(0));
    q.launch(sizes(grad, window, x, out)?)
}

/// x (N, C, H, W) -> out.
pub(super) fn avg_forward(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let (x, out) = (o.in_axes(0), o.out_axes(0));
    let large = window.kernel[0] * window.kernel[1] >= LARGE_WINDOW;
    if o.out_elems(0) > 0
        && x[2] * x[3] > 0
        && let Some(cut) = Cut::forward(x, out, window, o.in_dtype(0).bytes() as usize)
    {
        let kernel = pick(o.in_dtype(0), "avg_pool_forward_tile_f32", "avg_pool_forward_tile_bf16");
        let forward = cut.launch(kernel, x[0] * x[1]).ptr(o.output(0)).ptr(o.input(0));
        let few = cut.planes * cut.rows * out[3] < THREADS / 2;
        return q.launch(cut.sizes(forward, window, x, out)?.int(if large && few { 32 } else { 1 }));
    }
    let (f32, bf16, threads_each) = match large {
        true => ("avg_pool_forward_large_f32", "avg_pool_forward_large_bf16", 32),
        false => ("avg_pool_forward_f32", "avg_pool_forward_bf16", 1),
    };
    let forward = launch(pick(o.in_dtype(0), f32, bf16), o, threads_each).ptr(o.output(0)).ptr(o.input(0));
    q.launch(sizes(forward.long(o.out_elems(0)), window, x, out)?)
}

/// d_out -> d_x (N, C, H, W).
pub(super) fn avg_grad(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let (x, out) = (o.out_axes(0), o.in_axes(0));
    let covers = |axis: usize| window.padding + x[2 + axis] <= window.kernel[axis];
    if out[2..] == [1, 1] && covers(0) && covers(1) && i32::try_from(x[2] * x[3]).is_ok() {
        let kernel = pick(o.in_dtype(0), "avg_pool_grad_whole_f32", "avg_pool_grad_whole_bf16");
        let block = WHOLE_PACKS * 16 / o.in_dtype(0).bytes() as usize;
        let grad = Launch::new(kernel, [o.out_elems(0).div_ceil(block), 1, 1], THREADS as u32).ptr(o.output(0));
        let grad = grad.ptr(o.input(0)).long(o.out_elems(0)).int(x[2] * x[3]);
        return q.launch(grad.float((window.kernel[0] * window.kernel[1]) as f32));
    }
    let kernel = pick(o.in_dtype(0), "avg_pool_grad_f32", "avg_pool_grad_bf16");
    let grad = launch(kernel, o, 1).ptr(o.output(0)).ptr(o.input(0)).long(o.out_elems(0));
    q.launch(sizes(grad, window, x, out)?)
}

/// A launch with so many threads for each element of output 0.
fn launch(kernel: &'static str, o: &Operands, threads_each: usize) -> Launch {
    Launch::new(kernel, [o.out_elems(0).div_ceil(THREADS / threads_each), 1, 1], THREADS as u32)
}

/// The kernels' `Sizes`, of images `x` and results `out`.
fn sizes(launch: Launch, window: &Window, x: &[usize], out: &[usize]) -> Result<Launch> {
    let [height, width] = window.kernel;
    let mut numbers = [0_i32; 8];
    for (to, from) in numbers.iter_mut().zip([x[2], x[3], height, width, window.stride, window.padding, out[2], out[3]])
    {
        *to = i32::try_from(from).map_err(|_| Error::bad("pooling: an axis of 2^31 elements or more"))?;
    }
    Ok(launch.bytes(bytemuck::cast_slice(&numbers), 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_the_same_sizes() {
        let source = include_str!("../../../kernels/pool_tile.cu");
        let windows = TILE_WINDOWS / THREADS;
        for (name, value) in [("THREADS", THREADS), ("TILE_BYTES", TILE_BYTES), ("WINDOWS", windows)] {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
        assert!(source.contains(&format!("constexpr int WHOLE_PACKS = {};", WHOLE_PACKS / THREADS)));
    }

    #[test]
    fn planes_are_cut_where_they_do_not_fit() {
        let window = |kernel, stride, padding| Window { kernel: [kernel; 2], stride, padding };
        let stem = (&[128, 64, 112, 112][..], &[128, 64, 56, 56][..], window(3, 2, 1));
        assert_eq!(Cut::forward(stem.0, stem.1, &stem.2, 2), Some(Cut { planes: 1, strips: 1, rows: 56 }));
        assert_eq!(Cut::forward(stem.0, stem.1, &stem.2, 4), Some(Cut { planes: 1, strips: 2, rows: 28 }));
        assert_eq!(Cut::grad(stem.0, stem.1, &stem.2), Some(Cut { planes: 1, strips: 2, rows: 56 }));
        let last = (&[128, 2048, 7, 7][..], &[128, 2048, 1, 1][..], window(7, 1, 0));
        assert_eq!(Cut::forward(last.0, last.1, &last.2, 2), Some(Cut { planes: 249, strips: 1, rows: 1 }));
        assert_eq!(Cut::forward(&[1, 1, 9, 20_000], &[1, 1, 7, 19_998], &window(3, 1, 0), 2), None);
    }
}
