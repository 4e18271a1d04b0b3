//! Models on simulated devices: the executor that trains, on a virtual clock, with no data and no losses.

use super::bounds::bounds_of;
use super::visit::any_rule;
use super::{Ended, Engine, EngineOptions, StepInput, TurnOptions, check_count};
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::sim::{CostModel, SimDevice};
use crate::sched::{Bounds, Policy};
use crate::spill::{FleetMap, Home, Model, OnDisk, Placed, Plan, Updates};
use crate::trace::{Bound, LaneSum, Recorder};
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
    check(placed, &options)?;
    let SimulateOptions { steps, costs, shared_bytes_per_sec, arena_bytes, policy, units, lines, recorder } = options;
    let devices = costs.len();
    let pipelines = policy.as_ref().is_some_and(|policy| policy.pipelines());
    let arena_bytes = if arena_bytes.is_empty() { vec![0; devices] } else { arena_bytes };
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
    let lines = if lines.is_empty() { (0..placed.len()).map(|m| vec![m]).collect() } else { lines };
    let end_secs = run(&mut engine, placed, &steps, &lines)?;
    let makespan_secs = end_secs.iter().copied().fold(0.0, f64::max);
    let sums = engine.lane_sums().to_vec();
    let busy = |d: usize| {
        let of_device = |s: &&LaneSum| s.lane.kind == LaneKind::Compute && usize::from(s.lane.device) == d;
        sums.iter().find(of_device).map_or(0.0, |s| s.busy_secs)
    };
    let utilisation = (0..devices).map(|d| busy(d) / makespan_secs.max(f64::MIN_POSITIVE)).collect();
    Ok(Simulation { makespan_secs, utilisation, end_secs, bounds, recorder: engine.take_recorder(), sums })
}

/// Refuses options that are not those of the models.
fn check(placed: &[Placed], options: &SimulateOptions) -> Result<()> {
    let SimulateOptions { steps, costs, arena_bytes, policy, lines, .. } = options;
    let (models, devices, arenas) = (placed.len(), costs.len(), arena_bytes.len());
    if steps.len() != models || devices == 0 {
        return Err(Error::bad(format!("{models} models on {devices} devices, with steps for {}", steps.len())));
    }
    check_count(models)?;
    if policy.is_none() && placed.iter().any(|p| p.home == Home::Anywhere) {
        return Err(Error::bad("models that run anywhere need a policy"));
    }
    if arenas != devices && arenas > 0 {
        return Err(Error::bad(format!("arena_bytes are of {arenas} devices, there are {devices}")));
    }
    if lines.is_empty() { Ok(()) } else { check_lines(lines, models) }
}

/// Runs so many steps of each model, of those in a line one after another, and gives the ends of their last ones.
fn run(engine: &mut Engine, placed: &[Placed], steps: &[u64], lines: &[Vec<usize>]) -> Result<Vec<f64>> {
    let (mut begun, mut end_secs) = (vec![0; placed.len()], vec![0.0; placed.len()]);
    let mut fill = |engine: &mut Engine, m: usize| -> Result<()> {
        while begun[m] < steps[m] && engine.steps_in_flight(m) < 2 {
            engine.begin_step(m, &empty_step(&placed[m].model, &placed[m].plan, begun[m]))?;
            begun[m] += 1;
        }
        Ok(())
    };
    let mut next_in_line = vec![None; placed.len()];
    for line in lines {
        let line: Vec<usize> = line.iter().copied().filter(|&m| steps[m] > 0).collect();
        line.windows(2).for_each(|pair| next_in_line[pair[0]] = Some(pair[1]));
        line.first().map_or(Ok(()), |&first| fill(engine, first))?;
    }
    for _ in 0..steps.iter().sum::<u64>() {
        match engine.wait_any()? {
            Ended::Step(m, result) => {
                end_secs[m] = engine.now_secs();
                fill(engine, m)?;
                let next = next_in_line[m].filter(|_| result.step + 1 == steps[m]);
                next.map_or(Ok(()), |next| fill(engine, next))?;
            }
            Ended::Evaluation(..) => unreachable!("none was begun"),
            Ended::Model(_, error) => return Err(error),
        }
    }
    Ok(end_secs)
}

/// A step of a plan without data.
fn empty_step(model: &Model, plan: &Plan, step: u64) -> StepInput<'static> {
    let inputs = vec![&[][..]; model.train.inputs.len()];
    let Updates { moments, clips } = plan.updates;
    StepInput { step, inputs, loss_scale: 1.0, rule: any_rule(moments), clip: clips.then_some(1.0) }
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
    let mut busy = vec![0.0; engine.device.lanes().len()];
    let (mut step_secs, mut bound) = (0.0, Bound::default());
    let mut begun = 0;
    for step in 0..PREDICTED_STEPS {
        // The last of them too has a next one beside it.
        while begun <= PREDICTED_STEPS && engine.steps_in_flight(0) < 2 {
            engine.begin_step(0, &empty_step(model, plan, begun))?;
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
