//! A quick estimate of a step, to choose between plans of a model that is at home on a device: units in their order,
//! fetches ahead as far as slots allow.
//!
//! The executor on a simulated device gives the exact prediction of the plan that is chosen; this recurrence only
//! ranks.

use super::memory::{ArenaMap, BoundaryTier, Choice, update_state_bytes};
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

/// Estimated seconds of a training step.
pub fn estimate_secs(
    model: &Model,
    shards: &Shards,
    (choice, arena): (&Choice, &ArenaMap),
    updates: Updates,
    cost: &CostModel,
) -> f64 {
    let Shards { programs: shards, secs } = shards;
    let (n, m) = (shards.len(), model.microbatches as f64);
    let units: Vec<(usize, f64)> = (0..n.saturating_sub(1))
        .map(|s| (s, m * secs[s][0]))
        .chain((0..n).rev().map(|s| (s, m * secs[s][1])))
        .collect();
    let arithmetic = units.iter().map(|u| u.1).sum::<f64>();
    let mut steps = Steps::new(model, shards, (choice, arena), updates, cost);
    let ends: Vec<f64> = (0..STEPS).map(|_| steps.step(&units)).collect();
    let turn = ends[STEPS - 1] - ends[STEPS - 2];
    // Cores that units, copies and the host's arithmetic share.
    let updates: f64 = steps.by_host_secs.iter().sum();
    let here = steps.resting_secs;
    let copies = || cost.copy_core_secs(steps.moved_bytes, units.len() + n);
    let shared = cost.cores.map_or(0.0, |_| arithmetic + updates + here + copies());
    turn.max(updates).max(steps.out_secs).max(steps.in_secs).max(shared)
}

/// Seconds of a step in which the disk is at work, where so much of a model's state is at home there: it reads and
/// writes at once.
pub fn disk_secs(
    model: &Model,
    shards: &Shards,
    choice: &Choice,
    on_disk: OnDisk,
    updates: Updates,
    cost: &CostModel,
) -> f64 {
    let shards = &shards.programs;
    let (mut read, mut written) = (0, 0);
    for (s, shard) in shards.iter().enumerate().filter(|(s, _)| !choice.rests(*s)) {
        let own = shard.own_bytes();
        if on_disk >= OnDisk::UpdateState {
            read += update_state_bytes(model, shards, updates.moments, s);
            written += update_state_bytes(model, shards, updates.moments, s);
        }
        // With clipping they wait there for the norm.
        if on_disk >= OnDisk::Gradients && updates.clips {
            read += own * model.layout.wide_ratio;
            written += own * model.layout.wide_ratio;
        }
        if on_disk >= OnDisk::Weights {
            let visits = if s + 1 == shards.len() || shard.idles_back() { 1 } else { 2 };
            read += own + visits * shard.fetch_bytes();
            written += own;
        }
    }
    read.max(written) as f64 / cost.disk_bytes_per_sec()
}

/// Lanes, slots and what the host has, in the course of steps. Times are in seconds from the start.
struct Steps<'a> {
    model: &'a Model,
    shards: &'a [ShardPrograms],
    choice: &'a Choice,
    cost: &'a CostModel,
    updates: Updates,
    weights: &'a SlotMap,
    gradients: &'a SlotMap,
    /// Of each shard, bytes of accumulators that leave for the shard that owns their parameter, and that come to it.
    joined: Vec<[u64; 2]>,
    /// Of each shard, those whose parameters it uses too.
    owners: Vec<Vec<usize>>,
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
    /// Gradients that the host updates by: when the first piece of a shard's is there, and all of them; in this order.
    arrived: Vec<(f64, f64, usize)>,
    /// Of each shard, when the first piece of its new weights is at home, and all of them.
    new: Vec<[f64; 2]>,
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
    fn new(
        model: &'a Model,
        shards: &'a [ShardPrograms],
        (choice, arena): (&'a Choice, &'a ArenaMap),
        updates: Updates,
        cost: &'a CostModel,
    ) -> Steps<'a> {
        let (mut joined, mut owners) = (vec![[0, 0]; shards.len()], vec![Vec::new(); shards.len()]);
        for (s, shard) in shards.iter().enumerate() {
            for parameter in shard.layout.shared.iter().map(|u| u.parameter) {
                let (at, bytes) = (&model.layout.parameter[parameter], model.gradient_bytes(parameter));
                let owner = shards.iter().position(|o| o.layout.own.contains(at)).filter(|&owner| owner != s);
                if let Some(owner) = owner {
                    joined[s][0] += bytes;
                    joined[owner][1] += bytes;
                    owners[s].push(owner);
                }
            }
        }
        let traffic = |s: &ShardPrograms| {
            let own = s.own_bytes();
            (model.update_bytes(own, updates.moments), model.wide_bytes(own))
        };
        let by_host = |s: &ShardPrograms| {
            let (bytes, wide) = traffic(s);
            cost.host_settle_secs(bytes, wide)
        };
        let here = |s: &ShardPrograms| {
            let (bytes, wide) = traffic(s);
            cost.device_settle_secs(bytes, wide)
        };
        let (resting, first_by_host) = (choice.resting_of(shards.len()), choice.updated_of(shards.len()));
        Steps {
            by_host_secs: shards[first_by_host..].iter().map(by_host).collect(),
            resting_secs: shards[..resting].iter().map(here).sum(),
            new: vec![[0.0; 2]; shards.len()],
            model,
            shards,
            choice,
            cost,
            updates,
            weights: &arena.weight_slots,
            gradients: &arena.gradient_slots,
            joined,
            owners,
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
    fn step(&mut self, units: &[(usize, f64)]) -> f64 {
        let n = self.shards.len();
        (self.in_secs, self.out_secs, self.moved_bytes) = (0.0, 0.0, 0);
        for (u, &(s, secs)) in units.iter().enumerate() {
            self.visit(s, secs, u < n, u + 1 >= n);
        }
        if self.updates.clips {
            self.norm = self.compute.max(self.home);
            self.compute = if self.resting_secs > 0.0 { self.norm + self.resting_secs } else { self.compute };
            self.arrived.iter_mut().for_each(|(piece, all, _)| (*piece, *all) = (self.norm, self.norm));
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
            if let (true, Some(&(_, &(piece, ..)))) = (waiting.is_empty(), next.peek()) {
                self.host = self.host.max(piece);
            }
            while let Some((i, &(.., s))) = next.next_if(|&(_, &(piece, ..))| piece <= self.host) {
                waiting.push(Reverse((s, i)));
            }
            let Some(Reverse((s, i))) = waiting.pop() else { break };
            let secs = self.by_host_secs[s + self.by_host_secs.len() - self.shards.len()];
            let (begins, a_piece) = (self.host, secs / self.pieces(s));
            self.host = (begins + secs).max(arrived[i].1 + a_piece);
            self.new[s] = [begins + a_piece, self.host];
        }
    }

    /// A visit of a shard: its `first` of the step, and its backward.
    fn visit(&mut self, s: usize, secs: f64, first: bool, backward: bool) {
        let rests = self.choice.rests(s);
        let ready = self.fetch(s, first, backward);
        let visiting_update = self.is_updated_here(s) && if self.updates.clips { first } else { backward };
        let mut slot_leaves = 0.0;
        if self.updates.clips && visiting_update {
            self.compute = self.compute.max(self.norm).max(ready);
            let gradient = if self.waits_at_home(s) { self.shards[s].layout.gradient_bytes } else { 0 };
            let room = room_of(&self.states_left, self.choice.gradient_slots);
            self.update_here(s, room, gradient);
            slot_leaves = self.d2h;
            self.states_left.push(self.d2h);
        }
        let slots = is_large(self.gradients, s);
        let room = match backward && !rests {
            true => room_of(&self.left[slots], self.gradients.of[s].len()),
            false => 0.0,
        };
        let ready = ready.max(self.batch_comes(s, backward));
        let secs = self.arithmetic_secs(s, secs, first, backward);
        self.compute = self.compute.max(ready).max(room) + secs;
        if backward && (rests || self.updates.clips && self.is_updated_here(s)) {
            self.bring(self.joined[s][1]);
        }
        if self.batch_bytes(s, backward) > 0 {
            self.batch_read = self.compute;
        }
        if rests {
            return;
        }
        if !self.updates.clips && visiting_update {
            self.update_here(s, room, self.joined[s][1]);
            // New weights are in their slot until they have left.
            slot_leaves = self.d2h;
        }
        if backward {
            let gradients = self.shards[s].layout.gradient_bytes;
            let bytes = match self.is_updated_here(s) && !self.waits_at_home(s) {
                true => self.joined[s][0],
                false => gradients,
            };
            let begins = self.d2h.max(self.compute);
            let leaves = self.copy_home(bytes);
            self.left[slots].push(self.d2h.max(self.compute));
            if !self.is_updated_here(s) {
                self.home = self.d2h;
                self.arrived.push((begins + leaves / self.pieces(s), self.d2h, s));
            }
        }
        self.ends[is_large(self.weights, s)].push(self.compute.max(slot_leaves));
    }

    /// Brings a shard's weights, where no slot has them, and returns when they are there.
    fn fetch(&mut self, s: usize, first: bool, backward: bool) -> f64 {
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
        let bytes = self.shards[s].fetch_bytes();
        let secs = self.cost.copy_secs + bytes as f64 / self.cost.h2d_bytes_per_sec;
        self.in_secs += secs;
        self.moved_bytes += bytes;
        let free = room_of(&self.ends[is_large(self.weights, s)], self.weights.of[s].len());
        let [piece, mut all] = self.new[s];
        // What it borrows comes last.
        for &owner in self.owners[s].iter().filter(|&&owner| !self.choice.rests(owner)) {
            all = all.max(self.new[owner][1]);
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
        let secs = if bytes > 0 { self.cost.copy_secs + bytes as f64 / self.cost.h2d_bytes_per_sec } else { 0.0 };
        self.h2d += secs;
        self.in_secs += secs;
        self.moved_bytes += bytes;
    }

    /// The device's update of a shard that visits, with its state and so many bytes more, and room from then on; what is
    /// new goes home.
    fn update_here(&mut self, s: usize, room: f64, more_bytes: u64) {
        let state = update_state_bytes(self.model, self.shards, self.updates.moments, s);
        let secs = self.cost.copy_secs + (state + more_bytes) as f64 / self.cost.h2d_bytes_per_sec;
        self.in_secs += secs;
        // Of the state what has room comes beside the arithmetic before, the rest piece by piece.
        let own = self.shards[s].own_bytes();
        let pieces = count_pieces(own, self.choice.slots, true) as usize;
        let ahead = secs * self.choice.update_pieces.min(pieces) as f64 / pieces as f64;
        let came = self.h2d.max(room) + ahead;
        self.h2d = if ahead < secs { came.max(self.compute) + secs - ahead } else { came };
        let (bytes, wide) = (self.model.update_bytes(own, self.updates.moments), self.model.wide_bytes(own));
        self.compute = self.compute.max(self.h2d) + self.cost.device_settle_secs(bytes, wide);
        self.moved_bytes += state + more_bytes;
        self.copy_home(own + state);
        self.new[s] = [self.d2h; 2];
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
    fn batch_bytes(&self, s: usize, backward: bool) -> u64 {
        let program = if backward { &self.shards[s].backward } else { &self.shards[s].forward };
        self.model.microbatches as u64 * program.as_ref().map_or(0, |p| p.bytes(Area::Inputs))
    }

    /// When the first microbatch's part of the batch is there: a single entry is in use until it has been read.
    fn batch_comes(&self, s: usize, backward: bool) -> f64 {
        let secs = self.copies_secs(self.batch_bytes(s, backward), self.cost.h2d_bytes_per_sec);
        if self.choice.input_entries > 1 { 0.0 } else { self.batch_read + secs / self.model.microbatches as f64 }
    }

    /// Seconds of a copy for each microbatch, of so many bytes in all.
    fn copies_secs(&self, bytes: u64, bytes_per_sec: f64) -> f64 {
        let starts = if bytes > 0 { self.model.microbatches as f64 * self.cost.copy_secs } else { 0.0 };
        starts + bytes as f64 / bytes_per_sec
    }

    /// Seconds of a visit's arithmetic beside the copies of its boundary tensors and of the batch's, which take their
    /// time on the lanes.
    fn arithmetic_secs(&mut self, s: usize, secs: f64, first: bool, backward: bool) -> f64 {
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
        let batch = self.batch_bytes(s, backward);
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
        self.updates.clips && self.is_updated_here(s) && !self.gradients.stays(s, self.choice.resting)
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
fn is_large(slots: &SlotMap, s: usize) -> usize {
    usize::from(slots.of[s].end < slots.at.len())
}
