//! From a job to plans: how each model is cut, where it runs, and how models share the devices.
//!
//! [`planned`] is the entry: it traces the models, has [`placing`] plan and place them, and predicts a step.
//! [`fitting`] makes plans fit free memory, [`room`] plans models that are added later, and [`rehearsal`] tries ways to
//! take turns. [`words`] and [`json`] describe a plan, and [`advice`] says what would help.

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
