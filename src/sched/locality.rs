//! Locality-LRTF: sharded-LRTF where a model bounds the makespan, and where none does, the unit that leaves the device waiting least.
//!
//! LRTF cares for one thing, that no chain of units is left over at the end. Most of the time none is about to be: the work ahead is
//! more than any one model's, and whichever unit goes next, the run ends at the same moment if only no device waits. That freedom is
//! spent on copies. Where copies cost nothing the choices are sharded-LRTF's own, on devices of one speed.

use super::policies::{by_place, by_remaining};
use super::{Claim, DeviceView, ModelId, ModelView, Policy, View};
use std::cmp::Ordering;

/// A unit whose useful share is within this part of the best one is as good as that: predictions are no better.
const TOLERANCE: f64 = 1.0 / 32.0;

/// Sharded-LRTF that weighs what is resident, links and unequal devices, in four passes over the models and one over the devices.
///
/// `s`, `r`, `b` and `h` are a device's speed, its link's bytes per second, the seconds until its queue has run and until its copies are there;
/// `R`, `B`, `W` and `u` a model's remaining seconds, bytes and waits, and its next unit's seconds, at speed 1. All sums and maxima are over all
/// models and devices but where it is said.
///
/// 1. **Chain** of a model: `C = max(R / max s, B / max r) + W`. It takes at least that long wherever it runs.
/// 2. **Horizon**: nothing ends before `T = max(max C, (sum R + sum b s) / sum s, sum B / sum r)`. A shared link caps `max r` and `sum r`.
/// 3. **Critical** is a candidate that might end last if it were passed over once: `b + C + turn >= T`, where a turn is the longest that any
///    candidate's next unit takes by the same two measures. The longest critical chain goes first.
/// 4. **Useful share** of a candidate: `(u / s) / (w + u / s)`, where `w = max(0, h + bytes / rate - b)` is how long the device would wait
///    for its copies, or longer where what it fetches is not at home by then. `bytes` leaves out a shard that a slot holds and boundary tensors that are here; `rate` is `r`, or an equal part of the
///    shared link among the devices that are copying. Candidates within 1/32 of the best share are equals.
/// 5. Of equals the longest chain goes first, with sharded-LRTF's ties.
///
/// On unequal devices the longest chain, if critical, is left to the fastest device that is free soonest where that would end the unit sooner.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalityLrtf;

impl Policy for LocalityLrtf {
    fn name(&self) -> &str {
        "locality-lrtf"
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let outlook = Outlook::new(view);
        let longest = || view.candidates().max_by(|a, b| outlook.by_chain(a, b));
        let left = if outlook.may_leave { longest().filter(|model| outlook.is_left(model)) } else { None };
        let rest = || view.candidates().filter(|model| left.is_none_or(|left| left.id != model.id));

        // Whoever might end last goes first, whatever its copies.
        let critical = rest().filter(|model| outlook.is_critical(model)).max_by(|a, b| outlook.by_chain(a, b));
        if let Some(model) = critical {
            return Some(model.id);
        }
        let enough = (1.0 - TOLERANCE) * rest().map(|model| outlook.useful_share(model)).fold(0.0, f64::max);
        let equals = rest().filter(|model| outlook.useful_share(model) >= enough);
        equals.max_by(|a, b| outlook.by_chain(a, b)).map(|model| model.id)
    }
}

/// What all candidates of one choice are measured by.
struct Outlook<'a> {
    view: &'a View<'a>,
    here: &'a DeviceView,
    /// Of the fastest devices, the one that is free soonest.
    fastest: &'a DeviceView,
    /// The fastest link's rate.
    fastest_rate: f64,
    /// What falls to each copying device of a shared link.
    shared_rate: f64,
    /// The chain from which a candidate is critical.
    critical_secs: f64,
    /// There is a faster device, and something runs, so that a device which is left waiting will be asked again.
    may_leave: bool,
}

impl<'a> Outlook<'a> {
    fn new(view: &'a View<'a>) -> Self {
        let here = view.asking();
        let (mut fastest, mut runs, mut copying) = (here, false, 1);
        let (mut speeds, mut work, mut rates, mut fastest_rate) = (0.0, 0.0, 0.0, 0f64);
        for device in view.devices {
            speeds += device.speed;
            work += device.busy_secs * device.speed;
            rates += device.h2d_bytes_per_sec;
            fastest_rate = fastest_rate.max(device.h2d_bytes_per_sec);
            runs |= device.claimed > 0;
            copying += u32::from(device.id != here.id && device.h2d_secs > 0.0);
            let sooner = device.speed == fastest.speed && device.busy_secs < fastest.busy_secs;
            if device.speed > fastest.speed || sooner {
                fastest = device;
            }
        }
        let shared = view.shared_bytes_per_sec.unwrap_or(f64::INFINITY);
        let mut outlook = Outlook {
            view,
            here,
            fastest,
            fastest_rate: fastest_rate.min(shared),
            shared_rate: shared / f64::from(copying),
            critical_secs: 0.0,
            may_leave: runs && fastest.speed > here.speed,
        };
        let (mut longest, mut bytes, mut turn) = (0f64, 0.0, 0f64);
        for model in view.models {
            work += model.remaining_secs;
            bytes += model.remaining_bytes as f64;
            longest = longest.max(outlook.chain_secs(model));
            if view.may_take(model) {
                turn = turn.max(outlook.least_secs(model.unit_secs, model.weight_bytes));
            }
        }
        let horizon = longest.max(work / speeds).max(bytes / rates.min(shared));
        outlook.critical_secs = horizon - here.busy_secs - turn;
        outlook
    }

    /// The least seconds for some arithmetic and some bytes of one model on any device.
    fn least_secs(&self, secs: f64, bytes: u64) -> f64 {
        (secs / self.fastest.speed).max(bytes as f64 / self.fastest_rate)
    }

    fn chain_secs(&self, model: &ModelView) -> f64 {
        self.least_secs(model.remaining_secs, model.remaining_bytes) + model.remaining_wait_secs
    }

    /// Orders by chain, the longer one greater. A quotient may round two remaining times to one number, so they are asked as well.
    fn by_chain(&self, a: &ModelView, b: &ModelView) -> Ordering {
        let chains = self.chain_secs(a).total_cmp(&self.chain_secs(b));
        chains.then_with(|| by_remaining(a, b)).then_with(|| by_place(self.view, a, b))
    }

    fn is_critical(&self, model: &ModelView) -> bool {
        self.chain_secs(model) >= self.critical_secs
    }

    /// Seconds until a model's next unit has its copies on a device.
    fn arrival_secs(&self, model: &ModelView, device: &DeviceView) -> f64 {
        let held = device.held.contains(&(model.id, model.shard));
        let near = model.last_device == Some(device.id);
        let (weight_bytes, weights_ready) =
            if held { (0, 0.0) } else { (model.weight_bytes, model.weights_ready_secs) };
        let (boundary_bytes, boundary_ready) =
            if near { (0, 0.0) } else { (model.boundary_bytes, model.boundary_ready_secs) };
        let (bytes, ready) = (weight_bytes + boundary_bytes, f64::max(weights_ready, boundary_ready));
        let rate = device.h2d_bytes_per_sec.min(self.shared_rate);
        let arrival = if bytes == 0 { 0.0 } else { device.h2d_secs + bytes as f64 / rate };
        arrival.max(ready)
    }

    /// Seconds from the end of the asking device's queue until a model's next unit has its copies there.
    fn wait_secs(&self, model: &ModelView) -> f64 {
        (self.arrival_secs(model, self.here) - self.here.busy_secs).max(0.0)
    }

    /// The part of the time that a unit takes, from the end of the asking device's queue on, in which the device computes.
    fn useful_share(&self, model: &ModelView) -> f64 {
        let secs = model.unit_secs / self.here.speed;
        let wait = self.wait_secs(model);
        if wait == 0.0 { 1.0 } else { secs / (wait + secs) }
    }

    /// Whether the asking device leaves a model's next unit to the fastest one.
    fn is_left(&self, model: &ModelView) -> bool {
        let end_secs = |device: &DeviceView, free_secs: f64| {
            free_secs.max(self.arrival_secs(model, device)) + model.unit_secs / device.speed
        };
        // Where this device's queue holds the predecessor, no other can have the unit before that has run.
        let claimed_secs = if model.claim == Claim::By(self.here.id) { self.here.busy_secs } else { 0.0 };
        let there = end_secs(self.fastest, self.fastest.busy_secs.max(claimed_secs));
        model.pinned.is_none() && self.is_critical(model) && there < end_secs(self.here, self.here.busy_secs)
    }
}
