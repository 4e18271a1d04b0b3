//! Softmax and cross-entropy in one: the loss of each row of logits under its label, and the gradient.
//!
//! Sizes: logits (rows, cols); labels, loss_rows, lse (rows). A label of -100 leaves its row out, as in torch: its
//! loss, its lse and its gradient are 0, whatever its logits are. Labels are checked where data enters; another one out
//! of range is our own bug and panics.

use super::parallel::{expect_len, rows_per_chunk, vector_fn};
use super::real::Real;
use super::reduce;
use crate::base::IGNORED;
use rayon::prelude::*;

/// `loss_rows = lse - logits[label]`, where `lse` is the logarithm of the sum of the exponentials of the row. Both are
/// 0 in rows that do not count.
///
/// # Panics
/// When a length does not fit the sizes, or a label is outside 0..cols.
pub fn forward<T: Real>(loss_rows: &mut [T], lse: &mut [T], logits: &[T], labels: &[i32], rows: usize, cols: usize) {
    expect_len("cross_entropy", "loss_rows", loss_rows.len(), rows);
    expect_len("cross_entropy", "lse", lse.len(), rows);
    expect_len("cross_entropy", "logits", logits.len(), rows * cols);
    check_labels(labels, rows, cols);
    if logits.is_empty() {
        // Without classes no row counts.
        loss_rows.fill(T::ZERO);
        lse.fill(T::ZERO);
        return;
    }
    let chunk = rows_per_chunk(cols);
    loss_rows
        .par_chunks_mut(chunk)
        .zip(lse.par_chunks_mut(chunk))
        .zip(logits.par_chunks(chunk * cols).zip(labels.par_chunks(chunk)))
        .for_each(|((loss, lse), (logits, labels))| forward_rows(loss, lse, logits, labels, cols));
}

vector_fn! {
    fn forward_rows<T: Real>(loss: &mut [T], lse: &mut [T], logits: &[T], labels: &[i32], cols: usize) {
        for (((loss, lse), row), &label) in loss.iter_mut().zip(lse).zip(logits.chunks_exact(cols)).zip(labels) {
            if label == IGNORED {
                (*loss, *lse) = (T::ZERO, T::ZERO);
                continue;
            }
            let max = reduce::max(row);
            let sum = reduce::sum_of_exp(row, max);
            *lse = max + sum.ln();
            *loss = *lse - row[label as usize];
        }
    }
}

/// `d_logits = (softmax(logits) - onehot(label)) * scale`, 0 in rows that do not count; where `logits` is `None`,
/// `d_logits` holds them. `lse` is [`forward`]'s.
///
/// # Panics
/// When a length does not fit the sizes, or a label is outside 0..cols.
pub fn grad<T: Real>(
    d_logits: &mut [T],
    logits: Option<&[T]>,
    labels: &[i32],
    lse: &[T],
    scale: f64,
    rows: usize,
    cols: usize,
) {
    expect_len("cross_entropy grad", "d_logits", d_logits.len(), rows * cols);
    expect_len("cross_entropy grad", "lse", lse.len(), rows);
    if let Some(logits) = logits {
        expect_len("cross_entropy grad", "logits", logits.len(), rows * cols);
    }
    check_labels(labels, rows, cols);
    if d_logits.is_empty() {
        return;
    }
    let chunk = rows_per_chunk(cols);
    let scale = T::from_f64(scale);
    d_logits
        .par_chunks_mut(chunk * cols)
        .zip(lse.par_chunks(chunk).zip(labels.par_chunks(chunk)))
        .enumerate()
        .for_each(|(i, (d_logits, (lse, labels)))| {
            let logits = logits.map(|logits| &logits[i * chunk * cols..][..d_logits.len()]);
            grad_rows(d_logits, logits, labels, lse, scale, cols);
        });
}

vector_fn! {
    fn grad_rows<T: Real>(
        d_logits: &mut [T],
        logits: Option<&[T]>,
        labels: &[i32],
        lse: &[T],
        scale: T,
        cols: usize,
    ) {
        for (r, (d, (&lse, &label))) in d_logits.chunks_exact_mut(cols).zip(lse.iter().zip(labels)).enumerate() {
            if label == IGNORED {
                d.fill(T::ZERO);
                continue;
            }
            match logits {
                Some(logits) => {
                    let row = &logits[r * cols..][..cols];
                    for (d, &x) in d.iter_mut().zip(row) {
                        *d = (x - lse).exp() * scale;
                    }
                }
                None => {
                    for d in &mut *d {
                        *d = (*d - lse).exp() * scale;
                    }
                }
            }
            d[label as usize] += -scale;
        }
    }
}

fn check_labels(labels: &[i32], rows: usize, cols: usize) {
    expect_len("cross_entropy", "labels", labels.len(), rows);
    for &label in labels {
        let counts = label != IGNORED;
        assert!(!counts || (label as usize) < cols, "cross_entropy: label {label} is outside 0..{cols}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::philox::Sequence;
    use crate::device::host::loss_sum::loss_sum;
    use crate::device::host::testing::{assert_close, finite_difference, normal, poison, same_in_all_pools};

    fn labels(rows: usize, cols: usize) -> Vec<i32> {
        let mut sequence = Sequence::new(5, 5);
        (0..rows).map(|r| if r % 4 == 2 || cols == 0 { IGNORED } else { sequence.below(cols as u64) as i32 }).collect()
    }

    fn run<T: Real>(rows: usize, cols: usize) -> Vec<Vec<T>> {
        let (logits, labels) = (normal::<T>(rows * cols, 1), labels(rows, cols));
        let (mut loss_rows, mut lse, mut loss) = (poison(rows), poison(rows), poison(1));
        forward(&mut loss_rows, &mut lse, &logits, &labels, rows, cols);
        loss_sum(&mut loss, &loss_rows, 0.25);
        let (mut d_logits, mut in_place) = (poison(rows * cols), logits.clone());
        grad(&mut d_logits, Some(&logits), &labels, &lse, 0.25, rows, cols);
        grad(&mut in_place, None, &labels, &lse, 0.25, rows, cols);
        assert_eq!(d_logits, in_place);
        vec![loss_rows, lse, loss, d_logits]
    }

    #[test]
    fn f32_like_f64_on_any_number_of_threads() {
        for (rows, cols) in [(0, 3), (3, 0), (1, 1), (5, 31), (31, 33), (257, 65), (3, 9001)] {
            let got = same_in_all_pools(|| run::<f32>(rows, cols));
            for (got, want) in got.iter().zip(run::<f64>(rows, cols)) {
                assert_close(got, &want, 1e-6, &format!("{rows}x{cols}"));
            }
        }
    }

    #[test]
    fn the_gradient_is_the_slope() {
        let (rows, cols) = (6, 9);
        let logits = normal::<f64>(rows * cols, 1);
        let slope = finite_difference(&logits, |logits| {
            let (mut loss_rows, mut lse, mut loss) = (poison(rows), poison(rows), poison(1));
            forward(&mut loss_rows, &mut lse, logits, &labels(rows, cols), rows, cols);
            loss_sum(&mut loss, &loss_rows, 0.25);
            loss[0]
        });
        let got = run::<f64>(rows, cols);
        assert_close(&got[3], &slope, 1e-9, "d_logits");
        assert!(got[0][2] == 0.0 && got[3][2 * cols..3 * cols].iter().all(|&d| d == 0.0), "a row that does not count");
    }

    /// Whatever the logits of a row are that does not count, nothing of them comes through.
    #[test]
    fn a_row_that_does_not_count_is_not_read() {
        let logits = [f32::NAN, 1.0, f32::INFINITY, 0.0, 0.0, 0.0];
        let (mut loss_rows, mut lse, mut d_logits) = (poison(2), poison(2), poison(6));
        forward(&mut loss_rows, &mut lse, &logits, &[IGNORED, 1], 2, 3);
        grad(&mut d_logits, Some(&logits), &[IGNORED, 1], &lse, 0.25, 2, 3);
        assert_eq!((loss_rows[0], lse[0], &d_logits[..3]), (0.0, 0.0, &[0.0; 3][..]));
        assert!(lse[1] > 0.0 && d_logits[3..].iter().all(|&d| d != 0.0), "the row that counts");
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_shows() {
        let logits = [1e4f32, 0.0, -1e4, 0.0, f32::NAN, 0.0];
        let (mut loss, mut lse) = (poison(2), poison(2));
        forward(&mut loss, &mut lse, &logits, &[1, 0], 2, 3);
        assert_eq!(loss[0], 1e4);
        assert!(loss[1].is_nan());
    }
}
