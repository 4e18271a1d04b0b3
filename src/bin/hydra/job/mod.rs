//! The job file: TOML text in, plain values out.
//!
//! Reading checks everything that can be checked without opening another file or asking a device: types, ranges, words,
//! keys that do not exist or do not go together. Every error is one line that says the file, the dotted key, what is
//! wrong and what to write instead. Paths come out absolute; a relative one starts from the job file's folder.

pub mod model;
pub mod optimizer;
#[cfg(test)]
mod reference_tests;
pub mod search;
#[cfg(test)]
mod search_tests;
mod section;
mod set;
#[cfg(test)]
mod tests;

use hydra::base::{Error, Result};
use hydra::sched::{MOST_MODELS, POLICIES};
use hydra::spill::{Baseline, Recompute};
pub use model::{Model, Valid};
pub use search::Search;
pub use section::SANE_RATES;
use section::{Origin, Section};
use std::path::{Path, PathBuf};
use toml::Table;

/// What a job file asks for.
#[derive(Clone, Debug)]
pub struct Job {
    /// Where and how to run.
    pub run: Run,
    /// The devices, at least one entry.
    pub devices: Vec<Device>,
    /// The store behind the devices.
    pub host: Host,
    /// What to train, at least one, names all different; in the file's order, each search in the place of its model.
    pub models: Vec<Model>,
    /// The searches, in the file's order.
    pub searches: Vec<Search>,
    /// The folder from which relative paths start, absolute.
    pub folder: PathBuf,
    /// The job as TOML with the overrides in it; the file's own text where there are none.
    pub source_text: String,
}

/// Where and how to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The run's directory, absolute; default `runs/` and the job file's stem.
    pub out: PathBuf,
    /// Seed of all random numbers; default 0.
    pub seed: u64,
    /// Which model's shard goes next; default the first of [`POLICIES`].
    pub policy: Policy,
    /// Weight slots per device; none: 2.
    pub slots: Option<usize>,
    /// What is recomputed in the backward.
    pub recompute: Recompute,
    /// So many of the first steps have their events kept whole; default 5.
    pub trace_first: u64,
    /// So many of the last steps, too; default 20.
    pub trace_last: u64,
    /// Whether microbatches of one model may go on from device to device, where the policy can have that.
    pub pipeline: Pipeline,
    /// Whether rehearsals may find out what [`Policy::LOCALITY_LRTF`] should lean to.
    pub rehearse: bool,
    /// Microbatches that [`Baseline::Gpipe`] keeps in its pipeline; none: as many as devices.
    pub pipeline_microbatches: Option<usize>,
}

/// How models share the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// They take turns by the one of [`POLICIES`] that has this name.
    Turns(&'static str),
    /// They run in lines.
    Lines(Baseline),
}

impl Policy {
    /// The policy that can lean, and let a model run on several devices at once.
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

/// Whether microbatches of one model may go on from device to device, while others of them are still on the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pipeline {
    /// Where that is predicted to end sooner.
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

/// One `[[device]]`: `count` devices alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    /// What they are.
    pub kind: DeviceKind,
    /// How many; default 1.
    pub count: usize,
    /// Budget of each, in bytes; none: all that there is.
    pub memory: Option<u64>,
    /// Host and sim: bytes per second each way; none: as fast as it goes.
    pub link: Option<f64>,
    /// Host: cores of each; none: all, shared.
    pub threads: Option<usize>,
    /// Sim: floating-point operations per second.
    pub flops: Option<f64>,
    /// Sim: bytes per second of its own memory; there exactly when `flops` is.
    pub memory_bandwidth: Option<f64>,
    /// A named set of rates, or a file with one. Sim: there exactly when `flops` is not; others: in place of what would
    /// be measured.
    pub profile: Option<String>,
    /// The same as a path, absolute.
    pub profile_path: Option<PathBuf>,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Rust op loops in host memory.
    Host,
    /// A GPU.
    Cuda,
    /// The GPU's kernels run on the CPU.
    Emulated,
    /// A cost model and a virtual clock.
    Sim,
}

impl DeviceKind {
    /// Each with the word for it.
    pub const WORDS: [(&'static str, DeviceKind); 4] = [
        ("host", DeviceKind::Host),
        ("cuda", DeviceKind::Cuda),
        ("emulated", DeviceKind::Emulated),
        ("sim", DeviceKind::Sim),
    ];

    /// The word for it in a job file.
    pub fn word(self) -> &'static str {
        let found = DeviceKind::WORDS.iter().find(|(_, kind)| *kind == self);
        found.expect("WORDS has every kind").0
    }

    /// What the memory of its host's store is called.
    pub fn host_tier(self) -> &'static str {
        match self {
            DeviceKind::Cuda | DeviceKind::Emulated => "pinned",
            DeviceKind::Host | DeviceKind::Sim => "pageable",
        }
    }
}

/// The store behind the devices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Host {
    /// Budget in bytes; none: 80 % of what is free.
    pub memory: Option<u64>,
    /// Bytes per second that all devices share; none: as fast as it goes.
    pub link: Option<f64>,
    /// The disk tier, if there is one.
    pub disk: Option<Disk>,
}

/// The disk tier.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// Its folder, absolute.
    pub path: PathBuf,
    /// Budget in bytes.
    pub memory: u64,
    /// Bytes per second each way; none: as fast as it goes.
    pub link: Option<f64>,
}

impl Job {
    /// The job as a run's directory keeps it: a first line says from where its relative paths start, which is no longer
    /// the file's own folder.
    pub fn record(&self) -> String {
        format!("# Relative paths start from {:?}.\n{}", self.folder, self.source_text)
    }

    /// Reads the job file at `path` with the `sets` (`PATH=VALUE`, see [`set`]) put over it in order.
    ///
    /// # Errors
    /// [`Error::BadInput`] in every case; a file that cannot be read too, since its name was the user's.
    pub fn load(path: &Path, sets: &[String]) -> Result<Job> {
        let (file, full, text) = read_text(path)?;
        let folder = full.parent().unwrap_or(Path::new("/"));
        let stem = full.file_stem().map_or("job".into(), |stem| stem.to_string_lossy());
        read_job(Origin { file: &file, folder }, &stem, text, sets)
    }

    /// Adds the models of the file at `path`, which holds `[[model]]` tables and nothing else, after those that are
    /// there. Relative paths in it start from its own folder. A job that refuses the file is left as it was.
    ///
    /// # Errors
    /// As [`Job::load`]; and when a model has the name of one that is there.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        let (file, full, text) = read_text(path)?;
        let origin = Origin { file: &file, folder: full.parent().unwrap_or(Path::new("/")) };
        let table: Table = text.parse().map_err(|error| syntax_error(origin, &text, &error))?;
        let root = Section::open(origin, String::new(), &table, &["model"])?;
        let (models, searches) = read_all_models(&root, &self.models, self.run.seed)?;
        self.models.extend(models);
        self.searches.extend(searches);
        Ok(())
    }
}

/// The longest job file that is read: a thousand models with long searches are a hundredth of it.
const MOST_BYTES: u64 = 16 << 20;

/// The file's name as it was written, its absolute path, and its text.
fn read_text(path: &Path) -> Result<(String, PathBuf, String)> {
    let file = path.display().to_string();
    let unreadable = |error| Error::bad(format!("{file}: cannot read the job file: {error}"));
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > MOST_BYTES {
        return Err(Error::bad(format!("{file}: has {size} bytes; a job file has no more than {MOST_BYTES}")));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::bad(format!("{file}: byte {at} is no UTF-8; save the job file as UTF-8 text"))
    })?;
    let full = std::path::absolute(path).map_err(unreadable)?;
    Ok((file, full, text))
}

fn read_job(origin: Origin, stem: &str, text: String, sets: &[String]) -> Result<Job> {
    let mut table: Table = text.parse().map_err(|error| syntax_error(origin, &text, &error))?;
    for setting in sets {
        set::apply(origin, &mut table, setting)?;
    }
    let root = Section::open(origin, String::new(), &table, &["run", "device", "host", "model"])?;
    let run = read_run(&root, stem)?;
    let devices = read_devices(&root)?;
    let host = read_host(&root)?;
    let (models, searches) = read_all_models(&root, &[], run.seed)?;
    let source_text = if sets.is_empty() {
        text
    } else {
        toml::to_string(&table)
            .map_err(|error| origin.fault("", format!("cannot write the job back as TOML: {error}")))?
    };
    Ok(Job { run, devices, host, models, searches, folder: origin.folder.to_path_buf(), source_text })
}

/// The models and searches of a file, which come after the models that are `there`.
fn read_all_models(root: &Section, there: &[Model], seed: u64) -> Result<(Vec<Model>, Vec<Search>)> {
    let origin = root.origin();
    let (mut models, mut searches): (Vec<Model>, Vec<Search>) = (Vec::new(), Vec::new());
    for (place, section) in root.sections("model", model::MODEL_KEYS)?.iter().enumerate() {
        let (made, search) = search::read_models(section, place, there.len() + models.len(), seed)?;
        if there.len() + models.len() + made.len() > MOST_MODELS {
            return Err(origin.fault("model", format!("there are more than {MOST_MODELS}; no more can run together")));
        }
        for model in made {
            if let Some(twin) = models.iter().find(|other| other.name == model.name) {
                let message = format!("{} has the name {:?} too; give each its own", twin.at, model.name);
                return Err(origin.fault(&model.place("name"), message));
            }
            if let Some(twin) = there.iter().find(|other| other.name == model.name) {
                let message =
                    format!("{} of {} has the name {:?} too; give each its own", twin.at, twin.file, twin.name);
                return Err(origin.fault(&model.place("name"), message));
            }
            models.push(model);
        }
        searches.extend(search);
    }
    if models.is_empty() {
        return Err(origin.fault("model", "there is none; add a [[model]] with name, from or family, data and steps"));
    }
    Ok((models, searches))
}

fn syntax_error(origin: Origin, text: &str, error: &toml::de::Error) -> Error {
    let at = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = &text.as_bytes()[..at];
    let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
    let column = 1 + before.iter().rev().take_while(|&&byte| byte != b'\n').count();
    origin.fault(&format!("line {line}, column {column}"), format!("no valid TOML: {}", error.message()))
}

const RUN_KEYS: &[&str] =
    &["out", "seed", "policy", "slots", "recompute", "trace", "pipeline", "rehearse", "pipeline_microbatches"];

fn read_run(root: &Section, stem: &str) -> Result<Run> {
    let empty = Table::new();
    let s = root.section_or("run", &empty, RUN_KEYS)?;
    let trace = s.section_or("trace", &empty, &["first", "last"])?;
    let out = s.path("out")?.unwrap_or_else(|| root.origin().resolve(&format!("runs/{stem}")));
    // No folder can be made there.
    if out.is_symlink() && !out.exists() {
        return Err(s.fault("out", format!("{} is a link to nothing; a run needs a folder", out.display())));
    }
    Ok(Run {
        out,
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

const DEVICE_KEYS: &[&str] = &["kind", "count", "memory", "link", "threads", "flops", "memory_bandwidth", "profile"];

fn read_devices(root: &Section) -> Result<Vec<Device>> {
    let sections = root.sections("device", DEVICE_KEYS)?;
    if sections.is_empty() {
        // An empty [[device]] is the default: one host device with all that there is.
        return Ok(vec![read_device(&Section::open(root.origin(), "device".into(), &Table::new(), DEVICE_KEYS)?)?]);
    }
    sections.iter().map(read_device).collect()
}

fn read_device(s: &Section) -> Result<Device> {
    use DeviceKind::{Host, Sim};
    let kind = s.word("kind", &DeviceKind::WORDS)?.unwrap_or(Host);
    if kind != Sim {
        s.refuse(&["flops", "memory_bandwidth"], "is for kind = \"sim\" only; leave it out")?;
    }
    if kind != Host {
        s.refuse(&["threads"], "is for kind = \"host\" only; leave it out")?;
    }
    if kind != Host && kind != Sim {
        s.refuse(&["link"], "is for kind = \"host\" and \"sim\" only; leave it out")?;
    }
    let flops = s.flops("flops")?;
    let memory_bandwidth = s.bandwidth("memory_bandwidth")?;
    let profile = s.string("profile", "a profile's name in quotes, such as \"v100\"")?.map(str::to_string);
    if profile.is_some() {
        s.refuse(&["flops", "memory_bandwidth"], "profile is there too; keep the profile or the rates")?;
    } else if kind == Sim && (flops.is_none() || memory_bandwidth.is_none()) {
        let rates = "flops = \"60 TFLOP/s\" with memory_bandwidth = \"900 GB/s\"";
        return Err(s.fault_here(format!("a sim device needs its rates; write {rates}, or profile = \"v100\"")));
    }
    Ok(Device {
        kind,
        count: s.count("count")?.unwrap_or(1),
        memory: s.bytes("memory")?,
        link: s.bandwidth("link")?,
        threads: s.count("threads")?,
        flops,
        memory_bandwidth,
        profile,
        profile_path: s.path("profile")?,
    })
}

const HOST_KEYS: &[&str] = &["memory", "link", "disk"];
const DISK_KEYS: &[&str] = &["path", "memory", "link"];

fn read_host(root: &Section) -> Result<Host> {
    let Some(s) = root.section("host", HOST_KEYS)? else { return Ok(Host::default()) };
    let disk = match s.section("disk", DISK_KEYS)? {
        None => None,
        Some(d) => Some(Disk {
            path: d
                .path("path")?
                .ok_or_else(|| d.fault("path", "is missing; write a folder, such as path = \"spill\""))?,
            memory: d.bytes("memory")?.ok_or_else(|| d.fault("memory", "is missing; write memory = \"16 GiB\""))?,
            link: d.bandwidth("link")?,
        }),
    };
    Ok(Host { memory: s.bytes("memory")?, link: s.bandwidth("link")?, disk })
}
