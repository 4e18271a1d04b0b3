//! A run's directory: who may write to it, and what a failed start removes again.
//!
//! `plan.json` is the first file written, and together with `job.toml` it marks a directory as a run's: a plan alone
//! may come from `hydra plan`. Only such a plan is overwritten, unless a run is resumed.

use crate::args::Resume;
use hydra::base::{Error, Result};
pub use hydra::train::run_files::{METRICS, PLAN, REPORT, RESULTS, SCHEDULE, TRACE};
use hydra::train::write_safely;
use serde_json::Value;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

/// The job as it was run; with the plan it marks a run's directory.
pub const JOB: &str = "job.toml";
/// The reports of searches' models, in a run that ends models early.
pub const SELECTION: &str = "selection.jsonl";
/// Job files and cancellations for a run in progress.
pub const INBOX: &str = "inbox";
/// In a model's folder: the checkpoint to resume from.
pub const CHECKPOINT: &str = "checkpoint.safetensors";
/// In a model's folder: the trained model, a Hugging Face directory.
pub const MODEL: &str = "model";
/// In a model's folder: the adapters that it learned, if any, as peft reads them.
pub const ADAPTERS: &str = "adapters";
/// In that directory: its weights, which are written last.
pub const WEIGHTS: &str = "model.safetensors";

/// All names in the directory that are not those of models.
const TAKEN: [&str; 8] = [JOB, PLAN, TRACE, RESULTS, SELECTION, INBOX, REPORT, SCHEDULE];

/// The name of the `n`th (from 1) older trace of a run that resumed at step `until`.
pub fn older_trace(until: u64, n: u64) -> String {
    if n == 1 { format!("trace-until-{until}.json") } else { format!("trace-until-{until}-{n}.json") }
}

/// Whether `name` is used in the directory for something other than a model's folder.
pub fn is_taken(name: &str) -> bool {
    TAKEN.contains(&name) || name.starts_with("trace-until-") && name.ends_with(".json")
}

/// What is at the path that a job names for its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing that would be overwritten.
    Free,
    /// A run.
    Run,
}

/// Whether a run is in `out`.
pub fn holds_run(out: &Path) -> bool {
    out.join(PLAN).exists() && out.join(JOB).exists()
}

/// The names of the models of the run in `out`, from its plan; none if that cannot be read.
pub fn planned_names(out: &Path) -> Vec<String> {
    let plan: Option<Value> = fs::read(out.join(PLAN)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let name = |model: &Value| model["name"].as_str().map(String::from);
    plan.and_then(|plan| plan["models"].as_array()?.iter().map(name).collect()).unwrap_or_default()
}

/// Refuses the folder `out` for a command that does not train, if the command would overwrite a run's plan or trace.
///
/// # Errors
/// [`Error::BadInput`] when it contains a run.
pub fn keep_run(out: &Path) -> Result<()> {
    if holds_run(out) {
        return Err(Error::bad(format!("{}: holds a run, whose files are kept; name another folder", out.display())));
    }
    Ok(())
}

/// Writes a file of a command that does not train to the folder `out`, which is created if missing.
///
/// # Errors
/// When the system refuses.
pub fn write_into(out: &Path, name: &str, text: &str) -> Result<()> {
    fs::create_dir_all(out).map_err(|e| Error::refused("create", out, e))?;
    write_safely(&out.join(name), |file| file.write_all(text.as_bytes()))
}

/// Looks at `out`, changing nothing. `models` are the names of the job's models.
///
/// # Errors
/// [`Error::BadInput`] when there is a run and `resume` forbids it, there is none and `resume` requires it, or
/// something else is in the way.
pub fn inspect(out: &Path, models: &[&str], resume: Resume) -> Result<Found> {
    let found = match fs::metadata(out) {
        Ok(metadata) if !metadata.is_dir() => {
            return Err(Error::bad(format!("{}: is a file; a run needs a folder", out.display())));
        }
        Ok(_) if holds_run(out) => Found::Run,
        Ok(_) => {
            let names = [JOB, TRACE, RESULTS, SELECTION].into_iter().chain(models.iter().copied()).map(String::from);
            let there = names.into_iter().find(|name| out.join(name).exists());
            if let Some(name) = there.or_else(|| taken_before(out)) {
                return Err(Error::bad(format!(
                    "{}: holds no run, but {name} is there already; name an empty or a new folder",
                    out.display()
                )));
            }
            Found::Free
        }
        Err(_) => Found::Free,
    };
    match (found, resume) {
        (Found::Run, Resume::Never) => Err(Error::bad(format!(
            "{}: holds a run already; name another folder, or go on with it by --resume auto",
            out.display()
        ))),
        (Found::Free, Resume::Require) => {
            Err(Error::bad(format!("{}: holds no run to resume, as --resume require wants", out.display())))
        }
        _ => Ok(found),
    }
}

/// A file in `out` that another run took from its inbox: this run would obey it when resumed. Files still waiting there
/// are fine.
fn taken_before(out: &Path) -> Option<String> {
    let names =
        fs::read_dir(out.join(INBOX)).ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".taken")).min().map(|name| format!("{INBOX}/{name}"))
}

/// A run's directory while a run writes into it.
pub struct RunDir {
    path: PathBuf,
    /// Held for as long as the run lasts, so that no second one writes here.
    _lock: File,
    /// The files and folders that this run has made, outermost first.
    made: Vec<PathBuf>,
}

impl RunDir {
    /// Creates the directory if missing, and locks it for this process.
    ///
    /// # Errors
    /// When it cannot be created, or another process has locked it.
    pub fn take(path: &Path) -> Result<RunDir> {
        let mut made: Vec<PathBuf> =
            path.ancestors().take_while(|a| !a.as_os_str().is_empty() && !a.exists()).map(Path::to_path_buf).collect();
        made.reverse();
        fs::create_dir_all(path).map_err(|e| Error::refused("create", path, e))?;
        let lock = File::open(path).map_err(|e| Error::io("open", path, e))?;
        match lock.try_lock() {
            Ok(()) => Ok(RunDir { path: path.to_path_buf(), _lock: lock, made }),
            Err(TryLockError::WouldBlock) => {
                Err(Error::bad(format!("{}: another process is training there", path.display())))
            }
            // Some file systems have no locks; the run then goes on without one.
            Err(TryLockError::Error(_)) => Ok(RunDir { path: path.to_path_buf(), _lock: lock, made }),
        }
    }

    /// The path of `name` in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Creates a folder in it if missing.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn folder(&mut self, name: &str) -> Result<PathBuf> {
        let path = self.at(name);
        self.will_make(&path);
        fs::create_dir_all(&path).map_err(|e| Error::refused("create", &path, e))?;
        Ok(path)
    }

    /// Writes a file in it.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.at(name);
        self.will_make(&path);
        write_safely(&path, |out| out.write_all(bytes))
    }

    /// Notes that a file is about to be created.
    pub fn will_make(&mut self, path: &Path) {
        if !path.exists() {
            self.made.push(path.to_path_buf());
        }
    }

    /// Removes what this run has made: a job that fails before its first step leaves nothing behind. Folders are
    /// removed only if empty.
    pub fn abandon(self) {
        for path in self.made.iter().rev() {
            // What cannot be removed is left: the error to report is a different one.
            let _ = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_decides_what_may_be_written() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/run");
        let check = |resume| inspect(&out, &["gpt"], resume).map_err(|e| e.to_string());
        assert_eq!(check(Resume::Never), Ok(Found::Free));
        assert_eq!(check(Resume::Auto), Ok(Found::Free));
        assert!(check(Resume::Require).unwrap_err().contains("holds no run to resume"));
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join("notes.txt"), "mine").unwrap();
        assert_eq!(check(Resume::Never), Ok(Found::Free));
        fs::create_dir(out.join("gpt")).unwrap();
        assert!(check(Resume::Auto).unwrap_err().contains("gpt is there already"));
        fs::remove_dir(out.join("gpt")).unwrap();
        for (name, is_there) in [("results.csv", true), ("inbox/next.toml", false), ("inbox/gpt.cancel.taken", true)] {
            let path = out.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            let refused = check(Resume::Never).is_err_and(|error| error.contains(&format!("{name} is there already")));
            assert_eq!(refused, is_there, "{name}");
            fs::remove_file(path).unwrap();
        }
        // A plan alone is no run, and may be written anew; a trace without a run is nobody's to overwrite.
        fs::write(out.join(PLAN), "{}").unwrap();
        keep_run(&out).unwrap();
        assert_eq!(check(Resume::Auto), Ok(Found::Free));
        assert!(check(Resume::Require).unwrap_err().contains("holds no run to resume"));
        fs::write(out.join(TRACE), "{}").unwrap();
        assert!(check(Resume::Never).unwrap_err().contains("trace.json is there already"));
        fs::write(out.join(JOB), "").unwrap();
        assert!(keep_run(&out).unwrap_err().to_string().contains("holds a run"));
        assert_eq!(check(Resume::Auto), Ok(Found::Run));
        assert_eq!(check(Resume::Require), Ok(Found::Run));
        assert!(check(Resume::Never).unwrap_err().contains("holds a run already"));
    }

    #[test]
    fn no_model_has_the_name_of_an_older_trace() {
        assert_eq!([older_trace(12, 1), older_trace(12, 2)], ["trace-until-12.json", "trace-until-12-2.json"]);
        assert!([older_trace(0, 1), older_trace(12, 30)].iter().all(|name| is_taken(name)));
        assert!(TAKEN.iter().all(|name| is_taken(name)) && !is_taken("trace-until-12") && !is_taken(MODEL));
    }

    #[test]
    fn a_second_run_is_kept_out_and_an_abandoned_one_leaves_what_it_found() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/run");
        let mut dir = RunDir::take(&out).unwrap();
        assert!(RunDir::take(&out).err().expect("refused").to_string().contains("another process"));
        dir.write(PLAN, b"{}").unwrap();
        let model = dir.folder("gpt").unwrap();
        dir.will_make(&model.join(METRICS));
        fs::write(model.join(METRICS), "").unwrap();
        dir.abandon();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        fs::create_dir_all(&out).unwrap();
        fs::write(out.join("notes.txt"), "mine").unwrap();
        let mut dir = RunDir::take(&out).unwrap();
        dir.write(PLAN, b"{}").unwrap();
        dir.abandon();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    }
}
