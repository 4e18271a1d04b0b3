//! Which part of a trace is looked at: the steps whose events were kept, and the few of them whose schedule is drawn.

use crate::trace::{Event, What};
use std::collections::{BTreeMap, BTreeSet};

/// Steps drawn at most.
const MOST_STEPS: u32 = 3;
/// More events than this are not drawn if fewer steps will do.
const MANY_EVENTS: usize = 3000;

/// Consecutive steps of one model and the seconds they took.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shown {
    pub first: u32,
    pub last: u32,
    /// From the end of the step before `first` to the end of `last`.
    pub window: (f64, f64),
    /// Everything that ran in the window, other steps' tasks too.
    pub events: Vec<Event>,
}

/// A step's events in short.
#[derive(Clone, Copy, Debug)]
struct Step {
    start: f64,
    end: f64,
    count: usize,
    /// Held-out data were evaluated after it, or it is the model's first or second: what follows or runs is not steady.
    unsteady: bool,
}

/// Chooses what to draw: the last run of up to three kept steps of the lowest model that are steady (no start, no validation, not the
/// last of all, whose end nothing overlaps), of fewer where there are none, of any at the worst. `None` without events.
pub(super) fn choose(events: &[Event]) -> Option<Shown> {
    let model = events.iter().filter(|event| event.has_times()).map(|event| event.name.model).min()?;
    let mut steps: BTreeMap<u32, Step> = BTreeMap::new();
    for event in events.iter().filter(|event| event.name.model == model && event.has_times()) {
        let new = Step { start: event.start_secs, end: event.end_secs, count: 0, unsteady: event.step < 2 };
        let step = steps.entry(event.step).or_insert(new);
        step.start = step.start.min(event.start_secs);
        step.end = step.end.max(event.end_secs);
        step.count += 1;
        step.unsteady |= event.name.what == What::Eval;
    }
    let newest = *steps.keys().next_back()?;
    let before = |step: u32| step.checked_sub(1).and_then(|before| steps.get(&before));
    let is_steady = |step: u32| {
        let fits = |step: &Step| !step.unsteady;
        step < newest && steps.get(&step).is_some_and(fits) && before(step).is_some_and(fits)
    };
    let is_there = |step: u32| steps.contains_key(&step);
    let run = |length: u32, fits: &dyn Fn(u32) -> bool| {
        let firsts = steps.keys().rev().copied();
        let mut runs = firsts.filter_map(|last| Some((last.checked_sub(length - 1)?, last)));
        runs.find(|&(first, last)| {
            let count: usize = (first..=last).filter_map(|step| steps.get(&step)).map(|step| step.count).sum();
            (length == 1 || count <= MANY_EVENTS) && (first..=last).all(fits)
        })
    };
    let lengths = || (1..=MOST_STEPS).rev();
    let steady = lengths().find_map(|length| run(length, &is_steady));
    let (first, last) = steady.or_else(|| lengths().find_map(|length| run(length, &is_there)))?;
    let from = before(first).map_or(steps[&first].start, |step| step.end.min(steps[&last].end));
    let mut window = (from, steps[&last].end);
    if window.1 <= window.0 {
        window.0 = steps[&first].start;
    }
    let is_inside = |event: &&Event| event.has_times() && event.start_secs < window.1 && event.end_secs > window.0;
    Some(Shown { first, last, window, events: events.iter().filter(is_inside).copied().collect() })
}

/// Seconds that the kept steps took: each model's consecutive ones from the first start to the last end, overlaps counted once.
pub(super) fn kept_secs(events: &[Event]) -> f64 {
    let mut steps: BTreeMap<(u16, u32), (f64, f64)> = BTreeMap::new();
    for event in events.iter().filter(|event| event.has_times()) {
        let span = steps.entry((event.name.model, event.step)).or_insert((event.start_secs, event.end_secs));
        *span = (span.0.min(event.start_secs), span.1.max(event.end_secs));
    }
    let mut spans: Vec<(f64, f64)> = Vec::new();
    let mut previous = None;
    for (&(model, step), &(start, end)) in &steps {
        match spans.last_mut() {
            Some(span) if previous == Some((model, step.wrapping_sub(1))) => {
                *span = (span.0.min(start), span.1.max(end));
            }
            _ => spans.push((start, end)),
        }
        previous = Some((model, step));
    }
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut sum, mut until) = (0.0, f64::NEG_INFINITY);
    for (start, end) in spans {
        sum += (end - start.max(until)).max(0.0);
        until = until.max(end);
    }
    sum
}

/// Steps in words: `0 to 4 and 90 to 99`.
pub(super) fn steps_text(steps: &BTreeSet<u32>) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &step in steps {
        match runs.last_mut() {
            Some(run) if run.1 + 1 == step => run.1 = step,
            _ => runs.push((step, step)),
        }
    }
    let word =
        |&(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first} to {last}") };
    let words: Vec<String> = match runs.len() {
        // A trace has few runs of steps; one that has many is best told by its ends.
        7.. => return format!("{} of those from {} to {}", steps.len(), runs[0].0, runs[runs.len() - 1].1),
        _ => runs.iter().map(word).collect(),
    };
    match words.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => "none".into(),
    }
}
