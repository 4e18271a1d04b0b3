//! Which kernels an attention takes, and their blocks: a function of shapes, element type and architecture.

use crate::base::DType;
use crate::graph::AttentionKind;

/// Widths that the kernels on tensor cores are made for; others take the next.
const WIDTHS: [usize; 4] = [32, 64, 96, 128];
/// Rows that a streamed tile of the gradients has.
const GRAD_COLS: usize = 32;
/// Queries, keys and columns of a block on the ordinary cores, and its threads.
const PLAIN_TILE: usize = 64;
const PLAIN_THREADS: u32 = 256;
/// Queries of a block of the forwards on tensor cores, by warps.
const FORWARD_ROWS: usize = 128;
/// Of `attention_hopper.cu`: queries of a warpgroup, keys of a tile, the warpgroups of a block and stages of its ring.
pub(super) const HOPPER_QUERIES: usize = 64;
pub(super) const HOPPER_KEYS: usize = 128;
const fn hopper_consumers(width: usize) -> usize {
    if width == 64 { 3 } else { 2 }
}
const fn hopper_stages(width: usize) -> usize {
    if width == 64 { 5 } else { 2 }
}
/// Threads of a block of `attention_grad_delta`.
pub(super) const DELTA_THREADS: u32 = 256;
/// Columns of the swizzled tiles of `attention_hopper.cu` and of the gradient on Hopper.
pub(super) const HOPPER_BOX: usize = 64;
/// Of `gpu/attention_hopper_grad.cuh`: threads, queries or keys of a part, rows of a tile that is streamed and of a
/// box, and stages of these.
const HOPPER_GRAD_THREADS: u32 = 384;
const HOPPER_GRAD_ROWS: usize = 128;
pub(super) const HOPPER_GRAD_TILE: usize = 64;
const fn hopper_grad_stages(width: usize) -> usize {
    if width == 64 { 5 } else { 3 }
}
/// Bytes of tiles that heads may stream for their parts to be interleaved: they are to stay in the L2 cache (50 MB)
/// beside what is written.
const INTERLEAVED_BYTES: usize = 24 << 20;

/// Kernels by width, without and with dropout.
type Names = [[&'static str; 4]; 2];

const FORWARD: Names = [
    [
        "attention_forward_mma32_bf16",
        "attention_forward_mma64_bf16",
        "attention_forward_mma96_bf16",
        "attention_forward_mma128_bf16",
    ],
    [
        "attention_forward_dropout_mma32_bf16",
        "attention_forward_dropout_mma64_bf16",
        "attention_forward_dropout_mma96_bf16",
        "attention_forward_dropout_mma128_bf16",
    ],
];
const GRAD_Q: Names = [
    [
        "attention_grad_q_mma32_bf16",
        "attention_grad_q_mma64_bf16",
        "attention_grad_q_mma96_bf16",
        "attention_grad_q_mma128_bf16",
    ],
    [
        "attention_grad_q_dropout_mma32_bf16",
        "attention_grad_q_dropout_mma64_bf16",
        "attention_grad_q_dropout_mma96_bf16",
        "attention_grad_q_dropout_mma128_bf16",
    ],
];
const GRAD_KV: Names = [
    [
        "attention_grad_kv_mma32_bf16",
        "attention_grad_kv_mma64_bf16",
        "attention_grad_kv_mma96_bf16",
        "attention_grad_kv_mma128_bf16",
    ],
    [
        "attention_grad_kv_dropout_mma32_bf16",
        "attention_grad_kv_dropout_mma64_bf16",
        "attention_grad_kv_dropout_mma96_bf16",
        "attention_grad_kv_dropout_mma128_bf16",
    ],
];

/// Where the products are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// On the ordinary cores: f32, and what the others do not take.
    Plain,
    /// On tensor cores, by warps, at `WIDTHS[class]`.
    Tensor { class: usize, dropout: bool },
    /// On tensor cores, by warpgroups of sm_90a, at this width.
    Hopper { width: usize },
}

/// A kernel and its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) name: &'static str,
    /// Positions, queries or keys, that a block makes the rows of.
    pub(super) rows: usize,
    /// Columns of a head that a block makes; all where the head is narrower.
    pub(super) cols: usize,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

impl Kernel {
    /// Blocks for `positions` of each of `heads` heads `width` wide.
    pub(super) fn blocks(&self, heads: usize, positions: usize, width: usize) -> usize {
        heads * positions.div_ceil(self.rows) * width.div_ceil(self.cols)
    }
}

/// The path on any chip that has tensor cores.
fn path_by_warps(kind: &AttentionKind, dtype: DType) -> Path {
    let scale = kind.scale as f32;
    // Rows of heads have to be whole 16-byte pieces, and the largest score is looked for before scaling.
    let fits = dtype == DType::Bf16 && kind.width.is_multiple_of(8) && scale > 0.0 && scale.is_finite();
    match WIDTHS.iter().position(|&width| kind.width <= width) {
        Some(class) if fits && kind.width > 0 => Path::Tensor { class, dropout: kind.dropout.is_some() },
        _ => Path::Plain,
    }
}

/// The path for `rows`: all queries and all keys of a batch.
pub(super) fn path(kind: &AttentionKind, dtype: DType, rows: [usize; 2], arch: u32) -> Path {
    // Tensor maps have rows, and the bulk copy engine counts them in 31 bits.
    let mapped = rows.iter().all(|rows| (1..=i32::MAX as usize).contains(rows));
    match path_by_warps(kind, dtype) {
        Path::Tensor { dropout: false, .. } if arch == 90 && mapped && matches!(kind.width, 64 | 128) => {
            Path::Hopper { width: kind.width }
        }
        path => path,
    }
}

/// The forward's kernel.
pub(super) fn forward(path: Path, dtype: DType) -> Kernel {
    match path {
        Path::Plain => plain(dtype, "attention_forward_f32", "attention_forward_bf16"),
        Path::Tensor { class, dropout } => {
            let width = WIDTHS[class];
            // Queries, and two stages of keys and of values.
            let tile_rows = FORWARD_ROWS + 4 * if width <= 64 { 64 } else { 32 };
            tensor(FORWARD[usize::from(dropout)][class], FORWARD_ROWS, 128, tile_bytes(tile_rows, width))
        }
        Path::Hopper { width } => {
            let name = if width == 64 { "attention_forward_hopper64_bf16" } else { "attention_forward_hopper128_bf16" };
            let (consumers, stages) = (hopper_consumers(width), hopper_stages(width));
            let rows = consumers * HOPPER_QUERIES;
            // Queries of two parts, and stages of keys and of values; then two mbarriers for each of these, and five
            // numbers for each part.
            let shared_bytes = (2 * rows + 2 * stages * HOPPER_KEYS) * width * 2 + (2 + 2 * stages) * 2 * 8 + 2 * 5 * 4;
            let threads = 128 * (1 + consumers as u32);
            Kernel { name, rows, cols: width, threads, shared_bytes: shared_bytes as u32 }
        }
    }
}

/// The kernel that makes the gradient of q.
pub(super) fn grad_q(path: Path, dtype: DType) -> Kernel {
    match path {
        Path::Tensor { class, dropout } => {
            let width = WIDTHS[class];
            let rows = if width <= 64 { 128 } else { 64 };
            // Queries and the gradients of their outputs, and two stages of keys and of values. A warp has 32 queries.
            let shared = tile_bytes(2 * rows + 4 * GRAD_COLS, width);
            tensor(GRAD_Q[usize::from(dropout)][class], rows, rows as u32, shared)
        }
        Path::Hopper { width } => {
            let name = if width == 64 { "attention_grad_q_hopper64_bf16" } else { "attention_grad_q_hopper128_bf16" };
            // Two mbarriers for each pair of a part's tiles, five for each pair of a stage's; then the parts' numbers.
            hopper_grad(name, width, 2, 2 * 2 * 8 + hopper_grad_stages(width) * 5 * 8 + 2 * 4)
        }
        Path::Plain => plain(dtype, "attention_grad_q_f32", "attention_grad_q_bf16"),
    }
}

/// The kernel that makes the gradients of k and v.
pub(super) fn grad_kv(path: Path, dtype: DType) -> Kernel {
    match path {
        Path::Tensor { class, dropout } => {
            let width = WIDTHS[class];
            let rows = if width <= 64 && !dropout { 128 } else { 64 };
            // Keys and values, and two stages of queries and the gradients of their outputs, with two numbers for each
            // query.
            let shared = tile_bytes(2 * rows + 4 * GRAD_COLS, width) + (2 * 2 * GRAD_COLS * 4) as u32;
            tensor(GRAD_KV[usize::from(dropout)][class], rows, 128, shared)
        }
        Path::Hopper { width } => {
            let name = if width == 64 { "attention_grad_kv_hopper64_bf16" } else { "attention_grad_kv_hopper128_bf16" };
            let own_stages = if width == 64 { 2 } else { 1 };
            // Two numbers for each query of a stage, two mbarriers for each pair of a part's tiles, three for each pair
            // of a stage's; then the parts' numbers, in whole 8 bytes.
            let stage_bytes = 2 * HOPPER_GRAD_TILE * 4 + 3 * 8;
            hopper_grad(name, width, own_stages, hopper_grad_stages(width) * stage_bytes + own_stages * 2 * 8 + 8)
        }
        Path::Plain => plain(dtype, "attention_grad_kv_f32", "attention_grad_kv_bf16"),
    }
}

fn plain(dtype: DType, f32: &'static str, bf16: &'static str) -> Kernel {
    let name = if dtype == DType::Bf16 { bf16 } else { f32 };
    Kernel { name, rows: PLAIN_TILE, cols: PLAIN_TILE, threads: PLAIN_THREADS, shared_bytes: 0 }
}

fn tensor(name: &'static str, rows: usize, threads: u32, shared_bytes: u32) -> Kernel {
    Kernel { name, rows, cols: WIDTHS[WIDTHS.len() - 1], threads, shared_bytes }
}

/// A pass of the gradient on Hopper: pairs of a part's own tiles, pairs of streamed ones, and what stands beside them.
fn hopper_grad(name: &'static str, width: usize, own_stages: usize, beside_bytes: usize) -> Kernel {
    let rows = 2 * own_stages * HOPPER_GRAD_ROWS + 2 * hopper_grad_stages(width) * HOPPER_GRAD_TILE;
    let shared_bytes = (rows * width * 2 + beside_bytes) as u32;
    Kernel { name, rows: HOPPER_GRAD_ROWS, cols: width, threads: HOPPER_GRAD_THREADS, shared_bytes }
}

/// Whether a block of this pass on Hopper makes several parts, so that there need not be more than multiprocessors.
pub(super) fn makes_several(kernel: &Kernel) -> bool {
    // At width 128 d_k and d_v leave no registers for it.
    kernel.name != "attention_grad_kv_hopper128_bf16"
}

/// The kernel that makes `delta` on Hopper, and its rows.
pub(super) fn hopper_delta(width: usize) -> (&'static str, usize) {
    let name = if width == 64 { "attention_grad_delta_hopper64_bf16" } else { "attention_grad_delta_hopper128_bf16" };
    (name, DELTA_THREADS as usize / (width / 8))
}

/// Of how many heads out of `heads` parts are made side by side, so that the longest come first: as many as stream
/// tiles, of `rows` rows of two tensors each, that fit the L2 cache. One where parts are as long as each other.
pub(super) fn together(kind: &AttentionKind, heads: usize, rows: usize) -> usize {
    let streamed_bytes = (rows * kind.width * 2 * 2).max(1);
    if kind.causal { (INTERLEAVED_BYTES / streamed_bytes).clamp(1, heads.max(1)) } else { 1 }
}

/// Bytes of tiles with `rows` rows in all: rows are 8 elements longer than wide.
fn tile_bytes(rows: usize, width: usize) -> u32 {
    (rows * (width + 8) * 2) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(width: usize, scale: f64, dropout: Option<(f64, u32)>) -> AttentionKind {
        AttentionKind { heads: 2, kv_heads: 1, width, scale, causal: true, packed: false, masked: false, dropout }
    }

    #[test]
    fn a_width_takes_the_next_that_there_is() {
        for (width, class) in [(8, 0), (32, 0), (40, 1), (64, 1), (72, 2), (96, 2), (104, 3), (128, 3)] {
            assert_eq!(path_by_warps(&kind(width, 0.1, None), DType::Bf16), Path::Tensor { class, dropout: false });
        }
        for (width, scale, dtype) in [
            (33, 0.1, DType::Bf16),
            (136, 0.1, DType::Bf16),
            (64, -1.0, DType::Bf16),
            (64, 0.0, DType::Bf16),
            (64, 0.1, DType::F32),
        ] {
            assert_eq!(path_by_warps(&kind(width, scale, None), dtype), Path::Plain, "{width} {scale} {dtype}");
        }
    }

    #[test]
    fn hopper_takes_two_widths_without_dropout() {
        let on = |width, dropout, rows, arch| path(&kind(width, 0.1, dropout), DType::Bf16, rows, arch);
        assert_eq!(on(64, None, [7, 9], 90), Path::Hopper { width: 64 });
        assert_eq!(on(128, None, [7, 9], 90), Path::Hopper { width: 128 });
        for (width, dropout, rows, arch) in [
            (96, None, [7, 9], 90),
            (64, Some((0.1, 3)), [7, 9], 90),
            (64, None, [7, 0], 90),
            (64, None, [1 << 31, 9], 90),
            (64, None, [7, 9], 80),
            (64, None, [7, 9], 100),
        ] {
            assert!(
                matches!(on(width, dropout, rows, arch), Path::Tensor { .. }),
                "{width} {dropout:?} {rows:?} {arch}"
            );
        }
    }

    #[test]
    fn heads_are_together_as_far_as_the_cache_goes() {
        let kind = |causal, width| AttentionKind { causal, ..kind(width, 0.1, None) };
        assert_eq!(together(&kind(false, 64), 192, 1024), 1);
        assert_eq!(together(&kind(true, 64), 192, 1024), 96);
        assert_eq!(together(&kind(true, 64), 48, 1024), 48);
        assert_eq!(together(&kind(true, 128), 16, 16384), 3);
        assert_eq!(together(&kind(true, 128), 16, 1 << 20), 1);
        assert_eq!(together(&kind(true, 128), 0, 0), 1);
    }

    #[test]
    fn kernels_have_the_same_sizes() {
        let by_width = |of: fn(usize) -> usize| format!("W == 64 ? {} : {}", of(64), of(128));
        let source = include_str!("../../../../kernels/attention_hopper.cu");
        for (name, value) in [
            ("CONSUMERS", by_width(hopper_consumers)),
            ("STAGES", by_width(hopper_stages)),
            ("KEYS", HOPPER_KEYS.to_string()),
        ] {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
        let source = include_str!("../../../../kernels/gpu/attention_hopper_grad.cuh");
        for (name, value) in [
            ("STAGES", by_width(hopper_grad_stages)),
            ("ROWS", HOPPER_GRAD_ROWS.to_string()),
            ("TILE", HOPPER_GRAD_TILE.to_string()),
        ] {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
    }

    #[test]
    fn blocks_fit_the_smallest_chips() {
        // 99 KB is what a block may have on sm_86, sm_89 and sm_120; 227 KB on sm_90.
        for class in 0..WIDTHS.len() {
            for dropout in [false, true] {
                let path = Path::Tensor { class, dropout };
                for kernel in [forward(path, DType::Bf16), grad_q(path, DType::Bf16), grad_kv(path, DType::Bf16)] {
                    assert!(kernel.shared_bytes <= 99 << 10, "{kernel:?}");
                }
            }
        }
        for width in [64, 128] {
            let path = Path::Hopper { width };
            for kernel in [forward(path, DType::Bf16), grad_q(path, DType::Bf16), grad_kv(path, DType::Bf16)] {
                assert!(kernel.shared_bytes <= 227 << 10, "{kernel:?}");
            }
        }
    }
}
