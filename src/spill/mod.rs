//! Spilling: the cut into shards, where each kind of state lives, and the plan that a budget allows.

mod baselines;
mod cut;
mod estimate;
mod estimate_anywhere;
mod fleet;
mod fleet_plan;
mod found;
mod homes;
mod memory;
mod model;
mod pipelined;
mod plan;
mod search;
mod shard;
mod slots;
mod stand_in;
mod store;

pub use baselines::{Baseline, Lined, PlanAlone, place_baseline};
pub use cut::balanced;
pub use fleet::{FleetMap, Home, Placed};
pub use fleet_plan::{FleetDevice, FleetModel, FleetPlan, named, or_nominal, plan_anywhere, plan_at_home, plan_fleet};
pub use homes::{HomeBudgets, find_homes};
pub use memory::{ArenaMap, BoundaryTier, Choice, update_parts, update_state_bytes, visiting_gradients_at};
pub use model::Model;
pub use pipelined::plan_pipelined;
pub use plan::{Anywhere, Plan, PlanOptions, Recompute, Spread, Updates};
pub use shard::ShardPrograms;
pub use slots::SlotMap;
pub use stand_in::StandIns;
pub use store::{HostMap, OnDisk, update_stage_parts};
