//! Locality-LRTF: sharded-LRTF where a model bounds the makespan, and where none does, the unit that leaves the device
//! waiting least.
//!
//! LRTF cares for one thing, that no chain of units is left over at the end. Most of the time none is about to be: the
//! work ahead is more than any one model's, and whichever unit goes next, the run ends at the same moment if only no
//! device waits. That freedom is spent on copies. Where copies cost nothing the choices are sharded-LRTF's own, on
//! devices of one speed.

use super::policies::{by_place, by_remaining};
use super::{Claim, DeviceView, ModelId, ModelView, Policy, View};

/// Sharded-LRTF that weighs what is resident, links and unequal devices, in three passes over the models and one over
/// the devices.
///
/// `s`, `r`, `b` and `h` are a device's speed, its link's bytes per second, the seconds until its queue has run and
/// until its copies are there;
/// `R`, `B`, `W` and `u` a model's remaining seconds, bytes and waits, and its next unit's seconds, at speed 1. All
/// sums and maxima are over all models and devices but where it is said.
///
/// 1. **Chain** of a model: `C = max(R / max s, B / max r) + W`. It takes at least that long wherever it runs, one unit
///    at a time.
/// 2. **Horizon**: the run does not end before `T = max(max C, (sum R + sum b s) / sum s, sum B / sum r)`. A shared
///    link caps `max r` and `sum r`. Where microbatches can go on from unit to unit, what must run one after another
///    stands for `R` in `C` here.
/// 3. **Critical** is a candidate that might end last if it were passed over once: `b + C + turn >= T`, where a turn is
///    the longest that any candidate's next unit takes by the same two measures. If there are critical candidates, only
///    they are considered.
/// 4. **Useful share** of a candidate: `(u / s) / (w + u / s)`, where `w = max(0, h + bytes / rate - b)` is how long
///    the device would wait for its copies, or longer where what it fetches is not at home by then, or no gradient slot
///    is free that it needs. `bytes` leaves out a shard that a slot holds and boundary tensors that are here; `rate` is
///    `r`, or an equal part of the shared link among the devices that are copying. Candidates within 1/8 of the best
///    share are equals, critical ones within 1/2.
/// 5. Of equals the longest chain goes first, with sharded-LRTF's ties.
/// 6. Where it pipelines, a **follower** is considered where its model is critical, since every other model comes to
///    its end in time without, and where its useful share is within 1/8 of the best candidate's. It waits for
///    microbatches too: its last one ends no sooner than the unit's before it has. It is left to the device that has
///    the unit before, where that ends it as soon; and a device leaves a critical successor of its own unit to one that
///    is free before and ends it sooner.
///
/// On unequal devices a unit is left to the fastest device that is free soonest, where that would end it sooner, if its
/// chain is the longest and critical, or if its model could otherwise only end after all others: later than the horizon
/// of the other devices and half a turn.
/// So is every unit after which its model could only end half a turn later than everything could without the asking
/// device.
///
/// The numbers among these rules are [`LocalityTuning`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LocalityLrtf {
    /// Considers followers.
    pub pipelines: bool,
    /// Which of two things that speak for different units weighs more.
    pub tuning: LocalityTuning,
}

/// What locality-LRTF gives more weight. The default is good for most sets of models; [`rehearse`](super::rehearse)
/// finds better ones for one.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalityTuning {
    /// Candidates whose useful share is within this part of the best one's are equals: predictions are no better.
    pub tolerance: f64,
    /// The part within which critical models are equals; the longest of them is worth more waiting.
    pub critical_tolerance: f64,
    /// The turns for which a critical model may not be passed over. Without end, and a critical tolerance of 1, the
    /// choices are sharded-LRTF's.
    pub critical_turns: f64,
    /// Seconds of waiting that a second of copies counts for, though the device would not wait for them. What is
    /// fetched now is evicted for it, and a busy link makes the next unit late.
    pub copy_price: f64,
    /// A device that has something to run leaves a unit for later whose copies arrive within this part of its
    /// arithmetic at speed 1: a model that no device has claimed can go to whichever is free first.
    pub least_copies: f64,
    /// How much more urgent the end of a step is than its beginning, in parts: models that are in the middle of a step
    /// occupy entries.
    pub depth: f64,
    /// Leaves units to faster devices.
    pub leaves: bool,
    /// How urgent each unit of a step is, by model and unit: its chain counts as so many times as long. 1 where nothing
    /// is said.
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
        // Whether a model is left to another device is asked last: for most it makes no difference.
        let (mut best, mut best_critical) = (0f64, None);
        for model in view.candidates() {
            let critical = outlook.is_critical(model);
            let raises = |share: f64| share > best || critical && best_critical.is_none_or(|best| share > best);
            // No share is greater than 1, and beside critical candidates followers alone are measured by the others.
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
        // Where there are critical candidates, one of them is the longest that is good enough.
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

/// What all candidates of one choice are measured by.
struct Outlook<'a> {
    view: &'a View<'a>,
    here: &'a DeviceView,
    /// Of the fastest devices, the one that is free soonest.
    fastest: &'a DeviceView,
    /// The least seconds for a second of arithmetic at speed 1, and for a byte. There are many models to multiply by
    /// them.
    second_secs: f64,
    byte_secs: f64,
    /// What falls to each copying device of a shared link.
    shared_rate: f64,
    /// Seconds of a byte to the asking device.
    here_byte_secs: f64,
    /// The candidate with the longest chain, and that.
    longest: Option<(&'a ModelView, f64)>,
    /// The chain from which a candidate is critical.
    critical_secs: f64,
    /// The end that is too late for a model whose unit the asking device takes.
    late_secs: f64,
    /// Units may follow each other on several devices.
    pipelines: bool,
    tuning: &'a LocalityTuning,
    /// Some units are more urgent than others.
    leans: bool,
    /// There is a faster device, and something runs, so that a device which is left waiting will be asked again.
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
        // The horizon of the other devices: it is nearer than the run's end, the more so the fewer units there are.
        let (others, other_rates) = (speeds - here.speed, (rates - here.h2d_bytes_per_sec).min(shared));
        let without = chain.max((work - here.busy_secs * here.speed) / others).max(bytes / other_rates);
        outlook.late_secs = without + 0.5 * turn;
        outlook.critical_secs = horizon - here.busy_secs - tuning.critical_turns * turn;
        outlook
    }

    /// The least seconds for some arithmetic and some bytes of one model on any device.
    fn least_secs(&self, secs: f64, bytes: u64) -> f64 {
        greater(secs * self.second_secs, bytes as f64 * self.byte_secs)
    }

    fn chain_secs(&self, model: &ModelView) -> f64 {
        self.least_secs(model.remaining_secs, model.remaining_bytes) + model.remaining_wait_secs
    }

    /// Its chain, as long as it counts for.
    fn urgent_secs(&self, model: &ModelView) -> f64 {
        self.urgent(model, self.chain_secs(model))
    }

    fn urgent(&self, model: &ModelView, secs: f64) -> f64 {
        if self.leans { self.tuning.urgency(model) * secs } else { secs }
    }

    /// Whether a model, with its chain, comes before another: equal chains (of equal bytes, or by rounding) are ordered
    /// by remaining time.
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
        // Of the others it is not known what they still have.
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

    /// Seconds until a model's next unit has its copies on a device that can ask for them in `from_secs`.
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

    /// The same until it has all that it wants, a gradient slot included.
    #[inline(always)]
    fn ready_secs(&self, model: &ModelView, device: &DeviceView, from_secs: f64) -> f64 {
        let gradients = if model.leaves_gradients { device.gradients_secs } else { 0.0 };
        greater(self.arrival_secs(model, device, from_secs), gradients)
    }

    /// The part of the time that a unit takes, from the end of the asking device's queue on, in which the device
    /// computes.
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

    /// Seconds of the copies that its next unit wants, times `price`.
    fn copies_secs(&self, model: &ModelView, price: f64) -> f64 {
        if price == 0.0 {
            return 0.0;
        }
        let (weight_bytes, boundary_bytes) = self.missing_bytes(model, self.here);
        price * (weight_bytes + boundary_bytes) as f64 * self.here_byte_secs
    }

    /// Whether the asking device has something to run, and copies so little for this unit that it need not ask for them
    /// yet.
    fn can_wait(&self, model: &ModelView) -> bool {
        let least_secs = self.tuning.least_copies * model.unit_secs;
        self.here.claimed > 0 && self.arrival_secs(model, self.here, 0.0) < least_secs
    }

    /// Whether a model's next unit would follow one on another device, microbatch by microbatch.
    fn follows(&self, model: &ModelView, device: &DeviceView) -> bool {
        self.pipelines && matches!(model.claim, Claim::By(by) if by != device.id)
    }

    /// When a model's next unit would end on a device that can ask for its copies in `from_secs`.
    fn end_secs(&self, model: &ModelView, device: &DeviceView, from_secs: f64) -> f64 {
        let unit_secs = model.unit_secs / device.speed;
        let end = device.busy_secs.max(self.ready_secs(model, device, from_secs)) + unit_secs;
        match self.follows(model, device) {
            true => end.max(model.boundary_ready_secs + unit_secs / f64::from(model.microbatches)),
            false => end,
        }
    }

    /// Whether the asking device leaves a model's next unit to another, which ends it sooner: in a pipeline; and on
    /// unequal devices to the fastest one a critical longest chain, and any model that could only end late.
    fn is_left(&self, model: &ModelView) -> bool {
        if let Claim::By(by) = model.claim
            && by != self.here.id
        {
            // What it follows ends with that device's queue at the latest, and the unit is best placed there: nothing
            // has to be brought.
            let there = &self.view.devices[usize::from(by)];
            return there.busy_secs + model.unit_secs / there.speed <= self.end_secs(model, self.here, 0.0);
        }
        let end_secs = self.end_secs(model, self.here, 0.0);
        if self.pipelines && model.claim == Claim::By(self.here.id) && self.is_critical(model) {
            // One that has room before this queue has run will be asked in time.
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
        // Where this device's queue holds the predecessor, no other can claim the unit before that has run.
        let claimed_secs = if model.claim == Claim::By(self.here.id) { self.here.busy_secs } else { 0.0 };
        (late || longest) && self.end_secs(model, self.fastest, claimed_secs) < end_secs
    }
}

/// The greater of two numbers, without `f64::max`'s care for what is none: a choice asks thousands of times.
fn greater(a: f64, b: f64) -> f64 {
    if b > a { b } else { a }
}
