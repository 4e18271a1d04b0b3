//! The named shape table: what real models ask of each op. Sizes are those of `peers.py`, so that rows pair up.
//!
//! An entry is one forward op. It is traced between parameters and a loss and differentiated like any model, and the
//! ops of its gradient are taken from that graph: shapes and element types are the graph's own.

use hydra::base::{DType, Result, Shape};
use hydra::graph::{
    Activation, AttentionOptions, Builder, Graph, Init, Mode, Node, Op, Value, WeightLayout, differentiate,
};

/// One forward op with its sizes.
#[derive(Clone, Copy, Debug)]
pub enum Spec {
    /// (rows, inputs) to (rows, outputs), with a bias.
    Linear { rows: usize, inputs: usize, outputs: usize, activation: Activation, layout: WeightLayout },
    /// (rows, inputs), which come out of a GELU, to (rows, outputs), with a bias and a residual.
    Joined { rows: usize, inputs: usize, outputs: usize },
    /// Self-attention over (batch, len, heads width).
    Attention { batch: usize, heads: usize, kv_heads: usize, len: usize, width: usize, causal: bool },
    /// Over the last axis of (rows, cols).
    LayerNorm { rows: usize, cols: usize },
    /// Over the last axis of (rows, cols), by the root mean square.
    RmsNorm { rows: usize, cols: usize },
    /// The first heads of rows of packed queries, keys and values turn by their position.
    Rotary { batch: usize, heads: usize, kv_heads: usize, len: usize, width: usize },
    /// Logits of (rows, vocabulary).
    CrossEntropy { rows: usize, vocabulary: usize },
    /// Predictions of (rows, cols).
    MeanSquaredError { rows: usize, cols: usize },
    /// As many ids as rows.
    Embedding { rows: usize, vocabulary: usize, cols: usize },
    /// (batch, len, cols) and a table of (len, cols).
    AddPosition { batch: usize, len: usize, cols: usize },
    /// Two tensors of (rows, cols).
    Add { rows: usize, cols: usize },
    /// (rows, cols).
    Activation { rows: usize, cols: usize, activation: Activation },
    /// Two tensors of (rows, cols), through SiLU.
    Glu { rows: usize, cols: usize },
    /// (rows, cols), a tenth of them.
    Dropout { rows: usize, cols: usize },
    /// Square images and kernels; padding of half the kernel.
    Conv { images: usize, channels: usize, side: usize, out: usize, kernel: usize, stride: usize },
    /// In training.
    BatchNorm { images: usize, channels: usize, side: usize },
    /// 3 x 3, stride 2, padding 1.
    MaxPool { images: usize, channels: usize, side: usize },
    /// The whole plane.
    AvgPool { images: usize, channels: usize, side: usize },
    /// Axes 1 and 2 of (batch, a, b, cols) change places.
    Transpose { batch: usize, a: usize, b: usize, cols: usize },
}

use Activation::{GeluErf, GeluTanh, None as Plain, Silu};
use WeightLayout::{InOut, OutIn};

const fn linear(rows: usize, inputs: usize, outputs: usize, activation: Activation, layout: WeightLayout) -> Spec {
    Spec::Linear { rows, inputs, outputs, activation, layout }
}

const fn attention(batch: usize, heads: usize, kv_heads: usize, len: usize, width: usize, causal: bool) -> Spec {
    Spec::Attention { batch, heads, kv_heads, len, width, causal }
}

const fn conv(channels: usize, side: usize, out: usize, kernel: usize, stride: usize) -> Spec {
    Spec::Conv { images: 128, channels, side, out, kernel, stride }
}

/// Model and place, and what stands there. GPT-2 at 8 x 1024 tokens (norms and losses of `peers.py` at 16 x 1024),
/// BERT-large at 32 x 512, ViT-B at 64 x 197, Llama 1B and Qwen3 0.6B at 4 x 2048, ResNet-50 at 128 images of
/// 224 x 224; parts of a head at 2048 rows.
const TABLE: &[(&str, Spec)] = &[
    ("square/1024", linear(1024, 1024, 1024, Plain, OutIn)),
    ("square/4096", linear(4096, 4096, 4096, Plain, OutIn)),
    ("square/8192", linear(8192, 8192, 8192, Plain, OutIn)),
    ("gpt2_124m/qkv", linear(8192, 768, 2304, Plain, InOut)),
    ("gpt2_124m/out", linear(8192, 768, 768, Plain, InOut)),
    ("gpt2_124m/up", linear(8192, 768, 3072, GeluTanh, InOut)),
    ("gpt2_124m/down", linear(8192, 3072, 768, Plain, InOut)),
    ("gpt2_124m/out joined", Spec::Joined { rows: 8192, inputs: 768, outputs: 768 }),
    ("gpt2_124m/down joined", Spec::Joined { rows: 8192, inputs: 3072, outputs: 768 }),
    ("gpt2_124m/head", linear(8192, 768, 50257, Plain, OutIn)),
    ("gpt2_124m/head padded", linear(8192, 768, 50304, Plain, OutIn)),
    ("gpt2_124m/head padded, a part", linear(2048, 768, 50304, Plain, OutIn)),
    ("gpt2_1558m/qkv", linear(8192, 1600, 4800, Plain, InOut)),
    ("gpt2_1558m/up", linear(8192, 1600, 6400, GeluTanh, InOut)),
    ("gpt2_1558m/down", linear(8192, 6400, 1600, Plain, InOut)),
    ("bert_large/up", linear(16384, 1024, 4096, GeluErf, OutIn)),
    ("vit_b/up", linear(12608, 768, 3072, GeluErf, OutIn)),
    ("llama_1b/up", linear(8192, 2048, 8192, Plain, OutIn)),
    ("llama_1b/down", linear(8192, 8192, 2048, Plain, OutIn)),
    ("llama_1b/head, a part", linear(2048, 2048, 128_256, Plain, OutIn)),
    ("gpt2_124m/attention", attention(16, 12, 12, 1024, 64, true)),
    ("gpt2_1558m/attention", attention(8, 25, 25, 1024, 64, true)),
    ("bert_large/attention", attention(32, 16, 16, 512, 64, false)),
    ("vit_b/attention", attention(64, 12, 12, 197, 64, false)),
    ("llama_1b/attention", attention(4, 32, 8, 2048, 64, true)),
    ("long/2048 x 64", attention(8, 16, 16, 2048, 64, true)),
    ("long/4096 x 128", attention(4, 16, 16, 4096, 128, true)),
    ("long/16384 x 128", attention(1, 16, 16, 16384, 128, true)),
    ("gpt2_124m/norm", Spec::LayerNorm { rows: 16384, cols: 768 }),
    ("gpt2_1558m/norm", Spec::LayerNorm { rows: 16384, cols: 1600 }),
    ("bert_large/norm", Spec::LayerNorm { rows: 16384, cols: 1024 }),
    ("wide/4096", Spec::LayerNorm { rows: 8192, cols: 4096 }),
    ("wide/8192", Spec::LayerNorm { rows: 8192, cols: 8192 }),
    ("llama_1b/norm", Spec::RmsNorm { rows: 8192, cols: 2048 }),
    ("qwen3_600m/norm of heads", Spec::RmsNorm { rows: 8192 * 16, cols: 128 }),
    ("llama_1b/rotary", Spec::Rotary { batch: 4, heads: 32, kv_heads: 8, len: 2048, width: 64 }),
    ("gpt2_124m/loss", Spec::CrossEntropy { rows: 8192, vocabulary: 50257 }),
    ("gpt2_124m/loss padded", Spec::CrossEntropy { rows: 8192, vocabulary: 50304 }),
    ("bert_large/loss", Spec::CrossEntropy { rows: 16384, vocabulary: 30522 }),
    ("vit_b/pixels", Spec::MeanSquaredError { rows: 12544, cols: 768 }),
    ("wide/150528", Spec::MeanSquaredError { rows: 64, cols: 150_528 }),
    ("gpt2_124m/tokens", Spec::Embedding { rows: 16384, vocabulary: 50257, cols: 768 }),
    ("llama_1b/tokens", Spec::Embedding { rows: 8192, vocabulary: 128_256, cols: 2048 }),
    ("gpt2_124m/positions", Spec::AddPosition { batch: 16, len: 1024, cols: 768 }),
    ("gpt2_124m/residual", Spec::Add { rows: 16384, cols: 768 }),
    ("gpt2_1558m/residual", Spec::Add { rows: 16384, cols: 1600 }),
    ("gpt2_124m/gelu", Spec::Activation { rows: 16384, cols: 3072, activation: GeluTanh }),
    ("bert_large/gelu", Spec::Activation { rows: 16384, cols: 4096, activation: GeluErf }),
    ("llama_1b/gate", Spec::Glu { rows: 8192, cols: 8192 }),
    ("gpt2_124m/dropout", Spec::Dropout { rows: 16384, cols: 768 }),
    ("resnet50/stem", conv(3, 224, 64, 7, 2)),
    ("resnet50/1.middle", conv(64, 56, 64, 3, 1)),
    ("resnet50/1.expand", conv(64, 56, 256, 1, 1)),
    ("resnet50/2.middle", conv(128, 28, 128, 3, 1)),
    ("resnet50/2.shortcut", conv(256, 56, 512, 1, 2)),
    ("resnet50/3.stride", conv(256, 28, 256, 3, 2)),
    ("resnet50/3.middle", conv(256, 14, 256, 3, 1)),
    ("resnet50/4.middle", conv(512, 7, 512, 3, 1)),
    ("resnet50/stem norm", Spec::BatchNorm { images: 128, channels: 64, side: 112 }),
    ("resnet50/1.expand norm", Spec::BatchNorm { images: 128, channels: 256, side: 56 }),
    ("resnet50/4.expand norm", Spec::BatchNorm { images: 128, channels: 2048, side: 7 }),
    ("resnet50/pool", Spec::MaxPool { images: 128, channels: 64, side: 112 }),
    ("resnet50/last pool", Spec::AvgPool { images: 128, channels: 2048, side: 7 }),
    ("vit_b/heads", Spec::Transpose { batch: 64, a: 197, b: 12, cols: 64 }),
];

/// One op to measure: a node with the graph that it was traced in.
pub struct Case {
    /// The op, the model, the place.
    pub name: String,
    /// Of weights and activations.
    pub dtype: DType,
    /// Where it was traced.
    pub graph: Graph,
    /// Which of its nodes.
    pub node: usize,
}

impl Case {
    /// The node.
    pub fn node(&self) -> &Node {
        &self.graph.nodes[self.node]
    }

    /// Shapes of its inputs and outputs, as text.
    pub fn shapes(&self) -> String {
        let list = |values: &[Value]| {
            values.iter().map(|&v| self.graph.info(v).shape.to_string()).collect::<Vec<_>>().join(", ")
        };
        format!("{} -> {}", list(&self.node().inputs), list(&self.node().outputs))
    }
}

/// The names of all cases in both element types, with their entries; with `tiny` the shapes are a few elements.
pub fn all(tiny: bool) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for dtype in [DType::Bf16, DType::F32] {
        for (place, spec) in TABLE {
            let spec = if tiny { spec.tiny() } else { *spec };
            spec.cases(place, dtype, &mut cases)?;
        }
    }
    Ok(cases)
}

/// The largest product, for the ceiling of arithmetic; and the largest copy, for that of memory.
pub fn ceiling_product(dtype: DType, tiny: bool) -> Result<Case> {
    let n = if tiny { 32 } else { 8192 };
    let mut cases = Vec::new();
    linear(n, n, n, Plain, OutIn).cases("ceiling", dtype, &mut cases)?;
    Ok(cases.swap_remove(0))
}

/// A node that copies f32: 1 GiB there and 1 GiB back again in traffic.
pub fn ceiling_copy(tiny: bool) -> Result<Case> {
    let elems = if tiny { 1 << 8 } else { 1 << 28 };
    let mut b = Builder::new(Mode::Training, DType::F32);
    b.layer("copy", |b, _| {
        let x = b.parameter("x", [1, elems], Init::Constant(0.0))?;
        b.activation(x, Activation::Relu)
    })?;
    let mut graph = b.finish()?;
    graph.scratch = true;
    graph.nodes[0].op = Op::Copy;
    Ok(Case { name: "copy/ceiling".into(), dtype: DType::F32, graph, node: 0 })
}

impl Spec {
    /// The same op with sizes that the emulator computes in a moment.
    fn tiny(self) -> Spec {
        let few = |n: usize, most: usize| n.min(most);
        match self {
            Spec::Linear { activation, layout, .. } => {
                Spec::Linear { rows: 24, inputs: 40, outputs: 48, activation, layout }
            }
            Spec::Joined { .. } => Spec::Joined { rows: 24, inputs: 40, outputs: 48 },
            Spec::Attention { heads, kv_heads, causal, .. } => Spec::Attention {
                batch: 2,
                heads: 2,
                kv_heads: if heads == kv_heads { 2 } else { 1 },
                len: 20,
                width: 16,
                causal,
            },
            Spec::LayerNorm { cols, .. } => Spec::LayerNorm { rows: 6, cols: few(cols / 16, 64) },
            Spec::RmsNorm { .. } => Spec::RmsNorm { rows: 6, cols: 40 },
            Spec::Rotary { .. } => Spec::Rotary { batch: 2, heads: 2, kv_heads: 1, len: 5, width: 16 },
            Spec::CrossEntropy { vocabulary, .. } => Spec::CrossEntropy { rows: 6, vocabulary: 40 + vocabulary % 2 },
            Spec::MeanSquaredError { cols, .. } => Spec::MeanSquaredError { rows: 6, cols: few(cols / 16, 64) },
            Spec::Embedding { .. } => Spec::Embedding { rows: 12, vocabulary: 10, cols: 24 },
            Spec::AddPosition { .. } => Spec::AddPosition { batch: 2, len: 5, cols: 24 },
            Spec::Add { .. } => Spec::Add { rows: 6, cols: 24 },
            Spec::Activation { activation, .. } => Spec::Activation { rows: 6, cols: 24, activation },
            Spec::Glu { .. } => Spec::Glu { rows: 6, cols: 24 },
            Spec::Dropout { .. } => Spec::Dropout { rows: 6, cols: 24 },
            Spec::Conv { channels, out, kernel, stride, .. } => {
                Spec::Conv { images: 2, channels: few(channels, 8), side: 8, out: few(out, 8), kernel, stride }
            }
            Spec::BatchNorm { channels, .. } => Spec::BatchNorm { images: 2, channels: few(channels, 8), side: 5 },
            Spec::MaxPool { .. } => Spec::MaxPool { images: 2, channels: 3, side: 8 },
            Spec::AvgPool { .. } => Spec::AvgPool { images: 2, channels: 3, side: 7 },
            Spec::Transpose { .. } => Spec::Transpose { batch: 2, a: 5, b: 3, cols: 8 },
        }
    }

    /// Appends the op and the ops of its gradient.
    fn cases(&self, place: &str, dtype: DType, to: &mut Vec<Case>) -> Result<()> {
        let mut b = Builder::new(Mode::Training, dtype);
        let y = b.layer("op", |b, _| self.trace(b))?;
        let axes = b.shape(y).axes().to_vec();
        if let Spec::MeanSquaredError { .. } = self {
            let targets = b.input("targets", Shape(axes), dtype)?;
            b.mean_squared_error(y, targets)?;
        } else {
            let labels = b.input("labels", Shape(axes[..axes.len() - 1].to_vec()), DType::I32)?;
            b.cross_entropy(y, labels)?;
        }
        let mut graph = b.finish()?;
        differentiate(&mut graph)?;
        graph.scratch = true;
        for node in 0..graph.nodes.len() {
            let op = &graph.nodes[node].op;
            if self.counts(op) {
                // Of some ops the gradient is the op itself.
                let back = node >= graph.forward_nodes && op.name() == graph.nodes[0].op.name();
                let name = format!("{}/{place}{}", op.name(), if back { ", gradient" } else { "" });
                to.push(Case { name, dtype, graph: graph.clone(), node });
            }
        }
        Ok(())
    }

    /// Whether a node is what the entry is about: not its loss, nor what joins gradients.
    fn counts(&self, op: &Op) -> bool {
        match op {
            Op::CrossEntropy | Op::CrossEntropyGrad => matches!(self, Spec::CrossEntropy { .. }),
            Op::Activation(_) | Op::ActivationGrad(_) => matches!(self, Spec::Activation { .. }),
            Op::Add => matches!(self, Spec::Add { .. }),
            Op::Copy | Op::Zero | Op::UpdateRunning { .. } => false,
            _ => true,
        }
    }

    fn trace(&self, b: &mut Builder) -> Result<Value> {
        let leaf =
            |b: &mut Builder, name: &str, shape: &[usize]| b.parameter(name, Shape(shape.to_vec()), Init::Normal(1.0));
        match *self {
            Spec::Linear { rows, inputs, outputs, activation, layout } => {
                let x = leaf(b, "x", &[rows, inputs])?;
                let shape = if layout == InOut { [inputs, outputs] } else { [outputs, inputs] };
                let (weight, bias) = (leaf(b, "weight", &shape)?, leaf(b, "bias", &[outputs])?);
                b.linear(x, weight, Some(bias), activation, layout)
            }
            Spec::Joined { rows, inputs, outputs } => {
                let (x, weight) = (leaf(b, "x", &[rows, inputs])?, leaf(b, "weight", &[inputs, outputs])?);
                let (bias, residual) = (leaf(b, "bias", &[outputs])?, leaf(b, "residual", &[rows, outputs])?);
                let x = b.activation(x, GeluTanh)?;
                let y = b.linear(x, weight, Some(bias), Plain, InOut)?;
                b.add(residual, y)
            }
            Spec::Attention { batch, heads, kv_heads, len, width, causal } => {
                let options = AttentionOptions { heads, kv_heads, scale: None, causal, dropout: 0.0 };
                // GPT-2 computes the three in one product.
                if heads == kv_heads && causal {
                    let qkv = leaf(b, "qkv", &[batch, len, 3 * heads * width])?;
                    return b.attention_packed(qkv, None, options);
                }
                let q = leaf(b, "q", &[batch, len, heads * width])?;
                let (k, v) =
                    (leaf(b, "k", &[batch, len, kv_heads * width])?, leaf(b, "v", &[batch, len, kv_heads * width])?);
                b.attention(q, k, v, None, options)
            }
            Spec::LayerNorm { rows, cols } => {
                let x = leaf(b, "x", &[rows, cols])?;
                let (weight, bias) = (leaf(b, "weight", &[cols])?, leaf(b, "bias", &[cols])?);
                b.layernorm(x, weight, bias, 1e-5)
            }
            Spec::RmsNorm { rows, cols } => {
                let (x, weight) = (leaf(b, "x", &[rows, cols])?, leaf(b, "weight", &[cols])?);
                b.rmsnorm(x, weight, 1e-5)
            }
            Spec::Rotary { batch, heads, kv_heads, len, width } => {
                let qkv = leaf(b, "qkv", &[batch, len, (heads + 2 * kv_heads) * width])?;
                b.rotary(qkv, heads + kv_heads, width, 10_000.0)
            }
            Spec::CrossEntropy { rows, vocabulary } => {
                // The loss is appended to every entry; its logits must be computed.
                let x = leaf(b, "x", &[rows, vocabulary])?;
                b.activation(x, Activation::None)
            }
            Spec::MeanSquaredError { rows, cols } => {
                let x = leaf(b, "x", &[rows, cols])?;
                b.activation(x, Activation::None)
            }
            Spec::Embedding { rows, vocabulary, cols } => {
                let ids = b.input("ids", [rows], DType::I32)?;
                let table = leaf(b, "table", &[vocabulary, cols])?;
                b.embedding(ids, table)
            }
            Spec::AddPosition { batch, len, cols } => {
                let (x, table) = (leaf(b, "x", &[batch, len, cols])?, leaf(b, "table", &[len, cols])?);
                b.add_position(x, table)
            }
            Spec::Add { rows, cols } => {
                let (x, y) = (leaf(b, "x", &[rows, cols])?, leaf(b, "y", &[rows, cols])?);
                b.add(x, y)
            }
            Spec::Activation { rows, cols, activation } => {
                let x = leaf(b, "x", &[rows, cols])?;
                b.activation(x, activation)
            }
            Spec::Glu { rows, cols } => {
                let (gate, up) = (leaf(b, "gate", &[rows, cols])?, leaf(b, "up", &[rows, cols])?);
                b.glu(gate, up, Silu)
            }
            Spec::Dropout { rows, cols } => {
                let x = leaf(b, "x", &[rows, cols])?;
                b.dropout(x, 0.1)
            }
            Spec::Conv { images, channels, side, out, kernel, stride } => {
                let x = leaf(b, "x", &[images, channels, side, side])?;
                let weight = leaf(b, "weight", &[out, channels, kernel, kernel])?;
                b.conv2d(x, weight, None, stride, kernel / 2)
            }
            Spec::BatchNorm { images, channels, side } => {
                let x = leaf(b, "x", &[images, channels, side, side])?;
                b.batchnorm(x, "norm", 1e-5, 0.1)
            }
            Spec::MaxPool { images, channels, side } => {
                let x = leaf(b, "x", &[images, channels, side, side])?;
                b.max_pool(x, 3, 2, 1)
            }
            Spec::AvgPool { images, channels, side } => {
                let x = leaf(b, "x", &[images, channels, side, side])?;
                b.avg_pool(x, [side, side], 1, 0)
            }
            Spec::Transpose { batch, a, b: other, cols } => {
                let x = leaf(b, "x", &[batch, a, other, cols])?;
                b.transpose(x, &[0, 2, 1, 3])
            }
        }
    }
}
