//! Reads Hugging Face model directories: config.json and model.safetensors.
//!
//! Nothing in them is trusted. Opening checks names, types and shapes of all tensors against the network; the numbers are
//! read when they are asked for, tensor by tensor, so that a model larger than memory can be opened.

use super::families::{Family, family};
use super::fields::{Fields, shortened, shown};
use super::save::{Form, SavedTensor, counters};
use super::{Network, tensors};
use crate::base::tensorfile::{Element, TensorEntry, TensorIndex};
use crate::base::{Error, Result, Shape};
use half::{bf16, f16};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The longest config that is read: one for 22,000 classes with their names is a tenth of this.
const MOST_CONFIG_BYTES: u64 = 16 << 20;
/// Read at once where two tensors are compared.
const PIECE_BYTES: usize = 1 << 20;

/// A network from a directory, with its weights still in the file.
pub struct Pretrained {
    /// The network.
    pub network: Box<dyn Network>,
    /// How [`super::save`] writes it back: same names, same types.
    pub form: Form,
    /// The counts of training batches that BatchNorm layers have seen, by name.
    pub counts: BTreeMap<String, i64>,
    path: PathBuf,
    /// One reader at a time: reading moves the file's place.
    file: Mutex<File>,
    /// Where each of the form's tensors lies, by its name in the graph.
    places: BTreeMap<String, TensorEntry>,
}

impl fmt::Debug for Pretrained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pretrained").field("path", &self.path).field("tensors", &self.places.len()).finish()
    }
}

/// Opens a model directory.
///
/// # Errors
/// When a file is missing or damaged, the family or a value of the config is not supported, or the tensors are not those
/// of the network: one is missing, of another shape or type, or nobody's. Messages name the file and the key or tensor.
pub fn open(dir: &Path) -> Result<Pretrained> {
    let (family, network, config) = read_config(&dir.join("config.json"))?;
    let generation = dir.join("generation_config.json");
    let generation_config = if generation.exists() { Some(read_small(&generation)?) } else { None };
    let path = weights_path(dir)?;
    let (mut file, file_bytes) = open_file(&path)?;
    let called = path.display().to_string();
    let mut prefix = Vec::new();
    let io = |e| Error::io("read", &path, e);
    (&mut file).take(8).read_to_end(&mut prefix).map_err(io)?;
    let mut header = vec![0; TensorIndex::header_bytes(&prefix, file_bytes, &called)?];
    file.read_exact(&mut header).map_err(io)?;
    let index = TensorIndex::parse(&header, file_bytes, &called)?;
    let wanted = tensors(network.as_ref())?;
    let (saved, places) = match_tensors(&index, family, &wanted).map_err(|what| bad(&path, what))?;
    let files = Vec::new();
    let form = Form { config, generation_config, files, counters: counters(&saved), tensors: saved };
    let mut pretrained = Pretrained { network, form, counts: BTreeMap::new(), path, file: Mutex::new(file), places };
    pretrained.account_for_the_rest(&index, family)?;
    Ok(pretrained)
}

impl Pretrained {
    /// The elements of a tensor by its name in the graph, row-major, as f32.
    ///
    /// # Errors
    /// When the network has no such tensor, or of another shape, a value is not finite in f32, or reading fails.
    pub fn tensor(&self, name: &str, shape: &Shape) -> Result<Vec<f32>> {
        let entry =
            self.places.get(name).ok_or_else(|| bad(&self.path, format!("tensor {name}: is missing; want {shape}")))?;
        if entry.shape != *shape {
            return Err(bad(&self.path, wrong_shape(entry, shape)));
        }
        let mut bytes = vec![0; entry.len_bytes as usize];
        self.read_at(entry.start_bytes, &mut bytes)?;
        let values = decode(entry.element, &bytes);
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let (found, element) = (values[at], entry.element);
                let what = format!("tensor {}: element {at} ({element}) is {found} in f32", shortened(&entry.name));
                Err(bad(&self.path, what))
            }
        }
    }

    fn read_at(&self, start_bytes: u64, bytes: &mut [u8]) -> Result<()> {
        // A reader that panicked may have moved the file's place, which every reader sets anew.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let read = file.seek(SeekFrom::Start(start_bytes)).and_then(|_| file.read_exact(bytes));
        read.map_err(|e| Error::io("read", &self.path, e))
    }

    /// Takes the file's tensors that are no weights of the network: counts, constants, a copy of the tied head.
    fn account_for_the_rest(&mut self, index: &TensorIndex, family: &Family) -> Result<()> {
        let used: BTreeSet<String> = self.places.values().map(|entry| entry.name.clone()).collect();
        let mut unexpected = Vec::new();
        for entry in index.entries().iter().filter(|entry| !used.contains(&entry.name)) {
            let name = entry.name.as_str();
            if self.form.counters.iter().any(|counter| counter == name) {
                let count = self.count(entry)?;
                self.counts.insert(name.to_string(), count);
            } else if let Some((_, table)) = family.tied.iter().find(|&&(head, _)| head == name) {
                self.check_tied(entry, table)?;
            } else if !(family.is_buffer)(name) {
                unexpected.push(entry);
            }
        }
        let Some(first) = unexpected.first() else { return Ok(()) };
        let more = match unexpected.len() - 1 {
            0 => String::new(),
            more => format!(", nor has it place for {more} more, such as {}", shortened(&unexpected[more].name)),
        };
        let (name, shape) = (shortened(&first.name), &first.shape);
        Err(bad(&self.path, format!("tensor {name}: the network has no such tensor ({shape}){more}")))
    }

    fn count(&self, entry: &TensorEntry) -> Result<i64> {
        let TensorEntry { name, element, shape, start_bytes, .. } = entry;
        if *element != Element::I64 || shape.elems() != 1 {
            return Err(bad(&self.path, format!("tensor {name}: is {shape} {element}, want a scalar I64")));
        }
        let mut bytes = [0; 8];
        self.read_at(*start_bytes, &mut bytes)?;
        match i64::from_le_bytes(bytes) {
            count if count >= 0 => Ok(count),
            count => Err(bad(&self.path, format!("tensor {name}: is {count}, want a count"))),
        }
    }

    /// Checks that the file's own copy of a tied head is the table.
    fn check_tied(&self, head: &TensorEntry, table: &str) -> Result<()> {
        let differs = |what: &str| {
            let other = self.places.get(table).map_or(table, |entry| &entry.name);
            bad(&self.path, format!("tensor {}: has other {what} than {other}, to which the config ties it", head.name))
        };
        let table = self.places.get(table).filter(|table| table.shape == head.shape).ok_or_else(|| differs("axes"))?;
        if table.element != head.element {
            return Err(differs("elements"));
        }
        let mut pieces = [vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]];
        let mut done = 0;
        while done < head.len_bytes {
            let len = (head.len_bytes - done).min(PIECE_BYTES as u64) as usize;
            for (piece, entry) in pieces.iter_mut().zip([head, table]) {
                piece.truncate(len);
                self.read_at(entry.start_bytes + done, piece)?;
            }
            if pieces[0] != pieces[1] {
                return Err(differs("values"));
            }
            done += len as u64;
        }
        Ok(())
    }
}

/// Reads and checks a config.json; gives the family, the network and the text.
fn read_config(path: &Path) -> Result<(&'static Family, Box<dyn Network>, String)> {
    let whence = path.display().to_string();
    let bytes = read_small(path)?;
    let text = String::from_utf8(bytes).map_err(|_| Error::bad(format!("{whence}: is not UTF-8")))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| Error::bad(format!("{whence}: is no JSON: {e}")))?;
    let map: Map<String, Value> = match value {
        Value::Object(map) => map,
        other => return Err(Error::bad(format!("{whence}: want a JSON object, got {}", shown(&other)))),
    };
    let fields = Fields::new(&map, &whence, false);
    let model_type = match fields.get("model_type") {
        Some(Value::String(model_type)) => model_type,
        Some(other) => return Err(fields.fault("model_type", format!("want a string, got {}", shown(other)))),
        None => return Err(fields.fault("model_type", "is missing")),
    };
    let family = family(model_type, &format!("{whence}: model_type"))?;
    let want = family.architecture;
    match fields.get("architectures") {
        None => return Err(fields.fault("architectures", format!("is missing; want [\"{want}\"]"))),
        Some(Value::Array(found)) if found.len() == 1 && found[0] == want => {}
        Some(other) => {
            return Err(fields.fault("architectures", format!("{} is not supported, only [\"{want}\"]", shown(other))));
        }
    }
    Ok((family, (family.build)(&fields)?, text))
}

/// Finds every tensor of the network in the file, with or without the family's prefix.
fn match_tensors(
    index: &TensorIndex,
    family: &Family,
    wanted: &[(String, Shape)],
) -> std::result::Result<(Vec<SavedTensor>, BTreeMap<String, TensorEntry>), String> {
    let mut saved = Vec::with_capacity(wanted.len());
    let mut places = BTreeMap::new();
    let short = |name: &str| family.prefix.and_then(|p| name.strip_prefix(p)).and_then(|short| index.get(short));
    let find = |name: &str| index.get(name).or_else(|| short(name));
    for (name, shape) in wanted {
        let Some(entry) = find(name) else {
            let missing = wanted.iter().filter(|(name, _)| find(name).is_none()).count();
            let more = if missing > 1 { format!(", as are {} more", missing - 1) } else { String::new() };
            return Err(format!("tensor {name}: is missing{more}; want {shape}"));
        };
        if entry.shape != *shape {
            return Err(wrong_shape(entry, shape));
        }
        let element = entry.element;
        if !matches!(element, Element::F64 | Element::F32 | Element::F16 | Element::BF16) {
            return Err(format!("tensor {}: is {element}, want F32, F16, BF16 or F64", entry.name));
        }
        saved.push(SavedTensor { name: name.clone(), file_name: entry.name.clone(), shape: shape.clone(), element });
        places.insert(name.clone(), entry.clone());
    }
    Ok((saved, places))
}

fn wrong_shape(entry: &TensorEntry, want: &Shape) -> String {
    format!("tensor {}: is {}, want {want}", entry.name, entry.shape)
}

fn decode(element: Element, bytes: &[u8]) -> Vec<f32> {
    fn all<const N: usize>(bytes: &[u8], one: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|&chunk| one(chunk)).collect()
    }
    match element {
        Element::F64 => all(bytes, |b| f64::from_le_bytes(b) as f32),
        Element::F16 => all(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Element::BF16 => all(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        // match_tensors() lets no other type through.
        _ => all(bytes, f32::from_le_bytes),
    }
}

fn weights_path(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("model.safetensors");
    for (other, hint) in [
        (
            "model.safetensors.index.json",
            "the model is split over several files, which is not supported; save it as one",
        ),
        ("pytorch_model.bin", "only pytorch_model.bin is there; save it with safetensors"),
    ] {
        if !path.exists() && dir.join(other).exists() {
            return Err(bad(&path, format!("no such file; {hint}")));
        }
    }
    Ok(path)
}

fn open_file(path: &Path) -> Result<(File, u64)> {
    // Asked before opening, which would wait for the other end of a pipe.
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

/// Reads a whole file of at most [`MOST_CONFIG_BYTES`].
fn read_small(path: &Path) -> Result<Vec<u8>> {
    let (file, bytes) = open_file(path)?;
    if bytes > MOST_CONFIG_BYTES {
        return Err(bad(path, format!("{bytes} bytes are more than the {MOST_CONFIG_BYTES} that are read")));
    }
    let mut read = Vec::new();
    file.take(MOST_CONFIG_BYTES).read_to_end(&mut read).map_err(|e| Error::io("read", path, e))?;
    Ok(read)
}

fn bad(path: &Path, what: String) -> Error {
    Error::bad(format!("{}: {what}", path.display()))
}
