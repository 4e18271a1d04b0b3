//! `hydra simulate`: a job's schedule, run by the executor that trains, on simulated devices and a virtual clock.

use crate::args::Wishes;
use crate::job::Job;
use crate::plan::{PlannedJob, Sharing, describe_rehearsal, plan_job};
use crate::print::{count, say, table};
use crate::rundir::{SCHEDULE, TRACE, keep_run, write_into};
use crate::text::Texts;
use hydra::base::{Error, LaneKind, Result, format_secs};
use hydra::engine::Simulation;
use hydra::sched::LowerBound;
use hydra::trace::{ColourBy, GanttOptions, Keep, Recorder, RecorderOptions, gantt_svg, read_trace};
use hydra::train::{Selection, Verdict};
use serde_json::{Value, json};
use std::path::Path;
use std::rc::Rc;

/// A word as a TOML string, whatever it contains.
pub fn quoted(word: &str) -> String {
    toml::Value::from(word).to_string()
}

impl Wishes {
    /// These wishes as settings of the job.
    pub fn settings(&self) -> Vec<String> {
        let mut sets = self.file.set.clone();
        sets.extend(self.policy.as_deref().map(|p| format!("run.policy={}", quoted(p))));
        sets.extend(self.devices.map(|n| format!("device.0.count={n}")));
        sets.extend(self.slots.map(|n| format!("run.slots={n}")));
        sets
    }

    /// Refuses to set the number of devices for a job with several kinds of them: the number would apply to the first
    /// table only.
    ///
    /// # Errors
    /// [`Error::BadInput`] that names `option`; and as [`Job::load`].
    pub fn check_counts(&self, option: &str) -> Result<()> {
        let path = &self.file.job;
        match Job::load(path, &self.file.set)?.devices.len() {
            0 | 1 => Ok(()),
            n => Err(Error::bad(format!(
                "{option}: {} has {n} [[device]] tables, and one number says nothing of how many there are of each; set device.0.count and the others",
                path.display()
            ))),
        }
    }
}

/// Simulates a job; writes the schedule, the trace and the figures to the folder that the command line names, if any.
///
/// # Errors
/// When that folder contains a run, the job is faulty, no plan fits, or a file cannot be written.
pub fn run(wishes: &Wishes, json: bool) -> Result<()> {
    let out = wishes.out.as_deref();
    out.map_or(Ok(()), keep_run)?;
    if let Some(devices) = wishes.devices {
        wishes.check_counts(&format!("--devices {devices}"))?;
    }
    let (planned, simulation) = simulate_job(&wishes.file.job, &wishes.settings(), &Rc::default(), out)?;
    let figures = figures(&planned, &simulation);
    if let Some(out) = out {
        write_into(out, "simulation.json", &format!("{figures:#}\n"))?;
    }
    if json {
        say(figures);
        return Ok(());
    }
    say(describe(&planned, &simulation));
    if let Some(out) = out {
        say(format!("  schedule    {}", out.join(SCHEDULE).display()));
        say(format!("  trace       {} (opens in https://ui.perfetto.dev)", out.join(TRACE).display()));
    }
    Ok(())
}

/// Plans the job and simulates it to its end; with `out`, the trace and the schedule are written there.
///
/// # Errors
/// As [`run`].
pub fn simulate_job(
    path: &Path,
    sets: &[String],
    texts: &Rc<Texts>,
    out: Option<&Path>,
) -> Result<(PlannedJob, Simulation)> {
    let mut planned = plan_job(path, sets, texts)?;
    let steps = steps(&planned)?;
    let all: Vec<usize> = (0..steps.len()).collect();
    planned.rehearsal = planned.rehearse(&all, &steps)?;
    if let Some(found) = &planned.rehearsal {
        planned.sharing = Sharing::Turns(found.policy.clone());
    }
    let recorder = out.map(|out| recorder(&planned, &steps, out)).transpose()?;
    let mut simulation = planned.simulate(steps, recorder)?;
    if let (Some(out), Some(recorder)) = (out, simulation.recorder.take()) {
        recorder.finish()?;
        draw(&planned, out)?;
    }
    Ok((planned, simulation))
}

/// Steps of each model. There are no losses here, so models that a search may end early need a table of survivors.
fn steps(planned: &PlannedJob) -> Result<Vec<u64>> {
    let mut steps: Vec<u64> = planned.models.iter().map(|m| m.prepared.options.steps).collect();
    for search in &planned.job.searches {
        if search.stop.is_some() && search.simulated.is_none() {
            let file = &planned.job.models[search.models.start].file;
            return Err(Error::bad(format!(
                "{file}: {}.stop: a simulation has no losses to stop by; give it survivors, such as survivors = [[0, 2], [2]], or leave stop out",
                search.at
            )));
        }
        let Some(mut table) = search.simulated.clone() else { continue };
        for m in search.models.clone() {
            steps[m] = survives(&mut table, m, steps[m]);
        }
    }
    Ok(steps)
}

/// Steps after which the table ends a model.
fn survives(table: &mut Selection, model: usize, steps: u64) -> u64 {
    let stops = |step: &u64| table.has_rung(*step) && table.report(model, *step, 0.0) != Verdict::GoOn;
    (1..steps).find(stops).unwrap_or(steps)
}

fn recorder(planned: &PlannedJob, steps: &[u64], out: &Path) -> Result<Recorder> {
    std::fs::create_dir_all(out).map_err(|e| Error::refused("create", out, e))?;
    let run = &planned.job.run;
    let keep =
        Keep { first: run.trace_first, last: run.trace_last, total_steps: steps.iter().copied().max().unwrap_or(0) };
    let names = planned.models.iter().map(|m| m.prepared.name.clone()).collect();
    let mut options = RecorderOptions::new(keep, Vec::new(), names);
    // Larger than in training, since a simulation makes events much faster than they can be written.
    (options.ring_events, options.window_events) = (1 << 20, 1 << 18);
    Recorder::create(&out.join(TRACE), options)
}

/// Draws the compute and copy lanes of the trace's first steps.
fn draw(planned: &PlannedJob, out: &Path) -> Result<()> {
    let mut events = read_trace(&out.join(TRACE))?;
    events.retain(|e| e.lane.kind != LaneKind::HostMath);
    let options = GanttOptions {
        title: format!("{} on {} simulated devices", planned.job.run.policy.word(), planned.machine.devices.len()),
        colour_by: ColourBy::Model,
        models: planned.models.iter().map(|m| m.prepared.name.clone()).collect(),
        ..GanttOptions::default()
    };
    write_into(out, SCHEDULE, &gantt_svg(&events, &options))
}

fn bound_name(bound: LowerBound) -> &'static str {
    match bound {
        LowerBound::Work => "all arithmetic over all devices",
        LowerBound::Chain => "the longest chain",
        LowerBound::HostToDevice => "bytes to devices over their links",
        LowerBound::DeviceToHost => "bytes from devices over their links",
        LowerBound::SharedLink => "bytes over the shared link",
    }
}

/// What `--json` prints.
fn figures(planned: &PlannedJob, simulation: &Simulation) -> Value {
    let (bounds, makespan) = (&simulation.bounds, simulation.makespan_secs);
    json!({
        "makespan_secs": makespan,
        "bound_secs": bounds.secs,
        "bounds": bounds,
        "gap": bounds.gap(makespan),
        "utilisation": simulation.utilisation,
        "policy": planned.job.run.policy.word(),
        "devices": planned.machine.devices.len(),
        "device_peak_bytes": planned.map.arena_bytes.iter().max(),
        "idle": planned.idle_devices(),
        "rehearsal": planned.rehearsal.as_ref().map(|found| json!({ "tries": found.tries, "gain": found.gain() })),
        "models": planned.models.iter().zip(&simulation.end_secs).map(|(m, end)| json!({
            "name": m.prepared.name, "shards": m.plan().shards.len(), "end_secs": end,
        })).collect::<Vec<_>>(),
        "lanes": simulation.sums.iter().map(|s| json!({
            "lane": s.lane.to_string(), "tasks": s.tasks, "busy_secs": s.busy_secs, "bytes": s.bytes,
        })).collect::<Vec<_>>(),
    })
}

fn describe(planned: &PlannedJob, simulation: &Simulation) -> String {
    let (bounds, makespan) = (&simulation.bounds, simulation.makespan_secs);
    let mean = simulation.utilisation.iter().sum::<f64>() / simulation.utilisation.len().max(1) as f64;
    let mut text = format!(
        "{} on {}, {}: makespan {}, {:.1} % of the devices' time computed; {}\n",
        count(planned.models.len(), "model"),
        count(planned.machine.devices.len(), "simulated device"),
        planned.job.run.policy.word(),
        format_secs(makespan),
        100.0 * mean,
        planned.memory_text(),
    );
    text += &format!(
        "  no schedule of these plans ends before {}: {}; this one is {:.1} % above\n",
        format_secs(bounds.secs),
        bound_name(bounds.greatest),
        100.0 * bounds.gap(makespan),
    );
    if let Some(found) = &planned.rehearsal {
        text += &format!("  {}\n", describe_rehearsal(found));
    }
    let parts = [
        ("all arithmetic over all devices", bounds.work_secs),
        ("longest chain", bounds.chain_secs),
        ("bytes to devices", bounds.h2d_secs),
        ("bytes from devices", bounds.d2h_secs),
        ("bytes over the shared link", bounds.shared_secs),
    ];
    let rows: Vec<Vec<String>> =
        parts.iter().filter(|p| p.1 > 0.0).map(|(name, secs)| vec![name.to_string(), format_secs(*secs)]).collect();
    text += &table(&rows);
    let mut rows = vec![["device", "computes", "copies to it", "copies from it"].map(String::from).to_vec()];
    for (d, share) in simulation.utilisation.iter().enumerate() {
        let busy = |kind: LaneKind| {
            let of = simulation.sums.iter().filter(|s| usize::from(s.lane.device) == d && s.lane.kind == kind);
            format!("{:.1} %", 100.0 * of.map(|s| s.busy_secs).sum::<f64>() / makespan.max(f64::MIN_POSITIVE))
        };
        let computes = format!("{:.1} %", 100.0 * share);
        rows.push(vec![d.to_string(), computes, busy(LaneKind::HostToDevice), busy(LaneKind::DeviceToHost)]);
    }
    text += &table(&rows);
    if let Some(idle) = planned.idle_devices() {
        text += &idle;
    }
    text.trim_end().to_string()
}
