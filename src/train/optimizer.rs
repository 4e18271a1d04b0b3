//! Optimizers and learning-rate schedules as values, from which each step's update rule follows.

use crate::base::{Error, Result};
use crate::device::{AdamwRule, SgdRule, UpdateRule};
use serde::{Deserialize, Serialize};

/// Which update, with the numbers that stay the same. Defaults are torch.optim's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Optimizer {
    /// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
    Adamw {
        /// Peak learning rate.
        lr: f64,
        /// Decays of the moments.
        betas: (f64, f64),
        /// Added to the denominator.
        epsilon: f64,
        /// Decoupled weight decay.
        weight_decay: f64,
        /// Decay matrices alone: parameters of two axes and more.
        decay_matrices_only: bool,
    },
    /// SGD with momentum.
    Sgd {
        /// Peak learning rate.
        lr: f64,
        /// Decay of the momentum buffer.
        momentum: f64,
        /// Nesterov's variant.
        nesterov: bool,
        /// Added to the gradient, times the weight.
        weight_decay: f64,
    },
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer::Adamw {
            lr: 1e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.01,
            decay_matrices_only: false,
        }
    }
}

impl Optimizer {
    /// Peak learning rate.
    pub fn lr(&self) -> f64 {
        match *self {
            Optimizer::Adamw { lr, .. } | Optimizer::Sgd { lr, .. } => lr,
        }
    }

    /// Numbers kept for each parameter.
    pub fn moments(&self) -> usize {
        match *self {
            Optimizer::Adamw { .. } => 2,
            Optimizer::Sgd { momentum, .. } => usize::from(momentum > 0.0),
        }
    }

    /// Whether weight decay applies to a parameter with so many axes.
    pub fn decays(&self, axes: usize) -> bool {
        match *self {
            Optimizer::Adamw { decay_matrices_only, .. } => !decay_matrices_only || axes >= 2,
            Optimizer::Sgd { .. } => true,
        }
    }

    /// The update of `step` (from 0) at learning rate `lr`.
    pub fn rule(&self, step: u64, lr: f64) -> UpdateRule {
        let update = step + 1;
        match *self {
            Optimizer::Adamw { betas, epsilon, weight_decay, .. } => {
                UpdateRule::Adamw(AdamwRule { update, lr, betas, epsilon, weight_decay })
            }
            Optimizer::Sgd { momentum, nesterov, weight_decay, .. } => {
                UpdateRule::Sgd(SgdRule { update, lr, momentum, nesterov, weight_decay })
            }
        }
    }

    /// Refuses invalid numbers.
    ///
    /// # Errors
    /// When one is negative, not finite, or a decay is not below 1.
    pub fn check(&self) -> Result<()> {
        self.fault().map_or(Ok(()), |(key, what)| Err(Error::bad(format!("optimizer.{key}: {what}"))))
    }

    /// The first invalid number: its key in a job file, with what is wanted and what it is.
    pub fn fault(&self) -> Option<(&'static str, String)> {
        let lr = at_least_0("lr", self.lr());
        lr.or_else(|| match *self {
            Optimizer::Adamw { betas, epsilon, weight_decay, .. } => {
                let want = "want two numbers from 0 up to, not including, 1";
                let two = || Some(("betas", format!("{want}, got [{:?}, {:?}]", betas.0, betas.1)));
                let fault = if is_decay(betas.0) && is_decay(betas.1) { None } else { two() };
                fault.or_else(|| at_least_0("eps", epsilon)).or_else(|| at_least_0("weight_decay", weight_decay))
            }
            Optimizer::Sgd { momentum, .. } if !is_decay(momentum) => {
                Some(("momentum", format!("want a number from 0 up to, not including, 1, got {momentum}")))
            }
            Optimizer::Sgd { momentum: 0.0, nesterov: true, .. } => {
                Some(("nesterov", "needs momentum above 0; write momentum = 0.9 or leave nesterov out".into()))
            }
            Optimizer::Sgd { weight_decay, .. } => at_least_0("weight_decay", weight_decay),
        })
    }
}

fn at_least_0(key: &'static str, x: f64) -> Option<(&'static str, String)> {
    if !x.is_finite() || x < 0.0 {
        return Some((key, format!("want a number of at least 0, got {x}")));
    }
    (x as f32).is_infinite().then(|| (key, format!("want a number that f32 can hold, got {x:e}")))
}

fn is_decay(x: f64) -> bool {
    (0.0..1.0).contains(&x)
}

/// How the learning rate changes over a run. Warm-up goes linearly from 0 to the peak over `warmup` steps.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub enum Schedule {
    /// The peak throughout.
    #[default]
    Constant,
    /// Linearly from the peak to `min_lr`.
    Linear {
        /// Steps of warm-up.
        warmup: u64,
        /// Learning rate of the last step.
        min_lr: f64,
    },
    /// Half a cosine from the peak to `min_lr` (Loshchilov & Hutter 2017, arXiv:1608.03983, one period).
    Cosine {
        /// Steps of warm-up.
        warmup: u64,
        /// Learning rate of the last step.
        min_lr: f64,
    },
}

impl Schedule {
    /// The learning rate of `step` (from 0) of `steps`. The first step of a warm-up of n has 1/n of the peak, the first
    /// step after the warm-up has the peak, and the last step has `min_lr`, even if it is the first after the warm-up.
    /// A run of a single step has the peak.
    pub fn lr(&self, peak: f64, step: u64, steps: u64) -> f64 {
        let (warmup, min_lr) = match *self {
            Schedule::Constant => return peak,
            Schedule::Linear { warmup, min_lr } | Schedule::Cosine { warmup, min_lr } => (warmup, min_lr),
        };
        if step < warmup {
            return peak * (step + 1) as f64 / warmup as f64;
        }
        let last = steps.saturating_sub(1).max(warmup);
        let gone = match last - warmup {
            0 if warmup == 0 => 0.0,
            0 => 1.0,
            all => (step.min(last) - warmup) as f64 / all as f64,
        };
        if gone == 0.0 {
            // The sum below may be off by a bit.
            return peak;
        }
        let left = match self {
            Schedule::Cosine { .. } => 0.5 * (1.0 + (std::f64::consts::PI * gone).cos()),
            _ => 1.0 - gone,
        };
        min_lr + (peak - min_lr) * left
    }

    /// Refuses an invalid last learning rate.
    ///
    /// # Errors
    /// When it is negative or not finite.
    pub fn check(&self) -> Result<()> {
        self.fault().map_or(Ok(()), |(key, what)| Err(Error::bad(format!("schedule.{key}: {what}"))))
    }

    /// An invalid last learning rate: its key in a job file, with what is wanted and what it is.
    pub fn fault(&self) -> Option<(&'static str, String)> {
        match *self {
            Schedule::Constant => None,
            Schedule::Linear { min_lr, .. } | Schedule::Cosine { min_lr, .. } => at_least_0("min_lr", min_lr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_peak_and_end_where_they_say() {
        let cosine = Schedule::Cosine { warmup: 4, min_lr: 0.1 };
        let linear = Schedule::Linear { warmup: 4, min_lr: 0.1 };
        for schedule in [cosine, linear] {
            assert_eq!(schedule.lr(1.0, 0, 101), 0.25);
            assert_eq!(schedule.lr(1.0, 3, 101), 1.0);
            assert_eq!(schedule.lr(1.0, 4, 101), 1.0);
            assert!((schedule.lr(1.0, 52, 101) - 0.55).abs() < 1e-12);
            assert!((schedule.lr(1.0, 100, 101) - 0.1).abs() < 1e-12);
            assert!((schedule.lr(1.0, 1000, 101) - 0.1).abs() < 1e-12);
        }
        // A quarter and three quarters of the way, where a line and half a cosine are apart.
        for (schedule, quarter, three_quarters) in
            [(linear, 0.775, 0.325), (cosine, 0.868198051533946, 0.231801948466054)]
        {
            assert!((schedule.lr(1.0, 28, 101) - quarter).abs() < 1e-12);
            assert!((schedule.lr(1.0, 76, 101) - three_quarters).abs() < 1e-12);
        }
        assert_eq!(Schedule::Constant.lr(0.3, 7, 10), 0.3);
        // No rounding at either end, nor where the last step comes right after the warm-up.
        for schedule in [Schedule::Linear { warmup: 5, min_lr: 1e-3 }, Schedule::Cosine { warmup: 5, min_lr: 1e-3 }] {
            assert_eq!([5, 6].map(|step| schedule.lr(1e-2, step, 7)), [1e-2, 1e-3]);
            assert_eq!([4, 5].map(|step| schedule.lr(1e-2, step, 6)), [1e-2, 1e-3]);
        }
        // A run that is all warm-up, and one of a single step.
        assert_eq!(linear.lr(1.0, 1, 2), 0.5);
        assert_eq!(Schedule::Cosine { warmup: 0, min_lr: 0.0 }.lr(1.0, 0, 1), 1.0);
    }

    #[test]
    fn a_rule_has_all_of_its_optimizers_numbers() {
        let adamw = |decay_matrices_only| Optimizer::Adamw {
            lr: 0.5,
            betas: (0.8, 0.99),
            epsilon: 1e-3,
            weight_decay: 0.25,
            decay_matrices_only,
        };
        // The rate is the schedule's, the update counts from 1.
        let want = AdamwRule { update: 8, lr: 0.125, betas: (0.8, 0.99), epsilon: 1e-3, weight_decay: 0.25 };
        assert_eq!(adamw(true).rule(7, 0.125), UpdateRule::Adamw(want));
        assert_eq!([0, 1, 2, 4].map(|axes| adamw(true).decays(axes)), [false, false, true, true]);
        assert_eq!([0, 1, 2, 4].map(|axes| adamw(false).decays(axes)), [true; 4]);
        for nesterov in [false, true] {
            let sgd = Optimizer::Sgd { lr: 0.5, momentum: 0.75, nesterov, weight_decay: 0.25 };
            let want = SgdRule { update: 1, lr: 0.125, momentum: 0.75, nesterov, weight_decay: 0.25 };
            assert_eq!(sgd.rule(0, 0.125), UpdateRule::Sgd(want));
            assert_eq!([0, 1, 2, 4].map(|axes| sgd.decays(axes)), [true; 4]);
        }
    }

    #[test]
    fn absurd_numbers_are_refused() {
        assert!(Optimizer::default().check().is_ok());
        let bad = Optimizer::Sgd { lr: f64::NAN, momentum: 0.0, nesterov: false, weight_decay: 0.0 };
        assert_eq!(bad.check().unwrap_err().to_string(), "optimizer.lr: want a number of at least 0, got NaN");
        let bad = Optimizer::Adamw {
            lr: 1.0,
            betas: (0.9, 1.0),
            epsilon: 0.0,
            weight_decay: 0.0,
            decay_matrices_only: false,
        };
        let want = "optimizer.betas: want two numbers from 0 up to, not including, 1, got [0.9, 1.0]";
        assert_eq!(bad.check().unwrap_err().to_string(), want);
        let bad = Optimizer::Sgd { lr: 0.1, momentum: 0.0, nesterov: true, weight_decay: 0.0 };
        assert!(bad.check().unwrap_err().to_string().starts_with("optimizer.nesterov: needs momentum above 0"));
        let bad = Schedule::Linear { warmup: 1, min_lr: f64::NAN };
        assert_eq!(bad.check().unwrap_err().to_string(), "schedule.min_lr: want a number of at least 0, got NaN");
        assert!(Schedule::Cosine { warmup: 1, min_lr: -1e-9 }.check().is_err());
        assert!(Schedule::Cosine { warmup: 1, min_lr: 0.0 }.check().is_ok());
    }
}
