//! Maximum and average pooling over windows of `(N, C, H, W)` tensors; one (image, channel) pair is a plane.
//!
//! Planes are independent, and each is computed by one thread, so that overlapping windows' gradients add in a fixed
//! order.

use super::{
    parallel::{expect_len, for_each_strided, simd, vector_fn},
    real::Real,
};
use rayon::prelude::*;
use std::ops::Range;

/// Sizes of a pooling. `x`: `(planes, height, width)`; `out`: `(planes, out_height, out_width)`. A window that covers
/// the whole plane with no padding is global pooling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSizes {
    /// Images times channels.
    pub planes: usize,
    /// Rows of a plane of `x`.
    pub height: usize,
    /// Columns of a plane of `x`.
    pub width: usize,
    /// Rows of a window.
    pub kernel_h: usize,
    /// Columns of a window.
    pub kernel_w: usize,
    /// Step between windows, in both directions; at least 1.
    pub stride: usize,
    /// Rows and columns added on each side.
    pub padding: usize,
    /// Rows of windows.
    pub out_height: usize,
    /// Columns of windows.
    pub out_width: usize,
}

/// Elements of `x` for one task, at least one plane.
const TASK_ELEMS: usize = 16384;

impl PoolSizes {
    /// Elements of a plane of `x`.
    pub fn positions(&self) -> usize {
        self.height * self.width
    }

    /// Elements of a plane of `out`.
    pub fn out_positions(&self) -> usize {
        self.out_height * self.out_width
    }

    fn expect(&self, x: usize, out: usize) {
        expect_len("pool", "x", x, self.planes * self.positions());
        expect_len("pool", "out", out, self.planes * self.out_positions());
    }

    fn planes_per_task(&self) -> usize {
        (TASK_ELEMS / self.positions().max(1)).max(1)
    }

    /// The rows of the plane inside the windows of row `out_row`.
    #[inline(always)]
    fn rows(&self, out_row: usize) -> Range<usize> {
        inside(out_row * self.stride, self.kernel_h, self.padding, self.height)
    }

    /// The columns of windows whose column `kernel_col` lies inside the plane: 0 <= column * stride + kernel_col -
    /// padding < width.
    #[inline(always)]
    fn cols_with(&self, kernel_col: usize) -> Range<usize> {
        let first = self.padding.saturating_sub(kernel_col).div_ceil(self.stride).min(self.out_width);
        let end = (self.width + self.padding).saturating_sub(kernel_col).div_ceil(self.stride);
        first..end.clamp(first, self.out_width)
    }

    /// The columns of the plane inside the windows of column `out_col`.
    #[inline(always)]
    fn cols(&self, out_col: usize) -> Range<usize> {
        inside(out_col * self.stride, self.kernel_w, self.padding, self.width)
    }
}

/// What of a window lies inside an axis; `start` counts from the first padded place.
#[inline(always)]
fn inside(start: usize, kernel: usize, padding: usize, len: usize) -> Range<usize> {
    let first = start.saturating_sub(padding).min(len);
    let end = (start + kernel).saturating_sub(padding).min(len);
    first..end.max(first)
}

/// The greatest value of every window, and where it is: `argmax` counts rows times `width` plus columns within the
/// plane.
///
/// Padding never wins. The first of equal values in row-major order wins; a NaN beats every number and a later NaN an
/// earlier one, as in torch. A window with nothing inside the plane gives minus infinity and -1. Overwrites `out` and
/// `argmax`.
pub fn max_forward<T: Real>(out: &mut [T], argmax: &mut [i32], x: &[T], sizes: &PoolSizes) {
    sizes.expect(x.len(), out.len());
    expect_len("pool", "argmax", argmax.len(), out.len());
    assert!(i32::try_from(sizes.positions()).is_ok(), "pool: a plane of {} places", sizes.positions());
    if out.is_empty() {
        return;
    }
    let (group, positions) = (sizes.planes_per_task(), sizes.positions());
    let task = group * sizes.out_positions();
    let cols: Vec<Range<usize>> = (0..sizes.kernel_w).map(|kernel_col| sizes.cols_with(kernel_col)).collect();
    out.par_chunks_mut(task).zip(argmax.par_chunks_mut(task)).enumerate().for_each(|(index, (out, argmax))| {
        let outs = out.chunks_mut(sizes.out_positions()).zip(argmax.chunks_mut(sizes.out_positions()));
        for (plane, (out, argmax)) in outs.enumerate() {
            let start = (index * group + plane) * positions;
            max_plane(out, argmax, &x[start..start + positions], &cols, sizes);
        }
    });
}

vector_fn! {
    /// `cols`: for each column of a window, the columns of outputs for which it lies inside the plane.
    fn max_plane<T: Real>(
        out: &mut [T],
        argmax: &mut [i32],
        x: &[T],
        cols: &[Range<usize>],
        sizes: &PoolSizes,
    ) {
        out.fill(T::from_f64(f64::NEG_INFINITY));
        argmax.fill(-1);
        for (out_row, (out, argmax)) in
            out.chunks_exact_mut(sizes.out_width).zip(argmax.chunks_exact_mut(sizes.out_width)).enumerate()
        {
            let rows = sizes.rows(out_row);
            // All windows of a row in vectors: each place of a window in turn.
            for (row, (kernel_col, cols)) in rows.flat_map(|row| cols.iter().enumerate().map(move |col| (row, col))) {
                if cols.is_empty() {
                    continue;
                }
                let start = row * sizes.width + cols.start * sizes.stride + kernel_col - sizes.padding;
                let (best, places, x) = (&mut out[cols.clone()], &mut argmax[cols.clone()], &x[start..]);
                for_each_strided(
                    x,
                    best.len(),
                    sizes.stride,
                    #[inline(always)]
                    |i, at, value| {
                        // A NaN wins over all before it, and the first place of a window even with minus infinity.
                        #[allow(clippy::eq_op)] // only a NaN differs from itself
                        let wins = value > best[i] || value != value || places[i] < 0;
                        best[i] = if wins { value } else { best[i] };
                        places[i] = if wins { start as i32 + at as i32 } else { places[i] };
                    },
                );
            }
        }
    }
}

/// The gradient of [`max_forward`]: every window's gradient goes to the place that won it, windows in row-major order.
/// Overwrites `d_x`.
pub fn max_grad<T: Real>(d_x: &mut [T], d_y: &[T], argmax: &[i32], sizes: &PoolSizes) {
    sizes.expect(d_x.len(), d_y.len());
    expect_len("pool", "argmax", argmax.len(), d_y.len());
    let out_positions = sizes.out_positions();
    for_each_plane(d_x, sizes, |plane, d_x| {
        let out = plane * out_positions..(plane + 1) * out_positions;
        d_x.fill(T::ZERO);
        for (&d_y, &place) in d_y[out.clone()].iter().zip(&argmax[out]) {
            if let Ok(place) = usize::try_from(place) {
                d_x[place] += d_y;
            }
        }
    });
}

/// The mean of every window, summed in f64. Padding counts as zeros if `count_include_pad`, otherwise not at all.
///
/// A window with nothing to count gives 0. Overwrites `out`.
pub fn avg_forward<T: Real>(out: &mut [T], x: &[T], sizes: &PoolSizes, count_include_pad: bool) {
    sizes.expect(x.len(), out.len());
    if out.is_empty() {
        return;
    }
    let (group, positions) = (sizes.planes_per_task(), sizes.positions());
    out.par_chunks_mut(group * sizes.out_positions()).enumerate().for_each(|(index, out)| {
        for (plane, out) in out.chunks_mut(sizes.out_positions()).enumerate() {
            let start = (index * group + plane) * positions;
            avg_plane(out, &x[start..start + positions], sizes, count_include_pad);
        }
    });
}

fn avg_plane<T: Real>(out: &mut [T], x: &[T], sizes: &PoolSizes, count_include_pad: bool) {
    for out_row in 0..sizes.out_height {
        let rows = sizes.rows(out_row);
        for out_col in 0..sizes.out_width {
            let cols = sizes.cols(out_col);
            let mut sum = 0.0;
            for row in rows.clone() {
                let start = row * sizes.width;
                for value in &x[start + cols.start..start + cols.end] {
                    sum += value.to_f64();
                }
            }
            out[out_row * sizes.out_width + out_col] =
                T::from_f64(sum / divisor(sizes, &rows, &cols, count_include_pad));
        }
    }
}

/// What a window's sum is divided by; at least 1.
#[inline(always)]
fn divisor(sizes: &PoolSizes, rows: &Range<usize>, cols: &Range<usize>, count_include_pad: bool) -> f64 {
    let count = if count_include_pad { sizes.kernel_h * sizes.kernel_w } else { rows.len() * cols.len() };
    count.max(1) as f64
}

/// The gradient of [`avg_forward`]: every window spreads its gradient evenly, windows in row-major order. Overwrites
/// `d_x`.
pub fn avg_grad<T: Real>(d_x: &mut [T], d_y: &[T], sizes: &PoolSizes, count_include_pad: bool) {
    sizes.expect(d_x.len(), d_y.len());
    let out_positions = sizes.out_positions();
    for_each_plane(d_x, sizes, |plane, d_x| {
        d_x.fill(T::ZERO);
        let d_y = &d_y[plane * out_positions..(plane + 1) * out_positions];
        simd(
            #[inline(always)]
            || {
                for out_row in 0..sizes.out_height {
                    let rows = sizes.rows(out_row);
                    for out_col in 0..sizes.out_width {
                        let cols = sizes.cols(out_col);
                        let count = divisor(sizes, &rows, &cols, count_include_pad);
                        let share = d_y[out_row * sizes.out_width + out_col] / T::from_f64(count);
                        for row in rows.clone() {
                            let start = row * sizes.width;
                            for d_x in &mut d_x[start + cols.start..start + cols.end] {
                                *d_x += share;
                            }
                        }
                    }
                }
            },
        );
    });
}

/// Calls `body(plane, d_x of the plane)` for every plane, on all threads.
fn for_each_plane<T: Real>(d_x: &mut [T], sizes: &PoolSizes, body: impl Fn(usize, &mut [T]) + Sync) {
    if d_x.is_empty() {
        return;
    }
    let group = sizes.planes_per_task();
    d_x.par_chunks_mut(group * sizes.positions()).enumerate().for_each(|(index, d_x)| {
        for (plane, d_x) in d_x.chunks_mut(sizes.positions()).enumerate() {
            body(index * group + plane, d_x);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, normal, poison, same_in_all_pools};

    /// (planes, height, width, kernel h, kernel w, stride, padding)
    type Row = (usize, usize, usize, usize, usize, usize, usize);

    const SHAPES: &[Row] = &[
        (1, 1, 1, 1, 1, 1, 0),
        (3, 7, 7, 7, 7, 1, 0), // global
        (5, 13, 7, 13, 7, 1, 0),
        (7, 13, 13, 3, 3, 2, 1),
        (2, 13, 1, 3, 1, 1, 0),
        (3, 1, 13, 1, 2, 2, 0),
        (2, 13, 7, 2, 2, 2, 0),
        (2, 7, 7, 7, 7, 1, 3),
        (2, 5, 5, 3, 3, 4, 1),
        (1, 3, 3, 2, 2, 2, 3), // windows with nothing inside
        (33, 31, 33, 3, 3, 2, 1),
        (0, 3, 3, 2, 2, 1, 0),
        (3, 2, 2, 3, 3, 1, 0), // no window fits
        (3, 0, 4, 1, 1, 1, 1),
    ];

    fn sizes_of(&(planes, height, width, kernel_h, kernel_w, stride, padding): &Row) -> PoolSizes {
        let fits =
            |len: usize, kernel: usize| (len + 2 * padding).checked_sub(kernel).map_or(0, |free| free / stride + 1);
        let (out_height, out_width) = (fits(height, kernel_h), fits(width, kernel_w));
        PoolSizes { planes, height, width, kernel_h, kernel_w, stride, padding, out_height, out_width }
    }

    /// For every window, the indices in its plane that lie inside.
    fn windows(s: &PoolSizes) -> Vec<Vec<usize>> {
        let mut windows = Vec::new();
        for (oy, ox) in (0..s.out_height).flat_map(|oy| (0..s.out_width).map(move |ox| (oy, ox))) {
            let mut inside = Vec::new();
            for (ky, kx) in (0..s.kernel_h).flat_map(|ky| (0..s.kernel_w).map(move |kx| (ky, kx))) {
                let y = (oy * s.stride + ky) as isize - s.padding as isize;
                let x = (ox * s.stride + kx) as isize - s.padding as isize;
                if (0..s.height as isize).contains(&y) && (0..s.width as isize).contains(&x) {
                    inside.push(y as usize * s.width + x as usize);
                }
            }
            windows.push(inside);
        }
        windows
    }

    /// Values from a few integers, so that maxima are often equal.
    fn coarse<T: Real>(len: usize) -> Vec<T> {
        normal::<f64>(len, 1).iter().map(|x| T::from_f64((x * 2.0).round())).collect()
    }

    /// With `wild`, a fifth of the values is NaN or infinite.
    fn check_max<T: Real>(s: &PoolSizes, wild: bool) {
        let mut x = coarse::<T>(s.planes * s.positions());
        if wild {
            let odd = [f64::NAN, f64::NEG_INFINITY, f64::INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY];
            x.iter_mut().step_by(5).enumerate().for_each(|(i, x)| *x = T::from_f64(odd[i % 5]));
            x.iter_mut().skip(s.positions()).take(s.positions()).for_each(|x| *x = T::from_f64(odd[1]));
        }
        let d_y = normal::<T>(s.planes * s.out_positions(), 2);
        let results = same_in_all_pools(|| {
            let (mut out, mut argmax) = (poison::<T>(d_y.len()), vec![i32::MIN; d_y.len()]);
            max_forward(&mut out, &mut argmax, &x, s);
            let mut d_x = poison::<T>(x.len());
            max_grad(&mut d_x, &d_y, &argmax, s);
            vec![out, argmax.into_iter().map(|place| T::from_f64(place.into())).collect(), d_x]
        });
        let (mut window, mut d_x) = (0, vec![T::ZERO; x.len()]);
        for plane in 0..s.planes {
            for inside in windows(s) {
                let value = |place: usize| x[plane * s.positions() + place].to_f64();
                // The first of the greatest; the last NaN where there is one.
                let best = inside.iter().map(|&place| value(place)).fold(f64::NEG_INFINITY, f64::max);
                let first = inside.iter().copied().find(|&place| value(place) == best);
                let place = inside.iter().copied().rfind(|&place| value(place).is_nan()).or(first);
                if let Some(place) = place {
                    d_x[plane * s.positions() + place] += d_y[window];
                }
                // Maxima are copies: equal, not close.
                let (out, at) = (results[0][window].to_f64(), results[1][window].to_f64());
                let want = place.map_or(best, value);
                assert!(out == want || (out.is_nan() && want.is_nan()), "window {window} of {s:?}: {out}, want {want}");
                assert_eq!(at, place.map_or(-1.0, |place| place as f64), "window {window} of {s:?}");
                window += 1;
            }
        }
        // Gradients add in window order here too.
        assert_close(&results[2], &d_x, 0.0, &format!("d_x of {s:?}"));
    }

    fn check_avg<T: Real>(s: &PoolSizes, tolerance: f64) {
        let (x, d_y) = (normal::<T>(s.planes * s.positions(), 1), normal::<T>(s.planes * s.out_positions(), 2));
        for count_include_pad in [false, true] {
            let results = same_in_all_pools(|| {
                let (mut out, mut d_x) = (poison::<T>(d_y.len()), poison::<T>(x.len()));
                avg_forward(&mut out, &x, s, count_include_pad);
                avg_grad(&mut d_x, &d_y, s, count_include_pad);
                vec![out, d_x]
            });
            let (mut outs, mut d_x) = (Vec::new(), vec![0.0; x.len()]);
            for plane in 0..s.planes {
                for inside in windows(s) {
                    let count = if count_include_pad { s.kernel_h * s.kernel_w } else { inside.len() }.max(1) as f64;
                    let mut sum = 0.0;
                    for place in inside {
                        sum += x[plane * s.positions() + place].to_f64();
                        d_x[plane * s.positions() + place] += d_y[outs.len()].to_f64() / count;
                    }
                    outs.push(sum / count);
                }
            }
            assert_close(&results[0], &outs, tolerance, &format!("out of {s:?}"));
            assert_close(&results[1], &d_x, tolerance, &format!("d_x of {s:?}"));
        }
    }

    #[test]
    fn is_the_plain_loop() {
        for sizes in SHAPES.iter().map(sizes_of) {
            for wild in [false, true] {
                check_max::<f32>(&sizes, wild);
                check_max::<f64>(&sizes, wild);
            }
            // One rounding for the mean, up to 49 additions for the gradient.
            check_avg::<f32>(&sizes, 1e-6);
            check_avg::<f64>(&sizes, 1e-14);
        }
    }

    #[test]
    fn nan_and_infinity_are_torchs() {
        let sizes = sizes_of(&(1, 2, 3, 2, 3, 1, 0));
        let max = |x: [f32; 6]| {
            let (mut out, mut argmax) = ([0f32], [0]);
            max_forward(&mut out, &mut argmax, &x, &sizes);
            (out[0], argmax[0])
        };
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        assert_eq!(max([-inf; 6]), (-inf, 0));
        assert_eq!(max([1.0, inf, 2.0, inf, 0.0, 0.0]), (inf, 1));
        let (value, place) = max([1.0, nan, inf, 5.0, nan, 6.0]);
        assert!(value.is_nan() && place == 4, "{value} at {place}");
    }
}
