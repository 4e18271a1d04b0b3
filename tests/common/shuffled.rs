//! A device that brings everything about in another order: tasks reach the lanes late, completions are told late, both
//! at random.
//!
//! What a device promises is kept: a lane runs its tasks in the order they were submitted and tells of them in that
//! order, and no task reaches a lane before those that it waits for. Across lanes nothing is promised, and nothing of
//! it is left as it was.

use hydra::base::LaneId;
use hydra::base::philox::Sequence;
use hydra::device::host::HostDevice;
use hydra::device::{Completion, Device, Task, Ticket};
use std::collections::VecDeque;
use std::time::Duration;

/// A host device behind a shuffler.
pub struct Shuffled {
    inner: HostDevice,
    random: Sequence,
    /// Tasks given out, and of these handed to `inner`, for each lane.
    given: Vec<u64>,
    handed: Vec<u64>,
    held: Vec<VecDeque<(Task, Vec<Ticket>)>>,
    /// Completions not told yet, for each lane.
    ended: Vec<VecDeque<Completion>>,
    /// Looks in a row at which nothing had ended, that a norm waits for before it reaches its lane.
    norms_wait: u32,
    quiet: u32,
}

impl Shuffled {
    pub fn new(inner: HostDevice, seed: u64) -> Shuffled {
        let lanes = inner.lanes().len();
        Shuffled {
            inner,
            random: Sequence::new(seed, 0),
            given: vec![0; lanes],
            handed: vec![0; lanes],
            held: (0..lanes).map(|_| VecDeque::new()).collect(),
            ended: (0..lanes).map(|_| VecDeque::new()).collect(),
            norms_wait: 0,
            quiet: 0,
        }
    }

    /// Norms come when all else stands still.
    pub fn with_late_norms(self) -> Shuffled {
        Shuffled { norms_wait: 1000, ..self }
    }

    /// Lanes in a random order.
    fn lanes_shuffled(&mut self) -> Vec<usize> {
        let mut lanes: Vec<usize> = (0..self.held.len()).collect();
        for i in (1..lanes.len()).rev() {
            lanes.swap(i, self.random.below(i as u64 + 1) as usize);
        }
        lanes
    }

    /// Hands at most one task on; whether it did.
    fn hand_one(&mut self) -> bool {
        for lane in self.lanes_shuffled() {
            let Some((task, after)) = self.held[lane].front() else { continue };
            if matches!(task, Task::Norm(_)) && self.quiet < self.norms_wait {
                continue;
            }
            if after.iter().all(|t| self.handed[t.lane as usize] >= t.number) {
                let (task, after) = self.held[lane].pop_front().expect("looked at just above");
                self.handed[lane] += 1;
                // SAFETY: its tickets name the same tasks there, since lanes keep their order; what it waits for has
                // been handed on.
                let ticket = unsafe { self.inner.submit(lane as u16, task, &after) };
                assert_eq!(ticket.number, self.handed[lane]);
                return true;
            }
        }
        false
    }

    fn take_completion(&mut self, secs: f64) {
        self.quiet += 1;
        if let Some(completion) = self.inner.next_completion(secs) {
            self.quiet = 0;
            self.ended[completion.ticket.lane as usize].push_back(completion);
        }
    }
}

impl Device for Shuffled {
    fn lanes(&self) -> &[LaneId] {
        self.inner.lanes()
    }

    unsafe fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        self.given[lane as usize] += 1;
        self.held[lane as usize].push_back((task, after.to_vec()));
        while self.random.below(3) == 0 && self.hand_one() {}
        Ticket { lane, number: self.given[lane as usize] }
    }

    fn next_completion(&mut self, patience_secs: f64) -> Option<Completion> {
        let until = std::time::Instant::now() + Duration::from_secs_f64(patience_secs);
        while std::time::Instant::now() < until {
            while self.random.below(2) == 0 && self.hand_one() {}
            match self.random.below(4) {
                0 => std::thread::sleep(Duration::from_micros(self.random.below(200))),
                _ => self.take_completion(20e-6),
            }
            let told = self.lanes_shuffled().into_iter().find(|&lane| !self.ended[lane].is_empty());
            let all_handed = self.held.iter().all(VecDeque::is_empty);
            if let Some(lane) = told
                && (all_handed || self.random.below(2) == 0)
            {
                return self.ended[lane].pop_front();
            }
        }
        None
    }

    fn now_secs(&self) -> f64 {
        self.inner.now_secs()
    }

    fn computes(&self) -> bool {
        true
    }

    fn grow_host(&mut self, bytes: u64) -> hydra::base::Result<u64> {
        self.inner.grow_host(bytes)
    }

    fn grow_disk(&mut self, bytes: u64) -> hydra::base::Result<u64> {
        self.inner.grow_disk(bytes)
    }

    unsafe fn write_host(&mut self, offset: u64, bytes: &[u8]) {
        // SAFETY: as the caller promises.
        unsafe { self.inner.write_host(offset, bytes) };
    }

    unsafe fn read_host(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: as the caller promises.
        unsafe { self.inner.read_host(offset, bytes) };
    }

    fn write_disk(&mut self, offset: u64, bytes: &[u8]) -> hydra::base::Result<()> {
        self.inner.write_disk(offset, bytes)
    }

    fn read_disk(&self, offset: u64, bytes: &mut [u8]) -> hydra::base::Result<()> {
        self.inner.read_disk(offset, bytes)
    }

    fn high_water_bytes(&self, device: u16) -> u64 {
        self.inner.high_water_bytes(device)
    }
}
