//! Sample events for the tests of the drawings: two steps of a model of three shards that spills, on one device.

use super::{Event, TaskName, What};
use crate::base::{LaneId, LaneKind};

const GPU: LaneId = LaneId::device(0, LaneKind::Compute);
const UP: LaneId = LaneId::device(0, LaneKind::HostToDevice);
const DOWN: LaneId = LaneId::device(0, LaneKind::DeviceToHost);
const MATH: LaneId = LaneId::host(LaneKind::HostMath);

/// Submits tasks to lanes and computes when they run.
#[derive(Default)]
pub(super) struct Schedule {
    pub events: Vec<Event>,
}

impl Schedule {
    /// Adds a task of `secs` that waits for `inputs`; returns its ticket.
    pub fn task(&mut self, lane: LaneId, what: What, step: u32, shard: u16, secs: f64, inputs: &[u64]) -> u64 {
        let ticket = self.events.len() as u64 + 1;
        let predecessor = self.events.iter().rev().find(|event| event.lane == lane).map(|event| event.ticket);
        let waited_for = inputs.iter().copied().filter(|&input| input > 0).chain(predecessor);
        let last = waited_for
            .map(|ticket| self.events[ticket as usize - 1])
            .max_by(|a, b| a.end_secs.total_cmp(&b.end_secs).then(a.ticket.cmp(&b.ticket)));
        let start_secs = last.map_or(0.0, |last| last.end_secs);
        let moves = lane.kind != LaneKind::Compute;
        self.events.push(Event {
            lane,
            name: TaskName { what, model: 0, shard, microbatch: None },
            step,
            start_secs,
            end_secs: start_secs + secs,
            bytes: if moves { (secs * 2.1e9) as u64 } else { 0 },
            flops: if moves { 0.0 } else { secs * 61e9 },
            ticket,
            after: last.map_or(0, |last| last.ticket),
        });
        ticket
    }

    /// Adds one step over `shards` shards with two weight slots.
    pub fn step(&mut self, step: u32, shards: u16) {
        let (mut units, mut updates) = (Vec::new(), vec![0; usize::from(shards)]);
        let input = self.task(UP, What::Input, step, 0, 0.002, &[]);
        for visit in 0..2 * shards - 1 {
            let shard = if visit < shards { visit } else { 2 * shards - 2 - visit };
            let slot_free = units.len().checked_sub(2).map_or(0, |i: usize| units[i]);
            let fetched = self.task(UP, What::FetchWeights, step, shard, 0.011, &[slot_free]);
            let before = units.last().copied().unwrap_or(input);
            let last = shards - 1;
            let (what, secs) = match visit {
                v if v == last => (What::LastUnit, 0.027),
                v if v < last => (What::Forward, 0.009),
                _ => (What::Backward, 0.021),
            };
            let unit = self.task(GPU, what, step, shard, secs, &[fetched, before]);
            units.push(unit);
            if visit >= last {
                let norm = self.task(GPU, What::Norm, step, shard, 0.001, &[unit]);
                let spilled = self.task(DOWN, What::SpillGradient, step, shard, 0.011, &[norm]);
                updates[usize::from(shard)] = self.task(MATH, What::Update, step, shard, 0.008, &[spilled]);
            } else {
                self.task(DOWN, What::SpillBoundary, step, shard, 0.003, &[unit]);
            }
        }
        self.task(DOWN, What::Result, step, shards - 1, 0.0005, &[updates[0]]);
    }
}

/// Two steps over three shards.
pub(super) fn two_steps() -> Vec<Event> {
    let mut schedule = Schedule::default();
    schedule.step(0, 3);
    schedule.step(1, 3);
    schedule.events
}
