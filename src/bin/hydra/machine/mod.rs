//! What a job runs on: its devices with their rates, measured or stated, and the available memory.

mod memory;
mod profile;

use crate::job::{self, DeviceKind, Job, Policy};
use crate::print::count;
use hydra::base::{Error, Result};
use hydra::device::host::HostSpec;
use hydra::device::sim::CostModel;
use hydra::device::{DeviceSpec, calibrate_fleet, gpus, why_no_cuda, why_no_emulator};
use hydra::spill::{Baseline, HomeBudgets};
pub use memory::{free_memory_bytes, total_memory_bytes};
use profile::stated_cost;
use std::cell::RefCell;
use std::collections::BTreeSet;

/// The fraction of free memory that the host's store may take unless the job says otherwise.
pub const SHARE_OF_FREE_MEMORY: f64 = 0.8;

/// The most devices of a job: each takes part in every plan and choice.
const MOST_DEVICES: usize = 4096;

/// The rates of devices with `at_work` of them working at the same time.
struct Measured {
    specs: Vec<DeviceSpec>,
    at_work: usize,
    costs: Vec<CostModel>,
}

thread_local! {
    /// The measurements so far: all rates in one command come from one measurement, so that its results are comparable.
    static MEASURED: RefCell<Vec<Measured>> = const { RefCell::new(Vec::new()) };
}

/// The rates of `specs` with `at_work` of them working at the same time.
fn measured(specs: Vec<DeviceSpec>, at_work: usize) -> Result<Vec<CostModel>> {
    let before = MEASURED.with_borrow(|all| {
        let same = all.iter().find(|m| m.specs == specs && m.at_work == at_work);
        same.map(|measured| measured.costs.clone())
    });
    if let Some(costs) = before {
        return Ok(costs);
    }
    let costs = calibrate_fleet(&specs, at_work)?;
    MEASURED.with_borrow_mut(|all| all.push(Measured { specs, at_work, costs: costs.clone() }));
    Ok(costs)
}

/// One device of a job.
#[derive(Clone)]
pub struct MachineDevice {
    /// Its kind.
    pub kind: DeviceKind,
    /// The device that is started; for sim, which starts none, the host.
    pub spec: DeviceSpec,
    /// Measured or stated rates.
    pub cost: CostModel,
    /// Bytes of its memory; `None` means no limit.
    pub budget: Option<u64>,
}

/// What a job runs on.
#[derive(Clone)]
pub struct Machine {
    /// The devices, at least one.
    pub devices: Vec<MachineDevice>,
    /// Bytes of the host's store and of the disk tier.
    pub homes: HomeBudgets,
    /// Bytes per second that all links share.
    pub shared_bytes_per_sec: Option<f64>,
}

impl Machine {
    /// The first device.
    pub fn first(&self) -> &MachineDevice {
        &self.devices[0]
    }

    /// The number of devices in words, and the number of GPUs if several devices share one.
    pub fn devices_text(&self) -> String {
        let gpu = |device: &MachineDevice| match device.spec {
            DeviceSpec::Cuda { ordinal, .. } => Some(ordinal),
            _ => None,
        };
        let gpus: BTreeSet<usize> = self.devices.iter().filter_map(gpu).collect();
        let devices = count(self.devices.len(), "device");
        if self.devices.len() < 2 || gpus.is_empty() {
            devices
        } else {
            format!("{devices} on {}", count(gpus.len(), "GPU"))
        }
    }

    /// The cost model of each device.
    pub fn costs(&self) -> Vec<CostModel> {
        self.devices.iter().map(|d| d.cost.clone()).collect()
    }
}

/// Refuses devices that are not available, that cannot work together or, if the job `trains`, that cannot compute.
///
/// # Errors
/// [`Error::BadInput`] that names the key; [`Error::Device`] for a machine that lacks a GPU.
pub fn check_devices(file: &str, job: &Job, trains: bool) -> Result<()> {
    let count: usize = job.devices.iter().map(|d| d.count).sum();
    if count > MOST_DEVICES {
        return Err(Error::bad(format!("{file}: device: {count} devices, at most {MOST_DEVICES} make sense")));
    }
    for (i, device) in job.devices.iter().enumerate() {
        let fault = |what: &str| Err(Error::bad(format!("{file}: device.{i}.kind: {what}")));
        if device.kind != job.devices[0].kind {
            let (first, kind) = (job.devices[0].kind.word(), device.kind.word());
            return fault(&format!("\"{kind}\" does not work together with device.0's \"{first}\"; write one kind"));
        }
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
    }
    Ok(())
}

/// What is started for a device of a job; `ordinal` is the number of the machine's GPU that it uses.
pub fn device_spec(device: &job::Device, ordinal: usize) -> DeviceSpec {
    match device.kind {
        DeviceKind::Cuda => DeviceSpec::Cuda { ordinal, threads: None },
        // Runs in order, as a GPU of the Hopper generation.
        DeviceKind::Emulated => DeviceSpec::Emulated { arch: 90, seed: 0, threads: None },
        DeviceKind::Host | DeviceKind::Sim => {
            HostSpec { arena_bytes: 0, link_bytes_per_sec: device.link, threads: device.threads }.into()
        }
    }
}

/// The job's devices. Real ones without a stated profile are measured, as many at once as will work at the same time.
///
/// # Errors
/// When stated rates are invalid or rates cannot be measured.
pub fn machine(file: &str, job: &Job) -> Result<Machine> {
    let (mut devices, mut unmeasured) = (Vec::new(), Vec::new());
    // The n-th device uses GPU n modulo the number of GPUs.
    let gpus = if job.devices[0].kind == DeviceKind::Cuda { gpus().len().max(1) } else { 1 };
    for (i, device) in job.devices.iter().enumerate() {
        let measured = device.kind != DeviceKind::Sim && device.profile.is_none();
        let cost = if measured { CostModel::stated(1.0, 1.0, 1.0) } else { stated_cost(file, i, device)? };
        for _ in 0..device.count {
            let spec = device_spec(device, devices.len() % gpus);
            unmeasured.extend(measured.then_some(devices.len()));
            let one = MachineDevice { kind: device.kind, spec, cost: cost.clone(), budget: device.memory };
            devices.push((one, device.link));
        }
    }
    if !unmeasured.is_empty() {
        let specs: Vec<DeviceSpec> = unmeasured.iter().map(|&d| devices[d].0.spec.clone()).collect();
        let at_work = at_work(job.run.policy, job.models.len(), devices.len()).min(specs.len());
        for (d, cost) in unmeasured.into_iter().zip(measured(specs, at_work)?) {
            devices[d].0.cost = cost;
        }
    }
    let sim = job.devices[0].kind == DeviceKind::Sim;
    let linked = |(mut device, link): (MachineDevice, Option<f64>)| {
        if let Some(link) = link {
            let cost = &mut device.cost;
            cost.h2d_bytes_per_sec = if sim { link } else { cost.h2d_bytes_per_sec.min(link) };
            cost.d2h_bytes_per_sec = if sim { link } else { cost.d2h_bytes_per_sec.min(link) };
        }
        // No device has more than the link that all share.
        let most = job.host.link.unwrap_or(f64::INFINITY);
        device.cost.h2d_bytes_per_sec = device.cost.h2d_bytes_per_sec.min(most);
        device.cost.d2h_bytes_per_sec = device.cost.d2h_bytes_per_sec.min(most);
        let disk = job.host.disk.as_ref().and_then(|disk| disk.link);
        device.cost.disk_bytes_per_sec = disk.or(device.cost.disk_bytes_per_sec);
        device
    };
    let devices: Vec<MachineDevice> = devices.into_iter().map(linked).collect();
    let host_budget = match (job.host.memory, devices[0].kind) {
        (Some(bytes), _) => Some(bytes),
        (None, DeviceKind::Sim) => None,
        (None, _) => free_memory_bytes().map(|free| (free as f64 * SHARE_OF_FREE_MEMORY) as u64),
    };
    let homes = HomeBudgets { host: host_budget, disk: job.host.disk.as_ref().map_or(0, |disk| disk.memory) };
    Ok(Machine { devices, homes, shared_bytes_per_sec: job.host.link })
}

/// How many of `devices` compute at the same time, with this many models.
fn at_work(policy: Policy, models: usize, devices: usize) -> usize {
    match policy {
        Policy::Lines(Baseline::OneAtATime | Baseline::ModelParallel) => 1,
        Policy::Lines(Baseline::Gpipe) => devices,
        // A model runs on one device at a time.
        Policy::Turns(_) | Policy::Lines(Baseline::TaskParallel) => devices.min(models),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_on_how_many_gpus_devices_lie() {
        let text = |specs: &[DeviceSpec]| {
            let cost = CostModel::stated(1.0, 1.0, 1.0);
            let device = |spec: &DeviceSpec| MachineDevice {
                kind: DeviceKind::Cuda,
                spec: spec.clone(),
                cost: cost.clone(),
                budget: None,
            };
            let devices = specs.iter().map(device).collect();
            Machine { devices, homes: HomeBudgets::default(), shared_bytes_per_sec: None }.devices_text()
        };
        let gpu = |ordinal| DeviceSpec::Cuda { ordinal, threads: None };
        assert_eq!(text(&[gpu(0)]), "1 device");
        assert_eq!(text(&[gpu(0), gpu(0)]), "2 devices on 1 GPU");
        assert_eq!(text(&[gpu(0), gpu(1), gpu(0)]), "3 devices on 2 GPUs");
        assert_eq!(text(&[DeviceSpec::default(), DeviceSpec::default()]), "2 devices");
    }

    #[test]
    fn as_many_devices_are_at_work_as_there_are_models_unless_the_policy_says_otherwise() {
        let turns = [(1, 4, 1), (3, 4, 3), (5, 4, 4), (7, 1, 1)];
        for (models, devices, want) in turns {
            assert_eq!(at_work(Policy::Turns("sharded-lrtf"), models, devices), want);
            assert_eq!(at_work(Policy::Lines(Baseline::TaskParallel), models, devices), want);
            assert_eq!(at_work(Policy::Lines(Baseline::OneAtATime), models, devices), 1);
            assert_eq!(at_work(Policy::Lines(Baseline::ModelParallel), models, devices), 1);
            assert_eq!(at_work(Policy::Lines(Baseline::Gpipe), models, devices), devices);
        }
    }

    #[test]
    fn a_disks_rate_is_the_jobs_or_else_the_profiles() {
        let folder = tempfile::tempdir().unwrap();
        let cost = CostModel { disk_bytes_per_sec: Some(3e9), ..CostModel::stated(1e12, 1e11, 1e10) };
        std::fs::write(folder.path().join("fast.json"), serde_json::to_string(&cost).unwrap()).unwrap();
        let rate = |disk: &str| {
            let job = format!(
                "[[device]]\nkind = 'sim'\nprofile = 'fast.json'\n[host]\n{disk}\n[[model]]\nname = 'a'\n\
                 family = 'gpt2'\ndata = {{ random = true }}\nsteps = 3\n"
            );
            let path = folder.path().join("job.toml");
            std::fs::write(&path, job).unwrap();
            machine("job.toml", &Job::load(&path, &[]).unwrap()).unwrap().first().cost.disk_bytes_per_sec
        };
        assert_eq!(rate("disk = { path = 'spill', memory = '1 GiB' }"), Some(3e9));
        assert_eq!(rate("disk = { path = 'spill', memory = '1 GiB', link = '1 GB/s' }"), Some(1e9));
    }
}
