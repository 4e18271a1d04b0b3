//! The plan of a model that has a device to itself: of what the search has found the plan whose step the executor itself
//! predicts to be the shortest.

use super::simulate::{least_tasks, predict_counted};
use crate::base::Result;
use crate::device::sim::CostModel;
use crate::spill::{BoundaryTier, Model, Plan, PlanOptions};
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
    let mut sketches = Plan::sketches(model, options, cost)?;
    let told = options.visiting_updates.is_some();
    let is_too_long = |plan: &Plan| least_tasks(model, plan) > TRIED_TASKS;
    if sketches.len() == 1 && (told || sketches[0].choice.visiting_updates == 0) || is_too_long(&sketches[0]) {
        return Ok(Arc::new(sketches.swap_remove(0)));
    }
    let mut trials = Trials { model, options, cost, tasks: 0 };
    let mut tried: Vec<Tried> = Vec::new();
    for (i, plan) in sketches.into_iter().enumerate() {
        if i >= 2 && trials.tasks > if told { TRIED_TASKS } else { TRIED_TASKS / 2 } {
            break;
        }
        if !is_too_long(&plan) {
            tried.push(trials.predict(plan)?);
        }
    }
    let shorter = |best: Tried, other: Tried| if other.is_shorter(&best) { other } else { best };
    let mut best = tried.iter().cloned().reduce(shorter).expect("the first is not too long");
    if told || best.plan.choice.visiting_updates == 0 {
        return Ok(best.plan);
    }
    // Estimates are too rough to tell numbers of updates apart: a few of the best plans are tried with others.
    tried.sort_by(|a, b| a.secs.total_cmp(&b.secs));
    let mut starts = vec![best.clone()];
    for other in tried {
        let is_other = starts.iter().all(|start| start.plan.shards.len() != other.plan.shards.len());
        if other.plan.choice.visiting_updates > 0 && is_other && starts.len() < CLIMBS {
            starts.push(other);
        }
    }
    for start in starts {
        let mut top = trials.climb(start.clone(), true)?;
        // Where it has come up, one fewer is what it came from, which takes longer.
        if Arc::ptr_eq(&top.plan, &start.plan) {
            top = trials.climb(start, false)?;
        }
        best = shorter(best, top);
    }
    Ok(best.plan)
}

/// A plan, and the seconds of its step.
#[derive(Clone)]
struct Tried {
    plan: Arc<Plan>,
    secs: f64,
}

impl Tried {
    /// Whether it is to be had instead of one before it, which is the smaller where they are as fast; what is all on the
    /// device is not given up for little.
    fn is_shorter(&self, best: &Tried) -> bool {
        self.secs < if best.plan.choice.resident { 0.95 } else { 0.999 } * best.secs
    }
}

/// Predictions of a model's plans, and how many tasks they have taken.
struct Trials<'a> {
    model: &'a Arc<Model>,
    options: &'a PlanOptions,
    cost: &'a CostModel,
    tasks: u64,
}

impl Trials<'_> {
    fn predict(&mut self, plan: Plan) -> Result<Tried> {
        let plan = Arc::new(plan);
        let (prediction, tasks) = predict_counted(self.model, &plan, self.cost)?;
        self.tasks += tasks;
        Ok(Tried { plan, secs: prediction.step_secs })
    }

    /// Goes from a plan to that with one update more, or one fewer, for as long as steps become shorter.
    fn climb(&mut self, mut best: Tried, up: bool) -> Result<Tried> {
        loop {
            let Plan { shards, choice, smallest_device_bytes, .. } = best.plan.as_ref();
            let next = if up { choice.visiting_updates + 1 } else { choice.visiting_updates - 1 };
            if next == 0 || next > shards.len() - choice.resting || self.tasks > TRIED_TASKS {
                return Ok(best);
            }
            let options = the_same(&best.plan, next, self.options);
            let Ok(mut sketches) = Plan::sketches(self.model, &options, self.cost) else { return Ok(best) };
            let smallest_device_bytes = *smallest_device_bytes;
            let other = self.predict(Plan { smallest_device_bytes, ..sketches.swap_remove(0) })?;
            if !other.is_shorter(&best) {
                return Ok(best);
            }
            best = other;
        }
    }
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
