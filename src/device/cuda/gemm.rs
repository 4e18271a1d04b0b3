//! Launches of `kernels/gemm_*.cu`: matrix products for every family that needs them.

mod plan;
#[cfg(test)]
mod tests;

pub(super) use plan::{Form, Sizes};

use super::launch::{Launch, Ptr, TensorMap, TensorMapSpec};
use super::queue::Queue;
use crate::base::{DType, Result};
use crate::graph::{Activation, RowParts, beside_parts};
use plan::{GemmPlan, HOPPER_STEP, Path, Precision, plan};

/// Threads, and elements, of a block of `gemm_finish`.
const FINISH_BLOCK: usize = 256;

/// Fewest columns of the other factor for column sums beside a product.
const LEAST_OTHERS: usize = 512;

/// What kernels add to the number of an activation whose gradient is meant.
pub(super) const ACTIVATION_GRAD: usize = 5;

/// A matrix in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    /// Where it starts.
    pub at: Ptr,
    /// Elements from one row to the next.
    pub pitch: usize,
}

/// Column sums that are made beside a product of tn, of the columns of one factor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beside {
    /// The factor, bf16, its rows a multiple of 8 apart.
    pub x: Matrix,
    /// Its rows, the product's k.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
    /// f32 (parts, cols), of the parts of [`beside_parts`]: what there is to be added up.
    pub partials: Ptr,
}

/// A product: `out (m, n) = act(a b + bias)`, `a b + bias + residual`, or `(a b) act'(pre)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    /// How a and b are stored.
    pub form: Form,
    /// The sizes.
    pub sizes: Sizes,
    /// Element type of a, b and bias.
    pub dtype: DType,
    /// Left operand.
    pub a: Matrix,
    /// Right operand.
    pub b: Matrix,
    /// (n), or null.
    pub bias: Ptr,
    /// After the bias.
    pub activation: Activation,
    /// Whether its gradient is meant: `pre` is read, and the product is the gradient of what the activation gave.
    pub backward: bool,
    /// (m, n), of the inputs' type; f32 for tn, which makes parameters' gradients.
    pub out: Matrix,
    /// (m, n), of out's type and pitch: what the activation is given; or null. Where it is read, it may be out's own
    /// place.
    pub pre: Ptr,
    /// (m, n), of out's type and pitch: added after the bias; or null. It may be out's own place. There is none with an
    /// activation or an accumulator.
    pub residual: Ptr,
    /// [`Operands::accumulator`](super::operands::Operands::accumulator) of out.
    pub accumulator: usize,
    /// Where [`sums_beside`] says so.
    pub beside: Option<Beside>,
    /// [`crate::graph::product_bytes`] bytes.
    pub scratch: Ptr,
}

/// Queues a product.
///
/// # Errors
/// When a size is beyond what kernels take, or the device has failed.
pub(super) fn launch(q: &mut Queue, p: &Product) -> Result<()> {
    launch_as(q, p, &plan_of(q, p))
}

/// Whether the kernel of a product of tn makes column sums of one factor beside it, the other one having `others`
/// columns. Not of few: the sums of 256 columns take as long as the products with some 270, by the reckoning in
/// `gemm_hopper.cu`.
pub(super) fn sums_beside(q: &Queue, p: &Product, others: usize) -> bool {
    others >= LEAST_OTHERS && plan_of(q, p).path == Path::Hopper
}

/// How a product is computed here.
fn plan_of(q: &Queue, p: &Product) -> GemmPlan {
    let precision = match p.dtype {
        DType::Bf16 => Precision::Bf16,
        _ if q.tf32 => Precision::Tf32,
        _ => Precision::F32,
    };
    plan(p.form, p.sizes, [p.a.pitch, p.b.pitch], precision, q.arch())
}

/// Queues a product that was planned.
fn launch_as(q: &mut Queue, p: &Product, plan: &GemmPlan) -> Result<()> {
    debug_assert!(
        p.residual == Ptr::NULL || p.accumulator == 0 && p.activation == Activation::None && p.form != Form::Tn,
        "a residual beside what it cannot be beside"
    );
    let Sizes { m, n, k } = p.sizes;
    let parts = plan.parts.parts;
    let partials = if parts > 1 { p.scratch } else { Ptr::NULL };
    let tiles = plan.tiles(p.sizes);
    let persistent = matches!(plan.path, Path::Hopper | Path::HopperShifted);
    let grid = if persistent { [(tiles * parts).min(q.multiprocessors()), 1, 1] } else { [tiles, parts, 1] };
    let product = Launch::new(plan.kernel, grid, plan.block).shared(plan.shared_bytes);
    let product = product.ptr(p.out.at).ptr(p.pre).ptr(partials);
    let product = match plan.path {
        Path::Hopper => product.map(&left_map(q, p, plan)?).map(&right_map(q, p, plan)?),
        Path::HopperShifted => product.ptr(p.a.at).map(&right_map(q, p, plan)?),
        _ => product.ptr(p.a.at).ptr(p.b.at),
    };
    let activation = p.activation as usize + if p.backward { ACTIVATION_GRAD } else { 0 };
    let product = product.ptr(p.bias).ptr(p.residual).ptr(q.now).int(p.accumulator).int(activation);
    let product = product.int(m).int(n).int(k).int(plan.parts.k);
    q.launch(match plan.path {
        // f32 has no padded rows.
        Path::Plain | Path::Tf32 => product,
        Path::Mma | Path::MmaRagged => product.int(p.a.pitch).int(p.b.pitch).int(p.out.pitch),
        Path::Hopper => product.int(p.out.pitch).int(parts).bytes(&beside(p.beside.as_ref()), 8),
        Path::HopperShifted => product.int(p.out.pitch).int(parts),
    })?;
    if parts == 1 {
        return Ok(());
    }
    let finish = Launch::new(plan.finish, [(m * n).div_ceil(FINISH_BLOCK), 1, 1], FINISH_BLOCK as u32);
    let finish = finish.ptr(p.out.at).ptr(p.pre).ptr(partials).ptr(p.bias).ptr(p.residual).ptr(q.now);
    q.launch(finish.int(p.accumulator).int(activation).int(parts).int(m).int(n).int(p.out.pitch))
}

/// `Beside` of `kernels/gpu/gemm_beside.cuh`: two pointers and five ints; zeros where nothing is summed.
fn beside(sums: Option<&Beside>) -> [u8; 40] {
    let mut bytes = [0; 40];
    if let Some(&Beside { x, rows, cols, partials }) = sums {
        let RowParts { parts, rows: part_rows } = beside_parts(rows, cols);
        let ints = [rows, cols, x.pitch, parts, part_rows].map(|n| (n as i32).to_ne_bytes());
        bytes[..8].copy_from_slice(&x.at.0.to_ne_bytes());
        bytes[8..16].copy_from_slice(&partials.0.to_ne_bytes());
        bytes[16..36].copy_from_slice(ints.as_flattened());
    }
    bytes
}

/// A descriptor of a for `gemm_hopper.cu`.
fn left_map(q: &mut Queue, p: &Product, plan: &GemmPlan) -> Result<TensorMap> {
    let Sizes { m, k, .. } = p.sizes;
    match p.form {
        Form::Nn | Form::Nt => map(q, p.a, [m, k], plan.tile[0]),
        Form::Tn => map(q, p.a, [k, m], HOPPER_STEP),
    }
}

/// A descriptor of b for `gemm_hopper.cu`.
fn right_map(q: &mut Queue, p: &Product, plan: &GemmPlan) -> Result<TensorMap> {
    let Sizes { n, k, .. } = p.sizes;
    match p.form {
        Form::Nt => map(q, p.b, [n, k], plan.tile[1]),
        Form::Nn | Form::Tn => map(q, p.b, [k, n], HOPPER_STEP),
    }
}

/// A descriptor of a bf16 matrix. Where k runs along its rows, a box is as high as the tile, and else one step of k
/// high.
fn map(q: &mut Queue, matrix: Matrix, [rows, cols]: [usize; 2], box_rows: usize) -> Result<TensorMap> {
    q.tensor_map(&TensorMapSpec {
        base: matrix.at,
        elem_bytes: 2,
        rows: rows as u64,
        cols: cols as u64,
        pitch_bytes: 2 * matrix.pitch as u64,
        box_rows: box_rows as u32,
        box_cols: HOPPER_STEP as u32,
    })
}
