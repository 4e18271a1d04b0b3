//! Reads one table of a job file, key by key, and says exactly where a value is wrong.
//!
//! A [`Section`] knows its dotted path and every key it may hold. The keys are checked when it is opened, before any is
//! read, so that a misspelt key is reported as misspelt and not as the intended key missing.

use hydra::base::{Error, Result, is_too_large, nearest, parse_bytes, parse_bytes_per_sec, parse_flops_per_sec};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// The largest count (of steps, samples, devices, slots): half of the range of 32 bits, since step numbers are
/// coordinates of the random numbers.
pub const MOST: u64 = i32::MAX as u64;

/// Plausible rates of a device, in bytes or floating-point operations per second. With others a plan would be
/// meaningless: its seconds would be zero or too large to count.
pub const SANE_RATES: RangeInclusive<f64> = 1.0..=1e21;

/// Where a job file's text comes from: the name that errors carry, and the folder that relative paths start from.
#[derive(Clone, Copy)]
pub struct Origin<'a> {
    /// The file's name as the user wrote it.
    pub file: &'a str,
    /// Its folder, absolute.
    pub folder: &'a Path,
}

impl Origin<'_> {
    /// The error for `message` at the dotted path `at`; the whole file where `at` is empty.
    pub fn fault(&self, at: &str, message: impl std::fmt::Display) -> Error {
        let text =
            if at.is_empty() { format!("{}: {message}", self.file) } else { format!("{}: {at}: {message}", self.file) };
        Error::bad(text.replace(['\n', '\r'], " "))
    }

    /// `text` as an absolute path.
    pub fn resolve(&self, text: &str) -> PathBuf {
        // Collecting the components drops the "." ones, so that "./a" and "a" are one path in messages and records.
        self.folder.join(text).components().collect()
    }
}

/// One table of the job file.
pub struct Section<'a> {
    origin: Origin<'a>,
    at: String,
    table: &'a Table,
    keys: &'static [&'static str],
}

impl<'a> Section<'a> {
    /// Opens the table at the dotted path `at`, which may contain only `keys`.
    ///
    /// # Errors
    /// When it contains another key.
    pub fn open(origin: Origin<'a>, at: String, table: &'a Table, keys: &'static [&'static str]) -> Result<Self> {
        let section = Section { origin, at, table, keys };
        if let Some(unknown) = table.keys().find(|key| !keys.contains(&key.as_str())) {
            let known = keys.join(", ");
            let message = match nearest(unknown, keys.iter().copied()) {
                Some(key) => format!("unknown key; did you mean `{key}`? (the keys here are {known})"),
                None => format!("unknown key; the keys here are {known}"),
            };
            return Err(section.fault(unknown, message));
        }
        Ok(section)
    }

    /// The file it is in.
    pub fn origin(&self) -> Origin<'a> {
        self.origin
    }

    /// Its own dotted path; empty for the whole file.
    pub fn at(&self) -> &str {
        &self.at
    }

    /// The whole table.
    pub fn whole(&self) -> &'a Table {
        self.table
    }

    /// The dotted path of `key`.
    pub fn path_of(&self, key: &str) -> String {
        // A key with a dot or a space in it is quoted, as in TOML.
        let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        let key = if plain { key.to_string() } else { clip(&format!("{key:?}")) };
        if self.at.is_empty() { key } else { format!("{}.{key}", self.at) }
    }

    /// The error for `message` at `key`.
    pub fn fault(&self, key: &str, message: impl std::fmt::Display) -> Error {
        self.origin.fault(&self.path_of(key), message)
    }

    /// The error for `message` about the table as a whole.
    pub fn fault_here(&self, message: impl std::fmt::Display) -> Error {
        self.origin.fault(&self.at, message)
    }

    /// The value of `key`, of any type.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        debug_assert!(self.keys.contains(&key), "{key} is read but not declared");
        self.table.get(key)
    }

    /// Whether `key` is present.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// Refuses any of `keys` that is present, because it `belongs` elsewhere.
    pub fn refuse(&self, keys: &[&str], belongs: &str) -> Result<()> {
        match keys.iter().find(|key| self.has(key)) {
            Some(key) => Err(self.fault(key, belongs)),
            None => Ok(()),
        }
    }

    fn read<T>(&self, key: &str, want: &str, take: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        take(value).map(Some).ok_or_else(|| self.fault(key, format!("want {want}, got {}", show(value))))
    }

    /// A string that is not empty.
    pub fn string(&self, key: &str, want: &str) -> Result<Option<&'a str>> {
        self.read(key, want, |value| value.as_str().filter(|text| !text.is_empty()))
    }

    /// A whole number within `range`.
    pub fn integer(&self, key: &str, range: RangeInclusive<u64>) -> Result<Option<u64>> {
        let want = match (*range.start(), *range.end()) {
            (low, u64::MAX) => format!("a whole number of at least {low}"),
            (low, high) => format!("a whole number from {low} to {high}"),
        };
        self.read(key, &want, |value| u64::try_from(value.as_integer()?).ok().filter(|n| range.contains(n)))
    }

    /// A count: a whole number from 1 to [`MOST`].
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.integer(key, 1..=MOST)?.map(|n| n as usize))
    }

    /// A finite number for which `holds` is true; `want` describes such numbers in words.
    pub fn number(&self, key: &str, want: &str, holds: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        self.read(key, want, |value| number(value).filter(|&n| holds(n)))
    }

    /// `true` or `false`.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A size above 0: a whole number of bytes, or a string with a unit.
    pub fn bytes(&self, key: &str) -> Result<Option<u64>> {
        if let Some(value) = self.value(key)
            && value.as_str().is_some_and(is_too_large)
        {
            return Err(self.fault(key, format!("{} is too large; no machine has as much", show(value))));
        }
        self.read(key, "a size above 0, such as \"64 MiB\" or 67108864", |value| {
            let bytes = match value {
                Value::Integer(n) => u64::try_from(*n).ok(),
                Value::String(text) => parse_bytes(text).ok(),
                _ => None,
            };
            bytes.filter(|&n| n > 0)
        })
    }

    /// A bandwidth, in bytes per second.
    pub fn bandwidth(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a bandwidth from 1 to 1e21 B/s in quotes, such as \"2 GB/s\"", |value| {
            parse_bytes_per_sec(value.as_str()?).ok().filter(|rate| SANE_RATES.contains(rate))
        })
    }

    /// An arithmetic rate, in floating-point operations per second.
    pub fn flops(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "an arithmetic rate up to 1e21 FLOP/s in quotes, such as \"60 TFLOP/s\"", |value| {
            parse_flops_per_sec(value.as_str()?).ok().filter(|rate| SANE_RATES.contains(rate))
        })
    }

    /// One of `words`, as the value that it stands for.
    pub fn word<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let text = value.as_str().unwrap_or_default();
        if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == text) {
            return Ok(Some(*meaning));
        }
        let list = words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
        let hint = match nearest(text, words.iter().map(|(word, _)| *word)) {
            Some(word) if !text.is_empty() => format!("; did you mean \"{word}\"?"),
            _ => String::new(),
        };
        Err(self.fault(key, format!("want one of {list}, got {}{hint}", show(value))))
    }

    /// A path, made absolute.
    pub fn path(&self, key: &str) -> Result<Option<PathBuf>> {
        Ok(self.string(key, "a path in quotes")?.map(|text| self.origin.resolve(text)))
    }

    /// One path or a list of them, made absolute; never an empty list.
    pub fn paths(&self, key: &str) -> Result<Option<Vec<PathBuf>>> {
        let resolve = |value: &Value| {
            let text = value.as_str().filter(|text| !text.is_empty())?;
            Some(self.origin.resolve(text))
        };
        self.read(key, "a path in quotes, or a list of them", |value| match value {
            Value::Array(list) if !list.is_empty() => list.iter().map(resolve).collect(),
            _ => resolve(value).map(|path| vec![path]),
        })
    }

    /// A list of strings, none of them empty.
    pub fn strings(&self, key: &str, want: &str) -> Result<Option<Vec<String>>> {
        let string = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(String::from);
        self.read(key, want, |value| value.as_array()?.iter().map(string).collect())
    }

    /// A list of exactly `N` finite numbers.
    pub fn numbers<const N: usize>(&self, key: &str, want: &str) -> Result<Option<[f64; N]>> {
        self.read(key, want, |value| {
            let list: Option<Vec<f64>> = value.as_array()?.iter().map(number).collect();
            <[f64; N]>::try_from(list?).ok()
        })
    }

    /// A list of exactly `N` counts.
    pub fn counts<const N: usize>(&self, key: &str, want: &str) -> Result<Option<[usize; N]>> {
        self.read(key, want, |value| {
            let one =
                |v: &Value| u64::try_from(v.as_integer()?).ok().filter(|n| (1..=MOST).contains(n)).map(|n| n as usize);
            let list: Option<Vec<usize>> = value.as_array()?.iter().map(one).collect();
            <[usize; N]>::try_from(list?).ok()
        })
    }

    /// A table with any keys, unchecked.
    pub fn table(&self, key: &str) -> Result<Option<&'a Table>> {
        self.read(key, "a table such as { key = value }", Value::as_table)
    }

    /// A table that may contain `keys`.
    pub fn section(&self, key: &str, keys: &'static [&'static str]) -> Result<Option<Section<'a>>> {
        let table = self.table(key)?;
        table.map(|table| Section::open(self.origin, self.path_of(key), table, keys)).transpose()
    }

    /// The same, or `default` where the key is missing.
    pub fn section_or(&self, key: &str, default: &'a Table, keys: &'static [&'static str]) -> Result<Section<'a>> {
        Section::open(self.origin, self.path_of(key), self.table(key)?.unwrap_or(default), keys)
    }

    /// The tables of `[[key]]`, each of which may contain `keys`; empty where the key is missing.
    pub fn sections(&self, key: &str, keys: &'static [&'static str]) -> Result<Vec<Section<'a>>> {
        let tables: Option<Vec<&'a Table>> = self.read(key, &format!("tables under [[{key}]]"), |value| {
            value.as_array()?.iter().map(Value::as_table).collect()
        })?;
        let open = |(i, table)| Section::open(self.origin, format!("{}.{i}", self.path_of(key)), table, keys);
        tables.unwrap_or_default().into_iter().enumerate().map(open).collect()
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Float(n) => Some(*n).filter(|n| n.is_finite()),
        Value::Integer(n) => Some(*n as f64),
        _ => None,
    }
}

/// A value for an error message: on one line and short.
pub fn show(value: &Value) -> String {
    match value {
        Value::String(text) => clip(&format!("{text:?}")),
        Value::Table(_) => "a table".to_string(),
        Value::Array(list) if list.iter().any(|v| v.is_table() || v.is_array()) => "a list".to_string(),
        Value::Array(list) => clip(&format!("[{}]", list.iter().take(20).map(show).collect::<Vec<_>>().join(", "))),
        other => other.to_string(),
    }
}

fn clip(text: &str) -> String {
    const LONGEST: usize = 60;
    if text.chars().count() <= LONGEST {
        text.to_string()
    } else {
        text.chars().take(LONGEST).collect::<String>() + "..."
    }
}
