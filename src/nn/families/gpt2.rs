//! GPT-2 with its language-modelling head (Radford, Wu, Child, Luan, Amodei & Sutskever 2019, "Language models are
//! unsupervised multitask learners"), as transformers' `GPT2LMHeadModel` computes it.
//!
//! A cut may fall after the embeddings, and after either half of a block: attention, or the MLP.

use super::text::{self, TextModel};
use super::{ACTIVATIONS, Customs, Family};
use crate::base::{DType, Result};
use crate::graph::{Activation, AttentionOptions, Builder, Graph, Init, Mode, Value, WeightLayout};
use crate::nn::fields::Fields;
use crate::nn::layers::{Linear, embedding, layernorm};
use crate::nn::{InputShape, Labels, Network};
use serde_json::{Map, json};

pub(super) const FAMILY: Family = Family {
    name: "gpt2",
    architecture: ARCHITECTURE,
    files: Customs {
        prefix: Some("transformer."),
        tied: &[("lm_head.weight", TABLE)],
        is_buffer,
        is_elsewhere: |_| false,
    },
    build: |fields| Ok(Box::new(Gpt2::read(fields)?)),
};

const ARCHITECTURE: &str = "GPT2LMHeadModel";
/// The token embeddings, (V, C), which are also the head where it is tied.
const TABLE: &str = "transformer.wte.weight";
/// More layers than this are a mistake: the deepest published model has 48.
const MOST_LAYERS: usize = 1024;

/// A GPT-2, described by transformers' `GPT2Config`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2 {
    /// V, the number of tokens.
    pub vocab: usize,
    /// The longest context.
    pub positions: usize,
    /// C.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// H, which divides C.
    pub heads: usize,
    /// Width inside the MLP.
    pub inner: usize,
    /// Inside the MLP.
    pub activation: Activation,
    /// Dropout of each half block's output before the residual sum.
    pub resid_pdrop: f64,
    /// Dropout of the embeddings.
    pub embd_pdrop: f64,
    /// Dropout of attention weights.
    pub attn_pdrop: f64,
    /// Layer normalisation's epsilon.
    pub epsilon: f64,
    /// Standard deviation of initial weights.
    pub initializer_range: f64,
    /// Whether scores are divided by the square root of a head's width.
    pub scale_attn_weights: bool,
    /// Whether scores are also divided by the block's number, from 1.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// Whether the head is tied to the token embeddings.
    pub tied: bool,
    given: Map<String, serde_json::Value>,
}

impl Gpt2 {
    fn read(f: &Fields) -> Result<Gpt2> {
        const GELU: Activation = Activation::GeluTanh;
        for (alias, key) in [
            ("hidden_size", "n_embd"),
            ("max_position_embeddings", "n_positions"),
            ("num_attention_heads", "n_head"),
            ("num_hidden_layers", "n_layer"),
        ] {
            f.refuse_alias(alias, key)?;
        }
        let width = f.count("n_embd", 768, 1..=1 << 20)?;
        let gpt2 = Gpt2 {
            vocab: f.count("vocab_size", 50257, 1..=i32::MAX as usize)?,
            positions: f.count("n_positions", 1024, 1..=1 << 24)?,
            width,
            layers: f.count("n_layer", 12, 1..=MOST_LAYERS)?,
            heads: f.count("n_head", 12, 1..=1 << 20)?,
            inner: f.optional_count("n_inner", 1..=1 << 24)?.unwrap_or(4 * width),
            activation: f.word("activation_function", GELU, &ACTIVATIONS)?,
            resid_pdrop: f.dropout("resid_pdrop", 0.1)?,
            embd_pdrop: f.dropout("embd_pdrop", 0.1)?,
            attn_pdrop: f.dropout("attn_pdrop", 0.1)?,
            epsilon: f.epsilon("layer_norm_epsilon", 1e-5)?,
            initializer_range: f.deviation("initializer_range", 0.02)?,
            scale_attn_weights: f.flag("scale_attn_weights", true)?,
            scale_attn_by_inverse_layer_idx: f.flag("scale_attn_by_inverse_layer_idx", false)?,
            tied: f.flag("tie_word_embeddings", true)?,
            given: f.map().clone(),
        };
        // Old files state n_positions twice; under this name alone transformers would ignore it.
        if let Some(context) = f.optional_count("n_ctx", 1..=1 << 24)?.filter(|&context| context != gpt2.positions) {
            return Err(
                f.fault("n_ctx", format!("is {context}, n_positions {}; write it as n_positions", gpt2.positions))
            );
        }
        if f.flag("add_cross_attention", false)? {
            return Err(f.fault("add_cross_attention", "true is not supported"));
        }
        // It guards f16 against overflow; scores are accumulated in f32 here in any case.
        f.flag("reorder_and_upcast_attn", false)?;
        f.finish(&[
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        ])?;
        if width % gpt2.heads != 0 {
            return Err(f.fault("n_embd", format!("{width} is no multiple of n_head, {}", gpt2.heads)));
        }
        Ok(gpt2)
    }

    fn linear(&self, outputs: usize, deviation: f64, activation: Activation) -> Linear {
        let (weight, bias) = (Init::Normal(deviation), Some(Init::Constant(0.0)));
        Linear { outputs, layout: WeightLayout::InOut, weight, bias, activation }
    }

    /// The layers that add to the residual path have smaller initial weights, since 2 n_layer of them add up (Radford
    /// et al. 2019, section 2.3).
    fn projection(&self) -> Linear {
        let deviation = self.initializer_range / (2.0 * self.layers as f64).sqrt();
        self.linear(self.width, deviation, Activation::None)
    }
}

impl TextModel for Gpt2 {
    const LAYER: &'static str = "h";
    const ATTENTION: &'static str = "attn";

    fn longest(&self) -> (&'static str, usize) {
        ("n_positions", self.positions)
    }

    fn layers(&self) -> usize {
        self.layers
    }

    fn embeddings(&self, b: &mut Builder, ids: Value) -> Result<Value> {
        let normal = Init::Normal(self.initializer_range);
        let x = embedding(b, ids, "transformer.wte", [self.vocab, self.width], normal)?;
        let table = b.parameter("transformer.wpe.weight", [self.positions, self.width], normal)?;
        let x = b.add_position(x, table)?;
        b.dropout(x, self.embd_pdrop)
    }

    fn attention(&self, b: &mut Builder, layer: usize, input: Value, mask: Option<Value>) -> Result<Value> {
        let name = format!("transformer.h.{layer}");
        let x = layernorm(b, input, &format!("{name}.ln_1"), self.epsilon)?;
        let packed = self.linear(3 * self.width, self.initializer_range, Activation::None);
        let qkv = packed.trace(b, x, &format!("{name}.attn.c_attn"))?;
        let mut scale = if self.scale_attn_weights { ((self.width / self.heads) as f64).sqrt().recip() } else { 1.0 };
        if self.scale_attn_by_inverse_layer_idx {
            scale /= (layer + 1) as f64;
        }
        let options = AttentionOptions {
            heads: self.heads,
            kv_heads: self.heads,
            scale: Some(scale),
            causal: true,
            dropout: self.attn_pdrop,
        };
        let x = b.attention_packed(qkv, mask, options)?;
        let x = self.projection().trace(b, x, &format!("{name}.attn.c_proj"))?;
        let x = b.dropout(x, self.resid_pdrop)?;
        b.add(x, input)
    }

    fn mlp(&self, b: &mut Builder, layer: usize, input: Value) -> Result<Value> {
        let name = format!("transformer.h.{layer}");
        let x = layernorm(b, input, &format!("{name}.ln_2"), self.epsilon)?;
        let widen = self.linear(self.inner, self.initializer_range, self.activation);
        let x = widen.trace(b, x, &format!("{name}.mlp.c_fc"))?;
        let x = self.projection().trace(b, x, &format!("{name}.mlp.c_proj"))?;
        let x = b.dropout(x, self.resid_pdrop)?;
        b.add(x, input)
    }

    fn head(&self, b: &mut Builder, input: Value) -> Result<Value> {
        let x = layernorm(b, input, "transformer.ln_f", self.epsilon)?;
        let name = if self.tied { TABLE } else { "lm_head.weight" };
        let weight = b.parameter(name, [self.vocab, self.width], Init::Normal(self.initializer_range))?;
        b.linear(x, weight, None, Activation::None, WeightLayout::OutIn)
    }
}

impl Network for Gpt2 {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        text::trace(self, mode, float, batch, inputs)
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new("input_ids", [self.positions], DType::I32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: true, classes: self.vocab, vocab: Some(self.vocab) }
    }

    fn config(&self) -> serde_json::Value {
        let settings = json!({
            "vocab_size": self.vocab,
            "n_positions": self.positions,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": (self.inner != 4 * self.width).then_some(self.inner),
            "activation_function": super::activation_name(self.activation),
            "resid_pdrop": self.resid_pdrop,
            "embd_pdrop": self.embd_pdrop,
            "attn_pdrop": self.attn_pdrop,
            "layer_norm_epsilon": self.epsilon,
            "initializer_range": self.initializer_range,
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
            "tie_word_embeddings": self.tied,
        });
        super::whole_config(&FAMILY, &self.given, settings)
    }
}

/// The causal masks that old files contain besides the weights: `h.N.attn.bias` and `h.N.attn.masked_bias`.
fn is_buffer(name: &str) -> bool {
    let name = name.strip_prefix("transformer.").unwrap_or(name);
    let Some((number, rest)) = name.strip_prefix("h.").and_then(|rest| rest.split_once('.')) else { return false };
    number.bytes().all(|byte| byte.is_ascii_digit()) && matches!(rest, "attn.bias" | "attn.masked_bias")
}
