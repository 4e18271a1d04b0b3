//! The host device: arithmetic on the CPU.

pub mod batchnorm;
pub mod conv;
pub mod gemm;
mod im2col;
pub mod optimizer;
pub mod parallel;
mod planes;
pub mod pool;
pub mod real;
#[cfg(test)]
pub mod testing;
