//! A device for what needs no overlap: one task at a time.

use hydra::device::{Device, Task};

/// A device on which nothing is in flight between two calls.
pub struct Serial(Box<dyn Device>);

impl Serial {
    pub fn new(device: Box<dyn Device>) -> Serial {
        Serial(device)
    }

    /// Writes into the host's store.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        // SAFETY: nothing is in flight.
        unsafe { self.0.write_host(offset, bytes) }
    }

    /// Reads the host's store.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: nothing is in flight.
        unsafe { self.0.read_host(offset, bytes) }
    }

    /// Runs a task on a lane and waits for its end. The task is as its device takes it: tests lay their memory out so.
    pub fn wait(&mut self, lane: u16, task: Task) {
        // SAFETY: nothing else is in flight, and each test lays out what its tasks touch.
        let ticket = unsafe { self.0.submit(lane, task, &[]) };
        let done = self.0.next_completion(600.0);
        let done = done.expect("a small task ends within ten minutes, in a checked build on a busy machine too");
        assert_eq!(done.ticket, ticket);
        done.result.expect("the task succeeds");
    }
}
