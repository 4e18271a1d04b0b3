//! Batch normalization over images and positions, one mean and variance a channel (Ioffe & Szegedy 2015, arXiv:1502.03167).
//!
//! `x`, `out`: `(batch, channels, positions)`; everything else: `(channels)`. Sums run in f64 and in a fixed order, the mean
//! before the squares of the differences from it, so that a large mean does not swallow a small variance.

use super::{
    parallel::simd,
    planes::{Disjoint, Planes},
    real::Real,
};
use rayon::prelude::*;

/// Sizes of a batch normalization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchnormSizes {
    /// Images.
    pub batch: usize,
    /// Channels.
    pub channels: usize,
    /// Positions of a plane: height times width.
    pub positions: usize,
}

impl BatchnormSizes {
    /// Values that a channel's statistics are taken over.
    pub fn count(&self) -> usize {
        self.batch * self.positions
    }

    fn elems(&self) -> usize {
        self.count() * self.channels
    }
}

/// Elements of one task of an elementwise pass.
const TASK_ELEMS: usize = 16384;

/// Normalizes by the statistics of this batch, and returns them for the gradient and for [`update_running`].
///
/// `mean` and `var` (biased, divided by the count) over images and positions, `rstd = 1 / sqrt(var + epsilon)`,
/// `out = (x - mean) * (rstd * weight) + bias`. Overwrites `out`, `mean`, `var` and `rstd`. With no values at all, mean and var are 0.
pub fn forward_train<T: Real>(
    out: &mut [T],
    mean: &mut [T],
    var: &mut [T],
    rstd: &mut [T],
    x: &[T],
    weight: &[T],
    bias: &[T],
    sizes: &BatchnormSizes,
    epsilon: f64,
) {
    debug_assert!(out.len() == sizes.elems() && x.len() == sizes.elems());
    let walk = Planes::new(sizes.batch, sizes.channels, sizes.positions);
    let count = sizes.count().max(1) as f64;
    let out = Disjoint::new(out);
    mean.par_iter_mut().zip(var.par_iter_mut()).zip(rstd.par_iter_mut()).enumerate().for_each(
        |(channel, ((mean, var), rstd))| {
            let [sum] = walk.sums(
                channel,
                x,
                x,
                #[inline(always)]
                |x, _| [x.to_f64()],
            );
            let exact_mean = sum / count;
            let [squares, rest] = walk.sums(
                channel,
                x,
                x,
                #[inline(always)]
                |x, _| {
                    let d = x.to_f64() - exact_mean;
                    [d * d, d]
                },
            );
            // `rest` would be 0 without rounding; taking it out corrects what the mean's rounding did (Chan et al. 1983, eq. 1.7).
            let exact_var = ((squares - rest * rest / count) / count).max(0.0);
            *mean = T::from_f64(exact_mean);
            *var = T::from_f64(exact_var);
            *rstd = T::from_f64(1.0 / (exact_var + epsilon).sqrt());
            let (mean, scale, bias) = (*mean, *rstd * weight[channel], bias[channel]);
            walk.for_each_run(
                channel,
                #[inline(always)]
                |run| {
                    // SAFETY: the runs of all channels are disjoint, and each is visited once.
                    let out = unsafe { out.range(run.start, run.len()) };
                    normalize(out, &x[run], mean, scale, bias);
                },
            );
        },
    );
}

/// Mixes a batch's statistics into the running ones: `running = (1 - momentum) * running + momentum * batch`.
///
/// As in torch, the running variance takes the unbiased variance, `var * count / (count - 1)`; `count` is the number of values a channel
/// and at least 2 (one value a channel is refused before training; its variance would be taken as it is).
pub fn update_running<T: Real>(
    running_mean: &mut [T],
    running_var: &mut [T],
    mean: &[T],
    var: &[T],
    count: usize,
    momentum: f64,
) {
    debug_assert!(running_mean.len() == mean.len() && running_var.len() == var.len());
    let unbiased = count as f64 / count.saturating_sub(1).max(1) as f64;
    let mix = |running: &mut T, value: f64| {
        *running = T::from_f64((1.0 - momentum) * running.to_f64() + momentum * value);
    };
    for (running, mean) in running_mean.iter_mut().zip(mean) {
        mix(running, mean.to_f64());
    }
    for (running, var) in running_var.iter_mut().zip(var) {
        mix(running, var.to_f64() * unbiased);
    }
}

/// Normalizes by the running statistics: `out = (x - running_mean) * (weight / sqrt(running_var + epsilon)) + bias`. Overwrites `out`.
pub fn forward_eval<T: Real>(
    out: &mut [T],
    x: &[T],
    weight: &[T],
    bias: &[T],
    running_mean: &[T],
    running_var: &[T],
    sizes: &BatchnormSizes,
    epsilon: f64,
) {
    debug_assert!(out.len() == sizes.elems() && x.len() == sizes.elems());
    if out.is_empty() {
        return;
    }
    let planes = (TASK_ELEMS / sizes.positions).max(1);
    let task = planes * sizes.positions;
    out.par_chunks_mut(task).zip(x.par_chunks(task)).enumerate().for_each(|(index, (out, x))| {
        simd(
            #[inline(always)]
            || {
                for (plane, (out, x)) in out.chunks_mut(sizes.positions).zip(x.chunks(sizes.positions)).enumerate() {
                    let channel = (index * planes + plane) % sizes.channels;
                    let rstd = T::from_f64(1.0 / (running_var[channel].to_f64() + epsilon).sqrt());
                    normalize(out, x, running_mean[channel], rstd * weight[channel], bias[channel]);
                }
            },
        );
    });
}

#[inline(always)]
fn normalize<T: Real>(out: &mut [T], x: &[T], mean: T, scale: T, bias: T) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = (x - mean).mul_add(scale, bias);
    }
}

/// The gradient of [`forward_train`].
///
/// With `xhat = (x - mean) * rstd` and n values a channel: `d_bias = sum(d_y)`, `d_weight = sum(d_y * xhat)`,
/// `d_x = rstd * weight * (d_y - d_bias / n - xhat * d_weight / n)`, the sums being those of this batch. Overwrites `d_x`;
/// overwrites `d_weight` and `d_bias`, or adds to them when `accumulate`.
pub fn grad<T: Real>(
    d_x: &mut [T],
    d_weight: &mut [T],
    d_bias: &mut [T],
    d_y: &[T],
    x: &[T],
    weight: &[T],
    mean: &[T],
    rstd: &[T],
    accumulate: bool,
    sizes: &BatchnormSizes,
) {
    debug_assert!(d_x.len() == sizes.elems() && d_y.len() == sizes.elems() && x.len() == sizes.elems());
    let walk = Planes::new(sizes.batch, sizes.channels, sizes.positions);
    let count = sizes.count().max(1) as f64;
    let d_x = Disjoint::new(d_x);
    d_weight.par_iter_mut().zip(d_bias.par_iter_mut()).enumerate().for_each(|(channel, (d_weight, d_bias))| {
        let (mean, rstd) = (mean[channel], rstd[channel]);
        let (wide_mean, wide_rstd) = (mean.to_f64(), rstd.to_f64());
        let [sum, dot] = walk.sums(
            channel,
            d_y,
            x,
            #[inline(always)]
            |d_y, x| {
                let d_y = d_y.to_f64();
                [d_y, d_y * (x.to_f64() - wide_mean)]
            },
        );
        let dot = dot * wide_rstd;
        let (sum_t, dot_t) = (T::from_f64(sum), T::from_f64(dot));
        *d_weight = if accumulate { *d_weight + dot_t } else { dot_t };
        *d_bias = if accumulate { *d_bias + sum_t } else { sum_t };
        // d_x = scale * d_y + slope * (x - mean) + offset
        let wide_scale = wide_rstd * weight[channel].to_f64();
        let scale = T::from_f64(wide_scale);
        let slope = T::from_f64(-wide_scale * wide_rstd * dot / count);
        let offset = T::from_f64(-wide_scale * sum / count);
        walk.for_each_run(
            channel,
            #[inline(always)]
            |run| {
                // SAFETY: the runs of all channels are disjoint, and each is visited once.
                let d_x = unsafe { d_x.range(run.start, run.len()) };
                for ((d_x, &d_y), &x) in d_x.iter_mut().zip(&d_y[run.clone()]).zip(&x[run]) {
                    *d_x = scale.mul_add(d_y, slope.mul_add(x - mean, offset));
                }
            },
        );
    });
}
