//! Text, tokens and images become minibatches, in a seeded order, ahead of need on their own thread.
//!
//! A [`Source`] makes minibatch number `index` from `index` alone, so that a run can resume anywhere and two runs with
//! the same seed see the same bits. A [`Loader`] runs a source ahead and recycles its buffers. The tensors of a
//! minibatch:
//!
//! | tensor | shape | element | |
//! | --- | --- | --- | --- |
//! | `input_ids` | (B, T) | i32 | token ids |
//! | `attention_mask` | (B, T) | i32 | 1 for a token, 0 for padding; left out where there is no padding |
//! | `pixel_values` | (B, C, H, W) | f32 | normalised pixels |
//! | `labels` | (B, T) or (B) | i32 | the target of position t, or [`IGNORED`] |
//! | | (B, .., C) | f32 | or the target numbers |
//!
//! `labels` are never shifted again downstream: for a language model `labels[b, t]` is already the token after
//! `input_ids[b, t]`.

mod batch;
mod batches;
mod checks;
mod files;
mod images;
mod loader;
mod order;
mod random;
mod text;
mod tokens;

pub use batch::{Batch, BatchTensor, InputSpec};
pub use batches::{BatchesOptions, BatchesSource};
pub(crate) use checks::check_tensor;
pub use checks::{check_ids, labelled};
pub use images::{ImageFiles, ImageOptions, ImageSource};
pub use loader::{DEFAULT_AHEAD, Loader};
pub use order::Split;
pub use random::{RandomOptions, RandomSource};
pub use text::{TextOptions, TextSource};
pub use tokens::{Encode, Text, Tokenizer};

pub use crate::base::IGNORED;
use crate::base::Result;

/// The names of the tensors that sources make.
pub mod names {
    /// Token ids, (B, T), i32.
    pub const INPUT_IDS: &str = "input_ids";
    /// 1 for a token and 0 for padding, (B, T), i32.
    pub const ATTENTION_MASK: &str = "attention_mask";
    /// Normalised pixels, (B, C, H, W), f32.
    pub const PIXEL_VALUES: &str = "pixel_values";
    /// What to predict: classes (B, T) or (B), i32, or numbers (B, .., C), f32.
    pub const LABELS: &str = "labels";
}

/// Makes minibatches by number.
pub trait Source: Send {
    /// Describes every minibatch of this source; known before the first is made.
    fn spec(&self) -> &InputSpec;

    /// Overwrites `batch` with minibatch `index`, which counts from 0 over all epochs. A pure function of the source's
    /// options and `index`. Allocates almost nothing when this source has filled `batch` before.
    ///
    /// # Errors
    /// When the source has no such minibatch, or its file cannot be read or contains invalid values. The content of
    /// `batch` is then unspecified.
    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()>;

    /// Minibatches in one pass over the data; `u64::MAX` where the data never ends.
    fn batches_per_epoch(&self) -> u64;
}
