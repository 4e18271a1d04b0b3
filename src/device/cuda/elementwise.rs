//! Launches of `kernels/elementwise.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};

/// STUB.
pub(super) fn add(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("elementwise::add has no kernel yet"))
}

/// STUB.
pub(super) fn copy(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("elementwise::copy has no kernel yet"))
}

/// STUB.
pub(super) fn zero(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("elementwise::zero has no kernel yet"))
}

/// STUB.
pub(super) fn dropout(_q: &mut Queue, _o: &Operands, _p: f64, _stream: u32) -> Result<()> {
    Err(Error::bad("elementwise::dropout has no kernel yet"))
}

/// STUB.
pub(super) fn add_position(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("elementwise::add_position has no kernel yet"))
}

/// STUB.
pub(super) fn add_position_grad(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("elementwise::add_position_grad has no kernel yet"))
}
