//! The update of a shard: its task, piece by piece, the state that visits for it, and what it makes stale.
//!
//! Where a shard is settled (`settle`) says which device or host does it; the tasks are the same, and so are the bits.

use super::Engine;
use super::disk::UpdatePiece;
use super::settle::{Settled, within};
use super::site::Site;
use super::tables::Piece;
use crate::base::align_up;
use crate::device::{Clip, CopySpan, Span, Task, Update};
use crate::graph::ALIGNMENT;
use crate::spill::{Home, OnDisk, update_parts};
use crate::trace::What;
use std::ops::Range;
use std::sync::Arc;

/// Moments or remainders that visit a device, there and at home.
#[derive(Clone, Copy, Debug)]
struct Visitor {
    here: Span,
    home: Span,
}

impl Engine {
    /// Makes the update of a shard whose gradients and norms are there once the tasks made so far have run.
    pub(super) fn update(&mut self, site: &Site, done: &Settled, deadline: u64) {
        let s = done.shard;
        if site.tables.segments[s].is_empty() {
            return;
        }
        if site.plan.choice.rests(s) {
            self.fetch_state(site);
        }
        let visits = !site.plan.choice.rests(s) && Self::on_device(site, s);
        for piece in &site.tables.pieces[s] {
            let state = visits.then(|| self.fetch_update_state(site, s, &piece.range));
            self.update_piece(site, done, piece, state.as_deref(), deadline);
            if let Some(state) = state {
                self.spill_updated(site, done, &piece.range, &state);
            }
        }
        self.refresh_copies(site, s, deadline);
    }

    /// Makes the update of a piece. `visiting`: its moments and remainder, if they visit.
    fn update_piece(
        &mut self,
        site: &Site,
        done: &Settled,
        Piece { range, segments }: &Piece,
        visiting: Option<&[Visitor]>,
        deadline: u64,
    ) {
        let (s, plan, map, start, end) = (done.shard, &site.plan, &site.map, range.start, range.end);
        let (flat, bytes) = (plan.shards[s].layout.own.start + start, end - start);
        // Moments and gradients may be wider than weights, and lie as many times further on.
        let ratio = site.model.layout.wide_ratio;
        let (wide_start, wide_bytes) = (start * ratio, bytes * ratio);
        let gradient = within(Self::gradients(site, done), wide_start, wide_bytes);
        let mut piece = if plan.choice.rests(s) {
            let of = |at: &u64| site.arena(at + wide_start, wide_bytes);
            let remainder = map.remainders.get(s).map(|at| site.arena(at + start, bytes));
            let moments = [0, 1].map(|i| map.moments[i].get(s).map(of));
            UpdatePiece { weight: site.arena(map.weight_slots.at[s] + start, bytes), remainder, moments, gradient }
        } else if let Some(state) = visiting {
            let slot = self.rings[site.rings].weights.find(site.shard(s)).expect("the shard visits");
            let moments = [0, 1].map(|i| state[..plan.updates.moments].get(i).map(|m| m.here));
            let remainder = state.get(plan.updates.moments).map(|r| r.here);
            UpdatePiece { weight: site.arena(map.weight_slots.at[slot] + start, bytes), remainder, moments, gradient }
        } else {
            let of = |i: usize| site.update_state(plan.host.moments[i] + flat * ratio, wide_bytes);
            let remainder = site.model.has_remainders().then(|| site.update_state(plan.host.remainders + flat, bytes));
            let moments = [0, 1].map(|i| (i < plan.updates.moments).then(|| of(i)));
            let waits = done.clip.is_some() && plan.choice.on_disk >= OnDisk::Gradients;
            let gradient = if waits { Self::waiting_gradient(site, s, range) } else { gradient };
            UpdatePiece { weight: site.weights(flat, bytes), remainder, moments, gradient }
        };
        let goes_back = self.stage_update(site, s, &mut piece, deadline);
        let UpdatePiece { weight, remainder, moments, gradient } = piece;
        let loss_bytes = 4 * site.model.microbatches as u64;
        let gate = match Self::on_device(site, s) {
            true => site.arena(map.losses[site.parity()], loss_bytes),
            false => site.store(plan.host.losses[site.parity()], loss_bytes),
        };
        let clip = done.clip.map(|max_norm| Clip { max_norm, table: self.norms(site, s) });
        let mut reads = vec![gradient, gate];
        reads.extend(clip.map(|c| c.table));
        let mut writes = vec![weight];
        writes.extend(remainder.iter().chain(moments.iter().flatten()));
        let segments = Arc::clone(segments);
        let update = Update { rule: done.rule, segments, weight, remainder, moments, gradient, clip, gate };
        let task = Task::Update(Box::new(update));
        self.add(site, Self::math_lane(site, s), (What::Update, s), deadline, task, &reads, &writes);
        self.write_disk(site, s, deadline, goes_back);
    }

    /// Brings a piece of a shard's moments and remainders to the device for one update.
    fn fetch_update_state(&mut self, site: &Site, s: usize, piece: &Range<u64>) -> Vec<Visitor> {
        let (own, host) = (site.plan.shards[s].layout.own.start, &site.plan.host);
        let ratio = site.model.layout.wide_ratio;
        let parts = update_parts(&site.model, site.plan.updates.moments, piece.end - piece.start);
        if parts.iter().sum::<u64>() == 0 {
            return Vec::new();
        }
        let slot = self.rings[site.rings].update_slot();
        let mut here = site.map.update_slots[slot];
        let homes = [(host.moments[0], ratio), (host.moments[1], ratio), (host.remainders, 1)];
        let visitors = homes.into_iter().zip(parts).filter(|(_, bytes)| *bytes > 0).map(|((home, ratio), bytes)| {
            let at = here;
            here += align_up(bytes, ALIGNMENT);
            Visitor { home: site.update_state(home + (own + piece.start) * ratio, bytes), here: site.arena(at, bytes) }
        });
        let visitors: Vec<Visitor> = visitors.collect();
        let spans = visitors.iter().map(|v| CopySpan { from: v.home, to: v.here }).collect();
        self.copy(site, What::FetchState, s, None, spans);
        visitors
    }

    /// Sends an updated piece of a shard's weights home, and the state that visited.
    fn spill_updated(&mut self, site: &Site, done: &Settled, piece: &Range<u64>, state: &[Visitor]) {
        let (s, bytes) = (done.shard, piece.end - piece.start);
        let own = site.plan.shards[s].layout.own.start;
        let slot = self.rings[site.rings].weights.find(site.shard(s)).expect("its update has just been made");
        // The next unit's boundary tensors go first: what goes home is needed in the next step, its slot not before the
        // unit after.
        let deadline = self.sequence + done.visit;
        let spans = state.iter().map(|v| CopySpan { from: v.here, to: v.home }).collect();
        self.copy_by(site, What::SpillState, s, None, spans, deadline);
        let from = site.arena(site.map.weight_slots.at[slot] + piece.start, bytes);
        let to = site.weights(own + piece.start, bytes);
        self.copy_by(site, What::SpillWeights, s, None, vec![CopySpan { from, to }], deadline);
    }

    /// After an update of shard `s`: copies of its weights elsewhere are stale.
    fn refresh_copies(&mut self, site: &Site, s: usize, deadline: u64) {
        if !site.plan.choice.resident {
            // Where the device has made the update, its own copy is the new one.
            let stays = Self::on_device(site, s) || self.fetch_updated(site, s, deadline);
            for device in 0..self.lanes.len() {
                let rings = self.members[site.member].rings[device];
                let stale = |shard: usize| shard == s && !(stays && rings == site.rings);
                let borrower = |shard: usize| {
                    site.tables.borrows[shard].iter().any(|b| b.owner.is_some_and(|(owner, _)| owner == s))
                };
                let weights = &mut self.rings[rings].weights;
                weights.forget(|held| held.model == site.member && stale(held.shard));
                weights.mark(|held| held.model == site.member && borrower(held.shard));
            }
            return;
        }
        for user in 0..site.plan.shards.len() {
            let there = self.moved_home(site, user);
            let borrows = site.tables.borrows[user].iter();
            let copies = borrows.filter_map(|b| {
                let (_, in_owner) = b.owner.filter(|&(owner, _)| owner == s)?;
                let from = site.arena(site.map.weight_slots.at[s] + in_owner, b.bytes);
                Some((
                    from,
                    site.weights(b.flat, b.bytes),
                    there.arena(there.map.weight_slots.at[user] + b.at, b.bytes),
                ))
            });
            if there.device == site.device {
                let spans = copies.map(|(from, _, to)| CopySpan { from, to }).collect();
                self.copy(site, What::Update, user, None, spans);
            } else {
                let (down, up): (Vec<_>, Vec<_>) =
                    copies.map(|(from, home, to)| (CopySpan { from, to: home }, CopySpan { from: home, to })).unzip();
                self.copy(site, What::SpillWeights, user, None, down);
                self.copy(&there, What::FetchWeights, user, None, up);
            }
        }
    }

    /// Brings what the host has updated of a shard back into the slot that held it, as a part of the next step; tells
    /// whether it does.
    ///
    /// Copies to the device have little to do while gradients leave it. So this is worth its bytes where the next step
    /// is to come here too, and the slot is not handed out before: least recently used goes first, and until this
    /// shard's next visit those before it have theirs.
    fn fetch_updated(&mut self, site: &Site, s: usize, deadline: u64) -> bool {
        let (member, weights) = (&self.members[site.member], &self.rings[site.rings].weights);
        let spare = weights.len().saturating_sub(site.plan.choice.slots);
        let on_disk = site.plan.choice.on_disk >= OnDisk::Weights;
        if spare == 0 || on_disk || member.placed.home != Home::Anywhere || !member.returns[s] {
            return false;
        }
        let others = || self.members.iter().filter(|m| m.placed.home == Home::Anywhere && !m.over);
        let between = (s + 1) * others().count().div_ceil(self.lanes.len());
        let all: usize = others().map(|m| m.plan.shards.len()).sum();
        let next = member.pending.iter().skip_while(|p| p.serial != site.serial).nth(1);
        let (true, Some(next), Some(slot)) = (
            between <= spare || all <= weights.len(),
            next.map(|p| (p.step, p.serial)),
            weights.slot_of(site.shard(s)),
        ) else {
            return false;
        };
        let next = Site { step: next.0, serial: next.1, ..site.clone() };
        let (base, own) = (site.map.weight_slots.at[slot], site.plan.shards[s].layout.own.start);
        for &Piece { range: Range { start, end }, .. } in &site.tables.pieces[s] {
            let from = site.store(site.plan.host.weights + own + start, end - start);
            let to = site.arena(base + start, end - start);
            let task = Task::Copy(vec![CopySpan { from, to }]);
            self.add(&next, site.lanes.h2d, (What::FetchWeights, s), deadline, task, &[from], &[to]);
        }
        true
    }

    /// Brings the remainders and moments of shards at rest to their devices before the first update.
    fn fetch_state(&mut self, site: &Site) {
        let fetched = &mut self.members[site.member].state_fetched;
        if fetched.is_some() {
            return;
        }
        *fetched = Some(site.serial);
        for s in (0..site.plan.shards.len()).filter(|&s| site.plan.choice.rests(s)) {
            let there = self.moved_home(site, s);
            let spans = Self::resident_state(&there, s).map(|(to, from)| CopySpan { from, to }).collect();
            self.copy(&there, What::FetchState, s, None, spans);
        }
    }

    /// At rest: where what only updates touch, a shard's remainders and moments, lies on its device and at home.
    pub(super) fn resident_state(site: &Site, s: usize) -> impl Iterator<Item = (Span, Span)> {
        let (map, plan, ratio) = (&site.map, &site.plan, site.model.layout.wide_ratio);
        let own = &plan.shards[s].layout.own;
        let remainder = map.remainders.get(s).map(|&at| (at, plan.host.remainders, 1));
        let moments = [0, 1].map(|i| map.moments[i].get(s).map(|&at| (at, plan.host.moments[i], ratio)));
        let spans = [remainder, moments[0], moments[1]].map(|place| {
            place.map(|(arena, host, ratio)| {
                let bytes = (own.end - own.start) * ratio;
                (site.arena(arena, bytes), site.update_state(host + own.start * ratio, bytes))
            })
        });
        spans.into_iter().flatten()
    }
}
