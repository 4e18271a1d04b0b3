//! The report of a run: reads what the run left in its directory and draws it as report.html and schedule.svg.
//!
//! Nothing is asked of a running program, and nothing but these two files is written, each under a temporary name
//! first: a run may be looked at while it goes on. The page says what is missing (a trace, a validation, ceilings); a
//! damaged file is an error.

mod devices;
mod outcomes;
mod plan_file;
mod shown;

use super::metrics::{Row, StepRow, read_rows};
use super::run_files;
use crate::base::{Error, LaneId, Result, format_bytes, format_secs};
use crate::nn::safely::write_safely;
use crate::trace::{
    Bound, ColourBy, Event, LaneRow, LaneSum, ModelCurves, ReportData, StepBound, Trace, gantt_svg, report_page,
};
use devices::device_rows;
use outcomes::outcomes;
use plan_file::PlanFile;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Steps at the start that are not steady: the first prefetches everything, the second still overlaps with it.
const WARM_UP: u64 = 2;

/// Writes `report.html` (one self-contained page) and `schedule.svg` into the run directory `run`; returns the page's
/// path.
///
/// Reads `plan.json`, `trace.json` (which may be missing or truncated), `results.csv` where there is one, and the
/// `metrics.jsonl` of every model that plan.json names and of every subfolder that has one.
///
/// # Errors
/// [`Error::BadInput`], naming the file, when the directory or its plan.json does not exist, or a file is damaged;
/// [`Error::Io`] when one cannot be read or written.
pub fn write_report(run: &Path) -> Result<PathBuf> {
    if !run.is_dir() {
        return Err(Error::bad(format!("{}: is no run directory", run.display())));
    }
    let plan = PlanFile::read(&run.join(run_files::PLAN))?;
    let models = read_models(run, &plan)?;
    let trace_path = run.join(run_files::TRACE);
    let mut trace = if trace_path.exists() { Some(Trace::read(&trace_path)?) } else { None };
    trace.iter_mut().for_each(|trace| renumber(trace, &models));
    let mut data = report_data(&title(run), &plan, &models, trace.as_ref());
    (data.outcome_columns, data.outcome_rows) = outcomes(&run.join(run_files::RESULTS))?;
    let mut gantt = data.gantt_options();
    gantt.title = format!("{}: {}", data.title, data.schedule_note);
    write_safely(&run.join(run_files::SCHEDULE), |out| out.write_all(gantt_svg(&data.events, &gantt).as_bytes()))?;
    let page = run.join(run_files::REPORT);
    write_safely(&page, |out| out.write_all(report_page(&data).as_bytes()))?;
    Ok(page)
}

/// A model's name and its rows.
struct ModelRows {
    name: String,
    steps: Vec<StepRow>,
    /// Steps done, and the loss on held-out data at that point.
    valid: Vec<(u64, f64)>,
}

/// The directory's own name, also for a path such as `runs/demo/.`.
fn title(run: &Path) -> String {
    let whole = run.canonicalize().unwrap_or_else(|_| run.to_path_buf());
    whole.file_name().map_or_else(|| whole.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// The plan's models in its order, then those that it does not name, by name.
fn read_models(run: &Path, plan: &PlanFile) -> Result<Vec<ModelRows>> {
    let mut names: Vec<String> = plan.models.iter().map(|model| model.name.clone()).collect();
    let mut others = BTreeSet::new();
    for entry in std::fs::read_dir(run).map_err(|e| Error::io("read", run, e))? {
        let entry = entry.map_err(|e| Error::io("read", run, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !names.contains(&name) && entry.path().join(run_files::METRICS).is_file() {
            others.insert(name);
        }
    }
    names.extend(others);
    names.into_iter().map(|name| read_model(run, name)).collect()
}

fn read_model(run: &Path, name: String) -> Result<ModelRows> {
    let path = run.join(&name).join(run_files::METRICS);
    let rows = if path.exists() { read_rows(&path)? } else { Vec::new() };
    let (mut steps, mut valid) = (Vec::new(), Vec::new());
    for row in rows {
        match row {
            Row::Step(row) => steps.push(row),
            Row::Valid(row) => valid.push((row.step, f64::from(row.valid_loss))),
        }
    }
    steps.sort_by_key(|row| row.step);
    valid.sort_by_key(|row| row.0);
    Ok(ModelRows { name, steps, valid })
}

/// Renumbers the events' models as on the page: a resumed run without the models that are done numbers the others anew.
fn renumber(trace: &mut Trace, models: &[ModelRows]) {
    let number = |name: &String| models.iter().position(|model| model.name == *name);
    let numbers: Vec<Option<usize>> = trace.models.iter().map(number).collect();
    for event in &mut trace.events {
        let known = numbers.get(usize::from(event.name.model)).copied().flatten();
        event.name.model = known.map_or(event.name.model, |number| number as u16);
    }
}

fn report_data(title: &str, plan: &PlanFile, models: &[ModelRows], trace: Option<&Trace>) -> ReportData {
    let none = Vec::new();
    let events = trace.map_or(&none, |trace| &trace.events);
    let shown = shown::choose(events);
    let kept: BTreeSet<u32> = events.iter().map(|event| event.step).collect();
    let colour_by = match events.iter().all(|event| event.name.model == events[0].name.model) {
        true => ColourBy::What,
        false => ColourBy::Model,
    };
    let schedule_note = shown.as_ref().map_or_else(String::new, |shown| {
        let steps = if shown.first == shown.last {
            format!("Step {}", shown.first)
        } else {
            format!("Steps {} to {}", shown.first, shown.last)
        };
        let kept = shown::steps_text(&kept);
        match models.get(usize::from(shown.model)).filter(|_| colour_by == ColourBy::Model) {
            Some(ModelRows { name, .. }) => {
                format!("{steps} of {name} of those whose events were kept ({kept}), with all that ran meanwhile.")
            }
            None => format!("{steps} of those whose events were kept ({kept})."),
        }
    });
    let (lanes, lanes_note) = lanes(plan, events, &kept);
    let (plan_columns, plan_rows) = plan.shard_table();
    ReportData {
        title: title.into(),
        notes: notes(models, trace, events, &kept),
        facts: facts(plan, models),
        plan_columns,
        plan_rows,
        models: models.iter().map(curves).collect(),
        outcome_columns: Vec::new(),
        outcome_rows: Vec::new(),
        steps: step_bounds(models),
        devices: trace.map_or_else(Vec::new, device_rows),
        lanes,
        lanes_note,
        window: shown.as_ref().map(|shown| shown.window),
        events: shown.map_or_else(Vec::new, |shown| shown.events),
        schedule_note,
        colour_by,
    }
}

/// What the run is, and what its trace lacks.
fn notes(models: &[ModelRows], trace: Option<&Trace>, events: &[Event], kept: &BTreeSet<u32>) -> Vec<String> {
    let mut notes = Vec::new();
    for model in models {
        let trained = match model.steps.as_slice() {
            [] => "no steps yet".to_string(),
            [row] => format!("step {}", row.step),
            [first, .., last] => format!("steps {} to {}", first.step, last.step),
        };
        let secs: f64 = model.steps.iter().map(|row| row.secs).sum();
        let speed = speed(model).map_or(String::new(), |speed| format!(", {speed}"));
        notes.push(format!("{}: {trained} in {}{speed}.", model.name, format_secs(secs)));
    }
    match trace {
        None => notes
            .push("The run directory holds no trace.json, so there is no schedule and lanes have no totals.".into()),
        Some(trace) => {
            let missing = trace.summary.as_ref().map_or(0, |summary| summary.dropped + summary.displaced);
            let steps = shown::steps_text(kept);
            match missing {
                _ if events.is_empty() => notes.push("The trace holds no events.".into()),
                0 => notes.push(format!("The trace holds every event of the steps {steps}.")),
                missing => notes
                    .push(format!("The trace holds the steps {steps}, but for {missing} events that found no room.")),
            }
            if trace.summary.is_none() {
                notes.push("The trace breaks off: the run goes on, or it was killed.".into());
            }
        }
    }
    notes
}

/// The median speed of the steady steps, which differs from the average over all steps, as those include the warm-up.
fn speed(model: &ModelRows) -> Option<String> {
    let of = |what: fn(&StepRow) -> Option<f64>| median(steady(model).filter_map(what).collect());
    let tokens = of(|row| row.tokens_per_sec).map(|speed| format!("{speed:.0} tokens/s"));
    let speed = tokens.or_else(|| of(|row| row.samples_per_sec).map(|speed| format!("{speed:.1} samples/s")));
    speed.map(|speed| format!("median speed {speed}"))
}

/// The steps beyond the first two, or all where there are no more.
fn steady(model: &ModelRows) -> impl Iterator<Item = &StepRow> {
    let skipped = if model.steps.iter().any(|row| row.step >= WARM_UP) { WARM_UP } else { 0 };
    model.steps.iter().filter(move |row| row.step >= skipped)
}

/// The middle value, or the mean of the two middle ones; only finite values count.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.retain(|value| value.is_finite());
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// The plan's key figures, and what the run made of them.
fn facts(plan: &PlanFile, models: &[ModelRows]) -> Vec<(String, String)> {
    let mut facts: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, value: Option<String>| facts.extend(value.map(|value| (name.to_string(), value)));
    let listed = plan.models.iter().map(|model| model.shards.len() as u64).sum();
    add("shards", plan.shards.or(Some(listed)).filter(|&shards| shards > 0).map(|shards| shards.to_string()));
    add("predicted device peak", plan.device_peak_bytes.map(format_bytes));
    add("device budget", plan.budget_text());
    add(
        "smallest budget that works",
        plan.smallest_device_bytes.map(|bytes| format!("{} ({bytes} bytes)", format_bytes(bytes))),
    );
    let state = |resident| match (resident, plan.resting_shards) {
        (true, _) => "resident on the device".to_string(),
        (false, None | Some(0)) => "streamed from the host".to_string(),
        (false, Some(resting)) => {
            format!("of {resting} of the shards resident on the device, else streamed from the host")
        }
    };
    add("state of the model", plan.resident.map(state));
    add("weight slots", plan.slots.filter(|_| plan.resident != Some(true)).map(|slots| slots.to_string()));
    add("recomputation", plan.recompute.as_str().map(String::from));
    add("predicted step", plan.step_secs.map(format_secs));
    // Steps of several models overlap in ways that the median of each does not show.
    let measured = match models {
        [model] => median(steady(model).map(|row| row.secs).collect()),
        _ => None,
    };
    add(
        "measured step, median",
        measured.map(|secs| match plan.step_secs.filter(|&predicted| predicted > 0.0) {
            Some(predicted) => {
                format!("{}, {:+.1} % against predicted", format_secs(secs), (secs / predicted - 1.0) * 100.0)
            }
            None => format_secs(secs),
        }),
    );
    add(
        "bound that no schedule beats",
        plan.bound_secs.map(|bound| match measured.filter(|&secs| secs > 0.0 && bound > 0.0) {
            Some(secs) => format!("{}, {:.1} % of it reached", format_secs(bound), bound / secs * 100.0),
            None => format_secs(bound),
        }),
    );
    facts
}

fn curves(model: &ModelRows) -> ModelCurves {
    let points = |of: fn(&StepRow) -> f64| model.steps.iter().map(|row| (row.step, of(row))).collect();
    ModelCurves {
        name: model.name.clone(),
        train_loss: points(|row| f64::from(row.loss)),
        valid_loss: model.valid.clone(),
        learning_rate: points(|row| row.lr),
        grad_norm: points(|row| row.grad_norm),
    }
}

/// What bound each step; with several models, their seconds at the same step number are averaged, since each counts the
/// whole time. Empty where it is not known: older versions did not separate the steps of several models.
fn step_bounds(models: &[ModelRows]) -> Vec<StepBound> {
    let mut rows = models.iter().flat_map(|model| &model.steps);
    if rows.all(|row| row.bound().total() == row.idle_secs) {
        return Vec::new();
    }
    let mut steps: BTreeMap<u64, (Bound, f64)> = BTreeMap::new();
    for row in models.iter().flat_map(|model| &model.steps) {
        let (sum, count) = steps.entry(row.step).or_default();
        sum.add(&row.bound());
        *count += 1.0;
    }
    steps.into_iter().map(|(step, (bound, count))| StepBound { step, bound: bound.mean(count) }).collect()
}

/// Totals of each lane over the kept steps, and a sentence that says what they cover.
fn lanes(plan: &PlanFile, events: &[Event], kept: &BTreeSet<u32>) -> (Vec<LaneRow>, String) {
    let mut sums = BTreeMap::new();
    for event in events.iter().filter(|event| event.has_times()) {
        sums.entry(event.lane).or_insert_with(|| LaneSum::new(event.lane)).add(event);
    }
    if sums.is_empty() {
        return (Vec::new(), String::new());
    }
    let windows = shown::kept_windows(events);
    let secs: f64 = windows.iter().map(|window| window.1 - window.0).sum();
    let busy_secs = |lane: LaneId| {
        let of = events.iter().filter(|e| e.lane == lane && e.has_times());
        shown::covered_secs(of.map(|e| (e.start_secs, e.end_secs)).collect(), &windows)
    };
    let row = |sum: LaneSum| LaneRow {
        sum,
        peak_per_sec: plan.peak(sum.lane.kind),
        busy_share: (secs > 0.0).then(|| busy_secs(sum.lane) / secs),
    };
    let one_model = events.iter().all(|event| event.name.model == events[0].name.model);
    let kept = shown::steps_text(kept);
    let mut note = match one_model {
        true => format!("Over the steps {kept}, which took {}.", format_secs(secs)),
        // Steps of other models that were not kept ran at the same time as some that were.
        false => {
            format!("Over the steps {kept}; shares are of the {} in which every model's were kept.", format_secs(secs))
        }
    };
    if plan.ceilings.is_none() {
        note.push_str(" plan.json holds no ceilings.");
    }
    (sums.into_values().map(row).collect(), note)
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
