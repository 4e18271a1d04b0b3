//! What a run shows as it goes: on a terminal, a bar for each model; otherwise a line from time to time, or JSON lines
//! for several models or devices.

use crate::print::say;
use crate::run::live::{self, Live, ModelState, Models, Show};
use hydra::base::format_secs;
use hydra::engine::Engine;
use hydra::train::results::Status;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::time::{Duration, Instant};

/// The least time between lines.
const BETWEEN_LINES: Duration = Duration::from_secs(2);
/// The most time between lines.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);

/// Where the models and devices of a run show their progress.
pub struct Board {
    target: Target,
    models: Models,
    devices: Vec<ProgressBar>,
}

enum Target {
    Bars(MultiProgress),
    Lines,
    Json,
    Quiet,
}

impl Board {
    /// Bars on a terminal that can draw them; otherwise lines of text where one model trains alone on one device, and
    /// JSON lines where there are more of either. With `quiet`, nothing is shown.
    pub fn new(quiet: bool, models: usize, devices: usize) -> Board {
        let drawn = ProgressDrawTarget::stdout();
        let target = if quiet {
            Target::Quiet
        } else if !drawn.is_hidden() {
            Target::Bars(MultiProgress::with_draw_target(drawn))
        } else if models == 1 && devices == 1 {
            Target::Lines
        } else {
            Target::Json
        };
        let device = |bars: &MultiProgress, d: usize| {
            let bar = bars.add(ProgressBar::no_length());
            bar.set_style(style("{prefix} {wide_msg}"));
            bar.set_prefix(format!("device {d}"));
            bar
        };
        let devices = match &target {
            Target::Bars(bars) if models > 1 || devices > 1 => (0..devices).map(|d| device(bars, d)).collect(),
            _ => Vec::new(),
        };
        Board { target, models: Models::default(), devices }
    }

    /// The live display of the engine, if it is shown.
    pub fn live(&self, engine: &Engine) -> Option<Live> {
        let show = match &self.target {
            Target::Bars(_) if !self.devices.is_empty() => Show::Bars(self.devices.clone()),
            Target::Json => Show::Json,
            _ => return None,
        };
        Some(Live::new(self.models.clone(), show, engine.now_secs()))
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows a model's training.
pub struct Progress {
    began: Instant,
    first_step: u64,
    way: Way,
    models: Models,
    /// Its index among `models`.
    number: usize,
    /// A smoothed rate of units per second.
    rate: Option<f64>,
}

enum Way {
    Bar(ProgressBar),
    Lines {
        last: Instant,
        tenth: u64,
    },
    /// Its steps are part of the run's lines.
    Json,
    Quiet,
}

impl Progress {
    /// Shows `steps` steps from `first_step` on. To be called for models in the order of their numbers.
    pub fn new(board: &Board, name: &str, first_step: u64, steps: u64) -> Progress {
        let now = Instant::now();
        let way = match &board.target {
            Target::Quiet => Way::Quiet,
            Target::Bars(bars) => {
                // Above the lines of the devices.
                let bar = match board.devices.first() {
                    Some(device) => bars.insert_before(device, ProgressBar::new(steps)),
                    None => bars.add(ProgressBar::new(steps)),
                };
                bar.set_style(style("{prefix} {wide_bar} {pos}/{len}  {msg}  {eta} left"));
                bar.set_prefix(name.to_string());
                bar.set_position(first_step);
                bar.set_message(live::WAITING);
                bar.reset_eta();
                Way::Bar(bar)
            }
            Target::Lines => Way::Lines { last: now, tenth: 0 },
            Target::Json => Way::Json,
        };
        let models = board.models.clone();
        let number = models.borrow().len();
        let (name, status) = (name.to_string(), live::WAITING);
        models.borrow_mut().push(ModelState { name, step: first_step, steps, loss: None, status, reason: None });
        Progress { began: now, first_step, way, models, number, rate: None }
    }

    /// Step `step` (from 0) has ended with `loss`; `per_sec` is the throughput in `units` (tokens, samples) per second.
    pub fn step(&mut self, step: u64, loss: f32, per_sec: f64, units: &str) {
        let rate = self.rate.map_or(per_sec, |rate| 0.8 * rate + 0.2 * per_sec);
        self.rate = Some(rate);
        let done = step + 1;
        let state = &mut self.models.borrow_mut()[self.number];
        (state.step, state.loss, state.status) = (done, Some(loss), live::TRAINING);
        match &mut self.way {
            Way::Quiet | Way::Json => {}
            Way::Bar(bar) => {
                bar.set_message(format!("loss {loss:.4}  {rate:.0} {units}/s"));
                bar.set_position(done);
            }
            Way::Lines { last, tenth } => {
                let now_tenth = done * 10 / state.steps.max(1);
                // Shows the first step, the last, and every tenth of the run; if those are rare, also a line from time
                // to time.
                let rested = last.elapsed();
                let due = rested >= BETWEEN_LINES && now_tenth > *tenth || rested >= LONGEST_SILENCE;
                if done == self.first_step + 1 || done == state.steps || due {
                    (*last, *tenth) = (Instant::now(), now_tenth);
                    let per_step = self.began.elapsed().as_secs_f64() / (done - self.first_step) as f64;
                    let left = format_secs(per_step * (state.steps - done) as f64);
                    say(format!(
                        "{}: step {done} of {}  loss {loss:.4}  {rate:.0} {units}/s  {left} left",
                        state.name, state.steps
                    ));
                }
            }
        }
    }

    /// Prints a note in between.
    pub fn note(&self, line: &str) {
        let models = self.models.borrow();
        let name = &models[self.number].name;
        match &self.way {
            Way::Quiet => {}
            Way::Bar(bar) => bar.println(format!("{name}: {line}")),
            Way::Lines { .. } => say(format!("{name}: {line}")),
            Way::Json => say(json!({ "event": "note", "model": name, "text": line })),
        }
    }

    /// The model has ended: says how, if it ended early, and removes the bar.
    pub fn end(&self, status: &Status) {
        match status {
            // If it trains alone, its failure is the run's, which is reported at the end; the reason for a stop was
            // reported when it was decided.
            Status::Failed(reason) if !matches!(self.way, Way::Lines { .. }) => self.note(&format!("failed: {reason}")),
            Status::Cancelled => self.note("cancelled"),
            Status::Failed(_) | Status::Stopped(_) | Status::Done => {}
        }
        let state = &mut self.models.borrow_mut()[self.number];
        state.status = status.word();
        state.reason = Some(status.reason()).filter(|reason| !reason.is_empty()).map(String::from);
        self.finish();
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Way::Bar(bar) = &self.way {
            bar.finish_and_clear();
        }
    }
}
