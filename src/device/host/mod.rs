//! The host device: arithmetic on the CPU.

pub mod parallel;
pub mod real;
