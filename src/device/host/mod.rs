//! The host device: the machine's cores as devices, with separate memories and real copies between them.
//!
//! One file an op family holds bodies on slices, generic over [`real::Real`]; `operands` are what they are given, `ops`
//! calls them, `execute` runs tasks, `lanes` are the threads. Every body gives the same bits whatever the number of
//! threads.

pub mod activation;
mod affinity;
pub mod attention;
pub mod batchnorm;
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(in crate::device) mod beside;
pub mod conv;
mod cpu_clocks;
pub mod cross_entropy;
mod custom;
mod device;
mod disk;
pub mod elementwise;
pub mod embedding;
mod execute;
pub mod gemm;
pub mod glu;
mod im2col;
mod lanes;
pub mod linear;
pub mod loss_sum;
pub mod master;
pub mod mean_squared_error;
mod memory;
pub mod norm;
mod operands;
mod ops;
pub mod optimizer;
pub mod parallel;
mod planes;
pub mod pool;
pub mod real;
mod reduce;
pub mod rotary;
pub mod strided;
#[cfg(test)]
pub mod testing;
mod transpose;
mod widen;

#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(in crate::device) use memory::POISON;

pub use device::{HostConfig, HostDevice, HostSpec};
