//! The job file: TOML text in, plain values out.
//!
//! Reading checks everything that can be checked without opening another file or asking a device: types, ranges, words,
//! keys that do not exist or are incompatible. Every error is one line that states the file, the dotted key, what is
//! wrong and what to write instead. Paths come out absolute; a relative one starts from the job file's folder.

mod device;
#[cfg(test)]
mod hostile_tests;
pub mod model;
#[cfg(test)]
mod model_tests;
mod optimizer;
mod part;
#[cfg(test)]
mod part_tests;
#[cfg(test)]
mod reference_tests;
mod run;
mod search;
#[cfg(test)]
mod search_tests;
mod section;
mod set;
#[cfg(test)]
mod set_tests;
#[cfg(test)]
mod tests;

pub use device::{Device, DeviceKind, Host};
use device::{read_devices, read_host};
use hydra::base::{Error, Result};
use hydra::sched::MOST_MODELS;
pub use model::{Model, Valid};
use part::{Dealer, Part};
use run::read_run;
pub use run::{Pipeline, Policy, RECOMPUTE, Run};
pub use search::Search;
pub use section::SANE_RATES;
use section::{Origin, Section};
use std::collections::BTreeMap;
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
    /// The models to train, at least one, with distinct names; in the file's order, a search's models in the place of
    /// its `[[model]]`.
    pub models: Vec<Model>,
    /// The searches, in the file's order.
    pub searches: Vec<Search>,
    /// The folder from which relative paths start, absolute.
    pub folder: PathBuf,
    /// The job as TOML with the overrides applied; the file's own text where there are none.
    pub source_text: String,
}

impl Job {
    /// The job as a run's directory keeps it: its first line states the folder where relative paths start, which is no
    /// longer the file's own.
    pub fn record(&self) -> String {
        format!("# Relative paths start from {:?}.\n{}", self.folder, self.source_text)
    }

    /// Reads the job file at `path` with the `sets` (`PATH=VALUE`, see [`set`]) applied in order.
    ///
    /// # Errors
    /// Always [`Error::BadInput`], even for a file that cannot be read, since the user named it.
    pub fn load(path: &Path, sets: &[String]) -> Result<Job> {
        let (file, full, text) = read_text(path)?;
        let folder = full.parent().unwrap_or(Path::new("/"));
        let stem = full.file_stem().map_or("job".into(), |stem| stem.to_string_lossy());
        read_job(Origin { file: &file, folder }, &stem, text, sets)
    }

    /// Adds the models of the file at `path`, which contains `[[model]]` tables and nothing else, after the existing
    /// ones. Relative paths in it start from its own folder. On an error the job is unchanged.
    ///
    /// # Errors
    /// As [`Job::load`]; and when a model has the name of an existing one.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        let (file, full, text) = read_text(path)?;
        let origin = Origin { file: &file, folder: full.parent().unwrap_or(Path::new("/")) };
        let table: Table = text.parse().map_err(|error| syntax_error(origin, &text, &error))?;
        let root = Section::open(origin, String::new(), &table, &["model"])?;
        let (models, searches) = read_all_models(&root, &self.models, self.run.seed, None)?;
        self.models.extend(models);
        self.searches.extend(searches);
        Ok(())
    }
}

/// The longest job file that is read: a thousand models with long searches take a hundredth of this.
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
    let (models, searches) = read_all_models(&root, &[], run.seed, run.part)?;
    let source_text = if sets.is_empty() {
        text
    } else {
        toml::to_string(&table)
            .map_err(|error| origin.fault("", format!("cannot write the job back as TOML: {error}")))?
    };
    Ok(Job { run, devices, host, models, searches, folder: origin.folder.to_path_buf(), source_text })
}

/// Reads the part's models and searches from a file; they come after the models `there`.
fn read_all_models(
    root: &Section,
    there: &[Model],
    seed: u64,
    part: Option<Part>,
) -> Result<(Vec<Model>, Vec<Search>)> {
    let origin = root.origin();
    let (mut models, mut searches): (Vec<Model>, Vec<Search>) = (Vec::new(), Vec::new());
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let (mut dealer, mut searches_compare) = (Dealer::new(part), false);
    for (place, section) in root.sections("model", model::MODEL_KEYS)?.iter().enumerate() {
        let first = there.len() + models.len();
        let (made, search) = search::read_models(section, place, first, seed)?;
        for model in &made {
            if let Some(twin) = names.insert(model.name.clone(), model.at.clone()) {
                let message = format!("{twin} has the name {:?} too; give each its own", model.name);
                return Err(origin.fault(&model.place("name"), message));
            }
            if let Some(twin) = there.iter().find(|other| other.name == model.name) {
                let message =
                    format!("{} of {} has the name {:?} too; give each its own", twin.at, twin.file, twin.name);
                return Err(origin.fault(&model.place("name"), message));
            }
        }
        searches_compare |= search.as_ref().is_some_and(Search::compares);
        let (mine, search) = dealer.deal(first, made, search);
        if first + mine.len() > MOST_MODELS {
            return Err(origin.fault("model", format!("there are more than {MOST_MODELS}; no more can run together")));
        }
        models.extend(mine);
        searches.extend(search);
    }
    if names.is_empty() {
        return Err(origin.fault("model", "there is none; add a [[model]] with name, from or family, data and steps"));
    }
    if let Some(part) = part.filter(|_| models.is_empty()) {
        let counted = if searches_compare { ", of which those that asha compares count as one" } else { "" };
        let message = format!("{part} has no model: there are {}{counted}; write fewer parts", dealer.dealt());
        return Err(origin.fault("run.part", message));
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
