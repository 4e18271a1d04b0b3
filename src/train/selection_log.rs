//! selection.jsonl: the reports of searches' models, one JSON object per line, in the order in which verdicts were
//! given.
//!
//! Asynchronous halving depends on who reports first, so a resumed run needs the order and not just the losses. Lines
//! carry models' names, since their numbers may differ from one start of a run to the next. A line is in the file
//! before its verdict is acted on.

use super::json_lines::{JsonLines, salvage};
use super::selection::{Selection, Verdict};
use crate::base::Result;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One report of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelectionRow {
    /// The model's name.
    pub model: String,
    /// Steps done.
    pub step: u64,
    /// The loss at that step, as a string: JSON cannot represent an infinite number.
    metric: String,
}

impl SelectionRow {
    /// Makes a report of `model` after `step` steps.
    pub fn new(model: &str, step: u64, metric: f32) -> SelectionRow {
        // Debug prints the fewest digits that read back as the same number.
        SelectionRow { model: model.to_string(), step, metric: format!("{metric:?}") }
    }

    /// The loss.
    pub fn metric(&self) -> f32 {
        self.metric.parse().unwrap_or(f32::NAN)
    }
}

/// Appends reports to a file, after those that [`read_selection`] returned.
pub type SelectionLog = JsonLines<SelectionRow>;

/// Reads a file's reports in order (none where there is no file), and counts the damaged lines, which are skipped.
/// After a power cut anything may follow the last report that a checkpoint covers; models repeat the reports after it.
/// A last line that was cut off is skipped without being counted: its verdict was never acted on.
///
/// # Errors
/// When the file cannot be read.
pub fn read_selection(path: &Path) -> Result<(Vec<SelectionRow>, usize)> {
    if path.exists() { salvage(path) } else { Ok((Vec::new(), 0)) }
}

impl Selection {
    /// Restores a selection from `rows`, and returns the verdict on each of the `models`, which are given as a number
    /// in the selection, a name, and the step from which it resumes. A model will repeat its reports after that step.
    /// Where models are compared with each other, these reports are noted now too, since others were judged by them;
    /// where each is judged alone, they count when they are repeated.
    pub fn replay(&mut self, rows: &[SelectionRow], models: &[(usize, &str, u64)]) -> Vec<Verdict> {
        let mut verdicts = vec![Verdict::GoOn; models.len()];
        for row in rows {
            let Some(at) = models.iter().position(|(_, name, _)| *name == row.model) else { continue };
            let (number, _, from) = models[at];
            let comes_again = row.step > from;
            if comes_again && matches!(self, Selection::Patience(_)) {
                continue;
            }
            let verdict = self.report(number, row.step, f64::from(row.metric()));
            if !comes_again && matches!(verdicts[at], Verdict::GoOn) {
                verdicts[at] = verdict;
            }
        }
        verdicts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Asha, Patience, Rungs};

    fn rows(of: &[(&str, u64, f32)]) -> Vec<SelectionRow> {
        of.iter().map(|&(model, step, metric)| SelectionRow::new(model, step, metric)).collect()
    }

    #[test]
    fn reports_come_back_bit_for_bit_and_a_torn_line_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("selection.jsonl");
        assert_eq!(read_selection(&path).unwrap(), (vec![], 0));
        let all = rows(&[
            ("a \"b\"", 2, 0.1),
            ("c", 2, f32::INFINITY),
            ("c", 4, f32::NAN),
            ("d", u64::MAX, f32::MIN_POSITIVE),
        ]);
        let mut log = SelectionLog::open(&path, &[]).unwrap();
        all.iter().for_each(|row| log.write(row).unwrap());
        log.wait_sync().unwrap();
        drop(log);
        let (back, damaged) = read_selection(&path).unwrap();
        assert!(back == all && damaged == 0);
        let metrics: Vec<u32> = back.iter().map(|row| row.metric().to_bits()).collect();
        assert_eq!(metrics[..2], [0.1f32.to_bits(), f32::INFINITY.to_bits()]);
        assert!(back[2].metric().is_nan() && back[3].metric() == f32::MIN_POSITIVE);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text += "{\"model\":\"e\",\"st";
        std::fs::write(&path, &text).unwrap();
        let (kept, damaged) = read_selection(&path).unwrap();
        assert!(kept == all && damaged == 0);
        let mut log = SelectionLog::open(&path, &kept).unwrap();
        log.write(&all[0]).unwrap();
        drop(log);
        assert_eq!(read_selection(&path).unwrap().0.len(), 5);
        // As after a power cut.
        std::fs::write(&path, text.replace("{\"model\":\"e\",\"st", "\0\0\0\n{}\n\0\0\0")).unwrap();
        assert_eq!(read_selection(&path).unwrap(), (all, 2));
    }

    /// The verdicts on reports that a selection gets after it was brought back by those before.
    fn after(
        mut selection: Selection,
        before: &[SelectionRow],
        from: &[(usize, &str, u64)],
        then: &[(usize, u64, f64)],
    ) {
        let mut whole = selection.clone();
        for row in before {
            let number = from.iter().find(|(_, name, _)| *name == row.model).unwrap().0;
            whole.report(number, row.step, f64::from(row.metric()));
        }
        let fresh = selection.clone();
        selection.replay(before, from);
        let verdicts = |s: &mut Selection| -> Vec<Verdict> {
            then.iter().map(|&(model, step, metric)| s.report(model, step, metric)).collect()
        };
        let want = verdicts(&mut whole);
        assert_eq!(verdicts(&mut selection), want);
        assert_ne!(verdicts(&mut fresh.clone()), want, "what was forgotten would not have been missed");
    }

    #[test]
    fn halving_goes_on_as_if_it_had_not_been_interrupted() {
        let asha = || Selection::Asha(Asha::new(Rungs::new(2, 2).unwrap()));
        let before = rows(&[("a", 2, 0.5), ("b", 2, 0.7), ("a", 4, 0.4)]);
        let from = [(0, "a", 4), (1, "b", 2), (2, "c", 0)];
        // Alone at the rung c would go on, and at the next as well.
        after(asha(), &before, &from, &[(2, 2, 0.6), (2, 4, 0.45)]);
        let mut selection = asha();
        let verdicts = selection.replay(&before, &from);
        assert_eq!(verdicts[0], Verdict::GoOn);
        assert!(matches!(&verdicts[1], Verdict::Stop(why) if why.contains("place 2 of 2")), "{verdicts:?}");
        assert_eq!(verdicts[2], Verdict::GoOn);
        // A model that lost the steps after its rung reports again and hears the same; others are judged by it
        // meanwhile.
        let mut selection = asha();
        let lost = [(0, "a", 1), (1, "b", 1), (2, "c", 0)];
        assert_eq!(selection.replay(&before, &lost), vec![Verdict::GoOn; 3]);
        assert!(matches!(selection.report(2, 2, 0.6), Verdict::Stop(_)));
        assert!(
            matches!(selection.report(1, 2, f64::from(0.7f32)), Verdict::Stop(why) if why.contains("place 2 of 2"))
        );
    }

    #[test]
    fn patience_counts_what_its_checkpoint_has_seen() {
        let patience = || Selection::Patience(Patience::new(2));
        let before = rows(&[("a", 1, 0.5), ("b", 1, 0.4), ("a", 2, 0.6), ("a", 3, 0.7)]);
        after(patience(), &before[..3], &[(0, "a", 2), (1, "b", 1)], &[(0, 3, 0.7), (1, 2, 0.5), (1, 3, 0.5)]);
        // From its second step on, a model that was stopped after the third goes one step more.
        let mut selection = patience();
        assert_eq!(selection.replay(&before, &[(0, "a", 2)]), [Verdict::GoOn]);
        assert!(matches!(selection.report(0, 3, 0.7), Verdict::Stop(_)));
        assert!(matches!(&patience().replay(&before, &[(0, "a", 3)])[..], [Verdict::Stop(_)]));
    }
}
