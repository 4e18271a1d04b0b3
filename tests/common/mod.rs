//! What integration tests share: fixtures, small models, and a run that gives everything it computed.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod device;
pub mod shuffled;
pub mod small;

use hydra::base::Result;
use hydra::base::tensorfile::TensorFile;
use hydra::data::{BatchesOptions, BatchesSource, Source};
use hydra::device::sim::CostModel;
use hydra::engine::{Engine, Stored};
use hydra::nn::{self, Pretrained};
use hydra::spill::{Model, Plan};
use hydra::train::{Observer, Session, StepReport, TrainOptions, Weights, inputs_of, plan_model, trace_model};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A folder of `tests/fixtures`, or of the folder that `HYDRA_FIXTURES` names where the binary was carried away from
/// its sources.
pub fn fixture(case: &str) -> PathBuf {
    let carried = std::env::var_os("HYDRA_FIXTURES").map(PathBuf::from);
    carried.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")).join(case)
}

/// Everything that a run computed.
#[derive(Debug, Default, PartialEq, Clone)]
pub struct Outcome {
    /// Bits of the losses.
    pub losses: Vec<u32>,
    /// Bits of the validation losses.
    pub valid: Vec<u32>,
    /// Bits of the norms.
    pub norms: Vec<u64>,
    /// Bits of weights, moments and running statistics by name.
    pub tensors: BTreeMap<String, Vec<u32>>,
}

/// Collects losses.
#[derive(Default)]
pub struct Collect(pub Outcome);

impl Observer for Collect {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.0.losses.push(report.result.loss.to_bits());
        self.0.norms.push(report.result.grad_norm.to_bits());
        Ok(())
    }

    fn valid(&mut self, _: u64, loss: f32, _: f64) -> Result<()> {
        self.0.valid.push(loss.to_bits());
        Ok(())
    }
}

/// A cost model that is the same everywhere.
pub fn stated() -> CostModel {
    CostModel::stated(1e11, 2e10, 1e10)
}

/// Runs a session to its end and collects what it computed. Asserts that the plan's peak is what the run touched.
pub fn finish(mut session: Session) -> Result<Outcome> {
    let mut collect = Collect::default();
    session.run(&mut collect, &AtomicBool::new(false))?;
    let mut outcome = collect.0;
    gather(session.engine(), &mut outcome);
    Ok(outcome)
}

/// Adds the weights, moments and running statistics of an engine whose state is home. Asserts that the plan's peak is
/// what it touched.
pub fn gather(engine: &Engine, outcome: &mut Outcome) {
    assert_eq!(engine.high_water_bytes(0), engine.plan(0).arena.bytes, "predicted peak against touched bytes");
    gather_of(engine, 0, outcome);
}

/// Adds the weights, moments and running statistics of one of an engine's models.
pub fn gather_of(engine: &Engine, of: usize, outcome: &mut Outcome) {
    let model: &Arc<Model> = engine.model(of);
    let moments = engine.plan(of).updates.moments;
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    for (i, p) in model.train.parameters.iter().enumerate() {
        outcome.tensors.insert(p.name.clone(), bits(engine.read_parameter(of, Stored::Weight, i).unwrap()));
        for m in 0..if p.frozen { 0 } else { moments } {
            outcome.tensors.insert(
                format!("{}.moment{m}", p.name),
                bits(engine.read_parameter(of, Stored::Moment(m), i).unwrap()),
            );
        }
    }
    for (i, s) in model.train.states.iter().enumerate() {
        outcome.tensors.insert(s.name.clone(), bits(engine.read_state(of, i).unwrap()));
    }
}

/// The first thing in which two runs differ, for people.
pub fn difference(got: &Outcome, want: &Outcome) -> Option<String> {
    let tensor = |(name, bits): (&String, &Vec<u32>)| {
        let wrong = want.tensors.get(name).map_or(bits.len(), |w| w.iter().zip(bits).filter(|(a, b)| a != b).count());
        (wrong > 0).then(|| format!("{name}: {wrong} of {} elements", bits.len()))
    };
    let lists = [
        ("losses", got.losses != want.losses),
        ("norms", got.norms != want.norms),
        ("validation", got.valid != want.valid),
    ];
    let of_lists = lists.into_iter().find(|l| l.1).map(|l| l.0.to_string());
    of_lists.or_else(|| got.tensors.iter().find_map(tensor)).or_else(|| (got != want).then(|| "other tensors".into()))
}

/// One of the fixtures, ready to train.
pub struct Case {
    pub pretrained: Pretrained,
    pub spec: serde_json::Value,
    pub dir: PathBuf,
}

impl Case {
    pub fn open(name: &str) -> Case {
        let dir = fixture(name);
        let text = std::fs::read_to_string(dir.join("case.json")).expect("case.json");
        Case {
            pretrained: nn::open(&dir.join("model")).expect("model"),
            spec: serde_json::from_str(&text).expect("json"),
            dir,
        }
    }

    pub fn source(&self) -> Box<dyn Source> {
        let shift_labels = self.pretrained.network.labels().shift;
        let options = BatchesOptions { path: self.dir.join("batches.safetensors"), batch: None, shift_labels };
        Box::new(BatchesSource::open(&options).expect("batches"))
    }

    /// The case's own hyper-parameters.
    pub fn options(&self) -> TrainOptions {
        let number = |key: &str| self.spec[key].as_f64().expect("a number");
        let batch = self.source().spec().batch;
        let optimizer = hydra::train::Optimizer::Adamw {
            lr: number("lr"),
            betas: (
                self.spec["betas"][0].as_f64().expect("a number"),
                self.spec["betas"][1].as_f64().expect("a number"),
            ),
            epsilon: number("eps"),
            weight_decay: number("weight_decay"),
            decay_matrices_only: false,
        };
        TrainOptions { batch, microbatch: batch, optimizer, poison: true, ..TrainOptions::new(number("steps") as u64) }
    }

    pub fn plan(&self, options: &TrainOptions) -> Result<(Arc<Model>, Arc<Plan>)> {
        let inputs = inputs_of(self.source().as_ref());
        let model = Arc::new(trace_model(self.pretrained.network.as_ref(), &inputs, options)?);
        let plan = plan_model(&model, options, &stated())?;
        Ok((model, plan))
    }

    pub fn train(&self, options: &TrainOptions) -> Result<Outcome> {
        let planned = self.plan(options)?;
        let weights = Weights::Pretrained(&self.pretrained);
        finish(Session::new(weights, planned, self.source(), None, options.clone())?)
    }

    /// How far from PyTorch's its `key` may be: `logits`, `losses` or `weights`.
    pub fn tolerance(&self, key: &str) -> f64 {
        self.spec["tolerance"][key].as_f64().expect("a number")
    }

    /// The values of a tensor of expected.safetensors.
    pub fn expected(&self) -> BTreeMap<String, Vec<f32>> {
        floats_of(&self.dir.join("expected.safetensors"))
    }
}

/// The tensors of a file of f32.
pub fn floats_of(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).expect("a file");
    let file = TensorFile::parse(&bytes, &path.display().to_string()).expect("tensors");
    let values = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    file.tensors().map(|t| (t.entry.name.clone(), values(t.bytes))).collect()
}

/// |got - want| / |want|.
pub fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let num: f64 = got.iter().zip(want).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let den: f64 = want.iter().map(|&b| square(f64::from(b))).sum();
    (num / den.max(1e-30)).sqrt()
}
