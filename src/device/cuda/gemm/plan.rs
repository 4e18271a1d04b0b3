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

/// Elements of bf16 in the 16 bytes that the tensor core kernels copy at once.
const WORD_ELEMS: usize = 8;

/// The plan for a product with inputs of `dtype`.
pub fn plan(form: Form, sizes: Sizes, dtype: DType) -> GemmPlan {
    let Sizes { m, n, k } = sizes;
    let [a_pitch, b_pitch] = match form {
        Form::Nn => [k, n],
        Form::Nt => [k, k],
        Form::Tn => [m, n],
    };
    let aligned = a_pitch % WORD_ELEMS == 0 && b_pitch % WORD_ELEMS == 0;
    let (kernel, block) = match (dtype, form, aligned) {
        (DType::Bf16, Form::Nn, true) => ("gemm_nn_bf16", 128),
        (DType::Bf16, Form::Nt, true) => ("gemm_nt_bf16", 128),
        (DType::Bf16, Form::Tn, true) => ("gemm_tn_bf16", 128),
        (DType::Bf16, Form::Nn, false) => ("gemm_nn_ragged_bf16", 256),
        (DType::Bf16, Form::Nt, false) => ("gemm_nt_ragged_bf16", 256),
        (DType::Bf16, Form::Tn, false) => ("gemm_tn_ragged_bf16", 256),
        (_, Form::Nn, _) => ("gemm_nn_f32", 256),
        (_, Form::Nt, _) => ("gemm_nt_f32", 256),
        (_, Form::Tn, _) => ("gemm_tn_f32", 256),
    };
    // A parameter's gradient, the only use of tn, is f32 in a bf16 model too.
    let bf16_out = dtype == DType::Bf16 && form != Form::Tn;
    let finish = if bf16_out { "gemm_finish_bf16" } else { "gemm_finish_f32" };
    GemmPlan { kernel, finish, tile: [128, 128], block, parts: k_parts(m, n, k) }
}
