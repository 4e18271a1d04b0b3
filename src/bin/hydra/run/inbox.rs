//! RUN/inbox: files through which a user adds models to a running run and cancels them.
//!
//! `NAME.toml` contains `[[model]]` tables; `MODEL.cancel` may be empty. A file that was read is renamed, so that the
//! folder shows what became of each: `.taken`, or `.refused` with the reason in a `.reason` file beside it. Entries
//! that are of no use, including folders and dangling links, never end the run.

use crate::print::warn;
use hydra::base::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// The least time between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// A file that was changed less than this ago may still be being written; it is left for the next look.
const SETTLES: Duration = Duration::from_millis(200);

/// The request that a file makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Train its models too.
    Add,
    /// End the model of this name.
    Cancel(String),
    /// Unknown: the entry is not a file, but this.
    Nothing(&'static str),
}

/// A waiting file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboxFile {
    /// Its request.
    pub request: Request,
    /// Its path.
    pub path: PathBuf,
}

/// The inbox folder.
pub struct Inbox {
    folder: PathBuf,
    looked: Option<Instant>,
    /// Files that could not be renamed; each is answered only once.
    stuck: BTreeSet<PathBuf>,
}

/// The files that a run took before it was interrupted.
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

/// An entry of the folder.
struct Entry {
    name: String,
    path: PathBuf,
    changed: SystemTime,
    /// What the entry is, if it is not a file.
    no_file: Option<&'static str>,
}

/// A folder's entries, by name; empty if the folder does not exist.
fn entries(folder: &Path) -> Vec<Entry> {
    let entry = |entry: fs::DirEntry| {
        let path = entry.path();
        // For a link, the metadata of its target.
        let (metadata, no_file) = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => (metadata, None),
            Ok(metadata) if metadata.is_dir() => (metadata, Some("a folder")),
            Ok(metadata) => (metadata, Some("a device, a pipe or a socket")),
            // It may also be gone by now, like a file that was first written under another name.
            Err(_) => (fs::symlink_metadata(&path).ok()?, Some("a link that leads nowhere")),
        };
        let changed = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        Some(Entry { name: entry.file_name().to_string_lossy().into_owned(), path, changed, no_file })
    };
    let mut entries: Vec<Entry> = fs::read_dir(folder).into_iter().flatten().flatten().filter_map(entry).collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    entries
}

impl Inbox {
    /// The inbox at `folder`, which need not exist.
    pub fn new(folder: PathBuf) -> Inbox {
        Inbox { folder, looked: None, stuck: BTreeSet::new() }
    }

    /// The waiting files, job files first and then by name; none if the last look was too recent.
    pub fn look(&mut self) -> Vec<InboxFile> {
        if self.looked.is_some_and(|at| at.elapsed() < BETWEEN_LOOKS) {
            return Vec::new();
        }
        self.look_now().0
    }

    /// The same without regard to the last look, for a run that would otherwise end. Waits a moment if a file may still
    /// be being written.
    pub fn wait_look(&mut self) -> Vec<InboxFile> {
        let (mut files, unsettled) = self.look_now();
        if unsettled {
            std::thread::sleep(SETTLES);
            files = self.look_now().0;
        }
        files
    }

    /// The waiting files, and whether there are others that may still be being written.
    fn look_now(&mut self) -> (Vec<InboxFile>, bool) {
        self.looked = Some(Instant::now());
        let (mut adds, mut others, mut unsettled) = (Vec::new(), Vec::new(), false);
        for Entry { name, path, changed, no_file } in entries(&self.folder) {
            let answered = [".taken", ".refused", ".reason"].iter().any(|ending| name.ends_with(ending));
            let request = match (name.strip_suffix(".toml"), name.strip_suffix(".cancel"), no_file) {
                _ if self.stuck.contains(&path) || name.starts_with('.') || answered => continue,
                (_, _, Some(what)) => Request::Nothing(what),
                (Some(_), _, None) => Request::Add,
                (None, Some(model), None) => Request::Cancel(model.to_string()),
                (None, None, None) => continue,
            };
            // A time in the future is the clock's fault, not the file's.
            if changed.elapsed().is_ok_and(|age| age < SETTLES) {
                unsettled = true;
                continue;
            }
            let list = if request == Request::Add { &mut adds } else { &mut others };
            list.push(InboxFile { request, path });
        }
        adds.append(&mut others);
        (adds, unsettled)
    }

    /// Refuses a file if one of the same name was taken before, whose record must not be lost.
    ///
    /// # Errors
    /// [`Error::BadInput`] if one was.
    pub fn check_new(&self, file: &InboxFile) -> Result<()> {
        match with(&file.path, ".taken").exists() {
            true => {
                Err(Error::bad(format!("{}: a file of this name was taken before; name another", file.path.display())))
            }
            false => Ok(()),
        }
    }

    /// Marks a file as taken. Removes an older refusal under its name.
    pub fn take(&mut self, file: &InboxFile) {
        for ending in [".refused", ".reason"] {
            // Usually there is none.
            let _ = fs::remove_file(with(&file.path, ending));
        }
        self.rename(&file.path, ".taken");
    }

    /// Marks a file as refused and gives the reason, in a file beside it and on standard error.
    pub fn refuse(&mut self, file: &InboxFile, why: &Error) {
        let path = &file.path;
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

    /// The files that were taken from the inbox at `folder`.
    pub fn taken(folder: &Path) -> Taken {
        let mut taken = Taken::default();
        let mut jobs = Vec::new();
        for Entry { name, path, changed, .. } in entries(folder).into_iter().filter(|e| e.no_file.is_none()) {
            if name.ends_with(".toml.taken") {
                jobs.push((changed, path));
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
        entries(folder).into_iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn files_are_read_once_and_renamed_by_what_became_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert_eq!(Inbox::new(at("none")).look(), []);
        for name in ["b.toml", "a.cancel", "c.d=1.cancel", "a.toml", "notes.txt", ".x.toml", "old.toml.taken", "toml"] {
            put(&at(name), 9);
        }
        let mut inbox = Inbox::new(folder.path().to_path_buf());
        let files = inbox.look();
        let file = |request, name: &str| InboxFile { request, path: at(name) };
        let want = [
            file(Request::Add, "a.toml"),
            file(Request::Add, "b.toml"),
            file(Request::Cancel("a".into()), "a.cancel"),
            file(Request::Cancel("c.d=1".into()), "c.d=1.cancel"),
        ];
        assert_eq!(files, want);
        assert_eq!(inbox.look(), [], "it was looked at just now");
        put(&at("a.toml.refused"), 9);
        put(&at("a.toml.reason"), 9);
        inbox.take(&files[0]);
        inbox.take(&files[2]);
        inbox.refuse(&files[1], &Error::bad("first\nsecond"));
        inbox.refuse(&files[3], &Error::bad("no"));
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
        let again = file(Request::Add, "a.toml");
        assert!(inbox.check_new(&again).unwrap_err().to_string().contains("taken before"));
        assert!(inbox.check_new(&file(Request::Add, "b.toml")).is_ok());
    }

    /// Of a folder or a link, whose times cannot be set here: looks once it has settled.
    fn settled_look(folder: &Path) -> Vec<InboxFile> {
        Inbox::new(folder.to_path_buf()).wait_look()
    }

    #[test]
    #[cfg(unix)]
    fn what_is_no_file_is_a_letter_too_and_is_marked_like_one() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["folder.toml", "models", ".hidden", "old.refused", "m.cancel.taken"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("models/in.toml"), "x").unwrap();
        symlink(at("none"), at("nowhere.cancel")).unwrap();
        symlink(at("loop.toml"), at("loop.toml")).unwrap();
        put(&at(".there"), 9);
        symlink(at(".there"), at("good.toml")).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(at("s.toml")).unwrap();
        let files = settled_look(folder.path());
        let file = |request, name: &str| InboxFile { request, path: at(name) };
        let (a_folder, nowhere) = (Request::Nothing("a folder"), Request::Nothing("a link that leads nowhere"));
        let want = [
            file(Request::Add, "good.toml"),
            file(a_folder.clone(), "folder.toml"),
            file(nowhere.clone(), "loop.toml"),
            file(a_folder, "models"),
            file(nowhere, "nowhere.cancel"),
            file(Request::Nothing("a device, a pipe or a socket"), "s.toml"),
        ];
        assert_eq!(files, want);
        let mut inbox = Inbox::new(folder.path().to_path_buf());
        files[1..].iter().for_each(|file| inbox.refuse(file, &Error::bad("no")));
        assert!(fs::symlink_metadata(at("nowhere.cancel.refused")).unwrap().is_symlink());
        assert!(at("models.refused/in.toml").exists() && at("models.reason").exists());
        assert_eq!(settled_look(folder.path()), files[..1], "each is answered once");
        assert_eq!(Inbox::taken(folder.path()), Taken::default(), "a folder takes nobody away");
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
        let gone = InboxFile { request: Request::Add, path: path.clone() };
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
