//! Which part of a trace the report uses: the steps whose events were kept, and the few of them whose schedule is
//! drawn.

use crate::base::LaneKind;
use crate::trace::{Event, What};
use std::collections::{BTreeMap, BTreeSet};

/// Steps drawn at most.
const MOST_STEPS: u32 = 3;
/// If a choice has more events than this, fewer steps are drawn.
const MANY_EVENTS: usize = 3000;

/// Consecutive steps of one model and the seconds they took.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Shown {
    pub model: u16,
    pub first: u32,
    pub last: u32,
    /// From the first compute task of `first` to that of the step after `last`, which is one period of the schedule; to
    /// the end of `last` where there is no step after it.
    pub window: (f64, f64),
    /// Everything that ran in the window, including other steps' tasks.
    pub events: Vec<Event>,
}

/// A step's events in short.
#[derive(Clone, Copy, Debug)]
struct Step {
    start: f64,
    end: f64,
    /// When its first unit started; other lanes work ahead of it.
    begin: f64,
    count: usize,
    /// Held-out data was evaluated after it, or it is the model's first or second step: it, or the step after it, is
    /// not steady.
    unsteady: bool,
}

/// A choice and its rank: more models first; then steady steps (not at the start, no validation, not the very last,
/// whose end nothing overlaps); then more steps, up to three.
struct Candidate {
    rank: (usize, bool, u32),
    shown: Shown,
}

/// Chooses what to draw: the best run of kept steps of any model; among equals, the last one of the lowest-numbered
/// model. `None` without events.
pub(super) fn choose(events: &[Event]) -> Option<Shown> {
    let models: BTreeSet<u16> = events.iter().filter(|event| event.has_times()).map(|event| event.name.model).collect();
    let mut best: Option<Candidate> = None;
    for candidate in models.into_iter().flat_map(|model| candidates(events, model)) {
        if best.as_ref().is_none_or(|best| candidate.rank > best.rank) {
            best = Some(candidate);
        }
    }
    best.map(|best| best.shown)
}

/// The best of each stretch of consecutive kept steps of a model, the last stretch first.
fn candidates(events: &[Event], model: u16) -> Vec<Candidate> {
    let mut steps: BTreeMap<u32, Step> = BTreeMap::new();
    for event in events.iter().filter(|event| event.name.model == model && event.has_times()) {
        let (start, end) = (event.start_secs, event.end_secs);
        let new = Step { start, end, begin: f64::INFINITY, count: 0, unsteady: event.step < 2 };
        let step = steps.entry(event.step).or_insert(new);
        step.start = step.start.min(event.start_secs);
        step.end = step.end.max(event.end_secs);
        if event.lane.kind == LaneKind::Compute {
            step.begin = step.begin.min(event.start_secs);
        }
        step.count += 1;
        step.unsteady |= event.name.what == What::Eval;
    }
    let newest = steps.keys().next_back().copied();
    let before = |step: u32| step.checked_sub(1).and_then(|before| steps.get(&before));
    let is_steady = |step: u32| {
        let fits = |step: &Step| !step.unsteady;
        Some(step) < newest && steps.get(&step).is_some_and(fits) && before(step).is_some_and(fits)
    };
    let numbers: Vec<u32> = steps.keys().copied().collect();
    let stretches = numbers.chunk_by(|a, b| a + 1 == *b).rev();
    let best_of = |stretch: &[u32]| {
        let run = |length: u32, fits: &dyn Fn(u32) -> bool| {
            let mut runs = stretch.windows(length as usize).rev();
            let fits = |run: &&[u32]| {
                let count: usize = run.iter().filter_map(|step| steps.get(step)).map(|step| step.count).sum();
                (length == 1 || count <= MANY_EVENTS) && run.iter().all(|&step| fits(step))
            };
            runs.find(fits).map(|run| (run[0], run[run.len() - 1]))
        };
        let longest = |fits: &dyn Fn(u32) -> bool| (1..=MOST_STEPS).rev().find_map(|length| run(length, fits));
        let steady = longest(&is_steady);
        let (first, last) = steady.or_else(|| longest(&|_| true)).expect("a stretch has a step");
        let shown = window(events, &steps, model, (first, last));
        let models: BTreeSet<u16> = shown.events.iter().map(|event| event.name.model).collect();
        Candidate { rank: (models.len(), steady.is_some(), last - first), shown }
    };
    stretches.map(best_of).collect()
}

/// The seconds of a model's steps `first` to `last`, and all that ran in them.
fn window(events: &[Event], steps: &BTreeMap<u32, Step>, model: u16, (first, last): (u32, u32)) -> Shown {
    let begin = |step: &Step| if step.begin.is_finite() { step.begin } else { step.start };
    let end = steps[&last].end;
    let until = last.checked_add(1).and_then(|next| steps.get(&next)).map(begin);
    let mut window = (begin(&steps[&first]), until.unwrap_or(end));
    if window.1 <= window.0 {
        window = (steps[&first].start, end);
    }
    let is_inside = |event: &&Event| event.has_times() && event.start_secs < window.1 && event.end_secs > window.0;
    Shown { model, first, last, window, events: events.iter().filter(is_inside).copied().collect() }
}

/// The times that the trace covers completely: from its first event to its last, except while a model ran steps that
/// were not kept.
pub(super) fn kept_windows(events: &[Event]) -> Vec<(f64, f64)> {
    let mut steps: BTreeMap<(u16, u32), (f64, f64)> = BTreeMap::new();
    for event in events.iter().filter(|event| event.has_times()) {
        let span = steps.entry((event.name.model, event.step)).or_insert((event.start_secs, event.end_secs));
        *span = (span.0.min(event.start_secs), span.1.max(event.end_secs));
    }
    let begin = steps.values().map(|span| span.0).fold(f64::INFINITY, f64::min);
    let end = steps.values().map(|span| span.1).fold(f64::NEG_INFINITY, f64::max);
    let pairs = steps.iter().zip(steps.iter().skip(1));
    let gaps = pairs.filter(|((a, _), (b, _))| a.0 == b.0 && b.1 - a.1 > 1).map(|((_, a), (_, b))| (a.1, b.0));
    let mut windows = Vec::new();
    let mut from = begin;
    for gap in merged(gaps.collect()) {
        windows.push((from, gap.0));
        from = gap.1;
    }
    windows.push((from, end));
    windows.retain(|window| window.1 > window.0);
    windows
}

/// Seconds of the windows that lie in at least one of the spans.
pub(super) fn covered_secs(spans: Vec<(f64, f64)>, windows: &[(f64, f64)]) -> f64 {
    let within = |span: (f64, f64)| windows.iter().map(move |w| (span.1.min(w.1) - span.0.max(w.0)).max(0.0));
    // Starts at 0, since the sum of nothing is -0.
    merged(spans).into_iter().flat_map(within).fold(0.0, |sum, secs| sum + secs)
}

/// The same times as disjoint spans, in order.
fn merged(mut spans: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    spans.retain(|span| span.1 > span.0);
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut out: Vec<(f64, f64)> = Vec::new();
    for span in spans {
        match out.last_mut() {
            Some(last) if span.0 <= last.1 => last.1 = last.1.max(span.1),
            _ => out.push(span),
        }
    }
    out
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
        // A trace has few runs of steps; one with many is best described by its ends.
        7.. => return format!("{} of those from {} to {}", steps.len(), runs[0].0, runs[runs.len() - 1].1),
        _ => runs.iter().map(word).collect(),
    };
    match words.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => "none".into(),
    }
}
