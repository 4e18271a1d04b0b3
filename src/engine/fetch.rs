//! What a visit fetches: its shard's weights, boundary tensors, the batch. What a slot holds already is not fetched
//! again.

use super::Engine;
use super::rings::BoundaryKey;
use super::site::Site;
use super::tables::Borrow;
use super::visit::Pass;
use crate::device::CopySpan;
use crate::graph::Program;
use crate::spill::BoundaryTier;
use crate::trace::What;

impl Engine {
    /// The slot that holds a shard's weights, after a fetch where none does.
    pub(super) fn fetch_weights(&mut self, site: &Site, s: usize, pass: Pass) -> usize {
        let weights = &mut self.rings[site.rings].weights;
        let key = site.shard(s);
        if let Some(slot) = weights.find(key) {
            if weights.take_mark(slot) {
                self.refresh_borrowed(site, s, slot);
            }
            return slot;
        }
        let (plan, map, host, shard) = (&site.plan, &site.map, &site.plan.host, &site.plan.shards[s].layout);
        // New weights exist once their last use is over, so the slot of the old ones costs no wait, and leaves the
        // others' slots to shards whose update comes sooner.
        let slot = weights.take_back(key).unwrap_or_else(|| weights.take_of(map.weight_slots.of[s].clone(), key, &[]));
        let base = map.weight_slots.at[slot];
        // In pieces where a piece can be of use before the next: at a step's first visit, which begins on what an
        // update has left, and where boundary tensors share the lane, since one that is needed sooner must not stand
        // behind a whole shard.
        let own = shard.own.end - shard.own.start;
        let first_visit = pass != Pass::Backward || site.is_last(s);
        let shared_lane = [plan.choice.activations, plan.choice.gradients].iter().any(|&t| t != BoundaryTier::Device);
        // What a shard at rest has updated is newer there than at home.
        let by_device =
            |b: &Borrow| !plan.choice.resident && b.owner.is_some_and(|(owner, _)| plan.choice.rests(owner));
        let (pieces, borrows) = (&site.tables.pieces[s], &site.tables.borrows[s]);
        let count = if first_visit || shared_lane { pieces.len() } else { 1 };
        for i in 0..count {
            let piece = if count == 1 { 0..own } else { pieces[i].range.clone() };
            let bytes = piece.end - piece.start;
            let from = site.weights(shard.own.start + piece.start, bytes);
            let mut spans = vec![CopySpan { from, to: site.arena(base + piece.start, bytes) }];
            if i + 1 == count {
                for b in borrows.iter().filter(|b| !by_device(b)) {
                    spans.push(CopySpan { from: site.weights(b.flat, b.bytes), to: site.arena(base + b.at, b.bytes) });
                }
                let states = shard.states.end - shard.states.start;
                spans.push(CopySpan {
                    from: site.store(host.states + shard.states.start, states),
                    to: site.arena(base + map.states_at[s], states),
                });
            }
            self.copy(site, What::FetchWeights, s, None, spans);
        }
        for borrow in borrows.iter().filter(|b| by_device(b)) {
            self.bring_borrowed(site, s, slot, borrow);
        }
        slot
    }

    /// Brings the weights that a shard in a slot borrows up to date: from their owner's slot where it is beside it,
    /// else from home.
    fn refresh_borrowed(&mut self, site: &Site, s: usize, slot: usize) {
        for borrow in site.tables.borrows[s].iter().filter(|b| b.owner.is_some()) {
            self.bring_borrowed(site, s, slot, borrow);
        }
    }

    fn bring_borrowed(&mut self, site: &Site, s: usize, slot: usize, borrow: &Borrow) {
        let beside = borrow.owner.and_then(|(owner, in_owner)| {
            let slot = self.rings[site.rings].weights.slot_of(site.shard(owner))?;
            Some(site.map.weight_slots.at[slot] + in_owner)
        });
        let from = match beside {
            Some(at) => site.arena(at, borrow.bytes),
            None => site.weights(borrow.flat, borrow.bytes),
        };
        let to = site.arena(site.map.weight_slots.at[slot] + borrow.at, borrow.bytes);
        self.copy(site, What::FetchWeights, s, None, vec![CopySpan { from, to }]);
    }

    /// The entry that holds a boundary activation, or always does where they stay on the device.
    pub(super) fn activation_entry(&mut self, site: &Site, place: BoundaryKey) -> Option<usize> {
        match site.plan.choice.activations {
            BoundaryTier::Device => Some(place.boundary * site.model.microbatches + place.microbatch),
            BoundaryTier::Host { .. } => self.rings[site.rings].activations.find(place),
        }
    }

    pub(super) fn fetch_activation(&mut self, site: &Site, place: BoundaryKey) -> usize {
        if let Some(entry) = self.activation_entry(site, place) {
            return entry;
        }
        let entry = self.rings[site.rings].activations.take(place, &[]);
        let bytes = site.plan.shards[place.boundary].boundary_bytes;
        let from = site.store(site.plan.host.activations[place.boundary][place.microbatch], bytes);
        let to = site.arena(site.map.activations[entry], bytes);
        self.copy(site, What::FetchBoundary, place.boundary + 1, Some(place.microbatch), vec![CopySpan { from, to }]);
        entry
    }

    pub(super) fn fetch_gradient(&mut self, site: &Site, place: BoundaryKey) -> usize {
        if let Some(entry) = self.rings[site.rings].gradients.find(place) {
            return entry;
        }
        let entry = self.rings[site.rings].gradients.take(place, &[]);
        let bytes = site.plan.shards[place.boundary].boundary_bytes;
        let from = site.store(site.plan.host.gradients[place.boundary][place.microbatch], bytes);
        let to = site.arena(site.map.gradients[entry], bytes);
        self.copy(site, What::FetchBoundary, place.boundary, Some(place.microbatch), vec![CopySpan { from, to }]);
        entry
    }

    /// Brings what a program reads of the batch; returns where it will lie.
    pub(super) fn fetch_inputs(&mut self, site: &Site, s: usize, m: usize, program: &Program) -> u64 {
        let base = site.map.inputs[self.rings[site.rings].input_entry()];
        let staged = &site.plan.host.inputs[site.parity()];
        let spans = program
            .inputs
            .iter()
            .map(|used| CopySpan {
                from: site.store(staged[used.input] + m as u64 * used.bytes, used.bytes),
                to: site.arena(base + used.offset, used.bytes),
            })
            .collect();
        self.copy(site, What::Input, s, Some(m), spans);
        base
    }
}
