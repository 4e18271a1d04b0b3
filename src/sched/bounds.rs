//! Lower bounds on a makespan: what no policy can beat, whatever it does.
//!
//! Each bound leaves out everything but one resource, so it holds for every order of units, and the greatest of them is
//! the one to compare with. Bytes are the least that must move; the caller knows what may stay where it is.

use super::DeviceId;
use serde::Serialize;

/// All of a model's work.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelWork {
    /// Seconds of arithmetic on a device of speed 1.
    pub arithmetic_secs: f64,
    /// Of those, the ones that must run one after another: all, unless microbatches follow each other through its
    /// shards.
    pub chain_secs: f64,
    /// The least seconds of copies before its first unit, when nothing of it can run.
    pub first_secs: f64,
    /// Seconds between its steps in which nothing of it can run, in all: gradients on their way home, updates, new
    /// weights on their way back.
    pub turns_secs: f64,
    /// Seconds after its last unit until its state is at home.
    pub last_secs: f64,
    /// The least bytes that cross links to devices.
    pub h2d_bytes: u64,
    /// The least bytes that cross links from devices.
    pub d2h_bytes: u64,
    /// The one device that may run it; `None` where any may.
    pub pinned: Option<DeviceId>,
}

/// What a device can do at best.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceRates {
    /// Its arithmetic rate over that of the first device.
    pub speed: f64,
    /// Bytes per second to it.
    pub h2d_bytes_per_sec: f64,
    /// Bytes per second from it.
    pub d2h_bytes_per_sec: f64,
}

/// One of the lower bounds on a makespan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LowerBound {
    /// All arithmetic over all devices' speeds, between the shortest first copies of any model and the shortest last
    /// ones.
    Work,
    /// One model's arithmetic and the copies between: its units run one after another. Or the same of so many models on
    /// as many of the fastest devices.
    Chain,
    /// All bytes to devices over the sum of the links to them.
    HostToDevice,
    /// All bytes from devices over the sum of the links from them.
    DeviceToHost,
    /// The greater direction's bytes over what all links share.
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
    /// Which of them is the greatest; of equal ones the first.
    pub greatest: LowerBound,
    /// The greatest of them.
    pub secs: f64,
}

impl Bounds {
    /// The bounds of all `models` on all `devices`; links share `shared_bytes_per_sec` each way, where it is given. A
    /// device that a model is pinned to must be among the devices. Work with nothing to run it takes for ever: its
    /// bound is infinite.
    pub fn new(models: &[ModelWork], devices: &[DeviceRates], shared_bytes_per_sec: Option<f64>) -> Self {
        let speeds = || devices.iter().map(|device| device.speed);
        let fastest = speeds().fold(0.0, f64::max);
        let chain = |model: &ModelWork| {
            let speed = model.pinned.map_or(fastest, |device| devices[usize::from(device)].speed);
            over(model.chain_secs, speed) + model.waits_secs()
        };
        let chain_secs = models.iter().map(chain).fold(few_models_secs(models, devices), f64::max);
        let least = |of: fn(&ModelWork) -> f64| models.iter().map(of).min_by(f64::total_cmp).unwrap_or(0.0);
        let ends_secs = least(|model| model.first_secs) + least(|model| model.last_secs);
        let arithmetic_secs = sum(models.iter().map(|model| model.arithmetic_secs));
        let h2d_bytes = sum(models.iter().map(|model| model.h2d_bytes as f64));
        let d2h_bytes = sum(models.iter().map(|model| model.d2h_bytes as f64));
        let parts = [
            (LowerBound::Work, over(arithmetic_secs, sum(speeds())) + ends_secs),
            (LowerBound::Chain, chain_secs),
            (LowerBound::HostToDevice, over(h2d_bytes, sum(devices.iter().map(|device| device.h2d_bytes_per_sec)))),
            (LowerBound::DeviceToHost, over(d2h_bytes, sum(devices.iter().map(|device| device.d2h_bytes_per_sec)))),
            (LowerBound::SharedLink, shared_bytes_per_sec.map_or(0.0, |rate| over(h2d_bytes.max(d2h_bytes), rate))),
        ];
        let (greatest, secs) = parts.into_iter().fold(parts[0], |best, part| if part.1 > best.1 { part } else { best });
        let [work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs] = parts.map(|(_, secs)| secs);
        Bounds { work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs, greatest, secs }
    }

    /// By what part of the greatest bound a makespan is above it: 0 where it is met.
    pub fn gap(&self, makespan_secs: f64) -> f64 {
        over(makespan_secs - self.secs, self.secs)
    }
}

impl ModelWork {
    /// Seconds in which it can run nowhere.
    fn waits_secs(&self) -> f64 {
        self.first_secs + self.turns_secs + self.last_secs
    }
}

/// The least seconds of the longest `k` models on the `k` fastest devices, for the `k` where that is most (Horvath, Lam
/// & Sethi 1977, "A level algorithm for preemptive scheduling", which has no waits). They keep no more devices busy
/// than they are, and while one of them waits the slowest of those at least has nothing of theirs to do.
fn few_models_secs(models: &[ModelWork], devices: &[DeviceRates]) -> f64 {
    let mut speeds: Vec<f64> = devices.iter().map(|device| device.speed).collect();
    speeds.sort_by(|a, b| b.total_cmp(a));
    let (mut all, mut greatest) = (0.0, 0.0f64);
    for (k, &slowest) in speeds.iter().enumerate().take_while(|&(k, _)| k < models.len()) {
        all += slowest;
        // On equal devices the longest model alone takes longest.
        if k > 0 && slowest == speeds[0] {
            continue;
        }
        let mut amounts: Vec<f64> = models.iter().map(|m| m.chain_secs + slowest * m.waits_secs()).collect();
        amounts.sort_by(|a, b| b.total_cmp(a));
        greatest = greatest.max(over(sum(amounts[..=k].iter().copied()), all));
    }
    greatest
}

/// `amount / rate`, where no amount takes no time, whatever the rate.
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

    fn model(arithmetic_secs: f64, h2d_bytes: u64, d2h_bytes: u64) -> ModelWork {
        ModelWork {
            arithmetic_secs,
            chain_secs: arithmetic_secs,
            first_secs: 0.0,
            turns_secs: 0.0,
            last_secs: 0.0,
            h2d_bytes,
            d2h_bytes,
            pinned: None,
        }
    }

    fn device(speed: f64, h2d_bytes_per_sec: f64, d2h_bytes_per_sec: f64) -> DeviceRates {
        DeviceRates { speed, h2d_bytes_per_sec, d2h_bytes_per_sec }
    }

    /// Asserts the five parts in their order, which is the greatest, and the gap of twice the greatest.
    fn check(bounds: &Bounds, parts: [f64; 5], greatest: LowerBound) {
        let Bounds { work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs, .. } = *bounds;
        assert_eq!([work_secs, chain_secs, h2d_secs, d2h_secs, shared_secs], parts);
        assert_eq!((bounds.greatest, bounds.secs), (greatest, parts.into_iter().fold(0.0, f64::max)));
        assert_eq!(bounds.gap(2.0 * bounds.secs), if bounds.secs > 0.0 { 1.0 } else { 0.0 });
    }

    #[test]
    fn each_part_can_be_the_greatest() {
        let models = [model(6.0, 60, 20), model(3.0, 4, 108)];
        let two = [device(1.0, 16.0, 64.0), device(3.0, 48.0, 64.0)];
        check(&Bounds::new(&models, &two, None), [2.25, 2.25, 1.0, 1.0, 0.0], LowerBound::Work);
        check(&Bounds::new(&models, &two, Some(32.0)), [2.25, 2.25, 1.0, 1.0, 4.0], LowerBound::SharedLink);
        let many = [two[0].clone(), two[1].clone(), device(2.0, 64.0, 128.0)];
        check(&Bounds::new(&models, &many, None), [1.5, 2.0, 0.5, 0.5, 0.0], LowerBound::Chain);
        let slow_in = [device(4.0, 16.0, 64.0)];
        check(&Bounds::new(&models, &slow_in, None), [2.25, 1.5, 4.0, 2.0, 0.0], LowerBound::HostToDevice);
        let slow_out = [device(4.0, 64.0, 16.0)];
        check(&Bounds::new(&models, &slow_out, None), [2.25, 1.5, 1.0, 8.0, 0.0], LowerBound::DeviceToHost);
    }

    #[test]
    fn a_pinned_model_has_one_device() {
        let pinned = |device| [ModelWork { pinned: Some(device), ..model(6.0, 0, 0) }];
        let two = [device(1.0, 1.0, 1.0), device(3.0, 1.0, 1.0)];
        check(&Bounds::new(&pinned(0), &two, None), [1.5, 6.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        check(&Bounds::new(&pinned(1), &two, None), [1.5, 2.0, 0.0, 0.0, 0.0], LowerBound::Chain);
    }

    #[test]
    fn few_models_on_unequal_devices_and_copies_between_units() {
        // Two models of 6 cannot both have the device of speed 3: 12 seconds of work over 4, not over 4.5.
        let three = [device(3.0, 1.0, 1.0), device(1.0, 1.0, 1.0), device(0.5, 1.0, 1.0)];
        let two = [model(6.0, 0, 0), model(6.0, 0, 0)];
        check(&Bounds::new(&two, &three, None), [12.0 / 4.5, 3.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        // Each waits 0.5 + 1 + 0.5 seconds, in which the slower of two devices at least has nothing of theirs.
        let waits = |first_secs| ModelWork { first_secs, turns_secs: 1.0, last_secs: 0.5, ..model(6.0, 0, 0) };
        let bounds = Bounds::new(&[waits(0.5), waits(0.5)], &three, None);
        check(&bounds, [12.0 / 4.5 + 1.0, 4.0, 0.0, 0.0, 0.0], LowerBound::Chain);
        // On one device the shortest copies at both ends add to the work; waits between do not.
        let one = Bounds::new(&[waits(2.0), waits(0.25)], &three[..1], None);
        check(&one, [4.75, 5.5, 0.0, 0.0, 0.0], LowerBound::Chain);
        let piped = ModelWork { chain_secs: 1.5, ..model(6.0, 0, 0) };
        check(&Bounds::new(&[piped], &three, None), [6.0 / 4.5, 0.5, 0.0, 0.0, 0.0], LowerBound::Work);
    }

    #[test]
    fn nothing_and_free_copies_take_no_time() {
        let free = [device(1.0, f64::INFINITY, f64::INFINITY)];
        check(&Bounds::new(&[], &free, None), [0.0; 5], LowerBound::Work);
        check(&Bounds::new(&[], &[], Some(1.0)), [0.0; 5], LowerBound::Work);
        check(
            &Bounds::new(&[model(2.0, 7, 7)], &free, Some(f64::INFINITY)),
            [2.0, 2.0, 0.0, 0.0, 0.0],
            LowerBound::Work,
        );
        assert_eq!(Bounds::new(&[model(2.0, 0, 0)], &[], None).secs, f64::INFINITY);
        assert_eq!(Bounds::new(&[], &free, None).gap(1.0), f64::INFINITY);
    }

    #[test]
    fn bounds_are_written_with_their_names() {
        let bounds = Bounds::new(&[model(1.0, 0, 0)], &[device(2.0, 1.0, 1.0)], Some(1.0));
        let want = r#"{"work_secs":0.5,"chain_secs":0.5,"h2d_secs":0.0,"d2h_secs":0.0,"shared_secs":0.0,"greatest":"work","secs":0.5}"#;
        assert_eq!(serde_json::to_string(&bounds).unwrap(), want);
    }
}
