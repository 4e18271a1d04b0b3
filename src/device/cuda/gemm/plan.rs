//! Which kernel computes a product, and in which tiles: a pure function of shape, element type and architecture.
//!
//! Never of the number of multiprocessors, nor of where operands lie: a tensor starts at a multiple of 64 bytes wherever the shards are
//! cut, so whether its rows are aligned is a matter of their width. The tiles change no bit: each sum is taken in the order of k.

use crate::graph::{KParts, k_parts};

/// How the operands of `out (m, n) = a b` are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// a (m, k), b (k, n).
    Nn,
    /// a (m, k), b (n, k).
    Nt,
    /// a (k, m), b (k, n).
    Tn,
}

/// A product's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// How exactly factors are multiplied. Sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 as it is.
    F32,
    /// f32, rounded to 10 bits of fraction.
    Tf32,
    /// bf16.
    Bf16,
}

/// What multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// `gemm_f32.cu`.
    Plain,
    /// `gemm_tf32.cu`.
    Tf32,
    /// `gemm_mma.cu`, rows aligned to 16 bytes.
    Mma,
    /// `gemm_mma.cu`, rows of any width.
    MmaRagged,
    /// `gemm_hopper.cu`, both operands by bulk copies.
    Hopper,
    /// `gemm_hopper.cu`, rows of a of any width.
    HopperShifted,
}

/// A kernel with its launch shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmPlan {
    /// What multiplies.
    pub path: Path,
    /// The entry point.
    pub kernel: &'static str,
    /// The one that adds up the parts of k, where there are several.
    pub finish: &'static str,
    /// Rows and columns of a tile.
    pub tile: [usize; 2],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// How k is cut.
    pub parts: KParts,
}

impl GemmPlan {
    /// Tiles of the output.
    pub fn tiles(&self, sizes: Sizes) -> usize {
        sizes.m.div_ceil(self.tile[0]) * sizes.n.div_ceil(self.tile[1])
    }
}

/// Elements of bf16 in the 16 bytes that copies into shared memory start at multiples of.
const WORD_ELEMS: usize = 8;

/// The ring of `gemm_tf32.cu`: 3 steps of both operands, of 128 rows of 20 f32.
const TF32_RING_BYTES: u32 = 3 * 2 * 128 * 20 * 4;

/// k of a step of `gemm_hopper.cu`, columns of a box of its tensor maps, and rows of what its warpgroups own.
pub(super) const HOPPER_STEP: usize = 64;
/// Steps in its ring, for tiles 256 and 128 wide.
const HOPPER_STAGES: [usize; 2] = [4, 6];
/// Bytes in which its warps stage sums: 8 warps, 16 rows, 40 columns of f32.
const HOPPER_STAGED_BYTES: usize = 8 * 16 * 40 * 4;

/// Multiprocessors of the machine that tile widths are chosen for.
const MULTIPROCESSORS: usize = 132;
/// Time of a tile 256 wide in that of one 128 wide, which reads more for as many products: twice 498 over 610 TFLOP/s on an H100, by the
/// work log of pranjalssh/fast.cu.
const WIDE_TILE_COST: f64 = 1.63;

/// The plan for a product with factors of this precision, rows of a and b being `pitches` elements apart, on `arch` (90 for compute capability 9.0).
pub fn plan(form: Form, sizes: Sizes, pitches: [usize; 2], precision: Precision, arch: u32) -> GemmPlan {
    let path = path(sizes, pitches, precision, arch);
    let parts = k_parts(sizes.m, sizes.n, sizes.k);
    let wide = path == Path::HopperShifted || path == Path::Hopper && wide_tiles(sizes, parts.parts);
    let kernel = match (path, form, wide) {
        (Path::Plain, Form::Nn, _) => "gemm_nn_f32",
        (Path::Plain, Form::Nt, _) => "gemm_nt_f32",
        (Path::Plain, Form::Tn, _) => "gemm_tn_f32",
        (Path::Tf32, Form::Nn, _) => "gemm_nn_tf32",
        (Path::Tf32, Form::Nt, _) => "gemm_nt_tf32",
        (Path::Tf32, Form::Tn, _) => "gemm_tn_tf32",
        (Path::Mma, Form::Nn, _) => "gemm_nn_bf16",
        (Path::Mma, Form::Nt, _) => "gemm_nt_bf16",
        (Path::Mma, Form::Tn, _) => "gemm_tn_bf16",
        (Path::MmaRagged, Form::Nn, _) => "gemm_nn_ragged_bf16",
        (Path::MmaRagged, Form::Nt, _) => "gemm_nt_ragged_bf16",
        (Path::MmaRagged, Form::Tn, _) => "gemm_tn_ragged_bf16",
        (Path::Hopper, Form::Nn, true) => "gemm_nn_256_bf16",
        (Path::Hopper, Form::Nt, true) => "gemm_nt_256_bf16",
        (Path::Hopper, Form::Tn, true) => "gemm_tn_256_bf16",
        (Path::Hopper, Form::Nn, false) => "gemm_nn_128_bf16",
        (Path::Hopper, Form::Nt, false) => "gemm_nt_128_bf16",
        (Path::Hopper, Form::Tn, false) => "gemm_tn_128_bf16",
        (Path::HopperShifted, Form::Nn, _) => "gemm_nn_shifted_bf16",
        (Path::HopperShifted, Form::Tn, _) => "gemm_tn_shifted_bf16",
        (Path::HopperShifted, Form::Nt, _) => {
            unreachable!("a and b have rows of one width, so b has to be shifted too")
        }
    };
    // A parameter's gradient, the only use of tn, is f32 in a bf16 model too.
    let bf16_out = precision == Precision::Bf16 && form != Form::Tn;
    let finish = if bf16_out { "gemm_finish_bf16" } else { "gemm_finish_f32" };
    let tile = [128, if wide { 256 } else { 128 }];
    let (block, shared_bytes) = match path {
        Path::MmaRagged => (256, 0),
        Path::Tf32 => (128, TF32_RING_BYTES),
        Path::Plain | Path::Mma => (128, 0),
        Path::Hopper | Path::HopperShifted => {
            let ring = HOPPER_STAGES[usize::from(!wide)] * (tile[0] + tile[1]) * HOPPER_STEP * 2;
            (384, (ring + HOPPER_STAGED_BYTES) as u32)
        }
    };
    GemmPlan { path, kernel, finish, tile, block, shared_bytes, parts }
}

fn path(Sizes { m, n, k }: Sizes, pitches: [usize; 2], precision: Precision, arch: u32) -> Path {
    match precision {
        Precision::F32 => return Path::Plain,
        Precision::Tf32 => return Path::Tf32,
        Precision::Bf16 => {}
    }
    let aligned = pitches.map(|pitch| pitch % WORD_ELEMS == 0);
    // sm_90a is compute capability 9.0 alone. A tensor map of nothing cannot be made; nor is there work without m or n.
    let hopper = arch == 90 && m > 0 && n > 0 && k > 0;
    match (aligned, hopper) {
        ([true, true], true) => Path::Hopper,
        ([false, true], true) => Path::HopperShifted,
        ([true, true], false) => Path::Mma,
        _ => Path::MmaRagged,
    }
}

/// Whether tiles 256 wide take less time than tiles 128 wide, by how often the machine has to be filled.
fn wide_tiles(Sizes { m, n, .. }: Sizes, parts: usize) -> bool {
    let rounds = |width: usize| (m.div_ceil(128) * n.div_ceil(width) * parts).div_ceil(MULTIPROCESSORS);
    rounds(256) as f64 * WIDE_TILE_COST <= rounds(128) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of rows that lie next to each other.
    fn of(form: Form, m: usize, n: usize, k: usize, arch: u32) -> GemmPlan {
        let pitches = match form {
            Form::Nn => [k, n],
            Form::Nt => [k, k],
            Form::Tn => [m, n],
        };
        plan(form, Sizes { m, n, k }, pitches, Precision::Bf16, arch)
    }

    #[test]
    fn paths_follow_the_rows_of_memory() {
        // By form, what an m, n or k that is no multiple of 8 leads to.
        let both = [Path::Mma, Path::Hopper];
        let (left, right) = ([Path::MmaRagged, Path::HopperShifted], [Path::MmaRagged; 2]);
        for (form, want) in
            [(Form::Nn, [both, right, left]), (Form::Nt, [both, both, right]), (Form::Tn, [left, right, both])]
        {
            for (axis, want) in want.into_iter().enumerate() {
                let mut sizes = [1024; 3];
                sizes[axis] = 1001;
                let [m, n, k] = sizes;
                assert_eq!([80, 90].map(|arch| of(form, m, n, k, arch).path), want, "{form:?} {sizes:?}");
            }
            assert_eq!(of(form, 1024, 1024, 0, 90).path, Path::Mma, "{form:?}: sums of nothing");
            assert_eq!(of(form, 1024, 1024, 1024, 120).path, Path::Mma, "{form:?}: sm_120 has no warpgroup products");
            for (precision, path) in [(Precision::F32, Path::Plain), (Precision::Tf32, Path::Tf32)] {
                assert_eq!(plan(form, Sizes { m: 8, n: 8, k: 8 }, [8, 8], precision, 90).path, path, "{form:?}");
            }
        }
    }

    #[test]
    fn tiles_are_as_wide_as_fills_the_machine() {
        for (m, n, width) in [
            (8192, 8192, 256),
            (8192, 768, 128), // 192 wide tiles take 2 rounds, and 384 narrow ones 3 that are little over half as long
            (8192, 3072, 256), // 6 rounds against 12
            (1024, 1024, 128), // 32 tiles: half the rounds are empty either way, and narrow tiles are done sooner
            (64, 128, 128),
        ] {
            assert_eq!(of(Form::Nn, m, n, 768, 90).tile[1], width, "{m}x{n}");
        }
    }

    #[test]
    fn architectures_differ_in_the_path_alone() {
        for (m, n, k) in [(768, 768, 65_536), (1, 50_304, 768), (8192, 3072, 768)] {
            assert_eq!(of(Form::Tn, m, n, k, 80).parts, of(Form::Tn, m, n, k, 90).parts);
        }
    }

    #[test]
    fn kernels_have_the_same_sizes() {
        let source = include_str!("../../../../kernels/gemm_hopper.cu");
        for line in [
            "constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);",
            "constexpr int TILE_M = 128, STEP = 64;",
            "constexpr int PIECE = 32, PITCH = PIECE + 8;",
            "constexpr int STAGED_BYTES = CONSUMERS * 4 * 16 * PITCH * 4;",
            "static constexpr int STAGES = TILE_N == 256 ? 4 : 6,",
        ] {
            assert!(source.contains(line), "gemm_hopper.cu has no line {line}");
        }
        let source = include_str!("../../../../kernels/gemm_tf32.cu");
        for line in
            ["constexpr int TILE = 128, STEP = 16, STAGES = 3, THREADS = 128;", "constexpr int K_PITCH = STEP + 4,"]
        {
            assert!(source.contains(line), "gemm_tf32.cu has no line {line}");
        }
        let wide = of(Form::Nn, 8192, 8192, 768, 90).shared_bytes;
        // With the barriers, which take up to 1024 bytes, what a block can have.
        assert!(wide + 1024 <= 227 * 1024, "{wide}");
    }
}
