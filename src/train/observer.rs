//! Observers: they are told what happens as models train, and asked what should happen next.

use super::fleet::Fleet;
use crate::base::Result;
use crate::engine::{Engine, StepResult};

/// A training step as a caller sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// What the engine returned.
    pub result: StepResult,
    /// Learning rate of the update.
    pub lr: f64,
}

/// What happens during a run, told as it happens.
pub trait Observer {
    /// A step has ended.
    ///
    /// # Errors
    /// Whatever should end the run. A step that has begun by then ends first, and is not reported.
    fn step(&mut self, report: &StepReport) -> Result<()>;

    /// Held-out data was evaluated after `step` steps.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn valid(&mut self, step: u64, loss: f32, secs: f64) -> Result<()>;

    /// Asked before a step is begun, for its learning rate; `scheduled` is the rate by
    /// [`TrainOptions::schedule`](super::TrainOptions::schedule). Steps are begun ahead of the one that runs, so the
    /// previous step's loss is not known yet.
    fn lr(&mut self, step: u64, scheduled: f64) -> f64 {
        let _ = step;
        scheduled
    }

    /// Asked before a step is begun: whether to let the model rest after `step` steps and validate it, in addition to
    /// the validations that are due anyway.
    fn wants_rest(&mut self, step: u64) -> bool {
        let _ = step;
        false
    }

    /// Asked before a step is begun, and after every step and validation: whether the model ends here, as if it had no
    /// further steps.
    fn wants_end(&mut self) -> bool {
        false
    }

    /// Asked after every step: whether to save a checkpoint, as soon as the steps in flight have ended.
    fn wants_checkpoint(&mut self) -> bool {
        false
    }

    /// The model, number `model` of the engine's, is at rest after `step` steps, and its state is in the host's store:
    /// called where [`Observer::wants_checkpoint`] asked for it, where the run is to stop, and at the model's end.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn checkpoint(&mut self, step: u64, engine: &Engine, model: usize) -> Result<()> {
        let _ = (step, engine, model);
        Ok(())
    }

    /// The model cannot go on: its data failed, so its next step cannot begin. It is at rest, and its state is in the
    /// host's store.
    fn stuck(&mut self, engine: &Engine, model: usize) {
        let _ = (engine, model);
    }

    /// The model has come to its end, validated and at rest; its state is in the host's store.
    ///
    /// # Errors
    /// Whatever should count as the model's failure.
    fn ended(&mut self, engine: &Engine, model: usize) -> Result<()> {
        let _ = (engine, model);
        Ok(())
    }
}

/// Watches nothing.
impl Observer for () {
    fn step(&mut self, _: &StepReport) -> Result<()> {
        Ok(())
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        Ok(())
    }
}

/// A closure watches the steps alone.
impl<F: FnMut(&StepReport) -> Result<()>> Observer for F {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self(report)
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        Ok(())
    }
}

/// The observers of a fleet's models.
pub trait FleetObserver {
    /// The observer of one model.
    fn of_model(&mut self, model: usize) -> &mut dyn Observer;

    /// What a model is called in messages; with `None`, its number is used where there are several models.
    fn name(&self, model: usize) -> Option<String> {
        let _ = model;
        None
    }

    /// Called after every task that has ended while the models run, to look at the engine.
    fn task_ended(&mut self, engine: &Engine) {
        let _ = engine;
    }

    /// Called whenever something has ended, and once more when everything has: models may be added and cancelled here.
    ///
    /// # Errors
    /// Whatever should end the run.
    fn between(&mut self, fleet: &mut Fleet) -> Result<()> {
        let _ = fleet;
        Ok(())
    }
}

/// An observer for each model, in order; there must be one for each.
impl FleetObserver for Vec<&mut dyn Observer> {
    fn of_model(&mut self, model: usize) -> &mut dyn Observer {
        let observers = self.len();
        &mut **self.get_mut(model).unwrap_or_else(|| panic!("no observer of model {model}, of {observers}"))
    }
}
