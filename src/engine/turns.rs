//! Who is next: a device that can begin to fetch another unit asks the policy for one, and keeps it in its queue until
//! it has run.
//!
//! Invariant: a unit is claimed after all that it follows, so queues never wait for each other in a circle. Units of
//! one model in one queue run in order without any rule that says so; where a policy pipelines, a unit may follow one
//! on another device, and each of its microbatches then waits for the bytes that the same one leaves there. A device
//! holds as many units as it has weight slots: one that runs, the others on their way.

mod moment;

use super::Engine;
use super::member::{Ending, Member, Purpose};
use super::rings::Rings;
use super::unit_cost::{UnitCost, unit_costs};
use super::visit::Pass;
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::sim::CostModel;
use crate::sched::{Claim, DeviceView, ModelId, ModelView, Policy, View};
use crate::spill::{FleetMap, Home, Placed};
use crate::trace::Event;
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

/// When a model's next unit can have fetched what its last one leaves behind.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    weights: f64,
    /// The same for weights that a slot keeps: an update elsewhere has to come back to it.
    held: f64,
    boundary: f64,
    /// The first microbatch's.
    first: f64,
}

/// What a model's next unit takes in.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// Of the step or evaluation that it belongs to.
    serial: u64,
    shard: usize,
    /// It is a backward, which wants the gradient of its boundary too.
    backward: bool,
    /// Bytes of one microbatch's activation, and of its gradient.
    activation_bytes: u64,
    gradient_bytes: u64,
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
    models: Vec<ModelView>,
    devices: Vec<DeviceView>,
    /// Predictions, by model and unit of a step.
    costs: Vec<Vec<UnitCost>>,
    /// Measured seconds over predicted ones, by model.
    corrections: Vec<f64>,
    queues: Vec<VecDeque<Claimed>>,
    /// Seconds of arithmetic of each device's running unit so far.
    running_secs: Vec<f64>,
    /// When each device's running unit can have started, and when the copies to it that were asked for should have
    /// arrived.
    since: Vec<f64>,
    arrived: Vec<f64>,
    d2h_bytes_per_sec: Vec<f64>,
    /// The unit of its step that comes next, by model.
    next_unit: Vec<usize>,
    /// When all that units leave behind should have left.
    left: Vec<f64>,
    /// The same for what each gradient slot of a device holds, the one that is free first in front.
    gradients_left: Vec<VecDeque<f64>>,
    /// By model.
    ready: Vec<Ready>,
    wanted: Vec<Wanted>,
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
            costs: Vec::new(),
            corrections: Vec::new(),
            queues: vec![VecDeque::with_capacity(units + 1); devices],
            running_secs: vec![0.0; devices],
            since: vec![0.0; devices],
            arrived: vec![0.0; devices],
            d2h_bytes_per_sec: (0..devices).map(|d| cost(d).d2h_bytes_per_sec).collect(),
            next_unit: Vec::new(),
            left: vec![0.0; devices],
            gradients_left: vec![VecDeque::new(); devices],
            ready: Vec::new(),
            wanted: Vec::new(),
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
        self.costs.push(unit_costs(&member.placed, &self.cost));
        self.corrections.push(1.0);
        self.next_unit.push(0);
        self.ready.push(Ready::default());
        self.wanted.push(Wanted::default());
        self.models.push(ModelView::away(number as u16));
        self.refresh(number, member);
    }

    /// Brings the view of a model up to date.
    pub fn refresh(&mut self, model: usize, member: &Member) {
        let costs = &self.costs[model];
        let correction = self.corrections[model];
        let view = &mut self.models[model];
        let steps = member.steps_to_begin();
        let to_begin = steps as f64 * costs[0].rest_secs;
        let in_flight =
            member.pending.iter().filter(|p| p.made < p.units && matches!(p.purpose, Purpose::Step { .. })).count();
        let turns = (steps as usize + in_flight).saturating_sub(1) as f64;
        view.remaining_wait_secs = turns * costs[costs.len() - 1].wait_secs;
        let chain_to_begin = steps as f64 * costs[0].rest_chain_secs;
        let bytes_to_begin = steps * costs[0].rest_bytes;
        let Some(at) = member.next_work().filter(|_| !member.over) else {
            view.claim = Claim::Away;
            (view.remaining_secs, view.remaining_bytes) = (to_begin * correction, bytes_to_begin);
            view.remaining_chain_secs = chain_to_begin * correction;
            return;
        };
        let pending = &member.pending[at];
        let shards = member.plan.shards.len();
        let visit = pending.unit(pending.made, shards, member.model.microbatches);
        let (shard, pass) = (visit.shard, visit.pass);
        // An evaluation's unit costs what a forward does; what is left to train comes on top.
        let next = match pass {
            Pass::Backward => 2 * (shards - 1) - shard,
            Pass::Forward | Pass::Evaluate => shard,
        };
        self.next_unit[model] = next;
        let unit = costs[next];
        let bytes = |s: Option<usize>| s.map_or(0, |s| member.plan.shards[s].boundary_bytes);
        let hands_back = pass == Pass::Backward && shard + 1 < shards;
        self.wanted[model] = Wanted {
            serial: pending.serial,
            shard,
            backward: pass == Pass::Backward,
            activation_bytes: bytes(shard.checked_sub(1)),
            gradient_bytes: bytes(hands_back.then_some(shard)),
        };
        let of_steps = |p: &super::member::Pending| match p.purpose {
            Purpose::Step { .. } => {
                costs.get(p.made).map_or((0.0, 0.0, 0), |u| (u.rest_secs, u.rest_chain_secs, u.rest_bytes))
            }
            _ => (unit.secs, unit.secs, unit.weight_bytes),
        };
        let (mut secs, mut chain, mut bytes) = (to_begin, chain_to_begin, bytes_to_begin);
        for (of_secs, of_chain, of_bytes) in member.pending.iter().map(of_steps) {
            (secs, chain, bytes) = (secs + of_secs, chain + of_chain, bytes + of_bytes);
        }
        (view.remaining_secs, view.remaining_bytes) = (secs * correction, bytes);
        view.remaining_chain_secs = chain * correction;
        view.unit_secs = unit.secs * correction;
        view.microbatches = member.model.microbatches as u32;
        (view.shard, view.unit, view.units) = (shard as u16, next as u16, costs.len() as u16);
        view.boundary_bytes = unit.boundary_bytes;
        view.leave_bytes = unit.leave_bytes;
        view.leaves_gradients = unit.leaves_gradients && pass == Pass::Backward;
        view.weight_bytes = unit.weight_bytes;
        view.pinned = member.home_of(shard);
        // Its last unit is the last to end, whoever has it.
        let claimed = |&device: &u16| self.queues[usize::from(device)].iter().any(|c| c.model == model);
        view.claim = view.last_device.filter(claimed).map_or(Claim::Idle, Claim::By);
        if matches!(member.ending, Some(Ending::Cancelled | Ending::NotFinite { .. })) {
            view.claim = Claim::Away;
        }
    }

    /// A compute task has ended: measures the unit, and with its last task frees its place.
    pub fn task_ended(&mut self, event: &Event, ends_unit: bool, member: &Member) {
        let (device, model) = (usize::from(event.lane.device), usize::from(event.name.model));
        self.running_secs[device] += event.secs();
        // A model that ends early has left its queue already.
        if !ends_unit || self.queues[device].front().is_none_or(|c| c.model != model) {
            return;
        }
        let claimed = self.queues[device].pop_front().expect("looked at just above");
        let measured = std::mem::take(&mut self.running_secs[device]);
        let correction = &mut self.corrections[model];
        // Predictions are in seconds of the first device, corrected so far.
        let ratio = measured * self.devices[device].speed / claimed.secs.max(1e-12);
        *correction *= 0.9 + 0.1 * ratio.clamp(0.1, 10.0);
        self.since[device] = event.end_secs;
        self.refresh(model, member);
    }

    /// Takes a model's units out of every queue.
    pub fn release(&mut self, model: usize) {
        self.queues.iter_mut().for_each(|q| q.retain(|c| c.model != model));
        // Where no other unit runs, none ends after which devices would be asked.
        self.dirty = true;
    }

    /// The next choice that is to be made: a device with room, and the model that it takes. `rings` are the slots that
    /// models share on a device.
    fn next<'a>(&mut self, now: f64, rings: impl Fn(usize) -> Option<&'a Rings>) -> Result<Option<(usize, usize)>> {
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        order.extend((0..self.devices.len()).filter(|&d| self.queues[d].len() < self.units && self.has_candidate(d)));
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
            let models: Vec<String> = queue.iter().map(|c| format!("model {}", c.model)).collect();
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
