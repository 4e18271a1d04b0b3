//! The executor: one event loop that issues a step's tasks to lanes. Written once, against [`Device`].
//!
//! A step is expanded unit by unit into tasks (`visit`), each with the bytes it reads and writes; what a task waits for follows from
//! those bytes (`hazards`), and what each lane gets next from deadlines (`queue`). The loop waits in one place, for the next completion,
//! and never for longer than the watchdog's patience.

mod hazards;
mod queue;
mod rings;
mod settle;
mod state;
mod tables;
mod visit;
pub use state::Stored;

use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::sim::{CostModel, SimDevice};
use crate::device::{Device, UpdateRule};
use crate::spill::{Model, Plan};
use crate::trace::{Bound, Event, LaneSum, Recorder, StepAccount, What};
use queue::Queue;
use rings::Rings;
use std::collections::VecDeque;
use std::sync::Arc;

/// How an engine runs.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The run's seed, for dropout.
    pub seed: u64,
    /// The model's number in events.
    pub model: u16,
    /// Seconds without any completion after which the run ends with who waits for whom.
    pub patience_secs: f64,
    /// Whether weight decay applies to a parameter, by its index.
    pub decays: Vec<bool>,
}

impl EngineOptions {
    /// Decay on every parameter, a minute of patience.
    pub fn new(seed: u64, model: &Model) -> Self {
        EngineOptions { seed, model: 0, patience_secs: 60.0, decays: vec![true; model.train.parameters.len()] }
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
    /// Those seconds by what bound them.
    pub bound: Bound,
}

/// What one step of a plan takes on a simulated device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds of a steady step.
    pub step_secs: f64,
    /// Busy seconds of the busiest lane: what no overlap can beat.
    pub bound_secs: f64,
    /// Seconds of the step by what bound them.
    pub bound: Bound,
}

/// A step that is not finished.
#[derive(Clone, Debug)]
struct Pending {
    step: u64,
    tasks: u64,
    loss: Option<f32>,
    last_end: f64,
}

/// Runs one model's plan on a device.
pub struct Engine {
    device: Box<dyn Device>,
    model: Arc<Model>,
    plan: Arc<Plan>,
    options: EngineOptions,
    queue: Queue,
    rings: Rings,
    lanes: Lanes,
    visits: tables::Tables,
    pending: VecDeque<Pending>,
    account: StepAccount,
    recorder: Option<Recorder>,
    /// What ran on each lane since the start.
    totals: Vec<LaneSum>,
    /// Compute tasks created so far.
    sequence: u64,
    last_step_end: f64,
    /// The step begun last: tasks that belong to no step, an evaluation's or the state's on its way home, are recorded under it.
    last_begun: u64,
    /// Set by the first failure; nothing runs after it.
    failed: bool,
    /// With [`Engine::find_not_finite`]: the first such layer so far.
    not_finite_layer: Option<usize>,
}

/// Stands for the step in tasks of an evaluation; even, like the results that it uses.
const EVALUATION: u64 = u64::MAX - 1;

/// Numbers of the lanes that a model on one device uses.
#[derive(Clone, Copy, Debug)]
struct Lanes {
    compute: u16,
    h2d: u16,
    d2h: u16,
    host: u16,
}

impl Engine {
    /// An engine for `plan` on device 0 of `device`, whose arena and store are at least as large as the plan's maps.
    pub fn new(model: Arc<Model>, plan: Arc<Plan>, device: Box<dyn Device>, options: EngineOptions) -> Engine {
        let lane = |id: LaneId| {
            let found = device.lanes().iter().position(|&l| l == id);
            found.expect("every device has the three lanes, and the host one for arithmetic") as u16
        };
        let lanes = Lanes {
            compute: lane(LaneId::device(0, LaneKind::Compute)),
            h2d: lane(LaneId::device(0, LaneKind::HostToDevice)),
            d2h: lane(LaneId::device(0, LaneKind::DeviceToHost)),
            host: lane(LaneId::host(LaneKind::HostMath)),
        };
        let queue = Queue::new(device.lanes());
        // The three units of a shard, with their copies, for every microbatch, twice over for two steps in flight.
        let events = 16 * plan.shards.len() * (model.microbatches + 2);
        let account = StepAccount::new(device.lanes(), events);
        Engine {
            queue,
            rings: Rings::new(&plan, model.microbatches),
            visits: tables::Tables::new(&model, &plan, &options),
            lanes,
            pending: VecDeque::with_capacity(4),
            account,
            recorder: None,
            totals: device.lanes().iter().map(|&lane| LaneSum::new(lane)).collect(),
            sequence: 0,
            last_step_end: 0.0,
            last_begun: 0,
            failed: false,
            not_finite_layer: None,
            device,
            model,
            plan,
            options,
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

    /// The plan that it runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The model that it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Busy seconds, bytes and flops of each lane since the start.
    pub fn lane_sums(&self) -> &[LaneSum] {
        &self.totals
    }

    /// The same in the step that was waited for last; a task counts in the step in which it ended.
    pub fn step_lane_sums(&self) -> &[LaneSum] {
        self.account.sums()
    }

    /// The highest byte of the arena that any task has touched, plus one.
    pub fn high_water_bytes(&self) -> u64 {
        self.device.high_water_bytes(0)
    }

    /// Steps that were begun and not waited for.
    pub fn steps_in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Queues a training step; at most two may be in flight. Copies the inputs and returns without waiting.
    ///
    /// # Errors
    /// When the run has failed before, two steps are in flight already, or the inputs' sizes are not the graph's.
    pub fn begin_step(&mut self, input: &StepInput) -> Result<()> {
        self.check_running()?;
        if self.pending.len() >= 2 {
            return Err(Error::bad(format!("step {}: two steps are in flight already", input.step)));
        }
        self.stage(input.step, &input.inputs)?;
        self.last_begun = input.step;
        let before = self.queue.next_id();
        self.expand_step(input);
        let tasks = self.queue.next_id() - before;
        // Two steps may be in flight, with all of their tasks.
        self.queue.reserve(2 * tasks as usize);
        self.pending.push_back(Pending { step: input.step, tasks, loss: None, last_end: 0.0 });
        self.queue.issue(self.device.as_mut());
        Ok(())
    }

    /// Waits for the oldest step in flight to end.
    ///
    /// # Errors
    /// When a task fails or stalls, or the loss is not finite (the message names the first layer whose output is not).
    pub fn wait_step(&mut self) -> Result<StepResult> {
        loop {
            let Some(front) = self.pending.front() else { return Err(Error::bad("wait_step: no step is in flight")) };
            if front.tasks == 0 {
                let Pending { step, loss, last_end, .. } = self.pending.pop_front().expect("looked at just above");
                let loss = loss.expect("a step's last tasks come after its loss");
                let bound = self.account.finish_step(self.last_step_end, last_end);
                let secs = last_end - self.last_step_end;
                self.last_step_end = last_end;
                return Ok(StepResult { step, loss, grad_norm: self.grad_norm(step), secs, bound });
            }
            self.pump()?;
        }
    }

    /// Waits until nothing is left to run.
    ///
    /// # Errors
    /// As [`Engine::wait_step`].
    pub fn wait_idle(&mut self) -> Result<()> {
        while !self.queue.is_empty() {
            self.pump()?;
        }
        self.check_running()
    }

    /// Runs the evaluation graph on one minibatch, waits for it, and gives its loss: the sum over labelled positions times
    /// `loss_scale`. No step may be in flight.
    ///
    /// # Errors
    /// As [`Engine::wait_step`]; and when the model has no evaluation graph.
    pub fn wait_evaluation(&mut self, inputs: &[&[u8]], loss_scale: f64) -> Result<f32> {
        self.evaluate(inputs, loss_scale)?;
        Ok(self.read_loss(EVALUATION))
    }

    /// Runs an evaluation graph that ends in logits on one microbatch, waits for it, and gives the logits.
    ///
    /// # Errors
    /// As [`Engine::wait_evaluation`].
    pub fn wait_logits(&mut self, inputs: &[&[u8]]) -> Result<Vec<f32>> {
        self.evaluate(inputs, 1.0)?;
        Ok(self.read_logits())
    }

    fn evaluate(&mut self, inputs: &[&[u8]], loss_scale: f64) -> Result<()> {
        if self.model.eval.is_none() || !self.pending.is_empty() {
            return Err(Error::bad("an evaluation needs an evaluation graph, and no step in flight"));
        }
        self.wait_idle()?;
        self.stage(EVALUATION, inputs)?;
        self.expand_evaluation(EVALUATION, loss_scale);
        self.wait_idle()
    }

    /// Time spent outside steps (validation, a checkpoint) is left out of the next step's seconds.
    pub fn skip_time(&mut self) {
        self.last_step_end = self.device.now_secs();
    }

    /// Refuses to go on after a failure.
    fn check_running(&self) -> Result<()> {
        if self.failed { Err(Error::Device("the run has failed before".into())) } else { Ok(()) }
    }

    /// Issues what can be issued and takes one completion.
    fn pump(&mut self) -> Result<()> {
        self.check_running()?;
        self.queue.issue(self.device.as_mut());
        let Some(completion) = self.device.next_completion(self.options.patience_secs) else {
            self.failed = true;
            return Err(Error::Device(format!(
                "stalled: nothing has ended for {} s; who waits for whom:{}",
                self.options.patience_secs,
                self.queue.describe_stall()
            )));
        };
        if let Err(error) = completion.result {
            self.failed = true;
            return Err(error);
        }
        let finished = self.queue.complete(completion.ticket, completion.end_secs);
        let event = Event {
            lane: finished.lane,
            name: finished.name,
            step: finished.step.min(self.last_begun) as u32,
            start_secs: completion.start_secs,
            end_secs: completion.end_secs,
            bytes: finished.bytes,
            flops: finished.flops,
            ticket: finished.event,
            after: finished.after,
        };
        self.account.add(&event);
        let total = &mut self.totals[completion.ticket.lane as usize];
        total.tasks += 1;
        total.busy_secs += event.secs();
        total.bytes += event.bytes;
        total.flops += event.flops;
        if let Some(recorder) = &mut self.recorder {
            recorder.record(&event);
        }
        // Shards run microbatch by microbatch, so a later one may name an earlier layer.
        self.not_finite_layer = self.not_finite_layer.into_iter().chain(completion.not_finite_layer).min();
        let Some(at) = self.pending.iter().position(|p| p.step == finished.step) else { return Ok(()) };
        self.pending[at].tasks -= 1;
        self.pending[at].last_end = completion.end_secs.max(self.pending[at].last_end);
        if finished.name.what == What::Result && self.pending[at].loss.is_none() {
            let loss = self.read_loss(finished.step);
            self.pending[at].loss = Some(loss);
            if self.device.computes() && !loss.is_finite() {
                return Err(self.explain_not_finite(finished.step, loss));
            }
        }
        Ok(())
    }

    /// Stops the run and finds the first layer whose output is not finite, by running the step's forward again.
    fn explain_not_finite(&mut self, step: u64, loss: f32) -> Error {
        self.failed = true;
        self.queue.cancel();
        let layer = self.find_not_finite(step);
        match layer {
            Ok(Some(layer)) => Error::BadInput(format!(
                "the loss is {loss} at step {step}; the first layer whose output is not finite is {}",
                self.model.train.layers[layer].name
            )),
            Ok(None) => {
                Error::BadInput(format!("the loss is {loss} at step {step}, though every layer's output is finite"))
            }
            Err(error) => {
                Error::BadInput(format!("the loss is {loss} at step {step}; looking for the layer failed: {error}"))
            }
        }
    }

    fn find_not_finite(&mut self, step: u64) -> Result<Option<usize>> {
        self.failed = false;
        self.pending.clear();
        while self.queue.in_flight() {
            self.pump()?;
        }
        self.queue.reset();
        self.rings.forget_all(&self.plan);
        self.not_finite_layer = None;
        self.expand_check(step);
        let result = self.wait_idle();
        self.failed = true;
        result.map(|()| self.not_finite_layer)
    }
}

/// Predicts a steady step of `plan` by running the executor on a simulated device.
///
/// # Errors
/// When the plan stalls: our own bug.
pub fn predict(model: &Arc<Model>, plan: &Arc<Plan>, cost: &CostModel, clip: bool) -> Result<Prediction> {
    /// Steps until the lanes have settled into their rhythm, and steps that are averaged.
    const WARM: u64 = 3;
    const MEASURED: u64 = 4;
    let device = Box::new(SimDevice::new(vec![cost.clone()]));
    let mut engine = Engine::new(Arc::clone(model), Arc::clone(plan), device, EngineOptions::new(0, model));
    let rule = visit::any_rule(plan.moments);
    let mut busy = vec![0.0; engine.device.lanes().len()];
    let mut prediction = Prediction { step_secs: 0.0, bound_secs: 0.0, bound: Bound::default() };
    let mut begun = 0;
    for step in 0..WARM + MEASURED {
        while begun < WARM + MEASURED && engine.steps_in_flight() < 2 {
            let inputs = vec![&[][..]; model.train.inputs.len()];
            let clip = clip.then_some(1.0);
            engine.begin_step(&StepInput { step: begun, inputs, loss_scale: 1.0, rule, clip })?;
            begun += 1;
        }
        let result = engine.wait_step()?;
        if step >= WARM {
            prediction.step_secs += result.secs / MEASURED as f64;
            prediction.bound = result.bound;
            let sums = engine.step_lane_sums().iter();
            busy.iter_mut().zip(sums).for_each(|(busy, sum)| *busy += sum.busy_secs / MEASURED as f64);
        }
    }
    prediction.bound_secs = busy.into_iter().fold(0.0, f64::max);
    Ok(prediction)
}
