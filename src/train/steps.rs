//! Steps of a model in a fleet: two are in flight, until the model rests because it is to be saved or validated or has
//! come to its end.

use super::fleet::Fleet;
use super::observer::Observer;
use super::prepare::batch_inputs;
use super::trainee::Stage;
use crate::base::{Error, Result};
use crate::data::labelled;
use crate::engine::StepInput;

impl Fleet {
    /// Begins what a model can begin, a step or an evaluation; when the model is at rest, does what is due.
    pub(super) fn advance(&mut self, model: usize, observer: &mut dyn Observer, stopping: bool) -> Result<()> {
        // If the model is about to end, the engine reports when it has.
        if self.trainees[model].fault.is_some() || self.engine.is_ending(model) {
            return self.end_at_rest(model);
        }
        match self.trainees[model].stage {
            Stage::Waiting | Stage::Done | Stage::Failed(..) => Ok(()),
            Stage::Validating { .. } => self.validate_on(model, observer, stopping),
            Stage::Training => self.train_on(model, observer, stopping),
        }
    }

    /// Begins the steps that there is room for; when the model is at rest, does what is due.
    pub(super) fn train_on(&mut self, model: usize, observer: &mut dyn Observer, stopping: bool) -> Result<()> {
        let every = self.trainees[model].options.valid_every;
        let done = self.trainees[model].done;
        self.trainees[model].ends |= observer.wants_end();
        if self.trainees[model].ends {
            self.engine.begins_no_more(model);
        }
        if self.engine.steps_in_flight(model) == 0
            && std::mem::take(&mut self.trainees[model].owes_validation)
            && (done.is_multiple_of(every) || observer.wants_rest(done))
            && self.begin_validation(model)
        {
            return self.validate_on(model, observer, stopping);
        }
        loop {
            let trainee = &self.trainees[model];
            if stopping || trainee.pause || trainee.ends || !self.has_room(model) {
                break;
            }
            self.try_begin(model, observer)?;
        }
        if self.engine.steps_in_flight(model) > 0 {
            return Ok(());
        }
        if let Some(error) = self.trainees[model].refused.take() {
            self.engine.wait_home(model)?;
            observer.stuck(&self.engine, model);
            return Err(error);
        }
        // At rest: paused, stopped, or at the end.
        let (done, over) = {
            let trainee = &self.trainees[model];
            (trainee.done, trainee.ends || trainee.done == trainee.options.steps)
        };
        // A validation reads what is on the devices.
        if std::mem::take(&mut self.trainees[model].saves) || stopping || over {
            self.offer(model, observer)?;
        }
        let trainee = &mut self.trainees[model];
        trainee.pause = false;
        // A validation may take long, so it is left to the resumed run.
        if stopping && (!over || trainee.valid.is_some()) {
            trainee.owes_validation = done > 0;
            trainee.stage = Stage::Waiting;
            return Ok(());
        }
        let due = over || done.is_multiple_of(every) || observer.wants_rest(done);
        if due && self.begin_validation(model) {
            return self.validate_on(model, observer, stopping);
        }
        self.rested(model, observer)
    }

    /// After a rest: continues with the steps, or ends the model.
    pub(super) fn rested(&mut self, model: usize, observer: &mut dyn Observer) -> Result<()> {
        self.engine.skip_time(model);
        let trainee = &mut self.trainees[model];
        let ended = trainee.ends || trainee.done == trainee.options.steps;
        trainee.stage = if ended { Stage::Done } else { Stage::Training };
        if !ended {
            return Ok(());
        }
        self.engine.begins_no_more(model);
        // A validation, for which no state had to come home, may have ended the model.
        if self.trainees[model].offered != Some(self.trainees[model].done) {
            self.offer(model, observer)?;
        }
        observer.ended(&self.engine, model)
    }

    /// Brings a model's state home, and offers it to its observer as a checkpoint.
    pub(super) fn offer(&mut self, model: usize, observer: &mut dyn Observer) -> Result<()> {
        self.engine.wait_home(model)?;
        let done = self.trainees[model].done;
        self.trainees[model].offered = Some(done);
        observer.checkpoint(done, &self.engine, model)
    }

    /// Begins a step. A fault, such as in its data, is kept until the steps before it have ended, as is a loss that is
    /// not finite.
    ///
    /// # Errors
    /// When a device fails, or no step is in flight.
    pub(super) fn try_begin(&mut self, model: usize, observer: &mut dyn Observer) -> Result<()> {
        let begun = self.begin(model, observer);
        if self.engine.has_failed() || self.engine.is_ending(model) || self.engine.steps_in_flight(model) == 0 {
            return begun;
        }
        self.trainees[model].refused = begun.err();
        Ok(())
    }

    /// Begins a step.
    fn begin(&mut self, model: usize, observer: &mut dyn Observer) -> Result<()> {
        let trainee = &mut self.trainees[model];
        let step = trainee.begun;
        trainee.check_weights()?;
        let batch = trainee.loader()?.next()?;
        let labels = labelled(&batch)?;
        if labels == 0 {
            return Err(Error::bad(format!("step {step}: no position of the minibatch has a label")));
        }
        let options = &trainee.options;
        let lr = observer.lr(step, options.schedule.lr(options.optimizer.lr(), step, options.steps));
        if !(lr.is_finite() && lr >= 0.0) {
            return Err(Error::bad(format!("step {step}: the learning rate is {lr}, want 0 or more")));
        }
        let input = StepInput {
            step,
            inputs: batch_inputs(&self.engine.model(model).train, &batch)?,
            loss_scale: 1.0 / labels as f64,
            rule: options.optimizer.rule(step, lr),
            clip: options.clip,
        };
        self.engine.begin_step(model, &input)?;
        let trainee = &mut self.trainees[model];
        trainee.loader()?.recycle(batch);
        trainee.rates.push_back(lr);
        trainee.begun += 1;
        trainee.pause = trainee.valid.is_some() && trainee.begun.is_multiple_of(trainee.options.valid_every);
        trainee.pause |= observer.wants_rest(trainee.begun);
        Ok(())
    }

    /// Whether a further step of a model can begin.
    pub(super) fn has_room(&self, model: usize) -> bool {
        let trainee = &self.trainees[model];
        let begins = matches!(trainee.stage, Stage::Training) && trainee.refused.is_none();
        let begins = begins && !self.engine.is_ending(model);
        begins && self.engine.steps_in_flight(model) < 2 && trainee.begun < trainee.options.steps
    }

    /// Whether a model in training or validation has nothing in flight, so that something is due for it.
    pub(super) fn is_at_rest(&self, model: usize) -> bool {
        let trainee = &self.trainees[model];
        let works = matches!(trainee.stage, Stage::Training | Stage::Validating { .. });
        works && self.engine.steps_in_flight(model) == 0 && trainee.fault.is_none() && !self.engine.is_ending(model)
    }
}
