//! The small blocks of device memory that tell kernels what changes from task to task.
//!
//! Each task of a compute lane has one entry of a ring, which a kernel on the task's own stream writes first, so
//! nothing waits for the host and an entry is free again when its task has ended. What goes back to the host has a ring
//! in pinned memory.

use super::driver::{Driver, Stream};
use super::launch::Ptr;
use crate::base::Result;

/// Entries of a ring: tasks that may be queued on a lane at once.
const ENTRIES: u64 = 64;
/// Where the first layer that is not finite lies in an entry, as an `int`.
const LAYER_AT: u64 = 256;
/// Where kernels of one task leave what the next of them reads.
const PASSED_ON_AT: u64 = 320;

/// A lane's rings.
pub(super) struct Blocks {
    device: Ptr,
    /// First layers that are not finite, as they have come back.
    layers: *mut i32,
}

impl Blocks {
    /// Bytes of an entry: what changes, then the first layer that is not finite, then what kernels of the task leave
    /// for each other.
    pub const ENTRY_BYTES: u64 = 512;

    /// Rings for a lane of `gpu`; `wanted` is false for lanes that launch nothing.
    pub fn new(driver: &mut dyn Driver, gpu: usize, wanted: bool) -> Result<Blocks> {
        let entries = if wanted { ENTRIES } else { 0 };
        Ok(Blocks {
            device: driver.alloc(gpu, entries * Self::ENTRY_BYTES)?,
            layers: driver.alloc_host(4 * entries)?.cast(),
        })
    }

    /// Tasks that may be queued at once.
    pub fn len(&self) -> usize {
        ENTRIES as usize
    }

    /// Task `number`'s entry.
    pub fn entry(&self, number: u64) -> Ptr {
        self.device.plus(number % ENTRIES * Self::ENTRY_BYTES)
    }

    fn host_layer(&self, number: u64) -> *mut i32 {
        // SAFETY: within the ring, as the modulus says.
        unsafe { self.layers.add((number % ENTRIES) as usize) }
    }

    /// Where kernels of task `number` leave what the next of them reads: 192 bytes.
    pub fn passed_on(&self, number: u64) -> Ptr {
        self.entry(number).plus(PASSED_ON_AT)
    }

    /// Where kernels of task `number` put the first layer that is not finite.
    pub fn layer(&self, number: u64) -> Ptr {
        self.entry(number).plus(LAYER_AT)
    }

    /// Brings that layer back to the host.
    pub fn download_layer(&self, driver: &mut dyn Driver, stream: Stream, number: u64) -> Result<()> {
        driver.copy(stream, Ptr(self.host_layer(number) as u64), self.layer(number), 4)
    }

    /// The first layer that was not finite, once the task has ended.
    pub fn first_bad_layer(&self, number: u64) -> Option<usize> {
        // SAFETY: aligned, within the ring, and written by the copy that the task ended with.
        let layer = unsafe { self.host_layer(number).read() };
        (layer != 0x7F7F_7F7F).then_some(layer as usize)
    }
}

// SAFETY: pinned memory that the driver owns; used by the device's thread alone.
unsafe impl Send for Blocks {}
