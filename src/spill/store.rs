//! Where everything lies at home: the map of the host's store and of the disk tier under one choice of cut and tiers.
//!
//! What is at home on the disk comes to the host for as long as it is used there, or is on its way to a device: in
//! pieces, through a few stages that are used over and over.

use super::memory::{BoundaryTier, Bump, Choice, Tenant};
use super::model::Model;
use super::shard::ShardPrograms;
use crate::base::align_up;
use crate::graph::ALIGNMENT;
use std::ops::Range;

/// What of a model is at home in the disk tier; each holds those before it too. In the order of what it costs a step:
/// state that only updates touch crosses once each way, gradients only where they wait for their norm, weights are read
/// for every visit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OnDisk {
    /// Nothing.
    #[default]
    Nothing,
    /// Moments, and remainders of bf16 weights.
    UpdateState,
    /// Gradients that wait for the global norm. Others pass through host memory.
    Gradients,
    /// Weights.
    Weights,
}

impl OnDisk {
    /// What is tried, in this order.
    pub const ALL: [OnDisk; 4] = [OnDisk::Nothing, OnDisk::UpdateState, OnDisk::Gradients, OnDisk::Weights];

    /// In words, such as "moments and gradients".
    pub fn words(self) -> &'static str {
        match self {
            OnDisk::Nothing => "nothing",
            OnDisk::UpdateState => "moments",
            OnDisk::Gradients => "moments and gradients",
            OnDisk::Weights => "moments, gradients and weights",
        }
    }
}

/// The map of a model's part of the host's store and of the disk tier, in bytes from the start of each. Which of the
/// two the weights, remainders and moments are in says [`Choice::on_disk`].
#[derive(Clone, Debug, PartialEq, Default)]
pub struct HostMap {
    /// Weights in flat order.
    pub weights: u64,
    /// States in flat order.
    pub states: u64,
    /// Remainders of bf16 weights in flat order.
    pub remainders: u64,
    /// Moments in flat order.
    pub moments: [u64; 2],
    /// Gradients of each shard, shared uses included, in the store. Where gradients that wait go to the disk, shards
    /// share these places.
    pub shard_gradients: Vec<u64>,
    /// Gradients in flat order, in the disk tier.
    pub waiting_gradients: u64,
    /// Sums of squares, for steps of even and odd number.
    pub norms: [u64; 2],
    /// Losses, for steps of even and odd number.
    pub losses: [u64; 2],
    /// Staging of the batch: by parity, input and microbatch 0; microbatches follow each other.
    pub inputs: [Vec<u64>; 2],
    /// Boundary activations by boundary and microbatch.
    pub activations: Vec<Vec<u64>>,
    /// Boundary gradients by boundary and microbatch.
    pub gradients: Vec<Vec<u64>>,
    /// Where an evaluation's logits arrive.
    pub logits: u64,
    /// Stages for what an update on the host reads from the disk and writes back.
    pub update_stages: Vec<u64>,
    /// Stages for what goes from the disk to a device, or back.
    pub copy_stages: Vec<u64>,
    /// Bytes of one of the latter.
    pub copy_stage_bytes: u64,
    /// One past the last byte in the store.
    pub bytes: u64,
    /// One past the last byte in the disk tier.
    pub disk_bytes: u64,
}

/// The largest part of a shard's weights, in bytes, that goes to or from the disk at once: small beside the model, so
/// that stages are, and large enough to keep a disk at work; of the largest models a 4096th, since each part is a task or
/// more of its own.
fn disk_piece_bytes(model: &Model) -> u64 {
    let bytes = model.layout.parameter_bytes;
    align_up((bytes / 128).clamp(16 << 10, (4 << 20).max(bytes / 4096)), ALIGNMENT)
}

/// How many pieces a shard's own `bytes` of weights come and go in and are updated in, if it visits.
pub(super) fn count_pieces(bytes: u64, slots: usize, on_device: bool) -> u64 {
    // Smaller pieces cost more to start than they hide: at 10 GB/s this is 26 microseconds. An update on the device has
    // more to bring for each, and what it waits for is the link, not the piece before.
    let (least_bytes, most): (u64, u64) = if on_device { (4 << 20, 16) } else { (256 << 10, 8) };
    let most = if slots == 1 { 1 } else { most };
    most.min(bytes / least_bytes).max(1)
}

/// The same under a choice; where there is a disk tier none is longer than `disk_piece`.
fn count_pieces_of(choice: &Choice, shard: usize, bytes: u64, disk_piece: u64) -> u64 {
    if choice.rests(shard) {
        return 1;
    }
    let count = count_pieces(bytes, choice.slots, choice.updates_on_device(shard));
    if choice.on_disk == OnDisk::Nothing { count } else { count.max(bytes.div_ceil(disk_piece)) }
}

/// The pieces, from the shard's first byte.
pub(super) fn pieces_of(choice: &Choice, shard: usize, bytes: u64, disk_piece: u64) -> Vec<Range<u64>> {
    let count = count_pieces_of(choice, shard, bytes, disk_piece);
    let at = |i: u64| if i == count { bytes } else { align_up(bytes * i / count, ALIGNMENT) };
    (0..count).map(|i| at(i)..at(i + 1)).collect()
}

/// No less than the bytes of the longest of so many pieces.
pub(super) fn longest_piece(bytes: u64, count: u64) -> u64 {
    align_up(bytes.div_ceil(count), ALIGNMENT).min(bytes)
}

/// Maps a model's part of the host's store and of the disk tier.
pub(super) fn host_map(of: Tenant) -> HostMap {
    let Tenant { model, shards, choice, moments } = of;
    let (mut store, mut disk) = (Bump::default(), Bump::default());
    let (n, microbatches) = (shards.len(), model.microbatches);
    let graph = &model.train;
    let (parameter_bytes, ratio) = (model.layout.parameter_bytes, model.layout.wide_ratio);
    let boundaries = |store: &mut Bump, tier: BoundaryTier| match tier {
        BoundaryTier::Host { .. } if n > 1 => {
            shards[..n - 1].iter().map(|s| store.take_many(microbatches, s.boundary_bytes)).collect()
        }
        _ => Vec::new(),
    };
    let logits = match &model.eval {
        Some(graph) if graph.loss.is_none() => graph.logits.map_or(0, |v| graph.bytes(v)),
        _ => 0,
    };
    let on_disk = choice.on_disk;
    let home = |least: OnDisk, store: &mut Bump, disk: &mut Bump, bytes: u64| match on_disk >= least {
        true => disk.take(bytes),
        false => store.take(bytes),
    };
    let update_stage_bytes = update_stage_bytes(of);
    let copy_stage_bytes = if on_disk > OnDisk::Nothing { disk_piece_bytes(model) } else { 0 };
    let stages = match (on_disk, choice.slots) {
        (OnDisk::Nothing, _) => 0,
        (_, 1) => 1,
        // One that is read, one in use, one that is written.
        _ => 3,
    };
    let map = HostMap {
        weights: home(OnDisk::Weights, &mut store, &mut disk, model.layout.weight_bytes),
        states: store.take(model.layout.state_bytes),
        remainders: match model.has_remainders() {
            true => home(OnDisk::UpdateState, &mut store, &mut disk, parameter_bytes),
            false => 0,
        },
        moments: [0, 1].map(|i| match i < moments {
            true => home(OnDisk::UpdateState, &mut store, &mut disk, parameter_bytes * ratio),
            false => 0,
        }),
        shard_gradients: gradient_places(shards, choice, &mut store),
        waiting_gradients: if on_disk >= OnDisk::Gradients { disk.take(parameter_bytes * ratio) } else { 0 },
        norms: [0, 1].map(|_| store.take(8 * model.layout.order.len() as u64)),
        losses: [0, 1].map(|_| store.take(4 * microbatches as u64)),
        inputs: [0, 1].map(|_| {
            graph.inputs.iter().map(|input| store.take(microbatches as u64 * graph.bytes(input.value))).collect()
        }),
        activations: boundaries(&mut store, choice.activations),
        gradients: boundaries(&mut store, choice.gradients),
        logits: store.take(logits),
        update_stages: if update_stage_bytes > 0 { store.take_many(stages, update_stage_bytes) } else { Vec::new() },
        copy_stages: store.take_many(stages, copy_stage_bytes),
        copy_stage_bytes,
        bytes: 0,
        disk_bytes: disk.end,
    };
    HostMap { bytes: store.end, ..map }
}

/// Bytes that a model takes of the host's store and of the disk tier with so much at home on the disk.
pub(super) fn home_bytes(of: Tenant, on_disk: OnDisk) -> (u64, u64) {
    let map = host_map(Tenant { choice: &Choice { on_disk, ..of.choice.clone() }, ..of });
    (map.bytes, map.disk_bytes)
}

/// Where each shard's gradients lie in the store: nowhere for shards at rest. Once they are on the disk, or applied,
/// the place is free for another shard's; only those with accumulators for other shards' parameters keep theirs, until
/// these shards have fetched them.
fn gradient_places(shards: &[ShardPrograms], choice: &Choice, store: &mut Bump) -> Vec<u64> {
    let bytes = |s: usize| match choice.rests(s) && !choice.crosses {
        true => 0,
        false => shards[s].layout.gradient_bytes,
    };
    let may_share = |s: usize| choice.on_disk >= OnDisk::Gradients && shards[s].layout.shared.is_empty();
    let sharing: Vec<usize> = (0..shards.len()).filter(|&s| may_share(s)).collect();
    let places = if choice.slots == 1 { 1 } else { 2 };
    let largest = sharing.iter().map(|&s| bytes(s)).max().unwrap_or(0);
    let shared = store.take_many(places.min(sharing.len()), largest);
    let turn = |s: usize| sharing.iter().position(|&other| other == s).map(|turn| shared[turn % shared.len()]);
    (0..shards.len()).map(|s| turn(s).unwrap_or_else(|| store.take(bytes(s)))).collect()
}

/// Bytes of a stage for what an update on the host reads from the disk: moments, then remainder, gradient and weight.
fn update_stage_bytes(Tenant { model, shards, choice, moments }: Tenant) -> u64 {
    if choice.on_disk == OnDisk::Nothing {
        return 0;
    }
    let of = |(s, shard): (usize, &ShardPrograms)| {
        let own = shard.own_bytes();
        let longest = longest_piece(own, count_pieces_of(choice, s, own, disk_piece_bytes(model)));
        update_stage_parts(model, choice.on_disk, moments, longest)
            .into_iter()
            .map(|part| align_up(part, ALIGNMENT))
            .sum()
    };
    shards.iter().enumerate().filter(|(s, _)| !choice.updates_on_device(*s)).map(of).max().unwrap_or(0)
}

/// Bytes of what lies in such a stage for `bytes` of weights, each part at a multiple of [`ALIGNMENT`]: moments,
/// remainder, gradient, weight; 0 for what is in host memory anyway.
pub fn update_stage_parts(model: &Model, on_disk: OnDisk, moments: usize, bytes: u64) -> [u64; 5] {
    let wide = bytes * model.layout.wide_ratio;
    let when = |is_there: bool, bytes: u64| if is_there { bytes } else { 0 };
    [
        when(moments > 0, wide),
        when(moments > 1, wide),
        when(model.has_remainders(), bytes),
        when(on_disk >= OnDisk::Gradients, wide),
        when(on_disk >= OnDisk::Weights, bytes),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_piece_is_longer_than_what_is_reckoned_with() {
        let choice = |slots: usize, visiting_updates: usize, on_disk: OnDisk| Choice {
            slots,
            visiting_updates,
            on_disk,
            ..Choice::default()
        };
        let choices = [(1, 0), (2, 0), (2, 1)]
            .map(|(s, v)| [OnDisk::Nothing, OnDisk::Weights].map(|on_disk| choice(s, v, on_disk)));
        for choice in choices.iter().flatten() {
            for bytes in [0, 1, 256, 1 << 20, (4 << 20) + 1, 77_000_004, 1 << 30] {
                let count = count_pieces_of(choice, 0, bytes, 1 << 20);
                let pieces = pieces_of(choice, 0, bytes, 1 << 20);
                let longest = longest_piece(bytes, count);
                assert!(pieces.iter().all(|p| p.end - p.start <= longest), "{longest}: {pieces:?}");
                let all = pieces.iter().map(|p| p.end - p.start).sum::<u64>();
                assert_eq!((pieces.len() as u64, all), (count, bytes));
            }
        }
    }
}
