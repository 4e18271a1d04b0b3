//! The texts of a job, their tokenizers, and the other files of its models' directories; models that read the same
//! files share them.

mod added_tokens;
pub mod companions;
pub mod tokenizer;

use companions::Companions;
use hydra::base::Result;
use hydra::data::Text;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use tokenizer::{FileTokenizer, Tokenizers, cut_by};

/// The texts of a job and their tokenizers, each read once.
#[derive(Default)]
pub struct Texts {
    /// The tokenizers.
    pub tokenizers: Tokenizers,
    /// The other files in the directories of its initial models.
    pub companions: Companions,
    /// Texts in use, kept alive only by the models that read them.
    read: RefCell<BTreeMap<Key, Weak<Text>>>,
    /// Texts that stay in memory without readers; `None` if none do.
    kept: Option<RefCell<Vec<Arc<Text>>>>,
}

/// A text's canonical paths, and its tokenizer's identity.
type Key = (Vec<PathBuf>, String);

impl Texts {
    /// Makes texts that stay in memory once read, for successive jobs on the same texts.
    pub fn kept() -> Texts {
        Texts { kept: Some(RefCell::default()), ..Texts::default() }
    }

    /// The text at `paths`, cut by `tokenizer` or else into bytes. A text in use is not read again, whatever has
    /// happened to its files.
    ///
    /// # Errors
    /// As [`Text::read`].
    pub fn open(&self, paths: &[PathBuf], tokenizer: Option<&Arc<FileTokenizer>>) -> Result<Arc<Text>> {
        let (cut_by, identity) = cut_by(tokenizer);
        // Missing files are reported when they are read.
        let places = paths.iter().map(|path| fs::canonicalize(path).unwrap_or_else(|_| path.clone())).collect();
        let key = (places, identity.to_string());
        if let Some(text) = self.read.borrow().get(&key).and_then(Weak::upgrade) {
            return Ok(text);
        }
        let text = Text::read(paths, &cut_by)?;
        self.read.borrow_mut().insert(key, Arc::downgrade(&text));
        self.kept.iter().for_each(|kept| kept.borrow_mut().push(Arc::clone(&text)));
        Ok(text)
    }
}

#[cfg(test)]
mod tests;
