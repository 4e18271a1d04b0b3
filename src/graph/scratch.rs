//! Scratch: what an op's kernels need besides its operands, in bytes of the workspace, for devices that ask for it.
//!
//! Kernels that reduce over many blocks leave partial results for a second kernel. How many is a function of shapes alone, never of
//! the chip, so neither the plan's bytes nor the order of any sum depend on the machine.

mod conv;

use super::graph::{Graph, Node};
use super::op::Op;
pub use conv::{ConvSizes, ConvTile, conv_bias_bytes, conv_bias_parts, conv_regions, is_channels_last};

/// Columns that one block of `kernels/column_sum.cu` sums.
pub const COLUMN_TILE: usize = 256;

/// Blocks that a launch is divided into where a matrix has the rows for it: 8 on each of an H200's 132 multiprocessors.
const BLOCKS: usize = 1056;

/// Fewest rows of a part, so that writing partial sums is cheap beside reading the rows.
const LEAST_ROWS: usize = 32;

/// A matrix's rows cut into parts, each summed by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowParts {
    /// How many parts; 0 where there are no rows.
    pub parts: usize,
    /// Rows of each but the last, which may have fewer.
    pub rows: usize,
}

/// Parts for the column sums of (rows, cols).
pub fn row_parts(rows: usize, cols: usize) -> RowParts {
    let tiles = cols.div_ceil(COLUMN_TILE).max(1);
    parts_of(rows, rows.div_ceil(LEAST_ROWS).min(BLOCKS.div_ceil(tiles)))
}

/// At most `parts` parts of `rows` rows, none of them empty.
fn parts_of(rows: usize, parts: usize) -> RowParts {
    let per_part = rows.div_ceil(parts.max(1));
    RowParts { parts: rows.checked_div(per_part).map_or(0, |_| rows.div_ceil(per_part)), rows: per_part }
}

/// Bytes of the partial column sums of (rows, cols): f32 (parts, cols).
pub fn column_sum_bytes(rows: usize, cols: usize) -> u64 {
    (row_parts(rows, cols).parts * cols * 4) as u64
}

/// Bytes of scratch for `node`.
pub fn scratch_bytes(graph: &Graph, node: &Node) -> u64 {
    let input = |i: usize| &graph.info(node.inputs[i]).shape;
    match &node.op {
        Op::LinearGradBias => column_sum_bytes(input(0).rows(), input(0).cols()),
        Op::Conv2d(_) | Op::Conv2dGradInput(_) | Op::Conv2dGradWeight(_) => conv_bytes(graph, node),
        Op::Conv2dGradBias => conv_bias_bytes(input(0).axes()[1], input(0).elems() / input(0).axes()[1].max(1)),
        _ => 0,
    }
}

/// Of a convolution or one of its gradients but the bias'.
fn conv_bytes(graph: &Graph, node: &Node) -> u64 {
    let axes = |value| graph.info(value).shape.axes();
    let (window, x, out) = match &node.op {
        Op::Conv2d(window) => (window, node.inputs[0], node.outputs[0]),
        Op::Conv2dGradInput(window) => (window, node.outputs[0], node.inputs[0]),
        Op::Conv2dGradWeight(window) => (window, node.inputs[1], node.inputs[0]),
        other => unreachable!("{} is no convolution", other.name()),
    };
    let sizes = ConvSizes::new(window, axes(x), axes(out));
    conv_regions(&node.op, graph.info(node.inputs[0]).dtype, &sizes)[3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_rows_and_none_is_empty() {
        for rows in [0, 1, 31, 32, 33, 1000, 8192, 100_000, 16_777_216] {
            for cols in [0, 1, 256, 257, 768, 50_257, 1 << 20] {
                let RowParts { parts, rows: per_part } = row_parts(rows, cols);
                assert!(parts * per_part >= rows, "{rows}x{cols}");
                assert!(parts == 0 && rows == 0 || (parts - 1) * per_part < rows, "{rows}x{cols}");
                assert!(parts <= BLOCKS, "{rows}x{cols}");
            }
        }
    }
}
