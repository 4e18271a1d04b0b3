//! `hydra devices`: which devices are available, how fast they are, and why a kind is missing. Always succeeds, unless
//! it is told to write files and cannot.

use crate::machine::{free_memory_bytes, total_memory_bytes};
use crate::print::{say, table};
use crate::rundir::write_into;
use hydra::base::{Error, Result, format_bytes};
use hydra::device::sim::{CostModel, PROFILES};
use hydra::device::{DeviceSpec, calibrate, gpus, why_no_cuda, why_no_emulator};
use hydra::train::write_safely;
use serde_json::{Value, json};
use std::path::Path;

/// Prints the devices; with `out`, also writes devices.json there; with `profile`, also writes the measured rates of
/// the first GPU, or of the host if there is none, to that file.
///
/// # Errors
/// When a file cannot be written, or there are no rates for `profile`, or its name is not one that jobs accept.
pub fn run(out: Option<&Path>, profile: Option<&Path>, json: bool) -> Result<()> {
    // Jobs recognise such files by this extension.
    if let Some(path) = profile.filter(|path| path.extension().is_none_or(|end| end != "json")) {
        return Err(Error::bad(format!("--profile {}: want a name that ends in .json", path.display())));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (total, free) = (total_memory_bytes(), free_memory_bytes());
    let mut host = json!({
        "kind": "host", "here": true, "cores": cores, "memory_bytes": total, "free_memory_bytes": free,
    });
    let rates = calibrate(&DeviceSpec::default());
    put_rates(&mut host, &rates, |cost| cost.host_update_bytes_per_sec);
    let gpus = gpus();
    let mut cuda = missing("cuda", why_no_cuda());
    // Lists the rates of the first GPU of each model; those of the very first are also listed with the kind.
    let measured = |ordinal: usize| {
        let first = gpus[..ordinal].iter().all(|gpu| *gpu != gpus[ordinal]);
        first.then(|| calibrate(&DeviceSpec::Cuda { ordinal, threads: None }))
    };
    let gpu_rates: Vec<Option<Result<CostModel>>> = (0..gpus.len()).map(measured).collect();
    let described = gpus.iter().zip(&gpu_rates).map(|((name, bytes), rates)| {
        let mut gpu = json!({ "name": name, "memory_bytes": bytes });
        rates.iter().for_each(|rates| put_rates(&mut gpu, rates, |cost| cost.device_update_bytes_per_sec));
        gpu
    });
    if let Some(Some(rates)) = gpu_rates.first() {
        cuda["gpus"] = described.collect();
        put_rates(&mut cuda, rates, |cost| cost.device_update_bytes_per_sec);
    }
    let profiles: Vec<Value> = PROFILES
        .iter()
        .map(|p| {
            json!({
                "name": p.name,
                "flops_per_sec": p.flops_per_sec,
                "memory_bytes_per_sec": p.memory_bytes_per_sec,
                "link_bytes_per_sec": p.link_bytes_per_sec,
            })
        })
        .collect();
    let devices = json!({ "devices": [
        host,
        { "kind": "sim", "here": true, "profiles": profiles },
        cuda,
        missing("emulated", why_no_emulator()),
    ] });
    if let Some(out) = out {
        write_into(out, "devices.json", &format!("{devices:#}\n"))?;
    }
    if let Some(path) = profile {
        let rates = gpu_rates.iter().flatten().next().unwrap_or(&rates);
        let cost = rates.as_ref().map_err(|e| Error::Device(format!("{}: no rates to write: {e}", path.display())))?;
        write_safely(path, |file| writeln!(file, "{:#}", json!(cost)))?;
    }
    if json {
        say(devices);
        return Ok(());
    }
    let memory = |bytes: Option<u64>| bytes.map_or("unknown".into(), format_bytes);
    say(format!("host      {cores} cores, {} of memory, {} free", memory(total), memory(free)));
    say_rates(&rates, |cost| cost.host_update_bytes_per_sec);
    say("sim       for `hydra plan`; profiles with stated peaks:");
    let mut rows = vec![["", "f32", "memory", "link"].map(String::from).to_vec()];
    rows.extend(PROFILES.iter().map(|p| {
        vec![
            format!("        {}", p.name),
            format!("{:.1} TFLOP/s", p.flops_per_sec / 1e12),
            format!("{:.0} GB/s", p.memory_bytes_per_sec / 1e9),
            format!("{:.1} GB/s", p.link_bytes_per_sec / 1e9),
        ]
    }));
    say(table(&rows).trim_end());
    for (i, ((name, bytes), rates)) in gpus.iter().zip(&gpu_rates).enumerate() {
        say(format!("cuda {i:<4} {name}, {}", format_bytes(*bytes)));
        rates.iter().for_each(|rates| say_rates(rates, |cost| cost.device_update_bytes_per_sec));
    }
    if let Some(why) = why_no_cuda() {
        say(format!("cuda      not here: {}", why.trim_start_matches("cuda: ")));
    }
    say(format!("emulated  {}", why_no_emulator().map_or("here".into(), |why| format!("not here: {why}"))));
    Ok(())
}

/// Measured rates of a device as JSON; `update` picks the one of its optimizer.
fn put_rates(device: &mut Value, rates: &Result<CostModel>, update: impl Fn(&CostModel) -> f64) {
    match rates {
        Ok(cost) => {
            device["gemm_flops_per_sec"] = cost.best_flops_per_sec().into();
            device["memcpy_bytes_per_sec"] = cost.h2d_bytes_per_sec.into();
            device["optimizer_bytes_per_sec"] = update(cost).into();
            device["rates"] = json!(cost);
        }
        Err(error) => device["why_no_rates"] = error.to_string().into(),
    }
}

/// Prints the same as lines.
fn say_rates(rates: &Result<CostModel>, update: impl Fn(&CostModel) -> f64) {
    match rates {
        Ok(cost) => {
            say(format!("          matrix products {:.1} GFLOP/s", cost.best_flops_per_sec() / 1e9));
            say(format!("          copies          {}", copies(cost)));
            say(format!("          optimizer       {:.1} GB/s of memory traffic", update(cost) / 1e9));
        }
        Err(error) => say(format!("          not measured: {error}")),
    }
}

/// The measured bandwidth of links, in both directions.
fn copies(cost: &CostModel) -> String {
    let [h2d, d2h] = [cost.h2d_bytes_per_sec, cost.d2h_bytes_per_sec].map(|rate| format!("{:.1} GB/s", rate / 1e9));
    format!("{h2d} to the device, {d2h} back")
}

/// A kind of device, with the reason why it is missing, or as available.
fn missing(kind: &str, why: Option<String>) -> Value {
    match why {
        None => json!({ "kind": kind, "here": true }),
        Some(why) => json!({ "kind": kind, "here": false, "why": why }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_told_in_both_directions() {
        let cost = CostModel { d2h_bytes_per_sec: 9.04e9, ..CostModel::stated(1e12, 1e11, 12e9) };
        assert_eq!(copies(&cost), "12.0 GB/s to the device, 9.0 GB/s back");
    }
}
