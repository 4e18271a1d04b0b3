//! Which kernel computes a product, and on what grid: a pure function of shape, element type and architecture.
//!
//! Never of the number of multiprocessors, nor of where operands lie: a tensor starts at a multiple of 64 bytes wherever the shards are
//! cut, so whether its rows are aligned is a matter of their width.

use crate::base::DType;
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

/// A kernel with its launch shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmPlan {
    /// The entry point.
    pub kernel: &'static str,
    /// The one that adds up the parts of k, where there are several.
    pub finish: &'static str,
    /// Rows and columns of a block's tile.
    pub tile: [usize; 2],
    /// Threads of a block.
    pub block: u32,
    /// How k is cut.
    pub parts: KParts,
}

impl GemmPlan {
    /// Tiles of the output.
    pub fn tiles(&self, sizes: Sizes) -> usize {
        sizes.m.div_ceil(self.tile[0]) * sizes.n.div_ceil(self.tile[1])
    }
}

/// The plan for a product with inputs of `dtype` and an output of `out`.
pub fn plan(form: Form, sizes: Sizes, dtype: DType, out: DType) -> GemmPlan {
    let _ = dtype;
    let kernel = match form {
        Form::Nn => "gemm_nn_f32",
        Form::Nt => "gemm_nt_f32",
        Form::Tn => "gemm_tn_f32",
    };
    GemmPlan {
        kernel,
        finish: if out == DType::Bf16 { "gemm_finish_bf16" } else { "gemm_finish_f32" },
        tile: [128, 128],
        block: 256,
        parts: k_parts(sizes.m, sizes.n, sizes.k),
    }
}
