//! `hydra plan`: the cut, where everything lies, what a step will take, what bounds it and what would help.

use crate::planning::{Planned, PlannedJob, plan_job};
use crate::print::{say, table};
use crate::rundir::PLAN;
use hydra::base::{Result, format_bytes, format_secs};
use hydra::spill::BoundaryTier;
use hydra::trace::Bound;
use hydra::train::write_safely;
use std::path::Path;

/// Plans the job at `path` and prints the plan; with `out`, also writes plan.json there.
///
/// # Errors
/// When the job is at fault, no plan fits, or plan.json cannot be written.
pub fn run(path: &Path, sets: &[String], out: Option<&Path>, json: bool) -> Result<()> {
    let planned = plan_job(path, sets, false)?;
    if let Some(out) = out {
        std::fs::create_dir_all(out).map_err(|e| hydra::train::refused("create", out, e))?;
        write_safely(&out.join(PLAN), |file| write!(file, "{:#}\n", planned.json()))?;
    }
    if json {
        say(planned.json());
        return Ok(());
    }
    for model in &planned.models {
        say(describe(model, &planned));
    }
    Ok(())
}

/// Prints a few lines on each model's plan.
pub fn summary(planned: &PlannedJob) {
    for model in &planned.models {
        say(headline(model, planned));
    }
}

fn headline(model: &Planned, planned: &PlannedJob) -> String {
    let plan = &model.plan;
    let count = |n: usize, what: &str| if n == 1 { format!("{n} {what}") } else { format!("{n} {what}s") };
    let place = match plan.choice.resident {
        true => "all state on the device".to_string(),
        false => format!("state in host memory, {}", count(plan.arena.weight_slots.len(), "weight slot")),
    };
    let budget = planned.machine.device_budget.map_or(String::new(), |b| format!(" of {}", format_bytes(b)));
    format!(
        "{}: {}, {place}; device memory {}{budget}, host memory {}\n{}: a step is predicted to take {} (no less than {})",
        model.prepared.name,
        count(plan.shards.len(), "shard"),
        format_bytes(plan.arena.bytes),
        format_bytes(plan.host.bytes),
        model.prepared.name,
        format_secs(model.prediction.step_secs),
        format_secs(model.prediction.bound_secs),
    )
}

fn describe(model: &Planned, planned: &PlannedJob) -> String {
    let (plan, cost) = (&model.plan, &planned.machine.cost);
    let microbatches = model.model.microbatches as f64;
    let mut text = headline(model, planned);
    text += "\n\n";
    let mut rows = vec![["shard", "bytes", "tier", "forward", "backward", "layers"].map(String::from).to_vec()];
    for (s, shard) in plan.shards.iter().enumerate() {
        let names = plan.layer_names(&model.model, s);
        let layers = match names[..] {
            [one] => one.to_string(),
            [first, .., last] => format!("{first} to {last} ({})", names.len()),
            [] => String::new(),
        };
        let forward = match shard.forward {
            Some(_) => format_secs(microbatches * shard.forward_secs(cost)),
            None => "with backward".to_string(),
        };
        let again = if shard.forward.is_some() && !shard.kept { " (recomputes)" } else { "" };
        rows.push(vec![
            s.to_string(),
            format_bytes(shard.fetch_bytes()),
            if plan.choice.resident { "device" } else { "pageable" }.to_string(),
            forward,
            format!("{}{again}", format_secs(microbatches * shard.backward_secs(cost))),
            layers,
        ]);
    }
    text += &table(&rows);
    let tier = |tier: &BoundaryTier| match tier {
        BoundaryTier::Device => "the device",
        BoundaryTier::Host { .. } => "host memory",
    };
    if plan.shards.len() > 1 {
        let (activations, gradients) = (tier(&plan.choice.activations), tier(&plan.choice.gradients));
        text += &format!("  boundary activations in {activations}, boundary gradients in {gradients}\n");
    }
    text += "\ndevice memory\n";
    let mut rows: Vec<Vec<String>> =
        plan.arena_table().into_iter().map(|(what, bytes)| vec![what.to_string(), format_bytes(bytes)]).collect();
    rows.push(vec!["in all".into(), format_bytes(plan.arena.bytes)]);
    rows.push(vec!["smallest budget that works".into(), format_bytes(plan.smallest_device_bytes)]);
    text += &table(&rows);
    text += &format!("\na step: {}, of which\n", format_secs(model.prediction.step_secs));
    text += &bound_table(&model.prediction.bound);
    text.trim_end().to_string()
}

/// The seconds of a step by what bound them.
fn bound_table(bound: &Bound) -> String {
    let total = bound.total().max(f64::MIN_POSITIVE);
    let rows: Vec<Vec<String>> = Bound::NAMES
        .iter()
        .zip(bound.parts())
        .filter(|(_, secs)| *secs > 0.0)
        .map(|(name, secs)| vec![name.to_string(), format_secs(secs), format!("{:.1} %", 100.0 * secs / total)])
        .collect();
    table(&rows)
}
