//! Times devices that were started together, together.
//!
//! Every device gets the same list of tasks, but each begins at a different place of it, since a job's devices are not
//! in step. Each network drives the one before out of the caches, as when models take turns, so all but small operands
//! come from the same level of memory as in a training step. The first round is discarded; the result is the mean of
//! the others, without outliers caused by other programs.

use super::networks;
use super::rates::{Network, Rates, run};
use crate::base::{DType, Error, LaneId, LaneKind, Result, Shape};
use crate::device::sim::CostModel;
use crate::device::{
    AdamwRule, Attached, CopySpan, Device, Memory, Norm, Segment, Span, Task, Ticket, Update, UpdateRule,
    norm_scratch_bytes,
};
use crate::graph::{AREAS, Area, Buffer, Cost, Family, Op, Program, Step};
use std::sync::Arc;
use std::time::Duration;

/// Number of timed rounds: as many as fit the networks' shares of the second, within these bounds.
const ROUNDS: std::ops::RangeInclusive<usize> = 3..=9;
/// A network's share, in seconds.
const NETWORK_SECS: f64 = 0.07;
/// How often a copy or an update on the host is timed.
const TIMES: usize = 5;
/// The large copy that is timed.
pub(super) const LARGE_COPY_BYTES: u64 = 16 << 20;
/// The small copy, whose time is mostly the start-up cost.
const SMALL_COPY_BYTES: u64 = 4096;
/// Bytes of each pattern that devices are filled with: numbers, ids, zeros.
const PATTERN_BYTES: u64 = 4 << 20;
/// Room after an update's four arrays for losses and a table of norms.
const TABLE_BYTES: u64 = 128;

/// Bytes of the state that an update of `elems` is timed with: weights, two moments, gradients; losses, norms and their
/// partial sums.
pub(super) fn state_bytes(elems: u64) -> u64 {
    16 * elems + TABLE_BYTES + norm_scratch_bytes(&[segment(elems)])
}

/// Bytes of the host's store for so many devices: a state for each of its arithmetic lanes, patterns, and sources of
/// copies.
pub(super) fn host_bytes(devices: u64, elems: u64) -> u64 {
    devices * state_bytes(elems).max(LARGE_COPY_BYTES).max(3 * PATTERN_BYTES)
}

fn segment(elems: u64) -> Segment {
    Segment { offset: 0, elems, decay: true, index: 0 }
}

/// Devices that are measured.
pub(super) struct Bench<'a> {
    device: Attached,
    /// For each device, the first one like it: the times of devices that are alike are pooled.
    alike: &'a [usize],
    update_elems: u64,
    wants_scratch: bool,
}

/// For one lane of one device, the seconds of each of its tasks and when it ended.
type Times = Vec<(f64, f64)>;

impl<'a> Bench<'a> {
    pub fn new(device: Box<dyn Device>, alike: &'a [usize], update_elems: u64, wants_scratch: bool) -> Bench<'a> {
        let device = Attached::new(device);
        let mut bench = Bench { device, alike, update_elems, wants_scratch };
        bench.write_patterns();
        bench
    }

    fn devices(&self) -> u16 {
        self.alike.len() as u16
    }

    /// Measures every device. With `on_host`, all networks fit the arena together, and the host's arithmetic is done by
    /// the devices themselves, on the same cores.
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
                disk_bytes_per_sec: None,
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

    /// Runs `tasks` of each lane of `kind` on all these lanes at once and returns their times. Sleeps for `secs` before
    /// it polls: waiting for each completion would take time from the cores that are measured.
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

    /// Writes the patterns that devices are filled with into the host's store: small numbers, ids, zeros.
    fn write_patterns(&mut self) {
        let numbers: Vec<f32> = (0..PATTERN_BYTES / 4).map(|i| (i * 7919 % 4099) as f32 / 4e4 - 0.05).collect();
        let ids: Vec<i32> =
            (0..PATTERN_BYTES as i64 / 4).map(|i| (i * 7919 % networks::CLASSES as i64) as i32).collect();
        self.device.write_host(0, bytemuck::cast_slice(&numbers));
        self.device.write_host(PATTERN_BYTES, bytemuck::cast_slice(&ids));
        self.device.write_host(2 * PATTERN_BYTES, &vec![0; PATTERN_BYTES as usize]);
    }

    /// Copies that fill all of `to` with pattern number `pattern`.
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

    /// Seconds of each op of `networks`, which lie side by side, for each device; with `updates`, also those of a norm
    /// and an update after them.
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

    /// Runs each device's list over and over on all compute lanes at once, for about `total_secs`; returns each task's
    /// usual time, pooled over devices that are alike.
    fn rounds(&mut self, lists: &[Vec<Task>], total_secs: f64) -> Result<Vec<Vec<f64>>> {
        let devices = lists.len();
        let len = lists[0].len();
        // The index in its list at which a device begins.
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

    /// The usual time of each device, pooled over devices that are alike; for lanes that all devices share, the same
    /// for each.
    fn usual(&self, times: &[Times], each: impl Fn(&Times) -> Vec<f64>) -> Vec<f64> {
        let all: Vec<Vec<f64>> = times.iter().map(each).collect();
        let of = |like: usize| {
            let own = all.iter().enumerate().filter(|(lane, _)| self.alike[*lane] == like);
            let own: Vec<f64> = own.flat_map(|(_, secs)| secs.iter().copied()).collect();
            if own.is_empty() { all.concat() } else { own }
        };
        self.alike.iter().map(|&like| usual(of(like))).collect()
    }

    /// The start-up costs, in seconds, of a program and of each op in it, for each device.
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

    /// The start-up cost in seconds of a copy on a lane of `kind`, and the bytes per second of a large one, for each
    /// device.
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
        // On a busy machine a small copy may look as slow as a large one, which must not yield an infinite rate.
        let rate = |small: f64, large: f64| {
            (LARGE_COPY_BYTES - SMALL_COPY_BYTES) as f64 / (large - small).max(0.25 * large).max(1e-9)
        };
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

    /// A norm and an AdamW update of the state at `start`. Gradients and moments are zeros: second moments must not be
    /// negative.
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

    /// Seconds from the end of a task to the start of one on another lane that waited for it, for each device.
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

/// The median gap between spans each of which begins after the end of another. The minimum would not be representative:
/// a thread that is still awake takes over at once, but a sleeping one must be woken.
fn gap(spans: &mut [(f64, f64)]) -> f64 {
    // Completions of two lanes may come in a different order.
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut gaps: Vec<f64> = spans.windows(2).map(|w| (w[1].0 - w[0].1).max(0.0)).collect();
    gaps.sort_by(f64::total_cmp);
    gaps[gaps.len() / 2]
}

/// The mean of the values that are at most twice the least: devices that share memory slow each other down by less than
/// that, and what took longer was interrupted by another program.
fn usual(x: Vec<f64>) -> f64 {
    let least = x.iter().copied().fold(f64::INFINITY, f64::min);
    let undisturbed = || x.iter().filter(|&&secs| secs <= 2.0 * least);
    undisturbed().sum::<f64>() / undisturbed().count().max(1) as f64
}

#[cfg(test)]
mod tests;
