//! The two floating-point types that the host's op bodies are written for.
//!
//! f32 is what trains; f64 is the same code as an oracle. `exp`, `ln`, `tanh` and `erf` of f32 are polynomials of our
//! own without branches, so that loops over them vectorise and give the same bits in every lane and on every machine;
//! f64 takes the standard library's (and libm's `erf`).

use crate::base::DType;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// f32 or f64.
pub trait Real:
    bytemuck::Pod
    + Default
    + PartialOrd
    + Send
    + Sync
    + std::fmt::Debug
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// The element type.
    const DTYPE: DType;
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The nearest value to `x`.
    fn from_f64(x: f64) -> Self;
    /// The value as f64, exactly.
    fn to_f64(self) -> f64;
    /// `self * a + b`, rounded once. Compiled inside [`crate::device::host::parallel::simd`] it is one instruction;
    /// outside, a slow call.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Square root, rounded correctly.
    fn sqrt(self) -> Self;
    /// e to the power of `self`.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;
    /// The greater of the two; a NaN on either side stays a NaN.
    fn max(self, other: Self) -> Self;
}

impl Real for f64 {
    const DTYPE: DType = DType::F64;
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;

    #[inline(always)]
    fn from_f64(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: f64, b: f64) -> f64 {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    #[inline(always)]
    fn tanh(self) -> f64 {
        f64::tanh(self)
    }
    #[inline(always)]
    fn erf(self) -> f64 {
        libm::erf(self)
    }
    #[inline(always)]
    fn max(self, other: f64) -> f64 {
        if self > other || self.is_nan() { self } else { other }
    }
}

impl Real for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;

    #[inline(always)]
    fn from_f64(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn mul_add(self, a: f32, b: f32) -> f32 {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }

    #[inline(always)]
    fn exp(self) -> f32 {
        // Below -105 the result rounds to 0, above 89 to infinity; a comparison with NaN is false, so NaN passes.
        let x = if self > 89.0 { 89.0 } else { self };
        let x = if x < -105.0 { -105.0 } else { x };
        let (n, r) = exp_reduce(x);
        let y = 1.0 + exp_minus_one_reduced(r);
        // Two factors, since 2^n alone is out of range at both ends.
        let half = n >> 1;
        y * power_of_two(half) * power_of_two(n.wrapping_sub(half))
    }

    #[inline(always)]
    fn ln(self) -> f32 {
        // x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); ln(1 + f) = 2s + s R(s^2), s = f / (2 + f).
        let subnormal = self < f32::MIN_POSITIVE;
        let x = if subnormal { self * 16_777_216.0 } else { self };
        let bits = (x.to_bits() as i32).wrapping_sub(0x3f35_04f3); // sqrt(1/2)
        let e = (bits >> 23) as f32 - if subnormal { 24.0 } else { 0.0 };
        let f = f32::from_bits(((bits & 0x007f_ffff) + 0x3f35_04f3) as u32) - 1.0;
        let s = f / (2.0 + f);
        let z = s * s;
        // The first four terms of atanh's series; the fifth is below 2e-9 of the result.
        let r = z * f32::mul_add(f32::mul_add(f32::mul_add(2.222_222_2e-1, z, 2.857_143e-1), z, 0.4), z, 6.666_667e-1);
        let half_square = 0.5 * f * f;
        let low = f32::mul_add(s, half_square + r, e * 1.428_606_8e-6);
        let y = f32::mul_add(e, LN2_HIGH, f - (half_square - low));
        let y = if self == 0.0 { f32::NEG_INFINITY } else { y };
        let y = if self < 0.0 { f32::NAN } else { y };
        // Infinity and NaN.
        if self < f32::INFINITY { y } else { self }
    }

    #[inline(always)]
    fn tanh(self) -> f32 {
        // tanh x = m / (m + 2) with m = e^(2x) - 1, for |x|; from 10 on the result rounds to 1.
        let x = self.abs();
        let x = if x > 10.0 { 10.0 } else { x };
        let (n, r) = exp_reduce(2.0 * x);
        let scale = power_of_two(n);
        let m = f32::mul_add(scale, exp_minus_one_reduced(r), scale - 1.0);
        (m / (m + 2.0)).copysign(self)
    }

    #[inline(always)]
    fn erf(self) -> f32 {
        // Two ranges: x + x P(x^2), and 1 - exp(-Q(|x|)) with Q near -ln(erfc). P and Q interpolate at Chebyshev points
        // of [0, 0.86] (in x^2) and [0.92, 4]; their errors are 5e-10 and 2e-8. From 4 on the result rounds to 1.
        let x = self.abs();
        let x = if x > 4.0 { 4.0 } else { x };
        let z = x * x;
        let p = horner(
            z,
            [
                8.351_897e-5,
                -8.138_792_5e-4,
                5.200_729_7e-3,
                -2.685_929_6e-2,
                1.128_369_4e-1,
                -3.761_263_5e-1,
                1.283_791_7e-1,
            ],
        );
        let small = f32::mul_add(x, p, x);
        let q = horner(
            x,
            [
                -1.643_569_7e-6,
                4.617_791_3e-5,
                -5.977_435e-4,
                4.763_575_3e-3,
                -2.643_101_8e-2,
                1.100_944_8e-1,
                6.318_145_4e-1,
                1.130_237_6,
                -3.204_415_3e-4,
            ],
        );
        let large = 1.0 - Real::exp(-q);
        (if x < 0.925 { small } else { large }).copysign(self)
    }

    #[inline(always)]
    fn max(self, other: f32) -> f32 {
        if self > other || self.is_nan() { self } else { other }
    }
}

/// The high bits of ln 2: few enough that a product with an exponent is exact.
const LN2_HIGH: f32 = 0.693_145_75;

/// `x = n ln 2 + r` with r in about [-ln(2)/2, ln(2)/2].
#[inline(always)]
fn exp_reduce(x: f32) -> (i32, f32) {
    // Adding 1.5 * 2^23 leaves no bits for a fraction: the sum rounds to the nearest integer, in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = f32::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = f32::mul_add(n, -1.428_606_8e-6, f32::mul_add(n, -LN2_HIGH, x));
    ((shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32), r)
}

/// e^r - 1 for |r| up to ln(2)/2: r + r^2 Q(r), where Q interpolates at Chebyshev points with an error of 7e-8.
#[inline(always)]
fn exp_minus_one_reduced(r: f32) -> f32 {
    let q = horner(r, [1.392_620_4e-3, 8.363_195e-3, 4.166_655_6e-2, 1.666_657_6e-1, 0.5]);
    f32::mul_add(r * r, q, r)
}

/// 2^n for n in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23) as u32)
}

/// The polynomial with these coefficients, the highest power first.
#[inline(always)]
fn horner<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut y = coefficients[0];
    for i in 1..N {
        y = f32::mul_add(y, x, coefficients[i]);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::parallel::simd;

    /// The greatest error of `f` over `xs`, in units of the last place of the correctly rounded value.
    fn worst_ulps(xs: &[f32], f: impl Fn(f32) -> f32, oracle: impl Fn(f64) -> f64) -> (f64, f32) {
        let got: Vec<f32> = simd(|| xs.iter().map(|&x| f(x)).collect());
        let mut worst = (0.0, 0.0);
        for (&x, y) in xs.iter().zip(got) {
            let want = oracle(f64::from(x));
            let nearest = want as f32;
            if nearest.is_infinite() || nearest == 0.0 {
                assert!(y == nearest, "f({x}) = {y}, want {nearest}");
                continue;
            }
            let ulp = f64::from(f32::from_bits(nearest.abs().to_bits() + 1)) - f64::from(nearest.abs());
            let error = (f64::from(y) - want).abs() / ulp;
            assert!(error.is_finite(), "f({x}) = {y}, want {want}");
            if error > worst.0 {
                worst = (error, x);
            }
        }
        worst
    }

    fn grid(low: f64, high: f64, points: usize) -> Vec<f32> {
        (0..=points).map(|i| (low + (high - low) * i as f64 / points as f64) as f32).collect()
    }

    /// Magnitudes from 1e-30 to 10, both signs.
    fn magnitudes() -> Vec<f32> {
        let up = grid(-30.0, 1.0, 100_000).into_iter().map(|p| 10f64.powf(f64::from(p)) as f32);
        up.flat_map(|x| [x, -x]).collect()
    }

    #[test]
    fn close_to_f64() {
        let wide = grid(-110.0, 95.0, 2_000_000);
        let near = grid(-12.0, 12.0, 2_000_000);
        type Check = (&'static str, Vec<f32>, fn(f32) -> f32, fn(f64) -> f64, f64);
        let checks: [Check; 8] = [
            ("exp", wide, Real::exp, f64::exp, 1.5),
            ("exp near 0", magnitudes(), Real::exp, f64::exp, 1.5),
            ("tanh", near.clone(), Real::tanh, f64::tanh, 3.0),
            ("tanh near 0", magnitudes(), Real::tanh, f64::tanh, 3.0),
            ("erf", near, Real::erf, libm::erf, 2.0),
            ("erf near 0", magnitudes(), Real::erf, libm::erf, 2.0),
            ("ln", grid(1e-6, 20.0, 2_000_000), Real::ln, f64::ln, 1.5),
            ("ln of small", magnitudes().into_iter().map(f32::abs).collect(), Real::ln, f64::ln, 1.5),
        ];
        for (name, xs, f, oracle, tolerance) in checks {
            let (worst, at) = worst_ulps(&xs, f, oracle);
            assert!(worst <= tolerance, "{name}: {worst} ulp at {at}");
        }
    }

    #[test]
    fn the_ends_of_the_range() {
        let inf = f32::INFINITY;
        for x in [f32::NAN, -f32::NAN] {
            for y in [Real::exp(x), Real::ln(x), Real::tanh(x), Real::erf(x), Real::max(x, 1.0), Real::max(1.0, x)] {
                assert!(y.is_nan(), "{y}");
            }
        }
        assert_eq!([Real::exp(-inf), Real::exp(inf), Real::exp(0f32), Real::exp(-0f32)], [0.0, inf, 1.0, 1.0]);
        assert_eq!([Real::exp(f32::MIN), Real::exp(f32::MAX)], [0.0, inf]);
        assert_eq!([Real::ln(0f32), Real::ln(-0f32), Real::ln(inf), Real::ln(1f32)], [-inf, -inf, inf, 0.0]);
        assert!(Real::ln(-1f32).is_nan() && Real::ln(-inf).is_nan());
        assert_eq!([Real::tanh(inf), Real::tanh(-inf), Real::tanh(0f32)], [1.0, -1.0, 0.0]);
        assert_eq!([Real::erf(inf), Real::erf(-inf), Real::erf(0f32)], [1.0, -1.0, 0.0]);
        assert_eq!(Real::tanh(-0f32).to_bits(), (-0f32).to_bits());
        assert_eq!(Real::tanh(f32::from_bits(1)), f32::from_bits(1), "subnormal");
        assert_eq!((Real::max(2f32, 1.0), Real::max(-inf, 1.0)), (2.0, 1.0));
    }

    /// Compiled for any vector width, or for none, the bits are the same.
    #[test]
    fn same_bits_in_and_out_of_vectors() {
        let xs = grid(-100.0, 100.0, 4099);
        for f in [Real::exp as fn(f32) -> f32, Real::tanh, Real::erf, Real::ln] {
            let inside: Vec<u32> = simd(|| xs.iter().map(|&x| f(x).to_bits()).collect());
            let outside: Vec<u32> = xs.iter().map(|&x| f(x).to_bits()).collect();
            assert_eq!(inside, outside);
        }
        let vector: Vec<u32> = simd(|| xs.iter().map(|&x| Real::exp(x).to_bits()).collect());
        assert_eq!(vector, xs.iter().map(|&x| Real::exp(x).to_bits()).collect::<Vec<u32>>());
    }
}
