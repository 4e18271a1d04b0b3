//! Room for models that join a run later: how much larger the arenas are than the first models' plans need, and plans
//! that fit into that.
//!
//! Arenas do not grow. Untouched pages cost a host no memory; a GPU without spare memory gets only what the plan needs.

use crate::job::{DeviceKind, Job};
use crate::machine::{SHARE_OF_FREE_MEMORY, free_memory_bytes};
use crate::plan::placing::fleet_model;
use crate::plan::planned::{Planned, PlannedJob, predict_alone, trace};
use crate::setup::prepare;
use hydra::base::{Error, Result, format_bytes};
use hydra::spill::{FleetDevice, FleetMap, FleetModel, Placed, find_homes, named, plan_anywhere};
use std::rc::Rc;

/// Bisection steps between a model's smallest and widest plan.
const TRIES: usize = 6;

/// Bytes of each device's arena when other models may join: its budget or, without one, twice what is needed; if arenas
/// are in the machine's own memory, at most what is free there.
pub fn roomy_arenas(planned: &PlannedJob) -> Vec<u64> {
    let needs = &planned.map.arena_bytes;
    let budget = |d: usize| planned.machine.devices[d].budget;
    let extra: Vec<u64> =
        needs.iter().enumerate().map(|(d, &needs)| budget(d).unwrap_or(2 * needs).saturating_sub(needs)).collect();
    let wants: u64 = extra.iter().sum();
    let spare = match planned.machine.first().kind {
        DeviceKind::Host | DeviceKind::Emulated => free_memory_bytes()
            .map(|free| ((free as f64 * SHARE_OF_FREE_MEMORY) as u64).saturating_sub(planned.wants_bytes())),
        DeviceKind::Cuda | DeviceKind::Sim => None,
    };
    let share = spare.filter(|&spare| spare < wants).map_or(1.0, |spare| spare as f64 / wants as f64);
    needs.iter().zip(extra).map(|(needs, extra)| needs + (extra as f64 * share) as u64).collect()
}

/// Prepares and plans the models that `job` has beyond those of `planned`, so that they fit into `arenas` together with
/// the models `there`.
///
/// # Errors
/// When a model is faulty or does not fit.
pub fn plan_added(planned: &PlannedJob, job: &Job, there: &[Placed], arenas: &[u64]) -> Result<Vec<Rc<Planned>>> {
    let devices = planned.machine.devices.len();
    let mut placed = there.to_vec();
    let mut added: Vec<Rc<Planned>> = Vec::new();
    for i in planned.models.len()..job.models.len() {
        let before: Vec<_> = planned.models.iter().chain(&added).map(|p| (&p.prepared, p.model())).collect();
        let (prepared, model) = trace(job, prepare(job, i, &planned.texts)?, &before)?;
        prepared.check_weights(&model.train)?;
        let one = fit(&fleet_model(&prepared, &model), planned, &placed, arenas)?;
        // The existing models keep their homes.
        let homes = planned.machine.homes.beside(&FleetMap::new(&placed, devices));
        let one = find_homes(&[Placed { line: i, ..one }], homes).map_err(|e| named(&prepared.name, e))?.remove(0);
        placed.push(one.clone());
        let prediction = predict_alone(&one, &planned.sharing, &planned.machine, &planned.map.arena_bytes)?;
        added.push(Rc::new(Planned { prepared, placed: one, prediction }));
    }
    Ok(added)
}

/// The widest plan found with which `model` fits together with the models `there`.
fn fit(model: &FleetModel, planned: &PlannedJob, there: &[Placed], arenas: &[u64]) -> Result<Placed> {
    let machine = &planned.machine;
    let at = |budget: u64| -> Result<Placed> {
        let devices: Vec<FleetDevice> =
            machine.devices.iter().map(|d| FleetDevice { budget: Some(budget), cost: d.cost.clone() }).collect();
        Ok(plan_anywhere(std::slice::from_ref(model), &devices)?.placed.remove(0))
    };
    let needs = |placed: &Placed| {
        let mut all = there.to_vec();
        all.push(placed.clone());
        FleetMap::new(&all, arenas.len()).arena_bytes
    };
    let fits = |placed: &Placed| needs(placed).iter().zip(arenas).all(|(needs, has)| needs <= has);
    let room = arenas.iter().copied().min().unwrap_or(0);
    let widest = at(room)?;
    if fits(&widest) {
        return Ok(widest);
    }
    let (mut low, mut high) = (widest.plan.smallest_device_bytes, room);
    let mut best = at(low)?;
    if !fits(&best) {
        let needs = needs(&best);
        let (d, bytes) =
            (0..needs.len()).map(|d| (d, needs[d])).find(|&(d, n)| n > arenas[d]).expect("it does not fit somewhere");
        let message = format!(
            "device memory: {}: beside the other models device {d} needs {bytes} bytes ({}), its arena has {} ({}); write a larger memory under [[device]] when the run begins",
            model.name,
            format_bytes(bytes),
            arenas[d],
            format_bytes(arenas[d])
        );
        return Err(Error::OutOfBudget { message, smallest_device_bytes: bytes });
    }
    for _ in 0..TRIES {
        let middle = low + high.saturating_sub(low) / 2;
        let placed = at(middle)?;
        if fits(&placed) { (low, best) = (middle, placed) } else { high = middle }
    }
    Ok(best)
}
