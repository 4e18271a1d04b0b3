//! Launches of `kernels/glu.cu`.

use super::elementwise::pointwise;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::Result;
use crate::graph::Activation;

/// `out = activation(gate) * up`; out may be gate.
pub(super) fn forward(q: &mut Queue, o: &Operands, kind: Activation) -> Result<()> {
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    let launch = pointwise(pick(dtype, "glu_forward_f32", "glu_forward_bf16"), elems, dtype);
    q.launch(launch.ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1)).long(elems).int(kind as usize))
}

/// `d_gate = d_out * up * activation'(gate)`, `d_up = d_out * activation(gate)`; d_gate may be d_out.
pub(super) fn grad(q: &mut Queue, o: &Operands, kind: Activation) -> Result<()> {
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    let launch = pointwise(pick(dtype, "glu_grad_f32", "glu_grad_bf16"), elems, dtype);
    let launch = launch.ptr(o.output(0)).ptr(o.output(1)).ptr(o.input(0)).ptr(o.input(1)).ptr(o.input(2));
    q.launch(launch.long(elems).int(kind as usize))
}
