//! Text as tokens: tokenizers, and the streams of ids that they produce.
//!
//! The whole text stays in memory, shared by all its readers, so ids are stored in the narrowest type that fits the
//! vocabulary: one byte for byte tokens, two for GPT-2's 50,257 tokens.

use super::files;
use crate::base::{Error, Result};
use flate2::Crc;
use rayon::prelude::*;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// How text becomes tokens.
#[derive(Clone, Debug, Default)]
pub enum Tokenizer {
    /// Each byte is a token: a vocabulary of 256, for any file.
    #[default]
    Bytes,
    /// The caller's own.
    Own(Arc<dyn Encode>),
}

/// Cuts text into tokens. Equal texts must give equal tokens, since a minibatch's content must follow from its number
/// alone.
pub trait Encode: fmt::Debug + Send + Sync {
    /// Token ids are below this.
    fn vocab(&self) -> usize;

    /// Returns the tokens of `text`, all bytes of one file. Called for several files at once, on several threads.
    ///
    /// # Errors
    /// When the text cannot be encoded. The caller prefixes the message with the file's name.
    fn encode(&self, text: &[u8]) -> Result<Vec<u32>>;
}

impl Tokenizer {
    /// Token ids are below this.
    pub fn vocab(&self) -> usize {
        match self {
            Tokenizer::Bytes => 256,
            Tokenizer::Own(own) => own.vocab(),
        }
    }

    /// What its tokens are called in messages.
    fn unit(&self) -> &'static str {
        match self {
            Tokenizer::Bytes => "bytes",
            Tokenizer::Own(_) => "tokens",
        }
    }
}

/// A text, read and cut into tokens once; any number of [`TextSource`](super::TextSource)s share them.
pub struct Text {
    pub(super) tokens: Tokens,
    vocab: usize,
    /// What its tokens are called in messages.
    pub(super) unit: &'static str,
    /// The text's own name: its first file or folder, and how many more there are.
    pub(super) name: String,
    /// Computed when it is first asked for.
    identity: OnceLock<String>,
}

impl Text {
    /// Reads `paths`, one after another, into one stream: files, and folders, of which `*.rs`, `*.md` and `*.txt` files
    /// are read in the order of their paths. Hidden folders and those called `target` are left out.
    ///
    /// A file is encoded whole, and nothing is inserted between two files: a separator token, such as GPT-2 had between
    /// its documents, must be written in the text.
    ///
    /// # Errors
    /// When a file is missing or cannot be encoded, or an id or the vocabulary is out of range; of several faulty files
    /// the first is named.
    pub fn read(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Arc<Text>> {
        let tokens = Tokens::read(paths, tokenizer)?;
        let first = paths.first().map_or_else(|| "no file".to_string(), |path| path.display().to_string());
        let name = match paths.len() {
            0 | 1 => first,
            n => format!("{first} and {} more", n - 1),
        };
        Ok(Arc::new(Text { tokens, vocab: tokenizer.vocab(), unit: tokenizer.unit(), name, identity: OnceLock::new() }))
    }

    /// A string that identifies the tokens, whatever files they come from.
    pub fn identity(&self) -> &str {
        self.identity.get_or_init(|| {
            let mut crc = Crc::new();
            match &self.tokens {
                Tokens::U8(all) => crc.update(all),
                Tokens::U16(all) => crc.update(bytemuck::cast_slice(all)),
                Tokens::U32(all) => crc.update(bytemuck::cast_slice(all)),
            }
            format!("{} {} with CRC-32 {:08x}", self.tokens.len(), self.unit, crc.sum())
        })
    }

    /// Token ids are below this.
    pub fn vocab(&self) -> usize {
        self.vocab
    }
}

/// A sequence of token ids.
pub(super) enum Tokens {
    U8(Vec<u8>),
    U16(Vec<u16>),
    U32(Vec<u32>),
}

impl Tokens {
    /// The stream of [`Text::read`], with its errors.
    fn read(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Tokens> {
        let files = files::text_files(paths)?;
        let own = match tokenizer {
            Tokenizer::Bytes => {
                let mut all = Vec::new();
                for path in files {
                    all.append(&mut files::read(&path)?);
                }
                return Ok(Tokens::U8(all));
            }
            Tokenizer::Own(own) => own.as_ref(),
        };
        let vocab = own.vocab();
        if vocab == 0 || vocab > i32::MAX as usize {
            return Err(Error::bad(format!("the tokenizer has a vocabulary of {vocab}; want 1 to {}", i32::MAX)));
        }
        // Pieces keep the files' order, whichever thread made them.
        let pieces: Vec<Result<Tokens>> = files.par_iter().map(|path| Tokens::of_file(path, own, vocab)).collect();
        let mut all = Tokens::narrowed(Vec::new(), vocab);
        for piece in pieces {
            all.append(piece?);
        }
        Ok(all)
    }

    fn of_file(path: &Path, own: &dyn Encode, vocab: usize) -> Result<Tokens> {
        let fault = |what: &dyn fmt::Display| Error::bad(format!("{}: {what}", path.display()));
        let ids = own.encode(&files::read(path)?).map_err(|e| match e {
            Error::BadInput(what) => fault(&what),
            other => other,
        })?;
        match ids.iter().position(|&id| id as usize >= vocab) {
            Some(at) => Err(fault(&format!("token {at} is {}, beyond the tokenizer's vocabulary of {vocab}", ids[at]))),
            None => Ok(Tokens::narrowed(ids, vocab)),
        }
    }

    /// `ids`, all below `vocab`, in the narrowest type that fits them.
    fn narrowed(ids: Vec<u32>, vocab: usize) -> Tokens {
        match vocab {
            0..=0x100 => Tokens::U8(ids.into_iter().map(|id| id as u8).collect()),
            0x101..=0x1_0000 => Tokens::U16(ids.into_iter().map(|id| id as u16).collect()),
            _ => Tokens::U32(ids),
        }
    }

    fn append(&mut self, piece: Tokens) {
        match (self, piece) {
            (Tokens::U8(all), Tokens::U8(mut piece)) => all.append(&mut piece),
            (Tokens::U16(all), Tokens::U16(mut piece)) => all.append(&mut piece),
            (Tokens::U32(all), Tokens::U32(mut piece)) => all.append(&mut piece),
            _ => unreachable!("one vocabulary has one width"),
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            Tokens::U8(all) => all.len(),
            Tokens::U16(all) => all.len(),
            Tokens::U32(all) => all.len(),
        }
    }

    /// Copies the tokens from `first` on into `ids`, and each one's successor into `labels`, which has the same length.
    pub fn window(&self, first: usize, ids: &mut [i32], labels: &mut [i32]) {
        match self {
            Tokens::U8(all) => copy(&all[first..], |&id| i32::from(id), ids, labels),
            Tokens::U16(all) => copy(&all[first..], |&id| i32::from(id), ids, labels),
            // Every id is below the vocabulary's size, which is at most i32::MAX.
            Tokens::U32(all) => copy(&all[first..], |&id| id as i32, ids, labels),
        }
    }
}

fn copy<T>(tokens: &[T], wide: impl Fn(&T) -> i32, ids: &mut [i32], labels: &mut [i32]) {
    let tokens = &tokens[..=ids.len()];
    for t in 0..ids.len() {
        ids[t] = wide(&tokens[t]);
        labels[t] = wide(&tokens[t + 1]);
    }
}

#[cfg(test)]
#[path = "tokens_tests.rs"]
mod tests;
