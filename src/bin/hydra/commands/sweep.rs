//! `hydra simulate --sweep`: every combination of a few values, as a table, a CSV and a plot.

use crate::args::Wishes;
use crate::commands::simulate::{quoted, simulate_job};
use crate::plan::PlannedJob;
use crate::print::{say, table};
use crate::rundir::{keep_run, write_into};
use crate::text::Texts;
use hydra::base::{Error, Result, format_secs, parse_bytes, parse_bytes_per_sec};
use hydra::engine::Simulation;
use hydra::trace::{SweepLine, SweepPlot, sweep_svg};
use serde_json::{Value, json};
use std::path::Path;
use std::rc::Rc;

/// One key and the values that it takes.
struct Axis {
    key: String,
    values: Vec<String>,
}

/// The keys of a sweep and the settings of the job that they stand for.
const KEYS: [(&str, &str); 8] = [
    ("policy", "run.policy"),
    ("devices", "device.0.count"),
    ("slots", "run.slots"),
    ("memory", "device.0.memory"),
    ("link", "device.0.link"),
    ("recompute", "run.recompute"),
    ("pipeline", "run.pipeline"),
    ("rehearse", "run.rehearse"),
];

/// Most combinations of one sweep.
const MOST: usize = 10_000;

/// The result of one combination.
struct Point {
    values: Vec<String>,
    /// Its figures, or the reason why there are none.
    outcome: std::result::Result<Figures, String>,
}

struct Figures {
    makespan_secs: f64,
    bound_secs: f64,
    /// The utilisation of each device.
    utilisation: Vec<f64>,
    policy: &'static str,
}

impl Figures {
    fn new((planned, simulation): (PlannedJob, Simulation)) -> Figures {
        Figures {
            makespan_secs: simulation.makespan_secs,
            bound_secs: simulation.bounds.secs,
            utilisation: simulation.utilisation,
            policy: planned.job.run.policy.word(),
        }
    }

    fn mean_utilisation(&self) -> f64 {
        self.utilisation.iter().sum::<f64>() / self.utilisation.len().max(1) as f64
    }
}

/// Simulates every combination; writes sweep.csv and sweep.svg to the folder that the command line names, if any.
///
/// # Errors
/// When that folder contains a run, a key is unknown or set twice, or a file cannot be written. A combination that does
/// not fit, or whose values are incompatible, becomes a row that says so; if all of them do, [`Error::OutOfBudget`] if
/// any would fit with more memory, else the first one's error.
pub fn run(wishes: &Wishes, json: bool) -> Result<()> {
    let out = wishes.out.as_deref();
    out.map_or(Ok(()), keep_run)?;
    let axes = wishes.sweep.iter().map(|text| read_axis(text)).collect::<Result<Vec<Axis>>>()?;
    check_once(&axes, wishes)?;
    if wishes.devices.is_some() || axes.iter().any(|axis| axis.key == "devices") {
        wishes.check_counts(if wishes.devices.is_some() { "--devices" } else { "--sweep devices" })?;
    }
    let combinations: usize = axes.iter().map(|a| a.values.len()).product();
    if combinations > MOST {
        return Err(Error::bad(format!("--sweep: {combinations} combinations; at most {MOST}")));
    }
    // No key changes the texts that the models read.
    let texts = Rc::new(Texts::kept());
    let (mut points, mut faults) = (Vec::new(), Vec::new());
    for number in 0..combinations {
        let (values, sets) = combination(&axes, number, wishes.settings());
        let outcome =
            simulate_job(&wishes.file.job, &sets, &texts, None).map(Figures::new).map(Ok).or_else(|error| {
                let why = match &error {
                    Error::OutOfBudget { message, .. } => message.lines().next().unwrap_or_default().to_string(),
                    Error::BadInput(_) => error.to_string(),
                    _ => return Err(error),
                };
                faults.push(error);
                Ok(Err(why))
            })?;
        points.push(Point { values, outcome });
    }
    // The smallest budget among those that do not fit.
    let budget = |fault: &Error| match fault {
        Error::OutOfBudget { smallest_device_bytes, .. } => Some(*smallest_device_bytes),
        _ => None,
    };
    let (none, would_fit) = (points.iter().all(|p| p.outcome.is_err()), faults.iter().filter_map(budget).min());
    if none && would_fit.is_none() {
        return Err(faults.swap_remove(0));
    }
    if let Some(out) = out {
        write_into(out, "sweep.csv", &csv(&axes, &points))?;
        write_into(out, "sweep.svg", &sweep_svg(&plot(&axes, &points)))?;
    }
    if json {
        say(json!({ "sweep": points.iter().map(|p| point_json(&axes, p)).collect::<Vec<_>>() }));
    } else {
        tell(&axes, &points, out);
    }
    match (none, would_fit, &points[..]) {
        (true, Some(bytes), [Point { outcome: Err(why), .. }, others @ ..]) => Err(Error::OutOfBudget {
            message: match others {
                [] => format!("--sweep: its one combination does not fit: {why}"),
                _ => format!("--sweep: none of {combinations} combinations fits; the first: {why}"),
            },
            smallest_device_bytes: bytes,
        }),
        _ => Ok(()),
    }
}

/// The values of combination number `number`, where the last axis varies fastest, and the `sets` extended by them.
fn combination(axes: &[Axis], mut number: usize, mut sets: Vec<String>) -> (Vec<String>, Vec<String>) {
    let mut values = vec![String::new(); axes.len()];
    for (axis, value) in axes.iter().zip(&mut values).rev() {
        *value = axis.values[number % axis.values.len()].clone();
        number /= axis.values.len();
        let setting = KEYS.iter().find(|(key, _)| *key == axis.key).expect("read_axis knows the key").1;
        let plain = value.parse::<f64>().is_ok() || value.parse::<bool>().is_ok();
        sets.push(if plain { format!("{setting}={value}") } else { format!("{setting}={}", quoted(value)) });
    }
    (values, sets)
}

/// Prints a row for each combination, and the files' paths.
fn tell(axes: &[Axis], points: &[Point], out: Option<&Path>) {
    let mut rows: Vec<Vec<String>> = vec![axes.iter().map(|a| a.key.clone()).collect()];
    rows[0].extend(["makespan", "bound", "gap", "computes"].map(String::from));
    if points.iter().any(|p| p.outcome.is_err()) {
        rows[0].push("reason".into());
    }
    for point in points {
        let mut row = point.values.clone();
        match &point.outcome {
            Ok(f) => row.extend([
                format_secs(f.makespan_secs),
                format_secs(f.bound_secs),
                format!("{:.1} %", 100.0 * (f.makespan_secs / f.bound_secs - 1.0)),
                format!("{:.1} %", 100.0 * f.mean_utilisation()),
            ]),
            Err(why) => row.extend(["", "", "", "", why.as_str()].map(String::from)),
        }
        rows.push(row);
    }
    say(table(&rows).trim_end());
    if let Some(out) = out {
        say(format!("  sweep       {}", out.join("sweep.csv").display()));
        say(format!("  plot        {}", out.join("sweep.svg").display()));
    }
}

/// Refuses a key that is swept twice, or swept and also set by its own option: one of the two would be ignored.
fn check_once(axes: &[Axis], wishes: &Wishes) -> Result<()> {
    let stated = [
        ("policy", wishes.policy.clone()),
        ("devices", wishes.devices.map(|n| n.to_string())),
        ("slots", wishes.slots.map(|n| n.to_string())),
    ];
    for (i, Axis { key, values }) in axes.iter().enumerate() {
        if axes[..i].iter().any(|other| other.key == *key) {
            return Err(Error::bad(format!("--sweep {key}: is there twice; write all its values in one")));
        }
        if let Some((_, Some(value))) = stated.iter().find(|(option, _)| option == key) {
            let values = values.join(",");
            return Err(Error::bad(format!(
                "--sweep {key}={values}: --{key} {value} is there too; leave one of them out"
            )));
        }
    }
    Ok(())
}

fn read_axis(text: &str) -> Result<Axis> {
    let names = KEYS.map(|(key, _)| key);
    let (key, values) = text.split_once('=').ok_or_else(|| {
        Error::bad(format!(
            "--sweep {text}: want a key and its values, such as policy=fifo,srtf; keys are {}",
            names.join(", ")
        ))
    })?;
    if !names.contains(&key) {
        let hint = hydra::base::nearest(key, names).map_or(String::new(), |near| format!("; did you mean {near}?"));
        return Err(Error::bad(format!("--sweep {key}: is not known, only {}{hint}", names.join(", "))));
    }
    let values: Vec<String> = values.split(',').map(|v| v.trim().to_string()).filter(|v| !v.is_empty()).collect();
    if values.is_empty() {
        return Err(Error::bad(format!("--sweep {key}: has no values")));
    }
    if let Some(twin) = (1..values.len()).find(|&i| values[..i].contains(&values[i])) {
        return Err(Error::bad(format!("--sweep {key}: {} is there twice; write each value once", values[twin])));
    }
    Ok(Axis { key: key.to_string(), values })
}

fn csv(axes: &[Axis], points: &[Point]) -> String {
    let keys: Vec<&str> = axes.iter().map(|a| a.key.as_str()).collect();
    let mut text = format!("{},makespan_secs,bound_secs,utilisation,reason\n", keys.join(","));
    for point in points {
        let in_quotes = |word: &str| format!("\"{}\"", word.replace('"', "\"\""));
        // No value contains a comma.
        let field = |value: &String| if value.contains(['"', '\n', '\r']) { in_quotes(value) } else { value.clone() };
        let values = point.values.iter().map(field).collect::<Vec<_>>().join(",");
        text += &match &point.outcome {
            Ok(f) => format!("{values},{:?},{:?},{:?},\n", f.makespan_secs, f.bound_secs, f.mean_utilisation()),
            Err(why) => format!("{values},,,,{}\n", in_quotes(why)),
        };
    }
    text
}

/// The value as a number: a count, bytes, or bytes per second.
fn number(value: &str) -> Option<f64> {
    let plain = value.parse::<f64>().ok().filter(|n| n.is_finite());
    plain.or_else(|| parse_bytes(value).ok().map(|n| n as f64)).or_else(|| parse_bytes_per_sec(value).ok())
}

/// Makespans over the last axis of at least two numbers; without one, over the last axis of at least two words.
fn plot(axes: &[Axis], points: &[Point]) -> SweepPlot {
    let numbers = |axis: &Axis| axis.values.iter().map(|v| number(v)).collect::<Option<Vec<f64>>>();
    let varies = |i: &usize| axes[*i].values.len() > 1;
    let last = |fits: &dyn Fn(&usize) -> bool| (0..axes.len()).rev().find(fits);
    let across =
        last(&|i| varies(i) && numbers(&axes[*i]).is_some()).or_else(|| last(&varies)).unwrap_or(axes.len() - 1);
    let axis = &axes[across];
    let mut lines: Vec<SweepLine> = Vec::new();
    for point in points {
        let others = (0..axes.len()).filter(|i| *i != across && varies(i));
        let words: Vec<String> = others.map(|i| format!("{}={}", axes[i].key, point.values[i])).collect();
        let label = words.join(", ");
        let line = lines.iter().position(|line| line.label == label).unwrap_or_else(|| {
            lines.push(SweepLine { label, secs: vec![None; axis.values.len()] });
            lines.len() - 1
        });
        let at =
            axis.values.iter().position(|v| *v == point.values[across]).expect("points are made of the axes' values");
        lines[line].secs[at] = point.outcome.as_ref().ok().map(|f| (f.makespan_secs, f.bound_secs));
    }
    let fixed = axes.iter().enumerate().filter(|(i, axis)| *i != across && axis.values.len() == 1);
    let fixed: Vec<String> = fixed.map(|(_, axis)| format!("{}={}", axis.key, axis.values[0])).collect();
    let title = if fixed.is_empty() { "Makespan".to_string() } else { format!("Makespan, {}", fixed.join(", ")) };
    SweepPlot { title, axis: axis.key.clone(), values: axis.values.clone(), numbers: numbers(axis), lines }
}

/// The values (numbers as numbers), and the figures under the same keys as in a single simulation.
fn point_json(axes: &[Axis], point: &Point) -> Value {
    let mut json = match &point.outcome {
        Ok(f) => json!({
            "makespan_secs": f.makespan_secs,
            "bound_secs": f.bound_secs,
            "utilisation": f.utilisation,
            "policy": f.policy,
        }),
        Err(why) => json!({ "reason": why }),
    };
    for (axis, value) in axes.iter().zip(&point.values) {
        let number = serde_json::from_str(value).ok().filter(Value::is_number);
        json[&axis.key] = number.unwrap_or_else(|| value.as_str().into());
    }
    json
}
