//! What is at home on the disk: its way through stages in host memory, to a device and back, and to an update on the
//! host and back.
//!
//! Stages are used in turn, as tasks are made; when one may be overwritten follows from its bytes, as everywhere. A
//! lane that reads ahead has as many stages as there are, so what is in one goes on without waiting for the next.

use super::Engine;
use super::settle::{Settled, within};
use super::site::Site;
use super::tables::Piece;
use crate::base::align_up;
use crate::device::{CopySpan, Memory, Span, Task};
use crate::graph::ALIGNMENT;
use crate::spill::{OnDisk, update_stage_parts};
use crate::trace::What;
use std::ops::Range;

/// Where an update finds a piece of a shard's state.
#[derive(Clone, Copy, Debug)]
pub(super) struct UpdatePiece {
    pub weight: Span,
    pub remainder: Option<Span>,
    pub moments: [Option<Span>; 2],
    pub gradient: Span,
}

impl UpdatePiece {
    /// Its parts as stages hold them: moments, remainder, gradient, weight.
    fn parts(&mut self) -> [Option<&mut Span>; 5] {
        let [first, second] = &mut self.moments;
        [first.as_mut(), second.as_mut(), self.remainder.as_mut(), Some(&mut self.gradient), Some(&mut self.weight)]
    }
}

/// What of a stage goes back: all but the gradient.
const GOES_BACK: [bool; 5] = [true, true, true, false, true];

impl Engine {
    /// Makes the copies of those `spans` that begin or end on the disk, and leaves the others.
    pub(super) fn copy_by_stages(
        &mut self,
        site: &Site,
        what: What,
        s: usize,
        spans: &mut Vec<CopySpan>,
        deadline: u64,
    ) {
        let on_disk = |c: &CopySpan| c.from.memory == Memory::Disk || c.to.memory == Memory::Disk;
        let host = &site.plan.host;
        for CopySpan { from, to } in spans.extract_if(.., |c| on_disk(c)) {
            for at in (0..from.bytes).step_by(host.copy_stage_bytes as usize) {
                let bytes = host.copy_stage_bytes.min(from.bytes - at);
                let turn = &mut self.members[site.member].copy_stage;
                let stage = site.store(host.copy_stages[*turn], bytes);
                *turn = (*turn + 1) % host.copy_stages.len();
                let (from, to) = (within(from, at, bytes), within(to, at, bytes));
                if from.memory == Memory::Disk {
                    self.read_disk(site, s, deadline, vec![CopySpan { from, to: stage }]);
                    self.copy_by(site, what, s, None, vec![CopySpan { from: stage, to }], deadline);
                } else {
                    self.copy_by(site, what, s, None, vec![CopySpan { from, to: stage }], deadline);
                    self.write_disk(site, s, deadline, vec![CopySpan { from: stage, to }]);
                }
            }
        }
    }

    /// Sends a shard's gradients, whose squares have been summed, from host memory to the disk, where they wait for the
    /// global norm.
    pub(super) fn put_off_gradient(&mut self, site: &Site, done: &Settled) {
        let (s, ratio) = (done.shard, site.model.layout.wide_ratio);
        let gradient = Self::gradients(site, done);
        for Piece { range, .. } in &site.tables.pieces[s] {
            let from = within(gradient, range.start * ratio, (range.end - range.start) * ratio);
            let to = Self::waiting_gradient(site, s, range);
            self.write_disk(site, s, self.sequence, vec![CopySpan { from, to }]);
        }
    }

    /// Where a stretch of a shard's gradients waits on the disk, by that of its weights.
    pub(super) fn waiting_gradient(site: &Site, s: usize, stretch: &Range<u64>) -> Span {
        let (own, ratio) = (site.plan.shards[s].layout.own.start, site.model.layout.wide_ratio);
        let offset = site.plan.host.waiting_gradients + (own + stretch.start) * ratio;
        site.home(OnDisk::Gradients, offset, (stretch.end - stretch.start) * ratio)
    }

    /// Reads what of a piece is on the disk into the next stage, and gives the places there, with the copies back that
    /// are due after the update.
    pub(super) fn stage_update(
        &mut self,
        site: &Site,
        s: usize,
        piece: &mut UpdatePiece,
        deadline: u64,
    ) -> Vec<CopySpan> {
        let (plan, host) = (&site.plan, &site.plan.host);
        if !piece.parts().into_iter().flatten().any(|part| part.memory == Memory::Disk) {
            return Vec::new();
        }
        let turn = &mut self.members[site.member].update_stage;
        let mut at = host.update_stages[*turn];
        *turn = (*turn + 1) % host.update_stages.len();
        let sizes = update_stage_parts(&site.model, plan.choice.on_disk, plan.updates.moments, piece.weight.bytes);
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        for ((part, bytes), goes_back) in piece.parts().into_iter().zip(sizes).zip(GOES_BACK) {
            let Some(part) = part.filter(|part| part.memory == Memory::Disk) else { continue };
            let (home, stage) = (*part, site.store(at, bytes));
            at += align_up(bytes, ALIGNMENT);
            reads.push(CopySpan { from: home, to: stage });
            if goes_back {
                writes.push(CopySpan { from: stage, to: home });
            }
            *part = stage;
        }
        self.read_disk(site, s, deadline, reads);
        writes
    }

    fn read_disk(&mut self, site: &Site, s: usize, deadline: u64, spans: Vec<CopySpan>) {
        self.move_on_disk(site, (What::DiskRead, s), deadline, spans);
    }

    pub(super) fn write_disk(&mut self, site: &Site, s: usize, deadline: u64, spans: Vec<CopySpan>) {
        self.move_on_disk(site, (What::DiskWrite, s), deadline, spans);
    }

    fn move_on_disk(&mut self, site: &Site, of: (What, usize), deadline: u64, spans: Vec<CopySpan>) {
        if spans.is_empty() {
            return;
        }
        let lanes = site.lanes.disk.expect("plans put something on the disk where there is one");
        let lane = if of.0 == What::DiskRead { lanes.read } else { lanes.write };
        let (reads, writes): (Vec<Span>, Vec<Span>) = spans.iter().map(|c| (c.from, c.to)).unzip();
        self.add(site, lane, of, deadline, Task::Copy(spans), &reads, &writes);
    }
}
