//! Reads a config: every value is checked as it is read, and keys that nobody read can be refused.

use crate::base::tensorfile::shortened;
use crate::base::{Error, Result, nearest};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::ops::RangeInclusive;

/// Keys that any config.json may have, even if its family does not read them.
const USUAL: [&str; 21] = [
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// The keys and values of a config.
#[derive(Debug)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// What messages call the config.
    whence: &'a str,
    strict: bool,
    read: RefCell<Vec<&'static str>>,
}

impl<'a> Fields<'a> {
    /// Reads `map`; messages begin with `whence`. `strict`: a key that nobody reads is an error.
    pub fn new(map: &'a Map<String, Value>, whence: &'a str, strict: bool) -> Self {
        Fields { map, whence, strict, read: RefCell::default() }
    }

    /// All keys and values.
    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// What messages call a key of it.
    pub fn place(&self, key: &str) -> String {
        format!("{}: {key}", self.whence)
    }

    /// Whether a key that nobody reads is an error.
    pub fn is_strict(&self) -> bool {
        self.strict
    }

    /// An error about a key.
    pub fn fault(&self, key: &str, what: impl std::fmt::Display) -> Error {
        Error::bad(format!("{}: {what}", self.place(key)))
    }

    /// The keys that were asked for, present or not.
    pub fn read_keys(&self) -> Vec<&'static str> {
        self.read.borrow().clone()
    }

    /// The value of a key, if it is there and not null.
    pub fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.read.borrow_mut().push(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A whole number in `range`, if it is there.
    pub fn optional_count(&self, key: &'static str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        self.get(key).map(|value| self.as_count(key, value, &range)).transpose()
    }

    /// A whole number in `range`.
    pub fn count(&self, key: &'static str, default: usize, range: RangeInclusive<usize>) -> Result<usize> {
        self.refuse_null(key)?;
        Ok(self.optional_count(key, range)?.unwrap_or(default))
    }

    /// A whole number in `range`; `None` where the key is there and null.
    pub fn count_or_null(
        &self,
        key: &'static str,
        default: usize,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>> {
        let given = self.optional_count(key, range)?;
        Ok(given.or(Some(default).filter(|_| !self.map.contains_key(key))))
    }

    /// A list of at least one and at most `most` whole numbers in `range`.
    pub fn counts(
        &self,
        key: &'static str,
        default: &[usize],
        range: RangeInclusive<usize>,
        most: usize,
    ) -> Result<Vec<usize>> {
        self.refuse_null(key)?;
        let Some(value) = self.get(key) else { return Ok(default.to_vec()) };
        let list = value.as_array().filter(|list| (1..=most).contains(&list.len())).ok_or_else(|| {
            self.fault(key, format!("want a list of 1 to {most} whole numbers, got {}", shown(value)))
        })?;
        list.iter().map(|value| self.as_count(key, value, &range)).collect()
    }

    /// A number for which `fits` holds; `want` describes such numbers in words.
    pub fn number(&self, key: &'static str, default: f64, want: &str, fits: impl Fn(f64) -> bool) -> Result<f64> {
        self.refuse_null(key)?;
        let Some(value) = self.get(key) else { return Ok(default) };
        value
            .as_f64()
            .filter(|&x| x.is_finite() && fits(x))
            .ok_or_else(|| self.fault(key, format!("want {want}, got {}", shown(value))))
    }

    /// A probability of dropping.
    pub fn dropout(&self, key: &'static str, default: f64) -> Result<f64> {
        self.number(key, default, "a number from 0 to below 1", |p| (0.0..1.0).contains(&p))
    }

    /// A standard deviation of initial weights.
    pub fn deviation(&self, key: &'static str, default: f64) -> Result<f64> {
        self.number(key, default, "a number from 0 to 1000", |r| (0.0..=1000.0).contains(&r))
    }

    /// What a normalisation adds to the variance.
    pub fn epsilon(&self, key: &'static str, default: f64) -> Result<f64> {
        self.number(key, default, "a number above 0, up to 1", |e| e > 0.0 && e <= 1.0)
    }

    /// True or false.
    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool> {
        self.refuse_null(key)?;
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.fault(key, format!("want true or false, got {}", shown(value))))
    }

    /// One of the `known` words, as the value that it stands for.
    pub fn word<T: Copy>(&self, key: &'static str, default: T, known: &[(&str, T)]) -> Result<T> {
        self.refuse_null(key)?;
        let Some(value) = self.get(key) else { return Ok(default) };
        let found = known.iter().find(|(word, _)| value.as_str() == Some(word));
        found.map(|&(_, meant)| meant).ok_or_else(|| {
            let words: Vec<&str> = known.iter().map(|&(word, _)| word).collect();
            self.fault(key, format!("{} is not supported, only {}", shown(value), words.join(", ")))
        })
    }

    /// Refuses another name of a key, which transformers would accept and we would not.
    pub fn refuse_alias(&self, alias: &str, key: &str) -> Result<()> {
        if self.map.contains_key(alias) { Err(self.fault(alias, format!("write it as {key}"))) } else { Ok(()) }
    }

    /// Where the config is strict, refuses keys that were not read and are neither usual nor among `more`.
    pub fn finish(&self, more: &[&str]) -> Result<()> {
        if !self.strict {
            return Ok(());
        }
        let read = self.read.borrow();
        let known = |key: &str| read.contains(&key) || USUAL.contains(&key) || more.contains(&key);
        let unknown: Vec<&String> = self.map.keys().filter(|key| !known(key)).collect();
        // Report the misspelt key rather than one that is unknown because of it.
        let near = |key: &String| nearest(key, read.iter().copied());
        if let Some((key, near)) = unknown.iter().find_map(|key| near(key).map(|near| (key, near))) {
            return Err(self.fault(&shortened(key), format!("is no key that is known here; did you mean {near}?")));
        }
        let Some(key) = unknown.first() else { return Ok(()) };
        let mut names: Vec<&str> = Vec::new();
        read.iter().for_each(|&name| {
            if !names.contains(&name) {
                names.push(name)
            }
        });
        Err(self.fault(&shortened(key), format!("is no key that is known here, only {}", names.join(", "))))
    }

    fn as_count(&self, key: &str, value: &Value, range: &RangeInclusive<usize>) -> Result<usize> {
        value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| range.contains(n)).ok_or_else(|| {
            let want = format!("want a whole number from {} to {}", range.start(), range.end());
            self.fault(key, format!("{want}, got {}", shown(value)))
        })
    }

    fn refuse_null(&self, key: &str) -> Result<()> {
        match self.map.get(key) {
            Some(Value::Null) => Err(self.fault(key, "is null; leave it out for the default")),
            _ => Ok(()),
        }
    }
}

/// A value as JSON, cut so that a message stays one short line.
pub fn shown(value: &Value) -> String {
    shortened(&value.to_string())
}
