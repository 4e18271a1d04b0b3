//! Which kernel computes a product, and in which tiles: a pure function of shape, element type and architecture.
//!
//! Never of the number of multiprocessors, nor of where operands lie: a tensor starts at a multiple of 64 bytes
//! wherever the shards are cut, so whether its rows are aligned is a matter of their width. The tiles change no bit:
//! each sum is taken in the order of k.

use crate::base::DType;
use crate::graph::{KParts, ProductCut, product_cut};

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
/// Columns of its tiles, and steps in the ring of each. A tile of 256 is two warpgroups'; others belong to one, and the
/// other has the next.
const HOPPER_WIDTHS: [(usize, usize); 3] = [(256, 4), (192, 5), (128, 6)];
/// Bytes in which its warps stage sums and a bias: 8 warps, 16 rows of 40 columns of f32, 256 columns of bf16.
const HOPPER_STAGED_BYTES: usize = 8 * (16 * 40 * 4 + 256 * 2);

/// The plan for a product with factors of this precision, rows of a and b being `pitches` elements apart, on `arch` (90
/// for compute capability 9.0).
pub fn plan(form: Form, sizes: Sizes, pitches: [usize; 2], precision: Precision, arch: u32) -> GemmPlan {
    let path = path(sizes, pitches, precision, arch);
    let dtype = if precision == Precision::Bf16 { DType::Bf16 } else { DType::F32 };
    planned(form, path, precision, product_cut(dtype, sizes.m, sizes.n, sizes.k))
}

/// The plan for a product that is cut so.
pub(super) fn planned(form: Form, path: Path, precision: Precision, cut: ProductCut) -> GemmPlan {
    let ProductCut { tile_cols, parts } = cut;
    let width = match path {
        Path::Hopper => tile_cols,
        Path::HopperShifted => 256,
        _ => 128,
    };
    let kernel = match (path, form, width) {
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
        (Path::Hopper, Form::Nn, 256) => "gemm_nn_256_bf16",
        (Path::Hopper, Form::Nn, 192) => "gemm_nn_192_bf16",
        (Path::Hopper, Form::Nn, _) => "gemm_nn_128_bf16",
        (Path::Hopper, Form::Nt, 256) => "gemm_nt_256_bf16",
        (Path::Hopper, Form::Nt, 192) => "gemm_nt_192_bf16",
        (Path::Hopper, Form::Nt, _) => "gemm_nt_128_bf16",
        (Path::Hopper, Form::Tn, 256) => "gemm_tn_256_bf16",
        (Path::Hopper, Form::Tn, 192) => "gemm_tn_192_bf16",
        (Path::Hopper, Form::Tn, _) => "gemm_tn_128_bf16",
        (Path::HopperShifted, Form::Nn, _) => "gemm_nn_shifted_bf16",
        (Path::HopperShifted, Form::Tn, _) => "gemm_tn_shifted_bf16",
        (Path::HopperShifted, Form::Nt, _) => {
            unreachable!("a and b have rows of one width, so b has to be shifted too")
        }
    };
    // A parameter's gradient, the only use of tn, is f32 in a bf16 model too.
    let bf16_out = precision == Precision::Bf16 && form != Form::Tn;
    let finish = if bf16_out { "gemm_finish_bf16" } else { "gemm_finish_f32" };
    let tile = [128, width];
    let (block, shared_bytes) = match path {
        Path::MmaRagged => (256, 0),
        Path::Tf32 => (128, TF32_RING_BYTES),
        Path::Plain | Path::Mma => (128, 0),
        Path::Hopper | Path::HopperShifted => (384, hopper_bytes(width)),
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

/// Bytes of shared memory of `gemm_hopper.cu`, with tiles so wide.
fn hopper_bytes(width: usize) -> u32 {
    let stages = HOPPER_WIDTHS.iter().find(|(cols, _)| *cols == width).map_or(0, |(_, stages)| *stages);
    (stages * (128 + width) * HOPPER_STEP * 2 + HOPPER_STAGED_BYTES) as u32
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
    fn tiles_are_those_of_the_cut() {
        for (m, n, k, kernel) in [
            (8192, 8192, 8192, "gemm_nt_256_bf16"),
            (8192, 768, 3072, "gemm_nt_192_bf16"),
            (1024, 1024, 1024, "gemm_nt_128_bf16"),
        ] {
            let plan = of(Form::Nt, m, n, k, 90);
            assert_eq!((plan.kernel, plan.tile[1]), (kernel, product_cut(DType::Bf16, m, n, k).tile_cols));
            assert_eq!(of(Form::Nt, m, n, k, 80).tile, [128, 128]);
        }
        assert_eq!(of(Form::Nn, 1024, 1024, 1001, 90).tile, [128, 256], "the one width of rows that are shifted");
    }

    #[test]
    fn architectures_differ_in_the_path_alone() {
        for (m, n, k) in [(768, 768, 65_536), (1, 50_304, 768), (8192, 3072, 768)] {
            assert_eq!(of(Form::Tn, m, n, k, 80).parts, of(Form::Tn, m, n, k, 90).parts);
        }
    }

    #[test]
    fn kernels_have_the_same_sizes() {
        let hopper = concat!(
            include_str!("../../../../kernels/gemm_hopper.cu"),
            include_str!("../../../../kernels/gpu/gemm_ring.cuh"),
            include_str!("../../../../kernels/gpu/gemm_leave.cuh"),
        );
        for line in [
            "constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);",
            "constexpr int TILE_M = 128, STEP = 64;",
            "constexpr int PIECE = 32, PITCH = PIECE + 8;",
            "constexpr int BIAS_BYTES = 256 * 2; ",
            "constexpr int STAGED_BYTES = 16 * PITCH * 4 + BIAS_BYTES;",
            "static constexpr int STAGES = TILE_N == 256 ? 4 : TILE_N == 192 ? 5 : 6;",
        ] {
            assert!(hopper.contains(line), "gemm_hopper.cu has no line {line}");
        }
        let source = include_str!("../../../../kernels/gemm_tf32.cu");
        for line in
            ["constexpr int TILE = 128, STEP = 16, STAGES = 3, THREADS = 128;", "constexpr int K_PITCH = STEP + 4,"]
        {
            assert!(source.contains(line), "gemm_tf32.cu has no line {line}");
        }
        for (width, _) in HOPPER_WIDTHS {
            // With the barriers, which take up to 1024 bytes, what a block can have.
            let bytes = hopper_bytes(width);
            assert!(bytes + 1024 <= 227 * 1024, "{width}: {bytes}");
        }
    }
}
