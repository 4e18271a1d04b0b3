//! Rehearsals: before models take turns, a small fraction of the time that they will take is spent on finding the best
//! way to do so.

use crate::job::{Pipeline, Policy};
use crate::plan::placing::{COMPARED_STEPS, Scenario, Sharing, fewer_steps, is_worth_it};
use hydra::base::Result;
use hydra::sched::{LocalityLrtf, Rehearsal, rehearse};
use hydra::spill::{Home, Placed};

/// The fraction of a job's predicted seconds that its rehearsals may take, and their most seconds.
const PART: f64 = 0.01;
const MOST_SECS: f64 = 5.0;

/// Assumed seconds, an upper bound, to simulate a microbatch's visit to a shard. A constant, so that the same job is
/// always rehearsed in the same way.
const VISIT_SECS: f64 = 1e-5;

/// The number of tries wanted: if there is time for more, more steps are simulated instead, which represent the whole
/// job better. Beyond the greatest number, further tries find nothing.
const WANTED_TRIES: f64 = 48.0;
const MOST_TRIES: f64 = 512.0;

/// A result found over a part of the steps must also hold over this many times as many.
const CHECKED: u64 = 4;

/// The least gain for which a rehearsal's result is used.
const LEAST_GAIN: f64 = 0.01;

/// Finds how these models best take turns over `steps` steps each; `None` where there is nothing to choose or nothing
/// is gained.
///
/// # Errors
/// When the schedule stalls: our own bug.
pub fn rehearse_turns(scenario: &Scenario, steps: &[u64]) -> Result<Option<Rehearsal>> {
    let &Scenario { placed, sharing: Sharing::Turns(plain), run, .. } = scenario else { return Ok(None) };
    // A model alone on its device has no other to take turns with.
    let chooses = placed.len() > 1 && placed.iter().any(|p| p.home == Home::Anywhere);
    let longest = steps.iter().copied().max().unwrap_or(0);
    if run.policy != Policy::LOCALITY_LRTF || !run.rehearse || !chooses || longest == 0 {
        return Ok(None);
    }
    let makespan_secs = |policy: &LocalityLrtf, most: u64| {
        let scenario = Scenario { sharing: &Sharing::Turns(policy.clone()), ..scenario.clone() };
        scenario.simulate(fewer_steps(steps, most), None).map(|s| s.makespan_secs)
    };
    let some = COMPARED_STEPS.min(longest);
    let whole_secs = makespan_secs(plain, some)? * longest as f64 / some as f64;
    let units: Vec<usize> = placed.iter().map(|p| 2 * p.plan.shards.len() - 1).collect();
    let visits =
        |((p, &units), &steps): ((&Placed, &usize), &u64)| (units * p.model.microbatches) as f64 * steps as f64;
    // Seconds to simulate a step of the longest model, with the other models' share of steps.
    let step_secs = VISIT_SECS * placed.iter().zip(&units).zip(steps).map(visits).sum::<f64>() / longest as f64;
    let may_take_secs = (PART * whole_secs).min(MOST_SECS);
    let tried = ((may_take_secs / (WANTED_TRIES * step_secs)) as u64).clamp(some, longest);
    let tries = (may_take_secs / (tried as f64 * step_secs)).min(MOST_TRIES) as usize;
    let may_pipeline = run.pipeline != Pipeline::Never && is_worth_it(placed);
    let mut found = rehearse(plain, may_pipeline, &units, tries, |policy| makespan_secs(policy, tried))?;
    if found.policy != *plain && tried < longest {
        let more = |policy: &LocalityLrtf| makespan_secs(policy, CHECKED * tried);
        (found.plain_secs, found.makespan_secs) = (more(plain)?, more(&found.policy)?);
    }
    Ok((found.gain() > LEAST_GAIN).then_some(found))
}

/// A rehearsal's result in words.
pub fn describe_rehearsal(found: &Rehearsal) -> String {
    format!("of {} rehearsals the best ends {:.1} % sooner (run.rehearse)", found.tries, 100.0 * found.gain())
}
