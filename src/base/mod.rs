//! The vocabulary of all other modules: element types, shapes, random numbers, units of bytes and time, errors.
//!
//! Nothing here does I/O, starts a thread, or is unsafe.

mod dtype;
mod error;
mod lane;
pub mod philox;
mod shape;
pub mod tensorfile;
mod units;

/// The label of a position that does not count in the loss, as in torch's cross-entropy and in transformers.
pub const IGNORED: i32 = -100;

pub use dtype::DType;
pub use error::{Error, Result};
pub use lane::{LaneId, LaneKind};
pub use shape::Shape;
pub use units::{
    Bytes, align_up, format_bytes, format_secs, is_too_large, nearest, parse_bytes, parse_bytes_per_sec,
    parse_flops_per_sec,
};
