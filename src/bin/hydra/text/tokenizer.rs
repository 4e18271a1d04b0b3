//! Tokenizers from files: a tokenizer.json, or GPT-2's vocab.json and merges.txt.
//!
//! Nothing in them is trusted: content at which the `tokenizers` crate would panic, or which it would misread, is
//! reported as the file's fault. Their bytes are kept as read, to be saved with the model that is trained with them,
//! whatever happens to the files meanwhile.

use crate::text::added_tokens::{ADDED, AddedTokens, CONFIG, SPECIAL, check_id, fault};
use flate2::Crc;
use hydra::base::{Error, Result};
use hydra::data::{self, Encode};
use rayon::prelude::*;
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::AddedToken;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// The file that describes a whole tokenizer.
const TOKENIZER: &str = "tokenizer.json";
/// GPT-2's two files.
const VOCAB: &str = "vocab.json";
const MERGES: &str = "merges.txt";
/// The token that separates GPT-2's texts.
const END: &str = "<|endoftext|>";
/// Files that transformers keeps beside either form.
const BESIDE: [&str; 3] = [CONFIG, SPECIAL, ADDED];

/// The longest file that is read: one for a million tokens with their merges is a third of this.
const MOST_BYTES: u64 = 256 << 20;
/// Ids are positive i32 on devices.
const MOST_ID: u32 = i32::MAX as u32 - 1;

/// Bytes of text that are tokenized at once, where that can be chosen: the crate needs more than a hundred times as
/// much memory.
const PIECE_BYTES: usize = 1 << 18;

/// A tokenizer from files.
pub struct FileTokenizer {
    inner: tokenizers::Tokenizer,
    vocab: usize,
    /// Whether [`pieces`] of a text give the tokens of the whole.
    in_pieces: bool,
    /// Whether letters without a token vanish from the text silently; [`lost`] then finds them.
    may_lose: bool,
    /// The files it was made from and those beside them, by the names that transformers looks for.
    pub files: Vec<(String, Vec<u8>)>,
    /// A string that identifies the tokenizer.
    pub identity: String,
}

impl fmt::Debug for FileTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileTokenizer").field("vocab", &self.vocab).field("identity", &self.identity).finish()
    }
}

/// The files that a tokenizer is made from.
#[derive(Debug, PartialEq)]
enum Parts {
    /// A tokenizer.json, whatever it is called here.
    One(PathBuf),
    /// vocab.json and merges.txt in a folder.
    Two(PathBuf),
}

impl Parts {
    /// Finds a tokenizer at `path`: a file, or in a folder the one file in preference to the two. `None` for a folder
    /// with neither.
    fn find(path: &Path) -> Result<Option<Parts>> {
        let metadata = fs::metadata(path).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => fault(path, "no such file or folder"),
            _ => Error::io("inspect", path, e),
        })?;
        if !metadata.is_dir() {
            return Ok(Some(Parts::One(path.to_path_buf())));
        }
        let has = |name: &str| path.join(name).exists();
        Ok(match has(TOKENIZER) {
            true => Some(Parts::One(path.join(TOKENIZER))),
            false if has(VOCAB) && has(MERGES) => Some(Parts::Two(path.to_path_buf())),
            false => None,
        })
    }

    fn load(&self) -> Result<FileTokenizer> {
        let (folder, mut files) = match self {
            Parts::One(path) => (path.parent(), vec![(TOKENIZER.to_string(), read(path)?)]),
            Parts::Two(folder) => {
                let part = |name: &str| Ok((name.to_string(), read(&folder.join(name))?));
                (Some(folder.as_path()), vec![part(VOCAB)?, part(MERGES)?])
            }
        };
        let mut crc = Crc::new();
        files.iter().for_each(|(_, bytes)| crc.update(bytes));
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        let mut identity = format!("{} with CRC-32 {:08x}", names.join(" and "), crc.sum());
        for name in BESIDE {
            if let Some(path) = folder.map(|folder| folder.join(name)).filter(|path| path.is_file()) {
                files.push((name.to_string(), read(&path)?));
            }
        }
        let beside = AddedTokens::read(folder.unwrap_or(Path::new("")), &files)?;
        let (mut inner, in_bytes) = match self {
            Parts::One(path) => one(path, &files[0].1, &beside)?,
            Parts::Two(folder) => two(folder, &files, &beside)?,
        };
        if beside.add_to(&mut inner)? {
            let mut crc = Crc::new();
            inner.get_added_tokens_decoder().into_iter().collect::<BTreeMap<_, _>>().into_iter().for_each(|token| {
                crc.update(format!("{token:?}").as_bytes());
            });
            identity += &format!(", added tokens with CRC-32 {:08x}", crc.sum());
        }
        if matches!(self, Parts::Two(_)) && beside.add_prefix_space() == Some(true) {
            identity += ", with add_prefix_space";
        }
        let most = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if most > MOST_ID {
            let path = match self {
                Parts::One(path) => path,
                Parts::Two(folder) => &folder.join(VOCAB),
            };
            return Err(fault(path, format!("the highest id is {most}; want {MOST_ID} at most")));
        }
        let in_pieces = cuts_at_lines(&inner);
        // The other models map unknown text to a token, or fail; a byte-level one has been checked to have all letters.
        let may_lose = match inner.get_model() {
            ModelWrapper::BPE(bpe) => bpe.unk_token.is_none() && !bpe.byte_fallback && !in_bytes,
            _ => false,
        };
        Ok(FileTokenizer { inner, vocab: most as usize + 1, in_pieces, may_lose, files, identity })
    }
}

/// Loads a tokenizer.json; also returns whether its letters stand for bytes.
fn one(path: &Path, bytes: &[u8], beside: &AddedTokens) -> Result<(tokenizers::Tokenizer, bool)> {
    let json: Value = serde_json::from_slice(bytes).map_err(|e| fault(path, format!("damaged JSON: {e}")))?;
    if !json["model"].is_object() {
        let two = format!("; of GPT-2's {VOCAB} and {MERGES} name the folder");
        return Err(fault(
            path,
            format!("holds no model: is it a {TOKENIZER}?{}", if json.is_object() { &two } else { "" }),
        ));
    }
    let mut inner = contained(|| tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string()))
        .map_err(|e| fault(path, format!("is no tokenizer that can be loaded: {e}")))?;
    if let ModelWrapper::BPE(bpe) = inner.get_model()
        && let Some(dropout) = bpe.dropout.filter(|&dropout| dropout > 0.0)
    {
        return Err(fault(
            path,
            format!("model.dropout is {dropout}, which cuts a text otherwise each time; write null"),
        ));
    }
    // The crate numbers added tokens itself, and only warns if the file has a different number.
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(text), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else { continue };
        if let given @ Some(_) = inner.token_to_id(text) {
            check_id(path, text, id, given)?;
        }
    }
    let in_bytes = is_byte_level(&json["pre_tokenizer"]);
    if let ModelWrapper::BPE(bpe) = inner.get_model()
        && in_bytes
        && bpe.unk_token.is_none()
        && !bpe.byte_fallback
    {
        let vocab = inner.get_vocab(false);
        check_alphabet(path, |letter| vocab.contains_key(letter))?;
    }
    // Both are for single samples; a text is tokenized whole.
    inner.with_truncation(None).map_err(|e| fault(path, e))?.with_padding(None);
    if inner.get_vocab(true).is_empty() {
        return Err(fault(path, "the vocabulary is empty"));
    }
    beside.check_one(&json)?;
    Ok((inner, in_bytes))
}

/// Whether a tokenizer.json's pre-tokenizer, or one of its steps, turns a text into letters for bytes.
fn is_byte_level(pre_tokenizer: &Value) -> bool {
    let is = |step: &Value| step["type"] == "ByteLevel";
    is(pre_tokenizer) || pre_tokenizer["pretokenizers"].as_array().is_some_and(|steps| steps.iter().any(is))
}

/// Refuses a byte-level vocabulary without a token for each byte, since bytes without one would vanish from the text
/// silently.
fn check_alphabet(path: &Path, has: impl Fn(&str) -> bool) -> Result<()> {
    match ByteLevel::alphabet().into_iter().filter(|c| !has(&c.to_string())).min() {
        None => Ok(()),
        Some(letter) => {
            let what =
                format!("has no token for {letter:?}; a byte-level vocabulary has one for each of the 256 bytes");
            Err(fault(path, what))
        }
    }
}

/// Loads GPT-2's byte-level BPE from the `files` in `folder`; also returns that its letters stand for bytes.
///
/// As in transformers' GPT2Tokenizer, [`END`] is a single token if the vocabulary has it, and is not split into
/// letters.
fn two(folder: &Path, files: &[(String, Vec<u8>)], beside: &AddedTokens) -> Result<(tokenizers::Tokenizer, bool)> {
    let bytes = |name: &str| files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.as_slice());
    let (path, want) = (folder.join(VOCAB), "want an object of tokens and their ids");
    let vocab: BTreeMap<String, u32> = serde_json::from_slice(bytes(VOCAB).unwrap_or_default())
        .map_err(|e| fault(&path, format!("damaged, {want}: {e}")))?;
    if vocab.is_empty() {
        return Err(fault(&path, "the vocabulary is empty"));
    }
    beside.check_two()?;
    check_alphabet(&path, |letter| vocab.contains_key(letter))?;
    let path = folder.join(MERGES);
    let merges = bytes(MERGES).unwrap_or_default();
    let merges = std::str::from_utf8(merges).map_err(|e| fault(&path, not_utf8(e.valid_up_to())))?;
    let mut pairs = Vec::new();
    for (at, line) in merges.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with("#version")) {
        let fault = |what: String| fault(&path, format!("line {}: {what}", at + 1));
        let Some((left, right)) = line.split_once(' ').filter(|(_, right)| !right.contains(' ')) else {
            return Err(fault(format!("want two tokens with a space between, got {line:?}")));
        };
        let (left, right) = (left.to_string(), right.to_string());
        if let Some(none) = [&left, &right, &format!("{left}{right}")].into_iter().find(|t| !vocab.contains_key(*t)) {
            return Err(fault(format!("{none:?} is not in {VOCAB}")));
        }
        pairs.push((left, right));
    }
    let vocab: Vocab = vocab.into_iter().collect();
    let bpe = contained(|| BPE::builder().vocab_and_merges(vocab, pairs).build().map_err(|e| e.to_string()))
        .map_err(|e| fault(folder, e))?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    let add_prefix_space = beside.add_prefix_space().unwrap_or(false);
    inner.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(add_prefix_space)));
    if inner.token_to_id(END).is_some() {
        inner.add_special_tokens([AddedToken::from(END, true)]).map_err(|e| fault(folder, e))?;
    }
    Ok((inner, true))
}

/// Whether the [`pieces`] of any text have the same tokens as the whole: words must be split by GPT-2's regex, or by
/// one like Llama 3's, in a text that no earlier step changes, and no added token may extend over spaces.
///
/// No alternative of these regexes matches a line end followed by a character that is neither space nor slash; none
/// looks back; and a line end that stands alone is matched in the same way whatever follows it. For other ways to split
/// this is not known. NFC joins nothing to a line end and moves nothing past it.
fn cuts_at_lines(tokenizer: &tokenizers::Tokenizer) -> bool {
    let json = |part: serde_json::Result<Value>| part.unwrap_or(Value::Bool(true));
    let pre_tokenizer = json(serde_json::to_value(tokenizer.get_pre_tokenizer()));
    let normalizer = json(serde_json::to_value(tokenizer.get_normalizer()));
    let in_bytes = |step: &Value, use_regex: bool| {
        step["type"] == "ByteLevel" && step["add_prefix_space"] == false && step["use_regex"] == use_regex
    };
    let words = match pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) {
        None => in_bytes(&pre_tokenizer, true),
        Some([split, bytes]) => {
            let isolated = split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
            isolated && split["pattern"]["Regex"].as_str().is_some_and(is_known_split) && in_bytes(bytes, false)
        }
        Some(_) => false,
    };
    let apart = |token: &AddedToken| !token.lstrip && !token.rstrip && !token.content.contains(char::is_whitespace);
    words
        && (normalizer.is_null() || normalizer["type"] == "NFC")
        && tokenizer.get_added_tokens_decoder().values().all(apart)
}

/// Whether a regex is that of Llama 3, Qwen, Mistral (Tekken), OLMo 2 or gpt-oss, or a combination of their parts.
fn is_known_split(regex: &str) -> bool {
    const SHORT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
    const UPPER: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
    const LOWER: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
    const BEFORE: &str = r"[^\r\n\p{L}\p{N}]?";
    let cased = |short: &str| format!("{BEFORE}{UPPER}*{LOWER}+{short}|{BEFORE}{UPPER}+{LOWER}*{short}");
    let words = [format!(r"{SHORT}|{BEFORE}\p{{L}}+"), cased(""), cased(&format!("{SHORT}?"))];
    let Some(rest) = words.iter().find_map(|words| regex.strip_prefix(words.as_str())) else { return false };
    let Some(rest) = [r"|\p{N}", r"|\p{N}{1,3}"].iter().find_map(|digits| rest.strip_prefix(&format!("{digits}| ?")))
    else {
        return false;
    };
    let signs = [r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}]+[\r\n/]*"];
    signs.iter().any(|signs| rest == format!(r"{signs}|\s*[\r\n]+|\s+(?!\S)|\s+"))
}

/// Splits a text into pieces of at least `least` bytes, except the last, after line ends that stand alone between two
/// characters that are not spaces, the second of which is not a slash.
fn pieces(text: &str, least: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let solid = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
    for end in text.match_indices('\n').map(|(at, _)| at + 1) {
        let next = text[end..].chars().next();
        let alone = || solid(text[..end - 1].chars().next_back()) && solid(next) && next != Some('/');
        if end - start >= least && alone() {
            pieces.push(&text[start..end]);
            start = end;
        }
    }
    pieces.push(&text[start..]);
    pieces
}

/// The first word with a letter that no token covers. Spaces may vanish, and with a normalizer also characters other
/// than letters and digits, such as combining accents.
///
/// The crate's offsets within a word are wrong once one of its letters has vanished, so the check is that no token
/// reaches the word's end.
fn lost<'a>(text: &'a str, taken: &[(usize, usize)], normalized: bool) -> Option<&'a str> {
    let counts = |c: char| if normalized { c.is_alphanumeric() } else { !c.is_whitespace() };
    let mut reached = 0;
    for &(start, end) in taken.iter().chain(&[(text.len(), text.len())]) {
        if let Some(gap) = text.get(reached..start)
            && let Some(at) = gap.find(counts)
        {
            let at = reached + at;
            let first = text[..at]
                .rfind(char::is_whitespace)
                .map_or(0, |space| space + text[space..].chars().next().map_or(0, char::len_utf8));
            return text[first..].split(char::is_whitespace).next();
        }
        reached = reached.max(end);
    }
    None
}

impl FileTokenizer {
    fn encode_in(&self, pieces: &[&str]) -> Result<Vec<u32>> {
        let encode = |piece: &&str| {
            // Only the slower of the two encoders returns the tokens' offsets in the text.
            let encoding = contained(|| match self.may_lose {
                true => self.inner.encode(*piece, false).map_err(|e| e.to_string()),
                false => self.inner.encode_fast(*piece, false).map_err(|e| e.to_string()),
            });
            let encoding = encoding.map_err(|e| Error::bad(format!("the tokenizer fails: {e}")))?;
            if self.may_lose
                && let Some(word) = lost(piece, encoding.get_offsets(), self.inner.get_normalizer().is_some())
            {
                let what = "the tokenizer has no token for a letter of";
                return Err(Error::bad(format!(
                    "{what} {word:?}, nor an unk_token or byte_fallback for what is unknown"
                )));
            }
            Ok(encoding.get_ids().to_vec())
        };
        let parts: Vec<Result<Vec<u32>>> = pieces.par_iter().map(encode).collect();
        Ok(parts.into_iter().collect::<Result<Vec<_>>>()?.concat())
    }
}

impl Encode for FileTokenizer {
    fn vocab(&self) -> usize {
        self.vocab
    }

    /// Adds no token of the file's post-processor, such as Llama's `<s>`, since windows are cut from one stream. Tokens
    /// that a tokenizer.json or a file beside it adds to the vocabulary are recognised in the text, as in transformers.
    fn encode(&self, text: &[u8]) -> Result<Vec<u32>> {
        let text = std::str::from_utf8(text).map_err(|e| Error::bad(not_utf8(e.valid_up_to())))?;
        match self.in_pieces {
            true => self.encode_in(&pieces(text, PIECE_BYTES)),
            false => self.encode_in(&[text]),
        }
    }
}

/// The tokenizers of a job, each loaded once.
#[derive(Default)]
pub struct Tokenizers {
    loaded: RefCell<BTreeMap<PathBuf, Arc<FileTokenizer>>>,
}

impl Tokenizers {
    /// The tokenizer at `path`; `None` for a folder without one.
    ///
    /// # Errors
    /// When there is nothing at `path`, or a file is damaged or not supported.
    pub fn open(&self, path: &Path) -> Result<Option<Arc<FileTokenizer>>> {
        if let Some(loaded) = self.loaded.borrow().get(path) {
            return Ok(Some(Arc::clone(loaded)));
        }
        let Some(parts) = Parts::find(path)? else { return Ok(None) };
        let loaded = Arc::new(parts.load()?);
        self.loaded.borrow_mut().insert(path.to_path_buf(), Arc::clone(&loaded));
        Ok(Some(loaded))
    }
}

/// A model's tokenizer as the library expects it, and its identity; bytes if it does not come from files.
pub fn cut_by(tokenizer: Option<&Arc<FileTokenizer>>) -> (data::Tokenizer, &str) {
    match tokenizer {
        Some(own) => (data::Tokenizer::Own(Arc::clone(own) as Arc<dyn Encode>), &own.identity),
        None => (data::Tokenizer::Bytes, "bytes"),
    }
}

fn not_utf8(offset: usize) -> String {
    format!("byte {offset} is not UTF-8; tokenizer = \"bytes\" takes any file")
}

/// Reads a whole file of at most [`MOST_BYTES`]; anything that is not a file is an input error, and a pipe is not
/// waited for.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io("read", path, e);
    let metadata = fs::metadata(path).map_err(io)?;
    if metadata.is_dir() {
        return Err(fault(path, "is a folder, a file is needed"));
    }
    if !metadata.is_file() {
        return Err(fault(path, "is no regular file"));
    }
    if metadata.len() > MOST_BYTES {
        return Err(fault(path, format!("{} bytes are more than the {MOST_BYTES} that are read", metadata.len())));
    }
    fs::read(path).map_err(io)
}

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread is caught and reported as the input's fault.
pub fn panics_are_contained() -> bool {
    CONTAINED.get()
}

/// Calls the crate, and reports its panics as the file's fault: it uses numbers from the file as indices.
fn contained<T>(call: impl FnOnce() -> std::result::Result<T, String>) -> std::result::Result<T, String> {
    CONTAINED.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CONTAINED.set(false);
    result.unwrap_or_else(|_| Err("it contradicts itself".into()))
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
