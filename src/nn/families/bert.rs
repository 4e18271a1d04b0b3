//! BERT with its masked-language-modelling head (Devlin, Chang, Lee & Toutanova 2018, arXiv:1810.04805), as
//! transformers' `BertForMaskedLM` computes it: normalisation comes after each residual sum, and the decoder is tied to
//! the word embeddings, with a bias of its own.
//!
//! Every token has type 0, as in transformers when no `token_type_ids` are given. A cut may fall after the embeddings,
//! and after either half of a layer: attention, or the MLP.

use super::text::{self, TextModel};
use super::{ACTIVATIONS, Customs, Family};
use crate::base::{DType, Result};
use crate::graph::{Activation, AttentionOptions, Builder, Graph, Init, Mode, Value, WeightLayout};
use crate::nn::fields::{Fields, shown};
use crate::nn::layers::{Linear, layernorm, self_attention};
use crate::nn::{InputShape, Labels, Network};
use serde_json::{Map, json};

pub(super) const FAMILY: Family = Family {
    name: "bert",
    architecture: "BertForMaskedLM",
    files: Customs {
        prefix: None,
        tied: &[("cls.predictions.decoder.weight", WORDS), ("cls.predictions.decoder.bias", BIAS)],
        is_buffer: |name| name == "bert.embeddings.position_ids",
        // Files of pretraining also contain the head of its second task.
        is_elsewhere: |name| name.starts_with("bert.pooler.") || name.starts_with("cls.seq_relationship."),
    },
    build: |fields| Ok(Box::new(Bert::read(fields)?)),
};

/// The word embeddings, (V, C), which are also the decoder.
const WORDS: &str = "bert.embeddings.word_embeddings.weight";
/// The decoder's bias, (V).
const BIAS: &str = "cls.predictions.bias";
/// More layers than this are a mistake.
const MOST_LAYERS: usize = 1024;

/// A BERT, described by transformers' `BertConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct Bert {
    /// V, the number of tokens: `vocab_size`, 30522 by default.
    pub vocab: usize,
    /// C: `hidden_size`, 768 by default.
    pub width: usize,
    /// `num_hidden_layers`, 12 by default.
    pub layers: usize,
    /// H, which divides C: `num_attention_heads`, 12 by default.
    pub heads: usize,
    /// Width inside the MLP: `intermediate_size`, 3072 by default.
    pub inner: usize,
    /// Inside the MLP and the head: `hidden_act`, gelu by default.
    pub activation: Activation,
    /// Dropout of the embeddings and of each half layer's output before the residual sum: `hidden_dropout_prob`, 0.1 by
    /// default.
    pub hidden_dropout: f64,
    /// Dropout of attention weights: `attention_probs_dropout_prob`, 0.1 by default.
    pub attention_dropout: f64,
    /// The longest context: `max_position_embeddings`, 512 by default.
    pub positions: usize,
    /// Number of token types, of which the first is used: `type_vocab_size`, 2 by default.
    pub types: usize,
    /// The token whose row gets no gradient from the embedding (it does from the decoder): `pad_token_id`, 0 by
    /// default; null means none.
    pub padding: Option<usize>,
    /// Standard deviation of initial weights: `initializer_range`, 0.02 by default.
    pub initializer_range: f64,
    /// Layer normalisation's epsilon: `layer_norm_eps`, 1e-12 by default.
    pub epsilon: f64,
    given: Map<String, serde_json::Value>,
}

impl Bert {
    fn read(f: &Fields) -> Result<Bert> {
        let vocab = f.count("vocab_size", 30522, 1..=i32::MAX as usize)?;
        let bert = Bert {
            vocab,
            width: f.count("hidden_size", 768, 1..=1 << 20)?,
            layers: f.count("num_hidden_layers", 12, 1..=MOST_LAYERS)?,
            heads: f.count("num_attention_heads", 12, 1..=1 << 20)?,
            inner: f.count("intermediate_size", 3072, 1..=1 << 24)?,
            activation: f.word("hidden_act", Activation::GeluErf, &ACTIVATIONS)?,
            hidden_dropout: f.dropout("hidden_dropout_prob", 0.1)?,
            attention_dropout: f.dropout("attention_probs_dropout_prob", 0.1)?,
            positions: f.count("max_position_embeddings", 512, 1..=1 << 24)?,
            types: f.count("type_vocab_size", 2, 1..=1 << 20)?,
            padding: match f.map().get("pad_token_id") {
                None => Some(0),
                Some(_) => f.optional_count("pad_token_id", 0..=vocab - 1)?,
            },
            initializer_range: f.deviation("initializer_range", 0.02)?,
            epsilon: f.epsilon("layer_norm_eps", 1e-12)?,
            given: f.map().clone(),
        };
        for key in ["is_decoder", "add_cross_attention"] {
            if f.flag(key, false)? {
                return Err(f.fault(key, "true is not supported"));
            }
        }
        if !f.flag("tie_word_embeddings", true)? {
            return Err(f.fault("tie_word_embeddings", "false is not supported"));
        }
        if let Some(kind) = f.get("position_embedding_type").filter(|&kind| kind != "absolute") {
            return Err(f.fault("position_embedding_type", format!("{} is not supported, only absolute", shown(kind))));
        }
        f.finish(&["classifier_dropout"])?;
        if !bert.width.is_multiple_of(bert.heads) {
            return Err(f.fault(
                "hidden_size",
                format!("{} is no multiple of num_attention_heads, {}", bert.width, bert.heads),
            ));
        }
        Ok(bert)
    }

    fn normal(&self) -> Init {
        Init::Normal(self.initializer_range)
    }

    fn linear(&self, outputs: usize, activation: Activation) -> Linear {
        Linear::new(outputs, self.normal(), activation)
    }

    /// The end of a half layer: a dense layer and dropout, then the residual sum with the half layer's input and
    /// normalisation.
    fn output(&self, b: &mut Builder, name: &str, x: Value, input: Value) -> Result<Value> {
        let x = self.linear(self.width, Activation::None).trace(b, x, &format!("{name}.dense"))?;
        let x = b.dropout(x, self.hidden_dropout)?;
        let sum = b.add(x, input)?;
        layernorm(b, sum, &format!("{name}.LayerNorm"), self.epsilon)
    }
}

impl TextModel for Bert {
    const LAYER: &'static str = "layer";
    const ATTENTION: &'static str = "attention";

    fn longest(&self) -> (&'static str, usize) {
        ("max_position_embeddings", self.positions)
    }

    fn layers(&self) -> usize {
        self.layers
    }

    fn embeddings(&self, b: &mut Builder, ids: Value) -> Result<Value> {
        let name = "bert.embeddings";
        let words = b.parameter(WORDS, [self.vocab, self.width], self.normal())?;
        let types =
            b.parameter(format!("{name}.token_type_embeddings.weight"), [self.types, self.width], self.normal())?;
        let positions =
            b.parameter(format!("{name}.position_embeddings.weight"), [self.positions, self.width], self.normal())?;
        let x = b.embedding_padded(ids, words, self.padding)?;
        let shape = b.shape(x).clone();
        // With every token as a sequence of length one, the first row of a table is added to each token.
        let tokens = b.reshape(x, [shape.rows(), 1, self.width])?;
        let typed = b.add_position(tokens, types)?;
        let x = b.reshape(typed, shape)?;
        let x = b.add_position(x, positions)?;
        let x = layernorm(b, x, &format!("{name}.LayerNorm"), self.epsilon)?;
        b.dropout(x, self.hidden_dropout)
    }

    fn attention(&self, b: &mut Builder, layer: usize, input: Value, mask: Option<Value>) -> Result<Value> {
        let name = format!("bert.encoder.layer.{layer}.attention");
        let options = AttentionOptions {
            heads: self.heads,
            kv_heads: self.heads,
            scale: None,
            causal: false,
            dropout: self.attention_dropout,
        };
        let x = self_attention(
            b,
            input,
            &format!("{name}.self"),
            self.linear(self.width, Activation::None),
            mask,
            options,
        )?;
        self.output(b, &format!("{name}.output"), x, input)
    }

    fn mlp(&self, b: &mut Builder, layer: usize, input: Value) -> Result<Value> {
        let name = format!("bert.encoder.layer.{layer}");
        let x = self.linear(self.inner, self.activation).trace(b, input, &format!("{name}.intermediate.dense"))?;
        self.output(b, &format!("{name}.output"), x, input)
    }

    fn head(&self, b: &mut Builder, input: Value) -> Result<Value> {
        let name = "cls.predictions.transform";
        let x = self.linear(self.width, self.activation).trace(b, input, &format!("{name}.dense"))?;
        let x = layernorm(b, x, &format!("{name}.LayerNorm"), self.epsilon)?;
        let words = b.parameter(WORDS, [self.vocab, self.width], self.normal())?;
        let bias = b.parameter(BIAS, [self.vocab], Init::Constant(0.0))?;
        b.linear(x, words, Some(bias), Activation::None, WeightLayout::OutIn)
    }
}

impl Network for Bert {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        text::trace(self, mode, float, batch, inputs)
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new("input_ids", [self.positions], DType::I32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: false, classes: self.vocab, vocab: Some(self.vocab) }
    }

    fn config(&self) -> serde_json::Value {
        let settings = json!({
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "hidden_act": super::activation_name(self.activation),
            "hidden_dropout_prob": self.hidden_dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "max_position_embeddings": self.positions,
            "type_vocab_size": self.types,
            "pad_token_id": self.padding,
            "initializer_range": self.initializer_range,
            "layer_norm_eps": self.epsilon,
        });
        super::whole_config(&FAMILY, &self.given, settings)
    }
}
