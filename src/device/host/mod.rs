//! The host device: arithmetic on the CPU.

pub mod activation;
pub mod attention;
pub mod cross_entropy;
pub mod elementwise;
pub mod embedding;
pub mod gemm;
pub mod linear;
pub mod norm;
pub mod parallel;
pub mod real;
pub mod reduce;
pub mod strided;
#[cfg(test)]
pub mod testing;
