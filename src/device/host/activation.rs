//! Activation functions and their gradients.
//!
//! GELU after Hendrycks & Gimpel 2016, "Gaussian error linear units", arXiv:1606.08415: x Φ(x), with Φ by the error
//! function, or by tanh as GPT-2 has it (`gelu_new` in transformers).

use super::parallel::{self, Binary, Unary};
use super::real::Real;
use crate::graph::kinds::Activation;

/// Evaluates an expression in which a name stands for the type of an activation: `of_kind!(kind, F => map::<T, F>(out,
/// x))`.
macro_rules! of_kind {
    ($kind:expr, $F:ident => $body:expr) => {{
        use crate::device::host::activation::{GeluErf, GeluTanh, Identity, Relu, Silu};
        use crate::graph::kinds::Activation;
        macro_rules! with {
            ($of:ty) => {{
                type $F = $of;
                $body
            }};
        }
        match $kind {
            Activation::None => with!(Identity),
            Activation::Relu => with!(Relu),
            Activation::GeluTanh => with!(GeluTanh),
            Activation::GeluErf => with!(GeluErf),
            Activation::Silu => with!(Silu),
        }
    }};
}
pub(super) use of_kind;

/// `out = activation(x)`, elementwise; where `x` is `None`, `out` holds it.
///
/// # Panics
/// When the lengths differ.
pub fn forward<T: Real>(out: &mut [T], x: Option<&[T]>, activation: Activation) {
    if activation == Activation::None && x.is_none() {
        return;
    }
    of_kind!(activation, F => parallel::map::<T, F>(out, x));
}

/// `d_x = d_y * activation'(pre)`, elementwise; where `d_y` is `None`, `d_x` holds it. `pre` is what the activation was
/// given.
///
/// # Panics
/// When the lengths differ.
pub fn grad<T: Real>(d_x: &mut [T], d_y: Option<&[T]>, pre: &[T], activation: Activation) {
    if activation == Activation::None && d_y.is_none() {
        return;
    }
    of_kind!(activation, F => parallel::zip::<T, F>(d_x, d_y, pre));
}

/// x. As types: the value is [`Unary`], the gradient from d_y and x is [`Binary`].
pub(super) struct Identity;
/// max(x, 0).
pub(super) struct Relu;
/// x Φ(x), with Φ by tanh.
pub(super) struct GeluTanh;
/// x Φ(x), exactly.
pub(super) struct GeluErf;
/// x σ(x), with the logistic function.
pub(super) struct Silu;

/// sqrt(2/pi).
const SLOPE: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044715;

impl<T: Real> Unary<T> for Identity {
    #[inline(always)]
    fn apply(x: T) -> T {
        x
    }
}

impl<T: Real> Binary<T> for Identity {
    #[inline(always)]
    fn apply(d_y: T, _: T) -> T {
        d_y
    }
}

impl<T: Real> Unary<T> for Relu {
    #[inline(always)]
    fn apply(x: T) -> T {
        x.max(T::ZERO)
    }
}

impl<T: Real> Binary<T> for Relu {
    #[inline(always)]
    fn apply(d_y: T, x: T) -> T {
        if x <= T::ZERO { T::ZERO } else { d_y }
    }
}

impl<T: Real> Unary<T> for GeluTanh {
    #[inline(always)]
    fn apply(x: T) -> T {
        let u = x * (x * x).mul_add(T::from_f64(SLOPE * CUBIC), T::from_f64(SLOPE));
        let half = T::from_f64(0.5) * x;
        half.mul_add(u.tanh(), half)
    }
}

impl<T: Real> Binary<T> for GeluTanh {
    #[inline(always)]
    fn apply(d_y: T, x: T) -> T {
        // With t = tanh(u): y' = (1 + t)/2 + x/2 (1 - t^2) u', u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2).
        let square = x * x;
        let t = (x * square.mul_add(T::from_f64(SLOPE * CUBIC), T::from_f64(SLOPE))).tanh();
        let slope = square.mul_add(T::from_f64(3.0 * SLOPE * CUBIC), T::from_f64(SLOPE));
        // Far out u' overflows, where 1 - t^2 has long been 0.
        let flat = T::ONE - t * t;
        let inner = if flat == T::ZERO { T::ONE + t } else { (x * slope).mul_add(flat, T::ONE + t) };
        d_y * (T::from_f64(0.5) * inner)
    }
}

impl<T: Real> Unary<T> for GeluErf {
    #[inline(always)]
    fn apply(x: T) -> T {
        let half = T::from_f64(0.5) * x;
        half.mul_add((x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf(), half)
    }
}

impl<T: Real> Binary<T> for GeluErf {
    #[inline(always)]
    fn apply(d_y: T, x: T) -> T {
        // y' = Φ(x) + x φ(x), φ(x) = exp(-x^2 / 2) / sqrt(2 pi).
        let half = T::from_f64(0.5);
        let cdf = half.mul_add((x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).erf(), half);
        let density = (-(half * x * x)).exp() * T::from_f64(0.5 * SLOPE);
        d_y * x.mul_add(density, cdf)
    }
}

impl<T: Real> Unary<T> for Silu {
    #[inline(always)]
    fn apply(x: T) -> T {
        x / (T::ONE + (-x).exp())
    }
}

impl<T: Real> Binary<T> for Silu {
    #[inline(always)]
    fn apply(d_y: T, x: T) -> T {
        // y' = σ(x) (1 + x σ(-x)): of both logistic functions one is that of a number below 0, without cancellation.
        let (share, rest) = (T::ONE / (T::ONE + (-x).exp()), T::ONE / (T::ONE + x.exp()));
        d_y * (share * x.mul_add(rest, T::ONE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, dot, finite_difference, normal, poison, same_in_all_pools};

    #[test]
    fn known_values() {
        // The two formulas at these points, evaluated apart from this code in double precision.
        let x = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0];
        let tanh = [-0.0036373920817729943, -0.15880800939172324, -0.15428599017485606, 0.0];
        let erf = [-0.0040496940948933, -0.15865525393145707, -0.15426876936299344, 0.0];
        for (activation, want) in [(Activation::GeluTanh, tanh), (Activation::GeluErf, erf)] {
            let mut out = poison::<f64>(7);
            forward(&mut out, Some(&x), activation);
            assert_close(&out[..4], &want, 1e-10, "gelu");
            for i in 0..3 {
                // gelu(x) - gelu(-x) = x.
                assert!((out[6 - i] - out[i] - x[6 - i]).abs() < 1e-15);
            }
        }
        // torch.nn.functional.silu in double precision.
        let mut out = vec![-3.0, -1.0, 0.5, 3.0];
        forward(&mut out, None, Activation::Silu);
        assert_close(
            &out,
            &[-0.142_277_619_532_700_67, -0.268_941_421_369_995_1, 0.311_229_665_600_927_3, 2.857_722_380_467_299_3],
            1e-14,
            "silu",
        );
        let mut out = vec![-1f32, 0.0, 2.0, f32::NAN];
        forward(&mut out, None, Activation::Relu);
        assert!(out[..3] == [0.0, 0.0, 2.0] && out[3].is_nan());
    }

    #[test]
    fn far_out_nothing_overflows_into_nan() {
        for activation in [Activation::Relu, Activation::GeluTanh, Activation::GeluErf, Activation::Silu] {
            // The square of 1e20 is beyond f32, its cube of 1e13.
            for x in [-3e38f32, -1e20, -1e13, -1e4, 1e4, 1e13, 1e20, 3e38] {
                let (mut out, mut d_x) = (vec![x], vec![1f32]);
                forward(&mut out, None, activation);
                grad(&mut d_x, None, &[x], activation);
                assert_eq!((out[0], d_x[0]), (x.max(0.0), f32::from(x > 0.0)), "{activation:?} of {x}");
            }
            let mut d_x = vec![1f32];
            grad(&mut d_x, None, &[f32::NAN], activation);
            assert!(activation == Activation::Relu || d_x[0].is_nan(), "{activation:?} of NaN");
        }
    }

    #[test]
    fn f32_like_f64_in_place_or_not_on_any_number_of_threads() {
        for activation in Activation::ALL {
            for len in [0, 1, 31, 33, 1023, 20_000] {
                let (x, d_y) = (normal::<f32>(len, 1), normal::<f32>(len, 2));
                let got = same_in_all_pools(|| {
                    let (mut out, mut d_x) = (poison(len), poison(len));
                    forward(&mut out, Some(&x), activation);
                    grad(&mut d_x, Some(&d_y), &x, activation);
                    vec![out, d_x]
                });
                let (mut out, mut d_x) = (x.clone(), d_y.clone());
                forward(&mut out, None, activation);
                grad(&mut d_x, None, &x, activation);
                assert_eq!(got, [out, d_x], "{activation:?} in place");
                let (mut out, mut d_x) = (poison::<f64>(len), poison::<f64>(len));
                forward(&mut out, Some(&normal(len, 1)), activation);
                grad(&mut d_x, Some(&normal(len, 2)), &normal(len, 1), activation);
                // A few roundings of f32 on numbers below 10.
                assert_close(&got[0], &out, 1e-6, "forward");
                assert_close(&got[1], &d_x, 1e-6, "grad");
            }
        }
    }

    #[test]
    fn gradients_are_slopes() {
        for activation in Activation::ALL {
            let (x, d_y) = (normal::<f64>(301, 1), normal::<f64>(301, 2));
            let mut d_x = poison::<f64>(301);
            grad(&mut d_x, Some(&d_y), &x, activation);
            let slope = finite_difference(&x, |x| {
                let mut out = poison(301);
                forward(&mut out, Some(x), activation);
                dot(&out, &d_y)
            });
            assert_close(&d_x, &slope, 1e-7, &format!("{activation:?}"));
        }
    }
}
