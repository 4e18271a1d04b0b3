//! Validation: the mean loss of held-out data, with two minibatches in flight. In a fleet a validation runs when it is
//! due, at the same time as other models' work; for a model that trains alone it runs when asked for.

use super::fleet::Fleet;
use super::observer::Observer;
use super::prepare::batch_inputs;
use super::trainee::Stage;
use crate::base::{Error, Result};
use crate::data::{Batch, Source, check_ids, labelled};
use std::collections::VecDeque;
use std::time::Instant;

impl Fleet {
    /// Begins a validation; returns whether there is held-out data for one.
    pub(super) fn begin_validation(&mut self, model: usize) -> bool {
        let trainee = &mut self.trainees[model];
        if trainee.valid.is_none() {
            return false;
        }
        trainee.stage = Stage::Validating {
            next: 0,
            labels: VecDeque::with_capacity(2),
            sum: 0.0,
            count: 0,
            began: Instant::now(),
        };
        true
    }

    /// Begins the evaluation of the next held-out minibatch, or reports the mean loss to the observer. Where the run is
    /// to stop, the evaluations so far are discarded: the resumed run begins the validation anew.
    pub(super) fn validate_on(&mut self, model: usize, observer: &mut dyn Observer, stopping: bool) -> Result<()> {
        loop {
            let trainee = &mut self.trainees[model];
            let Stage::Validating { next, labels, sum, count, began } = &mut trainee.stage else {
                unreachable!("asked for in a validation only");
            };
            let source = trainee.valid.as_mut().expect("a validation begins only where there is held-out data");
            if labels.len() == 2 || !labels.is_empty() && (stopping || *next == source.batches_per_epoch()) {
                return Ok(());
            }
            if *next == source.batches_per_epoch() {
                let loss = mean_loss(*sum, *count)?;
                observer.valid(trainee.done, loss, began.elapsed().as_secs_f64())?;
                trainee.ends |= observer.wants_end();
                self.rested(model, observer)?;
                let ended = matches!(self.trainees[model].stage, Stage::Done);
                return if ended { Ok(()) } else { self.train_on(model, observer, stopping) };
            }
            if stopping {
                self.offer(model, observer)?;
                let trainee = &mut self.trainees[model];
                trainee.owes_validation = true;
                trainee.stage = Stage::Waiting;
                return Ok(());
            }
            let count = fill_held_out(source.as_mut(), *next, &mut trainee.valid_batch)?;
            *next += 1;
            if count > 0 {
                labels.push_back(count);
                let inputs = batch_inputs(&self.engine.model(model).train, &trainee.valid_batch)?;
                self.engine.begin_evaluation(model, &inputs, 1.0)?;
            }
        }
    }

    /// Evaluates a model that has no step in flight, on one pass over `source`.
    pub(super) fn wait_evaluation(&mut self, model: usize, source: &mut dyn Source) -> Result<f32> {
        self.check_failed(model)?;
        check_held_out(source)?;
        let (mut batch, mut sum, mut count) = (Batch::zeros(source.spec()), 0.0, 0);
        let mut begin_all = || -> Result<()> {
            for index in 0..source.batches_per_epoch() {
                let labels = fill_held_out(source, index, &mut batch)?;
                if labels == 0 {
                    continue;
                }
                if self.engine.steps_in_flight(model) == 2 {
                    sum += f64::from(self.engine.wait_begun_evaluation(model)?);
                }
                let inputs = batch_inputs(&self.engine.model(model).train, &batch)?;
                self.engine.begin_evaluation(model, &inputs, 1.0)?;
                count += labels;
            }
            Ok(())
        };
        let begun = begin_all();
        // If the data is at fault, the model is not: what has begun ends, and the model can go on.
        while self.engine.steps_in_flight(model) > 0 && !self.engine.is_ending(model) {
            sum += f64::from(self.engine.wait_begun_evaluation(model)?);
        }
        begun?;
        self.engine.skip_time(model);
        mean_loss(sum, count)
    }
}

/// Refuses held-out data that never ends.
pub(super) fn check_held_out(source: &dyn Source) -> Result<()> {
    match source.batches_per_epoch() {
        u64::MAX => Err(Error::bad("held-out data without an end: a validation would have none")),
        _ => Ok(()),
    }
}

/// Makes a held-out minibatch and counts its labels.
fn fill_held_out(source: &mut dyn Source, index: u64, batch: &mut Batch) -> Result<u64> {
    source.fill(index, batch)?;
    check_ids(batch)?;
    labelled(batch)
}

/// The loss of held-out data: the sum over its labelled positions, divided by their number.
fn mean_loss(sum: f64, count: u64) -> Result<f32> {
    match count {
        0 => Err(Error::bad("no position of the held-out data has a label")),
        _ => Ok((sum / count as f64) as f32),
    }
}
