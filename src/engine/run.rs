//! The loop: begins work, issues tasks, waits for what ends next and books it.

use super::member::{Ending, Member, Pending, Purpose};
use super::misfit::check_step;
use super::queue::{Finished, Tag};
use super::{EVALUATIONS, Ended, Engine, StepInput, StepResult};
use crate::base::{Error, LaneKind, Result};
use crate::device::UpdateRule;
use crate::trace::{Event, What};

impl Engine {
    /// A model's steps that were begun and not waited for.
    pub fn steps_in_flight(&self, model: usize) -> usize {
        self.members[model].pending.len()
    }

    /// Queues a training step of a model; at most two may be in flight. Copies the inputs and returns without waiting.
    ///
    /// # Errors
    /// When the run or the model has failed before, two steps are in flight already or one that this one does not
    /// follow, or the rule wants moments that the plan does not keep; when the model only evaluates, or a number of the
    /// step's cannot be meant; when the inputs' sizes are not the graph's, or an id or label lies beside what reads it
    /// ([`Graph::id_range`](crate::graph::Graph::id_range)).
    pub fn begin_step(&mut self, model: usize, input: &StepInput) -> Result<()> {
        self.check_running(model)?;
        let (member, step) = (&self.members[model], input.step);
        check_step(input)?;
        if !member.model.trains() {
            return Err(Error::bad(format!("step {step}: the model only evaluates")));
        }
        if member.pending.len() >= 2 {
            return Err(Error::bad(format!("step {step}: two steps are in flight already")));
        }
        if member.pending.back().is_some_and(|before| before.step.wrapping_add(1) != step) {
            return Err(Error::bad(format!("step {step}: does not follow the one in flight")));
        }
        let moments = match input.rule {
            UpdateRule::Adamw(_) => 2,
            UpdateRule::Sgd(rule) => usize::from(rule.momentum != 0.0),
        };
        if moments > member.plan.updates.moments {
            let has = member.plan.updates.moments;
            return Err(Error::bad(format!("step {step}: the rule wants {moments} moments, the plan keeps {has}")));
        }
        self.stage(model, input.step, &input.inputs)?;
        let purpose = Purpose::Step { rule: input.rule, clip: input.clip };
        let member = &mut self.members[model];
        (member.last_begun, member.begun_steps, member.at_home) = (input.step, input.step.saturating_add(1), false);
        self.begin(model, purpose, input.step, input.loss_scale)
    }

    /// Queues an evaluation of one minibatch of a model: the sum over labelled positions times `loss_scale`. At most
    /// two may be in flight, and no step beside them. Copies the inputs and returns without waiting.
    ///
    /// # Errors
    /// As [`Engine::begin_step`]; and when the model has no evaluation graph.
    pub fn begin_evaluation(&mut self, model: usize, inputs: &[&[u8]], loss_scale: f64) -> Result<()> {
        self.check_running(model)?;
        let member = &self.members[model];
        if member.model.eval.is_none() {
            return Err(Error::bad("an evaluation needs an evaluation graph"));
        }
        if member.pending.len() >= 2 || member.pending.iter().any(|p| p.purpose != Purpose::Evaluation) {
            return Err(Error::bad("an evaluation begins with no step and at most one evaluation in flight"));
        }
        let before = member.pending.back().map(|p| p.step);
        let step = if before == Some(EVALUATIONS[0]) { EVALUATIONS[1] } else { EVALUATIONS[0] };
        self.stage(model, step, inputs)?;
        self.begin(model, Purpose::Evaluation, step, loss_scale)
    }

    pub(super) fn begin(&mut self, model: usize, purpose: Purpose, step: u64, loss_scale: f64) -> Result<()> {
        self.members[model].begin(purpose, step, loss_scale);
        match &mut self.turns {
            Some(turns) => {
                turns.refresh(model, &self.members[model]);
                turns.dirty = true;
            }
            None => {
                let before = self.queue.next_id();
                while self.members[model].next_work().is_some() {
                    self.expand_at_home(model);
                }
                // Two steps may be in flight, with all of their tasks.
                let tasks = self.queue.next_id() - before;
                let busy = self.members.iter().filter(|m| !m.pending.is_empty()).count();
                self.queue.reserve(2 * tasks as usize * busy);
            }
        }
        self.queue.issue(&mut self.device);
        Ok(())
    }

    /// Waits for a model's oldest step in flight to end.
    ///
    /// # Errors
    /// When a task fails or stalls, or the loss is not finite (the message names the first layer whose output is not).
    pub fn wait_step(&mut self, model: usize) -> Result<StepResult> {
        match self.wait_ended(model, "wait_step: no step is in flight")? {
            Ended::Step(_, result) => Ok(result),
            Ended::Model(_, error) => Err(error),
            Ended::Evaluation(..) => Err(Error::bad("wait_step: an evaluation is in flight")),
        }
    }

    /// Waits for what ends next of a model; `nothing` says what is wrong where nothing of it is in flight.
    fn wait_ended(&mut self, model: usize, nothing: &str) -> Result<Ended> {
        loop {
            if let Some(ended) = self.ended(model) {
                return Ok(ended);
            }
            if self.members[model].pending.is_empty() {
                return Err(Error::bad(nothing));
            }
            self.wait_one()?;
        }
    }

    /// Waits for whatever ends next: a step, an evaluation, or a model before its time.
    ///
    /// # Errors
    /// When a device fails or stalls, nothing is in flight, or nothing runs and the policy chooses nothing.
    pub fn wait_any(&mut self) -> Result<Ended> {
        self.wait_any_watched(&mut |_| ())
    }

    /// Waits as [`Engine::wait_any`] does; `watch` is called after every task that has ended meanwhile.
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
            let model = self.wait_one()?;
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
            Purpose::Evaluation => {
                member.account.discard(done.last_end);
                Some(Ended::Evaluation(model, self.read_loss(model, done.step)))
            }
            // Its end was told as the model's.
            Purpose::Check => None,
        }
    }

    fn step_result(&mut self, model: usize, done: &Pending) -> StepResult {
        let member = &mut self.members[model];
        let began = std::mem::replace(&mut member.last_step_end, done.last_end);
        let (secs, bound) = (done.last_end - began, member.account.finish_step(began, done.last_end));
        let loss = done.loss.expect("a step's last tasks come after its loss");
        StepResult { step: done.step, loss, grad_norm: self.grad_norm(model, done.step), secs, bound }
    }

    /// Waits until nothing is left to run.
    ///
    /// # Errors
    /// As [`Engine::wait_any`].
    pub fn wait_idle(&mut self) -> Result<()> {
        self.offer()?;
        while !self.queue.is_empty() {
            self.wait_one()?;
        }
        self.check_device()
    }

    /// Whether a device has failed or stalled: nothing runs after that.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// What a model does before its next step is recorded under the step before that, not under the first: it goes on
    /// after `step` steps, and policies count those that are left.
    pub fn starts_at(&mut self, model: usize, step: u64) {
        let member = &mut self.members[model];
        (member.last_begun, member.begun_steps) = (step.saturating_sub(1), step);
        self.refresh_turns(model);
    }

    /// A model begins no more steps, though it has not done all: policies count none of them.
    pub fn begins_no_more(&mut self, model: usize) {
        let member = &mut self.members[model];
        member.options.steps = member.options.steps.min(member.begun_steps);
        self.refresh_turns(model);
    }

    fn refresh_turns(&mut self, model: usize) {
        if let Some(turns) = &mut self.turns {
            turns.refresh(model, &self.members[model]);
        }
    }

    pub(super) fn check_device(&self) -> Result<()> {
        if self.failed { Err(Error::Device("the run has failed before".into())) } else { Ok(()) }
    }

    /// Runs the evaluation graph of a model, of which nothing is in flight, on one minibatch, waits for it, and gives
    /// its loss.
    ///
    /// # Errors
    /// As [`Engine::begin_evaluation`] and [`Engine::wait_step`].
    pub fn wait_evaluation(&mut self, model: usize, inputs: &[&[u8]], loss_scale: f64) -> Result<f32> {
        if !self.members[model].pending.is_empty() {
            return Err(Error::bad("wait_evaluation: something is in flight"));
        }
        self.begin_evaluation(model, inputs, loss_scale)?;
        self.wait_begun_evaluation(model)
    }

    /// Waits for a model's oldest evaluation in flight, and gives its loss.
    ///
    /// # Errors
    /// As [`Engine::wait_step`].
    pub fn wait_begun_evaluation(&mut self, model: usize) -> Result<f32> {
        match self.wait_ended(model, "an evaluation is waited for, and none is in flight")? {
            Ended::Evaluation(_, loss) => Ok(loss),
            Ended::Model(_, error) => Err(error),
            Ended::Step(..) => Err(Error::bad("an evaluation is waited for, and a step is in flight")),
        }
    }

    /// Runs an evaluation graph that ends in logits on one microbatch, waits for it, and gives the logits.
    ///
    /// # Errors
    /// As [`Engine::wait_evaluation`]; and when the evaluation graph ends in a loss.
    pub fn wait_logits(&mut self, model: usize, inputs: &[&[u8]]) -> Result<Vec<f32>> {
        if self.members[model].model.eval_has_loss() {
            return Err(Error::bad(
                "the evaluation graph ends in a loss; Model::evaluation is one that ends in logits",
            ));
        }
        self.wait_evaluation(model, inputs, 1.0)?;
        Ok(self.read_logits(model))
    }

    /// Time spent outside a model's steps (validation, a checkpoint) is left out of its next step's seconds.
    pub fn skip_time(&mut self, model: usize) {
        self.members[model].last_step_end = self.device.now_secs();
    }

    /// Refuses to go on after a failure.
    pub(super) fn check_running(&self, model: usize) -> Result<()> {
        self.check_device()?;
        match self.is_ending(model) {
            true => Err(Error::bad("the model has ended before its time, and wait_step tells why, once")),
            false => Ok(()),
        }
    }

    /// Lets devices with room choose where there is something new to choose. Not before somebody waits: a choice
    /// between all models is another one than between those that happened to begin first.
    fn offer(&mut self) -> Result<()> {
        let dirty = self.turns.as_mut().is_some_and(|turns| std::mem::take(&mut turns.dirty));
        if dirty { self.take_turns() } else { Ok(()) }
    }

    /// Issues what can be issued and takes one completion; gives the model whose task it was.
    pub(super) fn wait_one(&mut self) -> Result<usize> {
        self.check_device()?;
        self.offer()?;
        if self.queue.is_empty() {
            // No task is left whose end could change anything.
            return Err(self.nothing_runs());
        }
        self.queue.issue(&mut self.device);
        let Some(completion) = self.device.next_completion(self.patience_secs) else {
            self.failed = true;
            return Err(self.stalled());
        };
        if let Err(error) = completion.result {
            self.failed = true;
            return Err(error);
        }
        let finished = self.queue.complete(completion.ticket, completion.end_secs);
        let Tag { name, step, ends_unit, .. } = finished.tag;
        let model = usize::from(name.model);
        let event = Event {
            lane: finished.lane,
            name,
            step: step.min(self.members[model].last_begun) as u32,
            start_secs: completion.start_secs,
            end_secs: completion.end_secs,
            bytes: finished.bytes,
            flops: finished.flops,
            ticket: finished.event,
            after: finished.after,
        };
        self.members[model].account.add(&event);
        self.totals[completion.ticket.lane as usize].add(&event);
        if let Some(recorder) = &mut self.recorder {
            recorder.record(&event);
        }
        if let (Some(turns), LaneKind::Compute) = (&mut self.turns, event.lane.kind) {
            turns.task_ended(&event, ends_unit, &self.members[model]);
        }
        self.task_ended(model, &finished, &event, completion.not_finite_layer)?;
        if self.turns.is_some() && ends_unit {
            self.take_turns()?;
        }
        Ok(model)
    }

    /// Books a task's end under the work that it belongs to.
    fn task_ended(
        &mut self,
        model: usize,
        finished: &Finished,
        event: &Event,
        not_finite: Option<usize>,
    ) -> Result<()> {
        let member = &mut self.members[model];
        // Shards run microbatch by microbatch, so a later one may name an earlier layer.
        member.not_finite_layer = member.not_finite_layer.into_iter().chain(not_finite).min();
        match member.pending.iter().position(|p| p.serial == finished.tag.serial) {
            None => member.loose_tasks -= 1,
            Some(at) => {
                let pending = &mut member.pending[at];
                pending.tasks -= 1;
                pending.updated |= finished.updates;
                pending.last_end = event.end_secs.max(pending.last_end);
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

    fn nothing_runs(&mut self) -> Error {
        let to_give = |(number, member): (usize, &Member)| member.next_work().map(|_| number);
        let models: Vec<usize> = self.members.iter().enumerate().filter_map(to_give).collect();
        let Some(turns) = self.turns.as_ref().filter(|_| !models.is_empty()) else {
            return Error::bad("nothing is in flight");
        };
        self.failed = true;
        turns.chose_nothing(&models)
    }

    fn stalled(&self) -> Error {
        let waiting = self.turns.as_ref().map_or(String::new(), |turns| turns.describe());
        Error::Device(format!(
            "stalled: nothing has ended for {} s; who waits for whom:{}{waiting}",
            self.patience_secs,
            self.queue.describe_stall()
        ))
    }
}
