//! Opening the files that users name: a missing file is an error in the input, a later failure is the system's.

use crate::base::{Error, Result};
use flate2::bufread::GzDecoder;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead, ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The first two bytes of a gzip file.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Deflate cannot expand one byte to more than this many.
const MOST_BYTES_PER_DEFLATED: u64 = 1032;
/// Extensions of the files that are read from a folder.
const TEXT_ENDINGS: [&str; 3] = ["rs", "md", "txt"];

/// Opens a file and finds its length in bytes.
///
/// # Errors
/// When there is no such file, it is a folder or a pipe, or it cannot be opened.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    // Checked before opening, which would block on a pipe until its other end is opened.
    let metadata = fs::metadata(path).map_err(|e| refused(path, e))?;
    if metadata.is_dir() {
        return Err(Error::bad(format!("{}: is a folder, a file is needed", path.display())));
    }
    if !metadata.is_file() {
        return Err(Error::bad(format!("{}: is no regular file", path.display())));
    }
    let file = File::open(path).map_err(|e| refused(path, e))?;
    Ok((file, metadata.len()))
}

/// Reads a whole file.
///
/// # Errors
/// As [`open`], and when reading fails.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let (mut file, _) = open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| Error::io("read", path, e))?;
    Ok(bytes)
}

fn refused(path: &Path, source: std::io::Error) -> Error {
    match source.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Error::bad(format!("{}: no such file", path.display())),
        _ => Error::io("open", path, source),
    }
}

/// The members of a gzip file one after the other. Zeros after a member are padding, as for gunzip.
struct Members<R> {
    /// `None` at the end.
    decoder: Option<GzDecoder<R>>,
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while let Some(decoder) = &mut self.decoder {
            let len = decoder.read(out)?;
            if len > 0 || out.is_empty() {
                return Ok(len);
            }
            let Some(mut rest) = self.decoder.take().map(GzDecoder::into_inner) else { break };
            self.decoder = loop {
                let bytes = rest.fill_buf()?;
                let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
                match (bytes.is_empty(), zeros) {
                    (true, _) => break None,
                    (false, 0) => break Some(GzDecoder::new(rest)),
                    _ => rest.consume(zeros),
                }
            };
        }
        Ok(0)
    }
}

/// The bytes of a file that may be gzipped, handed out piece by piece.
pub(super) struct Unpacked {
    reader: Box<dyn Read>,
    /// The most bytes that can come, given the file's length.
    pub most_bytes: u64,
    gzipped: bool,
    path: PathBuf,
}

impl Unpacked {
    /// Opens a file; its first two bytes tell whether it is gzipped.
    ///
    /// # Errors
    /// As [`open`], and when reading fails.
    pub fn open(path: &Path) -> Result<Unpacked> {
        let (mut file, len) = open(path)?;
        let mut first = Vec::new();
        (&mut file).take(2).read_to_end(&mut first).map_err(|e| Error::io("read", path, e))?;
        let gzipped = first == GZIP_MAGIC;
        let whole = std::io::Cursor::new(first).chain(std::io::BufReader::new(file));
        let (reader, most_bytes): (Box<dyn Read>, u64) = if gzipped {
            (Box::new(Members { decoder: Some(GzDecoder::new(whole)) }), len.saturating_mul(MOST_BYTES_PER_DEFLATED))
        } else {
            (Box::new(whole), len)
        };
        Ok(Unpacked { reader, most_bytes, gzipped, path: path.to_path_buf() })
    }

    /// Returns the next bytes, at most `most`; fewer only at the file's end. Memory grows only with the bytes actually
    /// read.
    ///
    /// # Errors
    /// When reading fails, or a gzipped file is damaged.
    pub fn take(&mut self, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match (&mut self.reader).take(most).read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(e) if self.gzipped => {
                Err(Error::bad(format!("{}: damaged gzip data after {} bytes: {e}", self.path.display(), bytes.len())))
            }
            Err(e) => Err(Error::io("read", &self.path, e)),
        }
    }
}

/// The text files that `paths` name: a file is itself, a folder stands for every `*.rs`, `*.md` and `*.txt` in it and
/// its subfolders, except in hidden folders and those called `target`. The paths keep their order; a folder's files are
/// sorted, so that the text is the same on every machine. Links are followed; a folder that is reached in two ways is
/// read once, by its own path rather than a link.
///
/// # Errors
/// When a path does not exist, a folder contains no such file, or a folder cannot be read.
pub(super) fn text_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let metadata = fs::metadata(path).map_err(|e| refused(path, e))?;
        if !metadata.is_dir() {
            files.push(path.clone());
            continue;
        }
        let mut found = Vec::new();
        walk(path, &mut found)?;
        if found.is_empty() {
            return Err(Error::bad(format!("{}: the folder holds no *.rs, *.md or *.txt", path.display())));
        }
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

fn walk(root: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let place = |folder: &Path| fs::canonicalize(folder).map_err(|e| Error::io("inspect", folder, e));
    let mut seen = BTreeSet::from([place(root)?]);
    let (mut folders, mut links) = (vec![root.to_path_buf()], BTreeSet::new());
    loop {
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(&folder).map_err(|e| Error::io("list", &folder, e))?;
            for entry in entries {
                let entry = entry.map_err(|e| Error::io("list", &folder, e))?;
                let kind = entry.file_type().map_err(|e| Error::io("inspect", &entry.path(), e))?;
                let (path, name) = (entry.path(), entry.file_name());
                let leads_to_folder = kind.is_symlink() && path.is_dir();
                if kind.is_dir() || leads_to_folder {
                    if name == "target" || name.as_encoded_bytes().starts_with(b".") {
                        continue;
                    }
                    if leads_to_folder {
                        links.insert(path);
                    } else if seen.insert(place(&path)?) {
                        folders.push(path);
                    }
                } else if path.extension().is_some_and(|ending| TEXT_ENDINGS.iter().any(|known| ending == *known))
                    && path.is_file()
                {
                    found.push(path);
                }
            }
        }
        // Links are followed only after everything reachable without them.
        let Some(link) = links.pop_first() else { return Ok(()) };
        if seen.insert(place(&link)?) {
            folders.push(link);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn folders_are_walked_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for name in ["b.txt", "a/z.rs", "a/b/c.md", "a.rs", "x.py", ".git/q.txt", "a/target/t.rs", "a/.h/i.md", "A.md"]
        {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        fs::create_dir(root.join("folder.txt")).unwrap();
        let files = text_files(&[root.join("x.py"), root.to_path_buf(), root.join("b.txt")]).unwrap();
        let names: Vec<_> = files.iter().map(|f| f.strip_prefix(root).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["x.py", "A.md", "a/b/c.md", "a/z.rs", "a.rs", "b.txt", "b.txt"]);

        let empty = text_files(&[root.join("folder.txt")]).unwrap_err();
        assert!(matches!(empty, Error::BadInput(_)) && empty.to_string().contains("folder.txt"), "{empty}");
        let missing = text_files(&[root.join("none")]).unwrap_err();
        assert!(matches!(missing, Error::BadInput(_)) && missing.to_string().contains("no such file"), "{missing}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_back_up_ends_the_walk() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.txt"), "a").unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("again")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("gone"), folder.path().join("b.txt")).unwrap();
        assert_eq!(text_files(&[folder.path().to_path_buf()]).unwrap(), [folder.path().join("a.txt")]);
    }

    #[cfg(unix)]
    #[test]
    fn linked_folders_are_taken_once() {
        use std::os::unix::fs::symlink;
        let (folder, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (root, far) = (folder.path(), far.path());
        fs::create_dir_all(root.join("z")).unwrap();
        fs::write(root.join("z/z.txt"), "z").unwrap();
        fs::create_dir(far.join("deep")).unwrap();
        fs::write(far.join("deep/f.txt"), "f").unwrap();
        // Out of the folder, twice; to what lies in it; there and back; and where no folder is taken from.
        for (to, link) in
            [(far, "b"), (far, "c"), (&root.join("z"), "a"), (root, "z/up"), (far, "target"), (far, ".hidden")]
        {
            symlink(to, root.join(link)).unwrap();
        }
        symlink(root, far.join("deep/back")).unwrap();
        assert_eq!(text_files(&[root.to_path_buf()]).unwrap(), [root.join("b/deep/f.txt"), root.join("z/z.txt")]);
    }

    #[test]
    fn gzip_is_told_by_its_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        for content in [&b""[..], b"x", b"\x1f", b"plain text"] {
            fs::write(&path, content).unwrap();
            assert_eq!(Unpacked::open(&path).unwrap().take(u64::MAX).unwrap(), content);
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packer.write_all(content).unwrap();
            let packed = packer.finish().unwrap();
            fs::write(&path, &packed).unwrap();
            assert_eq!(Unpacked::open(&path).unwrap().take(u64::MAX).unwrap(), content);
            fs::write(&path, &packed[..packed.len() - 3]).unwrap();
            let cut = Unpacked::open(&path).unwrap().take(u64::MAX).unwrap_err();
            assert!(matches!(cut, Error::BadInput(_)), "{cut}");
            // Zeros behind a member are padding, anything else is not.
            let padded = [&packed[..], &[0; 20_000]].concat();
            fs::write(&path, &padded).unwrap();
            assert_eq!(Unpacked::open(&path).unwrap().take(u64::MAX).unwrap(), content);
            fs::write(&path, [&padded[..], &packed].concat()).unwrap();
            assert_eq!(Unpacked::open(&path).unwrap().take(u64::MAX).unwrap(), [content, content].concat());
            fs::write(&path, [&padded[..], b"x"].concat()).unwrap();
            assert!(matches!(Unpacked::open(&path).unwrap().take(u64::MAX), Err(Error::BadInput(_))));
        }
        assert!(matches!(open(folder.path()), Err(Error::BadInput(_))));
    }
}
