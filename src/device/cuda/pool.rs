//! Launches of `kernels/pool.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};
use crate::graph::Window;

/// STUB.
pub(super) fn max_forward(_q: &mut Queue, _o: &Operands, _window: &Window) -> Result<()> {
    Err(Error::bad("pool::max_forward has no kernel yet"))
}

/// STUB.
pub(super) fn max_grad(_q: &mut Queue, _o: &Operands, _window: &Window) -> Result<()> {
    Err(Error::bad("pool::max_grad has no kernel yet"))
}

/// STUB.
pub(super) fn avg_forward(_q: &mut Queue, _o: &Operands, _window: &Window) -> Result<()> {
    Err(Error::bad("pool::avg_forward has no kernel yet"))
}

/// STUB.
pub(super) fn avg_grad(_q: &mut Queue, _o: &Operands, _window: &Window) -> Result<()> {
    Err(Error::bad("pool::avg_grad has no kernel yet"))
}
