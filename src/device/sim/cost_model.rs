//! Seconds of tasks: the counts of their ops, divided by a machine's rates, which are stated or measured.
//!
//! An op's seconds are its work divided by its family's rate at its size, plus a start-up cost. Rates are known at a
//! few sizes; between them the nearer ones have more weight.

use crate::base::{DType, LaneKind};
use crate::device::Task;
use crate::graph::{Cost, Family, Program, Work};

/// The rate of one family at one size.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Rate {
    /// The kind of work.
    pub family: Family,
    /// As in [`Cost::float`].
    pub float: DType,
    /// As in [`Cost::tf32`].
    #[serde(default)]
    pub tf32: bool,
    /// As in [`Cost::sizes`].
    pub sizes: [usize; 3],
    /// Flops or bytes per second, by [`Family::work`].
    pub work_per_sec: f64,
}

/// What a device and its links achieve.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CostModel {
    /// Rates by family and size; several for a family where it was measured at several sizes.
    pub rates: Vec<Rate>,
    /// Memory bandwidth, which no op can exceed.
    pub memory_bytes_per_sec: f64,
    /// Start-up cost of an op, in seconds.
    pub op_secs: f64,
    /// Start-up cost of a program, in seconds.
    pub run_secs: f64,
    /// Host-to-device bandwidth.
    pub h2d_bytes_per_sec: f64,
    /// Device-to-host bandwidth.
    pub d2h_bytes_per_sec: f64,
    /// Start-up cost of a copy, in seconds.
    pub copy_secs: f64,
    /// Memory traffic per second of optimizers and sums on the device.
    pub device_update_bytes_per_sec: f64,
    /// Memory traffic per second of optimizers and sums on the host.
    pub host_update_bytes_per_sec: f64,
    /// Memory traffic per second of a norm of gradients on the device; `None` means as fast as updates.
    #[serde(default)]
    pub device_norm_bytes_per_sec: Option<f64>,
    /// Memory traffic per second of a norm of gradients on the host; `None` means as fast as updates.
    #[serde(default)]
    pub host_norm_bytes_per_sec: Option<f64>,
    /// Seconds from a task's end to the start of one on another lane that waited for it.
    pub hand_over_secs: f64,
    /// The disk tier's bandwidth each way; `None` means [`DISK_BYTES_PER_SEC`].
    #[serde(default)]
    pub disk_bytes_per_sec: Option<f64>,
    /// The cores that all lanes of the device share; `None` where copies and the host's arithmetic take no time from
    /// its units.
    #[serde(default)]
    pub cores: Option<Cores>,
}

/// The bandwidth assumed for a disk, each way, where none is stated: half the peak of a good disk.
pub const DISK_BYTES_PER_SEC: f64 = 1e9;

/// Cores on which a device's units, its copies and its part of the host's arithmetic all run, so that they take time
/// from each other.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Cores {
    /// Number of cores.
    pub count: usize,
    /// Bytes per second that one core copies, whatever the link's limit.
    pub copy_bytes_per_sec: f64,
}

impl CostModel {
    /// Makes a device with stated rates: `flops_per_sec` for all arithmetic that is not memory-bound.
    pub fn stated(flops_per_sec: f64, memory_bytes_per_sec: f64, link_bytes_per_sec: f64) -> CostModel {
        let rate = |family: Family| {
            let work_per_sec = match family.work() {
                Work::Flops => flops_per_sec,
                Work::Bytes => memory_bytes_per_sec,
            };
            Rate { family, float: DType::F32, tf32: false, sizes: [1; 3], work_per_sec }
        };
        CostModel {
            rates: Family::ALL.map(rate).to_vec(),
            memory_bytes_per_sec,
            op_secs: 0.0,
            run_secs: 0.0,
            h2d_bytes_per_sec: link_bytes_per_sec,
            d2h_bytes_per_sec: link_bytes_per_sec,
            copy_secs: 0.0,
            device_update_bytes_per_sec: memory_bytes_per_sec,
            host_update_bytes_per_sec: memory_bytes_per_sec.min(50e9),
            device_norm_bytes_per_sec: None,
            host_norm_bytes_per_sec: None,
            hand_over_secs: 0.0,
            disk_bytes_per_sec: None,
            cores: None,
        }
    }

    /// Rates used to choose cuts: always the same, while measured ones differ a little each time.
    pub fn nominal() -> CostModel {
        CostModel::stated(1e11, 2e10, 1e10)
    }

    /// The disk tier's bandwidth each way.
    pub fn disk_bytes_per_sec(&self) -> f64 {
        self.disk_bytes_per_sec.unwrap_or(DISK_BYTES_PER_SEC)
    }

    /// Seconds of one op.
    pub fn op_secs(&self, cost: &Cost) -> f64 {
        let work = cost.work();
        let of_family = if work > 0.0 { work / self.rate(cost) } else { 0.0 };
        self.op_secs + of_family.max(cost.bytes as f64 / self.memory_bytes_per_sec)
    }

    /// The rate at the op's size: the geometric mean of the family's measured rates, each weighted by how near its size
    /// is. The distance of sizes is that of their logarithms, and a measured size gets exactly its rate. Where nothing
    /// was measured in the op's precision, rates in its element type are used, and where there are none either, those
    /// in other types.
    fn rate(&self, cost: &Cost) -> f64 {
        let log = |size: usize| (size.max(1) as f64).ln();
        let (mut weights, mut sum) = (0.0, 0.0);
        for rate in self.likest(cost.float, cost.tf32, |family| family == cost.family) {
            let apart: f64 = rate.sizes.iter().zip(cost.sizes).map(|(&a, b)| (log(a) - log(b)).powi(2)).sum();
            // The square of the squared distance: a far size has almost no weight next to a near one.
            let weight = 1.0 / (apart + 1e-3).powi(2);
            weights += weight;
            // The geometric mean: a size so small that start-up dominates has a rate thousands of times lower, which
            // must not outweigh the others.
            sum += weight * rate.work_per_sec.ln();
        }
        // A family that was not measured moves its operands at memory bandwidth, or computes as fast as the fastest
        // one.
        if weights > 0.0 { (sum / weights).exp() } else { self.best_rate(cost.family.work()) }
    }

    /// Rates of some families in a precision; where there are none, those in its element type; else all of them.
    fn likest(&self, float: DType, tf32: bool, of: impl Fn(Family) -> bool) -> impl Iterator<Item = &Rate> {
        let like = move |r: &Rate| (r.float == float, r.float == float && r.tf32 == tf32);
        let likest = self.rates.iter().filter(|r| of(r.family)).map(like).max();
        self.rates.iter().filter(move |r| of(r.family) && Some(like(r)) == likest)
    }

    /// The best arithmetic rate of any family in a precision: the ceiling of a compute lane for a model in that
    /// precision.
    pub fn ceiling_flops_per_sec(&self, float: DType, tf32: bool) -> f64 {
        self.likest(float, tf32, |family| family.work() == Work::Flops).map(|r| r.work_per_sec).fold(0.0, f64::max)
    }

    /// The best arithmetic rate of any family in any precision.
    pub fn best_flops_per_sec(&self) -> f64 {
        self.rates.iter().filter(|r| r.family.work() == Work::Flops).map(|r| r.work_per_sec).fold(0.0, f64::max)
    }

    fn best_rate(&self, work: Work) -> f64 {
        let same = self.rates.iter().filter(|r| r.family.work() == work).map(|r| r.work_per_sec);
        same.fold(0.0, f64::max).max(self.memory_bytes_per_sec)
    }

    /// Seconds of a program.
    pub fn program_secs(&self, program: &Program) -> f64 {
        self.run_secs + program.steps.iter().map(|step| self.op_secs(&step.cost)).sum::<f64>()
    }

    /// The same device with the fraction `share` of every rate, as when others work on the same cores.
    pub fn slowed(&self, share: f64) -> CostModel {
        let mut slow = self.clone();
        slow.rates.iter_mut().for_each(|rate| rate.work_per_sec *= share);
        let norms = slow.device_norm_bytes_per_sec.iter_mut().chain(&mut slow.host_norm_bytes_per_sec);
        let rates = [
            &mut slow.memory_bytes_per_sec,
            &mut slow.h2d_bytes_per_sec,
            &mut slow.d2h_bytes_per_sec,
            &mut slow.device_update_bytes_per_sec,
            &mut slow.host_update_bytes_per_sec,
        ];
        rates.into_iter().chain(norms).for_each(|rate| *rate *= share);
        let starts = [&mut slow.op_secs, &mut slow.run_secs, &mut slow.copy_secs];
        starts.into_iter().for_each(|secs| *secs /= share);
        slow
    }

    /// Seconds on the device of updates with `update_bytes` of memory traffic and norms of `norm_bytes` of gradients.
    pub fn device_settle_secs(&self, update_bytes: u64, norm_bytes: u64) -> f64 {
        let norms = self.device_norm_bytes_per_sec.unwrap_or(self.device_update_bytes_per_sec);
        update_bytes as f64 / self.device_update_bytes_per_sec + norm_bytes as f64 / norms
    }

    /// Seconds on the host of updates with `update_bytes` of memory traffic and norms of `norm_bytes` of gradients.
    pub fn host_settle_secs(&self, update_bytes: u64, norm_bytes: u64) -> f64 {
        let norms = self.host_norm_bytes_per_sec.unwrap_or(self.host_update_bytes_per_sec);
        update_bytes as f64 / self.host_update_bytes_per_sec + norm_bytes as f64 / norms
    }

    /// Seconds that `copies` copies of `bytes` in all take from each of the device's cores.
    pub fn copy_core_secs(&self, bytes: u64, copies: usize) -> f64 {
        let of = |cores: Cores| {
            // A copy occupies one core.
            let secs = copies as f64 * self.copy_secs + bytes as f64 / cores.copy_bytes_per_sec;
            secs / cores.count as f64
        };
        self.cores.map_or(0.0, of)
    }

    /// Seconds that a task on a lane of `kind` takes from each of the device's cores.
    pub fn core_secs(&self, task: &Task, kind: LaneKind) -> f64 {
        match (self.cores, task) {
            (None, _) => 0.0,
            (Some(_), Task::Copy(_)) => self.copy_core_secs(task.bytes(), 1),
            (Some(_), _) => self.task_secs(task, kind),
        }
    }

    /// Seconds of a task on a lane of `kind`.
    pub fn task_secs(&self, task: &Task, kind: LaneKind) -> f64 {
        let bytes = task.bytes() as f64;
        let of = |update: f64, norm: Option<f64>| {
            let rate = if let Task::Norm(_) = task { norm.unwrap_or(update) } else { update };
            self.run_secs + bytes / rate
        };
        let secs = match (task, kind) {
            (Task::Run(run), _) => self.program_secs(&run.program),
            (Task::Copy(_), LaneKind::HostToDevice) => self.copy_secs + bytes / self.h2d_bytes_per_sec,
            (Task::Copy(_), _) => self.copy_secs + bytes / self.d2h_bytes_per_sec,
            (_, LaneKind::Compute) => of(self.device_update_bytes_per_sec, self.device_norm_bytes_per_sec),
            _ => of(self.host_update_bytes_per_sec, self.host_norm_bytes_per_sec),
        };
        secs + self.hand_over_secs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(family: Family, work: f64, sizes: [usize; 3]) -> Cost {
        Cost { flops: work, bytes: work as u64, family, float: DType::F32, tf32: false, elems: 0, sizes }
    }

    #[test]
    fn measured_sizes_have_their_rates_and_others_lie_between() {
        let mut model = CostModel::stated(1e9, 1e12, 1e9);
        model.rates = [(64, 1e9), (1024, 4e9)]
            .map(|(n, work_per_sec)| Rate {
                family: Family::Gemm,
                float: DType::F32,
                tf32: false,
                sizes: [n; 3],
                work_per_sec,
            })
            .to_vec();
        let secs = |n: usize| model.op_secs(&cost(Family::Gemm, 1e9, [n; 3]));
        assert!((secs(64) - 1.0).abs() < 1e-3 && (secs(1024) - 0.25).abs() < 1e-3, "{} {}", secs(64), secs(1024));
        assert!(secs(64) > secs(128) && secs(128) > secs(256) && secs(256) > secs(1024));
        assert!(secs(0) > 0.8 && secs(1 << 20) < 0.5, "outside what was measured the nearest counts for most");
    }

    #[test]
    fn a_precision_has_its_own_rates_where_it_was_measured() {
        let mut model = CostModel::stated(1e9, 1e12, 1e9);
        let rate = |float, tf32, work_per_sec| Rate { family: Family::Gemm, float, tf32, sizes: [9; 3], work_per_sec };
        let f32s = Cost { float: DType::F32, ..cost(Family::Gemm, 8e9, [9; 3]) };
        let tf32s = Cost { tf32: true, ..f32s };
        let bf16s = Cost { float: DType::Bf16, ..f32s };
        // With all three, without tf32 as in older profiles, without f32, and of another type alone.
        let (f, t, b) = (rate(DType::F32, false, 1e9), rate(DType::F32, true, 4e9), rate(DType::Bf16, false, 8e9));
        for (rates, want) in [
            (vec![f, t, b], [8.0, 2.0, 1.0]),
            (vec![f, b], [8.0, 8.0, 1.0]),
            (vec![t, b], [2.0, 2.0, 1.0]),
            (vec![b], [1.0; 3]),
            (vec![f], [8.0; 3]),
        ] {
            model.rates = rates;
            for (cost, want) in [f32s, tf32s, bf16s].iter().zip(want) {
                assert!((model.op_secs(cost) - want).abs() < 1e-6, "{cost:?}: {}, want {want}", model.op_secs(cost));
            }
        }
    }

    #[test]
    fn nothing_takes_no_time_and_an_unmeasured_family_some() {
        let mut model = CostModel::stated(1e9, 1e9, 1e9);
        assert_eq!(model.op_secs(&cost(Family::Conv, 0.0, [0; 3])), 0.0);
        model.rates.clear();
        assert_eq!(model.op_secs(&cost(Family::Norm, 1e9, [7, 7, 1])), 1.0);
    }

    #[test]
    fn a_stated_device_is_bound_by_the_slower_of_arithmetic_and_memory() {
        let model = CostModel::stated(1e9, 1e6, 1e9);
        let sizes = [9; 3];
        let both = Cost { bytes: 1_000_000, ..cost(Family::Gemm, 2e9, sizes) };
        assert!((model.op_secs(&both) - 2.0).abs() < 1e-9);
        assert!((model.op_secs(&Cost { flops: 1.0, ..both }) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn norms_are_as_fast_as_updates_where_nobody_measured_them() {
        let mut model = CostModel::stated(1e9, 4e9, 1e9);
        assert_eq!((model.device_settle_secs(4_000_000_000, 2_000_000_000)), 1.5);
        (model.device_norm_bytes_per_sec, model.host_norm_bytes_per_sec) = (Some(1e9), Some(5e8));
        assert_eq!((model.device_settle_secs(4_000_000_000, 2_000_000_000)), 3.0);
        assert_eq!((model.host_settle_secs(4_000_000_000, 2_000_000_000)), 5.0);
    }

    #[test]
    fn a_share_of_a_device_takes_so_many_times_as_long() {
        let mut whole = CostModel::stated(1e9, 1e12, 1e9);
        (whole.op_secs, whole.run_secs, whole.copy_secs) = (0.25, 0.5, 0.125);
        whole.host_norm_bytes_per_sec = Some(8e9);
        let half = whole.slowed(0.5);
        let gemm = cost(Family::Gemm, 3e9, [9; 3]);
        // Rates go through logarithms.
        assert!((half.op_secs(&gemm) / whole.op_secs(&gemm) - 2.0).abs() < 1e-9);
        assert_eq!((half.run_secs, half.copy_secs), (1.0, 0.25));
        assert_eq!(half.host_settle_secs(7, 9), 2.0 * whole.host_settle_secs(7, 9));
        assert_eq!(half.device_settle_secs(7, 9), 2.0 * whole.device_settle_secs(7, 9));
        assert_eq!((half.h2d_bytes_per_sec, half.d2h_bytes_per_sec), (5e8, 5e8));
        assert_eq!(whole.slowed(1.0), whole);
    }

    #[test]
    fn older_profiles_are_read() {
        let model = CostModel::stated(1e9, 1e8, 1e7);
        let mut json = serde_json::to_value(&model).unwrap();
        for key in ["device_norm_bytes_per_sec", "host_norm_bytes_per_sec", "disk_bytes_per_sec", "cores"] {
            assert!(json.as_object_mut().unwrap().remove(key).is_some(), "{key}");
        }
        for rate in json["rates"].as_array_mut().unwrap() {
            assert!(rate.as_object_mut().unwrap().remove("tf32").is_some());
        }
        assert_eq!(serde_json::from_value::<CostModel>(json).unwrap(), model);
    }

    #[test]
    fn survives_json() {
        let model = CostModel::stated(1e9, 1e8, 1e7);
        let text = serde_json::to_string(&model).unwrap();
        assert_eq!(serde_json::from_str::<CostModel>(&text).unwrap(), model);
    }
}
