//! Reads Hugging Face model directories: config.json and the weights, in one file or in several; and the weights of a
//! network of one's own.
//!
//! Nothing in the files is trusted. Opening checks names, types and shapes of all tensors against the network; numbers
//! are read on demand, tensor by tensor, so that a model larger than memory can be opened.

use super::Network;
use super::families::{Customs, Family, family};
use super::fields::{Fields, shown};
use super::parts::{Parts, Place, bad, read_small};
use super::save::{Form, SavedTensor};
use crate::base::tensorfile::{Element, TensorEntry, shortened};
use crate::base::{Error, Result, Shape};
use half::{bf16, f16};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

/// The end of the names of BatchNorm's running variances.
const RUNNING_VAR: &str = "running_var";
/// Bytes read at a time where two tensors are compared.
const PIECE_BYTES: usize = 1 << 20;

/// A network with its weights still in files: from a directory, or of one's own.
pub struct Pretrained {
    /// The network.
    pub network: Box<dyn Network>,
    /// How [`super::save`] writes it back: same names, same types.
    pub form: Form,
    /// Weights in the files that belong to heads and layers which the network does not have, by name; they are not
    /// saved again.
    pub unused: Vec<String>,
    parts: Parts,
    /// Where each of the form's tensors lies, by its name in the graph.
    places: BTreeMap<String, Place>,
}

impl fmt::Debug for Pretrained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pretrained").field("path", &self.parts.path).field("tensors", &self.places.len()).finish()
    }
}

/// Opens a model directory.
///
/// # Errors
/// When a file is missing or damaged, the family or a value of the config is not supported, or the tensors are not
/// those of the network: one is missing, unknown, or has another shape or type. Messages name the file and the key or
/// tensor.
pub fn open(dir: &Path) -> Result<Pretrained> {
    let (family, network, config) = read_config(&dir.join("config.json"))?;
    let generation = dir.join("generation_config.json");
    let generation_config = if generation.exists() { Some(read_small(&generation)?) } else { None };
    let mut pretrained = Pretrained::open(dir, network, &family.files)?;
    (pretrained.form.config, pretrained.form.generation_config) = (config, generation_config);
    Ok(pretrained)
}

/// Opens the weights of a network of one's own: a directory that [`save`](super::save()) has written, or a safetensors
/// file from anywhere, with the network's tensors under their names in the graph. The network is given, so no
/// config.json is read.
///
/// # Errors
/// When a file is missing or damaged, the network does not trace with its default inputs, or the tensors are not those
/// of the network: one is missing, unknown, or has another shape or type; BatchNorm's batch counts may be missing.
/// Messages name the file and the tensor.
pub fn open_own(path: &Path, network: Box<dyn Network>) -> Result<Pretrained> {
    Pretrained::open(path, network, &Customs::NONE)
}

impl Pretrained {
    /// Finds the weights of `network` in a directory, or a file; the form's config is the network's own.
    fn open(path: &Path, network: Box<dyn Network>, customs: &Customs) -> Result<Pretrained> {
        let mut form = Form::of(network.as_ref())?;
        let tied = |name: &str| customs.tied.iter().any(|&(head, _)| head == name);
        let spared = |name: &str| {
            form.counters.contains_key(name) || tied(name) || (customs.is_buffer)(name) || (customs.is_elsewhere)(name)
        };
        let parts = Parts::open(path, &spared)?;
        let places = match_tensors(&parts, customs, &mut form.tensors)?;
        let mut pretrained = Pretrained { network, form, unused: Vec::new(), parts, places };
        pretrained.account_for_the_rest(customs)?;
        Ok(pretrained)
    }

    /// The directory that contains the weights.
    pub fn dir(&self) -> &Path {
        self.parts.path.parent().unwrap_or(Path::new(""))
    }

    /// The elements of a tensor by its name in the graph, row-major, as f32.
    ///
    /// # Errors
    /// When the network has no such tensor, or it has another shape, a value is not finite in f32, a running variance
    /// is negative, or reading fails.
    pub fn tensor(&self, name: &str, shape: &Shape) -> Result<Vec<f32>> {
        let place = self.places.get(name);
        let place = place.ok_or_else(|| bad(&self.parts.path, format!("tensor {name}: is missing; want {shape}")))?;
        let entry = &place.entry;
        if entry.shape != *shape {
            return Err(self.parts.fault(place, wrong_shape(entry, shape)));
        }
        let mut bytes = vec![0; entry.len_bytes as usize];
        self.parts.read(place, 0, &mut bytes)?;
        let values = decode(entry.element, &bytes);
        let is_variance = name.ends_with(RUNNING_VAR);
        match values.iter().position(|&x| !x.is_finite() || is_variance && x < 0.0) {
            None => Ok(values),
            Some(at) => {
                let (found, element) = (values[at], entry.element);
                let want = if found.is_finite() { "; want a variance of at least 0" } else { "" };
                let name = shortened(&entry.name);
                Err(self.parts.fault(place, format!("tensor {name}: element {at} ({element}) is {found} in f32{want}")))
            }
        }
    }

    /// Accounts for the files' tensors that are no weights of the network: counts, constants, a copy of the tied head.
    fn account_for_the_rest(&mut self, customs: &Customs) -> Result<()> {
        let used: BTreeSet<&str> = self.places.values().map(|place| place.entry.name.as_str()).collect();
        let mut unexpected = Vec::new();
        for place in self.parts.places().filter(|place| !used.contains(place.entry.name.as_str())) {
            let name = place.entry.name.as_str();
            if self.form.counters.contains_key(name) {
                let count = self.count(place)?;
                self.form.counters.insert(name.to_string(), count);
            } else if let Some((_, table)) = customs.tied.iter().find(|&&(head, _)| head == name) {
                self.check_tied(place, table)?;
            } else if (customs.is_elsewhere)(name) {
                self.unused.push(name.to_string());
            } else if !(customs.is_buffer)(name) {
                unexpected.push(place);
            }
        }
        let Some(first) = unexpected.first() else { return Ok(()) };
        let more = match unexpected.len() - 1 {
            0 => String::new(),
            more => format!(", nor has it place for {more} more, such as {}", shortened(&unexpected[more].entry.name)),
        };
        let (name, shape) = (shortened(&first.entry.name), &first.entry.shape);
        Err(self.parts.fault(first, format!("tensor {name}: the network has no such tensor ({shape}){more}")))
    }

    fn count(&self, place: &Place) -> Result<i64> {
        let TensorEntry { name, element, shape, .. } = &place.entry;
        if *element != Element::I64 || shape.elems() != 1 {
            return Err(self.parts.fault(place, format!("tensor {name}: is {shape} {element}, want a scalar I64")));
        }
        let mut bytes = [0; 8];
        self.parts.read(place, 0, &mut bytes)?;
        match i64::from_le_bytes(bytes) {
            count if count >= 0 => Ok(count),
            count => Err(self.parts.fault(place, format!("tensor {name}: is {count}, want a count"))),
        }
    }

    /// Checks that the files' own copy of a tied head equals the table.
    fn check_tied(&self, head: &Place, table: &str) -> Result<()> {
        let found = self.places.get(table);
        let differs = |what: &str| {
            let (name, other) = (&head.entry.name, found.map_or(table, |place| &place.entry.name));
            self.parts.fault(head, format!("tensor {name}: has other {what} than {other}, to which the config ties it"))
        };
        let table = found.filter(|table| table.entry.shape == head.entry.shape).ok_or_else(|| differs("axes"))?;
        if table.entry.element != head.entry.element {
            return Err(differs("elements"));
        }
        let mut pieces = [vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]];
        let (mut done, all) = (0, head.entry.len_bytes);
        while done < all {
            let len = (all - done).min(PIECE_BYTES as u64) as usize;
            for (piece, place) in pieces.iter_mut().zip([head, table]) {
                piece.truncate(len);
                self.parts.read(place, done, piece)?;
            }
            if pieces[0] != pieces[1] {
                return Err(differs("values"));
            }
            done += len as u64;
        }
        Ok(())
    }
}

/// Reads and checks a config.json; returns the family, the network and the text.
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

/// The name for a normalisation's weight or bias in files of early TensorFlow models; transformers renames them too.
fn old_name(name: &str) -> Option<String> {
    let old = |new: &str, old: &str| name.strip_suffix(new).map(|start| format!("{start}{old}"));
    old("LayerNorm.weight", "LayerNorm.gamma").or_else(|| old("LayerNorm.bias", "LayerNorm.beta"))
}

/// Finds every tensor of the network in the files, with or without the family's prefix, and notes its name and type
/// there.
fn match_tensors(parts: &Parts, customs: &Customs, wanted: &mut [SavedTensor]) -> Result<BTreeMap<String, Place>> {
    let mut places = BTreeMap::new();
    let short = |name: &str| customs.prefix.and_then(|p| name.strip_prefix(p)).and_then(|short| parts.get(short));
    let old = |name: &str| old_name(name).and_then(|old| parts.get(&old));
    let find = |name: &str| parts.get(name).or_else(|| short(name)).or_else(|| old(name));
    let is_missing = |tensor: &&SavedTensor| find(&tensor.name).is_none();
    let missing = wanted.iter().filter(is_missing).count();
    for SavedTensor { name, file_name, shape, element } in wanted {
        let Some(place) = find(name) else {
            let more = if missing > 1 { format!(", as are {} more", missing - 1) } else { String::new() };
            return Err(bad(&parts.path, format!("tensor {name}: is missing{more}; want {shape}")));
        };
        (*file_name, *element) = (place.entry.name.clone(), place.entry.element);
        if place.entry.shape != *shape {
            return Err(parts.fault(place, wrong_shape(&place.entry, shape)));
        }
        if !matches!(element, Element::F64 | Element::F32 | Element::F16 | Element::BF16) {
            return Err(parts.fault(place, format!("tensor {file_name}: is {element}, want F32, F16, BF16 or F64")));
        }
        places.insert(name.clone(), place.clone());
    }
    Ok(places)
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
