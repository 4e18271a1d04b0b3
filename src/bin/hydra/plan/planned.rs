//! From a job to plans: the devices, the plan and the place of each model, and how they take turns.

use crate::job::{self, DeviceKind, Job};
use crate::machine::{Machine, check_devices, device_spec, machine};
use crate::plan::placing::{self, Placing, Scenario, Sharing, fleet_model};
use crate::plan::rehearsal::rehearse_turns;
use crate::print::warn;
use crate::setup::recipe::Sources;
use crate::setup::{Prepared, check_scope, prepare};
use crate::text::Texts;
use hydra::base::{Error, Result};
use hydra::device::DiskSpec;
use hydra::engine::{Prediction, SimulateOptions, Simulation, busiest, predict, simulate};
use hydra::sched::{LocalityLrtf, Policy, Rehearsal};
use hydra::spill::{FleetMap, FleetModel, Home, Model, Placed, Plan};
use hydra::trace::{Bound, Recorder};
use hydra::train::{ModelToTrain, Schedule, trace_model};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// A model with its plan.
pub struct Planned {
    /// The model as it was prepared.
    pub prepared: Prepared,
    /// Its graphs, its plan and where it runs.
    pub placed: Placed,
    /// The prediction of a step when it runs alone.
    pub prediction: Prediction,
}

impl Planned {
    /// Its graphs.
    pub fn model(&self) -> &Arc<Model> {
        &self.placed.model
    }

    /// The model with its data, to be trained.
    pub fn fleet_model(&self, sources: Sources) -> ModelToTrain<'_> {
        ModelToTrain {
            weights: self.prepared.weights(),
            placed: self.placed.clone(),
            source: sources.train,
            valid: sources.valid,
            options: self.prepared.options.clone(),
        }
    }

    /// Its plan.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.placed.plan
    }
}

/// A job with its plans.
pub struct PlannedJob {
    /// The job.
    pub job: Job,
    /// The texts that its models read.
    pub texts: Rc<Texts>,
    /// What it runs on.
    pub machine: Machine,
    /// Its models, in the file's order, followed by models that were added later.
    pub models: Vec<Rc<Planned>>,
    /// How they share the devices.
    pub sharing: Sharing,
    /// The result of rehearsals of that, for a simulation.
    pub rehearsal: Option<Rehearsal>,
    /// The smallest budget of every device that would work.
    pub smallest_device_bytes: u64,
    /// Bytes of each device's arena, and of the host's store.
    pub map: FleetMap,
    /// Seconds of a steady step of every model, and a lower bound for any schedule of these plans.
    pub step_secs: f64,
    pub bound_secs: f64,
}

/// Reads and plans the job at `path`, to look at it or to simulate it.
///
/// # Errors
/// When the job or a file that it names is faulty, or no plan fits the budgets.
pub fn plan_job(path: &Path, sets: &[String], texts: &Rc<Texts>) -> Result<PlannedJob> {
    plan_loaded(path, Job::load(path, sets)?, texts, false)
}

/// Plans a job that was read from `path`. With `trains`, a device that cannot compute is refused.
///
/// # Errors
/// As [`plan_job`].
pub fn plan_loaded(path: &Path, job: Job, texts: &Rc<Texts>, trains: bool) -> Result<PlannedJob> {
    let file = path.display().to_string();
    check_scope(&file, &job)?;
    check_devices(&file, &job, trains)?;
    let prepared = (0..job.models.len()).map(|i| prepare(&job, i, texts)).collect::<Result<Vec<_>>>()?;
    // Graphs before rates, so that a network's errors are reported before a second is spent on measuring.
    let mut traced: Vec<(Prepared, Arc<Model>)> = Vec::new();
    for prepared in prepared {
        let before: Vec<_> = traced.iter().map(|(p, m)| (p, m)).collect();
        let next = trace(&job, prepared, &before)?;
        traced.push(next);
    }
    let machine = machine(&file, &job)?;
    let fleet: Vec<FleetModel> = traced.iter().map(|(prepared, model)| fleet_model(prepared, model)).collect();
    let Placing { placed, sharing, smallest_device_bytes } = Placing::new(&job, &machine, &fleet)?;
    let map = FleetMap::within(&placed, &placing::may_fill(&machine));
    let mut models = Vec::new();
    for ((prepared, _), placed) in traced.into_iter().zip(placed) {
        let alike = |m: &&Rc<Planned>| Arc::ptr_eq(&m.placed.plan, &placed.plan) && m.placed.home == placed.home;
        let prediction = match models.iter().find(alike) {
            Some(twin) => twin.prediction,
            None => predict_alone(&placed, &sharing, &machine, &map.arena_bytes)?,
        };
        models.push(Rc::new(Planned { prepared, placed, prediction }));
    }
    let mut planned = PlannedJob {
        job,
        texts: Rc::clone(texts),
        machine,
        models,
        sharing,
        rehearsal: None,
        smallest_device_bytes,
        map,
        step_secs: 0.0,
        bound_secs: 0.0,
    };
    planned.predict_step()?;
    Ok(planned)
}

/// Prints a line for each model after the first `from` whose learning rate would still rise when it ends, and so never
/// reaches the peak that was asked for.
pub fn warn_of_warmups(job: &Job, from: usize, models: &[Rc<Planned>]) {
    for (model, planned) in job.models[from..].iter().zip(models) {
        let options = &planned.prepared.options;
        let (Schedule::Linear { warmup, .. } | Schedule::Cosine { warmup, .. }) = options.schedule else { continue };
        if warmup > options.steps {
            let (place, steps) = (model.place("schedule.warmup"), options.steps);
            let file = &model.file;
            warn(format!("{file}: {place}: {warmup} steps of warm-up are more than all {steps} steps"));
        }
    }
}

/// Traces a model of a job, after the models `before`; identical models share a graph.
///
/// # Errors
/// When the network does not take the data, or the microbatch does not divide the batch.
pub fn trace(job: &Job, mut prepared: Prepared, before: &[(&Prepared, &Arc<Model>)]) -> Result<(Prepared, Arc<Model>)> {
    prepared.options.device = device_spec(&job.devices[0], 0);
    let b = &job.models[before.len()];
    let same = |j: &usize| {
        let (a, twin) = (&job.models[*j], before[*j].0);
        let sizes = |m: &job::Model| (m.batch, m.microbatch, m.loss_rows, m.dtype);
        let (one, other) = (&twin.options, &prepared.options);
        let traced_alike =
            one.microbatch == other.microbatch && (&one.frozen, &one.low_rank) == (&other.frozen, &other.low_rank);
        // Networks of the same family and config differ if the vocabulary comes from the data.
        let labels = twin.network().labels() == prepared.network().labels();
        a.source == b.source && labels && sizes(a) == sizes(b) && traced_alike && twin.inputs == prepared.inputs
    };
    let model = match (0..before.len()).find(same) {
        Some(twin) => Arc::clone(before[twin].1),
        None => {
            let model = trace_model(prepared.network(), &prepared.inputs, &prepared.options);
            Arc::new(model.map_err(|e| Error::bad(format!("{}: {}: {e}", b.file, b.at)))?)
        }
    };
    Ok((prepared, model))
}

/// Predicts a step of a model that has the devices to itself.
///
/// # Errors
/// When the schedule stalls: our own bug.
pub fn predict_alone(placed: &Placed, sharing: &Sharing, machine: &Machine, arena_bytes: &[u64]) -> Result<Prediction> {
    if let Home::On(devices) = &placed.home
        && devices.iter().all(|d| *d == devices[0])
    {
        return predict(&placed.model, &placed.plan, &machine.devices[usize::from(devices[0])].cost);
    }
    /// Number of simulated steps; the first is left out of every average.
    const STEPS: u64 = 4;
    let run = |steps: u64| {
        let pipelines = sharing.pipelines();
        let moves = placed.home == Home::Anywhere;
        let policy = moves.then(|| Box::new(LocalityLrtf { pipelines, ..LocalityLrtf::default() }) as Box<dyn Policy>);
        let options = SimulateOptions {
            shared_bytes_per_sec: machine.shared_bytes_per_sec,
            arena_bytes: arena_bytes.to_vec(),
            policy,
            units: placed.plan.choice.slots,
            ..SimulateOptions::new(vec![steps], machine.costs())
        };
        simulate(std::slice::from_ref(placed), options)
    };
    let (first, all) = (run(1)?, run(STEPS)?);
    // One-time costs, such as the first loads of state that then stays, are in both.
    let of_a_step = |all: f64, first: f64| (all - first) / (STEPS - 1) as f64;
    let lanes = all.sums.iter().zip(&first.sums);
    let (busiest, bound_secs) = busiest(lanes.map(|(a, f)| (a.lane, of_a_step(a.busy_secs, f.busy_secs))));
    let step_secs = of_a_step(all.makespan_secs, first.makespan_secs).max(bound_secs);
    let arithmetic = |of: &Simulation| of.utilisation.iter().sum::<f64>() * of.makespan_secs;
    let compute = of_a_step(arithmetic(&all), arithmetic(&first));
    let bound = Bound { compute: compute.min(step_secs), idle: (step_secs - compute).max(0.0), ..Bound::default() };
    Ok(Prediction { step_secs, bound_secs, busiest, bound })
}

impl PlannedJob {
    /// All models, as they are placed.
    pub fn placed(&self) -> Vec<Placed> {
        self.models.iter().map(|m| m.placed.clone()).collect()
    }

    /// Units that a device has in its queue.
    pub fn units(&self) -> usize {
        placing::units(&self.placed(), &self.job.run)
    }

    /// Simulates the job with `steps` steps of each model.
    ///
    /// # Errors
    /// When the schedule stalls: our own bug.
    pub fn simulate(&self, steps: Vec<u64>, recorder: Option<Recorder>) -> Result<Simulation> {
        self.scenario(&self.placed()).simulate(steps, recorder)
    }

    /// The models `placed`, as a fleet of their own.
    fn scenario<'a>(&'a self, placed: &'a [Placed]) -> Scenario<'a> {
        Scenario { placed, sharing: &self.sharing, run: &self.job.run, machine: &self.machine }
    }

    /// Finds how the models numbered `active`, as a fleet of their own, best take turns over `steps` steps each; `None`
    /// where nothing is gained.
    ///
    /// # Errors
    /// When the schedule stalls: our own bug.
    pub fn rehearse(&self, active: &[usize], steps: &[u64]) -> Result<Option<Rehearsal>> {
        let placed: Vec<Placed> = active.iter().map(|&m| self.models[m].placed.clone()).collect();
        rehearse_turns(&self.scenario(&placed), steps)
    }

    /// Predicts one step of every model.
    ///
    /// # Errors
    /// When the schedule stalls: our own bug.
    pub fn predict_step(&mut self) -> Result<()> {
        if self.sharing == Sharing::Alone {
            let prediction = &self.models[0].prediction;
            (self.step_secs, self.bound_secs) = (prediction.step_secs, prediction.bound_secs);
            return Ok(());
        }
        let (step_secs, bound_secs) = self.scenario(&self.placed()).predict_step()?;
        // Nor can they beat the bound of a single model that has its lanes to itself under any schedule.
        let stays = |m: &&Rc<Planned>| self.machine.devices.len() == 1 || m.placed.home != Home::Anywhere;
        let alone = self.models.iter().filter(stays).map(|m| m.prediction.bound_secs);
        self.bound_secs = alone.fold(bound_secs, f64::max);
        self.step_secs = step_secs.max(self.bound_secs);
        Ok(())
    }

    /// The disk tier, if the plan, or models added later, may put anything there.
    pub fn disk(&self) -> Option<DiskSpec> {
        let disk = self.job.host.disk.as_ref()?;
        let grows = matches!(self.sharing, Sharing::Turns(_));
        let spec = || DiskSpec { path: disk.path.clone(), bytes: self.map.disk_bytes, bytes_per_sec: disk.link };
        (self.map.disk_bytes > 0 || grows).then(spec)
    }

    /// Bytes of host memory that a run takes: arenas in the machine's own memory, and the host's store.
    pub fn wants_bytes(&self) -> u64 {
        let arenas: u64 = match self.machine.first().kind {
            DeviceKind::Host | DeviceKind::Emulated => self.map.arena_bytes.iter().sum(),
            DeviceKind::Cuda | DeviceKind::Sim => 0,
        };
        arenas + self.map.host_bytes
    }
}
