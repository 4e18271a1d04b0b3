//! Training: optimizers and schedules, the loop over steps, metrics, checkpoints, selection, results, the report.

mod checkpoint;
mod fleet;
mod forward;
mod json_lines;
pub mod metrics;
mod observer;
mod optimizer;
mod options;
mod prepare;
mod report;
pub mod results;
pub mod run_files;
mod save;
mod selection;
mod selection_log;
mod session;
mod steps;
mod trainee;
mod validation;
mod weights;

pub use checkpoint::{Change, Checkpoint, write_checkpoint, write_last_checkpoint};
pub use fleet::Fleet;
pub use forward::wait_forward;
pub use json_lines::JsonLines;
pub use observer::{FleetObserver, Observer, StepReport};
pub use optimizer::{Optimizer, Schedule};
pub use options::TrainOptions;
pub use prepare::{batch_inputs, inputs_of, plan_model, prepare, trace_model};
pub use report::write_report;
pub use save::{save_adapters, save_model};
pub use selection::{Asha, Patience, Rungs, Selection, Survivors, Verdict};
pub use selection_log::{SelectionLog, SelectionRow, read_selection};
pub use session::Session;
pub use trainee::ModelToTrain;
pub use weights::{GiveTensor, Weights};

pub use crate::nn::safely::write_safely;
