//! metrics.jsonl: one JSON object per line, for every step and every validation.

use super::json_lines::{JsonLines, read, salvage};
use super::observer::StepReport;
use crate::base::Result;
use crate::engine::StepResult;
use crate::trace::Bound;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;

/// One line. The loss is f32 and is written with digits that read back as the same f32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Row {
    /// A training step.
    Step(StepRow),
    /// A validation, after `step` steps.
    Valid(ValidRow),
}

impl Row {
    /// Seconds that the row accounts for.
    pub fn secs(&self) -> f64 {
        match self {
            Row::Step(row) => row.secs,
            Row::Valid(row) => row.secs,
        }
    }
}

/// A training step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Step, from 0.
    pub step: u64,
    /// Loss of the minibatch.
    #[serde(deserialize_with = "finite_or_nan")]
    pub loss: f32,
    /// Learning rate of its update.
    pub lr: f64,
    /// Global norm of its gradient, before clipping.
    #[serde(deserialize_with = "finite_or_nan")]
    pub grad_norm: f64,
    /// Tokens per second, for language models.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tokens_per_sec: Option<f64>,
    /// Samples per second, for others.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub samples_per_sec: Option<f64>,
    /// Seconds since the step before ended.
    pub secs: f64,
    /// Of those, seconds in which the device computed.
    pub compute_secs: f64,
    /// In which it waited for a copy to the device.
    pub h2d_secs: f64,
    /// In which it waited for a copy from the device.
    pub d2h_secs: f64,
    /// In which it waited for the host's arithmetic.
    pub host_secs: f64,
    /// In which it waited for the disk.
    pub disk_secs: f64,
    /// In which nothing ran that it waited for.
    pub idle_secs: f64,
}

impl StepRow {
    /// The row of a step that has ended, without rates.
    pub fn new(report: &StepReport) -> StepRow {
        let StepResult { step, loss, grad_norm, secs, bound } = report.result;
        StepRow {
            step,
            loss,
            lr: report.lr,
            grad_norm,
            tokens_per_sec: None,
            samples_per_sec: None,
            secs,
            compute_secs: bound.compute,
            h2d_secs: bound.h2d,
            d2h_secs: bound.d2h,
            host_secs: bound.host,
            disk_secs: bound.disk,
            idle_secs: bound.idle,
        }
    }

    /// The seconds by what bound them.
    pub fn bound(&self) -> Bound {
        Bound {
            compute: self.compute_secs,
            h2d: self.h2d_secs,
            d2h: self.d2h_secs,
            host: self.host_secs,
            disk: self.disk_secs,
            idle: self.idle_secs,
        }
    }
}

/// A validation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValidRow {
    /// Steps done before it.
    pub step: u64,
    /// Loss over all held-out data.
    #[serde(deserialize_with = "finite_or_nan")]
    pub valid_loss: f32,
    /// Seconds that it took.
    pub secs: f64,
}

/// JSON has no word for numbers that are not finite: they are written as `null`, which is read back as NaN. The row of
/// a step whose gradient overflowed must not make the whole file unreadable.
fn finite_or_nan<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + From<f32>>(
    from: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_else(|| f32::NAN.into()))
}

/// Appends rows to a file.
#[derive(Debug)]
pub struct Metrics {
    lines: JsonLines<Row>,
    secs: f64,
    missing: u64,
}

impl Metrics {
    /// Starts a file, or continues an existing one, dropping its rows from `step` on and whatever is not a row. A
    /// killed run or a power cut may have left anything there, and training does not depend on the file;
    /// [`Metrics::missing`] counts the rows that are gone.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Metrics> {
        let mut kept = if step == 0 || !path.exists() { Vec::new() } else { salvage(path)?.0 };
        kept.retain(|row| match row {
            Row::Step(r) => r.step < step,
            // A validation after exactly this step is done again.
            Row::Valid(r) => r.step < step,
        });
        // Whole or not at all: rows of steps that a checkpoint covers would never be written again.
        let lines = JsonLines::open(path, &kept)?;
        let secs = secs(&kept);
        let steps = kept.iter().filter_map(|row| if let Row::Step(r) = row { Some(r.step) } else { None });
        let missing = step - steps.collect::<BTreeSet<u64>>().len() as u64;
        Ok(Metrics { lines, secs, missing })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.lines.path()
    }

    /// How many steps before the one resumed from have no row.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// Waits until all rows are on the disk, where they survive a power cut.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn wait_sync(&mut self) -> Result<()> {
        self.lines.wait_sync()
    }

    /// Seconds of all rows in the file.
    pub fn secs(&self) -> f64 {
        self.secs
    }

    /// Appends a row, which is in the file when this returns.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn write(&mut self, row: &Row) -> Result<()> {
        self.lines.write(row)?;
        self.secs += row.secs();
        Ok(())
    }
}

/// Seconds of all `rows`.
pub fn secs(rows: &[Row]) -> f64 {
    // A plain sum of nothing is -0, and would be printed as such.
    rows.iter().map(Row::secs).fold(0.0, |sum, secs| sum + secs)
}

/// Reads a file's rows. A last line that was cut off is skipped.
///
/// # Errors
/// When the file cannot be read, or a complete line is not a row.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, loss: f32) -> Row {
        Row::Step(StepRow {
            step,
            loss,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens_per_sec: Some(10.0),
            samples_per_sec: None,
            secs: 1.0,
            compute_secs: 0.5,
            h2d_secs: 0.25,
            d2h_secs: 0.0,
            host_secs: 0.0,
            disk_secs: 0.0,
            idle_secs: 0.25,
        })
    }

    #[test]
    fn losses_come_back_bit_for_bit_and_a_resume_drops_what_follows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let losses = [0.1f32, 1.0 / 3.0, 16_777_217.0, f32::MIN_POSITIVE];
        let mut metrics = Metrics::open(&path, 0).unwrap();
        for (i, &loss) in losses.iter().enumerate() {
            metrics.write(&step(i as u64, loss)).unwrap();
        }
        metrics.write(&Row::Valid(ValidRow { step: 4, valid_loss: 0.7, secs: 0.25 })).unwrap();
        assert_eq!(metrics.secs(), 4.25);
        drop(metrics);
        let rows = read_rows(&path).unwrap();
        for (row, loss) in rows.iter().zip(losses) {
            assert!(matches!(row, Row::Step(r) if r.loss.to_bits() == loss.to_bits()));
        }
        assert_eq!(Metrics::open(&path, 2).unwrap().secs(), 2.0);
        assert_eq!(read_rows(&path).unwrap(), rows[..2]);
        // Of four steps the first row and the last are there, and what lies between them is none.
        let lines = |rows: &[Row]| rows.iter().map(|row| serde_json::to_string(row).unwrap()).collect::<Vec<_>>();
        let torn =
            [lines(&rows[..1]).concat().as_bytes(), b"\n\xff{}\0\n", lines(&rows[3..4]).concat().as_bytes()].concat();
        std::fs::write(&path, &torn).unwrap();
        let mut left = Metrics::open(&path, 4).unwrap();
        assert_eq!((left.missing(), read_rows(&path).unwrap().len()), (2, 2));
        left.wait_sync().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Metrics::open(&path, 4).unwrap().missing(), 4);
        assert_eq!(Metrics::open(&path, 0).unwrap().missing(), 0);
        std::fs::write(&path, "{\"step\":0,\"valid_loss\":1.0,\"secs\":0.5}\n{\"step\":1,\"lo").unwrap();
        assert_eq!(read_rows(&path).unwrap().len(), 1);
        std::fs::write(&path, "{\"step\":0,\"valid_loss\":null,\"secs\":0.5}\n").unwrap();
        assert!(
            matches!(read_rows(&path).unwrap()[..], [Row::Valid(ValidRow { valid_loss, .. })] if valid_loss.is_nan())
        );
        std::fs::write(&path, b"{\xff\xfe}\n").unwrap();
        assert_eq!(read_rows(&path).unwrap_err().exit_code(), 2);
        std::fs::write(&path, "nonsense\n{}\n").unwrap();
        assert!(read_rows(&path).unwrap_err().to_string().contains("line 1"));
    }
}
