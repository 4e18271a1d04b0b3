//! The built-in families of networks, named as in config.json's `model_type`.

pub mod bert;
mod classes;
pub mod gpt2;
pub mod llama;
pub mod resnet;
mod text;
pub mod vit;

use super::Network;
use super::fields::Fields;
use crate::base::tensorfile::quoted;
use crate::base::{Error, Result, nearest};
use crate::graph::Activation;
use serde_json::{Map, Value};

/// Activations by transformers' names. `gelu_pytorch_tanh` computes what `gelu_new` does.
pub(super) const ACTIVATIONS: [(&str, Activation); 6] = [
    ("gelu_new", Activation::GeluTanh),
    ("gelu", Activation::GeluErf),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("relu", Activation::Relu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
];

/// A family's name and its conventions.
pub(super) struct Family {
    /// `model_type`.
    pub name: &'static str,
    /// The one of `architectures` that is supported.
    pub architecture: &'static str,
    /// How its files differ from its networks.
    pub files: Customs,
    /// Builds the network.
    pub build: fn(&Fields) -> Result<Box<dyn Network>>,
}

/// How a family's files differ from the tensors of its networks.
pub(super) struct Customs {
    /// The prefix of tensors' names that old files leave out.
    pub prefix: Option<&'static str>,
    /// Tied tensors of the head that a file may contain, each with the tensor that it must equal.
    pub tied: &'static [(&'static str, &'static str)],
    /// Whether a file's tensor is a constant that the network does not need.
    pub is_buffer: fn(&str) -> bool,
    /// Whether a file's tensor is a weight of a head or a layer that this architecture does not have.
    pub is_elsewhere: fn(&str) -> bool,
}

impl Customs {
    /// No difference: the files contain exactly the network's tensors, under their own names.
    pub const NONE: Customs = Customs { prefix: None, tied: &[], is_buffer: |_| false, is_elsewhere: |_| false };
}

/// All families.
pub(super) const FAMILIES: [Family; 8] =
    [gpt2::FAMILY, llama::LLAMA, llama::MISTRAL, llama::QWEN2, llama::QWEN3, resnet::FAMILY, bert::FAMILY, vit::FAMILY];

/// The family of a `model_type`; messages begin with `whence`.
pub(super) fn family(name: &str, whence: &str) -> Result<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name).ok_or_else(|| {
        let names: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        let hint = nearest(name, names.iter().copied()).map_or(String::new(), |near| format!("; did you mean {near}?"));
        Error::bad(format!("{whence}: family {} is not known, only {}{hint}", quoted(name), names.join(", ")))
    })
}

/// Builds the network of a family from the keys of its config.json; missing keys have transformers' defaults.
///
/// ```
/// let config = serde_json::json!({ "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64 });
/// let gpt = hydra::nn::from_config("gpt2", &config)?;
/// # hydra::base::Result::Ok(())
/// ```
///
/// # Errors
/// When the family, a key or a value is not known or not supported, or `config` is no object; the message names the key
/// and the nearest known word.
pub fn from_config(name: &str, config: &Value) -> Result<Box<dyn Network>> {
    match config {
        Value::Object(config) => build(name, config, true),
        _ => Err(Error::bad(format!("{name} config: is no object of keys and values"))),
    }
}

/// Builds a network; `strict` refuses keys that mean nothing to the family, for hand-written configs: Hugging Face's
/// own files have many such keys.
pub(in crate::nn) fn build(name: &str, config: &Map<String, Value>, strict: bool) -> Result<Box<dyn Network>> {
    let family = family(name, "model")?;
    let whence = format!("{name} config");
    let fields = Fields::new(config, &whence, strict);
    if let Some(model_type) = fields.get("model_type").filter(|&found| found != name) {
        return Err(fields.fault("model_type", format!("is {}, the family {name}", super::fields::shown(model_type))));
    }
    (family.build)(&fields)
}

/// The keys of a network's config.json that its family reads, and so all that its arithmetic depends on; of a config
/// that no family accepts, all keys.
pub fn settings(config: &Value) -> Value {
    let family = config["model_type"].as_str().and_then(|name| FAMILIES.iter().find(|family| family.name == name));
    let (Value::Object(all), Some(family)) = (config, family) else { return config.clone() };
    let fields = Fields::new(all, "", false);
    if (family.build)(&fields).is_err() {
        return config.clone();
    }
    let read = fields.read_keys();
    all.iter()
        .filter(|(key, _)| read.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// The config.json of a new model: the given keys, the defaults of those left out, and a description of its files.
fn whole_config(family: &Family, given: &Map<String, Value>, settings: Value) -> Value {
    let Value::Object(mut config) = settings else { unreachable!("families state their settings as an object") };
    config.extend(given.iter().map(|(key, value)| (key.clone(), value.clone())));
    // New models are saved in f32, whatever the config was copied from.
    config.remove("torch_dtype");
    config.insert("dtype".into(), "float32".into());
    config.insert("model_type".into(), family.name.into());
    config.insert("architectures".into(), vec![family.architecture].into());
    Value::Object(config)
}

/// transformers' name of an activation.
fn activation_name(activation: Activation) -> Option<&'static str> {
    ACTIVATIONS.iter().find(|(_, known)| *known == activation).map(|(name, _)| *name)
}
