//! A model of a fleet: its parts, and how far it has come.

use super::options::TrainOptions;
use super::validation::check_held_out;
use super::weights::Weights;
use crate::base::{Error, Result};
use crate::data::{Batch, DEFAULT_AHEAD, Loader, Source};
use crate::spill::Placed;
use std::collections::VecDeque;
use std::time::Instant;

/// A model to train, with everything that it needs.
pub struct ModelToTrain<'a> {
    /// Where its first weights come from.
    pub weights: Weights<'a>,
    /// Its graphs, its plan and the devices that it runs on.
    pub placed: Placed,
    /// What it is trained on.
    pub source: Box<dyn Source>,
    /// What it is validated on.
    pub valid: Option<Box<dyn Source>>,
    /// How it is trained; the options about the device are ignored here.
    pub options: TrainOptions,
}

/// How far a model has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// Not its turn yet.
    Waiting,
    Training,
    /// Held-out minibatches before `next` have begun; the last of them, whose label counts are in `labels`, are in
    /// flight, and the rest are in the sum.
    Validating {
        next: u64,
        labels: VecDeque<u64>,
        sum: f64,
        count: u64,
        began: Instant,
    },
    Done,
    /// Why, in words and, until it is taken, as an error.
    Failed(String, Option<Error>),
}

impl Stage {
    pub fn failed(why: Error) -> Stage {
        Stage::Failed(why.to_string(), Some(why))
    }
}

/// What a model is trained on.
enum Feed {
    /// Nothing of it has been read.
    Ready(Box<dyn Source>),
    /// A thread makes minibatches ahead of need.
    Running(Loader),
    /// The model has ended.
    Closed,
}

/// A model in training.
pub(super) struct Trainee {
    pub(super) options: TrainOptions,
    feed: Feed,
    pub(super) valid: Option<Box<dyn Source>>,
    pub(super) valid_batch: Batch,
    pub(super) stage: Stage,
    /// Steps done and begun.
    pub(super) done: u64,
    pub(super) begun: u64,
    /// Its weights come from a checkpoint that has not been restored yet.
    owes_weights: bool,
    /// Learning rates of the steps in flight.
    pub(super) rates: VecDeque<f64>,
    /// No step is begun until the model has been at rest: a validation or a checkpoint is due.
    pub(super) pause: bool,
    /// A checkpoint is to be saved at its next rest.
    pub(super) saves: bool,
    /// Steps done when its state was last offered to its observer as a checkpoint.
    pub(super) offered: Option<u64>,
    /// Its observer wants it to end, at its next rest.
    pub(super) ends: bool,
    /// It resumes from a rest at which a validation was due that was left to the resumed run.
    pub(super) owes_validation: bool,
    /// Why its next step could not be begun: the model ends for this reason once the steps in flight have ended.
    pub(super) refused: Option<Error>,
    /// Why it is to end, as soon as nothing of it is in flight: the data's fault, or the observer's.
    pub(super) fault: Option<Error>,
}

impl Trainee {
    /// A model that waits for its turn.
    pub(super) fn new(model: ModelToTrain) -> Result<Trainee> {
        let ModelToTrain { weights, source, valid, options, .. } = model;
        valid.as_deref().map_or(Ok(()), check_held_out)?;
        Ok(Trainee {
            feed: Feed::Ready(source),
            valid_batch: valid.as_ref().map_or(Batch { tensors: Vec::new() }, |v| Batch::zeros(v.spec())),
            valid,
            stage: Stage::Waiting,
            done: 0,
            begun: 0,
            owes_weights: matches!(weights, Weights::Later),
            rates: VecDeque::with_capacity(4),
            pause: false,
            saves: false,
            offered: None,
            ends: false,
            owes_validation: false,
            refused: None,
            fault: None,
            options,
        })
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Done | Stage::Failed(..))
    }

    /// Lets the model go on after `step` steps.
    ///
    /// # Errors
    /// When it has begun already, or `step` is after its last step.
    pub(super) fn start_at(&mut self, step: u64) -> Result<()> {
        let steps = self.options.steps;
        match self.feed {
            _ if step > steps => return Err(Error::bad(format!("{step} steps are done, of {steps}"))),
            Feed::Ready(_) => {}
            Feed::Running(_) | Feed::Closed => {
                return Err(Error::bad(format!("step {step}: the model has begun already")));
            }
        }
        (self.done, self.begun) = (step, step);
        self.owes_weights = false;
        self.owes_validation = step > 0 && step < steps;
        Ok(())
    }

    /// Refuses to train from zeros that a checkpoint's weights should have replaced.
    ///
    /// # Errors
    /// When no checkpoint has been restored.
    pub(super) fn check_weights(&self) -> Result<()> {
        match self.owes_weights {
            true => Err(Error::bad("the weights were to come from a checkpoint, and none came")),
            false => Ok(()),
        }
    }

    /// The loader of its minibatches; its first call starts it at the minibatch of the next step to begin.
    ///
    /// # Errors
    /// When its thread cannot be started, or the model has ended.
    pub(super) fn loader(&mut self) -> Result<&Loader> {
        if let Feed::Ready(_) = self.feed
            && let Feed::Ready(source) = std::mem::replace(&mut self.feed, Feed::Closed)
        {
            self.feed = Feed::Running(Loader::start(source, self.begun, DEFAULT_AHEAD)?);
        }
        match &self.feed {
            Feed::Running(loader) => Ok(loader),
            Feed::Ready(_) | Feed::Closed => Err(Error::bad("the model's data is closed")),
        }
    }

    /// Gives up the data; waits for the minibatch in progress.
    pub(super) fn wait_close(&mut self) {
        (self.feed, self.valid) = (Feed::Closed, None);
    }
}
