//! `hydra devices`: what is here, how fast it is, and why a kind is missing. Always ends well.

use crate::planning::{free_memory_bytes, total_memory_bytes};
use crate::print::{say, table};
use hydra::base::{Result, format_bytes};
use hydra::device::sim::PROFILES;
use hydra::device::{DeviceSpec, calibrate};
use hydra::device::{why_no_cuda, why_no_emulator};
use hydra::train::{refused, write_safely};
use serde_json::{Value, json};
use std::path::Path;

/// Prints the devices; with `out`, also writes devices.json there.
///
/// # Errors
/// When devices.json cannot be written.
pub fn run(out: Option<&Path>, json: bool) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (total, free) = (total_memory_bytes(), free_memory_bytes());
    let mut host = json!({
        "kind": "host", "here": true, "cores": cores, "memory_bytes": total, "free_memory_bytes": free,
    });
    let rates = calibrate(&DeviceSpec::default());
    match &rates {
        Ok(cost) => {
            host["gemm_flops_per_sec"] = cost.best_flops_per_sec().into();
            host["memcpy_bytes_per_sec"] = cost.h2d_bytes_per_sec.into();
            host["optimizer_bytes_per_sec"] = cost.host_update_bytes_per_sec.into();
            host["rates"] = json!(cost);
        }
        Err(error) => host["why_no_rates"] = error.to_string().into(),
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
        missing("cuda", why_no_cuda()),
        missing("emulated", why_no_emulator()),
    ] });
    if let Some(out) = out {
        std::fs::create_dir_all(out).map_err(|e| refused("create", out, e))?;
        write_safely(&out.join("devices.json"), |file| writeln!(file, "{devices:#}"))?;
    }
    if json {
        say(devices);
        return Ok(());
    }
    let memory = |bytes: Option<u64>| bytes.map_or("unknown".into(), format_bytes);
    say(format!("host      {cores} cores, {} of memory, {} free", memory(total), memory(free)));
    match rates {
        Ok(cost) => {
            say(format!("          matrix products {:.1} GFLOP/s", cost.best_flops_per_sec() / 1e9));
            say(format!("          copies          {:.1} GB/s each way", cost.h2d_bytes_per_sec / 1e9));
            say(format!(
                "          optimizer       {:.1} GB/s of memory traffic",
                cost.host_update_bytes_per_sec / 1e9
            ));
        }
        Err(error) => say(format!("          not measured: {error}")),
    }
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
    for (kind, why) in [("cuda", why_no_cuda()), ("emulated", why_no_emulator())] {
        say(format!("{kind:<9} {}", why.map_or("here".into(), |why| format!("not here: {why}"))));
    }
    Ok(())
}

/// A kind with the reason for which it is missing, or as one that is here.
fn missing(kind: &str, why: Option<String>) -> Value {
    match why {
        None => json!({ "kind": kind, "here": true }),
        Some(why) => json!({ "kind": kind, "here": false, "why": why }),
    }
}
