//! Windows of text for language models.
//!
//! A [`Text`] is one stream of tokens, cut into windows that do not overlap: window i of context T has the tokens
//! `s[i*T .. i*T + T + 1]`, one more than its inputs, so that the last position also has a token to predict:
//!
//! ```text
//!   input_ids[t] = w[t]        t in 0..T
//!   labels[t]    = w[t + 1]    already shifted; no position is lost
//! ```

use super::order::{Order, Split, check_fraction, held_out, smallest_total};
use super::{Batch, IGNORED, InputSpec, Source, Text, names};
use crate::base::{DType, Error, Result, Shape};
use std::sync::Arc;

/// How a text is divided into samples.
#[derive(Clone, Debug)]
pub struct TextOptions {
    /// Input tokens of a sample (T).
    pub context: usize,
    /// Samples in a minibatch (B).
    pub batch: usize,
    /// Fixes the order of the windows.
    pub seed: u64,
    /// The fraction of the windows to hold out, in `[0, 1)`: the last ones, their number rounded, at least one unless
    /// the fraction is 0.
    pub valid_fraction: f64,
}

/// Makes `input_ids` (B, T) and `labels` (B, T) from windows of text.
pub struct TextSource {
    text: Arc<Text>,
    /// The first token of window 0.
    start: usize,
    context: usize,
    order: Order,
    spec: InputSpec,
}

impl TextSource {
    /// Cuts `text` into windows for training and held-out ones, without copying it.
    ///
    /// Held-out windows begin after training's last label, one token later than the next window would: no token is in
    /// both. They come in order, the last minibatch padded with rows whose labels are all [`IGNORED`].
    ///
    /// # Errors
    /// When an option is out of range, or the text is too short for one training minibatch and one held-out window; the
    /// message says how many tokens are needed.
    pub fn open(text: &Arc<Text>, options: &TextOptions) -> Result<Split<TextSource>> {
        check_fraction(options.valid_fraction)?;
        let spec = spec_of(text, options)?;
        let context = options.context;
        // A label after the last window, and with held-out data also one token between the two parts.
        let between = if options.valid_fraction > 0.0 { 2 } else { 1 };
        let windows = text.tokens.len().saturating_sub(between) / context;
        let valid_windows = held_out(windows, options.valid_fraction).min(windows);
        let train_windows = windows - valid_windows;
        if train_windows < options.batch {
            let needed = smallest_total(options.batch, options.valid_fraction);
            return Err(too_short(text, options, needed as u128 * context as u128 + between as u128));
        }
        let source = |start: usize, order: Order| TextSource {
            text: Arc::clone(text),
            start,
            context,
            spec: InputSpec { samples: Some(order.samples() as u64), ..spec.clone() },
            order,
        };
        let valid = (valid_windows > 0)
            .then(|| source(train_windows * context + 1, Order::in_order(valid_windows, options.batch)));
        Ok(Split { train: source(0, Order::shuffled(train_windows, options.batch, options.seed)), valid })
    }

    /// Cuts text that is entirely held out: every window in order, the last minibatch padded as in
    /// [`open`](Self::open). `seed` and `valid_fraction` are ignored.
    ///
    /// # Errors
    /// When an option is out of range, or the text is shorter than one window.
    pub fn open_valid(text: &Arc<Text>, options: &TextOptions) -> Result<TextSource> {
        let spec = spec_of(text, options)?;
        let windows = text.tokens.len().saturating_sub(1) / options.context;
        if windows == 0 {
            return Err(too_short(text, options, options.context as u128 + 1));
        }
        let order = Order::in_order(windows, options.batch);
        let spec = InputSpec { samples: Some(windows as u64), ..spec };
        Ok(TextSource { text: Arc::clone(text), start: 0, context: options.context, order, spec })
    }
}

fn spec_of(text: &Text, options: &TextOptions) -> Result<InputSpec> {
    if options.context == 0 {
        return Err(Error::bad("the context of a text must be at least one token; it is 0"));
    }
    let tensor = |name: &str| (name.to_string(), DType::I32, Shape::from([options.context]));
    let spec = InputSpec::new(vec![tensor(names::INPUT_IDS), tensor(names::LABELS)], options.batch)?;
    let vocab = Some(text.vocab());
    Ok(InputSpec { vocab, classes: vocab, ..spec })
}

fn too_short(text: &Text, options: &TextOptions, needed: u128) -> Error {
    let held_out = if options.valid_fraction > 0.0 { " beside the held-out part" } else { "" };
    Error::bad(format!(
        "{}: the text has {} {}; batch {} of context {}{held_out} needs at least {needed}",
        text.name,
        text.tokens.len(),
        text.unit,
        options.batch,
        options.context
    ))
}

impl Source for TextSource {
    fn spec(&self) -> &InputSpec {
        &self.spec
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        batch.conform(&self.spec);
        let [input_ids, labels] = batch.tensors.as_mut_slice() else {
            unreachable!("the minibatch has just been made that of a specification with two tensors")
        };
        let rows = input_ids.as_i32_mut().chunks_exact_mut(self.context);
        let label_rows = labels.as_i32_mut().chunks_exact_mut(self.context);
        for ((ids, labels), window) in rows.zip(label_rows).zip(self.order.rows(index)) {
            let Some(window) = window else {
                ids.fill(0);
                labels.fill(IGNORED);
                continue;
            };
            let first = self.start + window * self.context;
            self.text.tokens.window(first, ids, labels);
        }
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        self.order.batches_per_epoch()
    }
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
