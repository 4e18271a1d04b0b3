//! Optimizer updates and the sums over gradients that go with them, on flat slices.
//!
//! Every update is elementwise and a written sequence of IEEE operations, so its bits depend neither on how a tensor is
//! cut into slices nor on the number of threads, and a device that repeats the sequence in the same precision gives the
//! same bits. Only [`sum_squares`] reduces, over fixed blocks in a fixed order.

use super::{
    parallel::{CHUNK, expect_len, simd},
    real::Real,
};
use rayon::prelude::*;

/// Elements of a block of [`sum_squares`]; part of what the sum's bits depend on.
pub const SUM_BLOCK: usize = 4096;
/// Running sums inside a block of [`sum_squares`]; part of what the sum's bits depend on.
pub const SUM_LANES: usize = 32;
/// Blocks that are summed at once: their sums fit a stack array, so that no length needs memory.
const SUM_GROUP: usize = 512;

/// The constants of one AdamW step (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization",
/// arXiv:1711.05101).
///
/// All are computed once in f64 and rounded to the weights' precision by the update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay; multiplied by `lr`.
    pub weight_decay: f64,
    /// `1 - beta1^step`.
    pub bias_correction1: f64,
    /// `1 - beta2^step`.
    pub bias_correction2: f64,
    /// Multiplies every gradient: the clipping factor, 1 without clipping.
    pub grad_scale: f64,
}

impl AdamwStep {
    /// The constants of step `step`, counted from 1.
    pub fn new(step: u64, lr: f64, betas: (f64, f64), epsilon: f64, weight_decay: f64, grad_scale: f64) -> Self {
        // `powi` takes an i32; past 2^31 steps both powers are 0 for every beta that trains.
        let exponent = i32::try_from(step).unwrap_or(i32::MAX);
        AdamwStep {
            lr,
            beta1: betas.0,
            beta2: betas.1,
            epsilon,
            weight_decay,
            bias_correction1: 1.0 - betas.0.powi(exponent),
            bias_correction2: 1.0 - betas.1.powi(exponent),
            grad_scale,
        }
    }

    /// The step's constants as the update uses them.
    pub fn constants<T: Real>(&self) -> AdamwConstants<T> {
        AdamwConstants {
            grad_scale: T::from_f64(self.grad_scale),
            keep: T::from_f64(1.0 - self.lr * self.weight_decay),
            one_minus_beta1: T::from_f64(1.0 - self.beta1),
            beta2: T::from_f64(self.beta2),
            one_minus_beta2: T::from_f64(1.0 - self.beta2),
            root_correction: T::from_f64(1.0 / self.bias_correction2.sqrt()),
            epsilon: T::from_f64(self.epsilon),
            minus_step_size: T::from_f64(-(self.lr / self.bias_correction1)),
        }
    }
}

/// What [`adamw`] multiplies by, each rounded once from f64. A CUDA kernel takes these eight numbers, computed here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwConstants<T> {
    /// Clipping factor.
    pub grad_scale: T,
    /// `1 - lr * weight_decay`.
    pub keep: T,
    /// `1 - beta1`.
    pub one_minus_beta1: T,
    /// `beta2`.
    pub beta2: T,
    /// `1 - beta2`.
    pub one_minus_beta2: T,
    /// `1 / sqrt(1 - beta2^step)`.
    pub root_correction: T,
    /// `epsilon`.
    pub epsilon: T,
    /// `-lr / (1 - beta1^step)`.
    pub minus_step_size: T,
}

/// Updates weights and moments by one AdamW step, on all threads. All slices are equally long.
///
/// Per element, every line one rounding and `fma(a, b, c) = a * b + c` rounded once:
///
/// | # | operation |
/// | --- | --- |
/// | 1 | `g = grad * grad_scale` |
/// | 2 | `d = g - m` |
/// | 3 | `m = fma(one_minus_beta1, d, m)` |
/// | 4 | `s = one_minus_beta2 * g` |
/// | 5 | `u = beta2 * v` |
/// | 6 | `v = fma(s, g, u)` |
/// | 7 | `r = sqrt(v)` |
/// | 8 | `e = fma(r, root_correction, epsilon)` |
/// | 9 | `q = m / e` |
/// | 10 | `w = weight * keep` |
/// | 11 | `weight = fma(minus_step_size, q, w)` |
///
/// Square root and division are the correctly rounded ones; subnormal numbers are kept. The order is that of
/// `torch.optim.AdamW`, which rounds the products of lines 3, 6, 8 and 11 once more.
pub fn adamw<T: Real>(weight: &mut [T], m: &mut [T], v: &mut [T], grad: &[T], step: &AdamwStep) {
    for (name, len) in [("m", m.len()), ("v", v.len()), ("grad", grad.len())] {
        expect_len("adamw", name, len, weight.len());
    }
    let constants = step.constants();
    if weight.len() <= CHUNK {
        return adamw_serial(weight, m, v, grad, &constants);
    }
    weight
        .par_chunks_mut(CHUNK)
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK))
        .zip(grad.par_chunks(CHUNK))
        .for_each(|(((weight, m), v), grad)| adamw_serial(weight, m, v, grad, &constants));
}

/// [`adamw`] on the calling thread: the same bits.
pub fn adamw_serial<T: Real>(weight: &mut [T], m: &mut [T], v: &mut [T], grad: &[T], constants: &AdamwConstants<T>) {
    for (name, len) in [("m", m.len()), ("v", v.len()), ("grad", grad.len())] {
        expect_len("adamw", name, len, weight.len());
    }
    simd(
        #[inline(always)]
        || adamw_loop(weight, m, v, grad, constants),
    );
}

#[inline(always)]
fn adamw_loop<T: Real>(weight: &mut [T], m: &mut [T], v: &mut [T], grad: &[T], constants: &AdamwConstants<T>) {
    let c = *constants;
    for (((weight, m), v), &grad) in weight.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(grad) {
        let g = grad * c.grad_scale;
        let d = g - *m;
        *m = c.one_minus_beta1.mul_add(d, *m);
        let s = c.one_minus_beta2 * g;
        let u = c.beta2 * *v;
        *v = s.mul_add(g, u);
        let e = v.sqrt().mul_add(c.root_correction, c.epsilon);
        let q = *m / e;
        let w = *weight * c.keep;
        *weight = c.minus_step_size.mul_add(q, w);
    }
}

/// The constants of one step of stochastic gradient descent, as `torch.optim.SGD` defines them with a dampening of 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the momentum buffer; 0 for none, and then there is no buffer.
    pub momentum: f64,
    /// Look ahead by one more decayed step (Sutskever et al. 2013).
    pub nesterov: bool,
    /// Added to the gradient, times the weight.
    pub weight_decay: f64,
    /// Multiplies every gradient: the clipping factor, 1 without clipping.
    pub grad_scale: f64,
    /// The first update, which sets the momentum buffer to the gradient and never reads it.
    pub first: bool,
}

/// Updates weights and momentum by one step of stochastic gradient descent, on all threads.
///
/// `momentum_buffer` is as long as `weight`, or empty when `momentum` is 0. Per element, every line one rounding:
///
/// | # | operation | when |
/// | --- | --- | --- |
/// | 1 | `g = grad * grad_scale` | |
/// | 2 | `g = fma(weight_decay, weight, g)` | |
/// | 3 | `b = g` | momentum, first step |
/// | 3 | `b = fma(momentum, b, g)` | momentum, later steps |
/// | 4 | `g = b` | momentum, not nesterov |
/// | 4 | `g = fma(momentum, b, g)` | momentum, nesterov |
/// | 5 | `weight = fma(-lr, g, weight)` | |
pub fn sgd<T: Real>(weight: &mut [T], momentum_buffer: &mut [T], grad: &[T], step: &SgdStep) {
    expect_len("sgd", "grad", grad.len(), weight.len());
    if step.momentum == 0.0 {
        if weight.len() <= CHUNK {
            return sgd_serial(weight, &mut [], grad, step);
        }
        weight
            .par_chunks_mut(CHUNK)
            .zip(grad.par_chunks(CHUNK))
            .for_each(|(weight, grad)| sgd_serial(weight, &mut [], grad, step));
        return;
    }
    expect_len("sgd", "momentum_buffer", momentum_buffer.len(), weight.len());
    if weight.len() <= CHUNK {
        return sgd_serial(weight, momentum_buffer, grad, step);
    }
    weight
        .par_chunks_mut(CHUNK)
        .zip(momentum_buffer.par_chunks_mut(CHUNK))
        .zip(grad.par_chunks(CHUNK))
        .for_each(|((weight, buffer), grad)| sgd_serial(weight, buffer, grad, step));
}

/// [`sgd`] on the calling thread: the same bits.
pub fn sgd_serial<T: Real>(weight: &mut [T], momentum_buffer: &mut [T], grad: &[T], step: &SgdStep) {
    expect_len("sgd", "grad", grad.len(), weight.len());
    if step.momentum != 0.0 {
        expect_len("sgd", "momentum_buffer", momentum_buffer.len(), weight.len());
    }
    simd(
        #[inline(always)]
        || match (step.momentum != 0.0, step.first, step.nesterov) {
            (false, _, _) => sgd_plain_loop(weight, grad, step),
            (true, true, false) => sgd_momentum_loop::<T, true, false>(weight, momentum_buffer, grad, step),
            (true, true, true) => sgd_momentum_loop::<T, true, true>(weight, momentum_buffer, grad, step),
            (true, false, false) => sgd_momentum_loop::<T, false, false>(weight, momentum_buffer, grad, step),
            (true, false, true) => sgd_momentum_loop::<T, false, true>(weight, momentum_buffer, grad, step),
        },
    );
}

#[inline(always)]
fn sgd_plain_loop<T: Real>(weight: &mut [T], grad: &[T], step: &SgdStep) {
    let (scale, decay, minus_lr) =
        (T::from_f64(step.grad_scale), T::from_f64(step.weight_decay), T::from_f64(-step.lr));
    for (weight, &grad) in weight.iter_mut().zip(grad) {
        let g = decay.mul_add(*weight, grad * scale);
        *weight = minus_lr.mul_add(g, *weight);
    }
}

#[inline(always)]
fn sgd_momentum_loop<T: Real, const FIRST: bool, const NESTEROV: bool>(
    weight: &mut [T],
    buffer: &mut [T],
    grad: &[T],
    step: &SgdStep,
) {
    let (scale, decay, minus_lr) =
        (T::from_f64(step.grad_scale), T::from_f64(step.weight_decay), T::from_f64(-step.lr));
    let momentum = T::from_f64(step.momentum);
    for ((weight, buffer), &grad) in weight.iter_mut().zip(buffer.iter_mut()).zip(grad) {
        let g = decay.mul_add(*weight, grad * scale);
        *buffer = if FIRST { g } else { momentum.mul_add(*buffer, g) };
        let g = if NESTEROV { momentum.mul_add(*buffer, g) } else { *buffer };
        *weight = minus_lr.mul_add(g, *weight);
    }
}

/// The sum of the squares of `x` in f64, on all threads.
///
/// `x` is cut into blocks of [`SUM_BLOCK`]; inside a block, element `i` goes to running sum `i % SUM_LANES`, in order,
/// by `lane = fma(x, x, lane)` (for f32 the square is exact in f64, so this equals a product and a sum); the running
/// sums are added pairwise (`lane[i] + lane[i + width]`, width 16, 8, 4, 2, 1), and the blocks in order from 0.
pub fn sum_squares<T: Real>(x: &[T]) -> f64 {
    let mut total = 0.0;
    for group in x.chunks(SUM_GROUP * SUM_BLOCK) {
        let mut sums = [0.0; SUM_GROUP];
        let sums = &mut sums[..group.len().div_ceil(SUM_BLOCK)];
        // Four blocks a task: 64 KiB of f32 pay for it.
        sums.par_chunks_mut(4).zip(group.par_chunks(4 * SUM_BLOCK)).for_each(|(sums, x)| {
            simd(
                #[inline(always)]
                || {
                    for (sum, block) in sums.iter_mut().zip(x.chunks(SUM_BLOCK)) {
                        *sum = block_sum_squares(block);
                    }
                },
            );
        });
        for &sum in &*sums {
            total += sum;
        }
    }
    total
}

#[inline(always)]
fn block_sum_squares<T: Real>(block: &[T]) -> f64 {
    let mut lanes = [0.0f64; SUM_LANES];
    let mut rows = block.chunks_exact(SUM_LANES);
    for row in &mut rows {
        for lane in 0..SUM_LANES {
            let value = row[lane].to_f64();
            lanes[lane] = value.mul_add(value, lanes[lane]);
        }
    }
    for (lane, value) in rows.remainder().iter().enumerate() {
        let value = value.to_f64();
        lanes[lane] = value.mul_add(value, lanes[lane]);
    }
    let mut width = SUM_LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Adds `x` to `acc`, element by element, on all threads.
pub fn add_assign<T: Real>(acc: &mut [T], x: &[T]) {
    expect_len("add_assign", "x", x.len(), acc.len());
    acc.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(acc, x)| {
        simd(
            #[inline(always)]
            || {
                for (acc, &x) in acc.iter_mut().zip(x) {
                    *acc += x;
                }
            },
        );
    });
}

/// Whether every element is finite: no infinity, no NaN. On all threads.
pub fn is_finite<T: Real>(x: &[T]) -> bool {
    x.par_chunks(CHUNK).all(|chunk| {
        simd(
            #[inline(always)]
            || chunk_is_finite(chunk),
        )
    })
}

#[inline(always)]
fn chunk_is_finite<T: Real>(chunk: &[T]) -> bool {
    // 0 * x is a zero for a finite x and NaN otherwise, and a sum never loses a NaN.
    const LANES: usize = 64;
    let mut lanes = [T::ZERO; LANES];
    let mut rows = chunk.chunks_exact(LANES);
    for row in &mut rows {
        for lane in 0..LANES {
            lanes[lane] += T::ZERO * row[lane];
        }
    }
    for (lane, &value) in rows.remainder().iter().enumerate() {
        lanes[lane] += T::ZERO * value;
    }
    lanes.iter().all(|&lane| lane == T::ZERO)
}

#[cfg(test)]
mod tests;
