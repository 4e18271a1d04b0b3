//! Locality-LRTF: sharded-LRTF where a model bounds the makespan, and otherwise the unit that makes the device wait
//! least.
//!
//! LRTF has one aim: that no chain of units is left over at the end. Most of the time none would be: the remaining work
//! exceeds any one model's, and whichever unit goes next, the run ends at the same time as long as no device waits.
//! That freedom is used to save copies. Where copies cost nothing and devices have one speed, the choices are
//! sharded-LRTF's own.

use super::policies::{by_place, by_remaining};
use super::{Claim, DeviceView, ModelId, ModelView, Policy, View};

/// Sharded-LRTF that weighs what is resident, links and unequal devices, in three passes over the models and one over
/// the devices.
///
/// `s`, `r`, `b` and `h` are a device's speed, its link's bytes per second, and the seconds until its queue has run and
/// until its copies have arrived; `R`, `B`, `W` and `u` are a model's remaining seconds, bytes and waits, and its next
/// unit's seconds, at speed 1. All sums and maxima are over all models and devices unless stated otherwise.
///
/// 1. **Chain** of a model: `C = max(R / max s, B / max r) + W`. A model takes at least that long wherever it runs, one
///    unit at a time.
/// 2. **Horizon**: the run does not end before `T = max(max C, (sum R + sum b s) / sum s, sum B / sum r)`. A shared
///    link caps `max r` and `sum r`. Where microbatches are pipelined from unit to unit, only the seconds that must run
///    one after another count as `R` in `C` here.
/// 3. **Critical** is a candidate that might end last if it were passed over once: `b + C + turn >= T`, where a turn is
///    the longest time that any candidate's next unit takes by the same two measures. If there are critical candidates,
///    only they are considered.
/// 4. **Useful share** of a candidate: `(u / s) / (w + u / s)`, where `w = max(0, h + bytes / rate - b)` is how long
///    the device would wait for its copies; it waits longer if what it fetches is not at home by then, or if it needs a
///    gradient slot and none is free. `bytes` leaves out a shard that a slot holds and boundary tensors already on the
///    device; `rate` is `r`, or an equal share of the shared link among the devices that are copying. Candidates within
///    1/8 of the best share are equals, critical ones within 1/2.
/// 5. Among equals the longest chain goes first, with ties broken as in sharded-LRTF.
/// 6. If the policy pipelines, a **follower** (a unit whose predecessor runs on another device) is considered if its
///    model is critical, since every other model ends in time without that, and if its useful share is within 1/8 of
///    the best candidate's. It also waits for microbatches: its last one ends no sooner than one microbatch after the
///    predecessor. It is left to the predecessor's device if that would end it as soon; and a device leaves a critical
///    successor of its own unit to a device that is free earlier and ends it sooner.
///
/// On unequal devices a unit is left to the fastest device (the one of them that is free soonest), if that would end it
/// sooner and either its chain is the longest and critical, or its model could otherwise only end after all others:
/// later than the horizon of the other devices plus half a turn.
///
/// The constants in these rules are the defaults of [`LocalityTuning`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LocalityLrtf {
    /// Whether followers are considered.
    pub pipelines: bool,
    /// How much weight the rules give to conflicting aims.
    pub tuning: LocalityTuning,
}

/// The weights of locality-LRTF's aims. The defaults are good for most sets of models; [`rehearse`](super::rehearse)
/// finds better ones for a given set.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalityTuning {
    /// Candidates whose useful share is within this fraction of the best one's are equals, since predictions are no
    /// more precise.
    pub tolerance: f64,
    /// The same fraction for critical models; for the longest of them more waiting is acceptable.
    pub critical_tolerance: f64,
    /// A model is critical if being passed over for this many turns might make it end last. If this is infinite, and
    /// the critical tolerance 1, the choices are sharded-LRTF's.
    pub critical_turns: f64,
    /// Seconds of waiting that a second of copies counts as, even if the device would not wait for them: a copy
    /// displaces what its slot held, and a busy link delays the next unit.
    pub copy_price: f64,
    /// A device that has work queued does not yet take a unit whose copies would arrive within this fraction of the
    /// unit's seconds at speed 1: an unclaimed model can go to whichever device is free first.
    pub least_copies: f64,
    /// How much more urgent the end of a step is than its beginning, as a fraction: models in the middle of a step
    /// occupy entries.
    pub depth: f64,
    /// Whether units are left to faster devices.
    pub leaves: bool,
    /// How urgent each unit of a step is, by model and unit: a factor on the length of its chain; 1 where not given.
    pub urgency: Vec<Vec<f64>>,
}

impl Default for LocalityTuning {
    fn default() -> Self {
        LocalityTuning {
            tolerance: 0.125,
            critical_tolerance: 0.5,
            critical_turns: 1.0,
            copy_price: 0.0,
            least_copies: 0.0,
            depth: 0.0,
            leaves: true,
            urgency: Vec::new(),
        }
    }
}

impl LocalityTuning {
    /// How urgent a model's next unit is.
    fn urgency(&self, model: &ModelView) -> f64 {
        let of_unit = self.urgency.get(usize::from(model.id)).and_then(|units| units.get(usize::from(model.unit)));
        of_unit.copied().unwrap_or(1.0) * (1.0 + self.depth * f64::from(model.unit) / f64::from(model.units))
    }
}

impl Policy for LocalityLrtf {
    fn name(&self) -> &str {
        "locality-lrtf"
    }

    fn pipelines(&self) -> bool {
        self.pipelines
    }

    fn choose(&self, view: &View) -> Option<ModelId> {
        let outlook = Outlook::new(view, self);
        // Whether a model is left to another device is checked last: for most models it makes no difference.
        let (mut best, mut best_critical) = (0f64, None);
        for model in view.candidates() {
            let critical = outlook.is_critical(model);
            let raises = |share: f64| share > best || critical && best_critical.is_none_or(|best| share > best);
            // No share is greater than 1; and once there are critical candidates, the others matter only for comparison
            // with followers.
            if !raises(1.0) || !critical && !self.pipelines && best_critical.is_some() {
                continue;
            }
            let share = outlook.useful_share(model);
            if !raises(share) || outlook.is_left(model) {
                continue;
            }
            best = greater(best, share);
            if critical {
                best_critical = Some(greater(best_critical.unwrap_or(0.0), share));
            }
        }
        let LocalityTuning { tolerance, critical_tolerance, .. } = self.tuning;
        let followed = (1.0 - tolerance) * best;
        let followers = || view.followers().filter(|model| self.pipelines && outlook.is_critical(model));
        for model in followers() {
            let share = outlook.useful_share(model);
            if share >= greater(followed, best_critical.unwrap_or(0.0)) && !outlook.is_left(model) {
                best_critical = Some(share);
            }
        }
        // Where there are critical candidates, the choice is the longest of them that is good enough.
        let enough = best_critical.map_or(followed, |best| (1.0 - critical_tolerance) * best);
        let mut first: Option<(&ModelView, f64)> = None;
        let all = view.candidates().map(|model| (model, enough));
        for (model, enough) in all.chain(followers().map(|model| (model, greater(enough, followed)))) {
            let secs = outlook.urgent_secs(model);
            if best_critical.is_some() && secs < outlook.critical_secs {
                continue;
            }
            let longer = outlook.is_longer((model, secs), first);
            if longer && outlook.useful_share(model) >= enough && !outlook.is_left(model) {
                first = Some((model, secs));
            }
        }
        first.map(|(model, _)| model).filter(|model| !outlook.can_wait(model)).map(|model| model.id)
    }
}

/// The quantities by which all candidates of one choice are measured.
struct Outlook<'a> {
    view: &'a View<'a>,
    here: &'a DeviceView,
    /// Of the fastest devices, the one that is free soonest.
    fastest: &'a DeviceView,
    /// The least seconds for a second of compute at speed 1, and for a byte. Stored as reciprocals, since they are
    /// multiplied for many models.
    second_secs: f64,
    byte_secs: f64,
    /// Each copying device's share of a shared link.
    shared_rate: f64,
    /// Seconds per byte to the asking device.
    here_byte_secs: f64,
    /// The candidate with the longest chain, and the length of that chain.
    longest: Option<(&'a ModelView, f64)>,
    /// The chain length from which on a candidate is critical.
    critical_secs: f64,
    /// A model whose unit the asking device takes must not end later than this.
    late_secs: f64,
    /// Whether units may be pipelined over several devices.
    pipelines: bool,
    tuning: &'a LocalityTuning,
    /// Whether some units are more urgent than others.
    leans: bool,
    /// Whether there is a faster device and something is running, so that a device left waiting will be asked again.
    may_leave: bool,
}

impl<'a> Outlook<'a> {
    fn new(view: &'a View<'a>, policy: &'a LocalityLrtf) -> Self {
        let LocalityLrtf { pipelines, ref tuning } = *policy;
        let here = view.asking();
        let (mut fastest, mut runs, mut copying) = (here, false, 1);
        let (mut speeds, mut work, mut rates, mut fastest_rate) = (0.0, 0.0, 0.0, 0f64);
        for device in view.devices {
            speeds += device.speed;
            work += device.busy_secs * device.speed;
            rates += device.h2d_bytes_per_sec;
            fastest_rate = greater(fastest_rate, device.h2d_bytes_per_sec);
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
            second_secs: 1.0 / fastest.speed,
            byte_secs: 1.0 / fastest_rate.min(shared),
            shared_rate: shared / f64::from(copying),
            here_byte_secs: 1.0 / here.h2d_bytes_per_sec.min(shared / f64::from(copying)),
            longest: None,
            critical_secs: 0.0,
            late_secs: 0.0,
            pipelines,
            tuning,
            leans: tuning.depth > 0.0 || !tuning.urgency.is_empty(),
            may_leave: tuning.leaves && runs && fastest.speed > here.speed,
        };
        let (mut chain, mut bytes, mut turn) = (0f64, 0.0, 0f64);
        for model in view.models {
            work += model.remaining_secs;
            bytes += model.remaining_bytes as f64;
            let least = model.remaining_chain_secs * outlook.second_secs + model.remaining_wait_secs;
            let goes_on = pipelines && model.microbatches > 1;
            let chain_secs = outlook.chain_secs(model);
            chain = greater(chain, if goes_on { least } else { chain_secs });
            if view.may_take(model) || pipelines && view.may_follow(model) {
                turn = greater(turn, outlook.least_secs(model.unit_secs, model.weight_bytes));
                let secs = outlook.urgent(model, chain_secs);
                if outlook.is_longer((model, secs), outlook.longest) {
                    outlook.longest = Some((model, secs));
                }
            }
        }
        let horizon = chain.max(work / speeds).max(bytes / rates.min(shared));
        // The horizon of the other devices alone, with the asking device's queue left out.
        let (others, other_rates) = (speeds - here.speed, (rates - here.h2d_bytes_per_sec).min(shared));
        let without = chain.max((work - here.busy_secs * here.speed) / others).max(bytes / other_rates);
        outlook.late_secs = without + 0.5 * turn;
        outlook.critical_secs = horizon - here.busy_secs - tuning.critical_turns * turn;
        outlook
    }

    /// The least seconds on any device for `secs` of compute and `bytes` of copies of one model.
    fn least_secs(&self, secs: f64, bytes: u64) -> f64 {
        greater(secs * self.second_secs, bytes as f64 * self.byte_secs)
    }

    fn chain_secs(&self, model: &ModelView) -> f64 {
        self.least_secs(model.remaining_secs, model.remaining_bytes) + model.remaining_wait_secs
    }

    /// A model's chain, weighted by its urgency.
    fn urgent_secs(&self, model: &ModelView) -> f64 {
        self.urgent(model, self.chain_secs(model))
    }

    fn urgent(&self, model: &ModelView, secs: f64) -> f64 {
        if self.leans { self.tuning.urgency(model) * secs } else { secs }
    }

    /// Whether a model, given with its chain, comes before another: equal chains (due to equal bytes or to rounding)
    /// are ordered by remaining time.
    fn is_longer(&self, (a, a_secs): (&ModelView, f64), b: Option<(&ModelView, f64)>) -> bool {
        let Some((b, b_secs)) = b else { return true };
        let ties = || by_remaining(a, b).then_with(|| by_place(self.view, a, b)).is_gt();
        a_secs > b_secs || a_secs == b_secs && ties()
    }

    fn is_critical(&self, model: &ModelView) -> bool {
        self.urgent_secs(model) >= self.critical_secs
    }

    /// Bytes of weights and of boundary tensors that a model's next unit fetches to a device.
    #[inline(always)]
    fn missing_bytes(&self, model: &ModelView, device: &DeviceView) -> (u64, u64) {
        let held = device.held.contains(&(model.id, model.shard));
        // For other devices it is not known what they still hold.
        let here_bytes = match (device.id == self.here.id, model.last_device == Some(device.id)) {
            (true, _) => model.here_bytes,
            (false, true) => model.boundary_bytes,
            (false, false) => 0,
        };
        (if held { 0 } else { model.weight_bytes }, model.boundary_bytes.saturating_sub(here_bytes))
    }

    /// Bytes per second of a device's copies.
    fn rate(&self, device: &DeviceView) -> f64 {
        device.h2d_bytes_per_sec.min(self.shared_rate)
    }

    /// Seconds until the copies of a model's next unit have arrived on a device that can request them in `from_secs`.
    #[inline(always)]
    fn arrival_secs(&self, model: &ModelView, device: &DeviceView, from_secs: f64) -> f64 {
        let (weight_bytes, boundary_bytes) = self.missing_bytes(model, device);
        let weights_ready = if weight_bytes == 0 { 0.0 } else { model.weights_ready_secs };
        let boundary_ready = match boundary_bytes {
            0 => 0.0,
            _ if self.follows(model, device) => model.first_ready_secs,
            _ => model.boundary_ready_secs,
        };
        let bytes = weight_bytes + boundary_bytes;
        let byte_secs = if device.id == self.here.id { self.here_byte_secs } else { 1.0 / self.rate(device) };
        let copies_secs = bytes as f64 * byte_secs;
        let arrival = if bytes == 0 { from_secs } else { greater(device.h2d_secs, from_secs) + copies_secs };
        greater(arrival, greater(weights_ready, boundary_ready))
    }

    /// The same until the unit has everything that it needs, including a gradient slot.
    #[inline(always)]
    fn ready_secs(&self, model: &ModelView, device: &DeviceView, from_secs: f64) -> f64 {
        let gradients = if model.leaves_gradients { device.gradients_secs } else { 0.0 };
        greater(self.arrival_secs(model, device, from_secs), gradients)
    }

    /// The share of a unit's time, from the end of the asking device's queue on, in which the device computes.
    #[inline(always)]
    fn useful_share(&self, model: &ModelView) -> f64 {
        let wait_secs = match self.follows(model, self.here) {
            true => self.end_secs(model, self.here, 0.0) - model.unit_secs / self.here.speed,
            false => self.ready_secs(model, self.here, 0.0),
        } - self.here.busy_secs;
        let wait_secs = greater(wait_secs, 0.0) + self.copies_secs(model, self.tuning.copy_price);
        if wait_secs <= 0.0 {
            return 1.0;
        }
        model.unit_secs / (wait_secs * self.here.speed + model.unit_secs)
    }

    /// Seconds of the copies that its next unit needs, times `price`.
    fn copies_secs(&self, model: &ModelView, price: f64) -> f64 {
        if price == 0.0 {
            return 0.0;
        }
        let (weight_bytes, boundary_bytes) = self.missing_bytes(model, self.here);
        price * (weight_bytes + boundary_bytes) as f64 * self.here_byte_secs
    }

    /// Whether the asking device has work queued, and this unit's copies are so short that it need not request them
    /// yet.
    fn can_wait(&self, model: &ModelView) -> bool {
        let least_secs = self.tuning.least_copies * model.unit_secs;
        self.here.claimed > 0 && self.arrival_secs(model, self.here, 0.0) < least_secs
    }

    /// Whether a model's next unit would be pipelined, microbatch by microbatch, after one on another device.
    fn follows(&self, model: &ModelView, device: &DeviceView) -> bool {
        self.pipelines && matches!(model.claim, Claim::By(by) if by != device.id)
    }

    /// When a model's next unit would end on a device that can request its copies in `from_secs`.
    fn end_secs(&self, model: &ModelView, device: &DeviceView, from_secs: f64) -> f64 {
        let unit_secs = model.unit_secs / device.speed;
        let end = device.busy_secs.max(self.ready_secs(model, device, from_secs)) + unit_secs;
        match self.follows(model, device) {
            true => end.max(model.boundary_ready_secs + unit_secs / f64::from(model.microbatches)),
            false => end,
        }
    }

    /// Whether the asking device leaves a model's next unit to another device that ends it sooner: in a pipeline; and
    /// on unequal devices, to the fastest one, if the model has the longest chain and is critical, or could only end
    /// late.
    fn is_left(&self, model: &ModelView) -> bool {
        if let Claim::By(by) = model.claim
            && by != self.here.id
        {
            // Its predecessor ends with that device's queue at the latest, and the unit is best placed there: nothing
            // has to be copied.
            let there = &self.view.devices[usize::from(by)];
            return there.busy_secs + model.unit_secs / there.speed <= self.end_secs(model, self.here, 0.0);
        }
        let end_secs = self.end_secs(model, self.here, 0.0);
        if self.pipelines && model.claim == Claim::By(self.here.id) && self.is_critical(model) {
            // A device that has room before this queue has run will be asked in time.
            let sooner = |d: &DeviceView| d.busy_secs < self.here.busy_secs && self.end_secs(model, d, 0.0) < end_secs;
            if model.pinned.is_none() && self.view.devices.iter().any(sooner) {
                return true;
            }
        }
        if !self.may_leave || model.pinned.is_some() {
            return false;
        }
        let bytes = model.remaining_bytes.saturating_sub(model.weight_bytes);
        let rest = self.least_secs(model.remaining_secs - model.unit_secs, bytes) + model.remaining_wait_secs;
        let late = end_secs + self.urgent(model, rest) > self.late_secs;
        let longest = self.longest.is_some_and(|(longest, _)| longest.id == model.id) && self.is_critical(model);
        // If the predecessor is in this device's queue, no other device can claim the unit before it has run.
        let claimed_secs = if model.claim == Claim::By(self.here.id) { self.here.busy_secs } else { 0.0 };
        (late || longest) && self.end_secs(model, self.fastest, claimed_secs) < end_secs
    }
}

/// The greater of two numbers, without `f64::max`'s handling of NaN: a choice calls this thousands of times.
fn greater(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}
