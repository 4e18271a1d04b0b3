//! What a unit is predicted to take, from its plan: arithmetic, and the bytes that come before it and leave after it.

use crate::device::sim::CostModel;
use crate::spill::{Home, Placed, update_state_bytes};

/// What several units are predicted to take on the first device.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rest {
    pub secs: f64,
    /// Of those, what must run one after another where microbatches go on from unit to unit.
    pub chain_secs: f64,
    /// Of weights.
    pub bytes: u64,
}

impl Rest {
    /// So many times the same.
    pub fn times(self, times: u64) -> Rest {
        Rest { secs: times as f64 * self.secs, chain_secs: times as f64 * self.chain_secs, bytes: times * self.bytes }
    }

    /// The sum of both.
    pub fn and(self, more: Rest) -> Rest {
        let Rest { secs, chain_secs, bytes } = self;
        Rest { secs: secs + more.secs, chain_secs: chain_secs + more.chain_secs, bytes: bytes + more.bytes }
    }
}

/// What a unit of a training step is predicted to take on the first device.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnitCost {
    pub secs: f64,
    /// Of it and all units after it in the step.
    pub rest: Rest,
    pub weight_bytes: u64,
    pub boundary_bytes: u64,
    pub leave_bytes: u64,
    /// Gradients leave for the host, and occupy their slot until then.
    pub leaves_gradients: bool,
    /// Seconds until the other devices have its last boundary tensor, once the lane out is free.
    pub hand_on_secs: f64,
    /// Where the next step's first unit needs what this one updates: seconds until it has that, once the gradient has
    /// left.
    pub turn_secs: Option<f64>,
    /// That, and the seconds in which the gradient leaves.
    pub wait_secs: f64,
}

/// Predictions for the units of a training step.
pub(super) fn unit_costs(placed: &Placed, cost: &CostModel) -> Vec<UnitCost> {
    let (model, plan) = (&placed.model, &placed.plan);
    let microbatches = model.microbatches as f64;
    let shards = plan.shards.len();
    let units = if plan.shards[0].backward.is_some() { 2 * shards - 1 } else { shards };
    let mut costs: Vec<UnitCost> = (0..units)
        .map(|unit| {
            let (s, backward) = if unit + 1 < shards { (unit, false) } else { (2 * (shards - 1) - unit, true) };
            let shard = &plan.shards[s];
            let rests = plan.choice.rests(s);
            let on_device = plan.choice.updates_on_device(s);
            let secs = if backward { shard.backward_secs(cost) } else { shard.forward_secs(cost) };
            let own = shard.own_bytes();
            let update = match backward && on_device {
                true => model.device_settle_secs(own, plan.updates.moments, cost),
                false => 0.0,
            };
            let idles = backward && shard.idles_back();
            let taken_in =
                if idles { 0 } else { s.checked_sub(1).map_or(0, |before| plan.shards[before].boundary_bytes) };
            let handed_in = if backward && !idles { shard.boundary_bytes } else { 0 };
            let boundary = (taken_in + handed_in) * microbatches as u64;
            let out = match (backward, s.checked_sub(1)) {
                (false, _) => shard.boundary_bytes,
                (true, Some(before)) if !plan.shards[before].idles_back() => taken_in,
                (true, _) => 0,
            };
            let gradient = match backward && !rests {
                true if on_device => own + update_state_bytes(model, &plan.shards, plan.updates.moments, s),
                true => shard.layout.gradient_bytes,
                false => 0,
            };
            let piece = plan.pieces(s).first().map_or(0, |r| r.end - r.start) as f64;
            let update_bytes = model.update_bytes(piece as u64, plan.updates.moments);
            let update_secs = update_bytes as f64 / cost.host_update_bytes_per_sec;
            let first = piece / cost.h2d_bytes_per_sec;
            let turn_secs = if on_device { first } else { update_secs + first };
            let hand_on_secs = out as f64 * (1.0 / cost.d2h_bytes_per_sec + 1.0 / cost.h2d_bytes_per_sec);
            UnitCost {
                secs: secs * microbatches + update,
                rest: Rest::default(),
                weight_bytes: if rests || idles { 0 } else { shard.fetch_bytes() },
                boundary_bytes: if placed.home == Home::Anywhere { boundary } else { 0 },
                leave_bytes: out * microbatches as u64 + gradient,
                leaves_gradients: backward && !on_device,
                hand_on_secs,
                wait_secs: if on_device { 0.0 } else { gradient as f64 / cost.d2h_bytes_per_sec + turn_secs },
                turn_secs: (unit + 1 == units && !rests).then_some(turn_secs),
            }
        })
        .collect();
    let (mut secs, mut bytes, mut longest) = (0.0, 0, 0.0f64);
    for unit in costs.iter_mut().rev() {
        (secs, bytes, longest) = (secs + unit.secs, bytes + unit.weight_bytes, longest.max(unit.secs));
        // One microbatch through all units, and the others through the longest.
        let chain_secs = (secs + (microbatches - 1.0) * longest) / microbatches;
        unit.rest = Rest { secs, chain_secs, bytes };
    }
    costs
}
