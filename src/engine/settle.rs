//! What a step does with gradients: their way out, the sums over shared parameters, the norm, and when each shard is
//! updated.
//!
//! State that is resident is settled by its device once the last gradient is there. State that visits is settled shard
//! by shard: by the host's threads, or by the device that has just computed the gradients; beside it that of shards at
//! rest, by their device. With clipping all of it waits for the last norm (`clipped`). The tasks are the same, and so are
//! the bits.

use super::Engine;
use super::site::Site;
use super::tables::{Join, Piece};
use crate::device::{CopySpan, Norm, Span, Task, UpdateRule, norm_scratch_bytes};
use crate::trace::What;
use std::sync::Arc;

/// A shard whose gradients are complete once the tasks made so far have run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settled {
    pub shard: usize,
    /// The gradient slot that has them.
    pub slot: usize,
    pub rule: UpdateRule,
    pub clip: Option<f64>,
    /// Deadlines: the next step's first visit, and how far visits are apart.
    pub next_step: u64,
    pub visit: u64,
}

/// Updates that devices make of shards when these come for the next step, in the order of shards.
#[derive(Clone, Copy, Debug)]
pub(super) struct Due {
    /// The next of them; its slot is not known yet.
    pub next: Settled,
    /// The step that they end.
    pub step: u64,
    pub serial: u64,
}

pub(super) fn within(span: Span, offset: u64, bytes: u64) -> Span {
    Span { offset: span.offset + offset, bytes, ..span }
}

impl Engine {
    /// Settles what can be settled after a shard's backward.
    pub(super) fn settle(&mut self, site: &Site, done: &Settled) {
        let (s, n, choice) = (done.shard, site.plan.shards.len(), &site.plan.choice);
        if choice.resident {
            if choice.crosses {
                self.spill_shared(site, done);
            }
            if s == 0 {
                self.settle_resident(site, done);
            }
            return;
        }
        if site.is_last(s) {
            self.result(site);
        }
        if done.clip.is_some() {
            return self.settle_clipped(site, done);
        }
        match (choice.rests(s), choice.updates_on_device(s)) {
            (true, _) => {
                self.join_and_norm(site, done, self.sequence);
                self.update(site, done, self.sequence);
            }
            (false, true) => {
                self.spill_shared(site, done);
                self.join_and_norm(site, done, self.sequence);
                self.bring_losses(site);
                self.update(site, done, self.sequence);
            }
            // Nobody but the report waits for the norm: it gives way to the updates, of which the first shard's is
            // needed first in the next step.
            (false, false) => {
                self.spill_gradient(site, done);
                self.join_and_norm(site, done, done.next_step + n as u64 * done.visit);
                self.update(site, done, done.next_step + s as u64 * done.visit);
            }
        }
    }

    /// The same model and step on another device.
    pub(super) fn moved(&self, site: &Site, device: u16) -> Site {
        if device == site.device {
            return site.clone();
        }
        Site { step: site.step, serial: site.serial, ..self.site(site.member, device) }
    }

    /// The same on the device where a shard's state is at home.
    pub(super) fn moved_home(&self, site: &Site, s: usize) -> Site {
        self.moved(site, self.members[site.member].home_of(s).expect("state at rest is at home on a device"))
    }

    /// Settles a model whose state is at home on devices: norms everywhere, then updates everywhere.
    fn settle_resident(&mut self, site: &Site, done: &Settled) {
        let n = site.plan.shards.len();
        let settled = |s: usize| Settled { shard: s, slot: s, ..*done };
        for s in (0..n).rev() {
            self.join_and_norm(&self.moved_home(site, s), &settled(s), self.sequence);
        }
        self.result(&self.moved_home(site, n - 1));
        if site.plan.choice.crosses {
            self.gather_norms(site, done.clip.is_some());
        }
        for s in 0..n {
            self.update(&self.moved_home(site, s), &settled(s), self.sequence);
        }
    }

    /// Sends every device's norms to the host, and with clipping the whole table back to each, with the losses.
    fn gather_norms(&mut self, site: &Site, clips: bool) {
        let parity = site.parity();
        for s in 0..site.plan.shards.len() {
            self.send_norms(&self.moved_home(site, s), s);
        }
        for device in 0..self.lanes.len() as u16 {
            let visits = (0..site.plan.shards.len()).any(|s| self.members[site.member].home_of(s) == Some(device));
            if !visits {
                continue;
            }
            let there = self.moved(site, device);
            self.bring_losses(&there);
            if clips {
                let to = self.norms(&there, 0);
                let from = there.store(there.plan.host.norms[parity], to.bytes);
                self.copy(&there, What::FetchState, 0, None, vec![CopySpan { from, to }]);
            }
        }
    }

    /// Sends the norms of a shard's tensors from its device to the host.
    fn send_norms(&mut self, site: &Site, s: usize) {
        let segments = &site.tables.segments[s];
        if segments.is_empty() {
            return;
        }
        let (first, bytes) = (8 * u64::from(segments[0].index), 8 * segments.len() as u64);
        let from = within(self.norms(site, s), first, bytes);
        let to = site.store(site.plan.host.norms[site.parity()] + first, bytes);
        self.copy(site, What::Norm, s, None, vec![CopySpan { from, to }]);
    }

    /// Sends a shard's gradients to the host's store, shared parameters' accumulators with the last piece.
    pub(super) fn spill_gradient(&mut self, site: &Site, done: &Settled) {
        let s = done.shard;
        let all = site.plan.shards[s].layout.gradient_bytes;
        let (from, to) = (site.map.gradient_slots.at[done.slot], site.plan.host.shard_gradients[s]);
        let (pieces, ratio) = (&site.tables.pieces[s], site.model.layout.wide_ratio);
        for (i, Piece { range, .. }) in pieces.iter().enumerate() {
            let (start, end) = (range.start * ratio, range.end * ratio);
            let bytes = if i + 1 == pieces.len() { all - start } else { end - start };
            let span = CopySpan { from: site.arena(from + start, bytes), to: site.store(to + start, bytes) };
            self.copy(site, What::SpillGradient, s, None, vec![span]);
        }
    }

    /// Sends the accumulators of parameters that other shards own to the host's store, from where their owners fetch
    /// them.
    pub(super) fn spill_shared(&mut self, site: &Site, done: &Settled) {
        let s = done.shard;
        let (from, to) = (site.map.gradient_slots.at[done.slot], site.plan.host.shard_gradients[s]);
        let uses = site.plan.shards[s].layout.shared.iter().filter(|u| u.borrowed.is_some());
        let copy = |u: &crate::graph::SharedUse| {
            let bytes = site.model.gradient_bytes(u.parameter);
            CopySpan { from: site.arena(from + u.gradient, bytes), to: site.store(to + u.gradient, bytes) }
        };
        self.copy(site, What::SpillGradient, s, None, uses.map(copy).collect());
    }

    /// Whether a shard's gradients are settled where they were computed.
    pub(super) fn on_device(site: &Site, s: usize) -> bool {
        site.plan.choice.updates_on_device(s)
    }

    pub(super) fn math_lane(site: &Site, s: usize) -> u16 {
        if Self::on_device(site, s) { site.lanes.compute } else { site.lanes.host }
    }

    /// Where a shard's gradients lie when its update reads them.
    pub(super) fn gradients(site: &Site, done: &Settled) -> Span {
        let bytes = site.plan.shards[done.shard].layout.gradient_bytes;
        match Self::on_device(site, done.shard) {
            true => site.arena(site.map.gradient_slots.at[done.slot], bytes),
            false => site.store(site.plan.host.shard_gradients[done.shard], bytes),
        }
    }

    /// The table of norms where a shard is settled.
    pub(super) fn norms(&self, site: &Site, s: usize) -> Span {
        let bytes = 8 * site.model.layout.order.len() as u64;
        match Self::on_device(site, s) {
            true => site.arena(site.map.norms[site.parity()], bytes),
            false => site.store(site.plan.host.norms[site.parity()], bytes),
        }
    }

    /// The accumulator of a shared parameter's further use: where it can be added to its owner's, or at home, from
    /// where it visits an owner that does.
    fn joining(&mut self, site: &Site, done: &Settled, join: &Join) -> Span {
        let &Join { user, from, bytes, visits_at, .. } = join;
        let in_store = site.store(site.plan.host.shard_gradients[user] + from, bytes);
        if !Self::on_device(site, done.shard) {
            return in_store;
        }
        let gradient = Self::gradients(site, done);
        let member = &self.members[site.member];
        if user == done.shard {
            within(gradient, from, bytes)
        } else if site.plan.choice.rests(user) && member.home_of(user) == Some(site.device) {
            site.arena(site.map.gradient_slots.at[user] + from, bytes)
        } else if !site.plan.choice.rests(done.shard) {
            in_store
        } else {
            let visiting = within(gradient, visits_at, bytes);
            let span = CopySpan { from: in_store, to: visiting };
            self.copy(site, What::FetchGradient, done.shard, None, vec![span]);
            visiting
        }
    }

    /// Adds the accumulators of a shard's shared parameters in the order of layers, then sums its gradients' squares.
    /// Users are later shards, whose backward came before. `deadline` is the norm's.
    pub(super) fn join_and_norm(&mut self, site: &Site, done: &Settled, deadline: u64) {
        let (s, lane) = (done.shard, Self::math_lane(site, done.shard));
        let gradient = Self::gradients(site, done);
        for join in &site.tables.joins[s] {
            let from = self.joining(site, done, join);
            let to = within(gradient, join.to, join.bytes);
            // What visits comes in pieces of what has room.
            let piece_bytes = if from.memory == to.memory { to.bytes.max(1) } else { site.map.update_slot_bytes };
            for at in (0..to.bytes).step_by(piece_bytes as usize) {
                let bytes = piece_bytes.min(to.bytes - at);
                let (mut from, to) = (within(from, at, bytes), within(to, at, bytes));
                if from.memory != to.memory {
                    let slot = self.rings[site.rings].update_slot();
                    let visiting = site.arena(site.map.update_slots[slot], bytes);
                    self.copy(site, What::FetchGradient, s, None, vec![CopySpan { from, to: visiting }]);
                    from = visiting;
                }
                let task = Task::Add(vec![CopySpan { from, to }]);
                self.add(site, lane, (What::Update, s), self.sequence, task, &[from], &[to]);
            }
        }
        let segments = Arc::clone(&site.tables.segments[s]);
        if segments.is_empty() {
            return;
        }
        let table = self.norms(site, s);
        // Only this shard's entries are written, so norms of other shards need not wait.
        let entries = within(table, 8 * u64::from(segments[0].index), 8 * segments.len() as u64);
        let scratch = (Self::on_device(site, s) && site.model.train.scratch)
            .then(|| site.arena(site.map.norm_scratch, norm_scratch_bytes(&segments)));
        let task = Task::Norm(Box::new(Norm { gradient, segments, table, scratch }));
        let writes: &[Span] = &[entries, scratch.unwrap_or(entries)];
        let writes = &writes[..1 + usize::from(scratch.is_some())];
        self.add(site, lane, (What::Norm, s), deadline, task, &[gradient], writes);
        if !site.plan.choice.resident && Self::on_device(site, s) {
            self.send_norms(site, s);
        }
    }

    /// Brings a step's losses to the host from the device that has them, and the norms where that one has them all.
    pub(super) fn result(&mut self, site: &Site) {
        let parity = site.parity();
        let bytes = 4 * site.model.microbatches as u64;
        let mut spans = vec![CopySpan {
            from: site.arena(site.map.losses[parity], bytes),
            to: site.store(site.plan.host.losses[parity], bytes),
        }];
        if site.plan.choice.resident && !site.plan.choice.crosses {
            let norms = self.norms(site, 0);
            spans.push(CopySpan { from: norms, to: site.store(site.plan.host.norms[parity], norms.bytes) });
        }
        self.members[site.member].losses_on[usize::from(site.device)] = site.serial;
        self.copy(site, What::Result, site.plan.shards.len() - 1, None, spans);
    }

    /// Brings a step's losses to a device that updates and has not computed them.
    pub(super) fn bring_losses(&mut self, site: &Site) {
        let on = &mut self.members[site.member].losses_on[usize::from(site.device)];
        if std::mem::replace(on, site.serial) == site.serial {
            return;
        }
        let (parity, bytes) = (site.parity(), 4 * site.model.microbatches as u64);
        let from = site.store(site.plan.host.losses[parity], bytes);
        let to = site.arena(site.map.losses[parity], bytes);
        self.copy(site, What::FetchState, site.plan.shards.len() - 1, None, vec![CopySpan { from, to }]);
    }
}
