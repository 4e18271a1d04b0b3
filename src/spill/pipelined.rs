//! Plans for a policy that pipelines: units so fine that microbatches of a model which would end last go on from device
//! to device.

use super::fleet::Placed;
use super::fleet_plan::{FleetDevice, FleetModel, FleetPlan, hold, plan_anywhere, sketch_anywhere, speeds};
use super::plan::{Anywhere, Spread};
use crate::base::Result;

/// A model whose units one after another take this part of the time that all models' work takes on all devices may
/// bound the makespan.
const NEARLY: f64 = 0.9;

/// As [`plan_anywhere`], for a policy that pipelines: where a model bounds the makespan, with the memory that devices
/// have or with all that it wants, units are so fine that its microbatches can go on from device to device. `None`
/// where there is one device, no model does, or none that does has several microbatches.
///
/// # Errors
/// As [`plan_anywhere`].
pub fn plan_pipelined(models: &[FleetModel], devices: &[FleetDevice]) -> Result<Option<FleetPlan>> {
    if devices.len() < 2 {
        return Ok(None);
    }
    let _held = hold(models);
    let unlimited: Vec<FleetDevice> = devices.iter().map(|d| FleetDevice { budget: None, ..d.clone() }).collect();
    let finer_by = |by: &[FleetDevice]| Ok(finer(models, &sketch_anywhere(models, by, None)?.placed, devices));
    let fine = match finer_by(devices)? {
        None if devices.iter().any(|d| d.budget.is_some()) => finer_by(&unlimited)?,
        fine => fine,
    };
    fine.map(|fine| plan_anywhere(&fine, devices)).transpose()
}

/// The models with the wish for finer units than those of their plans, where one of those bounds the makespan.
fn finer(models: &[FleetModel], placed: &[Placed], devices: &[FleetDevice]) -> Option<Vec<FleetModel>> {
    let secs = |m: &FleetModel, p: &Placed| m.steps as f64 * p.plan.estimated_secs;
    let all: f64 = models.iter().zip(placed).map(|(m, p)| secs(m, p)).sum();
    let share = all / speeds(models, devices).iter().sum::<f64>();
    let hurries = |m: &FleetModel, p: &Placed| m.model.microbatches > 1 && secs(m, p) > NEARLY * share;
    let steps = models.iter().zip(placed).filter(|(m, p)| hurries(m, p)).map(|(_, p)| p.plan.estimated_secs);
    let shortest = steps.min_by(f64::total_cmp)?;
    let mut fine = models.to_vec();
    for (m, p) in fine.iter_mut().zip(placed) {
        // About two units in each direction for each device.
        m.options.spread = Spread::Anywhere(Anywhere {
            devices: devices.len(),
            unit_secs: Some(shortest / (4 * devices.len()) as f64),
            chain_secs: hurries(m, p).then(|| 0.5 * share / m.steps as f64),
        });
    }
    Some(fine)
}
