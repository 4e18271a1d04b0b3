//! Every tile width of `gemm_hopper.cu`, on the emulator or a Hopper GPU: shapes that choose the wider ones are too
//! large for the tables of tests/kernels.
//!
//! Factors are -1, 0 and 1 and sums stay below 256, so every result is exact.

use super::plan::{Path, Precision, planned};
use super::{Beside, Form, Matrix, Product, Sizes, launch_as};
use crate::base::DType;
use crate::device::Scalars;
use crate::device::cuda::launch::Ptr;
use crate::device::cuda::stand::{Held, Stand};
use crate::graph::{Activation, KParts, ProductCut, beside_parts};

/// Tails in every direction, several tiles a block of the emulator's four, and steps beyond the ring.
const SIZES: Sizes = Sizes { m: 312, n: 456, k: 584 };

/// A matrix of small integers, as the device sees it.
struct Tensor {
    held: Held,
    dtype: DType,
}

impl Tensor {
    fn new(stand: &mut Stand, dtype: DType, values: &[i32]) -> Tensor {
        let bytes: Vec<u8> = match dtype {
            DType::Bf16 => {
                values.iter().flat_map(|&v| ((v as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec()).collect()
            }
            _ => values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
        };
        Tensor { held: stand.hold(&bytes), dtype }
    }

    fn rows(&self, pitch: usize) -> Matrix {
        Matrix { at: self.ptr(), pitch }
    }

    fn ptr(&self) -> Ptr {
        self.held.ptr()
    }

    /// What is there now.
    fn read(&self, stand: &mut Stand) -> Vec<f32> {
        let width = if self.dtype == DType::Bf16 { 2 } else { 4 };
        let value = |v: &[u8]| match *v {
            [low, high] => f32::from_bits(u32::from(u16::from_le_bytes([low, high])) << 16),
            [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("chunks of 2 or 4"),
        };
        stand.read(&self.held).chunks(width).map(value).collect()
    }
}

/// Numbers from -bound to bound.
fn draw(seed: &mut u32, count: usize, bound: i32) -> Vec<i32> {
    let mut next = || {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 16) as i32 % (2 * bound + 1) - bound
    };
    (0..count).map(|_| next()).collect()
}

fn transposed(from: &[i32], rows: usize, cols: usize) -> Vec<i32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| from[r * cols + c])).collect()
}

/// What becomes of sums.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    /// The bias is added, and ReLU of that is taken; both are kept.
    Activation,
    /// Bias and residual are added, the output in a place of its own or over the residual.
    Residual { in_place: bool },
    /// They go back through a ReLU, likewise.
    Gradient { in_place: bool },
    /// They are added to an accumulator in f32.
    Accumulator,
}

/// One product by tiles so wide, with k in parts of `k_part`.
fn check(form: Form, end: End, width: usize, k_part: usize, seed: u32) {
    let Sizes { m, n, k } = SIZES;
    let what = format!("{form:?}, {end:?}, width {width}, parts of {k_part}, seed {seed}");
    let mut state = seed + width as u32;
    // One factor in three is not 0: sums stay far below 256.
    let sparse = |state: &mut u32, count| {
        let (signs, kept) = (draw(state, count, 1), draw(state, count, 1));
        signs.into_iter().zip(kept).map(|(s, kept)| if kept == 0 { s } else { 0 }).collect::<Vec<_>>()
    };
    let (a, b) = (sparse(&mut state, m * k), sparse(&mut state, k * n));
    let (bias, old) = (draw(&mut state, n, 9), draw(&mut state, m * n, 9));
    let gradient = end == End::Accumulator;
    let in_place = matches!(end, End::Residual { in_place: true } | End::Gradient { in_place: true });

    let mut stand = Stand::open(90, seed).expect("it has opened before");
    let out_dtype = if gradient { DType::F32 } else { DType::Bf16 };
    let stored_a = if form == Form::Tn { transposed(&a, m, k) } else { a.clone() };
    let stored_b = if form == Form::Nt { transposed(&b, k, n) } else { b.clone() };
    let left = Tensor::new(&mut stand, DType::Bf16, &stored_a);
    let right = Tensor::new(&mut stand, DType::Bf16, &stored_b);
    let biases = Tensor::new(&mut stand, DType::Bf16, &bias);
    let out = Tensor::new(&mut stand, out_dtype, &old);
    let nines = vec![99; m * n];
    let other = Tensor::new(&mut stand, out_dtype, if end == End::Activation { &nines } else { &old });
    let joins = if in_place { out.ptr() } else { other.ptr() };
    // Beside a gradient, the sums of b's columns.
    let parts = beside_parts(k, n).parts;
    let sums = Tensor::new(&mut stand, DType::F32, &vec![99; parts * n]);
    let beside = Beside { x: right.rows(n), rows: k, cols: n, partials: sums.ptr() };
    let scratch = Tensor::new(&mut stand, DType::F32, &vec![99; m * n * k.div_ceil(k_part)]);

    let product = Product {
        form,
        sizes: SIZES,
        dtype: DType::Bf16,
        a: left.rows(if form == Form::Tn { m } else { k }),
        b: right.rows(if form == Form::Nt { k } else { n }),
        bias: if let End::Activation | End::Residual { .. } = end { biases.ptr() } else { Ptr::NULL },
        activation: if let End::Activation | End::Gradient { .. } = end { Activation::Relu } else { Activation::None },
        backward: matches!(end, End::Gradient { .. }),
        out: out.rows(n),
        pre: if let End::Activation | End::Gradient { .. } = end { joins } else { Ptr::NULL },
        residual: if let End::Residual { .. } = end { joins } else { Ptr::NULL },
        accumulator: usize::from(gradient),
        beside: gradient.then_some(beside),
        scratch: scratch.ptr(),
    };
    let cut = ProductCut { tile_cols: width, parts: KParts { parts: k.div_ceil(k_part), k: k_part } };
    let plan = planned(form, Path::Hopper, Precision::Bf16, cut);
    let now = Scalars { seed: 0, step: 0, microbatch: 1, loss_scale: 1.0, accumulate: true };
    stand.wait_for(&what, |q| {
        q.begin(&now, false)?;
        launch_as(q, &product, &plan)
    });

    let sums = sums.read(&mut stand);
    for col in 0..n {
        let got: f32 = sums[col..].iter().step_by(n).sum();
        let want = if gradient { (0..k).map(|row| b[row * n + col]).sum() } else { 99 * parts as i32 };
        assert_eq!(got, want as f32, "{what}: the sum of column {col}");
    }
    let (got, got_other) = (out.read(&mut stand), other.read(&mut stand));
    for row in 0..m {
        let mut sums = vec![0; n];
        for i in 0..k {
            let factor = a[row * k + i];
            sums.iter_mut().zip(&b[i * n..]).for_each(|(sum, b)| *sum += factor * b);
        }
        for (col, sum) in sums.into_iter().enumerate() {
            let at = row * n + col;
            let (want, want_other) = match end {
                End::Activation => ((sum + bias[col]).max(0), sum + bias[col]),
                End::Residual { .. } => (sum + bias[col] + old[at], old[at]),
                End::Gradient { .. } => (if old[at] > 0 { sum } else { 0 }, old[at]),
                End::Accumulator => (sum + old[at], old[at]),
            };
            assert_eq!(got[at], want as f32, "{what}: ({row}, {col})");
            assert_eq!(got_other[at], want_other as f32, "{what}: the other ({row}, {col})");
        }
    }
}

#[test]
fn tiles_of_every_width_give_the_same() {
    // Held to the end, since a GPU's context goes with the last that uses it.
    let Some(_open) = Stand::open(90, 0) else { return };
    for (seed, width) in [256, 192, 128].into_iter().enumerate() {
        let whole = SIZES.k.next_multiple_of(64);
        for form in [Form::Nn, Form::Nt, Form::Tn] {
            let end = if form == Form::Tn { End::Accumulator } else { End::Activation };
            for k_part in [whole, 256] {
                check(form, end, width, k_part, seed as u32);
            }
        }
        check(Form::Nt, End::Activation, width, whole, 7);
    }
}

#[test]
fn what_joins_the_sums_does_so_in_tiles_of_every_width() {
    let Some(_open) = Stand::open(90, 0) else { return };
    for (seed, width) in [256, 192, 128].into_iter().enumerate() {
        for (form, in_place) in [(Form::Nn, false), (Form::Nt, true)] {
            let whole = SIZES.k.next_multiple_of(64);
            check(form, End::Residual { in_place }, width, whole, seed as u32);
            check(form, End::Gradient { in_place }, width, whole, 7 + seed as u32);
            check(form, End::Gradient { in_place: !in_place }, width, 256, seed as u32);
        }
    }
}
