//! Baseline schedules, as placements on the same executor: where each model's shards have their homes, and which models
//! run one after another.

use super::cut::balanced;
use super::fleet::{FleetMap, Home, Placed};
use super::fleet_plan::{FleetDevice, FleetModel, hold, named, once_for_equal, speeds};
use super::model::Model;
use super::plan::{Plan, PlanOptions, Recompute, Spread};
use super::shard::ShardPrograms;
use crate::base::{Error, Result, format_bytes};
use crate::device::sim::CostModel;
use std::ops::Range;
use std::sync::Arc;

/// A way to run several models without their shards taking turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// Models one after another on the first device, spilled where necessary.
    OneAtATime,
    /// Each model cut into as many stages as there are devices, one minibatch at a time; models one after another.
    ModelParallel,
    /// The same stages, with microbatches in a pipeline that is drained after every minibatch (Huang et al. 2019,
    /// "GPipe", arXiv:1811.06965).
    Gpipe,
    /// Each model whole on one device, the longest assigned first.
    TaskParallel,
}

impl Baseline {
    /// Each baseline with its name in a job file.
    pub const NAMES: [(&'static str, Baseline); 4] = [
        ("one-at-a-time", Baseline::OneAtATime),
        ("model-parallel", Baseline::ModelParallel),
        ("gpipe", Baseline::Gpipe),
        ("task-parallel", Baseline::TaskParallel),
    ];
}

/// Models placed for a baseline.
#[derive(Clone, Debug)]
pub struct Lined {
    /// Where each model is, in the models' order.
    pub placed: Vec<Placed>,
    /// Groups of models; those of a group run one after another.
    pub lines: Vec<Vec<usize>>,
    /// The smallest budget per device that would work.
    pub smallest_device_bytes: u64,
}

/// The largest of what each plan needs at least.
fn smallest(placed: &[Placed]) -> u64 {
    placed.iter().map(|p| p.plan.smallest_device_bytes).max().unwrap_or(0)
}

/// How a model that has a device to itself is planned: [`plan_alone`](crate::engine::plan_alone), which needs the
/// executor.
pub type PlanAlone = fn(&Arc<Model>, &PlanOptions, &CostModel) -> Result<Arc<Plan>>;

/// Places `models` on `devices` as the baseline does; models that run one at a time are planned by `plan_alone`.
///
/// # Errors
/// [`Error::OutOfBudget`] that names what does not fit; [`Error::BadInput`] for invalid options.
pub fn place_baseline(
    baseline: Baseline,
    models: &[FleetModel],
    devices: &[FleetDevice],
    plan_alone: PlanAlone,
) -> Result<Lined> {
    let _held = hold(models);
    match baseline {
        Baseline::OneAtATime => one_at_a_time(models, devices, plan_alone),
        Baseline::ModelParallel | Baseline::Gpipe => staged(models, devices, baseline == Baseline::Gpipe),
        Baseline::TaskParallel => task_parallel(models, devices),
    }
}

/// Makes something for each model, once for equal ones.
///
/// # Errors
/// Where some do not fit, that of the one that needs the most: with what it names all fit.
fn for_each<T: Clone>(models: &[FleetModel], mut make: impl FnMut(&FleetModel) -> Result<T>) -> Result<Vec<T>> {
    let mut refused: Option<(u64, Error)> = None;
    let made = once_for_equal(models, |_, m| match make(m) {
        Ok(made) => Ok(Some(made)),
        Err(error @ Error::OutOfBudget { smallest_device_bytes: needs, .. }) => {
            if refused.as_ref().is_none_or(|(most, _)| needs > *most) {
                refused = Some((needs, named(&m.name, error)));
            }
            Ok(None)
        }
        Err(error) => Err(named(&m.name, error)),
    })?;
    refused.map_or_else(|| Ok(made.into_iter().flatten().collect()), |(_, error)| Err(error))
}

fn one_at_a_time(models: &[FleetModel], devices: &[FleetDevice], plan_alone: PlanAlone) -> Result<Lined> {
    let plans = for_each(models, |m| {
        let options = PlanOptions { device_budget: devices[0].budget, ..m.options.clone() };
        plan_alone(&m.model, &options, &devices[0].cost)
    })?;
    let alone = |(m, plan): (&FleetModel, Arc<Plan>)| Placed::alone(Arc::clone(&m.model), plan);
    let placed: Vec<Placed> = models.iter().zip(plans).map(alone).collect();
    let smallest_device_bytes = smallest(&placed);
    Ok(Lined { placed, lines: vec![(0..models.len()).collect()], smallest_device_bytes })
}

fn task_parallel(models: &[FleetModel], devices: &[FleetDevice]) -> Result<Lined> {
    let plans = for_each(models, |m| Plan::new(&m.model, &m.whole(), &devices[0].cost).map(Arc::new))?;
    let secs = |i: usize| models[i].steps as f64 * plans[i].estimated_secs;
    let speeds = speeds(models, devices);
    let mut order: Vec<usize> = (0..models.len()).collect();
    order.sort_by(|&a, &b| secs(b).total_cmp(&secs(a)).then(a.cmp(&b)));
    let mut lines: Vec<Vec<usize>> = vec![Vec::new(); devices.len()];
    let mut loads = vec![0.0; devices.len()];
    let (mut homes, mut too_large) = (vec![0; models.len()], Vec::new());
    for i in order {
        let fits = |&d: &usize| devices[d].budget.is_none_or(|budget| plans[i].arena.bytes <= budget);
        let end = |d: usize| loads[d] + secs(i) / speeds[d];
        let best = (0..devices.len()).filter(fits).min_by(|&a, &b| end(a).total_cmp(&end(b)).then(a.cmp(&b)));
        match best {
            Some(d) => {
                loads[d] = end(d);
                homes[i] = d;
                lines[d].push(i);
            }
            None => too_large.push(i),
        }
    }
    if !too_large.is_empty() {
        too_large.sort_unstable();
        let most = devices.iter().filter_map(|d| d.budget).max().unwrap_or(0);
        let mut message =
            format!("task-parallel: models that fit whole on no device, the largest has {}:\n", format_bytes(most));
        for &i in &too_large {
            let bytes = plans[i].arena.bytes;
            message += &format!("  {:<26} {bytes:>14} bytes  {:>12}\n", models[i].name, format_bytes(bytes));
        }
        let needs = too_large.iter().map(|&i| plans[i].arena.bytes).max().unwrap_or(0);
        message += &format!("  smallest budget that works {needs:>14} bytes: memory = {needs}");
        return Err(Error::OutOfBudget { message, smallest_device_bytes: needs });
    }
    let place = |((m, plan), d): ((&FleetModel, Arc<Plan>), usize)| {
        let home = Home::On(vec![d as u16; plan.shards.len()]);
        m.placed(plan, home, d)
    };
    let placed: Vec<Placed> = models.iter().zip(plans).zip(homes).map(place).collect();
    let smallest_device_bytes = smallest(&placed);
    Ok(Lined { placed, lines, smallest_device_bytes })
}

/// Cuts each model into a stage for each device.
fn staged(models: &[FleetModel], devices: &[FleetDevice], pipelined: bool) -> Result<Lined> {
    let staged = for_each(models, |m| stage(m, devices, pipelined))?;
    let smallest_device_bytes = staged.iter().map(|(_, least)| *least).max().unwrap_or(0);
    let placed = staged.into_iter().map(|(placed, _)| placed).collect();
    Ok(Lined { placed, lines: vec![(0..models.len()).collect()], smallest_device_bytes })
}

/// The first plan with these stages that fits: resident with everything kept, resident with recomputation, or stages of
/// several shards that visit, more and more of them; and the bytes of a device with which the smallest of all does.
fn stage(m: &FleetModel, devices: &[FleetDevice], pipelined: bool) -> Result<(Placed, u64)> {
    let cost = &devices[0].cost;
    let layers = m.model.layers();
    // As every cut, this one must not depend on what was measured.
    let nominal = CostModel::nominal();
    let secs: Vec<f64> =
        (0..layers).map(|l| ShardPrograms::new(&m.model, l..l + 1, false, false).step_secs(&nominal)).collect();
    let stages = balanced(&secs, devices.len());
    let needs = |placed: &Placed| FleetMap::new(std::slice::from_ref(placed), devices.len()).arena_bytes;
    let fits = |placed: &Placed| {
        needs(placed).iter().zip(devices).all(|(&bytes, d)| d.budget.is_none_or(|budget| bytes <= budget))
    };
    let most = |placed: &Placed| needs(placed).into_iter().max().unwrap_or(0);
    let mut sketches: Vec<Placed> = Vec::new();
    let mut sketch = |cut: Vec<Range<usize>>, kept: bool, resident: bool| -> Result<()> {
        let home = cut.iter().map(|r| stages.iter().position(|s| s.contains(&r.start)).unwrap_or(0) as u16).collect();
        let options = |device_budget: Option<u64>| PlanOptions {
            kept: Some(vec![kept; cut.len()]),
            cut: Some(cut.clone()),
            resident: Some(resident),
            boundaries_stay: Some(false),
            spread: Spread::Stages { pipelined },
            device_budget,
            ..m.options.clone()
        };
        let home = Home::On(home);
        let placed = |plan| m.placed(Arc::new(plan), home.clone(), 0);
        let fastest = Plan::sketch(&m.model, &options(None), cost)?;
        let least = fastest.smallest_device_bytes;
        let smaller = fastest.arena.bytes > least;
        sketches.push(placed(fastest));
        if smaller {
            sketches.push(placed(Plan::sketch(&m.model, &options(Some(least)), cost)?));
        }
        Ok(())
    };
    if m.options.recompute != Recompute::Always {
        sketch(stages.clone(), true, true)?;
    }
    if m.options.recompute != Recompute::Never {
        sketch(stages.clone(), false, true)?;
        // Stages of more and more shards, which visit.
        for parts in 2..=layers {
            let cut: Vec<Range<usize>> = stages
                .iter()
                .flat_map(|s| balanced(&secs[s.clone()], parts).into_iter().map(|r| r.start + s.start..r.end + s.start))
                .collect();
            if cut.len() == layers {
                break;
            }
            sketch(cut, false, false)?;
        }
        sketch((0..layers).map(|l| l..l + 1).collect(), false, false)?;
    }
    let smallest = sketches.iter().min_by_key(|placed| most(placed)).expect("some way to recompute is allowed");
    let least = most(smallest);
    let Some(first) = sketches.iter().find(|placed| fits(placed)) else {
        return Err(refusal(devices, smallest, least));
    };
    let plan = Plan::clone(&first.plan).own(&m.model, m.options.recompute);
    Ok((Placed { plan: Arc::new(plan), ..first.clone() }, least))
}

fn refusal(devices: &[FleetDevice], Placed { plan, .. }: &Placed, needs: u64) -> Error {
    let budget = devices.iter().filter_map(|d| d.budget).min().unwrap_or(0);
    let [needed, given] = [needs, budget].map(format_bytes);
    let mut message = format!(
        "device memory: its stages need {needs} bytes ({needed}) of a device, the budget is {budget} bytes ({given})\n"
    );
    message += &format!("  the smallest plan has {} shards, and if all were on one device:\n", plan.shards.len());
    message += &plan.arena_lines();
    message += &format!("  smallest budget that works {needs:>14} bytes: memory = {needs}");
    Error::OutOfBudget { message, smallest_device_bytes: needs }
}
