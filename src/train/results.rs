//! results.csv and the table at the end of a run: what became of each model.
//!
//! Rows arrive in any order, as models end, and are written in the order of the models' numbers. Every number in the
//! file reads back as the same number; an unknown value is an empty field.

use super::selection::best_first;
use crate::base::{Error, Result, format_secs};
use crate::nn::safely::write_safely;
use std::path::{Path, PathBuf};

/// What became of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelResult {
    /// Its number in the run.
    pub model: usize,
    /// Its name.
    pub name: String,
    /// The keys that its search varies, each with the model's value as written in a job file.
    pub searched: Vec<(String, String)>,
    /// How it ended.
    pub status: Status,
    /// Steps done.
    pub steps: u64,
    /// Loss of the last minibatch.
    pub train_loss: Option<f32>,
    /// Loss on held-out data at the last evaluation.
    pub valid_loss: Option<f32>,
    /// Seconds of its steps and validations, over all parts of an interrupted run: the sum over its rows in
    /// metrics.jsonl.
    pub secs: f64,
    /// Its folder.
    pub directory: PathBuf,
}

/// How a model ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// All its steps are done.
    Done,
    /// Selection ended it, for this reason.
    Stopped(String),
    /// It went wrong, for this reason.
    Failed(String),
    /// It was ended before its last step on request.
    Cancelled,
}

impl Status {
    /// The word for it.
    pub fn word(&self) -> &'static str {
        match self {
            Status::Done => "done",
            Status::Stopped(_) => "stopped",
            Status::Failed(_) => "failed",
            Status::Cancelled => "cancelled",
        }
    }

    /// The reason, where there is one; otherwise empty.
    pub fn reason(&self) -> &str {
        match self {
            Status::Stopped(reason) | Status::Failed(reason) => reason,
            Status::Done | Status::Cancelled => "",
        }
    }
}

/// The best model of a search: the lowest loss on held-out data or, where no model has one, the lowest loss in
/// training. Losses of models with different data are not comparable. Failed models and NaN losses are left out; among
/// equals the lower model number wins.
pub fn best(results: &[ModelResult]) -> Option<&ModelResult> {
    let of = |metric: fn(&ModelResult) -> Option<f32>| {
        let candidates = results.iter().filter(|r| !matches!(r.status, Status::Failed(_)));
        let numbers =
            candidates.filter_map(|r| Some((f64::from(metric(r)?), r))).filter(|(metric, _)| !metric.is_nan());
        numbers.min_by(|a, b| best_first((a.0, a.1.model), (b.0, b.1.model))).map(|(_, result)| result)
    };
    // A training loss and a held-out loss are not comparable.
    of(|r| r.valid_loss).or_else(|| of(|r| r.train_loss))
}

/// Writes results.csv: a header, then a line per model. Quoted as in RFC 4180; lines end in a plain line feed.
///
/// The columns are name, the searched keys, status, reason, steps_done, train_loss, valid_loss, secs, directory.
///
/// # Errors
/// When the operating system refuses; an existing file is then left as it was.
pub fn write(path: &Path, results: &[ModelResult]) -> Result<()> {
    let text = csv(results);
    write_safely(path, |out| out.write_all(text.as_bytes()))
}

fn csv(results: &[ModelResult]) -> String {
    let rows = in_order(results);
    // A key of any model's search has a column, in order of first mention.
    let mut keys: Vec<&str> = Vec::new();
    for (key, _) in rows.iter().flat_map(|row| &row.searched) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    let last = ["status", "reason", "steps_done", "train_loss", "valid_loss", "secs", "directory"];
    let mut text = String::new();
    push_line(&mut text, ["name"].into_iter().chain(keys.iter().copied()).chain(last));
    for row in rows {
        let value = |key: &str| row.searched.iter().find(|(k, _)| k == key).map_or("", |(_, value)| value);
        // Debug prints the fewest digits that read back as the same number, with an exponent where that is shorter.
        let loss = |loss: Option<f32>| loss.map_or(String::new(), |loss| format!("{loss:?}"));
        let numbers = [row.steps.to_string(), loss(row.train_loss), loss(row.valid_loss), format!("{:?}", row.secs)];
        let directory = row.directory.to_string_lossy();
        let fields = [row.name.as_str()]
            .into_iter()
            .chain(keys.iter().map(|key| value(key)))
            .chain([row.status.word(), row.status.reason()])
            .chain(numbers.iter().map(String::as_str))
            .chain([&*directory]);
        push_line(&mut text, fields);
    }
    text
}

/// Adds a line of CSV. A field with a comma, a quote or a line break is put in quotes, its own quotes doubled.
fn push_line<'a>(text: &mut String, fields: impl Iterator<Item = &'a str>) {
    for (i, field) in fields.enumerate() {
        if i > 0 {
            text.push(',');
        }
        if field.contains(['"', ',', '\n', '\r']) {
            text.push('"');
            text.push_str(&field.replace('"', "\"\""));
            text.push('"');
        } else {
            text.push_str(field);
        }
    }
    text.push('\n');
}

/// Reads a results.csv: the fields of each line, the header first.
///
/// # Errors
/// When the file cannot be read, a quote is not closed, or a line has a different number of fields from the header.
pub fn read(path: &Path) -> Result<Vec<Vec<String>>> {
    let damaged = |what: String| Error::bad(format!("{}: damaged: {what}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| damaged(e.to_string()))?;
    let rows = parse(&text).ok_or_else(|| damaged("it breaks off".into()))?;
    match rows.iter().enumerate().find(|(_, row)| row.len() != rows[0].len()) {
        Some((i, row)) => Err(damaged(format!("row {i} has {} fields, the header {}", row.len(), rows[0].len()))),
        None => Ok(rows),
    }
}

/// Parses CSV as in RFC 4180, lines ending in a plain line feed; `None` where it does not end with a whole line.
fn parse(text: &str) -> Option<Vec<Vec<String>>> {
    let (mut rows, mut row, mut field) = (Vec::new(), Vec::new(), String::new());
    let mut chars = text.chars().peekable();
    let mut quoted = false;
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => field.extend(chars.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => row.push(std::mem::take(&mut field)),
            '\n' if !quoted => {
                row.push(std::mem::take(&mut field));
                rows.push(std::mem::take(&mut row));
            }
            c => field.push(c),
        }
    }
    (!quoted && row.is_empty() && field.is_empty()).then_some(rows)
}

/// The table for people to read: a header, then a row per model. A reason is put on one line, shortened where it is
/// long.
pub fn table(results: &[ModelResult]) -> Vec<Vec<String>> {
    let header = ["model", "steps", "loss", "held-out loss", "time", "status"].map(String::from).to_vec();
    let rows = in_order(results).into_iter().map(|row| {
        let loss = |loss: Option<f32>| loss.map_or("-".to_string(), |loss| format!("{loss:.4}"));
        let status = match row.status.reason() {
            "" => row.status.word().to_string(),
            reason => format!("{}: {}", row.status.word(), one_line(reason)),
        };
        let (train, valid) = (loss(row.train_loss), loss(row.valid_loss));
        vec![row.name.clone(), row.steps.to_string(), train, valid, format_secs(row.secs), status]
    });
    [header].into_iter().chain(rows).collect()
}

fn one_line(reason: &str) -> String {
    const LONGEST: usize = 60;
    let words = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    if words.chars().count() <= LONGEST { words } else { words.chars().take(LONGEST).collect::<String>() + "..." }
}

fn in_order(results: &[ModelResult]) -> Vec<&ModelResult> {
    let mut rows: Vec<&ModelResult> = results.iter().collect();
    rows.sort_by_key(|row| row.model);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn result(model: usize, status: Status, train_loss: Option<f32>, valid_loss: Option<f32>) -> ModelResult {
        ModelResult {
            model,
            name: format!("m{model}"),
            searched: Vec::new(),
            status,
            steps: 7,
            train_loss,
            valid_loss,
            secs: 1.5,
            directory: PathBuf::from(format!("runs/m{model}")),
        }
    }

    #[test]
    fn rows_stand_by_number_and_awkward_names_in_quotes() {
        let pair = |key: &str, value: &str| (key.to_string(), value.to_string());
        let mut first = result(0, Status::Failed("NaN in \"h.0\",\nstep 3".into()), Some(f32::NAN), None);
        first.name = "a,b".into();
        first.searched = vec![pair("lr", "1e-3"), pair("betas", "0.9,0.95")];
        let mut second = result(1, Status::Stopped("place 2".into()), Some(0.1), Some(1e-10));
        second.name = "say \"x\"".into();
        second.searched = vec![pair("batch", "16"), pair("lr", "1")];
        let third = result(2, Status::Cancelled, None, None);
        let text = csv(&[third, first, second]);
        assert_eq!(
            text,
            "name,lr,betas,batch,status,reason,steps_done,train_loss,valid_loss,secs,directory\n\
             \"a,b\",1e-3,\"0.9,0.95\",,failed,\"NaN in \"\"h.0\"\",\nstep 3\",7,NaN,,1.5,runs/m0\n\
             \"say \"\"x\"\"\",1,,16,stopped,place 2,7,0.1,1e-10,1.5,runs/m1\n\
             m2,,,,cancelled,,7,,,1.5,runs/m2\n"
        );
        assert_eq!(
            csv(&[]),
            "name,status,reason,steps_done,train_loss,valid_loss,secs,directory\n",
            "no model, no row"
        );
    }

    #[test]
    fn a_file_replaces_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.csv");
        write(&path, &[result(0, Status::Done, None, None), result(1, Status::Done, None, None)]).unwrap();
        let rows = [result(0, Status::Done, Some(0.25), None)];
        write(&path, &rows).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), csv(&rows));
        let back = read(&path).unwrap();
        assert_eq!((back.len(), back[0][0].as_str(), back[1][4].as_str()), (2, "name", "0.25"));
        for (damaged, says) in
            [("name,status\na\n", "row 1 has 1 fields"), ("name\n\"a", "breaks off"), ("name\na", "breaks off")]
        {
            std::fs::write(&path, damaged).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("results.csv") && error.contains(says), "{error}");
        }
        assert_eq!(write(&folder.path().join("none/results.csv"), &rows).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn the_best_has_the_lowest_loss_that_compares() {
        let number = |results: &[ModelResult]| best(results).map(|r| r.model);
        let done = |model, train, valid| result(model, Status::Done, train, valid);
        assert_eq!(number(&[]), None);
        assert_eq!(number(&[done(0, None, None), done(1, Some(f32::NAN), None)]), None);
        assert_eq!(number(&[done(0, Some(f32::NAN), None), done(1, Some(f32::INFINITY), None)]), Some(1));
        assert_eq!(number(&[done(0, Some(2.0), None), done(1, Some(1.0), None)]), Some(1));
        assert_eq!(number(&[done(3, Some(1.0), None), done(2, Some(1.0), None)]), Some(2));
        assert_eq!(number(&[done(0, Some(0.5), None), done(1, Some(9.0), Some(3.0))]), Some(1));
        assert_eq!(number(&[done(0, Some(0.5), Some(f32::NAN)), done(1, Some(9.0), Some(3.0))]), Some(1));
        // Where no held-out loss is a number, training decides.
        assert_eq!(number(&[done(0, Some(0.5), Some(f32::NAN)), done(1, Some(9.0), None)]), Some(0));
        let failed = result(0, Status::Failed("disk full".into()), Some(0.1), Some(0.1));
        assert_eq!(number(std::slice::from_ref(&failed)), None);
        assert_eq!(number(&[failed, result(1, Status::Stopped("place 2".into()), Some(0.5), Some(0.4))]), Some(1));
        assert_eq!(number(&[done(0, None, Some(0.5)), result(1, Status::Cancelled, None, Some(0.4))]), Some(1));
    }

    #[test]
    fn the_table_is_short() {
        let long = format!("first\r\n  second {}", "x".repeat(80));
        let rows =
            table(&[result(1, Status::Failed(long), None, Some(0.123456)), result(0, Status::Done, Some(2.0), None)]);
        let cut = format!("failed: first second {}...", "x".repeat(47));
        let want: [&[&str]; 3] = [
            &["model", "steps", "loss", "held-out loss", "time", "status"],
            &["m0", "7", "2.0000", "-", &format_secs(1.5), "done"],
            &["m1", "7", "-", "0.1235", &format_secs(1.5), &cut],
        ];
        assert_eq!(rows, want);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the fields hold, they come back; numbers to the bit.
        #[test]
        fn fields_come_back(
            texts in prop::collection::vec("[a-z,\"\n\r ;é]{0,6}", 4),
            train in any::<f32>(), valid in any::<f32>(), secs in any::<f64>(), steps in any::<u64>(),
        ) {
            let mut row = result(0, Status::Failed(texts[1].clone()), Some(train), Some(valid));
            (row.name, row.steps, row.secs) = (texts[0].clone(), steps, secs);
            row.searched = vec![("lr".to_string(), texts[2].clone())];
            row.directory = PathBuf::from(&texts[3]);
            let rows = parse(&csv(&[row])).unwrap();
            prop_assert_eq!(rows.len(), 2);
            let [name, lr, status, reason, steps_done, train_loss, valid_loss, took, directory] = &rows[1][..] else {
                panic!("nine fields: {rows:?}");
            };
            prop_assert_eq!([name, reason, lr, directory], [&texts[0], &texts[1], &texts[2], &texts[3]]);
            prop_assert_eq!((status.as_str(), steps_done.parse::<u64>().unwrap()), ("failed", steps));
            let same = |text: &str, loss: f32| {
                let back: f32 = text.parse().unwrap();
                back.to_bits() == loss.to_bits() || back.is_nan() && loss.is_nan()
            };
            prop_assert!(same(train_loss, train) && same(valid_loss, valid), "{train_loss} {valid_loss}");
            let back: f64 = took.parse().unwrap();
            prop_assert!(back.to_bits() == secs.to_bits() || back.is_nan() && secs.is_nan());
        }
    }
}
