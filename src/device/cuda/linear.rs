//! The linear layer's launches: products of `gemm`, and column sums for a bias.
//!
//! Sizes: M (rows of x), K (inputs), N (outputs). The weight is (K, N) or (N, K). Rows of out and of d_pre may be
//! further apart than N.

use super::column_sum;
use super::gemm::{self, Beside, Form, Matrix, Product, Sizes};
use super::launch::Ptr;
use super::operands::Operands;
use super::queue::Queue;
use crate::base::Result;
use crate::graph::{Activation, WeightLayout, beside_parts, product_bytes};

/// x (M, K), weight, bias (N) or none -> out (M, N) = act(x W + bias), pre (M, N) where it is wanted. A `residual` (M,
/// N), the last input, is added after the bias.
pub(super) fn forward(
    q: &mut Queue,
    o: &Operands,
    activation: Activation,
    layout: WeightLayout,
    residual: bool,
) -> Result<()> {
    let (m, k) = o.rows_cols(0);
    let form = match layout {
        WeightLayout::InOut => Form::Nn,
        WeightLayout::OutIn => Form::Nt,
    };
    let product = product(o, form, Sizes { m, n: o.out_cols(), k }, [0, 1]);
    let inputs = o.step.inputs.len() - usize::from(residual);
    let bias = if inputs > 2 { o.input(2) } else { Ptr::NULL };
    let residual = if residual { o.input(inputs) } else { Ptr::NULL };
    gemm::launch(q, &Product { bias, activation, pre: o.optional_output(1), residual, ..product })
}

/// d_pre (M, N), weight -> d_x (M, K) = d_pre W^T; with an activation, pre (M, K) too -> d_x = (d_pre W^T) act'(pre).
/// Where it `adds`, the last input (M, K) is added.
pub(super) fn grad_input(
    q: &mut Queue,
    o: &Operands,
    layout: WeightLayout,
    activation: Activation,
    adds: bool,
) -> Result<()> {
    let (m, k) = o.rows_cols(0);
    let form = match layout {
        WeightLayout::InOut => Form::Nt,
        WeightLayout::OutIn => Form::Nn,
    };
    let product = product(o, form, Sizes { m, n: o.out_cols(), k }, [0, 1]);
    let backward = activation != Activation::None;
    let (pre, residual) = if adds { (Ptr::NULL, o.input(2)) } else { (o.optional_input(2), Ptr::NULL) };
    gemm::launch(q, &Product { activation, backward, pre, residual, ..product })
}

/// x (M, K), d_pre (M, N) -> d_weight = x^T d_pre (K, N), or d_pre^T x (N, K), and with a `bias` d_bias (N), the column
/// sums of d_pre: made beside the product where its kernel does that, and else after it.
pub(super) fn grad_weight(q: &mut Queue, o: &Operands, layout: WeightLayout, bias: bool) -> Result<()> {
    let ((k, inputs), (_, outputs)) = (o.rows_cols(0), o.rows_cols(1));
    let product = match layout {
        WeightLayout::InOut => product(o, Form::Tn, Sizes { m: inputs, n: outputs, k }, [0, 1]),
        WeightLayout::OutIn => product(o, Form::Tn, Sizes { m: outputs, n: inputs, k }, [1, 0]),
    };
    if !bias {
        return gemm::launch(q, &product);
    }
    let Sizes { m, n, .. } = product.sizes;
    let partials = o.scratch().plus(product_bytes(product.dtype, m, n, k));
    let (d_bias, accumulator) = (o.output(1), o.accumulator(1));
    let d_pre = Matrix { at: o.input(1), pitch: o.pitch(1) };
    if gemm::sums_beside(q, &product, inputs) {
        gemm::launch(q, &Product { beside: Some(Beside { x: d_pre, rows: k, cols: outputs, partials }), ..product })?;
        let parts = beside_parts(k, outputs).parts;
        column_sum::finish(q, [(d_bias, accumulator), (Ptr::NULL, 0)], parts, outputs, partials)
    } else {
        gemm::launch(q, &product)?;
        let sizes = [k, outputs, d_pre.pitch];
        column_sum::launch(q, d_bias, accumulator, d_pre.at, product.dtype, sizes, partials)
    }
}

/// The product of two inputs into output 0.
fn product(o: &Operands, form: Form, sizes: Sizes, inputs: [usize; 2]) -> Product {
    let [a, b] = inputs.map(|i| Matrix { at: o.input(i), pitch: o.pitch(i) });
    Product {
        form,
        sizes,
        dtype: o.in_dtype(0),
        a,
        b,
        bias: Ptr::NULL,
        activation: Activation::None,
        backward: false,
        out: Matrix { at: o.output(0), pitch: o.out_pitch() },
        pre: Ptr::NULL,
        residual: Ptr::NULL,
        accumulator: o.accumulator(0),
        beside: None,
        scratch: o.scratch(),
    }
}
