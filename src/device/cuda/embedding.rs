//! Launches of `kernels/embedding.cu`.

use super::launch::{Launch, Queue};
use super::operands::{Operands, pick};
use crate::base::{Error, Result};

/// Rows that a block picks, one warp each.
const ROWS: usize = 8;

/// `out (tokens, C) = table (V, C)[ids (tokens)]`.
pub(super) fn forward(q: &mut Queue, o: &Operands) -> Result<()> {
    let &[table_rows, cols] = o.in_axes(1) else { unreachable!("a table is a matrix") };
    let tokens = o.step.inputs[0].shape.elems();
    let kernel = pick(o.out_dtype(0), "embedding_forward_f32", "embedding_forward_bf16");
    let launch = Launch::new(kernel, [tokens.div_ceil(ROWS), 1, 1], 32 * ROWS as u32).ptr(o.output(0));
    q.launch(launch.ptr(o.input(0)).ptr(o.input(1)).long(tokens).int(table_rows).int(cols))
}

/// STUB.
pub(super) fn grad(_q: &mut Queue, _o: &Operands) -> Result<()> {
    Err(Error::bad("embedding::grad has no kernel yet"))
}
