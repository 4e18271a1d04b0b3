//! The embedding: rows of a table picked by token ids, and the gradient that adds rows back.
//!
//! Sizes: `ids` (tokens), table (table_rows, cols), out (tokens, cols). Ids are checked where data enters; one out of
//! range here is our own bug and panics.

use super::parallel::{Sum, expect_len, rows_per_chunk, zip_chunk};
use super::real::Real;
use rayon::prelude::*;

/// Parts of the table whose gradients are computed side by side. A number of its own, not the threads', though the bits
/// would be the same: more parts than threads even out tokens that are frequent.
const PARTS: usize = 64;

/// `out[t, :] = table[ids[t], :]`.
///
/// # Panics
/// When a length does not fit, or an id is outside the table.
pub fn forward<T: Real>(out: &mut [T], ids: &[i32], table: &[T], cols: usize) {
    expect_len("embedding", "out", out.len(), ids.len() * cols);
    if out.is_empty() {
        return;
    }
    let rows = rows_per_chunk(cols);
    out.par_chunks_mut(rows * cols).zip(ids.par_chunks(rows)).for_each(|(out, ids)| {
        for (out, &id) in out.chunks_exact_mut(cols).zip(ids) {
            out.copy_from_slice(&table[checked(id, table.len() / cols) * cols..][..cols]);
        }
    });
}

/// `d_table[v, :] = sum over tokens t with ids[t] = v, in order, of d_y[t, :]`, or `d_table +=` that with `accumulate`;
/// for the id `padding` the sum is 0.
///
/// # Panics
/// When a length does not fit, or an id is outside the table.
pub fn grad<T: Real>(
    d_table: &mut [T],
    d_y: &[T],
    ids: &[i32],
    padding: Option<usize>,
    accumulate: bool,
    table_rows: usize,
    cols: usize,
) {
    expect_len("embedding grad", "d_table", d_table.len(), table_rows * cols);
    expect_len("embedding grad", "d_y", d_y.len(), ids.len() * cols);
    ids.iter().for_each(|&id| _ = checked(id, table_rows));
    if d_table.is_empty() {
        return;
    }
    // Each part reads all ids, which is little beside the rows, and adds those that are its own.
    let part = table_rows.div_ceil(PARTS);
    d_table.par_chunks_mut(part * cols).enumerate().for_each(|(i, d_table)| {
        if !accumulate {
            d_table.fill(T::ZERO);
        }
        let own = d_table.len() / cols;
        for (&id, d_y) in ids.iter().zip(d_y.chunks_exact(cols)) {
            let row = (id as usize).wrapping_sub(i * part);
            if row < own && padding != Some(id as usize) {
                zip_chunk::<T, Sum>(&mut d_table[row * cols..][..cols], None, d_y);
            }
        }
    });
}

#[inline(always)]
fn checked(id: i32, table_rows: usize) -> usize {
    let row = id as usize; // a negative id becomes far too large
    assert!(row < table_rows, "embedding: id {id} is outside a table of {table_rows} rows");
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::philox::Sequence;
    use crate::device::host::testing::{assert_close, dot, finite_difference, normal, poison, same_in_all_pools};

    fn ids(tokens: usize, table_rows: usize) -> Vec<i32> {
        let mut sequence = Sequence::new(3, 3);
        (0..tokens).map(|_| sequence.below(table_rows as u64) as i32).collect()
    }

    const SHAPES: [(usize, usize, usize); 7] =
        [(0, 3, 4), (1, 1, 1), (5, 7, 0), (31, 2, 33), (65, 63, 8), (500, 257, 129), (3, 1023, 65)];

    #[test]
    fn picks_and_adds_rows() {
        for (tokens, table_rows, cols) in SHAPES {
            let ids = ids(tokens, table_rows);
            let table = normal::<f32>(table_rows * cols, 1);
            let d_y = normal::<f32>(tokens * cols, 2);
            let got = same_in_all_pools(|| {
                let (mut out, mut d_table) = (poison(tokens * cols), poison(table_rows * cols));
                forward(&mut out, &ids, &table, cols);
                grad(&mut d_table, &d_y, &ids, None, false, table_rows, cols);
                let mut more = table.clone();
                grad(&mut more, &d_y, &ids, None, true, table_rows, cols);
                vec![out, d_table, more]
            });
            let mut fresh = vec![0f32; table_rows * cols];
            let mut more = table.clone();
            for (t, &id) in ids.iter().enumerate() {
                for c in 0..cols {
                    assert_eq!(got[0][t * cols + c], table[id as usize * cols + c]);
                    fresh[id as usize * cols + c] += d_y[t * cols + c];
                    more[id as usize * cols + c] += d_y[t * cols + c];
                }
            }
            assert_eq!([&got[1], &got[2]], [&fresh, &more], "tokens are added in order");
        }
    }

    #[test]
    fn the_row_of_padding_gets_nothing() {
        let (mut d_table, mut more) = (poison::<f32>(6), vec![1.0; 6]);
        let d_y = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0];
        grad(&mut d_table, &d_y, &[1, 2, 1], Some(1), false, 3, 2);
        grad(&mut more, &d_y, &[1, 2, 1], Some(2), true, 3, 2);
        assert_eq!(d_table, [0.0, 0.0, 0.0, 0.0, 4.0, 8.0]);
        assert_eq!(more, [1.0, 1.0, 18.0, 35.0, 1.0, 1.0]);
    }

    #[test]
    fn gradient_is_the_slope() {
        let ids = ids(17, 5);
        let (table, d_y) = (normal::<f64>(15, 1), normal::<f64>(51, 2));
        let mut d_table = poison(15);
        grad(&mut d_table, &d_y, &ids, None, false, 5, 3);
        let slope = finite_difference(&table, |table| {
            let mut out = poison(51);
            forward(&mut out, &ids, table, 3);
            dot(&out, &d_y)
        });
        assert_close(&d_table, &slope, 1e-8, "d_table");
    }

    #[test]
    #[should_panic(expected = "id -1 is outside a table of 3 rows")]
    fn an_id_outside_is_our_bug() {
        grad(&mut [0f32; 6], &[0.0; 2], &[-1], None, true, 3, 2);
    }
}
