//! Models on simulated devices: the executor that trains, on a virtual clock, with no data and no losses.

use super::tables::fetched_bytes;
use super::visit::any_rule;
use super::{Ended, Engine, EngineOptions, StepInput, TurnOptions, check_count};
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::sim::{CostModel, SimDevice};
use crate::sched::{Bounds, DeviceRates, ModelWork, Part, Policy};
use crate::spill::{
    ArenaMap, BoundaryTier, FleetMap, Home, Model, OnDisk, Placed, Plan, ShardPrograms, update_state_bytes,
};
use crate::trace::{Bound, LaneSum, Recorder};
use std::collections::VecDeque;
use std::sync::Arc;

/// What is simulated.
pub struct SimulateOptions {
    /// Steps of each model.
    pub steps: Vec<u64>,
    /// What each device costs.
    pub costs: Vec<CostModel>,
    /// Bytes per second that the devices' links share.
    pub shared_bytes_per_sec: Option<f64>,
    /// Bytes of each device's arena, which weight slots fill where models take turns; empty: as few as there can be.
    pub arena_bytes: Vec<u64>,
    /// Chooses units, where models take turns.
    pub policy: Option<Box<dyn Policy>>,
    /// Units in a device's queue: 1 is no double buffering.
    pub units: usize,
    /// Models that run one after another; empty: all at once.
    pub lines: Vec<Vec<usize>>,
    /// Where events go.
    pub recorder: Option<Recorder>,
}

impl SimulateOptions {
    /// So many steps of each model on devices of these costs, all at once in arenas as small as there can be, with no
    /// policy.
    pub fn new(steps: Vec<u64>, costs: Vec<CostModel>) -> Self {
        SimulateOptions {
            steps,
            costs,
            shared_bytes_per_sec: None,
            arena_bytes: Vec::new(),
            policy: None,
            units: 2,
            lines: Vec::new(),
            recorder: None,
        }
    }
}

/// What a simulation came to.
pub struct Simulation {
    /// The end of the last unit.
    pub makespan_secs: f64,
    /// Compute lane busy over makespan, by device.
    pub utilisation: Vec<f64>,
    /// When each model's last step ended.
    pub end_secs: Vec<f64>,
    /// All that ran, by lane.
    pub sums: Vec<LaneSum>,
    /// What no schedule of these plans can beat.
    pub bounds: Bounds,
    /// The recorder, to be finished.
    pub recorder: Option<Recorder>,
}

/// Runs `placed` to their ends on simulated devices.
///
/// # Errors
/// When there is not one number of steps for each model, when there are more than
/// [`MOST_MODELS`](crate::sched::MOST_MODELS), or no policy where models run anywhere; when the arenas are not those of
/// the devices, a model is at home on none of these, or the lines do not have each model once; when the policy chooses
/// what it may not, or everything stalls because it chooses nothing.
pub fn simulate(placed: &[Placed], options: SimulateOptions) -> Result<Simulation> {
    let SimulateOptions { steps, costs, shared_bytes_per_sec, arena_bytes, policy, units, lines, recorder } = options;
    if steps.len() != placed.len() || costs.is_empty() {
        let (n, d) = (placed.len(), costs.len());
        return Err(Error::bad(format!("{n} models on {d} devices, with steps for {}", steps.len())));
    }
    check_count(placed.len())?;
    if policy.is_none() && placed.iter().any(|p| p.home == Home::Anywhere) {
        return Err(Error::bad("models that run anywhere need a policy"));
    }
    let pipelines = policy.as_ref().is_some_and(|policy| policy.pipelines());
    let arena_bytes = if arena_bytes.is_empty() { vec![0; costs.len()] } else { arena_bytes };
    let devices = costs.len();
    if arena_bytes.len() != devices {
        let arenas = arena_bytes.len();
        return Err(Error::bad(format!("arena_bytes are of {arenas} devices, there are {devices}")));
    }
    if !lines.is_empty() {
        check_lines(&lines, placed.len())?;
    }
    let disk = disk_bytes_per_sec(placed.iter().map(|p| p.plan.as_ref()), &costs[0]);
    let device = Box::new(SimDevice::new(costs.clone()).with_shared_link(shared_bytes_per_sec).with_disk(disk));
    let turns = policy.map(|policy| TurnOptions {
        policy,
        units,
        costs: costs.clone(),
        shared_bytes_per_sec,
        arena_bytes,
        room_bytes: Vec::new(),
    });
    let map = turns.as_ref().map_or_else(|| FleetMap::new(placed, devices), |turns| turns.map(placed));
    let bounds = bounds_of(placed, &map, &steps, &costs, shared_bytes_per_sec, pipelines);
    let of = |(p, &steps): (&Placed, &u64)| EngineOptions { steps, ..EngineOptions::new(0, &p.model) };
    let engine_options = placed.iter().zip(&steps).map(of).collect();
    let mut engine = Engine::try_fleet(placed, engine_options, device, turns)?;
    recorder.into_iter().for_each(|recorder| engine.record(recorder));
    let mut lines: Vec<VecDeque<usize>> = match lines.is_empty() {
        true => (0..placed.len()).map(|m| VecDeque::from([m])).collect(),
        false => lines.into_iter().map(VecDeque::from).collect(),
    };
    let rules: Vec<_> = placed.iter().map(|p| any_rule(p.plan.updates.moments)).collect();
    let inputs: Vec<Vec<&[u8]>> = placed.iter().map(|p| vec![&[][..]; p.model.train.inputs.len()]).collect();
    let mut begun = vec![0; placed.len()];
    let mut end_secs = vec![0.0; placed.len()];
    let mut running = 0;
    let mut fill = |engine: &mut Engine, m: usize, running: &mut usize| -> Result<()> {
        while begun[m] < steps[m] && engine.steps_in_flight(m) < 2 {
            let clip = placed[m].plan.updates.clips.then_some(1.0);
            let (rule, inputs) = (rules[m], inputs[m].clone());
            engine.begin_step(m, &StepInput { step: begun[m], inputs, loss_scale: 1.0, rule, clip })?;
            begun[m] += 1;
            *running += 1;
        }
        Ok(())
    };
    for line in &mut lines {
        line.retain(|&m| steps[m] > 0);
        if let Some(&m) = line.front() {
            fill(&mut engine, m, &mut running)?;
        }
    }
    while running > 0 {
        match engine.wait_any()? {
            Ended::Step(m, result) => {
                running -= 1;
                end_secs[m] = engine.now_secs();
                fill(&mut engine, m, &mut running)?;
                if result.step + 1 == steps[m] {
                    let line = lines.iter_mut().find(|l| l.front() == Some(&m)).expect("a model is first in its line");
                    line.pop_front();
                    if let Some(&next) = line.front() {
                        fill(&mut engine, next, &mut running)?;
                    }
                }
            }
            Ended::Evaluation(..) => unreachable!("none was begun"),
            Ended::Model(_, error) => return Err(error),
        }
    }
    let makespan_secs = end_secs.iter().copied().fold(0.0, f64::max);
    let sums = engine.lane_sums().to_vec();
    let busy = |d: usize| {
        let of_device = |s: &&LaneSum| s.lane.kind == LaneKind::Compute && usize::from(s.lane.device) == d;
        sums.iter().find(of_device).map_or(0.0, |s| s.busy_secs)
    };
    let utilisation = (0..devices).map(|d| busy(d) / makespan_secs.max(f64::MIN_POSITIVE)).collect();
    Ok(Simulation { makespan_secs, utilisation, end_secs, bounds, recorder: engine.take_recorder(), sums })
}

/// Refuses lines of models in which one of so many is missing or comes twice, or one is that there is not.
pub(crate) fn check_lines(lines: &[Vec<usize>], models: usize) -> Result<()> {
    let mut all: Vec<usize> = lines.iter().flatten().copied().collect();
    all.sort_unstable();
    match all.into_iter().eq(0..models) {
        true => Ok(()),
        false => Err(Error::bad(format!("lines {lines:?} do not have each of {models} models once"))),
    }
}

/// What one step of a plan takes on a simulated device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds of a steady step.
    pub step_secs: f64,
    /// Busy seconds of the busiest lane: what no overlap can beat.
    pub bound_secs: f64,
    /// That lane.
    pub busiest: LaneId,
    /// Seconds of the step by what bound them.
    pub bound: Bound,
}

/// How fast the disk tier is, where any of these plans has one.
fn disk_bytes_per_sec<'a>(mut plans: impl Iterator<Item = &'a Plan>, cost: &CostModel) -> Option<f64> {
    let any = plans.any(|plan| plan.choice.on_disk > OnDisk::Nothing);
    any.then(|| cost.disk_bytes_per_sec())
}

/// The lane with most busy seconds, the first of those that have as many; of none, the first device's compute lane.
pub fn busiest(lanes: impl Iterator<Item = (LaneId, f64)>) -> (LaneId, f64) {
    let none = (LaneId::device(0, LaneKind::Compute), 0.0);
    lanes.fold(none, |most, lane| if lane.1 > most.1 { lane } else { most })
}

/// Steps that a prediction simulates, and those of them until the lanes have settled into their rhythm.
const PREDICTED_STEPS: u64 = 7;
const WARM_STEPS: u64 = 3;

/// Predicts a steady step of `plan` by running the executor on a simulated device.
///
/// # Errors
/// When the plan stalls: our own bug.
pub fn predict(model: &Arc<Model>, plan: &Arc<Plan>, cost: &CostModel) -> Result<Prediction> {
    Ok(predict_counted(model, plan, cost)?.0)
}

/// Tasks that a prediction takes at least: in each step a program for each microbatch of every visit.
pub(super) fn least_tasks(model: &Model, plan: &Plan) -> u64 {
    (PREDICTED_STEPS + 1) * model.microbatches as u64 * (2 * plan.shards.len() as u64 - 1)
}

/// [`predict`], and how many tasks that took.
pub(super) fn predict_counted(model: &Arc<Model>, plan: &Arc<Plan>, cost: &CostModel) -> Result<(Prediction, u64)> {
    const MEASURED: u64 = PREDICTED_STEPS - WARM_STEPS;
    let disk = disk_bytes_per_sec(std::iter::once(plan.as_ref()), cost);
    let device = Box::new(SimDevice::new(vec![cost.clone()]).with_disk(disk));
    let mut engine = Engine::new(Arc::clone(model), Arc::clone(plan), device, EngineOptions::new(0, model));
    let rule = any_rule(plan.updates.moments);
    let mut busy = vec![0.0; engine.device.lanes().len()];
    let (mut step_secs, mut bound) = (0.0, Bound::default());
    let mut begun = 0;
    for step in 0..PREDICTED_STEPS {
        // The last of them too has a next one beside it.
        while begun <= PREDICTED_STEPS && engine.steps_in_flight(0) < 2 {
            let inputs = vec![&[][..]; model.train.inputs.len()];
            let clip = plan.updates.clips.then_some(1.0);
            engine.begin_step(0, &StepInput { step: begun, inputs, loss_scale: 1.0, rule, clip })?;
            begun += 1;
        }
        let result = engine.wait_step(0)?;
        if step >= WARM_STEPS {
            step_secs += result.secs / MEASURED as f64;
            bound.add(&result.bound);
            let sums = engine.step_lane_sums(0).iter();
            busy.iter_mut().zip(sums).for_each(|(busy, sum)| *busy += sum.busy_secs / MEASURED as f64);
        }
    }
    let lanes = engine.device.lanes().iter().copied();
    let (busiest, bound_secs) = busiest(lanes.zip(busy));
    let prediction = Prediction { step_secs, bound_secs, busiest, bound: bound.mean(MEASURED as f64) };
    Ok((prediction, engine.queue.next_id()))
}

/// What no schedule of these plans can beat: arithmetic as planned, and the bytes that must cross however shards are
/// spread. A step fetches every shard once, since an update by the host makes copies stale, and again for its backward
/// where all devices' slots together cannot have kept it. `pipelines`: a unit may begin before the one that it follows
/// has ended.
pub fn bounds_of(
    placed: &[Placed],
    map: &FleetMap,
    steps: &[u64],
    costs: &[CostModel],
    shared: Option<f64>,
    pipelines: bool,
) -> Bounds {
    let links = |cost: &CostModel| DeviceRates {
        h2d_bytes_per_sec: cost.h2d_bytes_per_sec,
        d2h_bytes_per_sec: cost.d2h_bytes_per_sec,
    };
    let devices: Vec<DeviceRates> = costs.iter().map(links).collect();
    let best = |of: fn(&CostModel) -> f64| costs.iter().map(of).fold(0.0, f64::max);
    let rates = Rates {
        h2d: best(|c| c.h2d_bytes_per_sec).min(shared.unwrap_or(f64::INFINITY)),
        d2h: best(|c| c.d2h_bytes_per_sec).min(shared.unwrap_or(f64::INFINITY)),
        host: costs[0].host_update_bytes_per_sec,
    };
    let work = |((p, &steps), maps): ((&Placed, &u64), &Vec<ArenaMap>)| {
        let slots = maps
            .iter()
            .map(|m| m.weight_slots.at.len() - m.resting)
            .sum::<usize>()
            .max(p.plan.choice.slots * costs.len());
        let (down, up) = least_bytes(p, slots, maps.iter().map(|m| m.activations.len()).sum());
        let [first_secs, turn_secs, last_secs] = wait_secs(p, &rates);
        let pipelined = p.plan.choice.pipelined || pipelines && p.home == Home::Anywhere;
        let ends = if steps > 0 { 1.0 } else { 0.0 };
        ModelWork {
            parts: parts(p, steps as f64, costs, pipelined),
            first_secs: ends * first_secs,
            turns_secs: steps.saturating_sub(1) as f64 * turn_secs,
            last_secs: ends * last_secs,
            h2d_bytes: steps * down,
            d2h_bytes: steps * up,
        }
    };
    Bounds::new(&placed.iter().zip(steps).zip(&map.maps).map(work).collect::<Vec<_>>(), &devices, shared)
}

/// The greatest rates of any link, and the host's, in bytes per second.
struct Rates {
    h2d: f64,
    d2h: f64,
    host: f64,
}

/// Least seconds before a model's first unit, between two steps, and after its last unit, in which it can run nowhere.
fn wait_secs(placed: &Placed, rates: &Rates) -> [f64; 3] {
    let plan = &placed.plan;
    let shard = &plan.shards[0];
    let program = shard.forward.as_ref().or(shard.backward.as_ref());
    let inputs = program.map_or(0, |p| p.inputs.iter().map(|used| used.bytes).sum());
    let (changing, frozen) = fetched_bytes(&placed.model, &shard.layout);
    let first = (changing + frozen + inputs) as f64 / rates.h2d;
    if plan.choice.rests(0) {
        return [first, 0.0, 0.0];
    }
    if plan.choice.updates_on_device(0) {
        // Where it was updated the next step can begin; what goes home, or with clipping the update too, may come later.
        return [first, 0.0, 0.0];
    }
    // In pieces that overlap: all of the gradient leaves, then at least a piece is updated and comes back.
    let piece = plan.pieces(0).into_iter().map(|r| r.end - r.start).min().unwrap_or(0);
    let update_bytes = placed.model.update_bytes(piece, plan.updates.moments);
    let home = shard.layout.gradient_bytes as f64 / rates.d2h + update_bytes as f64 / rates.host;
    [first, home + piece as f64 / rates.h2d, home]
}

/// The arithmetic of so many steps in the parts that run on one device each: programs, a microbatch at a time, and
/// updates on devices. `pipelined`: microbatches go on from unit to unit, so that not all of a step is one chain, but
/// one microbatch through all units and the others through the longest.
fn parts(placed: &Placed, steps: f64, costs: &[CostModel], pipelined: bool) -> Vec<Part> {
    let Placed { model, plan, home, .. } = placed;
    let by_device = |secs: &dyn Fn(&CostModel) -> f64| {
        let mut all: Vec<f64> = Vec::with_capacity(costs.len());
        for (d, cost) in costs.iter().enumerate() {
            let twin = costs[..d].iter().position(|other| other == cost);
            all.push(twin.map_or_else(|| secs(cost), |twin| all[twin]));
        }
        all
    };
    let microbatches = steps * model.microbatches as f64;
    let one_device = match home {
        Home::On(devices) => devices.iter().all(|d| *d == devices[0]),
        Home::Anywhere => costs.len() == 1,
    };
    let (mut runs, mut updates) = (Vec::new(), Vec::new());
    for (s, shard) in plan.shards.iter().enumerate() {
        let pinned = match home {
            Home::On(devices) => Some(devices[s]),
            Home::Anywhere => None,
        };
        for program in shard.forward.iter().chain(&shard.backward) {
            // It is handed to the device once for every microbatch.
            let secs = by_device(&|cost| cost.program_secs(program) + cost.hand_over_secs);
            let chain_times = if pipelined { steps } else { microbatches };
            runs.push(Part { secs, times: microbatches, chain_times, pinned });
        }
        if plan.choice.updates_on_device(s) && shard.own_bytes() > 0 {
            let own = shard.own_bytes();
            let (update, norm) = (model.update_bytes(own, plan.updates.moments), model.wide_bytes(own));
            let secs = by_device(&|cost| cost.device_settle_secs(update, norm));
            // Beside others' backwards on other devices, but for the first shard's: the next step begins with that.
            let in_chain = !pipelined && (one_device || s == 0);
            updates.push(Part { secs, times: steps, chain_times: if in_chain { steps } else { 0.0 }, pinned });
        }
    }
    if let Some(longest) = runs.iter_mut().max_by(|a, b| a.least_secs(|_| 1.0).total_cmp(&b.least_secs(|_| 1.0))) {
        longest.chain_times = microbatches;
    }
    runs.append(&mut updates);
    runs
}

/// Least bytes of a step to devices that have so many weight slots in all, and from them.
fn least_bytes(placed: &Placed, slots: usize, entries: usize) -> (u64, u64) {
    let plan = &placed.plan;
    if plan.choice.resident {
        return (0, 0);
    }
    let visiting = &plan.shards[plan.choice.resting..];
    // What they borrow of shards at rest need not come from the host.
    let changing = |s: &ShardPrograms| match plan.choice.resting > 0 {
        true => s.own_bytes(),
        false => fetched_bytes(&placed.model, &s.layout).0,
    };
    let frozen = |s: &ShardPrograms| fetched_bytes(&placed.model, &s.layout).1;
    let bytes = |s: &ShardPrograms| changing(s) + frozen(s);
    // Kept at best: as many shards as there are slots, the largest.
    let beyond_slots = |mut sizes: Vec<u64>| -> u64 {
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.iter().skip(slots).sum()
    };
    let again = beyond_slots(visiting.iter().filter(|s| !s.idles_back()).map(bytes).collect());
    // What a device has updated may stay for the next step too, and what nobody updates.
    let (here, by_host) = visiting.split_at(plan.choice.visiting_updates.min(visiting.len()));
    let stays = here.iter().map(bytes).chain(by_host.iter().map(frozen));
    let all = by_host.iter().map(changing).sum::<u64>() + beyond_slots(stays.collect());
    let weights = here.iter().map(|s| s.own_bytes()).sum::<u64>();
    let gradients = by_host.iter().map(|s| s.layout.gradient_bytes).sum::<u64>();
    let state_of = |s: usize| update_state_bytes(&placed.model, &plan.shards, plan.updates.moments, s);
    let state = (plan.choice.resting..).take(here.len()).map(state_of).sum::<u64>();
    // An activation goes home and comes back for the next shard's backward, but for those that entries can have kept
    // until then. A gradient may be read where it was made, and stays there.
    let read_back = plan.shards.windows(2).filter(|pair| !pair[1].idles_back()).map(|pair| pair[0].boundary_bytes);
    let mut boundaries: Vec<u64> =
        read_back.flat_map(|bytes| std::iter::repeat_n(bytes, placed.model.microbatches)).collect();
    boundaries.sort_unstable_by(|a, b| b.cmp(a));
    let crosses = match plan.choice.activations {
        BoundaryTier::Host { .. } => boundaries.iter().skip(entries).sum(),
        BoundaryTier::Device => 0,
    };
    (all + again + state + crosses, weights + gradients + state + crosses)
}
