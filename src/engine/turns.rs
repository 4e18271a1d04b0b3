//! Who is next: a device that can begin to fetch another unit asks the policy for one, and keeps it in its queue until
//! it has run.
//!
//! Invariant: a unit is claimed after all that it follows, so queues never wait for each other in a circle. Units of
//! one model in one queue run in order without any rule that says so; where a policy pipelines, a unit may follow one
//! on another device, and each of its microbatches then waits for the bytes that the same one leaves there. A device
//! holds as many units as it has weight slots: one that runs, the others on their way.

mod chain;
mod moment;

use super::Engine;
use super::member::Member;
use super::rings::Rings;
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::sim::CostModel;
use crate::sched::{Claim, DeviceView, ModelId, ModelView, Policy, View};
use crate::spill::{FleetMap, Home, Placed};
use crate::trace::Event;
use chain::Chain;
use std::collections::VecDeque;

/// How several models take turns on devices.
pub struct TurnOptions {
    /// Chooses the model whose unit a device takes.
    pub policy: Box<dyn Policy>,
    /// Units that a device has in its queue: the running one, and those that are fetched beside it.
    pub units: usize,
    /// What each device achieves, by which seconds are predicted until they are measured.
    pub costs: Vec<CostModel>,
    /// Bytes per second that the devices' links share.
    pub shared_bytes_per_sec: Option<f64>,
    /// Bytes of each device's arena that weight slots may fill, however many models there are.
    pub arena_bytes: Vec<u64>,
    /// Bytes of each device's arena into which models that come later must fit; empty: the same.
    pub room_bytes: Vec<u64>,
}

impl TurnOptions {
    /// Where models lie in these arenas.
    pub(super) fn map(&self, models: &[Placed]) -> FleetMap {
        map_within(models, &self.arena_bytes)
    }
}

pub(super) fn map_within(models: &[Placed], arena_bytes: &[u64]) -> FleetMap {
    FleetMap::within(models, &arena_bytes.iter().map(|&bytes| Some(bytes)).collect::<Vec<_>>())
}

/// A unit in a device's queue.
#[derive(Clone, Copy, Debug)]
struct Claimed {
    model: usize,
    /// Predicted seconds on the first device.
    secs: f64,
    /// When what it fetches should have arrived, of boundary tensors the first.
    ready: f64,
    /// It does not end before: it follows a unit on another device.
    last: f64,
}

/// A device's units, and when its lanes should have done what these ask of them. Times are in seconds of the devices'
/// clock.
#[derive(Clone, Debug)]
struct DeviceQueue {
    units: VecDeque<Claimed>,
    /// When the running unit can have started, and its seconds of arithmetic so far.
    since: f64,
    running_secs: f64,
    /// When the copies to the device that were asked for should have arrived.
    arrived: f64,
    d2h_bytes_per_sec: f64,
    /// When all that units leave behind should have left.
    left: f64,
    /// The same for what each gradient slot holds, the one that is free first in front.
    gradients_left: VecDeque<f64>,
}

/// The state of a schedule.
pub(super) struct Turns {
    policy: Box<dyn Policy>,
    units: usize,
    shared_bytes_per_sec: Option<f64>,
    pub arena_bytes: Vec<u64>,
    pub room_bytes: Vec<u64>,
    /// What the first device achieves.
    cost: CostModel,
    /// No unit is given out: the devices are to come to rest.
    pub paused: bool,
    /// What policies see of models and devices, and what that is made of.
    models: Vec<ModelView>,
    devices: Vec<DeviceView>,
    chains: Vec<Chain>,
    queues: Vec<DeviceQueue>,
    choices: u64,
    last: Option<ModelId>,
    /// A model has begun work, or has left its places in queues, since devices were asked last.
    pub dirty: bool,
    /// Devices with room, in the order in which they are asked; kept for its memory.
    order: Vec<usize>,
}

impl Turns {
    pub fn new(options: TurnOptions, members: &[Member], lanes: &[LaneId]) -> Turns {
        let TurnOptions { policy, units, costs, shared_bytes_per_sec, arena_bytes, room_bytes } = options;
        let devices = lanes.iter().filter(|l| l.kind == LaneKind::Compute && !l.is_host()).count();
        let cost = |d: usize| &costs[d.min(costs.len() - 1)];
        let total = |d: usize| -> f64 {
            members.iter().map(|m| m.plan.shards.iter().map(|s| s.step_secs(cost(d))).sum::<f64>()).sum()
        };
        let first_total = total(0);
        let view = |d: usize| DeviceView {
            id: d as u16,
            speed: if costs.len() > 1 { first_total / total(d) } else { 1.0 },
            held: Vec::with_capacity(8),
            claimed: 0,
            busy_secs: 0.0,
            h2d_bytes_per_sec: cost(d).h2d_bytes_per_sec,
            h2d_secs: 0.0,
            gradients_secs: 0.0,
        };
        let queue = |d: usize| DeviceQueue {
            units: VecDeque::with_capacity(units + 1),
            since: 0.0,
            running_secs: 0.0,
            arrived: 0.0,
            d2h_bytes_per_sec: cost(d).d2h_bytes_per_sec,
            left: 0.0,
            gradients_left: VecDeque::new(),
        };
        let mut turns = Turns {
            policy,
            units: units.max(1),
            shared_bytes_per_sec,
            room_bytes: if room_bytes.is_empty() { arena_bytes.clone() } else { room_bytes },
            arena_bytes,
            cost: cost(0).clone(),
            paused: false,
            models: Vec::new(),
            devices: (0..devices).map(view).collect(),
            chains: Vec::new(),
            queues: (0..devices).map(queue).collect(),
            choices: 0,
            last: None,
            dirty: false,
            order: Vec::with_capacity(devices),
        };
        members.iter().for_each(|member| turns.add(member));
        turns
    }

    /// Adds a model after those that are there.
    pub fn add(&mut self, member: &Member) {
        let number = self.models.len();
        self.chains.push(Chain::new(&member.placed, &self.cost));
        self.models.push(ModelView::away(number as u16));
        self.refresh(number, member);
    }

    /// A compute task has ended: measures the unit, and with its last task frees its place.
    pub fn task_ended(&mut self, event: &Event, ends_unit: bool, member: &Member) {
        let (device, model) = (usize::from(event.lane.device), usize::from(event.name.model));
        let queue = &mut self.queues[device];
        queue.running_secs += event.secs();
        // A model that ends early has left its queue already.
        if !ends_unit || queue.units.front().is_none_or(|c| c.model != model) {
            return;
        }
        let claimed = queue.units.pop_front().expect("looked at just above");
        let measured = std::mem::take(&mut queue.running_secs);
        queue.since = event.end_secs;
        // Predictions are in seconds of the first device, corrected so far.
        let ratio = measured * self.devices[device].speed / claimed.secs.max(1e-12);
        self.chains[model].correction *= 0.9 + 0.1 * ratio.clamp(0.1, 10.0);
        self.refresh(model, member);
    }

    /// Takes a model's units out of every queue.
    pub fn release(&mut self, model: usize) {
        self.queues.iter_mut().for_each(|q| q.units.retain(|c| c.model != model));
        // Where no other unit runs, none ends after which devices would be asked.
        self.dirty = true;
    }

    /// The next choice that is to be made: a device with room, and the model that it takes. `rings` are the slots that
    /// models share on a device.
    fn next<'a>(&mut self, now: f64, rings: impl Fn(usize) -> Option<&'a Rings>) -> Result<Option<(usize, usize)>> {
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        order.extend(
            (0..self.devices.len()).filter(|&d| self.queues[d].units.len() < self.units && self.has_candidate(d)),
        );
        self.order = order;
        if self.order.is_empty() {
            return Ok(None);
        }
        self.look(now);
        // The one that is free soonest is asked first, and of equal ones the fastest: see `sched`.
        let devices = &self.devices;
        self.order.sort_unstable_by(|&a, &b| {
            let (x, y) = (&devices[a], &devices[b]);
            x.busy_secs.total_cmp(&y.busy_secs).then(y.speed.total_cmp(&x.speed)).then(a.cmp(&b))
        });
        for i in 0..self.order.len() {
            let device = self.order[i];
            self.look_at(device, now, rings(device));
            let view = View { device: device as u16, ..self.view() };
            let Some(model) = self.policy.choose(&view) else { continue };
            let name = self.policy.name();
            let fault =
                |what: &str| Err(Error::bad(format!("policy {name}: chose model {model} for device {device}, {what}")));
            match self.models.get(usize::from(model)) {
                None => return fault(&format!("of models 0 to {}", self.models.len() - 1)),
                Some(chosen) if !(view.may_take(chosen) || self.policy.pipelines() && view.may_follow(chosen)) => {
                    return fault(match (chosen.claim, chosen.pinned) {
                        (Claim::Idle, _) => "whose next unit is at home on another device",
                        (Claim::By(_), _) => "which is busy on another device",
                        (Claim::Away, _) => "which has no unit to give",
                    });
                }
                Some(_) => {}
            }
            self.choices += 1;
            self.last = Some(model);
            return Ok(Some((device, usize::from(model))));
        }
        Ok(None)
    }

    fn has_candidate(&self, device: usize) -> bool {
        let view = View { device: device as u16, ..self.view() };
        view.candidates().next().is_some() || self.policy.pipelines() && view.followers().next().is_some()
    }

    /// The moment, for device 0.
    fn view(&self) -> View<'_> {
        View {
            device: 0,
            choices: self.choices,
            last: self.last,
            models: &self.models,
            devices: &self.devices,
            shared_bytes_per_sec: self.shared_bytes_per_sec,
        }
    }

    /// The policy's fault where nothing runs, though these models have units to give.
    pub fn chose_nothing(&self, models: &[usize]) -> Error {
        let name = self.policy.name();
        Error::bad(format!(
            "policy {name}: chose nothing, though nothing runs and models {models:?} have units to give"
        ))
    }

    /// What every device has in its queue, for people.
    pub fn describe(&self) -> String {
        let mut text = format!("\n  policy {}: ", self.policy.name());
        for (device, queue) in self.queues.iter().enumerate() {
            let models: Vec<String> = queue.units.iter().map(|c| format!("model {}", c.model)).collect();
            let models = if models.is_empty() { "nothing".into() } else { models.join(", ") };
            text += &format!("{}device {device} has {models}", if device > 0 { "; " } else { "" });
        }
        text
    }
}

impl Engine {
    /// Lets every device that has room take units, as the policy chooses.
    ///
    /// # Errors
    /// When the policy chooses what the device may not take.
    pub(super) fn take_turns(&mut self) -> Result<()> {
        let now = self.device.now_secs();
        loop {
            let Some(turns) = self.turns.as_mut().filter(|turns| !turns.paused) else { return Ok(()) };
            let (members, rings) = (&self.members, &self.rings);
            let shared = members.iter().find(|m| m.placed.home == Home::Anywhere);
            let rings_of = |device: usize| shared.map(|m| &rings[m.rings[device]]);
            let Some((device, model)) = turns.next(now, rings_of).inspect_err(|_| self.failed = true)? else {
                return Ok(());
            };
            self.expand(model, device as u16);
            if let Some(turns) = &mut self.turns {
                turns.claimed(device, model, &self.members[model], now);
            }
        }
    }
}
