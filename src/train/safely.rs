//! Files that appear whole or not at all.
//!
//! A file is written under another name in the same folder, flushed to the disk, and then renamed: a crash or a full disk leaves what
//! was there before.

use crate::base::{Error, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Writes `path` with what `body` writes, replacing what is there once all of it is on the disk.
///
/// # Errors
/// When the folder is not there ([`Error::BadInput`]), or the operating system refuses.
pub fn write_safely(path: &Path, body: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Err(Error::bad(format!("{}: is no name of a file", path.display())));
    };
    if path.is_dir() {
        return Err(Error::bad(format!("{}: is a folder, a file is to be written there", path.display())));
    }
    let temporary = path.with_file_name(format!(".{}.part", name.to_string_lossy()));
    let file = File::create(&temporary).map_err(|e| Error::refused("create", path, e))?;
    // From here on the temporary file is removed on every way out but the last.
    let pending = Pending(temporary);
    let mut out = BufWriter::with_capacity(1 << 18, file);
    let written = body(&mut out).and_then(|()| out.flush()).and_then(|()| out.get_ref().sync_all());
    written.map_err(|e| Error::io("write", path, e))?;
    fs::rename(&pending.0, path).map_err(|e| Error::io("create", path, e))?;
    sync_folder(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// A file under its temporary name. Dropped, it vanishes.
struct Pending(PathBuf);

impl Drop for Pending {
    fn drop(&mut self) {
        // After the rename there is nothing under this name; where it cannot be removed, the next try overwrites it.
        let _ = fs::remove_file(&self.0);
    }
}

/// Makes a rename in `folder` outlive a power cut.
fn sync_folder(folder: &Path) -> Result<()> {
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
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_safely(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
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
