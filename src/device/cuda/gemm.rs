//! Launches of `kernels/gemm_*.cu`: matrix products for every family that needs them.

mod plan;

pub(super) use plan::{Form, Sizes};

use super::launch::{Launch, Ptr, Queue};
use crate::base::{DType, Result};
use crate::graph::Activation;
use plan::plan;

/// Threads of a block of `gemm_finish`, and elements of a thread.
const FINISH_BLOCK: usize = 256;
const FINISH_ELEMS: usize = 8;

/// A product: `out (m, n) = act(a b + bias)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// How a and b are stored.
    pub form: Form,
    /// The sizes.
    pub sizes: Sizes,
    /// Element type of a, b and bias.
    pub dtype: DType,
    /// Left operand.
    pub a: Ptr,
    /// Right operand.
    pub b: Ptr,
    /// (n), or null.
    pub bias: Ptr,
    /// After the bias.
    pub activation: Activation,
    /// (m, n), of the inputs' type; f32 for tn, which makes parameters' gradients.
    pub out: Ptr,
    /// (m, n), of out's type: what the activation is given; or null.
    pub pre: Ptr,
    /// 1 where out is an accumulator.
    pub accumulator: usize,
    /// [`crate::graph::product_bytes`] bytes.
    pub scratch: Ptr,
}

/// Queues a product.
///
/// # Errors
/// When a size is beyond what kernels take, or the device has failed.
pub(super) fn launch(q: &mut Queue, p: &Product) -> Result<()> {
    let Sizes { m, n, k } = p.sizes;
    let plan = plan(p.form, p.sizes, p.dtype);
    let parts = plan.parts.parts;
    let partials = if parts > 1 { p.scratch } else { Ptr::NULL };
    let product = Launch::new(plan.kernel, [plan.tiles(p.sizes), parts, 1], plan.block);
    let product = product.ptr(p.out).ptr(p.pre).ptr(partials).ptr(p.a).ptr(p.b).ptr(p.bias).ptr(q.now);
    let product = product.int(p.accumulator).int(p.activation as usize).int(m).int(n).int(k).int(plan.parts.k);
    q.launch(product)?;
    if parts == 1 {
        return Ok(());
    }
    let finish =
        Launch::new(plan.finish, [(m * n.div_ceil(FINISH_ELEMS)).div_ceil(FINISH_BLOCK), 1, 1], FINISH_BLOCK as u32);
    let finish = finish.ptr(p.out).ptr(p.pre).ptr(partials).ptr(p.bias).ptr(q.now);
    q.launch(finish.int(p.accumulator).int(p.activation as usize).int(parts).int(m).int(n))
}
