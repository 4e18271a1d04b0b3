//! The executor: one event loop that issues the steps of models to the lanes of devices. Written once, against [`Device`].
//!
//! A step is a chain of units. Each is expanded into tasks (`visit`, `settle`) with the bytes that they read and write; what a task waits for
//! follows from those bytes (`hazards`), and what each lane gets next from deadlines (`queue`). Where a model's shards have their own devices
//! a step is expanded at once; where several models share devices, a unit is expanded when a policy gives it to a device (`turns`). The loop
//! waits in one place, for the next completion, and never for longer than the watchdog's patience.

mod fault;
mod hazards;
mod member;
mod queue;
mod rings;
mod settle;
mod simulate;
mod state;
mod tables;
mod turns;
mod unit_cost;
mod visit;
pub use simulate::{Prediction, SimulateOptions, Simulation, bounds_of, predict, simulate};
pub use state::Stored;
pub use turns::TurnOptions;

use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::{Device, UpdateRule};
use crate::spill::{FleetMap, Home, Model, Placed, Plan};
use crate::trace::{Bound, Event, LaneSum, Recorder, StepAccount, TaskName, What};
use member::{Ending, Member, Pending, Purpose};
use queue::Queue;
use rings::Rings;
use std::sync::Arc;
use turns::Turns;

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
    /// Which.
    pub step: u64,
    /// The minibatch's loss.
    pub loss: f32,
    /// The gradient's global norm before clipping.
    pub grad_norm: f64,
    /// Seconds since the step before ended.
    pub secs: f64,
    /// Those seconds by what bound them; with several models on the devices, those of the model's own arithmetic, and the rest idle.
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
}

/// Stands for the step in tasks of an evaluation; even, like the results that it uses.
const EVALUATION: u64 = u64::MAX - 1;
/// Stands for it in tasks that belong to no step.
const NO_STEP: u64 = u64::MAX;

/// Runs models on devices.
pub struct Engine {
    device: Box<dyn Device>,
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
    /// Where the time of a step went, when one model is alone.
    account: StepAccount,
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
    pub fn new(model: Arc<Model>, plan: Arc<Plan>, device: Box<dyn Device>, options: EngineOptions) -> Engine {
        Engine::fleet(&[Placed::alone(model, plan)], vec![options], device, None)
    }

    /// An engine for several models on the devices of `device`, whose arenas and store are at least as large as [`FleetMap::new`] says. With
    /// `turns`, whose arenas are filled as [`FleetMap::within`] does, units go to devices one by one, as a policy chooses; without, every model must be at home on devices, and its steps run in the order in
    /// which they are begun.
    ///
    /// # Panics
    /// When a model without a home has no turns to take: our own bug.
    pub fn fleet(
        models: &[Placed],
        options: Vec<EngineOptions>,
        device: Box<dyn Device>,
        turns: Option<TurnOptions>,
    ) -> Engine {
        assert!(turns.is_some() || models.iter().all(|m| m.home != Home::Anywhere), "somebody has to choose a device");
        let lanes = lanes_of(device.as_ref());
        let map = match &turns {
            Some(turns) => turns.map(models),
            None => FleetMap::new(models, lanes.len()),
        };
        let mut rings = Vec::new();
        let mut shared: Vec<Option<usize>> = vec![None; lanes.len()];
        let mut members = Vec::new();
        for (((placed, options), maps), store) in models.iter().zip(options).zip(map.maps).zip(map.stores) {
            let of_device = |(d, map): (usize, &crate::spill::ArenaMap)| {
                let mut make = || {
                    rings.push(Rings::new(map, placed.home == Home::Anywhere));
                    rings.len() - 1
                };
                if placed.home == Home::Anywhere { *shared[d].get_or_insert_with(make) } else { make() }
            };
            let ring_of = maps.iter().enumerate().map(of_device).collect();
            members.push(Member::new(placed, maps.into_iter().map(Arc::new).collect(), ring_of, store, options));
        }
        // The three units of a shard, with their copies, for every microbatch, twice over for two steps in flight.
        let events = |m: &Member| 16 * m.plan.shards.len() * (m.model.microbatches + 2);
        let alone = members.len() == 1 && lanes.len() == 1;
        let account = StepAccount::new(device.lanes(), if alone { events(&members[0]) } else { 0 });
        Engine {
            queue: Queue::new(device.lanes()),
            rings,
            shared_rings: shared,
            turns: turns.map(|options| Turns::new(options, &members, device.lanes())),
            lanes,
            account,
            recorder: None,
            totals: device.lanes().iter().map(|&lane| LaneSum::new(lane)).collect(),
            sequence: 0,
            failed: false,
            patience_secs: members.iter().map(|m| m.options.patience_secs).fold(0.0, f64::max),
            device,
            members,
        }
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

    /// The same in the step that was waited for last; a task counts in the step in which it ended. One model on one device alone.
    pub fn step_lane_sums(&self) -> &[LaneSum] {
        self.account.sums()
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

    /// A model's steps that were begun and not waited for.
    pub fn steps_in_flight(&self, model: usize) -> usize {
        self.members[model].pending.len()
    }

    /// Queues a training step of a model; at most two may be in flight. Copies the inputs and returns without waiting.
    ///
    /// # Errors
    /// When the run or the model has failed before, two steps are in flight already, or the inputs' sizes are not the graph's.
    pub fn begin_step(&mut self, model: usize, input: &StepInput) -> Result<()> {
        self.check_running(model)?;
        if self.members[model].pending.len() >= 2 {
            return Err(Error::bad(format!("step {}: two steps are in flight already", input.step)));
        }
        self.stage(model, input.step, &input.inputs)?;
        let purpose = Purpose::Step { rule: input.rule, clip: input.clip };
        let member = &mut self.members[model];
        (member.last_begun, member.has_begun) = (input.step, true);
        self.begin(model, purpose, input.step, input.loss_scale)
    }

    /// Queues an evaluation of one minibatch of a model: the sum over labelled positions times `loss_scale`. Nothing else of the model may be in
    /// flight. Copies the inputs and returns without waiting.
    ///
    /// # Errors
    /// As [`Engine::begin_step`]; and when the model has no evaluation graph.
    pub fn begin_evaluation(&mut self, model: usize, inputs: &[&[u8]], loss_scale: f64) -> Result<()> {
        self.check_running(model)?;
        let member = &self.members[model];
        if member.model.eval.is_none() || !member.pending.is_empty() {
            return Err(Error::bad("an evaluation needs an evaluation graph, and no step in flight"));
        }
        self.stage(model, EVALUATION, inputs)?;
        self.begin(model, Purpose::Evaluation, EVALUATION, loss_scale)
    }

    fn begin(&mut self, model: usize, purpose: Purpose, step: u64, loss_scale: f64) -> Result<()> {
        self.members[model].begin(purpose, step, loss_scale);
        match &mut self.turns {
            Some(turns) => {
                turns.refresh(model, &self.members[model]);
                turns.has_begun = true;
            }
            None => {
                let before = self.queue.next_id();
                while self.members[model].next_work().is_some() {
                    self.expand_at_home(model);
                }
                // Two steps may be in flight, with all of their tasks.
                let tasks = self.queue.next_id() - before;
                self.queue.reserve(2 * tasks as usize * self.members.len());
            }
        }
        self.queue.issue(self.device.as_mut());
        Ok(())
    }

    /// Waits for a model's oldest step in flight to end.
    ///
    /// # Errors
    /// When a task fails or stalls, or the loss is not finite (the message names the first layer whose output is not).
    pub fn wait_step(&mut self, model: usize) -> Result<StepResult> {
        loop {
            match self.ended(model) {
                Some(Ended::Step(_, result)) => return Ok(result),
                Some(Ended::Model(_, error)) => return Err(error),
                Some(Ended::Evaluation(..)) => return Err(Error::bad("wait_step: an evaluation is in flight")),
                None if self.members[model].pending.is_empty() => {
                    return Err(Error::bad("wait_step: no step is in flight"));
                }
                None => self.pump().map(drop)?,
            }
        }
    }

    /// Waits for whatever ends next: a step, an evaluation, or a model before its time.
    ///
    /// # Errors
    /// When a device fails or stalls, or nothing is in flight.
    pub fn wait_any(&mut self) -> Result<Ended> {
        self.wait_any_watched(&mut |_| ())
    }

    /// The same; `watch` is called after every task that has ended meanwhile.
    ///
    /// # Errors
    /// As [`Engine::wait_any`].
    pub fn wait_any_watched(&mut self, watch: &mut dyn FnMut(&Engine)) -> Result<Ended> {
        // What ended while somebody waited for another model is told first.
        for model in 0..self.members.len() {
            if let Some(ended) = self.ended(model) {
                return Ok(ended);
            }
        }
        loop {
            let model = self.pump()?;
            watch(self);
            if let Some(ended) = self.ended(model) {
                return Ok(ended);
            }
        }
    }

    /// Takes what has ended of a model: its oldest work, or the model itself.
    fn ended(&mut self, model: usize) -> Option<Ended> {
        let member = &mut self.members[model];
        // Steps that ended before it come first.
        if !member.pending.front().is_some_and(|p| p.is_over() && !p.void && p.purpose != Purpose::Check) {
            return member.why.take().map(|error| Ended::Model(model, error));
        }
        let done = member.pending.pop_front()?;
        if let Some(turns) = &mut self.turns {
            turns.refresh(model, member);
        }
        match done.purpose {
            Purpose::Step { .. } => Some(Ended::Step(model, self.step_result(model, &done))),
            Purpose::Evaluation => Some(Ended::Evaluation(model, self.read_loss(model, EVALUATION))),
            // Its end was told as the model's.
            Purpose::Check => None,
        }
    }

    fn step_result(&mut self, model: usize, done: &Pending) -> StepResult {
        let began = self.members[model].last_step_end;
        let secs = done.last_end - began;
        let bound = if self.is_alone() {
            self.account.finish_step(began, done.last_end)
        } else {
            let compute = done.compute_secs.min(secs);
            Bound { compute, idle: secs - compute, ..Bound::default() }
        };
        self.members[model].last_step_end = done.last_end;
        let loss = done.loss.expect("a step's last tasks come after its loss");
        StepResult { step: done.step, loss, grad_norm: self.grad_norm(model, done.step), secs, bound }
    }

    fn is_alone(&self) -> bool {
        self.members.len() == 1 && self.lanes.len() == 1
    }

    /// Waits until nothing is left to run.
    ///
    /// # Errors
    /// As [`Engine::wait_any`].
    pub fn wait_idle(&mut self) -> Result<()> {
        self.offer()?;
        while !self.queue.is_empty() {
            self.pump()?;
        }
        self.check_device()
    }

    fn check_device(&self) -> Result<()> {
        if self.failed { Err(Error::Device("the run has failed before".into())) } else { Ok(()) }
    }

    /// Runs the evaluation graph of a model on one minibatch, waits for it, and gives its loss.
    ///
    /// # Errors
    /// As [`Engine::begin_evaluation`] and [`Engine::wait_step`].
    pub fn wait_evaluation(&mut self, model: usize, inputs: &[&[u8]], loss_scale: f64) -> Result<f32> {
        self.begin_evaluation(model, inputs, loss_scale)?;
        loop {
            match self.ended(model) {
                Some(Ended::Evaluation(_, loss)) => return Ok(loss),
                Some(Ended::Model(_, error)) => return Err(error),
                _ => self.pump().map(drop)?,
            }
        }
    }

    /// Runs an evaluation graph that ends in logits on one microbatch, waits for it, and gives the logits.
    ///
    /// # Errors
    /// As [`Engine::wait_evaluation`].
    pub fn wait_logits(&mut self, model: usize, inputs: &[&[u8]]) -> Result<Vec<f32>> {
        self.wait_evaluation(model, inputs, 1.0)?;
        Ok(self.read_logits(model))
    }

    /// Time spent outside a model's steps (validation, a checkpoint) is left out of its next step's seconds.
    pub fn skip_time(&mut self, model: usize) {
        self.members[model].last_step_end = self.device.now_secs();
    }

    /// Refuses to go on after a failure.
    fn check_running(&self, model: usize) -> Result<()> {
        match self.failed || self.members[model].over || self.members[model].ending.is_some() {
            true => Err(Error::Device("the run has failed before".into())),
            false => Ok(()),
        }
    }

    /// Offers what has begun to devices with room. Not before somebody waits: a choice between all models is another one than between those
    /// that happened to begin first.
    fn offer(&mut self) -> Result<()> {
        let has_begun = self.turns.as_mut().is_some_and(|turns| std::mem::take(&mut turns.has_begun));
        if has_begun { self.take_turns() } else { Ok(()) }
    }

    /// Issues what can be issued and takes one completion; gives the model whose task it was.
    fn pump(&mut self) -> Result<usize> {
        self.check_device()?;
        self.offer()?;
        self.queue.issue(self.device.as_mut());
        let Some(completion) = self.device.next_completion(self.patience_secs) else {
            self.failed = true;
            return Err(self.stalled());
        };
        if let Err(error) = completion.result {
            self.failed = true;
            return Err(error);
        }
        let finished = self.queue.complete(completion.ticket, completion.end_secs);
        let model = usize::from(finished.name.model);
        let event = Event {
            lane: finished.lane,
            name: finished.name,
            step: finished.step.min(self.members[model].last_begun) as u32,
            start_secs: completion.start_secs,
            end_secs: completion.end_secs,
            bytes: finished.bytes,
            flops: finished.flops,
            ticket: finished.event,
            after: finished.after,
        };
        if self.is_alone() {
            self.account.add(&event);
        }
        let total = &mut self.totals[completion.ticket.lane as usize];
        total.tasks += 1;
        total.busy_secs += event.secs();
        total.bytes += event.bytes;
        total.flops += event.flops;
        if let Some(recorder) = &mut self.recorder {
            recorder.record(&event);
        }
        if let (Some(turns), LaneKind::Compute) = (&mut self.turns, event.lane.kind) {
            turns.task_ended(&event, finished.ends_unit, &self.members[model]);
        }
        self.task_ended(model, finished.serial, &event, completion.not_finite_layer)?;
        if self.turns.is_some() && finished.ends_unit {
            self.take_turns()?;
        }
        Ok(model)
    }

    /// Books a task's end under the work that it belongs to.
    fn task_ended(&mut self, model: usize, serial: u64, event: &Event, not_finite: Option<usize>) -> Result<()> {
        let member = &mut self.members[model];
        // Shards run microbatch by microbatch, so a later one may name an earlier layer.
        member.not_finite_layer = member.not_finite_layer.into_iter().chain(not_finite).min();
        match member.pending.iter().position(|p| p.serial == serial) {
            None => member.loose_tasks -= 1,
            Some(at) => {
                let pending = &mut member.pending[at];
                pending.tasks -= 1;
                pending.last_end = event.end_secs.max(pending.last_end);
                if event.lane.kind == LaneKind::Compute {
                    pending.compute_secs += event.secs();
                }
                let step = pending.step;
                let first = event.name.what == What::Result && pending.loss.is_none();
                if first && matches!(pending.purpose, Purpose::Step { .. }) {
                    let loss = self.read_loss(model, step);
                    self.members[model].pending[at].loss = Some(loss);
                    if self.device.computes() && !loss.is_finite() {
                        self.end_early(model, Ending::NotFinite { step, loss });
                    }
                }
            }
        }
        self.go_on_ending(model)
    }

    fn stalled(&self) -> Error {
        let waiting = self.turns.as_ref().map_or(String::new(), |turns| turns.describe());
        let what = if self.queue.is_empty() && self.turns.is_some() { "nothing runs" } else { "nothing has ended" };
        Error::Device(format!(
            "stalled: {what} for {} s; who waits for whom:{}{waiting}",
            self.patience_secs,
            self.queue.describe_stall()
        ))
    }
}

/// The lanes of each device. The host's arithmetic has a lane for each device, or one for all.
fn lanes_of(device: &dyn Device) -> Vec<Lanes> {
    let find = |id: LaneId| device.lanes().iter().position(|&l| l == id).map(|i| i as u16);
    let lane = |id| find(id).expect("every device has the three lanes, and the host one for arithmetic");
    let devices = device.lanes().iter().filter(|l| !l.is_host()).map(|l| l.device + 1).max().unwrap_or(0);
    let of = |d: u16| Lanes {
        compute: lane(LaneId::device(d, LaneKind::Compute)),
        h2d: lane(LaneId::device(d, LaneKind::HostToDevice)),
        d2h: lane(LaneId::device(d, LaneKind::DeviceToHost)),
        host: find(LaneId::device(d, LaneKind::HostMath)).unwrap_or_else(|| lane(LaneId::host(LaneKind::HostMath))),
    };
    (0..devices).map(of).collect()
}
