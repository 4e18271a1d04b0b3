//! Events: what ran where, from when to when, and what it waited for.
//!
//! An event is `Copy` and holds no text, so that recording one costs no allocation.

use std::fmt;

use crate::base::LaneId;

/// One finished task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    /// The lane it ran on.
    pub lane: LaneId,
    /// What it did, for which model and shard.
    pub name: TaskName,
    /// The step of its model, from 0.
    pub step: u32,
    /// When it started, in seconds since the run's start, real or virtual.
    pub start_secs: f64,
    /// When it ended, on the same clock.
    pub end_secs: f64,
    /// Bytes it moved; 0 where it moved none.
    pub bytes: u64,
    /// Floating-point operations it did; 0 where it did none.
    pub flops: f64,
    /// Its ticket; tickets count up from 1 in the order of submission, over all lanes.
    pub ticket: u64,
    /// Among the tasks it waited for and its predecessor on the lane, the ticket of the one that finished last; 0 where
    /// there was none. Less than `ticket`.
    pub after: u64,
}

impl Event {
    /// Seconds it ran; 0 where the times are out of order or not finite.
    pub fn secs(&self) -> f64 {
        if self.has_times() { self.end_secs - self.start_secs } else { 0.0 }
    }

    /// True where both times are finite and in order.
    pub fn has_times(&self) -> bool {
        self.start_secs.is_finite() && self.end_secs.is_finite() && self.start_secs <= self.end_secs
    }
}

/// What a task did and for whom; prints as `forward model 0 shard 3 microbatch 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TaskName {
    /// The kind of task.
    pub what: What,
    /// The model's number.
    pub model: u16,
    /// The shard's number within the model.
    pub shard: u16,
    /// The microbatch, where the task is for one of several.
    pub microbatch: Option<u16>,
}

impl fmt::Display for TaskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} model {} shard {}", self.what.label(), self.model, self.shard)?;
        match self.microbatch {
            Some(microbatch) => write!(f, " microbatch {microbatch}"),
            None => Ok(()),
        }
    }
}

/// Kinds of tasks, in the order of a legend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// A shard's forward unit.
    Forward,
    /// A shard's backward unit, recomputation included.
    Backward,
    /// The last shard's forward, loss and backward.
    LastUnit,
    /// A forward unit on held-out data.
    Eval,
    /// An optimizer's update.
    Update,
    /// A gradient's share of the global norm.
    Norm,
    /// A copy of weights to the device.
    FetchWeights,
    /// A copy of masters and moments to the device.
    FetchState,
    /// A copy of a gradient to the device.
    FetchGradient,
    /// A copy of a boundary activation or boundary gradient to the device.
    FetchBoundary,
    /// A copy of updated weights to their home.
    SpillWeights,
    /// A copy of updated masters and moments to their home.
    SpillState,
    /// A copy of a gradient to the host.
    SpillGradient,
    /// A copy of a boundary activation or boundary gradient to the host.
    SpillBoundary,
    /// A copy of a batch to the device.
    Input,
    /// A copy of a loss or logits to the host.
    Result,
    /// A read of state from the disk tier.
    DiskRead,
    /// A write of state to the disk tier.
    DiskWrite,
}

impl What {
    /// Every kind, in the order of a legend.
    pub const ALL: [What; 18] = {
        let mut all = [What::Forward; 18];
        let mut i = 0;
        while i < all.len() {
            all[i] = LOOKS[i].0;
            i += 1;
        }
        all
    };

    /// Whether it is the compute of a shard's unit.
    pub const fn is_unit(self) -> bool {
        matches!(self, What::Forward | What::Backward | What::LastUnit | What::Eval)
    }

    /// The kind in words; also its category in the trace file.
    pub const fn label(self) -> &'static str {
        LOOKS[self as usize].1
    }

    /// The kind whose [`What::label`] is `label`.
    pub(super) fn from_label(label: &str) -> Option<What> {
        What::ALL.into_iter().find(|what| what.label() == label)
    }

    /// A CSS colour.
    pub(super) const fn colour(self) -> &'static str {
        LOOKS[self as usize].2
    }
}

/// Every kind in the order of the enum, with its label and its colour. Compute has cool colours, fetches warm ones,
/// spills purple to pink, the disk brown; each is legible on white and on near-black.
const LOOKS: [(What, &str, &str); 18] = [
    (What::Forward, "forward", "#4c8bd6"),
    (What::Backward, "backward", "#2f5fa8"),
    (What::LastUnit, "last unit", "#1fa3a3"),
    (What::Eval, "eval", "#8fb8e8"),
    (What::Update, "update", "#3f9d5a"),
    (What::Norm, "norm", "#8cc56d"),
    (What::FetchWeights, "fetch weights", "#f0993a"),
    (What::FetchState, "fetch state", "#e3b93c"),
    (What::FetchGradient, "fetch gradient", "#f3c98b"),
    (What::FetchBoundary, "fetch boundary", "#dd6f3c"),
    (What::SpillWeights, "spill weights", "#9a6fd0"),
    (What::SpillState, "spill state", "#7a55b8"),
    (What::SpillGradient, "spill gradient", "#d0649c"),
    (What::SpillBoundary, "spill boundary", "#e395bd"),
    (What::Input, "input", "#9aa5b1"),
    (What::Result, "result", "#7b8794"),
    (What::DiskRead, "disk read", "#a97b55"),
    (What::DiskWrite, "disk write", "#8a5a3b"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_label_and_colour() {
        for (index, what) in What::ALL.into_iter().enumerate() {
            assert_eq!(What::from_label(what.label()), Some(what));
            assert_eq!(what as usize, index, "ALL is in the order of the enum");
            assert!(What::ALL[..index].iter().all(|other| other.colour() != what.colour()), "{what:?}");
        }
        assert_eq!(What::from_label("job"), None);
        let name = TaskName { what: What::FetchWeights, model: 0, shard: 3, microbatch: Some(1) };
        assert_eq!(name.to_string(), "fetch weights model 0 shard 3 microbatch 1");
    }
}
