//! Rates that a job states for a device: its own, a known profile's, or those of a file.

use crate::job::{Device, SANE_RATES};
use hydra::base::{Error, Result};
use hydra::device::sim::{CostModel, PROFILES, Profile};
use std::ops::RangeInclusive;
use std::path::Path;

/// Plausible start-up costs of a task or a copy, in seconds.
const SANE_SECS: RangeInclusive<f64> = 0.0..=1000.0;

/// The rates of a device that states them: device `i` of the job `file`.
///
/// # Errors
/// [`Error::BadInput`] that names the key.
pub fn stated_cost(file: &str, i: usize, device: &Device) -> Result<CostModel> {
    let Some(profile) = &device.profile else {
        let (flops, memory) = (device.flops.unwrap_or(1e12), device.memory_bandwidth.unwrap_or(1e11));
        return Ok(CostModel::stated(flops, memory, device.link.unwrap_or(memory)));
    };
    if let Some(known) = Profile::find(profile) {
        return Ok(known.cost());
    }
    let fault = |what: String| Error::bad(format!("{file}: device.{i}.profile: {what}"));
    if profile.ends_with(".json") {
        let path = device.profile_path.as_deref().unwrap_or(Path::new(profile));
        let text =
            std::fs::read_to_string(path).map_err(|e| fault(format!("{}: cannot be read: {e}", path.display())))?;
        let cost: CostModel = serde_json::from_str(&text)
            .map_err(|e| fault(format!("{}: is no profile of `hydra devices --profile`: {e}", path.display())))?;
        check_cost(&cost).map_err(|what| fault(format!("{}: {what}", path.display())))?;
        return Ok(cost);
    }
    let names = PROFILES.map(|p| p.name);
    let hint = hydra::base::nearest(profile, names).map_or(String::new(), |near| format!("; did you mean \"{near}\"?"));
    let known = names.join(", ");
    Err(fault(format!("\"{profile}\" is not known, only {known}, and files that end in .json{hint}")))
}

/// Refuses numbers that no device has, with which a plan would be meaningless. Returns the faulty field.
fn check_cost(cost: &CostModel) -> std::result::Result<(), String> {
    // Destructured, so that a field that a later version adds must be named here.
    let CostModel {
        rates,
        memory_bytes_per_sec,
        op_secs,
        run_secs,
        h2d_bytes_per_sec,
        d2h_bytes_per_sec,
        copy_secs,
        device_update_bytes_per_sec,
        host_update_bytes_per_sec,
        device_norm_bytes_per_sec,
        host_norm_bytes_per_sec,
        hand_over_secs,
        disk_bytes_per_sec,
        cores,
    } = cost;
    let rate = |field: &str, rate: f64| match SANE_RATES.contains(&rate) {
        true => Ok(()),
        false => Err(format!("{field}: want a rate from 1 to 1e21 a second, got {rate:?}")),
    };
    let secs = |field: &str, secs: f64| match SANE_SECS.contains(&secs) {
        true => Ok(()),
        false => Err(format!("{field}: want seconds from 0 to 1000, got {secs:?}")),
    };
    for (i, measured) in rates.iter().enumerate() {
        rate(&format!("rates.{i}.work_per_sec"), measured.work_per_sec)?;
    }
    rate("memory_bytes_per_sec", *memory_bytes_per_sec)?;
    rate("h2d_bytes_per_sec", *h2d_bytes_per_sec)?;
    rate("d2h_bytes_per_sec", *d2h_bytes_per_sec)?;
    rate("device_update_bytes_per_sec", *device_update_bytes_per_sec)?;
    rate("host_update_bytes_per_sec", *host_update_bytes_per_sec)?;
    device_norm_bytes_per_sec.map_or(Ok(()), |n| rate("device_norm_bytes_per_sec", n))?;
    host_norm_bytes_per_sec.map_or(Ok(()), |n| rate("host_norm_bytes_per_sec", n))?;
    disk_bytes_per_sec.map_or(Ok(()), |n| rate("disk_bytes_per_sec", n))?;
    secs("op_secs", *op_secs)?;
    secs("run_secs", *run_secs)?;
    secs("copy_secs", *copy_secs)?;
    secs("hand_over_secs", *hand_over_secs)?;
    let Some(cores) = cores else { return Ok(()) };
    if cores.count == 0 {
        return Err("cores.count: want a number above 0, got 0".into());
    }
    rate("cores.copy_bytes_per_sec", cores.copy_bytes_per_sec)
}
