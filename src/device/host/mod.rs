//! The host device: arithmetic on the CPU.

pub mod activation;
pub mod attention;
pub mod batchnorm;
pub mod conv;
pub mod cross_entropy;
pub mod elementwise;
pub mod embedding;
pub mod gemm;
mod im2col;
pub mod linear;
pub mod norm;
pub mod optimizer;
pub mod parallel;
mod planes;
pub mod pool;
pub mod real;
pub mod reduce;
pub mod strided;
#[cfg(test)]
pub mod testing;
