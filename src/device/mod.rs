//! Devices: where units run.

pub mod host;
