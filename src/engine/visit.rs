//! Expands a step into tasks: for every visit of a shard, the fetches before it, a compute task for each microbatch,
//! what leaves after.
//!
//! Tasks are made in the order in which one device with one lane could run them; every overlap comes from lanes running
//! ahead of that order as far as the bytes allow. The visits of a step are F(0) .. F(n-2), the last shard's forward,
//! loss and backward, B(n-2) .. B(0). A visit may be on another device than the one before: what it needs of that one's
//! it fetches from the host's store.

use super::Engine;
use super::member::{Pending, Purpose};
use super::microbatch::Microbatch;
use super::queue::Order;
use super::site::Site;
use crate::device::{AdamwRule, CopySpan, Memory, SgdRule, Span, Task, UpdateRule};
use crate::trace::What;
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
            let microbatch = Microbatch { site, s, m, pass, program: &program };
            self.microbatch(&microbatch, (slot, gradient_slot), pending, ends_unit);
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

    /// Adds a task and books it under its work.
    pub(super) fn enter(
        &mut self,
        order: Order,
        reads: impl IntoIterator<Item = Span>,
        writes: impl IntoIterator<Item = Span>,
    ) {
        let member = &mut self.members[usize::from(order.tag.name.model)];
        member.book(order.tag.serial);
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
        let order = Order { lane, task, tag: site.tag(what, s, None), deadline };
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
        self.enter(Order { lane, task: Task::Copy(spans), tag: site.tag(what, s, m), deadline }, [], []);
    }
}
