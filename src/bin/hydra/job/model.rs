//! One `[[model]]` of a job: the network, its data and how long it is trained.

use super::optimizer::{SCHEDULE_KEYS, read_optimizer, read_schedule};
use super::section::{MOST, Section, show};
use crate::rundir::is_taken;
use hydra::base::{Error, Result};
use hydra::graph::{LowRank, MOST_RANK};
use hydra::train::{Optimizer, Schedule};
use serde_json::Map;
use std::path::PathBuf;
use toml::Value;

/// One thing to train.
#[derive(Clone, Debug)]
pub struct Model {
    /// The file that defines it, as errors name it.
    pub file: String,
    /// Its place in the file: `model.0`, or `model.0.search: lr = 1e-3, batch = 16` for one of a search.
    pub at: String,
    /// The keys that its search varies, each with its own value as a word; empty for a model outside a search.
    pub searched: Vec<(String, String)>,
    /// Its folder in the run's directory; a plain file name, distinct from every other model's.
    pub name: String,
    /// Where the network and its initial weights come from.
    pub source: Source,
    /// Type of weights and activations.
    pub dtype: Precision,
    /// What it is trained on.
    pub data: Data,
    /// What it is evaluated on, if anything.
    pub valid: Option<Valid>,
    /// Samples per step.
    pub batch: usize,
    /// Samples that run together; divides `batch`.
    pub microbatch: usize,
    /// Rows of logits that are computed at a time; `None` means chosen by the vocabulary.
    pub loss_rows: Option<usize>,
    /// Prefixes of the names of parameters that are frozen.
    pub frozen: Vec<String>,
    /// Adapters of linear layers; if given, only they are trained.
    pub lora: Option<LowRank>,
    /// How long it is trained.
    pub length: Length,
    /// The update rule.
    pub optimizer: Optimizer,
    /// Largest global norm of its gradients, above 0; `None` means no clipping.
    pub clip: Option<f64>,
    /// How the learning rate changes.
    pub schedule: Schedule,
}

/// Type of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    F32,
    /// bf16, with f32 masters.
    Bf16,
    /// f32, whose products round their factors to tf32.
    Tf32,
}

impl Precision {
    /// Each with the word for it.
    pub const WORDS: [(&'static str, Precision); 3] =
        [("f32", Precision::F32), ("bf16", Precision::Bf16), ("tf32", Precision::Tf32)];
}

impl Model {
    /// The error for `message` at `key` of it.
    pub fn fault(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::bad(format!("{}: {}: {message}", self.file, self.place(key)))
    }

    /// The place that an error at `key` states, after the file.
    pub fn place(&self, key: &str) -> String {
        let between = if self.searched.is_empty() { "." } else { ": " };
        format!("{}{between}{key}", self.at)
    }
}

/// Where a network comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A Hugging Face directory with config.json and model.safetensors, or its parts.
    From(PathBuf),
    /// A family by name, with its config.json's values; random weights.
    Family {
        /// The family, such as `gpt2`; not checked here.
        family: String,
        /// Values under config.json's names; missing ones have transformers' defaults.
        config: Map<String, serde_json::Value>,
    },
}

/// What a model is trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Text files, or folders of them, cut into pieces of `context` tokens.
    Text {
        /// Files and folders, at least one.
        paths: Vec<PathBuf>,
        /// The tokenizer.
        tokenizer: Tokenizer,
        /// Tokens of one sample.
        context: usize,
    },
    /// Ready-made batches in a safetensors file, in order.
    Batches {
        /// The file.
        path: PathBuf,
    },
    /// Seeded random inputs.
    Random {
        /// Tokens of one sample; `None` means the model's own.
        context: Option<usize>,
        /// Channels, height and width of one image; `None` means the model's own.
        image: Option<[usize; 3]>,
    },
    /// Images in MNIST's (idx) or CIFAR-10's binary format.
    Images {
        /// The files, at least one.
        images: Vec<PathBuf>,
        /// The labels' file, where the images' files do not contain them.
        labels: Option<PathBuf>,
    },
}

/// A tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub enum Tokenizer {
    /// Each byte is a token.
    Bytes,
    /// A tokenizer.json, or a folder that contains one or vocab.json and merges.txt.
    File(PathBuf),
    /// The tokenizer in the directory from which the model comes.
    OfModel,
}

/// What may be written for a tokenizer.
pub const TOKENIZERS: &str =
    "tokenizer = \"bytes\", or the path of a tokenizer.json or of a folder with one, or with vocab.json and merges.txt";

/// Held-out data and how often it is evaluated.
#[derive(Clone, Debug, PartialEq)]
pub struct Valid {
    /// The data.
    pub part: ValidPart,
    /// Steps between evaluations; default 50.
    pub every: u64,
}

/// Which data is held out.
#[derive(Clone, Debug, PartialEq)]
pub enum ValidPart {
    /// A fraction of the training data, above 0 and below 1, which is then not trained on.
    Fraction(f64),
    /// Text of its own, read with the training data's tokenizer and context.
    Text(Vec<PathBuf>),
}

/// How long a model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// A number of updates.
    Steps(u64),
    /// A number of passes over the data.
    Epochs(u64),
}

/// The keys of a `[[model]]`.
pub const MODEL_KEYS: &[&str] = &[
    "name",
    "from",
    "family",
    "config",
    "dtype",
    "data",
    "valid",
    "batch",
    "microbatch",
    "loss_rows",
    "frozen",
    "lora",
    "steps",
    "epochs",
    "optimizer",
    "schedule",
    "search",
];

/// Bytes of the longest name.
pub const LONGEST_NAME: usize = 200;

/// Reads one model; `search` is read elsewhere.
pub fn read_model(s: &Section) -> Result<Model> {
    let name = read_name(s)?.to_string();
    let source = read_source(s)?;
    let dtype = s.word("dtype", &Precision::WORDS)?.unwrap_or(Precision::F32);
    let data = read_data(s, &source)?;
    let valid = read_valid(s, &data)?;
    let batch = s.count("batch")?.unwrap_or(1);
    let microbatch = s.count("microbatch")?.unwrap_or(batch);
    if !batch.is_multiple_of(microbatch) {
        let fits = (1..=microbatch).rev().find(|n| batch.is_multiple_of(*n)).unwrap_or(1);
        let message = format!("{microbatch} does not divide the batch of {batch}; {fits} does");
        return Err(s.fault("microbatch", message));
    }
    let loss_rows = s.count("loss_rows")?;
    let frozen = s.strings("frozen", "a list of beginnings of parameters' names, such as [\"transformer.h.0.\"]")?;
    let lora = read_lora(s)?;
    if lora.is_some() && frozen.is_some() {
        return Err(s.fault("frozen", "lora is there too, beside which all is frozen; keep one of them"));
    }
    let length = match (s.integer("steps", 1..=MOST)?, s.integer("epochs", 1..=MOST)?) {
        (Some(steps), None) => Length::Steps(steps),
        (None, Some(epochs)) => Length::Epochs(epochs),
        (Some(_), Some(_)) => return Err(s.fault("epochs", "steps is there too; keep one of them")),
        (None, None) => return Err(s.fault_here("steps or epochs is missing; write steps = 200")),
    };
    let (optimizer, clip) = read_optimizer(s)?;
    let schedule = read_schedule(s)?;
    let lr = optimizer.lr();
    if let Schedule::Linear { min_lr, .. } | Schedule::Cosine { min_lr, .. } = schedule
        && min_lr > lr
        && let Some(table) = s.section("schedule", SCHEDULE_KEYS)?
    {
        let message = format!("{min_lr} is above the learning rate of {lr}, from which it is to fall; write less");
        return Err(table.fault("min_lr", message));
    }
    let (file, at, searched) = (s.origin().file.to_string(), s.at().to_string(), Vec::new());
    Ok(Model {
        file,
        at,
        searched,
        name,
        source,
        dtype,
        data,
        valid,
        batch,
        microbatch,
        loss_rows,
        frozen: frozen.unwrap_or_default(),
        lora,
        length,
        optimizer,
        clip,
        schedule,
    })
}

/// Reads a model's name.
pub fn read_name<'a>(s: &Section<'a>) -> Result<&'a str> {
    let want = "a plain file name in quotes, such as \"gpt\"";
    let name = s.string("name", want)?.ok_or_else(|| s.fault("name", format!("is missing; write {want}")))?;
    // The name becomes a folder in the run's directory, and must not lead out of it or collide with a file there.
    let plain = !name.chars().any(|c| c == '/' || c == '\\' || c.is_control())
        && name.len() <= LONGEST_NAME
        && name.trim() == name;
    if is_taken(name) {
        return Err(
            s.fault("name", format!("{name:?} is a name that the run's directory has another use for; write another"))
        );
    }
    if !plain {
        return Err(s.fault("name", format!("want {want}, got {}", show(&Value::String(name.to_string())))));
    }
    // Files with such names are hidden: the inbox ignores them, and the program uses such names for files that are
    // still being written.
    if name.starts_with('.') {
        return Err(s.fault("name", format!("{name:?} begins with a dot; write another")));
    }
    Ok(name)
}

fn read_source(s: &Section) -> Result<Source> {
    match (s.path("from")?, s.string("family", "a family's name in quotes, such as \"gpt2\"")?) {
        (Some(_), Some(_)) => Err(s.fault("family", "from is there too; keep one of them")),
        (None, None) => {
            Err(s
                .fault_here("from or family is missing; write from = \"path/to/huggingface-dir\" or family = \"gpt2\""))
        }
        (Some(path), None) => {
            s.refuse(&["config"], "is for family only; a directory named by from has its own config.json")?;
            Ok(Source::From(path))
        }
        (None, Some(family)) => {
            let mut config = Map::new();
            for (key, value) in s.table("config")?.into_iter().flatten() {
                let json = to_json(value).ok_or_else(|| {
                    s.fault("config", format!("{key} is {}, which JSON cannot hold; write a finite number, a string, true, false, a list or a table", show(value)))
                })?;
                config.insert(key.clone(), json);
            }
            Ok(Source::Family { family: family.to_string(), config })
        }
    }
}

fn to_json(value: &Value) -> Option<serde_json::Value> {
    Some(match value {
        Value::String(text) => text.clone().into(),
        Value::Integer(n) => (*n).into(),
        Value::Float(n) => serde_json::Number::from_f64(*n)?.into(),
        Value::Boolean(yes) => (*yes).into(),
        Value::Datetime(_) => return None,
        Value::Array(list) => serde_json::Value::Array(list.iter().map(to_json).collect::<Option<_>>()?),
        Value::Table(table) => {
            let entries = table.iter().map(|(key, value)| Some((key.clone(), to_json(value)?)));
            serde_json::Value::Object(entries.collect::<Option<_>>()?)
        }
    })
}

/// The keys of `data`.
pub const DATA_KEYS: &[&str] = &["text", "tokenizer", "context", "batches", "random", "image", "images", "labels"];

fn read_data(s: &Section, source: &Source) -> Result<Data> {
    const KINDS: [&str; 4] = ["text", "batches", "random", "images"];
    const EXAMPLE: &str = "{ text = \"corpus.txt\", tokenizer = \"bytes\", context = 128 }";
    let missing = || s.fault("data", format!("is missing; write data = {EXAMPLE}"));
    let d = s.section("data", DATA_KEYS)?.ok_or_else(missing)?;
    let kinds: Vec<&str> = KINDS.into_iter().filter(|key| d.has(key)).collect();
    let kind = match kinds[..] {
        [kind] => kind,
        [] => return Err(d.fault_here(format!("want one of text, batches, random, images, such as {EXAMPLE}"))),
        [first, second, ..] => return Err(d.fault(second, format!("{first} is there too; keep one of them"))),
    };
    let own: &[&str] = match kind {
        "text" => &["tokenizer", "context"],
        "random" => &["context", "image"],
        "images" => &["labels"],
        _ => &[],
    };
    let foreign: Vec<&str> = DATA_KEYS.iter().copied().filter(|key| *key != kind && !own.contains(key)).collect();
    d.refuse(&foreign, &format!("does not go with {kind}; leave it out"))?;
    Ok(match kind {
        "text" => Data::Text {
            paths: d.paths("text")?.ok_or_else(missing)?,
            tokenizer: match (d.string("tokenizer", "\"bytes\" or the path of a tokenizer.json")?, source) {
                (Some("bytes"), _) => Tokenizer::Bytes,
                (Some(_), _) => Tokenizer::File(d.path("tokenizer")?.ok_or_else(missing)?),
                (None, Source::From(_)) => Tokenizer::OfModel,
                (None, Source::Family { .. }) => {
                    return Err(d.fault("tokenizer", format!("is missing; write {TOKENIZERS}")));
                }
            },
            context: d.count("context")?.ok_or_else(|| {
                d.fault("context", "is missing; write the tokens of one sample, such as context = 128")
            })?,
        },
        "batches" => Data::Batches { path: d.path("batches")?.ok_or_else(missing)? },
        "images" => Data::Images { images: d.paths("images")?.ok_or_else(missing)?, labels: d.path("labels")? },
        _ => {
            if d.flag("random")? == Some(false) {
                return Err(d.fault("random", "want true, or another kind of data"));
            }
            let context = d.count("context")?;
            let image = d.counts("image", "channels, height and width, such as [3, 224, 224]")?;
            if context.is_some() && image.is_some() {
                return Err(d.fault("image", "context is there too; keep context for text, image for images"));
            }
            Data::Random { context, image }
        }
    })
}

/// The keys of `valid`.
pub const VALID_KEYS: &[&str] = &["fraction", "text", "every"];

fn read_valid(s: &Section, data: &Data) -> Result<Option<Valid>> {
    let Some(v) = s.section("valid", VALID_KEYS)? else { return Ok(None) };
    let fraction = v.number("fraction", "a number above 0 and below 1, such as 0.1", |n| n > 0.0 && n < 1.0)?;
    let part = match (fraction, v.paths("text")?) {
        (Some(fraction), None) => ValidPart::Fraction(fraction),
        (None, Some(paths)) if matches!(data, Data::Text { .. }) => ValidPart::Text(paths),
        (None, Some(_)) => {
            let instead = match data {
                Data::Images { .. } => "write fraction = 0.1",
                _ => "leave valid out",
            };
            return Err(v.fault("text", format!("goes with text as the training data only; {instead}")));
        }
        (Some(_), Some(_)) => return Err(v.fault("text", "fraction is there too; keep one of them")),
        (None, None) => return Err(v.fault_here("want fraction or text, such as { fraction = 0.1, every = 50 }")),
    };
    Ok(Some(Valid { part, every: v.integer("every", 1..=MOST)?.unwrap_or(50) }))
}

/// The keys of `lora`.
pub const LORA_KEYS: &[&str] = &["rank", "alpha", "dropout", "targets"];

fn read_lora(s: &Section) -> Result<Option<LowRank>> {
    let Some(l) = s.section("lora", LORA_KEYS)? else { return Ok(None) };
    let want = "a list of names of linear layers or their ends, such as [\"q_proj\", \"v_proj\"]";
    let targets = l.strings("targets", want)?.filter(|targets| !targets.is_empty());
    let targets = targets.ok_or_else(|| l.fault("targets", format!("is missing; write {want}")))?;
    let rank = l.count("rank")?.unwrap_or(8);
    if rank > MOST_RANK {
        return Err(l.fault("rank", format!("want {MOST_RANK} at most, got {rank}")));
    }
    let alpha = l.number("alpha", "a number above 0, up to 1e6", |alpha| alpha > 0.0 && alpha <= 1e6)?;
    let dropout = l.number("dropout", "a number from 0 to below 1", |p| (0.0..1.0).contains(&p))?;
    let (alpha, dropout) = (alpha.unwrap_or(rank as f64), dropout.unwrap_or(0.0));
    Ok(Some(LowRank { rank, alpha, dropout, targets }))
}
