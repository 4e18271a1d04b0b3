//! How a model of a job is trained: `optimizer` and `schedule`, read and checked.

use super::section::{MOST, Section};
use hydra::base::Result;

/// The update rule of a model and its constants; the defaults are torch's.
#[derive(Clone, Debug, PartialEq)]
pub enum Optimizer {
    /// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), as torch.optim.AdamW has it.
    Adamw {
        /// Learning rate before the schedule; default 1e-3.
        lr: f64,
        /// Decay of the first and of the second moment, each in [0, 1); default 0.9 and 0.999.
        betas: [f64; 2],
        /// Added to the root of the second moment; default 1e-8.
        eps: f64,
        /// Share of a weight taken off per step and learning rate; default 0.01.
        weight_decay: f64,
        /// Largest global norm of the gradient, above 0; none: the gradient is left as it is.
        clip: Option<f64>,
        /// Whether weight decay leaves out vectors (biases and norms); by default it does not.
        decay_matrices_only: bool,
    },
    /// Gradient descent with momentum, as torch.optim.SGD has it.
    Sgd {
        /// Learning rate before the schedule; default 1e-3.
        lr: f64,
        /// Share of the last step's direction that is kept; default 0.
        momentum: f64,
        /// Whether the momentum is Nesterov's; needs momentum above 0.
        nesterov: bool,
        /// Share of a weight added to its gradient; default 0.
        weight_decay: f64,
        /// Largest global norm of the gradient, above 0; none: the gradient is left as it is.
        clip: Option<f64>,
    },
}

/// How the learning rate changes over the steps.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// It does not.
    Constant,
    /// Up in a line over `warmup` steps, then down in a line to `min_lr`.
    Linear {
        /// Steps of rise; default 0.
        warmup: u64,
        /// Learning rate at the end; default 0.
        min_lr: f64,
    },
    /// Up in a line over `warmup` steps, then down half a cosine to `min_lr`.
    Cosine {
        /// Steps of rise; default 0.
        warmup: u64,
        /// Learning rate at the end; default 0.
        min_lr: f64,
    },
}

/// The keys of `optimizer`.
pub const KEYS: &[&str] = &["kind", "lr", "betas", "eps", "weight_decay", "clip", "decay", "momentum", "nesterov"];

/// The optimizer's keys but `kind`: those that `--set model.N.KEY` reaches without saying `optimizer`.
pub const SHORT_KEYS: &[&str] = KEYS.split_at(1).1;

/// Reads `optimizer` of a model; AdamW with its defaults where it is left out.
pub fn read_optimizer(model: &Section) -> Result<Optimizer> {
    #[derive(Clone, Copy)]
    enum Kind {
        Adamw,
        Sgd,
    }
    let empty = toml::Table::new();
    let s = model.section_or("optimizer", &empty, KEYS)?;
    let kind = s.word("kind", &[("adamw", Kind::Adamw), ("sgd", Kind::Sgd)])?.unwrap_or(Kind::Adamw);
    let not_negative = |key, default: f64, example: &str| -> Result<f64> {
        let want = format!("a number of at least 0, such as {example}");
        Ok(s.number(key, &want, |n| n >= 0.0)?.unwrap_or(default))
    };
    let lr = not_negative("lr", 1e-3, "1e-3")?;
    let clip = s.number("clip", "a number above 0, such as 1.0 (left out: no clipping)", |n| n > 0.0)?;
    match kind {
        Kind::Adamw => {
            s.refuse(&["momentum", "nesterov"], "is for kind = \"sgd\" only; adamw has betas")?;
            Ok(Optimizer::Adamw {
                lr,
                betas: s
                    .numbers("betas", "two numbers from 0 up to, not including, 1, such as [0.9, 0.999]", below_one)?
                    .unwrap_or([0.9, 0.999]),
                eps: not_negative("eps", 1e-8, "1e-8")?,
                weight_decay: not_negative("weight_decay", 0.01, "0.01")?,
                clip,
                decay_matrices_only: s.word("decay", &[("all", false), ("matrices", true)])?.unwrap_or(false),
            })
        }
        Kind::Sgd => {
            s.refuse(&["betas", "eps", "decay"], "is for kind = \"adamw\" only")?;
            let momentum = not_negative("momentum", 0.0, "0.9")?;
            let nesterov = s.flag("nesterov")?.unwrap_or(false);
            if nesterov && momentum == 0.0 {
                return Err(s.fault("nesterov", "needs momentum above 0; add momentum = 0.9 or leave nesterov out"));
            }
            Ok(Optimizer::Sgd {
                lr,
                momentum,
                nesterov,
                weight_decay: not_negative("weight_decay", 0.0, "1e-4")?,
                clip,
            })
        }
    }
}

fn below_one(n: f64) -> bool {
    (0.0..1.0).contains(&n)
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
    let min_lr = s.number("min_lr", "a number of at least 0, such as 1e-5", |n| n >= 0.0)?.unwrap_or(0.0);
    Ok(if kind == Kind::Linear { Schedule::Linear { warmup, min_lr } } else { Schedule::Cosine { warmup, min_lr } })
}
