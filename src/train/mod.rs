//! Training: optimizers and schedules, the loop over steps, metrics, checkpoints, the report.

pub mod metrics;
mod optimizer;
mod session;

pub use optimizer::{Optimizer, Schedule};
pub use session::{Observer, Session, StepReport, TrainOptions, Weights, inputs_of, plan_model, prepare, trace_model};
