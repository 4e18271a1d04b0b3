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
    use crate::base::DType;
    use crate::device::cuda::gemm::ACTIVATION_GRAD;
    use crate::device::cuda::stand::Stand;

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

    /// Far out the square of what is given overflows; there a slope is 0 or 1 all the same.
    #[test]
    fn slopes_far_out_are_those_of_a_line() {
        let Some(_open) = Stand::open(80, 0) else { return };
        let x = [-3e38f32, -1e20, -1e13, -1e4, 1e4, 1e13, 1e20, 3e38];
        for dtype in [DType::F32, DType::Bf16] {
            let width = dtype.bytes() as usize;
            // The upper half of an f32 is a bf16.
            let bytes =
                |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()[4 - width..].to_vec()).collect::<Vec<_>>();
            for kind in [Activation::Relu, Activation::GeluTanh, Activation::GeluErf, Activation::Silu] {
                let mut stand = Stand::open(80, 0).expect("it has opened before");
                let [to, d, given] = [&[9.0; 8], &[1.0; 8], &x].map(|values: &[f32; 8]| stand.hold(&bytes(values)));
                let launch = pointwise(pick(dtype, "activation_grad_f32", "activation_grad_bf16"), 8, dtype);
                let launch = launch.ptr(to.ptr()).ptr(d.ptr()).ptr(given.ptr()).long(8).int(kind as usize);
                stand.wait_for("slopes", |q| q.launch(launch));
                let got = stand.read(&to);
                assert_eq!(got, bytes(&x.map(|x| f32::from(x > 0.0))), "{kind:?} in {dtype}");
            }
        }
    }
}
