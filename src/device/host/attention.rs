//! Scaled dot-product attention and its gradient (Vaswani et al. 2017, "Attention is all you need", arXiv:1706.03762,
//! eq. 1).
//!
//! Sizes: B batch, H heads, Tq queries, Tk keys, D width of a head; q (B Tq, H D); k, v (B Tk, Hkv D), where H / Hkv
//! heads in a row share one of k and v. `out (B Tq, H D) = dropout(softmax(scale q k^T + mask)) v`, `lse (B, H, Tq)` is
//! the logarithm of each softmax's denominator, kept so that the gradient recomputes the probabilities instead of
//! keeping them (Dao et al. 2022, "FlashAttention", arXiv:2205.14135; unlike theirs, a tile here has all keys at once,
//! so nothing is rescaled).
//!
//! A task of the forward is 64 queries of one head; a task of the gradient is one head of k and v, with its query heads
//! and their tiles in order. Neither depends on the number of threads, and no sum crosses tasks.

use super::elementwise::factors;
use super::gemm::{Matrix, Threads, gemm};
use super::parallel::{expect_len, for_each_index, vector_fn, with_scratch};
use super::real::Real;
use super::reduce;
use super::strided::{Rows, RowsMut};
use crate::base::philox::Stream;

/// Queries of a tile: with 1024 keys in f32, a tile of scores fits the second-level cache.
const TILE: usize = 64;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Sequences, B.
    pub batch: usize,
    /// Heads of q, H: a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of k and v.
    pub kv_heads: usize,
    /// Queries of a sequence, Tq.
    pub queries: usize,
    /// Keys of a sequence, Tk.
    pub keys: usize,
    /// Elements of a head, D.
    pub width: usize,
}

/// What an attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Queries (B Tq, H D).
    pub q: Rows<'a, T>,
    /// Keys (B Tk, Hkv D).
    pub k: Rows<'a, T>,
    /// Values (B Tk, Hkv D).
    pub v: Rows<'a, T>,
    /// (B, Tk): 0 hides a key from all queries of its sequence.
    pub key_mask: Option<&'a [i32]>,
    /// The sizes above.
    pub sizes: Sizes,
    /// What q k^T is multiplied by: usually 1 / sqrt(D).
    pub scale: f64,
    /// Query i sees keys 0..=i alone.
    pub causal: bool,
    /// Probability that a weight is dropped, and the random words: element ((b H + h) Tq + i) Tk + j for query i and
    /// key j.
    pub dropout: Option<(f64, Stream)>,
}

/// Overwrites `out (B, Tq, H D)` and `lse (B, H, Tq)`. A query that sees no key gets 0, and minus infinity.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn forward<T: Real>(out: &mut [T], lse: &mut [T], inputs: &Inputs<T>) {
    let Sizes { batch, heads, kv_heads, queries, keys, width } = inputs.sizes;
    inputs.check();
    expect_len("attention", "out", out.len(), batch * queries * heads * width);
    expect_len("attention", "lse", lse.len(), batch * heads * queries);
    let tiles = queries.div_ceil(TILE);
    let out = RowsMut::whole(out, heads * width);
    let lse = RowsMut::whole(lse, queries);
    for_each_index(batch * heads * tiles, |task| {
        let (head, first) = (task / tiles, task % tiles * TILE);
        let (b, h) = (head / heads, head % heads);
        let kv = h / (heads / kv_heads);
        let rows = TILE.min(queries - first);
        let seen = inputs.keys_seen(first + rows);
        // SAFETY: one task has this head and this tile, and asks for it once.
        let lse = unsafe { lse.row(head, first..first + rows) };
        with_scratch(rows * (seen + width) + keys, |scratch| {
            let (scores, rest) = scratch.split_at_mut(rows * seen);
            let (product, bias) = rest.split_at_mut(rows * width);
            inputs.fill_bias(bias, b);
            let q = inputs.q.matrix(b * queries + first, h * width);
            let k = inputs.k.matrix(b * keys, kv * width);
            let v = inputs.v.matrix(b * keys, kv * width);
            gemm(scores, seen, q, k.transposed(), [rows, seen, width], false, Threads::One);
            let mut sums = [T::ZERO; TILE];
            let sums = &mut sums[..rows];
            softmax(scores, lse, sums, bias, inputs, head, first);
            gemm(product, width, Matrix::rows(scores, seen), v, [rows, width, seen], false, Threads::One);
            for i in 0..rows {
                // SAFETY: one task has these queries of this head, and asks for each row once.
                let out = unsafe { out.row(b * queries + first + i, h * width..(h + 1) * width) };
                // The product is of weights that are not yet divided by their sum: width divisions less per key.
                let product = &product[i * width..][..width];
                let factor = if sums[i] == T::ZERO { T::ZERO } else { T::ONE / sums[i] };
                out.iter_mut().zip(product).for_each(|(out, &product)| *out = product * factor);
            }
        });
    });
}

/// The gradient, given that of `out`, and the forward's `out` and `lse`. Overwrites `d_q (B Tq, H D)`, `d_k` and `d_v
/// (B Tk, Hkv D)`.
///
/// With P the softmax, M dropout's factors and `delta` the row sums of `d_out * out`: `d_v = (P M)^T d_out`,
/// `d_s = P (M (d_out v^T) - delta)`, `d_q = scale d_s k`, `d_k = scale d_s^T q`.
///
/// # Panics
/// When a length does not fit the sizes.
pub fn backward<T: Real>(
    d_q: RowsMut<T>,
    d_k: RowsMut<T>,
    d_v: RowsMut<T>,
    d_out: &[T],
    out: &[T],
    lse: &[T],
    inputs: &Inputs<T>,
) {
    let Sizes { batch, heads, kv_heads, queries, keys, width } = inputs.sizes;
    inputs.check();
    expect_len("attention backward", "d_out", d_out.len(), batch * queries * heads * width);
    expect_len("attention backward", "out", out.len(), d_out.len());
    expect_len("attention backward", "lse", lse.len(), batch * heads * queries);
    for (name, rows, d, width) in [
        ("d_q", queries, &d_q, heads * width),
        ("d_k", keys, &d_k, kv_heads * width),
        ("d_v", keys, &d_v, kv_heads * width),
    ] {
        assert!(
            d.rows() == batch * rows && d.width() == width,
            "attention backward: {name} has {} rows of {}, want {} of {width}",
            d.rows(),
            d.width(),
            batch * rows
        );
    }
    let group = heads / kv_heads;
    let tile = TILE.min(queries);
    for_each_index(batch * kv_heads, |task| {
        let (b, kv) = (task / kv_heads, task % kv_heads);
        let k = inputs.k.matrix(b * keys, kv * width);
        let v = inputs.v.matrix(b * keys, kv * width);
        with_scratch(2 * tile * keys + tile * width + 2 * keys * width + 2 * keys, |scratch| {
            let (scores, rest) = scratch.split_at_mut(tile * keys);
            let (d_scores, rest) = rest.split_at_mut(tile * keys);
            let (d_q_tile, rest) = rest.split_at_mut(tile * width);
            let (d_k_sum, rest) = rest.split_at_mut(keys * width);
            let (d_v_sum, rest) = rest.split_at_mut(keys * width);
            let (bias, keep) = rest.split_at_mut(keys);
            d_k_sum.fill(T::ZERO);
            d_v_sum.fill(T::ZERO);
            keep.fill(T::ONE);
            inputs.fill_bias(bias, b);
            for h in kv * group..(kv + 1) * group {
                let head = b * heads + h;
                for first in (0..queries).step_by(TILE) {
                    let rows = TILE.min(queries - first);
                    let seen = inputs.keys_seen(first + rows);
                    let at = (b * queries + first) * heads * width + h * width;
                    let (d_out, out) = (&d_out[at.min(d_out.len())..], &out[at.min(out.len())..]);
                    let (scores, d_scores) = (&mut scores[..rows * seen], &mut d_scores[..rows * seen]);
                    let q = inputs.q.matrix(b * queries + first, h * width);
                    let d_out_tile = Matrix::rows(d_out, heads * width);
                    gemm(scores, seen, q, k.transposed(), [rows, seen, width], false, Threads::One);
                    gemm(d_scores, seen, d_out_tile, v.transposed(), [rows, seen, width], false, Threads::One);
                    let lse = &lse[head * queries + first..][..rows];
                    grad_rows(scores, d_scores, keep, d_out, out, lse, bias, inputs, head, first);
                    let weights = Matrix::rows(scores, seen);
                    let d_scores = Matrix::rows(d_scores, seen);
                    gemm(d_v_sum, width, weights.transposed(), d_out_tile, [seen, width, rows], true, Threads::One);
                    gemm(d_k_sum, width, d_scores.transposed(), q, [seen, width, rows], true, Threads::One);
                    gemm(d_q_tile, width, d_scores, k, [rows, width, seen], false, Threads::One);
                    for i in 0..rows {
                        // SAFETY: one task has this head, and asks for each of its rows once.
                        let d_q = unsafe { d_q.row(b * queries + first + i, h * width..(h + 1) * width) };
                        d_q.copy_from_slice(&d_q_tile[i * width..][..width]);
                    }
                }
            }
            for j in 0..keys {
                // SAFETY: one task has this head of k and v, and asks for each of its rows once.
                let d_k = unsafe { d_k.row(b * keys + j, kv * width..(kv + 1) * width) };
                d_k.copy_from_slice(&d_k_sum[j * width..][..width]);
                // SAFETY: as above.
                let d_v = unsafe { d_v.row(b * keys + j, kv * width..(kv + 1) * width) };
                d_v.copy_from_slice(&d_v_sum[j * width..][..width]);
            }
        });
    });
}

impl<T: Real> Inputs<'_, T> {
    fn check(&self) {
        let Sizes { batch, heads, kv_heads, keys, width, .. } = self.sizes;
        assert!(width > 0, "attention: heads have no elements");
        assert!(kv_heads > 0 && heads % kv_heads == 0, "attention: {heads} heads share {kv_heads} of k and v");
        if let Some(mask) = self.key_mask {
            expect_len("attention", "key_mask", mask.len(), batch * keys);
        }
    }

    /// Keys that any of the queries below `end` sees; the later ones are skipped.
    fn keys_seen(&self, end: usize) -> usize {
        if self.causal { self.sizes.keys.min(end) } else { self.sizes.keys }
    }

    /// What is added to the scores of sequence `b`: 0, or minus infinity where a key is hidden.
    fn fill_bias(&self, bias: &mut [T], b: usize) {
        match self.key_mask {
            None => bias.fill(T::ZERO),
            Some(mask) => {
                for (bias, &seen) in bias.iter_mut().zip(&mask[b * self.sizes.keys..]) {
                    *bias = if seen != 0 { T::ZERO } else { T::from_f64(f64::NEG_INFINITY) };
                }
            }
        }
    }

    /// Number of the first random word of query `i` of a head.
    #[inline(always)]
    fn first_word(&self, head: usize, i: usize) -> u64 {
        ((head * self.sizes.queries + i) * self.sizes.keys) as u64
    }
}

vector_fn! {
    /// Turns a tile of scores into `exp(score - max)`, dropped, and gives the sum before dropping of each row.
    fn softmax<T: Real>(
        scores: &mut [T],
        lse: &mut [T],
        sums: &mut [T],
        bias: &[T],
        inputs: &Inputs<'_, T>,
        head: usize,
        first: usize,
    ) {
        let seen = scores.len() / sums.len();
        let scale = T::from_f64(inputs.scale);
        let nothing = T::from_f64(f64::NEG_INFINITY);
        for i in 0..sums.len() {
            let (row, hidden) = scores[i * seen..][..seen].split_at_mut(row_sees(inputs.causal, first + i, seen));
            hidden.fill(T::ZERO);
            for (x, &bias) in row.iter_mut().zip(bias) {
                *x = x.mul_add(scale, bias);
            }
            let max = reduce::max(row);
            if max == nothing {
                row.fill(T::ZERO);
                (sums[i], lse[i]) = (T::ZERO, nothing);
                continue;
            }
            let sum = reduce::exp_and_sum(row, max);
            (sums[i], lse[i]) = (sum, max + sum.ln());
            if let Some((p, stream)) = inputs.dropout {
                factors(stream, p, inputs.first_word(head, first + i), row.len(), |at, factors| {
                    for (x, &factor) in row[at..].iter_mut().zip(factors) {
                        *x *= factor;
                    }
                });
            }
        }
    }
}

vector_fn! {
    /// Turns a tile of scores into the weights that v was multiplied by, and the gradient of those into that of q k^T.
    fn grad_rows<T: Real>(
        scores: &mut [T],
        d_scores: &mut [T],
        keep: &mut [T],
        d_out: &[T],
        out: &[T],
        lse: &[T],
        bias: &[T],
        inputs: &Inputs<'_, T>,
        head: usize,
        first: usize,
    ) {
        let seen = scores.len() / lse.len();
        let scale = T::from_f64(inputs.scale);
        let Sizes { heads, width, .. } = inputs.sizes;
        for (i, &lse) in lse.iter().enumerate() {
            let sees = row_sees(inputs.causal, first + i, seen);
            let (row, hidden) = scores[i * seen..][..seen].split_at_mut(sees);
            let (d_row, d_hidden) = d_scores[i * seen..][..seen].split_at_mut(sees);
            hidden.fill(T::ZERO);
            d_hidden.fill(T::ZERO);
            if lse == T::from_f64(f64::NEG_INFINITY) {
                row.fill(T::ZERO);
                d_row.fill(T::ZERO);
                continue;
            }
            if let Some((p, stream)) = inputs.dropout {
                factors(stream, p, inputs.first_word(head, first + i), sees, |at, factors| {
                    keep[at..][..factors.len()].copy_from_slice(factors);
                });
            }
            let at = i * heads * width;
            let [delta] = reduce::sums([&d_out[at..][..width], &out[at..][..width]], |[d_out, out]| [d_out * out]);
            for (((x, d), &bias), &keep) in row.iter_mut().zip(d_row).zip(bias).zip(&*keep) {
                let p = (x.mul_add(scale, bias) - lse).exp();
                *x = p * keep;
                *d = p * (d.mul_add(keep, -delta)) * scale;
            }
        }
    }
}

/// Of the `seen` keys of a tile, those that query `i` sees.
#[inline(always)]
fn row_sees(causal: bool, i: usize, seen: usize) -> usize {
    if causal { seen.min(i + 1) } else { seen }
}

#[cfg(test)]
mod tests;
