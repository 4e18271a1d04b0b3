//! A model in the executor: what it is, where it lies, and how far its steps have come.

use super::EngineOptions;
use super::settle::Due;
use super::tables::Tables;
use crate::base::{Error, LaneId};
use crate::device::UpdateRule;
use crate::spill::{ArenaMap, Home, Model, Placed, Plan};
use crate::trace::StepAccount;
use std::collections::VecDeque;
use std::sync::Arc;

/// What a begun piece of work is for. It is a chain of units.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Purpose {
    /// A training step with this update: forward through the shards, and back.
    Step { rule: UpdateRule, clip: Option<f64> },
    /// An evaluation: forward through the shards.
    Evaluation,
    /// A forward pass that looks for the first layer whose output is not finite.
    Check,
}

/// Why a model ends before its time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ending {
    /// The loss of this step is not finite; the layer is to be found.
    NotFinite { step: u64, loss: f32 },
    /// The check for it runs.
    Checking { step: u64, loss: f32 },
    /// Its owner wants no more of it.
    Cancelled,
}

/// What of a model's state is that of its last whole step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whole {
    All,
    /// Weights and moments: a step that is void has run forward, which changes running statistics.
    Parameters,
    /// It has ended in the middle of a step.
    Nothing,
}

/// A step, or an evaluation, that has begun and not ended.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub purpose: Purpose,
    /// Tells it from all others of its model.
    pub serial: u64,
    pub step: u64,
    pub loss_scale: f64,
    /// Units in all, and those made into tasks so far.
    pub units: usize,
    pub made: usize,
    /// Tasks made and not ended.
    pub tasks: u64,
    pub loss: Option<f32>,
    /// An update of it has run.
    pub updated: bool,
    pub last_end: f64,
    /// Its model ends early, and it with it: nobody is told of its end.
    pub void: bool,
    /// Units are of one microbatch each.
    pub pipelined: bool,
}

impl Pending {
    /// Whether everything of it has run.
    pub fn is_over(&self) -> bool {
        self.made == self.units && self.tasks == 0
    }
}

/// A model in the executor.
pub(super) struct Member {
    pub model: Arc<Model>,
    pub plan: Arc<Plan>,
    pub placed: Placed,
    pub options: EngineOptions,
    /// Where its part of the host's store begins.
    pub store: u64,
    /// Where its part of the disk tier begins.
    pub disk: u64,
    /// The stages, by number, that its next update and copy from or to the disk use.
    pub update_stage: usize,
    pub copy_stage: usize,
    /// How it sees each device's arena.
    pub maps: Vec<Arc<ArenaMap>>,
    /// Its slots on each device, by number among the executor's.
    pub rings: Vec<usize>,
    pub tables: Arc<Tables>,
    pub pending: VecDeque<Pending>,
    /// Where the time of its steps goes.
    pub account: StepAccount,
    /// The serial of the last pending.
    pub serial: u64,
    /// For each device, the serials of the step whose losses it has, and of that whose norms.
    pub losses_on: Vec<u64>,
    pub norms_on: Vec<u64>,
    /// Where each shard's backward ran last.
    pub ran_on: Vec<u16>,
    /// Whether each shard's backward ran where its forward or its last backward had, so that the next visit may come
    /// there too.
    pub returns: Vec<bool>,
    /// What is left of the last step to be made of it.
    pub due: Option<Due>,
    /// The work with which remainders and moments of the shards that rest on devices were brought there.
    pub state_fetched: Option<u64>,
    /// Tasks of its state on the way home.
    pub loose_tasks: u64,
    pub last_step_end: f64,
    /// The step begun last: tasks that belong to no step, an evaluation's or the state's on its way home, are recorded
    /// under it.
    pub last_begun: u64,
    /// Steps that were begun, those before this run among them.
    pub begun_steps: u64,
    /// What lies at home is what its last step left.
    pub at_home: bool,
    /// Ends before its time; what is on a lane runs out, the rest is dropped.
    pub ending: Option<Ending>,
    /// Has ended before its time. Nothing of it runs after that.
    pub over: bool,
    /// Why, until it is told.
    pub why: Option<Error>,
    /// What its end has left.
    pub whole: Whole,
    /// The first layer so far whose output a check found not finite.
    pub not_finite_layer: Option<usize>,
}

impl Member {
    pub fn new(
        placed: &Placed,
        maps: Vec<Arc<ArenaMap>>,
        rings: Vec<usize>,
        (store, disk): (u64, u64),
        lanes: &[LaneId],
        options: EngineOptions,
    ) -> Self {
        let Placed { model, plan, .. } = placed;
        let devices = maps.len();
        // The three units of a shard, with their copies, for every microbatch, twice over for two steps in flight.
        let events = 16 * plan.shards.len() * (model.microbatches + 2);
        Member {
            tables: Arc::new(Tables::new(model, plan, &options)),
            model: Arc::clone(model),
            plan: Arc::clone(plan),
            placed: placed.clone(),
            options,
            store,
            disk,
            update_stage: 0,
            copy_stage: 0,
            maps,
            rings,
            account: StepAccount::new(lanes, events),
            pending: VecDeque::with_capacity(4),
            serial: 0,
            losses_on: vec![0; devices],
            norms_on: vec![0; devices],
            ran_on: vec![0; plan.shards.len()],
            returns: vec![false; plan.shards.len()],
            due: None,
            state_fetched: None,
            loose_tasks: 0,
            last_step_end: 0.0,
            last_begun: 0,
            begun_steps: 0,
            at_home: true,
            ending: None,
            over: false,
            why: None,
            whole: Whole::All,
            not_finite_layer: None,
        }
    }

    /// The device where a shard's state is at home, if it is at home on one.
    pub fn home_of(&self, shard: usize) -> Option<u16> {
        match &self.placed.home {
            Home::Anywhere => None,
            Home::On(devices) => Some(devices[shard]),
        }
    }

    /// Adds work to do and gives its serial.
    pub fn begin(&mut self, purpose: Purpose, step: u64, loss_scale: f64) -> u64 {
        let shards = self.plan.shards.len();
        let pipelined = self.plan.choice.pipelined && matches!(purpose, Purpose::Step { .. });
        let units = match purpose {
            Purpose::Step { .. } => (2 * shards - 1) * if pipelined { self.model.microbatches } else { 1 },
            Purpose::Evaluation | Purpose::Check => shards,
        };
        self.serial += 1;
        self.pending.push_back(Pending {
            purpose,
            serial: self.serial,
            step,
            loss_scale,
            units,
            made: 0,
            tasks: 0,
            loss: None,
            updated: false,
            last_end: 0.0,
            void: false,
            pipelined,
        });
        self.serial
    }

    /// Steps that are to be begun.
    pub fn steps_to_begin(&self) -> u64 {
        let ends_early = self.over || self.ending.is_some();
        if ends_early { 0 } else { self.options.steps.saturating_sub(self.begun_steps) }
    }

    /// Books a task under the work that it belongs to.
    pub fn book(&mut self, serial: u64) {
        match self.pending.iter_mut().find(|p| p.serial == serial) {
            Some(pending) => pending.tasks += 1,
            None => self.loose_tasks += 1,
        }
    }

    /// Strikes out a task that was booked and will not run.
    pub fn unbook(&mut self, serial: u64) {
        match self.pending.iter_mut().find(|p| p.serial == serial) {
            Some(pending) => pending.tasks -= 1,
            None => self.loose_tasks -= 1,
        }
    }

    /// Whether nothing of it runs, nor is to.
    pub fn is_at_rest(&self) -> bool {
        self.loose_tasks == 0 && self.pending.iter().all(Pending::is_over)
    }

    /// The work whose next unit would be this model's next, by its place among `pending`.
    pub fn next_work(&self) -> Option<usize> {
        self.pending.iter().position(|p| p.made < p.units)
    }
}
