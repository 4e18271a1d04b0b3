//! The files beside a tokenizer's main file that change how a text is tokenized, read as by transformers.
//!
//! Added tokens are added in the order of their ids. A setting that the main file contradicts, or a special token
//! without an id anywhere, is refused: no text is silently tokenized differently from transformers.

use hydra::base::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, Tokenizer};

/// The tokenizer's settings; if they contain added tokens, the other two files are ignored.
pub const CONFIG: &str = "tokenizer_config.json";
/// The names of special tokens.
pub const SPECIAL: &str = "special_tokens_map.json";
/// Tokens in addition to those of the vocabulary, with their ids.
pub const ADDED: &str = "added_tokens.json";

/// Classes that use a tokenizer.json as it is; the others read some settings from [`CONFIG`].
const PLAIN: [&str; 2] = ["PreTrainedTokenizerFast", "TokenizersBackend"];
/// The class of vocab.json and merges.txt.
const GPT2: [&str; 2] = ["GPT2Tokenizer", "GPT2TokenizerFast"];

/// Names of settings in [`CONFIG`], and in the normalizer of BERT's tokenizer.json.
const OF_BERT: [(&str, &str); 3] = [
    ("do_lower_case", "lowercase"),
    ("strip_accents", "strip_accents"),
    ("tokenize_chinese_chars", "handle_chinese_chars"),
];

/// The files beside the main one; missing ones are empty.
pub struct AddedTokens {
    folder: PathBuf,
    config: Map<String, Value>,
    special: Map<String, Value>,
    added: BTreeMap<String, u32>,
}

impl AddedTokens {
    /// Reads those of `files` that are in `folder`.
    ///
    /// # Errors
    /// When one is damaged.
    pub fn read(folder: &Path, files: &[(String, Vec<u8>)]) -> Result<AddedTokens> {
        let bytes =
            |name: &str| files.iter().find(|(file, _)| file == name).map_or(&b"{}"[..], |(_, bytes)| bytes.as_slice());
        let object = |name: &str| {
            let damaged = |e| fault(&folder.join(name), format!("damaged, want an object: {e}"));
            serde_json::from_slice(bytes(name)).map_err(damaged)
        };
        let want = "want an object of tokens and their ids";
        let added = serde_json::from_slice(bytes(ADDED))
            .map_err(|e| fault(&folder.join(ADDED), format!("damaged, {want}: {e}")))?;
        Ok(AddedTokens { folder: folder.to_path_buf(), config: object(CONFIG)?, special: object(SPECIAL)?, added })
    }

    /// Whether a text is treated as if it began with a space, if the settings say so.
    pub fn add_prefix_space(&self) -> Option<bool> {
        self.config.get("add_prefix_space").and_then(Value::as_bool)
    }

    fn class(&self) -> &str {
        self.config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default()
    }

    /// Refuses settings that are incompatible with vocab.json and merges.txt.
    ///
    /// # Errors
    /// When the class is not GPT-2's, or special tokens are to be split.
    pub fn check_two(&self) -> Result<()> {
        let class = self.class();
        if !class.is_empty() && !GPT2.contains(&class) {
            let what =
                format!("tokenizer_class {class:?} may cut otherwise than GPT2Tokenizer; write a tokenizer.json");
            return Err(fault(&self.folder.join(CONFIG), what));
        }
        self.check_split()
    }

    /// Refuses settings that a tokenizer.json contradicts.
    ///
    /// # Errors
    /// When a setting contradicts it; the message names the setting.
    pub fn check_one(&self, json: &Value) -> Result<()> {
        self.check_split()?;
        if PLAIN.contains(&self.class()) {
            return Ok(());
        }
        let check = |key: &str, wanted: Option<bool>, has: Option<bool>| match (wanted, has) {
            (Some(wanted), Some(has)) if wanted != has => {
                let what = format!("{key} is {wanted}, and the tokenizer.json has {has}; make them agree");
                Err(fault(&self.folder.join(CONFIG), what))
            }
            _ => Ok(()),
        };
        // GPT-2's classes add no space by default.
        let space = self.add_prefix_space().or(GPT2.contains(&self.class()).then_some(false));
        check("add_prefix_space", space, adds_space(json))?;
        let normalizer = &json["normalizer"];
        if normalizer["type"] == "BertNormalizer" {
            for (key, name) in OF_BERT {
                let wanted = self.config.get(key).and_then(Value::as_bool);
                // By default accents are stripped if text is lowercased.
                check(key, wanted, normalizer[name].as_bool().or(normalizer["lowercase"].as_bool()))?;
            }
        }
        Ok(())
    }

    fn check_split(&self) -> Result<()> {
        match self.config.get("split_special_tokens") {
            Some(Value::Bool(true)) => {
                Err(fault(&self.folder.join(CONFIG), "split_special_tokens is true, which is not supported"))
            }
            _ => Ok(()),
        }
    }

    /// Adds the tokens to `inner`; returns whether that changed anything.
    ///
    /// # Errors
    /// When a token gets a different id from the one in its file, or a special token has none.
    pub fn add_to(&self, inner: &mut Tokenizer) -> Result<bool> {
        let before = inner.get_added_tokens_decoder();
        let known =
            |inner: &Tokenizer, text: &str| inner.get_added_tokens_decoder().values().any(|t| t.content == text);
        let (stated, file) = self.stated()?;
        let path = self.folder.join(file);
        let add = |inner: &mut Tokenizer, token| inner.add_tokens([token]).map_err(|e| fault(&path, e)).map(drop);
        for (id, token) in stated {
            let text = token.content.clone();
            // An added_tokens.json contains only a token's id.
            if file == CONFIG || !known(inner, &text) {
                add(inner, token)?;
            }
            check_id(&path, &text, id.into(), inner.token_to_id(&text))?;
        }
        for (key, token, file) in self.named() {
            if known(inner, &token.content) {
                continue;
            }
            if inner.token_to_id(&token.content).is_none() {
                let what = "is neither in the vocabulary nor an added token; add it to one of the two, or leave it out";
                return Err(fault(&self.folder.join(file), format!("{key} {:?} {what}", token.content)));
            }
            add(inner, token)?;
        }
        Ok(inner.get_added_tokens_decoder() != before)
    }

    /// The tokens with a stated id, by id, and the file that states it.
    fn stated(&self) -> Result<(BTreeMap<u32, AddedToken>, &'static str)> {
        let Some(decoder) = self.config.get("added_tokens_decoder") else {
            let named = self.named();
            let special = |text: &str| named.iter().any(|(_, token, _)| token.content == text);
            let token = |(text, &id): (&String, &u32)| (id, AddedToken::from(text, special(text)));
            let tokens: BTreeMap<u32, AddedToken> = self.added.iter().map(token).collect();
            if tokens.len() < self.added.len() {
                return Err(fault(&self.folder.join(ADDED), "two tokens have the same id"));
            }
            return Ok((tokens, ADDED));
        };
        let want = || fault(&self.folder.join(CONFIG), "added_tokens_decoder: want an object of ids and their tokens");
        let token = |(id, value): (&String, &Value)| {
            let id = id.parse().map_err(|_| want())?;
            let special = value["special"].as_bool().unwrap_or(false);
            Ok((id, token_of(value, special).ok_or_else(want)?))
        };
        let tokens = decoder.as_object().ok_or_else(want)?.iter().map(token);
        Ok((tokens.collect::<Result<_>>()?, CONFIG))
    }

    /// The special tokens with their names, and the files that name them; those that take precedence come first.
    fn named(&self) -> Vec<(String, AddedToken, &'static str)> {
        let mut named = Vec::new();
        let older = !self.config.contains_key("added_tokens_decoder");
        for (object, file) in [(Some(&self.special).filter(|_| older), SPECIAL), (Some(&self.config), CONFIG)] {
            let Some(object) = object else { continue };
            for (key, value) in object.iter().filter(|(key, _)| key.ends_with("_token")) {
                named.extend(token_of(value, true).map(|token| (key.clone(), token, file)));
            }
            for key in ["extra_special_tokens", "additional_special_tokens"] {
                let values: Vec<&Value> = match object.get(key) {
                    Some(Value::Array(list)) => list.iter().collect(),
                    Some(Value::Object(names)) => names.values().collect(),
                    _ => Vec::new(),
                };
                named.extend(values.into_iter().filter_map(|v| Some((key.to_string(), token_of(v, true)?, file))));
            }
        }
        named
    }
}

/// Parses a token, given as text alone or with its properties.
fn token_of(value: &Value, special: bool) -> Option<AddedToken> {
    let text = value.as_str().or_else(|| value["content"].as_str())?;
    let token = AddedToken::from(text, special);
    let is = |key: &str, default: bool| value.get(key).and_then(Value::as_bool).unwrap_or(default);
    let normalized = is("normalized", token.normalized);
    let token = token.single_word(is("single_word", false)).normalized(normalized);
    Some(token.lstrip(is("lstrip", false)).rstrip(is("rstrip", false)))
}

/// Refuses an added token whose id in the file at `path` differs from the one `given` to it.
pub fn check_id(path: &Path, text: &str, id: u64, given: Option<u32>) -> Result<()> {
    if given.map(u64::from) == Some(id) {
        return Ok(());
    }
    let given = given.map_or("none".to_string(), |given| given.to_string());
    Err(fault(path, format!("added token {text:?} has the id {id}; by its place it is {given}")))
}

/// An error about the tokenizer's file at `path`, in one line.
pub fn fault(path: &Path, what: impl Display) -> Error {
    // The crate's messages may have several lines.
    Error::bad(format!("{}: {what}", path.display()).replace(['\n', '\r'], " "))
}

/// Whether a tokenizer.json treats a text as if it began with a space; `None` if it has no step that could.
fn adds_space(json: &Value) -> Option<bool> {
    let steps = |part: &str, list: &str| -> Vec<Value> {
        json[part][list].as_array().cloned().unwrap_or_else(|| vec![json[part].clone()])
    };
    let adds = |step: &Value| match step["type"].as_str() {
        Some("ByteLevel") => Some(step["add_prefix_space"].as_bool().unwrap_or(true)),
        Some("Metaspace") => Some(match step["prepend_scheme"].as_str() {
            Some(scheme) => scheme != "never",
            None => step["add_prefix_space"].as_bool().unwrap_or(true),
        }),
        Some("Prepend") => Some(true),
        _ => None,
    };
    let all = [steps("pre_tokenizer", "pretokenizers"), steps("normalizer", "normalizers")].concat();
    all.iter().filter_map(adds).reduce(|a, b| a || b)
}
