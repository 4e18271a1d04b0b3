//! The built-in policies that consider only models, and a table of all built-in policies by name.
//!
//! Each is one pass over the candidates, with ties broken down to the id, so that equal views yield equal choices and a
//! run can be repeated.

use super::{LocalityLrtf, ModelId, ModelView, Policy, View};
use crate::base::philox::philox;
use std::cmp::Ordering;

/// Makes a policy with a seed, which only `random` uses.
pub type MakePolicy = fn(u64) -> Box<dyn Policy>;

/// The built-in policies by name, the default first. None pipelines.
pub const POLICIES: [(&str, MakePolicy); 6] = [
    ("sharded-lrtf", |_| Box::new(ShardedLrtf)),
    ("fifo", |_| Box::new(Fifo)),
    ("random", |seed| Box::new(Random { seed })),
    ("round-robin", |_| Box::new(RoundRobin)),
    ("srtf", |_| Box::new(Srtf)),
    ("locality-lrtf", |_| Box::new(LocalityLrtf::default())),
];

/// The one of [`POLICIES`] that has this name.
pub fn by_name(name: &str, seed: u64) -> Option<Box<dyn Policy>> {
    POLICIES.iter().find(|(known, _)| *known == name).map(|(_, make)| make(seed))
}

/// The longest remaining time first (sharded-LRTF; Nagrecha & Kumar 2021, arXiv:2110.08633).
///
/// The longest chain of units bounds the makespan, so it goes first. Unlike in the paper, a claimed unit counts as
/// done, and a device may take the successor of a unit in its own queue.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShardedLrtf;

impl Policy for ShardedLrtf {
    fn name(&self) -> &str {
        "sharded-lrtf"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let first = view.candidates().max_by(|a, b| by_remaining(a, b).then_with(|| by_place(view, a, b)));
        first.map(|model| model.id)
    }
}

/// The shortest remaining time first: models end early, and the longest one is left over. A baseline.
#[derive(Clone, Copy, Debug, Default)]
pub struct Srtf;

impl Policy for Srtf {
    fn name(&self) -> &str {
        "srtf"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let first = view.candidates().max_by(|a, b| by_remaining(b, a).then_with(|| by_place(view, a, b)));
        first.map(|model| model.id)
    }
}

/// Models in the order in which they were added.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fifo;

impl Policy for Fifo {
    fn name(&self) -> &str {
        "fifo"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        view.candidates().next().map(|model| model.id)
    }
}

/// Any candidate with equal probability. The choice's number is the counter, so that a run can be repeated from any
/// choice on.
#[derive(Clone, Copy, Debug)]
pub struct Random {
    /// Seeds the choices.
    pub seed: u64,
}

/// The fourth word of this policy's counters; no op and no other sequence uses it under the same seed.
const RANDOM_COUNTERS: u32 = u32::MAX;

impl Policy for Random {
    fn name(&self) -> &str {
        "random"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let counter = [view.choices as u32, (view.choices >> 32) as u32, 0, RANDOM_COUNTERS];
        let word = philox(counter, [self.seed as u32, (self.seed >> 32) as u32])[0];
        // The high half of word * count is uniform in 0..count, but for a bias of count / 2^32.
        let count = view.candidates().count() as u64;
        view.candidates().nth(((u64::from(word) * count) >> 32) as usize).map(|model| model.id)
    }
}

/// The next candidate in the order of ids after the model that was chosen last, by any device; after the last comes the
/// first.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn name(&self) -> &str {
        "round-robin"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let after = view.candidates().find(|model| Some(model.id) > view.last);
        after.or_else(|| view.candidates().next()).map(|model| model.id)
    }
}

/// Orders by remaining time, the longer one greater.
pub(super) fn by_remaining(a: &ModelView, b: &ModelView) -> Ordering {
    a.remaining_secs.total_cmp(&b.remaining_secs)
}

/// Breaks ties: a model already on the asking device is greater than one that is not, and a lower id is greater than a
/// higher one.
pub(super) fn by_place(view: &View, a: &ModelView, b: &ModelView) -> Ordering {
    let here = |model: &ModelView| model.last_device == Some(view.device);
    here(a).cmp(&here(b)).then(b.id.cmp(&a.id))
}
