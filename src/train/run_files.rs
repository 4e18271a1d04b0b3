//! The names of files in a run's directory that a report reads or writes.

/// The plan.
pub const PLAN: &str = "plan.json";
/// Events of the first and last steps.
pub const TRACE: &str = "trace.json";
/// What became of each model, in a run of several.
pub const RESULTS: &str = "results.csv";
/// In a model's folder: one line per step.
pub const METRICS: &str = "metrics.jsonl";
/// The report.
pub const REPORT: &str = "report.html";
/// The schedule as a picture.
pub const SCHEDULE: &str = "schedule.svg";
