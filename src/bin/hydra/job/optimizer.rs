//! How a model of a job is trained: `optimizer` and `schedule`, read into the library's own values, which check the
//! numbers.

use super::section::{MOST, Section};
use hydra::base::Result;
use hydra::train::{Optimizer, Schedule};

/// The keys of `optimizer`.
pub const KEYS: &[&str] = &["kind", "lr", "betas", "eps", "weight_decay", "clip", "decay", "momentum", "nesterov"];

/// The optimizer's keys except `kind`: those that `--set model.N.KEY` reaches without `optimizer` in the path.
pub const SHORT_KEYS: &[&str] = KEYS.split_at(1).1;

/// Reads `optimizer` of a model, AdamW with its defaults where it is left out, and the largest global norm of its
/// gradients, `clip`; `None` means no clipping.
pub fn read_optimizer(model: &Section) -> Result<(Optimizer, Option<f64>)> {
    #[derive(Clone, Copy)]
    enum Kind {
        Adamw,
        Sgd,
    }
    let empty = toml::Table::new();
    let s = model.section_or("optimizer", &empty, KEYS)?;
    let kind = s.word("kind", &[("adamw", Kind::Adamw), ("sgd", Kind::Sgd)])?.unwrap_or(Kind::Adamw);
    let number = |key, default: f64, example: &str| -> Result<f64> {
        Ok(s.number(key, &format!("a number, such as {example}"), |_| true)?.unwrap_or(default))
    };
    let lr = number("lr", 1e-3, "1e-3")?;
    let clip = s.number("clip", "a number above 0, such as 1.0 (left out: no clipping)", |n| n > 0.0)?;
    let optimizer = match kind {
        Kind::Adamw => {
            s.refuse(&["momentum", "nesterov"], "is for kind = \"sgd\" only; adamw has betas")?;
            let [beta1, beta2] = s.numbers("betas", "two numbers, such as [0.9, 0.999]")?.unwrap_or([0.9, 0.999]);
            Optimizer::Adamw {
                lr,
                betas: (beta1, beta2),
                epsilon: number("eps", 1e-8, "1e-8")?,
                weight_decay: number("weight_decay", 0.01, "0.01")?,
                decay_matrices_only: s.word("decay", &[("all", false), ("matrices", true)])?.unwrap_or(false),
            }
        }
        Kind::Sgd => {
            s.refuse(&["betas", "eps", "decay"], "is for kind = \"adamw\" only")?;
            Optimizer::Sgd {
                lr,
                momentum: number("momentum", 0.0, "0.9")?,
                nesterov: s.flag("nesterov")?.unwrap_or(false),
                weight_decay: number("weight_decay", 0.0, "1e-4")?,
            }
        }
    };
    match optimizer.fault() {
        Some((key, what)) => Err(s.fault(key, what)),
        None => Ok((optimizer, clip)),
    }
}

/// The keys of `schedule`.
pub const SCHEDULE_KEYS: &[&str] = &["kind", "warmup", "min_lr"];

/// Reads `schedule` of a model; constant where it is left out.
pub fn read_schedule(model: &Section) -> Result<Schedule> {
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Constant,
        Linear,
        Cosine,
    }
    const KINDS: [(&str, Kind); 3] = [("constant", Kind::Constant), ("linear", Kind::Linear), ("cosine", Kind::Cosine)];
    let Some(s) = model.section("schedule", SCHEDULE_KEYS)? else { return Ok(Schedule::Constant) };
    let kind = s.word("kind", &KINDS)?.ok_or_else(|| s.fault("kind", "is missing; write kind = \"cosine\""))?;
    if kind == Kind::Constant {
        s.refuse(&["warmup", "min_lr"], "is for kind = \"linear\" and \"cosine\" only")?;
        return Ok(Schedule::Constant);
    }
    let warmup = s.integer("warmup", 0..=MOST)?.unwrap_or(0);
    let min_lr = s.number("min_lr", "a number, such as 1e-5", |_| true)?.unwrap_or(0.0);
    let linear = kind == Kind::Linear;
    let schedule = if linear { Schedule::Linear { warmup, min_lr } } else { Schedule::Cosine { warmup, min_lr } };
    match schedule.fault() {
        Some((key, what)) => Err(s.fault(key, what)),
        None => Ok(schedule),
    }
}
