//! Devices that were started together, timed together.
//!
//! Every device gets the same list of tasks, and each begins at another place of it, as devices of a job are not in step. What one network leaves in the
//! caches the next drives out, as where models take turns, so that all but small operands come from where a step's come from.
//! The first round is thrown away; of the others counts the mean, without what other programs have interrupted.

use super::networks;
use super::rates::{Network, Rates, run};
use crate::base::{DType, Error, LaneId, LaneKind, Result, Shape};
use crate::device::sim::CostModel;
use crate::device::{
    AdamwRule, CopySpan, Device, Memory, Norm, Segment, Span, Task, Ticket, Update, UpdateRule, norm_scratch_bytes,
};
use crate::graph::{AREAS, Area, Buffer, Cost, Family, Op, Program, Step};
use std::sync::Arc;
use std::time::Duration;

/// Rounds that are timed: as many as fit the networks' shares of the second, within these bounds.
const ROUNDS: std::ops::RangeInclusive<usize> = 3..=9;
/// A network's share.
const NETWORK_SECS: f64 = 0.07;
/// Times that a copy or an update on the host is timed.
const TIMES: usize = 5;
/// The large copy that is timed.
pub(super) const LARGE_COPY_BYTES: u64 = 16 << 20;
/// The small one: mostly what starting a copy costs.
const SMALL_COPY_BYTES: u64 = 4096;
/// Bytes of each pattern that devices are filled with: numbers, ids, zeros.
const PATTERN_BYTES: u64 = 4 << 20;
/// Room behind an update's four arrays for losses and a table of norms.
const TABLE_BYTES: u64 = 128;

/// Bytes of the state that an update of `elems` is timed with: weights, two moments, gradients; losses, norms and their partial sums.
pub(super) fn state_bytes(elems: u64) -> u64 {
    16 * elems + TABLE_BYTES + norm_scratch_bytes(&[segment(elems)])
}

/// Bytes of the host's store for so many devices: a state for each of its arithmetic lanes, patterns and sources of copies.
pub(super) fn host_bytes(devices: u64, elems: u64) -> u64 {
    devices * state_bytes(elems).max(LARGE_COPY_BYTES).max(3 * PATTERN_BYTES)
}

fn segment(elems: u64) -> Segment {
    Segment { offset: 0, elems, decay: true, index: 0 }
}

/// Devices that are measured.
pub(super) struct Bench<'a> {
    device: Box<dyn Device>,
    /// For each device the first that is like it: what they take is put together.
    alike: &'a [usize],
    update_elems: u64,
    wants_scratch: bool,
}

/// What one lane of one device did: seconds of each of its tasks, and when they ended.
type Times = Vec<(f64, f64)>;

impl<'a> Bench<'a> {
    pub fn new(device: Box<dyn Device>, alike: &'a [usize], update_elems: u64, wants_scratch: bool) -> Bench<'a> {
        let mut bench = Bench { device, alike, update_elems, wants_scratch };
        bench.write_patterns();
        bench
    }

    fn devices(&self) -> u16 {
        self.alike.len() as u16
    }

    /// Measures every device. `on_host`: all networks fit the arena together, and the host's arithmetic is the devices' own, on the same cores.
    pub fn measure(&mut self, networks: &[Network], on_host: bool) -> Result<Vec<CostModel>> {
        let starts = self.starts()?;
        let mut rates: Vec<Rates> = self.alike.iter().map(|_| Rates::default()).collect();
        // Norm and update come last.
        let groups: Vec<(&[Network], bool)> = match on_host {
            true => vec![(networks, true)],
            false => networks.chunks(1).map(|n| (n, false)).chain([(&[][..], true)]).collect(),
        };
        let mut settled = Vec::new();
        for (group, updates) in groups {
            let secs = self.walk(group, updates)?;
            for (d, secs) in secs.iter().enumerate() {
                let mut secs = &secs[..];
                for network in group {
                    let (own, rest) = secs.split_at(network.steps.len());
                    rates[d].add(network, own, starts[d].0 + starts[d].1);
                    secs = rest;
                }
                settled.extend(updates.then(|| (secs[0], secs[1])));
            }
        }
        let (h2d, d2h) = (self.copies(LaneKind::HostToDevice)?, self.copies(LaneKind::DeviceToHost)?);
        let host = if on_host { settled.clone() } else { self.host_math()? };
        let hand_over_secs = self.hand_over()?;
        let (update_bytes, norm_bytes) = (28.0 * self.update_elems as f64, 4.0 * self.update_elems as f64);
        let cost = |(d, rates): (usize, Rates)| {
            let (run_secs, op_secs) = starts[d];
            let rate = |bytes: f64, secs: f64| bytes / (secs - run_secs).max(1e-9);
            CostModel {
                memory_bytes_per_sec: rates.fastest_bytes_per_sec,
                rates: rates.all(),
                op_secs,
                run_secs,
                h2d_bytes_per_sec: h2d[d].1,
                d2h_bytes_per_sec: d2h[d].1,
                copy_secs: h2d[d].0,
                device_update_bytes_per_sec: rate(update_bytes, settled[d].1),
                host_update_bytes_per_sec: rate(update_bytes, host[d].1),
                device_norm_bytes_per_sec: Some(rate(norm_bytes, settled[d].0)),
                host_norm_bytes_per_sec: Some(rate(norm_bytes, host[d].0)),
                hand_over_secs: hand_over_secs[d],
                cores: None,
            }
        };
        Ok(rates.into_iter().enumerate().map(cost).collect())
    }

    /// The lane of `kind` that serves `device`, among [`Device::lanes`].
    fn lane(&self, device: u16, kind: LaneKind) -> u16 {
        let find = |id: LaneId| self.device.lanes().iter().position(|&l| l == id);
        let lane = find(LaneId::device(device, kind)).or_else(|| find(LaneId::host(kind)));
        lane.expect("a device has its three lanes, and itself or the host one for arithmetic") as u16
    }

    /// The lanes of `kind` of all devices, each once.
    fn lanes(&self, kind: LaneKind) -> Vec<u16> {
        let mut lanes: Vec<u16> = (0..self.devices()).map(|d| self.lane(d, kind)).collect();
        lanes.dedup();
        lanes
    }

    /// Runs `tasks` of each lane of `kind` on all of them at once and gives their times. Waits for `secs` before it looks: to wait for each
    /// completion would take the time of the cores that are measured.
    fn time(&mut self, kind: LaneKind, secs: f64, tasks: impl Fn(u16) -> Vec<Task>) -> Result<Vec<Times>> {
        let lanes = self.lanes(kind);
        let mut lists: Vec<_> = (0..lanes.len() as u16).map(|d| tasks(d).into_iter()).collect();
        let longest = lists.iter().map(|l| l.len()).max().unwrap_or(0);
        let mut times: Vec<Times> = lists.iter().map(|l| Vec::with_capacity(l.len())).collect();
        let mut left = 0;
        for _ in 0..longest {
            for (list, &lane) in lists.iter_mut().zip(&lanes) {
                if let Some(task) = list.next() {
                    self.device.submit(lane, task, &[]);
                    left += 1;
                }
            }
        }
        std::thread::sleep(Duration::from_secs_f64(secs));
        for _ in 0..left {
            let (ticket, start, end) = self.wait()?;
            let lane = lanes.iter().position(|&l| l == ticket.lane).expect("only these lanes have tasks");
            times[lane].push((end - start, end));
        }
        Ok(times)
    }

    /// Ticket, start and end of the next task that completes.
    fn wait(&mut self) -> Result<(Ticket, f64, f64)> {
        let done = self.device.next_completion(60.0);
        let done = done.ok_or_else(|| Error::Device("calibration: a small task did not end within a minute".into()))?;
        done.result?;
        Ok((done.ticket, done.start_secs, done.end_secs))
    }

    /// Writes what devices are filled with into the host's store: small numbers, ids, zeros.
    fn write_patterns(&mut self) {
        let numbers: Vec<f32> = (0..PATTERN_BYTES / 4).map(|i| (i * 7919 % 4099) as f32 / 4e4 - 0.05).collect();
        let ids: Vec<i32> =
            (0..PATTERN_BYTES as i64 / 4).map(|i| (i * 7919 % networks::CLASSES as i64) as i32).collect();
        self.device.write_host(0, bytemuck::cast_slice(&numbers));
        self.device.write_host(PATTERN_BYTES, bytemuck::cast_slice(&ids));
        self.device.write_host(2 * PATTERN_BYTES, &vec![0; PATTERN_BYTES as usize]);
    }

    /// A copy of pattern number `pattern` over all of `to`.
    fn fill(pattern: u64, to: Span) -> Vec<CopySpan> {
        (0..to.bytes.div_ceil(PATTERN_BYTES))
            .map(|i| {
                let at = i * PATTERN_BYTES;
                let bytes = PATTERN_BYTES.min(to.bytes - at);
                let from = Span { memory: Memory::Host, offset: pattern * PATTERN_BYTES, bytes };
                CopySpan { from, to: Span { offset: to.offset + at, bytes, ..to } }
            })
            .collect()
    }

    /// Seconds of each op of `networks`, which lie side by side, for each device; with `updates` of a norm and an update after them.
    fn walk(&mut self, networks: &[Network], updates: bool) -> Result<Vec<Vec<f64>>> {
        let mut starts = Vec::new();
        let mut end = 0;
        for network in networks {
            starts.push(end);
            end += network.arena_bytes;
        }
        let (mut fills, mut lists) = (Vec::new(), Vec::new());
        for d in 0..self.devices() {
            let span = |offset, bytes| Span { memory: Memory::Device(d), offset, bytes };
            let mut spans = Self::fill(0, span(0, end));
            let mut list = Vec::new();
            for (network, &start) in networks.iter().zip(&starts) {
                spans.extend(network.integers(d, start).flat_map(|to| Self::fill(1, to)));
                list.extend(network.tasks(d, start));
            }
            if updates {
                spans.extend(Self::fill(2, span(end, state_bytes(self.update_elems))));
                list.extend(self.settle(Memory::Device(d), end));
            }
            fills.push(vec![Task::Copy(spans)]);
            lists.push(list);
        }
        self.time(LaneKind::HostToDevice, 0.0, |d| fills[usize::from(d)].clone())?;
        self.rounds(&lists, NETWORK_SECS * networks.len().max(1) as f64)
    }

    /// Runs each device's list over and over on all compute lanes at once, for about `total_secs`; gives each task's usual time, of alike devices
    /// together.
    fn rounds(&mut self, lists: &[Vec<Task>], total_secs: f64) -> Result<Vec<Vec<f64>>> {
        let devices = lists.len();
        let len = lists[0].len();
        // The place of a list at which a device begins.
        let first = |d: usize| d * len / devices;
        let begin = self.device.now_secs();
        let times = |rounds: usize| {
            move |d: u16| {
                let list = &lists[usize::from(d)];
                (0..rounds * len).map(|i| list[(first(usize::from(d)) + i) % len].clone()).collect()
            }
        };
        self.time(LaneKind::Compute, 0.0, times(1))?;
        let round_secs = self.device.now_secs() - begin;
        let rounds = ((total_secs / round_secs) as usize).clamp(*ROUNDS.start(), *ROUNDS.end());
        let done = self.time(LaneKind::Compute, 0.8 * round_secs * rounds as f64, times(rounds))?;
        let of = |like: usize, task: usize| {
            let mut secs = Vec::new();
            for (d, done) in done.iter().enumerate().filter(|(d, _)| self.alike[*d] == like) {
                let place = (task + len - first(d)) % len;
                secs.extend(done[place..].iter().step_by(len).map(|t| t.0));
            }
            usual(secs)
        };
        Ok(self.alike.iter().map(|&like| (0..len).map(|task| of(like, task)).collect()).collect())
    }

    /// The usual one of each device's times, of alike devices together; of lanes that all share, the same for each.
    fn usual(&self, times: &[Times], each: impl Fn(&Times) -> Vec<f64>) -> Vec<f64> {
        let all: Vec<Vec<f64>> = times.iter().map(each).collect();
        let of = |like: usize| {
            let own = all.iter().enumerate().filter(|(lane, _)| self.alike[*lane] == like);
            let own: Vec<f64> = own.flat_map(|(_, secs)| secs.iter().copied()).collect();
            if own.is_empty() { all.concat() } else { own }
        };
        self.alike.iter().map(|&like| usual(of(like))).collect()
    }

    /// Seconds that starting a program costs, and each op in it, for each device.
    fn starts(&mut self) -> Result<Vec<(f64, f64)>> {
        const OPS: usize = 64;
        const TASKS: usize = 50;
        let out = Buffer::new(Area::Workspace, 0, Shape::from([16]), DType::F32);
        let (family, float, sizes) = (Family::Memory, DType::F32, [64, 16, 1]);
        let cost = Cost { flops: 0.0, bytes: 64, family, float, tf32: false, elems: 16, sizes };
        let step = Step {
            op: Op::Zero,
            layer: 0,
            inputs: Vec::new(),
            outputs: vec![Some(out)],
            scratch: None,
            cost,
            ends_layer: false,
        };
        let tasks = |ops: usize| {
            let steps = vec![step.clone(); ops];
            move |d: u16| {
                let program = || Program::of_steps(steps.clone(), [0; AREAS], Vec::new(), false);
                (0..TASKS).map(|_| run(program(), d, [0; AREAS])).collect()
            }
        };
        let secs = |times: &Times| times.iter().map(|t| t.0).collect();
        let empty = self.time(LaneKind::Compute, 0.0, tasks(0))?;
        let full = self.time(LaneKind::Compute, 0.0, tasks(OPS))?;
        let (empty, full) = (self.usual(&empty, secs), self.usual(&full, secs));
        Ok(empty.into_iter().zip(full).map(|(e, f)| (e, (f - e).max(0.0) / OPS as f64)).collect())
    }

    /// Seconds that starting a copy on a lane of `kind` costs, and bytes per second of a large one, for each device.
    fn copies(&mut self, kind: LaneKind) -> Result<Vec<(f64, f64)>> {
        let tasks = |bytes: u64| {
            move |d: u16| {
                let host = Span { memory: Memory::Host, offset: u64::from(d) * LARGE_COPY_BYTES, bytes };
                let arena = Span { memory: Memory::Device(d), offset: 0, bytes };
                let (from, to) = if kind == LaneKind::HostToDevice { (host, arena) } else { (arena, host) };
                vec![Task::Copy(vec![CopySpan { from, to }]); TIMES + 1]
            }
        };
        let secs = |times: &Times| times[1..].iter().map(|t| t.0).collect();
        let small = self.time(kind, 0.0, tasks(SMALL_COPY_BYTES))?;
        let large = self.time(kind, 0.0, tasks(LARGE_COPY_BYTES))?;
        let (small, large) = (self.usual(&small, secs), self.usual(&large, secs));
        let rate = |small: f64, large: f64| (LARGE_COPY_BYTES - SMALL_COPY_BYTES) as f64 / (large - small).max(1e-9);
        Ok(small.into_iter().zip(large).map(|(small, large)| (small, rate(small, large))).collect())
    }

    /// Seconds of a norm and of an update on the host, for each device: on all arithmetic lanes at once.
    fn host_math(&mut self) -> Result<Vec<(f64, f64)>> {
        let bytes = state_bytes(self.update_elems);
        let zeros = vec![0; bytes as usize];
        for i in 0..self.lanes(LaneKind::HostMath).len() as u64 {
            self.device.write_host(i * bytes, &zeros);
        }
        let settle: Vec<[Task; 2]> =
            (0..u64::from(self.devices())).map(|i| self.settle(Memory::Host, i * bytes)).collect();
        let tasks = |d: u16| (0..=TIMES).flat_map(|_| settle[usize::from(d)].clone()).collect();
        let times = self.time(LaneKind::HostMath, 0.0, tasks)?;
        let every_other = |from: usize| move |times: &Times| times[from..].iter().step_by(2).map(|t| t.0).collect();
        let (norms, updates) = (self.usual(&times, every_other(2)), self.usual(&times, every_other(3)));
        Ok(norms.into_iter().zip(updates).collect())
    }

    /// A norm and an AdamW update of a state that lies at `start`. Gradients and moments are zeros: second moments must not be negative.
    fn settle(&self, memory: Memory, start: u64) -> [Task; 2] {
        let (elems, bytes) = (self.update_elems, 4 * self.update_elems);
        let span = |at: u64, bytes: u64| Span { memory, offset: start + at, bytes };
        let array = |i: u64| span(i * bytes, bytes);
        let segments: Arc<[Segment]> = vec![segment(elems)].into();
        let scratch = (self.wants_scratch && memory != Memory::Host)
            .then(|| span(4 * bytes + TABLE_BYTES, norm_scratch_bytes(&segments)));
        let norm =
            Norm { gradient: array(3), segments: Arc::clone(&segments), table: span(4 * bytes + 64, 8), scratch };
        let rule = AdamwRule { update: 10, lr: 1e-3, betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.1 };
        let update = Update {
            rule: UpdateRule::Adamw(rule),
            segments,
            weight: array(0),
            remainder: None,
            moments: [Some(array(1)), Some(array(2))],
            gradient: array(3),
            clip: None,
            gate: span(4 * bytes, 4),
        };
        [Task::Norm(Box::new(norm)), Task::Update(Box::new(update))]
    }

    /// Seconds between the end of a task and the start of one on another lane that waited for it, for each device.
    fn hand_over(&mut self) -> Result<Vec<f64>> {
        const TASKS: usize = 50;
        let devices = self.devices();
        let mut before: Vec<Option<Ticket>> = vec![None; usize::from(devices)];
        for i in 0..TASKS {
            for d in 0..devices {
                let host = Span { memory: Memory::Host, offset: 64 * u64::from(d), bytes: 64 };
                let arena = Span { memory: Memory::Device(d), offset: 0, bytes: 64 };
                let (kind, from, to) = match i % 2 {
                    0 => (LaneKind::HostToDevice, host, arena),
                    _ => (LaneKind::DeviceToHost, arena, host),
                };
                let before = &mut before[usize::from(d)];
                let lane = self.lane(d, kind);
                *before = Some(self.device.submit(lane, Task::Copy(vec![CopySpan { from, to }]), before.as_slice()));
            }
        }
        let mut spans: Vec<Vec<(f64, f64)>> = vec![Vec::new(); usize::from(devices)];
        for _ in 0..TASKS * usize::from(devices) {
            let (ticket, start, end) = self.wait()?;
            let device = self.device.lanes()[usize::from(ticket.lane)].device;
            spans[usize::from(device)].push((start, end));
        }
        Ok(self.alike.iter().map(|&like| gap(&mut spans[like])).collect())
    }
}

/// The middle one of the gaps between spans of which each began after another's end. Here the least says nothing of the others: a thread that is still
/// awake takes over at once, one that sleeps must be woken.
fn gap(spans: &mut [(f64, f64)]) -> f64 {
    // Completions of two lanes may come in another order.
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut gaps: Vec<f64> = spans.windows(2).map(|w| (w[1].0 - w[0].1).max(0.0)).collect();
    gaps.sort_by(f64::total_cmp);
    gaps[gaps.len() / 2]
}

/// The mean of those that are at most twice the least: devices that share the memory slow each other by less than that, and what took longer another
/// program has interrupted.
fn usual(x: Vec<f64>) -> f64 {
    let least = x.iter().copied().fold(f64::INFINITY, f64::min);
    let undisturbed = || x.iter().filter(|&&secs| secs <= 2.0 * least);
    undisturbed().sum::<f64>() / undisturbed().count().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Completion;
    use crate::device::sim::{Rate, SimDevice};
    #[cfg(feature = "emulator")]
    use crate::device::{DeviceSpec, FleetMemory, start_fleet};
    use std::cell::RefCell;
    use std::rc::Rc;

    /// What a lane was given, and when it ran.
    #[derive(Default)]
    struct Log {
        /// Lane and memory traffic of each task, as submitted.
        tasks: Vec<(LaneId, u64)>,
        /// The tasks: the simulated device knows a program by its address, which must not be another's before the end.
        kept: Vec<Task>,
        /// Lane, start and end, as completed.
        spans: Vec<(LaneId, f64, f64)>,
    }

    /// A simulated device that keeps a log.
    struct Logged(SimDevice, Rc<RefCell<Log>>);

    impl Device for Logged {
        fn lanes(&self) -> &[LaneId] {
            self.0.lanes()
        }
        fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
            self.1.borrow_mut().tasks.push((self.0.lanes()[usize::from(lane)], task.bytes()));
            self.1.borrow_mut().kept.push(task.clone());
            self.0.submit(lane, task, after)
        }
        fn next_completion(&mut self, patience_secs: f64) -> Option<Completion> {
            let done = self.0.next_completion(patience_secs)?;
            let lane = self.0.lanes()[usize::from(done.ticket.lane)];
            self.1.borrow_mut().spans.push((lane, done.start_secs, done.end_secs));
            Some(done)
        }
        fn now_secs(&self) -> f64 {
            self.0.now_secs()
        }
        fn computes(&self) -> bool {
            false
        }
        fn grow_host(&mut self, bytes: u64) -> Result<u64> {
            self.0.grow_host(bytes)
        }
        fn write_host(&mut self, _offset: u64, _bytes: &[u8]) {}
        fn read_host(&self, _offset: u64, _bytes: &mut [u8]) {}
        fn high_water_bytes(&self, _device: u16) -> u64 {
            0
        }
    }

    const ELEMS: u64 = 1 << 20;

    fn stated(speed: f64) -> CostModel {
        let mut cost = CostModel::stated(speed * 1e12, speed * 1e13, speed * 1e11);
        (cost.op_secs, cost.run_secs, cost.copy_secs) = (1e-7, 2e-7, 3e-7);
        (cost.device_update_bytes_per_sec, cost.host_update_bytes_per_sec) = (speed * 3e11, speed * 2e11);
        cost.device_norm_bytes_per_sec = Some(speed * 1e11);
        cost
    }

    fn measure(costs: &[CostModel], alike: &[usize], on_host: bool) -> (Vec<CostModel>, Log) {
        let log = Rc::new(RefCell::new(Log::default()));
        let device = Logged(SimDevice::new(costs.to_vec()), Rc::clone(&log));
        let graphs = networks::all().unwrap().into_iter().take(3);
        let networks: Vec<Network> = graphs.map(|graph| Network::new(graph).unwrap()).collect();
        let measured = Bench::new(Box::new(device), alike, ELEMS, false).measure(&networks, on_host).unwrap();
        (measured, Rc::try_unwrap(log).ok().expect("the device is gone").into_inner())
    }

    #[test]
    fn a_simulated_device_is_found_to_be_what_it_is() {
        for on_host in [true, false] {
            let costs = [stated(1.0), stated(0.5)];
            let (found, _) = measure(&costs, &[0, 1], on_host);
            for (found, is) in found.iter().zip(&costs) {
                let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-3, "{a} for {b}");
                near(found.run_secs, is.run_secs);
                near(found.op_secs, is.op_secs);
                near(found.copy_secs, is.copy_secs + SMALL_COPY_BYTES as f64 / is.h2d_bytes_per_sec);
                near(found.h2d_bytes_per_sec, is.h2d_bytes_per_sec);
                near(found.d2h_bytes_per_sec, is.d2h_bytes_per_sec);
                near(found.device_update_bytes_per_sec, is.device_update_bytes_per_sec);
                near(found.device_norm_bytes_per_sec.unwrap(), is.device_norm_bytes_per_sec.unwrap());
                near(found.best_flops_per_sec(), is.best_flops_per_sec());
                // A host's arithmetic is its devices' own; that of others' host is the first device's here.
                let of_host = if on_host { is.device_update_bytes_per_sec } else { costs[0].host_update_bytes_per_sec };
                near(found.host_update_bytes_per_sec, of_host);
            }
        }
    }

    /// Products that may round to tf32 are timed in f32 too, each by itself, and get the rates of both.
    #[test]
    fn a_graph_that_allows_tf32_is_measured_in_both() {
        let mut is = stated(1.0);
        let products = is.rates.clone().into_iter().filter(|rate| rate.family.is_linear_product());
        is.rates.extend(products.map(|r| Rate { tf32: true, work_per_sec: 3.0 * r.work_per_sec, ..r }));
        let log = Rc::new(RefCell::new(Log::default()));
        let device = Logged(SimDevice::new(vec![is]), Rc::clone(&log));
        let mut graph = networks::all().unwrap().remove(2);
        graph.tf32 = true;
        let networks = [Network::new(graph).unwrap()];
        let measured = Bench::new(Box::new(device), &[0], ELEMS, false).measure(&networks, false).unwrap().remove(0);
        let of = |tf32| measured.rates.iter().filter(move |r| r.family.is_linear_product() && r.tf32 == tf32);
        let sizes = |tf32| of(tf32).map(|r| (r.family, r.sizes)).collect::<Vec<_>>();
        assert_eq!(sizes(true), sizes(false));
        assert!(of(true).count() > 5 && measured.rates.iter().all(|r| !r.tf32 || r.family.is_linear_product()));
        let near = |rate: &Rate, want: f64| assert!((rate.work_per_sec / want - 1.0).abs() < 1e-3, "{rate:?}, {want}");
        of(false).for_each(|rate| near(rate, 1e12));
        of(true).for_each(|rate| near(rate, 3e12));
        // What was launched: each product as often in tf32 as in f32, and nothing else in tf32.
        let launched = |tf32: bool| {
            let runs = log
                .borrow()
                .kept
                .iter()
                .filter_map(|task| match task {
                    Task::Run(run) if run.program.steps.len() == 1 && run.program.tf32 == tf32 => {
                        Some(Arc::clone(&run.program))
                    }
                    _ => None,
                })
                .collect::<Vec<_>>();
            (runs.iter().filter(|p| p.steps[0].cost.family.is_linear_product()).count(), runs.len())
        };
        let (products, all) = launched(true);
        assert_eq!((products, products), (all, launched(false).0));
        assert!(launched(false).1 > products);
    }

    #[test]
    fn alike_devices_share_what_was_measured() {
        let (found, _) = measure(&[stated(1.0), stated(1.0), stated(2.0)], &[0, 0, 2], true);
        assert_eq!(found[0], found[1]);
        assert!(found[2].best_flops_per_sec() > 1.9 * found[0].best_flops_per_sec());
    }

    #[test]
    fn all_devices_are_at_work_and_not_in_step() {
        const DEVICES: u16 = 3;
        let (_, log) = measure(&[stated(1.0), stated(1.0), stated(1.0)], &[0; DEVICES as usize], true);
        for kind in [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost] {
            let of = |d: u16| {
                let lane = LaneId::device(d, kind);
                let tasks: Vec<u64> = log.tasks.iter().filter(|t| t.0 == lane).map(|t| t.1).collect();
                let spans: Vec<(f64, f64)> = log.spans.iter().filter(|s| s.0 == lane).map(|s| (s.1, s.2)).collect();
                (tasks, spans)
            };
            let (first, first_spans) = of(0);
            for d in 1..DEVICES {
                let (tasks, spans) = of(d);
                let sorted = |mut tasks: Vec<u64>| {
                    tasks.sort_unstable();
                    tasks
                };
                assert_eq!(tasks != first, kind == LaneKind::Compute, "only rounds begin elsewhere");
                assert_eq!(sorted(tasks), sorted(first.clone()), "each does the same in all");
                // Whatever the first does, this one works too.
                let works = |&(start, end): &(f64, f64)| spans.iter().any(|&(s, e)| s < end && start < e);
                assert!(first_spans.iter().all(works), "{kind:?} of {d}");
            }
        }
    }

    /// On the emulated device, with its kernels: what is timed as tf32 leaves other bits than what is timed as f32, where that always leaves the same.
    #[cfg(feature = "emulator")]
    #[test]
    fn what_is_timed_as_tf32_runs_in_tf32() {
        let spec = DeviceSpec::Emulated { arch: 80, seed: 1, threads: Some(1) };
        let mut graph = networks::all().unwrap().remove(0);
        (graph.scratch, graph.tf32) = (true, true);
        let network = Network::new(graph).unwrap();
        let arena_bytes = vec![network.arena_bytes.max(LARGE_COPY_BYTES)];
        let memory = FleetMemory { arena_bytes, host_bytes: host_bytes(1, 1 << 10), ..FleetMemory::default() };
        let mut bench = Bench::new(start_fleet(&[spec], memory).unwrap(), &[0], 1 << 10, true);
        let tasks: Vec<Task> = network.tasks(0, 0).collect();
        // Puts numbers into the arena, and the results of ops.
        bench.walk(std::slice::from_ref(&network), false).unwrap();
        let mut output = |of: usize| {
            let out = network.steps[of].outputs[0].clone().expect("a product has an output");
            let offset = network.bases[out.area as usize] + out.offset;
            let from = Span { memory: Memory::Device(0), offset, bytes: out.bytes() };
            let to = Span { memory: Memory::Host, offset: 0, ..from };
            bench.time(LaneKind::Compute, 0.0, |_| vec![tasks[of].clone()]).unwrap();
            bench.time(LaneKind::DeviceToHost, 0.0, |_| vec![Task::Copy(vec![CopySpan { from, to }])]).unwrap();
            let mut bytes = vec![0; out.bytes() as usize];
            bench.device.read_host(0, &mut bytes);
            bytes
        };
        let steps = &network.steps;
        let twins = (0..steps.len()).filter(|&i| steps[i].cost.tf32);
        let like = |i: usize, j: usize| steps[j].outputs == steps[i].outputs && steps[j].inputs == steps[i].inputs;
        let mut compared = 0;
        for tf32 in twins {
            let f32 = (0..tf32).find(|&j| like(tf32, j)).expect("each is timed as f32 before");
            let [first, again, rounded] = [f32, f32, tf32].map(&mut output);
            // One that lies over what it reads is never the same.
            if first == again {
                assert!(rounded != first, "{:?} of {:?} is the same in tf32", steps[tf32].op, steps[tf32].cost.sizes);
                compared += 1;
            }
        }
        assert!(compared > 5, "only {compared} products could be compared");
    }

    #[test]
    fn what_was_interrupted_does_not_count() {
        assert_eq!(usual(vec![3.0, 1.0, 2.0]), 1.5);
        assert_eq!(usual(vec![1.0]), 1.0);
        assert_eq!(usual(vec![0.0, 0.0, 5.0]), 0.0);
    }

    #[test]
    fn gaps_are_between_tasks_in_their_order() {
        assert_eq!(gap(&mut [(7.0, 8.0), (0.0, 1.0), (1.0, 2.0), (4.0, 5.0)]), 2.0);
    }
}
