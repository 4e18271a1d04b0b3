//! A moment as a policy sees it, and what a claim changes of that: predictions of when queues have run, copies have
//! arrived and slots are free.
//!
//! They follow from the units in the queues, not from the tasks on the lanes: what the lanes do otherwise than
//! predicted shows when a unit ends.

use super::{Claimed, Ready, Turns};
use crate::engine::member::Member;
use crate::engine::rings::{Rings, ShardOf};
use crate::sched::{Claim, ModelId};

impl Turns {
    /// Brings what changes with time up to date.
    pub(super) fn look(&mut self, now: f64) {
        for (d, view) in self.devices.iter_mut().enumerate() {
            let end = |from: f64, c: &Claimed| c.last.max(from.max(c.ready) + c.secs / view.speed);
            // What runs has not ended, whatever was predicted.
            let runs = self.queues[d].front().map_or(now, |c| end(self.since[d], c).max(now));
            view.claimed = self.queues[d].len();
            view.busy_secs = self.queues[d].iter().skip(1).fold(runs, end) - now;
            view.h2d_secs = (self.arrived[d] - now).max(0.0);
            view.gradients_secs = self.gradients_left[d].front().map_or(0.0, |left| (left - now).max(0.0));
        }
        for (view, ready) in self.models.iter_mut().zip(&self.ready) {
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
        self.gradients_left[device].resize(rings.gradient_slots(), 0.0);
        for ShardOf { model, shard } in rings.weights.held() {
            if usize::from(self.models[model].shard) == shard && self.ready[model].held <= now {
                held.push((model as ModelId, shard as u16));
            }
        }
        for place in rings.activations.held() {
            let wanted = &self.wanted[place.model];
            if place.serial == wanted.serial && place.boundary + 1 == wanted.shard {
                self.models[place.model].here_bytes += wanted.activation_bytes;
            }
        }
        for place in rings.gradients.held() {
            let wanted = &self.wanted[place.model];
            if place.serial == wanted.serial && place.boundary == wanted.shard && wanted.backward {
                self.models[place.model].here_bytes += wanted.gradient_bytes;
            }
        }
    }

    /// Notes that a device has taken a model's next unit, whose tasks have been made.
    pub(super) fn claimed(&mut self, device: usize, model: usize, member: &Member, now: f64) {
        let view = &self.models[model];
        let (shard, secs) = (view.shard, view.unit_secs);
        let cost = self.costs[model][self.next_unit[model]];
        let here = view.last_device == Some(device as u16);
        let follows = matches!(view.claim, Claim::By(_)) && !here;
        let a_microbatch = secs / (f64::from(view.microbatches) * self.devices[device].speed);
        let held = self.devices[device].held.contains(&(model as u16, shard));
        let boundary_bytes = view.boundary_bytes.saturating_sub(view.here_bytes);
        let bytes = if held { 0 } else { view.weight_bytes } + boundary_bytes;
        let shared = self.shared_bytes_per_sec.unwrap_or(f64::INFINITY);
        let rate = self.devices[device].h2d_bytes_per_sec.min(shared);
        self.arrived[device] = self.arrived[device].max(now) + bytes as f64 / rate;
        let mut ready = if bytes > 0 { self.arrived[device] } else { now };
        ready = if held { ready } else { ready.max(self.ready[model].weights) };
        let before = self.ready[model];
        ready = ready.max(if boundary_bytes == 0 {
            0.0
        } else if follows {
            before.first
        } else {
            before.boundary
        });
        if view.leaves_gradients {
            ready = ready.max(now + self.devices[device].gradients_secs);
        }
        let last = if follows { before.boundary + a_microbatch } else { 0.0 };
        if self.queues[device].is_empty() {
            self.since[device] = now;
        }
        let queue_end = now + self.devices[device].busy_secs;
        let start = queue_end.max(ready);
        let end = last.max(start + secs / self.devices[device].speed);
        let d2h = self.d2h_bytes_per_sec[device].min(shared);
        let leaves = self.left[device].max(end);
        self.left[device] = leaves + view.leave_bytes as f64 / d2h;
        if view.leaves_gradients && self.gradients_left[device].pop_front().is_some() {
            self.gradients_left[device].push_back(self.left[device]);
        }
        let turned = |secs: f64| self.left[device] + secs;
        self.ready[model] = Ready {
            weights: cost.turn_secs.map_or(0.0, turned),
            // Where this device makes the update, its slot has it.
            held: cost.turn_secs.filter(|&secs| secs > 0.0).map_or(0.0, turned),
            boundary: leaves + cost.hand_on_secs,
            first: start + a_microbatch + cost.hand_on_secs,
        };
        self.queues[device].push_back(Claimed { model, secs, ready, last });
        self.models[model].last_device = Some(device as u16);
        self.refresh(model, member);
    }
}
