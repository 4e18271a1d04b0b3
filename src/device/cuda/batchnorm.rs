//! Launches of `kernels/batchnorm.cu`.

use super::launch::Queue;
use super::operands::Operands;
use crate::base::{Error, Result};

/// STUB.
pub(super) fn forward_train(_q: &mut Queue, _o: &Operands, _epsilon: f64) -> Result<()> {
    Err(Error::bad("batchnorm::forward_train has no kernel yet"))
}

/// STUB.
pub(super) fn update_running(_q: &mut Queue, _o: &Operands, _momentum: f64, _count: usize) -> Result<()> {
    Err(Error::bad("batchnorm::update_running has no kernel yet"))
}

/// STUB.
pub(super) fn forward_eval(_q: &mut Queue, _o: &Operands, _epsilon: f64) -> Result<()> {
    Err(Error::bad("batchnorm::forward_eval has no kernel yet"))
}

/// STUB.
pub(super) fn grad(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("batchnorm::grad has no kernel yet"))
}
