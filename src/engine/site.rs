//! A model on a device: where its tensors lie there and at home.

use super::queue::Tag;
use super::rings::{BoundaryKey, ShardOf};
use super::tables::Tables;
use super::{Engine, Lanes, NO_STEP};
use crate::device::{Memory, Span};
use crate::spill::{ArenaMap, Model, OnDisk, Plan};
use crate::trace::{TaskName, What};
use std::sync::Arc;

/// A model on a device, at work: where its tensors are there, and what the tasks belong to.
#[derive(Clone)]
pub(super) struct Site {
    pub member: usize,
    pub device: u16,
    pub model: Arc<Model>,
    pub plan: Arc<Plan>,
    pub map: Arc<ArenaMap>,
    pub tables: Arc<Tables>,
    pub rings: usize,
    pub lanes: Lanes,
    /// Where the model's part of the host's store begins.
    pub store: u64,
    /// Where its part of the disk tier begins.
    pub disk: u64,
    pub step: u64,
    pub serial: u64,
}

impl Site {
    pub fn arena(&self, offset: u64, bytes: u64) -> Span {
        Span { memory: Memory::Device(self.device), offset, bytes }
    }

    pub fn store(&self, offset: u64, bytes: u64) -> Span {
        Span { memory: Memory::Host, offset: self.store + offset, bytes }
    }

    /// A stretch of what is at home on the disk from `least` on, and in the store before.
    pub fn home(&self, least: OnDisk, offset: u64, bytes: u64) -> Span {
        match self.plan.choice.on_disk >= least {
            true => Span { memory: Memory::Disk, offset: self.disk + offset, bytes },
            false => self.store(offset, bytes),
        }
    }

    /// A stretch of the weights at home, by its start in the flat order.
    pub fn weights(&self, flat: u64, bytes: u64) -> Span {
        self.home(OnDisk::Weights, self.plan.host.weights + flat, bytes)
    }

    /// A stretch of moments or remainders at home.
    pub fn update_state(&self, offset: u64, bytes: u64) -> Span {
        self.home(OnDisk::UpdateState, offset, bytes)
    }

    /// What a task is called that is of a shard, and of a microbatch if it is of one.
    pub fn tag(&self, what: What, shard: usize, microbatch: Option<usize>) -> Tag {
        let microbatch = microbatch.filter(|_| self.model.microbatches > 1).map(|m| m as u16);
        let name = TaskName { what, model: self.member as u16, shard: shard as u16, microbatch };
        Tag { name, serial: self.serial, step: self.step, ends_unit: false }
    }

    pub fn shard(&self, shard: usize) -> ShardOf {
        ShardOf { model: self.member, shard }
    }

    pub fn place(&self, boundary: usize, microbatch: usize) -> BoundaryKey {
        BoundaryKey { model: self.member, serial: self.serial, boundary, microbatch }
    }

    pub fn is_last(&self, shard: usize) -> bool {
        shard + 1 == self.plan.shards.len()
    }

    /// Which of the two sets of numbers (losses, norms, inputs) the step uses.
    pub fn parity(&self) -> usize {
        (self.step % 2) as usize
    }
}

impl Engine {
    /// A model on a device, for tasks of no step.
    pub(super) fn site(&self, member: usize, device: u16) -> Site {
        let m = &self.members[member];
        Site {
            member,
            device,
            model: Arc::clone(&m.model),
            plan: Arc::clone(&m.plan),
            map: Arc::clone(&m.maps[usize::from(device)]),
            tables: Arc::clone(&m.tables),
            rings: m.rings[usize::from(device)],
            lanes: self.lanes[usize::from(device)],
            store: m.store,
            disk: m.disk,
            step: NO_STEP,
            serial: 0,
        }
    }
}
