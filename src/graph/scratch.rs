//! Scratch: what an op's kernels need besides its operands, in bytes of the workspace, for devices that ask for it.
//!
//! Kernels that reduce over many blocks leave partial results for a second kernel. How many is a function of shapes alone, never of
//! the chip, so neither the plan's bytes nor the order of any sum depend on the machine.

use super::graph::{Graph, Node};
use super::op::Op;

/// Bytes of scratch for `node`.
pub fn scratch_bytes(graph: &Graph, node: &Node) -> u64 {
    let _ = graph;
    match &node.op {
        Op::LinearGradBias => 0,
        _ => 0,
    }
}
