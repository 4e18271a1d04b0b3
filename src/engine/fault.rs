//! A model that ends before its time: its loss is not finite, or nobody wants it any more. The others go on, and their
//! bits are the same.
//!
//! What is on a lane runs out, and what belongs to a step before the one that failed; the rest is dropped, but keeps
//! its place until what it waited for is done, so that whoever waits for it does not start too soon. Then, for a loss
//! that is not finite, the step's forward runs again with a check after each layer.

use super::Engine;
use super::member::{Ending, Pending, Purpose, Whole};
use crate::base::{Error, Result};

impl Engine {
    /// Ends a model before its time; [`Engine::wait_any`] tells when. At rest it keeps what its last step has left, for
    /// [`Engine::wait_home`] to bring home; in the middle of a step that is of none, and cannot be read.
    ///
    /// # Errors
    /// When a device fails.
    pub fn cancel(&mut self, model: usize) -> Result<()> {
        if self.members[model].over || self.members[model].ending.is_some() {
            return Ok(());
        }
        self.end_early(model, Ending::Cancelled);
        self.go_on_ending(model)
    }

    /// Whether a model ends before its time, or has: nothing of it is begun any more, and [`Engine::wait_any`] tells
    /// why.
    pub fn is_ending(&self, model: usize) -> bool {
        self.members[model].over || self.members[model].ending.is_some()
    }

    /// Drops what is not on a lane.
    pub(super) fn end_early(&mut self, model: usize, ending: Ending) {
        let member = &mut self.members[model];
        if member.ending.is_some() || member.over {
            return;
        }
        member.ending = Some(ending);
        // The steps before one whose loss is not finite are whole: what is left of them runs out. Of one at rest all
        // are, and their updates that wait for the next step's visits stay to be made.
        let first = match ending {
            Ending::NotFinite { step, .. } => member.pending.iter().find(|p| p.step == step).map_or(0, |p| p.serial),
            Ending::Checking { .. } | Ending::Cancelled if member.is_at_rest() => u64::MAX,
            Ending::Checking { .. } | Ending::Cancelled => {
                if !member.at_home {
                    member.whole = Whole::Nothing;
                }
                0
            }
        };
        for pending in member.pending.iter_mut().filter(|p| p.serial >= first) {
            pending.void = !pending.is_over() || pending.loss.is_some_and(|loss| !loss.is_finite());
            pending.made = pending.units;
        }
        member.due = member.due.filter(|due| due.serial < first);
        member.state_fetched = member.state_fetched.filter(|&serial| serial < first);
        self.queue.drop_model(model, first, |serial| member.unbook(serial));
        if let Some(turns) = &mut self.turns {
            turns.release(model);
            turns.refresh(model, &self.members[model]);
        }
    }

    /// The next stage of a model's end, once nothing of it is on a lane.
    pub(super) fn go_on_ending(&mut self, model: usize) -> Result<()> {
        let member = &mut self.members[model];
        let Some(ending) = member.ending else { return Ok(()) };
        let busy = member.loose_tasks > 0 || member.pending.iter().any(|p| p.tasks > 0);
        if busy || member.over {
            return Ok(());
        }
        match ending {
            Ending::NotFinite { step, loss } => {
                let whole = self.left_by_void(model, step);
                let member = &mut self.members[model];
                member.whole = whole;
                member.pending.retain(|p| !p.void);
                member.ending = Some(Ending::Checking { step, loss });
                member.not_finite_layer = None;
                let choice = member.plan.choice.clone();
                for rings in self.members[model].rings.clone() {
                    self.rings[rings].forget_model(model, |shard| choice.rests(shard));
                }
                self.begin(model, Purpose::Check, step, 1.0)
            }
            Ending::Checking { step, loss } if member.pending.iter().all(|p| p.is_over()) => {
                let layer = member.not_finite_layer.map(|l| member.model.train.layers[l].name.clone());
                self.conclude(model, Error::NotFinite { step, loss, layer });
                Ok(())
            }
            Ending::Checking { .. } => Ok(()),
            Ending::Cancelled => {
                self.conclude(model, Error::Cancelled);
                Ok(())
            }
        }
    }

    /// What is left of a model's state of before `step`, whose loss is not finite. Where one of a step's losses is not,
    /// its updates do nothing; those of the step behind it may have run before the loss was known.
    fn left_by_void(&self, model: usize, step: u64) -> Whole {
        let member = &self.members[model];
        let is_gated = |p: &Pending| p.loss.is_some() && self.losses(model, p.step).any(|loss| !loss.is_finite());
        if member.pending.iter().skip_while(|p| p.step != step).any(|p| p.updated && !is_gated(p)) {
            return Whole::Nothing;
        }
        if member.model.train.states.is_empty() { Whole::All } else { Whole::Parameters }
    }

    fn conclude(&mut self, model: usize, why: Error) {
        let member = &mut self.members[model];
        member.pending.retain(|p| !p.void && p.purpose != Purpose::Check);
        (member.over, member.why) = (true, Some(why));
        if let Some(turns) = &mut self.turns {
            turns.refresh(model, &self.members[model]);
        }
    }
}
