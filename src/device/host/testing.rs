//! What the tests of the op bodies share: seeded vectors, poison, pools of threads, finite differences.

use crate::base::philox::Sequence;
use crate::device::host::real::Real;

/// `len` standard normal numbers; the same for one `stream`, and the same in f32 and f64 up to rounding.
pub fn normal<T: Real>(len: usize, stream: u64) -> Vec<T> {
    let mut sequence = Sequence::new(0x5eed, stream);
    // Through f32, so that the f64 oracle sees exactly the f32 body's input.
    (0..len).map(|_| T::from_f64(f64::from(sequence.normal() as f32))).collect()
}

/// `len` NaNs, to be overwritten: whatever is read before it is written shows.
pub fn poison<T: Real>(len: usize) -> Vec<T> {
    vec![T::from_f64(f64::NAN); len]
}

/// Runs `body` in pools of 1, 2 and 3 threads and checks that its results have the same bits; returns them.
pub fn same_in_all_pools<T: Real>(body: impl Fn() -> Vec<Vec<T>> + Sync) -> Vec<Vec<T>> {
    let mut first: Option<Vec<Vec<T>>> = None;
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
        let result = pool.install(&body);
        match &first {
            None => first = Some(result),
            Some(first) => {
                for (i, (a, b)) in first.iter().zip(&result).enumerate() {
                    let same = bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b);
                    assert!(same, "result {i} differs between 1 and {threads} threads");
                }
            }
        }
    }
    first.expect("the loop ran")
}

/// Checks that `got` is near `want`: within `tolerance` times the greatest magnitude of `want` (at least 1).
pub fn assert_close<A: Real, B: Real>(got: &[A], want: &[B], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().map(|w| w.to_f64().abs()).filter(|w| w.is_finite()).fold(1.0, f64::max);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let (g, w) = (g.to_f64(), w.to_f64());
        assert!(g == w || (g - w).abs() <= tolerance * scale, "{what}[{i}]: {g}, want {w}");
    }
}

/// The gradient of `f` at `x` by central differences: (f(x + h) - f(x - h)) / 2h in every element.
pub fn finite_difference(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    // The cube root of f64's epsilon balances rounding against truncation.
    let h = 6e-6;
    let mut moved = x.to_vec();
    (0..x.len())
        .map(|i| {
            moved[i] = x[i] + h;
            let above = f(&moved);
            moved[i] = x[i] - h;
            let below = f(&moved);
            moved[i] = x[i];
            (above - below) / (2.0 * h)
        })
        .collect()
}

/// The sum of products of two vectors: a loss whose gradient with respect to `a` is `b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
