//! Launches of `kernels/optimizer.cu`: updates, sums of squares, sums of accumulators, and the look for what is not finite.

use super::launch::{Ptr, Queue};
use crate::base::{Error, Result};
use crate::device::{Norm, Span, Update};

/// `acc[i] += x[i]` over `elems` floats.
pub(super) fn add(_q: &mut Queue, _acc: Ptr, _x: Ptr, _elems: usize) -> Result<()> {
    Err(Error::bad("optimizer::add has no kernel yet"))
}

/// Sums of squares by tensor; `at` gives a span's address.
pub(super) fn norm(_q: &mut Queue, _norm: &Norm, _at: &dyn Fn(Span) -> Ptr) -> Result<()> {
    Err(Error::bad("optimizer::norm has no kernel yet"))
}

/// An update of a shard's flat state.
pub(super) fn update(_q: &mut Queue, _update: &Update, _at: &dyn Fn(Span) -> Ptr) -> Result<()> {
    Err(Error::bad("optimizer::update has no kernel yet"))
}

/// Looks at output 0 for what is not finite; `q.layer` keeps the lowest `layer` where there is any.
pub(super) fn check_finite(_q: &mut Queue, _o: &super::operands::Operands, _layer: usize) -> Result<()> {
    Err(Error::bad("optimizer::check_finite has no kernel yet"))
}
