//! Which of the calls of criterion's body are samples.

/// Leaves the last `counted` of what was measured: criterion calls the body as often as it has samples, but before that
/// for as long as it warms up.
pub fn drop_warm_up(samples: &mut Vec<f64>, counted: usize) {
    samples.drain(..samples.len().saturating_sub(counted));
}
