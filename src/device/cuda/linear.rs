//! Launches of `kernels/linear.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};
use crate::graph::{Activation, WeightLayout};

/// STUB.
pub(super) fn forward(_q: &mut Queue, _o: &Operands, _activation: Activation, _layout: WeightLayout) -> Result<()> {
    Err(Error::bad("linear::forward has no kernel yet"))
}

/// STUB.
pub(super) fn grad_input(_q: &mut Queue, _o: &Operands, _layout: WeightLayout) -> Result<()> {
    Err(Error::bad("linear::grad_input has no kernel yet"))
}

/// STUB.
pub(super) fn grad_weight(_q: &mut Queue, _o: &Operands, _layout: WeightLayout) -> Result<()> {
    Err(Error::bad("linear::grad_weight has no kernel yet"))
}

/// STUB.
pub(super) fn grad_bias(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("linear::grad_bias has no kernel yet"))
}
