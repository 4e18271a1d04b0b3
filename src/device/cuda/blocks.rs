//! The small blocks of device memory that tell kernels what changes from task to task.
//!
//! Each task of a compute lane has one entry of a ring, on the device and in pinned memory; its bytes are copied on the task's own
//! stream, so nothing waits for the host and an entry is free again when its task has ended.

use super::driver::{Driver, Stream};
use super::launch::Ptr;
use crate::base::{Error, Result};

/// Entries of a ring: tasks that may be queued on a lane at once.
const ENTRIES: u64 = 64;
/// Where the first layer that is not finite lies in an entry, as an `int`.
const LAYER_AT: u64 = 256;
/// Where kernels of one task leave what the next of them reads.
const PASSED_ON_AT: u64 = 320;

/// A lane's ring.
pub(super) struct Blocks {
    device: Ptr,
    host: *mut u8,
}

impl Blocks {
    /// Bytes of an entry: what changes, then the first layer that is not finite, then what kernels of the task leave for each other.
    pub const ENTRY_BYTES: u64 = 512;

    /// A ring for a lane of `gpu`; `wanted` is false for lanes that launch nothing.
    pub fn new(driver: &mut dyn Driver, gpu: usize, wanted: bool) -> Result<Blocks> {
        let bytes = if wanted { ENTRIES * Self::ENTRY_BYTES } else { 0 };
        Ok(Blocks { device: driver.alloc(gpu, bytes)?, host: driver.alloc_host(bytes)? })
    }

    /// Tasks that may be queued at once.
    pub fn len(&self) -> usize {
        ENTRIES as usize
    }

    fn at(number: u64) -> u64 {
        number % ENTRIES * Self::ENTRY_BYTES
    }

    /// Task `number`'s entry.
    pub fn entry(&self, number: u64) -> Ptr {
        self.device.plus(Self::at(number))
    }

    /// The entry's copy in pinned memory.
    fn host(&self, number: u64, offset: u64, bytes: usize) -> *mut u8 {
        debug_assert!(offset + bytes as u64 <= Self::ENTRY_BYTES);
        // SAFETY: within the ring, as the modulus and the line above say.
        unsafe { self.host.add((Self::at(number) + offset) as usize) }
    }

    /// Sends `bytes` to task `number`'s entry.
    pub fn upload(&self, driver: &mut dyn Driver, stream: Stream, number: u64, bytes: &[u8]) -> Result<Ptr> {
        if bytes.len() as u64 > LAYER_AT {
            return Err(Error::Device(format!("{} bytes are more than a task's block holds", bytes.len())));
        }
        let host = self.host(number, 0, bytes.len());
        // SAFETY: the entry is this task's alone until it has ended.
        unsafe { host.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        let device = self.entry(number);
        driver.copy(stream, device, Ptr(host as u64), bytes.len() as u64)?;
        Ok(device)
    }

    /// Where kernels of task `number` leave what the next of them reads: 192 bytes.
    pub fn passed_on(&self, number: u64) -> Ptr {
        self.entry(number).plus(PASSED_ON_AT)
    }

    /// Where kernels of task `number` put the first layer that is not finite; starts above every layer.
    pub fn layer(&self, driver: &mut dyn Driver, stream: Stream, number: u64) -> Result<Ptr> {
        let layer = self.entry(number).plus(LAYER_AT);
        driver.fill(stream, layer, 0x7F, 4)?;
        Ok(layer)
    }

    /// Brings that layer back to the host.
    pub fn download_layer(&self, driver: &mut dyn Driver, stream: Stream, number: u64) -> Result<()> {
        let (from, to) = (self.entry(number).plus(LAYER_AT), self.host(number, LAYER_AT, 4));
        driver.copy(stream, Ptr(to as u64), from, 4)
    }

    /// The first layer that was not finite, once the task has ended.
    pub fn first_bad_layer(&self, number: u64) -> Option<usize> {
        let host = self.host(number, LAYER_AT, 4).cast::<i32>();
        // SAFETY: aligned, within the entry, and written by the copy that the task ended with.
        let layer = unsafe { host.read() };
        (layer != 0x7F7F_7F7F).then_some(layer as usize)
    }
}

// SAFETY: pinned memory that the driver owns; used by the device's thread alone.
unsafe impl Send for Blocks {}
