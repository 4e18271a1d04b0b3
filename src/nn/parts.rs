//! Where a model's tensors lie: in model.safetensors, in the files that model.safetensors.index.json names, or in one
//! file of another name.
//!
//! Opening reads all headers and no numbers. Every file then stays open, so that what is read is what was checked, even
//! if another file takes its name meanwhile: a model of 400 billion parameters has some 200 files, and a process may
//! open a thousand or more. Invariant: no two files contain a tensor of the same name, and every tensor that the
//! network needs is where the index says.

use crate::base::tensorfile::{TensorEntry, TensorIndex, Texts, quoted, shortened};
use crate::base::{Error, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files that are not read; messages name one if it is all there is.
const PICKLED: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
/// The longest JSON that is read: a config for 22,000 classes with their names is a tenth of this, an index of 100,000
/// tensors two thirds.
const MOST_JSON_BYTES: u64 = 16 << 20;

/// The files of a model's weights.
#[derive(Debug)]
pub struct Parts {
    /// The file that lists the tensors: the weights themselves, or the index of several files.
    pub path: PathBuf,
    files: Vec<Part>,
    /// All tensors, by their names in the files.
    places: BTreeMap<String, Place>,
}

/// One file of weights, open.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    /// One reader at a time: reading moves the file's position.
    file: Mutex<File>,
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file's number.
    part: usize,
    /// What the file's header says of the tensor.
    pub entry: TensorEntry,
}

/// The part of an index that is read. Its `metadata` is informative: transformers does not check `total_size`, and some
/// files state it as a fraction or not at all.
#[derive(Deserialize)]
struct Index {
    /// The name of each tensor's file.
    weight_map: Texts,
}

impl Parts {
    /// Opens the weights of a directory, preferring a single file where there is one, as transformers does. A path that
    /// is no directory is taken as such a file.
    ///
    /// `spared` says which tensors the network does not need. The index may have an outdated place for them or none:
    /// tools that convert older files leave out a tied head but keep its line in the index.
    ///
    /// # Errors
    /// When a file is missing or damaged, the index names a file outside the directory or disagrees with the files on a
    /// tensor's place, or a tensor is in two files.
    pub fn open(dir: &Path, spared: &dyn Fn(&str) -> bool) -> Result<Parts> {
        if !dir.is_dir() {
            return Parts::open_whole(dir.to_path_buf());
        }
        let (whole, index) = (dir.join(WHOLE), dir.join(INDEX));
        if !whole.is_file() && index.is_file() {
            return Parts::open_split(dir, index, spared);
        }
        if let Some(found) = PICKLED.iter().find(|name| !whole.exists() && dir.join(name).exists()) {
            return Err(bad(&whole, format!("no such file; only {found} is there; save it with safetensors")));
        }
        if !whole.exists() && !index.exists() && has_parts(dir) {
            return Err(bad(&index, "no such file, which names the parts that are there".into()));
        }
        Parts::open_whole(whole)
    }

    fn open_whole(file: PathBuf) -> Result<Parts> {
        let mut parts = Parts { path: file.clone(), files: Vec::new(), places: BTreeMap::new() };
        parts.add(file)?;
        Ok(parts)
    }

    fn open_split(dir: &Path, index: PathBuf, spared: &dyn Fn(&str) -> bool) -> Result<Parts> {
        let read: Index = serde_json::from_slice(&read_small(&index)?).map_err(|e| {
            let what = shortened(&e.to_string());
            bad(&index, format!("is no index of weights: {what}"))
        })?;
        let map = read.weight_map.0;
        if let Some((tensor, name)) = map.iter().find(|(_, name)| !is_plain(name)) {
            let (tensor, name) = (shortened(tensor), quoted(name));
            return Err(bad(&index, format!("tensor {tensor}: weight_map has {name}, which is no plain file name")));
        }
        let mut parts = Parts { path: index, files: Vec::new(), places: BTreeMap::new() };
        let names: BTreeSet<&String> = map.values().collect();
        for name in names {
            parts.add(dir.join(name))?;
        }
        for (tensor, name) in map.iter().filter(|(tensor, _)| !spared(tensor)) {
            let found = match parts.places.get(tensor) {
                Some(place) if parts.path_of(place).ends_with(name) => continue,
                Some(place) => format!("it is in {}", quoted(&parts.name_of(place))),
                None => "no file has it".into(),
            };
            let (tensor, name) = (shortened(tensor), quoted(name));
            return Err(bad(&parts.path, format!("tensor {tensor}: weight_map places it in {name}, but {found}")));
        }
        match parts.places.iter().find(|(tensor, _)| !map.contains_key(*tensor) && !spared(tensor)) {
            Some((tensor, place)) => {
                let tensor = shortened(tensor);
                Err(parts.fault(place, format!("tensor {tensor}: the weight_map of {INDEX} does not have it")))
            }
            None => Ok(parts),
        }
    }

    /// Opens one more file and takes in its tensors.
    fn add(&mut self, path: PathBuf) -> Result<()> {
        let (file, file_bytes) = open_file(&path)?;
        let index = TensorIndex::read(&file, file_bytes, &path)?;
        let part = self.files.len();
        self.files.push(Part { path, file: Mutex::new(file) });
        for entry in index.entries() {
            if let Some(other) = self.places.insert(entry.name.clone(), Place { part, entry: entry.clone() }) {
                let (tensor, other) = (shortened(&entry.name), quoted(&self.name_of(&other)));
                return Err(bad(&self.files[part].path, format!("tensor {tensor}: is in {other} too")));
            }
        }
        Ok(())
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Place> {
        self.places.get(name)
    }

    /// All tensors, ordered by name.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.values()
    }

    /// Reads bytes of a tensor, from its byte `from` on.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn read(&self, place: &Place, from: u64, bytes: &mut [u8]) -> Result<()> {
        let Part { path, file } = &self.files[place.part];
        // A reader that panicked may have moved the file's position, which every reader sets anew.
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let start = SeekFrom::Start(place.entry.start_bytes + from);
        file.seek(start).and_then(|_| file.read_exact(bytes)).map_err(|e| Error::io("read", path, e))
    }

    /// An error about a tensor, which names its file.
    pub fn fault(&self, place: &Place, what: String) -> Error {
        bad(self.path_of(place), what)
    }

    fn path_of(&self, place: &Place) -> &Path {
        &self.files[place.part].path
    }

    fn name_of(&self, place: &Place) -> String {
        self.path_of(place).file_name().unwrap_or_default().display().to_string()
    }
}

/// Whether a directory contains parts of a model, under the names that transformers gives them.
fn has_parts(dir: &Path) -> bool {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.into_iter().any(|name| name.to_string_lossy().starts_with("model-00001-of-"))
}

/// Whether a name is that of a file in the same directory, whatever the system.
pub(super) fn is_plain(name: &str) -> bool {
    const MOST_BYTES: usize = 255;
    let mut components = Path::new(name).components();
    let alone = matches!((components.next(), components.next()), (Some(Component::Normal(one)), None) if one == name);
    let special = |c: char| c.is_control() || matches!(c, '/' | '\\' | ':');
    alone && name.len() <= MOST_BYTES && !name.contains(special)
}

fn open_file(path: &Path) -> Result<(File, u64)> {
    // Checked before opening, which would block on a pipe until its other end is opened.
    let metadata = std::fs::metadata(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => bad(path, "no such file".into()),
        _ => Error::io("read", path, e),
    })?;
    if !metadata.is_file() {
        return Err(bad(path, "is no regular file".into()));
    }
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    Ok((file, metadata.len()))
}

/// Reads a whole file of at most [`MOST_JSON_BYTES`].
///
/// # Errors
/// When there is no such file, or it is longer or cannot be read.
pub fn read_small(path: &Path) -> Result<Vec<u8>> {
    let (file, bytes) = open_file(path)?;
    if bytes > MOST_JSON_BYTES {
        return Err(bad(path, format!("{bytes} bytes are more than the {MOST_JSON_BYTES} that are read")));
    }
    let mut read = Vec::new();
    file.take(MOST_JSON_BYTES).read_to_end(&mut read).map_err(|e| Error::io("read", path, e))?;
    Ok(read)
}

/// An error about a file.
pub fn bad(path: &Path, what: String) -> Error {
    Error::bad(format!("{}: {what}", path.display()))
}
