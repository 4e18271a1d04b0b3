//! The cuda device's memory by address: each logical device's arena on its GPU, and the host's pinned store.

use super::driver::Driver;
use super::launch::Ptr;
use crate::base::{Error, Result};
use crate::device::{Memory, Span};

/// A logical device: where it lies, and its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogicalDevice {
    /// The GPU, by its place among the driver's.
    pub gpu: usize,
    /// Bytes of its arena.
    pub arena_bytes: u64,
}

/// Arenas and store.
pub(super) struct DeviceMemory {
    devices: Vec<LogicalDevice>,
    /// Of each logical device.
    arenas: Vec<Ptr>,
    /// One past the highest byte of each arena that a task has touched.
    high_water: Vec<u64>,
    /// Pinned memory, each piece with the offset where it begins and its size.
    host: Vec<(u64, Ptr, u64)>,
}

impl DeviceMemory {
    /// Allocates the arenas; the store's first piece lies at `host`.
    ///
    /// # Errors
    /// When a GPU has not as much.
    pub fn new(driver: &mut dyn Driver, devices: &[LogicalDevice], host: Ptr, host_bytes: u64) -> Result<DeviceMemory> {
        let arenas =
            devices.iter().map(|device| driver.alloc(device.gpu, device.arena_bytes)).collect::<Result<Vec<_>>>()?;
        let high_water = vec![0; arenas.len()];
        Ok(DeviceMemory { devices: devices.to_vec(), arenas, high_water, host: vec![(0, host, host_bytes)] })
    }

    /// Adds a piece to the store, which begins at offset `base` of it.
    pub fn grow(&mut self, base: u64, at: Ptr, bytes: u64) {
        self.host.push((base, at, bytes));
    }

    /// Where a logical device's arena begins.
    pub fn arena(&self, device: u16) -> Ptr {
        self.arenas[device as usize]
    }

    /// Bytes of a logical device's arena.
    pub fn arena_bytes(&self, device: u16) -> u64 {
        self.devices[device as usize].arena_bytes
    }

    /// One past the last byte of the store.
    pub fn host_bytes(&self) -> u64 {
        self.host.last().map_or(0, |(base, _, bytes)| base + bytes)
    }

    /// One past the highest byte of a device's arena that a task has touched.
    pub fn high_water(&self, device: u16) -> u64 {
        self.high_water[device as usize]
    }

    /// Where a span begins.
    pub fn address(&self, span: Span) -> Ptr {
        match span.memory {
            Memory::Host => self.host_address(span.offset, span.bytes),
            Memory::Device(device) => self.arena(device).plus(span.offset),
            Memory::Disk => unreachable!("the disk tier has lanes of its own"),
        }
    }

    /// Where `bytes` of the store from `offset` on begin.
    pub fn host_address(&self, offset: u64, bytes: u64) -> Ptr {
        let (base, start, size) = self.host[self.host.partition_point(|(base, ..)| *base <= offset) - 1];
        let end = offset.saturating_add(bytes);
        assert!(end <= base + size, "bytes {offset}..{end} of host memory that ends at {}", base + size);
        start.plus(offset - base)
    }

    /// Notes that a task on GPU `own` touches a span.
    ///
    /// # Errors
    /// When it lies in another GPU's memory, or outside of its arena.
    pub fn touch(&mut self, driver: &dyn Driver, own: usize, span: Span) -> Result<()> {
        let Memory::Device(device) = span.memory else { return Ok(()) };
        if span.bytes == 0 {
            return Ok(());
        }
        let LogicalDevice { gpu, arena_bytes } = self.devices[device as usize];
        if gpu != own {
            let (own, other) = (driver.facts(own), driver.facts(gpu));
            let what = format!("a task on {own} touches memory of device {device}, which lies on {other}");
            return Err(Error::Device(what));
        }
        if span.end() > arena_bytes {
            let (start, end) = (span.offset, span.end());
            let what = format!("bytes {start}..{end} of device {device}, whose arena has {arena_bytes}");
            return Err(Error::Device(what));
        }
        let high = &mut self.high_water[device as usize];
        *high = (*high).max(span.end());
        Ok(())
    }
}
