//! Batch normalization over images and positions, one mean and variance a channel (Ioffe & Szegedy 2015,
//! arXiv:1502.03167).
//!
//! `x`, `out`: `(batch, channels, positions)`; everything else: `(channels)`. Sums run in f64 and in a fixed order.

use super::{
    parallel::{expect_len, simd},
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

    fn expect(&self, whole: &[(&str, usize)], channels: &[(&str, usize)]) {
        whole.iter().for_each(|&(name, len)| expect_len("batchnorm", name, len, self.elems()));
        channels.iter().for_each(|&(name, len)| expect_len("batchnorm", name, len, self.channels));
    }
}

/// Elements of one task of an elementwise pass.
const TASK_ELEMS: usize = 16384;

/// Normalizes by the statistics of this batch, and returns them for the gradient and for [`update_running`].
///
/// `mean` and `var` (biased, divided by the count) over images and positions, `rstd = 1 / sqrt(var + epsilon)`, `out =
/// (x - mean) * (rstd * weight) + bias`. Overwrites `out`, `mean`, `var` and `rstd`. With no values at all, mean and
/// var are 0.
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
    let channels = [("mean", mean.len()), ("var", var.len()), ("rstd", rstd.len())];
    sizes.expect(&[("out", out.len()), ("x", x.len())], &channels);
    sizes.expect(&[], &[("weight", weight.len()), ("bias", bias.len())]);
    let walk = Planes::new(sizes.batch, sizes.channels, sizes.positions);
    let count = sizes.count().max(1) as f64;
    let out = Disjoint::new(out);
    let block = walk.block();
    let stats = mean.par_chunks_mut(block).zip(var.par_chunks_mut(block)).zip(rstd.par_chunks_mut(block));
    stats.enumerate().for_each(|(index, ((mean, var), rstd))| {
        let first = index * block;
        let channels = first..first + mean.len();
        // Differences from one of the values, whichever, so that a large mean does not swallow a small variance (Chan,
        // Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance", section 3).
        let near = |index: usize| x.get((first + index) * sizes.positions).map_or(0.0, |x| x.to_f64());
        let sums = walk.sums(
            channels.clone(),
            x,
            x,
            near,
            #[inline(always)]
            |x, _, near| {
                let d = x.to_f64() - near;
                [d, d * d]
            },
        );
        for (i, &[sum, squares]) in sums[..mean.len()].iter().enumerate() {
            let exact_var = (squares - sum * sum / count) / count;
            // Rounding may take it below 0; a NaN stays one, and so the channel's outputs become.
            let exact_var = if exact_var < 0.0 { 0.0 } else { exact_var };
            mean[i] = T::from_f64(near(i) + sum / count);
            var[i] = T::from_f64(exact_var);
            rstd[i] = T::from_f64(1.0 / (exact_var + epsilon).sqrt());
        }
        walk.for_each_run(
            channels.clone(),
            #[inline(always)]
            |i, run| {
                // SAFETY: the runs of all channels are disjoint, and each is visited once.
                let out = unsafe { out.range(run.start, run.len()) };
                normalize(out, &x[run], mean[i], rstd[i] * weight[first + i], bias[first + i]);
            },
        );
    });
}

/// Mixes a batch's statistics into the running ones: `running = (1 - momentum) * running + momentum * batch`.
///
/// As in torch, the running variance takes the unbiased variance, `var * count / (count - 1)`; `count` is the number of
/// values a channel and at least 2 (one value a channel is refused before training; its variance would be taken as it
/// is).
pub fn update_running<T: Real>(
    running_mean: &mut [T],
    running_var: &mut [T],
    mean: &[T],
    var: &[T],
    count: usize,
    momentum: f64,
) {
    expect_len("batchnorm", "mean", mean.len(), running_mean.len());
    expect_len("batchnorm", "var", var.len(), running_var.len());
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

/// Normalizes by the running statistics: `out = (x - running_mean) * (weight / sqrt(running_var + epsilon)) + bias`.
/// Overwrites `out`.
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
    sizes.expect(&[("out", out.len()), ("x", x.len())], &[("weight", weight.len()), ("bias", bias.len())]);
    sizes.expect(&[], &[("running_mean", running_mean.len()), ("running_var", running_var.len())]);
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
/// With `xhat = (x - mean) * rstd` and n values a channel: `d_bias = sum(d_y)`, `d_weight = sum(d_y * xhat)`, `d_x =
/// rstd * weight * (d_y - d_bias / n - xhat * d_weight / n)`, the sums being those of this batch. Overwrites `d_x`;
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
    let channels = [("weight", weight.len()), ("mean", mean.len()), ("rstd", rstd.len())];
    sizes.expect(&[("d_x", d_x.len()), ("d_y", d_y.len()), ("x", x.len())], &channels);
    sizes.expect(&[], &[("d_weight", d_weight.len()), ("d_bias", d_bias.len())]);
    let walk = Planes::new(sizes.batch, sizes.channels, sizes.positions);
    let count = sizes.count().max(1) as f64;
    let d_x = Disjoint::new(d_x);
    let block = walk.block();
    d_weight.par_chunks_mut(block).zip(d_bias.par_chunks_mut(block)).enumerate().for_each(
        |(index, (d_weight, d_bias))| {
            let first = index * block;
            let channels = first..first + d_weight.len();
            let sums = walk.sums(
                channels.clone(),
                d_y,
                x,
                |index| mean[first + index].to_f64(),
                #[inline(always)]
                |d_y, x, mean| {
                    let d_y = d_y.to_f64();
                    [d_y, d_y * (x.to_f64() - mean)]
                },
            );
            // d_x = scale * d_y + slope * (x - mean) + offset
            let factors = |i: usize| {
                let (rstd, [sum, dot]) = (rstd[first + i].to_f64(), sums[i]);
                let scale = rstd * weight[first + i].to_f64();
                [scale, -scale * rstd * (dot * rstd) / count, -scale * sum / count].map(T::from_f64)
            };
            for (i, (d_weight, d_bias)) in d_weight.iter_mut().zip(d_bias).enumerate() {
                let [sum, dot] = sums[i];
                let (sum, dot) = (T::from_f64(sum), T::from_f64(dot * rstd[first + i].to_f64()));
                *d_weight = if accumulate { *d_weight + dot } else { dot };
                *d_bias = if accumulate { *d_bias + sum } else { sum };
            }
            walk.for_each_run(
                channels,
                #[inline(always)]
                |i, run| {
                    let ([scale, slope, offset], mean) = (factors(i), mean[first + i]);
                    // SAFETY: the runs of all channels are disjoint, and each is visited once.
                    let d_x = unsafe { d_x.range(run.start, run.len()) };
                    for ((d_x, &d_y), &x) in d_x.iter_mut().zip(&d_y[run.clone()]).zip(&x[run]) {
                        *d_x = scale.mul_add(d_y, slope.mul_add(x - mean, offset));
                    }
                },
            );
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, dot, finite_difference, normal, poison, same_in_all_pools};

    const EPSILON: f64 = 1e-5;

    /// (batch, channels, positions): few and many channels, cut and uncut planes, one value, none.
    const SHAPES: &[(usize, usize, usize)] = &[
        (1, 1, 1),
        (2, 1, 1),
        (1, 3, 49),
        (5, 3, 169),
        (3, 33, 7),
        (4, 17, 31),
        (2, 2, 40_000),
        (33, 1, 1023),
        (2, 257, 7), // blocks of channels, the last one of one
        (0, 3, 5),
        (3, 0, 5),
        (3, 17, 0),
    ];

    fn sizes_of(&(batch, channels, positions): &(usize, usize, usize)) -> BatchnormSizes {
        BatchnormSizes { batch, channels, positions }
    }

    /// out, mean, var, rstd.
    fn train<T: Real>(x: &[T], weight: &[T], bias: &[T], sizes: &BatchnormSizes) -> Vec<Vec<T>> {
        let (mut out, channels) = (poison::<T>(x.len()), sizes.channels);
        let (mut mean, mut var, mut rstd) = (poison::<T>(channels), poison::<T>(channels), poison::<T>(channels));
        forward_train(&mut out, &mut mean, &mut var, &mut rstd, x, weight, bias, sizes, EPSILON);
        vec![out, mean, var, rstd]
    }

    /// out, mean, var, rstd by the formulas.
    fn train_by_loops(x: &[f64], weight: &[f64], bias: &[f64], sizes: &BatchnormSizes) -> Vec<Vec<f64>> {
        let channel_of = |i: usize| i / sizes.positions % sizes.channels;
        let count = sizes.count().max(1) as f64;
        let (mut mean, mut var) = (vec![0.0; sizes.channels], vec![0.0; sizes.channels]);
        x.iter().enumerate().for_each(|(i, x)| mean[channel_of(i)] += x / count);
        x.iter().enumerate().for_each(|(i, x)| var[channel_of(i)] += (x - mean[channel_of(i)]).powi(2) / count);
        let rstd: Vec<f64> = var.iter().map(|var| 1.0 / (var + EPSILON).sqrt()).collect();
        let normalized = |(i, x): (usize, &f64)| {
            let c = channel_of(i);
            (x - mean[c]) * rstd[c] * weight[c] + bias[c]
        };
        let out = x.iter().enumerate().map(normalized).collect();
        vec![out, mean, var, rstd]
    }

    fn inputs<T: Real>(sizes: &BatchnormSizes) -> [Vec<T>; 4] {
        let lens = [sizes.elems(), sizes.channels, sizes.channels, sizes.elems()];
        std::array::from_fn(|i| normal(lens[i], i as u64))
    }

    /// Relative errors of f32: a dozen roundings; where a channel's few values are nearly equal, 1/sqrt(var + epsilon)
    /// makes them larger.
    const SINGLE: f64 = 1e-5;
    const DOUBLE: f64 = 1e-12;

    #[test]
    fn forward_is_the_formula() {
        for sizes in SHAPES.iter().map(sizes_of) {
            let [x, weight, bias, _] = inputs::<f64>(&sizes);
            let want = train_by_loops(&x, &weight, &bias, &sizes);
            let double = same_in_all_pools(|| train(&x, &weight, &bias, &sizes));
            let [x, weight, bias, _] = inputs::<f32>(&sizes);
            let single = same_in_all_pools(|| train(&x, &weight, &bias, &sizes));
            for (i, want) in want.iter().enumerate() {
                assert_close(&double[i], want, DOUBLE, &format!("f64 {i} of {sizes:?}"));
                assert_close(&single[i], want, SINGLE, &format!("f32 {i} of {sizes:?}"));
            }
        }
    }

    #[test]
    fn a_large_mean_keeps_the_variance() {
        // Sums of squares would lose it: 2^20 squared has no digits left for a variance of 1/16 beside it. A channel of
        // equal values has none, and one value far out belongs to it.
        let sizes = BatchnormSizes { batch: 3, channels: 3, positions: 1023 };
        let mut x: Vec<f32> = normal::<f32>(sizes.elems(), 1).iter().map(|x| x / 4.0 + 1048576.0).collect();
        for (plane, x) in x.chunks_mut(sizes.positions).enumerate() {
            match plane % 3 {
                0 => {}
                1 => x.fill(4096.0),
                _ => x.iter_mut().for_each(|x| *x -= 1048576.0),
            }
        }
        x[2 * sizes.positions] = -1e6;
        let wide: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        let want = train_by_loops(&wide, &[1.0; 3], &[0.0; 3], &sizes);
        let got = train(&x, &[1.0; 3], &[0.0; 3], &sizes);
        for channel in 0..3 {
            assert_close(&got[2][channel..=channel], &want[2][channel..=channel], 1e-7, &format!("var {channel}"));
            assert_close(&got[1][channel..=channel], &want[1][channel..=channel], 1e-6, &format!("mean {channel}"));
        }
        assert_eq!(got[2][1], 0.0);
    }

    #[test]
    fn what_is_not_finite_shows_in_its_channel_alone() {
        let sizes = BatchnormSizes { batch: 2, channels: 33, positions: 9 };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 5, 33 * 9 + 8] {
                let mut x = normal::<f32>(sizes.elems(), 1);
                x[17 * sizes.positions + at] = bad;
                let got = train(&x, &[1.0; 33], &[0.0; 33], &sizes);
                for (i, out) in got[0].iter().enumerate() {
                    assert_eq!(out.is_nan(), i / sizes.positions % 33 == 17, "{bad} at {at}: {out} at {i}");
                }
                for stat in [&got[2], &got[3]] {
                    stat.iter().enumerate().for_each(|(c, stat)| assert_eq!(stat.is_nan(), c == 17, "{bad} at {at}"));
                }
            }
        }
    }

    #[test]
    fn gradient_is_the_difference_quotient() {
        for shape in [(2, 1, 1), (1, 3, 4), (3, 2, 5), (2, 17, 3)] {
            let sizes = sizes_of(&shape);
            let [x, weight, bias, d_y] = inputs::<f64>(&sizes);
            let loss = |x: &[f64], w: &[f64], b: &[f64]| dot(&train_by_loops(x, w, b, &sizes)[0], &d_y);
            let stats = train(&x, &weight, &bias, &sizes);
            let got = grads(&d_y, &x, &weight, &stats[1], &stats[3], &sizes);
            let want = [
                finite_difference(&x, |x| loss(x, &weight, &bias)),
                finite_difference(&weight, |weight| loss(&x, weight, &bias)),
                finite_difference(&bias, |bias| loss(&x, &weight, bias)),
            ];
            for (got, want) in got.iter().zip(&want) {
                // Differences of step 6e-6 are good to about 1e-10 times the loss' curvature, which 1/sqrt(var) raises.
                assert_close(got, want, 1e-6, &format!("{sizes:?}"));
            }
        }
    }

    /// d_x, d_weight, d_bias, and the latter two added to ones.
    fn grads<T: Real>(d_y: &[T], x: &[T], weight: &[T], mean: &[T], rstd: &[T], sizes: &BatchnormSizes) -> Vec<Vec<T>> {
        let channels = sizes.channels;
        let (mut d_x, mut d_w, mut d_b) = (poison::<T>(x.len()), poison::<T>(channels), poison::<T>(channels));
        grad(&mut d_x, &mut d_w, &mut d_b, d_y, x, weight, mean, rstd, false, sizes);
        let (mut again, mut more_w, mut more_b) =
            (poison::<T>(x.len()), vec![T::ONE; channels], vec![T::ONE; channels]);
        grad(&mut again, &mut more_w, &mut more_b, d_y, x, weight, mean, rstd, true, sizes);
        assert_eq!(bytemuck::cast_slice::<T, u8>(&d_x), bytemuck::cast_slice::<T, u8>(&again));
        for (more, once) in more_w.iter().zip(&d_w).chain(more_b.iter().zip(&d_b)) {
            assert_eq!(*more, T::ONE + *once);
        }
        vec![d_x, d_w, d_b]
    }

    #[test]
    fn gradient_in_f32_is_that_in_f64() {
        for sizes in SHAPES.iter().map(sizes_of).filter(|sizes| sizes.count() != 1) {
            let [x, weight, bias, d_y] = inputs::<f64>(&sizes);
            let stats = train(&x, &weight, &bias, &sizes);
            let want = same_in_all_pools(|| grads(&d_y, &x, &weight, &stats[1], &stats[3], &sizes));
            let [x, weight, bias, d_y] = inputs::<f32>(&sizes);
            let stats = train(&x, &weight, &bias, &sizes);
            let got = same_in_all_pools(|| grads(&d_y, &x, &weight, &stats[1], &stats[3], &sizes));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_close(got, want, SINGLE, &format!("{i} of {sizes:?}"));
            }
        }
    }

    #[test]
    fn running_statistics_are_torchs() {
        let (mut mean, mut var) = ([1f32, 2.0], [3f32, 4.0]);
        update_running(&mut mean, &mut var, &[5.0, 6.0], &[8.0, 16.0], 5, 0.25);
        assert_eq!((mean, var), ([2.0, 3.0], [0.75 * 3.0 + 0.25 * 10.0, 0.75 * 4.0 + 0.25 * 20.0]));
        for sizes in SHAPES.iter().map(sizes_of) {
            let [x, weight, bias, _] = inputs::<f32>(&sizes);
            let trained = train(&x, &weight, &bias, &sizes);
            // Evaluated by its own statistics, a batch gives what training gave: the same operations, hence the same
            // bits but for rstd, which comes from the rounded variance.
            let out = same_in_all_pools(|| {
                let mut out = poison::<f32>(x.len());
                forward_eval(&mut out, &x, &weight, &bias, &trained[1], &trained[2], &sizes, EPSILON);
                vec![out]
            });
            assert_close(&out[0], &trained[0], 1e-6, &format!("{sizes:?}"));
        }
    }
}
