//! Scheduling over many models and devices: which model's next unit a device takes. Pure: a snapshot in, a choice out; no clock, no device.
//!
//! The executor asks when a device can begin to fetch another unit (double buffering), not when it is already idle. So the candidates are the
//! idle models and those whose claimed units all stand in this very device's queue: without the second kind a model would lose its turn
//! whenever it is prefetched.

mod bounds;
mod locality;
mod policies;
#[cfg(test)]
mod tests;
mod view;

pub use bounds::{Bound, Bounds, DeviceRates, ModelWork};
pub use locality::LocalityLrtf;
pub use policies::{Fifo, POLICIES, Random, RoundRobin, ShardedLrtf, Srtf, by_name};
pub use view::{Claim, DeviceId, DeviceView, ModelId, ModelView, Policy, View};
