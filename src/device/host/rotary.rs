//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), with the pairs of Llama's weights.
//!
//! Sizes: x, out (batch * positions, cols), whose rows begin with `heads` heads of `width`. With `a = x[i]` and `b =
//! x[i + width/2]` of a head and the angle `p = t base^(-2i/width)` at position t: `out[i] = a cos p - b sin p`, `out[i
//! + width/2] = b cos p + a sin p`, both times the rotation's stretch. What lies behind the heads is copied.

use super::parallel::{expect_len, rows_per_chunk, with_scratch};
use super::real::Real;
use crate::graph::Rotation;
use rayon::prelude::*;

/// Turns every row's heads by its position; where `x` is `None`, `out` holds it. Overwrites `out`. Turning `back` is
/// the gradient.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn turn<T: Real>(out: &mut [T], x: Option<&[T]>, rotation: &Rotation, positions: usize, cols: usize) {
    if let Some(x) = x {
        expect_len("rotary", "x", x.len(), out.len());
    }
    if out.is_empty() {
        return;
    }
    let (rows, half) = (rows_per_chunk(cols), rotation.width / 2);
    out.par_chunks_mut(rows * cols).enumerate().for_each(|(chunk, out)| {
        with_scratch::<T, _>(2 * half, |angles| {
            let (cos, sin) = angles.split_at_mut(half);
            for (r, out) in out.chunks_exact_mut(cols).enumerate() {
                let row = chunk * rows + r;
                if let Some(x) = x {
                    out.copy_from_slice(&x[row * cols..][..cols]);
                }
                set_angles(cos, sin, rotation, row % positions);
                for head in out[..rotation.heads * rotation.width].chunks_exact_mut(rotation.width.max(1)) {
                    turn_head(head, cos, sin);
                }
            }
        });
    });
}

/// Cosines and sines of `position`, taken in f64 and rounded once: an f32 angle of a thousand turns would be off by
/// 1e-4.
fn set_angles<T: Real>(cos: &mut [T], sin: &mut [T], rotation: &Rotation, position: usize) {
    for (i, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
        let angle = position as f64 * rotation.frequency(i);
        let (s, c) = angle.sin_cos();
        *cos = T::from_f64(rotation.stretch() * c);
        *sin = T::from_f64(rotation.stretch() * if rotation.back { -s } else { s });
    }
}

fn turn_head<T: Real>(head: &mut [T], cos: &[T], sin: &[T]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, dot, normal, poison, same_in_all_pools};
    use crate::graph::RotaryScaling;

    /// batch, positions, heads, width, columns behind the heads
    const SHAPES: [[usize; 5]; 7] = [
        [1, 1, 1, 2, 0],
        [2, 3, 1, 2, 1],
        [0, 3, 2, 4, 0],
        [2, 31, 3, 6, 5],
        [1, 1025, 1, 64, 0],
        [3, 7, 0, 4, 3],
        [2, 5, 3, 0, 4],
    ];

    fn run<T: Real>([batch, positions, heads, width, rest]: [usize; 5], back: bool) -> Vec<T> {
        let cols = heads * width + rest;
        let x = normal::<T>(batch * positions * cols, 1);
        let rotation = Rotation { heads, width, base: 10_000.0, scaling: RotaryScaling::None, back };
        let (mut out, mut over) = (poison(x.len()), x.clone());
        turn(&mut out, Some(&x), &rotation, positions, cols);
        turn(&mut over, None, &rotation, positions, cols);
        assert_eq!(out, over, "in place");
        out
    }

    #[test]
    fn f32_like_f64_on_any_number_of_threads() {
        for shape in SHAPES {
            let got = same_in_all_pools(|| vec![run::<f32>(shape, false)]);
            // Products and a sum, each rounded once; the angles are exact.
            assert_close(&got[0], &run::<f64>(shape, false), 1e-6, &format!("{shape:?}"));
        }
    }

    /// The pairs as transformers writes them: `x * cos + rotate_half(x) * sin`, with angles that repeat after half the
    /// width.
    #[test]
    fn like_the_definition() {
        let (positions, heads, width) = (5, 2, 6);
        let x = normal::<f64>(positions * 13, 1);
        let mut out = poison(x.len());
        turn(
            &mut out,
            Some(&x),
            &Rotation { heads, width, base: 500.0, scaling: RotaryScaling::None, back: false },
            positions,
            13,
        );
        for t in 0..positions {
            for c in 0..13 {
                let (head, i) = (c / width, c % width);
                let pair = i % 3;
                let at = |i: usize| x[t * 13 + head * width + i];
                let turned_half = |i: usize| if i < 3 { -at(i + 3) } else { at(i - 3) };
                let angle = t as f64 * 500f64.powf(-2.0 * pair as f64 / width as f64);
                let want = if c < 12 { at(i) * angle.cos() + turned_half(i) * angle.sin() } else { x[t * 13 + c] };
                assert!((out[t * 13 + c] - want).abs() < 1e-12, "{t} {c}");
            }
        }
    }

    /// Llama 3.1's rule as transformers writes it, by wavelengths; with 8 times 64 positions every branch is met.
    #[test]
    fn angles_are_slowed_as_in_transformers() {
        let scaling = RotaryScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, positions: 64 };
        let rotation = Rotation { heads: 1, width: 32, base: 10_000.0, scaling, back: false };
        let mut met = [0; 3];
        for i in 0..16 {
            let frequency = 10_000f64.powf(-2.0 * i as f64 / 32.0);
            let wavelength = std::f64::consts::TAU / frequency;
            let (branch, want) = if wavelength > 64.0 / 1.0 {
                (0, frequency / 8.0)
            } else if wavelength < 64.0 / 4.0 {
                (1, frequency)
            } else {
                let smooth = (64.0 / wavelength - 1.0) / (4.0 - 1.0);
                (2, (1.0 - smooth) * frequency / 8.0 + smooth * frequency)
            };
            met[branch] += 1;
            assert!((rotation.frequency(i) / want - 1.0).abs() < 1e-12, "pair {i}");
            let linear = Rotation { scaling: RotaryScaling::Linear { factor: 8.0 }, ..rotation };
            assert!((linear.frequency(i) * 8.0 / frequency - 1.0).abs() < 1e-12, "pair {i}");
            let none = Rotation { scaling: RotaryScaling::None, ..rotation };
            assert_eq!(none.frequency(i), (i as f64 * none.per_pair()).exp2(), "pair {i}");
        }
        assert!(met.iter().all(|&n| n > 0), "{met:?}");
    }

    /// What transformers makes of YaRN in f32, for heads of 128: of Qwen2.5 with its advised factor, and with limits
    /// that are no whole pairs.
    #[test]
    fn yarns_angles_are_those_of_transformers() {
        let yarn = |factor, positions, whole| RotaryScaling::Yarn {
            factor,
            low: 1.0,
            high: 32.0,
            positions,
            whole,
            stretch: 1.0,
        };
        let pairs = [0, 15, 25, 30, 35, 40, 63];
        for (base, scaling, want) in [
            (
                1e6,
                yarn(4.0, 32768, true),
                [1.0, 0.03924189880, 0.004131738096, 0.001064360957, 2.462583943e-4, 4.445698505e-5, 3.102344408e-7],
            ),
            (
                1e4,
                yarn(40.0, 4096, false),
                [1.0, 0.1154782027, 0.02288793586, 0.008446235210, 0.002798499307, 7.226381567e-4, 2.886954690e-6],
            ),
        ] {
            let rotation = Rotation { heads: 1, width: 128, base, scaling, back: false };
            for (i, want) in pairs.into_iter().zip(want) {
                let found = rotation.frequency(i);
                assert!((found / want - 1.0).abs() < 1e-6, "base {base}, pair {i}: {found:e}, want {want:e}");
            }
        }
    }

    #[test]
    fn turning_back_is_the_inverse_and_the_gradient() {
        let (positions, cols) = (7, 3 * 4 + 2);
        let (x, d_y) = (normal::<f64>(2 * positions * cols, 1), normal::<f64>(2 * positions * cols, 2));
        let rotation = Rotation { heads: 3, width: 4, base: 10_000.0, scaling: RotaryScaling::None, back: false };
        let back = Rotation { back: true, ..rotation };
        let [mut y, mut again, mut d_x] = [(); 3].map(|()| poison(x.len()));
        turn(&mut y, Some(&x), &rotation, positions, cols);
        turn(&mut again, Some(&y), &back, positions, cols);
        assert_close(&again, &x, 1e-13, "there and back");
        // <d_y, R x> = <R^T d_y, x>: turning is linear, so its gradient is its transpose.
        turn(&mut d_x, Some(&d_y), &back, positions, cols);
        assert!((dot(&y, &d_y) - dot(&x, &d_x)).abs() < 1e-12);
    }
}
