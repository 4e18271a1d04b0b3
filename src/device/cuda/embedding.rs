//! Launches of `kernels/embedding.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};

/// STUB.
pub(super) fn forward(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("embedding::forward has no kernel yet"))
}

/// STUB.
pub(super) fn grad(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("embedding::grad has no kernel yet"))
}
