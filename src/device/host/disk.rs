//! The disk tier: a file without a name in a folder that the user gives. Lanes of their own read and write stretches of
//! it.
//!
//! The whole file is asked of the file system before anything runs, so that a disk that is too full is known then and
//! not in the middle of a step. The name goes as soon as the file is open: whatever ends the program, nothing is left
//! behind. Invariant as for memory: tasks that touch the same byte are ordered by tickets.

use crate::base::{Error, Result};
use crate::device::DiskSpec;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// The file.
#[derive(Debug)]
pub(in crate::device) struct Disk {
    file: File,
    folder: PathBuf,
    /// Its size.
    end: AtomicU64,
}

impl Disk {
    /// A file of `spec.bytes` zeroed bytes.
    ///
    /// # Errors
    /// [`Error::BadInput`] when there can be no such folder, [`Error::Io`] when it cannot be written or has no such
    /// room.
    pub fn new(spec: &DiskSpec) -> Result<Disk> {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let folder = spec.path.clone();
        std::fs::create_dir_all(&folder).map_err(|e| Error::refused("create the disk tier's folder", &folder, e))?;
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".hydra-{}-{number}", std::process::id()));
        let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = opened.map_err(|e| Error::refused("create the disk tier's file", &path, e))?;
        std::fs::remove_file(&path).map_err(|e| Error::io("take the name from", &path, e))?;
        let disk = Disk { file, folder, end: AtomicU64::new(0) };
        disk.grow(spec.bytes)?;
        Ok(disk)
    }

    /// Adds `bytes` zeroed bytes and gives the offset where they begin. One thread alone grows it.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder has no such room.
    pub fn grow(&self, bytes: u64) -> Result<u64> {
        let start = self.end.load(Ordering::Relaxed);
        let refused =
            |e| Error::Io { what: format!("no {bytes} bytes of disk tier in {}", self.folder.display()), source: e };
        let end = start.checked_add(bytes).filter(|&end| i64::try_from(end).is_ok());
        let end = end.ok_or_else(|| refused(std::io::ErrorKind::FileTooLarge.into()))?;
        if bytes > 0 {
            // SAFETY: a call on a descriptor that is open as long as `file` lives; both numbers fit, since the end
            // does.
            let code = unsafe { libc::posix_fallocate(self.file.as_raw_fd(), start as i64, bytes as i64) };
            if code != 0 {
                // What it got before it came to the end of the room is given back.
                let _ = self.file.set_len(start);
                return Err(refused(std::io::Error::from_raw_os_error(code)));
            }
        }
        self.end.store(end, Ordering::Relaxed);
        Ok(start)
    }

    /// Reads the stretch from `offset` on that is as long as `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk fails.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.check(offset, bytes.len());
        self.file.read_exact_at(bytes, offset).map_err(|e| Error::io("read the disk tier in", &self.folder, e))
    }

    /// Writes `bytes` to the stretch from `offset` on.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk fails.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes.len());
        self.file.write_all_at(bytes, offset).map_err(|e| Error::io("write the disk tier in", &self.folder, e))
    }

    fn check(&self, offset: u64, bytes: usize) {
        let (end, size) = (offset + bytes as u64, self.end.load(Ordering::Relaxed));
        assert!(end <= size, "bytes {offset}..{end} of a disk tier of {size}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: PathBuf, bytes: u64) -> DiskSpec {
        DiskSpec { path, bytes, bytes_per_sec: None }
    }

    #[test]
    fn what_was_written_is_read_and_what_was_not_is_zero() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("made/when/missing");
        let disk = Disk::new(&spec(folder.clone(), 100)).unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "the file has no name");
        disk.write(3, &[1, 2, 3]).unwrap();
        assert_eq!(disk.grow(28).unwrap(), 100);
        disk.write(126, &[8, 9]).unwrap();
        let mut all = vec![7; 128];
        disk.read(0, &mut all).unwrap();
        let mut want = vec![0; 128];
        want[3..6].copy_from_slice(&[1, 2, 3]);
        want[126..].copy_from_slice(&[8, 9]);
        assert_eq!(all, want);
    }

    #[test]
    fn what_a_disk_cannot_hold_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let error = Disk::new(&spec(dir.path().into(), u64::MAX / 2)).unwrap_err();
        assert!(error.to_string().contains("bytes of disk tier in"), "{error}");
        assert_eq!(Disk::new(&spec(dir.path().into(), u64::MAX)).unwrap_err().exit_code(), 1);
        let file = dir.path().join("a file");
        std::fs::write(&file, "").unwrap();
        let error = Disk::new(&spec(file, 1)).unwrap_err();
        assert!(error.to_string().contains("a file") && error.exit_code() == 2, "{error}");
    }

    #[test]
    #[should_panic(expected = "bytes 98..102 of a disk tier of 100")]
    fn stretches_beyond_its_end_are_our_own_bug() {
        let dir = tempfile::tempdir().unwrap();
        Disk::new(&spec(dir.path().into(), 100)).unwrap().read(98, &mut [0; 4]).unwrap();
    }
}
