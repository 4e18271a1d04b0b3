//! Launches of `kernels/attention.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};
use crate::graph::AttentionKind;

/// STUB.
pub(super) fn forward(_q: &mut Queue, _o: &Operands, _kind: &AttentionKind) -> Result<()> {
    Err(Error::bad("attention::forward has no kernel yet"))
}

/// STUB.
pub(super) fn grad(_q: &mut Queue, _o: &Operands, _kind: &AttentionKind) -> Result<()> {
    Err(Error::bad("attention::grad has no kernel yet"))
}
