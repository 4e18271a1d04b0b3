//! The host device: arithmetic on the CPU.

pub mod gemm;
pub mod parallel;
pub mod real;
#[cfg(test)]
pub mod testing;
