//! The two floating-point types that the host's op bodies are written for, and the matrix product they share.
//!
//! f32 is what trains; f64 is the same code as an oracle. `exp`, `tanh` and `erf` of f32 are polynomials of our own, so that
//! loops over them vectorise and give the same bits in every lane; f64 takes the standard library's.

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
    /// `self * a + b`, rounded once. Compiled inside [`crate::device::host::parallel::simd`] it is one instruction; outside, a slow call.
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
