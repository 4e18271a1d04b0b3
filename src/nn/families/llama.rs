//! Llama with its language-modelling head (Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Grattafiori et al.
//! 2024, arXiv:2407.21783), as transformers' `LlamaForCausalLM` computes it: RMS norms, rotary positions, grouped key
//! and value heads, a gated MLP. And its relatives, which differ in a bias, a norm or a window: Mistral (Jiang et al.
//! 2023, arXiv:2310.06825), Qwen2 and 2.5 (Yang et al. 2024, arXiv:2407.10671 and 2412.15115), Qwen3 (Yang et al. 2025,
//! arXiv:2505.09388).
//!
//! A cut may fall after the embeddings, and after either half of a layer: attention, or the MLP.

use super::text::{self, TextModel};
use super::{ACTIVATIONS, Customs, Family};
use crate::base::{DType, Result};
use crate::graph::{Activation, AttentionOptions, Builder, Graph, Init, Mode, RotaryScaling, Value, WeightLayout};
use crate::nn::fields::{Fields, shown};
use crate::nn::layers::{Linear, rmsnorm};
use crate::nn::{InputShape, Labels, Network};
use serde_json::{Map, json};

pub(super) const LLAMA: Family =
    family("llama", "LlamaForCausalLM", |fields| Ok(Box::new(Llama::read(fields, Kind::Llama)?)));
pub(super) const MISTRAL: Family =
    family("mistral", "MistralForCausalLM", |fields| Ok(Box::new(Llama::read(fields, Kind::Mistral)?)));
pub(super) const QWEN2: Family =
    family("qwen2", "Qwen2ForCausalLM", |fields| Ok(Box::new(Llama::read(fields, Kind::Qwen2)?)));
pub(super) const QWEN3: Family =
    family("qwen3", "Qwen3ForCausalLM", |fields| Ok(Box::new(Llama::read(fields, Kind::Qwen3)?)));

const fn family(
    name: &'static str,
    architecture: &'static str,
    build: fn(&Fields) -> Result<Box<dyn Network>>,
) -> Family {
    let tied = &[("lm_head.weight", TABLE)];
    let files = Customs { prefix: Some("model."), tied, is_buffer, is_elsewhere: |_| false };
    Family { name, architecture, files, build }
}

/// Llama or one of its relatives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Llama.
    Llama,
    /// No biases, and optionally sliding-window attention.
    Mistral,
    /// Queries, keys and values have a bias.
    Qwen2,
    /// Queries and keys are normalised head by head before they are rotated.
    Qwen3,
}

impl Kind {
    fn family(self) -> Family {
        match self {
            Kind::Llama => LLAMA,
            Kind::Mistral => MISTRAL,
            Kind::Qwen2 => QWEN2,
            Kind::Qwen3 => QWEN3,
        }
    }

    /// `vocab_size`, `intermediate_size` and `max_position_embeddings` by default.
    fn sizes(self) -> [usize; 3] {
        match self {
            Kind::Llama => [32_000, 11_008, 2048],
            Kind::Mistral => [32_000, 14_336, 131_072],
            Kind::Qwen2 | Kind::Qwen3 => [151_936, 22_016, 32_768],
        }
    }
}

/// The token embeddings, (V, C), which are also the head where it is tied.
const TABLE: &str = "model.embed_tokens.weight";
/// More layers than this are a mistake: the deepest published model has 126.
const MOST_LAYERS: usize = 1024;

/// A Llama or one of its relatives, described by transformers' `LlamaConfig`, `MistralConfig`, `Qwen2Config` or
/// `Qwen3Config`. Defaults below are Llama's unless stated otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama {
    /// Which of them.
    pub kind: Kind,
    /// V, the number of tokens: `vocab_size`, 32000 by default, Qwen's 151936.
    pub vocab: usize,
    /// C: `hidden_size`, 4096 by default.
    pub width: usize,
    /// Width inside the MLP: `intermediate_size`, 11008 by default, Mistral's 14336, Qwen's 22016.
    pub inner: usize,
    /// `num_hidden_layers`, 32 by default.
    pub layers: usize,
    /// H: `num_attention_heads`, 32 by default.
    pub heads: usize,
    /// Key and value heads, which divide H: `num_key_value_heads`, H by default, Mistral's 8, Qwen's 32.
    pub kv_heads: usize,
    /// Width of a head, even: `head_dim`, C / H by default, Qwen3's 128.
    pub head_width: usize,
    /// Of the MLP's gate: `hidden_act`, silu by default.
    pub activation: Activation,
    /// The longest context: `max_position_embeddings`, 2048 by default, Mistral's 131072, Qwen's 32768.
    pub positions: usize,
    /// How many positions a query sees, its own included, in a layer with sliding-window attention: `sliding_window`.
    /// `None` means all of them: always for Llama; for Mistral where it is `null` (the default is 4096); for Qwen,
    /// unless `use_sliding_window` is set and a layer has a window. Longer contexts are refused; with shorter ones the
    /// window changes nothing.
    pub window: Option<usize>,
    /// Standard deviation of initial weights: `initializer_range`, 0.02 by default.
    pub initializer_range: f64,
    /// RMS normalisation's epsilon: `rms_norm_eps`, 1e-6 by default.
    pub epsilon: f64,
    /// The token whose row gets no gradient from the embedding: `pad_token_id`, none by default.
    pub padding: Option<usize>,
    /// Whether the head is tied to the token embeddings: `tie_word_embeddings`, false by default.
    pub tied: bool,
    /// Base of the rotary angles: `rope_theta`, 10000 by default.
    pub rotary_base: f64,
    /// How these are scaled for long contexts: `rope_scaling`, not at all by default.
    pub rotary_scaling: RotaryScaling,
    /// Whether queries, keys and values have a bias: `attention_bias` of Llama and Qwen3, false by default; always in
    /// Qwen2, never in Mistral.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias: also `attention_bias`, but never in Qwen2.
    pub out_bias: bool,
    /// Dropout of attention weights: `attention_dropout`, 0 by default.
    pub attention_dropout: f64,
    /// Whether the MLP's layers have a bias: Llama's `mlp_bias`, false by default.
    pub mlp_bias: bool,
    given: Map<String, serde_json::Value>,
}

impl Llama {
    fn read(f: &Fields, kind: Kind) -> Result<Llama> {
        let [vocab, inner, positions] = kind.sizes();
        let vocab = f.count("vocab_size", vocab, 1..=i32::MAX as usize)?;
        let width = f.count("hidden_size", 4096, 1..=1 << 20)?;
        let heads = f.count("num_attention_heads", 32, 1..=1 << 20)?;
        let head_width = match kind {
            Kind::Qwen3 => Some(f.count("head_dim", 128, 2..=1 << 12)?),
            _ => f.optional_count("head_dim", 2..=1 << 12)?,
        };
        let layers = f.count("num_hidden_layers", 32, 1..=MOST_LAYERS)?;
        let kv_heads = match kind {
            Kind::Llama => heads,
            Kind::Mistral => 8,
            Kind::Qwen2 | Kind::Qwen3 => 32,
        };
        let kv_heads = f.count_or_null("num_key_value_heads", kv_heads, 1..=1 << 20)?.unwrap_or(heads);
        let (rotary_base, rotary_scaling) = read_rotary(f)?;
        let bias = matches!(kind, Kind::Llama | Kind::Qwen3) && f.flag("attention_bias", false)?;
        let llama = Llama {
            kind,
            vocab,
            width,
            inner: f.count("intermediate_size", inner, 1..=1 << 24)?,
            layers,
            heads,
            kv_heads,
            head_width: head_width.unwrap_or(width / heads),
            activation: f.word("hidden_act", Activation::Silu, &ACTIVATIONS)?,
            positions: f.count("max_position_embeddings", positions, 1..=1 << 24)?,
            window: read_window(f, kind, layers)?,
            initializer_range: f.deviation("initializer_range", 0.02)?,
            epsilon: f.epsilon("rms_norm_eps", 1e-6)?,
            padding: f.optional_count("pad_token_id", 0..=vocab - 1)?,
            tied: f.flag("tie_word_embeddings", false)?,
            rotary_base,
            rotary_scaling,
            qkv_bias: bias || kind == Kind::Qwen2,
            out_bias: bias,
            attention_dropout: f.dropout("attention_dropout", 0.0)?,
            mlp_bias: kind == Kind::Llama && f.flag("mlp_bias", false)?,
            given: f.map().clone(),
        };
        // How products were split to reproduce a training run's rounding; it does not change the mathematics.
        f.finish(&["pretraining_tp"])?;
        if head_width.is_none() && !width.is_multiple_of(heads) {
            return Err(f.fault("hidden_size", format!("{width} is no multiple of num_attention_heads, {heads}")));
        }
        if !llama.head_width.is_multiple_of(2) {
            return Err(f.fault("head_dim", format!("is {}; rotary positions need it even", llama.head_width)));
        }
        if !heads.is_multiple_of(llama.kv_heads) {
            let what = format!("{} do not divide num_attention_heads, {heads}", llama.kv_heads);
            return Err(f.fault("num_key_value_heads", what));
        }
        Ok(llama)
    }

    fn linear(&self, outputs: usize, bias: bool) -> Linear {
        let linear = Linear::new(outputs, Init::Normal(self.initializer_range), Activation::None);
        Linear { bias: linear.bias.filter(|_| bias), ..linear }
    }

    /// Divides each head of `x` (B, T, heads x width) by its root mean square.
    fn norm_heads(&self, b: &mut Builder, x: Value, name: &str) -> Result<Value> {
        let shape = b.shape(x).clone();
        let heads = b.reshape(x, [shape.elems() / self.head_width, self.head_width])?;
        let heads = rmsnorm(b, heads, name, self.epsilon)?;
        b.reshape(heads, shape)
    }

    /// `rope_scaling`, under the name of transformers up to version 4, which later versions also accept.
    fn scaling_config(&self) -> serde_json::Value {
        match self.rotary_scaling {
            RotaryScaling::None => serde_json::Value::Null,
            RotaryScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            RotaryScaling::Llama3 { factor, low, high, positions } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": positions,
            }),
            RotaryScaling::Yarn { factor, low, high, positions, whole, stretch } => json!({
                "rope_type": "yarn",
                "factor": factor,
                "beta_slow": low,
                "beta_fast": high,
                "original_max_position_embeddings": positions,
                "truncate": whole,
                "attention_factor": stretch,
            }),
        }
    }
}

impl TextModel for Llama {
    const LAYER: &'static str = "layers";
    const ATTENTION: &'static str = "attn";

    fn longest(&self) -> (&'static str, usize) {
        // YaRN's factor makes the first training's context longer, whether or not `max_position_embeddings` says so.
        let positions = match self.rotary_scaling {
            RotaryScaling::Yarn { factor, positions, .. } => self.positions.max((factor * positions as f64) as usize),
            _ => self.positions,
        };
        match self.window.filter(|&window| window < positions) {
            Some(window) => ("sliding_window", window),
            None => ("max_position_embeddings", positions),
        }
    }

    fn layers(&self) -> usize {
        self.layers
    }

    fn embeddings(&self, b: &mut Builder, ids: Value) -> Result<Value> {
        let table = b.parameter(TABLE, [self.vocab, self.width], Init::Normal(self.initializer_range))?;
        b.embedding_padded(ids, table, self.padding)
    }

    fn attention(&self, b: &mut Builder, layer: usize, input: Value, mask: Option<Value>) -> Result<Value> {
        let name = format!("model.layers.{layer}");
        let x = rmsnorm(b, input, &format!("{name}.input_layernorm"), self.epsilon)?;
        let heads = |b: &mut Builder, of: &str, heads: usize| {
            let linear = self.linear(heads * self.head_width, self.qkv_bias);
            linear.trace(b, x, &format!("{name}.self_attn.{of}_proj"))
        };
        let turned = |b: &mut Builder, x: Value, of: &str, heads: usize| {
            let x = if self.kind == Kind::Qwen3 {
                self.norm_heads(b, x, &format!("{name}.self_attn.{of}_norm"))?
            } else {
                x
            };
            b.rotary_scaled(x, heads, self.head_width, self.rotary_base, self.rotary_scaling)
        };
        let (q, k) = (heads(b, "q", self.heads)?, heads(b, "k", self.kv_heads)?);
        let v = heads(b, "v", self.kv_heads)?;
        let (q, k) = (turned(b, q, "q", self.heads)?, turned(b, k, "k", self.kv_heads)?);
        let options = AttentionOptions {
            heads: self.heads,
            kv_heads: self.kv_heads,
            scale: None,
            causal: true,
            dropout: self.attention_dropout,
        };
        let x = b.attention(q, k, v, mask, options)?;
        let x = self.linear(self.width, self.out_bias).trace(b, x, &format!("{name}.self_attn.o_proj"))?;
        b.add(x, input)
    }

    fn mlp(&self, b: &mut Builder, layer: usize, input: Value) -> Result<Value> {
        let name = format!("model.layers.{layer}");
        let x = rmsnorm(b, input, &format!("{name}.post_attention_layernorm"), self.epsilon)?;
        let widen = self.linear(self.inner, self.mlp_bias);
        let gate = widen.trace(b, x, &format!("{name}.mlp.gate_proj"))?;
        let up = widen.trace(b, x, &format!("{name}.mlp.up_proj"))?;
        let x = b.glu(gate, up, self.activation)?;
        let x = self.linear(self.width, self.mlp_bias).trace(b, x, &format!("{name}.mlp.down_proj"))?;
        b.add(x, input)
    }

    fn head(&self, b: &mut Builder, input: Value) -> Result<Value> {
        let x = rmsnorm(b, input, "model.norm", self.epsilon)?;
        let name = if self.tied { TABLE } else { "lm_head.weight" };
        let weight = b.parameter(name, [self.vocab, self.width], Init::Normal(self.initializer_range))?;
        b.linear(x, weight, None, Activation::None, WeightLayout::OutIn)
    }
}

impl Network for Llama {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        text::trace(self, mode, float, batch, inputs)
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new("input_ids", [self.longest().1], DType::I32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: true, classes: self.vocab, vocab: Some(self.vocab) }
    }

    fn config(&self) -> serde_json::Value {
        let mut settings = json!({
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width,
            "hidden_act": super::activation_name(self.activation),
            "max_position_embeddings": self.positions,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.epsilon,
            "pad_token_id": self.padding,
            "tie_word_embeddings": self.tied,
            "attention_dropout": self.attention_dropout,
        });
        match self.kind {
            Kind::Llama => {
                settings["attention_bias"] = self.qkv_bias.into();
                settings["mlp_bias"] = self.mlp_bias.into();
            }
            Kind::Mistral => settings["sliding_window"] = self.window.into(),
            Kind::Qwen2 => {}
            Kind::Qwen3 => settings["attention_bias"] = self.qkv_bias.into(),
        }
        // The given config states both, possibly in the newer form.
        if !self.given.contains_key("rope_parameters") {
            settings["rope_theta"] = self.rotary_base.into();
            settings["rope_scaling"] = self.scaling_config();
        }
        super::whole_config(&self.kind.family(), &self.given, settings)
    }
}

/// The window of sliding-window layers, if there are any.
fn read_window(f: &Fields, kind: Kind, layers: usize) -> Result<Option<usize>> {
    if kind == Kind::Llama {
        return Ok(None);
    }
    let window = f.count_or_null("sliding_window", 4096, 1..=1 << 24)?;
    if kind == Kind::Mistral {
        return Ok(window);
    }
    let is_used = f.flag("use_sliding_window", false)?;
    let full = f.count("max_window_layers", 28, 0..=MOST_LAYERS)?;
    let slides = match f.get("layer_types") {
        None => is_used && full < layers,
        Some(types) => {
            let want = || f.fault("layer_types", format!("want {layers} of full_attention and sliding_attention"));
            let types = types.as_array().filter(|types| types.len() == layers).ok_or_else(want)?;
            let known = |word: &serde_json::Value| ["full_attention", "sliding_attention"].iter().any(|w| word == w);
            if !types.iter().all(known) {
                return Err(want());
            }
            types.iter().any(|word| word == "sliding_attention")
        }
    };
    if slides && !is_used {
        return Err(f.fault("layer_types", "has sliding_attention, but use_sliding_window is false"));
    }
    Ok(window.filter(|_| slides))
}

/// Base and scaling of the rotary angles: `rope_parameters`, or `rope_theta` and `rope_scaling` as in transformers up
/// to version 4.
fn read_rotary(f: &Fields) -> Result<(f64, RotaryScaling)> {
    let theta = |f: &Fields, default: f64| {
        f.number("rope_theta", default, "a number above 0, up to 1e12", |base| base > 0.0 && base <= 1e12)
    };
    let base = theta(f, 10_000.0)?;
    let whole = |f: &Fields| match f.number("partial_rotary_factor", 1.0, "a number", |_| true)? {
        1.0 => Ok(()),
        part => Err(f.fault("partial_rotary_factor", format!("{part} is not supported, only 1"))),
    };
    whole(f)?;
    let [parameters, scaling] = ["rope_parameters", "rope_scaling"].map(|key| (key, f.get(key)));
    let (key, value) = match (parameters.1, scaling.1) {
        (Some(_), Some(_)) => return Err(f.fault("rope_scaling", "rope_parameters is there too; keep one of them")),
        (Some(value), None) => (parameters.0, value),
        (None, Some(value)) => (scaling.0, value),
        (None, None) => return Ok((base, RotaryScaling::None)),
    };
    let map = value.as_object().ok_or_else(|| f.fault(key, format!("want an object, got {}", shown(value))))?;
    let whence = f.place(key);
    let r = Fields::new(map, &whence, f.is_strict());
    let base = theta(&r, base)?;
    // Old files have `type`.
    let kind = if r.get("rope_type").is_some() { "rope_type" } else { "type" };
    const KINDS: [&str; 4] = ["default", "linear", "llama3", "yarn"];
    let kind = r.word(kind, "default", &KINDS.map(|kind| (kind, kind)))?;
    let positions = || {
        let key = "original_max_position_embeddings";
        let missing = || r.fault(key, "is missing; want a whole number");
        r.optional_count(key, 1..=1 << 24)?.ok_or_else(missing)
    };
    let number = |key: &'static str, least: f64| {
        let want = format!("a number of {least} or more, up to 1e6");
        match r.get(key) {
            None => Err(r.fault(key, format!("is missing; want {want}"))),
            Some(_) => r.number(key, 0.0, &want, |x| x >= least && x <= 1e6),
        }
    };
    let scaling = match kind {
        "linear" => RotaryScaling::Linear { factor: number("factor", 1.0)? },
        "llama3" => {
            let (factor, low) = (number("factor", 1.0)?, number("low_freq_factor", 1e-6)?);
            let high = number("high_freq_factor", 1e-6)?;
            if low >= high {
                return Err(r.fault("low_freq_factor", format!("is {low}, high_freq_factor {high}; want it below")));
            }
            RotaryScaling::Llama3 { factor, low, high, positions: positions()? }
        }
        "yarn" => {
            let (factor, positions) = (number("factor", 1.0)?, positions()?);
            let above = |x: f64| x > 0.0 && x <= 1e6;
            // transformers also treats null and 0 as absent.
            let given = |key: &'static str| match r.get(key) {
                None => Ok(None),
                Some(value) if value.as_f64() == Some(0.0) => Ok(None),
                Some(_) => r.number(key, 0.0, "a number above 0, up to 1e6", above).map(Some),
            };
            let (high, low) = (given("beta_fast")?.unwrap_or(32.0), given("beta_slow")?.unwrap_or(1.0));
            if low >= high {
                return Err(r.fault("beta_slow", format!("is {low}, beta_fast {high}; want it below")));
            }
            if base <= 1.0 {
                return Err(r.fault("rope_theta", format!("is {base}; yarn wants it above 1")));
            }
            let sharper = |scale: f64| 1.0 + 0.1 * scale * factor.ln();
            let inferred = match (given("mscale")?, given("mscale_all_dim")?) {
                (Some(own), Some(all)) => sharper(own) / sharper(all),
                _ => sharper(1.0),
            };
            let stretch = match r.get("attention_factor") {
                None => inferred,
                Some(_) => r.number("attention_factor", inferred, "a number above 0, up to 1e6", above)?,
            };
            RotaryScaling::Yarn { factor, low, high, positions, whole: r.flag("truncate", true)?, stretch }
        }
        _ => RotaryScaling::None,
    };
    whole(&r)?;
    r.finish(&["type"])?;
    Ok((base, scaling))
}

/// The rotary frequencies that old files contain besides the weights: `model.layers.N.self_attn.rotary_emb.inv_freq`.
fn is_buffer(name: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let Some((number, rest)) = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')) else { return false };
    number.bytes().all(|byte| byte.is_ascii_digit()) && rest == "self_attn.rotary_emb.inv_freq"
}
