//! What every step needs and no step changes: tensors by shard and piece, and the ways of shared parameters.

use super::EngineOptions;
use crate::base::align_up;
use crate::device::Segment;
use crate::graph::{ALIGNMENT, ShardLayout};
use crate::spill::{Model, Plan, visiting_gradients_at};
use std::ops::Range;
use std::sync::Arc;

/// What every step needs and no step changes.
#[derive(Debug)]
pub(super) struct Tables {
    /// Tensors of each shard's own stretch.
    pub segments: Vec<Arc<[Segment]>>,
    /// The pieces of each shard's own stretch.
    pub pieces: Vec<Vec<Piece>>,
    /// By owning shard: uses of its parameters elsewhere, in the order of layers.
    pub joins: Vec<Vec<Join>>,
    /// Stretches of weights that each shard borrows.
    pub borrows: Vec<Vec<Borrow>>,
}

/// A stretch of a shard's weights, as [`Plan::pieces`] cuts them.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// Bytes from the shard's first weight.
    pub range: Range<u64>,
    /// Tensors, or parts of them, in it, with offsets from its start. An update is elementwise, so a tensor may be cut.
    pub segments: Arc<[Segment]>,
}

/// The parts of `segments` that lie within `range`, given in bytes of weights of `float_bytes` each.
fn cut_segments(segments: &[Segment], range: &Range<u64>, float_bytes: u64) -> Arc<[Segment]> {
    let (start, end) = (range.start / float_bytes, range.end / float_bytes);
    let part = |s: &Segment| {
        let (from, to) = (s.offset.max(start), (s.offset + s.elems).min(end));
        (from < to).then(|| Segment { offset: from - start, elems: to - from, ..*s })
    };
    segments.iter().filter_map(part).collect()
}

/// A shared parameter's further accumulator, to be added to its owner's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Join {
    /// The shard that uses it, and the accumulator's start in that shard's gradients.
    pub user: usize,
    pub from: u64,
    /// Start in the owner's gradients, and size there.
    pub to: u64,
    pub bytes: u64,
    /// Where, in the gradient slot of an owner at rest, it lies when it visits the owner's device to be added.
    pub visits_at: u64,
}

/// A copy of a shared weight, or of frozen ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Borrow {
    /// The shard that trains it, and its start in that shard's own stretch; nobody for what is frozen.
    pub owner: Option<(usize, u64)>,
    /// Start in the flat order.
    pub flat: u64,
    /// Start in the borrower's weights.
    pub at: u64,
    pub bytes: u64,
}

impl Tables {
    pub fn new(model: &Model, plan: &Plan, options: &EngineOptions) -> Self {
        let owner_of = |flat: u64| {
            plan.shards.iter().position(|s| s.layout.own.contains(&flat)).expect("every parameter has an owner")
        };
        let segments: Vec<Arc<[Segment]>> =
            plan.shards.iter().map(|s| model.segments(&s.layout.own, |p| options.decays[p]).into()).collect();
        let cut = |(s, all): (usize, &Arc<[Segment]>)| -> Vec<Piece> {
            let piece = |range| Piece { segments: cut_segments(all, &range, model.train.float.bytes()), range };
            plan.pieces(s).into_iter().map(piece).collect()
        };
        let pieces = segments.iter().enumerate().map(cut).collect();
        let mut joins: Vec<Vec<Join>> = vec![Vec::new(); plan.shards.len()];
        let mut borrows: Vec<Vec<Borrow>> = vec![Vec::new(); plan.shards.len()];
        for (user, shard) in plan.shards.iter().enumerate() {
            for shared in &shard.layout.shared {
                let flat = model.layout.parameter[shared.parameter];
                let bytes = model.train.bytes(model.train.parameters[shared.parameter].value);
                let owner = owner_of(flat);
                let in_owner = flat - plan.shards[owner].layout.own.start;
                let ratio = model.layout.wide_ratio;
                let end = |j: &Join| align_up(j.visits_at + j.bytes, ALIGNMENT);
                let visitors = joins[owner].iter().filter(|j| j.user != owner);
                let visits_at = visitors.map(end).max().unwrap_or(visiting_gradients_at(&plan.shards, owner));
                let (to, bytes) = (in_owner * ratio, bytes * ratio);
                joins[owner].push(Join { user, from: shared.gradient, to, bytes, visits_at });
                let bytes = bytes / ratio;
                if let Some(at) = shared.borrowed
                    && !borrows[user].iter().any(|b| b.at == at)
                {
                    borrows[user].push(Borrow { owner: Some((owner, in_owner)), flat, at, bytes });
                }
            }
            borrows[user].extend(frozen_stretches(model, &shard.layout));
        }
        Tables { segments, pieces, joins, borrows }
    }
}

/// Bytes that a fetch of a shard copies: of what may change from step to step, and of frozen weights. What pads the end
/// of a borrowed weight is not copied.
pub(super) fn fetched_bytes(model: &Model, shard: &ShardLayout) -> (u64, u64) {
    let mut borrowed: Vec<(u64, usize)> =
        shard.shared.iter().filter_map(|u| Some((u.borrowed?, u.parameter))).collect();
    borrowed.sort_unstable();
    borrowed.dedup();
    let borrowed = borrowed.iter().map(|&(_, p)| model.train.bytes(model.train.parameters[p].value)).sum::<u64>();
    let own = shard.own.end - shard.own.start + shard.states.end - shard.states.start;
    (own + borrowed, frozen_stretches(model, shard).iter().map(|b| b.bytes).sum())
}

/// The frozen weights of a shard; what lies together at home and there is one stretch.
fn frozen_stretches(model: &Model, shard: &ShardLayout) -> Vec<Borrow> {
    let mut stretches: Vec<Borrow> = Vec::new();
    for &(parameter, at) in &shard.frozen {
        let flat = model.layout.parameter[parameter];
        let bytes = model.train.bytes(model.train.parameters[parameter].value);
        match stretches.last_mut() {
            Some(last)
                if flat.checked_sub(last.flat) == Some(at - last.at)
                    && at - last.at == align_up(last.bytes, ALIGNMENT) =>
            {
                last.bytes = at - last.at + bytes;
            }
            _ => stretches.push(Borrow { owner: None, flat, at, bytes }),
        }
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element lands in one piece, once, with its tensor's decay.
    #[test]
    fn pieces_share_out_every_element_once() {
        let segment = |offset, elems, decay, index| Segment { offset, elems, decay, index };
        let whole =
            [segment(0, 33, true, 4), segment(64, 0, false, 5), segment(64, 1023, false, 6), segment(1088, 1, true, 7)];
        for cuts in [vec![0u64, 4356], vec![0, 64, 128, 4352, 4356], vec![0, 256, 1024, 1088, 4356]] {
            let mut seen = Vec::new();
            for cut in cuts.windows(2) {
                for part in cut_segments(&whole, &(cut[0]..cut[1]), 4).iter() {
                    assert!(part.elems > 0 && 4 * (part.offset + part.elems) <= cut[1] - cut[0]);
                    let start = cut[0] / 4 + part.offset;
                    seen.extend((start..start + part.elems).map(|e| (e, part.decay, part.index)));
                }
            }
            let of = |s: &Segment| (s.offset..s.offset + s.elems).map(|e| (e, s.decay, s.index)).collect::<Vec<_>>();
            assert_eq!(seen, whole.iter().flat_map(of).collect::<Vec<_>>(), "{cuts:?}");
        }
    }
}
