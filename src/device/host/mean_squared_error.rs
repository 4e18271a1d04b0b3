//! Mean squared error of predictions: the loss of each row, and the gradient.
//!
//! Sizes: predictions `x`, `targets` (rows, cols), cols 1 or more; `loss_rows` (rows).

use super::parallel::{CHUNK, expect_len, rows_per_chunk, vector_fn};
use super::real::Real;
use super::reduce;
use rayon::prelude::*;

/// `loss_rows = mean over the columns of (x - targets)^2`.
///
/// # Panics
/// When a length does not fit the sizes, or there are no columns.
pub fn forward<T: Real>(loss_rows: &mut [T], x: &[T], targets: &[T], rows: usize, cols: usize) {
    assert!(cols > 0, "mean_squared_error: rows of no columns have no mean");
    expect_len("mean_squared_error", "loss_rows", loss_rows.len(), rows);
    expect_len("mean_squared_error", "x", x.len(), rows * cols);
    expect_len("mean_squared_error", "targets", targets.len(), rows * cols);
    let chunk = rows_per_chunk(cols);
    loss_rows
        .par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk * cols).zip(targets.par_chunks(chunk * cols)))
        .for_each(|(loss, (x, targets))| forward_rows(loss, x, targets, cols));
}

vector_fn! {
    fn forward_rows<T: Real>(loss: &mut [T], x: &[T], targets: &[T], cols: usize) {
        let count = T::from_f64(cols as f64);
        for (loss, (x, targets)) in loss.iter_mut().zip(x.chunks_exact(cols).zip(targets.chunks_exact(cols))) {
            let [sum] = reduce::sums([x, targets], |[x, t]| [(x - t) * (x - t)]);
            *loss = sum / count;
        }
    }
}

/// `d_x = (x - targets) * (2 scale / cols)`; where `x` is `None`, `d_x` holds it.
///
/// # Panics
/// When the lengths differ.
pub fn grad<T: Real>(d_x: &mut [T], x: Option<&[T]>, targets: &[T], scale: f64, cols: usize) {
    expect_len("mean_squared_error grad", "x", x.map_or(d_x.len(), <[T]>::len), d_x.len());
    expect_len("mean_squared_error grad", "targets", targets.len(), d_x.len());
    let factor = T::from_f64(2.0 * scale / cols as f64);
    d_x.par_chunks_mut(CHUNK).zip(targets.par_chunks(CHUNK)).enumerate().for_each(|(i, (d_x, targets))| {
        let x = x.map(|x| &x[i * CHUNK..][..d_x.len()]);
        grad_chunk(d_x, x, targets, factor);
    });
}

vector_fn! {
    fn grad_chunk<T: Real>(d_x: &mut [T], x: Option<&[T]>, targets: &[T], factor: T) {
        match x {
            Some(x) => {
                for ((d, &x), &t) in d_x.iter_mut().zip(x).zip(targets) {
                    *d = (x - t) * factor;
                }
            }
            None => {
                for (d, &t) in d_x.iter_mut().zip(targets) {
                    *d = (*d - t) * factor;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::loss_sum::loss_sum;
    use crate::device::host::testing::{assert_close, finite_difference, normal, poison, same_in_all_pools};

    fn run<T: Real>(rows: usize, cols: usize) -> Vec<Vec<T>> {
        let (x, targets) = (normal::<T>(rows * cols, 1), normal::<T>(rows * cols, 2));
        let (mut loss_rows, mut loss) = (poison(rows), poison(1));
        forward(&mut loss_rows, &x, &targets, rows, cols);
        loss_sum(&mut loss, &loss_rows, 0.25);
        let (mut d_x, mut in_place) = (poison(rows * cols), x.clone());
        grad(&mut d_x, Some(&x), &targets, 0.25, cols);
        grad(&mut in_place, None, &targets, 0.25, cols);
        assert_eq!(d_x, in_place);
        vec![loss_rows, loss, d_x]
    }

    #[test]
    fn f32_like_f64_on_any_number_of_threads() {
        for (rows, cols) in [(0, 3), (1, 1), (5, 31), (31, 33), (257, 65), (3, 9001)] {
            let got = same_in_all_pools(|| run::<f32>(rows, cols));
            for (got, want) in got.iter().zip(run::<f64>(rows, cols)) {
                assert_close(got, &want, 1e-6, &format!("{rows}x{cols}"));
            }
        }
    }

    #[test]
    fn the_gradient_is_the_slope() {
        let (rows, cols) = (6, 9);
        let (x, targets) = (normal::<f64>(rows * cols, 1), normal::<f64>(rows * cols, 2));
        let slope = finite_difference(&x, |x| {
            let (mut loss_rows, mut loss) = (poison(rows), poison(1));
            forward(&mut loss_rows, x, &targets, rows, cols);
            loss_sum(&mut loss, &loss_rows, 0.25);
            loss[0]
        });
        assert_close(&run::<f64>(rows, cols)[2], &slope, 1e-9, "d_x");
    }

    /// The mean of the squares of all differences, and 2 / 6 of each.
    #[test]
    fn over_all_rows_it_is_torchs() {
        let (x, targets) = ([1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 3.0, 6.0, 5.0, 2.0]);
        let (mut loss_rows, mut loss, mut d_x) = (poison(2), poison(1), poison(6));
        forward(&mut loss_rows, &x, &targets, 2, 3);
        loss_sum(&mut loss, &loss_rows, 0.5);
        grad(&mut d_x, Some(&x), &targets, 0.5, 3);
        assert_close(&loss, &[25.0 / 6.0], 1e-7, "loss");
        assert_close(&d_x, &[1.0, 2.0, 0.0, -2.0, 0.0, 4.0].map(|d| d / 3.0), 1e-7, "d_x");
    }
}
