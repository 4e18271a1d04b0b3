//! The simulated device: no arithmetic, a cost model and a virtual clock.
//!
//! A task's start is the latest of: its lane's last end, the ends of what it waits for, and the moment it was submitted. All of them are
//! known at submission, since tickets only point back, so a lane is one number and the clock is a heap. Where a device's lanes share its
//! cores, a copy or an update that meets units takes twice its share of the cores' time, and what it took the next unit ends later.

mod cost_model;
mod profiles;

pub use cost_model::{Cores, CostModel, Rate};
pub use profiles::{PROFILES, Profile};

use super::{Completion, Device, Task, Ticket};
use crate::base::{LaneId, LaneKind, Result};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Seconds, ordered totally.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Secs(f64);

impl Eq for Secs {}

impl PartialOrd for Secs {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Secs {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Simulated devices on one virtual clock.
pub struct SimDevice {
    lanes: Vec<LaneId>,
    models: Vec<CostModel>,
    now: f64,
    /// Ends of each lane's tasks, from the first.
    ends: Vec<Lane>,
    /// Seconds of each device's cores that its other lanes took while units were queued, and that no unit has paid for yet.
    taken: Vec<f64>,
    /// Seconds of programs that have run, by device and address; a program lives as long as the plan that it is of.
    programs: HashMap<(u16, usize), f64>,
    /// One past the last byte that was added to host memory.
    host_end: u64,
    /// What all links share each way, and when what was asked for until now will have crossed.
    shared: Option<SharedLink>,
    /// Completions to come: equal times are ordered by device, lane and task.
    coming: BinaryHeap<Reverse<(Secs, LaneId, Ticket, Secs)>>,
}

/// A link behind the devices' own. It carries what is asked of it in that order; who is first on a device's own link does not matter to it.
#[derive(Clone, Copy, Debug)]
struct SharedLink {
    bytes_per_sec: f64,
    /// To devices, and from them.
    crossed: [f64; 2],
}

/// Ends of a lane's tasks. Old ones are forgotten once told: a ticket below them is long done.
#[derive(Debug, Default)]
struct Lane {
    forgotten: u64,
    ends: std::collections::VecDeque<f64>,
    last_end: f64,
}

impl Lane {
    fn end_of(&self, number: u64) -> f64 {
        number.checked_sub(self.forgotten + 1).map_or(0.0, |i| self.ends[i as usize])
    }
}

impl SimDevice {
    /// Devices that cost what `models` say, one for each.
    pub fn new(models: Vec<CostModel>) -> SimDevice {
        let mut lanes = Vec::new();
        for device in 0..models.len() as u16 {
            for kind in [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost] {
                lanes.push(LaneId { device, kind });
            }
        }
        // Devices with cores of their own do the host's arithmetic there, as `host::HostDevice` has it.
        if models.len() > 1 && models.iter().all(|m| m.cores.is_some()) {
            lanes.extend((0..models.len() as u16).map(|d| LaneId::device(d, LaneKind::HostMath)));
        } else {
            lanes.push(LaneId::host(LaneKind::HostMath));
        }
        let ends = lanes.iter().map(|_| Lane::default()).collect();
        SimDevice {
            lanes,
            taken: vec![0.0; models.len()],
            models,
            now: 0.0,
            ends,
            programs: HashMap::new(),
            host_end: 0,
            shared: None,
            coming: BinaryHeap::new(),
        }
    }

    /// The same devices with links that share so many bytes per second each way.
    pub fn with_shared_link(mut self, bytes_per_sec: Option<f64>) -> SimDevice {
        self.shared = bytes_per_sec.map(|bytes_per_sec| SharedLink { bytes_per_sec, crossed: [0.0; 2] });
        self
    }
}

impl Device for SimDevice {
    fn lanes(&self) -> &[LaneId] {
        &self.lanes
    }

    fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        let id = self.lanes[lane as usize];
        let owner = if id.is_host() { 0 } else { usize::from(id.device) };
        let model = &self.models[owner];
        let waited = after.iter().map(|t| self.ends[t.lane as usize].end_of(t.number)).fold(self.now, f64::max);
        // Lanes come device by device, the one for units first.
        let units_until = self.ends[3 * owner].last_end;
        let on = &mut self.ends[lane as usize];
        let start = waited.max(on.last_end);
        let secs = match &task {
            Task::Run(run) => {
                let key = (id.device, std::sync::Arc::as_ptr(&run.program) as usize);
                *self.programs.entry(key).or_insert_with(|| model.task_secs(&task, id.kind))
            }
            _ => model.task_secs(&task, id.kind),
        };
        let mut end = start + secs;
        if id.kind == LaneKind::Compute {
            end += std::mem::take(&mut self.taken[owner]);
        } else if model.cores.is_some() {
            // Both get on half as fast for as long as both are there.
            let met = model.core_secs(&task, id.kind).min((units_until - start).max(0.0));
            self.taken[owner] += met;
            end += met;
        }
        if let (Some(shared), Task::Copy(_), LaneKind::HostToDevice | LaneKind::DeviceToHost) =
            (&mut self.shared, &task, id.kind)
        {
            let crossed = &mut shared.crossed[usize::from(id.kind == LaneKind::DeviceToHost)];
            *crossed = crossed.max(self.now) + task.bytes() as f64 / shared.bytes_per_sec;
            end = end.max(*crossed);
        }
        on.ends.push_back(end);
        on.last_end = end;
        let ticket = Ticket { lane, number: on.forgotten + on.ends.len() as u64 };
        self.coming.push(Reverse((Secs(end), id, ticket, Secs(start))));
        ticket
    }

    fn next_completion(&mut self, _patience_secs: f64) -> Option<Completion> {
        let Reverse((Secs(end_secs), _, ticket, Secs(start_secs))) = self.coming.pop()?;
        self.now = end_secs;
        let lane = &mut self.ends[ticket.lane as usize];
        // Nobody who is submitted from now on can be held up by what has ended, so its end may be forgotten: 0 stands for "past".
        while lane.ends.front().is_some_and(|&e| e <= self.now) && lane.forgotten < ticket.number {
            lane.ends.pop_front();
            lane.forgotten += 1;
        }
        Some(Completion { ticket, start_secs, end_secs, result: Ok(()), not_finite_layer: None })
    }

    fn now_secs(&self) -> f64 {
        self.now
    }

    fn computes(&self) -> bool {
        false
    }

    fn grow_host(&mut self, bytes: u64) -> Result<u64> {
        // Nothing lies there: offsets need only be apart from those of the first models, whose store nobody measured.
        let base = self.host_end.max(1 << 60);
        self.host_end = base + bytes.next_multiple_of(4096);
        Ok(base)
    }

    fn write_host(&mut self, _offset: u64, _bytes: &[u8]) {}

    fn read_host(&self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn high_water_bytes(&self, _device: u16) -> u64 {
        0
    }
}
