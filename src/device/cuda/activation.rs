//! Launches of `kernels/activation.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};
use crate::graph::Activation;

/// STUB.
pub(super) fn forward(_q: &mut Queue, _o: &Operands, _kind: Activation) -> Result<()> {
    Err(Error::bad("activation::forward has no kernel yet"))
}

/// STUB.
pub(super) fn grad(_q: &mut Queue, _o: &Operands, _kind: Activation) -> Result<()> {
    Err(Error::bad("activation::grad has no kernel yet"))
}
