//! A model's chain of units as a policy sees it: what is left of it, and what its next unit takes in.

use super::Turns;
use crate::device::sim::CostModel;
use crate::engine::member::{Ending, Member, Pending, Purpose};
use crate::engine::unit_cost::{Rest, UnitCost, unit_costs};
use crate::engine::visit::Pass;
use crate::sched::Claim;
use crate::spill::Placed;

/// A model's units: what they are predicted to take, and the next of them.
pub(super) struct Chain {
    /// Predictions, by unit of a step.
    pub costs: Vec<UnitCost>,
    /// Measured seconds over predicted ones.
    pub correction: f64,
    /// The unit of its step that comes next.
    pub next: usize,
    pub ready: Ready,
    pub wanted: Wanted,
}

/// When the next unit can have fetched what the last one leaves behind.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ready {
    pub weights: f64,
    /// The same for weights that a slot keeps: an update elsewhere has to come back to it.
    pub held: f64,
    pub boundary: f64,
    /// The first microbatch's.
    pub first: f64,
}

/// What the next unit takes in.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    /// Of the step or evaluation that it belongs to.
    pub serial: u64,
    pub shard: usize,
    /// It is a backward, which wants the gradient of its boundary too.
    pub backward: bool,
    /// Bytes of one microbatch's activation, and of its gradient.
    pub activation_bytes: u64,
    pub gradient_bytes: u64,
}

impl Chain {
    pub fn new(placed: &Placed, cost: &CostModel) -> Chain {
        let costs = unit_costs(placed, cost);
        Chain { costs, correction: 1.0, next: 0, ready: Ready::default(), wanted: Wanted::default() }
    }

    /// What is left of a piece of work.
    fn rest_of(&self, work: &Pending) -> Rest {
        match work.purpose {
            Purpose::Step { .. } => self.costs.get(work.made).map_or(Rest::default(), |unit| unit.rest),
            // An evaluation's unit costs what a forward does; what is left to train comes on top.
            Purpose::Evaluation | Purpose::Check => {
                let UnitCost { secs, weight_bytes, .. } = self.costs[self.next];
                Rest { secs, chain_secs: secs, bytes: weight_bytes }
            }
        }
    }
}

impl Turns {
    /// Brings the view of a model up to date.
    pub fn refresh(&mut self, model: usize, member: &Member) {
        let next = member.next_work().filter(|_| !member.over).map(|at| &member.pending[at]);
        match next {
            Some(work) => self.refresh_unit(model, member, work),
            None => self.models[model].claim = Claim::Away,
        }
        let (view, chain) = (&mut self.models[model], &self.chains[model]);
        let steps = member.steps_to_begin();
        let begun = member.pending.iter().filter(|_| next.is_some());
        let rest = begun.map(|work| chain.rest_of(work)).fold(chain.costs[0].rest.times(steps), Rest::and);
        view.remaining_secs = rest.secs * chain.correction;
        view.remaining_chain_secs = rest.chain_secs * chain.correction;
        view.remaining_bytes = rest.bytes;
        let is_step = |p: &&Pending| p.made < p.units && matches!(p.purpose, Purpose::Step { .. });
        let turns = (steps as usize + member.pending.iter().filter(is_step).count()).saturating_sub(1);
        view.remaining_wait_secs = turns as f64 * chain.costs[chain.costs.len() - 1].wait_secs;
    }

    /// The same of its next unit, which belongs to this work.
    fn refresh_unit(&mut self, model: usize, member: &Member, work: &Pending) {
        let (view, chain) = (&mut self.models[model], &mut self.chains[model]);
        let shards = &member.plan.shards;
        let visit = work.unit(work.made, shards.len(), member.model.microbatches);
        let (shard, backward) = (visit.shard, visit.pass == Pass::Backward);
        chain.next = if backward { 2 * (shards.len() - 1) - shard } else { shard };
        let hands_back = backward && shard + 1 < shards.len();
        chain.wanted = Wanted {
            serial: work.serial,
            shard,
            backward,
            activation_bytes: shard.checked_sub(1).map_or(0, |before| shards[before].boundary_bytes),
            gradient_bytes: if hands_back { shards[shard].boundary_bytes } else { 0 },
        };
        let unit = &chain.costs[chain.next];
        view.unit_secs = unit.secs * chain.correction;
        view.microbatches = member.model.microbatches as u32;
        (view.shard, view.unit, view.units) = (shard as u16, chain.next as u16, chain.costs.len() as u16);
        view.boundary_bytes = unit.boundary_bytes;
        view.leave_bytes = unit.leave_bytes;
        view.leaves_gradients = unit.leaves_gradients && backward;
        view.weight_bytes = unit.weight_bytes;
        view.pinned = member.home_of(shard);
        // Its last unit is the last to end, whoever has it.
        let claimed = |&device: &u16| self.queues[usize::from(device)].units.iter().any(|c| c.model == model);
        view.claim = match member.ending {
            Some(Ending::Cancelled | Ending::NotFinite { .. }) => Claim::Away,
            Some(Ending::Checking { .. }) | None => view.last_device.filter(claimed).map_or(Claim::Idle, Claim::By),
        };
    }
}
