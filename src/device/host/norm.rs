//! Normalization over the last axis: layernorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450) and rmsnorm (Zhang &
//! Sennrich 2019, arXiv:1910.07467).
//!
//! Sizes: x, out (rows, cols); weight, bias (cols); mean, rstd (rows), kept for the gradient.
//! `out = (x - mean) rstd weight + bias`, `rstd = 1 / sqrt(var + epsilon)`, var with divisor cols; rmsnorm has neither
//! mean nor bias, and the mean of the squares for var.

use super::parallel::{expect_len, rows_per_chunk, vector_fn};
use super::real::Real;
use super::reduce;
use rayon::prelude::*;

/// Normalizes every row; overwrites `out`, `mean` and `rstd`.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn forward<T: Real>(
    out: &mut [T],
    mean: &mut [T],
    rstd: &mut [T],
    x: &[T],
    weight: &[T],
    bias: &[T],
    rows: usize,
    cols: usize,
    epsilon: f64,
) {
    check(&[("out", out.len()), ("x", x.len())], rows * cols);
    check(&[("mean", mean.len()), ("rstd", rstd.len())], rows);
    check(&[("weight", weight.len()), ("bias", bias.len())], cols);
    if out.is_empty() {
        // Rows without columns: the formulas with empty sums as 0.
        mean.fill(T::ZERO);
        rstd.fill(T::from_f64(1.0 / epsilon.sqrt()));
        return;
    }
    let chunk = rows_per_chunk(cols);
    out.par_chunks_mut(chunk * cols)
        .zip(x.par_chunks(chunk * cols))
        .zip(mean.par_chunks_mut(chunk).zip(rstd.par_chunks_mut(chunk)))
        .for_each(|((out, x), (mean, rstd))| forward_rows(out, mean, rstd, x, weight, bias, epsilon));
}

vector_fn! {
    fn forward_rows<T: Real>(
        out: &mut [T],
        mean: &mut [T],
        rstd: &mut [T],
        x: &[T],
        weight: &[T],
        bias: &[T],
        epsilon: f64,
    ) {
        let cols = weight.len();
        let per_col = T::from_f64(1.0 / cols as f64);
        for (r, (out, x)) in out.chunks_exact_mut(cols).zip(x.chunks_exact(cols)).enumerate() {
            let [sum] = reduce::sums([x], |[x]| [x]);
            let m = sum * per_col;
            // A second pass, since the sum of squares less the square of the sum loses all digits where the mean is
            // large.
            let [squares] = reduce::sums([x], |[x]| [(x - m) * (x - m)]);
            let s = T::ONE / (squares * per_col + T::from_f64(epsilon)).sqrt();
            for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                *out = ((x - m) * s).mul_add(weight, bias);
            }
            mean[r] = m;
            rstd[r] = s;
        }
    }
}

/// The gradient. Overwrites `d_x`; overwrites `d_weight` and `d_bias`, or adds to them with `accumulate`.
///
/// With `n = (x - mean) rstd` and `g = d_y weight`: `d_x = rstd (g - mean(g) - n mean(g n))`, means over the row;
/// `d_weight = sum of d_y n` and `d_bias = sum of d_y` over rows.
///
/// # Panics
/// When a length does not fit the sizes.
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
    rows: usize,
    cols: usize,
) {
    check(&[("d_x", d_x.len()), ("d_y", d_y.len()), ("x", x.len())], rows * cols);
    check(&[("mean", mean.len()), ("rstd", rstd.len())], rows);
    check(&[("d_weight", d_weight.len()), ("d_bias", d_bias.len()), ("weight", weight.len())], cols);
    reduce::columns(d_bias, accumulate, rows, reduce::Elements { x: d_y, cols });
    reduce::columns(d_weight, accumulate, rows, WeightTerms { d_y, x, mean, rstd, cols });
    if d_x.is_empty() {
        return;
    }
    let chunk = rows_per_chunk(cols);
    d_x.par_chunks_mut(chunk * cols)
        .zip(d_y.par_chunks(chunk * cols).zip(x.par_chunks(chunk * cols)))
        .zip(mean.par_chunks(chunk).zip(rstd.par_chunks(chunk)))
        .for_each(|((d_x, (d_y, x)), (mean, rstd))| grad_rows(d_x, d_y, x, weight, mean, rstd));
}

/// d_y (x - mean) rstd.
#[derive(Clone, Copy)]
struct WeightTerms<'a, T> {
    d_y: &'a [T],
    x: &'a [T],
    mean: &'a [T],
    rstd: &'a [T],
    cols: usize,
}

impl<T: Real> reduce::Terms<T> for WeightTerms<'_, T> {
    #[inline(always)]
    fn add_row(self, row: usize, first: usize, sums: &mut [T]) {
        let d_y = &self.d_y[row * self.cols + first..][..sums.len()];
        let x = &self.x[row * self.cols + first..][..sums.len()];
        let (mean, rstd) = (self.mean[row], self.rstd[row]);
        for ((sum, &d_y), &x) in sums.iter_mut().zip(d_y).zip(x) {
            *sum = d_y.mul_add((x - mean) * rstd, *sum);
        }
    }
}

vector_fn! {
    fn grad_rows<T: Real>(d_x: &mut [T], d_y: &[T], x: &[T], weight: &[T], mean: &[T], rstd: &[T]) {
        let cols = weight.len();
        let per_col = T::from_f64(1.0 / cols as f64);
        let rows = d_x.chunks_exact_mut(cols).zip(d_y.chunks_exact(cols).zip(x.chunks_exact(cols)));
        for ((d_x, (d_y, x)), (&m, &s)) in rows.zip(mean.iter().zip(rstd)) {
            let [sum, product] = reduce::sums([d_y, weight, x], |[d_y, weight, x]| {
                let g = d_y * weight;
                [g, g * ((x - m) * s)]
            });
            let (mean_g, mean_gn) = (sum * per_col, product * per_col);
            for (((d_x, &d_y), &weight), &x) in d_x.iter_mut().zip(d_y).zip(weight).zip(x) {
                let n = (x - m) * s;
                *d_x = s * (d_y * weight - n.mul_add(mean_gn, mean_g));
            }
        }
    }
}

/// Divides every row by its root mean square; overwrites `out` and `rstd`.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn rms_forward<T: Real>(
    out: &mut [T],
    rstd: &mut [T],
    x: &[T],
    weight: &[T],
    rows: usize,
    cols: usize,
    epsilon: f64,
) {
    check(&[("out", out.len()), ("x", x.len())], rows * cols);
    check(&[("rstd", rstd.len())], rows);
    check(&[("weight", weight.len())], cols);
    if out.is_empty() {
        rstd.fill(T::from_f64(1.0 / epsilon.sqrt()));
        return;
    }
    let chunk = rows_per_chunk(cols);
    out.par_chunks_mut(chunk * cols)
        .zip(x.par_chunks(chunk * cols))
        .zip(rstd.par_chunks_mut(chunk))
        .for_each(|((out, x), rstd)| rms_forward_rows(out, rstd, x, weight, epsilon));
}

vector_fn! {
    fn rms_forward_rows<T: Real>(out: &mut [T], rstd: &mut [T], x: &[T], weight: &[T], epsilon: f64) {
        let cols = weight.len();
        let per_col = T::from_f64(1.0 / cols as f64);
        for ((out, x), rstd) in out.chunks_exact_mut(cols).zip(x.chunks_exact(cols)).zip(rstd) {
            let [squares] = reduce::sums([x], |[x]| [x * x]);
            let s = T::ONE / (squares * per_col + T::from_f64(epsilon)).sqrt();
            for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * s * weight;
            }
            *rstd = s;
        }
    }
}

/// The gradient of [`rms_forward`]. Overwrites `d_x`; overwrites `d_weight`, or adds to it with `accumulate`.
///
/// With `n = x rstd` and `g = d_y weight`: `d_x = rstd (g - n mean(g n))`, the mean over the row; `d_weight = sum of
/// d_y n` over rows.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn rms_grad<T: Real>(
    d_x: &mut [T],
    d_weight: &mut [T],
    d_y: &[T],
    x: &[T],
    weight: &[T],
    rstd: &[T],
    accumulate: bool,
    rows: usize,
    cols: usize,
) {
    check(&[("d_x", d_x.len()), ("d_y", d_y.len()), ("x", x.len())], rows * cols);
    check(&[("rstd", rstd.len())], rows);
    check(&[("d_weight", d_weight.len()), ("weight", weight.len())], cols);
    reduce::columns(d_weight, accumulate, rows, RmsWeightTerms { d_y, x, rstd, cols });
    if d_x.is_empty() {
        return;
    }
    let chunk = rows_per_chunk(cols);
    d_x.par_chunks_mut(chunk * cols)
        .zip(d_y.par_chunks(chunk * cols).zip(x.par_chunks(chunk * cols)))
        .zip(rstd.par_chunks(chunk))
        .for_each(|((d_x, (d_y, x)), rstd)| rms_grad_rows(d_x, d_y, x, weight, rstd));
}

/// d_y x rstd.
#[derive(Clone, Copy)]
struct RmsWeightTerms<'a, T> {
    d_y: &'a [T],
    x: &'a [T],
    rstd: &'a [T],
    cols: usize,
}

impl<T: Real> reduce::Terms<T> for RmsWeightTerms<'_, T> {
    #[inline(always)]
    fn add_row(self, row: usize, first: usize, sums: &mut [T]) {
        let d_y = &self.d_y[row * self.cols + first..][..sums.len()];
        let x = &self.x[row * self.cols + first..][..sums.len()];
        let rstd = self.rstd[row];
        for ((sum, &d_y), &x) in sums.iter_mut().zip(d_y).zip(x) {
            *sum = d_y.mul_add(x * rstd, *sum);
        }
    }
}

vector_fn! {
    fn rms_grad_rows<T: Real>(d_x: &mut [T], d_y: &[T], x: &[T], weight: &[T], rstd: &[T]) {
        let cols = weight.len();
        let per_col = T::from_f64(1.0 / cols as f64);
        let rows = d_x.chunks_exact_mut(cols).zip(d_y.chunks_exact(cols).zip(x.chunks_exact(cols)));
        for ((d_x, (d_y, x)), &s) in rows.zip(rstd) {
            let [product] = reduce::sums([d_y, weight, x], |[d_y, weight, x]| [d_y * weight * (x * s)]);
            let mean_gn = product * per_col;
            for (((d_x, &d_y), &weight), &x) in d_x.iter_mut().zip(d_y).zip(weight).zip(x) {
                *d_x = s * (d_y * weight - x * s * mean_gn);
            }
        }
    }
}

fn check(lens: &[(&str, usize)], want: usize) {
    lens.iter().for_each(|(name, len)| expect_len("norm", name, *len, want));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, dot, finite_difference, normal, poison, same_in_all_pools};

    /// out, mean, rstd, d_x, d_weight, d_bias, then the last two accumulated upon the first's.
    fn run<T: Real>(rows: usize, cols: usize, shift: f64) -> Vec<Vec<T>> {
        let x: Vec<T> = normal::<T>(rows * cols, 1).into_iter().map(|x| x + T::from_f64(shift)).collect();
        let (weight, bias, d_y) = (normal::<T>(cols, 2), normal::<T>(cols, 3), normal::<T>(rows * cols, 4));
        let (mut out, mut mean, mut rstd) = (poison(rows * cols), poison(rows), poison(rows));
        forward(&mut out, &mut mean, &mut rstd, &x, &weight, &bias, rows, cols, 1e-5);
        let (mut d_x, mut d_weight, mut d_bias) = (poison(rows * cols), poison(cols), poison(cols));
        grad(&mut d_x, &mut d_weight, &mut d_bias, &d_y, &x, &weight, &mean, &rstd, false, rows, cols);
        let (mut again, mut more_weight, mut more_bias) = (poison(rows * cols), d_weight.clone(), d_bias.clone());
        grad(&mut again, &mut more_weight, &mut more_bias, &d_y, &x, &weight, &mean, &rstd, true, rows, cols);
        assert_eq!(again, d_x);
        for (more, once) in more_weight.iter().chain(&more_bias).zip(d_weight.iter().chain(&d_bias)) {
            assert_eq!(*more, *once + *once);
        }
        vec![out, mean, rstd, d_x, d_weight, d_bias]
    }

    #[test]
    fn f32_like_f64_on_any_number_of_threads() {
        for (rows, cols) in [(0, 4), (3, 0), (1, 1), (2, 31), (33, 33), (5, 1023), (300, 384), (2, 9000)] {
            let got = same_in_all_pools(|| run::<f32>(rows, cols, 0.0));
            for (i, (got, want)) in got.iter().zip(run::<f64>(rows, cols, 0.0)).enumerate() {
                // A row's sums have f32's rounding a few hundred times; one column alone has variance 0, hence rstd
                // 316.
                assert_close(got, &want, 2e-5, &format!("result {i} of {rows}x{cols}"));
            }
        }
        // A mean a thousand times the deviation: the variance must not come from cancelling squares.
        let (got, want) = (run::<f32>(7, 384, 1000.0), run::<f64>(7, 384, 1000.0));
        assert_close(&got[0], &want[0], 1e-3, "far from zero");
    }

    #[test]
    fn normalizes() {
        let x = normal::<f64>(384, 9);
        let (mut out, mut mean, mut rstd) = (poison(384), poison(1), poison(1));
        forward(&mut out, &mut mean, &mut rstd, &x, &[1.0; 384], &[0.0; 384], 1, 384, 0.0);
        let [m, square] = [out.iter().sum::<f64>() / 384.0, out.iter().map(|x| x * x).sum::<f64>() / 384.0];
        assert!(m.abs() < 1e-14 && (square - 1.0).abs() < 1e-13, "{m} {square}");
    }

    /// out, rstd, d_x, d_weight, then d_weight accumulated upon the first's.
    fn run_rms<T: Real>(rows: usize, cols: usize) -> Vec<Vec<T>> {
        let (x, weight, d_y) = (normal::<T>(rows * cols, 1), normal::<T>(cols, 2), normal::<T>(rows * cols, 3));
        let (mut out, mut rstd) = (poison(rows * cols), poison(rows));
        rms_forward(&mut out, &mut rstd, &x, &weight, rows, cols, 1e-5);
        let (mut d_x, mut d_weight) = (poison(rows * cols), poison(cols));
        rms_grad(&mut d_x, &mut d_weight, &d_y, &x, &weight, &rstd, false, rows, cols);
        let mut more = d_weight.clone();
        rms_grad(&mut poison(rows * cols), &mut more, &d_y, &x, &weight, &rstd, true, rows, cols);
        assert!(more.iter().zip(&d_weight).all(|(more, once)| *more == *once + *once));
        vec![out, rstd, d_x, d_weight]
    }

    #[test]
    fn rmsnorm_in_f32_like_f64_on_any_number_of_threads() {
        for (rows, cols) in [(0, 4), (3, 0), (1, 1), (2, 31), (33, 33), (5, 1023), (300, 384), (2, 9000)] {
            let got = same_in_all_pools(|| run_rms::<f32>(rows, cols));
            for (i, (got, want)) in got.iter().zip(run_rms::<f64>(rows, cols)).enumerate() {
                // A row's sums have f32's rounding a few hundred times.
                assert_close(got, &want, 2e-5, &format!("result {i} of {rows}x{cols}"));
            }
        }
    }

    #[test]
    fn rmsnorm_is_layernorm_where_rows_have_no_mean() {
        let half = normal::<f64>(192, 5);
        let x: Vec<f64> = half.iter().copied().chain(half.iter().map(|x| -x)).collect();
        let weight = normal::<f64>(384, 6);
        let [mut rms, mut layer] = [(); 2].map(|()| poison(384));
        rms_forward(&mut rms, &mut poison::<f64>(1), &x, &weight, 1, 384, 1e-5);
        forward(&mut layer, &mut poison(1), &mut poison(1), &x, &weight, &[0.0; 384], 1, 384, 1e-5);
        assert_close(&rms, &layer, 1e-13, "out");
    }

    #[test]
    fn gradients_are_slopes() {
        let (rows, cols) = (5, 7);
        let (x, weight, bias) = (normal::<f64>(35, 1), normal::<f64>(7, 2), normal::<f64>(7, 3));
        let d_y = normal::<f64>(35, 4);
        let loss = |x: &[f64], weight: &[f64], bias: &[f64]| {
            let (mut out, mut mean, mut rstd) = (poison(35), poison(5), poison(5));
            forward(&mut out, &mut mean, &mut rstd, x, weight, bias, rows, cols, 1e-5);
            dot(&out, &d_y)
        };
        let got = run::<f64>(rows, cols, 0.0);
        assert_close(&got[3], &finite_difference(&x, |x| loss(x, &weight, &bias)), 1e-7, "d_x");
        assert_close(&got[4], &finite_difference(&weight, |weight| loss(&x, weight, &bias)), 1e-7, "d_weight");
        assert_close(&got[5], &finite_difference(&bias, |bias| loss(&x, &weight, bias)), 1e-7, "d_bias");
    }
}
