//! Elementwise ops: addition, a factor, dropout, and the position table's addition to every sequence of a batch.

use super::parallel::{self, CHUNK, Sum, expect_len, vector_fn, zip_chunk};
use super::real::Real;
use crate::base::philox::{Stream, drop_below};
use rayon::prelude::*;

/// `out = a + b`; where `a` is `None`, `out` holds it.
///
/// # Panics
/// When the lengths differ.
pub fn add<T: Real>(out: &mut [T], a: Option<&[T]>, b: &[T]) {
    parallel::zip::<T, Sum>(out, a, b);
}

/// `out = by * x`; where `x` is `None`, `out` holds it. The gradient is the same op on `d_out`.
///
/// # Panics
/// When the lengths differ.
pub fn scale<T: Real>(out: &mut [T], x: Option<&[T]>, by: f64) {
    if let Some(x) = x {
        expect_len("scale", "x", x.len(), out.len());
    }
    let by = T::from_f64(by);
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| match x {
        Some(x) => out.iter_mut().zip(&x[i * CHUNK..]).for_each(|(out, &x)| *out = x * by),
        None => out.iter_mut().for_each(|out| *out *= by),
    });
}

/// Drops each element with probability `p` and multiplies the others by 1/(1-p) (Srivastava et al. 2014, "Dropout";
/// scaled in training, so that evaluation does nothing); where `x` is `None`, `out` holds it. The gradient is the same
/// op on `d_out`.
///
/// Element i is dropped by word i of `stream`, so that a recomputation drops the same ones.
///
/// # Panics
/// When the lengths differ.
pub fn dropout<T: Real>(out: &mut [T], x: Option<&[T]>, p: f64, stream: Stream) {
    if let Some(x) = x {
        expect_len("dropout", "x", x.len(), out.len());
    }
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        let x = x.map(|x| &x[i * CHUNK..][..out.len()]);
        dropout_chunk(out, x, (i * CHUNK) as u64, p, stream);
    });
}

vector_fn! {
    fn dropout_chunk<T: Real>(out: &mut [T], x: Option<&[T]>, start: u64, p: f64, stream: Stream) {
        match x {
            Some(x) => factors(stream, p, start, out.len(), |at, factors| {
                let x = &x[at..][..factors.len()];
                for ((out, &x), &factor) in out[at..].iter_mut().zip(x).zip(factors) {
                    *out = x * factor;
                }
            }),
            None => factors(stream, p, start, out.len(), |at, factors| {
                for (out, &factor) in out[at..].iter_mut().zip(factors) {
                    *out *= factor;
                }
            }),
        }
    }
}

/// Hands out dropout's factors, 0 or 1/(1-p), of the elements from `start` on: `body(offset, factors)` for runs of up
/// to 64 that cover `len` elements.
#[inline(always)]
pub(super) fn factors<T: Real>(stream: Stream, p: f64, start: u64, len: usize, mut body: impl FnMut(usize, &[T])) {
    const BLOCKS: usize = 16;
    let limit = drop_below(p);
    // With p = 1 the one word that is never below the limit must not become infinity.
    let scale = if p < 1.0 { T::from_f64(1.0 / (1.0 - p)) } else { T::ZERO };
    let mut run = [T::ZERO; 4 * BLOCKS];
    let mut at = 0;
    while at < len {
        let element = start + at as u64;
        let skip = (element % 4) as usize;
        // Word by word rather than block by block, so that the rounds of 16 blocks run side by side in vectors.
        let mut words = [[0u32; BLOCKS]; 4];
        for block in 0..BLOCKS {
            let four = stream.words(element / 4 + block as u64);
            for word in 0..4 {
                words[word][block] = four[word];
            }
        }
        for block in 0..BLOCKS {
            for word in 0..4 {
                run[4 * block + word] = if words[word][block] >= limit { scale } else { T::ZERO };
            }
        }
        let take = (run.len() - skip).min(len - at);
        body(at, &run[skip..][..take]);
        at += take;
    }
}

/// `out[b, t, :] = x[b, t, :] + table[t, :]`; where `x` is `None`, `out` holds it. Sizes: out and x (batch, positions,
/// cols), table (at least `positions`, cols).
///
/// # Panics
/// When a length does not fit the sizes.
pub fn add_position<T: Real>(out: &mut [T], x: Option<&[T]>, table: &[T], batch: usize, positions: usize, cols: usize) {
    expect_len("add_position", "out", out.len(), batch * positions * cols);
    if let Some(x) = x {
        expect_len("add_position", "x", x.len(), out.len());
    }
    assert!(table.len() >= positions * cols, "add_position: table is {} long, want {}", table.len(), positions * cols);
    if out.is_empty() {
        return;
    }
    let rows = parallel::rows_per_chunk(cols);
    out.par_chunks_mut(rows * cols).enumerate().for_each(|(i, out)| {
        for (r, out) in out.chunks_exact_mut(cols).enumerate() {
            let row = i * rows + r;
            let x = x.map(|x| &x[row * cols..][..cols]);
            zip_chunk::<T, Sum>(out, x, &table[row % positions * cols..][..cols]);
        }
    });
}

/// `d_table[t, :] = sum over b, in order, of d_y[b, t, :]`, or `d_table +=` that with `accumulate`. Rows of the table
/// from `positions` on get 0, or nothing. Sizes: d_y (batch, positions, cols), d_table (table_rows, cols).
///
/// # Panics
/// When a length does not fit the sizes.
pub fn add_position_grad<T: Real>(
    d_table: &mut [T],
    d_y: &[T],
    accumulate: bool,
    batch: usize,
    positions: usize,
    table_rows: usize,
    cols: usize,
) {
    expect_len("add_position grad", "d_table", d_table.len(), table_rows * cols);
    expect_len("add_position grad", "d_y", d_y.len(), batch * positions * cols);
    assert!(positions <= table_rows, "add_position grad: {positions} positions, the table has {table_rows}");
    if d_table.is_empty() {
        return;
    }
    let rows = parallel::rows_per_chunk(cols);
    d_table.par_chunks_mut(rows * cols).enumerate().for_each(|(i, d_table)| {
        if !accumulate {
            d_table.fill(T::ZERO);
        }
        let first = i * rows;
        let own = positions.saturating_sub(first).min(d_table.len() / cols) * cols;
        for b in 0..batch {
            if own > 0 {
                zip_chunk::<T, Sum>(&mut d_table[..own], None, &d_y[(b * positions + first) * cols..][..own]);
            }
        }
    });
}

/// `out[b, t + by, :] = x[b, t, :]`; rows that none comes to are 0. Sizes: x (batch, T, cols), out (batch, rows, cols).
///
/// # Panics
/// When a length does not fit the sizes.
pub fn shift<T: Real>(out: &mut [T], x: &[T], by: isize, batch: usize, positions: usize, rows: usize, cols: usize) {
    expect_len("shift", "out", out.len(), batch * rows * cols);
    expect_len("shift", "x", x.len(), batch * positions * cols);
    if out.is_empty() {
        return;
    }
    out.par_chunks_mut(rows * cols).enumerate().for_each(|(b, out)| {
        for (t, out) in out.chunks_exact_mut(cols).enumerate() {
            match t.checked_add_signed(by.saturating_neg()).filter(|&from| from < positions) {
                Some(from) => out.copy_from_slice(&x[(b * positions + from) * cols..][..cols]),
                None => out.fill(T::ZERO),
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shifted_and_what_is_left_is_zero() {
        let x: Vec<f32> = (1..=12).map(|i| i as f32).collect();
        for (by, rows, want) in [
            (1, 4, vec![0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 7, 8, 9, 10, 11, 12]),
            (0, 1, vec![1, 2, 7, 8]),
            (0, 4, vec![1, 2, 3, 4, 5, 6, 0, 0, 7, 8, 9, 10, 11, 12, 0, 0]),
            (-2, 2, vec![5, 6, 0, 0, 11, 12, 0, 0]),
            (-3, 1, vec![0; 4]),
            (isize::MIN, 1, vec![0; 4]),
            (isize::MAX, 2, vec![0; 8]),
            (1, 0, vec![]),
        ] {
            let mut out = vec![f32::NAN; want.len()];
            shift(&mut out, &x, by, 2, 3, rows, 2);
            assert_eq!(out, want.iter().map(|&i| i as f32).collect::<Vec<_>>(), "by {by} of {rows}");
        }
        shift(&mut [0f32; 0], &[], 1, 0, 3, 4, 2);
        shift(&mut [0f32; 0], &[], 1, 2, 3, 4, 0);
    }
    use crate::device::host::testing::{assert_close, normal, poison, same_in_all_pools};

    const LENS: [usize; 7] = [0, 1, 31, 33, 1023, CHUNK, 2 * CHUNK + 5];

    fn stream(op: u32) -> Stream {
        Stream { seed: 0x0123_4567_89ab_cdef, step: 3, microbatch: 1, op }
    }

    #[test]
    fn adds() {
        for len in LENS {
            let (a, b) = (normal::<f32>(len, 1), normal::<f32>(len, 2));
            let got = same_in_all_pools(|| {
                let (mut out, mut in_place) = (poison(len), a.clone());
                add(&mut out, Some(&a), &b);
                add(&mut in_place, None, &b);
                vec![out, in_place]
            });
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            assert_eq!(got, [want.clone(), want]);
        }
    }

    #[test]
    fn a_factor_multiplies_in_place_too() {
        for len in LENS {
            let x = normal::<f32>(len, 1);
            let got = same_in_all_pools(|| {
                let (mut out, mut in_place) = (poison(len), x.clone());
                scale(&mut out, Some(&x), -0.3);
                scale(&mut in_place, None, -0.3);
                vec![out, in_place]
            });
            let want: Vec<f32> = x.iter().map(|x| x * -0.3f32).collect();
            assert_eq!(got, [want.clone(), want]);
        }
    }

    #[test]
    fn dropout_follows_the_stream() {
        for p in [0.0, 0.1, 0.5, 0.9, 1.0] {
            for len in LENS {
                let x = normal::<f32>(len, 1);
                let got = same_in_all_pools(|| {
                    let (mut out, mut in_place) = (poison(len), x.clone());
                    dropout(&mut out, Some(&x), p, stream(5));
                    dropout(&mut in_place, None, p, stream(5));
                    vec![out, in_place]
                });
                assert_eq!(got[0], got[1]);
                let scale = if p == 1.0 { 0.0 } else { (1.0 / (1.0 - p)) as f32 };
                for (i, (&out, &x)) in got[0].iter().zip(&x).enumerate() {
                    let keep = stream(5).word(i as u64) >= drop_below(p);
                    assert_eq!(out, if keep { x * scale } else { 0.0 }, "{i} of {len}, p {p}");
                }
            }
        }
        let mut out = vec![1f32; 100_000];
        dropout(&mut out, None, 0.1, stream(6));
        let dropped = out.iter().filter(|&&x| x == 0.0).count();
        // 10,000 expected with a standard deviation of 95.
        assert!((9_600..10_400).contains(&dropped), "{dropped}");
    }

    #[test]
    fn factors_may_start_anywhere() {
        for start in [0, 1, 2, 3, 62, 1021] {
            for len in [0, 1, 5, 63, 64, 65, 200] {
                let mut got = poison::<f64>(len);
                factors(stream(7), 0.3, start, len, |at, run| got[at..][..run.len()].copy_from_slice(run));
                for (i, got) in got.iter().enumerate() {
                    let keep = stream(7).word(start + i as u64) >= drop_below(0.3);
                    assert_eq!(*got, if keep { 1.0 / 0.7 } else { 0.0 }, "{start} {i}");
                }
            }
        }
    }

    #[test]
    fn positions() {
        for (batch, positions, table_rows, cols) in
            [(0, 3, 3, 4), (1, 1, 1, 1), (3, 5, 9, 7), (2, 33, 40, 300), (2, 5, 5, 9000), (2, 0, 3, 2)]
        {
            let len = batch * positions * cols;
            let (x, d_y) = (normal::<f32>(len, 1), normal::<f32>(len, 2));
            let table = normal::<f32>(table_rows * cols, 3);
            let got = same_in_all_pools(|| {
                let (mut out, mut in_place) = (poison(len), x.clone());
                add_position(&mut out, Some(&x), &table, batch, positions, cols);
                add_position(&mut in_place, None, &table, batch, positions, cols);
                let (mut d_table, mut more) = (poison(table_rows * cols), table.clone());
                add_position_grad(&mut d_table, &d_y, false, batch, positions, table_rows, cols);
                add_position_grad(&mut more, &d_y, true, batch, positions, table_rows, cols);
                vec![out, in_place, d_table, more]
            });
            let want: Vec<f32> = (0..len).map(|e| x[e] + table[e % (positions * cols)]).collect();
            assert_eq!([&got[0], &got[1]], [&want, &want]);
            let mut fresh = vec![0f32; table_rows * cols];
            let mut more = table.clone();
            for e in 0..len {
                fresh[e % (positions * cols)] += d_y[e];
                more[e % (positions * cols)] += d_y[e];
            }
            assert_eq!([&got[2], &got[3]], [&fresh, &more], "the batch is added in order");
            assert_close(&got[2][positions * cols..], &vec![0f32; (table_rows - positions) * cols], 0.0, "rows unused");
        }
    }
}
