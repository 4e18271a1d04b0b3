//! `hydra plan`: the cut, where everything lies, what a step will take, what bounds it and what would help.

use crate::job::Job;
use crate::machine::free_memory_bytes;
use crate::plan::advice::what_would_help;
use crate::plan::fitting::{plan_to_fit, why_not};
use crate::plan::placing::Sharing;
use crate::plan::planned::warn_of_warmups;
use crate::plan::words::{describe, together};
use crate::print::{say, warn};
use crate::rundir::{PLAN, keep_run};
use hydra::base::{Error, Result};
use hydra::train::write_safely;
use std::path::Path;
use std::rc::Rc;

/// Plans the job at `path` and prints the plan; with `out`, also writes plan.json there.
///
/// # Errors
/// When `out` holds a run, the job is at fault, no plan fits, or plan.json cannot be written.
pub fn run(path: &Path, sets: &[String], out: Option<&Path>, json: bool) -> Result<()> {
    // Before the plan is searched, which may take minutes.
    out.map_or(Ok(()), keep_run)?;
    let free = free_memory_bytes();
    let planned = plan_to_fit(path, Job::load(path, sets)?, &Rc::default(), false, free)?;
    why_not(path, &planned, free).into_iter().for_each(warn);
    warn_of_warmups(&planned.job, 0, &planned.models);
    if let Some(out) = out {
        std::fs::create_dir_all(out).map_err(|e| Error::refused("create", out, e))?;
        write_safely(&out.join(PLAN), |file| writeln!(file, "{:#}", planned.json()))?;
    }
    if json {
        say(planned.json());
        return Ok(());
    }
    for model in &planned.models {
        say(describe(model, &planned));
    }
    together(&planned);
    if planned.sharing != Sharing::Alone {
        say(format!("\nwhat would help:\n{}", what_would_help(&planned).trim_end()));
    }
    Ok(())
}
