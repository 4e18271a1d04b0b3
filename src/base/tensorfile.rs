//! Reads the header of a safetensors file and trusts none of it; writes one ([`header`]).
//!
//! The safetensors crate reads the format but keeps the last of two equal keys, accepts `[2^64-1, 0]` as a shape, and
//! seldom names the faulty tensor. Here every tensor is checked individually first, and then the crate checks the
//! whole. Parsing needs only the header, so files larger than memory can be read piece by piece; its allocations are
//! bounded by the header's length, whatever the numbers in it claim. Invariant of [`TensorIndex`]: the tensors cover
//! the bytes after the header exactly, without gap or overlap, and each is as long as its shape says.

mod header;

use super::{Error, Result, Shape};
pub use header::header;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::Path;

/// The longest header that is read: the safetensors crate's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The most axes of a tensor. No model has more, and every two characters of header could otherwise cost another axis.
const MAX_AXES: usize = 16;
/// Bytes of the header's length at the start of the file.
const LENGTH_BYTES: u64 = 8;
/// The key that holds free text rather than a tensor.
const METADATA: &str = "__metadata__";

/// The type of one element in a file; there are more of them than of [`DType`](super::DType), which are the types we
/// compute in. In the format's ascending order: with the widest first, all tensors are aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Signed, 16 bits.
    I16,
    /// IEEE half precision.
    F16,
    /// The high half of an `F32`.
    BF16,
    /// Signed, 32 bits.
    I32,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// Signed, 64 bits.
    I64,
}

impl Element {
    const NAMES: [(&'static str, Element); 10] = [
        ("F64", Element::F64),
        ("F32", Element::F32),
        ("F16", Element::F16),
        ("BF16", Element::BF16),
        ("I64", Element::I64),
        ("I32", Element::I32),
        ("I16", Element::I16),
        ("I8", Element::I8),
        ("U8", Element::U8),
        ("BOOL", Element::Bool),
    ];

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Element::F64 | Element::I64 => 8,
            Element::F32 | Element::I32 => 4,
            Element::F16 | Element::BF16 | Element::I16 => 2,
            Element::I8 | Element::U8 | Element::Bool => 1,
        }
    }

    fn named(name: &str) -> Option<Element> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, element)| element)
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, element)| element == self).map_or("?", |(name, _)| name);
        f.write_str(name)
    }
}

/// Where one tensor lies in its file. Elements are little-endian and row-major, at no particular alignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its key in the header.
    pub name: String,
    /// The type of its elements.
    pub element: Element,
    /// Its axes, outermost first; none for a scalar.
    pub shape: Shape,
    /// Its first byte, counted from the start of the file.
    pub start_bytes: u64,
    /// Its length: elements times bytes per element.
    pub len_bytes: u64,
}

/// The header of a safetensors file, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorIndex {
    /// Ordered by name.
    entries: Vec<TensorEntry>,
    metadata: BTreeMap<String, String>,
}

impl TensorIndex {
    /// Reads the header of a file of `file_bytes` bytes, from its start; messages call the file `path`.
    ///
    /// # Errors
    /// When reading fails; the file is shorter than eight bytes, or its header longer than the rest of the file or 100
    /// MB; the header is not UTF-8 or not a JSON object of tensors, a key occurs twice, a dtype is unknown, a shape and
    /// its bytes disagree, or the tensors do not cover the rest of the file exactly.
    pub fn read(mut reader: impl Read, file_bytes: u64, path: &Path) -> Result<TensorIndex> {
        let io = |e| Error::io("read", path, e);
        let file = path.display().to_string();
        let mut prefix = Vec::new();
        reader.by_ref().take(LENGTH_BYTES).read_to_end(&mut prefix).map_err(io)?;
        let mut header = vec![0; TensorIndex::header_bytes(&prefix, file_bytes, &file)?];
        reader.read_exact(&mut header).map_err(io)?;
        TensorIndex::parse(&header, file_bytes, &file)
    }

    /// The number of bytes of JSON after a file's first eight bytes, given those eight (or fewer, where the file is
    /// shorter).
    fn header_bytes(prefix: &[u8], file_bytes: u64, file: &str) -> Result<usize> {
        let Some(length) = prefix.first_chunk::<8>().filter(|_| file_bytes >= LENGTH_BYTES) else {
            return Err(Error::bad(format!("{file}: {file_bytes} bytes are too few for a safetensors file")));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES {
            return Err(Error::bad(format!(
                "{file}: states a header of {length} bytes, more than {MAX_HEADER_BYTES}; is it a safetensors file?"
            )));
        }
        if length > file_bytes - LENGTH_BYTES {
            return Err(Error::bad(format!(
                "{file}: states a header of {length} bytes, but only {} bytes follow; the file is truncated",
                file_bytes - LENGTH_BYTES
            )));
        }
        Ok(length as usize)
    }

    /// Parses the JSON `header` of a file of `file_bytes` bytes.
    fn parse(header: &[u8], file_bytes: u64, file: &str) -> Result<TensorIndex> {
        let bad = |what: String| Error::bad(format!("{file}: {what}"));
        let data_start = LENGTH_BYTES + header.len() as u64;
        let data_bytes = file_bytes
            .checked_sub(data_start)
            .ok_or_else(|| bad(format!("{file_bytes} bytes are fewer than its header needs")))?;
        let text = std::str::from_utf8(header)
            .map_err(|e| bad(format!("the header is not UTF-8 at byte {}", LENGTH_BYTES + e.valid_up_to() as u64)))?;
        if !text.starts_with('{') {
            return Err(bad("the header does not begin with '{'; is it a safetensors file?".into()));
        }
        let raw: Header =
            serde_json::from_str(text).map_err(|e| bad(format!("header: {}", shortened(&e.to_string()))))?;
        let mut entries = Vec::with_capacity(raw.tensors.len());
        for (name, tensor) in raw.tensors {
            let entry = tensor.entry(name, data_start, data_bytes).map_err(bad)?;
            entries.push(entry);
        }
        check_cover(&entries, data_start, data_bytes).map_err(bad)?;
        // The format's own reader also checks the header, in case it has a rule that is not known here.
        serde_json::from_str::<safetensors::tensor::Metadata>(text)
            .map_err(|e| bad(format!("header: {}", shortened(&e.to_string()))))?;
        Ok(TensorIndex { entries, metadata: raw.metadata })
    }

    /// The tensors, ordered by name.
    pub fn entries(&self) -> &[TensorEntry] {
        &self.entries
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        let at = self.entries.binary_search_by(|entry| entry.name.as_str().cmp(name)).ok()?;
        self.entries.get(at)
    }

    /// The free text of the file, such as `format = pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// One tensor of a file in memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its name, element type and shape.
    pub entry: &'a TensorEntry,
    /// Its elements, little-endian, at no particular alignment.
    pub bytes: &'a [u8],
}

/// A whole safetensors file in memory, checked.
#[derive(Clone, Debug)]
pub struct TensorFile<'a> {
    index: TensorIndex,
    bytes: &'a [u8],
}

impl<'a> TensorFile<'a> {
    /// Parses the bytes of a whole file, which messages call `file`.
    ///
    /// # Errors
    /// As [`TensorIndex::read`].
    pub fn parse(bytes: &'a [u8], file: &str) -> Result<TensorFile<'a>> {
        Ok(TensorFile { index: TensorIndex::read(bytes, bytes.len() as u64, Path::new(file))?, bytes })
    }

    /// Where the tensors lie.
    pub fn index(&self) -> &TensorIndex {
        &self.index
    }

    /// The tensors, ordered by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.index.entries.iter().map(|entry| self.view(entry))
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.index.get(name).map(|entry| self.view(entry))
    }

    fn view<'s>(&'s self, entry: &'s TensorEntry) -> TensorView<'s> {
        // In range: parse() has compared every entry with the length of these bytes.
        let start = entry.start_bytes as usize;
        TensorView { entry, bytes: &self.bytes[start..start + entry.len_bytes as usize] }
    }
}

/// The header as it is in the file, keys in order.
struct Header {
    tensors: BTreeMap<String, RawTensor>,
    metadata: BTreeMap<String, String>,
}

/// One tensor's value in the header, before any check.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Axes,
    data_offsets: (u64, u64),
}

/// At most [`MAX_AXES`] axes.
struct Axes(Vec<usize>);

/// A map of text to text in which no key occurs twice; also used for the index of a model in several files.
pub(crate) struct Texts(pub(crate) BTreeMap<String, String>);

impl RawTensor {
    fn entry(self, name: String, data_start: u64, data_bytes: u64) -> std::result::Result<TensorEntry, String> {
        let called = format!("tensor {}", quoted(&name));
        let element = Element::named(&self.dtype)
            .ok_or_else(|| format!("{called}: element type {} is not supported", quoted(&self.dtype)))?;
        let shape = Shape::new(self.shape.0);
        // Zero axes are left out of the product: a shape such as [2^64-1, 0] has no elements, but an axis that no loop
        // could ever finish.
        let walked = Shape::new(shape.axes().iter().copied().filter(|&axis| axis > 0).collect::<Vec<_>>());
        if walked.checked_elems().is_err() {
            return Err(format!("{called}: shape {shape} has more elements than fit in memory"));
        }
        let len_bytes = shape.elems() as u64 * element.bytes();
        let (start, end) = self.data_offsets;
        if end < start {
            return Err(format!("{called}: data_offsets end at {end}, before their start at {start}"));
        }
        if end > data_bytes {
            return Err(format!(
                "{called}: ends at byte {end} of the data, of which the file has {data_bytes}; the file is truncated"
            ));
        }
        if end - start != len_bytes {
            return Err(format!(
                "{called}: shape {shape} of {element} takes {len_bytes} bytes, data_offsets span {}",
                end - start
            ));
        }
        Ok(TensorEntry { name, element, shape, start_bytes: data_start + start, len_bytes })
    }
}

/// Checks that the tensors follow each other without gap or overlap from the header to the file's end.
fn check_cover(entries: &[TensorEntry], data_start: u64, data_bytes: u64) -> std::result::Result<(), String> {
    let mut by_place: Vec<&TensorEntry> = entries.iter().collect();
    by_place.sort_by_key(|entry| (entry.start_bytes, entry.len_bytes));
    let mut end = data_start;
    let mut last: Option<&TensorEntry> = None;
    for entry in by_place {
        let name = quoted(&entry.name);
        if entry.start_bytes < end {
            let other = last.map_or_else(String::new, |other| quoted(&other.name));
            return Err(format!("tensor {name}: overlaps tensor {other} by {} bytes", end - entry.start_bytes));
        }
        if entry.start_bytes > end {
            return Err(format!("tensor {name}: {} bytes before it belong to no tensor", entry.start_bytes - end));
        }
        end = entry.start_bytes + entry.len_bytes;
        last = Some(entry);
    }
    match data_start + data_bytes - end {
        0 => Ok(()),
        extra => Err(format!("{extra} bytes follow the last tensor")),
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut tensors = BTreeMap::new();
                let mut metadata: Option<Texts> = None;
                while let Some(name) = map.next_key::<String>()? {
                    let twice = if name == METADATA { metadata.is_some() } else { tensors.contains_key(&name) };
                    if twice {
                        return Err(A::Error::custom(format!("key {} occurs twice", quoted(&name))));
                    }
                    if name == METADATA {
                        let texts = map.next_value();
                        metadata = Some(texts.map_err(|e| A::Error::custom(format!("{METADATA}: {e}")))?);
                    } else {
                        let value = map.next_value().map_err(|e| {
                            A::Error::custom(format!("tensor {}: {}", quoted(&name), shortened(&e.to_string())))
                        })?;
                        tensors.insert(name, value);
                    }
                }
                Ok(Header { tensors, metadata: metadata.map_or_else(BTreeMap::new, |texts| texts.0) })
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

impl<'de> Deserialize<'de> for Axes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Axes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of axis sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Axes, A::Error> {
                let mut axes = Vec::new();
                while let Some(axis) = seq.next_element::<usize>()? {
                    if axes.len() == MAX_AXES {
                        return Err(A::Error::custom(format!("shape has more than {MAX_AXES} axes")));
                    }
                    axes.push(axis);
                }
                Ok(Axes(axes))
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Texts, A::Error> {
                let mut texts = BTreeMap::new();
                while let Some((key, text)) = map.next_entry::<String, String>()? {
                    if texts.contains_key(&key) {
                        return Err(A::Error::custom(format!("key {} occurs twice", quoted(&key))));
                    }
                    texts.insert(key, text);
                }
                Ok(Texts(texts))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// A name from a file, in quotes.
pub fn quoted(name: &str) -> String {
    format!("'{}'", shortened(name))
}

/// The first characters of a text that may contain parts of a file, escaped so that a message stays on one line.
pub(crate) fn shortened(text: &str) -> String {
    const CHARS: usize = 200;
    let mut short = String::new();
    for c in text.chars().take(CHARS) {
        // JSON has quotes and backslashes of its own.
        if matches!(c, '"' | '\'' | '\\') { short.push(c) } else { short.extend(c.escape_debug()) }
    }
    if text.chars().nth(CHARS).is_some() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
#[path = "tensorfile_tests.rs"]
mod tests;
