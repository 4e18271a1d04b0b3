//! Files that appear whole or not at all.
//!
//! A file is written under another name in the same folder, flushed to the disk, and then renamed: a crash or a full
//! disk leaves what was there before. A link stays, and its target is written. A device or a pipe is not replaced but
//! written into.

use crate::base::{Error, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes written at a time.
const AT_ONCE: usize = 1 << 18;
/// The most links that are followed, as in Linux.
const MOST_LINKS: usize = 40;

/// Writes what `body` writes to `path`, replacing the file there once all of it is on the disk. Where `path` is a pipe,
/// waits for its reader.
///
/// # Errors
/// When the folder does not exist ([`Error::BadInput`]), or the operating system refuses. An [`Error`] that `body` has
/// wrapped with [`io::Error::other`] is returned unchanged: the content itself was not available.
pub fn write_safely(path: &Path, body: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let there = fs::metadata(path).ok();
    if there.as_ref().is_some_and(fs::Metadata::is_dir) {
        return Err(Error::bad(format!("{}: is a folder, a file is to be written there", path.display())));
    }
    if there.is_some_and(|there| !there.is_file()) {
        return write_into(path, body);
    }
    let path = &resolve_links(path)?;
    Pending::write(path, |out| body(out).map_err(|e| failure(path, e)))?.commit()?;
    sync_folder(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Writes into the device or the pipe at `path`.
fn write_into(path: &Path, body: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let file = File::options().write(true).open(path).map_err(|e| Error::refused("open", path, e))?;
    let mut out = BufWriter::with_capacity(AT_ONCE, file);
    body(&mut out).and_then(|()| out.flush()).map_err(|e| failure(path, e))
}

/// Why `path` was not written.
fn failure(path: &Path, error: io::Error) -> Error {
    error.downcast().unwrap_or_else(|error| Error::io("write", path, error))
}

/// The path to which `path` leads through links, which may not exist yet.
fn resolve_links(path: &Path) -> Result<PathBuf> {
    let mut place = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        // A path that cannot be read as a link is not one.
        let Ok(target) = fs::read_link(&place) else { return Ok(place) };
        place = place.parent().unwrap_or(Path::new("")).join(target);
    }
    Err(Error::bad(format!("{}: is a link that leads from link to link and to no file", path.display())))
}

/// A file that is on the disk, but not yet in its place. Dropping it removes it.
pub(crate) struct Pending {
    temporary: PathBuf,
    target: PathBuf,
}

impl Pending {
    /// Writes with `body` what will be at `target`. A link there will be replaced.
    ///
    /// # Errors
    /// What `body` returns; when the folder does not exist ([`Error::BadInput`]), or the operating system refuses.
    pub fn write(target: &Path, body: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<Pending> {
        let Some(name) = target.file_name() else {
            return Err(Error::bad(format!("{}: is no name of a file", target.display())));
        };
        let temporary = target.with_file_name(format!(".{}.part", name.to_string_lossy()));
        let file = File::create(&temporary).map_err(|e| Error::refused("create", target, e))?;
        // From here on the temporary file is removed unless commit() is called.
        let pending = Pending { temporary, target: target.to_path_buf() };
        let mut out = BufWriter::with_capacity(AT_ONCE, file);
        body(&mut out)?;
        let flushed = out.flush().and_then(|()| out.get_ref().sync_all());
        flushed.map_err(|e| Error::io("write", target, e))?;
        Ok(pending)
    }

    /// Renames it to its target. [`sync_folder`] makes that durable.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn commit(self) -> Result<()> {
        fs::rename(&self.temporary, &self.target).map_err(|e| Error::io("create", &self.target, e))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // After commit() nothing has this name; if the file cannot be removed, the next write overwrites it.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Makes renames in `folder` outlive a power cut.
///
/// # Errors
/// When the operating system refuses.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    if cfg!(unix) { synced.map_err(|e| Error::io("write", folder, e)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_safely(&path, |out| out.write_all(b"old")).unwrap();
        let failed = write_safely(&path, |out| {
            out.write_all(b"new")?;
            Err(io::Error::other("disk full"))
        });
        assert_eq!(failed.unwrap_err().exit_code(), 1);
        let failed = write_safely(&path, |_| Err(io::Error::other(Error::bad("no such tensor"))));
        assert!(matches!(failed, Err(Error::BadInput(what)) if what == "no such tensor"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_safely(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    #[cfg(unix)]
    fn links_stay_and_what_is_no_file_is_written_into() {
        use std::os::unix::fs::{FileTypeExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let is_link = |name: &str| at(name).symlink_metadata().unwrap().is_symlink();
        // Through two links, to a file that is there and to one that is not.
        fs::create_dir(at("far")).unwrap();
        fs::write(at("far/old"), "old").unwrap();
        for (first, second, target) in [("a", "b", "old"), ("c", "d", "new")] {
            symlink(second, at(first)).unwrap();
            symlink(Path::new("far").join(target), at(second)).unwrap();
            write_safely(&at(first), |out| out.write_all(b"written")).unwrap();
            assert!(is_link(first) && is_link(second));
            assert_eq!(fs::read(at("far").join(target)).unwrap(), b"written");
        }
        symlink("e", at("e")).unwrap();
        let error = write_safely(&at("e"), |_| Ok(())).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("leads from link to link"), "{error}");
        // A device, and a link to it.
        symlink("/dev/null", at("null")).unwrap();
        write_safely(&at("null"), |out| out.write_all(b"written")).unwrap();
        assert!(is_link("null") && fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        let error = write_safely(Path::new("/dev/full"), |out| out.write_all(b"written")).unwrap_err();
        assert!(error.exit_code() == 1 && error.to_string().contains("/dev/full"), "{error}");
        // A pipe, whose reader gets it.
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(made.success());
        let pipe = at("pipe");
        let reader = std::thread::spawn(move || fs::read(pipe).unwrap());
        write_safely(&at("pipe"), |out| out.write_all(b"written")).unwrap();
        assert_eq!(reader.join().unwrap(), b"written");
        assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
    }

    #[test]
    fn paths_that_cannot_be_meant_are_the_inputs_fault() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("none/a"), folder.path().to_path_buf(), "/dev/null/a".into(), "/".into()] {
            let error = write_safely(&path, |_| Ok(())).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        }
    }
}
