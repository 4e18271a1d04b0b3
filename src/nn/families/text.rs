//! What the text families share: tokens in, layers of two halves, logits over the vocabulary out.

use crate::base::{DType, Error, Result};
use crate::graph::{Builder, Graph, Mode, Value};
use crate::nn::{InputShape, Inputs};

/// A Transformer over tokens. Each of its parts is a layer of the graph, so that a cut may fall after any of them.
pub(super) trait TextModel {
    /// What the graph calls a layer, before its number.
    const LAYER: &'static str;
    /// What the graph calls a layer's first half; the second is `mlp`.
    const ATTENTION: &'static str;

    /// The key of config.json that limits the context, and the longest one.
    fn longest(&self) -> (&'static str, usize);
    /// Layers.
    fn layers(&self) -> usize;
    /// ids (B, T) -> (B, T, C).
    fn embeddings(&self, b: &mut Builder, ids: Value) -> Result<Value>;
    /// (B, T, C) -> (B, T, C); `mask` (B, T) is 1 where a key may be seen.
    fn attention(&self, b: &mut Builder, layer: usize, input: Value, mask: Option<Value>) -> Result<Value>;
    /// (B, T, C) -> (B, T, C).
    fn mlp(&self, b: &mut Builder, layer: usize, input: Value) -> Result<Value>;
    /// (B, T, C) -> logits (B, T, V).
    fn head(&self, b: &mut Builder, input: Value) -> Result<Value>;
}

/// Traces the model, for [`crate::nn::Network::trace`].
pub(super) fn trace<M: TextModel>(
    model: &M,
    mode: Mode,
    float: DType,
    batch: usize,
    inputs: &[InputShape],
) -> Result<Graph> {
    let inputs = Inputs::new(batch, float, inputs, &["input_ids", "attention_mask", "labels"])?;
    let [t] = inputs.axes("input_ids")?;
    let (key, most) = model.longest();
    if t > most {
        return Err(Error::bad(format!("input_ids: a context of {t} is over {key}, {most}")));
    }
    let mut b = Builder::new(mode, float);
    let ids = inputs.declare(&mut b, "input_ids", &[t], true)?.expect("axes() has found it");
    let mask = inputs.declare(&mut b, "attention_mask", &[t], true)?;
    let mut x = b.layer("embeddings", |b, _| model.embeddings(b, ids))?;
    let (name, half) = (M::LAYER, M::ATTENTION);
    for layer in 0..model.layers() {
        x = b.layer(format!("{name}.{layer}.{half}"), |b, _| model.attention(b, layer, x, mask))?;
        x = b.layer(format!("{name}.{layer}.mlp"), |b, _| model.mlp(b, layer, x))?;
    }
    let logits = b.layer("head", |b, _| model.head(b, x))?;
    if let Some(labels) = inputs.declare(&mut b, "labels", &[t], true)? {
        b.cross_entropy(logits, labels)?;
    }
    b.finish()
}
