//! A device owned by the crate itself.

use super::{Device, Task, Ticket};
use std::ops::{Deref, DerefMut};

/// A device that receives tasks from a single owner. The owner upholds what [`Device`] requires of its callers, so that
/// these functions are safe for it alone:
/// - the engine's queue enters every task with the bytes that it touches, in program order, and makes it wait for all
///   earlier tasks that touch them too (`engine::hazards`); it reads and writes the host's store only when nothing is
///   in flight, and not after a failure; its programs and spans come from a plan;
/// - calibration gives each lane memory of its own, and waits for the lane before it gives that memory to another.
pub(crate) struct Attached(Box<dyn Device>);

impl Attached {
    pub fn new(device: Box<dyn Device>) -> Attached {
        Attached(device)
    }

    /// As [`Device::submit`].
    pub fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        // SAFETY: the owner has ordered the task after all that conflict with it, see above.
        unsafe { self.0.submit(lane, task, after) }
    }

    /// As [`Device::write_host`].
    pub fn write_host(&mut self, offset: u64, bytes: &[u8]) {
        // SAFETY: the owner has waited for all tasks that touch these bytes, see above.
        unsafe { self.0.write_host(offset, bytes) }
    }

    /// As [`Device::read_host`].
    pub fn read_host(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: the owner has waited for all tasks that write these bytes, see above.
        unsafe { self.0.read_host(offset, bytes) }
    }
}

impl Deref for Attached {
    type Target = dyn Device;

    fn deref(&self) -> &(dyn Device + 'static) {
        self.0.as_ref()
    }
}

impl DerefMut for Attached {
    fn deref_mut(&mut self) -> &mut (dyn Device + 'static) {
        self.0.as_mut()
    }
}
