//! The device that tests run on, where the environment names one: so a built test binary can be carried to a machine
//! with a GPU.
//!
//! `HYDRA_KERNEL_TESTS_DEVICE` is `cuda` or `emulated`. Where that is not there, tests are skipped aloud;
//! `HYDRA_REQUIRE_GPU=1` makes the skip a failure.

use hydra::device::{DeviceSpec, why_no_cuda, why_no_emulator};

/// What the environment asks for.
pub enum Asked {
    /// Nothing: the test's own choice.
    Nothing,
    /// This device.
    Device(DeviceSpec),
    /// A device that is not there; that has been said.
    Missing,
}

/// The device that `HYDRA_KERNEL_TESTS_DEVICE` names, or else `default` does.
///
/// # Panics
/// When it names none, or the device is not there and `HYDRA_REQUIRE_GPU` is set.
pub fn asked(default: Option<&str>) -> Asked {
    let named = std::env::var("HYDRA_KERNEL_TESTS_DEVICE").ok().filter(|v| !v.is_empty());
    let (spec, why) = match named.as_deref().or(default) {
        None => return Asked::Nothing,
        Some("cuda") => (DeviceSpec::Cuda { ordinal: 0, threads: None }, why_no_cuda()),
        Some("emulated") => (DeviceSpec::Emulated { arch: 90, seed: 0, threads: Some(1) }, why_no_emulator()),
        Some(other) => panic!("HYDRA_KERNEL_TESTS_DEVICE is {other:?}, want \"cuda\" or \"emulated\""),
    };
    let Some(why) = why else { return Asked::Device(spec) };
    let required = std::env::var("HYDRA_REQUIRE_GPU").is_ok_and(|v| !v.is_empty() && v != "0");
    assert!(!required, "{why}, and HYDRA_REQUIRE_GPU is set");
    // Past the test harness, which would keep it to itself.
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
    Asked::Missing
}
