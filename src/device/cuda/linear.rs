//! Launches of `kernels/linear.cu`.

use super::column_sum;
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

/// d_pre (rows, N) -> d_bias (N).
pub(super) fn grad_bias(q: &mut Queue, o: &Operands) -> Result<()> {
    let (rows, cols) = o.rows_cols(0);
    column_sum::launch(q, o.output(0), o.accumulator(0), o.input(0), o.in_dtype(0), rows, cols, o.scratch())
}
