//! Which models of a search go on and which stop early: asynchronous successive halving, patience, or a table.
//!
//! Pure: metrics in, verdicts out. A metric is a loss, so lower is better; NaN is worse than any number, and among
//! equals the lower model number is better. Invariant: a verdict is final. A repeated report (as when a resumed run
//! repeats steps) changes nothing and gets the same verdict, so a run's state can be restored by repeating its reports
//! in order.

use crate::base::{Error, Result};
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// What becomes of a model that has reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on training.
    GoOn,
    /// It ends here; the reason is one line.
    Stop(String),
}

/// Any rule that ends models early.
#[derive(Clone, Debug, PartialEq)]
pub enum Selection {
    /// Successive halving.
    Asha(Asha),
    /// Each model judged by its own losses.
    Patience(Patience),
    /// A table of survivors, where there are no losses.
    Survivors(Survivors),
}

impl Selection {
    /// Takes the metric of `model` after `step` steps and says whether it goes on. After a model's last step there is
    /// nothing to decide, and callers should ignore the verdict.
    pub fn report(&mut self, model: usize, step: u64, metric: f64) -> Verdict {
        match self {
            Selection::Asha(asha) => asha.report(model, step, metric),
            Selection::Patience(patience) => patience.report(model, step, metric),
            Selection::Survivors(survivors) => survivors.report(model, step),
        }
    }

    /// Whether a report of `model` after `step` steps changes anything, so that a resumed run needs it
    /// ([`Selection::replay`]). A repeated report does not.
    pub fn would_note(&self, model: usize, step: u64) -> bool {
        match self {
            Selection::Asha(asha) => asha.would_note(model, step),
            Selection::Patience(patience) => patience.would_note(model, step),
            Selection::Survivors(_) => false,
        }
    }

    /// Whether models are compared after `step` steps, so that each model needs a metric at exactly that step.
    pub fn has_rung(&self, step: u64) -> bool {
        match self {
            Selection::Asha(asha) => asha.rungs.at(step).is_some(),
            Selection::Patience(_) => false,
            Selection::Survivors(survivors) => survivors.rungs.at(step).is_some(),
        }
    }
}

/// The numbers of steps after which models are compared: `first * eta^k` for k = 0, 1, 2, ...
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rungs {
    /// The first rung, at least 1.
    first: u64,
    /// The factor between rungs, at least 2.
    eta: u64,
}

impl Rungs {
    /// Makes rungs that start at `first` steps, each `eta` times as many steps as the one before.
    ///
    /// # Errors
    /// [`Error::BadInput`] when `first` is 0 or `eta` is below 2: the rungs would not grow.
    pub fn new(first: u64, eta: u64) -> Result<Rungs> {
        if first == 0 || eta < 2 {
            return Err(Error::bad(format!(
                "rungs from {first} steps on, times {eta}, do not grow; want at least 1 and 2"
            )));
        }
        Ok(Rungs { first, eta })
    }

    /// The number of the rung after `step` steps, from 0; `None` where there is none.
    pub fn at(&self, step: u64) -> Option<usize> {
        let (mut steps, mut rung) = (self.first, 0);
        while steps < step {
            steps = steps.checked_mul(self.eta)?;
            rung += 1;
        }
        (steps == step).then_some(rung)
    }
}

/// Asynchronous successive halving (Li, Jamieson, Rostamizadeh, Gonina, Hardt, Recht & Talwalkar 2018, "A System for
/// Massively Parallel Hyperparameter Tuning", arXiv:1810.05934), in its stopping variant.
///
/// A model that reports at a rung goes on if it is among the best 1 in `eta` of those that have reported there so far,
/// itself included; this number is rounded down, but is at least one. So the first always goes on, and so does, of the
/// first `2 eta - 1`, each that is the best so far. In the paper's algorithm 2 a model waits at a rung and is promoted later,
/// when enough worse ones have reported; here the verdict is immediate and final, so that no model holds memory while
/// it waits. The price: verdicts depend on the order of arrival. A good model is never stopped by worse ones, but early
/// arrivals go on more easily than late ones.
///
/// A model that reports NaN counts as one that has reported, and never goes on.
#[derive(Clone, Debug, PartialEq)]
pub struct Asha {
    rungs: Rungs,
    /// For each rung the reports in order of arrival, at most one per model.
    reports: Vec<Vec<Report>>,
}

#[derive(Clone, Debug, PartialEq)]
struct Report {
    model: usize,
    metric: f64,
    verdict: Verdict,
}

impl Asha {
    /// Starts without any reports.
    pub fn new(rungs: Rungs) -> Asha {
        Asha { rungs, reports: Vec::new() }
    }

    fn would_note(&self, model: usize, step: u64) -> bool {
        let reported =
            |rung| self.reports.get(rung).is_some_and(|all: &Vec<Report>| all.iter().any(|r| r.model == model));
        self.rungs.at(step).is_some_and(|rung| !reported(rung))
    }

    /// Takes the metric of `model` after `step` steps; where there is no rung, the model goes on and nothing is noted.
    pub fn report(&mut self, model: usize, step: u64, metric: f64) -> Verdict {
        let Some(rung) = self.rungs.at(step) else { return Verdict::GoOn };
        if self.reports.len() <= rung {
            self.reports.resize(rung + 1, Vec::new());
        }
        let reports = &mut self.reports[rung];
        if let Some(before) = reports.iter().find(|report| report.model == model) {
            return before.verdict.clone();
        }
        let better = reports.iter().filter(|r| best_first((r.metric, r.model), (metric, model)).is_lt()).count() as u64;
        let reported = reports.len() as u64 + 1;
        let places = (reported / self.rungs.eta).max(1);
        let verdict = if metric.is_nan() {
            Verdict::Stop(format!("asha after {step} steps: the loss is no number"))
        } else if better < places {
            Verdict::GoOn
        } else {
            let place = better + 1;
            Verdict::Stop(format!("asha after {step} steps: place {place} of {reported}, and {places} may go on"))
        };
        reports.push(Report { model, metric, verdict: verdict.clone() });
        verdict
    }
}

/// Plain early stopping: a model ends after a number of evaluations without improvement, whatever the others do.
///
/// Every report is an evaluation. Only a lower metric than all before is an improvement; NaN never is.
#[derive(Clone, Debug, PartialEq)]
pub struct Patience {
    /// Number of evaluations without improvement after which a model ends, at least 1.
    evaluations: u64,
    models: BTreeMap<usize, Course>,
}

/// A model's record so far.
#[derive(Clone, Debug, PartialEq)]
struct Course {
    /// Lowest metric; NaN until a report is a number.
    best: f64,
    best_step: u64,
    last_step: u64,
    /// Evaluations since `best`.
    stale: u64,
}

impl Patience {
    /// Ends a model after `evaluations` evaluations without improvement; 0 is treated as 1.
    pub fn new(evaluations: u64) -> Patience {
        Patience { evaluations: evaluations.max(1), models: BTreeMap::new() }
    }

    fn would_note(&self, model: usize, step: u64) -> bool {
        self.models.get(&model).is_none_or(|course| step > course.last_step)
    }

    /// Takes the metric of `model` after `step` steps. Steps come in ascending order; a report that is not after the
    /// last one changes nothing.
    pub fn report(&mut self, model: usize, step: u64, metric: f64) -> Verdict {
        let start = Course { best: f64::NAN, best_step: 0, last_step: 0, stale: 0 };
        let course = self.models.entry(model).or_insert(start);
        if step > course.last_step {
            course.last_step = step;
            if metric < course.best || (course.best.is_nan() && !metric.is_nan()) {
                (course.best, course.best_step, course.stale) = (metric, step, 0);
            } else {
                course.stale += 1;
            }
        }
        if course.stale < self.evaluations {
            return Verdict::GoOn;
        }
        let Course { best, best_step, stale, .. } = course;
        Verdict::Stop(format!("patience: {stale} evaluations without improvement on {best:.4} after {best_step} steps"))
    }
}

/// Which models survive each rung, given as a table: the simulator, which has no losses, uses it in place of [`Asha`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivors {
    rungs: Rungs,
    /// Model numbers per rung, each list a subset of the one before.
    table: Vec<Vec<usize>>,
}

impl Survivors {
    /// `table[k]` holds the models that go on after rung k. Rungs beyond the table stop nobody.
    ///
    /// # Errors
    /// [`Error::BadInput`] when a list is empty, has a model twice, or has one that the list before lacks, as no
    /// halving produces.
    pub fn new(rungs: Rungs, table: Vec<Vec<usize>>) -> Result<Survivors> {
        for (k, list) in table.iter().enumerate() {
            if list.is_empty() {
                return Err(Error::bad(format!("rung {k} has no survivor; the best model of a rung always goes on")));
            }
            for (i, model) in list.iter().enumerate() {
                if list[..i].contains(model) {
                    return Err(Error::bad(format!("rung {k} has model {model} twice")));
                }
                if k > 0 && !table[k - 1].contains(model) {
                    return Err(Error::bad(format!("model {model} survives rung {k} but not rung {}", k - 1)));
                }
            }
        }
        Ok(Survivors { rungs, table })
    }

    /// Says whether `model` goes on after `step` steps.
    pub fn report(&self, model: usize, step: u64) -> Verdict {
        match self.rungs.at(step).and_then(|rung| self.table.get(rung)) {
            Some(list) if !list.contains(&model) => {
                Verdict::Stop(format!("survivors after {step} steps: not among them"))
            }
            _ => Verdict::GoOn,
        }
    }
}

/// Orders (metric, model) with the best first: numbers before NaN, lower before higher, then by the model's number.
pub(super) fn best_first(a: (f64, usize), b: (f64, usize)) -> Ordering {
    let nan_last = a.0.is_nan().cmp(&b.0.is_nan());
    nan_last.then(a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal)).then(a.1.cmp(&b.1))
}

#[cfg(test)]
#[path = "selection_tests.rs"]
mod tests;
