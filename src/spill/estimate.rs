//! A quick estimate of a step, to choose between plans of a model that is at home on a device: units in their order,
//! fetches ahead as far as slots allow.
//!
//! The executor on a simulated device gives the exact prediction of the plan that is chosen; this recurrence only
//! ranks.

use super::memory::{ArenaMap, BoundaryTier, Choice, Tenant, update_state_bytes};
use super::model::Model;
use super::plan::Updates;
use super::shard::ShardPrograms;
use super::slots::SlotMap;
use super::stand_in::Shards;
use super::store::{OnDisk, count_pieces};
use crate::device::sim::CostModel;
use crate::graph::Area;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

/// Steps that are gone through: the last one is taken, which begins on what one before it has left.
const STEPS: usize = 3;

/// What an estimate is of: shards under a choice, and what they cost.
#[derive(Clone, Copy)]
pub(super) struct Draft<'a> {
    pub model: &'a Model,
    pub shards: &'a Shards,
    pub choice: &'a Choice,
    pub updates: Updates,
    pub cost: &'a CostModel,
}

impl<'a> Draft<'a> {
    /// What of it decides where everything lies.
    pub fn tenant(&self) -> Tenant<'a> {
        let Draft { model, shards, choice, updates, .. } = *self;
        Tenant { model, shards: &shards.programs, choice, moments: updates.moments }
    }

    /// Bytes of a shard's moments and remainders.
    pub fn update_state_bytes(&self, shard: usize) -> u64 {
        update_state_bytes(self.model, &self.shards.programs, self.updates.moments, shard)
    }
}

/// Estimated seconds of a training step.
pub(super) fn estimate_secs(draft: Draft, arena: &ArenaMap) -> f64 {
    let Draft { shards: Shards { programs, secs }, cost, .. } = draft;
    let (n, m) = (programs.len(), draft.model.microbatches as f64);
    let forwards = (0..n - 1).map(|s| Visit { s, secs: m * secs[s][0], first: true, backward: false });
    let backwards = (0..n).rev().map(|s| Visit { s, secs: m * secs[s][1], first: s + 1 == n, backward: true });
    let visits: Vec<Visit> = forwards.chain(backwards).collect();
    let arithmetic = visits.iter().map(|v| v.secs).sum::<f64>();
    let mut steps = Steps::new(draft, arena);
    let ends: Vec<f64> = (0..STEPS).map(|_| steps.step(&visits)).collect();
    let turn = ends[STEPS - 1] - ends[STEPS - 2];
    // Cores that units, copies and the host's arithmetic share.
    let updates: f64 = steps.by_host_secs.iter().sum();
    let here = steps.resting_secs;
    let copies = || cost.copy_core_secs(steps.moved_bytes, visits.len() + n);
    let shared = cost.cores.map_or(0.0, |_| arithmetic + updates + here + copies());
    turn.max(updates).max(steps.out_secs).max(steps.in_secs).max(shared)
}

/// Seconds of a step in which the disk is at work, where so much of a model's state is at home there: it reads and
/// writes at once.
pub(super) fn disk_secs(draft: Draft, on_disk: OnDisk) -> f64 {
    let shards = &draft.shards.programs;
    let of = |(s, shard): (usize, &ShardPrograms)| {
        let own = shard.own_bytes();
        let visits = if s + 1 == shards.len() || shard.idles_back() { 1 } else { 2 };
        // With clipping gradients wait there for the norm.
        let gradients = if draft.updates.clips { draft.model.wide_bytes(own) } else { 0 };
        // No more is written: what visits read does not come back.
        let reads = [
            (OnDisk::UpdateState, draft.update_state_bytes(s)),
            (OnDisk::Gradients, gradients),
            (OnDisk::Weights, own + visits * shard.fetch_bytes()),
        ];
        reads.into_iter().filter(|(least, _)| on_disk >= *least).map(|(_, bytes)| bytes).sum::<u64>()
    };
    let read: u64 = shards.iter().enumerate().filter(|(s, _)| !draft.choice.rests(*s)).map(of).sum();
    read as f64 / draft.cost.disk_bytes_per_sec()
}

/// A visit of a shard: its first of the step, its backward, or both.
#[derive(Clone, Copy)]
struct Visit {
    s: usize,
    /// Of arithmetic.
    secs: f64,
    first: bool,
    backward: bool,
}

/// When the first piece of something is there, and all of it.
#[derive(Clone, Copy, Default)]
struct There {
    piece: f64,
    all: f64,
}

/// What a shard has to do with others whose parameters it uses too, or that use its own.
#[derive(Clone, Default)]
struct Shared {
    /// Bytes of accumulators that leave for the shard that owns their parameter, and that come to it.
    leaves_bytes: u64,
    comes_bytes: u64,
    /// The shards whose parameters it uses.
    owners: Vec<usize>,
}

/// Lanes, slots and what the host has, in the course of steps. Times are in seconds from the start.
struct Steps<'a> {
    draft: Draft<'a>,
    model: &'a Model,
    shards: &'a [ShardPrograms],
    choice: &'a Choice,
    cost: &'a CostModel,
    weights: &'a SlotMap,
    gradients: &'a SlotMap,
    /// Of each shard.
    shared: Vec<Shared>,
    /// Updates by the host, of each shard that it updates.
    by_host_secs: Vec<f64>,
    /// The device's of shards that rest.
    resting_secs: f64,
    /// Ends of what the lanes have been given.
    compute: f64,
    h2d: f64,
    d2h: f64,
    host: f64,
    /// When the batch was read last.
    batch_read: f64,
    /// Where the lane to the device waits for new weights: others may come meanwhile.
    gap: Range<f64>,
    /// When the last gradients that the host updates are there, and when the norm of all is known.
    home: f64,
    norm: f64,
    /// Gradients of shards that the host updates by, in the order in which they come.
    arrived: Vec<(usize, There)>,
    /// Of each shard, its new weights at home.
    new: Vec<There>,
    /// Ends of visits that took a slot, and when what used gradient slots had left, each for shards that are not large
    /// and for large ones; and the same of slots of state that visits.
    ends: [Vec<f64>; 2],
    left: [Vec<f64>; 2],
    states_left: Vec<f64>,
    /// Of the last step: seconds of copies to the device and home, and the bytes of all.
    in_secs: f64,
    out_secs: f64,
    moved_bytes: u64,
}

impl<'a> Steps<'a> {
    fn new(draft: Draft<'a>, arena: &'a ArenaMap) -> Steps<'a> {
        let Draft { model, shards: Shards { programs: shards, .. }, choice, updates, cost } = draft;
        let mut shared = vec![Shared::default(); shards.len()];
        for (s, shard) in shards.iter().enumerate() {
            for parameter in shard.layout.shared.iter().map(|u| u.parameter) {
                let (at, bytes) = (&model.layout.parameter[parameter], model.gradient_bytes(parameter));
                let owner = shards.iter().position(|o| o.layout.own.contains(at)).filter(|&owner| owner != s);
                if let Some(owner) = owner {
                    shared[s].leaves_bytes += bytes;
                    shared[owner].comes_bytes += bytes;
                    shared[s].owners.push(owner);
                }
            }
        }
        let by_host = |s: &ShardPrograms| model.host_settle_secs(s.own_bytes(), updates.moments, cost);
        let here = |s: &ShardPrograms| model.device_settle_secs(s.own_bytes(), updates.moments, cost);
        let (resting, first_by_host) = (choice.resting_of(shards.len()), choice.updated_of(shards.len()));
        Steps {
            by_host_secs: shards[first_by_host..].iter().map(by_host).collect(),
            resting_secs: shards[..resting].iter().map(here).sum(),
            new: vec![There::default(); shards.len()],
            draft,
            model,
            shards,
            choice,
            cost,
            weights: &arena.weight_slots,
            gradients: &arena.gradient_slots,
            shared,
            compute: 0.0,
            h2d: 0.0,
            d2h: 0.0,
            host: 0.0,
            batch_read: 0.0,
            gap: 0.0..0.0,
            home: 0.0,
            norm: 0.0,
            arrived: Vec::new(),
            ends: Default::default(),
            left: Default::default(),
            states_left: Vec::new(),
            in_secs: 0.0,
            out_secs: 0.0,
            moved_bytes: 0,
        }
    }

    /// Goes through a step and returns its end.
    fn step(&mut self, visits: &[Visit]) -> f64 {
        (self.in_secs, self.out_secs, self.moved_bytes) = (0.0, 0.0, 0);
        visits.iter().for_each(|visit| self.visit(visit));
        if self.draft.updates.clips {
            self.norm = self.compute.max(self.home);
            self.compute = if self.resting_secs > 0.0 { self.norm + self.resting_secs } else { self.compute };
            self.arrived.iter_mut().for_each(|(_, there)| *there = There { piece: self.norm, all: self.norm });
        } else {
            self.compute += self.resting_secs;
        }
        self.update_by_host();
        self.compute
    }

    /// The host's updates of a step's shards: of those whose gradients have begun to arrive always the one that is needed
    /// first.
    fn update_by_host(&mut self) {
        let arrived = std::mem::take(&mut self.arrived);
        let mut next = arrived.iter().enumerate().peekable();
        let mut waiting = BinaryHeap::new();
        loop {
            if let (true, Some((_, (_, there)))) = (waiting.is_empty(), next.peek()) {
                self.host = self.host.max(there.piece);
            }
            while let Some((i, (s, _))) = next.next_if(|(_, (_, there))| there.piece <= self.host) {
                waiting.push(Reverse((*s, i)));
            }
            let Some(Reverse((s, i))) = waiting.pop() else { break };
            let secs = self.by_host_secs[s + self.by_host_secs.len() - self.shards.len()];
            let (begins, a_piece) = (self.host, secs / self.pieces(s));
            self.host = (begins + secs).max(arrived[i].1.all + a_piece);
            self.new[s] = There { piece: begins + a_piece, all: self.host };
        }
    }

    fn visit(&mut self, visit: &Visit) {
        let &Visit { s, first, backward, .. } = visit;
        let rests = self.choice.rests(s);
        let ready = self.fetch(visit);
        let visiting_update = self.is_updated_here(s) && if self.draft.updates.clips { first } else { backward };
        let mut slot_leaves = 0.0;
        if self.draft.updates.clips && visiting_update {
            self.compute = self.compute.max(self.norm).max(ready);
            let gradient = if self.waits_at_home(s) { self.shards[s].layout.gradient_bytes } else { 0 };
            let room = room_of(&self.states_left, self.choice.gradient_slots);
            self.update_here(s, room, gradient);
            slot_leaves = self.d2h;
            self.states_left.push(self.d2h);
        }
        let ring = ring_of(self.gradients, s);
        let room = match backward && !rests {
            true => room_of(&self.left[ring], self.gradients.of[s].len()),
            false => 0.0,
        };
        let ready = ready.max(self.batch_comes(visit));
        let secs = self.arithmetic_secs(visit);
        self.compute = self.compute.max(ready).max(room) + secs;
        if backward && (rests || self.draft.updates.clips && self.is_updated_here(s)) {
            self.bring(self.shared[s].comes_bytes);
        }
        if self.batch_bytes(visit) > 0 {
            self.batch_read = self.compute;
        }
        if rests {
            return;
        }
        if !self.draft.updates.clips && visiting_update {
            self.update_here(s, room, self.shared[s].comes_bytes);
            // New weights are in their slot until they have left.
            slot_leaves = self.d2h;
        }
        if backward {
            let gradients = self.shards[s].layout.gradient_bytes;
            let bytes = match self.is_updated_here(s) && !self.waits_at_home(s) {
                true => self.shared[s].leaves_bytes,
                false => gradients,
            };
            let begins = self.d2h.max(self.compute);
            let leaves = self.copy_home(bytes);
            self.left[ring].push(self.d2h.max(self.compute));
            if !self.is_updated_here(s) {
                self.home = self.d2h;
                let piece = begins + leaves / self.pieces(s);
                self.arrived.push((s, There { piece, all: self.d2h }));
            }
        }
        self.ends[ring_of(self.weights, s)].push(self.compute.max(slot_leaves));
    }

    /// Brings a shard's weights, where no slot has them, and returns when they are there.
    fn fetch(&mut self, &Visit { s, first, backward, .. }: &Visit) -> f64 {
        let (rests, resting) = (self.choice.rests(s), self.choice.resting);
        let hit = rests
            || (backward && self.shards[s].idles_back())
            // Around the turn the last shards are still in their slots.
            || (!first && self.weights.returns(s))
            // What the device has updated last is still in its slot in the next step.
            || (first && self.is_updated_here(s) && self.weights.stays(s, resting));
        if hit {
            return 0.0;
        }
        let secs = self.copy_here(self.shards[s].fetch_bytes());
        let free = room_of(&self.ends[ring_of(self.weights, s)], self.weights.of[s].len());
        let There { piece, mut all } = self.new[s];
        // What it borrows comes last.
        for &owner in self.shared[s].owners.iter().filter(|&&owner| !self.choice.rests(owner)) {
            all = all.max(self.new[owner].all);
        }
        let starts = self.gap.start.max(free).max(piece);
        let before = (self.gap.end - starts).clamp(0.0, secs);
        if before > 0.0 {
            self.gap.start = starts + before;
        }
        let whole = all + secs / self.pieces(s);
        if before >= secs {
            return (starts + secs).max(whole);
        }
        let begins = self.h2d.max(free).max(piece);
        if begins > self.h2d.max(free) {
            self.gap = self.h2d..begins;
        }
        self.h2d = (begins + secs - before).max(whole);
        self.h2d
    }

    /// Copies to the device, of what is there.
    fn bring(&mut self, bytes: u64) {
        self.h2d += if bytes > 0 { self.copy_here(bytes) } else { 0.0 };
    }

    /// Counts a copy to the device, and returns the seconds that it takes.
    fn copy_here(&mut self, bytes: u64) -> f64 {
        let secs = self.cost.copy_secs + bytes as f64 / self.cost.h2d_bytes_per_sec;
        self.in_secs += secs;
        self.moved_bytes += bytes;
        secs
    }

    /// The device's update of a shard that visits, with its state and so many bytes more, and room from then on; what is
    /// new goes home.
    fn update_here(&mut self, s: usize, room: f64, more_bytes: u64) {
        let state = self.draft.update_state_bytes(s);
        let secs = self.copy_here(state + more_bytes);
        // Of the state what has room comes beside the arithmetic before, the rest piece by piece.
        let own = self.shards[s].own_bytes();
        let pieces = count_pieces(own, self.choice.slots, true) as usize;
        let ahead = secs * self.choice.update_pieces.min(pieces) as f64 / pieces as f64;
        let came = self.h2d.max(room) + ahead;
        self.h2d = if ahead < secs { came.max(self.compute) + secs - ahead } else { came };
        let settles = self.model.device_settle_secs(own, self.draft.updates.moments, self.cost);
        self.compute = self.compute.max(self.h2d) + settles;
        self.copy_home(own + state);
        self.new[s] = There { piece: self.d2h, all: self.d2h };
    }

    /// Copies what is there, and returns the seconds that it takes.
    fn copy_home(&mut self, bytes: u64) -> f64 {
        if bytes == 0 {
            return 0.0;
        }
        let secs = self.cost.copy_secs + bytes as f64 / self.cost.d2h_bytes_per_sec;
        self.d2h = self.d2h.max(self.compute) + secs;
        self.out_secs += secs;
        self.moved_bytes += bytes;
        secs
    }

    /// Bytes that a visit reads of the batch.
    fn batch_bytes(&self, visit: &Visit) -> u64 {
        let shard = &self.shards[visit.s];
        let program = if visit.backward { &shard.backward } else { &shard.forward };
        self.model.microbatches as u64 * program.as_ref().map_or(0, |p| p.bytes(Area::Inputs))
    }

    /// When the first microbatch's part of the batch is there: a single entry is in use until it has been read.
    fn batch_comes(&self, visit: &Visit) -> f64 {
        let secs = self.copies_secs(self.batch_bytes(visit), self.cost.h2d_bytes_per_sec);
        if self.choice.input_entries > 1 { 0.0 } else { self.batch_read + secs / self.model.microbatches as f64 }
    }

    /// Seconds of a copy for each microbatch, of so many bytes in all.
    fn copies_secs(&self, bytes: u64, bytes_per_sec: f64) -> f64 {
        let starts = if bytes > 0 { self.model.microbatches as f64 * self.cost.copy_secs } else { 0.0 };
        starts + bytes as f64 / bytes_per_sec
    }

    /// Seconds of a visit's arithmetic beside the copies of its boundary tensors and of the batch's, which take their
    /// time on the lanes.
    fn arithmetic_secs(&mut self, visit: &Visit) -> f64 {
        let &Visit { s, secs, first, backward } = visit;
        let (choice, shards, m) = (self.choice, self.shards, self.model.microbatches);
        let boundary = |crosses: bool, at: Option<usize>| match at {
            Some(at) if crosses => m as u64 * shards[at].boundary_bytes,
            _ => 0,
        };
        let (before, behind) = (s.checked_sub(1), Some(s).filter(|s| s + 1 < shards.len()));
        let entries = |tier: BoundaryTier| match tier {
            BoundaryTier::Device => usize::MAX,
            BoundaryTier::Host { entries } => entries,
        };
        // What a ring still has since the visit before is not fetched, and need not have gone home.
        let few = |tier: BoundaryTier| m >= entries(tier);
        let at_home = choice.activations != BoundaryTier::Device;
        let activations = boundary(if first { few(choice.activations) } else { at_home }, before);
        // In and out of one ring, and in beside them.
        let (comes, leaves, beside) = match backward {
            true => {
                let cross = few(choice.gradients);
                (boundary(cross, behind), boundary(cross, before), activations)
            }
            false => {
                let is_read_at_once = s + 2 == shards.len() && !few(choice.activations);
                (activations, boundary(at_home && !is_read_at_once, behind), 0)
            }
        };
        let batch = self.batch_bytes(visit);
        self.moved_bytes += batch + comes + beside + leaves;
        let to_device = |bytes: u64| self.copies_secs(bytes, self.cost.h2d_bytes_per_sec);
        let (batch, comes, beside) = (to_device(batch), to_device(comes), to_device(beside));
        let (brought, leaves) = (batch + comes + beside, self.copies_secs(leaves, self.cost.d2h_bytes_per_sec));
        self.h2d += brought;
        self.d2h += leaves;
        self.in_secs += brought;
        self.out_secs += leaves;
        // All but what the first microbatch reads.
        let others = |secs: f64| secs * (m - 1) as f64 / m as f64;
        // A ring with an entry for what comes in and one for what goes out has none for the next microbatch's:
        // arithmetic waits for the copies. Of the batch a single entry is in use.
        let ring = if backward { choice.gradients } else { choice.activations };
        let is_narrow = entries(ring) <= 2 && comes > 0.0 && leaves > 0.0;
        let waits = if is_narrow { comes.max(leaves) } else { 0.0 };
        let waits_for_batch = if choice.input_entries == 1 { others(batch) } else { 0.0 };
        (secs + waits + waits_for_batch).max(others(brought)).max(others(leaves))
    }

    /// Whether it visits and is updated on the device.
    fn is_updated_here(&self, s: usize) -> bool {
        self.choice.updates_on_device(s) && !self.choice.rests(s)
    }

    /// Whether its gradients wait at home for the norm: with clipping those of what the device updates, but for what its
    /// slots hold.
    fn waits_at_home(&self, s: usize) -> bool {
        self.draft.updates.clips && self.is_updated_here(s) && !self.gradients.stays(s, self.choice.resting)
    }

    /// Pieces in which a shard's gradients leave and its weights come.
    fn pieces(&self, s: usize) -> f64 {
        count_pieces(self.shards[s].own_bytes(), self.choice.slots, false) as f64
    }
}

/// When the slot is free that was used so many uses ago, as there are slots.
fn room_of(used: &[f64], slots: usize) -> f64 {
    used.len().checked_sub(slots).map_or(0.0, |at| used[at])
}

/// Which of two rings a shard that visits uses.
fn ring_of(slots: &SlotMap, s: usize) -> usize {
    usize::from(slots.of[s].end < slots.at.len())
}
