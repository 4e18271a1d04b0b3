//! A moment as a policy sees it, and what a claim changes of that: predictions of when queues have run, copies have
//! arrived and slots are free.
//!
//! They follow from the units in the queues, not from the tasks on the lanes: what the lanes do otherwise than
//! predicted shows when a unit ends.

use super::chain::{Chain, Ready};
use super::{Claimed, Turns};
use crate::engine::member::Member;
use crate::engine::rings::{Rings, ShardOf};
use crate::sched::{Claim, ModelId};

impl Turns {
    /// Brings what changes with time up to date.
    pub(super) fn look(&mut self, now: f64) {
        for (view, queue) in self.devices.iter_mut().zip(&self.queues) {
            let end = |from: f64, c: &Claimed| c.last.max(from.max(c.ready) + c.secs / view.speed);
            // What runs has not ended, whatever was predicted.
            let runs = queue.units.front().map_or(now, |c| end(queue.since, c).max(now));
            view.claimed = queue.units.len();
            view.busy_secs = queue.units.iter().skip(1).fold(runs, end) - now;
            view.h2d_secs = (queue.arrived - now).max(0.0);
            view.gradients_secs = queue.gradients_left.front().map_or(0.0, |left| (left - now).max(0.0));
        }
        for (view, Chain { ready, .. }) in self.models.iter_mut().zip(&self.chains) {
            view.weights_ready_secs = (ready.weights - now).max(0.0);
            view.boundary_ready_secs = (ready.boundary - now).max(0.0);
            view.first_ready_secs = (ready.first - now).max(0.0);
        }
    }

    /// Notes what of the models' next units lies on a device, in slots that they share.
    pub(super) fn look_at(&mut self, device: usize, now: f64, rings: Option<&Rings>) {
        let held = &mut self.devices[device].held;
        held.clear();
        self.models.iter_mut().for_each(|model| model.here_bytes = 0);
        let Some(rings) = rings else { return };
        self.queues[device].gradients_left.resize(rings.gradient_slots(), 0.0);
        for ShardOf { model, shard } in rings.weights.held() {
            if usize::from(self.models[model].shard) == shard && self.chains[model].ready.held <= now {
                held.push((model as ModelId, shard as u16));
            }
        }
        for place in rings.activations.held() {
            let wanted = &self.chains[place.model].wanted;
            if place.serial == wanted.serial && place.boundary + 1 == wanted.shard {
                self.models[place.model].here_bytes += wanted.activation_bytes;
            }
        }
        for place in rings.gradients.held() {
            let wanted = &self.chains[place.model].wanted;
            if place.serial == wanted.serial && place.boundary == wanted.shard && wanted.backward {
                self.models[place.model].here_bytes += wanted.gradient_bytes;
            }
        }
    }

    /// Notes that a device has taken a model's next unit, whose tasks have been made.
    pub(super) fn claimed(&mut self, device: usize, model: usize, member: &Member, now: f64) {
        let (view, chain) = (&mut self.models[model], &mut self.chains[model]);
        let (there, queue) = (&self.devices[device], &mut self.queues[device]);
        let (secs, cost, before) = (view.unit_secs, chain.costs[chain.next], chain.ready);
        let follows = matches!(view.claim, Claim::By(_)) && view.last_device != Some(device as u16);
        let a_microbatch = secs / (f64::from(view.microbatches) * there.speed);
        let held = there.held.contains(&(model as u16, view.shard));
        let boundary_bytes = view.boundary_bytes.saturating_sub(view.here_bytes);
        let bytes = if held { 0 } else { view.weight_bytes } + boundary_bytes;
        let shared = self.shared_bytes_per_sec.unwrap_or(f64::INFINITY);
        queue.arrived = queue.arrived.max(now) + bytes as f64 / there.h2d_bytes_per_sec.min(shared);
        let mut ready = if bytes > 0 { queue.arrived } else { now };
        if !held {
            ready = ready.max(before.weights);
        }
        if boundary_bytes > 0 {
            ready = ready.max(if follows { before.first } else { before.boundary });
        }
        if view.leaves_gradients {
            ready = ready.max(now + there.gradients_secs);
        }
        let last = if follows { before.boundary + a_microbatch } else { 0.0 };
        if queue.units.is_empty() {
            queue.since = now;
        }
        let start = (now + there.busy_secs).max(ready);
        let end = last.max(start + secs / there.speed);
        let leaves = queue.left.max(end);
        queue.left = leaves + view.leave_bytes as f64 / queue.d2h_bytes_per_sec.min(shared);
        if view.leaves_gradients && queue.gradients_left.pop_front().is_some() {
            queue.gradients_left.push_back(queue.left);
        }
        let turned = |secs: f64| queue.left + secs;
        chain.ready = Ready {
            weights: cost.turn_secs.map_or(0.0, turned),
            // Where this device makes the update, its slot has it.
            held: cost.turn_secs.filter(|&secs| secs > 0.0).map_or(0.0, turned),
            boundary: leaves + cost.hand_on_secs,
            first: start + a_microbatch + cost.hand_on_secs,
        };
        queue.units.push_back(Claimed { model, secs, ready, last });
        view.last_device = Some(device as u16);
        self.refresh(model, member);
    }
}
