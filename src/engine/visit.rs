//! Expands a step into tasks: for every visit of a shard, the fetches before it, a compute task for each microbatch,
//! what leaves after.
//!
//! Tasks are made in the order in which one device with one lane could run them; every overlap comes from lanes running
//! ahead of that order as far as the bytes allow. The visits of a step are F(0) .. F(n-2), the last shard's forward,
//! loss and backward, B(n-2) .. B(0). A visit may be on another device than the one before: what it needs of that one's
//! it fetches from the host's store.

use super::Engine;
use super::member::{Pending, Purpose};
use super::queue::Order;
use super::rings::{BoundaryKey, Spill};
use super::site::Site;
use crate::device::{AdamwRule, CopySpan, Memory, Run, Scalars, SgdRule, Span, Task, UpdateRule};
use crate::graph::{AREAS, Area, Program};
use crate::spill::BoundaryTier;
use crate::trace::{TaskName, What};
use std::ops::Range;
use std::sync::Arc;

/// A rule of the right kind for `moments`, where its numbers do not matter.
pub(super) fn any_rule(moments: usize) -> UpdateRule {
    match moments {
        2 => UpdateRule::Adamw(AdamwRule { update: 1, lr: 0.0, betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.0 }),
        n => UpdateRule::Sgd(SgdRule {
            update: 1,
            lr: 0.0,
            momentum: if n > 0 { 0.9 } else { 0.0 },
            nesterov: false,
            weight_decay: 0.0,
        }),
    }
}

/// One visit of a shard: what is scheduled. The range is the whole minibatch unless a schedule pipelines microbatches.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub shard: usize,
    pub pass: Pass,
    pub microbatches: Range<usize>,
}

/// What a visit does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Forward,
    Backward,
    Evaluate,
}

impl Pending {
    /// Its unit number `unit`, of a model with `shards`, that runs so many `microbatches`.
    pub fn unit(&self, unit: usize, shards: usize, microbatches: usize) -> Unit {
        if self.pipelined {
            return self.pipelined_unit(unit, shards, microbatches);
        }
        let (shard, pass) = match self.purpose {
            Purpose::Evaluation => (unit, Pass::Evaluate),
            _ if unit + 1 < shards => (unit, Pass::Forward),
            _ => (2 * (shards - 1) - unit, Pass::Backward),
        };
        Unit { shard, pass, microbatches: 0..microbatches }
    }

    /// Microbatch by microbatch: all forward, then all backward. A lane takes units in this order as they become ready,
    /// which fills and empties the pipeline.
    fn pipelined_unit(&self, unit: usize, shards: usize, microbatches: usize) -> Unit {
        let forwards = (shards - 1) * microbatches;
        let (shard, pass, m) = match unit.checked_sub(forwards) {
            None => (unit % (shards - 1), Pass::Forward, unit / (shards - 1)),
            Some(unit) => (shards - 1 - unit % shards, Pass::Backward, unit / shards),
        };
        Unit { shard, pass, microbatches: m..m + 1 }
    }
}

impl Engine {
    /// Makes the tasks of a model's next unit, on the device where the shard is at home.
    pub(super) fn expand_at_home(&mut self, member: usize) {
        let m = &self.members[member];
        let pending = &m.pending[m.next_work().expect("asked for only where there is work")];
        let unit = pending.unit(pending.made, m.plan.shards.len(), m.model.microbatches);
        let device = m.home_of(unit.shard).expect("a model without a home takes turns");
        self.expand(member, device);
    }

    /// Makes the tasks of a model's next unit on a device.
    pub(super) fn expand(&mut self, member: usize, device: u16) {
        let m = &mut self.members[member];
        let at = m.next_work().expect("asked for only where there is work");
        let pending = m.pending[at].clone();
        m.pending[at].made += 1;
        let site = Site { step: pending.step, serial: pending.serial, ..self.site(member, device) };
        let unit = pending.unit(pending.made, site.plan.shards.len(), site.model.microbatches);
        let (shard, pass, whole) = (unit.shard, unit.pass, unit.microbatches.end == site.model.microbatches);
        let (ahead, crowd) = (self.sequence, self.members.len() as u64);
        let held = self.rings[site.rings].weights.slot_of(site.shard(shard)).is_some();
        let slot = self.visit(&site, &unit, &pending);
        match pending.purpose {
            // Its gradients are complete with the last microbatch.
            Purpose::Step { rule, clip } if pass == Pass::Backward && whole => {
                let m = &mut self.members[member];
                m.returns[shard] = held || m.ran_on[shard] == device;
                m.ran_on[shard] = device;
                // The next step's first visit comes after the rest of this one's, each with as many others' between as
                // there are models.
                let visit = site.model.microbatches as u64 * crowd;
                let next_step = ahead + (shard as u64 + 1) * visit;
                self.settle(&site, &super::settle::Settled { shard, slot, rule, clip, next_step, visit });
            }
            Purpose::Evaluation if site.is_last(shard) && site.model.eval_has_loss() => self.result(&site),
            _ => {}
        }
    }

    /// Makes the tasks of one visit and returns the gradient slot that it filled.
    fn visit(&mut self, site: &Site, unit: &Unit, pending: &Pending) -> usize {
        let (s, pass) = (unit.shard, unit.pass);
        let shard = &site.plan.shards[s];
        let program = match pass {
            Pass::Forward => shard.forward.as_ref(),
            Pass::Backward => shard.backward.as_ref(),
            Pass::Evaluate => shard.eval.as_ref(),
        };
        let program = Arc::clone(program.expect("a model has the programs of every pass that it is asked for"));
        // Before all that is trained a backward has nothing to do, and wants nothing.
        let slot = if program.steps.is_empty() { 0 } else { self.fetch_weights(site, s, pass) };
        self.update_due(site, s);
        let gradient_slot = match pass {
            Pass::Backward => {
                self.rings[site.rings].gradient_slot(site.map.gradient_slots.of[s].clone(), site.shard(s))
            }
            Pass::Forward | Pass::Evaluate => 0,
        };
        for m in unit.microbatches.clone() {
            let ends_unit = m + 1 == unit.microbatches.end;
            self.microbatch(site, (s, m, pass), &program, (slot, gradient_slot), pending, ends_unit);
        }
        let states = shard.layout.states.end - shard.layout.states.start;
        let changes_states = pass == Pass::Forward || (pass == Pass::Backward && site.is_last(s));
        if changes_states && states > 0 && !site.plan.choice.rests(s) {
            let from = site.arena(site.map.weight_slots.at[slot] + site.map.states_at[s], states);
            let to = site.store(site.plan.host.states + shard.layout.states.start, states);
            self.copy(site, What::SpillState, s, None, vec![CopySpan { from, to }]);
            // Elsewhere they are older now.
            self.forget_weights(site, |engine, rings| engine.rings[rings].weights.forget(|held| held == site.shard(s)));
        }
        gradient_slot
    }

    /// Lets every set of slots but this device's forget weights, where the model has such.
    pub(super) fn forget_weights(&mut self, site: &Site, forget: impl Fn(&mut Engine, usize)) {
        for device in 0..self.lanes.len() {
            let rings = self.members[site.member].rings[device];
            if rings != site.rings {
                forget(self, rings);
            }
        }
    }

    /// Makes the compute task of one microbatch of a visit, with the copies of its boundary tensors.
    fn microbatch(
        &mut self,
        site: &Site,
        (s, m, pass): (usize, usize, Pass),
        program: &Arc<Program>,
        (slot, gradient_slot): (usize, usize),
        pending: &Pending,
        ends_unit: bool,
    ) {
        let (plan, map, last) = (&site.plan, &site.map, site.is_last(s));
        let mut bases = [0; AREAS];
        let mut reads: [Option<Span>; 8] = [None; 8];
        let mut writes: [Option<Span>; 8] = [None; 8];
        let mut set = |area: Area, base: u64| {
            bases[area as usize] = base;
            site.arena(base, program.bytes(area))
        };
        // All programs of a device have one workspace, and an evaluation's logits lie in it until they have left.
        writes[6] = Some(set(Area::Workspace, map.workspace));
        reads[0] = Some(set(Area::Weights, map.weight_slots.at[slot]));
        let states = set(Area::States, map.weight_slots.at[slot] + map.states_at[s]);
        if pass == Pass::Evaluate {
            reads[1] = Some(states)
        } else {
            writes[0] = Some(states)
        }
        if pass == Pass::Backward {
            writes[1] = Some(set(Area::Gradients, map.gradient_slots.at[gradient_slot]));
        }
        if last && pass != Pass::Forward {
            writes[2] = Some(set(Area::Results, map.losses[site.parity()] + 4 * m as u64));
        }
        if let Some(&saved) = map.saved[s].get(m)
            && pass != Pass::Evaluate
        {
            let span = set(Area::Saved, saved);
            if pass == Pass::Forward { writes[3] = Some(span) } else { reads[2] = Some(span) }
        }
        // What the task before in this shard hands over is brought first, then what the batch brings.
        let place_in: Option<BoundaryKey> = s.checked_sub(1).map(|before| site.place(before, m));
        let place_out: Option<BoundaryKey> = (!last).then(|| site.place(s, m));
        let mut pinned: [Option<BoundaryKey>; 2] = [None; 2];
        if let Some(place) = place_in.filter(|_| program.bytes(Area::ActivationIn) > 0) {
            let entry = self.fetch_activation(site, place);
            bases[Area::ActivationIn as usize] = map.activations[entry];
            reads[3] = Some(site.arena(map.activations[entry], program.bytes(Area::ActivationIn)));
            pinned[0] = Some(place);
        }
        if let Some(place) = place_out.filter(|_| pass != Pass::Backward) {
            let entry = self
                .activation_entry(site, place)
                .unwrap_or_else(|| self.rings[site.rings].activations.take(place, &pinned.map(|p| p.unwrap_or(place))));
            bases[Area::ActivationOut as usize] = map.activations[entry];
            writes[4] = Some(site.arena(map.activations[entry], program.bytes(Area::ActivationOut)));
        }
        if pass == Pass::Evaluate && last && program.bytes(Area::ActivationOut) > 0 {
            // Logits are handed on to nobody: they lie over the workspace's end, where the map of an evaluation leaves
            // room.
            let at = map.workspace + crate::base::align_up(program.bytes(Area::Workspace), crate::graph::ALIGNMENT);
            bases[Area::ActivationOut as usize] = at;
            writes[4] = Some(site.arena(at, program.bytes(Area::ActivationOut)));
        }
        let mut grad_in = None;
        if let Some(place) = place_out.filter(|_| pass == Pass::Backward && program.bytes(Area::GradientIn) > 0) {
            let entry = self.fetch_gradient(site, place);
            bases[Area::GradientIn as usize] = map.gradients[entry];
            reads[4] = Some(site.arena(map.gradients[entry], program.bytes(Area::GradientIn)));
            grad_in = Some(place);
        }
        let mut grad_out = None;
        if let Some(place) = place_in.filter(|_| pass == Pass::Backward && program.bytes(Area::GradientOut) > 0) {
            let entry = self.rings[site.rings].gradients.take(place, &[grad_in.unwrap_or(place)]);
            bases[Area::GradientOut as usize] = map.gradients[entry];
            let span = site.arena(map.gradients[entry], program.bytes(Area::GradientOut));
            writes[5] = Some(span);
            grad_out = Some((place, span));
        }
        if !program.inputs.is_empty() {
            let base = self.fetch_inputs(site, s, m, program);
            bases[Area::Inputs as usize] = base;
            reads[5] = Some(site.arena(base, program.bytes(Area::Inputs)));
        }
        if m == 0 && plan.choice.crosses && !plan.choice.pipelined {
            // One unit at a time: with what is handed over at home, the last microbatch's has been too.
            let end = site.model.microbatches - 1;
            let before = match (pass, s.checked_sub(1)) {
                (Pass::Backward, _) if !last => Some(plan.host.gradients[s][end]),
                (_, Some(before)) => Some(plan.host.activations[before][end]),
                (_, None) => None,
            };
            reads[6] = before.map(|at| site.store(at, 1));
        }
        let scalars = Scalars {
            seed: self.members[site.member].options.seed,
            step: site.step as u32,
            microbatch: m as u32,
            loss_scale: pending.loss_scale,
            accumulate: m > 0,
        };
        let what = match pass {
            Pass::Evaluate => What::Eval,
            Pass::Forward => What::Forward,
            Pass::Backward if last => What::LastUnit,
            Pass::Backward => What::Backward,
        };
        let check = pending.purpose == Purpose::Check;
        let run = Run { program: Arc::clone(program), device: site.device, bases, scalars, check };
        let order = Order {
            lane: site.lanes.compute,
            task: Task::Run(Box::new(run)),
            name: self.name(site, what, s, Some(m)),
            serial: site.serial,
            step: site.step,
            deadline: self.sequence,
            ends_unit,
        };
        let maker = self.queue.next_id();
        self.enter(order, reads.into_iter().flatten(), writes.into_iter().flatten());
        let spill = Spill { task: maker + 1, maker };
        if let (Some(place), Some(from)) = (place_out.filter(|_| pass != Pass::Backward), writes[4])
            && plan.choice.activations != BoundaryTier::Device
        {
            let to = site.store(plan.host.activations[place.boundary][place.microbatch], from.bytes);
            self.copy(site, What::SpillBoundary, s, Some(m), vec![CopySpan { from, to }]);
            self.rings[site.rings].activations.note_spill(place, spill);
        }
        if let Some((place, from)) = grad_out
            && plan.choice.gradients != BoundaryTier::Device
        {
            let to = site.store(plan.host.gradients[place.boundary][place.microbatch], from.bytes);
            self.copy(site, What::SpillBoundary, s, Some(m), vec![CopySpan { from, to }]);
            self.rings[site.rings].gradients.note_spill(place, spill);
        }
        // What its last reader finds where it was made need not go home any more.
        if let Some(spill) = grad_in.and_then(|place| self.rings[site.rings].gradients.let_go(place)) {
            self.drop_spill(site, spill);
        }
        if pass != Pass::Forward
            && plan.choice.activations != BoundaryTier::Device
            && let Some(place) = place_in
            && let Some(spill) = self.rings[site.rings].activations.let_go(place)
        {
            self.drop_spill(site, spill);
        }
        if pass == Pass::Evaluate && last && program.bytes(Area::ActivationOut) > 0 {
            let from = writes[4].expect("set above");
            let to = site.store(plan.host.logits, from.bytes);
            self.copy(site, What::Result, s, Some(m), vec![CopySpan { from, to }]);
        }
        self.sequence += 1;
    }

    /// Drops a copy of a boundary tensor that nobody will fetch, unless it has begun.
    fn drop_spill(&mut self, site: &Site, spill: Spill) {
        if let Some(serial) = self.queue.drop_copy(spill.task, spill.maker) {
            self.members[site.member].unbook(serial);
        }
    }

    fn name(&self, site: &Site, what: What, s: usize, m: Option<usize>) -> TaskName {
        let microbatch = m.filter(|_| site.model.microbatches > 1).map(|m| m as u16);
        TaskName { what, model: site.member as u16, shard: s as u16, microbatch }
    }

    /// Adds a task and books it under its work.
    fn enter(&mut self, order: Order, reads: impl IntoIterator<Item = Span>, writes: impl IntoIterator<Item = Span>) {
        let member = &mut self.members[usize::from(order.name.model)];
        member.book(order.serial);
        reads.into_iter().for_each(|span| self.queue.access(span, false));
        writes.into_iter().for_each(|span| self.queue.access(span, true));
        self.queue.add(order);
    }

    pub(super) fn add(
        &mut self,
        site: &Site,
        lane: u16,
        (what, s): (What, usize),
        deadline: u64,
        task: Task,
        reads: &[Span],
        writes: &[Span],
    ) {
        let name = self.name(site, what, s, None);
        let (step, serial) = (site.step, site.serial);
        let order = Order { lane, task, name, serial, step, deadline, ends_unit: false };
        self.enter(order, reads.iter().copied(), writes.iter().copied());
    }

    /// Adds a copy; its lane follows from where it goes. What is on the disk goes by way of the host's memory.
    pub(super) fn copy(&mut self, site: &Site, what: What, s: usize, m: Option<usize>, spans: Vec<CopySpan>) {
        self.copy_by(site, what, s, m, spans, self.sequence);
    }

    /// The same with a deadline of its own.
    pub(super) fn copy_by(
        &mut self,
        site: &Site,
        what: What,
        s: usize,
        m: Option<usize>,
        mut spans: Vec<CopySpan>,
        deadline: u64,
    ) {
        spans.retain(|c| c.from.bytes > 0);
        self.copy_by_stages(site, what, s, &mut spans, deadline);
        if spans.is_empty() {
            return;
        }
        let lane = match (spans[0].from.memory, spans[0].to.memory) {
            (Memory::Host, _) => site.lanes.h2d,
            (_, Memory::Host) => site.lanes.d2h,
            _ => site.lanes.compute,
        };
        for CopySpan { from, to } in &spans {
            self.queue.access(*from, false);
            self.queue.access(*to, true);
        }
        let name = self.name(site, what, s, m);
        let (step, serial, task) = (site.step, site.serial, Task::Copy(spans));
        self.enter(Order { lane, task, name, serial, step, deadline, ends_unit: false }, [], []);
    }
}
