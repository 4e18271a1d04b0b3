//! A file with one JSON object per line, which a run appends to as it goes and a resumed run reads.
//!
//! A row is in the file before its writer goes on. After a killed run only the last line may be incomplete.

use crate::base::{Error, Result};
use crate::nn::safely::write_safely;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

/// Appends rows to a file.
#[derive(Debug)]
pub struct JsonLines<T> {
    path: PathBuf,
    file: BufWriter<File>,
    rows: PhantomData<fn(&T)>,
}

impl<T: Serialize> JsonLines<T> {
    /// Replaces the file's content with `rows`, whole or not at all; later rows are appended after them.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn open(path: &Path, rows: &[T]) -> Result<Self> {
        write_safely(path, |out| rows.iter().try_for_each(|row| put(out, row)))?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        Ok(JsonLines { path: path.to_path_buf(), file: BufWriter::with_capacity(1 << 16, file), rows: PhantomData })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a row, which is in the file when this returns.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn write(&mut self, row: &T) -> Result<()> {
        let written = put(&mut self.file, row).and_then(|()| self.file.flush());
        written.map_err(|e| Error::io("write", &self.path, e))
    }

    /// Waits until all rows are on the disk, where they survive a power cut.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn wait_sync(&mut self) -> Result<()> {
        match self.file.flush().and_then(|()| self.file.get_ref().sync_data()) {
            // A link may lead to a device or a pipe, and those have no disk.
            Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
            other => other.map_err(|e| Error::io("write", &self.path, e)),
        }
    }
}

fn put<T: Serialize>(out: &mut dyn Write, row: &T) -> io::Result<()> {
    serde_json::to_writer(&mut *out, row)?;
    out.write_all(b"\n")
}

/// Reads a file's rows. Empty lines are skipped, and so is a last line that was cut off.
///
/// # Errors
/// When the file cannot be read, or a complete line is not a row.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let mut lines = bytes.split(|&byte| byte == b'\n').enumerate().peekable();
    let mut rows = Vec::new();
    while let Some((i, line)) = lines.next() {
        match serde_json::from_slice(line) {
            Ok(row) => rows.push(row),
            Err(_) if line.trim_ascii().is_empty() || lines.peek().is_none() => {}
            Err(e) => return Err(Error::bad(format!("{}: line {}: {e}", path.display(), i + 1))),
        }
    }
    Ok(rows)
}

/// Reads the rows of a file, whatever else it holds, and counts the complete lines that are not rows.
///
/// # Errors
/// When the file cannot be read.
pub(super) fn salvage<T: DeserializeOwned>(path: &Path) -> Result<(Vec<T>, usize)> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let mut lines = bytes.split(|&byte| byte == b'\n').peekable();
    let (mut rows, mut damaged) = (Vec::new(), 0);
    while let Some(line) = lines.next() {
        match serde_json::from_slice(line) {
            Ok(row) => rows.push(row),
            Err(_) => damaged += usize::from(!line.trim_ascii().is_empty() && lines.peek().is_some()),
        }
    }
    Ok((rows, damaged))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_but_for_a_torn_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let mut lines = JsonLines::open(&path, &[1, 2]).unwrap();
        lines.write(&3).unwrap();
        lines.wait_sync().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n3\n");
        let check = |text: &[u8], want: std::result::Result<&[u64], &str>, left: &[u64], damaged: usize| {
            std::fs::write(&path, text).unwrap();
            match (read::<u64>(&path), want) {
                (Ok(rows), Ok(want)) => assert_eq!(rows, want),
                (Err(Error::BadInput(what)), Err(want)) => assert!(what.contains(want), "{what}"),
                (got, want) => panic!("{got:?}, want {want:?}"),
            }
            assert_eq!(salvage::<u64>(&path).unwrap(), (left.to_vec(), damaged));
        };
        check(b"", Ok(&[]), &[], 0);
        check(b"1\n\n 2 \n  \n3", Ok(&[1, 2, 3]), &[1, 2, 3], 0);
        check(b"1\n{\"ro", Ok(&[1]), &[1], 0);
        check(b"1\n{\xff\xfe", Ok(&[1]), &[1], 0);
        // What ends in a line feed was not cut off.
        check(b"1\n{\xff\xfe}\n", Err("line 2"), &[1], 1);
        check(b"\n1\nno\n2\n\0\0\n\0", Err("line 3"), &[1, 2], 2);
        std::fs::remove_file(&path).unwrap();
        assert!(read::<u64>(&path).is_err() && salvage::<u64>(&path).is_err());
    }

    #[test]
    #[cfg(unix)]
    fn a_device_has_no_disk_to_wait_for() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = folder.path().join("nowhere.jsonl");
        std::os::unix::fs::symlink("/dev/null", &nowhere).unwrap();
        let mut lines = JsonLines::open(&nowhere, &[1]).unwrap();
        lines.write(&2).unwrap();
        lines.wait_sync().unwrap();
    }
}
