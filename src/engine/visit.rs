//! Expands a step into tasks: for every visit of a shard, the fetches before it, a compute task for each microbatch, what leaves after.
//!
//! Tasks are made in the order in which one device with one lane could run them; every overlap comes from lanes running ahead of that
//! order as far as the bytes allow. The visits of a step are F(0) .. F(n-2), the last shard's forward, loss and backward, B(n-2) .. B(0).

use super::queue::Order;
use super::rings::Place;
use super::{Engine, StepInput};
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
struct Unit {
    shard: usize,
    pass: Pass,
    microbatches: Range<usize>,
}

/// What a visit does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
    Evaluate,
}

/// What is common to the visits of a step.
#[derive(Clone, Copy, Debug)]
struct Context {
    step: u64,
    loss_scale: f64,
    check: bool,
}

impl Engine {
    /// Makes the tasks of a training step.
    pub(super) fn expand_step(&mut self, input: &StepInput) {
        let n = self.plan.shards.len();
        let context = Context { step: input.step, loss_scale: input.loss_scale, check: false };
        for s in 0..n - 1 {
            self.visit(&self.unit(s, Pass::Forward), context);
        }
        let mut updates = Vec::new();
        let next_step = self.sequence + (n * self.model.microbatches) as u64;
        for s in (0..n).rev() {
            let slot = self.visit(&self.unit(s, Pass::Backward), context);
            if s == n - 1 && !self.plan.choice.resident {
                self.result(input.step);
            }
            if self.plan.choice.resident {
                continue;
            }
            self.spill_gradient(s, slot, input.step);
            // Without clipping nobody but the report waits for the norm: it gives way to the updates, of which the first shard's is
            // needed first in the next step.
            match input.clip {
                None => {
                    self.join_and_norm(s, input.step, next_step + (n * self.model.microbatches) as u64);
                    self.update(s, input, next_step + (s * self.model.microbatches) as u64);
                }
                Some(_) => {
                    self.join_and_norm(s, input.step, self.sequence);
                    updates.push(s);
                }
            }
        }
        for s in updates.into_iter().rev() {
            self.update(s, input, next_step + (s * self.model.microbatches) as u64);
        }
        if self.plan.choice.resident {
            for s in (0..n).rev() {
                self.join_and_norm(s, input.step, self.sequence);
            }
            self.result(input.step);
            for s in 0..n {
                self.update(s, input, self.sequence);
            }
        }
    }

    /// Makes the tasks of a forward pass that looks for the first layer whose output is not finite.
    pub(super) fn expand_check(&mut self, step: u64) {
        let n = self.plan.shards.len();
        let context = Context { step, loss_scale: 1.0, check: true };
        for s in 0..n {
            let pass = if s + 1 == n { Pass::Backward } else { Pass::Forward };
            self.visit(&self.unit(s, pass), context);
        }
    }

    /// Makes the tasks of an evaluation of one minibatch; losses, or the logits of microbatch 0, end in the host's store.
    pub(super) fn expand_evaluation(&mut self, step: u64, loss_scale: f64) {
        let n = self.plan.shards.len();
        for s in 0..n {
            self.visit(&self.unit(s, Pass::Evaluate), Context { step, loss_scale, check: false });
        }
        if self.model.eval.as_ref().is_some_and(|g| g.loss.is_some()) {
            self.result(step);
        }
    }

    /// A visit of all microbatches.
    fn unit(&self, shard: usize, pass: Pass) -> Unit {
        Unit { shard, pass, microbatches: 0..self.model.microbatches }
    }

    /// Makes the tasks of one visit and returns the gradient slot that it filled.
    fn visit(&mut self, unit: &Unit, context: Context) -> usize {
        let (s, pass) = (unit.shard, unit.pass);
        let plan = Arc::clone(&self.plan);
        let shard = &plan.shards[s];
        let last = s + 1 == plan.shards.len();
        let program = match pass {
            Pass::Forward => shard.forward.as_ref(),
            Pass::Backward => shard.backward.as_ref(),
            Pass::Evaluate => shard.eval.as_ref(),
        };
        let program = Arc::clone(program.expect("a model has the programs of every pass that it is asked for"));
        let slot = self.fetch_weights(s, pass, context.step);
        let gradient_slot = if plan.choice.resident { s } else { self.rings.gradient_slot() };
        for m in unit.microbatches.clone() {
            self.microbatch(s, m, pass, &program, slot, gradient_slot, context);
        }
        let states = shard.layout.states.end - shard.layout.states.start;
        let changes_states = pass == Pass::Forward || (pass == Pass::Backward && last);
        if changes_states && states > 0 && !plan.choice.resident {
            let from = self.arena(plan.arena.weight_slots[slot] + plan.arena.states_at[s], states);
            let to = self.store(plan.host.states + shard.layout.states.start, states);
            self.copy(What::SpillState, s, None, context.step, vec![CopySpan { from, to }]);
        }
        gradient_slot
    }

    /// Makes the compute task of one microbatch of a visit, with the copies of its boundary tensors.
    fn microbatch(
        &mut self,
        s: usize,
        m: usize,
        pass: Pass,
        program: &Arc<Program>,
        slot: usize,
        gradient_slot: usize,
        context: Context,
    ) {
        let plan = Arc::clone(&self.plan);
        let (last, step) = (s + 1 == plan.shards.len(), context.step);
        let mut bases = [0; AREAS];
        let mut reads: [Option<Span>; 8] = [None; 8];
        let mut writes: [Option<Span>; 8] = [None; 8];
        let mut set = |area: Area, base: u64| {
            bases[area as usize] = base;
            self.arena(base, program.bytes(area))
        };
        set(Area::Workspace, plan.arena.workspace);
        reads[0] = Some(set(Area::Weights, plan.arena.weight_slots[slot]));
        let states = set(Area::States, plan.arena.weight_slots[slot] + plan.arena.states_at[s]);
        if pass == Pass::Evaluate {
            reads[1] = Some(states)
        } else {
            writes[0] = Some(states)
        }
        if pass == Pass::Backward {
            writes[1] = Some(set(Area::Gradients, plan.arena.gradient_slots[gradient_slot]));
        }
        if last && pass != Pass::Forward {
            writes[2] = Some(set(Area::Results, plan.arena.losses[(step % 2) as usize] + 4 * m as u64));
        }
        if let Some(&saved) = plan.arena.saved[s].get(m)
            && pass != Pass::Evaluate
        {
            let span = set(Area::Saved, saved);
            if pass == Pass::Forward { writes[3] = Some(span) } else { reads[2] = Some(span) }
        }
        // What the task before in this shard hands over is brought first, then what the batch brings.
        let place_in: Option<Place> = s.checked_sub(1).map(|before| (before, m));
        let place_out: Option<Place> = (!last).then_some((s, m));
        let mut pinned: [Option<Place>; 2] = [None; 2];
        if let Some(place) = place_in.filter(|_| program.bytes(Area::ActivationIn) > 0) {
            let entry = self.fetch_activation(place, step);
            bases[Area::ActivationIn as usize] = plan.arena.activations[entry];
            reads[3] = Some(self.arena(plan.arena.activations[entry], program.bytes(Area::ActivationIn)));
            pinned[0] = Some(place);
        }
        if let Some(place) = place_out.filter(|_| pass != Pass::Backward) {
            let entry = match self.rings.activations.find(place) {
                Some(entry) => entry,
                None => self.rings.activations.take(place, &pinned.map(|p| p.unwrap_or(place))),
            };
            bases[Area::ActivationOut as usize] = plan.arena.activations[entry];
            writes[4] = Some(self.arena(plan.arena.activations[entry], program.bytes(Area::ActivationOut)));
        }
        if pass == Pass::Evaluate && last && program.bytes(Area::ActivationOut) > 0 {
            // Logits are handed on to nobody: they lie over the workspace's end, where the map of an evaluation leaves room.
            let at =
                plan.arena.workspace + crate::base::align_up(program.bytes(Area::Workspace), crate::graph::ALIGNMENT);
            bases[Area::ActivationOut as usize] = at;
            writes[4] = Some(self.arena(at, program.bytes(Area::ActivationOut)));
        }
        let mut grad_in = None;
        if let Some(place) = place_out.filter(|_| pass == Pass::Backward && program.bytes(Area::GradientIn) > 0) {
            let entry = self.fetch_gradient(place, step);
            bases[Area::GradientIn as usize] = plan.arena.gradients[entry];
            reads[4] = Some(self.arena(plan.arena.gradients[entry], program.bytes(Area::GradientIn)));
            grad_in = Some(place);
        }
        let mut grad_out = None;
        if let Some(place) = place_in.filter(|_| pass == Pass::Backward && program.bytes(Area::GradientOut) > 0) {
            let entry = self.rings.gradients.take(place, &[grad_in.unwrap_or(place)]);
            bases[Area::GradientOut as usize] = plan.arena.gradients[entry];
            let span = self.arena(plan.arena.gradients[entry], program.bytes(Area::GradientOut));
            writes[5] = Some(span);
            grad_out = Some((place, span));
        }
        if !program.inputs.is_empty() {
            let base = self.fetch_inputs(s, m, program, step);
            bases[Area::Inputs as usize] = base;
            reads[5] = Some(self.arena(base, program.bytes(Area::Inputs)));
        }
        let scalars = Scalars {
            seed: self.options.seed,
            step: step as u32,
            microbatch: m as u32,
            loss_scale: context.loss_scale,
            accumulate: m > 0,
        };
        let what = match pass {
            Pass::Evaluate => What::Eval,
            Pass::Forward => What::Forward,
            Pass::Backward if last => What::LastUnit,
            Pass::Backward => What::Backward,
        };
        let run = Run { program: Arc::clone(program), device: 0, bases, scalars, check: context.check };
        let spans = |list: [Option<Span>; 8]| list.into_iter().flatten().filter(|s| s.bytes > 0).collect::<Vec<_>>();
        let lane = self.lanes.compute;
        self.add(lane, what, s, Some(m), step, self.sequence, Task::Run(Box::new(run)), &spans(reads), &spans(writes));
        if let (Some(place), Some(from)) = (place_out.filter(|_| pass != Pass::Backward), writes[4])
            && plan.choice.activations != BoundaryTier::Device
        {
            let to = self.store(plan.host.activations[place.0][place.1], from.bytes);
            self.copy(What::SpillBoundary, s, Some(m), step, vec![CopySpan { from, to }]);
        }
        if let Some((place, from)) = grad_out
            && plan.choice.gradients != BoundaryTier::Device
        {
            let to = self.store(plan.host.gradients[place.0][place.1], from.bytes);
            self.copy(What::SpillBoundary, s, Some(m), step, vec![CopySpan { from, to }]);
        }
        if let Some(place) = grad_in {
            self.rings.gradients.forget(|p| p == place);
        }
        if pass != Pass::Forward
            && plan.choice.activations != BoundaryTier::Device
            && let Some(place) = place_in
        {
            self.rings.activations.forget(|p| p == place);
        }
        if pass == Pass::Evaluate && last && program.bytes(Area::ActivationOut) > 0 {
            let from = writes[4].expect("set above");
            let to = self.store(plan.host.logits, from.bytes);
            self.copy(What::Result, s, Some(m), step, vec![CopySpan { from, to }]);
        }
        self.sequence += 1;
    }

    pub(super) fn arena(&self, offset: u64, bytes: u64) -> Span {
        Span { memory: Memory::Device(0), offset, bytes }
    }

    pub(super) fn store(&self, offset: u64, bytes: u64) -> Span {
        Span { memory: Memory::Host, offset, bytes }
    }

    pub(super) fn add(
        &mut self,
        lane: u16,
        what: What,
        s: usize,
        m: Option<usize>,
        step: u64,
        deadline: u64,
        task: Task,
        reads: &[Span],
        writes: &[Span],
    ) {
        let microbatch = m.filter(|_| self.model.microbatches > 1).map(|m| m as u16);
        let name = TaskName { what, model: self.options.model, shard: s as u16, microbatch };
        self.queue.add(Order { lane, task, name, step, deadline }, reads, writes);
    }

    /// Adds a copy; its lane follows from where it goes.
    pub(super) fn copy(&mut self, what: What, s: usize, m: Option<usize>, step: u64, mut spans: Vec<CopySpan>) {
        spans.retain(|c| c.from.bytes > 0);
        if spans.is_empty() {
            return;
        }
        let lane = match (spans[0].from.memory, spans[0].to.memory) {
            (Memory::Host, _) => self.lanes.h2d,
            (_, Memory::Host) => self.lanes.d2h,
            _ => self.lanes.compute,
        };
        let (reads, writes): (Vec<Span>, Vec<Span>) = spans.iter().map(|c| (c.from, c.to)).unzip();
        self.add(lane, what, s, m, step, self.sequence, Task::Copy(spans), &reads, &writes);
    }

    /// The slot that holds a shard's weights, after a fetch where none does.
    fn fetch_weights(&mut self, s: usize, pass: Pass, step: u64) -> usize {
        if let Some(slot) = self.rings.weights.find(s) {
            return slot;
        }
        let plan = Arc::clone(&self.plan);
        let (arena, host, shard) = (&plan.arena, &plan.host, &plan.shards[s].layout);
        let slot = if plan.choice.resident {
            self.rings.weights.pin(s, s);
            s
        } else {
            // New weights exist once their last use is over, so the slot of the old ones costs no wait, and leaves the others' slots to
            // shards whose update comes sooner.
            self.rings.weights.take_back(s).unwrap_or_else(|| self.rings.weights.take(s, &[]))
        };
        let base = arena.weight_slots[slot];
        // In pieces where a piece can be of use before the next: at a step's first visit, which begins on what an update has left, and
        // where boundary tensors share the lane, since one that is needed sooner must not stand behind a whole shard.
        let own = shard.own.end - shard.own.start;
        let first_visit = pass != Pass::Backward || s + 1 == plan.shards.len();
        let shared_lane = [plan.choice.activations, plan.choice.gradients].iter().any(|&t| t != BoundaryTier::Device);
        let count = if first_visit || shared_lane { self.visits.pieces[s].len() } else { 1 };
        for i in 0..count {
            let piece = if count == 1 { 0..own } else { self.visits.pieces[s][i].range.clone() };
            let bytes = piece.end - piece.start;
            let from = self.store(host.weights + shard.own.start + piece.start, bytes);
            let mut spans = vec![CopySpan { from, to: self.arena(base + piece.start, bytes) }];
            if i + 1 == count {
                for b in &self.visits.borrows[s] {
                    spans.push(CopySpan {
                        from: self.store(host.weights + b.flat, b.bytes),
                        to: self.arena(base + b.at, b.bytes),
                    });
                }
                let states = shard.states.end - shard.states.start;
                spans.push(CopySpan {
                    from: self.store(host.states + shard.states.start, states),
                    to: self.arena(base + arena.states_at[s], states),
                });
            }
            self.copy(What::FetchWeights, s, None, step, spans);
        }
        slot
    }

    fn fetch_activation(&mut self, place: Place, step: u64) -> usize {
        if let Some(entry) = self.rings.activations.find(place) {
            return entry;
        }
        let plan = Arc::clone(&self.plan);
        let entry = self.rings.activations.take(place, &[]);
        let bytes = plan.shards[place.0].boundary_bytes;
        let from = self.store(plan.host.activations[place.0][place.1], bytes);
        let to = self.arena(plan.arena.activations[entry], bytes);
        self.copy(What::FetchBoundary, place.0 + 1, Some(place.1), step, vec![CopySpan { from, to }]);
        entry
    }

    fn fetch_gradient(&mut self, place: Place, step: u64) -> usize {
        if let Some(entry) = self.rings.gradients.find(place) {
            return entry;
        }
        let plan = Arc::clone(&self.plan);
        let entry = self.rings.gradients.take(place, &[]);
        let bytes = plan.shards[place.0].boundary_bytes;
        let from = self.store(plan.host.gradients[place.0][place.1], bytes);
        let to = self.arena(plan.arena.gradients[entry], bytes);
        self.copy(What::FetchBoundary, place.0, Some(place.1), step, vec![CopySpan { from, to }]);
        entry
    }

    /// Brings what a program reads of the batch; returns where it will lie.
    fn fetch_inputs(&mut self, s: usize, m: usize, program: &Program, step: u64) -> u64 {
        let plan = Arc::clone(&self.plan);
        let base = plan.arena.inputs[self.rings.input_entry()];
        let staged = &plan.host.inputs[(step % 2) as usize];
        let spans = program
            .inputs
            .iter()
            .map(|used| CopySpan {
                from: self.store(staged[used.input] + m as u64 * used.bytes, used.bytes),
                to: self.arena(base + used.offset, used.bytes),
            })
            .collect();
        self.copy(What::Input, s, Some(m), step, spans);
        base
    }
}
