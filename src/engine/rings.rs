//! Which shard's weights, which boundary tensor, each slot of the arena holds: decided in program order, when tasks are created.
//!
//! Invariant: a slot names what it will hold once all tasks created so far have run. Whether it may be overwritten yet is not decided
//! here: the bytes' own history does that (`hazards`).

use crate::spill::{BoundaryTier, Plan};

/// Slots that are handed out again in the order of their last use.
#[derive(Debug)]
pub(super) struct Slots<K> {
    holds: Vec<Option<K>>,
    /// What it held last, forgotten or not.
    held: Vec<Option<K>>,
    used: Vec<u64>,
    clock: u64,
}

impl<K: Copy + PartialEq> Slots<K> {
    fn new(count: usize) -> Self {
        let nothing = || (0..count).map(|_| None).collect();
        Slots { holds: nothing(), held: nothing(), used: vec![0; count], clock: 0 }
    }

    /// The slot that holds `key`, which counts as a use.
    pub fn find(&mut self, key: K) -> Option<usize> {
        let slot = self.holds.iter().position(|&h| h == Some(key))?;
        self.touch(slot);
        Some(slot)
    }

    /// A slot for `key`: an empty one if there is one, else the least recently used; never one that holds any of `pinned`.
    pub fn take(&mut self, key: K, pinned: &[K]) -> usize {
        let free = (0..self.holds.len()).filter(|&s| self.holds[s].is_none_or(|h| !pinned.contains(&h)));
        let slot = free
            .min_by_key(|&s| (self.holds[s].is_some(), self.used[s]))
            .expect("a ring has more entries than a task pins");
        self.pin(slot, key);
        slot
    }

    /// The empty slot that held `key` last, for `key` again.
    pub fn take_back(&mut self, key: K) -> Option<usize> {
        let slot = (0..self.holds.len()).find(|&s| self.holds[s].is_none() && self.held[s] == Some(key))?;
        self.pin(slot, key);
        Some(slot)
    }

    /// Puts `key` into a slot of its own.
    pub fn pin(&mut self, slot: usize, key: K) {
        (self.holds[slot], self.held[slot]) = (Some(key), Some(key));
        self.touch(slot);
    }

    /// Whether `slot` holds `key`.
    pub fn has(&self, slot: usize, key: K) -> bool {
        self.holds[slot] == Some(key)
    }

    /// Forgets what satisfies `stale`.
    pub fn forget(&mut self, stale: impl Fn(K) -> bool) {
        self.holds.iter_mut().for_each(|h| *h = h.filter(|&k| !stale(k)));
    }

    fn touch(&mut self, slot: usize) {
        self.clock += 1;
        self.used[slot] = self.clock;
    }
}

/// A boundary tensor: the boundary after a shard, and the microbatch.
pub(super) type Place = (usize, usize);

/// All slots of an arena.
#[derive(Debug)]
pub(super) struct Rings {
    /// Weight slots, by shard.
    pub weights: Slots<usize>,
    /// Boundary activations.
    pub activations: Slots<Place>,
    /// Boundary gradients.
    pub gradients: Slots<Place>,
    /// Next entry for the batch's tensors.
    next_input: usize,
    inputs: usize,
    /// Next gradient slot.
    next_gradient: usize,
    gradient_slots: usize,
    /// Resident: remainders and moments have been brought to the device.
    pub state_fetched: bool,
}

impl Rings {
    pub fn new(plan: &Plan, microbatches: usize) -> Self {
        let mut rings = Rings {
            weights: Slots::new(plan.arena.weight_slots.len()),
            activations: Slots::new(plan.arena.activations.len()),
            gradients: Slots::new(plan.arena.gradients.len()),
            next_input: 0,
            inputs: plan.arena.inputs.len(),
            next_gradient: 0,
            gradient_slots: plan.arena.gradient_slots.len(),
            state_fetched: false,
        };
        if plan.choice.activations == BoundaryTier::Device {
            for entry in 0..plan.arena.activations.len() {
                rings.activations.pin(entry, (entry / microbatches, entry % microbatches));
            }
        }
        rings
    }

    /// The next entry for the batch's tensors.
    pub fn input_entry(&mut self) -> usize {
        self.next_input = (self.next_input + 1) % self.inputs.max(1);
        self.next_input
    }

    /// The next gradient slot.
    pub fn gradient_slot(&mut self) -> usize {
        self.next_gradient = (self.next_gradient + 1) % self.gradient_slots.max(1);
        self.next_gradient
    }

    /// Forgets every copy whose home is in the host's store.
    pub fn forget_all(&mut self, plan: &Plan) {
        if !plan.choice.resident {
            self.weights.forget(|_| true);
        }
        if plan.choice.activations != BoundaryTier::Device {
            self.activations.forget(|_| true);
        }
        self.gradients.forget(|_| true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_go_to_the_least_recently_used_and_back_to_their_shard() {
        let mut slots = Slots::new(2);
        assert_eq!((slots.take(0, &[]), slots.take(1, &[])), (0, 1));
        assert_eq!(slots.find(0), Some(0));
        assert_eq!(slots.take(2, &[]), 1, "shard 1 was used before shard 0");
        assert_eq!(slots.take_back(0), None, "shard 0 is still there");
        slots.forget(|_| true);
        assert_eq!((slots.find(2), slots.take_back(1)), (None, None), "shard 1's slot held another since");
        assert_eq!((slots.take_back(2), slots.take_back(0)), (Some(1), Some(0)));
    }
}
