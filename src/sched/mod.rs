//! Scheduling over many models and devices: which model's next unit a device takes. Pure: a snapshot in, a choice out;
//! no clock, no device.
//!
//! The executor asks when a device can begin to prefetch another unit (double buffering), not when it is already idle.
//! So the candidates are the idle models and those whose claimed units are all in this same device's queue: without the
//! latter a model would lose its turn whenever one of its units is prefetched.
//!
//! **Of several devices that can take a unit, the one that is free soonest is asked first, and of equal ones the
//! fastest.** Otherwise a busy device would prefetch a unit that an idle one could run at once, and would withhold both
//! its models from all other devices for as long as it alternates between them: with 12 equal models on 8 devices,
//! asked in order of their numbers, the makespan is 4/3 of the least possible (`tests.rs`).

mod bounds;
mod locality;
mod policies;
mod rehearsal;
#[cfg(test)]
mod tests;
mod view;

pub use bounds::{Bounds, DeviceRates, LowerBound, ModelWork, Part};
pub use locality::{LocalityLrtf, LocalityTuning};
pub use policies::{Fifo, MakePolicy, POLICIES, Random, RoundRobin, ShardedLrtf, Srtf, by_name};
pub use rehearsal::{Rehearsal, rehearse};
pub use view::{Claim, DeviceId, DeviceView, MOST_MODELS, ModelId, ModelView, Policy, View};
