//! From a job to plans: how each model is cut, where it runs, and how models share the devices.
//!
//! [`planned`] is the whole: it has models traced, [`placing`] plan and place them, and predicts a step. [`fitting`]
//! holds plans to the memory that is free, [`room`] plans models that come later, [`rehearsal`] tries ways to take
//! turns. What a plan says is in [`words`] and [`json`], and in [`advice`] what would help.

mod advice;
mod fitting;
mod json;
mod placing;
mod planned;
mod rehearsal;
mod room;
mod words;

pub use advice::what_would_help;
pub use fitting::{plan_to_fit, why_not};
pub use placing::Sharing;
pub use planned::{Planned, PlannedJob, plan_job, warn_of_warmups};
pub use rehearsal::describe_rehearsal;
pub use room::{plan_added, roomy_arenas};
pub use words::{describe, summary, together};
