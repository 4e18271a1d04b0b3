//! Which shard's weights, which boundary tensor, each slot of an arena holds: decided in program order, when tasks are
//! created.
//!
//! Models whose shards run on any device share a device's slots; a model at home on a device has slots of its own
//! there.
//! Invariant: a slot names what it will hold once all tasks created so far have run. Whether it may be overwritten yet
//! is not decided here: the bytes' own history does that (`hazards`).

use super::hazards::TaskId;
use crate::spill::ArenaMap;
use std::ops::Range;

/// A copy of what a slot holds to its place at home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spill {
    pub task: TaskId,
    /// The compute task that writes what it copies.
    pub maker: TaskId,
}

/// What a slot holds.
#[derive(Clone, Debug)]
struct Slot<K> {
    holds: Option<K>,
    /// What it held last, forgotten or not.
    held: Option<K>,
    /// What it holds is good but for a part.
    marked: bool,
    /// The task that copies what it holds home.
    spill: Option<Spill>,
    used: u64,
}

/// Slots that are handed out again in the order of their last use.
#[derive(Debug)]
pub(super) struct Slots<K> {
    all: Vec<Slot<K>>,
    clock: u64,
    /// Empty slots go first, whenever they were used.
    empty_first: bool,
}

impl<K: Copy + PartialEq> Slots<K> {
    fn new(count: usize, empty_first: bool) -> Self {
        let empty = Slot { holds: None, held: None, marked: false, spill: None, used: 0 };
        Slots { all: vec![empty; count], clock: 0, empty_first }
    }

    /// Marks the slots that hold what satisfies `partly`: a part of it is stale.
    pub fn mark(&mut self, partly: impl Fn(K) -> bool) {
        self.all.iter_mut().for_each(|slot| slot.marked |= slot.holds.is_some_and(&partly));
    }

    /// Takes a slot's mark away and tells whether it had one.
    pub fn take_mark(&mut self, slot: usize) -> bool {
        std::mem::take(&mut self.all[slot].marked)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// The slot that holds `key`.
    pub fn slot_of(&self, key: K) -> Option<usize> {
        self.all.iter().position(|slot| slot.holds == Some(key))
    }

    /// The same, which counts as a use.
    pub fn find(&mut self, key: K) -> Option<usize> {
        let slot = self.slot_of(key)?;
        self.touch(slot);
        Some(slot)
    }

    /// A slot for `key` of all: an empty one if there is one, else the least recently used; never one that holds any of
    /// `pinned`.
    pub fn take(&mut self, key: K, pinned: &[K]) -> usize {
        self.take_of(0..self.all.len(), key, pinned)
    }

    /// The same of `slots`.
    pub fn take_of(&mut self, slots: Range<usize>, key: K, pinned: &[K]) -> usize {
        let free = slots.filter(|&s| self.all[s].holds.is_none_or(|held| !pinned.contains(&held)));
        let slot = free
            .min_by_key(|&s| (self.empty_first && self.all[s].holds.is_some(), self.all[s].used))
            .expect("a ring has more entries than a task pins");
        self.pin(slot, key);
        slot
    }

    /// The empty slot that held `key` last, for `key` again.
    pub fn take_back(&mut self, key: K) -> Option<usize> {
        let slot = self.all.iter().position(|slot| slot.holds.is_none() && slot.held == Some(key))?;
        self.pin(slot, key);
        Some(slot)
    }

    /// Puts `key` into a slot of its own.
    fn pin(&mut self, slot: usize, key: K) {
        self.all[slot] = Slot { holds: Some(key), held: Some(key), marked: false, spill: None, used: 0 };
        self.touch(slot);
    }

    /// Notes the copy home of what the slot that holds `key` does.
    pub fn note_spill(&mut self, key: K, spill: Spill) {
        if let Some(slot) = self.slot_of(key) {
            self.all[slot].spill = Some(spill);
        }
    }

    /// Forgets `key`, which nobody reads again, and gives its copy home.
    pub fn let_go(&mut self, key: K) -> Option<Spill> {
        let slot = self.slot_of(key)?;
        self.all[slot].holds = None;
        self.all[slot].spill.take()
    }

    /// What the slots hold.
    pub fn held(&self) -> impl Iterator<Item = K> {
        self.all.iter().filter_map(|slot| slot.holds)
    }

    /// Whether `slot` holds `key`.
    pub fn has(&self, slot: usize, key: K) -> bool {
        self.all[slot].holds == Some(key)
    }

    /// Forgets what satisfies `stale`.
    pub fn forget(&mut self, stale: impl Fn(K) -> bool) {
        self.all.iter_mut().for_each(|slot| slot.holds = slot.holds.filter(|&key| !stale(key)));
    }

    fn touch(&mut self, slot: usize) {
        self.clock += 1;
        self.all[slot].used = self.clock;
    }
}

/// A shard of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ShardOf {
    pub model: usize,
    pub shard: usize,
}

/// A boundary tensor: the boundary after a shard, and the microbatch. The serial tells it from that of another step or
/// evaluation, whose entry on a device that has not been there since is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BoundaryKey {
    pub model: usize,
    pub serial: u64,
    pub boundary: usize,
    pub microbatch: usize,
}

/// Slots of one arena that are handed out together.
#[derive(Debug)]
pub(super) struct Rings {
    /// Weight slots, by shard.
    pub weights: Slots<ShardOf>,
    /// Boundary activations, where they visit.
    pub activations: Slots<BoundaryKey>,
    /// Boundary gradients.
    pub gradients: Slots<BoundaryKey>,
    /// Next slot for what visits for an update.
    next_update: usize,
    update_slots: usize,
    /// Next entry for the batch's tensors.
    next_input: usize,
    inputs: usize,
    /// Of each gradient slot, the shard whose gradients it was given to last, and when.
    gradients_of: Vec<(Option<ShardOf>, u64)>,
    gradients_given: u64,
}

impl Rings {
    /// Empty slots, as many as the map has. `shared`: by models whose units take turns, so that what is fetched next is
    /// another's; it then goes where nothing has run for longest, since a slot whose content has just become useless is
    /// still in use.
    pub fn new(map: &ArenaMap, shared: bool) -> Self {
        Rings {
            weights: Slots::new(map.weight_slots.at.len(), !shared),
            activations: Slots::new(map.activations.len(), !shared),
            gradients: Slots::new(map.gradients.len(), !shared),
            next_update: 0,
            update_slots: map.update_slots.len(),
            next_input: 0,
            inputs: map.inputs.len(),
            gradients_of: vec![(None, 0); map.gradient_slots.at.len()],
            gradients_given: 0,
        }
    }

    /// The next entry for the batch's tensors.
    pub fn input_entry(&mut self) -> usize {
        self.next_input = (self.next_input + 1) % self.inputs.max(1);
        self.next_input
    }

    /// The next slot for what visits for an update.
    pub fn update_slot(&mut self) -> usize {
        self.next_update = (self.next_update + 1) % self.update_slots.max(1);
        self.next_update
    }

    /// A slot for a shard's gradients: of `slots` the one that was given first.
    pub fn gradient_slot(&mut self, slots: Range<usize>, shard: ShardOf) -> usize {
        let slot = slots.min_by_key(|&s| self.gradients_of[s].1).expect("every shard has gradient slots");
        self.gradients_given += 1;
        self.gradients_of[slot] = (Some(shard), self.gradients_given);
        slot
    }

    /// The slot that a shard's gradients were given last, if no other's were given it since.
    pub fn gradient_slot_of(&self, shard: ShardOf) -> Option<usize> {
        let of_shard = (0..self.gradients_of.len()).filter(|&slot| self.gradients_of[slot].0 == Some(shard));
        of_shard.max_by_key(|&slot| self.gradients_of[slot].1)
    }

    /// How many gradient slots there are.
    pub fn gradient_slots(&self) -> usize {
        self.gradients_of.len()
    }

    /// Forgets every copy of a model's tensors. The weights of a shard that `rests` are at home in its slot, and stay.
    pub fn forget_model(&mut self, model: usize, rests: impl Fn(usize) -> bool) {
        self.weights.forget(|held| held.model == model && !rests(held.shard));
        self.activations.forget(|place| place.model == model);
        self.gradients.forget(|place| place.model == model);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_go_to_the_least_recently_used_and_back_to_their_shard() {
        let mut slots = Slots::new(2, true);
        assert_eq!((slots.take(0, &[]), slots.take(1, &[])), (0, 1));
        assert_eq!(slots.find(0), Some(0));
        assert_eq!(slots.take(2, &[]), 1, "shard 1 was used before shard 0");
        assert_eq!(slots.take_back(0), None, "shard 0 is still there");
        slots.forget(|_| true);
        assert_eq!((slots.find(2), slots.take_back(1)), (None, None), "shard 1's slot held another since");
        assert_eq!((slots.take_back(2), slots.take_back(0)), (Some(1), Some(0)));
    }
    #[test]
    fn a_copy_home_is_given_once_and_belongs_to_what_was_made_here() {
        let spill = Spill { task: 7, maker: 6 };
        let mut slots = Slots::new(1, false);
        slots.take('a', &[]);
        slots.note_spill('a', spill);
        slots.note_spill('b', Spill { task: 9, maker: 8 });
        assert_eq!((slots.let_go('b'), slots.let_go('a'), slots.let_go('a')), (None, Some(spill), None));
        // What was fetched again has no copy home of its own.
        slots.take('a', &[]);
        slots.note_spill('a', spill);
        slots.take('b', &[]);
        slots.take('a', &[]);
        assert_eq!((slots.let_go('a'), slots.slot_of('a')), (None, None));
    }
}
