//! What a run of several models or devices shows while it goes on: on a terminal, a line for each device in addition to
//! the models' bars; otherwise one JSON object per line.
//!
//! It looks at the engine after every task, but draws at most a few times per second: training must not wait for a
//! terminal.

use crate::print::say;
use hydra::engine::{DeviceState, Engine};
use hydra::trace::TaskName;
use indicatif::ProgressBar;
use serde::Serialize;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The least time between JSON lines; a terminal is redrawn more often, since its lines are not kept.
const BETWEEN_LINES: Duration = Duration::from_secs(1);
const BETWEEN_DRAWINGS: Duration = Duration::from_millis(200);

/// How far a model has come.
#[derive(Clone, Debug, Serialize)]
pub struct ModelState {
    pub name: String,
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Loss of the last step.
    pub loss: Option<f32>,
    /// [`WAITING`], [`TRAINING`], or the word for how it ended: `done`, `stopped`, `failed`, `cancelled`.
    pub status: &'static str,
    /// Why it ended early, if there is a reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The model has not run at all.
pub const WAITING: &str = "waiting";
/// The model has begun and not ended.
pub const TRAINING: &str = "training";

/// The models of a run by their numbers, shared with what watches each.
pub type Models = Rc<RefCell<Vec<ModelState>>>;

/// One line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    models: &'a [ModelState],
    devices: Vec<Device>,
}

/// What a device is doing.
#[derive(Debug, Serialize)]
struct Device {
    device: usize,
    /// In words: `gpt shard 2 backward`.
    runs: Option<String>,
    next: Option<String>,
    /// The share of the time since the start of training in which it did not compute.
    idle_share: f64,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let [runs, next] = [&self.runs, &self.next].map(|unit| unit.as_deref().unwrap_or("nothing"));
        write!(f, "runs {runs}  next {next}  idle {:.0} %", 100.0 * self.idle_share)
    }
}

impl Device {
    fn new(device: usize, state: &DeviceState, models: &[ModelState], secs: f64) -> Device {
        let unit = |task: TaskName| {
            let model = models.get(usize::from(task.model)).map_or("a model", |m| m.name.as_str());
            format!("{model} shard {} {}", task.shard, task.what.label())
        };
        let idle_share = if secs > 0.0 { (1.0 - state.busy_secs / secs).clamp(0.0, 1.0) } else { 0.0 };
        Device { device, runs: state.runs.map(unit), next: state.next.map(unit), idle_share }
    }
}

/// Where it is shown.
pub enum Show {
    /// A line for each device.
    Bars(Vec<ProgressBar>),
    Json,
}

/// Shows the state of a run from time to time.
pub struct Live {
    models: Models,
    show: Show,
    /// When training began, on the devices' clock.
    began_secs: f64,
    last: Instant,
}

impl Live {
    /// Shows training that begins at `began_secs` on the devices' clock.
    pub fn new(models: Models, show: Show, began_secs: f64) -> Live {
        Live { models, show, began_secs, last: Instant::now() }
    }

    /// Looks at the engine, and shows the state if it is time to.
    pub fn look(&mut self, engine: &Engine) {
        let between = if matches!(self.show, Show::Json) { BETWEEN_LINES } else { BETWEEN_DRAWINGS };
        if self.last.elapsed() >= between {
            self.last = Instant::now();
            self.draw(engine);
        }
    }

    /// Removes the devices' lines; the last JSON line tells how the run ended.
    pub fn finish(&mut self, engine: &Engine) {
        match &self.show {
            Show::Bars(bars) => bars.iter().for_each(ProgressBar::finish_and_clear),
            Show::Json => self.draw(engine),
        }
    }

    fn draw(&self, engine: &Engine) {
        for (number, model) in self.models.borrow_mut().iter_mut().enumerate() {
            let begun = number < engine.models() && engine.steps_in_flight(number) > 0;
            if model.status == WAITING && begun {
                model.status = TRAINING;
            }
        }
        let models = self.models.borrow();
        let secs = engine.now_secs() - self.began_secs;
        let devices = engine.device_states().enumerate().map(|(d, state)| Device::new(d, &state, &models, secs));
        match &self.show {
            Show::Bars(bars) => bars.iter().zip(devices).for_each(|(bar, device)| bar.set_message(device.to_string())),
            Show::Json => {
                let line = Line { event: "progress", models: &models, devices: devices.collect() };
                // Only names and numbers, so this cannot fail.
                say(serde_json::to_string(&line).unwrap_or_default());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra::trace::What;

    fn models() -> Vec<ModelState> {
        let model = |name: &str, step, loss, status, reason: Option<&str>| ModelState {
            name: name.into(),
            step,
            steps: 7,
            loss,
            status,
            reason: reason.map(String::from),
        };
        vec![
            model("a \"b\"", 0, None, WAITING, None),
            model("c", 3, Some(0.5), TRAINING, None),
            model("d", 7, Some(f32::NAN), "failed", Some("the loss is NaN")),
        ]
    }

    fn task(model: u16, shard: u16, what: What) -> Option<TaskName> {
        Some(TaskName { what, model, shard, microbatch: Some(1) })
    }

    #[test]
    fn a_line_is_one_json_object() {
        let models = models();
        let busy = DeviceState { runs: task(1, 2, What::Backward), next: task(0, 0, What::Forward), busy_secs: 1.0 };
        let waits = DeviceState { runs: None, next: task(2, 1, What::LastUnit), busy_secs: 0.0 };
        let devices = vec![Device::new(0, &busy, &models, 4.0), Device::new(1, &waits, &models, 4.0)];
        let text = serde_json::to_string(&Line { event: "progress", models: &models, devices }).unwrap();
        assert_eq!(
            text,
            "{\"event\":\"progress\",\"models\":[{\"name\":\"a \\\"b\\\"\",\"step\":0,\"steps\":7,\"loss\":null,\"status\":\"waiting\"},\
             {\"name\":\"c\",\"step\":3,\"steps\":7,\"loss\":0.5,\"status\":\"training\"},\
             {\"name\":\"d\",\"step\":7,\"steps\":7,\"loss\":null,\"status\":\"failed\",\"reason\":\"the loss is NaN\"}],\
             \"devices\":[{\"device\":0,\"runs\":\"c shard 2 backward\",\"next\":\"a \\\"b\\\" shard 0 forward\",\"idle_share\":0.75},\
             {\"device\":1,\"runs\":null,\"next\":\"d shard 1 last unit\",\"idle_share\":1.0}]}"
        );
    }

    #[test]
    fn a_device_in_words() {
        let models = models();
        let state = DeviceState { runs: task(1, 2, What::Eval), next: None, busy_secs: 9.0 };
        // Tasks are measured after the clock was read: a share stays a share.
        assert_eq!(Device::new(0, &state, &models, 8.0).to_string(), "runs c shard 2 eval  next nothing  idle 0 %");
        assert_eq!(Device::new(0, &state, &models, 0.0).idle_share, 0.0);
        let unknown = DeviceState { runs: None, next: task(3, 0, What::Forward), busy_secs: 1.0 };
        let words = "runs nothing  next a model shard 0 forward  idle 50 %";
        assert_eq!(Device::new(0, &unknown, &models, 2.0).to_string(), words);
    }
}
