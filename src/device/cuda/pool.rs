//! Launches of `kernels/pool.cu`.

use super::launch::{Launch, Queue};
use super::operands::{Operands, pick};
use crate::base::{Error, Result};
use crate::graph::Window;

/// Threads of a block.
const THREADS: usize = 256;

/// Elements of a window from which on a warp takes it.
const LARGE_WINDOW: usize = 32;

/// x (N, C, H, W) -> out, argmax.
pub(super) fn max_forward(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let positions: usize = o.in_axes(0)[2..].iter().product();
    if i32::try_from(positions).is_err() {
        return Err(Error::bad(format!("max_pool: a plane of {positions} places")));
    }
    let kernel = pick(o.in_dtype(0), "max_pool_forward_f32", "max_pool_forward_bf16");
    let forward = launch(kernel, o, 1).ptr(o.output(0)).ptr(o.output(1)).ptr(o.input(0));
    q.launch(sizes(forward, o, window, o.in_axes(0), o.out_axes(0))?)
}

/// d_out, argmax -> d_x.
pub(super) fn max_grad(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let kernel = pick(o.in_dtype(0), "max_pool_grad_f32", "max_pool_grad_bf16");
    let grad = launch(kernel, o, 1).ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1));
    q.launch(sizes(grad, o, window, o.out_axes(0), o.in_axes(0))?)
}

/// x (N, C, H, W) -> out.
pub(super) fn avg_forward(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let large = window.kernel[0] * window.kernel[1] >= LARGE_WINDOW;
    let (f32, bf16, threads_each) = match large {
        true => ("avg_pool_forward_large_f32", "avg_pool_forward_large_bf16", 32),
        false => ("avg_pool_forward_f32", "avg_pool_forward_bf16", 1),
    };
    let forward = launch(pick(o.in_dtype(0), f32, bf16), o, threads_each).ptr(o.output(0)).ptr(o.input(0));
    q.launch(sizes(forward, o, window, o.in_axes(0), o.out_axes(0))?)
}

/// d_out -> d_x (N, C, H, W).
pub(super) fn avg_grad(q: &mut Queue, o: &Operands, window: &Window) -> Result<()> {
    let kernel = pick(o.in_dtype(0), "avg_pool_grad_f32", "avg_pool_grad_bf16");
    let grad = launch(kernel, o, 1).ptr(o.output(0)).ptr(o.input(0));
    q.launch(sizes(grad, o, window, o.out_axes(0), o.in_axes(0))?)
}

/// A launch with so many threads for each element of output 0.
fn launch(kernel: &'static str, o: &Operands, threads_each: usize) -> Launch {
    Launch::new(kernel, [o.out_elems(0).div_ceil(THREADS / threads_each), 1, 1], THREADS as u32)
}

/// The last arguments: elements of output 0, and the kernels' `Sizes`, of images `x` and results `out`.
fn sizes(launch: Launch, o: &Operands, window: &Window, x: &[usize], out: &[usize]) -> Result<Launch> {
    let [height, width] = window.kernel;
    let mut numbers = [0_i32; 8];
    for (to, from) in numbers.iter_mut().zip([x[2], x[3], height, width, window.stride, window.padding, out[2], out[3]])
    {
        *to = i32::try_from(from).map_err(|_| Error::bad("pooling: an axis of 2^31 elements or more"))?;
    }
    Ok(launch.long(o.out_elems(0)).bytes(bytemuck::cast_slice(&numbers), 4))
}
