//! ResNet for image classification (He, Zhang, Ren & Sun 2015, arXiv:1512.03385), as transformers'
//! `ResNetForImageClassification` computes it: the stride lies in the 3x3 convolution of a bottleneck.
//!
//! A cut may fall after the stem and after every residual block.

use super::classes::{classes, with_named_classes};
use super::{ACTIVATIONS, Customs, Family};
use crate::base::{DType, Error, Result};
use crate::graph::{Activation, Builder, Graph, Init, Mode, Value, WeightLayout};
use crate::nn::fields::Fields;
use crate::nn::layers::{ConvNorm, Linear};
use crate::nn::{InputShape, Inputs, Labels, Network};
use serde_json::{Map, json};

pub(super) const FAMILY: Family = Family {
    name: "resnet",
    architecture: ARCHITECTURE,
    files: Customs::NONE,
    build: |fields| Ok(Box::new(ResNet::read(fields)?)),
};

const ARCHITECTURE: &str = "ResNetForImageClassification";
/// A bottleneck is this many times narrower inside.
const REDUCTION: usize = 4;
/// More blocks than this are a mistake: the deepest published networks have 50 bottlenecks, or basic blocks for 1202
/// layers.
const MOST_BLOCKS: usize = 1024;
const MOST_STAGES: usize = 32;
const MOST_CHANNELS: usize = 1 << 16;

/// A ResNet, described by transformers' `ResNetConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct ResNet {
    /// Channels of the image.
    pub channels: usize,
    /// Channels after the stem.
    pub embedding_size: usize,
    /// Channels after each stage.
    pub hidden_sizes: Vec<usize>,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Blocks of 1x1, 3x3 and 1x1 convolutions instead of two 3x3 ones.
    pub bottleneck: bool,
    /// After the stem, and after the sum that ends a block; inside a block it is always ReLU, as in transformers.
    pub activation: Activation,
    /// Whether the first stage halves the image, as the others do.
    pub downsample_in_first_stage: bool,
    /// Whether a bottleneck's stride lies in its first convolution.
    pub downsample_in_bottleneck: bool,
    /// Classes.
    pub classes: usize,
    given: Map<String, serde_json::Value>,
}

/// One residual block.
struct Block {
    name: String,
    inputs: usize,
    outputs: usize,
    stride: usize,
}

impl ResNet {
    fn read(f: &Fields) -> Result<ResNet> {
        let resnet = ResNet {
            channels: f.count("num_channels", 3, 1..=MOST_CHANNELS)?,
            embedding_size: f.count("embedding_size", 64, 1..=MOST_CHANNELS)?,
            hidden_sizes: f.counts("hidden_sizes", &[256, 512, 1024, 2048], 1..=MOST_CHANNELS, MOST_STAGES)?,
            depths: f.counts("depths", &[3, 4, 6, 3], 1..=MOST_BLOCKS, MOST_STAGES)?,
            bottleneck: f.word("layer_type", true, &[("bottleneck", true), ("basic", false)])?,
            activation: f.word("hidden_act", Activation::Relu, &ACTIVATIONS)?,
            downsample_in_first_stage: f.flag("downsample_in_first_stage", false)?,
            downsample_in_bottleneck: f.flag("downsample_in_bottleneck", false)?,
            classes: classes(f)?,
            given: f.map().clone(),
        };
        f.finish(&["out_features", "out_indices", "stage_names"])?;
        let (sizes, depths) = (resnet.hidden_sizes.len(), resnet.depths.len());
        if sizes != depths {
            return Err(f.fault("depths", format!("has {depths} stages, hidden_sizes {sizes}")));
        }
        let blocks: usize = resnet.depths.iter().sum();
        if blocks > MOST_BLOCKS {
            return Err(f.fault("depths", format!("{blocks} blocks in all; {MOST_BLOCKS} are supported")));
        }
        if let Some(&narrow) = resnet.hidden_sizes.iter().find(|&&size| resnet.bottleneck && size < REDUCTION) {
            return Err(
                f.fault("hidden_sizes", format!("{narrow} is too few; a bottleneck keeps one channel in {REDUCTION}"))
            );
        }
        Ok(resnet)
    }

    fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        let mut inputs = self.embedding_size;
        for (stage, (&outputs, &depth)) in self.hidden_sizes.iter().zip(&self.depths).enumerate() {
            for layer in 0..depth {
                let halves = layer == 0 && (stage > 0 || self.downsample_in_first_stage);
                let stride = if halves { 2 } else { 1 };
                blocks.push(Block { name: format!("stages.{stage}.layers.{layer}"), inputs, outputs, stride });
                inputs = outputs;
            }
        }
        blocks
    }

    /// The convolutions of a block, in order; the residual is added before the last one's activation.
    fn convolutions(&self, block: &Block) -> Vec<ConvNorm> {
        let (outputs, stride, activation) = (block.outputs, block.stride, Activation::Relu);
        let last = Activation::None;
        if !self.bottleneck {
            return vec![
                ConvNorm { outputs, kernel: 3, stride, activation },
                ConvNorm { outputs, kernel: 3, stride: 1, activation: last },
            ];
        }
        let narrow = outputs / REDUCTION;
        let [first, second] = if self.downsample_in_bottleneck { [stride, 1] } else { [1, stride] };
        vec![
            ConvNorm { outputs: narrow, kernel: 1, stride: first, activation },
            ConvNorm { outputs: narrow, kernel: 3, stride: second, activation },
            ConvNorm { outputs, kernel: 1, stride: 1, activation: last },
        ]
    }

    fn stem(&self, b: &mut Builder, pixels: Value) -> Result<Value> {
        let stem = ConvNorm { outputs: self.embedding_size, kernel: 7, stride: 2, activation: self.activation };
        let x = stem.trace(b, pixels, "resnet.embedder.embedder")?;
        b.max_pool(x, 3, 2, 1)
    }

    fn block(&self, b: &mut Builder, block: &Block, input: Value) -> Result<Value> {
        let name = format!("resnet.encoder.{}", block.name);
        let mut x = input;
        for (k, convolution) in self.convolutions(block).iter().enumerate() {
            x = convolution.trace(b, x, &format!("{name}.layer.{k}"))?;
        }
        let mut residual = input;
        if block.inputs != block.outputs || block.stride != 1 {
            let (outputs, stride) = (block.outputs, block.stride);
            let shortcut = ConvNorm { outputs, kernel: 1, stride, activation: Activation::None };
            residual = shortcut.trace(b, input, &format!("{name}.shortcut"))?;
        }
        let sum = b.add(x, residual)?;
        b.activation(sum, self.activation)
    }

    /// Initial weight and bias are uniform in plus or minus 1 / sqrt(K), torch's default for a linear layer.
    fn classifier(&self, b: &mut Builder, input: Value) -> Result<Value> {
        let x = b.global_avg_pool(input)?;
        let uniform = Init::Uniform((b.shape(x).cols() as f64).sqrt().recip());
        let (layout, activation) = (WeightLayout::OutIn, Activation::None);
        Linear { outputs: self.classes, layout, weight: uniform, bias: Some(uniform), activation }.trace(
            b,
            x,
            "classifier.1",
        )
    }
}

impl Network for ResNet {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &["pixel_values", "labels"])?;
        let [channels, height, width] = inputs.axes("pixel_values")?;
        if channels != self.channels {
            return Err(Error::bad(format!("pixel_values: {channels} channels, want num_channels, {}", self.channels)));
        }
        let mut b = Builder::new(mode, float);
        let image = [channels, height, width];
        let pixels = inputs.declare(&mut b, "pixel_values", &image, false)?.expect("axes() has found it");
        let labels = inputs.declare(&mut b, "labels", &[], true)?;
        if labels.is_some() && self.classes == 1 {
            return Err(Error::bad("labels: one class makes this a regression, which is not supported"));
        }
        let mut x = b.layer("embedder", |b, _| self.stem(b, pixels))?;
        for block in self.blocks() {
            x = b.layer(block.name.clone(), |b, _| self.block(b, &block, x))?;
        }
        let logits = b.layer("classifier", |b, _| self.classifier(b, x))?;
        if let Some(labels) = labels {
            b.cross_entropy(logits, labels)?;
        }
        b.finish()
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new("pixel_values", [self.channels, 224, 224], DType::F32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: false, classes: self.classes, vocab: None }
    }

    fn config(&self) -> serde_json::Value {
        let settings = json!({
            "num_channels": self.channels,
            "embedding_size": self.embedding_size,
            "hidden_sizes": self.hidden_sizes,
            "depths": self.depths,
            "layer_type": if self.bottleneck { "bottleneck" } else { "basic" },
            "hidden_act": super::activation_name(self.activation),
            "downsample_in_first_stage": self.downsample_in_first_stage,
            "downsample_in_bottleneck": self.downsample_in_bottleneck,
        });
        super::whole_config(&FAMILY, &with_named_classes(&self.given, self.classes), settings)
    }
}
