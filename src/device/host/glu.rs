//! Gated linear units and their gradients (Shazeer 2020, "GLU variants improve Transformer", arXiv:2002.05202).

use super::activation::of_kind;
use super::parallel::{Binary, CHUNK, Unary, expect_len, vector_fn};
use super::real::Real;
use crate::graph::kinds::Activation;
use rayon::prelude::*;

/// An activation as a type: its value and its gradient.
trait Kind<T>: Unary<T> + Binary<T> {}
impl<T, F: Unary<T> + Binary<T>> Kind<T> for F {}

/// `out = activation(gate) * up`, elementwise; where `gate` is `None`, `out` holds it.
///
/// # Panics
/// When the lengths differ.
pub fn forward<T: Real>(out: &mut [T], gate: Option<&[T]>, up: &[T], activation: Activation) {
    of_kind!(activation, F => forward_of::<T, F>(out, gate, up));
}

/// `d_gate = d_out * up * activation'(gate)`, `d_up = d_out * activation(gate)`, elementwise; where `d_out` is `None`,
/// `d_gate` holds it.
///
/// # Panics
/// When the lengths differ.
pub fn grad<T: Real>(
    d_gate: &mut [T],
    d_up: &mut [T],
    d_out: Option<&[T]>,
    gate: &[T],
    up: &[T],
    activation: Activation,
) {
    of_kind!(activation, F => grad_of::<T, F>(d_gate, d_up, d_out, gate, up));
}

fn forward_of<T: Real, F: Unary<T>>(out: &mut [T], gate: Option<&[T]>, up: &[T]) {
    expect_len("glu", "gate", gate.map_or(out.len(), <[T]>::len), out.len());
    expect_len("glu", "up", up.len(), out.len());
    out.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).enumerate().for_each(|(i, (out, up))| {
        let gate = gate.map(|gate| &gate[i * CHUNK..][..out.len()]);
        forward_chunk::<T, F>(out, gate, up);
    });
}

vector_fn! {
    fn forward_chunk<T: Real, F: Unary<T>>(out: &mut [T], gate: Option<&[T]>, up: &[T]) {
        match gate {
            Some(gate) => {
                for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                    *out = F::apply(gate) * up;
                }
            }
            None => {
                for (out, &up) in out.iter_mut().zip(up) {
                    *out = F::apply(*out) * up;
                }
            }
        }
    }
}

fn grad_of<T: Real, F: Kind<T>>(d_gate: &mut [T], d_up: &mut [T], d_out: Option<&[T]>, gate: &[T], up: &[T]) {
    let len = d_gate.len();
    expect_len("glu grad", "d_up", d_up.len(), len);
    expect_len("glu grad", "d_out", d_out.map_or(len, <[T]>::len), len);
    expect_len("glu grad", "gate", gate.len(), len);
    expect_len("glu grad", "up", up.len(), len);
    d_gate.par_chunks_mut(CHUNK).zip(d_up.par_chunks_mut(CHUNK)).enumerate().for_each(|(i, (d_gate, d_up))| {
        let here = i * CHUNK..i * CHUNK + d_gate.len();
        if let Some(d_out) = d_out {
            d_gate.copy_from_slice(&d_out[here.clone()]);
        }
        grad_chunk::<T, F>(d_gate, d_up, &gate[here.clone()], &up[here]);
    });
}

vector_fn! {
    /// `d_gate` holds the gradient of the output.
    fn grad_chunk<T: Real, F: Kind<T>>(d_gate: &mut [T], d_up: &mut [T], gate: &[T], up: &[T]) {
        for (((d_gate, d_up), &gate), &up) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up) {
            let d_out = *d_gate;
            *d_up = d_out * <F as Unary<T>>::apply(gate);
            *d_gate = <F as Binary<T>>::apply(d_out * up, gate);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, dot, finite_difference, normal, poison, same_in_all_pools};

    fn run<T: Real>(len: usize, activation: Activation) -> Vec<Vec<T>> {
        let [gate, up, d_out] = [1, 2, 3].map(|seed| normal::<T>(len, seed));
        let [mut out, mut d_gate, mut d_up] = [(); 3].map(|()| poison(len));
        forward(&mut out, Some(&gate), &up, activation);
        grad(&mut d_gate, &mut d_up, Some(&d_out), &gate, &up, activation);
        let (mut over, mut d_over, mut d_up_over) = (gate.clone(), d_out, poison(len));
        forward(&mut over, None, &up, activation);
        grad(&mut d_over, &mut d_up_over, None, &gate, &up, activation);
        assert_eq!([&out, &d_gate, &d_up], [&over, &d_over, &d_up_over], "{activation:?} in place");
        vec![out, d_gate, d_up]
    }

    #[test]
    fn f32_like_f64_in_place_or_not_on_any_number_of_threads() {
        for activation in Activation::ALL {
            for len in [0, 1, 31, 33, 1023, 20_000] {
                let got = same_in_all_pools(|| run::<f32>(len, activation));
                for (got, want) in got.iter().zip(run::<f64>(len, activation)) {
                    // A few roundings of f32 on numbers below 10.
                    assert_close(got, &want, 2e-6, &format!("{activation:?}"));
                }
            }
        }
    }

    #[test]
    fn gradients_are_slopes() {
        for activation in Activation::ALL {
            let [gate, up, d_out] = [1, 2, 3].map(|seed| normal::<f64>(301, seed));
            let got = run::<f64>(301, activation);
            let of = |gate: &[f64], up: &[f64]| {
                let mut out = poison(301);
                forward(&mut out, Some(gate), up, activation);
                dot(&out, &d_out)
            };
            assert_close(&got[1], &finite_difference(&gate, |x| of(x, &up)), 1e-7, &format!("{activation:?}, gate"));
            assert_close(&got[2], &finite_difference(&up, |x| of(&gate, x)), 1e-7, &format!("{activation:?}, up"));
        }
    }
}
