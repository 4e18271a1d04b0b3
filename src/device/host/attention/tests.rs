//! Attention against a plain f64 loop over queries and keys, in all its variants.

use super::*;
use crate::base::philox::drop_below;
use crate::device::host::testing::{assert_close, dot, finite_difference, normal, poison, same_in_all_pools};

#[derive(Clone, Copy, Debug)]
struct Case {
    sizes: Sizes,
    causal: bool,
    masked: bool,
    dropout: f64,
}

const fn sizes(batch: usize, heads: usize, kv_heads: usize, queries: usize, keys: usize, width: usize) -> Sizes {
    Sizes { batch, heads, kv_heads, queries, keys, width }
}

/// All variants of every shape.
fn cases() -> Vec<Case> {
    let shapes = [
        sizes(1, 1, 1, 1, 1, 1),
        sizes(2, 3, 3, 31, 31, 8),
        sizes(2, 4, 2, 33, 33, 16),
        sizes(1, 2, 1, 65, 70, 5),
        sizes(1, 2, 2, 70, 65, 33),
        sizes(1, 1, 1, 130, 130, 64),
        sizes(2, 2, 2, 0, 3, 4),
        sizes(2, 2, 2, 3, 0, 4),
        sizes(0, 2, 2, 3, 3, 4),
    ];
    let mut all = Vec::new();
    for sizes in shapes {
        for (causal, masked, dropout) in
            [(false, false, 0.0), (true, false, 0.0), (false, true, 0.0), (true, true, 0.3), (false, false, 0.1)]
        {
            all.push(Case { sizes, causal, masked, dropout });
        }
    }
    all
}

/// q, k, v each in memory of its own, and a mask that hides every third key and all keys of the last sequence.
struct Operands<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    mask: Vec<i32>,
}

impl<T: Real> Operands<T> {
    fn new(s: Sizes) -> Self {
        let keys = s.batch * s.keys;
        let hidden = |e: usize| e % 3 == 1 || (s.batch > 1 && e / s.keys == s.batch - 1);
        Operands {
            q: normal(s.batch * s.queries * s.heads * s.width, 1),
            k: normal(keys * s.kv_heads * s.width, 2),
            v: normal(keys * s.kv_heads * s.width, 3),
            mask: (0..keys).map(|e| i32::from(!hidden(e))).collect(),
        }
    }

    fn inputs(&self, case: Case) -> Inputs<'_, T> {
        let s = case.sizes;
        Inputs {
            q: Rows { data: &self.q, offset: 0, stride: s.heads * s.width },
            k: Rows { data: &self.k, offset: 0, stride: s.kv_heads * s.width },
            v: Rows { data: &self.v, offset: 0, stride: s.kv_heads * s.width },
            key_mask: case.masked.then_some(&self.mask),
            sizes: s,
            scale: 1.0 / (s.width as f64).sqrt(),
            causal: case.causal,
            dropout: (case.dropout > 0.0).then_some((case.dropout, stream())),
        }
    }
}

fn stream() -> Stream {
    Stream { seed: 11, step: 2, microbatch: 0, op: 4 }
}

/// out and lse by the formula, one query at a time.
fn plain(operands: &Operands<f64>, case: Case) -> (Vec<f64>, Vec<f64>) {
    let Sizes { batch, heads, kv_heads, queries, keys, width } = case.sizes;
    let mut out = vec![0.0; batch * queries * heads * width];
    let mut lse = vec![f64::NEG_INFINITY; batch * heads * queries];
    for e in 0..batch * heads * queries {
        let (b, h, i) = (e / queries / heads, e / queries % heads, e % queries);
        let kv = h * kv_heads / heads;
        let q = &operands.q[((b * queries + i) * heads + h) * width..][..width];
        let mut weights = vec![0.0; keys];
        for j in 0..keys {
            let sees = (!case.causal || j <= i) && (!case.masked || operands.mask[b * keys + j] != 0);
            let k = &operands.k[((b * keys + j) * kv_heads + kv) * width..][..width];
            weights[j] = if sees { (dot(q, k) / (width as f64).sqrt()).exp() } else { 0.0 };
        }
        let sum: f64 = weights.iter().sum();
        if sum == 0.0 {
            continue;
        }
        lse[e] = sum.ln();
        for j in 0..keys {
            let dropped = case.dropout > 0.0 && stream().word((e * keys + j) as u64) < drop_below(case.dropout);
            let factor = if dropped { 0.0 } else { 1.0 / (1.0 - case.dropout) };
            for d in 0..width {
                out[((b * queries + i) * heads + h) * width + d] +=
                    weights[j] / sum * factor * operands.v[((b * keys + j) * kv_heads + kv) * width + d];
            }
        }
    }
    (out, lse)
}

/// out, lse, d_q, d_k, d_v.
fn run<T: Real>(operands: &Operands<T>, case: Case) -> Vec<Vec<T>> {
    let s = case.sizes;
    let inputs = operands.inputs(case);
    let (mut out, mut lse) = (poison(operands.q.len()), poison(s.batch * s.heads * s.queries));
    forward(&mut out, &mut lse, &inputs);
    let d_out = normal::<T>(out.len(), 4);
    let (mut d_q, mut d_k, mut d_v) = (poison(out.len()), poison(operands.k.len()), poison(operands.k.len()));
    backward(
        RowsMut::whole(&mut d_q, s.heads * s.width),
        RowsMut::whole(&mut d_k, s.kv_heads * s.width),
        RowsMut::whole(&mut d_v, s.kv_heads * s.width),
        &d_out,
        &out,
        &lse,
        &inputs,
    );
    vec![out, lse, d_q, d_k, d_v]
}

#[test]
fn forward_is_the_formula() {
    for case in cases() {
        let operands = Operands::<f64>::new(case.sizes);
        let (out, lse) = plain(&operands, case);
        let got = run(&operands, case);
        assert_close(&got[0], &out, 1e-13, &format!("out of {case:?}"));
        assert_close(&got[1], &lse, 1e-13, &format!("lse of {case:?}"));
    }
}

#[test]
fn f32_like_f64_on_any_number_of_threads() {
    for case in cases() {
        let operands = Operands::<f32>::new(case.sizes);
        let got = same_in_all_pools(|| run(&operands, case));
        for (i, (got, want)) in got.iter().zip(run(&Operands::<f64>::new(case.sizes), case)).enumerate() {
            // Scores are sums of up to 64 products, and weights their exponentials: some ten roundings of f32.
            assert_close(got, &want, 2e-6, &format!("result {i} of {case:?}"));
            assert!(got.iter().all(|x| !x.is_nan()));
        }
    }
}

#[test]
fn gradients_are_slopes() {
    for shape in [sizes(2, 4, 2, 3, 3, 2), sizes(1, 1, 1, 66, 4, 1), sizes(1, 2, 2, 4, 7, 3)] {
        for (causal, masked, dropout) in [(false, false, 0.0), (true, false, 0.0), (true, true, 0.3)] {
            let case = Case { sizes: shape, causal, masked, dropout };
            let operands = Operands::<f64>::new(shape);
            let got = run(&operands, case);
            let d_out = normal::<f64>(got[0].len(), 4);
            let loss = |q: &[f64], k: &[f64], v: &[f64]| {
                let moved = Operands { q: q.to_vec(), k: k.to_vec(), v: v.to_vec(), mask: operands.mask.clone() };
                let (mut out, mut lse) = (poison(q.len()), poison(got[1].len()));
                forward(&mut out, &mut lse, &moved.inputs(case));
                dot(&out, &d_out)
            };
            let Operands { q, k, v, .. } = &operands;
            assert_close(&got[2], &finite_difference(q, |q| loss(q, k, v)), 1e-8, &format!("d_q of {case:?}"));
            assert_close(&got[3], &finite_difference(k, |k| loss(q, k, v)), 1e-8, &format!("d_k of {case:?}"));
            assert_close(&got[4], &finite_difference(v, |v| loss(q, k, v)), 1e-8, &format!("d_v of {case:?}"));
        }
    }
}

#[test]
fn packed_gives_the_bits_of_separate() {
    let s = sizes(2, 4, 2, 67, 67, 16);
    let case = Case { sizes: s, causal: true, masked: true, dropout: 0.2 };
    let operands = Operands::<f32>::new(s);
    let want = run(&operands, case);
    let (wide, narrow) = (s.heads * s.width, s.kv_heads * s.width);
    let stride = wide + 2 * narrow;
    let mut packed = Vec::new();
    for row in 0..s.batch * s.queries {
        packed.extend_from_slice(&operands.q[row * wide..][..wide]);
        packed.extend_from_slice(&operands.k[row * narrow..][..narrow]);
        packed.extend_from_slice(&operands.v[row * narrow..][..narrow]);
    }
    let inputs = Inputs {
        q: Rows { data: &packed, offset: 0, stride },
        k: Rows { data: &packed, offset: wide, stride },
        v: Rows { data: &packed, offset: wide + narrow, stride },
        ..operands.inputs(case)
    };
    let (mut out, mut lse) = (poison(want[0].len()), poison(want[1].len()));
    forward(&mut out, &mut lse, &inputs);
    assert_eq!([&out, &lse], [&want[0], &want[1]]);
    let mut d_packed = poison::<f32>(packed.len());
    let columns = [0..wide, wide..wide + narrow, wide + narrow..stride];
    let [d_q, d_k, d_v] = RowsMut::split(&mut d_packed, stride, columns);
    backward(d_q, d_k, d_v, &normal(out.len(), 4), &out, &lse, &inputs);
    for (row, d) in d_packed.chunks_exact(stride).enumerate() {
        assert_eq!(d[..wide], want[2][row * wide..][..wide]);
        assert_eq!(d[wide..wide + narrow], want[3][row * narrow..][..narrow]);
        assert_eq!(d[wide + narrow..], want[4][row * narrow..][..narrow]);
    }
}

#[test]
fn a_query_that_sees_nothing_gives_zero_and_nan_shows() {
    let case = Case { sizes: sizes(1, 1, 1, 2, 2, 3), causal: true, masked: true, dropout: 0.0 };
    let mut operands = Operands::<f32>::new(case.sizes);
    operands.mask = vec![0, 1];
    let got = run(&operands, case);
    assert!(got[0][..3].iter().chain(&got[2][..3]).all(|&x| x == 0.0), "the first query sees the hidden key alone");
    assert_eq!(got[1][0], f32::NEG_INFINITY);
    assert_eq!(got[0][3..], operands.v[3..], "the second sees itself alone");
    operands.q[4] = f32::NAN;
    let got = run(&operands, case);
    assert!(got[0][3].is_nan() && got[0][0] == 0.0);
}
