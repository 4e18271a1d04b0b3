//! A toy executor, independent of the real one, to compare policies in unit tests: models as lists of units, devices
//! with double buffering, one first-in-first-out link to each device or one for all.
//!
//! When a unit is claimed everything is known: its copies follow those asked for before, and it starts once they are
//! there, its predecessor has ended and the device is free. So the only events are ends of units. Nothing leaves a
//! device, in bytes or in time.

use crate::sched::*;
use std::collections::VecDeque;

/// One unit of a model.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    pub shard: u16,
    /// Seconds at speed 1.
    pub secs: f64,
    pub weight_bytes: u64,
    pub boundary_bytes: u64,
    /// A backward unit: what its slot holds afterwards is out of date.
    pub updates: bool,
}

/// Models and devices. Rates are in bytes per second.
#[derive(Clone, Debug)]
pub struct Toy {
    pub models: Vec<Vec<Unit>>,
    /// Speed and link of each.
    pub devices: Vec<(f64, f64)>,
    pub shared_rate: Option<f64>,
    pub slots: usize,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Ran {
    pub makespan: f64,
    /// Device, model and start of each unit, in the order of the choices.
    pub units: Vec<(DeviceId, ModelId, f64)>,
    pub h2d_bytes: u64,
}

impl Toy {
    /// Runs all units.
    pub fn run(&self, policy: &dyn Policy) -> Ran {
        self.run_asking(policy, |device| device.busy_secs)
    }

    /// Runs all units. Of the devices that can take one, that with the least `order` is asked first, and of equal ones
    /// the fastest.
    pub fn run_asking(&self, policy: &dyn Policy, order: fn(&DeviceView) -> f64) -> Ran {
        let mut models: Vec<ModelView> = (0..self.models.len()).map(|id| self.model_view(id, 0, None)).collect();
        let device_view = |(id, &(speed, rate))| DeviceView {
            id: id as DeviceId,
            speed,
            held: vec![],
            claimed: 0,
            busy_secs: 0.0,
            h2d_bytes_per_sec: rate,
            h2d_secs: 0.0,
            gradients_secs: 0.0,
        };
        let mut devices: Vec<DeviceView> = self.devices.iter().enumerate().map(device_view).collect();
        let mut done = vec![0; models.len()];
        let mut ends = vec![0f64; models.len()];
        let mut queues: Vec<VecDeque<(usize, f64)>> = vec![VecDeque::new(); devices.len()];
        let mut links = vec![0f64; devices.len()];
        let (mut now, mut last) = (0f64, None);
        let mut ran = Ran { makespan: 0.0, units: vec![], h2d_bytes: 0 };
        loop {
            let mut asked = vec![false; devices.len()];
            loop {
                for (d, device) in devices.iter_mut().enumerate() {
                    device.claimed = queues[d].len();
                    device.busy_secs = queues[d].back().map_or(0.0, |&(_, end)| end - now);
                    device.h2d_secs = (links[d] - now).max(0.0);
                }
                let able =
                    devices.iter().filter(|device| device.claimed < self.slots && !asked[usize::from(device.id)]);
                let sooner =
                    |a: &&DeviceView, b: &&DeviceView| order(a).total_cmp(&order(b)).then(b.speed.total_cmp(&a.speed));
                let Some(asking) = able.min_by(sooner) else { break };
                let d = usize::from(asking.id);
                for model in &mut models {
                    model.here_bytes = if model.last_device == Some(asking.id) { model.boundary_bytes } else { 0 };
                }
                let view = View {
                    device: asking.id,
                    choices: ran.units.len() as u64,
                    last,
                    models: &models,
                    devices: &devices,
                    shared_bytes_per_sec: self.shared_rate,
                };
                let chosen = view.candidates().next().and_then(|_| policy.choose(&view));
                let Some(id) = chosen else {
                    asked[d] = true;
                    continue;
                };
                assert!(view.candidates().any(|model| model.id == id), "{} chose {id}", policy.name());
                let (m, device) = (usize::from(id), &mut devices[d]);
                let unit = self.models[m][done[m]];
                let mut bytes = if models[m].last_device == Some(d as DeviceId) { 0 } else { unit.boundary_bytes };
                match device.held.iter().position(|&held| held == (id, unit.shard)) {
                    Some(at) => _ = device.held.remove(at),
                    None => bytes += unit.weight_bytes,
                }
                // The slot of a unit that updates is taken as well, by a shard that nobody asks for.
                device.held.push((id, if unit.updates { u16::MAX } else { unit.shard }));
                let over = device.held.len().saturating_sub(self.slots);
                device.held.drain(..over);
                let mut start = ends[m].max(queues[d].back().map_or(now, |&(_, end)| end));
                if bytes > 0 {
                    let rate = self.devices[d].1.min(self.shared_rate.unwrap_or(f64::INFINITY));
                    let arrived = links[d].max(now) + bytes as f64 / rate;
                    let all = if self.shared_rate.is_some() { 0..links.len() } else { d..d + 1 };
                    links[all].fill(arrived);
                    start = start.max(arrived);
                }
                ends[m] = start + unit.secs / self.devices[d].0;
                queues[d].push_back((m, ends[m]));
                done[m] += 1;
                models[m] = self.model_view(m, done[m], Some(d as DeviceId));
                ran.units.push((d as DeviceId, id, start));
                ran.h2d_bytes += bytes;
                last = Some(id);
            }
            let ends_of_first = queues.iter().filter_map(|queue| Some(queue.front()?.1));
            let Some(next) = ends_of_first.min_by(f64::total_cmp) else { break };
            now = next;
            for queue in &mut queues {
                while let Some(&(m, end)) = queue.front()
                    && end == now
                {
                    queue.pop_front();
                    if done[m] < self.models[m].len() && queue.iter().all(|&(other, _)| other != m) {
                        models[m].claim = Claim::Idle;
                    }
                }
            }
        }
        assert!(done.iter().zip(&self.models).all(|(&done, units)| done == units.len()), "{} stopped", policy.name());
        ran.makespan = now;
        ran
    }

    /// A model of which `done` units are claimed, the last of them by `device`.
    fn model_view(&self, id: usize, done: usize, device: Option<DeviceId>) -> ModelView {
        let to_come = &self.models[id][done..];
        let none = Unit { shard: 0, secs: 0.0, weight_bytes: 0, boundary_bytes: 0, updates: false };
        let next = to_come.first().unwrap_or(&none);
        ModelView {
            claim: if to_come.is_empty() { Claim::Away } else { device.map_or(Claim::Idle, Claim::By) },
            remaining_secs: to_come.iter().map(|unit| unit.secs).sum(),
            remaining_bytes: to_come.iter().map(|unit| unit.weight_bytes).sum(),
            shard: next.shard,
            unit_secs: next.secs,
            weight_bytes: next.weight_bytes,
            boundary_bytes: next.boundary_bytes,
            last_device: device,
            ..ModelView::away(id as ModelId)
        }
    }
}
