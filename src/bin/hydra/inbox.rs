//! RUN/inbox: files by which somebody adds models to a run that goes on, and cancels them.
//!
//! `NAME.toml` holds `[[model]]` tables, `MODEL.cancel` needs to hold nothing. What was read is renamed, so that a look at the folder says what
//! became of each: `.taken`, or `.refused` with the reason in a `.reason` beside it. A file that nothing can be done with never ends the run.

use crate::print::warn;
use hydra::base::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Looks come no closer than this.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// A file that was changed less than this ago may still be written; it is left for the next look.
const SETTLES: Duration = Duration::from_millis(200);

/// What a file asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Its models are to be trained too.
    Add,
    /// The model of this name is to end.
    Cancel(String),
}

/// A file that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// What it asks for.
    pub wish: Wish,
    /// Where it lies.
    pub path: PathBuf,
}

/// The folder.
pub struct Inbox {
    folder: PathBuf,
    looked: Option<Instant>,
    /// Files that could not be renamed: each is answered once.
    stuck: BTreeSet<PathBuf>,
}

/// What a run took before it was interrupted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Job files, in the order in which they were written.
    pub jobs: Vec<PathBuf>,
    /// Names of models that were cancelled.
    pub cancelled: BTreeSet<String>,
}

/// `x.toml` with `ending` is `x.toml.taken`.
fn with(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(ending);
    name.into()
}

/// The files of a folder by their names, with the times of their last change; none where there is no folder.
fn files(folder: &Path) -> Vec<(String, SystemTime)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let file = |entry: fs::DirEntry| {
        let metadata = fs::metadata(entry.path()).ok().filter(fs::Metadata::is_file)?;
        Some((entry.file_name().to_str()?.to_string(), metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH)))
    };
    let mut files: Vec<_> = entries.filter_map(file).collect();
    files.sort();
    files
}

impl Inbox {
    /// The inbox at `folder`, which need not be there.
    pub fn new(folder: PathBuf) -> Inbox {
        Inbox { folder, looked: None, stuck: BTreeSet::new() }
    }

    /// The files that wait, job files first and then by name; none when the last look was just now.
    pub fn look(&mut self) -> Vec<Letter> {
        if self.looked.is_some_and(|at| at.elapsed() < BETWEEN_LOOKS) {
            return Vec::new();
        }
        self.look_now().0
    }

    /// The same at once, for a run that would end otherwise. Waits a moment where a file may still be written.
    pub fn wait_look(&mut self) -> Vec<Letter> {
        let (mut letters, unsettled) = self.look_now();
        if unsettled {
            std::thread::sleep(SETTLES);
            letters = self.look_now().0;
        }
        letters
    }

    /// The files that wait, and whether there are others that may still be written.
    fn look_now(&mut self) -> (Vec<Letter>, bool) {
        self.looked = Some(Instant::now());
        let (mut adds, mut cancels, mut unsettled) = (Vec::new(), Vec::new(), false);
        for (name, changed) in files(&self.folder) {
            let path = self.folder.join(&name);
            let wish = match (name.strip_suffix(".toml"), name.strip_suffix(".cancel")) {
                _ if self.stuck.contains(&path) || name.starts_with('.') => continue,
                (Some(_), _) => Wish::Add,
                (None, Some(model)) => Wish::Cancel(model.to_string()),
                (None, None) => continue,
            };
            // A time to come is a clock's fault, not the file's.
            if changed.elapsed().is_ok_and(|age| age < SETTLES) {
                unsettled = true;
                continue;
            }
            let list = if wish == Wish::Add { &mut adds } else { &mut cancels };
            list.push(Letter { wish, path });
        }
        adds.append(&mut cancels);
        (adds, unsettled)
    }

    /// Whether a file of this name was taken before: its record must not be lost.
    ///
    /// # Errors
    /// [`Error::BadInput`] where it was.
    pub fn check_new(&self, letter: &Letter) -> Result<()> {
        match with(&letter.path, ".taken").exists() {
            true => Err(Error::bad(format!(
                "{}: a file of this name was taken before; name another",
                letter.path.display()
            ))),
            false => Ok(()),
        }
    }

    /// Marks a file as taken. An older refusal under its name is of no interest any more.
    pub fn take(&mut self, letter: &Letter) {
        for ending in [".refused", ".reason"] {
            // Mostly there is none.
            let _ = fs::remove_file(with(&letter.path, ending));
        }
        self.rename(&letter.path, ".taken");
    }

    /// Marks a file as refused and says why, beside it and on standard error.
    pub fn refuse(&mut self, letter: &Letter, why: &Error) {
        let path = &letter.path;
        let text = why.to_string();
        let first = text.lines().next().unwrap_or_default();
        let named =
            if first.contains(&*path.to_string_lossy()) { String::new() } else { format!("{}: ", path.display()) };
        warn(format!("refused: {named}{first}"));
        if let Err(e) = fs::write(with(path, ".reason"), format!("{text}\n")) {
            warn(format!("{}: cannot be written: {e}", with(path, ".reason").display()));
        }
        self.rename(path, ".refused");
    }

    fn rename(&mut self, path: &Path, ending: &str) {
        if let Err(e) = fs::rename(path, with(path, ending)) {
            warn(format!("{}: cannot be renamed: {e}", path.display()));
            self.stuck.insert(path.to_path_buf());
        }
    }

    /// What was taken from the inbox at `folder`.
    pub fn taken(folder: &Path) -> Taken {
        let mut taken = Taken::default();
        let mut jobs = Vec::new();
        for (name, changed) in files(folder) {
            if name.ends_with(".toml.taken") {
                jobs.push((changed, folder.join(&name)));
            } else if let Some(model) = name.strip_suffix(".cancel.taken") {
                taken.cancelled.insert(model.to_string());
            }
        }
        jobs.sort();
        taken.jobs = jobs.into_iter().map(|(_, path)| path).collect();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a file that was changed so many seconds ago.
    fn put(path: &Path, secs: u64) {
        fs::write(path, "x").unwrap();
        let when = SystemTime::now() - Duration::from_secs(secs);
        fs::File::options().write(true).open(path).unwrap().set_modified(when).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        files(folder).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn files_are_read_once_and_renamed_by_what_became_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(Inbox::new(at("none")).look(), []);
        for name in ["b.toml", "a.cancel", "c.d=1.cancel", "a.toml", "notes.txt", ".x.toml", "old.toml.taken", "toml"] {
            put(&at(name), 9);
        }
        fs::create_dir(at("folder.toml")).unwrap();
        let mut inbox = Inbox::new(folder.path().to_path_buf());
        let letters = inbox.look();
        let letter = |wish, name: &str| Letter { wish, path: at(name) };
        let want = [
            letter(Wish::Add, "a.toml"),
            letter(Wish::Add, "b.toml"),
            letter(Wish::Cancel("a".into()), "a.cancel"),
            letter(Wish::Cancel("c.d=1".into()), "c.d=1.cancel"),
        ];
        assert_eq!(letters, want);
        assert_eq!(inbox.look(), [], "it was looked at just now");
        put(&at("a.toml.refused"), 9);
        put(&at("a.toml.reason"), 9);
        inbox.take(&letters[0]);
        inbox.take(&letters[2]);
        inbox.refuse(&letters[1], &Error::bad("first\nsecond"));
        inbox.refuse(&letters[3], &Error::bad("no"));
        assert_eq!(fs::read_to_string(at("b.toml.reason")).unwrap(), "first\nsecond\n");
        let want = [
            ".x.toml",
            "a.cancel.taken",
            "a.toml.taken",
            "b.toml.reason",
            "b.toml.refused",
            "c.d=1.cancel.reason",
            "c.d=1.cancel.refused",
            "notes.txt",
            "old.toml.taken",
            "toml",
        ];
        assert_eq!(names(folder.path()), want);
        assert_eq!(inbox.look_now(), (Vec::new(), false));
        let again = letter(Wish::Add, "a.toml");
        assert!(inbox.check_new(&again).unwrap_err().to_string().contains("taken before"));
        assert!(inbox.check_new(&letter(Wish::Add, "b.toml")).is_ok());
    }

    #[test]
    fn a_file_that_may_still_be_written_waits_and_one_from_the_future_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut inbox = Inbox::new(folder.path().to_path_buf());
        let path = folder.path().join("a.toml");
        fs::write(&path, "").unwrap();
        assert_eq!(inbox.look_now(), (Vec::new(), true));
        // The look for a run's end waits for it.
        assert_eq!(inbox.wait_look().len(), 1);
        let ahead = SystemTime::now() + Duration::from_secs(3600);
        fs::File::options().write(true).open(&path).unwrap().set_modified(ahead).unwrap();
        assert_eq!(inbox.look_now().0.len(), 1);
        // What cannot be renamed is answered once.
        let gone = Letter { wish: Wish::Add, path: path.clone() };
        fs::remove_file(&path).unwrap();
        inbox.take(&gone);
        put(&path, 9);
        assert_eq!(inbox.look_now(), (Vec::new(), false));
    }

    #[test]
    fn a_run_that_goes_on_finds_what_was_taken_in_its_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(Inbox::taken(&at("none")), Taken::default());
        for (name, secs) in [
            ("later.toml.taken", 10),
            ("zeroth.toml.taken", 30),
            ("b.cancel.taken", 5),
            ("c.toml.refused", 5),
            ("d.cancel", 5),
            ("e.toml", 5),
        ] {
            put(&at(name), secs);
        }
        let taken = Inbox::taken(folder.path());
        assert_eq!(taken.jobs, [at("zeroth.toml.taken"), at("later.toml.taken")]);
        assert_eq!(taken.cancelled.into_iter().collect::<Vec<_>>(), ["b"]);
    }
}
