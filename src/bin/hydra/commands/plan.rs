//! `hydra plan`: the cut, where everything lies, what a step will take, what bounds it and what would help.

use crate::args::JobFile;
use crate::job::Job;
use crate::machine::free_memory_bytes;
use crate::plan::{Sharing, describe, plan_to_fit, together, warn_of_warmups, what_would_help, why_not};
use crate::print::{say, warn};
use crate::rundir::{PLAN, keep_run, write_into};
use hydra::base::Result;
use std::path::Path;
use std::rc::Rc;

/// Plans the job of a file and prints the plan; with `out`, also writes plan.json there.
///
/// # Errors
/// When `out` contains a run, the job is faulty, no plan fits, or plan.json cannot be written.
pub fn run(JobFile { job: path, set }: &JobFile, out: Option<&Path>, json: bool) -> Result<()> {
    // Checked before the search for a plan, which may take minutes.
    out.map_or(Ok(()), keep_run)?;
    let free = free_memory_bytes();
    let planned = plan_to_fit(path, Job::load(path, set)?, &Rc::default(), false, free)?;
    why_not(path, &planned, free).into_iter().for_each(warn);
    warn_of_warmups(&planned.job, 0, &planned.models);
    if let Some(out) = out {
        write_into(out, PLAN, &planned.text())?;
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
