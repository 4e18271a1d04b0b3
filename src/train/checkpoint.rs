//! A checkpoint: weights, moments and running statistics after some steps, in one safetensors file, with a checksum in
//! place of the weights that are not trained.
//!
//! The numbers are exact, and everything else that a step depends on (order of the data, dropout, learning rate)
//! follows from the step's number, so a resumed run computes the same bits as one that was never stopped. The settings
//! that must be the same for that are written to the file's metadata and compared: with some of them different the
//! numbers mean nothing; the others may be changed on purpose, and the change is reported.

use super::optimizer::{Optimizer, Schedule};
use super::options::TrainOptions;
use crate::base::tensorfile::{Element, TensorIndex, header};
use crate::base::{Error, Result, Shape};
use crate::engine::{Engine, Stored};
use crate::nn::safely::write_safely;
use crate::spill::Model;
use crc32fast::Hasher;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The value of `format` in the file's metadata.
const FORMAT: &str = "hydra-checkpoint-2";
/// The key of the model's element type. Numbers are always f32: a bf16 model's weights are stored as their f32 masters.
const DTYPE: &str = "dtype";
/// The key of whether products round their factors to tf32, which the job file sets with a `dtype` of its own.
const TF32: &str = "tf32";
/// The key of how many rows of logits are computed at a time, which fixes the order in which gradients are summed.
const LOSS_ROWS: &str = "loss_rows";
/// The key of the tokenizer of the model's text.
const TOKENIZER: &str = "tokenizer";
/// The key of which parameters are not trained; of those the file has only a checksum.
const FROZEN: &str = "frozen";
const LOW_RANK: &str = "lora";
/// The key of the CRC-32 of the frozen weights' f32s, in the model's order.
const FROZEN_CHECKSUM: &str = "frozen.checksum";
/// The key of the network's settings, by config.json's keys.
const NETWORK: &str = "network";
/// Those of config.json's keys that do not matter in training, or that the tensors' shapes imply.
const OF_NO_ACCOUNT: [&str; 6] =
    ["id2label", "initializer_range", "n_inner", "position_embedding_type", "problem_type", "reorder_and_upcast_attn"];
/// The key of whether the model had come to its end.
const ENDED: &str = "ended";
/// The file's last tensor: the CRC-32 of all bytes before it, as the bits of one I32.
const CHECKSUM: &str = "checksum";
/// Keys of the optimizer that determine what the moments mean.
const KIND: &str = "optimizer.kind";
const MOMENTUM: &str = "optimizer.momentum";

/// What must stay the same in a run besides its model and the model's element type: what determines minibatches and
/// dropout.
fn identity(options: &TrainOptions) -> [(&'static str, u64); 3] {
    [("seed", options.seed), ("batch", options.batch as u64), ("microbatch", options.microbatch as u64)]
}

/// How a model is updated, by the job file's keys.
fn updates(options: &TrainOptions) -> Vec<(&'static str, String)> {
    // Debug prints the fewest digits that read back as the same number.
    let number = |x: f64| format!("{x:?}");
    let mut all = vec![(TF32, options.tf32.to_string()), ("optimizer.lr", number(options.optimizer.lr()))];
    match options.optimizer {
        Optimizer::Adamw { betas, epsilon, weight_decay, decay_matrices_only, .. } => all.extend([
            (KIND, "adamw".into()),
            ("optimizer.betas", format!("[{:?}, {:?}]", betas.0, betas.1)),
            ("optimizer.eps", number(epsilon)),
            ("optimizer.weight_decay", number(weight_decay)),
            ("optimizer.decay", if decay_matrices_only { "matrices" } else { "all" }.into()),
        ]),
        Optimizer::Sgd { momentum, nesterov, weight_decay, .. } => all.extend([
            (KIND, "sgd".into()),
            (MOMENTUM, number(momentum)),
            ("optimizer.nesterov", nesterov.to_string()),
            ("optimizer.weight_decay", number(weight_decay)),
        ]),
    }
    all.push((LOSS_ROWS, options.loss_rows.map_or("none".into(), |rows| rows.to_string())));
    all.push(("optimizer.clip", options.clip.map_or("none".into(), number)));
    let (kind, shape) = match options.schedule {
        Schedule::Constant => ("constant", None),
        Schedule::Linear { warmup, min_lr } => ("linear", Some((warmup, min_lr))),
        Schedule::Cosine { warmup, min_lr } => ("cosine", Some((warmup, min_lr))),
    };
    all.push(("schedule.kind", kind.into()));
    if let Some((warmup, min_lr)) = shape {
        // Where the learning rate falls, it falls towards the last step.
        all.extend([
            ("schedule.warmup", warmup.to_string()),
            ("schedule.min_lr", number(min_lr)),
            ("steps", options.steps.to_string()),
        ]);
    }
    all
}

/// The first key whose values in the two settings make them different networks, with both values. A key that only one
/// of them has is from another version of this program.
fn network_change(was: &str, is: &str) -> Option<(String, Value, Value)> {
    let read = |text| serde_json::from_str::<Map<String, Value>>(text).ok();
    let (was, is) = (read(was)?, read(is)?);
    let same = |a: &Value, b: &Value| a == b || a.as_f64().is_some_and(|a| b.as_f64() == Some(a));
    let counts = |key: &String| !OF_NO_ACCOUNT.contains(&key.as_str());
    let change = |(key, is): (String, Value)| {
        let was = was.get(&key).filter(|was| !same(was, &is))?.clone();
        Some((key, was, is))
    };
    is.into_iter().filter(|(key, _)| counts(key)).find_map(change)
}

/// A setting that has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The job file's key, within the model.
    pub key: &'static str,
    /// Its value when the checkpoint was written.
    pub was: String,
    /// Its value now.
    pub is: String,
}

/// One tensor of a model in training.
#[derive(Clone, Copy, Debug)]
enum Part {
    Parameter(Stored, usize),
    State(usize),
}

/// All tensors of a model that change in training, with their names in the file and their shapes.
fn parts(model: &Model, moments: usize) -> Vec<(String, &Shape, Part)> {
    let mut parts = Vec::new();
    for (i, p) in model.train.parameters.iter().enumerate().filter(|(_, p)| !p.frozen) {
        parts.push((format!("weight/{}", p.name), &p.shape, Part::Parameter(Stored::Weight, i)));
        for m in 0..moments {
            parts.push((format!("moment{m}/{}", p.name), &p.shape, Part::Parameter(Stored::Moment(m), i)));
        }
    }
    for (i, s) in model.train.states.iter().enumerate() {
        parts.push((format!("state/{}", s.name), &s.shape, Part::State(i)));
    }
    parts
}

/// The checksum of the engine's frozen weights of model number `of`; none where all are trained.
fn frozen_checksum(engine: &Engine, of: usize) -> Result<Option<u32>> {
    let mut sum = None;
    for (i, _) in engine.model(of).train.parameters.iter().enumerate().filter(|(_, p)| p.frozen) {
        let values = engine.read_parameter(of, Stored::Weight, i)?;
        let sum = sum.get_or_insert_with(Hasher::new);
        pieces(&values).for_each(|bytes| sum.update(&bytes));
    }
    Ok(sum.map(Hasher::finalize))
}

/// The bytes of `values`, in pieces.
fn pieces(values: &[f32]) -> impl Iterator<Item = Vec<u8>> {
    values.chunks(1 << 14).map(|some| some.iter().flat_map(|value| value.to_le_bytes()).collect())
}

/// Writes the state of the engine's model number `of` after `step` steps to `path`, replacing an older checkpoint only
/// once this one is on the disk. Call [`Engine::wait_home`] first.
///
/// # Errors
/// When the file cannot be written, or the state cannot be read ([`Engine::read_parameter`], [`Engine::read_state`]):
/// steps were begun since the state came home, or the model ended in the middle of one.
pub fn write_checkpoint(path: &Path, engine: &Engine, of: usize, options: &TrainOptions, step: u64) -> Result<()> {
    write(path, engine, of, options, (step, false))
}

/// Writes the checkpoint of a model that has come to its end, after everything else of it is saved: whoever finds this
/// file has nothing left to do.
///
/// # Errors
/// As [`write_checkpoint`].
pub fn write_last_checkpoint(path: &Path, engine: &Engine, of: usize, options: &TrainOptions, step: u64) -> Result<()> {
    write(path, engine, of, options, (step, true))
}

fn write(path: &Path, engine: &Engine, of: usize, options: &TrainOptions, (step, ended): (u64, bool)) -> Result<()> {
    let model = engine.model(of);
    let parts = parts(model, engine.plan(of).updates.moments);
    let mut metadata = BTreeMap::from([("format", FORMAT.into()), ("step", step.to_string())]);
    metadata.extend(identity(options).map(|(key, value)| (key, value.to_string())));
    metadata.extend(updates(options));
    metadata.extend([(ENDED, ended.to_string()), (DTYPE, model.train.float.to_string())]);
    if !options.frozen.is_empty() {
        metadata.insert(FROZEN, json!(options.frozen).to_string());
    }
    metadata.extend(options.low_rank.as_ref().map(|low_rank| (LOW_RANK, json!(low_rank).to_string())));
    metadata.extend(frozen_checksum(engine, of)?.map(|sum| (FROZEN_CHECKSUM, sum.to_string())));
    metadata.extend(options.tokenizer.clone().map(|tokenizer| (TOKENIZER, tokenizer)));
    metadata.extend(options.network.clone().map(|network| (NETWORK, network)));
    metadata.extend(options.data.iter().cloned());
    let tensors = parts.iter().map(|(name, shape, _)| (name.as_str(), Element::F32, shape.axes()));
    let header = header(&metadata, tensors.chain([(CHECKSUM, Element::I32, &[1][..])]));
    write_safely(path, |out| {
        let mut sum = Hasher::new();
        let mut write = |bytes: &[u8]| {
            sum.update(bytes);
            out.write_all(bytes)
        };
        write(&header)?;
        for (_, _, part) in &parts {
            let values = match *part {
                Part::Parameter(what, i) => engine.read_parameter(of, what, i).map_err(std::io::Error::other)?,
                Part::State(i) => engine.read_state(of, i).map_err(std::io::Error::other)?,
            };
            pieces(&values).try_for_each(|bytes| write(&bytes))?;
        }
        out.write_all(&sum.finalize().to_le_bytes())
    })
}

/// A checkpoint on the disk whose header has been read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    file: File,
    index: TensorIndex,
    step: u64,
}

impl Checkpoint {
    /// Opens the checkpoint at `path`; `None` where there is no such file.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or is no checkpoint.
    pub fn open(path: &Path) -> Result<Option<Checkpoint>> {
        let io = |e| Error::io("read", path, e);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
        };
        let file_bytes = file.metadata().map_err(io)?.len();
        let index = TensorIndex::read(&file, file_bytes, path)?;
        let step = index.metadata().get("step").and_then(|s| s.parse().ok());
        match (index.metadata().get("format").map(String::as_str), step) {
            (Some(FORMAT), Some(step)) => Ok(Some(Checkpoint { path: path.to_path_buf(), file, index, step })),
            _ => Err(Error::bad(format!("{}: is no checkpoint of this program ({FORMAT})", path.display()))),
        }
    }

    /// Steps done when it was written.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Whether the model had come to its end, and been saved.
    pub fn ended(&self) -> bool {
        self.index.metadata().get(ENDED).is_some_and(|ended| ended == "true")
    }

    /// In what `options` would update the model differently from the run that wrote this, or with other data.
    pub fn changes(&self, options: &TrainOptions) -> Vec<Change> {
        let change = |(key, is): (&'static str, String)| {
            let was = self.index.metadata().get(key).filter(|was| **was != is)?.clone();
            Some(Change { key, was, is })
        };
        updates(options).into_iter().chain(options.data.iter().cloned()).filter_map(change).collect()
    }

    /// Compares it with the run that is to resume from it. Settings that the run may change are left to
    /// [`Checkpoint::changes`].
    ///
    /// # Errors
    /// [`Error::BadInput`] that names the first difference that makes its numbers meaningless.
    pub fn check(&self, options: &TrainOptions, model: &Model) -> Result<()> {
        for (key, want) in identity(options) {
            let found = self.index.metadata().get(key).map_or("missing", String::as_str);
            if found != want.to_string() {
                return Err(self.fault(format!("{key} is {found} in the checkpoint, {want} in the job")));
            }
        }
        let (found, want) = (self.index.metadata().get(DTYPE).map_or("missing", String::as_str), model.train.float);
        if found != want.to_string() {
            return Err(self.fault(format!("{DTYPE} is {found} in the checkpoint, {want} in the job")));
        }
        let (found, want) = (self.index.metadata().get(FROZEN), json!(options.frozen).to_string());
        if found.map_or("[]", String::as_str) != want {
            let found = found.map_or("[]", String::as_str);
            return Err(self.fault(format!("{FROZEN} is {found} in the checkpoint, {want} in the job")));
        }
        let (found, want) = (self.index.metadata().get(LOW_RANK), options.low_rank.as_ref());
        let want = want.map_or("none".to_string(), |low_rank| json!(low_rank).to_string());
        if found.map_or("none", String::as_str) != want {
            let found = found.map_or("none", String::as_str);
            return Err(self.fault(format!("{LOW_RANK} is {found} in the checkpoint, {want} in the job")));
        }
        // Either may leave it out.
        if let (Some(found), Some(want)) = (self.index.metadata().get(TOKENIZER), &options.tokenizer)
            && found != want
        {
            return Err(self.fault(format!("{TOKENIZER} is {found} in the checkpoint, {want} in the job")));
        }
        // Another rule would interpret the moments differently, and SGD without momentum has none.
        let none = |momentum: &str| momentum.parse() == Ok(0.0);
        let meaningless = |c: &Change| c.key == KIND || c.key == MOMENTUM && none(&c.was) != none(&c.is);
        if let Some(Change { key, was, is }) = self.changes(options).into_iter().find(meaningless) {
            return Err(self.fault(format!("{key} is {was} in the checkpoint, {is} in the job")));
        }
        let parts = parts(model, options.optimizer.moments());
        for (name, shape, _) in &parts {
            let Some(entry) = self.index.get(name) else {
                return Err(self.fault(format!("tensor {name}: is missing; the job's model has it")));
            };
            if entry.shape != **shape || entry.element != Element::F32 {
                let (found, element) = (&entry.shape, entry.element);
                return Err(self.fault(format!("tensor {name}: is {found} {element}, the job's model has {shape} F32")));
            }
        }
        let known = |name: &str| name == CHECKSUM || parts.iter().any(|(part, _, _)| part == name);
        if self.index.entries().iter().any(|e| !known(&e.name)) {
            let extra = self.index.entries().iter().find(|e| !known(&e.name)).map_or("?", |e| &e.name);
            return Err(self.fault(format!("tensor {extra}: the job's model has no such tensor")));
        }
        // What the tensors do not imply, where both sides state it.
        if let (Some(found), Some(want)) = (self.index.metadata().get(NETWORK), &options.network)
            && let Some((key, was, is)) = network_change(found, want)
        {
            return Err(self.fault(format!("config.{key} is {was} in the checkpoint, {is} in the job")));
        }
        self.check_sum()
    }

    /// Checks that all bytes are those that were written.
    fn check_sum(&self) -> Result<()> {
        let Some(entry) = self.index.get(CHECKSUM) else { return Err(self.fault("has no checksum".into())) };
        let io = |e| Error::io("read", &self.path, e);
        let (mut file, mut sum) = (&self.file, Hasher::new());
        let mut bytes = vec![0; 1 << 18];
        let mut left = entry.start_bytes;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        while left > 0 {
            let some = &mut bytes[..left.min(1 << 18) as usize];
            file.read_exact(some).map_err(io)?;
            sum.update(some);
            left -= some.len() as u64;
        }
        let mut written = [0; 4];
        file.read_exact(&mut written).map_err(io)?;
        match sum.finalize() == u32::from_le_bytes(written) {
            true => Ok(()),
            false => Err(self.fault("is damaged: its bytes are not those that were written, by its checksum".into())),
        }
    }

    /// Writes all tensors into the host's store for the engine's model number `of`, whose frozen weights must already
    /// be there. Call [`Checkpoint::check`] first, and this before the first step.
    ///
    /// # Errors
    /// When the file cannot be read or lacks a tensor, or the frozen weights differ from those that it was trained
    /// with.
    pub fn restore(&mut self, engine: &mut Engine, of: usize) -> Result<()> {
        let (found, want) = (self.index.metadata().get(FROZEN_CHECKSUM), frozen_checksum(engine, of)?);
        if found.cloned() != want.map(|sum| sum.to_string()) {
            return Err(self.fault("the frozen weights are others than those that it was trained with".into()));
        }
        let model = std::sync::Arc::clone(engine.model(of));
        for (name, shape, part) in parts(&model, engine.plan(of).updates.moments) {
            let start = match self.index.get(&name).filter(|e| e.shape == *shape) {
                Some(entry) => entry.start_bytes,
                None => return Err(self.fault(format!("tensor {name}: is missing, or not {shape}"))),
            };
            let mut bytes = vec![0; 4 * shape.elems()];
            let read = self.file.seek(SeekFrom::Start(start)).and_then(|_| self.file.read_exact(&mut bytes));
            read.map_err(|e| Error::io("read", &self.path, e))?;
            let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            match part {
                Part::Parameter(what, i) => engine.write_parameter(of, what, i, &values)?,
                Part::State(i) => engine.write_state(of, i, &values)?,
            }
        }
        Ok(())
    }

    fn fault(&self, what: String) -> Error {
        Error::bad(format!("{}: {what}", self.path.display()))
    }
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
