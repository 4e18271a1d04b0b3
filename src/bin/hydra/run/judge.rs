//! What ends models of searches early: each search's rule, with the record of the reports to it.
//!
//! A report is in selection.jsonl before its verdict is acted on. A resumed run begins by repeating the file's reports,
//! so that its verdicts are those of a run that was never interrupted.

use crate::job::Job;
use crate::print::warn;
use crate::rundir::{self, Found};
use hydra::base::Result;
use hydra::train::{Selection, SelectionLog, SelectionRow, Verdict, read_selection};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Judges one model.
pub struct Judge {
    number: usize,
    name: String,
    /// Shared by the models of a search.
    selection: Rc<RefCell<Selection>>,
    log: Rc<RefCell<SelectionLog>>,
}

impl Judge {
    /// Judges whether the model, whose loss after `step` steps is `metric`, goes on.
    ///
    /// # Errors
    /// When the report cannot be recorded.
    pub fn report(&self, step: u64, metric: f32) -> Result<Verdict> {
        let mut selection = self.selection.borrow_mut();
        if selection.would_note(self.number, step) {
            self.log.borrow_mut().write(&SelectionRow::new(&self.name, step, metric))?;
        }
        Ok(selection.report(self.number, step, f64::from(metric)))
    }

    /// Waits until all reports are on the disk.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn wait_sync(&self) -> Result<()> {
        self.log.borrow_mut().wait_sync()
    }

    /// Whether the model is compared after `step` steps.
    pub fn has_rung(&self, step: u64) -> bool {
        self.selection.borrow().has_rung(step)
    }
}

/// The rules of a run.
pub struct Judges {
    path: PathBuf,
    /// The reports before this start of the run.
    rows: Vec<SelectionRow>,
    /// The rule of each model; `None` for one that no rule ends early.
    rules: Vec<Option<Rc<RefCell<Selection>>>>,
    /// Number of searches whose rules have been added.
    searches: usize,
    log: Option<Rc<RefCell<SelectionLog>>>,
}

impl Judges {
    /// Makes the rules of the run in `out`; if a run was `found` there, its record is read.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn new(out: &Path, found: Found) -> Result<Judges> {
        let path = out.join(rundir::SELECTION);
        let (rows, damaged) = if found == Found::Run { read_selection(&path)? } else { (Vec::new(), 0) };
        if damaged > 0 {
            warn(format!("{}: {damaged} of its lines are damaged; the run goes on without them", path.display()));
        }
        Ok(Judges { rows, path, rules: Vec::new(), searches: 0, log: None })
    }

    /// Adds the rules of `job`'s models that were added since the last call, and returns each one's verdict so far;
    /// `from` are the steps from which the models go on.
    pub fn extend(&mut self, job: &Job, from: &[u64]) -> Vec<Verdict> {
        let first = self.rules.len();
        let mut verdicts = vec![Verdict::GoOn; job.models.len() - first];
        self.rules.resize(job.models.len(), None);
        for search in &job.searches[self.searches..] {
            let Some(stop) = &search.stop else { continue };
            let mut selection = stop.clone();
            let models: Vec<(usize, &str, u64)> =
                search.models.clone().map(|m| (m, job.models[m].name.as_str(), from[m])).collect();
            let shared_verdicts = selection.replay(&self.rows, &models);
            // A model that is judged alone will repeat its reports for the steps that it repeats, so the earlier ones
            // no longer count.
            if matches!(selection, Selection::Patience(_)) {
                let undone =
                    |row: &SelectionRow| models.iter().any(|(_, name, from)| row.model == *name && row.step > *from);
                self.rows.retain(|row| !undone(row));
            }
            search.models.clone().zip(shared_verdicts).for_each(|(m, verdict)| verdicts[m - first] = verdict);
            let shared = Rc::new(RefCell::new(selection));
            search.models.clone().for_each(|m| self.rules[m] = Some(Rc::clone(&shared)));
        }
        self.searches = job.searches.len();
        verdicts
    }

    /// The judge of model `number`, called `name`, if anything may end it early.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn judge(&mut self, number: usize, name: &str) -> Result<Option<Judge>> {
        let Some(selection) = self.rules[number].clone() else { return Ok(None) };
        let log = match &self.log {
            Some(log) => Rc::clone(log),
            None => Rc::clone(self.log.insert(Rc::new(RefCell::new(SelectionLog::open(&self.path, &self.rows)?)))),
        };
        Ok(Some(Judge { number, name: name.to_string(), selection, log }))
    }
}
