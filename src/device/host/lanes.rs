//! Lanes of the host device: one thread each, which waits for a task's tickets, runs it, and says so.

use super::disk::Disk;
use super::execute::execute;
use super::gemm;
use super::memory::{Block, Store};
use super::operands::OpMemory;
use super::parallel::{most_scratch, reserve_scratch};
use crate::base::{Error, Result};
use crate::device::{Completion, Task, Ticket};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A task on its way to a lane.
pub(super) struct Order {
    pub ticket: Ticket,
    pub task: Task,
    pub after: Vec<Ticket>,
}

/// How long a lane that is being dropped may take to end the task that it runs.
const LAST_TASK: Duration = Duration::from_secs(5);

/// Waits for lanes that were told to stop, but not for ever: one whose task does not end, such as a read from a disk
/// that is gone, is left to itself. Otherwise nobody would hear the error that says so. False where one was left.
pub(super) fn wait_join(threads: &mut Vec<JoinHandle<()>>) -> bool {
    let began = Instant::now();
    while threads.iter().any(|thread| !thread.is_finished()) && began.elapsed() < LAST_TASK {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (ended, hang): (Vec<_>, Vec<_>) = threads.drain(..).partition(JoinHandle::is_finished);
    for thread in ended {
        // A lane's panics are caught and reported as its task's failure; nothing is left to say here.
        let _ = thread.join();
    }
    hang.is_empty()
}

/// What all lanes see.
pub(super) struct Shared {
    pub start: Instant,
    pub host: Store,
    pub disk: Option<Disk>,
    pub arenas: Vec<Block>,
    /// For each device, what the op that it runs has beside the arena.
    pub op_memory: Vec<Mutex<OpMemory>>,
    /// Highest touched byte of each arena, plus one.
    pub high_water: Vec<AtomicU64>,
    /// Tasks done, for each lane.
    done: Vec<AtomicU64>,
    /// Guards nothing but the wait itself.
    turn: Mutex<()>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Shared {
    pub fn new(
        host: Store,
        disk: Option<Disk>,
        arenas: Vec<Block>,
        op_memory: Vec<Mutex<OpMemory>>,
        lanes: usize,
        start: Instant,
    ) -> Self {
        Shared {
            disk,
            start,
            op_memory,
            high_water: arenas.iter().map(|_| AtomicU64::new(0)).collect(),
            host,
            arenas,
            done: (0..lanes).map(|_| AtomicU64::new(0)).collect(),
            turn: Mutex::new(()),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        }
    }

    /// The disk tier.
    ///
    /// # Errors
    /// When there is none.
    pub fn disk(&self) -> Result<&Disk> {
        self.disk.as_ref().ok_or_else(|| Error::Device("these devices have no disk tier".into()))
    }

    fn is_done(&self, ticket: Ticket) -> bool {
        self.done[ticket.lane as usize].load(Ordering::Acquire) >= ticket.number
    }

    /// Waits for every ticket; false when the device is being dropped.
    fn wait_for(&self, after: &[Ticket]) -> bool {
        let ready = || after.iter().all(|&t| self.is_done(t));
        if ready() {
            return !self.stop.load(Ordering::Acquire);
        }
        let mut turn = self.turn.lock().expect("no thread panics while it holds the turn");
        while !ready() {
            if self.stop.load(Ordering::Acquire) {
                return false;
            }
            turn = self.changed.wait(turn).expect("no thread panics while it holds the turn");
        }
        !self.stop.load(Ordering::Acquire)
    }

    fn mark_done(&self, ticket: Ticket) {
        let _turn = self.turn.lock().expect("no thread panics while it holds the turn");
        self.done[ticket.lane as usize].store(ticket.number, Ordering::Release);
        self.changed.notify_all();
    }

    /// Ends every wait; lanes finish the task they are at and leave.
    pub fn stop(&self) {
        let _turn = self.turn.lock().expect("no thread panics while it holds the turn");
        self.stop.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

/// A bandwidth: a copy ends no sooner than its bytes would take after the one before.
#[derive(Debug)]
pub(super) struct Link {
    bytes_per_sec: f64,
    free_at: Option<Instant>,
}

impl Link {
    pub fn new(bytes_per_sec: f64) -> Link {
        Link { bytes_per_sec, free_at: None }
    }

    /// When `bytes`, whose copy began at `began`, will have crossed.
    fn cross(&mut self, began: Instant, bytes: u64) -> Instant {
        // A sleep overshoots by some tens of microseconds. A copy that begins within them follows the one before at
        // once, or the link would be slower than stated; spinning instead would take the time from the arithmetic,
        // which has the same cores.
        const OVERSHOOT: Duration = Duration::from_micros(200);
        let from = self.free_at.filter(|&free| free + OVERSHOOT >= began).unwrap_or(began);
        // The slowest of links takes years, not for ever.
        let until = from + Duration::from_secs_f64((bytes as f64 / self.bytes_per_sec).min(1e9));
        self.free_at = Some(until);
        until
    }
}

/// Holds a copy lane to its link's bandwidth, and to what it shares with others.
#[derive(Debug)]
pub(super) struct Throttle {
    pub own: Option<Link>,
    pub shared: Option<Arc<Mutex<Link>>>,
}

impl Throttle {
    /// Waits until `bytes`, whose copy began at `began`, would have crossed the link, or the device is being dropped.
    fn wait_for_link(&mut self, began: Instant, bytes: u64, stop: &AtomicBool) {
        // A slow link's copy may take minutes, which a drop need not wait for.
        const SLICE: Duration = Duration::from_millis(50);
        let own = self.own.as_mut().map(|link| link.cross(began, bytes));
        let shared = self
            .shared
            .as_ref()
            .map(|link| link.lock().expect("no thread panics while it holds a link").cross(began, bytes));
        let Some(until) = own.max(shared) else { return };
        while let Some(rest) = until.checked_duration_since(Instant::now()).filter(|r| !r.is_zero()) {
            if stop.load(Ordering::Acquire) {
                return;
            }
            std::thread::sleep(rest.min(SLICE));
        }
    }
}

/// What a lane's thread owns.
pub(super) struct Lane {
    pub shared: Arc<Shared>,
    pub orders: Receiver<Order>,
    pub completions: Sender<Completion>,
    /// Threads for arithmetic; lanes of copies have none.
    pub pool: Option<Arc<rayon::ThreadPool>>,
    /// Scratch that every thread of the pool has been given, in words.
    pub scratch: Option<usize>,
    pub throttle: Throttle,
    /// A task's number whose completion is never told: for tests of the watchdog.
    pub withhold: Option<u64>,
}

impl Lane {
    /// Serves orders until the device is dropped.
    pub fn serve(mut self) {
        while let Ok(Order { ticket, task, after }) = self.orders.recv() {
            if !self.shared.wait_for(&after) {
                return;
            }
            let began = Instant::now();
            let (result, not_finite_layer) = match self.run(&task) {
                Ok(layer) => (Ok(()), layer),
                Err(error) => (Err(error), None),
            };
            self.share_scratch();
            if let Task::Copy(_) = &task {
                self.throttle.wait_for_link(began, task.bytes(), &self.shared.stop);
            }
            let secs = |t: Instant| t.duration_since(self.shared.start).as_secs_f64();
            let failed = result.is_err();
            let completion = Completion {
                ticket,
                start_secs: secs(began),
                end_secs: secs(Instant::now()),
                result,
                not_finite_layer,
            };
            if self.withhold == Some(ticket.number) {
                return;
            }
            // A failed task stays undone, so that nothing which builds on it runs.
            if !failed {
                self.shared.mark_done(ticket);
            }
            if self.completions.send(completion).is_err() || failed {
                return;
            }
        }
    }

    /// Gives all threads of the pool as much scratch as one of them has needed, in the first step and then never again,
    /// and what products need.
    fn share_scratch(&mut self) {
        let most = most_scratch();
        if let Some(pool) = self.pool.as_ref().filter(|_| self.scratch.is_none_or(|scratch| most > scratch)) {
            pool.broadcast(|_| {
                reserve_scratch(most);
                gemm::reserve();
            });
            self.scratch = Some(most);
        }
    }

    fn run(&self, task: &Task) -> Result<Option<usize>> {
        let shared: &Shared = &self.shared;
        let body = || match &self.pool {
            Some(pool) => pool.install(|| execute(task, shared)),
            None => execute(task, shared),
        };
        catch_unwind(AssertUnwindSafe(body))
            .unwrap_or_else(|panic| Err(Error::Device(format!("a task panicked: {}", words_of(panic.as_ref())))))
    }
}

/// What a panic has said.
pub(super) fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|words| words.to_string());
    panic.downcast_ref::<String>().cloned().or(text).unwrap_or_else(|| "no message".into())
}
