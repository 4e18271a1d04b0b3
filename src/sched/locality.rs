//! Locality-LRTF: sharded-LRTF where models bound the makespan, and where none does, the unit that leaves the device least without work.
//!
//! LRTF cares for one thing, that no chain of units is left over at the end. Most of the time no chain is about to be: the work ahead is
//! more than any one model's, and whichever unit goes next, the run ends at the same moment, if only no device waits. That freedom is
//! spent on copies. Where copies cost nothing the choices are sharded-LRTF's own on devices of one speed.

use super::policies::{by_place, by_remaining};
use super::{Claim, DeviceView, ModelId, ModelView, Policy, View};

/// A unit whose share of useful time is within this part of the best one is as good as that: predictions are not better.
const TOLERANCE: f64 = 0.125;

/// Sharded-LRTF that weighs what is resident, links and unequal devices. One choice is three passes over the models and one over the devices.
///
/// With `R` a model's remaining and `u` its next unit's seconds at speed 1, `s` and `b` a device's speed and seconds until its queue has run:
///
/// 1. **Horizon**: nothing ends before `T = max(max R / max s, (sum R + sum b s) / sum s)`.
/// 2. **Critical** is a candidate that would end last if it were passed over once: `b + (R + max u) / max s >= T`, with `b` the asking
///    device's and `max u` over the candidates. If there are any, they alone are considered.
/// 3. **Useful share** of a candidate: `(u / s) / (w + u / s)`, where `w = max(0, h + bytes / rate - b)` is how long the device would wait
///    for its copies: `h` seconds of copies are asked for already, `bytes` leaves out a shard that a slot holds and boundary tensors that
///    are here, and `rate` is the link's, or what falls to it of a shared one. Candidates within 1/8 of the best share are equals.
/// 4. Of equals the longest remaining goes first, with sharded-LRTF's ties.
///
/// On unequal devices the longest critical candidate is left to the fastest device that is free soonest if that would end the unit sooner.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalityLrtf;

impl Policy for LocalityLrtf {
    fn name(&self) -> &str {
        "locality-lrtf"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let outlook = Outlook::new(view);
        let longest = || view.candidates().max_by(|a, b| by_remaining(a, b).then_with(|| by_place(view, a, b)));
        let left = if outlook.may_leave { longest().filter(|model| outlook.is_left(model)) } else { None };
        let rest = || view.candidates().filter(|model| left.is_none_or(|left| left.id != model.id));

        // The best share of all candidates and of the critical ones, which go first.
        let (mut best, mut best_critical) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
        for model in rest() {
            let share = outlook.useful_share(model);
            best = best.max(share);
            if outlook.is_critical(model) {
                best_critical = best_critical.max(share);
            }
        }
        let any_critical = best_critical > f64::NEG_INFINITY;
        let enough = (1.0 - TOLERANCE) * if any_critical { best_critical } else { best };
        rest()
            .filter(|model| !any_critical || outlook.is_critical(model))
            .filter(|model| outlook.useful_share(model) >= enough)
            .max_by(|a, b| by_remaining(a, b).then_with(|| by_place(view, a, b)))
            .map(|model| model.id)
    }
}

/// What one choice looks at again and again.
struct Outlook<'a> {
    view: &'a View<'a>,
    here: &'a DeviceView,
    /// Of the fastest devices, the one that is free soonest.
    fastest: &'a DeviceView,
    /// A faster device exists, and something runs: a device that is left waiting will be asked again.
    may_leave: bool,
    /// The remaining time from which a candidate is critical.
    critical_secs: f64,
    /// Of a shared link, what falls to each device that uses it.
    shared_rate: f64,
}

impl<'a> Outlook<'a> {
    fn new(view: &'a View<'a>) -> Self {
        let here = view.asking();
        let (mut fastest, mut speeds, mut work, mut copying, mut runs) = (here, 0.0, 0.0, 1, false);
        for device in view.devices {
            speeds += device.speed;
            work += device.busy_secs * device.speed;
            copying += u32::from(device.id != here.id && device.h2d_secs > 0.0);
            runs |= device.claimed > 0;
            let sooner = device.speed == fastest.speed && device.busy_secs < fastest.busy_secs;
            if device.speed > fastest.speed || sooner {
                fastest = device;
            }
        }
        let (mut longest, mut turn) = (0f64, 0f64);
        for model in view.models {
            work += model.remaining_secs;
            longest = longest.max(model.remaining_secs);
            if view.may_take(model) {
                turn = turn.max(model.unit_secs);
            }
        }
        let horizon = (longest / fastest.speed).max(work / speeds);
        Outlook {
            view,
            here,
            fastest,
            may_leave: runs && fastest.speed > here.speed,
            critical_secs: (horizon - here.busy_secs) * fastest.speed - turn,
            shared_rate: view.shared_bytes_per_sec.map_or(f64::INFINITY, |rate| rate / f64::from(copying)),
        }
    }

    fn is_critical(&self, model: &ModelView) -> bool {
        model.remaining_secs >= self.critical_secs
    }

    /// The seconds until a device could start a model's next unit for its copies' sake.
    fn arrival_secs(&self, model: &ModelView, device: &DeviceView) -> f64 {
        let held = device.held.contains(&(model.id, model.shard));
        let near = model.last_device == Some(device.id);
        let bytes = if held { 0 } else { model.weight_bytes } + if near { 0 } else { model.boundary_bytes };
        let rate = device.h2d_bytes_per_sec.min(self.shared_rate);
        if bytes == 0 { 0.0 } else { device.h2d_secs + bytes as f64 / rate }
    }

    /// The part of the time for this unit, from the end of the asking device's queue on, in which the device computes.
    fn useful_share(&self, model: &ModelView) -> f64 {
        let secs = model.unit_secs / self.here.speed;
        let wait = (self.arrival_secs(model, self.here) - self.here.busy_secs).max(0.0);
        if wait == 0.0 { 1.0 } else { secs / (wait + secs) }
    }

    /// Whether the asking device leaves this model's next unit to the fastest one.
    fn is_left(&self, model: &ModelView) -> bool {
        let end_secs = |device: &DeviceView, free_secs: f64| {
            free_secs.max(self.arrival_secs(model, device)) + model.unit_secs / device.speed
        };
        // Another device can have it only when this one's queue has run, if that holds its predecessor.
        let free_secs = if model.claim == Claim::By(self.view.device) { self.here.busy_secs } else { 0.0 };
        let there = end_secs(self.fastest, self.fastest.busy_secs.max(free_secs));
        model.pinned.is_none() && self.is_critical(model) && there < end_secs(self.here, self.here.busy_secs)
    }
}
