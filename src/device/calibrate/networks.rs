//! The networks that calibration walks: together they cover every family of ops in small, medium and large sizes.

use crate::base::{DType, Result, Shape};
use crate::graph::{Activation, AttentionOptions, Builder, Graph, Init, Mode, Value, WeightLayout};

/// Ids and labels are below this.
pub(super) const CLASSES: usize = 10;

/// All networks for the host, smallest first. In f32: the host computes in f32 whatever the element type.
pub(super) fn all() -> Result<Vec<Graph>> {
    let float = DType::F32;
    Ok(vec![
        transformer(float, 2, 32, 64, 1, 64)?,
        transformer(float, 4, 64, 128, 4, 256)?,
        transformer(float, 1, 256, 128, 2, 1024)?,
        transformer(float, 2, 128, 256, 8, 512)?,
        transformer(float, 1, 256, 512, 8, 512)?,
        transformer(float, 4, 256, 384, 6, 256)?,
        images(float, 8, 32, 16)?,
        images(float, 4, 48, 24)?,
        images(float, 8, 16, 64)?,
    ])
}

/// Networks that fill a GPU, in each element type that models train in there; where their graphs allow tf32, products
/// are timed in it too. In smaller networks start-up costs would dominate an op's time.
pub(super) fn large() -> Result<Vec<Graph>> {
    let mut graphs = Vec::new();
    for float in [DType::F32, DType::Bf16] {
        graphs.push(transformer(float, 4, 256, 512, 8, 4096)?);
        graphs.push(transformer(float, 4, 1024, 768, 12, 16_384)?);
        graphs.push(transformer(float, 2, 1024, 1600, 25, 8192)?);
        graphs.push(images(float, 32, 64, 64)?);
        graphs.push(images(float, 32, 28, 256)?);
    }
    Ok(graphs)
}

/// Embeddings, one block as in GPT-2, and a head over `vocabulary`: (B, T, C), heads.
fn transformer(float: DType, batch: usize, len: usize, width: usize, heads: usize, vocabulary: usize) -> Result<Graph> {
    let mut b = Builder::new(Mode::Training, float);
    let logits = b.layer("transformer", |b, _| {
        let ids = b.input("ids", [batch, len], DType::I32)?;
        let table = parameter(b, "table", &[vocabulary, width])?;
        let positions = parameter(b, "positions", &[len, width])?;
        let x = b.embedding(ids, table)?;
        let x = b.add_position(x, positions)?;
        let x = b.dropout(x, 0.1)?;
        let n = norm(b, x, "norm 1", width)?;
        let qkv = linear(b, n, "qkv", width, 3 * width, Activation::None)?;
        let options = AttentionOptions { heads, kv_heads: heads, scale: None, causal: true, dropout: 0.1 };
        let a = b.attention_packed(qkv, None, options)?;
        let a = linear(b, a, "out", width, width, Activation::None)?;
        let x = b.add(x, a)?;
        let n = norm(b, x, "norm 2", width)?;
        let h = linear(b, n, "up", width, 4 * width, Activation::GeluTanh)?;
        let h = linear(b, h, "down", 4 * width, width, Activation::None)?;
        let h = b.dropout(h, 0.1)?;
        let x = b.add(x, h)?;
        // An activation of its own, whose gradient is not fused with a product's.
        let x = b.activation(x, Activation::GeluTanh)?;
        let n = norm(b, x, "norm 3", width)?;
        b.linear(n, table, None, Activation::None, WeightLayout::OutIn)
    })?;
    finish(b, logits, &[batch, len])
}

/// A residual network's kinds of convolution on square images: 3x3 from few channels, 3x3 and 1x1 between many, 3x3
/// with a stride, and pooling.
fn images(float: DType, batch: usize, side: usize, channels: usize) -> Result<Graph> {
    let mut b = Builder::new(Mode::Training, float);
    let logits = b.layer("images", |b, _| {
        let x = b.input("image", [batch, 3, side, side], float)?;
        let x = convolution(b, x, "stem", [channels, 3], 3, 1)?;
        let y = convolution(b, x, "same", [channels, channels], 3, 1)?;
        let x = b.add(x, y)?;
        let x = b.max_pool(x, 3, 2, 1)?;
        let x = convolution(b, x, "wide", [2 * channels, channels], 1, 1)?;
        let x = convolution(b, x, "stride", [2 * channels, 2 * channels], 3, 2)?;
        let x = b.global_avg_pool(x)?;
        linear(b, x, "head", 2 * channels, CLASSES, Activation::None)
    })?;
    finish(b, logits, &[batch])
}

fn parameter(b: &mut Builder, name: &str, shape: &[usize]) -> Result<Value> {
    b.parameter(name, Shape(shape.to_vec()), Init::Normal(0.02))
}

fn norm(b: &mut Builder, x: Value, name: &str, width: usize) -> Result<Value> {
    let weight = parameter(b, &format!("{name} weight"), &[width])?;
    let bias = parameter(b, &format!("{name} bias"), &[width])?;
    b.layernorm(x, weight, bias, 1e-5)
}

fn linear(
    b: &mut Builder,
    x: Value,
    name: &str,
    inputs: usize,
    outputs: usize,
    activation: Activation,
) -> Result<Value> {
    let weight = parameter(b, name, &[inputs, outputs])?;
    let bias = parameter(b, &format!("{name} bias"), &[outputs])?;
    b.linear(x, weight, Some(bias), activation, WeightLayout::InOut)
}

/// A convolution without bias, normalised, with ReLU.
fn convolution(
    b: &mut Builder,
    x: Value,
    name: &str,
    [out, channels]: [usize; 2],
    kernel: usize,
    stride: usize,
) -> Result<Value> {
    let weight = parameter(b, name, &[out, channels, kernel, kernel])?;
    let x = b.conv2d(x, weight, None, stride, kernel / 2)?;
    let x = b.batchnorm(x, &format!("{name} norm"), 1e-5, 0.1)?;
    b.activation(x, Activation::Relu)
}

fn finish(mut b: Builder, logits: Value, labels: &[usize]) -> Result<Graph> {
    let labels = b.input("labels", Shape(labels.to_vec()), DType::I32)?;
    b.cross_entropy(logits, labels)?;
    b.finish()
}
