//! The host's arithmetic as a lane on its own, over memory of another device: updates and norms beside a GPU.

use super::device::pool;
use super::lanes::{Lane, Order, Shared, Throttle};
use super::memory::{Block, Store};
use crate::base::{Error, Result};
use crate::device::{Completion, Task, Ticket};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

/// What a [`MathLane`] is made of.
pub(in crate::device) struct MathConfig {
    /// Its number among the device's lanes.
    pub lane: u16,
    /// Cores; `None` is all.
    pub threads: Option<usize>,
    /// From when its seconds count.
    pub clock: Instant,
}

/// A thread, with a pool behind it, that runs tasks on host memory.
pub(in crate::device) struct MathLane {
    shared: Arc<Shared>,
    orders: Option<Sender<Order>>,
    completions: Receiver<Completion>,
    thread: Option<JoinHandle<()>>,
}

impl MathLane {
    /// Starts the thread, over `bytes` of host memory at `store`.
    ///
    /// # Safety
    /// The memory is page-aligned, initialised, and outlives the lane.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub unsafe fn new(config: &MathConfig, store: *mut u8, bytes: u64) -> Result<MathLane> {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = config.threads.unwrap_or(all).clamp(1, all);
        // SAFETY: the caller's promise.
        let host = Store::new(unsafe { Block::borrowed(store, bytes) });
        let (orders, received) = channel();
        let (completed, completions) = channel();
        let shared = Arc::new(Shared::new(host, Vec::new(), Vec::new(), config.lane as usize + 1, config.clock));
        let lane = Lane {
            shared: Arc::clone(&shared),
            orders: received,
            completions: completed,
            pool: Some(pool(threads, 0..threads)?),
            scratch: None,
            throttle: Throttle { own: None, shared: None },
            withhold: None,
        };
        let thread = std::thread::Builder::new()
            .name("host math".into())
            .spawn(move || lane.serve())
            .map_err(|e| Error::Device(format!("cannot start the thread of the host's arithmetic: {e}")))?;
        Ok(MathLane { shared, orders: Some(orders), completions, thread: Some(thread) })
    }

    /// Adds memory to the store; gives the offset where it begins.
    ///
    /// # Safety
    /// The memory is page-aligned, initialised, and outlives the lane.
    pub unsafe fn add(&self, store: *mut u8, bytes: u64) -> u64 {
        // SAFETY: the caller's promise.
        self.shared.host.add(unsafe { Block::borrowed(store, bytes) })
    }

    /// Queues a task that may start at once.
    pub fn send(&self, ticket: Ticket, task: Task) {
        let order = Order { ticket, task, after: Vec::new() };
        // A lane that failed has left: its task is never told done, and the executor has the failure already.
        let _ = self.orders.as_ref().expect("there until the lane is dropped").send(order);
    }

    /// A task that has ended, if one has.
    pub fn ended(&self) -> Option<Completion> {
        self.completions.try_recv().ok()
    }
}

impl Drop for MathLane {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the lane was reported as its task's failure.
            let _ = thread.join();
        }
    }
}
