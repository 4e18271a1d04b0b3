//! Models in training together: one loop that keeps two steps of each in flight and takes whatever ends next.
//!
//! A model's data, validation, checkpoints and end are its own, and what it computes does not depend on the others. Nor
//! does it wait for another, except while one is saved: one thread does all of this, and meanwhile the devices run out
//! of work. A model that fails ends with its reason, and the rest go on.

use super::observer::{FleetObserver, StepReport};
use super::options::TrainOptions;
use super::trainee::{ModelToTrain, Stage, Trainee};
use crate::base::{Error, Result};
use crate::device::Device;
use crate::engine::{Ended, Engine, EngineOptions, StepResult, TurnOptions, check_count, check_lines};
use crate::graph::Input;
use crate::spill::Placed;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

/// Models in training on the devices of one engine.
pub struct Fleet {
    pub(super) engine: Engine,
    pub(super) trainees: Vec<Trainee>,
    /// Models of one line run one after another; by default each model has a line of its own, and all run at once.
    lines: Vec<VecDeque<usize>>,
}

impl Fleet {
    /// Fills the store of `device` with the first weights. The device's arenas and store must be at least as large as
    /// [`FleetMap::new`](crate::spill::FleetMap::new) computes for the models.
    ///
    /// # Errors
    /// When threads cannot be started, weights are missing, an option is invalid or differs from what its model was
    /// traced or planned with, a plan belongs to another model, or models, memory, devices and turns do not fit each
    /// other; when there are more models than [`MOST_MODELS`](crate::sched::MOST_MODELS).
    pub fn new(models: Vec<ModelToTrain>, device: Box<dyn Device>, turns: Option<TurnOptions>) -> Result<Fleet> {
        check_count(models.len())?;
        let engine_options = models.iter().map(engine_options).collect::<Result<Vec<_>>>()?;
        let placed: Vec<Placed> = models.iter().map(|m| m.placed.clone()).collect();
        let engine = Engine::try_fleet(&placed, engine_options, device, turns)?;
        let mut fleet = Fleet { engine, trainees: Vec::new(), lines: Vec::new() };
        for (number, model) in models.into_iter().enumerate() {
            model.weights.write(&mut fleet.engine, number, model.options.seed)?;
            fleet.add(number, Trainee::new(model)?);
        }
        Ok(fleet)
    }

    /// Adds a model to those in training, and returns its number. Waits until the devices are at rest between units;
    /// this does not change the bits of any other model. A model whose weights cannot be read is still added, and fails
    /// ([`Fleet::failure`]).
    ///
    /// # Errors
    /// As [`Engine::wait_add`]; and when its data cannot be opened, an option is invalid or differs from what the model
    /// was traced or planned with, or the plan belongs to another model. Unless a device has failed, nothing has
    /// changed then.
    pub fn wait_add(&mut self, model: ModelToTrain) -> Result<usize> {
        let options = engine_options(&model)?;
        let (placed, weights, seed) = (model.placed.clone(), model.weights, model.options.seed);
        let trainee = Trainee::new(model)?;
        let number = self.engine.wait_add(&placed, options)?;
        let filled = weights.write(&mut self.engine, number, seed);
        self.add(number, trainee);
        if let Err(error) = filled {
            // The engine has it by now, so it can only be ended.
            self.trainees[number].stage = Stage::Training;
            self.fail(number, error)?;
        }
        Ok(number)
    }

    fn add(&mut self, number: usize, trainee: Trainee) {
        self.trainees.push(trainee);
        self.lines.push(VecDeque::from([number]));
    }

    /// Lets models run one after another: each of `lines` lists models in the order in which they run, and every model
    /// is in one of them.
    ///
    /// # Errors
    /// When a model is in no line or appears twice, or there is no such model.
    pub fn run_in_order(&mut self, lines: Vec<Vec<usize>>) -> Result<()> {
        check_lines(&lines, self.trainees.len())?;
        self.lines = lines.into_iter().map(VecDeque::from).collect();
        Ok(())
    }

    /// Lets a model and its data go on after `step` steps. The caller has written its state, as
    /// [`Checkpoint`](super::Checkpoint) does.
    ///
    /// # Errors
    /// When the model has begun already, or `step` is after its last step.
    pub fn start_at(&mut self, model: usize, step: u64) -> Result<()> {
        self.trainees[model].start_at(step)?;
        self.engine.starts_at(model, step);
        Ok(())
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The engine, to record events or write state. Steps and evaluations that the caller begins must have been waited
    /// for by the caller before the fleet goes on.
    pub fn engine_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Steps that a model has done.
    pub fn steps_done(&self, model: usize) -> u64 {
        self.trainees[model].done
    }

    /// Whether every model has come to its end.
    pub fn is_over(&self) -> bool {
        self.trainees.iter().all(Trainee::is_over)
    }

    /// Whether a model waits for its turn and has not run at all.
    pub fn is_waiting(&self, model: usize) -> bool {
        matches!(self.trainees[model].stage, Stage::Waiting)
    }

    /// Why a model ended before its time, if it did.
    pub fn failure(&self, model: usize) -> Option<&Error> {
        match &self.trainees[model].stage {
            Stage::Failed(_, error) => error.as_ref(),
            _ => None,
        }
    }

    /// Refuses to go on with a model that has failed, or that has work in flight which the fleet did not begin.
    pub(super) fn check_failed(&self, model: usize) -> Result<()> {
        match &self.trainees[model].stage {
            Stage::Failed(why, _) => Err(Error::bad(format!("the model has failed before: {why}"))),
            _ => self.check_begun(model),
        }
    }

    /// Refuses to go on where a model has work in flight that was begun through [`Fleet::engine_mut`].
    fn check_begun(&self, model: usize) -> Result<()> {
        let (found, own) = (self.engine.steps_in_flight(model), self.trainees[model].rates.len());
        if found == own || self.engine.has_failed() || self.engine.is_ending(model) {
            return Ok(());
        }
        Err(Error::bad(format!(
            "{found} steps or evaluations are in flight, of which {own} were begun here: who begins one with the \
             engine waits for it there"
        )))
    }

    /// Takes the reason why a model has failed; a second call returns `None`.
    pub fn take_failure(&mut self, model: usize) -> Option<Error> {
        match &mut self.trainees[model].stage {
            Stage::Failed(_, error) => error.take(),
            _ => None,
        }
    }

    /// Ends a model before its time, at once, as [`Engine::cancel`] does; the others go on. One that has come to its
    /// end stays as it is.
    ///
    /// # Errors
    /// When a device fails.
    pub fn cancel(&mut self, model: usize, why: Error) -> Result<()> {
        match self.trainees[model].stage {
            Stage::Done => Ok(()),
            Stage::Training | Stage::Validating { .. } => {
                self.trainees[model].fault.get_or_insert(why);
                self.engine.cancel(model)
            }
            Stage::Waiting | Stage::Failed(..) => self.fail(model, why),
        }
    }

    /// Ends a model for a fault of its own: in its data, its observer, or its ending. Its work in flight finishes
    /// first, so that its last step is whole.
    fn fail(&mut self, model: usize, why: Error) -> Result<()> {
        match &mut self.trainees[model].stage {
            Stage::Failed(..) => Ok(()),
            stage @ (Stage::Waiting | Stage::Done) => {
                *stage = Stage::failed(why);
                Ok(())
            }
            Stage::Training | Stage::Validating { .. } => {
                self.trainees[model].fault.get_or_insert(why);
                self.end_at_rest(model)
            }
        }
    }

    /// Ends a model that has a fault once it has nothing in flight.
    pub(super) fn end_at_rest(&mut self, model: usize) -> Result<()> {
        if self.engine.steps_in_flight(model) == 0 { self.engine.cancel(model) } else { Ok(()) }
    }

    /// A model's own fault ends it; a device's ends the run.
    fn fault_of(&mut self, model: usize, error: Error) -> Result<()> {
        if self.engine.has_failed() { Err(error) } else { self.fail(model, error) }
    }

    /// Runs every model to its end, or until `stop` is set; afterwards each model's state is in the host's store and
    /// has been offered to its observer as a checkpoint. [`Fleet::take_failure`] then returns why a model failed, if it
    /// did. Waits for the devices throughout.
    ///
    /// # Errors
    /// When a device fails, or a step is in flight that was begun through [`Fleet::engine_mut`];
    /// [`Error::Interrupted`] when `stop` was set before all was done.
    ///
    /// # Panics
    /// When `observers` has none for a model, such as a `Vec` with fewer elements than there are models.
    pub fn run(&mut self, observers: &mut dyn FleetObserver, stop: &AtomicBool) -> Result<()> {
        // Evaluations of a validation in progress are the fleet's own.
        let validates = |model: &usize| matches!(self.trainees[*model].stage, Stage::Validating { .. });
        let mut others = (0..self.trainees.len()).filter(|model| !validates(model));
        others.try_for_each(|model| self.check_begun(model))?;
        loop {
            // Data that nobody else reads is freed with it.
            self.trainees.iter_mut().filter(|t| t.is_over()).for_each(Trainee::wait_close);
            observers.between(self)?;
            let stopping = stop.load(Ordering::Relaxed);
            let busy = |t: &Trainee| matches!(t.stage, Stage::Training | Stage::Validating { .. });
            let waits = |t: &Trainee| matches!(t.stage, Stage::Waiting);
            if !self.trainees.iter().any(|t| busy(t) || waits(t) && !stopping) {
                break;
            }
            self.start_waiting(stopping);
            for model in 0..self.trainees.len() {
                if let Err(error) = self.advance(model, observers.of_model(model), stopping) {
                    self.fault_of(model, error)?;
                }
            }
            self.start_waiting(stopping);
            if self.trainees.iter().all(|t| !busy(t)) || (0..self.trainees.len()).any(|m| self.is_at_rest(m)) {
                continue;
            }
            match self.engine.wait_any_watched(&mut |engine| observers.task_ended(engine))? {
                Ended::Step(model, result) => {
                    let report = self.report(model, result);
                    if self.trainees[model].fault.is_some() && !self.engine.is_ending(model) {
                        // Its observer has failed, and the step had already begun.
                        continue;
                    }
                    let observer = observers.of_model(model);
                    let told = observer.step(&report);
                    let trainee = &mut self.trainees[model];
                    trainee.ends |= observer.wants_end();
                    trainee.saves |= observer.wants_checkpoint();
                    trainee.pause |= trainee.ends || trainee.saves;
                    if let Err(error) = told {
                        self.fail(model, error)?;
                    }
                }
                Ended::Evaluation(model, loss) => {
                    let Stage::Validating { labels, sum, count, .. } = &mut self.trainees[model].stage else {
                        unreachable!("an evaluation belongs to a validation");
                    };
                    // The loss is a sum over labelled positions, so each batch is weighted by their number.
                    *sum += f64::from(loss);
                    *count += labels.pop_front().expect("each minibatch in flight has its labels");
                }
                Ended::Model(model, error) => {
                    let trainee = &mut self.trainees[model];
                    trainee.stage = Stage::failed(trainee.fault.take().unwrap_or(error));
                }
            }
        }
        match self.unfinished(observers) {
            Some(at) => Err(Error::Interrupted { at, checkpoint: None }),
            None => Ok(()),
        }
    }

    /// Records a step that has ended.
    fn report(&mut self, model: usize, result: StepResult) -> StepReport {
        let trainee = &mut self.trainees[model];
        trainee.done = result.step + 1;
        let lr = trainee.rates.pop_front().expect("each step in flight has its learning rate");
        StepReport { result, lr }
    }

    /// Waits for the next step of a model that trains alone; with `begins`, further steps are begun first, as far as
    /// there is room. `None` where no step is in flight then.
    pub(super) fn wait_step(&mut self, model: usize, begins: bool) -> Result<Option<StepReport>> {
        self.check_failed(model)?;
        if begins && self.is_waiting(model) {
            self.trainees[model].stage = Stage::Training;
            self.engine.skip_time(model);
        }
        while begins && self.has_room(model) {
            // A caller that takes steps itself also validates itself.
            self.trainees[model].owes_validation = false;
            if let Err(error) = self.try_begin(model, &mut ()) {
                self.fault_of(model, error)?;
            }
        }
        if self.engine.steps_in_flight(model) == 0
            && let Some(error) = self.trainees[model].refused.take()
        {
            self.fault_of(model, error)?;
        }
        if self.engine.steps_in_flight(model) == 0 && !self.engine.is_ending(model) {
            return Ok(None);
        }
        match self.engine.wait_any()? {
            Ended::Step(_, result) => Ok(Some(self.report(model, result))),
            Ended::Model(_, error) => {
                let trainee = &mut self.trainees[model];
                let why = trainee.fault.take().unwrap_or(error);
                trainee.stage = Stage::Failed(why.to_string(), None);
                Err(why)
            }
            Ended::Evaluation(..) => unreachable!("an evaluation belongs to a validation, which runs to its end"),
        }
    }

    /// How far the unfinished models have come; `None` where all are finished.
    fn unfinished(&self, observers: &dyn FleetObserver) -> Option<String> {
        let unfinished = |t: &Trainee| !matches!(t.stage, Stage::Done | Stage::Failed(..));
        let models = (0..self.trainees.len()).filter(|&m| unfinished(&self.trainees[m]));
        let named = |m: usize| {
            let by_number = || (self.trainees.len() > 1).then(|| format!("model {m}"));
            (self.trainees[m].done, observers.name(m).or_else(by_number))
        };
        let steps: Vec<(u64, Option<String>)> = models.map(named).collect();
        (!steps.is_empty()).then(|| steps_text(&steps))
    }

    /// Starts the first unfinished model of each line.
    fn start_waiting(&mut self, stopping: bool) {
        for line in &mut self.lines {
            while let Some(&model) = line.front() {
                let stage = &mut self.trainees[model].stage;
                match stage {
                    Stage::Done | Stage::Failed(..) => drop(line.pop_front()),
                    Stage::Waiting if !stopping => {
                        *stage = Stage::Training;
                        // The time that it waited, for models ahead of it or for weights to reach the store, is no part
                        // of its first step.
                        self.engine.skip_time(model);
                    }
                    _ => break,
                }
            }
        }
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stages: Vec<&Stage> = self.trainees.iter().map(|t| &t.stage).collect();
        f.debug_struct("Fleet").field("engine", &self.engine).field("stages", &stages).finish_non_exhaustive()
    }
}

/// How the engine runs a model; its options must be those that it was traced and planned with.
fn engine_options(model: &ModelToTrain) -> Result<EngineOptions> {
    model.options.check()?;
    check_options(&model.options, &model.placed)?;
    Ok(model.options.engine_options(&model.placed.model, &model.placed.plan))
}

/// Refuses options that differ from those that a model was traced or planned with, and a plan of another model.
fn check_options(options: &TrainOptions, placed: &Placed) -> Result<()> {
    let Placed { model, plan, .. } = placed;
    let fault = |what: String| Err(Error::bad(format!("the options are not those of the model: {what}")));
    let (found, want) = (options.dtype, model.train.float);
    if found != want {
        return fault(format!("dtype is {found}, the model is {want}"));
    }
    let microbatch = options.microbatch;
    let other = |input: &&Input| input.shape.axes().first() != Some(&microbatch);
    if let Some(Input { name, shape, .. }) = model.train.inputs.iter().find(other) {
        return fault(format!("microbatch is {microbatch}, {name} is {shape}"));
    }
    let (found, want) = (options.batch / microbatch, model.microbatches);
    if found != want {
        return fault(format!("a batch has {found} microbatches, of the model {want}"));
    }
    if let Some(parameter) = model.train.parameters.iter().find(|p| p.frozen != options.freezes(&p.name)) {
        let is = if parameter.frozen { "frozen" } else { "trained" };
        let (frozen, beside) = (&options.frozen, if options.low_rank.is_some() { ", low_rank is there" } else { "" });
        return fault(format!("frozen is {frozen:?}{beside}, the model has {} {is}", parameter.name));
    }
    let (found, want) = (options.optimizer.moments(), plan.updates.moments);
    if found != want {
        return fault(format!("the optimizer has {found} moments, the plan keeps {want}"));
    }
    if !plan.is_of(model) {
        return Err(Error::bad("the plan is of another model"));
    }
    Ok(())
}

/// Steps of models in words; only the first ones where a line cannot hold all.
fn steps_text(steps: &[(u64, Option<String>)]) -> String {
    const MOST: usize = 8;
    let text = |(step, name): &(u64, Option<String>)| match name {
        Some(name) => format!("step {step} of {name}"),
        None => format!("step {step}"),
    };
    let mut texts: Vec<String> = steps.iter().take(MOST).map(text).collect();
    if steps.len() > MOST {
        texts.push(format!("steps of {} more", steps.len() - MOST));
    }
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::steps_text;

    #[test]
    fn an_interruption_says_how_far_each_model_had_come() {
        let of = |step: u64, name: &str| (step, Some(name.to_string()));
        assert_eq!(steps_text(&[(12, None)]), "step 12");
        assert_eq!(steps_text(&[of(12, "gpt"), of(0, "bert")]), "step 12 of gpt, step 0 of bert");
        let many: Vec<_> = (0..11).map(|m| of(m, &format!("m{m}"))).collect();
        assert!(steps_text(&many).ends_with("step 7 of m7, steps of 3 more"), "{}", steps_text(&many));
        assert!(steps_text(&many[..8]).ends_with("step 7 of m7"));
    }
}
