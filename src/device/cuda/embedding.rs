//! Launches of `kernels/embedding.cu`.

use super::launch::{Launch, Ptr};
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::Result;
use crate::graph::EmbeddingSort;

/// Rows of a block, one warp each.
const ROWS: usize = 8;
/// Columns that one warp adds up, and places of the tokens' order.
const GROUP: usize = 256;
const CHUNK: usize = 16;
/// Rows of the table of a block that zeros those without a token.
const ZEROED: usize = 32;
/// Values of a digit that tokens are sorted by: threads of a sorting block.
const DIGITS: u32 = 256;

/// `out (tokens, C) = table (V, C)[ids (tokens)]`.
pub(super) fn forward(q: &mut Queue, o: &Operands) -> Result<()> {
    let &[table_rows, cols] = o.in_axes(1) else { unreachable!("a table is a matrix") };
    let tokens = o.step.inputs[0].shape.elems();
    let kernel = pick(o.out_dtype(0), "embedding_forward_f32", "embedding_forward_bf16");
    let launch = Launch::new(kernel, [tokens.div_ceil(ROWS), 1, 1], 32 * ROWS as u32).ptr(o.output(0));
    q.launch(launch.ptr(o.input(0)).ptr(o.input(1)).long(tokens).int(table_rows).int(cols))
}

/// `d_table (V, C) f32 = ` the sum over tokens t with ids[t] = v of `d_y (tokens, C)`, or `+=` for an accumulator; 0
/// for the id `padding`.
pub(super) fn grad(q: &mut Queue, o: &Operands, padding: Option<usize>) -> Result<()> {
    let &[table_rows, cols] = o.out_axes(0) else { unreachable!("a table is a matrix") };
    let (ids, tokens) = (o.input(1), o.step.inputs[1].shape.elems());
    // No row is so far down: ids are i32.
    let padding = padding.map_or(u32::MAX, |row| row as u32);
    let sort = EmbeddingSort::new(tokens, table_rows);
    let [seen, counts, even, odd] = sort.starts().map(|start| o.scratch().plus(start));
    q.fill(seen, 0, 4 * table_rows as u64)?;
    let mut order = Ptr::NULL;
    for pass in 0..sort.passes {
        let placed = if pass % 2 == 0 { even } else { odd };
        let blocks = [sort.blocks, 1, 1];
        let count = Launch::new("embedding_grad_count", blocks, DIGITS).ptr(counts).ptr(ids).ptr(order);
        q.launch(count.int(tokens).int(table_rows).word(padding).int(8 * pass))?;
        let place = Launch::new("embedding_grad_place", blocks, DIGITS).ptr(placed).ptr(counts).ptr(ids).ptr(order);
        q.launch(place.int(tokens).int(table_rows).word(padding).int(8 * pass))?;
        order = placed;
    }
    let noted = Launch::new("embedding_grad_seen", [tokens.div_ceil(256), 1, 1], 256);
    q.launch(noted.ptr(seen).ptr(ids).ptr(order).int(tokens).int(table_rows).word(padding))?;
    let kernel = pick(o.in_dtype(0), "embedding_grad_f32", "embedding_grad_bf16");
    let adding = (tokens.div_ceil(CHUNK) * cols.div_ceil(GROUP)).div_ceil(ROWS);
    let grid = [adding + if cols > 0 { table_rows.div_ceil(ZEROED) } else { 0 }, 1, 1];
    let launch = Launch::new(kernel, grid, 32 * ROWS as u32).ptr(o.output(0)).ptr(o.input(0)).ptr(ids).ptr(order);
    let launch = launch.ptr(seen).int(adding).int(tokens).int(table_rows).word(padding).int(cols);
    q.launch(launch.int(o.accumulator(0)).ptr(q.now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::SORT_KEYS;

    #[test]
    fn kernels_have_the_same_blocks() {
        let source = include_str!("../../../kernels/embedding.cu");
        for (name, value) in [("ROWS", ROWS), ("DIGITS", DIGITS as usize), ("CHUNK", CHUNK), ("ZEROED", ZEROED)] {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
        assert!(source.contains("constexpr int SORT_WARPS = 8;") && source.contains("constexpr int SORT_ROUNDS = 8;"));
        assert_eq!(SORT_KEYS, 8 * 8 * 32);
        assert!(source.contains("constexpr int GROUP_LANE = 8;") && GROUP == 32 * 8);
    }
}
