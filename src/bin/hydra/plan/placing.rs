//! Where the models of a job run, and how they share its devices: of the ways that the policy allows, the one that ends
//! soonest.

use crate::job::{DeviceKind, Job, Pipeline, Policy, Run};
use crate::machine::{Machine, MachineDevice};
use crate::setup::Prepared;
use hydra::base::{Error, Result};
use hydra::engine::{SimulateOptions, Simulation, plan_alone, simulate};
use hydra::sched::{self, LocalityLrtf, by_name};
use hydra::spill::{
    FleetDevice, FleetMap, FleetModel, FleetPlan, Home, Lined, Model, Placed, PlanOptions, find_homes, named,
    or_nominal, place_baseline, plan_fleet, plan_pipelined,
};
use hydra::trace::Recorder;
use std::sync::Arc;

/// Steps of the longest model over which ways are compared.
pub const COMPARED_STEPS: u64 = 24;

/// The least predicted gain for which a pipeline is used: predictions are no more precise.
const LEAST_GAIN: f64 = 0.1;

/// Fractions of the plans' memory in which plans are tried too, and the least predicted gain for using those.
const LESS_MEMORY: [u64; 2] = [2, 4];
const LEAST_GAIN_OF_LESS: f64 = 0.02;

/// Seconds of a microbatch in a unit below which passing it on costs too much, whatever a simulation predicts.
const LEAST_TASK_SECS: f64 = 2e-4;

/// Whether microbatches take long enough to be passed on.
pub fn is_worth_it(placed: &[Placed]) -> bool {
    placed.iter().all(|p| {
        let tasks = (2 * p.plan.shards.len() - 1) * p.model.microbatches;
        p.plan.estimated_secs >= tasks as f64 * LEAST_TASK_SECS
    })
}

/// How the models of a job share its devices.
#[derive(Clone, Debug, PartialEq)]
pub enum Sharing {
    /// One model on one device.
    Alone,
    /// Units go where the policy chooses; if that is locality-LRTF, it is this one.
    Turns(LocalityLrtf),
    /// Models run one after another in these lines.
    Lines(Vec<Vec<usize>>),
}

impl Sharing {
    /// The policy that chooses the next unit, where models take turns.
    pub fn policy(&self, run: &Run) -> Option<Box<dyn sched::Policy>> {
        match self {
            Sharing::Turns(policy) if run.policy == Policy::LOCALITY_LRTF => Some(Box::new(policy.clone())),
            Sharing::Turns(_) => by_name(run.policy.word(), run.seed),
            Sharing::Alone | Sharing::Lines(_) => None,
        }
    }

    /// Whether a unit may follow one on another device before the latter has ended.
    pub fn pipelines(&self) -> bool {
        matches!(self, Sharing::Turns(policy) if policy.pipelines)
    }
}

/// Models and where they run.
pub struct Placing {
    /// The models, by number.
    pub placed: Vec<Placed>,
    /// How they share the devices.
    pub sharing: Sharing,
    /// The smallest budget of every device that would work.
    pub smallest_device_bytes: u64,
}

impl Placing {
    /// Plans and places all models under the job's policy.
    ///
    /// # Errors
    /// When no plan fits the budgets.
    pub fn new(job: &Job, machine: &Machine, fleet: &[FleetModel]) -> Result<Placing> {
        let _held: Vec<_> = fleet.iter().map(|m| m.model.stand_ins()).collect();
        let devices: Vec<FleetDevice> =
            machine.devices.iter().map(|d| FleetDevice { budget: d.budget, cost: d.cost.clone() }).collect();
        if let Policy::Lines(baseline) = job.run.policy {
            return or_nominal(&devices, |devices| {
                let Lined { placed, lines, smallest_device_bytes } =
                    place_baseline(baseline, fleet, devices, plan_alone)?;
                Placing { placed, sharing: Sharing::Lines(lines), smallest_device_bytes }.checked(machine)
            });
        }
        let one_at_a_time = || match fleet {
            [model] => Placing::alone(machine, model),
            _ => Placing::by_turns(job, machine, fleet, &devices),
        };
        let may_pipeline = job.run.policy == Policy::LOCALITY_LRTF && job.run.pipeline != Pipeline::Never;
        let plan = if may_pipeline { plan_pipelined(fleet, &devices) } else { Ok(None) };
        let never = || match &plan {
            // A suggested budget must be useful: if no budget would fit, that is reported first.
            Err(Error::OutOfBudget { smallest_device_bytes, .. }) => {
                let budget = Some(*smallest_device_bytes);
                let enough: Vec<FleetDevice> = devices.iter().map(|d| FleetDevice { budget, ..d.clone() }).collect();
                matches!(plan_pipelined(fleet, &enough), Ok(None))
            }
            plan => matches!(plan, Ok(None)),
        };
        if job.run.pipeline == Pipeline::Always && never() {
            // The first model is in the job file itself, which also has the key.
            let file = &job.models[0].file;
            let what = "\"always\" wants a model with a microbatch below its batch that would end last; leave it out";
            return Err(Error::bad(format!("{file}: run.pipeline: {what}")));
        }
        // Plans that do not fit with fine units may fit without.
        let plan = plan.ok().flatten().filter(|plan| job.run.pipeline == Pipeline::Always || is_worth_it(&plan.placed));
        let Some(plan) = plan else { return one_at_a_time()?.checked(machine) };
        let fine = |plan: FleetPlan| {
            let sharing = Sharing::Turns(LocalityLrtf { pipelines: true, ..LocalityLrtf::default() });
            Placing { placed: plan.placed, sharing, smallest_device_bytes: plan.smallest_device_bytes }.checked(machine)
        };
        if job.run.pipeline == Pipeline::Always {
            let mut measured = Some(plan);
            return or_nominal(&devices, |devices| {
                let plan = measured.take().map_or_else(|| plan_pipelined(fleet, devices), |plan| Ok(Some(plan)));
                plan?.map_or_else(|| one_at_a_time()?.checked(machine), fine)
            });
        }
        let without = one_at_a_time()?.checked(machine)?;
        let Ok(pipelined) = fine(plan) else { return Ok(without) };
        let makespan_secs = |placing: &Placing| placing.simulated(job, machine, fleet).map(|s| s.makespan_secs);
        let ends_sooner = makespan_secs(&pipelined)? < (1.0 - LEAST_GAIN) * makespan_secs(&without)?;
        let smallest_device_bytes = pipelined.smallest_device_bytes.min(without.smallest_device_bytes);
        Ok(if ends_sooner { Placing { smallest_device_bytes, ..pipelined } } else { without })
    }

    /// Plans and places models that take turns. A plan for less memory also fits in more, and may be better there:
    /// plans are made for each model alone, and only a simulation shows how they do together.
    fn by_turns(job: &Job, machine: &Machine, fleet: &[FleetModel], devices: &[FleetDevice]) -> Result<Placing> {
        let within = |devices: &[FleetDevice]| {
            let FleetPlan { placed, smallest_device_bytes, .. } = plan_fleet(fleet, devices, machine.homes)?;
            Ok(Placing { placed, sharing: Sharing::Turns(LocalityLrtf::default()), smallest_device_bytes })
        };
        let mut best = within(devices)?;
        let simulated = best.simulated(job, machine, fleet)?;
        let mut secs = simulated.makespan_secs;
        let gains = |found: f64, secs: f64| found < (1.0 - LEAST_GAIN_OF_LESS) * secs;
        // Less memory does not mean less work.
        if !gains(simulated.bounds.secs, secs) {
            return Ok(best);
        }
        let used = FleetMap::new(&best.placed, devices.len()).arena_bytes;
        for part in LESS_MEMORY {
            let budget = |used: &u64| Some((*used / part).max(best.smallest_device_bytes));
            let less: Vec<FleetDevice> =
                devices.iter().zip(&used).map(|(d, used)| FleetDevice { budget: budget(used), ..d.clone() }).collect();
            let Ok(placing) = within(&less) else { continue };
            if find_homes(&placing.placed, machine.homes).is_err() {
                continue;
            }
            let found = placing.simulated(job, machine, fleet)?.makespan_secs;
            if gains(found, secs) {
                let smallest_device_bytes = best.smallest_device_bytes;
                (best, secs) = (Placing { smallest_device_bytes, ..placing }, found);
            }
        }
        Ok(best)
    }

    /// The placed models as a scenario to simulate.
    pub fn scenario<'a>(&'a self, job: &'a Job, machine: &'a Machine) -> Scenario<'a> {
        Scenario { placed: &self.placed, sharing: &self.sharing, run: &job.run, machine }
    }

    /// Simulates a part of all steps, to compare ways.
    fn simulated(&self, job: &Job, machine: &Machine, fleet: &[FleetModel]) -> Result<Simulation> {
        let steps: Vec<u64> = fleet.iter().map(|m| m.steps).collect();
        self.scenario(job, machine).simulate(fewer_steps(&steps, COMPARED_STEPS), None)
    }

    /// Assigns every model's home, on the disk where the host's store cannot hold everything, or refuses.
    fn checked(self, machine: &Machine) -> Result<Placing> {
        Ok(Placing { placed: find_homes(&self.placed, machine.homes)?, ..self })
    }

    /// One model on one device.
    fn alone(machine: &Machine, fleet_model: &FleetModel) -> Result<Placing> {
        let FleetModel { name, model, options, .. } = fleet_model;
        // Chooses the device with the most memory; among equals, the first.
        let wants = |d: &usize| machine.devices[*d].budget.unwrap_or(u64::MAX);
        let best = (0..machine.devices.len()).rev().max_by_key(wants).unwrap_or(0);
        let options =
            PlanOptions { device_budget: machine.devices[best].budget, homes: machine.homes, ..options.clone() };
        let plan = plan_alone(model, &options, &machine.devices[best].cost).map_err(|e| named(name, e))?;
        let smallest_device_bytes = plan.smallest_device_bytes;
        let home = Home::On(vec![best as u16; plan.shards.len()]);
        let placed = vec![Placed { home, ..Placed::alone(Arc::clone(model), plan) }];
        Ok(Placing { placed, sharing: Sharing::Alone, smallest_device_bytes })
    }
}

/// Fewer steps for each model, at most `most`, in the same proportions.
pub fn fewer_steps(steps: &[u64], most: u64) -> Vec<u64> {
    let longest = steps.iter().copied().max().unwrap_or(0).max(1);
    steps.iter().map(|steps| (steps * most.min(longest)).div_ceil(longest)).collect()
}

/// A model as input to the planner of a fleet.
pub fn fleet_model(prepared: &Prepared, model: &Arc<Model>) -> FleetModel {
    FleetModel {
        name: prepared.name.clone(),
        model: Arc::clone(model),
        options: PlanOptions { updates: prepared.options.updates(), ..prepared.options.plan.clone() },
        steps: prepared.options.steps,
    }
}

/// Units that a device has in its queue.
pub fn units(placed: &[Placed], run: &Run) -> usize {
    placed.iter().map(|p| p.plan.choice.slots).max().unwrap_or(1).min(run.slots.unwrap_or(2))
}

/// Bytes of each device's memory that extra weight slots may fill. Without a stated budget a real device provides only
/// what plans need; a simulated one has unlimited memory.
pub fn may_fill(machine: &Machine) -> Vec<Option<u64>> {
    let of = |d: &MachineDevice| d.budget.or((d.kind != DeviceKind::Sim).then_some(0));
    machine.devices.iter().map(of).collect()
}

/// Everything that a schedule depends on except the number of steps.
#[derive(Clone)]
pub struct Scenario<'a> {
    pub placed: &'a [Placed],
    pub sharing: &'a Sharing,
    pub run: &'a Run,
    pub machine: &'a Machine,
}

impl Scenario<'_> {
    /// Simulates `steps` steps of each model.
    ///
    /// # Errors
    /// When the schedule stalls, which is our own bug.
    pub fn simulate(&self, steps: Vec<u64>, recorder: Option<Recorder>) -> Result<Simulation> {
        let lines = match self.sharing {
            Sharing::Lines(lines) => lines.clone(),
            Sharing::Alone | Sharing::Turns { .. } => Vec::new(),
        };
        let options = SimulateOptions {
            shared_bytes_per_sec: self.machine.shared_bytes_per_sec,
            arena_bytes: FleetMap::within(self.placed, &may_fill(self.machine)).arena_bytes,
            policy: self.sharing.policy(self.run),
            units: units(self.placed, self.run),
            lines,
            recorder,
            ..SimulateOptions::new(steps, self.machine.costs())
        };
        simulate(self.placed, options)
    }

    /// Seconds of a steady step of every model, and a lower bound for any schedule of these plans.
    ///
    /// # Errors
    /// When the schedule stalls, which is our own bug.
    pub fn predict_step(&self) -> Result<(f64, f64)> {
        let steps = |n: u64| self.simulate(vec![n; self.placed.len()], None);
        let (first, third) = (steps(1)?, steps(3)?);
        // Without the time before the first step and after the last.
        let bound_secs = (third.bounds.secs - first.bounds.secs) / 2.0;
        Ok((((third.makespan_secs - first.makespan_secs) / 2.0).max(bound_secs), bound_secs))
    }
}
