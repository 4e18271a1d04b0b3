//! The simulated device: no computation, only a cost model and a virtual clock.
//!
//! A task's start is the latest of: its lane's last end, the ends of what it waits for, and the moment it was
//! submitted. All of these are known at submission, since tickets only point to earlier tasks, so a lane is one number
//! and the clock is a heap. Where a device's lanes share its cores, a copy or an update that overlaps units is delayed
//! by its share of the cores' time, and so is the end of the next unit.

mod cost_model;
mod profiles;

pub use cost_model::{Cores, CostModel, DISK_BYTES_PER_SEC, Rate};
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
    /// End times of each lane's tasks.
    ends: Vec<Lane>,
    /// Seconds of each device's cores that its other lanes took while units were queued and by which no unit has been
    /// delayed yet.
    taken: Vec<f64>,
    /// Seconds of programs that have run, by device and address; a program lives as long as its plan.
    programs: HashMap<(u16, usize), f64>,
    /// One past the last byte that was added to host memory.
    host_end: u64,
    /// The bandwidth that all links share each way, and when the copies requested so far will have crossed.
    shared: Option<SharedLink>,
    /// Bytes per second of the disk tier, each way.
    disk_bytes_per_sec: f64,
    /// One past the last byte that was added to the disk tier.
    disk_end: u64,
    /// Completions to come; equal times are ordered by device, lane and task.
    coming: BinaryHeap<Reverse<(Secs, LaneId, Ticket, Secs)>>,
}

/// A link shared behind the devices' own links. It carries copies in the order in which they are requested, whatever
/// the order on a device's own link.
#[derive(Clone, Copy, Debug)]
struct SharedLink {
    bytes_per_sec: f64,
    /// When the last copy will have crossed: to devices, and from them.
    crossed: [f64; 2],
}

/// End times of a lane's tasks. Old ones are dropped once reported: a ticket below them is already done.
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
    /// Makes one device for each cost model in `models`.
    pub fn new(models: Vec<CostModel>) -> SimDevice {
        let mut lanes = Vec::new();
        for device in 0..models.len() as u16 {
            for kind in [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost] {
                lanes.push(LaneId { device, kind });
            }
        }
        // Devices with cores of their own do the host's arithmetic there, as in `host::HostDevice`.
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
            disk_bytes_per_sec: 0.0,
            disk_end: 0,
            shared: None,
            coming: BinaryHeap::new(),
        }
    }

    /// The same devices with links that share `bytes_per_sec` each way.
    pub fn with_shared_link(mut self, bytes_per_sec: Option<f64>) -> SimDevice {
        self.shared = bytes_per_sec.map(|bytes_per_sec| SharedLink { bytes_per_sec, crossed: [0.0; 2] });
        self
    }

    /// The same devices with a disk tier of `bytes_per_sec` each way.
    pub fn with_disk(mut self, bytes_per_sec: Option<f64>) -> SimDevice {
        if let Some(bytes_per_sec) = bytes_per_sec {
            let lanes = [LaneKind::DiskRead, LaneKind::DiskWrite].map(LaneId::host);
            self.lanes.extend(lanes);
            self.ends.extend(lanes.map(|_| Lane::default()));
            self.disk_bytes_per_sec = bytes_per_sec;
        }
        self
    }
}

impl Device for SimDevice {
    fn lanes(&self) -> &[LaneId] {
        &self.lanes
    }

    unsafe fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        let id = self.lanes[lane as usize];
        let owner = if id.is_host() { 0 } else { usize::from(id.device) };
        let model = &self.models[owner];
        let waited = after.iter().map(|t| self.ends[t.lane as usize].end_of(t.number)).fold(self.now, f64::max);
        // Lanes come device by device, the one for units first.
        let on_disk = matches!(id.kind, LaneKind::DiskRead | LaneKind::DiskWrite);
        let units_until = self.ends[3 * owner].last_end;
        let on = &mut self.ends[lane as usize];
        let start = waited.max(on.last_end);
        let secs = match &task {
            Task::Run(run) => {
                let key = (id.device, std::sync::Arc::as_ptr(&run.program) as usize);
                *self.programs.entry(key).or_insert_with(|| model.task_secs(&task, id.kind))
            }
            _ if on_disk => model.copy_secs + task.bytes() as f64 / self.disk_bytes_per_sec + model.hand_over_secs,
            _ => model.task_secs(&task, id.kind),
        };
        let mut end = start + secs;
        if id.kind == LaneKind::Compute {
            end += std::mem::take(&mut self.taken[owner]);
        } else if model.cores.is_some() && !on_disk {
            // While both run, each progresses at half speed.
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
        // Tasks submitted from now on cannot be delayed by tasks that have ended, so these ends can be dropped: 0
        // stands for "past".
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
        // There is no memory behind these offsets: they only need to be distinct from those of the first models, whose
        // store's size is not known here.
        let base = self.host_end.max(1 << 60);
        self.host_end = base + bytes.next_multiple_of(4096);
        Ok(base)
    }

    fn grow_disk(&mut self, bytes: u64) -> Result<u64> {
        let base = self.disk_end.max(1 << 60);
        self.disk_end = base + bytes;
        Ok(base)
    }

    unsafe fn write_host(&mut self, _offset: u64, _bytes: &[u8]) {}

    unsafe fn read_host(&self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn write_disk(&mut self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read_disk(&self, _offset: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn high_water_bytes(&self, _device: u16) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Attached, CopySpan, Memory, Norm, Span};

    fn copy(bytes: u64) -> Task {
        let span = |memory| Span { memory, offset: 0, bytes };
        Task::Copy(vec![CopySpan { from: span(Memory::Host), to: span(Memory::Device(0)) }])
    }

    /// A task of arithmetic with so many bytes of traffic.
    fn work(bytes: u64) -> Task {
        let span = Span { memory: Memory::Device(0), offset: 0, bytes };
        Task::Norm(Box::new(Norm { gradient: span, segments: Vec::new().into(), table: span, scratch: None }))
    }

    /// Ends of tasks, each on its lane, submitted at once.
    fn ends(cost: &CostModel, tasks: Vec<(u16, Task)>) -> Vec<f64> {
        let mut device = Attached::new(Box::new(SimDevice::new(vec![cost.clone()])));
        let tickets: Vec<Ticket> = tasks.into_iter().map(|(lane, task)| device.submit(lane, task, &[])).collect();
        let mut ends = vec![0.0; tickets.len()];
        for _ in 0..tickets.len() {
            let done = device.next_completion(0.0).unwrap();
            ends[tickets.iter().position(|&t| t == done.ticket).unwrap()] = done.end_secs;
        }
        ends
    }

    /// Updates of 8, copies of 4 bytes per second, which take 1/16 second of one core a byte.
    fn device(count: Option<usize>) -> CostModel {
        let mut cost = CostModel::stated(1.0, 8.0, 4.0);
        cost.host_update_bytes_per_sec = 8.0;
        cost.cores = count.map(|count| Cores { count, copy_bytes_per_sec: 16.0 });
        cost
    }

    #[test]
    fn lanes_on_one_core_take_its_time_from_units() {
        let tasks = || vec![(0, work(8)), (1, copy(4)), (3, work(2)), (0, work(8))];
        assert_eq!(ends(&device(None), tasks()), [1.0, 1.0, 0.25, 2.0]);
        // The copy takes 1/4 second of the core and the host's arithmetic 1/4; both last so much longer, and the second
        // unit ends 1/2 later.
        assert_eq!(ends(&device(Some(1)), tasks()), [1.0, 1.25, 0.5, 2.5]);
        // Of two cores a copy takes one.
        assert_eq!(ends(&device(Some(2)), tasks()), [1.0, 1.125, 0.5, 2.375]);
    }

    #[test]
    fn where_no_unit_is_queued_nothing_is_taken() {
        let tasks = vec![(1, copy(4)), (3, work(2)), (0, work(8)), (0, work(8))];
        assert_eq!(ends(&device(Some(1)), tasks), [1.0, 0.25, 1.0, 2.0]);
        // Only what meets the unit counts: 1/8 second of the four that a long update takes.
        let tasks = vec![(0, work(1)), (3, work(32)), (0, work(8))];
        assert_eq!(ends(&device(Some(1)), tasks), [0.125, 4.125, 1.25]);
    }

    #[test]
    fn devices_with_cores_of_their_own_do_the_hosts_arithmetic_there() {
        let math = |cores: [Option<usize>; 2]| {
            let device = SimDevice::new(cores.map(device).to_vec());
            device.lanes().iter().filter(|l| l.kind == LaneKind::HostMath).map(|l| l.device).collect::<Vec<_>>()
        };
        assert_eq!(math([Some(1), Some(2)]), [0, 1]);
        assert_eq!(math([Some(1), None]), [LaneId::HOST]);
        assert_eq!(SimDevice::new(vec![device(Some(2))]).lanes()[3], LaneId::host(LaneKind::HostMath));
    }
}
