//! Why what an engine is given does not fit: models, devices and turns at its start, and the numbers of a step.

use super::{EVALUATIONS, EngineOptions, StepInput, TurnOptions};
use crate::base::{Error, Result};
use crate::device::{Device, UpdateRule};
use crate::spill::{FleetMap, Home, Placed};

/// Refuses models that do not fit so many devices, or each other's options and turns.
pub(super) fn check_fleet(
    models: &[Placed],
    options: &[EngineOptions],
    turns: Option<&TurnOptions>,
    devices: usize,
) -> Result<()> {
    if models.len() != options.len() {
        return Err(Error::bad(format!("{} models, and options of {}", models.len(), options.len())));
    }
    for (m, (placed, options)) in models.iter().zip(options).enumerate() {
        let (parameters, decays) = (placed.model.train.parameters.len(), options.decays.len());
        if parameters != decays {
            return Err(Error::bad(format!("model {m}: has {parameters} parameters, and {decays} decay or do not")));
        }
        let shards = placed.plan.shards.len();
        match &placed.home {
            Home::Anywhere if turns.is_none() => {
                return Err(Error::bad(format!("model {m}: runs anywhere, and nobody chooses a device")));
            }
            Home::On(homes) if homes.len() != shards => {
                let homes = homes.len();
                return Err(Error::bad(format!("model {m}: has {shards} shards, and homes of {homes}")));
            }
            Home::On(homes) => {
                if let Some(home) = homes.iter().find(|&&home| usize::from(home) >= devices) {
                    return Err(Error::bad(format!("model {m}: is at home on device {home}, of {devices} devices")));
                }
            }
            Home::Anywhere => {}
        }
    }
    let Some(TurnOptions { costs, arena_bytes, room_bytes, .. }) = turns else { return Ok(()) };
    if costs.is_empty() {
        return Err(Error::bad("turns: costs are those of no device"));
    }
    let lists = [("arena_bytes", arena_bytes.len()), ("room_bytes", room_bytes.len())];
    match lists.into_iter().find(|&(name, found)| found != devices && !(name == "room_bytes" && found == 0)) {
        Some((name, found)) => Err(Error::bad(format!("turns: {name} are of {found} devices, there are {devices}"))),
        None => Ok(()),
    }
}

/// Refuses a device whose memory ends before that of the models, as far as it says where it ends.
pub(super) fn check_memory(device: &dyn Device, map: &FleetMap) -> Result<()> {
    let small = |what: &str, has: Option<u64>, needs: u64| match has {
        Some(has) if has < needs => Err(Error::bad(format!("{what} has {has} bytes, the plans need {needs}"))),
        _ => Ok(()),
    };
    for (d, &needs) in map.arena_bytes.iter().enumerate() {
        small(&format!("the arena of device {d}"), device.arena_bytes(d as u16), needs)?;
    }
    small("the host's store", device.host_bytes(), map.host_bytes)
}

/// Refuses numbers of a step that cannot be meant.
pub(super) fn check_step(input: &StepInput) -> Result<()> {
    let &StepInput { step, loss_scale, rule, clip, .. } = input;
    if step >= EVALUATIONS[1] {
        return Err(Error::bad(format!("step {step}: is kept for evaluations and what belongs to no step")));
    }
    let fault =
        |field: &str, is: f64, want: &str| Err(Error::bad(format!("step {step}: {field} is {is}, want {want}")));
    let is_above_0 = |x: f64| x > 0.0 && x.is_finite();
    if !is_above_0(loss_scale) {
        return fault("loss_scale", loss_scale, "a number above 0");
    }
    if let Some(clip) = clip.filter(|&clip| !is_above_0(clip)) {
        return fault("clip", clip, "a number above 0, or none");
    }
    let (update, numbers, decays) = match rule {
        UpdateRule::Adamw(r) => {
            let numbers = [("lr", r.lr), ("epsilon", r.epsilon), ("weight_decay", r.weight_decay)];
            (r.update, numbers, [("betas.0", r.betas.0), ("betas.1", r.betas.1)])
        }
        UpdateRule::Sgd(r) => {
            let numbers = [("lr", r.lr), ("weight_decay", r.weight_decay), ("weight_decay", r.weight_decay)];
            (r.update, numbers, [("momentum", r.momentum); 2])
        }
    };
    if update == 0 {
        return fault("rule.update", 0.0, "1 or more");
    }
    if let Some(&(name, x)) = numbers.iter().find(|(_, x)| !(x.is_finite() && *x >= 0.0)) {
        return fault(&format!("rule.{name}"), x, "0 or more");
    }
    match decays.iter().find(|(_, x)| !(0.0..1.0).contains(x)) {
        Some(&(name, x)) => fault(&format!("rule.{name}"), x, "a number from 0 up to, not including, 1"),
        None => Ok(()),
    }
}
