//! A microbatch's loss: the sum over its rows, whichever loss it is.

use super::real::Real;

/// `loss[0] = scale * sum of loss_rows`, summed in order in f64.
///
/// # Panics
/// When `loss` is empty.
pub fn loss_sum<T: Real>(loss: &mut [T], loss_rows: &[T], scale: f64) {
    loss[0] = T::from_f64(loss_rows.iter().map(|x| x.to_f64()).sum::<f64>() * scale);
}
