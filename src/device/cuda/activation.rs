//! Launches of `kernels/activation.cu`.

use super::elementwise::pointwise;
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::Result;
use crate::graph::Activation;

/// `out = activation(x)`.
pub(super) fn forward(q: &mut Queue, o: &Operands, kind: Activation) -> Result<()> {
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    let launch = pointwise(pick(dtype, "activation_forward_f32", "activation_forward_bf16"), elems, dtype);
    q.launch(launch.ptr(o.output(0)).ptr(o.input(0)).long(elems).int(kind as usize))
}

/// `d_x = d_out * activation'(x)`.
pub(super) fn grad(q: &mut Queue, o: &Operands, kind: Activation) -> Result<()> {
    let (dtype, elems) = (o.out_dtype(0), o.out_elems(0));
    let launch = pointwise(pick(dtype, "activation_grad_f32", "activation_grad_bf16"), elems, dtype);
    q.launch(launch.ptr(o.output(0)).ptr(o.input(0)).ptr(o.input(1)).long(elems).int(kind as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::gemm::ACTIVATION_GRAD;

    #[test]
    fn kernels_number_the_kinds_alike() {
        let header = include_str!("../../../kernels/gpu/math.cuh");
        for (name, kind) in [
            ("NONE", Activation::None),
            ("RELU", Activation::Relu),
            ("GELU_TANH", Activation::GeluTanh),
            ("GELU_ERF", Activation::GeluErf),
            ("SILU", Activation::Silu),
        ] {
            assert!(header.contains(&format!("ACTIVATION_{name} = {}", kind as usize)), "{name}");
        }
        assert!(header.contains(&format!("ACTIVATION_GRAD = {ACTIVATION_GRAD}")));
    }
}
