//! The cuda device: our kernels on a GPU, or the same kernels on the emulator.
//!
//! One launch file an op family, with the stem of its kernels; `launch` is what a launch is, `driver` the seam under which a GPU or the
//! emulator stands.

mod activation;
mod attention;
mod batchnorm;
mod column_sum;
mod conv;
mod cross_entropy;
pub mod driver;
mod elementwise;
mod embedding;
pub mod launch;
mod linear;
mod norm;
mod operands;
mod ops;
mod optimizer;
mod pool;
mod transpose;
