//! Softmax and cross-entropy in one: the loss of each row of logits under its label, and the gradient.
//!
//! Sizes: logits (rows, cols); labels, loss_rows (rows). A label of -100 leaves its row out, as in torch: its loss and its
//! gradient are 0, whatever its logits are. Labels are checked where data enters; another one out of range is our own bug
//! and panics.

use super::parallel::{expect_len, rows_per_chunk, vector_fn};
use super::real::Real;
use super::reduce;
use crate::base::IGNORED;
use rayon::prelude::*;

/// `loss_rows = lse - logits[label]`, where `lse` is the logarithm of the sum of the exponentials of the row; 0 in rows
/// that do not count.
///
/// # Panics
/// When a length does not fit the sizes, or a label is outside 0..cols.
pub fn forward<T: Real>(loss_rows: &mut [T], logits: &[T], labels: &[i32], rows: usize, cols: usize) {
    expect_len("cross_entropy", "loss_rows", loss_rows.len(), rows);
    expect_len("cross_entropy", "logits", logits.len(), rows * cols);
    check_labels(labels, rows, cols);
    if logits.is_empty() {
        // Without classes no row counts.
        return loss_rows.fill(T::ZERO);
    }
    let chunk = rows_per_chunk(cols);
    let rows = logits.par_chunks(chunk * cols).zip(labels.par_chunks(chunk));
    let losses = loss_rows.par_chunks_mut(chunk);
    losses.zip(rows).for_each(|(losses, (logits, labels))| forward_rows(losses, logits, labels, cols));
}

vector_fn! {
    fn forward_rows<T: Real>(losses: &mut [T], logits: &[T], labels: &[i32], cols: usize) {
        for ((loss, row), &label) in losses.iter_mut().zip(logits.chunks_exact(cols)).zip(labels) {
            *loss = if label == IGNORED { T::ZERO } else { log_sum_exp(row) - row[label as usize] };
        }
    }
}

#[inline(always)]
fn log_sum_exp<T: Real>(row: &[T]) -> T {
    let max = reduce::max(row);
    max + reduce::sum_of_exp(row, max).ln()
}

/// `d_logits = (softmax(logits) - onehot(label)) * scale`, 0 in rows that do not count; where `logits` is `None`,
/// `d_logits` holds them. `loss_rows`, where given, is as by [`forward`]. A row is read the second time where the first has
/// left it.
///
/// # Panics
/// When a length does not fit the sizes, or a label is outside 0..cols.
pub fn grad<T: Real>(
    d_logits: &mut [T],
    loss_rows: Option<&mut [T]>,
    logits: Option<&[T]>,
    labels: &[i32],
    scale: f64,
    rows: usize,
    cols: usize,
) {
    expect_len("cross_entropy grad", "d_logits", d_logits.len(), rows * cols);
    if let Some(loss_rows) = &loss_rows {
        expect_len("cross_entropy grad", "loss_rows", loss_rows.len(), rows);
    }
    if let Some(logits) = logits {
        expect_len("cross_entropy grad", "logits", logits.len(), rows * cols);
    }
    check_labels(labels, rows, cols);
    if d_logits.is_empty() {
        return loss_rows.into_iter().for_each(|losses| losses.fill(T::ZERO));
    }
    let chunk = rows_per_chunk(cols);
    let scale = T::from_f64(scale);
    let some = |(i, (d, labels)): (usize, (&mut [T], &[i32])), losses: Option<&mut [T]>| {
        let logits = logits.map(|logits| &logits[i * chunk * cols..][..d.len()]);
        grad_rows(d, losses, logits, labels, scale, cols);
    };
    let chunks = d_logits.par_chunks_mut(chunk * cols).zip(labels.par_chunks(chunk)).enumerate();
    match loss_rows {
        Some(losses) => chunks.zip(losses.par_chunks_mut(chunk)).for_each(|(rows, losses)| some(rows, Some(losses))),
        None => chunks.for_each(|rows| some(rows, None)),
    }
}

vector_fn! {
    fn grad_rows<T: Real>(
        d_logits: &mut [T],
        losses: Option<&mut [T]>,
        logits: Option<&[T]>,
        labels: &[i32],
        scale: T,
        cols: usize,
    ) {
        let mut losses = losses.map(|losses| losses.iter_mut());
        for (r, (d, &label)) in d_logits.chunks_exact_mut(cols).zip(labels).enumerate() {
            let mut loss = T::ZERO;
            if label == IGNORED {
                d.fill(T::ZERO);
            } else {
                let row = logits.map(|logits| &logits[r * cols..][..cols]);
                let of = row.unwrap_or(d);
                let lse = log_sum_exp(of);
                loss = lse - of[label as usize];
                match row {
                    Some(row) => {
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
            if let Some(to) = losses.as_mut().and_then(Iterator::next) {
                *to = loss;
            }
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
        let (mut loss_rows, mut again, mut loss) = (poison(rows), poison(rows), poison(1));
        forward(&mut loss_rows, &logits, &labels, rows, cols);
        loss_sum(&mut loss, &loss_rows, 0.25);
        let (mut d_logits, mut in_place) = (poison(rows * cols), logits.clone());
        grad(&mut d_logits, None, Some(&logits), &labels, 0.25, rows, cols);
        grad(&mut in_place, Some(&mut again), None, &labels, 0.25, rows, cols);
        assert_eq!((&d_logits, &loss_rows), (&in_place, &again));
        vec![loss_rows, loss, d_logits]
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
            let (mut loss_rows, mut loss) = (poison(rows), poison(1));
            forward(&mut loss_rows, logits, &labels(rows, cols), rows, cols);
            loss_sum(&mut loss, &loss_rows, 0.25);
            loss[0]
        });
        let got = run::<f64>(rows, cols);
        assert_close(&got[2], &slope, 1e-9, "d_logits");
        assert!(got[0][2] == 0.0 && got[2][2 * cols..3 * cols].iter().all(|&d| d == 0.0), "a row that does not count");
    }

    /// Whatever the logits of a row are that does not count, nothing of them comes through.
    #[test]
    fn a_row_that_does_not_count_is_not_read() {
        let logits = [f32::NAN, 1.0, f32::INFINITY, 0.0, 0.0, 0.0];
        let (mut loss_rows, mut d_logits) = (poison(2), poison(6));
        forward(&mut loss_rows, &logits, &[IGNORED, 1], 2, 3);
        grad(&mut d_logits, None, Some(&logits), &[IGNORED, 1], 0.25, 2, 3);
        assert_eq!((loss_rows[0], &d_logits[..3]), (0.0, &[0.0; 3][..]));
        assert!(loss_rows[1] > 0.0 && d_logits[3..].iter().all(|&d| d != 0.0), "the row that counts");
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_shows() {
        let logits = [1e4f32, 0.0, -1e4, 0.0, f32::NAN, 0.0];
        let mut loss = poison(2);
        forward(&mut loss, &logits, &[1, 0], 2, 3);
        assert_eq!(loss[0], 1e4);
        assert!(loss[1].is_nan());
    }
}
