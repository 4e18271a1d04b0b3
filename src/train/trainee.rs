//! A model of a fleet: what it is made of, and how far it has come.

use super::options::TrainOptions;
use super::validation::check_held_out;
use super::weights::Weights;
use crate::base::{Error, Result};
use crate::data::{Batch, DEFAULT_AHEAD, Loader, Source};
use crate::spill::Placed;
use std::collections::VecDeque;
use std::time::Instant;

/// A model to train, with everything that it takes.
pub struct ModelToTrain<'a> {
    /// Where its first weights come from.
    pub weights: Weights<'a>,
    /// Its graphs, its plan and where it runs.
    pub placed: Placed,
    /// What it is trained on.
    pub source: Box<dyn Source>,
    /// What it is validated on.
    pub valid: Option<Box<dyn Source>>,
    /// How it is trained; the device's part is of no account here.
    pub options: TrainOptions,
}

/// How far a model has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// Not its turn yet.
    Waiting,
    Training,
    /// Held-out minibatches before `next` have begun, of which those with so many `labels` are in flight and the rest
    /// are in the sum.
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
    /// Its weights come from a checkpoint, which has not come yet.
    owes_weights: bool,
    /// Learning rates of the steps in flight.
    pub(super) rates: VecDeque<f64>,
    /// No step is begun until the model has been at rest: a validation or a checkpoint is due.
    pub(super) pause: bool,
    /// A checkpoint is to be saved at its next rest.
    pub(super) saves: bool,
    /// Steps done when its state was last offered to its observer as a checkpoint.
    pub(super) offered: Option<u64>,
    /// Nobody wants more of it: it ends at its next rest.
    pub(super) ends: bool,
    /// It goes on from a rest: a validation that was due there was left to the run that goes on.
    pub(super) owes_validation: bool,
    /// Why its next step could not be begun: it ends for that once the steps in flight have ended.
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

    /// Goes on after `step` steps.
    ///
    /// # Errors
    /// When it has begun already, or that is after its last step.
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

    /// Refuses to train from the zeros that were to become a checkpoint's weights.
    ///
    /// # Errors
    /// When it was not told that they have come.
    pub(super) fn check_weights(&self) -> Result<()> {
        match self.owes_weights {
            true => Err(Error::bad("the weights were to come from a checkpoint, and none came")),
            false => Ok(()),
        }
    }

    /// Its minibatches, from that of the next step to begin when it is first asked for.
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

    /// Gives up the data; waits for the minibatch that is being made.
    pub(super) fn wait_close(&mut self) {
        (self.feed, self.valid) = (Feed::Closed, None);
    }
}
