//! Spilling: the cut into shards, where each kind of state lives, and the plan that a budget allows.

mod cut;
mod estimate;
mod memory;
mod model;
mod plan;
mod search;
mod shard;
mod stand_in;

pub use cut::{CutRule, balanced, max_fill};
pub use memory::{ArenaMap, BoundaryTier, Choice, HostMap};
pub use model::Model;
pub use plan::{Plan, PlanOptions, Recompute};
pub use shard::ShardPrograms;
