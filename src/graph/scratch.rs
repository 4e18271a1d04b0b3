//! Scratch: what an op's kernels need besides its operands, in bytes of the workspace, for devices that ask for it.
//!
//! Kernels that reduce over many blocks leave partial results for a second kernel. Their number is a function of shapes
//! alone, never of the chip, so neither the plan's bytes nor the order of any sum depends on the machine.

mod conv;
mod product;

use super::graph::{Graph, Node};
use super::op::Op;
pub use conv::{ConvSizes, ConvTile, conv_bias_bytes, conv_bias_parts, conv_regions, is_channels_last};
pub use product::{K_STEP, KParts, ProductCut, product_bytes, product_cut};

/// Columns that one block of `kernels/column_sum.cu` sums.
pub const COLUMN_TILE: usize = 256;

/// Blocks that a launch is divided into where a matrix has enough rows: 8 on each of an H200's 132 multiprocessors.
const BLOCKS: usize = 1056;

/// Fewest images of a part, so that writing partial sums is cheap compared with reading the images.
const LEAST_ROWS: usize = 32;

/// A matrix's rows cut into parts, each summed by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowParts {
    /// How many parts; 0 where there are no rows.
    pub parts: usize,
    /// Rows of each but the last, which may have fewer.
    pub rows: usize,
}

/// Blocks of `column_sum` that run at once on an H200, 4 a multiprocessor.
const SUM_BLOCKS: usize = 528;

/// Fewest rows of a part of column sums: the rows that a block has in flight at once.
const SUM_ROWS: usize = 64;

/// Parts for the column sums of (rows, cols): the division that is fastest on a machine of an H200's size. A function
/// of the shape alone.
pub fn row_parts(rows: usize, cols: usize) -> RowParts {
    let tiles = cols.div_ceil(COLUMN_TILE).max(1);
    // Cost in rows per block: the rows of its part, as many as pass during the latency of the first load, and a share
    // of the sum over parts.
    let cost = |parts: usize| {
        let waves = (tiles * parts).div_ceil(SUM_BLOCKS);
        16 * waves * (rows.div_ceil(parts) + 24) + parts
    };
    let most = rows.div_ceil(SUM_ROWS).min((2 * BLOCKS).div_ceil(tiles).min(BLOCKS));
    parts_of(rows, (1..=most).min_by_key(|&parts| cost(parts)).unwrap_or(1))
}

/// Parts for the sums over the images of a matrix (images, cols) whose columns are a channel's positions.
fn image_parts(images: usize, cols: usize) -> RowParts {
    let tiles = cols.div_ceil(COLUMN_TILE).max(1);
    parts_of(images, images.div_ceil(LEAST_ROWS).min(BLOCKS.div_ceil(tiles)))
}

/// Columns of a row that the threads of one block of `kernels/norm_grad.cu` can always keep, whatever the element type
/// and the alignment.
pub const NORM_COLUMNS: usize = 4096;

/// Parts for the gradient of a normalization of (rows, cols): two blocks on each of an H200's multiprocessors.
pub fn norm_parts(rows: usize, cols: usize) -> RowParts {
    let tiles = cols.div_ceil(NORM_COLUMNS).max(1);
    parts_of(rows, rows.div_ceil(8).min(264_usize.div_ceil(tiles)))
}

/// Bytes of `sums` partial column sums of (rows, cols), f32 (sums, parts, cols), and of the two means of each row,
/// where rows are long: f32 (rows, 2).
fn norm_bytes(sums: usize, rows: usize, cols: usize) -> u64 {
    let means = if cols > NORM_COLUMNS { 2 * rows } else { 0 };
    ((sums * norm_parts(rows, cols).parts * cols + means) * 4) as u64
}

/// Number of positions from which on a plane of a batch normalization is summed on its own.
const LARGE_PLANE: usize = 256;

/// Elements of a plane that a warp of `kernels/gpu/batchnorm.cuh` takes at a time.
pub const PLANE_PIECE: usize = 8192;

/// How the sums of a batch normalization of (images, channels, positions) are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelParts {
    /// For large planes, parts of a channel's pieces, with one partial result per channel and part. Otherwise, parts of
    /// the images as rows of a matrix, with one partial result per column and part.
    pub parts: RowParts,
    /// Partial results that a channel has in each part: 1, or `positions`.
    pub width: usize,
}

impl ChannelParts {
    /// Partial results.
    fn count(&self, channels: usize) -> usize {
        self.parts.parts * channels * self.width
    }
}

/// Parts for the sums of a batch normalization.
pub fn channel_parts(images: usize, channels: usize, positions: usize) -> ChannelParts {
    if positions < LARGE_PLANE {
        return ChannelParts { parts: image_parts(images, channels * positions), width: positions };
    }
    let pieces = images * positions.div_ceil(PLANE_PIECE);
    ChannelParts { parts: parts_of(pieces, pieces.div_ceil(16).min(BLOCKS.div_ceil(channels.max(1)))), width: 1 }
}

/// Divides `rows` rows into at most `parts` parts, none of them empty.
fn parts_of(rows: usize, parts: usize) -> RowParts {
    let per_part = rows.div_ceil(parts.max(1));
    RowParts { parts: rows.checked_div(per_part).map_or(0, |_| rows.div_ceil(per_part)), rows: per_part }
}

/// Bytes of the partial column sums of (rows, cols): f32 (parts, cols).
pub fn column_sum_bytes(rows: usize, cols: usize) -> u64 {
    (row_parts(rows, cols).parts * cols * 4) as u64
}

/// Warps that sum columns alongside a product on an H200, 3 per multiprocessor.
const BESIDE_WARPS: usize = 396;

/// Fewest rows of a part that a warp sums: twice as many as it has in flight at once.
const BESIDE_ROWS: usize = 32;

/// Parts for the column sums of (rows, cols) that are computed alongside a product (`kernels/gpu/gemm_beside.cuh`):
/// about two per warp, since there may be fewer warps than on an H200. A function of the shape alone.
pub fn beside_parts(rows: usize, cols: usize) -> RowParts {
    let tiles = cols.div_ceil(COLUMN_TILE).max(1);
    parts_of(rows, rows.div_ceil(BESIDE_ROWS).min((2 * BESIDE_WARPS).div_ceil(tiles)))
}

/// Bytes of the partial sums of [`beside_parts`]: f32 (parts, cols).
fn beside_bytes(rows: usize, cols: usize) -> u64 {
    (beside_parts(rows, cols).parts * cols * 4) as u64
}

/// Tokens that a block of the embedding gradient's sort takes.
pub const SORT_KEYS: usize = 2048;

/// How `kernels/embedding.cu` sorts tokens by id, 8 bits a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbeddingSort {
    /// Number of tokens.
    pub tokens: usize,
    /// Rows of the table, V.
    pub table_rows: usize,
    /// Blocks of [`SORT_KEYS`] tokens.
    pub blocks: usize,
    /// Number of passes, enough to also distinguish V itself, which stands for an id outside the table.
    pub passes: usize,
}

impl EmbeddingSort {
    /// Sizes the sort of `tokens` tokens for a table of `table_rows` rows.
    pub fn new(tokens: usize, table_rows: usize) -> EmbeddingSort {
        let bits = (usize::BITS - table_rows.leading_zeros()).max(1);
        EmbeddingSort { tokens, table_rows, blocks: tokens.div_ceil(SORT_KEYS), passes: bits.div_ceil(8) as usize }
    }

    /// Where its parts start in the scratch, in bytes: which ids occur (V), counts of digits (blocks, 256), and the
    /// tokens' order (tokens) after even-numbered and after odd-numbered passes. All i32.
    pub fn starts(&self) -> [u64; 4] {
        let counts = 4 * self.table_rows as u64;
        let even = counts + 1024 * self.blocks as u64;
        [0, counts, even, even + 4 * self.tokens as u64]
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.starts()[3] + 4 * self.tokens as u64
    }
}

/// Bytes of scratch for `node`.
pub fn scratch_bytes(graph: &Graph, node: &Node) -> u64 {
    let input = |i: usize| &graph.info(node.inputs[i]).shape;
    let output = |i: usize| &graph.info(node.outputs[i]).shape;
    let dtype = graph.float;
    match &node.op {
        Op::Linear { .. } | Op::LinearGradInput { .. } => {
            product_bytes(dtype, output(0).rows(), output(0).cols(), input(0).cols())
        }
        Op::LinearGradWeight { bias, .. } => {
            let product = product_bytes(dtype, output(0).rows(), output(0).cols(), input(0).rows());
            let (rows, cols) = (input(1).rows(), input(1).cols());
            product + if *bias { column_sum_bytes(rows, cols).max(beside_bytes(rows, cols)) } else { 0 }
        }
        Op::EmbeddingGrad { .. } => {
            let table = &graph.info(node.outputs[0]).shape;
            EmbeddingSort::new(input(1).elems(), table.rows()).bytes()
        }
        Op::LayerNormGrad => norm_bytes(2, input(1).rows(), input(1).cols()),
        Op::RmsNormGrad => norm_bytes(1, input(1).rows(), input(1).cols()),
        Op::BatchNorm { .. } | Op::BatchNormGrad => {
            let x = input(if node.op == Op::BatchNormGrad { 1 } else { 0 }).axes();
            let partials = channel_parts(x[0], x[1], x[2..].iter().product()).count(x[1]);
            // Count, mean and sum of squares of each; or two sums of each, and three numbers per channel for the
            // elementwise pass.
            let floats = if node.op == Op::BatchNormGrad { 2 * partials + 3 * x[1] } else { 3 * partials };
            (floats * 4) as u64
        }
        // For each query of each head, the sum of d_out * out, f32: as many as lse has elements. Then one number for
        // each of two passes.
        Op::AttentionGrad(_) => (input(2).elems() as u64 + 2) * 4,
        Op::Conv2d(_) | Op::Conv2dGradInput(_) | Op::Conv2dGradWeight(_) => conv_bytes(graph, node),
        Op::Conv2dGradBias => conv_bias_bytes(input(0).axes()[1], input(0).elems() / input(0).axes()[1].max(1)),
        _ => 0,
    }
}

/// Bytes for a convolution or one of its gradients, except the bias'.
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
    fn a_sort_has_passes_for_every_id_and_the_one_past_them() {
        for (table_rows, passes) in [(0, 1), (1, 1), (255, 1), (256, 2), (50_257, 2), (65_535, 2), (65_536, 3)] {
            assert_eq!(EmbeddingSort::new(5, table_rows).passes, passes, "{table_rows}");
        }
        let sort = EmbeddingSort::new(2049, 10);
        assert_eq!((sort.starts(), sort.bytes()), ([0, 40, 40 + 2048, 40 + 2048 + 8196], 40 + 2048 + 2 * 8196));
    }

    #[test]
    fn column_sums_fill_the_machine() {
        for (rows, cols, parts, beside) in
            [(8192, 768, 128, 256), (8192, 3072, 44, 66), (8192, 8192, 16, 25), (8192, 50_257, 8, 5), (10, 5, 1, 1)]
        {
            assert_eq!((row_parts(rows, cols).parts, beside_parts(rows, cols).parts), (parts, beside), "{rows}x{cols}");
        }
    }

    #[test]
    fn parts_cover_the_rows_and_none_is_empty() {
        for rows in [0, 1, 31, 32, 33, 1000, 8192, 100_000, 16_777_216] {
            for cols in [0, 1, 256, 257, 768, 50_257, 1 << 20] {
                for RowParts { parts, rows: per_part } in
                    [row_parts, beside_parts, norm_parts, image_parts].map(|f| f(rows, cols))
                {
                    assert!(parts * per_part >= rows, "{rows}x{cols}");
                    assert!(parts == 0 && rows == 0 || (parts - 1) * per_part < rows, "{rows}x{cols}");
                    assert!(parts <= BLOCKS, "{rows}x{cols}");
                }
            }
        }
    }
}
