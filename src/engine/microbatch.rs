//! One microbatch of a visit: its compute task, and the copies of the boundary tensors that it takes over and hands on.

use super::Engine;
use super::member::{Pending, Purpose};
use super::queue::{Order, Tag};
use super::rings::{BoundaryKey, Spill};
use super::site::Site;
use super::visit::Pass;
use crate::base::align_up;
use crate::device::{CopySpan, Run, Scalars, Span, Task};
use crate::graph::{ALIGNMENT, AREAS, Area, Program};
use crate::spill::BoundaryTier;
use crate::trace::What;
use std::sync::Arc;

/// Microbatch `m` of a visit of shard `s`.
pub(super) struct Microbatch<'a> {
    pub site: &'a Site,
    pub s: usize,
    pub m: usize,
    pub pass: Pass,
    pub program: &'a Arc<Program>,
}

impl Microbatch<'_> {
    /// The boundary tensors before and behind the shard.
    fn places(&self) -> [Option<BoundaryKey>; 2] {
        let before = self.s.checked_sub(1).map(|before| self.site.place(before, self.m));
        let behind = (!self.site.is_last(self.s)).then(|| self.site.place(self.s, self.m));
        [before, behind]
    }

    fn what(&self) -> What {
        match self.pass {
            Pass::Evaluate => What::Eval,
            Pass::Forward => What::Forward,
            Pass::Backward if self.site.is_last(self.s) => What::LastUnit,
            Pass::Backward => What::Backward,
        }
    }

    /// Where what the unit before hands over is at home, for models whose units follow each other from device to
    /// device: with the last microbatch's, all of it is there.
    fn handed_over(&self) -> Option<Span> {
        let (plan, last) = (&self.site.plan, self.site.model.microbatches - 1);
        if self.m > 0 || !plan.choice.crosses || plan.choice.pipelined {
            return None;
        }
        let at = match (self.pass, self.s.checked_sub(1)) {
            (Pass::Backward, _) if !self.site.is_last(self.s) => plan.host.gradients[self.s][last],
            (_, before) => plan.host.activations[before?][last],
        };
        Some(self.site.store(at, 1))
    }
}

/// Where the areas of a microbatch's program lie, and which of them its task reads and which it writes.
struct Operands {
    bases: [u64; AREAS],
    reads: [Option<Span>; AREAS],
    writes: [Option<Span>; AREAS],
}

impl Operands {
    /// Those that stay where they are for the whole visit.
    fn of_visit(of: &Microbatch, slot: usize, gradient_slot: usize) -> Operands {
        let &Microbatch { site, s, m, pass, .. } = of;
        let map = &site.map;
        let mut operands = Operands { bases: [0; AREAS], reads: [None; AREAS], writes: [None; AREAS] };
        // All programs of a device have one workspace, and an evaluation's logits lie in it until they have left.
        operands.write(of, Area::Workspace, map.workspace);
        let weights = map.weight_slots.at[slot];
        operands.read(of, Area::Weights, weights);
        let states = weights + map.states_at[s];
        match pass {
            Pass::Evaluate => operands.read(of, Area::States, states),
            Pass::Forward | Pass::Backward => operands.write(of, Area::States, states),
        };
        if pass == Pass::Backward {
            operands.write(of, Area::Gradients, map.gradient_slots.at[gradient_slot]);
        }
        if site.is_last(s) && pass != Pass::Forward {
            operands.write(of, Area::Results, map.losses[site.parity()] + 4 * m as u64);
        }
        match (pass, map.saved[s].get(m)) {
            (Pass::Forward, Some(&saved)) => _ = operands.write(of, Area::Saved, saved),
            (Pass::Backward, Some(&saved)) => _ = operands.read(of, Area::Saved, saved),
            (Pass::Evaluate, _) | (_, None) => {}
        }
        operands
    }

    fn place(&mut self, of: &Microbatch, area: Area, base: u64) -> Span {
        self.bases[area as usize] = base;
        of.site.arena(base, of.program.bytes(area))
    }

    fn read(&mut self, of: &Microbatch, area: Area, base: u64) -> Span {
        let span = self.place(of, area, base);
        *self.reads[area as usize].insert(span)
    }

    fn write(&mut self, of: &Microbatch, area: Area, base: u64) -> Span {
        let span = self.place(of, area, base);
        *self.writes[area as usize].insert(span)
    }
}

/// Boundary tensors that a microbatch takes over and hands on.
#[derive(Default)]
struct Boundaries {
    /// The activation that is for the next shard, and where it is made.
    activation: Option<(BoundaryKey, Span)>,
    /// The gradient that the next shard has left.
    came: Option<BoundaryKey>,
    /// The gradient that is for the shard before, and where it is made.
    gradient: Option<(BoundaryKey, Span)>,
    /// An evaluation's logits.
    logits: Option<Span>,
}

impl Engine {
    /// Makes the compute task of one microbatch of a visit that holds these slots, with the copies of its boundary
    /// tensors.
    pub(super) fn microbatch(
        &mut self,
        of: &Microbatch,
        (slot, gradient_slot): (usize, usize),
        pending: &Pending,
        ends_unit: bool,
    ) {
        let &Microbatch { site, s, m, program, .. } = of;
        let mut operands = Operands::of_visit(of, slot, gradient_slot);
        // What the task before in this shard hands over is brought first, then what the batch brings.
        let boundaries = self.boundaries(of, &mut operands);
        if !program.inputs.is_empty() {
            let base = self.fetch_inputs(site, s, m, program);
            operands.read(of, Area::Inputs, base);
        }
        let scalars = Scalars {
            seed: self.members[site.member].options.seed,
            step: site.step as u32,
            microbatch: m as u32,
            loss_scale: pending.loss_scale,
            accumulate: m > 0,
        };
        let Operands { bases, reads, writes } = operands;
        let check = pending.purpose == Purpose::Check;
        let run = Run { program: Arc::clone(program), device: site.device, bases, scalars, check };
        let tag = Tag { ends_unit, ..site.tag(of.what(), s, Some(m)) };
        let order = Order { lane: site.lanes.compute, task: Task::Run(Box::new(run)), tag, deadline: self.sequence };
        let maker = self.queue.next_id();
        let reads = reads.into_iter().chain([of.handed_over()]).flatten();
        self.enter(order, reads, writes.into_iter().flatten());
        self.hand_on(of, &boundaries, Spill { task: maker + 1, maker });
        self.sequence += 1;
    }

    /// Finds entries for the boundary tensors, and fetches those that are not there.
    fn boundaries(&mut self, of: &Microbatch, operands: &mut Operands) -> Boundaries {
        let &Microbatch { site, pass, program, .. } = of;
        let map = &site.map;
        let has = |area: Area| program.bytes(area) > 0;
        let [before, behind] = of.places();
        let mut found = Boundaries::default();
        let came = before.filter(|_| has(Area::ActivationIn));
        if let Some(place) = came {
            let entry = self.fetch_activation(site, place);
            operands.read(of, Area::ActivationIn, map.activations[entry]);
        }
        if let Some(place) = behind.filter(|_| pass != Pass::Backward) {
            let entry = self.activation_entry(site, place);
            let take = || self.rings[site.rings].activations.take(place, &[came.unwrap_or(place)]);
            let entry = entry.unwrap_or_else(take);
            found.activation = Some((place, operands.write(of, Area::ActivationOut, map.activations[entry])));
        }
        if pass == Pass::Evaluate && behind.is_none() && has(Area::ActivationOut) {
            // Logits are handed on to nobody: they lie over the workspace's end, where the map of an evaluation leaves
            // room.
            let at = map.workspace + align_up(program.bytes(Area::Workspace), ALIGNMENT);
            found.logits = Some(operands.write(of, Area::ActivationOut, at));
        }
        if pass == Pass::Backward {
            found.came = behind.filter(|_| has(Area::GradientIn));
            if let Some(place) = found.came {
                let entry = self.fetch_gradient(site, place);
                operands.read(of, Area::GradientIn, map.gradients[entry]);
            }
            if let Some(place) = before.filter(|_| has(Area::GradientOut)) {
                let entry = self.rings[site.rings].gradients.take(place, &[found.came.unwrap_or(place)]);
                found.gradient = Some((place, operands.write(of, Area::GradientOut, map.gradients[entry])));
            }
        }
        found
    }

    /// Copies home what others may fetch from there, and drops such copies of what has been used up; `spill` is the
    /// next task to be made, and the one that makes what it copies.
    fn hand_on(&mut self, of: &Microbatch, boundaries: &Boundaries, spill: Spill) {
        let &Microbatch { site, s, m, pass, .. } = of;
        let plan = &site.plan;
        if let Some((place, from)) = boundaries.activation
            && plan.choice.activations != BoundaryTier::Device
        {
            let to = site.store(plan.host.activations[place.boundary][place.microbatch], from.bytes);
            self.copy(site, What::SpillBoundary, s, Some(m), vec![CopySpan { from, to }]);
            self.rings[site.rings].activations.note_spill(place, spill);
        }
        if let Some((place, from)) = boundaries.gradient
            && plan.choice.gradients != BoundaryTier::Device
        {
            let to = site.store(plan.host.gradients[place.boundary][place.microbatch], from.bytes);
            self.copy(site, What::SpillBoundary, s, Some(m), vec![CopySpan { from, to }]);
            self.rings[site.rings].gradients.note_spill(place, spill);
        }
        // What its last reader finds where it was made need not go home any more.
        if let Some(spill) = boundaries.came.and_then(|place| self.rings[site.rings].gradients.let_go(place)) {
            self.drop_spill(site, spill);
        }
        if pass != Pass::Forward
            && plan.choice.activations != BoundaryTier::Device
            && let [Some(before), _] = of.places()
            && let Some(spill) = self.rings[site.rings].activations.let_go(before)
        {
            self.drop_spill(site, spill);
        }
        if let Some(from) = boundaries.logits {
            let to = site.store(plan.host.logits, from.bytes);
            self.copy(site, What::Result, s, Some(m), vec![CopySpan { from, to }]);
        }
    }

    /// Drops a copy of a boundary tensor that nobody will fetch, unless it has begun.
    fn drop_spill(&mut self, site: &Site, spill: Spill) {
        if let Some(serial) = self.queue.drop_copy(spill.task, spill.maker) {
            self.members[site.member].unbook(serial);
        }
    }
}
