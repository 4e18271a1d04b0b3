//! Vision Transformer for image classification (Dosovitskiy et al. 2020, arXiv:2010.11929), as transformers'
//! `ViTForImageClassification` computes it: an image's tokens are a class token and then its patches.
//!
//! A cut may fall after the embeddings, and after either half of a layer: attention, or the MLP.

use super::classes::{classes, with_named_classes};
use super::{ACTIVATIONS, Customs, Family};
use crate::base::{DType, Error, Result};
use crate::graph::{Activation, AttentionOptions, Builder, Graph, Init, Mode, Value};
use crate::nn::fields::Fields;
use crate::nn::layers::{Linear, layernorm, self_attention};
use crate::nn::{InputShape, Inputs, Labels, Network};
use serde_json::{Map, json};

pub(super) const FAMILY: Family = Family {
    name: "vit",
    architecture: "ViTForImageClassification",
    files: Customs::NONE,
    build: |fields| Ok(Box::new(Vit::read(fields)?)),
};

/// More layers than this are a mistake.
const MOST_LAYERS: usize = 1024;

/// A Vision Transformer, described by transformers' `ViTConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct Vit {
    /// C: `hidden_size`, 768 by default.
    pub width: usize,
    /// `num_hidden_layers`, 12 by default.
    pub layers: usize,
    /// H, which divides C: `num_attention_heads`, 12 by default.
    pub heads: usize,
    /// Width inside the MLP: `intermediate_size`, 3072 by default.
    pub inner: usize,
    /// Inside the MLP: `hidden_act`, gelu by default.
    pub activation: Activation,
    /// Dropout of the embeddings and of each half layer's output before the residual sum: `hidden_dropout_prob`, 0 by
    /// default.
    pub hidden_dropout: f64,
    /// Dropout of attention weights: `attention_probs_dropout_prob`, 0 by default.
    pub attention_dropout: f64,
    /// Standard deviation of initial weights, class token and position embeddings: `initializer_range`, 0.02 by
    /// default.
    pub initializer_range: f64,
    /// Layer normalisation's epsilon: `layer_norm_eps`, 1e-12 by default.
    pub epsilon: f64,
    /// Height and width of the image: `image_size`, 224 by default.
    pub image: usize,
    /// Height and width of a patch; a remainder at the image's right and bottom edges is ignored: `patch_size`, 16 by
    /// default.
    pub patch: usize,
    /// Channels of the image: `num_channels`, 3 by default.
    pub channels: usize,
    /// Whether queries, keys and values have a bias: `qkv_bias`, true by default.
    pub qkv_bias: bool,
    /// Classes: `num_labels`, or the names in `id2label`; 2 by default.
    pub classes: usize,
    given: Map<String, serde_json::Value>,
}

impl Vit {
    fn read(f: &Fields) -> Result<Vit> {
        let vit = Vit {
            width: f.count("hidden_size", 768, 1..=1 << 20)?,
            layers: f.count("num_hidden_layers", 12, 1..=MOST_LAYERS)?,
            heads: f.count("num_attention_heads", 12, 1..=1 << 20)?,
            inner: f.count("intermediate_size", 3072, 1..=1 << 24)?,
            activation: f.word("hidden_act", Activation::GeluErf, &ACTIVATIONS)?,
            hidden_dropout: f.dropout("hidden_dropout_prob", 0.0)?,
            attention_dropout: f.dropout("attention_probs_dropout_prob", 0.0)?,
            initializer_range: f.deviation("initializer_range", 0.02)?,
            epsilon: f.epsilon("layer_norm_eps", 1e-12)?,
            image: f.count("image_size", 224, 1..=1 << 16)?,
            patch: f.count("patch_size", 16, 1..=1 << 16)?,
            channels: f.count("num_channels", 3, 1..=1 << 16)?,
            qkv_bias: f.flag("qkv_bias", true)?,
            classes: classes(f)?,
            given: f.map().clone(),
        };
        f.finish(&["encoder_stride", "pooler_act", "pooler_output_size"])?;
        if !vit.width.is_multiple_of(vit.heads) {
            return Err(
                f.fault("hidden_size", format!("{} is no multiple of num_attention_heads, {}", vit.width, vit.heads))
            );
        }
        if vit.patch > vit.image {
            return Err(f.fault("patch_size", format!("{} is over image_size, {}", vit.patch, vit.image)));
        }
        Ok(vit)
    }

    /// T: the patches and the class token.
    fn tokens(&self) -> usize {
        (self.image / self.patch).pow(2) + 1
    }

    fn normal(&self) -> Init {
        Init::Normal(self.initializer_range)
    }

    fn linear(&self, outputs: usize, activation: Activation) -> Linear {
        Linear::new(outputs, self.normal(), activation)
    }

    /// `pixels` (B, channels, image, image) -> (B, T, C).
    fn embeddings(&self, b: &mut Builder, pixels: Value) -> Result<Value> {
        let (name, c, tokens, side) = ("vit.embeddings", self.width, self.tokens(), self.image / self.patch);
        let class = b.parameter(format!("{name}.cls_token"), [1, 1, c], self.normal())?;
        let positions = b.parameter(format!("{name}.position_embeddings"), [1, tokens, c], self.normal())?;
        let projection = format!("{name}.patch_embeddings.projection");
        let kernel = [c, self.channels, self.patch, self.patch];
        let weight = b.parameter(format!("{projection}.weight"), kernel, self.normal())?;
        let bias = b.parameter(format!("{projection}.bias"), [c], Init::Constant(0.0))?;
        let x = b.conv2d(pixels, weight, Some(bias), self.patch, 0)?;
        let batch = b.shape(x).axes()[0];
        let planes = b.reshape(x, [batch, c, side * side])?;
        let patches = b.transpose(planes, &[0, 2, 1])?;
        // The class token goes into the row that the shift leaves 0; shifting it likewise makes a table that is 0
        // everywhere else.
        let mut x = b.shift(patches, 1, tokens)?;
        let class = b.shift(class, 0, tokens)?;
        for table in [class, positions] {
            let table = b.reshape(table, [tokens, c])?;
            x = b.add_position(x, table)?;
        }
        b.dropout(x, self.hidden_dropout)
    }

    fn attention(&self, b: &mut Builder, layer: usize, input: Value) -> Result<Value> {
        let name = format!("vit.encoder.layer.{layer}");
        let x = layernorm(b, input, &format!("{name}.layernorm_before"), self.epsilon)?;
        let options = AttentionOptions {
            heads: self.heads,
            kv_heads: self.heads,
            scale: None,
            causal: false,
            dropout: self.attention_dropout,
        };
        let plain = self.linear(self.width, Activation::None);
        let linear = Linear { bias: plain.bias.filter(|_| self.qkv_bias), ..plain };
        let x = self_attention(b, x, &format!("{name}.attention.attention"), linear, None, options)?;
        let x = plain.trace(b, x, &format!("{name}.attention.output.dense"))?;
        let x = b.dropout(x, self.hidden_dropout)?;
        b.add(x, input)
    }

    fn mlp(&self, b: &mut Builder, layer: usize, input: Value) -> Result<Value> {
        let name = format!("vit.encoder.layer.{layer}");
        let x = layernorm(b, input, &format!("{name}.layernorm_after"), self.epsilon)?;
        let x = self.linear(self.inner, self.activation).trace(b, x, &format!("{name}.intermediate.dense"))?;
        let x = self.linear(self.width, Activation::None).trace(b, x, &format!("{name}.output.dense"))?;
        let x = b.dropout(x, self.hidden_dropout)?;
        b.add(x, input)
    }

    /// Only the class token is normalised, since rows are normalised independently.
    fn head(&self, b: &mut Builder, input: Value) -> Result<Value> {
        let batch = b.shape(input).axes()[0];
        let first = b.shift(input, 0, 1)?;
        let class = b.reshape(first, [batch, self.width])?;
        let x = layernorm(b, class, "vit.layernorm", self.epsilon)?;
        self.linear(self.classes, Activation::None).trace(b, x, "classifier")
    }
}

impl Network for Vit {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &["pixel_values", "labels"])?;
        let found: [usize; 3] = inputs.axes("pixel_values")?;
        let image = [self.channels, self.image, self.image];
        if found != image {
            return Err(Error::bad(format!(
                "pixel_values: an image of {found:?}, want num_channels, image_size, image_size: {image:?}"
            )));
        }
        let mut b = Builder::new(mode, float);
        let pixels = inputs.declare(&mut b, "pixel_values", &image, false)?.expect("axes() has found it");
        let labels = inputs.declare(&mut b, "labels", &[], true)?;
        if labels.is_some() && self.classes == 1 {
            return Err(Error::bad("labels: one class makes this a regression, which is not supported"));
        }
        let mut x = b.layer("embeddings", |b, _| self.embeddings(b, pixels))?;
        for layer in 0..self.layers {
            x = b.layer(format!("layer.{layer}.attention"), |b, _| self.attention(b, layer, x))?;
            x = b.layer(format!("layer.{layer}.mlp"), |b, _| self.mlp(b, layer, x))?;
        }
        let logits = b.layer("classifier", |b, _| self.head(b, x))?;
        if let Some(labels) = labels {
            b.cross_entropy(logits, labels)?;
        }
        b.finish()
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new("pixel_values", [self.channels, self.image, self.image], DType::F32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: false, classes: self.classes, vocab: None }
    }

    fn config(&self) -> serde_json::Value {
        let settings = json!({
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "hidden_act": super::activation_name(self.activation),
            "hidden_dropout_prob": self.hidden_dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "initializer_range": self.initializer_range,
            "layer_norm_eps": self.epsilon,
            "image_size": self.image,
            "patch_size": self.patch,
            "num_channels": self.channels,
            "qkv_bias": self.qkv_bias,
        });
        super::whole_config(&FAMILY, &with_named_classes(&self.given, self.classes), settings)
    }
}
