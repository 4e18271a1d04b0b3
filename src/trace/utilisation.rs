//! Where the time went: what bound each second of a step, and how close each lane came to its ceiling.
//!
//! A second in which a compute lane works is bound by compute. When the lane stalls, its next task was waiting, and
//! that task's event says for which task. The waited-for task's time is charged to the kind of its lane; if that task
//! had waited too, the walk continues along the chain until the gap is filled. Time in which no such task ran is idle:
//! latency, or nothing to do.

use super::Event;
use crate::base::{LaneId, LaneKind};

/// Seconds of a window by what bound them; they sum to the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Bound {
    /// A compute lane worked.
    pub compute: f64,
    /// The compute lane waited for a copy to the device.
    pub h2d: f64,
    /// The compute lane waited for a copy from the device.
    pub d2h: f64,
    /// The compute lane waited for arithmetic on the host.
    pub host: f64,
    /// The compute lane waited for the disk, either way.
    pub disk: f64,
    /// Nothing that the compute lane waited for ran.
    pub idle: f64,
}

impl Bound {
    /// The parts' names, in the order of [`Bound::parts`].
    pub const NAMES: [&'static str; 6] = ["compute", "host to device", "device to host", "host math", "disk", "idle"];

    /// The parts as a list: compute, h2d, d2h, host, disk, idle.
    pub fn parts(&self) -> [f64; 6] {
        [self.compute, self.h2d, self.d2h, self.host, self.disk, self.idle]
    }

    /// Seconds of the window.
    pub fn total(&self) -> f64 {
        self.parts().iter().sum()
    }

    /// Adds `other`'s seconds, part by part.
    pub fn add(&mut self, other: &Bound) {
        self.compute += other.compute;
        self.h2d += other.h2d;
        self.d2h += other.d2h;
        self.host += other.host;
        self.disk += other.disk;
        self.idle += other.idle;
    }

    /// The mean, where `self` is a sum over `count` windows.
    pub fn mean(self, count: f64) -> Bound {
        let [compute, h2d, d2h, host, disk, idle] = self.parts().map(|part| part / count);
        Bound { compute, h2d, d2h, host, disk, idle }
    }

    fn charge(&mut self, kind: LaneKind, secs: f64) {
        match kind {
            LaneKind::Compute => self.compute += secs,
            LaneKind::HostToDevice => self.h2d += secs,
            LaneKind::DeviceToHost => self.d2h += secs,
            LaneKind::HostMath => self.host += secs,
            LaneKind::DiskRead | LaneKind::DiskWrite => self.disk += secs,
        }
    }
}

/// A lane's totals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaneSum {
    /// The lane.
    pub lane: LaneId,
    /// Tasks that ran on it.
    pub tasks: u64,
    /// Seconds they ran.
    pub busy_secs: f64,
    /// Bytes they moved.
    pub bytes: u64,
    /// Floating-point operations they did.
    pub flops: f64,
}

impl LaneSum {
    /// Totals of a lane on which nothing has run.
    pub fn new(lane: LaneId) -> Self {
        LaneSum { lane, tasks: 0, busy_secs: 0.0, bytes: 0, flops: 0.0 }
    }

    /// Adds a task that ran on it.
    pub fn add(&mut self, event: &Event) {
        self.tasks += 1;
        self.busy_secs += event.secs();
        self.bytes += event.bytes;
        self.flops += if event.flops.is_finite() { event.flops } else { 0.0 };
    }

    /// Bytes per second while it worked; `None` where it moved none.
    pub fn bytes_per_sec(&self) -> Option<f64> {
        (self.bytes > 0 && self.busy_secs > 0.0).then(|| self.bytes as f64 / self.busy_secs)
    }

    /// Floating-point operations per second while it worked; `None` where it did none.
    pub fn flops_per_sec(&self) -> Option<f64> {
        (self.flops > 0.0 && self.busy_secs > 0.0).then(|| self.flops / self.busy_secs)
    }
}

/// What each kind of lane can do at best; `None` where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// Floating-point operations per second of a device.
    pub flops_per_sec: Option<f64>,
    /// Bytes per second to a device.
    pub h2d_bytes_per_sec: Option<f64>,
    /// Bytes per second from a device.
    pub d2h_bytes_per_sec: Option<f64>,
    /// Bytes per second that host arithmetic can read and write.
    pub host_bytes_per_sec: Option<f64>,
    /// Bytes per second from the disk.
    pub disk_read_bytes_per_sec: Option<f64>,
    /// Bytes per second to the disk.
    pub disk_write_bytes_per_sec: Option<f64>,
}

impl Ceilings {
    /// The ceiling of a kind of lane: flop/s for compute, bytes/s for the others.
    pub fn of(&self, kind: LaneKind) -> Option<f64> {
        match kind {
            LaneKind::Compute => self.flops_per_sec,
            LaneKind::HostToDevice => self.h2d_bytes_per_sec,
            LaneKind::DeviceToHost => self.d2h_bytes_per_sec,
            LaneKind::HostMath => self.host_bytes_per_sec,
            LaneKind::DiskRead => self.disk_read_bytes_per_sec,
            LaneKind::DiskWrite => self.disk_write_bytes_per_sec,
        }
        .filter(|&per_sec| per_sec > 0.0)
    }
}

/// Adds `event` to its lane's row; a new row is inserted in lane order.
pub(super) fn add_to_sums(sums: &mut Vec<LaneSum>, event: &Event) {
    let row = sums.binary_search_by_key(&event.lane, |sum| sum.lane).unwrap_or_else(|place| {
        sums.insert(place, LaneSum::new(event.lane));
        place
    });
    sums[row].add(event);
}

/// Computes what bound the window from `start_secs` to `end_secs`, given the events that overlap it, in any order.
///
/// Several devices count as one: while any of them works, the window is bound by compute. The parts sum to the window.
#[cfg(test)]
pub(super) fn where_time_went(events: &[Event], start_secs: f64, end_secs: f64) -> Bound {
    let lanes: Vec<LaneId> = events.iter().map(|event| event.lane).collect();
    let mut account = StepAccount::new(&lanes, events.len());
    events.iter().for_each(|event| account.add(event));
    account.finish_step(start_secs, end_secs)
}

/// Takes one model's events as its tasks complete and accounts for them step by step. It has no events of other models'
/// tasks, so time spent waiting for those counts as idle.
///
/// Its memory is reused, and as large as the largest step so far needed.
#[derive(Debug)]
pub struct StepAccount {
    /// Events of the open step; those with impossible times are left out.
    tasks: Vec<Task>,
    /// Sums of the open step and of the last finished one; both have the same lanes.
    open: Vec<LaneSum>,
    settled: Vec<LaneSum>,
    /// Indices of the devices' compute tasks by start; scratch space of `finish_step`.
    compute: Vec<u32>,
}

/// What attribution needs of an event.
#[derive(Clone, Copy, Debug)]
struct Task {
    ticket: u64,
    after: u64,
    start: f64,
    end: f64,
    lane: LaneId,
}

impl StepAccount {
    /// Makes an account for a run with these lanes, with room for `events_per_step` events.
    pub fn new(lanes: &[LaneId], events_per_step: usize) -> Self {
        let mut account = StepAccount {
            tasks: Vec::with_capacity(events_per_step),
            open: Vec::with_capacity(64),
            settled: Vec::with_capacity(64),
            compute: Vec::with_capacity(events_per_step),
        };
        account.open.extend(lanes.iter().map(|&lane| LaneSum::new(lane)));
        account.open.sort_unstable_by_key(|sum| sum.lane);
        account.open.dedup_by_key(|sum| sum.lane);
        account
    }

    /// Adds a finished task to the open step.
    pub fn add(&mut self, event: &Event) {
        add_to_sums(&mut self.open, event);
        if event.has_times() {
            let Event { lane, ticket, after, start_secs: start, end_secs: end, .. } = *event;
            self.tasks.push(Task { ticket, after, start, end, lane });
        }
    }

    /// Computes what bound the window from `start_secs` to `end_secs`, and opens the next step. Several devices count
    /// as one: while any of them works, the window is bound by compute. The parts sum to the window.
    ///
    /// Tasks that ended after the window are kept, since they extend into the next one.
    pub fn finish_step(&mut self, start_secs: f64, end_secs: f64) -> Bound {
        let mut bound = Bound::default();
        let window = end_secs - start_secs;
        if window > 0.0 && window.is_finite() {
            self.tasks.sort_unstable_by_key(|task| task.ticket);
            self.sort_compute();
            bound = self.window_bound(start_secs, end_secs);
        }
        self.settled.clear();
        self.settled.extend_from_slice(&self.open);
        self.discard(end_secs);
        bound
    }

    /// Drops tasks that ended by `end_secs` and belong to no step.
    pub fn discard(&mut self, end_secs: f64) {
        self.tasks.retain(|task| task.end > end_secs);
        for sum in &mut self.open {
            *sum = LaneSum::new(sum.lane);
        }
    }

    /// Sums of the last finished step, in lane order. A task counts entirely in the step in which it was added.
    pub fn sums(&self) -> &[LaneSum] {
        &self.settled
    }

    fn sort_compute(&mut self) {
        let tasks = &self.tasks;
        self.compute.clear();
        let of_devices = |&i: &u32| {
            let lane = tasks[i as usize].lane;
            lane.kind == LaneKind::Compute && !lane.is_host()
        };
        self.compute.extend((0..tasks.len() as u32).filter(of_devices));
        self.compute.sort_unstable_by(|&a, &b| {
            let (a, b) = (&tasks[a as usize], &tasks[b as usize]);
            a.start.total_cmp(&b.start).then(a.ticket.cmp(&b.ticket))
        });
    }

    fn window_bound(&self, start: f64, end: f64) -> Bound {
        let mut bound = Bound::default();
        let mut now = start;
        for &i in &self.compute {
            let task = self.tasks[i as usize];
            if now >= end {
                break;
            }
            if task.start > now {
                let until = task.start.min(end);
                self.charge_gap(&mut bound, task.after, now, until);
                now = until;
            }
            let until = task.end.min(end);
            if until > now {
                bound.compute += until - now;
                now = until;
            }
        }
        if now < end {
            // No compute task ends the last gap, so the task that finished last in the window is taken.
            let last = self
                .tasks
                .iter()
                .filter(|task| task.end <= end)
                .max_by(|a, b| a.end.total_cmp(&b.end).then(a.ticket.cmp(&b.ticket)));
            self.charge_gap(&mut bound, last.map_or(0, |task| task.ticket), now, end);
        }
        // Computed from the other parts, so that all sum to the window regardless of rounding above.
        bound.idle = (end - start - (bound.compute + bound.h2d + bound.d2h + bound.host + bound.disk)).max(0.0);
        bound
    }

    /// Charges the gap between `from` and `until` to the chain of tasks that begins with `ticket` and goes back in
    /// time.
    fn charge_gap(&self, bound: &mut Bound, mut ticket: u64, from: f64, until: f64) {
        let mut now = until;
        while ticket != 0 && now > from {
            let Ok(i) = self.tasks.binary_search_by_key(&ticket, |task| task.ticket) else { return };
            let task = &self.tasks[i];
            let (began, ended) = (task.start.max(from), task.end.min(now));
            if ended > began {
                bound.charge(task.lane.kind, ended - began);
            }
            now = now.min(began);
            // A task waits only for tasks submitted before it; an event that says otherwise would make the walk cycle.
            if task.after >= ticket {
                return;
            }
            ticket = task.after;
        }
    }
}

#[cfg(test)]
#[path = "utilisation_tests.rs"]
mod tests;
