//! What a run shows as it goes: a bar on a terminal, else a line now and then.

use crate::print::say;
use hydra::base::format_secs;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Lines come no closer than this.
const BETWEEN_LINES: Duration = Duration::from_secs(2);
/// A line comes at least this often.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);

/// Where the models of a run show theirs.
pub struct Board {
    bars: Option<MultiProgress>,
    quiet: bool,
}

impl Board {
    /// Bars on a terminal, else lines. `quiet`: nothing is shown.
    pub fn new(quiet: bool) -> Board {
        let bars = !quiet && std::io::stdout().is_terminal();
        Board { bars: bars.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stdout())), quiet }
    }
}

/// Shows a model's training.
pub struct Progress {
    name: String,
    steps: u64,
    began: Instant,
    first_step: u64,
    way: Way,
    /// A smoothed rate of units per second.
    rate: Option<f64>,
}

enum Way {
    Bar(ProgressBar),
    Lines { last: Instant, tenth: u64 },
    Quiet,
}

impl Progress {
    /// For `steps` steps from `first_step` on.
    pub fn new(board: &Board, name: &str, first_step: u64, steps: u64) -> Progress {
        let now = Instant::now();
        let way = if board.quiet {
            Way::Quiet
        } else if let Some(bars) = &board.bars {
            let bar = bars.add(ProgressBar::new(steps));
            let template = "{prefix} {wide_bar} {pos}/{len}  {msg}  {eta} left";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(name.to_string());
            bar.set_position(first_step);
            bar.reset_eta();
            Way::Bar(bar)
        } else {
            Way::Lines { last: now, tenth: 0 }
        };
        Progress { name: name.to_string(), steps, began: now, first_step, way, rate: None }
    }

    /// Step `step` (from 0) has ended with `loss`; `per_sec` `units` (tokens, samples) went through a second.
    pub fn step(&mut self, step: u64, loss: f32, per_sec: f64, units: &str) {
        let rate = self.rate.map_or(per_sec, |rate| 0.8 * rate + 0.2 * per_sec);
        self.rate = Some(rate);
        let done = step + 1;
        match &mut self.way {
            Way::Quiet => {}
            Way::Bar(bar) => {
                bar.set_message(format!("loss {loss:.4}  {rate:.0} {units}/s"));
                bar.set_position(done);
            }
            Way::Lines { last, tenth } => {
                let now_tenth = done * 10 / self.steps.max(1);
                // The first step, the last, and between them tenths of the run; where those are rare, one a while.
                let rested = last.elapsed();
                let due = rested >= BETWEEN_LINES && now_tenth > *tenth || rested >= LONGEST_SILENCE;
                if done == self.first_step + 1 || done == self.steps || due {
                    (*last, *tenth) = (Instant::now(), now_tenth);
                    let per_step = self.began.elapsed().as_secs_f64() / (done - self.first_step) as f64;
                    let left = format_secs(per_step * (self.steps - done) as f64);
                    say(format!(
                        "{}: step {done} of {}  loss {loss:.4}  {rate:.0} {units}/s  {left} left",
                        self.name, self.steps
                    ));
                }
            }
        }
    }

    /// Says something in between.
    pub fn note(&self, line: &str) {
        match &self.way {
            Way::Quiet => {}
            Way::Bar(bar) => bar.println(format!("{}: {line}", self.name)),
            Way::Lines { .. } => say(format!("{}: {line}", self.name)),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Way::Bar(bar) = &self.way {
            bar.finish_and_clear();
        }
    }
}
