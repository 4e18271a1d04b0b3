//! From a job to plans: the devices, the plan and the place of each model, and how they take turns.

use crate::job::{self, DeviceKind, Job, Policy};
use crate::setup::{Prepared, check_scope, prepare};
use hydra::base::{Error, Result, format_bytes};
use hydra::device::host::HostSpec;
use hydra::device::sim::{CostModel, PROFILES, Profile};
use hydra::device::{DeviceSpec, calibrate_fleet, why_no_cuda, why_no_emulator};
use hydra::engine::{Prediction, SimulateOptions, Simulation, predict, simulate};
use hydra::sched::by_name;
use hydra::spill::{
    Baseline, FleetDevice, FleetMap, FleetModel, Home, Model, Placed, Plan, check_host, place_baseline, plan_fleet,
};
use hydra::trace::{Bound, Recorder};
use hydra::train::{plan_model, trace_model};
use std::path::Path;
use std::sync::Arc;

/// Of the memory that is free, the part that the host's store may take unless the job says otherwise.
const SHARE_OF_FREE_MEMORY: f64 = 0.8;

/// One device of a job.
#[derive(Clone)]
pub struct MachineDevice {
    /// Its kind.
    pub kind: DeviceKind,
    /// What is started; for sim, which starts none, the host.
    pub spec: DeviceSpec,
    /// Measured or stated rates.
    pub cost: CostModel,
    /// Bytes of its memory; `None` is no limit.
    pub budget: Option<u64>,
}

/// What a job runs on.
pub struct Machine {
    /// The devices, at least one.
    pub devices: Vec<MachineDevice>,
    /// Bytes of the host's store; `None` is no limit.
    pub host_budget: Option<u64>,
    /// Bytes per second that all links share.
    pub shared_bytes_per_sec: Option<f64>,
}

impl Machine {
    /// The first device.
    pub fn first(&self) -> &MachineDevice {
        &self.devices[0]
    }

    /// What each device costs.
    pub fn costs(&self) -> Vec<CostModel> {
        self.devices.iter().map(|d| d.cost.clone()).collect()
    }
}

/// A model with its plan.
pub struct Planned {
    /// What was planned.
    pub prepared: Prepared,
    /// Its graphs, its plan and where it runs.
    pub placed: Placed,
    /// What a step takes, alone.
    pub prediction: Prediction,
}

impl Planned {
    /// Its graphs.
    pub fn model(&self) -> &Arc<Model> {
        &self.placed.model
    }

    /// Its plan.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.placed.plan
    }
}

/// How the models of a job share its devices.
#[derive(Clone, Debug, PartialEq)]
pub enum Sharing {
    /// One model on one device.
    Alone,
    /// Units go where the policy wants them.
    Turns,
    /// Models run one after another in these lines.
    Lines(Vec<Vec<usize>>),
}

/// A job with its plans.
pub struct PlannedJob {
    /// The job.
    pub job: Job,
    /// What it runs on.
    pub machine: Machine,
    /// Its models, in the file's order.
    pub models: Vec<Planned>,
    /// How they share the devices.
    pub sharing: Sharing,
    /// The smallest budget of every device that would work.
    pub smallest_device_bytes: u64,
    /// Bytes of each device's arena, and of the host's store.
    pub map: FleetMap,
    /// A steady step of every model: seconds, and those that no schedule of these plans can beat.
    pub step_secs: f64,
    pub bound_secs: f64,
}

/// Reads and plans the job at `path`. `trains`: a device that cannot compute is refused.
///
/// # Errors
/// When the job or what it names is at fault, or no plan fits the budgets.
pub fn plan_job(path: &Path, sets: &[String], trains: bool) -> Result<PlannedJob> {
    let job = Job::load(path, sets)?;
    let file = path.display().to_string();
    check_scope(&file, &job)?;
    check_devices(&file, &job, trains)?;
    let prepared = (0..job.models.len()).map(|i| prepare(&file, &job, i)).collect::<Result<Vec<_>>>()?;
    // Graphs before rates: what a network refuses is said before a second goes into measuring.
    let traced = trace_all(&file, &job, prepared)?;
    let machine = machine(&file, &job)?;
    let (placed, sharing, smallest_device_bytes) = place(&job, &machine, &traced)?;
    check_host(&placed, machine.devices.len(), machine.host_budget)?;
    let map = FleetMap::new(&placed, machine.devices.len());
    let mut models = Vec::new();
    for ((prepared, _), placed) in traced.into_iter().zip(placed) {
        let prediction = predict_alone(&placed, &machine, prepared.options.clip.is_some())?;
        models.push(Planned { prepared, placed, prediction });
    }
    let mut planned =
        PlannedJob { job, machine, models, sharing, smallest_device_bytes, map, step_secs: 0.0, bound_secs: 0.0 };
    planned.predict_step()?;
    Ok(planned)
}

/// Traces every model; equal ones share a graph.
fn trace_all(file: &str, job: &Job, prepared: Vec<Prepared>) -> Result<Vec<(Prepared, Arc<Model>)>> {
    let spec = device_spec(&job.devices[0], 0);
    let mut traced: Vec<(Prepared, Arc<Model>)> = Vec::new();
    for (i, mut prepared) in prepared.into_iter().enumerate() {
        prepared.options.device = spec.clone();
        let same = |j: &usize| {
            let (a, b) = (&job.models[*j], &job.models[i]);
            let sizes = |m: &job::Model| (m.batch, m.microbatch, m.dtype.clone());
            let inputs = traced[*j].0.inputs == prepared.inputs;
            let microbatch = traced[*j].0.options.microbatch == prepared.options.microbatch;
            a.source == b.source && sizes(a) == sizes(b) && microbatch && inputs
        };
        let model = match (0..i).find(same) {
            Some(twin) => Arc::clone(&traced[twin].1),
            None => {
                let model = trace_model(prepared.network(), &prepared.inputs, &prepared.options);
                let at = &job.models[i].at;
                Arc::new(model.map_err(|e| Error::bad(format!("{file}: {at}: {e}")))?)
            }
        };
        traced.push((prepared, model));
    }
    Ok(traced)
}

/// Plans and places all models as the job's policy has it.
fn place(job: &Job, machine: &Machine, traced: &[(Prepared, Arc<Model>)]) -> Result<(Vec<Placed>, Sharing, u64)> {
    let fleet: Vec<FleetModel> = traced
        .iter()
        .map(|(prepared, model)| FleetModel {
            name: prepared.name.clone(),
            model: Arc::clone(model),
            options: hydra::spill::PlanOptions {
                moments: prepared.options.optimizer.moments(),
                clips: prepared.options.clip.is_some(),
                ..prepared.options.plan.clone()
            },
            steps: prepared.options.steps,
        })
        .collect();
    let devices: Vec<FleetDevice> =
        machine.devices.iter().map(|d| FleetDevice { budget: d.budget, cost: d.cost.clone() }).collect();
    if let Some(baseline) = Baseline::by_name(job.run.policy.word()) {
        let lined = place_baseline(baseline, &fleet, &devices)?;
        let smallest = lined.placed.iter().map(|p| p.plan.smallest_device_bytes).max().unwrap_or(0);
        return Ok((lined.placed, Sharing::Lines(lined.lines), smallest));
    }
    if let [(prepared, model)] = traced {
        // A model runs on one device at a time, so it may as well be the one with the most memory, of equals the first.
        let wants = |d: &usize| machine.devices[*d].budget.unwrap_or(u64::MAX);
        let best = (0..devices.len()).rev().max_by_key(wants).unwrap_or(0);
        let mut options = prepared.options.clone();
        options.plan.device_budget = machine.devices[best].budget;
        options.plan.host_budget = machine.host_budget;
        let plan = plan_model(model, &options, &machine.devices[best].cost);
        let plan = Arc::new(plan.map_err(|e| hydra::spill::named(&prepared.name, e))?);
        let smallest = plan.smallest_device_bytes;
        let home = Home::On(vec![best as u16; plan.shards.len()]);
        let placed = vec![Placed { home, ..Placed::alone(Arc::clone(model), plan) }];
        return Ok((placed, Sharing::Alone, smallest));
    }
    let plan = plan_fleet(&fleet, &devices, machine.host_budget)?;
    Ok((plan.placed, Sharing::Turns, plan.smallest_device_bytes))
}

/// What a step of a model takes with the devices to itself.
fn predict_alone(placed: &Placed, machine: &Machine, clip: bool) -> Result<Prediction> {
    let alone = matches!(&placed.home, Home::On(devices) if devices.iter().all(|d| *d == devices[0]));
    if alone {
        let Home::On(devices) = &placed.home else { unreachable!("matched just above") };
        return predict(&placed.model, &placed.plan, &machine.devices[usize::from(devices[0])].cost, clip);
    }
    /// Steps that are run, the first of which is left out of the average.
    const STEPS: u64 = 4;
    let run = |steps: u64| {
        let policy = (placed.home == Home::Anywhere).then(|| by_name("sharded-lrtf", 0)).flatten();
        let options = SimulateOptions {
            steps: vec![steps],
            clips: vec![clip],
            costs: machine.costs(),
            shared_bytes_per_sec: machine.shared_bytes_per_sec,
            policy,
            units: placed.plan.choice.slots,
            lines: Vec::new(),
            recorder: None,
        };
        simulate(std::slice::from_ref(placed), options)
    };
    let (first, all) = (run(1)?, run(STEPS)?);
    let step_secs = (all.makespan_secs - first.makespan_secs) / (STEPS - 1) as f64;
    let busiest = |s: &Simulation| s.sums.iter().map(|s| s.busy_secs).fold(0.0, f64::max);
    let compute = all.utilisation.iter().sum::<f64>() * all.makespan_secs / STEPS as f64;
    let bound = Bound { compute: compute.min(step_secs), idle: (step_secs - compute).max(0.0), ..Bound::default() };
    Ok(Prediction { step_secs, bound_secs: busiest(&all) / STEPS as f64, bound })
}

fn check_devices(file: &str, job: &Job, trains: bool) -> Result<()> {
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

/// The rates of a sim device.
fn stated_cost(file: &str, i: usize, device: &job::Device) -> Result<CostModel> {
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
        return serde_json::from_str(&text)
            .map_err(|e| fault(format!("{}: is no profile of `hydra devices --profile`: {e}", path.display())));
    }
    let names = PROFILES.map(|p| p.name);
    let hint = hydra::base::nearest(profile, names).map_or(String::new(), |near| format!("; did you mean \"{near}\"?"));
    let known = names.join(", ");
    Err(fault(format!("\"{profile}\" is not known, only {known}, and files that end in .json{hint}")))
}

/// What is started for the `n`-th device of a job.
fn device_spec(device: &job::Device, ordinal: usize) -> DeviceSpec {
    match device.kind {
        DeviceKind::Cuda => DeviceSpec::Cuda { ordinal, threads: None },
        // In order, as a GPU of the Hopper generation.
        DeviceKind::Emulated => DeviceSpec::Emulated { arch: 90, seed: 0, threads: None },
        DeviceKind::Host | DeviceKind::Sim => {
            HostSpec { arena_bytes: 0, link_bytes_per_sec: device.link, threads: device.threads }.into()
        }
    }
}

/// The job's devices, measured where they are real, as many at once as will be at work.
fn machine(file: &str, job: &Job) -> Result<Machine> {
    let mut devices = Vec::new();
    for (i, device) in job.devices.iter().enumerate() {
        // What a real device does is measured below.
        let cost = match device.kind {
            DeviceKind::Sim => stated_cost(file, i, device)?,
            _ => CostModel::stated(1.0, 1.0, 1.0),
        };
        let one = MachineDevice { kind: device.kind, spec: device_spec(device, 0), cost, budget: device.memory };
        devices.extend(std::iter::repeat_n((one, device.link), device.count));
    }
    // All are of one kind, as `check_devices` has seen to.
    if job.devices[0].kind != DeviceKind::Sim {
        let specs: Vec<DeviceSpec> = devices.iter().map(|(d, _)| d.spec.clone()).collect();
        let costs = calibrate_fleet(&specs, at_work(job.run.policy, job.models.len(), specs.len()))?;
        devices.iter_mut().zip(costs).for_each(|((device, _), cost)| device.cost = cost);
    }
    let sim = job.devices[0].kind == DeviceKind::Sim;
    let linked = |(mut device, link): (MachineDevice, Option<f64>)| {
        if let Some(link) = link {
            let cost = &mut device.cost;
            cost.h2d_bytes_per_sec = if sim { link } else { cost.h2d_bytes_per_sec.min(link) };
            cost.d2h_bytes_per_sec = if sim { link } else { cost.d2h_bytes_per_sec.min(link) };
        }
        device
    };
    let devices: Vec<MachineDevice> = devices.into_iter().map(linked).collect();
    let host_budget = match (job.host.memory, devices[0].kind) {
        (Some(bytes), _) => Some(bytes),
        (None, DeviceKind::Sim) => None,
        (None, _) => free_memory_bytes().map(|free| (free as f64 * SHARE_OF_FREE_MEMORY) as u64),
    };
    Ok(Machine { devices, host_budget, shared_bytes_per_sec: job.host.link })
}

/// Devices that compute at the same time, of so many, with so many models.
fn at_work(policy: Policy, models: usize, devices: usize) -> usize {
    match policy {
        Policy::OneAtATime | Policy::ModelParallel => 1,
        Policy::Gpipe => devices,
        // A model runs on one device at a time.
        _ => devices.min(models),
    }
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

impl PlannedJob {
    /// All models where they are placed.
    pub fn placed(&self) -> Vec<Placed> {
        self.models.iter().map(|m| m.placed.clone()).collect()
    }

    /// Units that a device has in its queue.
    pub fn units(&self) -> usize {
        self.models.iter().map(|m| m.plan().choice.slots).max().unwrap_or(1).min(self.job.run.slots.unwrap_or(2))
    }

    /// Simulates the job with so many steps of each model.
    ///
    /// # Errors
    /// When the schedule stalls: our own bug.
    pub fn simulate(&self, steps: Vec<u64>, recorder: Option<Recorder>) -> Result<Simulation> {
        let policy = match self.sharing {
            Sharing::Turns => by_name(self.job.run.policy.word(), self.job.run.seed),
            Sharing::Alone | Sharing::Lines(_) => None,
        };
        let lines = match &self.sharing {
            Sharing::Lines(lines) => lines.clone(),
            Sharing::Alone | Sharing::Turns => Vec::new(),
        };
        let options = SimulateOptions {
            steps,
            clips: self.models.iter().map(|m| m.prepared.options.clip.is_some()).collect(),
            costs: self.machine.costs(),
            shared_bytes_per_sec: self.machine.shared_bytes_per_sec,
            policy,
            units: self.units(),
            lines,
            recorder,
        };
        simulate(&self.placed(), options)
    }

    /// Predicts one step of every model.
    fn predict_step(&mut self) -> Result<()> {
        if self.sharing == Sharing::Alone {
            let prediction = &self.models[0].prediction;
            (self.step_secs, self.bound_secs) = (prediction.step_secs, prediction.bound_secs);
            return Ok(());
        }
        let steps = |n: u64| vec![n; self.models.len()];
        let (first, third) = (self.simulate(steps(1), None)?, self.simulate(steps(3), None)?);
        let bound_secs = third.bounds.secs / 3.0;
        self.step_secs = ((third.makespan_secs - first.makespan_secs) / 2.0).max(bound_secs);
        self.bound_secs = bound_secs;
        Ok(())
    }

    /// Devices that will have nothing to do for want of models, and why; empty where there are none.
    pub fn idle_devices(&self) -> Option<String> {
        let (models, devices) = (self.models.len(), self.machine.devices.len());
        let used = |d: u16| {
            self.models.iter().any(|m| match &m.placed.home {
                Home::Anywhere => true,
                Home::On(homes) => homes.contains(&d),
            })
        };
        let unused = (0..devices as u16).filter(|&d| !used(d)).count();
        let spare = if self.sharing == Sharing::Turns { devices.saturating_sub(models).max(unused) } else { unused };
        if spare == 0 {
            return None;
        }
        let why = match self.sharing {
            Sharing::Alone | Sharing::Turns if models < devices => "a model runs on one device at a time",
            Sharing::Lines(_) if self.job.run.policy == Policy::OneAtATime => {
                "one-at-a-time uses the first device alone"
            }
            _ => "every model is at home on another",
        };
        let count = |n: usize, what: &str| if n == 1 { format!("{n} {what}") } else { format!("{n} {what}s") };
        Some(format!("{} of {devices} idle at any time: {} and {why}", count(spare, "device"), count(models, "model")))
    }

    /// What of memory a run takes: arenas that lie in the machine's own memory, and the host's store.
    pub fn wants_bytes(&self) -> u64 {
        let arenas: u64 = match self.machine.first().kind {
            DeviceKind::Host | DeviceKind::Emulated => self.map.arena_bytes.iter().sum(),
            DeviceKind::Cuda | DeviceKind::Sim => 0,
        };
        arenas + self.map.host_bytes
    }

    /// Bytes as people read them, of the largest arena and of the store.
    pub fn memory_text(&self) -> String {
        let most = self.map.arena_bytes.iter().copied().max().unwrap_or(0);
        format!("device memory {}, host memory {}", format_bytes(most), format_bytes(self.map.host_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_devices_are_at_work_as_there_are_models_unless_the_policy_says_otherwise() {
        let turns = [(1, 4, 1), (3, 4, 3), (5, 4, 4), (7, 1, 1)];
        for (models, devices, want) in turns {
            assert_eq!(at_work(Policy::ShardedLrtf, models, devices), want);
            assert_eq!(at_work(Policy::TaskParallel, models, devices), want);
            assert_eq!(at_work(Policy::OneAtATime, models, devices), 1);
            assert_eq!(at_work(Policy::ModelParallel, models, devices), 1);
            assert_eq!(at_work(Policy::Gpipe, models, devices), devices);
        }
    }
}
