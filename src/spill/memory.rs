//! Where everything lies on a device: the map of its arena under one choice of cut, slots and tiers.
//!
//! A map is made by laying stretches end to end; its total is the exact number of bytes that the run will touch, which
//! is what budgets are held against.

use super::model::Model;
use super::shard::ShardPrograms;
use super::slots::{SlotMap, has_large, shared_bytes};
use super::store::{OnDisk, count_pieces, longest_piece};
use crate::base::align_up;
use crate::device::norm_scratch_bytes;
use crate::graph::{ALIGNMENT, Area};

/// Bytes laid end to end, each stretch at a multiple of [`ALIGNMENT`]. Of more than 64 bits hold the end is the last
/// that they do: no memory has as many.
#[derive(Debug, Default)]
pub(super) struct Bump {
    pub end: u64,
}

impl Bump {
    pub fn take(&mut self, bytes: u64) -> u64 {
        let at = align_up(self.end, ALIGNMENT);
        self.end = at.saturating_add(bytes);
        at
    }

    pub fn take_many(&mut self, count: usize, bytes: u64) -> Vec<u64> {
        (0..count).map(|_| self.take(bytes)).collect()
    }
}

/// Where boundary tensors of one kind live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BoundaryTier {
    /// On the device until they are used.
    #[default]
    Device,
    /// In host memory, visiting this many entries of the device.
    Host {
        /// Entries of the ring.
        entries: usize,
    },
}

/// What of a plan decides the maps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Weights, gradients and optimizer state stay on the device.
    pub resident: bool,
    /// Where not resident: how many shards, from the first on, have theirs on the device all the same. Their gradients
    /// are the last to be there and their weights the first to be needed, so these gain most by not leaving; and what
    /// the host updates meanwhile is needed after them.
    pub resting: usize,
    /// Weight slots for the shards that visit.
    pub slots: usize,
    /// Slots are as large as the largest shard that visits, though others be far smaller: any shard may be in any.
    pub even_slots: bool,
    /// Gradient slots for the shards that visit.
    pub gradient_slots: usize,
    /// Boundary activations.
    pub activations: BoundaryTier,
    /// Boundary gradients.
    pub gradients: BoundaryTier,
    /// Entries for the batch's tensors.
    pub input_entries: usize,
    /// Where not resident: how many of the shards that visit, from the first of them on, are updated on the device that
    /// has just computed their gradients, with remainders and moments visiting; the host's threads update the others.
    /// With clipping, which knows its factor only after the last gradient, when they come for the next step.
    pub visiting_updates: usize,
    /// Of the state that visits for an update, so many pieces have room for each gradient slot, or all of a shard's:
    /// the more, the more of it can come before the gradients are complete.
    pub update_pieces: usize,
    /// Where resident: shards are at home on several devices, so gradients and weights of shared parameters cross by
    /// way of the host.
    pub crosses: bool,
    /// Microbatches go through the shards one behind the other.
    pub pipelined: bool,
    /// What is at home in the disk tier instead of the host's store.
    pub on_disk: OnDisk,
}

impl Choice {
    /// Whether a shard's weights, gradients and optimizer state stay on the device.
    pub fn rests(&self, shard: usize) -> bool {
        self.resident || shard < self.resting
    }

    /// Whether a shard is updated on the device that has computed its gradients.
    pub fn updates_on_device(&self, shard: usize) -> bool {
        self.resident || shard < self.resting + self.visiting_updates
    }

    /// How many of so many shards rest, from the first on.
    pub(super) fn resting_of(&self, shards: usize) -> usize {
        if self.resident { shards } else { self.resting.min(shards) }
    }

    /// How many of so many shards are updated on the device: those that rest, and the next ones with state that visits.
    pub(super) fn updated_of(&self, shards: usize) -> usize {
        if self.resident { shards } else { (self.resting + self.visiting_updates).min(shards) }
    }
}

/// The map of a device's arena, in bytes from its start.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct ArenaMap {
    /// Losses of the microbatches, 4 bytes each, for steps of even and odd number.
    pub losses: [u64; 2],
    /// Sums of squares, 8 bytes a parameter, for steps of even and odd number; where the device updates a shard.
    pub norms: [u64; 2],
    /// Entries for the batch's tensors.
    pub inputs: Vec<u64>,
    /// Slots of weights and of gradients that belong to a shard that rests: shard `s` has slot `s`. What visits shares
    /// the others.
    pub resting: usize,
    /// Weight slots. States lie after the weights, at `states_at`.
    pub weight_slots: SlotMap,
    /// Start of a shard's states in its slot.
    pub states_at: Vec<u64>,
    /// Gradient slots.
    pub gradient_slots: SlotMap,
    /// Partial sums for the norm of one shard at a time; where the device updates a shard and asks for scratch.
    pub norm_scratch: u64,
    /// Remainders of the bf16 weights of each shard that rests.
    pub remainders: Vec<u64>,
    /// Moments of each shard that rests: first and second.
    pub moments: [Vec<u64>; 2],
    /// Slots for what visits for an update, a piece at a time: first and second moment, then remainder, end to end; and
    /// before that gradients of parameters that other shards use too.
    pub update_slots: Vec<u64>,
    /// Bytes of one of them.
    pub update_slot_bytes: u64,
    /// Boundary activations: one for each boundary and microbatch, or a ring.
    pub activations: Vec<u64>,
    /// Boundary gradients: a ring.
    pub gradients: Vec<u64>,
    /// What forward leaves for backward, by shard and microbatch; empty for shards that recompute.
    pub saved: Vec<Vec<u64>>,
    /// The workspace, last so that the peak is a program's own.
    pub workspace: u64,
    /// One past the last byte.
    pub bytes: u64,
}

impl ArenaMap {
    /// The same map, all of it `by` bytes further on, with the workspace at `workspace`.
    pub(super) fn shifted(mut self, by: u64, workspace: u64) -> ArenaMap {
        let lists = [
            &mut self.inputs,
            &mut self.weight_slots.at,
            &mut self.gradient_slots.at,
            &mut self.remainders,
            &mut self.update_slots,
            &mut self.activations,
            &mut self.gradients,
        ];
        let places = lists.into_iter().chain(&mut self.moments).chain(&mut self.saved).flatten();
        let single = self.losses.iter_mut().chain(&mut self.norms).chain([&mut self.norm_scratch]);
        places.chain(single).for_each(|at| *at = at.saturating_add(by));
        self.workspace = workspace;
        self
    }
}

/// What of a model decides where everything of it lies.
#[derive(Clone, Copy)]
pub(super) struct Tenant<'a> {
    pub model: &'a Model,
    pub shards: &'a [ShardPrograms],
    pub choice: &'a Choice,
    /// Moments that the optimizer keeps.
    pub moments: usize,
}

impl Tenant<'_> {
    /// Bytes that a device asks for as scratch for the norm of a shard.
    pub fn norm_scratch_bytes(&self, shard: usize) -> u64 {
        norm_scratch_bytes(&self.model.segments(&self.shards[shard].layout.own, |_| true))
    }

    /// Bytes of the gradient slot that a shard fills, with room for what visits of parameters that other shards use too.
    fn gradient_slot_bytes(&self, shard: usize) -> u64 {
        let joins = if self.choice.resident { self.choice.crosses } else { self.choice.rests(shard) };
        match joins {
            true => visiting_gradients_at(self.shards, shard) + visiting_gradient_bytes(self.model, self.shards, shard),
            false => self.shards[shard].layout.gradient_bytes,
        }
    }

    /// Lays out a slot for each of the first `own` shards, and for the others so many. `bytes`: of each shard.
    fn slots(&self, bump: &mut Bump, own: usize, shared: usize, bytes: impl Fn(usize) -> u64) -> SlotMap {
        let mut bytes: Vec<u64> = (0..self.shards.len()).map(bytes).collect();
        // In a pipeline any two shards may follow each other.
        if self.choice.even_slots || self.choice.pipelined {
            let largest = bytes[own..].iter().copied().max().unwrap_or(0);
            bytes[own..].fill(largest);
        }
        SlotMap::new(bump, &bytes, own, shared)
    }
}

/// Maps an arena that is a model's own.
pub(super) fn arena_map(of: Tenant) -> ArenaMap {
    arena_map_of(of, &|_| true)
}

/// Maps the arena of one of the devices that a model's shards are at home on; `here` tells which are on this one. The
/// others have stretches of no bytes.
pub(super) fn arena_map_of(of: Tenant, here: &dyn Fn(usize) -> bool) -> ArenaMap {
    let Tenant { model, shards, choice, moments } = of;
    let (n, microbatches, ratio) = (shards.len(), model.microbatches, model.layout.wide_ratio);
    let (resting, updated) = (choice.resting_of(n), choice.updated_of(n));
    let if_here = |s: usize, bytes: u64| if here(s) { bytes } else { 0 };
    let own = |s: usize| if_here(s, shards[s].own_bytes());
    let most = |bytes: fn(&ShardPrograms) -> u64| (0..n).map(|s| if_here(s, bytes(&shards[s]))).max().unwrap_or(0);
    // A boundary tensor is handed out by one shard and taken in by the next.
    let boundary = |s: usize| if here(s) || here(s + 1) { shards[s].boundary_bytes } else { 0 };
    let ring = |bump: &mut Bump, entries: usize| match (1..n).map(|s| boundary(s - 1)).max() {
        Some(largest) => bump.take_many(entries, largest),
        None => Vec::new(),
    };
    let (update_slots, update_slot_bytes) = update_room(of);
    let mut bump = Bump::default();
    // In the order in which they lie.
    let map = ArenaMap {
        losses: [0, 1].map(|_| bump.take(4 * microbatches as u64)),
        norms: [0, 1].map(|_| if updated > 0 { bump.take(8 * model.layout.order.len() as u64) } else { 0 }),
        norm_scratch: match updated > 0 && model.train.scratch {
            true => bump.take((0..updated).filter(|&s| here(s)).map(|s| of.norm_scratch_bytes(s)).max().unwrap_or(0)),
            false => 0,
        },
        inputs: bump.take_many(choice.input_entries, most(ShardPrograms::input_bytes)),
        resting,
        weight_slots: of.slots(&mut bump, resting, choice.slots, |s| if_here(s, shards[s].slot_bytes())),
        states_at: shards.iter().map(ShardPrograms::states_at).collect(),
        gradient_slots: {
            // In a pipeline a shard's gradients wait for the next microbatch while others' are computed.
            let own = if choice.pipelined { n } else { resting };
            of.slots(&mut bump, own, choice.gradient_slots, |s| if_here(s, of.gradient_slot_bytes(s)))
        },
        remainders: match model.has_remainders() {
            true => (0..resting).map(|s| bump.take(own(s))).collect(),
            false => Vec::new(),
        },
        moments: [0, 1].map(|i| match i < moments {
            true => (0..resting).map(|s| bump.take(own(s) * ratio)).collect(),
            false => Vec::new(),
        }),
        update_slots: bump.take_many(update_slots, update_slot_bytes),
        update_slot_bytes,
        activations: match choice.activations {
            BoundaryTier::Device => (1..n).flat_map(|s| bump.take_many(microbatches, boundary(s - 1))).collect(),
            BoundaryTier::Host { entries } => ring(&mut bump, entries),
        },
        gradients: match choice.gradients {
            BoundaryTier::Device => ring(&mut bump, microbatches + 1),
            BoundaryTier::Host { entries } => ring(&mut bump, entries),
        },
        saved: (0..n)
            .map(|s| match shards[s].forward.as_ref().map(|p| p.bytes(Area::Saved)) {
                Some(bytes) if bytes > 0 => bump.take_many(microbatches, if_here(s, bytes)),
                _ => Vec::new(),
            })
            .collect(),
        workspace: bump.take(most(ShardPrograms::workspace_bytes)),
        bytes: 0,
    };
    ArenaMap { bytes: bump.end, ..map }
}

/// What of a shard decides how much room it needs as one that visits.
#[derive(Clone, Copy, Debug)]
pub(super) struct VisitBytes {
    slot: u64,
    gradients: u64,
    state: u64,
    /// Of the pieces of what visits for its update, the number and the bytes of one.
    pieces: usize,
    piece: u64,
}

impl VisitBytes {
    /// Those of each shard.
    pub fn of(model: &Model, shards: &[ShardPrograms], moments: usize, slots: usize) -> Vec<VisitBytes> {
        let of = |s: usize| {
            let (pieces, piece) = update_pieces(model, shards, slots, moments, s);
            VisitBytes {
                slot: shards[s].slot_bytes(),
                gradients: shards[s].layout.gradient_bytes,
                state: update_state_bytes(model, shards, moments, s),
                pieces,
                piece,
            }
        };
        (0..shards.len()).map(of).collect()
    }
}

/// Whether some have a slot apart where as many slots may be of different sizes.
pub(super) fn have_large(shards: &[VisitBytes], slots: usize) -> bool {
    has_large(&shards.iter().map(|s| s.slot).collect::<Vec<_>>(), slots)
}

/// Of each number of shards at rest, bytes that these take at least.
pub(super) fn bytes_at_rest(shards: &[VisitBytes]) -> Vec<u64> {
    let mut sums = vec![0];
    sums.extend(shards.iter().scan(0, |sum, shard| {
        *sum = [shard.slot, shard.gradients, shard.state].into_iter().fold(*sum, u64::saturating_add);
        Some(*sum)
    }));
    sums
}

/// How many shards may rest, at least one and not all, such that from one of these numbers up to the next one each more
/// takes more bytes. It may take fewer where what the others share shrinks by more.
pub(super) fn resting_counts(shards: &[VisitBytes], choice: &Choice) -> Vec<usize> {
    let n = shards.len();
    let shared = |bytes: fn(&VisitBytes) -> u64, count: usize| {
        shared_bytes(&shards.iter().map(bytes).collect::<Vec<_>>(), count, choice.even_slots)
    };
    let (weights, gradients) = (shared(|s| s.slot, choice.slots), shared(|s| s.gradients, choice.gradient_slots));
    let update_shrinks = |s: usize| {
        let (this, others) = (shards[s], &shards[s + 1..]);
        let here = &others[..choice.visiting_updates.min(others.len())];
        !here.is_empty() && here.iter().all(|o| o.piece < this.piece || o.pieces < this.pieces)
    };
    let shrinks = |s: usize| weights[s + 1] < weights[s] || gradients[s + 1] < gradients[s] || update_shrinks(s);
    (1..n).filter(|&resting| resting == 1 || shrinks(resting - 1)).collect()
}

/// How many slots there are for what visits for an update, and the bytes of one.
pub(super) fn update_room(Tenant { model, shards, choice, moments }: Tenant) -> (usize, u64) {
    let visiting = (choice.resting..shards.len()).take(if choice.resident { 0 } else { choice.visiting_updates });
    let at_once = choice.gradient_slots.min(visiting.len());
    let (count, bytes) = visiting
        .map(|s| update_pieces(model, shards, choice.slots, moments, s))
        .fold((0, 0), |(count, bytes), (pieces, piece)| (pieces.max(count), piece.max(bytes)));
    let count = match update_parts(model, moments, 1).iter().sum() {
        // Gradients of shared parameters alone: one that comes, and one in use.
        0u64 => count.min(2),
        _ => count.min(choice.update_pieces) * at_once,
    };
    (if bytes > 0 { count } else { 0 }, bytes)
}

/// How many pieces of a shard's state visit for its update, and the bytes of one, by how many weight slots there are.
pub(super) fn update_pieces(
    model: &Model,
    shards: &[ShardPrograms],
    slots: usize,
    moments: usize,
    shard: usize,
) -> (usize, u64) {
    let own = shards[shard].own_bytes();
    let count = count_pieces(own, slots, true);
    let longest = longest_piece(own, count);
    let state = update_parts(model, moments, longest).into_iter().map(|part| align_up(part, ALIGNMENT)).sum::<u64>();
    let shared = visiting_gradient_bytes(model, shards, shard).min(longest * model.layout.wide_ratio);
    (count as usize, state.max(shared))
}

/// Bytes of what only updates touch for `bytes` of weights: first and second moment, remainder. They lie in this order,
/// each at a multiple of [`ALIGNMENT`].
pub fn update_parts(model: &Model, moments: usize, bytes: u64) -> [u64; 3] {
    let when = |is_there: bool, bytes: u64| if is_there { bytes } else { 0 };
    let wide = bytes * model.layout.wide_ratio;
    [when(moments > 0, wide), when(moments > 1, wide), when(model.has_remainders(), bytes)]
}

/// Bytes of a shard's moments and remainders, end to end.
pub fn update_state_bytes(model: &Model, shards: &[ShardPrograms], moments: usize, shard: usize) -> u64 {
    update_parts(model, moments, shards[shard].own_bytes()).into_iter().sum()
}

/// Where, after a shard's gradients, further accumulators of parameters that it owns lie when they visit its device to
/// be added.
pub fn visiting_gradients_at(shards: &[ShardPrograms], shard: usize) -> u64 {
    align_up(shards[shard].layout.gradient_bytes, ALIGNMENT)
}

/// Bytes of those accumulators: every use of its parameters in another shard.
pub(super) fn visiting_gradient_bytes(model: &Model, shards: &[ShardPrograms], shard: usize) -> u64 {
    let own = &shards[shard].layout.own;
    // Of most shards there are none, and they are many.
    if !model.layout.shared.iter().any(|&p| own.contains(&model.layout.parameter[p])) {
        return 0;
    }
    let others = shards.iter().enumerate().filter(|&(s, _)| s != shard).flat_map(|(_, o)| &o.layout.shared);
    let owned = others.filter(|u| own.contains(&model.layout.parameter[u.parameter]));
    owned.map(|u| align_up(model.gradient_bytes(u.parameter), ALIGNMENT)).sum()
}
