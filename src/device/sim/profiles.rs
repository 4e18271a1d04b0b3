//! Rates of well-known devices, by name: peaks as their makers state them, so that predictions are bounds rather than
//! promises.

use super::CostModel;

/// A device's stated peaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Profile {
    /// Its name in a job file.
    pub name: &'static str,
    /// f32 arithmetic outside tensor cores, in floating-point operations per second.
    pub flops_per_sec: f64,
    /// Bandwidth of its own memory, in bytes per second.
    pub memory_bytes_per_sec: f64,
    /// What its link to the host carries each way, in bytes per second: four fifths of the stated rate, which is what
    /// copies of pinned memory reach.
    pub link_bytes_per_sec: f64,
}

/// The profiles, oldest first. Sources: NVIDIA's data sheets of the V100 (SXM2, 2020), A100 (80 GB SXM, 2022), H100
/// (SXM, 2023) and H200 (SXM, 2024); links are PCI Express 3, 4, 5 and 5 with 16 lanes, stated as 16, 32, 64 and 64
/// GB/s each way.
pub const PROFILES: [Profile; 4] = [
    Profile { name: "v100", flops_per_sec: 15.7e12, memory_bytes_per_sec: 900e9, link_bytes_per_sec: 12.8e9 },
    Profile { name: "a100", flops_per_sec: 19.5e12, memory_bytes_per_sec: 2039e9, link_bytes_per_sec: 25.6e9 },
    Profile { name: "h100", flops_per_sec: 67e12, memory_bytes_per_sec: 3350e9, link_bytes_per_sec: 51.2e9 },
    Profile { name: "h200", flops_per_sec: 67e12, memory_bytes_per_sec: 4800e9, link_bytes_per_sec: 51.2e9 },
];

impl Profile {
    /// The profile of this name.
    pub fn find(name: &str) -> Option<Profile> {
        PROFILES.into_iter().find(|profile| profile.name == name)
    }

    /// Its cost model.
    pub fn cost(&self) -> CostModel {
        CostModel::stated(self.flops_per_sec, self.memory_bytes_per_sec, self.link_bytes_per_sec)
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
        }
        assert_eq!(Profile::find("V100"), None);
    }
}
