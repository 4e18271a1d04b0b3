//! How a matrix product is divided: its output into tiles, and k into parts whose partial sums a second kernel adds.
//!
//! A function of shape and element type alone, from a model of one machine, an H100 or H200: neither bits nor bytes of
//! scratch depend on the chip at hand. The parts hold for every kernel of that type; the tile is that of
//! `kernels/gemm_hopper.cu` or `gemm_f32.cu`, and changes no bit.

use super::{RowParts, parts_of};
use crate::base::DType;

/// Depth in k of one step of a product's kernels: a part of k is a multiple of it.
pub const K_STEP: usize = 64;

/// Rows of a tile.
const TILE_ROWS: usize = 128;

/// A tile width, with the cycles that a multiprocessor takes for a tile.
struct Width {
    cols: usize,
    /// Tiles that a multiprocessor works on at a time.
    at_once: usize,
    /// Cycles of a step of k: 4 per column for the products themselves, and what narrower tiles lose to the widest one,
    /// which loads the fewest bytes per product.
    step: usize,
    /// Cycles to write its sums without further ops, by the account in `gemm_hopper.cu`.
    end: usize,
    /// Whether the next tile's products run meanwhile.
    overlaps: bool,
}

/// The widths for bf16, the widest first: it is chosen where others are no faster.
const WIDTHS: [Width; 3] = [
    Width { cols: 256, at_once: 1, step: 1024, end: 3700, overlaps: false },
    Width { cols: 192, at_once: 1, step: 800, end: 6200, overlaps: true },
    Width { cols: 128, at_once: 1, step: 600, end: 3900, overlaps: true },
];
/// The only width for f32, at three quarters of the arithmetic units' peak.
const F32_WIDTHS: [Width; 1] = [Width { cols: 128, at_once: 2, step: 21_800, end: 5000, overlaps: false }];

/// The machine's number of multiprocessors; then the bytes per cycle at which partial sums are written and read back,
/// and the cycles that a second launch costs.
const MULTIPROCESSORS: usize = 132;
const PARTIAL_BYTES_PER_CYCLE: usize = 1800;
const FINISH_CYCLES: usize = 6000;
/// Most parts of k: with more, adding up costs more than it gains.
const MOST_K_PARTS: usize = 32;

/// The k of a product cut into parts, each computed by blocks of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KParts {
    /// How many parts, at least one.
    pub parts: usize,
    /// k of each part but the last, which may have less; a multiple of [`K_STEP`].
    pub k: usize,
}

/// How a product (m, k) x (k, n) is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductCut {
    /// Columns of a tile of 128 rows: 256, 192 or 128.
    pub tile_cols: usize,
    /// Parts of k.
    pub parts: KParts,
}

/// The division that takes the modelled machine the least time, for factors of this type.
pub fn product_cut(dtype: DType, m: usize, n: usize, k: usize) -> ProductCut {
    let widths = if dtype == DType::Bf16 { &WIDTHS[..] } else { &F32_WIDTHS[..] };
    let steps = k.div_ceil(K_STEP).max(1);
    // With this many tiles or more, dividing k gains too little to consider, and an offset in (parts, m, n) would
    // exceed 32 bits.
    let most = if tiles(m, n, WIDTHS[0].cols) >= MULTIPROCESSORS { 1 } else { MOST_K_PARTS.min(steps) };
    let cuts = (1..=most).flat_map(|parts| widths.iter().map(move |width| (parts, width)));
    let best = cuts.min_by_key(|&(parts, width)| cycles(m, n, steps, parts, width));
    let (parts, width) = best.unwrap_or((1, &widths[0]));
    let RowParts { parts, rows } = parts_of(steps, parts);
    ProductCut { tile_cols: width.cols, parts: KParts { parts: parts.max(1), k: rows * K_STEP } }
}

fn tiles(m: usize, n: usize, cols: usize) -> usize {
    m.div_ceil(TILE_ROWS) * n.div_ceil(cols)
}

/// Modelled time in cycles, with k divided into `steps` steps and `parts` parts.
fn cycles(m: usize, n: usize, steps: usize, parts: usize, width: &Width) -> usize {
    let rounds = (tiles(m, n, width.cols) * parts).div_ceil(MULTIPROCESSORS * width.at_once);
    let products = steps.div_ceil(parts) * width.step;
    // Two warpgroups take turns: one's sums are written during the other's products, except the last ones.
    let alone = if width.overlaps { products.max((products + width.end) / 2) } else { products + width.end };
    let adding_up = if parts == 1 { 0 } else { FINISH_CYCLES + 8 * m * n * parts / PARTIAL_BYTES_PER_CYCLE };
    rounds * alone + if width.overlaps { width.end } else { 0 } + adding_up
}

/// Bytes of a product's partial results: f32 (parts, m, n), or none where k is whole.
pub fn product_bytes(dtype: DType, m: usize, n: usize, k: usize) -> u64 {
    let KParts { parts, .. } = product_cut(dtype, m, n, k).parts;
    if parts == 1 { 0 } else { (parts * m * n * 4) as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_cut_where_that_fills_the_machine() {
        for (m, n, k, parts) in [
            (8192, 8192, 8192, 1), // fills it as it is
            (768, 50_257, 8192, 1),
            (128, 256, 64, 1), // one step
            (128, 256, 0, 1),
            (0, 5, 100, 1),
            (768, 768, 8192, 3), // 36 narrow tiles, 108 blocks
            (10, 7, 1 << 20, 32),
        ] {
            let cut = product_cut(DType::Bf16, m, n, k).parts;
            assert_eq!(cut.parts, parts, "{m}x{n}x{k}");
            assert!(
                cut.k.is_multiple_of(K_STEP) && cut.parts * cut.k >= k && (cut.parts - 1) * cut.k <= k,
                "{m}x{n}x{k}: {cut:?}"
            );
        }
    }

    #[test]
    fn tiles_are_as_wide_as_fills_the_machine() {
        for (m, n, k, tile_cols) in [
            (8192, 8192, 8192, 256), // 16 rounds
            (4096, 4096, 4096, 256), // 4 rounds of 128 tiles; a width of 192 takes 6 that are three quarters as long
            (8192, 768, 768, 192),   // 2 rounds, as with a width of 256, where 60 of 132 tiles are missing
            (8192, 768, 50_304, 192),
            (8192, 3072, 768, 192),  // short sums: what leaves beside products counts
            (768, 2304, 8192, 128),  // 108 tiles; 72 or 54 of the wider ones
            (768, 3072, 8192, 192),  // 96 tiles; 144 of a width of 128
            (1024, 1024, 1024, 128), // 64 tiles: half the machine is idle, and narrow tiles are done sooner
            (64, 128, 768, 128),
        ] {
            assert_eq!(product_cut(DType::Bf16, m, n, k).tile_cols, tile_cols, "{m}x{n}x{k}");
        }
    }

    #[test]
    fn partial_products_do_not_depend_on_which_side_is_longer_by_much() {
        // The two layouts of a weight have the gradient (K, N) or (N, K); neither may need boundless scratch.
        for (m, n, k) in [(768, 3072, 8192), (3072, 768, 8192), (1600, 6400, 16_384), (6400, 1600, 16_384)] {
            for (dtype, parts) in [(DType::Bf16, 8), (DType::F32, 16)] {
                assert!(product_bytes(dtype, m, n, k) <= (4 * parts * m * n) as u64, "{m}x{n}x{k}");
            }
        }
    }
}
