//! Trains Transformers and CNNs that are larger than the memory they are given.
//!
//! A model is traced once into a graph ([`graph`]), differentiated, cut into shards under a memory budget ([`spill`]) and
//! run on lanes with the copies beside the arithmetic ([`engine`]). See ARCHITECTURE.md for the map.

pub mod base;
pub mod data;
pub mod device;
pub mod engine;
pub mod graph;
pub mod nn;
pub mod sched;
pub mod spill;
pub mod trace;
pub mod train;
