//! A device for what needs no overlap: one task at a time.

use hydra::device::{Device, DeviceMemory, DeviceSpec, Task};

/// A device on which nothing is in flight between two calls.
pub struct Serial {
    device: Box<dyn Device>,
    patience_secs: f64,
}

impl Serial {
    /// Starts a small device.
    pub fn start(spec: &DeviceSpec, memory: DeviceMemory) -> Serial {
        // On a GPU a kernel that hangs should cost little; elsewhere a build may be checked, and the machine busy.
        let patience_secs = if let DeviceSpec::Cuda { .. } = spec { 20.0 } else { 600.0 };
        Serial { device: spec.start(memory).expect("a small device starts"), patience_secs }
    }

    /// Writes into the host's store.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        // SAFETY: nothing is in flight.
        unsafe { self.device.write_host(offset, bytes) }
    }

    /// Reads the host's store.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: nothing is in flight.
        unsafe { self.device.read_host(offset, bytes) }
    }

    /// Runs a task on a lane and waits for its end. The task is as its device takes it: tests lay their memory out so.
    pub fn wait(&mut self, lane: u16, task: Task) {
        // SAFETY: nothing else is in flight, and each test lays out what its tasks touch.
        let ticket = unsafe { self.device.submit(lane, task, &[]) };
        let done = self.device.next_completion(self.patience_secs).expect("a small task ends in time");
        assert_eq!(done.ticket, ticket);
        done.result.expect("the task succeeds");
    }
}
