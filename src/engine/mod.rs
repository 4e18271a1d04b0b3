//! The executor: one event loop that issues the steps of models to the lanes of devices. Written once, against
//! [`Device`].
//!
//! A step is a chain of units. Each is expanded into tasks (`visit`, `settle`) with the bytes that they read and write;
//! what a task waits for follows from those bytes (`hazards`), and what each lane gets next from deadlines (`queue`).
//! Where a model's shards have their own devices a step is expanded at once; where several models share devices, a unit
//! is expanded when a policy gives it to a device (`turns`). The loop waits in one place, for the next completion, and
//! never for longer than the watchdog's patience.

mod alone;
mod bounds;
mod clipped;
mod disk;
mod fault;
mod fetch;
mod hazards;
mod join;
mod member;
mod microbatch;
mod misfit;
mod queue;
mod rings;
mod run;
mod settle;
mod simulate;
mod site;
mod state;
mod tables;
mod turns;
mod unit_cost;
mod update;
mod visit;

pub use alone::plan_alone;
pub use bounds::bounds_of;
pub(crate) use simulate::check_lines;
pub use simulate::{Prediction, SimulateOptions, Simulation, busiest, predict, simulate};
pub use state::Stored;
pub use turns::TurnOptions;

use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::{Attached, Device, UpdateRule};
use crate::sched::MOST_MODELS;
use crate::spill::{FleetMap, Home, Model, Placed, Plan};
use crate::trace::{Bound, LaneSum, Recorder, TaskName};
use member::Member;
use queue::Queue;
use rings::Rings;
use std::fmt;
use std::sync::Arc;
use turns::Turns;

/// Refuses more models than have a number each.
///
/// # Errors
/// [`Error::BadInput`] that names how many do.
pub(crate) fn check_count(models: usize) -> Result<()> {
    let refused = || Error::bad(format!("{models} models; at most {MOST_MODELS} can run together"));
    if models > MOST_MODELS { Err(refused()) } else { Ok(()) }
}

/// How a model runs.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The run's seed, for dropout.
    pub seed: u64,
    /// Seconds without any completion after which the run ends with who waits for whom.
    pub patience_secs: f64,
    /// Whether weight decay applies to a parameter, by its index.
    pub decays: Vec<bool>,
    /// Steps in all, from which policies take what remains.
    pub steps: u64,
}

impl EngineOptions {
    /// Decay on every parameter, a minute of patience.
    pub fn new(seed: u64, model: &Model) -> Self {
        EngineOptions { seed, patience_secs: 60.0, decays: vec![true; model.train.parameters.len()], steps: 0 }
    }
}

/// One training step to run.
#[derive(Clone, Debug)]
pub struct StepInput<'a> {
    /// Step, from 0.
    pub step: u64,
    /// The minibatch's tensors, in the order of the graph's inputs; microbatches follow each other.
    pub inputs: Vec<&'a [u8]>,
    /// 1 over the number of labelled positions in the minibatch.
    pub loss_scale: f64,
    /// The optimizer's numbers.
    pub rule: UpdateRule,
    /// Greatest global norm of the gradient, if it is clipped.
    pub clip: Option<f64>,
}

/// What a step gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// The step, from 0.
    pub step: u64,
    /// The minibatch's loss.
    pub loss: f32,
    /// The gradient's global norm before clipping.
    pub grad_norm: f64,
    /// Seconds since the step before ended.
    pub secs: f64,
    /// Those seconds by what bound them; what the model waited for others is idle.
    pub bound: Bound,
}

/// What has come to its end.
#[derive(Debug)]
pub enum Ended {
    /// The oldest step in flight of this model.
    Step(usize, StepResult),
    /// An evaluation of this model, with its loss.
    Evaluation(usize, f32),
    /// This model, before its time; the others go on.
    Model(usize, Error),
}

/// What a device is at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceState {
    /// The arithmetic that runs; nothing while the device waits.
    pub runs: Option<TaskName>,
    /// The unit after that, whose tensors are on their way.
    pub next: Option<TaskName>,
    /// Seconds of arithmetic since the start.
    pub busy_secs: f64,
}

/// Numbers of the lanes that serve a device.
#[derive(Clone, Copy, Debug)]
struct Lanes {
    compute: u16,
    h2d: u16,
    d2h: u16,
    host: u16,
    disk: Option<DiskLanes>,
}

/// Numbers of the disk tier's lanes.
#[derive(Clone, Copy, Debug)]
struct DiskLanes {
    read: u16,
    write: u16,
}

/// Stand for the step in tasks of evaluations, by turns: the one even, the other odd, like the staging memory and the
/// results that they use.
const EVALUATIONS: [u64; 2] = [u64::MAX - 1, u64::MAX - 2];
/// Stands for it in tasks that belong to no step.
const NO_STEP: u64 = u64::MAX;

/// Runs models on devices.
pub struct Engine {
    device: Attached,
    members: Vec<Member>,
    queue: Queue,
    /// Slots: a model's own on a device where it is at home, and on each device those that the others share.
    rings: Vec<Rings>,
    /// The latter's numbers among them, by device.
    shared_rings: Vec<Option<usize>>,
    /// By device.
    lanes: Vec<Lanes>,
    /// With several models on the devices, who is next.
    turns: Option<Turns>,
    recorder: Option<Recorder>,
    /// What ran on each lane since the start.
    totals: Vec<LaneSum>,
    /// Compute tasks created so far.
    sequence: u64,
    /// Set when a device fails; nothing runs after it.
    failed: bool,
    patience_secs: f64,
}

impl Engine {
    /// An engine for one model on device 0 of `device`, whose arena and store are at least as large as the plan's maps.
    ///
    /// # Panics
    /// As [`Engine::fleet`].
    pub fn new(model: Arc<Model>, plan: Arc<Plan>, device: Box<dyn Device>, options: EngineOptions) -> Engine {
        Engine::fleet(&[Placed::alone(model, plan)], vec![options], device, None)
    }

    /// An engine for several models on the devices of `device`, whose arenas and store are at least as large as
    /// [`FleetMap::new`] says. With `turns`, whose arenas are filled as [`FleetMap::within`] does, units go to devices
    /// one by one, as a policy chooses; without, every model must be at home on devices, and its steps run in the order
    /// in which they are begun.
    ///
    /// # Panics
    /// When there are not as many options as models, nor as many [`EngineOptions::decays`] as parameters; when a model
    /// without a home has no turns to take, one is at home on a device that is not there, or turns are of other
    /// devices; when a device's arena or the store is too small: bugs of the caller's. That a plan is its model's is
    /// taken on trust.
    pub fn fleet(
        models: &[Placed],
        options: Vec<EngineOptions>,
        device: Box<dyn Device>,
        turns: Option<TurnOptions>,
    ) -> Engine {
        Engine::try_fleet(models, options, device, turns).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`Engine::fleet`], with an error where that panics.
    pub(crate) fn try_fleet(
        models: &[Placed],
        options: Vec<EngineOptions>,
        device: Box<dyn Device>,
        turns: Option<TurnOptions>,
    ) -> Result<Engine> {
        let lanes = lanes_of(device.lanes());
        misfit::check_fleet(models, &options, turns.as_ref(), lanes.len())?;
        let map = match &turns {
            Some(turns) => turns.map(models),
            None => FleetMap::new(models, lanes.len()),
        };
        misfit::check_memory(device.as_ref(), &map)?;
        let mut rings = Vec::new();
        let mut shared: Vec<Option<usize>> = vec![None; lanes.len()];
        let mut members = Vec::new();
        let homes = map.stores.into_iter().zip(map.disks);
        for (((placed, options), maps), home) in models.iter().zip(options).zip(map.maps).zip(homes) {
            let of_device = |(d, map): (usize, &crate::spill::ArenaMap)| {
                let mut make = || {
                    rings.push(Rings::new(map, placed.home == Home::Anywhere));
                    rings.len() - 1
                };
                if placed.home == Home::Anywhere { *shared[d].get_or_insert_with(make) } else { make() }
            };
            let ring_of = maps.iter().enumerate().map(of_device).collect();
            let maps = maps.into_iter().map(Arc::new).collect();
            members.push(Member::new(placed, maps, ring_of, home, device.lanes(), options));
        }
        Ok(Engine {
            queue: Queue::new(device.lanes()),
            rings,
            shared_rings: shared,
            turns: turns.map(|options| Turns::new(options, &members, device.lanes())),
            lanes,
            recorder: None,
            totals: device.lanes().iter().map(|&lane| LaneSum::new(lane)).collect(),
            sequence: 0,
            failed: false,
            patience_secs: members.iter().map(|m| m.options.patience_secs).fold(0.0, f64::max),
            device: Attached::new(device),
            members,
        })
    }

    /// Sends events to `recorder` from now on.
    pub fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
    }

    /// Takes the recorder back, to finish it.
    pub fn take_recorder(&mut self) -> Option<Recorder> {
        self.recorder.take()
    }

    /// How many models there are.
    pub fn models(&self) -> usize {
        self.members.len()
    }

    /// The plan that it runs for a model.
    pub fn plan(&self, model: usize) -> &Plan {
        &self.members[model].plan
    }

    /// A model that it runs.
    pub fn model(&self, model: usize) -> &Arc<Model> {
        &self.members[model].model
    }

    /// The lanes of the devices.
    pub fn lanes(&self) -> &[LaneId] {
        self.device.lanes()
    }

    /// Now, on the devices' clock, in seconds.
    pub fn now_secs(&self) -> f64 {
        self.device.now_secs()
    }

    /// Busy seconds, bytes and flops of each lane since the start.
    pub fn lane_sums(&self) -> &[LaneSum] {
        &self.totals
    }

    /// What each lane has done for a model in its step that was waited for last; a task counts in the step in which it
    /// ended.
    pub fn step_lane_sums(&self, model: usize) -> &[LaneSum] {
        self.members[model].account.sums()
    }

    /// What each device is at.
    pub fn device_states(&self) -> impl Iterator<Item = DeviceState> + '_ {
        self.lanes.iter().map(|lanes| {
            let (runs, next) = self.queue.ahead(lanes.compute);
            DeviceState { runs, next, busy_secs: self.totals[usize::from(lanes.compute)].busy_secs }
        })
    }

    /// The highest byte of a device's arena that any task has touched, plus one.
    pub fn high_water_bytes(&self, device: u16) -> u64 {
        self.device.high_water_bytes(device)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Engine { members, lanes, failed, .. } = self;
        let (models, devices) = (members.len(), lanes.len());
        let mut shown = f.debug_struct("Engine");
        shown.field("models", &models).field("devices", &devices).field("failed", failed).finish_non_exhaustive()
    }
}

/// The lanes of each device. The host's arithmetic has a lane for each device, or one for all.
fn lanes_of(lanes: &[LaneId]) -> Vec<Lanes> {
    let find = |id: LaneId| lanes.iter().position(|&l| l == id).map(|i| i as u16);
    let lane = |id| find(id).expect("every device has the three lanes, and the host one for arithmetic");
    let devices = lanes.iter().filter(|l| !l.is_host()).map(|l| l.device + 1).max().unwrap_or(0);
    let disk = find(LaneId::host(LaneKind::DiskRead)).zip(find(LaneId::host(LaneKind::DiskWrite)));
    let disk = disk.map(|(read, write)| DiskLanes { read, write });
    let of = |d: u16| Lanes {
        disk,
        compute: lane(LaneId::device(d, LaneKind::Compute)),
        h2d: lane(LaneId::device(d, LaneKind::HostToDevice)),
        d2h: lane(LaneId::device(d, LaneKind::DeviceToHost)),
        host: find(LaneId::device(d, LaneKind::HostMath)).unwrap_or_else(|| lane(LaneId::host(LaneKind::HostMath))),
    };
    (0..devices).map(of).collect()
}
