//! Seconds for tasks: rates of a machine, stated or measured, over the counts that ops give.

use crate::base::LaneKind;
use crate::device::Task;
use crate::graph::{Cost, Family, Program};

/// The rate of matrix products of about one size.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct GemmRate {
    /// Floating-point operations of the product.
    pub flops: f64,
    /// Smallest of rows, columns and depth.
    pub narrow: f64,
    /// Rate reached.
    pub flops_per_sec: f64,
}

/// What a device and its links achieve.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct CostModel {
    /// Rates of matrix products; the nearest in size is taken.
    pub gemm: Vec<GemmRate>,
    /// Rate of fused attention, forward and backward, by its own flop count.
    pub attention_flops_per_sec: f64,
    /// Rate of convolutions.
    pub conv_flops_per_sec: f64,
    /// Rate of activations, dropout and softmax over the vocabulary, in elements.
    pub transcendental_elems_per_sec: f64,
    /// Memory traffic of everything else.
    pub memory_bytes_per_sec: f64,
    /// Seconds that starting an op costs.
    pub op_secs: f64,
    /// Host-to-device bandwidth.
    pub h2d_bytes_per_sec: f64,
    /// Device-to-host bandwidth.
    pub d2h_bytes_per_sec: f64,
    /// Seconds that starting a copy costs.
    pub copy_secs: f64,
    /// Memory traffic of optimizers and sums on the device.
    pub device_update_bytes_per_sec: f64,
    /// Memory traffic of optimizers and sums on the host.
    pub host_update_bytes_per_sec: f64,
    /// Seconds between a task's end and the start of one that waited for it on another lane.
    pub hand_over_secs: f64,
}

impl CostModel {
    /// A device of stated rates: `flops` for all arithmetic that is not bound by memory.
    pub fn stated(flops_per_sec: f64, memory_bytes_per_sec: f64, link_bytes_per_sec: f64) -> CostModel {
        CostModel {
            gemm: vec![GemmRate { flops: 1e9, narrow: 1024.0, flops_per_sec }],
            attention_flops_per_sec: flops_per_sec,
            conv_flops_per_sec: flops_per_sec,
            transcendental_elems_per_sec: memory_bytes_per_sec / 8.0,
            memory_bytes_per_sec,
            op_secs: 0.0,
            h2d_bytes_per_sec: link_bytes_per_sec,
            d2h_bytes_per_sec: link_bytes_per_sec,
            copy_secs: 0.0,
            device_update_bytes_per_sec: memory_bytes_per_sec,
            host_update_bytes_per_sec: memory_bytes_per_sec.min(50e9),
            hand_over_secs: 0.0,
        }
    }

    /// Seconds of one op.
    pub fn op_secs(&self, cost: &Cost) -> f64 {
        let memory = cost.bytes as f64 / self.memory_bytes_per_sec;
        let arithmetic = match cost.family {
            Family::Gemm => cost.flops / self.gemm_rate(cost),
            Family::Attention => cost.flops / self.attention_flops_per_sec,
            Family::Conv => cost.flops / self.conv_flops_per_sec,
            Family::Transcendental => cost.elems as f64 / self.transcendental_elems_per_sec,
            Family::Memory => 0.0,
        };
        self.op_secs + memory.max(arithmetic)
    }

    /// The measured rate nearest in size, by ratio.
    fn gemm_rate(&self, cost: &Cost) -> f64 {
        let narrow = cost.gemm.iter().copied().min().unwrap_or(1).max(1) as f64;
        let apart =
            |rate: &GemmRate| (rate.flops / cost.flops.max(1.0)).ln().abs() + 2.0 * (rate.narrow / narrow).ln().abs();
        let nearest = self.gemm.iter().min_by(|a, b| apart(a).total_cmp(&apart(b)));
        nearest.map_or(self.conv_flops_per_sec, |rate| rate.flops_per_sec)
    }

    /// Seconds of a program.
    pub fn program_secs(&self, program: &Program) -> f64 {
        program.steps.iter().map(|step| self.op_secs(&step.cost)).sum()
    }

    /// Seconds of a task on a lane of `kind`.
    pub fn task_secs(&self, task: &Task, kind: LaneKind) -> f64 {
        let bytes = task.bytes() as f64;
        let secs = match (task, kind) {
            (Task::Run(run), _) => self.program_secs(&run.program),
            (Task::Copy(_), LaneKind::HostToDevice) => self.copy_secs + bytes / self.h2d_bytes_per_sec,
            (Task::Copy(_), _) => self.copy_secs + bytes / self.d2h_bytes_per_sec,
            (_, LaneKind::Compute) => self.op_secs + bytes / self.device_update_bytes_per_sec,
            _ => self.op_secs + bytes / self.host_update_bytes_per_sec,
        };
        secs + self.hand_over_secs
    }
}
