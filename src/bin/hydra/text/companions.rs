//! Files in a model's directory that describe how its inputs are made, and that are saved with it.
//!
//! Only files with known names are taken. Their bytes are kept as read, whatever happens to the files meanwhile.

use crate::text::tokenizer;
use hydra::base::Result;
use hydra::data::{ImageFiles, ImageOptions};
use serde_json::json;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How images become inputs.
pub const PREPROCESSOR: &str = "preprocessor_config.json";
/// Files that are saved with the model whatever it is trained on.
const OF_ANY: [&str; 2] = [PREPROCESSOR, "processor_config.json"];
/// How text becomes tokens: files that are saved with the model unless another tokenizer replaces them.
const OF_TEXT: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Files by their plain names.
pub type Files = Vec<(String, Vec<u8>)>;

/// The directories of a job, each read once.
#[derive(Default)]
pub struct Companions {
    read: RefCell<BTreeMap<PathBuf, Arc<Files>>>,
}

impl Companions {
    /// The known files in `folder`.
    ///
    /// # Errors
    /// When one is not a file, is too long, or cannot be read.
    pub fn open(&self, folder: &Path) -> Result<Arc<Files>> {
        if let Some(files) = self.read.borrow().get(folder) {
            return Ok(Arc::clone(files));
        }
        let there =
            OF_ANY.iter().chain(&OF_TEXT).map(|name| (name, folder.join(name))).filter(|(_, path)| path.exists());
        let read = there.map(|(name, path)| Ok((name.to_string(), tokenizer::read(&path)?)));
        let files = Arc::new(read.collect::<Result<Files>>()?);
        self.read.borrow_mut().insert(folder.to_path_buf(), Arc::clone(&files));
        Ok(files)
    }
}

/// Adds to `files` those of `companions` that they lack; `of_text` says whether to include those about text.
pub fn complete(files: &mut Files, companions: &Files, of_text: bool) {
    for (name, bytes) in companions {
        if (of_text || OF_ANY.contains(&name.as_str())) && files.iter().all(|(other, _)| other != name) {
            files.push((name.clone(), bytes.clone()));
        }
    }
}

/// The [`PREPROCESSOR`] of images of `axes` (C, H, W) as made from IDX and CIFAR-10 files. transformers uses ViT's
/// processor for any kind of image model.
pub fn preprocessor(axes: [usize; 3]) -> (String, Vec<u8>) {
    let scaling = ImageOptions::new(ImageFiles::Cifar10 { files: Vec::new() });
    let [channels, height, width] = axes;
    let json = json!({
        "image_processor_type": "ViTImageProcessor",
        "do_resize": false,
        "size": { "height": height, "width": width },
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": vec![scaling.mean; channels],
        "image_std": vec![scaling.std; channels],
    });
    (PREPROCESSOR.to_string(), format!("{json:#}\n").into_bytes())
}
