//! What a step does with gradients: their way out, the sums over shared parameters, the norm, the update, and what that makes stale.
//!
//! Resident state is settled by the device, spilled state by the host's threads; the tasks are the same, and so are the bits.

use super::tables::{Join, Piece};
use super::{Engine, StepInput};
use crate::device::{Clip, CopySpan, Norm, Span, Task, Update, norm_scratch_bytes};
use crate::trace::What;
use std::ops::Range;
use std::sync::Arc;

impl Engine {
    /// Sends a shard's gradients to the host's store, shared parameters' accumulators with the last piece.
    pub(super) fn spill_gradient(&mut self, s: usize, slot: usize, step: u64) {
        let all = self.plan.shards[s].layout.gradient_bytes;
        let (from, to) = (self.plan.arena.gradient_slots[slot], self.plan.host.shard_gradients[s]);
        let (count, ratio) = (self.visits.pieces[s].len(), self.model.layout.wide_ratio);
        for i in 0..count {
            let Range { start, end } = self.visits.pieces[s][i].range;
            let (start, end) = (start * ratio, end * ratio);
            let bytes = if i + 1 == count { all - start } else { end - start };
            let span = CopySpan { from: self.arena(from + start, bytes), to: self.store(to + start, bytes) };
            self.copy(What::SpillGradient, s, None, step, vec![span]);
        }
    }

    /// Where a shard's gradients lie when its update reads them.
    fn gradients(&self, s: usize) -> Span {
        let bytes = self.plan.shards[s].layout.gradient_bytes;
        match self.plan.choice.resident {
            true => self.arena(self.plan.arena.gradient_slots[s], bytes),
            false => self.store(self.plan.host.shard_gradients[s], bytes),
        }
    }

    fn math_lane(&self) -> u16 {
        if self.plan.choice.resident { self.lanes.compute } else { self.lanes.host }
    }

    fn norms(&self, step: u64) -> Span {
        let bytes = 8 * self.model.train.parameters.len() as u64;
        let parity = (step % 2) as usize;
        match self.plan.choice.resident {
            true => self.arena(self.plan.arena.norms[parity], bytes),
            false => self.store(self.plan.host.norms[parity], bytes),
        }
    }

    /// Adds the accumulators of a shard's shared parameters in the order of layers, then sums its gradients' squares. Users are later
    /// shards, whose backward came before. `deadline` is the norm's.
    pub(super) fn join_and_norm(&mut self, s: usize, step: u64, deadline: u64) {
        let lane = self.math_lane();
        let within = |span: Span, offset: u64, bytes: u64| Span { offset: span.offset + offset, bytes, ..span };
        for i in 0..self.visits.joins[s].len() {
            let Join { user, from, to, bytes } = self.visits.joins[s][i];
            let from = within(self.gradients(user), from, bytes);
            let to = within(self.gradients(s), to, bytes);
            let task = Task::Add(vec![CopySpan { from, to }]);
            self.add(lane, What::Update, s, None, step, self.sequence, task, &[from], &[to]);
        }
        let segments = Arc::clone(&self.visits.segments[s]);
        if segments.is_empty() {
            return;
        }
        let gradient = self.gradients(s);
        let table = self.norms(step);
        // Only this shard's entries are written, so norms of other shards need not wait.
        let first = u64::from(segments[0].index);
        let entries = within(table, 8 * first, 8 * segments.len() as u64);
        let scratch = (self.plan.choice.resident && self.model.train.scratch)
            .then(|| self.arena(self.plan.arena.norm_scratch, norm_scratch_bytes(&segments)));
        let task = Task::Norm(Box::new(Norm { gradient, segments, table, scratch }));
        let writes: &[Span] = &[entries, scratch.unwrap_or(entries)];
        self.add(
            lane,
            What::Norm,
            s,
            None,
            step,
            deadline,
            task,
            &[gradient],
            &writes[..1 + usize::from(scratch.is_some())],
        );
    }

    pub(super) fn update(&mut self, s: usize, input: &StepInput, deadline: u64) {
        if self.visits.segments[s].is_empty() {
            return;
        }
        if self.plan.choice.resident {
            self.fetch_state(input.step);
        }
        for i in 0..self.visits.pieces[s].len() {
            self.update_piece(s, i, input, deadline);
        }
        self.refresh_copies(s, input.step);
    }

    fn update_piece(&mut self, s: usize, i: usize, input: &StepInput, deadline: u64) {
        let Piece { range: Range { start, end }, segments } = self.visits.pieces[s][i].clone();
        let plan = Arc::clone(&self.plan);
        let (flat, bytes) = (plan.shards[s].layout.own.start + start, end - start);
        // Moments and gradients may be wider than weights, and lie as many times further on.
        let ratio = self.model.layout.wide_ratio;
        let (wide_start, wide_bytes) = (start * ratio, bytes * ratio);
        let (weight, remainder, moments) = if plan.choice.resident {
            let of = |at: &u64| self.arena(at + wide_start, wide_bytes);
            let remainder = plan.arena.remainders.get(s).map(|at| self.arena(at + start, bytes));
            let moments = [0, 1].map(|i| plan.arena.moments[i].get(s).map(of));
            (self.arena(plan.arena.weight_slots[s] + start, bytes), remainder, moments)
        } else {
            let of = |i: usize| self.store(plan.host.moments[i] + flat * ratio, wide_bytes);
            let remainder = self.model.has_remainders().then(|| self.store(plan.host.remainders + flat, bytes));
            let moments = [0, 1].map(|i| (i < plan.moments).then(|| of(i)));
            (self.store(plan.host.weights + flat, bytes), remainder, moments)
        };
        let gradient = self.gradients(s);
        let gradient = Span { offset: gradient.offset + wide_start, bytes: wide_bytes, ..gradient };
        let parity = (input.step % 2) as usize;
        let loss_bytes = 4 * self.model.microbatches as u64;
        let gate = match plan.choice.resident {
            true => self.arena(plan.arena.losses[parity], loss_bytes),
            false => self.store(plan.host.losses[parity], loss_bytes),
        };
        let clip = input.clip.map(|max_norm| Clip { max_norm, table: self.norms(input.step) });
        let mut reads = vec![gradient, gate];
        reads.extend(clip.map(|c| c.table));
        let mut writes = vec![weight];
        writes.extend(remainder.iter().chain(moments.iter().flatten()));
        let update = Update { rule: input.rule, segments, weight, remainder, moments, gradient, clip, gate };
        let lane = self.math_lane();
        self.add(lane, What::Update, s, None, input.step, deadline, Task::Update(Box::new(update)), &reads, &writes);
    }

    /// After an update of shard `s`: copies of its weights elsewhere are stale.
    fn refresh_copies(&mut self, s: usize, step: u64) {
        let plan = Arc::clone(&self.plan);
        if !plan.choice.resident {
            let borrows = &self.visits.borrows;
            self.rings.weights.forget(|shard| shard == s || borrows[shard].iter().any(|b| b.owner == s));
            return;
        }
        for user in 0..plan.shards.len() {
            let spans = self.visits.borrows[user]
                .iter()
                .filter(|b| b.owner == s)
                .map(|b| CopySpan {
                    from: self.arena(plan.arena.weight_slots[s] + b.in_owner, b.bytes),
                    to: self.arena(plan.arena.weight_slots[user] + b.at, b.bytes),
                })
                .collect();
            self.copy(What::Update, user, None, step, spans);
        }
    }

    /// Resident: brings remainders and moments to the device before the first update.
    fn fetch_state(&mut self, step: u64) {
        if self.rings.state_fetched {
            return;
        }
        self.rings.state_fetched = true;
        let plan = Arc::clone(&self.plan);
        for (s, shard) in plan.shards.iter().enumerate() {
            let spans = self.update_state(s, &shard.layout.own).map(|(to, from)| CopySpan { from, to }).collect();
            self.copy(What::FetchState, s, None, step, spans);
        }
    }

    /// Resident: where what only updates touch, a shard's remainders and moments, lies on the device and at home.
    pub(super) fn update_state(&self, s: usize, own: &Range<u64>) -> impl Iterator<Item = (Span, Span)> {
        let (plan, ratio) = (&self.plan, self.model.layout.wide_ratio);
        let remainder = plan.arena.remainders.get(s).map(|&at| (at, plan.host.remainders, 1));
        let moments = [0, 1].map(|i| plan.arena.moments[i].get(s).map(|&at| (at, plan.host.moments[i], ratio)));
        let spans = [remainder, moments[0], moments[1]].map(|place| {
            place.map(|(arena, host, ratio)| {
                let bytes = (own.end - own.start) * ratio;
                (self.arena(arena, bytes), self.store(host + own.start * ratio, bytes))
            })
        });
        spans.into_iter().flatten()
    }

    /// Brings a step's losses, and the norms where they are on the device, to the host.
    pub(super) fn result(&mut self, step: u64) {
        let plan = Arc::clone(&self.plan);
        let parity = (step % 2) as usize;
        let bytes = 4 * self.model.microbatches as u64;
        let mut spans = vec![CopySpan {
            from: self.arena(plan.arena.losses[parity], bytes),
            to: self.store(plan.host.losses[parity], bytes),
        }];
        if plan.choice.resident {
            let norms = self.norms(step);
            spans.push(CopySpan { from: norms, to: self.store(plan.host.norms[parity], norms.bytes) });
        }
        self.copy(What::Result, plan.shards.len() - 1, None, step, spans);
    }
}
