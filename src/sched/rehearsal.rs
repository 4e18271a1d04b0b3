//! Rehearsals: the best policy for a set of models is found by scheduling it on simulated devices before it runs.
//!
//! No rule is good for all sets of models. But a schedule is a function of the policy, the executor simulates it in a
//! small fraction of its time, and no bit of any model depends on it. So the numbers of locality-LRTF's
//! [`LocalityTuning`] are searched for: a few are changed at a time, a change that does not end later is kept, and the
//! search restarts when it makes no progress. The numbers are few and refer to no points in time, so a result still
//! holds if units take a little longer than predicted.

use super::{LocalityLrtf, LocalityTuning};
use crate::base::philox::Sequence;

/// The result of a rehearsal.
#[derive(Clone, Debug, PartialEq)]
pub struct Rehearsal {
    /// The policy that ends soonest.
    pub policy: LocalityLrtf,
    /// Its makespan, in the caller's seconds.
    pub makespan_secs: f64,
    /// The makespan of the given policy.
    pub plain_secs: f64,
    /// Schedules that were simulated.
    pub tries: usize,
}

impl Rehearsal {
    /// The fraction of the makespan that is saved.
    pub fn gain(&self) -> f64 {
        1.0 - self.makespan_secs / self.plain_secs
    }
}

/// The changes that are tried first, each alone, ordered so that each adds most to those before it, over a thousand
/// random sets of models.
const FIRST: [fn(&mut LocalityLrtf); 12] = [
    |p| (p.pipelines, p.tuning.depth, p.tuning.copy_price) = (true, 1.0, 0.25),
    |p| (p.tuning.depth, p.tuning.critical_tolerance) = (AT_ONCE, 1.0),
    // Sharded-LRTF.
    |p| {
        let plain = p.tuning.clone();
        p.tuning = LocalityTuning { critical_turns: f64::INFINITY, critical_tolerance: 1.0, leaves: false, ..plain };
    },
    |p| (p.pipelines, p.tuning.tolerance) = (true, 0.0),
    |p| p.tuning.depth = 3.0,
    |p| (p.tuning.depth, p.tuning.copy_price) = (1.0, 0.25),
    |p| (p.tuning.depth, p.tuning.critical_turns) = (AT_ONCE, 0.0),
    |p| (p.tuning.depth, p.tuning.copy_price) = (AT_ONCE, 1.0),
    |p| (p.pipelines, p.tuning.depth, p.tuning.tolerance) = (true, 1.0, 0.6),
    |p| p.tuning.copy_price = 16.0,
    |p| p.tuning.tolerance = 0.0,
    |p| p.tuning.least_copies = 0.02,
];

/// A depth at which steps that have begun are finished before any other begins.
const AT_ONCE: f64 = 1000.0;

/// The number of unsuccessful tries after which the search restarts: the best of several short searches is better than
/// one long search, which ends where no change helps.
const PATIENCE: usize = 32;

/// The greatest factor by which one change alters an urgency.
const GREATEST_FACTOR: f64 = 4.0;

/// Searches for a tuning of locality-LRTF in at most `tries` simulations, the first of which is of `plain` itself. With
/// `may_pipeline`, the result may pipeline even if `plain` does not. `units` are the numbers of units in each model's
/// step, and `makespan_secs` simulates. Equal arguments give the same result.
///
/// # Errors
/// The first error of `makespan_secs`.
pub fn rehearse<E>(
    plain: &LocalityLrtf,
    may_pipeline: bool,
    units: &[usize],
    tries: usize,
    mut makespan_secs: impl FnMut(&LocalityLrtf) -> Result<f64, E>,
) -> Result<Rehearsal, E> {
    let plain_secs = makespan_secs(plain)?;
    let mut found = Rehearsal { policy: plain.clone(), makespan_secs: plain_secs, plain_secs, tries: 1 };
    let mut numbers = Sequence::new(0, 0);
    let first = FIRST.iter().map(|first| {
        let mut policy = plain.clone();
        first(&mut policy);
        policy
    });
    let mut first = first.filter(|policy| policy.pipelines == plain.pipelines || may_pipeline);
    // Where the search is, and the number of tries since it last improved.
    let (mut at, mut in_vain) = ((plain.clone(), plain_secs), 0);
    while found.tries < tries {
        let policy = first.next().unwrap_or_else(|| {
            if in_vain >= PATIENCE {
                (at, in_vain) = ((plain.clone(), plain_secs), 0);
            }
            let mut policy = at.0.clone();
            (0..=numbers.below(2)).for_each(|_| change(&mut policy, may_pipeline, units, &mut numbers));
            policy
        });
        found.tries += 1;
        let secs = makespan_secs(&policy)?;
        in_vain = if secs < at.1 { 0 } else { in_vain + 1 };
        // An equally good tuning may lead to a better one.
        if secs <= at.1 {
            at = (policy, secs);
        }
        if at.1 < found.makespan_secs {
            (found.policy, found.makespan_secs) = at.clone();
        }
    }
    Ok(found)
}

/// Changes one number; every other time it is an urgency, of which there are many.
fn change(policy: &mut LocalityLrtf, may_pipeline: bool, units: &[usize], numbers: &mut Sequence) {
    let tuning = &mut policy.tuning;
    if numbers.below(2) > 0 {
        return change_urgency(tuning, units, numbers);
    }
    let of = |numbers: &mut Sequence, values: &[f64]| values[numbers.below(values.len() as u64) as usize];
    match numbers.below(if may_pipeline { 7 } else { 6 }) {
        0 => tuning.tolerance = of(numbers, &[0.0, 0.05, 0.125, 0.3, 0.6]),
        1 => tuning.critical_tolerance = of(numbers, &[0.05, 0.125, 0.25, 0.5, 0.75, 1.0]),
        2 => tuning.critical_turns = of(numbers, &[0.0, 0.5, 1.0, 2.0, 4.0, f64::INFINITY]),
        3 => tuning.copy_price = of(numbers, &[0.0, 0.25, 1.0, 4.0, 16.0]),
        4 => tuning.least_copies = of(numbers, &[0.0, 0.02, 0.1, 0.3, 1.0, 3.0]),
        6 => policy.pipelines = !policy.pipelines,
        _ => tuning.depth = of(numbers, &[0.0, 0.3, 1.0, 3.0, AT_ONCE]),
    }
}

/// Changes the urgency of a model, or of one of its shards in both directions.
fn change_urgency(tuning: &mut LocalityTuning, units: &[usize], numbers: &mut Sequence) {
    if tuning.urgency.is_empty() {
        tuning.urgency = units.iter().map(|&n| vec![1.0; n]).collect();
    }
    let of_model = &mut tuning.urgency[numbers.below(units.len() as u64) as usize];
    let factor = GREATEST_FACTOR.powf(2.0 * numbers.uniform() - 1.0);
    let (unit, last) = (numbers.below(of_model.len() as u64) as usize, of_model.len() - 1);
    let whole = numbers.below(2) == 0;
    for (i, urgency) in of_model.iter_mut().enumerate() {
        if whole || i == unit || i == last - unit {
            *urgency *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A makespan that is least where the first model's units are half as urgent as the second's.
    fn toy(policy: &LocalityLrtf) -> Result<f64, ()> {
        let urgency = |m: usize| policy.tuning.urgency.get(m).map_or(1.0, |of: &Vec<f64>| of.iter().sum::<f64>());
        Ok((urgency(0) / urgency(1) - 0.5).abs() + policy.tuning.copy_price)
    }

    #[test]
    fn a_rehearsal_finds_the_least_and_can_be_repeated() {
        let plain = LocalityLrtf::default();
        let found = rehearse(&plain, false, &[3, 3], 400, toy).unwrap();
        assert_eq!((found.plain_secs, found.tries), (0.5, 400));
        assert!(found.makespan_secs < 0.02 && toy(&found.policy) == Ok(found.makespan_secs), "{found:?}");
        assert_eq!(rehearse(&plain, false, &[3, 3], 400, toy), Ok(found));
    }

    #[test]
    fn one_try_is_the_policy_as_it_is() {
        let plain = LocalityLrtf { pipelines: true, ..LocalityLrtf::default() };
        for tries in [0, 1] {
            let found = rehearse(&plain, false, &[1], tries, |_| Ok::<_, ()>(2.0)).unwrap();
            assert_eq!(found, Rehearsal { policy: plain.clone(), makespan_secs: 2.0, plain_secs: 2.0, tries: 1 });
        }
        assert_eq!(rehearse(&plain, false, &[1], 5, |p| if *p == plain { Ok(1.0) } else { Err("no") }), Err("no"));
    }
}
