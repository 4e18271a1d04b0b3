//! Lower bounds on a makespan: what no policy can beat, whatever it does.
//!
//! Each bound considers only one resource, so it holds for every order of units, and makespans are compared with the
//! greatest of them. Bytes are the least that must move; the caller knows what may stay where it is.

use super::DeviceId;
use serde::Serialize;

/// Compute of a model that runs from beginning to end on one device, a number of times.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Seconds of one run, by device.
    pub secs: Vec<f64>,
    /// How often it runs.
    pub times: f64,
    /// How many of those runs must follow one another, also across the model's parts: all, unless microbatches are
    /// pipelined through its shards.
    pub chain_times: f64,
    /// The one device that may run it; `None` where any may.
    pub pinned: Option<DeviceId>,
}

/// All of a model's work.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelWork {
    /// Its compute.
    pub parts: Vec<Part>,
    /// The least seconds of copies before its first unit, during which none of its units can run.
    pub first_secs: f64,
    /// Total seconds between its steps in which none of its units can run: copies of gradients to their home, updates,
    /// and copies of new weights back.
    pub turns_secs: f64,
    /// Seconds after its last unit until its state is at home.
    pub last_secs: f64,
    /// The least bytes that cross links to devices.
    pub h2d_bytes: u64,
    /// The least bytes that cross links from devices.
    pub d2h_bytes: u64,
}

/// What a device's links can do at best.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceRates {
    /// Bytes per second to it.
    pub h2d_bytes_per_sec: f64,
    /// Bytes per second from it.
    pub d2h_bytes_per_sec: f64,
}

/// One of the lower bounds on a makespan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LowerBound {
    /// All compute divided over all devices, plus the shortest first copies of any model and the shortest last ones.
    Work,
    /// One model's compute and the copies in between: its units run one after another, each at best on the device that
    /// is fastest for it. Or the same for the k longest models on the k fastest devices.
    Chain,
    /// All bytes to devices divided by the total bandwidth of the links to them.
    HostToDevice,
    /// All bytes from devices divided by the total bandwidth of the links from them.
    DeviceToHost,
    /// The bytes of the direction with more of them, divided by the bandwidth that all links share.
    SharedLink,
}

/// Lower bounds on the makespan of some models on some devices, in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bounds {
    /// [`LowerBound::Work`].
    pub work_secs: f64,
    /// [`LowerBound::Chain`].
    pub chain_secs: f64,
    /// [`LowerBound::HostToDevice`].
    pub h2d_secs: f64,
    /// [`LowerBound::DeviceToHost`].
    pub d2h_secs: f64,
    /// [`LowerBound::SharedLink`]; 0 where no link is shared.
    pub shared_secs: f64,
    /// Which of them is the greatest; among equals, the first.
    pub greatest: LowerBound,
    /// The greatest of them.
    pub secs: f64,
}

impl Bounds {
    /// The bounds of all `models` on all `devices`; links share `shared_bytes_per_sec` each way, if given. A device
    /// that a model is pinned to must be among the devices. Work that no device can run has an infinite bound.
    pub fn new(models: &[ModelWork], devices: &[DeviceRates], shared_bytes_per_sec: Option<f64>) -> Self {
        let speeds = speeds(models, devices.len());
        let all = sum(speeds.iter().copied());
        let shares: Vec<f64> = speeds.iter().map(|speed| speed / all).collect();
        let work_secs = sum(models.iter().map(|model| model.arithmetic_secs(&shares)));
        let least = |of: fn(&ModelWork) -> f64| models.iter().map(of).min_by(f64::total_cmp).unwrap_or(0.0);
        let ends_secs = least(|model| model.first_secs) + least(|model| model.last_secs);
        let h2d_bytes = sum(models.iter().map(|model| model.h2d_bytes as f64));
        let d2h_bytes = sum(models.iter().map(|model| model.d2h_bytes as f64));
        let parts = [
            (LowerBound::Work, work_secs + ends_secs),
            (LowerBound::Chain, few_models_secs(models, &speeds)),
            (LowerBound::HostToDevice, over(h2d_bytes, sum(devices.iter().map(|device| device.h2d_bytes_per_sec)))),
            (LowerBound::DeviceToHost, over(d2h_bytes, sum(devices.iter().map(|device| device.d2h_bytes_per_sec)))),
            (LowerBound::SharedLink, shared_bytes_per_sec.map_or(0.0, |rate| over(h2d_bytes.max(d2h_bytes), rate))),
        ];
        let (greatest, secs) = parts.into_iter().fold(parts[0], |best, part| if part.1 > best.1 { part } else { best });
        let [work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs] = parts.map(|(_, secs)| secs);
        Bounds { work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs, greatest, secs }
    }

    /// How far a makespan is above the greatest bound, as a fraction of that bound: 0 where it is met.
    pub fn gap(&self, makespan_secs: f64) -> f64 {
        over(makespan_secs - self.secs, self.secs)
    }
}

impl Part {
    /// The least weighted seconds of one run over the devices that may run it, where each device's seconds are
    /// multiplied by its weight.
    pub fn least_secs(&self, weight: impl Fn(usize) -> f64) -> f64 {
        let may = |d: usize| self.pinned.is_none_or(|device| usize::from(device) == d);
        let secs = (0..self.secs.len()).filter(|&d| may(d)).map(|d| weight(d) * self.secs[d]);
        secs.fold(f64::INFINITY, f64::min)
    }
}

// Each bound on compute is a weighted sum of busy seconds. Give devices and models weights that sum to 1. In a makespan
// of T a device is busy for at most T, and so is a model with its chain and its waits, no two of which overlap. So the
// weighted sum of all these seconds is at most T; and a part, wherever it runs, contributes its seconds there times the
// device's weight plus, if it is in the chain, the model's weight.
impl ModelWork {
    /// The least that its compute contributes to a sum in which devices have these weights and the model has none.
    fn arithmetic_secs(&self, devices: &[f64]) -> f64 {
        sum(self.parts.iter().map(|part| times(part.times, part.least_secs(|d| devices[d]))))
    }

    /// The least that its compute and its waits contribute to a sum in which devices have these weights and the model
    /// has the weight `own`.
    fn chain_secs(&self, devices: &[f64], own: f64) -> f64 {
        let chain = self.parts.iter().map(|part| times(part.chain_times, part.least_secs(|d| devices[d] + own)));
        sum(chain) + own * (self.first_secs + self.turns_secs + self.last_secs)
    }
}

/// Each device's speed with all models' work, relative to the slowest. Where devices differ only by such a factor,
/// weights derived from it give the greatest bounds.
fn speeds(models: &[ModelWork], devices: usize) -> Vec<f64> {
    let parts = || models.iter().flat_map(|model| &model.parts);
    let secs: Vec<f64> = (0..devices).map(|d| sum(parts().map(|part| times(part.times, part.secs[d])))).collect();
    let most = secs.iter().copied().fold(0.0, f64::max);
    // Work that takes no time counts as fast, but not infinitely fast.
    let least = 1e-12 * most;
    secs.iter().map(|&secs| if most > 0.0 { most / secs.max(least) } else { 1.0 }).collect()
}

/// The least seconds of the `k` longest models on the `k` fastest devices, for the `k` where that is most (Horvath, Lam
/// & Sethi 1977, "A level algorithm for preemptive scheduling", without waits and with devices that differ only by a
/// factor). `k` models keep at most `k` devices busy, and while one of them waits, at least the slowest of these
/// devices has no work of theirs.
fn few_models_secs(models: &[ModelWork], speeds: &[f64]) -> f64 {
    let mut order: Vec<usize> = (0..speeds.len()).collect();
    order.sort_by(|&a, &b| speeds[b].total_cmp(&speeds[a]));
    let (mut all, mut greatest) = (0.0, 0.0f64);
    for (k, &d) in order.iter().enumerate().take_while(|&(k, _)| k < models.len()) {
        let slowest = speeds[d];
        all += slowest;
        // On equal devices the bound for the longest model alone is the greatest.
        if k > 0 && slowest == speeds[order[0]] {
            continue;
        }
        // A device's weight is its speed above the slowest of them; each model's weight is the slowest one's speed.
        let devices: Vec<f64> = speeds.iter().map(|speed| (speed - slowest).max(0.0) / all).collect();
        let mut secs: Vec<f64> = models.iter().map(|m| m.chain_secs(&devices, slowest / all)).collect();
        secs.sort_by(|a, b| b.total_cmp(a));
        greatest = greatest.max(sum(secs[..=k].iter().copied()));
    }
    greatest
}

/// `times * secs`, or 0 where `times` is 0, even if `secs` is infinite.
fn times(times: f64, secs: f64) -> f64 {
    if times == 0.0 { 0.0 } else { times * secs }
}

/// `amount / rate`, or 0 where `amount` is 0, whatever the rate.
fn over(amount: f64, rate: f64) -> f64 {
    if amount == 0.0 { 0.0 } else { amount / rate }
}

/// The sum, which is 0 and not -0 where there is nothing to add.
fn sum(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.fold(0.0, |sum, number| sum + number)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model of so many seconds on a device of speed 1.
    fn model(secs: f64, h2d_bytes: u64, d2h_bytes: u64) -> ModelWork {
        ModelWork {
            parts: vec![Part { secs: vec![secs], times: 1.0, chain_times: 1.0, pinned: None }],
            first_secs: 0.0,
            turns_secs: 0.0,
            last_secs: 0.0,
            h2d_bytes,
            d2h_bytes,
        }
    }

    /// A device of a speed.
    fn device(speed: f64, h2d_bytes_per_sec: f64, d2h_bytes_per_sec: f64) -> (f64, DeviceRates) {
        (speed, DeviceRates { h2d_bytes_per_sec, d2h_bytes_per_sec })
    }

    /// Bounds of models on devices that differ by one factor, by their seconds on a device of speed 1.
    fn of_speeds(models: &[ModelWork], devices: &[(f64, DeviceRates)], shared_bytes_per_sec: Option<f64>) -> Bounds {
        let mut models = models.to_vec();
        for part in models.iter_mut().flat_map(|model| &mut model.parts) {
            part.secs = devices.iter().map(|(speed, _)| part.secs[0] / speed).collect();
        }
        let rates: Vec<DeviceRates> = devices.iter().map(|(_, rates)| rates.clone()).collect();
        Bounds::new(&models, &rates, shared_bytes_per_sec)
    }

    /// Asserts the five parts in their order, which is the greatest, and the gap of twice the greatest.
    fn check(bounds: &Bounds, parts: [f64; 5], greatest: LowerBound) {
        let Bounds { work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs, .. } = *bounds;
        let close = |(got, want): (f64, f64)| got == want || (got - want).abs() < 1e-12 * want;
        let got = [work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs];
        assert!(got.into_iter().zip(parts).all(close), "{got:?}, not {parts:?}");
        assert_eq!((bounds.greatest, bounds.secs), (greatest, got.into_iter().fold(0.0, f64::max)));
        assert_eq!(bounds.gap(2.0 * bounds.secs), if bounds.secs > 0.0 { 1.0 } else { 0.0 });
    }

    #[test]
    fn each_part_can_be_the_greatest() {
        let models = [model(6.0, 60, 20), model(3.0, 4, 108)];
        let two = [device(1.0, 16.0, 64.0), device(3.0, 48.0, 64.0)];
        check(&of_speeds(&models, &two, None), [2.25, 2.25, 1.0, 1.0, 0.0], LowerBound::Work);
        check(&of_speeds(&models, &two, Some(32.0)), [2.25, 2.25, 1.0, 1.0, 4.0], LowerBound::SharedLink);
        let many = [two[0].clone(), two[1].clone(), device(2.0, 64.0, 128.0)];
        check(&of_speeds(&models, &many, None), [1.5, 2.0, 0.5, 0.5, 0.0], LowerBound::Chain);
        let slow_in = [device(4.0, 16.0, 64.0)];
        check(&of_speeds(&models, &slow_in, None), [2.25, 1.5, 4.0, 2.0, 0.0], LowerBound::HostToDevice);
        let slow_out = [device(4.0, 64.0, 16.0)];
        check(&of_speeds(&models, &slow_out, None), [2.25, 1.5, 1.0, 8.0, 0.0], LowerBound::DeviceToHost);
    }

    #[test]
    fn a_pinned_model_has_one_device() {
        let pinned = |device| {
            let mut one = model(6.0, 0, 0);
            one.parts[0].pinned = Some(device);
            [one]
        };
        let two = [device(1.0, 1.0, 1.0), device(3.0, 1.0, 1.0)];
        check(&of_speeds(&pinned(0), &two, None), [1.5, 6.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        check(&of_speeds(&pinned(1), &two, None), [1.5, 2.0, 0.0, 0.0, 0.0], LowerBound::Chain);
    }

    #[test]
    fn few_models_on_unequal_devices_and_copies_between_units() {
        // Two models of 6 cannot both have the device of speed 3: 12 seconds of work over 4, not over 4.5.
        let three = [device(3.0, 1.0, 1.0), device(1.0, 1.0, 1.0), device(0.5, 1.0, 1.0)];
        let two = [model(6.0, 0, 0), model(6.0, 0, 0)];
        check(&of_speeds(&two, &three, None), [12.0 / 4.5, 3.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        // Each waits 0.5 + 1 + 0.5 seconds, in which the slower of two devices at least has nothing of theirs.
        let waits = |first_secs| ModelWork { first_secs, turns_secs: 1.0, last_secs: 0.5, ..model(6.0, 0, 0) };
        let bounds = of_speeds(&[waits(0.5), waits(0.5)], &three, None);
        check(&bounds, [12.0 / 4.5 + 1.0, 4.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        // On one device the shortest copies at both ends add to the work; waits between do not.
        let one = of_speeds(&[waits(2.0), waits(0.25)], &three[..1], None);
        check(&one, [4.75, 5.5, 0.0, 0.0, 0.0], LowerBound::Chain);
        let mut piped = model(1.5, 0, 0);
        piped.parts[0].times = 4.0;
        check(&of_speeds(&[piped], &three, None), [6.0 / 4.5, 0.5, 0.0, 0.0, 0.0], LowerBound::Work);
    }

    #[test]
    fn each_part_has_its_own_seconds_on_each_device() {
        let part = |secs: [f64; 2], pinned| Part { secs: secs.to_vec(), times: 2.0, chain_times: 2.0, pinned };
        let rates = DeviceRates { h2d_bytes_per_sec: 1.0, d2h_bytes_per_sec: 1.0 };
        let of = |models: &[&[Part]]| {
            let model = |parts: &&[Part]| ModelWork { parts: parts.to_vec(), ..model(0.0, 0, 0) };
            Bounds::new(&models.iter().map(model).collect::<Vec<_>>(), &[rates.clone(), rates.clone()], None)
        };
        // Each part where it is fastest; together they are as fast on one device as on the other.
        let (left, right) = ([1.0, 5.0], [5.0, 1.0]);
        check(&of(&[&[part(left, None), part(right, None)]]), [2.0, 4.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        check(&of(&[&[part(left, None)], &[part(right, None)]]), [2.0, 2.0, 0.0, 0.0, 0.0], LowerBound::Work);
        // A shard each on a device, at home on the slow one.
        check(&of(&[&[part(left, Some(1)), part(right, Some(0))]]), [10.0, 20.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        // What the first does slowly is no measure of the second, which has 2 seconds on the faster device.
        let bounds = of(&[&[part([100.0, 1.0], None)], &[part([1.0, 2.0], None)]]);
        assert!((bounds.secs - 2.0).abs() < 1e-12, "{bounds:?}");
    }

    #[test]
    fn nothing_and_free_copies_take_no_time() {
        let free = [device(1.0, f64::INFINITY, f64::INFINITY)];
        check(&of_speeds(&[], &free, None), [0.0; 5], LowerBound::Work);
        check(&of_speeds(&[], &[], Some(1.0)), [0.0; 5], LowerBound::Work);
        check(&of_speeds(&[model(2.0, 7, 7)], &free, Some(f64::INFINITY)), [2.0, 2.0, 0.0, 0.0, 0.0], LowerBound::Work);
        assert_eq!(of_speeds(&[model(2.0, 0, 0)], &[], None).secs, f64::INFINITY);
        assert_eq!(of_speeds(&[], &free, None).gap(1.0), f64::INFINITY);
    }

    #[test]
    fn bounds_are_written_with_their_names() {
        let bounds = of_speeds(&[model(1.0, 0, 0)], &[device(2.0, 1.0, 1.0)], Some(1.0));
        let want = r#"{"work_secs":0.5,"chain_secs":0.5,"h2d_secs":0.0,"d2h_secs":0.0,"shared_secs":0.0,"greatest":"work","secs":0.5}"#;
        assert_eq!(serde_json::to_string(&bounds).unwrap(), want);
    }
}
