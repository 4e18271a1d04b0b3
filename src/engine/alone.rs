//! The plan of a model that has a device to itself: of what the search has found the plan whose step the executor itself
//! predicts to be the shortest.

use super::simulate::{least_tasks, predict_counted};
use crate::base::Result;
use crate::device::sim::CostModel;
use crate::spill::{BoundaryTier, Model, Plan, PlanOptions};
use std::cell::Cell;
use std::sync::Arc;

/// Tasks after which [`plan_alone`] simulates no other plan: about a second's, of which half are for what the search
/// has found. Two plans are tried in any case, but none that takes more by itself: then the estimate decides.
const TRIED_TASKS: u64 = 1_000_000;

/// Plans of different numbers of shards that are tried with other numbers of updates on the device.
const CLIMBS: usize = 4;

/// Plans a model that has a device to itself: of the plans that may be the fastest the one with the shortest predicted
/// step, with as many updates of what visits on the device as make it shortest.
///
/// # Errors
/// As [`Plan::new`].
pub fn plan_alone(model: &Arc<Model>, options: &PlanOptions, cost: &CostModel) -> Result<Arc<Plan>> {
    let best = alone(model, options, cost)?;
    Ok(Arc::new(Arc::unwrap_or_clone(best).own(model, options.recompute)))
}

/// [`plan_alone`]'s plan, of stand-ins.
fn alone(model: &Arc<Model>, options: &PlanOptions, cost: &CostModel) -> Result<Arc<Plan>> {
    let sketches: Vec<Arc<Plan>> = Plan::sketches(model, options, cost)?.into_iter().map(Arc::new).collect();
    let first = Arc::clone(&sketches[0]);
    let told = options.visiting_updates.is_some();
    let is_too_long = |plan: &Plan| least_tasks(model, plan) > TRIED_TASKS;
    if sketches.len() == 1 && (told || first.choice.visiting_updates == 0) || is_too_long(&first) {
        return Ok(first);
    }
    let tasks = Cell::new(0);
    let secs = |plan: &Arc<Plan>| -> Result<f64> {
        let (prediction, added) = predict_counted(model, plan, cost)?;
        tasks.set(tasks.get() + added);
        Ok(prediction.step_secs)
    };
    let is_enough = |most: u64| tasks.get() > most;
    // The first is the smaller, where they are as fast; what is all on the device is not given up for little.
    let is_shorter =
        |secs: f64, best: &Plan, least: f64| secs < if best.choice.resident { 0.95 } else { 0.999 } * least;
    let mut tried: Vec<(f64, Arc<Plan>)> = Vec::new();
    let (mut best, mut least) = (Arc::clone(&first), f64::INFINITY);
    for (i, plan) in sketches.into_iter().enumerate() {
        if i >= 2 && is_enough(if told { TRIED_TASKS } else { TRIED_TASKS / 2 }) {
            break;
        }
        if is_too_long(&plan) {
            continue;
        }
        let secs = secs(&plan)?;
        tried.push((secs, Arc::clone(&plan)));
        if is_shorter(secs, &best, least) {
            (best, least) = (plan, secs);
        }
    }
    if told || best.choice.visiting_updates == 0 {
        return Ok(best);
    }
    // Estimates are too rough to tell numbers of updates apart: a few of the best plans are tried with others.
    tried.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let mut starts = vec![(least, Arc::clone(&best))];
    for (secs, plan) in tried {
        let is_other = starts.iter().all(|(_, other)| other.shards.len() != plan.shards.len());
        if plan.choice.visiting_updates > 0 && is_other && starts.len() < CLIMBS {
            starts.push((secs, plan));
        }
    }
    let climb = |mut least: f64, mut best: Arc<Plan>, up: bool| -> Result<(f64, Arc<Plan>)> {
        loop {
            let updates = best.choice.visiting_updates;
            let next = if up { updates + 1 } else { updates - 1 };
            if next == 0 || next > best.shards.len() - best.choice.resting || is_enough(TRIED_TASKS) {
                return Ok((least, best));
            }
            let Ok(mut sketches) = Plan::sketches(model, &the_same(&best, next, options), cost) else {
                return Ok((least, best));
            };
            let plan = Plan { smallest_device_bytes: first.smallest_device_bytes, ..sketches.swap_remove(0) };
            let plan = Arc::new(plan);
            let secs = secs(&plan)?;
            if !is_shorter(secs, &best, least) {
                return Ok((least, best));
            }
            (least, best) = (secs, plan);
        }
    };
    for (secs, start) in starts {
        let (mut secs, mut plan) = climb(secs, Arc::clone(&start), true)?;
        // Where it has come up, one fewer is what it came from, which takes longer.
        if Arc::ptr_eq(&plan, &start) {
            (secs, plan) = climb(secs, plan, false)?;
        }
        if is_shorter(secs, &best, least) {
            (best, least) = (plan, secs);
        }
    }
    Ok(best)
}

/// What makes a plan like this one, with another number of updates of what visits on the device.
fn the_same(plan: &Plan, visiting_updates: usize, options: &PlanOptions) -> PlanOptions {
    PlanOptions {
        cut: Some(plan.shards.iter().map(|s| s.layout.layers.clone()).collect()),
        kept: Some(plan.shards.iter().map(|s| s.kept).collect()),
        resident: Some(false),
        resting: Some(plan.choice.resting),
        visiting_updates: Some(visiting_updates),
        boundaries_stay: Some(plan.choice.activations == BoundaryTier::Device),
        ..options.clone()
    }
}
