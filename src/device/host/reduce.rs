//! Sums and maxima in an order that is written down.
//!
//! Along a row, element i goes to lane i mod 16, and the lanes are then added in a fixed tree: vectors as wide as any
//! machine's do it, and all give the same bits. Down the columns, rows are added in blocks of 256, in order.

use super::parallel::vector_fn;
use super::real::Real;
use rayon::prelude::*;

/// Sums that run side by side along a row: one cache line of f32, and the widest vector there is.
const LANES: usize = 16;

/// Columns that one task sums: a few cache lines, so that reading them row by row wastes little.
const COLUMNS: usize = 64;

/// Rows added before their sum is added to the total, so that rounding grows with the blocks and not with the rows.
const ROWS: usize = 256;

/// The sums of `J` terms of `K` rows of one length: `sum over i of term([x[i] for x in inputs])`.
#[inline(always)]
pub fn sums<T: Real, const K: usize, const J: usize>(inputs: [&[T]; K], term: impl Fn([T; K]) -> [T; J]) -> [T; J] {
    let len = inputs[0].len();
    for x in inputs {
        assert!(x.len() == len, "rows of different lengths are summed");
    }
    let mut lanes = [[T::ZERO; LANES]; J];
    let mut start = 0;
    while start + LANES <= len {
        let mut block = [[T::ZERO; LANES]; K];
        for k in 0..K {
            block[k].copy_from_slice(&inputs[k][start..start + LANES]);
        }
        for lane in 0..LANES {
            let mut x = [T::ZERO; K];
            for k in 0..K {
                x[k] = block[k][lane];
            }
            let terms = term(x);
            for j in 0..J {
                lanes[j][lane] += terms[j];
            }
        }
        start += LANES;
    }
    for i in start..len {
        let mut x = [T::ZERO; K];
        for k in 0..K {
            x[k] = inputs[k][i];
        }
        let terms = term(x);
        for j in 0..J {
            lanes[j][i - start] += terms[j];
        }
    }
    let mut out = [T::ZERO; J];
    for j in 0..J {
        out[j] = fold(lanes[j], |a, b| a + b);
    }
    out
}

/// The greatest element; minus infinity for an empty row, NaN if any is NaN.
#[inline(always)]
pub fn max<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::from_f64(f64::NEG_INFINITY); LANES];
    let blocks = x.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] = block[lane].max(lanes[lane]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = x.max(*lane);
    }
    fold(lanes, T::max)
}

/// The sum of `exp(x - shift)`.
#[inline(always)]
pub fn sum_of_exp<T: Real>(x: &[T], shift: T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let blocks = x.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for lane in 0..LANES {
            lanes[lane] += (block[lane] - shift).exp();
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += (x - shift).exp();
    }
    fold(lanes, |a, b| a + b)
}

/// Replaces each element by `exp(x - shift)` and returns their sum.
#[inline(always)]
pub fn exp_and_sum<T: Real>(x: &mut [T], shift: T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let mut blocks = x.chunks_exact_mut(LANES);
    for block in &mut blocks {
        for lane in 0..LANES {
            let e = (block[lane] - shift).exp();
            block[lane] = e;
            lanes[lane] += e;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(blocks.into_remainder()) {
        *x = (*x - shift).exp();
        *lane += *x;
    }
    fold(lanes, |a, b| a + b)
}

/// The lanes joined in a tree: 16 to 8 to 4 to 2 to 1.
#[inline(always)]
fn fold<T: Real>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// What [`columns`] sums.
pub trait Terms<T>: Copy + Sync {
    /// Adds row `row`'s terms for the columns from `first` on to `sums`; to be marked `#[inline(always)]`.
    fn add_row(self, row: usize, first: usize, sums: &mut [T]);
}

/// `out[c] = sum over rows of the terms`, or `out[c] +=` that with `accumulate`.
pub fn columns<T: Real, F: Terms<T>>(out: &mut [T], accumulate: bool, rows: usize, terms: F) {
    out.par_chunks_mut(COLUMNS)
        .enumerate()
        .for_each(|(i, out)| column_block(out, i * COLUMNS, accumulate, rows, terms));
}

vector_fn! {
    fn column_block<T: Real, F: Terms<T>>(out: &mut [T], first: usize, accumulate: bool, rows: usize, terms: F) {
        let mut totals = [T::ZERO; COLUMNS];
        let totals = &mut totals[..out.len()];
        for start in (0..rows).step_by(ROWS) {
            let mut block = [T::ZERO; COLUMNS];
            let block = &mut block[..out.len()];
            for row in start..rows.min(start + ROWS) {
                terms.add_row(row, first, block);
            }
            for (total, block) in totals.iter_mut().zip(block) {
                *total += *block;
            }
        }
        for (out, &total) in out.iter_mut().zip(&*totals) {
            *out = if accumulate { *out + total } else { total };
        }
    }
}

/// The elements of a matrix themselves, with rows of `cols`.
#[derive(Clone, Copy)]
pub struct Elements<'a, T> {
    /// (rows, cols).
    pub x: &'a [T],
    /// Elements of a row.
    pub cols: usize,
}

impl<T: Real> Terms<T> for Elements<'_, T> {
    #[inline(always)]
    fn add_row(self, row: usize, first: usize, sums: &mut [T]) {
        let x = &self.x[row * self.cols + first..][..sums.len()];
        for (sum, &x) in sums.iter_mut().zip(x) {
            *sum += x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, normal, poison, same_in_all_pools};

    #[test]
    fn along_a_row() {
        for len in [0, 1, 15, 16, 17, 31, 33, 1023] {
            let x = normal::<f32>(len, 1);
            let y = normal::<f32>(len, 2);
            let [sum, product] = sums([&x, &y], |[x, y]| [x, x * y]);
            let want: f64 = x.iter().map(|&x| f64::from(x)).sum();
            let want_product: f64 = x.iter().zip(&y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            // 64 additions in a lane at most, of numbers near 1.
            assert_close(&[sum, product], &[want, want_product], 1e-4, "sums");
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut e = x.clone();
            let total = exp_and_sum(&mut e, 0.5);
            assert_close(&e, &x.iter().map(|&x| f64::from(x - 0.5).exp()).collect::<Vec<f64>>(), 1e-6, "exp");
            assert_eq!(sum_of_exp(&x, 0.5), total);
            assert_close(&[total], &[e.iter().map(|&x| f64::from(x)).sum::<f64>()], 1e-5, "sum of exp");
        }
        for at in [0, 7, 16, 18] {
            let mut x = normal::<f32>(19, 1);
            x[at] = f32::NAN;
            assert!(max(&x).is_nan(), "NaN at {at}");
        }
    }

    #[test]
    fn down_the_columns() {
        for (rows, cols) in [(0, 3), (1, 1), (31, 33), (257, 64), (600, 129)] {
            let x = normal::<f32>(rows * cols, 1);
            let want: Vec<f64> = (0..cols).map(|c| (0..rows).map(|r| f64::from(x[r * cols + c])).sum()).collect();
            let got = same_in_all_pools(|| {
                let mut out = poison::<f32>(cols);
                columns(&mut out, false, rows, Elements { x: &x, cols });
                let mut more = out.clone();
                columns(&mut more, true, rows, Elements { x: &x, cols });
                vec![out, more]
            });
            assert_close(&got[0], &want, 1e-5, "columns");
            assert_close(&got[1], &want.iter().map(|x| 2.0 * x).collect::<Vec<f64>>(), 1e-5, "accumulated");
        }
    }
}
