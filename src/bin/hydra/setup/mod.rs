//! Prepares a job's models: the network, its data, and how to train it; nothing is planned yet and no weights are read.

mod checks;
mod options;
mod prepared;
pub mod recipe;
#[cfg(test)]
mod tests;

use crate::job::model::{Data, Precision, Source, TOKENIZERS, Tokenizer};
use crate::job::{self, DeviceKind, Job};
use crate::print::note;
use crate::text::Texts;
use crate::text::tokenizer::{FileTokenizer, Tokenizers, cut_by};
pub use checks::check_scope;
use checks::{check_data, check_fit};
use hydra::base::{Error, Result};
use hydra::nn;
use hydra::train::inputs_of;
use options::train_options;
use prepared::Origin;
pub use prepared::Prepared;
use recipe::Recipe;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Prepares model number `i` of the job.
///
/// # Errors
/// When a file is missing or faulty, or the parts are incompatible; the message names the file or the key.
pub fn prepare(job: &Job, i: usize, texts: &Texts) -> Result<Prepared> {
    let (model, kind) = (&job.models[i], job.devices[0].kind);
    if model.dtype == Precision::Tf32 && !matches!(kind, DeviceKind::Cuda | DeviceKind::Emulated) {
        let what = format!("tf32 goes with kind = \"cuda\", not \"{}\"; write dtype = \"f32\"", kind.word());
        return Err(model.fault("dtype", what));
    }
    let mut origin = open_network(model, None)?;
    let tokenizer = open_tokenizer(model, &texts.tokenizers)?;
    let (cut_by, identity) = cut_by(tokenizer.as_ref());
    let of_text = matches!(model.data, Data::Text { .. });
    let (vocab, identity) = (of_text.then(|| cut_by.vocab()), of_text.then(|| identity.to_string()));
    if let Source::Family { config, .. } = &model.source
        && of_text
        && !config.contains_key("vocab_size")
        && origin.network().labels().vocab.is_some()
    {
        origin = open_network(model, vocab)?;
    }
    let network = origin.network();
    check_data(model, network, vocab)?;
    let recipe = Recipe {
        data: model.data.clone(),
        tokenizer,
        valid: model.valid.clone(),
        batch: model.batch,
        seed: job.run.seed,
    };
    let sources = recipe.open(network, texts)?;
    let made = sources.train.spec();
    check_fit(model, network, made.vocab, made.classes)?;
    let mut options = train_options(job, model, network, sources.train.as_ref())?;
    (options.tokenizer, options.data) = (identity, recipe.identity(texts)?);
    let companions = match &model.source {
        Source::From(dir) => texts.companions.open(dir)?,
        Source::Family { .. } => Arc::default(),
    };
    let (name, inputs) = (model.name.clone(), inputs_of(sources.train.as_ref()));
    Ok(Prepared { name, origin, options, inputs, opened: RefCell::new(Some(sources)), recipe, companions })
}

/// The network of a model; `vocab`, if given, is the vocabulary of a family's network.
fn open_network(model: &job::Model, vocab: Option<usize>) -> Result<Origin> {
    match &model.source {
        Source::From(dir) => {
            let pretrained = nn::open(dir)?;
            note_unused(dir, &pretrained.unused);
            Ok(Origin::Pretrained(Box::new(pretrained)))
        }
        Source::Family { family, config } => {
            let mut config = config.clone();
            config.extend(vocab.map(|vocab| ("vocab_size".to_string(), vocab.into())));
            let network = nn::from_config(family, &config.into()).map_err(|e| model.fault("family", e))?;
            Ok(Origin::Family(network))
        }
    }
}

thread_local! {
    /// Directories that this command has already reported, however many models and plans it opens them for.
    static NOTED: RefCell<BTreeSet<PathBuf>> = const { RefCell::new(BTreeSet::new()) };
}

/// Reports, once, which weights of a directory the network does not use.
pub fn note_unused(dir: &Path, unused: &[String]) {
    let Some(first) = unused.first() else { return };
    if !NOTED.with_borrow_mut(|noted| noted.insert(dir.to_path_buf())) {
        return;
    }
    let more = if unused.len() > 1 { format!(" and {} more", unused.len() - 1) } else { String::new() };
    note(format!("{}: weights of layers that the network has not are left out: {first}{more}", dir.display()));
}

/// The tokenizer of a model's text, where it comes from files.
fn open_tokenizer(model: &job::Model, tokenizers: &Tokenizers) -> Result<Option<Arc<FileTokenizer>>> {
    let Data::Text { tokenizer, .. } = &model.data else { return Ok(None) };
    let (path, says) = match (tokenizer, &model.source) {
        (Tokenizer::Bytes, _) => return Ok(None),
        (Tokenizer::File(path), _) => (path, ""),
        (Tokenizer::OfModel, Source::From(dir)) => (dir, "is missing, and "),
        (Tokenizer::OfModel, Source::Family { .. }) => unreachable!("a family has no directory, as its reader knows"),
    };
    let found = tokenizers.open(path).map_err(|e| match e {
        Error::BadInput(what) => model.fault("data.tokenizer", what),
        other => other,
    })?;
    found.map(Some).ok_or_else(|| {
        let what = format!("{says}{} holds no tokenizer; write {TOKENIZERS}", path.display());
        model.fault("data.tokenizer", what)
    })
}
