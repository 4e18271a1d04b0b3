//! From a job to plans: the machine it runs on, the plan of each model, and what plan.json says of them.

use crate::job::{DeviceKind, Job};
use crate::setup::{Prepared, check_scope, prepare};
use hydra::base::{Error, Result};
use hydra::device::host::HostSpec;
use hydra::device::sim::{CostModel, PROFILES, Profile};
use hydra::device::{DeviceSpec, calibrate, why_no_cuda, why_no_emulator};
use hydra::engine::{Prediction, predict};
use hydra::spill::{BoundaryTier, Model, Plan, named};
use hydra::train::{plan_model, trace_model};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// Of the memory that is free, the part that the host's store may take unless the job says otherwise.
const SHARE_OF_FREE_MEMORY: f64 = 0.8;

/// What a job runs on.
pub struct Machine {
    /// Its kind.
    pub kind: DeviceKind,
    /// Measured or stated rates.
    pub cost: CostModel,
    /// Bytes of the device's memory; `None` is no limit.
    pub device_budget: Option<u64>,
    /// Bytes of the host's store; `None` is no limit.
    pub host_budget: Option<u64>,
}

/// A model with its plan.
pub struct Planned {
    /// What was planned.
    pub prepared: Prepared,
    /// Its graphs.
    pub model: Arc<Model>,
    /// Its plan.
    pub plan: Arc<Plan>,
    /// What a step takes.
    pub prediction: Prediction,
}

/// A job with its plans.
pub struct PlannedJob {
    /// The job.
    pub job: Job,
    /// What it runs on.
    pub machine: Machine,
    /// Its models, in the file's order.
    pub models: Vec<Planned>,
}

/// Reads and plans the job at `path`. `trains`: a device that cannot compute is refused.
///
/// # Errors
/// When the job or what it names is at fault, or no plan fits the budgets.
pub fn plan_job(path: &Path, sets: &[String], trains: bool) -> Result<PlannedJob> {
    let job = Job::load(path, sets)?;
    let file = path.display().to_string();
    check_scope(&file, &job)?;
    check_device(&file, &job, trains)?;
    let prepared = (0..job.models.len()).map(|i| prepare(&file, &job, i)).collect::<Result<Vec<_>>>()?;
    // Graphs before rates: what a network refuses is said before a second goes into measuring.
    let mut traced = Vec::new();
    let spec = device_spec(&job);
    for (i, mut prepared) in prepared.into_iter().enumerate() {
        prepared.options.device = spec.clone();
        let model = trace_model(prepared.network(), &prepared.inputs, &prepared.options);
        let model = model.map_err(|e| Error::bad(format!("{file}: {}: {e}", job.models[i].at)))?;
        traced.push((prepared, Arc::new(model)));
    }
    let machine = machine(&job, &spec)?;
    let mut models = Vec::new();
    for (mut prepared, model) in traced {
        prepared.options.plan.device_budget = machine.device_budget;
        prepared.options.plan.host_budget = machine.host_budget;
        let plan = plan_model(&model, &prepared.options, &machine.cost).map_err(|e| named(&prepared.name, e))?;
        let plan = Arc::new(plan);
        let prediction = predict(&model, &plan, &machine.cost, prepared.options.clip.is_some())?;
        models.push(Planned { prepared, model, plan, prediction });
    }
    Ok(PlannedJob { job, machine, models })
}

fn check_device(file: &str, job: &Job, trains: bool) -> Result<()> {
    for (i, device) in job.devices.iter().enumerate() {
        let fault = |what: &str| Err(Error::bad(format!("{file}: device.{i}.kind: {what}")));
        match device.kind {
            DeviceKind::Host => {}
            DeviceKind::Sim if trains => {
                return fault(
                    "\"sim\" has a clock and no arithmetic: it plans and cannot train; write kind = \"host\"",
                );
            }
            DeviceKind::Sim => {}
            DeviceKind::Cuda => match why_no_cuda() {
                None => {}
                Some(_) if !cfg!(feature = "cuda") => return fault("\"cuda\" is not built in; write kind = \"host\""),
                Some(why) => return Err(Error::Device(format!("{file}: device.{i}.kind: {why}"))),
            },
            DeviceKind::Emulated if why_no_emulator().is_some() => {
                return fault("\"emulated\" is not built in; write kind = \"host\"");
            }
            DeviceKind::Emulated => {}
        }
        if let Some(profile) = device.profile.as_deref()
            && Profile::find(profile).is_none()
        {
            let names = PROFILES.map(|p| p.name);
            let known = names.join(", ");
            let hint = hydra::base::nearest(profile, names)
                .map_or(String::new(), |near| format!("; did you mean \"{near}\"?"));
            return Err(Error::bad(format!(
                "{file}: device.{i}.profile: \"{profile}\" is not known, only {known}{hint}"
            )));
        }
    }
    Ok(())
}

/// The first device, to be started; for sim, which starts none, the host.
fn device_spec(job: &Job) -> DeviceSpec {
    let device = &job.devices[0];
    match device.kind {
        DeviceKind::Cuda => DeviceSpec::Cuda { ordinal: 0, threads: None },
        // In order, as a GPU of the Hopper generation.
        DeviceKind::Emulated => DeviceSpec::Emulated { arch: 90, seed: 0, threads: None },
        DeviceKind::Host | DeviceKind::Sim => {
            HostSpec { arena_bytes: 0, link_bytes_per_sec: device.link, threads: device.threads }.into()
        }
    }
}

/// The first device, measured where it is real.
fn machine(job: &Job, spec: &DeviceSpec) -> Result<Machine> {
    let device = &job.devices[0];
    let link = device.link;
    let mut cost = match device.kind {
        DeviceKind::Sim => match device.profile.as_deref().and_then(Profile::find) {
            Some(profile) => profile.cost(),
            None => {
                let (flops, memory) = (device.flops.unwrap_or(1e12), device.memory_bandwidth.unwrap_or(1e11));
                CostModel::stated(flops, memory, link.unwrap_or(memory))
            }
        },
        _ => calibrate(spec)?,
    };
    if let Some(link) = link {
        cost.h2d_bytes_per_sec = if device.kind == DeviceKind::Sim { link } else { cost.h2d_bytes_per_sec.min(link) };
        cost.d2h_bytes_per_sec = if device.kind == DeviceKind::Sim { link } else { cost.d2h_bytes_per_sec.min(link) };
    }
    let host_budget = match (job.host.memory, device.kind) {
        (Some(bytes), _) => Some(bytes),
        (None, DeviceKind::Sim) => None,
        (None, _) => free_memory_bytes().map(|free| (free as f64 * SHARE_OF_FREE_MEMORY) as u64),
    };
    Ok(Machine { kind: device.kind, cost, device_budget: device.memory, host_budget })
}

/// Memory that programs can still have, where the system says (Linux's MemAvailable).
pub fn free_memory_bytes() -> Option<u64> {
    memory_line("MemAvailable:")
}

/// Memory of the machine, where the system says.
pub fn total_memory_bytes() -> Option<u64> {
    memory_line("MemTotal:")
}

fn memory_line(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

impl Planned {
    fn json(&self, cost: &CostModel) -> Value {
        let (plan, microbatches) = (&self.plan, self.model.microbatches as f64);
        let tier = |resident: bool| if resident { "device" } else { "pageable" };
        let boundary = |tier: &BoundaryTier| match tier {
            BoundaryTier::Device => "device",
            BoundaryTier::Host { .. } => "pageable",
        };
        let shards: Vec<Value> = plan
            .shards
            .iter()
            .enumerate()
            .map(|(s, shard)| {
                json!({
                    "layers": plan.layer_names(&self.model, s),
                    "bytes": shard.fetch_bytes(),
                    "tiers": {
                        "weights": tier(plan.choice.resident),
                        "gradients": tier(plan.choice.resident),
                        "moments": tier(plan.choice.resident),
                        "boundary_activations": boundary(&plan.choice.activations),
                        "boundary_gradients": boundary(&plan.choice.gradients),
                    },
                    "recompute": shard.forward.is_some() && !shard.kept,
                    "forward_secs": microbatches * shard.forward_secs(cost),
                    "backward_secs": microbatches * shard.backward_secs(cost),
                })
            })
            .collect();
        let arena: serde_json::Map<String, Value> =
            plan.arena_table().into_iter().map(|(what, bytes)| (what.to_string(), bytes.into())).collect();
        json!({
            "name": self.prepared.name,
            "steps": self.prepared.options.steps,
            "batch": self.prepared.options.batch,
            "microbatch": self.prepared.options.microbatch,
            "device_peak_bytes": plan.arena.bytes,
            "smallest_device_bytes": plan.smallest_device_bytes,
            "host_bytes": plan.host.bytes,
            "resident": plan.choice.resident,
            "slots": plan.choice.slots,
            "step_secs": self.prediction.step_secs,
            "bound_secs": self.prediction.bound_secs,
            "bound": self.prediction.bound,
            "arena": arena,
            "shards": shards,
        })
    }
}

impl PlannedJob {
    /// What plan.json holds. A shard's seconds are those of a step, all microbatches; the last shard's forward, loss and backward are
    /// one unit, whose seconds are `backward_secs`.
    pub fn json(&self) -> Value {
        let most = |of: fn(&Plan) -> u64| self.models.iter().map(|m| of(&m.plan)).max().unwrap_or(0);
        let cost = &self.machine.cost;
        json!({
            "device_peak_bytes": most(|p| p.arena.bytes),
            "smallest_device_bytes": most(|p| p.smallest_device_bytes),
            "shards": self.models.iter().map(|m| m.plan.shards.len()).sum::<usize>(),
            "step_secs": self.models.iter().map(|m| m.prediction.step_secs).sum::<f64>(),
            "bound_secs": self.models.iter().map(|m| m.prediction.bound_secs).sum::<f64>(),
            "device": self.machine.kind.word(),
            "budget": self.machine.device_budget,
            "recompute": self.job.run.recompute.word(),
            "resident": self.models.iter().all(|m| m.plan.choice.resident),
            "slots": self.models.iter().map(|m| m.plan.choice.slots).max(),
            "host_bytes": most(|p| p.host.bytes),
            "host_budget": self.machine.host_budget,
            "ceilings": {
                "flops_per_sec": cost.best_flops_per_sec(),
                "h2d_bytes_per_sec": cost.h2d_bytes_per_sec,
                "d2h_bytes_per_sec": cost.d2h_bytes_per_sec,
                "host_update_bytes_per_sec": cost.host_update_bytes_per_sec,
            },
            "models": self.models.iter().map(|m| m.json(cost)).collect::<Vec<_>>(),
        })
    }
}
