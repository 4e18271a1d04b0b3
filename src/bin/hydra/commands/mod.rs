//! The program's commands, one file each: what they print and write.

pub mod devices;
pub mod forward;
pub mod plan;
pub mod report;
pub mod simulate;
pub mod sweep;
pub mod train;
