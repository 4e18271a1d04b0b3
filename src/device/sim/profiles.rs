//! Rates of well-known devices, by name: peaks as their makers state them, so that predictions are bounds rather than
//! promises.

use super::{CostModel, Rate};
use crate::base::DType;
use crate::graph::{Family, Work};

/// A device's stated peaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Profile {
    /// Its name in a job file.
    pub name: &'static str,
    /// f32 arithmetic outside tensor cores, in floating-point operations per second.
    pub flops_per_sec: f64,
    /// Dense f32 products whose factors are rounded to tf32; without such tensor cores, the f32 rate.
    pub tf32_flops_per_sec: f64,
    /// Dense bf16 products; without such tensor cores, the f32 rate.
    pub bf16_flops_per_sec: f64,
    /// Bandwidth of its own memory, in bytes per second.
    pub memory_bytes_per_sec: f64,
    /// Bandwidth of its link to the host each way, in bytes per second: four fifths of the stated rate, which copies of
    /// pinned memory reach.
    pub link_bytes_per_sec: f64,
}

/// The profiles, oldest first. Sources: NVIDIA's data sheets of the V100 (SXM2, 2020), A100 (80 GB SXM, 2022), H100
/// (SXM, 2023) and H200 (SXM, 2024); links are PCI Express 3, 4, 5 and 5 with 16 lanes, stated as 16, 32, 64 and 64
/// GB/s each way.
pub const PROFILES: [Profile; 4] = [
    profile("v100", [15.7, 15.7, 15.7], 900.0, 12.8),
    profile("a100", [19.5, 156.0, 312.0], 2039.0, 25.6),
    profile("h100", [67.0, 494.5, 989.0], 3350.0, 51.2),
    profile("h200", [67.0, 494.5, 989.0], 4800.0, 51.2),
];

/// Makes a profile from TFLOP/s in f32, tf32 and bf16, and GB/s of memory and link.
const fn profile(name: &'static str, tflops: [f64; 3], memory: f64, link: f64) -> Profile {
    Profile {
        name,
        flops_per_sec: tflops[0] * 1e12,
        tf32_flops_per_sec: tflops[1] * 1e12,
        bf16_flops_per_sec: tflops[2] * 1e12,
        memory_bytes_per_sec: memory * 1e9,
        link_bytes_per_sec: link * 1e9,
    }
}

impl Profile {
    /// The profile of this name.
    pub fn find(name: &str) -> Option<Profile> {
        PROFILES.into_iter().find(|profile| profile.name == name)
    }

    /// Its cost model.
    pub fn cost(&self) -> CostModel {
        let mut cost = CostModel::stated(self.flops_per_sec, self.memory_bytes_per_sec, self.link_bytes_per_sec);
        for family in Family::ALL.into_iter().filter(|family| family.work() == Work::Flops) {
            for (float, tf32, work_per_sec) in
                [(DType::F32, true, self.tf32_flops_per_sec), (DType::Bf16, false, self.bf16_flops_per_sec)]
            {
                cost.rates.push(Rate { family, float, tf32, sizes: [1; 3], work_per_sec });
            }
        }
        cost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_is_found_by_its_name() {
        for profile in PROFILES {
            assert_eq!(Profile::find(profile.name), Some(profile));
            assert_eq!(profile.cost().h2d_bytes_per_sec, profile.link_bytes_per_sec);
            let of = |float, tf32| profile.cost().ceiling_flops_per_sec(float, tf32);
            assert_eq!(of(DType::F32, false), profile.flops_per_sec);
            assert_eq!(of(DType::F32, true), profile.tf32_flops_per_sec);
            assert_eq!(of(DType::Bf16, false), profile.bf16_flops_per_sec);
        }
        assert_eq!(Profile::find("V100"), None);
    }
}
