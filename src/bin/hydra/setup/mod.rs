//! A job's models made ready: the network, its data, and how to train it; nothing is planned yet and no weight is read.

pub mod recipe;

use crate::job::model::{Data, Length, Precision, Source as Whence, TOKENIZERS, Tokenizer, ValidPart};
use crate::job::{self, DeviceKind, Job, Pipeline, Policy};
use crate::print::note;
use crate::text::Texts;
use crate::text::companions::{self, Files, PREPROCESSOR};
use crate::text::tokenizer::{FileTokenizer, Tokenizers, cut_by};
use hydra::base::{DType, Error, Result};
use hydra::data::{Source, names};
use hydra::graph::{Graph, Parameter, adapted_layer};
use hydra::nn::{self, Form, InputShape, Network, Pretrained};
use hydra::spill::{Baseline, PlanOptions};
use hydra::train::{TrainOptions, Weights, inputs_of};
use recipe::{Recipe, Sources};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Steps beyond this are refused, as the job file's own key does.
const MOST_STEPS: u64 = i32::MAX as u64;

/// A model that is ready to be planned.
pub struct Prepared {
    /// Its name.
    pub name: String,
    /// Its network, with or without weights.
    pub origin: Origin,
    /// How to train it; the device's part is filled in by whoever plans.
    pub options: TrainOptions,
    /// The tensors of a sample.
    pub inputs: Vec<InputShape>,
    /// Its data, opened once to see what is there.
    opened: RefCell<Option<Sources>>,
    recipe: Recipe,
    /// What lay beside the model in its directory.
    companions: Arc<Files>,
}

/// Where a network and its first weights come from.
pub enum Origin {
    /// A Hugging Face directory.
    Pretrained(Box<Pretrained>),
    /// Sizes from the job; weights drawn from the seed.
    Family(Box<dyn Network>),
}

impl Origin {
    fn network(&self) -> &dyn Network {
        match self {
            Origin::Pretrained(pretrained) => pretrained.network.as_ref(),
            Origin::Family(network) => network.as_ref(),
        }
    }
}

impl Prepared {
    /// The network.
    pub fn network(&self) -> &dyn Network {
        self.origin.network()
    }

    /// Where the first weights come from.
    pub fn weights(&self) -> Weights<'_> {
        match &self.origin {
            Origin::Pretrained(pretrained) => Weights::Pretrained(pretrained),
            Origin::Family(_) => Weights::Random,
        }
    }

    /// The directory that it comes from, if it does from one.
    pub fn base(&self) -> Option<&Path> {
        match &self.origin {
            Origin::Pretrained(pretrained) => Some(pretrained.dir()),
            Origin::Family(_) => None,
        }
    }

    /// Reads the weights of `graph` once, so that damaged ones are told before anything is done with them.
    ///
    /// # Errors
    /// When one is missing, has another shape, or is not finite.
    pub fn check_weights(&self, graph: &Graph) -> Result<()> {
        let Origin::Pretrained(pretrained) = &self.origin else { return Ok(()) };
        let in_files = |p: &&Parameter| adapted_layer(&p.name).is_none();
        graph.parameters.iter().filter(in_files).try_for_each(|p| pretrained.tensor(&p.name, &p.shape).map(drop))?;
        graph.states.iter().try_for_each(|s| pretrained.tensor(&s.name, &s.shape).map(drop))
    }

    /// What its directory looks like when it is saved, and the counts that it began with.
    ///
    /// # Errors
    /// When the network does not trace with its own inputs.
    pub fn form(&self) -> Result<Form> {
        let form = match &self.origin {
            Origin::Pretrained(pretrained) => pretrained.form.clone(),
            Origin::Family(network) => Form::of(network.as_ref())?,
        };
        let mut files = self.recipe.tokenizer.as_ref().map_or_else(Vec::new, |tokenizer| tokenizer.files.clone());
        // What cut the text stands in the place of another tokenizer.
        let cut_by_own = match &self.recipe.data {
            Data::Text { tokenizer, .. } => *tokenizer == Tokenizer::OfModel,
            _ => true,
        };
        companions::complete(&mut files, &self.companions, cut_by_own);
        let pixels = self.inputs.iter().find(|input| input.name == names::PIXEL_VALUES);
        if let (Data::Images { .. }, Some([c, h, w])) = (&self.recipe.data, pixels.map(|input| &input.axes[..]))
            && files.iter().all(|(name, _)| name != PREPROCESSOR)
        {
            files.push(companions::preprocessor([*c, *h, *w]));
        }
        Ok(Form { files, ..form })
    }

    /// Its data, from the start.
    ///
    /// # Errors
    /// When a file is missing or at fault.
    pub fn sources(&self, texts: &Texts) -> Result<Sources> {
        match self.opened.take() {
            Some(sources) => Ok(sources),
            None => self.recipe.open(self.network(), texts),
        }
    }

    /// Closes its data: it will not be trained.
    pub fn close(&self) {
        self.opened.take();
    }

    /// Tokens of a step; `None` for images.
    pub fn step_tokens(&self) -> Option<u64> {
        let ids = self.inputs.iter().find(|input| input.name == names::INPUT_IDS)?;
        Some(self.options.batch as u64 * ids.axes.iter().product::<usize>() as u64)
    }
}

/// Refuses what a job may ask for and this program cannot do yet.
///
/// # Errors
/// [`Error::BadInput`] that names the key.
pub fn check_scope(file: &str, job: &Job) -> Result<()> {
    let fault = |at: &str, what: &str| Err(Error::bad(format!("{file}: {at}: {what}")));
    if job.run.pipeline_microbatches.is_some() && job.run.policy != Policy::Lines(Baseline::Gpipe) {
        return fault("run.pipeline_microbatches", "goes with policy = \"gpipe\" only; leave it out");
    }
    if job.run.pipeline == Pipeline::Always {
        let devices: usize = job.devices.iter().map(|d| d.count).sum();
        if job.run.policy != Policy::LOCALITY_LRTF || devices < 2 {
            let what = "\"always\" goes with policy = \"locality-lrtf\" and two devices or more; leave it out";
            return fault("run.pipeline", what);
        }
    }
    if job.host.link.is_some() && !matches!(job.devices[0].kind, DeviceKind::Host | DeviceKind::Sim) {
        return fault("host.link", "is for kind = \"host\" and \"sim\" only; leave it out");
    }
    Ok(())
}

thread_local! {
    /// Directories of which a command has said so, for however many models and plans it opens them.
    static NOTED: RefCell<BTreeSet<PathBuf>> = const { RefCell::new(BTreeSet::new()) };
}

/// Says which weights of a directory the network has no use for, once.
pub fn note_unused(dir: &Path, unused: &[String]) {
    let Some(first) = unused.first() else { return };
    if !NOTED.with_borrow_mut(|noted| noted.insert(dir.to_path_buf())) {
        return;
    }
    let more = if unused.len() > 1 { format!(" and {} more", unused.len() - 1) } else { String::new() };
    note(format!("{}: weights of layers that the network has not are left out: {first}{more}", dir.display()));
}

/// Makes model number `i` of the job ready.
///
/// # Errors
/// When a file is missing or at fault, or the parts do not go together; the message names the file or the key.
pub fn prepare(job: &Job, i: usize, texts: &Texts) -> Result<Prepared> {
    let model = &job.models[i];
    let fault = |key: &str, what: String| model.fault(key, what);
    let kind = job.devices[0].kind;
    if model.dtype == Precision::Tf32 && !matches!(kind, DeviceKind::Cuda | DeviceKind::Emulated) {
        let what = format!("tf32 goes with kind = \"cuda\", not \"{}\"; write dtype = \"f32\"", kind.word());
        return Err(fault("dtype", what));
    }
    let build = |family: &str, config: &serde_json::Map<String, serde_json::Value>| {
        nn::from_config(family, &config.clone().into()).map_err(|e| fault("family", e.to_string()))
    };
    let mut origin = match &model.source {
        Whence::From(dir) => {
            let pretrained = nn::open(dir)?;
            note_unused(dir, &pretrained.unused);
            Origin::Pretrained(Box::new(pretrained))
        }
        Whence::Family { family, config } => Origin::Family(build(family, config)?),
    };
    let tokenizer = open_tokenizer(model, &texts.tokenizers)?;
    let (cut_by, identity) = cut_by(tokenizer.as_ref());
    let of_text = matches!(model.data, Data::Text { .. });
    if let Whence::Family { family, config } = &model.source
        && of_text
        && !config.contains_key("vocab_size")
        && origin.network().labels().vocab.is_some()
    {
        let mut config = config.clone();
        config.insert("vocab_size".into(), cut_by.vocab().into());
        origin = Origin::Family(build(family, &config)?);
    }
    let network = origin.network();
    if of_text {
        if network.inputs().iter().any(|input| input.name == names::PIXEL_VALUES) {
            return Err(fault(
                "data.text",
                "the model takes images, not text; write images, or batches of them".into(),
            ));
        }
        let labels = network.labels();
        if labels.vocab.is_some() && !labels.shift {
            let what = "labels each token by the next one, which is not what the model learns; write batches, or random = true";
            return Err(fault("data.text", what.into()));
        }
        // Before the text is cut, which may take long.
        let vocab = Some(cut_by.vocab());
        check_fit(network, vocab, vocab).map_err(|what| fault("data", what))?;
    }
    if model.valid.as_ref().is_some_and(|v| matches!(v.part, ValidPart::Fraction(_)))
        && !matches!(model.data, Data::Text { .. } | Data::Images { .. })
    {
        return Err(fault("valid.fraction", "goes with text and images only; leave valid out".into()));
    }
    let identity = of_text.then(|| identity.to_string());
    let recipe = Recipe {
        data: model.data.clone(),
        tokenizer,
        valid: model.valid.clone(),
        batch: model.batch,
        seed: job.run.seed,
    };
    recipe.check_random(network).map_err(|(key, what)| fault(key, what.into()))?;
    let sources = recipe.open(network, texts)?;
    let made = sources.train.spec();
    check_fit(network, made.vocab, made.classes).map_err(|what| fault("data", what))?;
    let steps = steps(&model.length, sources.train.as_ref()).map_err(|(key, what)| fault(key, what))?;
    let inputs = inputs_of(sources.train.as_ref());
    let mut options = TrainOptions::new(steps);
    options.seed = job.run.seed;
    options.batch = model.batch;
    options.microbatch = microbatch(job, model)?;
    if model.loss_rows.is_some() && network.labels().vocab.is_none() {
        return Err(model.fault("loss_rows", "is for models over tokens; leave it out"));
    }
    options.loss_rows = model.loss_rows;
    check_frozen(network, model)?;
    options.frozen = model.frozen.clone();
    options.low_rank = model.lora.clone();
    options.dtype = if model.dtype == Precision::Bf16 { DType::Bf16 } else { DType::F32 };
    options.tf32 = model.dtype == Precision::Tf32;
    (options.optimizer, options.clip, options.schedule) = (model.optimizer, model.clip, model.schedule);
    options.tokenizer = identity;
    options.network = Some(nn::settings(&network.config()).to_string());
    options.data = recipe.identity(texts)?;
    options.valid_every = model.valid.as_ref().map_or(50, |v| v.every);
    options.plan =
        PlanOptions { slots: job.run.slots.unwrap_or(2), recompute: job.run.recompute, ..PlanOptions::default() };
    let companions = match &model.source {
        Whence::From(dir) => texts.companions.open(dir)?,
        Whence::Family { .. } => Arc::default(),
    };
    let (name, opened) = (model.name.clone(), RefCell::new(Some(sources)));
    Ok(Prepared { name, origin, options, inputs, opened, recipe, companions })
}

/// Refuses beginnings with which no parameter's name begins.
fn check_frozen(network: &dyn Network, model: &job::Model) -> Result<()> {
    if model.frozen.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = nn::tensors(network)?.into_iter().map(|(name, _)| name).collect();
    let begins = |start: &&String| names.iter().any(|name| name.starts_with(*start));
    let Some(start) = model.frozen.iter().find(|start| !begins(start)) else { return Ok(()) };
    let alike = |name: &&String| name.bytes().zip(start.bytes()).take_while(|(a, b)| a == b).count();
    let such = names.iter().rev().max_by_key(alike).map_or(String::new(), |name| format!("; there is {name}"));
    Err(model.fault("frozen", format!("no parameter's name begins with {start:?}{such}")))
}

/// The tokenizer of a model's text, where it comes from files.
fn open_tokenizer(model: &job::Model, tokenizers: &Tokenizers) -> Result<Option<Arc<FileTokenizer>>> {
    let Data::Text { tokenizer, .. } = &model.data else { return Ok(None) };
    let (path, says) = match (tokenizer, &model.source) {
        (Tokenizer::Bytes, _) => return Ok(None),
        (Tokenizer::File(path), _) => (path, ""),
        (Tokenizer::OfModel, Whence::From(dir)) => (dir, "is missing, and "),
        (Tokenizer::OfModel, Whence::Family { .. }) => unreachable!("a family has no directory, as its reader knows"),
    };
    let found = tokenizers.open(path).map_err(|e| match e {
        Error::BadInput(what) => model.fault("data.tokenizer", what),
        other => other,
    })?;
    found.map(Some).ok_or_else(|| {
        let what = format!("{says}{} holds no tokenizer; write {TOKENIZERS}", path.display());
        model.fault("data.tokenizer", what)
    })
}

/// Samples that run together. In a pipeline they follow from how many microbatches it is to hold: by default as many as
/// there are devices, or the most below that which divide the batch.
fn microbatch(job: &Job, model: &job::Model) -> Result<usize> {
    if job.run.policy != Policy::Lines(Baseline::Gpipe) {
        return Ok(model.microbatch);
    }
    let devices: usize = job.devices.iter().map(|d| d.count).sum();
    let fits = |n: usize| model.batch.is_multiple_of(n);
    let count = match job.run.pipeline_microbatches {
        Some(stated) if !fits(stated) => {
            let batch = model.batch;
            let what = format!("run.pipeline_microbatches = {stated} does not divide the batch of {batch}");
            return Err(model.fault("batch", what));
        }
        Some(stated) => stated,
        None => (1..=devices).rev().find(|&n| fits(n)).unwrap_or(1),
    };
    Ok(model.batch / count)
}

/// Ids and labels that a source may make against those that the network takes.
fn check_fit(network: &dyn Network, vocab: Option<usize>, classes: Option<usize>) -> std::result::Result<(), String> {
    let labels = network.labels();
    if let (Some(have), Some(takes)) = (vocab, labels.vocab)
        && have > takes
    {
        return Err(format!("its tokens are 0..{have}, the model's vocab_size is {takes}; it must be at least {have}"));
    }
    if let Some(have) = classes.filter(|&have| have > labels.classes) {
        return Err(format!("its labels are 0..{have}, the model has {} classes", labels.classes));
    }
    Ok(())
}

/// Steps of a run, or the key at fault and why.
fn steps(length: &Length, source: &dyn Source) -> std::result::Result<u64, (&'static str, String)> {
    let steps = match *length {
        Length::Steps(steps) => steps,
        Length::Epochs(epochs) => match source.batches_per_epoch() {
            u64::MAX => return Err(("epochs", "random data has no end; write steps".into())),
            batches => epochs
                .checked_mul(batches)
                .filter(|&steps| (1..=MOST_STEPS).contains(&steps))
                .ok_or(("epochs", format!("{epochs} of {batches} minibatches are more than {MOST_STEPS} steps")))?,
        },
    };
    let key = if matches!(length, Length::Steps(_)) { "steps" } else { "epochs" };
    match source.spec().batches {
        Some(ready) if steps > ready => {
            Err((key, format!("{steps} steps are more than the {ready} minibatches of the file")))
        }
        _ => Ok(steps),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydra::data::Batch;
    use hydra::spill::Recompute;
    use hydra::train::{Optimizer, Schedule};

    /// Two models of which no setting has its default.
    const JOB: &str = "[run]
seed = 9
slots = 3
recompute = 'never'
[[device]]
kind = 'host'
[[model]]
name = 'a'
family = 'gpt2'
config = { n_layer = 1, n_embd = 16, n_head = 2, n_positions = 8, bos_token_id = 0, eos_token_id = 0 }
data = { text = 'corpus.txt', tokenizer = 'bytes', context = 8 }
valid = { fraction = 0.25, every = 3 }
dtype = 'bf16'
batch = 12
microbatch = 4
frozen = ['transformer.h.0.']
steps = 7
optimizer = { lr = 0.5, betas = [0.8, 0.99], eps = 1e-3, weight_decay = 0.25, clip = 2.5, decay = 'matrices' }
schedule = { kind = 'linear', warmup = 2, min_lr = 0.125 }
[[model]]
name = 'b'
family = 'gpt2'
config = { n_layer = 1, n_embd = 16, n_head = 2, n_positions = 8, vocab_size = 11, bos_token_id = 0, eos_token_id = 0 }
data = { random = true }
batch = 12
steps = 9
optimizer = { kind = 'sgd', lr = 0.75, momentum = 0.5, nesterov = true, weight_decay = 0.125, clip = 1.5 }
schedule = { kind = 'cosine', warmup = 3, min_lr = 0.25 }
";

    fn prepared(sets: &[&str]) -> Vec<Result<Prepared>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        std::fs::write(&path, JOB).unwrap();
        std::fs::write(folder.path().join("corpus.txt"), "The lazy dog. ".repeat(99)).unwrap();
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let job = Job::load(&path, &sets).unwrap();
        (0..2).map(|i| prepare(&job, i, &Texts::default())).collect()
    }

    #[test]
    fn a_model_is_trained_as_its_job_says() {
        let all: Vec<TrainOptions> = prepared(&[]).into_iter().map(|model| model.unwrap().options).collect();
        let [a, b] = &all[..] else { panic!("two models") };
        let sizes = |o: &TrainOptions| (o.seed, o.batch, o.microbatch, o.steps, o.valid_every, o.dtype, o.clip);
        assert_eq!(sizes(a), (9, 12, 4, 7, 3, DType::Bf16, Some(2.5)));
        assert_eq!(sizes(b), (9, 12, 12, 9, 50, DType::F32, Some(1.5)));
        assert_eq!((&a.frozen[..], &b.frozen[..]), (&["transformer.h.0.".to_string()][..], &[][..]));
        let (betas, decay_matrices_only) = ((0.8, 0.99), true);
        let adamw = Optimizer::Adamw { lr: 0.5, betas, epsilon: 1e-3, weight_decay: 0.25, decay_matrices_only };
        assert_eq!((a.optimizer, a.schedule), (adamw, Schedule::Linear { warmup: 2, min_lr: 0.125 }));
        let sgd = Optimizer::Sgd { lr: 0.75, momentum: 0.5, nesterov: true, weight_decay: 0.125 };
        assert_eq!((b.optimizer, b.schedule), (sgd, Schedule::Cosine { warmup: 3, min_lr: 0.25 }));
        assert!([a, b].iter().all(|o| (o.plan.slots, o.plan.recompute) == (3, Recompute::Never)));
    }

    #[test]
    fn data_comes_in_an_order_of_the_runs_seed() {
        let first = |seed: &str| {
            let first = |model: Result<Prepared>| {
                let mut batch = Batch::default();
                model.unwrap().sources(&Texts::default()).unwrap().train.fill(0, &mut batch).unwrap();
                batch
            };
            prepared(&[seed]).into_iter().map(first).collect::<Vec<Batch>>()
        };
        let (one, other) = (first("run.seed=1"), first("run.seed=2"));
        assert!(one == first("run.seed=1") && one.iter().zip(&other).all(|(one, other)| one != other));
    }

    #[test]
    fn a_pipeline_holds_a_microbatch_for_each_device_or_as_many_as_are_stated() {
        let of = |sets: &[&str]| -> Result<usize> {
            let mut all = prepared(&[&["run.policy=gpipe"], sets].concat());
            all.remove(0).map(|model| model.options.microbatch)
        };
        for (sets, want) in [
            (&["device.0.count=4"][..], 3),
            // The most that divide the batch.
            (&["device.0.count=5"], 3),
            (&["device.0.count=6"], 2),
            (&["device.0.count=4", "run.pipeline_microbatches=12"], 1),
        ] {
            assert_eq!(of(sets).unwrap(), want, "{sets:?}");
        }
        let refused = of(&["run.pipeline_microbatches=5"]).unwrap_err().to_string();
        assert!(refused.contains("run.pipeline_microbatches = 5 does not divide the batch of 12"), "{refused}");
    }
}
