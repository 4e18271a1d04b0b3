//! With clipping no shard is updated before the last gradient's norm. Then the host and the shards at rest begin; a shard
//! that visits and that a device updates is due when it comes for the next step, just before the arithmetic that reads
//! its weights. Until then its gradients wait in their slot, or at home.

use super::Engine;
use super::settle::{Due, Settled, within};
use super::site::Site;
use super::tables::Piece;
use super::visit::Pass;
use crate::device::CopySpan;
use crate::spill::{Home, OnDisk};
use crate::trace::What;

impl Engine {
    /// What [`Engine::settle`] does with clipping, but for state that is resident.
    pub(super) fn settle_clipped(&mut self, site: &Site, done: &Settled) {
        let (s, choice) = (done.shard, &site.plan.choice);
        match (choice.rests(s), choice.updates_on_device(s)) {
            (true, _) => self.join_and_norm(site, done, self.sequence),
            (false, true) => {
                self.spill_shared(site, done);
                self.join_and_norm(site, done, self.sequence);
                if !self.waits_in_slot(site, s) {
                    self.move_gradient(site, s, done.slot, What::SpillGradient);
                }
            }
            (false, false) => {
                self.spill_gradient(site, done);
                self.join_and_norm(site, done, self.sequence);
                if choice.on_disk >= OnDisk::Gradients {
                    self.put_off_gradient(site, done);
                }
            }
        }
        if s > 0 {
            return;
        }
        self.bring_norms(site);
        for shard in 0..site.plan.shards.len() {
            let rests = choice.rests(shard);
            if choice.updates_on_device(shard) && !rests {
                continue;
            }
            let there = self.moved(site, self.members[site.member].ran_on[shard]);
            let deadline = if rests { self.sequence } else { done.next_step + shard as u64 * done.visit };
            // Of a shard at rest, its own slot.
            let slot = if rests { shard } else { done.slot };
            self.update(&there, &Settled { shard, slot, ..*done }, deadline);
        }
        if choice.visiting_updates > 0 {
            let first = Settled { shard: choice.resting, ..*done };
            self.members[site.member].due = Some(Due { next: first, step: site.step, serial: site.serial });
        }
    }

    /// Makes the update of a shard that has waited for the norm, and now for the shard's visit: its weights are there.
    pub(super) fn update_due(&mut self, site: &Site, s: usize) {
        let member = &mut self.members[site.member];
        let Some(due) = member.due.filter(|due| due.next.shard == s) else { return };
        let choice = &site.plan.choice;
        let is_last = s + 1 == site.plan.shards.len() || !choice.updates_on_device(s + 1);
        member.due = (!is_last).then_some(Due { next: Settled { shard: s + 1, ..due.next }, ..due });
        // It belongs to the step that it ends.
        let site = Site { step: due.step, serial: due.serial, ..site.clone() };
        self.bring_losses(&site);
        self.bring_all_norms(&site);
        let waits_in_slot = self.waits_in_slot(&site, s);
        let rings = &mut self.rings[site.rings];
        let slot = if waits_in_slot {
            rings.gradient_slot_of(site.shard(s)).expect("nothing has been given its slot since")
        } else {
            let slot = rings.gradient_slot(site.map.gradient_slots.of[s].clone(), site.shard(s));
            self.move_gradient(&site, s, slot, What::FetchGradient);
            slot
        };
        self.update(&site, &Settled { slot, ..due.next }, self.sequence);
    }

    /// Whether a shard's gradients are left in their slot until the shard comes for the next step: the last ones of a
    /// model that is at home on the device.
    fn waits_in_slot(&self, site: &Site, s: usize) -> bool {
        let at_home = self.members[site.member].home_of(s).is_some();
        at_home && site.map.gradient_slots.stays(s, site.plan.choice.resting)
    }

    /// Makes all updates that wait for shards' visits, without these.
    pub(super) fn make_due_updates(&mut self, model: usize) {
        while let Some(Due { next: Settled { shard, .. }, .. }) = self.members[model].due {
            let site = self.site(model, self.members[model].ran_on[shard]);
            self.fetch_weights(&site, shard, Pass::Forward);
            self.update_due(&site, shard);
        }
    }

    /// Brings a step's norms to a device that updates a shard of a model that runs anywhere.
    fn bring_all_norms(&mut self, site: &Site) {
        let member = &mut self.members[site.member];
        let on = &mut member.norms_on[usize::from(site.device)];
        if member.placed.home != Home::Anywhere || std::mem::replace(on, site.serial) == site.serial {
            return;
        }
        let to = self.norms(site, 0);
        let from = site.store(site.plan.host.norms[site.parity()], to.bytes);
        self.copy(site, What::FetchState, 0, None, vec![CopySpan { from, to }]);
    }

    /// Brings to the device, where it updates shards, the norms that the host has summed: no update of theirs can be
    /// clipped without.
    fn bring_norms(&mut self, site: &Site) {
        let choice = &site.plan.choice;
        let by_host = (0..site.plan.shards.len()).filter(|&s| !choice.updates_on_device(s));
        let segments = by_host.flat_map(|s| site.tables.segments[s].iter());
        let (first, end) = segments.fold((u64::MAX, 0), |(first, end), s| {
            let index = u64::from(s.index);
            (first.min(8 * index), end.max(8 * index + 8))
        });
        if !choice.updates_on_device(0) || first >= end {
            return;
        }
        let to = within(self.norms(site, 0), first, end - first);
        let from = site.store(site.plan.host.norms[site.parity()] + first, end - first);
        self.copy(site, What::FetchState, 0, None, vec![CopySpan { from, to }]);
    }

    /// Sends a shard's own gradients from a device's slot to where they wait for its update there, or brings them back.
    fn move_gradient(&mut self, site: &Site, s: usize, slot: usize, what: What) {
        let ratio = site.model.layout.wide_ratio;
        for Piece { range, .. } in &site.tables.pieces[s] {
            let (at, bytes) = (range.start * ratio, (range.end - range.start) * ratio);
            let here = site.arena(site.map.gradient_slots.at[slot] + at, bytes);
            let home = match site.plan.choice.on_disk >= OnDisk::Gradients {
                true => Self::waiting_gradient(site, s, range),
                false => site.store(site.plan.host.shard_gradients[s] + at, bytes),
            };
            let span = match what {
                What::SpillGradient => CopySpan { from: here, to: home },
                _ => CopySpan { from: home, to: here },
            };
            self.copy(site, what, s, None, vec![span]);
        }
    }
}
