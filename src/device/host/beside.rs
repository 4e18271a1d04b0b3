//! The host's lanes beside a GPU, over memory that is the GPU's driver's: arithmetic, and the disk tier's reads and
//! writes. A thread for each.

use super::device::{DISK_LANES, pool};
use super::disk::Disk;
use super::lanes::{Lane, Link, Order, Shared, Throttle, wait_join};
use super::memory::{Block, Store};
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::{Completion, DiskSpec, Task, Ticket};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

/// What [`HostLanes`] are made of.
pub(in crate::device) struct HostLanesConfig {
    /// The first one's number among the device's lanes.
    pub first: u16,
    /// Cores for the arithmetic; `None` is all.
    pub threads: Option<usize>,
    /// The disk tier.
    pub disk: Option<DiskSpec>,
    /// From when their seconds count.
    pub clock: Instant,
}

/// Threads that run tasks on host memory: arithmetic first, with a pool behind it; where there is a disk tier, its two
/// lanes.
pub(in crate::device) struct HostLanes {
    names: Vec<LaneId>,
    shared: Arc<Shared>,
    orders: Vec<Sender<Order>>,
    completions: Receiver<Completion>,
    threads: Vec<JoinHandle<()>>,
}

impl HostLanes {
    /// Starts the threads, over `bytes` of host memory at `store`.
    ///
    /// # Safety
    /// The memory is page-aligned, initialised, and outlives the lanes: until [`HostLanes::wait_stop`] says so, or for
    /// ever.
    ///
    /// # Errors
    /// When a thread cannot be started, or there is no room for the disk tier.
    pub unsafe fn new(config: &HostLanesConfig, store: *mut u8, bytes: u64) -> Result<HostLanes> {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        // One core feeds the GPUs.
        let threads = config.threads.unwrap_or(all - 1).clamp(1, all);
        // SAFETY: the caller's promise.
        let host = Store::new(unsafe { Block::borrowed(store, bytes) });
        let mut names = vec![LaneId::host(LaneKind::HostMath)];
        if config.disk.is_some() {
            names.extend(DISK_LANES);
        }
        let disk = config.disk.as_ref().map(Disk::new).transpose()?;
        let (completed, completions) = channel();
        let lanes = usize::from(config.first) + names.len();
        let shared = Arc::new(Shared::new(host, disk, Vec::new(), Vec::new(), lanes, config.clock));
        let mut lanes = HostLanes { names, shared, orders: Vec::new(), completions, threads: Vec::new() };
        for &name in &lanes.names {
            let computes = name.kind == LaneKind::HostMath;
            let rate = config.disk.as_ref().and_then(|d| d.bytes_per_sec).filter(|_| !computes);
            let (orders, received) = channel();
            let lane = Lane {
                shared: Arc::clone(&lanes.shared),
                orders: received,
                completions: completed.clone(),
                pool: if computes { Some(pool(threads, None, &Arc::default())?) } else { None },
                scratch: None,
                throttle: Throttle { own: rate.map(Link::new), shared: None },
                withhold: None,
            };
            let thread = std::thread::Builder::new()
                .name(name.to_string())
                .spawn(move || lane.serve())
                .map_err(|e| Error::Device(format!("cannot start the thread of {name}: {e}")))?;
            lanes.orders.push(orders);
            lanes.threads.push(thread);
        }
        Ok(lanes)
    }

    /// What they are called.
    pub fn names(&self) -> &[LaneId] {
        &self.names
    }

    /// The disk tier.
    ///
    /// # Errors
    /// When there is none.
    pub fn disk(&self) -> Result<&Disk> {
        self.shared.disk()
    }

    /// Adds memory to the store; gives the offset where it begins.
    ///
    /// # Safety
    /// The memory is page-aligned, initialised, and outlives the lanes.
    pub unsafe fn add(&self, store: *mut u8, bytes: u64) -> u64 {
        // SAFETY: the caller's promise.
        self.shared.host.add(unsafe { Block::borrowed(store, bytes) })
    }

    /// Queues a task that may start at once on the lane of that place among the names.
    pub fn send(&self, lane: usize, ticket: Ticket, task: Task) {
        let order = Order { ticket, task, after: Vec::new() };
        // A lane that failed has left: its task is never told done, and the executor has the failure already.
        let _ = self.orders[lane].send(order);
    }

    /// A task that has ended, if one has.
    pub fn ended(&self) -> Option<Completion> {
        self.completions.try_recv().ok()
    }
}

impl HostLanes {
    /// Waits until the threads have ended, but not for ever: false where one was left with a task that does not end.
    /// Then the memory must stay.
    pub fn wait_stop(&mut self) -> bool {
        self.shared.stop();
        self.orders.clear();
        wait_join(&mut self.threads)
    }
}

impl Drop for HostLanes {
    fn drop(&mut self) {
        self.wait_stop();
    }
}
