//! Launches of `kernels/conv.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};
use crate::graph::Window;

/// STUB.
pub(super) fn forward(_q: &mut Queue, _o: &Operands, _window: &Window) -> Result<()> {
    Err(Error::bad("conv::forward has no kernel yet"))
}

/// STUB.
pub(super) fn grad_input(_q: &mut Queue, _o: &Operands, _window: &Window) -> Result<()> {
    Err(Error::bad("conv::grad_input has no kernel yet"))
}

/// STUB.
pub(super) fn grad_weight(_q: &mut Queue, _o: &Operands, _window: &Window) -> Result<()> {
    Err(Error::bad("conv::grad_weight has no kernel yet"))
}

/// STUB.
pub(super) fn grad_bias(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("conv::grad_bias has no kernel yet"))
}
