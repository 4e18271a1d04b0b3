//! Devices: where units run. A device is a set of lanes; a task is submitted to a lane with the tickets it waits for.
//!
//! The executor knows this trait and nothing below it, so the code that drives the host device also drives a GPU and
//! the simulator.
//! This module and those under it are the only ones that touch memory by address (`unsafe`).

mod attached;
mod calibrate;
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub mod cuda;
pub mod host;
pub mod sim;
mod start;
mod task;

pub(crate) use attached::Attached;
pub use calibrate::{calibrate, calibrate_fleet};
pub use sim::CostModel;
pub use start::{DeviceMemory, DeviceSpec, DiskSpec, FleetMemory, gpus, start_fleet, why_no_cuda, why_no_emulator};
pub use task::{
    AdamwRule, Clip, CopySpan, Memory, Norm, Run, Scalars, Segment, SgdRule, Span, Task, Update, UpdateRule,
    norm_scratch_bytes,
};

use crate::base::{LaneId, Result};

/// The promise of one task's completion. Lanes run in order, so it names a lane and how many tasks are done there then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    /// Index of the lane among the device's [`Device::lanes`].
    pub lane: u16,
    /// The task's number on that lane, from 1.
    pub number: u64,
}

/// A finished task.
#[derive(Debug)]
pub struct Completion {
    /// The task that has ended.
    pub ticket: Ticket,
    /// When it started, in seconds on the device's clock.
    pub start_secs: f64,
    /// When it ended.
    pub end_secs: f64,
    /// What went wrong, if anything did: the device runs nothing after that.
    pub result: Result<()>,
    /// Where [`Run::check`] is set: the first layer whose output was not finite.
    pub not_finite_layer: Option<usize>,
}

/// One or more devices of one kind, with the host's lanes beside them.
///
/// `after` may only name tickets that were issued before, so no order of submission can deadlock. Completions come one
/// by one and are the only source of time. The caller must rule out that tasks touch the same bytes at once, hence
/// `unsafe`; [`crate::engine::Engine`] does so for whole models, and is safe.
pub trait Device: Send {
    /// The lanes, in the order that [`Ticket::lane`] counts.
    fn lanes(&self) -> &[LaneId];

    /// Queues `task` on a lane, to start when the lane's earlier tasks and all of `after` are done. Never waits.
    ///
    /// # Safety
    /// Of two tasks that touch the same bytes, at least one of them writing, the later must wait for the earlier: by
    /// its lane or by `after`, directly or through other tasks. A program's buffers must be as
    /// [`crate::graph::Program::new`] placed them, each area whole at its base and none overlapping another. The spans
    /// of any other task must not overlap within the task, and must hold all the elements that its segments name.
    unsafe fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket;

    /// Waits up to `patience_secs` for the next completion; `None` when none came. Time in which the device sees a task
    /// at work does not count.
    fn next_completion(&mut self, patience_secs: f64) -> Option<Completion>;

    /// Now, on the device's clock, in seconds.
    fn now_secs(&self) -> f64;

    /// Whether tasks compute and memory holds anything; a simulated device does neither.
    fn computes(&self) -> bool;

    /// Adds `bytes` zeroed bytes to host memory while tasks run, and returns the offset where they begin.
    ///
    /// # Errors
    /// When the machine does not have that much memory.
    fn grow_host(&mut self, bytes: u64) -> Result<u64>;

    /// Adds `bytes` zeroed bytes to the disk tier, and returns the offset where they begin.
    ///
    /// # Errors
    /// When there is no disk tier, or not enough room.
    fn grow_disk(&mut self, bytes: u64) -> Result<u64>;

    /// Copies `bytes` into host memory at `offset`.
    ///
    /// # Safety
    /// Every task that reads or writes there has ended.
    unsafe fn write_host(&mut self, offset: u64, bytes: &[u8]);

    /// Copies host memory from `offset` into `bytes`.
    ///
    /// # Safety
    /// Every task that writes there has ended.
    unsafe fn read_host(&self, offset: u64, bytes: &mut [u8]);

    /// Writes `bytes` to the disk tier at `offset`. The caller has waited for every task that reads or writes there.
    ///
    /// # Errors
    /// When the disk fails.
    fn write_disk(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Reads the disk tier from `offset` into `bytes`. The caller has waited for every task that writes there.
    ///
    /// # Errors
    /// When the disk fails.
    fn read_disk(&self, offset: u64, bytes: &mut [u8]) -> Result<()>;

    /// The highest byte of a device's arena that any task has touched so far, plus one.
    fn high_water_bytes(&self, device: u16) -> u64;

    /// Bytes of a device's arena; `None` where it is unlimited, as a simulated one's, or not known.
    fn arena_bytes(&self, device: u16) -> Option<u64> {
        let _ = device;
        None
    }

    /// Bytes of host memory, including what was added; `None` as for an arena.
    fn host_bytes(&self) -> Option<u64> {
        None
    }
}
