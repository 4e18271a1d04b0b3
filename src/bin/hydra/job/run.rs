//! `[run]` of a job: where and how to run.

use super::part::Part;
use super::section::Section;
use hydra::base::Result;
use hydra::sched::POLICIES;
use hydra::spill::{Baseline, Recompute};
use std::path::PathBuf;
use toml::Table;

/// Where and how to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The run's directory, absolute; default `runs/` and the job file's stem, and a folder in it for a part.
    pub out: PathBuf,
    /// The part of the models that this machine trains; `None` means all.
    pub part: Option<Part>,
    /// Seed of all random numbers; default 0.
    pub seed: u64,
    /// The policy that chooses which model's shard is next; default the first of [`POLICIES`].
    pub policy: Policy,
    /// Weight slots per device; `None` means 2.
    pub slots: Option<usize>,
    /// What is recomputed in the backward.
    pub recompute: Recompute,
    /// How many of the first steps have their events kept; default 5.
    pub trace_first: u64,
    /// How many of the last steps have their events kept; default 20.
    pub trace_last: u64,
    /// Whether microbatches of one model may be pipelined from device to device, if the policy supports it.
    pub pipeline: Pipeline,
    /// Whether rehearsals may tune [`Policy::LOCALITY_LRTF`].
    pub rehearse: bool,
    /// Microbatches that [`Baseline::Gpipe`] keeps in its pipeline; `None` means as many as devices.
    pub pipeline_microbatches: Option<usize>,
}

/// How models share the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// They take turns, by the policy of this name in [`POLICIES`].
    Turns(&'static str),
    /// They run in lines, by a baseline.
    Lines(Baseline),
}

impl Policy {
    /// The policy that can be tuned, and that can run a model on several devices at once.
    pub const LOCALITY_LRTF: Policy = Policy::Turns("locality-lrtf");

    /// Each with the word for it: the policies and, after them, the baselines.
    pub fn words() -> Vec<(&'static str, Policy)> {
        let turns = POLICIES.map(|(name, _)| (name, Policy::Turns(name)));
        let lines = Baseline::NAMES.map(|(name, baseline)| (name, Policy::Lines(baseline)));
        turns.into_iter().chain(lines).collect()
    }

    /// The word for it in a job file.
    pub fn word(self) -> &'static str {
        let found = Policy::words().into_iter().find(|(_, policy)| *policy == self);
        found.expect("every policy has a word").0
    }
}

/// Whether microbatches of one model may go on to the next device while others are still on the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipeline {
    /// Where the job is predicted to end sooner with it.
    Auto,
    /// Wherever one model bounds the makespan.
    Always,
    /// Nowhere: a model runs on one device at a time.
    Never,
}

impl Pipeline {
    /// Each with the word for it.
    pub const WORDS: [(&'static str, Pipeline); 3] =
        [("auto", Pipeline::Auto), ("always", Pipeline::Always), ("never", Pipeline::Never)];
}

/// What may be recomputed in the backward, each with the word for it.
pub const RECOMPUTE: [(&str, Recompute); 3] =
    [("auto", Recompute::Auto), ("always", Recompute::Always), ("never", Recompute::Never)];

/// The keys of `[run]`.
pub const RUN_KEYS: &[&str] =
    &["out", "part", "seed", "policy", "slots", "recompute", "trace", "pipeline", "rehearse", "pipeline_microbatches"];

/// Reads `[run]`; `stem` is the file's name without its extension.
pub fn read_run(root: &Section, stem: &str) -> Result<Run> {
    let empty = Table::new();
    let s = root.section_or("run", &empty, RUN_KEYS)?;
    let trace = s.section_or("trace", &empty, &["first", "last"])?;
    let out = s.path("out")?.unwrap_or_else(|| root.origin().resolve(&format!("runs/{stem}")));
    let part = Part::read(&s)?;
    // A folder cannot be created there.
    if out.is_symlink() && !out.exists() {
        return Err(s.fault("out", format!("{} is a link to nothing; a run needs a folder", out.display())));
    }
    Ok(Run {
        out: part.map_or_else(|| out.clone(), |part| out.join(part.folder())),
        part,
        seed: s.integer("seed", 0..=u64::MAX)?.unwrap_or(0),
        policy: s.word("policy", &Policy::words())?.unwrap_or(Policy::Turns(POLICIES[0].0)),
        slots: s.count("slots")?,
        recompute: s.word("recompute", &RECOMPUTE)?.unwrap_or(Recompute::Auto),
        trace_first: trace.integer("first", 0..=u64::MAX)?.unwrap_or(5),
        trace_last: trace.integer("last", 0..=u64::MAX)?.unwrap_or(20),
        pipeline: s.word("pipeline", &Pipeline::WORDS)?.unwrap_or(Pipeline::Auto),
        rehearse: s.flag("rehearse")?.unwrap_or(true),
        pipeline_microbatches: s.count("pipeline_microbatches")?,
    })
}
