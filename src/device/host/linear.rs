//! The linear layer: act(x W + b), and its gradients.
//!
//! Sizes: `rows` (all leading axes of x), `inputs`, `outputs`. The weight is (inputs, outputs) or (outputs, inputs).
//! Bias and activation or residual are one pass over the product, and so is the gradient of an activation before the
//! layer: of that pass each element has the bits that it has of ops by themselves.

use super::activation::{self, of_kind};
use super::gemm::{Matrix, Threads, gemm};
use super::parallel::{Unary, expect_len, rows_per_chunk, vector_fn};
use super::real::Real;
use super::reduce;
use crate::graph::kinds::{Activation, WeightLayout};
use rayon::prelude::*;

/// `out (rows, outputs) = act(x (rows, inputs) W + bias (outputs))`. `pre`, where given, gets what the activation was
/// given. A `residual` (rows, outputs) is added last; an activation has none.
///
/// # Panics
/// When a length does not fit the sizes, or there is an activation and a residual.
pub fn forward<T: Real>(
    out: &mut [T],
    mut pre: Option<&mut [T]>,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    residual: Option<&[T]>,
    activation: Activation,
    layout: WeightLayout,
    rows: usize,
    inputs: usize,
    outputs: usize,
) {
    expect_len("linear", "out", out.len(), rows * outputs);
    expect_len("linear", "x", x.len(), rows * inputs);
    expect_len("linear", "weight", weight.len(), inputs * outputs);
    if let Some(pre) = &pre {
        expect_len("linear", "pre", pre.len(), rows * outputs);
    }
    if let Some(bias) = bias {
        expect_len("linear", "bias", bias.len(), outputs);
    }
    let product = pre.as_deref_mut().unwrap_or(out);
    let weight = weight_matrix(weight, layout, inputs, outputs);
    gemm(product, outputs, Matrix::rows(x, inputs), weight, [rows, outputs, inputs], false, Threads::All);
    if let Some(residual) = residual {
        expect_len("linear", "residual", residual.len(), rows * outputs);
        assert!(activation == Activation::None && pre.is_none(), "linear: a residual beside an activation");
        return finish_residual(out, residual, bias, outputs);
    }
    of_kind!(activation, F => finish::<T, F>(out, pre, bias, outputs));
}

/// `d_x (rows, inputs) = d_y (rows, outputs) W^T`; where x came from an activation, given what that was given (rows,
/// inputs), `d_x` is the gradient of that: `(d_y W^T) act'(pre)`. Then an addend (rows, inputs) is added, where there
/// is one.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn grad_input<T: Real>(
    d_x: &mut [T],
    d_y: &[T],
    weight: &[T],
    before: Option<(&[T], Activation)>,
    addend: Option<&[T]>,
    layout: WeightLayout,
    rows: usize,
    inputs: usize,
    outputs: usize,
) {
    expect_len("linear grad_input", "d_x", d_x.len(), rows * inputs);
    expect_len("linear grad_input", "d_y", d_y.len(), rows * outputs);
    expect_len("linear grad_input", "weight", weight.len(), inputs * outputs);
    let weight = weight_matrix(weight, layout, inputs, outputs).transposed();
    gemm(d_x, inputs, Matrix::rows(d_y, outputs), weight, [rows, inputs, outputs], false, Threads::All);
    if let Some((pre, activation)) = before {
        activation::grad(d_x, None, pre, activation);
    }
    if let Some(addend) = addend {
        expect_len("linear grad_input", "addend", addend.len(), d_x.len());
        finish_residual(d_x, addend, None, inputs);
    }
}

/// `d_w = x^T d_y` in the weight's layout, or `d_w +=` that with `accumulate`.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn grad_weight<T: Real>(
    d_w: &mut [T],
    x: &[T],
    d_y: &[T],
    accumulate: bool,
    layout: WeightLayout,
    rows: usize,
    inputs: usize,
    outputs: usize,
) {
    expect_len("linear grad_weight", "d_w", d_w.len(), inputs * outputs);
    expect_len("linear grad_weight", "x", x.len(), rows * inputs);
    expect_len("linear grad_weight", "d_y", d_y.len(), rows * outputs);
    let (x, d_y) = (Matrix::rows(x, inputs), Matrix::rows(d_y, outputs));
    match layout {
        WeightLayout::InOut => {
            gemm(d_w, outputs, x.transposed(), d_y, [inputs, outputs, rows], accumulate, Threads::All)
        }
        WeightLayout::OutIn => {
            gemm(d_w, inputs, d_y.transposed(), x, [outputs, inputs, rows], accumulate, Threads::All)
        }
    }
}

/// `d_b (cols) = sum over rows of d_y (rows, cols)`, or `d_b +=` that with `accumulate`.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn grad_bias<T: Real>(d_b: &mut [T], d_y: &[T], accumulate: bool, rows: usize, cols: usize) {
    expect_len("linear grad_bias", "d_b", d_b.len(), cols);
    expect_len("linear grad_bias", "d_y", d_y.len(), rows * cols);
    reduce::columns(d_b, accumulate, rows, reduce::Elements { x: d_y, cols });
}

/// The weight as (inputs, outputs).
fn weight_matrix<T>(weight: &[T], layout: WeightLayout, inputs: usize, outputs: usize) -> Matrix<'_, T> {
    match layout {
        WeightLayout::InOut => Matrix::rows(weight, outputs),
        WeightLayout::OutIn => Matrix::rows(weight, inputs).transposed(),
    }
}

/// Adds the bias to the product, which is in `pre` or else in `out`, and puts the activation of that in `out`.
fn finish<T: Real, F: Unary<T>>(out: &mut [T], pre: Option<&mut [T]>, bias: Option<&[T]>, cols: usize) {
    if out.is_empty() {
        return;
    }
    let chunk = rows_per_chunk(cols) * cols;
    match pre {
        None => out.par_chunks_mut(chunk).for_each(|out| finish_in_place::<T, F>(out, bias)),
        Some(pre) => out
            .par_chunks_mut(chunk)
            .zip(pre.par_chunks_mut(chunk))
            .for_each(|(out, pre)| finish_beside::<T, F>(out, pre, bias)),
    }
}

/// Adds the bias to the product in `out`, and then the residual.
fn finish_residual<T: Real>(out: &mut [T], residual: &[T], bias: Option<&[T]>, cols: usize) {
    if out.is_empty() {
        return;
    }
    let chunk = rows_per_chunk(cols) * cols;
    out.par_chunks_mut(chunk)
        .zip(residual.par_chunks(chunk))
        .for_each(|(out, residual)| finish_chunk_residual(out, residual, bias));
}

vector_fn! {
    fn finish_chunk_residual<T: Real>(out: &mut [T], residual: &[T], bias: Option<&[T]>) {
        match bias {
            Some(bias) => {
                for (out, residual) in out.chunks_exact_mut(bias.len()).zip(residual.chunks_exact(bias.len())) {
                    for ((out, &residual), &bias) in out.iter_mut().zip(residual).zip(bias) {
                        *out = (*out + bias) + residual;
                    }
                }
            }
            None => {
                for (out, &residual) in out.iter_mut().zip(residual) {
                    *out += residual;
                }
            }
        }
    }
}

vector_fn! {
    fn finish_in_place<T: Real, F: Unary<T>>(out: &mut [T], bias: Option<&[T]>) {
        match bias {
            Some(bias) => {
                for row in out.chunks_exact_mut(bias.len()) {
                    for (out, &bias) in row.iter_mut().zip(bias) {
                        *out = F::apply(*out + bias);
                    }
                }
            }
            None => {
                for out in out {
                    *out = F::apply(*out);
                }
            }
        }
    }
}

vector_fn! {
    fn finish_beside<T: Real, F: Unary<T>>(out: &mut [T], pre: &mut [T], bias: Option<&[T]>) {
        match bias {
            Some(bias) => {
                for (out, pre) in out.chunks_exact_mut(bias.len()).zip(pre.chunks_exact_mut(bias.len())) {
                    for ((out, pre), &bias) in out.iter_mut().zip(pre).zip(bias) {
                        *pre += bias;
                        *out = F::apply(*pre);
                    }
                }
            }
            None => {
                for (out, pre) in out.iter_mut().zip(pre) {
                    *out = F::apply(*pre);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::elementwise;
    use crate::device::host::testing::{assert_close, dot, finite_difference, normal, poison, same_in_all_pools};

    const LAYOUTS: [WeightLayout; 2] = [WeightLayout::InOut, WeightLayout::OutIn];

    fn run<T: Real>(layout: WeightLayout, activation: Activation, [rows, inputs, outputs]: [usize; 3]) -> Vec<Vec<T>> {
        let (x, w, b) = (normal(rows * inputs, 1), normal(inputs * outputs, 2), normal(outputs, 3));
        let d_y = normal::<T>(rows * outputs, 4);
        let (mut out, mut pre, mut alone) = (poison(rows * outputs), poison(rows * outputs), poison(rows * outputs));
        forward(&mut out, Some(&mut pre), &x, &w, Some(&b), None, activation, layout, rows, inputs, outputs);
        forward(&mut alone, None, &x, &w, Some(&b), None, activation, layout, rows, inputs, outputs);
        assert_eq!(out, alone, "keeping the pre-activation changes the result");
        let mut plain = poison(rows * outputs);
        forward(&mut plain, None, &x, &w, None, None, activation, layout, rows, inputs, outputs);
        let (mut d_x, mut d_w, mut d_b) = (poison(rows * inputs), poison(inputs * outputs), poison(outputs));
        grad_input(&mut d_x, &d_y, &w, None, None, layout, rows, inputs, outputs);
        grad_weight(&mut d_w, &x, &d_y, false, layout, rows, inputs, outputs);
        grad_bias(&mut d_b, &d_y, false, rows, outputs);
        let (mut d_w2, mut d_b2) = (d_w.clone(), d_b.clone());
        grad_weight(&mut d_w2, &x, &d_y, true, layout, rows, inputs, outputs);
        grad_bias(&mut d_b2, &d_y, true, rows, outputs);
        for (twice, once) in d_w2.iter().chain(&d_b2).zip(d_w.iter().chain(&d_b)) {
            assert!((twice.to_f64() - 2.0 * once.to_f64()).abs() <= 1e-4 * once.to_f64().abs().max(1.0));
        }
        vec![out, pre, plain, d_x, d_w, d_b, d_w2, d_b2]
    }

    #[test]
    fn f32_like_f64_on_any_number_of_threads() {
        for layout in LAYOUTS {
            for activation in Activation::ALL {
                for sizes in [[0, 3, 4], [1, 1, 1], [3, 0, 5], [5, 7, 0], [31, 33, 65], [130, 129, 257]] {
                    let got = same_in_all_pools(|| run::<f32>(layout, activation, sizes));
                    for (got, want) in got.iter().zip(run::<f64>(layout, activation, sizes)) {
                        // Sums of up to 130 products of normals, with f32's rounding each.
                        assert_close(got, &want, 1e-5, &format!("{layout:?} {activation:?} {sizes:?}"));
                    }
                }
            }
        }
    }

    #[test]
    fn fused_ops_have_the_bits_of_two() {
        for layout in LAYOUTS {
            for [rows, inputs, outputs] in [[0, 3, 4], [1, 1, 1], [3, 0, 5], [5, 7, 0], [31, 33, 65], [130, 129, 257]] {
                let (x, w, d_y) = (normal(rows * inputs, 1), normal(inputs * outputs, 2), normal(rows * outputs, 4));
                let (b, r) = (normal::<f32>(outputs, 3), normal::<f32>(rows * outputs, 5));
                for bias in [None, Some(&b[..])] {
                    let run = |out: &mut [f32], residual: Option<&[f32]>| {
                        forward(out, None, &x, &w, bias, residual, Activation::None, layout, rows, inputs, outputs);
                    };
                    let got = same_in_all_pools(|| {
                        let mut out = poison(rows * outputs);
                        run(&mut out, Some(&r));
                        vec![out]
                    });
                    let mut want = poison(rows * outputs);
                    run(&mut want, None);
                    elementwise::add(&mut want, None, &r);
                    assert_eq!(got[0], want, "{layout:?} bias {}", bias.is_some());
                }
                let others = normal::<f32>(rows * inputs, 7);
                let got = same_in_all_pools(|| {
                    let mut d_x = poison(rows * inputs);
                    grad_input(&mut d_x, &d_y, &w, None, Some(&others), layout, rows, inputs, outputs);
                    vec![d_x]
                });
                let mut want = poison(rows * inputs);
                grad_input(&mut want, &d_y, &w, None, None, layout, rows, inputs, outputs);
                elementwise::add(&mut want, None, &others);
                assert_eq!(got[0], want, "{layout:?} added");
                for activation in Activation::ALL.into_iter().skip(1) {
                    let pre = normal::<f32>(rows * inputs, 6);
                    let got = same_in_all_pools(|| {
                        let mut d_pre = poison(rows * inputs);
                        grad_input(&mut d_pre, &d_y, &w, Some((&pre, activation)), None, layout, rows, inputs, outputs);
                        vec![d_pre]
                    });
                    let mut d_x = poison(rows * inputs);
                    grad_input(&mut d_x, &d_y, &w, None, None, layout, rows, inputs, outputs);
                    let mut want = poison(rows * inputs);
                    activation::grad(&mut want, Some(&d_x), &pre, activation);
                    assert_eq!(got[0], want, "{layout:?} {activation:?}");
                }
            }
        }
    }

    #[test]
    fn against_plain_loops() {
        let [rows, inputs, outputs] = [3, 4, 5];
        for layout in LAYOUTS {
            let got = run::<f64>(layout, Activation::None, [rows, inputs, outputs]);
            let (x, w, b) = (normal::<f64>(12, 1), normal::<f64>(20, 2), normal::<f64>(5, 3));
            let at = |i, o| if layout == WeightLayout::InOut { w[i * outputs + o] } else { w[o * inputs + i] };
            let want: Vec<f64> = (0..rows * outputs)
                .map(|e| {
                    b[e % outputs] + (0..inputs).map(|i| x[e / outputs * inputs + i] * at(i, e % outputs)).sum::<f64>()
                })
                .collect();
            assert_close(&got[0], &want, 1e-14, "out");
        }
    }

    #[test]
    fn gradients_are_slopes() {
        let [rows, inputs, outputs] = [5, 4, 7];
        for layout in LAYOUTS {
            let (x, w, b) = (normal::<f64>(20, 1), normal::<f64>(28, 2), normal::<f64>(7, 3));
            let d_y = normal::<f64>(35, 4);
            let loss = |x: &[f64], w: &[f64], b: &[f64]| {
                let mut out = poison(35);
                forward(&mut out, None, x, w, Some(b), None, Activation::None, layout, rows, inputs, outputs);
                dot(&out, &d_y)
            };
            let got = run::<f64>(layout, Activation::None, [rows, inputs, outputs]);
            assert_close(&got[3], &finite_difference(&x, |x| loss(x, &w, &b)), 1e-8, "d_x");
            assert_close(&got[4], &finite_difference(&w, |w| loss(&x, w, &b)), 1e-8, "d_w");
            assert_close(&got[5], &finite_difference(&b, |b| loss(&x, &w, b)), 1e-8, "d_b");
        }
    }
}
