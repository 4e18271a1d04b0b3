//! Launches of `kernels/gemm_*.cu`: matrix products for every family that needs them.

mod plan;

pub(super) use plan::{Form, Sizes};

use super::launch::{Launch, Ptr, Queue, Swizzle, TensorMap, TensorMapSpec};
use crate::base::{DType, Result};
use crate::graph::Activation;
use plan::{GemmPlan, HOPPER_STEP, Path, Precision, plan};

/// Threads, and elements, of a block of `gemm_finish`.
const FINISH_BLOCK: usize = 256;

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
    let precision = match p.dtype {
        DType::Bf16 => Precision::Bf16,
        _ if q.tf32 => Precision::Tf32,
        _ => Precision::F32,
    };
    let plan = plan(p.form, p.sizes, precision, q.arch());
    let parts = plan.parts.parts;
    let partials = if parts > 1 { p.scratch } else { Ptr::NULL };
    let tiles = plan.tiles(p.sizes);
    let product = match plan.path {
        Path::Hopper => {
            let blocks = (tiles * parts).min(q.multiprocessors());
            let [a, b] = tensor_maps(q, p, &plan)?;
            let product = Launch::new(plan.kernel, [blocks, 1, 1], plan.block).shared(plan.shared_bytes);
            product.ptr(p.out).ptr(p.pre).ptr(partials).map(&a).map(&b)
        }
        _ => {
            let product = Launch::new(plan.kernel, [tiles, parts, 1], plan.block).shared(plan.shared_bytes);
            product.ptr(p.out).ptr(p.pre).ptr(partials).ptr(p.a).ptr(p.b)
        }
    };
    let product = product.ptr(p.bias).ptr(q.now).int(p.accumulator).int(p.activation as usize);
    let product = product.int(m).int(n).int(k).int(plan.parts.k);
    q.launch(if plan.path == Path::Hopper { product.int(parts) } else { product })?;
    if parts == 1 {
        return Ok(());
    }
    let finish = Launch::new(plan.finish, [(m * n).div_ceil(FINISH_BLOCK), 1, 1], FINISH_BLOCK as u32);
    let finish = finish.ptr(p.out).ptr(p.pre).ptr(partials).ptr(p.bias).ptr(q.now);
    q.launch(finish.int(p.accumulator).int(p.activation as usize).int(parts).int(m).int(n))
}

/// Descriptors of a and b for `gemm_hopper.cu`. Boxes are 64 wide; where k runs along the rows of memory, they are as high as the tile, and else one
/// step of k high.
fn tensor_maps(q: &mut Queue, p: &Product, plan: &GemmPlan) -> Result<[TensorMap; 2]> {
    let Sizes { m, n, k } = p.sizes;
    let along_k = |base, rows, tile| (base, rows, k, tile);
    let across_k = |base, cols| (base, k, cols, HOPPER_STEP);
    let [a, b] = match p.form {
        Form::Nn => [along_k(p.a, m, plan.tile[0]), across_k(p.b, n)],
        Form::Nt => [along_k(p.a, m, plan.tile[0]), along_k(p.b, n, plan.tile[1])],
        Form::Tn => [across_k(p.a, m), across_k(p.b, n)],
    };
    let mut map = |(base, rows, cols, box_rows): (Ptr, usize, usize, usize)| {
        q.tensor_map(&TensorMapSpec {
            base,
            elem_bytes: 2,
            rows: rows as u64,
            cols: cols as u64,
            pitch_bytes: 2 * cols as u64,
            box_rows: box_rows as u32,
            box_cols: HOPPER_STEP as u32,
            swizzle: Swizzle::Bytes128,
        })
    };
    Ok([map(a)?, map(b)?])
}
