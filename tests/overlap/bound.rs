//! Bound B: the same visits with the plan's slots on lanes that cost nothing to feed, by a recurrence of its own.
//!
//! It shares no code with the engine. What a piece of work waits for is written down from the meaning of the plan
//! (which visit used a slot before, which copy emptied an entry), not found from bytes, and a lane is one number: a
//! piece starts at the latest of its lane's end and the ends that it waits for. The choice that is left, which of
//! several waiting copies goes first, is made in several ways and the fastest counts.

use hydra::device::sim::CostModel;
use hydra::graph::{Area, Program};
use hydra::spill::{BoundaryTier, Model, Plan};

const COMPUTE: usize = 0;
const IN: usize = 1;
const OUT: usize = 2;
const HOST: usize = 3;
/// No lane: what is not done after all takes no time.
const NOWHERE: usize = 4;
const LANES: usize = 5;

/// A piece of work for one lane.
#[derive(Debug)]
struct Work {
    lane: usize,
    secs: f64,
    after: Vec<usize>,
    /// Place in the order of compute work by which its result is wanted.
    wanted: usize,
    step: usize,
}

/// What a ring's entry holds, its last use, and the work that must end before it is overwritten, with how far from its
/// start in bytes that work reaches.
type Entry = (Option<(usize, usize)>, usize, Vec<(usize, u64)>);

/// Reaches to the end of an entry.
const WHOLE: u64 = u64::MAX;

/// A ring of entries, the least recently used of which is handed out.
#[derive(Clone, Debug)]
struct Ring {
    entries: Vec<Entry>,
    uses: usize,
}

impl Ring {
    fn new(entries: usize) -> Ring {
        Ring { entries: vec![(None, 0, Vec::new()); entries], uses: 0 }
    }

    fn find(&mut self, key: (usize, usize)) -> Option<usize> {
        let at = self.entries.iter().position(|e| e.0 == Some(key))?;
        self.uses += 1;
        self.entries[at].1 = self.uses;
        Some(at)
    }

    /// An entry for `key`, not that of `keep`, and what its last holder leaves to wait for.
    fn take(&mut self, key: (usize, usize), keep: Option<(usize, usize)>) -> (usize, Vec<usize>) {
        let (at, users) = self.take_of(key, |_, e| keep.is_none() || e.0 != keep);
        (at, users.into_iter().map(|u| u.0).collect())
    }

    fn take_of(&mut self, key: (usize, usize), open: impl Fn(usize, &Entry) -> bool) -> (usize, Vec<(usize, u64)>) {
        let open = (0..self.entries.len()).filter(|&i| open(i, &self.entries[i]));
        let at = open.min_by_key(|&i| (self.entries[i].0.is_some(), self.entries[i].1)).expect("an open entry");
        self.uses += 1;
        let users = std::mem::take(&mut self.entries[at].2);
        self.entries[at] = (Some(key), self.uses, Vec::new());
        (at, users)
    }

    fn forget(&mut self, key: Option<(usize, usize)>) {
        self.entries.iter_mut().filter(|e| key.is_none() || e.0 == key).for_each(|e| e.0 = None);
    }
}

struct Recurrence<'a> {
    plan: &'a Plan,
    cost: &'a CostModel,
    microbatches: usize,
    work: Vec<Work>,
    computes: usize,
    step: usize,
    slots: Ring,
    /// The slot that each shard was in last, and the use of it.
    last_slot: Vec<Option<usize>>,
    last_use: Vec<usize>,
    activations: Ring,
    gradients: Ring,
    inputs: Ring,
    /// The copies that read each gradient slot's content out, with where they start, and when it was given last.
    leaving: Vec<Vec<(usize, u64)>>,
    given: Vec<usize>,
    /// Last update of each shard, piece by piece, and its last norm.
    updated: Vec<Vec<usize>>,
    normed: Vec<Option<usize>>,
    /// The copies that took boundary tensors to the host.
    activation_home: Vec<Vec<Option<usize>>>,
    gradient_home: Vec<Vec<Option<usize>>>,
}

/// Seconds of a steady step.
pub fn step_secs(model: &Model, plan: &Plan, cost: &CostModel, clip: bool, warm: usize, measured: usize) -> f64 {
    let n = plan.shards.len();
    let mut recurrence = Recurrence {
        plan,
        cost,
        microbatches: model.microbatches,
        work: Vec::new(),
        computes: 0,
        step: 0,
        slots: Ring::new(plan.arena.weight_slots.at.len()),
        last_slot: vec![None; n],
        last_use: vec![0; n],
        activations: Ring::new(plan.arena.activations.len()),
        gradients: Ring::new(plan.arena.gradients.len()),
        inputs: Ring::new(plan.arena.inputs.len()),
        leaving: vec![Vec::new(); plan.arena.gradient_slots.at.len()],
        given: vec![0; plan.arena.gradient_slots.at.len()],
        updated: vec![Vec::new(); n],
        normed: vec![None; n],
        activation_home: vec![vec![None; model.microbatches]; n],
        gradient_home: vec![vec![None; model.microbatches]; n],
    };
    for step in 0..warm + measured {
        recurrence.step = step;
        recurrence.add_step(clip);
    }
    let work = &recurrence.work;
    let orders = [[true, true], [true, false], [false, true], [false, false]];
    orders
        .into_iter()
        .map(|[i, o]| measure(work, [true, i, o, false, false], warm, measured))
        .fold(f64::INFINITY, f64::min)
}

impl Recurrence<'_> {
    fn add(&mut self, lane: usize, secs: f64, after: Vec<usize>, wanted: usize) -> usize {
        self.work.push(Work { lane, secs, after, wanted, step: self.step });
        self.work.len() - 1
    }

    fn copy_in(&mut self, bytes: u64, after: Vec<usize>) -> usize {
        self.add(IN, self.cost.copy_secs + bytes as f64 / self.cost.h2d_bytes_per_sec, after, self.computes)
    }

    fn copy_out(&mut self, bytes: u64, after: Vec<usize>) -> usize {
        self.add(OUT, self.cost.copy_secs + bytes as f64 / self.cost.d2h_bytes_per_sec, after, self.computes)
    }

    fn add_step(&mut self, clip: bool) {
        let n = self.plan.shards.len();
        for s in 0..n - 1 {
            self.visit(s, false);
        }
        if self.plan.choice.resident {
            return self.finish_resident();
        }
        let next_step = self.computes + n * self.microbatches;
        let mut result = 0;
        let mut home = vec![None; n];
        // Norms of what rests are summed on the device and sent, and its updates are made there.
        let mut sent = Vec::new();
        for s in (0..n).rev() {
            let (slot, last) = self.visit(s, true);
            if s == n - 1 {
                result = self.copy_out(4 * self.microbatches as u64, vec![last]);
            }
            if self.plan.shards[s].layout.gradient_bytes == 0 {
                continue;
            }
            if self.plan.choice.rests(s) {
                let norm = self.on_device(self.own_bytes(s), vec![last]);
                sent.push(self.copy_out(8 * self.plan.shards[s].layout.layers.len() as u64, vec![norm]));
                if !clip {
                    self.on_device(self.own_bytes(s) * (3 + 2 * self.plan.updates.moments) as f64, vec![norm]);
                }
                continue;
            }
            // The host's copy of the gradient is overwritten: its last readers come first.
            let before: Vec<usize> = self.updated[s].iter().chain(&self.normed[s]).chain([&last]).copied().collect();
            let pieces = self.plan.pieces(s);
            let out: Vec<usize> = pieces.iter().map(|p| self.copy_out(p.end - p.start, before.clone())).collect();
            self.leaving[slot].extend(out.iter().copied().zip(pieces.iter().map(|p| p.start)));
            let wanted = if clip { self.computes } else { next_step + n * self.microbatches };
            let bytes = self.plan.shards[s].layout.own.end - self.plan.shards[s].layout.own.start;
            self.normed[s] = Some(self.math(bytes as f64, out.clone(), wanted));
            home[s] = self.normed[s];
            if !clip {
                self.updated[s].clear();
                for (piece, out) in pieces.iter().zip(out) {
                    self.update(s, piece.end - piece.start, vec![out, result], next_step);
                }
            }
        }
        if clip {
            let norms: Vec<usize> = home.iter().flatten().copied().chain([result]).chain(sent).collect();
            let brought = (self.plan.choice.resting > 0).then(|| self.copy_in(8 * n as u64, norms.clone()));
            for s in 0..self.plan.choice.resting {
                self.on_device(
                    self.own_bytes(s) * (3 + 2 * self.plan.updates.moments) as f64,
                    brought.into_iter().collect(),
                );
            }
            for s in (0..n).filter(|&s| home[s].is_some()) {
                self.updated[s].clear();
                for piece in self.plan.pieces(s) {
                    self.update(s, piece.end - piece.start, norms.clone(), next_step);
                }
            }
        }
        self.slots.forget(None);
    }

    /// Where everything stays on the device, norms and updates follow the last backward there.
    fn finish_resident(&mut self) {
        for s in (0..self.plan.shards.len()).rev() {
            self.visit(s, true);
        }
        let bytes: f64 = (0..self.plan.shards.len()).map(|s| self.own_bytes(s)).sum();
        let secs = bytes * (1 + 3 + 2 * self.plan.updates.moments) as f64 / self.cost.device_update_bytes_per_sec;
        self.add(COMPUTE, secs, Vec::new(), self.computes);
    }

    fn own_bytes(&self, s: usize) -> f64 {
        let own = &self.plan.shards[s].layout.own;
        (own.end - own.start) as f64
    }

    fn on_device(&mut self, bytes: f64, after: Vec<usize>) -> usize {
        let secs = self.cost.op_secs + bytes / self.cost.device_update_bytes_per_sec;
        self.add(COMPUTE, secs, after, self.computes)
    }

    fn math(&mut self, bytes: f64, after: Vec<usize>, wanted: usize) -> usize {
        self.add(HOST, self.cost.op_secs + bytes / self.cost.host_update_bytes_per_sec, after, wanted)
    }

    fn update(&mut self, s: usize, bytes: u64, after: Vec<usize>, next_step: usize) {
        let traffic = bytes as f64 * (3 + 2 * self.plan.updates.moments) as f64;
        let update = self.math(traffic, after, next_step + s * self.microbatches);
        self.updated[s].push(update);
    }

    /// What is read for the last time where it was made need not go home: the copy that is among an entry's users, if
    /// there is one, is not made.
    fn drop_copy(&mut self, users: &[(usize, u64)], home: Option<usize>) {
        if let Some(out) = home.filter(|out| users.iter().any(|u| u.0 == *out)) {
            (self.work[out].lane, self.work[out].secs) = (NOWHERE, 0.0);
        }
    }

    /// One visit; gives the gradient slot that it filled and its last compute work.
    fn visit(&mut self, s: usize, backward: bool) -> (usize, usize) {
        let plan = self.plan;
        let shard = &plan.shards[s];
        let program = if backward { &shard.backward } else { &shard.forward };
        let program = program.as_ref().expect("a training plan has both");
        let mut here = Vec::new();
        let rests = !plan.choice.resident && plan.choice.rests(s);
        let slot = match self.slots.find((s, 0)) {
            _ if rests => None,
            Some(slot) => Some(slot),
            None => {
                // The first shards of a step go back to the slots that they left last in the step before.
                let own = self.last_slot[s].filter(|&slot| self.slots.entries[slot].0.is_none());
                let own = own.filter(|&slot| self.slots.entries[slot].1 == self.last_use[s]);
                let own_use = own.map(|slot| self.slots.entries[slot].1);
                let (slot, users) = self.slots.take_of((s, 0), |i, e| {
                    plan.arena.weight_slots.of[s].contains(&i) && own_use.is_none_or(|u| e.1 == u)
                });
                let before = |start: u64| users.iter().filter(move |u| u.1 > start).map(|u| u.0).collect::<Vec<_>>();
                let pieces = plan.pieces(s);
                // A backward visit's fetch is whole, save where boundary tensors cross the same link.
                let crossing =
                    [plan.choice.activations, plan.choice.gradients].iter().any(|&t| t != BoundaryTier::Device);
                let in_pieces = !backward || s + 1 == plan.shards.len() || crossing;
                if plan.choice.resident || shard.fetch_bytes() == 0 {
                    here = before(0);
                } else if pieces.len() == self.updated[s].len() && in_pieces {
                    for (piece, updated) in pieces.into_iter().zip(self.updated[s].clone()) {
                        let waits = before(piece.start).into_iter().chain([updated]).collect();
                        here.push(self.copy_in(piece.end - piece.start, waits));
                    }
                } else {
                    let waits = before(0).into_iter().chain(self.updated[s].iter().copied()).collect();
                    here.push(self.copy_in(shard.fetch_bytes(), waits));
                }
                self.slots.entries[slot].2 = users;
                Some(slot)
            }
        };
        let mut gradient_slot = 0;
        if backward && !plan.choice.rests(s) {
            let slots = plan.arena.gradient_slots.of[s].clone();
            gradient_slot = slots.min_by_key(|&slot| self.given[slot]).expect("every shard has one");
            self.given[gradient_slot] = self.computes + 1;
            // A smaller shard's gradients need not wait for the end of a larger one's.
            let leaving = &mut self.leaving[gradient_slot];
            here.extend(leaving.iter().filter(|l| l.1 < shard.layout.gradient_bytes).map(|l| l.0));
            leaving.retain(|l| l.1 >= shard.layout.gradient_bytes);
        }
        let mut last = 0;
        for m in 0..self.microbatches {
            last = self.microbatch(s, m, backward, program, std::mem::take(&mut here));
        }
        if let Some(slot) = slot {
            let users = &mut self.slots.entries[slot].2;
            users.retain(|u| u.1 > shard.fetch_bytes());
            users.push((last, shard.fetch_bytes()));
            (self.last_slot[s], self.last_use[s]) = (Some(slot), self.slots.entries[slot].1);
        }
        (gradient_slot, last)
    }

    fn microbatch(&mut self, s: usize, m: usize, backward: bool, program: &Program, mut after: Vec<usize>) -> usize {
        let plan = self.plan;
        let (n, stay) = (plan.shards.len(), plan.choice.activations == BoundaryTier::Device);
        let gradients_stay = plan.choice.gradients == BoundaryTier::Device;
        let (before, behind) = (s.checked_sub(1).map(|b| (b, m)), (s + 1 < n).then_some((s, m)));
        let mut used = Vec::new();
        if let Some(key) = before.filter(|_| !stay && program.bytes(Area::ActivationIn) > 0) {
            let entry = match self.activations.find(key) {
                Some(entry) => {
                    if backward {
                        let users = self.activations.entries[entry].2.clone();
                        self.drop_copy(&users, self.activation_home[key.0][m]);
                    }
                    entry
                }
                None => {
                    let (entry, mut free) = self.activations.take(key, None);
                    free.extend(self.activation_home[key.0][m]);
                    after.push(self.copy_in(plan.shards[key.0].boundary_bytes, free));
                    entry
                }
            };
            used.push(entry);
        }
        let mut leaves = None;
        if let Some(key) = behind.filter(|_| !stay && !backward) {
            let (entry, free) = self.activations.take(key, before);
            after.extend(free);
            used.push(entry);
            leaves = Some(entry);
        }
        let mut gradient_in = None;
        if let Some(key) = behind.filter(|_| backward && program.bytes(Area::GradientIn) > 0) {
            let entry = match self.gradients.find(key) {
                Some(entry) => {
                    let users = self.gradients.entries[entry].2.clone();
                    self.drop_copy(&users, self.gradient_home[s][m]);
                    entry
                }
                None => {
                    let (entry, mut free) = self.gradients.take(key, None);
                    free.extend(self.gradient_home[s][m]);
                    after.push(self.copy_in(plan.shards[s].boundary_bytes, free));
                    entry
                }
            };
            gradient_in = Some((key, entry));
        }
        let mut gradient_out = None;
        if let Some(key) = before.filter(|_| backward && program.bytes(Area::GradientOut) > 0) {
            let (entry, free) = self.gradients.take(key, gradient_in.map(|g| g.0));
            after.extend(free);
            gradient_out = Some((key, entry));
        }
        let mut input = None;
        if !program.inputs.is_empty() {
            let (entry, free) = self.inputs.take((self.computes, 0), None);
            after.push(self.copy_in(program.inputs.iter().map(|i| i.bytes).sum(), free));
            input = Some(entry);
        }
        let unit = self.add(COMPUTE, self.cost.program_secs(program), after, self.computes);
        used.into_iter().for_each(|entry| self.activations.entries[entry].2.push((unit, WHOLE)));
        input.into_iter().for_each(|entry| self.inputs.entries[entry].2 = vec![(unit, WHOLE)]);
        if let Some(entry) = leaves {
            let out = self.copy_out(plan.shards[s].boundary_bytes, vec![unit]);
            self.activation_home[s][m] = Some(out);
            self.activations.entries[entry].2.push((out, WHOLE));
        }
        if let Some((key, entry)) = gradient_out {
            self.gradients.entries[entry].2 = vec![(unit, WHOLE)];
            if !gradients_stay {
                let out = self.copy_out(plan.shards[key.0].boundary_bytes, vec![unit]);
                self.gradient_home[key.0][m] = Some(out);
                self.gradients.entries[entry].2.push((out, WHOLE));
            }
        }
        if let Some((key, entry)) = gradient_in {
            self.gradients.entries[entry].2.push((unit, WHOLE));
            self.gradients.forget(Some(key));
        }
        if let Some(key) = before.filter(|_| backward) {
            self.activations.forget(Some(key));
        }
        self.computes += 1;
        unit
    }
}

/// Runs the work: lanes marked `in_order` take it as it was written down, the others what can start and is wanted
/// first.
fn measure(work: &[Work], in_order: [bool; LANES], warm: usize, measured: usize) -> f64 {
    let mut open: Vec<usize> = work.iter().map(|w| w.after.len()).collect();
    let mut behind = vec![Vec::new(); work.len()];
    for (i, w) in work.iter().enumerate() {
        w.after.iter().for_each(|&a| behind[a].push(i));
    }
    let mut queues: [Vec<usize>; LANES] = Default::default();
    let mut next = [0; LANES];
    let mut ready: [Vec<usize>; LANES] = Default::default();
    for (i, w) in work.iter().enumerate() {
        queues[w.lane].push(i);
        if open[i] == 0 {
            ready[w.lane].push(i);
        }
    }
    let mut busy: [Option<(f64, usize)>; LANES] = [None; LANES];
    let mut ends = vec![0.0f64; warm + measured];
    let (mut now, mut left) = (0.0f64, work.len());
    while left > 0 {
        for lane in 0..LANES {
            if busy[lane].is_some() {
                continue;
            }
            let chosen = if in_order[lane] {
                queues[lane].get(next[lane]).copied().filter(|&i| open[i] == 0)
            } else {
                ready[lane].iter().copied().min_by_key(|&i| (work[i].wanted, i))
            };
            if let Some(i) = chosen {
                next[lane] += 1;
                ready[lane].retain(|&r| r != i);
                busy[lane] = Some((now + work[i].secs, i));
            }
        }
        now = busy.iter().flatten().map(|b| b.0).fold(f64::INFINITY, f64::min);
        assert!(now.is_finite(), "the recurrence waits for itself");
        for lane in 0..LANES {
            let Some((_, i)) = busy[lane].filter(|b| b.0 <= now) else { continue };
            busy[lane] = None;
            left -= 1;
            ends[work[i].step] = ends[work[i].step].max(now);
            for &b in &behind[i] {
                open[b] -= 1;
                if open[b] == 0 {
                    ready[work[b].lane].push(b);
                }
            }
        }
    }
    (ends[warm + measured - 1] - ends[warm - 1]) / measured as f64
}
