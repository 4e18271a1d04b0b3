//! The texts of a job, what cuts them into tokens, and what lies beside its models: those that read the same files have
//! them once.

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

/// The texts of a job and what cuts them, each read once.
#[derive(Default)]
pub struct Texts {
    /// What cuts them.
    pub tokenizers: Tokenizers,
    /// What lies beside the models that it begins with.
    pub companions: Companions,
    /// Those that a model reads, which alone holds on to them.
    read: RefCell<BTreeMap<Key, Weak<Text>>>,
    /// Those that stay, whoever reads them; `None` where none does.
    kept: Option<RefCell<Vec<Arc<Text>>>>,
}

/// Where a text lies, by whatever way one gets there, and the identity of what cuts it.
type Key = (Vec<PathBuf>, String);

impl Texts {
    /// Those that stay once they were read: for jobs on the same texts, one after another.
    pub fn kept() -> Texts {
        Texts { kept: Some(RefCell::default()), ..Texts::default() }
    }

    /// The text at `paths`, cut by `tokenizer` or else into bytes. What is being read is not looked at again, whatever
    /// has become of its files.
    ///
    /// # Errors
    /// As [`Text::read`].
    pub fn open(&self, paths: &[PathBuf], tokenizer: Option<&Arc<FileTokenizer>>) -> Result<Arc<Text>> {
        let (cut_by, identity) = cut_by(tokenizer);
        // What is not there is told by who reads it.
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
