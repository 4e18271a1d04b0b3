//! Plans for models that share devices: which may run anywhere and which stay on one device, and slots that hold any
//! model's shards.
//!
//! Each model is planned by itself, as large as the budget allows. If their slots and rings together are then too
//! large, each gets the same share of what it asked for beyond its smallest plan. Where all models fit whole and the
//! devices' loads are even enough, they stay on their devices and copy nothing.

use super::fleet::{FleetMap, Home, Placed};
use super::homes::{HomeBudgets, find_homes, first_at_home};
use super::model::Model;
use super::plan::{Plan, PlanOptions, Spread};
use super::stand_in::StandIns;
use super::store::OnDisk;
use crate::base::{Error, Result, format_bytes};
use crate::device::sim::CostModel;
use std::sync::Arc;

/// A model to be planned among others.
#[derive(Clone, Debug)]
pub struct FleetModel {
    /// Its name, for messages.
    pub name: String,
    /// Its graphs. Equal models may share one, and are then planned once.
    pub model: Arc<Model>,
    /// Its options; budgets and what depends on other models are filled in.
    pub options: PlanOptions,
    /// Number of steps to train.
    pub steps: u64,
}

impl FleetModel {
    /// Its wishes where it is to stay on a device in one piece.
    pub(super) fn whole(&self) -> PlanOptions {
        let whole = std::iter::once(0..self.model.layers()).collect();
        PlanOptions { resident: Some(true), cut: Some(whole), device_budget: None, ..self.options.clone() }
    }

    fn sketch(&self, options: &PlanOptions, cost: &CostModel) -> Result<Arc<Plan>> {
        Plan::sketch(&self.model, options, cost).map(Arc::new).map_err(|error| named(&self.name, error))
    }

    pub(super) fn placed(&self, plan: Arc<Plan>, home: Home, line: usize) -> Placed {
        Placed { model: Arc::clone(&self.model), plan, home, line }
    }
}

/// What a plan needs to know of a device.
#[derive(Clone, Debug)]
pub struct FleetDevice {
    /// Bytes of its arena; `None`: as many as the plan wants.
    pub budget: Option<u64>,
    /// Its rates.
    pub cost: CostModel,
}

/// How uneven the devices' loads may be before models that could stay move instead.
const UNEVEN: f64 = 1.05;

/// Models placed on devices.
#[derive(Clone, Debug)]
pub struct FleetPlan {
    /// Where each model is, in the models' order.
    pub placed: Vec<Placed>,
    /// The smallest budget per device for which there is a plan under the same options.
    pub smallest_device_bytes: u64,
}

/// Plans `models` that take turns on `devices`.
///
/// # Errors
/// [`Error::OutOfBudget`] that names the models which do not fit; [`Error::BadInput`] for invalid options.
pub fn plan_fleet(models: &[FleetModel], devices: &[FleetDevice], budgets: HomeBudgets) -> Result<FleetPlan> {
    let _held = hold(models);
    let Ways { mut ways, smallest_device_bytes } = or_nominal(devices, |devices| sketch_fleet(models, devices))?;
    let way = match first_at_home(&ways, budgets) {
        Err(refused @ Error::OutOfBudget { .. }) => {
            ways = sketch_thrifty(models, devices, budgets.disk)?;
            if ways.is_empty() { Err(refused) } else { first_at_home(&ways, budgets) }
        }
        found => found,
    }?;
    let placed = find_homes(&with_own_programs(models, ways.swap_remove(way)), budgets)?;
    Ok(FleetPlan { placed, smallest_device_bytes })
}

/// Sketches of the ways to place models on devices that have room for them, whatever host memory they take.
struct Ways {
    /// The one that ends soonest first; at least one.
    ways: Vec<Vec<Placed>>,
    /// The smallest budget of every device for which there is one.
    smallest_device_bytes: u64,
}

/// Calls `plan` for `devices` and, where these are refused, for the same devices with nominal costs: whether a job is
/// refused, and the budget that the refusal names, must not depend on measured rates, which choose plans here without
/// regard to host memory.
///
/// # Errors
/// As `plan`.
pub fn or_nominal<T>(devices: &[FleetDevice], mut plan: impl FnMut(&[FleetDevice]) -> Result<T>) -> Result<T> {
    match plan(devices) {
        Err(Error::OutOfBudget { .. }) => {
            let nominal = |d: &FleetDevice| FleetDevice { cost: CostModel::nominal(), ..d.clone() };
            plan(&devices.iter().map(nominal).collect::<Vec<_>>())
        }
        planned => planned,
    }
}

/// Sketches for [`plan_fleet`]: every model whole at home, and every shard anywhere.
fn sketch_fleet(models: &[FleetModel], devices: &[FleetDevice]) -> Result<Ways> {
    let (closest, at_home) = sketch_closest(models, devices.len())?;
    let moving = sketch_anywhere(models, devices, Some(at_home));
    let staying = sketch_at_home(models, devices)?;
    let (ways, smallest_device_bytes) = match (moving, staying) {
        // Where only those that stay fit, they need not be even.
        (Err(Error::OutOfBudget { smallest_device_bytes, .. }), Some((staying, _))) => {
            (vec![staying], smallest_device_bytes)
        }
        (Err(Error::OutOfBudget { smallest_device_bytes, .. }), None) if all_have(devices, at_home) => {
            (vec![closest], smallest_device_bytes)
        }
        (Err(error), _) => return Err(error),
        (Ok(moving), None) => (vec![moving.placed], moving.smallest_device_bytes),
        (Ok(moving), Some((staying, secs))) => {
            // Somebody who stays copies nothing; somebody who moves leaves no device idle.
            let is_even = secs <= UNEVEN * makespan_secs(models, &moving.placed, devices);
            let ways = if is_even { vec![staying, moving.placed] } else { vec![moving.placed, staying] };
            (ways, moving.smallest_device_bytes)
        }
    };
    Ok(Ways { ways, smallest_device_bytes })
}

/// Sketches for [`plan_fleet`] where host memory is short, by nominal costs, so that what is refused and what is named
/// then is the same whatever was measured: what devices have room for of every model whole at home, and of every shard
/// anywhere in the plans that are fast and in those that need the least host memory, off the disk and on it.
fn sketch_thrifty(models: &[FleetModel], devices: &[FleetDevice], disk: u64) -> Result<Vec<Vec<Placed>>> {
    let nominal = |d: &FleetDevice| FleetDevice { cost: CostModel::nominal(), ..d.clone() };
    let devices: Vec<FleetDevice> = devices.iter().map(nominal).collect();
    let mut ways = Vec::new();
    ways.extend(sketch_at_home(models, &devices)?.map(|(staying, _)| staying));
    if ways.is_empty() {
        let (closest, at_home) = sketch_closest(models, devices.len())?;
        ways.extend(all_have(&devices, at_home).then_some(closest));
    }
    let least_host = |on_disk| {
        let mut models = models.to_vec();
        // What has no home is planned for the least of it where it is told what is on the disk.
        models.iter_mut().for_each(|m| (m.options.homes.host, m.options.on_disk) = (Some(0), Some(on_disk)));
        models
    };
    let mut wishes = vec![models.to_vec(), least_host(OnDisk::Nothing)];
    if disk > 0 {
        wishes.push(least_host(OnDisk::Weights));
    }
    for models in wishes {
        match sketch_anywhere(&models, &devices, None) {
            Ok(moving) => ways.push(moving.placed),
            Err(Error::OutOfBudget { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ways)
}

fn all_have(devices: &[FleetDevice], bytes: u64) -> bool {
    devices.iter().all(|d| d.budget.is_none_or(|budget| budget >= bytes))
}

/// What the models' plans have in common, for as long as several of them are made.
pub(super) fn hold(models: &[FleetModel]) -> Vec<Arc<StandIns>> {
    models.iter().map(|m| m.model.stand_ins()).collect()
}

/// What is made of each model, once for models and options that are equal.
pub(super) fn once_for_equal<T: Clone>(
    models: &[FleetModel],
    mut make: impl FnMut(usize, &FleetModel) -> Result<T>,
) -> Result<Vec<T>> {
    let mut made: Vec<T> = Vec::new();
    for (i, m) in models.iter().enumerate() {
        let equal = |other: &FleetModel| Arc::ptr_eq(&other.model, &m.model) && other.options == m.options;
        made.push(match models[..i].iter().position(equal) {
            Some(twin) => made[twin].clone(),
            None => make(i, m)?,
        });
    }
    Ok(made)
}

/// Sketches that were chosen, as plans.
fn with_own_programs(models: &[FleetModel], sketches: Vec<Placed>) -> Vec<Placed> {
    let mut placed: Vec<Placed> = Vec::new();
    for (i, sketch) in sketches.iter().enumerate() {
        let twin = (0..i).find(|&t| Arc::ptr_eq(&sketches[t].plan, &sketch.plan));
        let plan = match twin {
            Some(twin) => Arc::clone(&placed[twin].plan),
            None => Arc::new(Plan::clone(&sketch.plan).own(&sketch.model, models[i].options.recompute)),
        };
        placed.push(Placed { plan, ..sketch.clone() });
    }
    placed
}

/// The least that plans which move can take: all seconds over all devices, or the longest of them.
fn makespan_secs(models: &[FleetModel], placed: &[Placed], devices: &[FleetDevice]) -> f64 {
    let speeds = speeds(models, devices);
    let secs: Vec<f64> = models.iter().zip(placed).map(|(m, p)| m.steps as f64 * p.plan.estimated_secs).collect();
    let longest = secs.iter().copied().fold(0.0, f64::max) / speeds.iter().copied().fold(0.0, f64::max);
    longest.max(secs.iter().sum::<f64>() / speeds.iter().sum::<f64>())
}

/// Each device's rate over that of the first, by the models' own work in one piece.
pub(super) fn speeds(models: &[FleetModel], devices: &[FleetDevice]) -> Vec<f64> {
    if devices.windows(2).all(|d| d[0].cost == d[1].cost) {
        return vec![1.0; devices.len()];
    }
    let secs = |cost: &CostModel| -> f64 {
        let of = |m: &FleetModel| {
            let ops = m.model.train.nodes.iter().map(|node| cost.op_secs(&crate::graph::cost(&m.model.train, node)));
            ops.sum::<f64>() * m.model.microbatches as f64
        };
        models.iter().map(of).sum()
    };
    let first = secs(&devices[0].cost);
    devices.iter().map(|d| first / secs(&d.cost).max(f64::MIN_POSITIVE)).collect()
}

/// Plans in which every shard may run anywhere.
///
/// # Errors
/// As [`plan_fleet`].
pub fn plan_anywhere(models: &[FleetModel], devices: &[FleetDevice]) -> Result<FleetPlan> {
    let _held = hold(models);
    let sketch = sketch_anywhere(models, devices, None)?;
    Ok(FleetPlan { placed: with_own_programs(models, sketch.placed), ..sketch })
}

/// Sketches with every shard anywhere; `at_home`: bytes of every device with which all could stay instead.
pub(super) fn sketch_anywhere(
    models: &[FleetModel],
    devices: &[FleetDevice],
    at_home: Option<u64>,
) -> Result<FleetPlan> {
    let within = |budget_of: &dyn Fn(usize) -> Option<u64>| sketch_within(models, devices, budget_of);
    let wishes = within(&|_| None)?;
    let smallest: Vec<u64> = wishes.iter().map(|p| p.plan.smallest_device_bytes).collect();
    let least = within(&|i| Some(smallest[i]))?;
    let least_bytes = shared_bytes(&least);
    let smallest_device_bytes = least_bytes.min(at_home.unwrap_or(u64::MAX));
    let plan = |placed| FleetPlan { placed, smallest_device_bytes };
    // A shard must fit wherever it may go. What is named is refused a byte below it, whatever the fastest plans take.
    let is_little = |&budget: &u64| least_bytes > budget || shared_bytes(&wishes) > budget;
    let Some(budget) = devices.iter().filter_map(|d| d.budget).min().filter(is_little) else {
        return Ok(plan(wishes));
    };
    if least_bytes > budget {
        return Err(refusal(models, &least, budget, smallest_device_bytes));
    }
    let widest = within(&|_| Some(budget))?;
    if shared_bytes(&widest) <= budget {
        return Ok(plan(widest));
    }
    let (mut low, mut high, mut best) = (0.0, 1.0, least);
    for _ in 0..6 {
        let share = 0.5 * (low + high);
        let placed = within(&|i| Some(smallest[i] + ((budget - smallest[i]) as f64 * share) as u64))?;
        if shared_bytes(&placed) <= budget {
            (low, best) = (share, placed);
        } else {
            high = share;
        }
    }
    Ok(plan(best))
}

/// Sketches with every shard anywhere, each within a budget of its own.
fn sketch_within(
    models: &[FleetModel],
    devices: &[FleetDevice],
    budget_of: &dyn Fn(usize) -> Option<u64>,
) -> Result<Vec<Placed>> {
    // Of more slots than the models can have shards nothing is gained.
    let most_slots = models.iter().map(|m| m.model.layers()).sum();
    let plans = once_for_equal(models, |i, m| {
        let spread = match m.options.spread {
            fine @ Spread::Anywhere(_) => fine,
            Spread::One | Spread::Stages { .. } => Spread::anywhere(devices.len()),
        };
        let (device_budget, slots) = (budget_of(i), m.options.slots.min(most_slots));
        let mut options = PlanOptions { spread, slots, device_budget, ..m.options.clone() };
        (options.resident, options.boundaries_stay) = (None, None);
        m.sketch(&options, &devices[0].cost)
    })?;
    let place = |(line, (m, plan)): (usize, (&FleetModel, Arc<Plan>))| m.placed(plan, Home::Anywhere, line);
    Ok(models.iter().zip(plans).enumerate().map(place).collect())
}

/// Bytes of the arena of a device that models share whose shards run anywhere.
fn shared_bytes(placed: &[Placed]) -> u64 {
    FleetMap::new(placed, 1).arena_bytes[0]
}

/// Says what each of these models needs that do not fit in the smallest device.
fn refusal(models: &[FleetModel], least: &[Placed], budget: u64, needs: u64) -> Error {
    let mut message = format!(
        "device memory: the models together need {needs} bytes ({}) of every device, the smallest has {budget} bytes ({})\n",
        format_bytes(needs),
        format_bytes(budget)
    );
    for (m, placed) in models.iter().zip(least) {
        let bytes = shared_bytes(std::slice::from_ref(placed));
        let fits = if bytes > budget { ", does not fit" } else { "" };
        message += &format!("  {:<26} {bytes:>14} bytes  {:>12} alone{fits}\n", m.name, format_bytes(bytes));
    }
    message += &format!("  smallest budget that works {needs:>14} bytes: memory = {needs}");
    Error::OutOfBudget { message, smallest_device_bytes: needs }
}

/// Plans in which every model stays whole on one device, assigned longest first to the device that finishes soonest
/// (Graham 1969, "Bounds on multiprocessing timing anomalies"), and the seconds until the last device is done; `None`
/// where they do not all fit.
///
/// # Errors
/// [`Error::BadInput`] for invalid options.
pub fn plan_at_home(models: &[FleetModel], devices: &[FleetDevice]) -> Result<Option<(Vec<Placed>, f64)>> {
    let sketch = sketch_at_home(models, devices)?;
    Ok(sketch.map(|(placed, secs)| (with_own_programs(models, placed), secs)))
}

fn sketch_at_home(models: &[FleetModel], devices: &[FleetDevice]) -> Result<Option<(Vec<Placed>, f64)>> {
    let plans = sketch_whole(models, &devices[0].cost)?;
    let budgets: Vec<Option<u64>> = devices.iter().map(|d| d.budget).collect();
    let distributed = distribute(models, &plans, &speeds(models, devices), &budgets);
    Ok(distributed.map(|found| (found.placed(models, &plans), found.secs)))
}

/// A sketch of each model that stays on a device in one piece.
fn sketch_whole(models: &[FleetModel], cost: &CostModel) -> Result<Vec<Arc<Plan>>> {
    once_for_equal(models, |_, m| m.sketch(&m.whole(), cost))
}

/// Every model whole on one of so many devices, as close together as [`distribute`] finds, and the bytes of the
/// fullest: with any more of every device they fit too. By nominal costs, so that it is the same whatever was measured.
fn sketch_closest(models: &[FleetModel], devices: usize) -> Result<(Vec<Placed>, u64)> {
    let plans = sketch_whole(models, &CostModel::nominal())?;
    let within = |budget: Option<u64>| distribute(models, &plans, &vec![1.0; devices], &vec![budget; devices]);
    let mut closest = within(None).expect("without budgets all fit");
    while devices > 1
        && let Some(closer) = closest.most_bytes.checked_sub(1).and_then(|budget| within(Some(budget)))
    {
        closest = closer;
    }
    Ok((closest.placed(models, &plans), closest.most_bytes))
}

/// Whole models on devices.
struct Distributed {
    /// The device of each model.
    devices: Vec<usize>,
    /// Seconds until the last device is done.
    secs: f64,
    /// Bytes of the fullest device.
    most_bytes: u64,
}

impl Distributed {
    fn placed(&self, models: &[FleetModel], plans: &[Arc<Plan>]) -> Vec<Placed> {
        let place = |(line, (m, plan)): (usize, (&FleetModel, &Arc<Plan>))| {
            m.placed(Arc::clone(plan), Home::On(vec![self.devices[line] as u16; plan.shards.len()]), line)
        };
        let placed: Vec<Placed> = models.iter().zip(plans).enumerate().map(place).collect();
        let devices = self.devices.iter().map(|d| d + 1).max().unwrap_or(0);
        let most_bytes = || FleetMap::new(&placed, devices).arena_bytes.into_iter().max();
        debug_assert_eq!(most_bytes().unwrap_or(0), self.most_bytes);
        placed
    }
}

/// What a device has of the models that are whole on it: what is each one's own, end to end, and behind that the
/// largest workspace, as [`FleetMap`] lays them out.
#[derive(Clone, Copy, Default)]
struct Load {
    secs: f64,
    own_bytes: u64,
    workspace_bytes: u64,
}

impl Load {
    fn with(self, plan: &Plan, secs: f64) -> Load {
        Load {
            secs: self.secs + secs,
            own_bytes: self.own_bytes.saturating_add(plan.arena.workspace),
            workspace_bytes: self.workspace_bytes.max(plan.arena.bytes - plan.arena.workspace),
        }
    }

    fn bytes(self) -> u64 {
        self.own_bytes.saturating_add(self.workspace_bytes)
    }
}

/// Whole models on devices of these rates and budgets, the longest first onto the device that is done soonest of those
/// that it fits; `None` where one fits nowhere.
fn distribute(
    models: &[FleetModel],
    plans: &[Arc<Plan>],
    speeds: &[f64],
    budgets: &[Option<u64>],
) -> Option<Distributed> {
    let secs = |i: usize| models[i].steps as f64 * plans[i].estimated_secs;
    let mut order: Vec<usize> = (0..models.len()).collect();
    order.sort_by(|&a, &b| secs(b).total_cmp(&secs(a)).then(a.cmp(&b)));
    let mut loads = vec![Load::default(); speeds.len()];
    let mut devices = vec![0; models.len()];
    for i in order {
        let with = |d: usize| loads[d].with(&plans[i], secs(i) / speeds[d]);
        let fits = |&d: &usize| budgets[d].is_none_or(|budget| with(d).bytes() <= budget);
        let sooner = |&a: &usize, &b: &usize| with(a).secs.total_cmp(&with(b).secs);
        let d = (0..speeds.len()).filter(fits).min_by(sooner)?;
        (loads[d], devices[i]) = (with(d), d);
    }
    let secs = loads.iter().map(|load| load.secs).fold(0.0, f64::max);
    Some(Distributed { devices, secs, most_bytes: loads.iter().map(|load| load.bytes()).max().unwrap_or(0) })
}

/// An error about a model, with the model's name in front.
pub fn named(model: &str, error: Error) -> Error {
    match error {
        Error::BadInput(message) => Error::BadInput(format!("{model}: {message}")),
        Error::OutOfBudget { message, smallest_device_bytes } => {
            Error::OutOfBudget { message: format!("{model}: {message}"), smallest_device_bytes }
        }
        Error::Device(message) => Error::Device(format!("{model}: {message}")),
        Error::NotFinite { .. } | Error::Cancelled => Error::BadInput(format!("{model}: {error}")),
        other => other,
    }
}
