//! The event log and what is made from it: a Chrome trace, a Gantt chart, an account of where the time went, and the
//! report page.
//!
//! Everything here uses one kind of record, the [`Event`], and has no clock: times are given. The [`Recorder`] takes
//! events from the executor without delaying it and streams the chosen steps to `trace.json`; [`read_trace`] reads that
//! file back; [`StepAccount`] determines what bound a step; [`gantt_svg`], [`report_page`] and [`sweep_svg`] draw. Uses
//! [`base`](crate::base) alone.

mod bars;
mod chart;
mod chrome;
mod event;
mod gantt;
mod page;
mod recorder;
#[cfg(test)]
mod sample;
mod svg;
mod sweep;
mod utilisation;

pub use chrome::{Trace, read_trace};
pub use event::{Event, TaskName, What};
pub use gantt::{ColourBy, GanttOptions, gantt_svg};
pub use page::{DeviceRow, LaneRow, ModelCurves, ReportData, StepBound, report_page};
pub use recorder::{Keep, Recorder, RecorderOptions, Summary};
pub use sweep::{SweepLine, SweepPlot, sweep_svg};
pub use utilisation::{Bound, Ceilings, LaneSum, StepAccount};
