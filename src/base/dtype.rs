//! Element types.

use std::fmt;

/// The type of one element of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE single precision, in which models train.
    #[default]
    F32,
    /// IEEE double precision, for the oracle that tests compare the others with.
    F64,
    /// The upper half of an IEEE single, in which models train on tensor cores, with f32 master weights.
    Bf16,
    /// 32-bit signed integers: token ids, labels, masks, positions of maxima.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            DType::Bf16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::F64 => 8,
        }
    }

    /// The type of sums that belong to tensors of this type: statistics, losses, parameters' gradients and moments.
    pub const fn wide(self) -> DType {
        match self {
            DType::Bf16 => DType::F32,
            other => other,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::Bf16 => "bf16",
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::I32 => "i32",
        })
    }
}
