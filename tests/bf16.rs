//! Training in bf16: weights and activations of 16 bits, with f32 masters, statistics, gradients and moments.

mod common;

use common::small::Small;
use common::{Case, Collect, difference, distance, gather};
use half::bf16;
use hydra::base::tensorfile::Element;
use hydra::base::{DType, Error, Result, Shape, align_up};
use hydra::data::{Source, Text, TextOptions, TextSource, Tokenizer};
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::engine::{Engine, EngineOptions};
use hydra::graph::{ALIGNMENT, Mode};
use hydra::nn::{self, Form, InputShape};
use hydra::spill::{Model, Plan, PlanOptions, Updates};
use hydra::train::{
    Observer, Optimizer, Session, StepReport, TrainOptions, Weights, inputs_of, plan_model, trace_model,
    write_checkpoint,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The losses of 50 steps on a text with a pattern.
fn losses(text: &Path, dtype: DType) -> Vec<f32> {
    let config = serde_json::json!({
        "vocab_size": 256, "n_positions": 32, "n_embd": 48, "n_head": 3, "n_layer": 2,
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    });
    let network = nn::from_config("gpt2", &config).expect("a network");
    let optimizer =
        Optimizer::Adamw { lr: 3e-3, betas: (0.9, 0.95), epsilon: 1e-8, weight_decay: 0.1, decay_matrices_only: false };
    let options = TrainOptions {
        batch: 8,
        microbatch: 4,
        optimizer,
        clip: Some(1.0),
        dtype,
        poison: true,
        ..TrainOptions::new(50)
    };
    let text = Text::read(&[text.into()], &Tokenizer::Bytes).expect("a text");
    let windows = TextOptions { context: 32, batch: 8, seed: 1, valid_fraction: 0.0 };
    let source: Box<dyn Source> = Box::new(TextSource::open(&text, &windows).expect("long enough").train);
    let model = Arc::new(trace_model(network.as_ref(), &inputs_of(source.as_ref()), &options).expect("a model"));
    let plan = plan_model(&model, &options, &common::stated()).expect("a plan");
    let planned = (model, plan);
    let mut session = Session::new(Weights::Random, planned, source, None, options).expect("a session");
    let mut losses = Vec::new();
    let mut observer = |report: &StepReport| {
        losses.push(report.result.loss);
        Ok(())
    };
    session.run(&mut observer, &AtomicBool::new(false)).expect("a run");
    losses
}

/// Within half a percent of it while it falls to a fraction, dropout included, whose random words are the same.
#[test]
fn the_loss_follows_that_of_f32() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("text");
    std::fs::write(&path, (0..60_000u32).map(|n| (n * 7 % 251) as u8).collect::<Vec<u8>>()).expect("written");
    let (single, half) = (losses(&path, DType::F32), losses(&path, DType::Bf16));
    let apart = single.iter().zip(&half).map(|(&s, &h)| ((h - s) / s).abs()).fold(0.0, f32::max);
    println!("f32 {:?} bf16 {:?}, apart by {apart:.4} at most", single.last(), half.last());
    assert!(single[49] < 0.6 * single[0], "the loss falls: {single:?}");
    assert_ne!(single, half);
    assert!(apart < 5e-3, "f32 {single:?}, bf16 {half:?}");
}

/// Collects what a run tells, and stops it after some steps, with a checkpoint.
struct StopAt {
    step: u64,
    path: PathBuf,
    options: TrainOptions,
    stop: Arc<AtomicBool>,
    told: Collect,
}

impl Observer for StopAt {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.stop.store(report.result.step + 1 >= self.step, Ordering::Relaxed);
        self.told.step(report)
    }

    fn valid(&mut self, step: u64, loss: f32, secs: f64) -> Result<()> {
        self.told.valid(step, loss, secs)
    }

    fn checkpoint(&mut self, step: u64, engine: &Engine, model: usize) -> Result<()> {
        write_checkpoint(&self.path, engine, model, &self.options, step)
    }
}

/// A run that is stopped and goes on under another plan, from a checkpoint of the masters, ends in the bits of one that
/// was not.
#[test]
fn a_stopped_run_goes_on_with_the_same_bits() {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, small, microbatch) in
        [("gpt", Small::gpt(26, 2, 2, 19, 0.1), 2), ("resnet", Small::resnet(&[6, 10], &[1, 1], [19, 17]), 3)]
    {
        let whole = TrainOptions {
            seed: 3,
            batch: 2 * microbatch,
            microbatch,
            clip: Some(0.5),
            dtype: DType::Bf16,
            poison: true,
            ..TrainOptions::new(6)
        };
        let want = small.train(&whole).expect("a run");
        for (first, second) in [(true, false), (false, true)] {
            let resident = |resident| {
                let plan = PlanOptions { resident: Some(resident), ..PlanOptions::default() };
                TrainOptions { plan, ..whole.clone() }
            };
            let path = dir.path().join(format!("{name} {first}.safetensors"));
            let stop = Arc::new(AtomicBool::new(false));
            let mut observer = StopAt {
                step: 3,
                path: path.clone(),
                options: whole.clone(),
                stop: Arc::clone(&stop),
                told: Collect::default(),
            };
            let options = resident(first);
            let mut session = small.session(small.plan(&options).expect("a plan"), &options).expect("a session");
            let ended = session.run(&mut observer, &stop);
            assert!(matches!(ended, Err(Error::Interrupted { .. })), "{ended:?}");
            let options = resident(second);
            let mut session = small.session(small.plan(&options).expect("a plan"), &options).expect("a session");
            let at = session.resume(&path).expect("of the same run").expect("a checkpoint");
            assert!((3..6).contains(&at) && observer.told.0.losses.len() as u64 == at, "{at} steps");
            session.run(&mut observer.told, &AtomicBool::new(false)).expect("a run");
            let mut got = observer.told.0;
            gather(session.engine(), &mut got);
            assert_eq!(difference(&got, &want), None, "{name}, resident {first} then {second}");
        }
    }
}

/// A directory whose weights are bf16 trains from them, and is saved in bf16 again, from the masters.
#[test]
fn a_directory_in_bf16_stays_one() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["gpt2", "resnet-basic"] {
        let mut case = Case::open(name);
        let mut form = case.pretrained.form.clone();
        form.tensors.iter_mut().for_each(|t| t.element = Element::BF16);
        let save = |to: &Path, form: &Form, of: &dyn Fn(&str, &Shape) -> Result<Vec<f32>>| {
            let shapes: BTreeMap<&str, &Shape> = form.tensors.iter().map(|t| (t.name.as_str(), &t.shape)).collect();
            nn::save(to, form, &mut |name| of(name, shapes[name])).expect("saved");
        };
        let (before, after) = (dir.path().join(format!("{name} before")), dir.path().join(format!("{name} after")));
        save(&before, &form, &|name, shape| case.pretrained.tensor(name, shape));
        case.pretrained = nn::open(&before).expect("it opens");
        let options = TrainOptions { dtype: DType::Bf16, ..case.options() };
        let (single, half) =
            (case.train(&case.options()).expect("a run in f32"), case.train(&options).expect("a run in bf16"));
        for (&s, &h) in single.losses.iter().zip(&half.losses) {
            let (s, h) = (f32::from_bits(s), f32::from_bits(h));
            assert!((h - s).abs() < 1e-2 * s, "{name}: loss {h}, in f32 {s}");
        }
        let masters =
            |name: &str| -> Vec<f32> { half.tensors[name].iter().map(|&bits| f32::from_bits(bits)).collect() };
        save(&after, &case.pretrained.form, &|name, _| Ok(masters(name)));
        let saved = nn::open(&after).expect("it opens");
        for tensor in &saved.form.tensors {
            assert_eq!(tensor.element, Element::BF16, "{name}: {}", tensor.name);
            let want: Vec<f32> = masters(&tensor.name).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
            assert_eq!(saved.tensor(&tensor.name, &tensor.shape).expect("finite"), want, "{name}: {}", tensor.name);
        }
    }
}

/// An evaluation that ends in logits gives them as f32, near those of f32.
#[test]
fn logits_are_near_those_of_f32() {
    let small = Small::gpt(26, 2, 2, 9, 0.1);
    let ids: Vec<i32> = (0..9).map(|i| i * 7 % 61).collect();
    let logits = |dtype| {
        let inputs = [InputShape::new("input_ids", [9], DType::I32)];
        let graph = small.network.trace(Mode::Evaluation, dtype, 1, &inputs).expect("traced");
        let model = Arc::new(Model::evaluation(graph).expect("a model"));
        let options = PlanOptions { updates: Updates::PLAIN, ..PlanOptions::default() };
        let plan = Arc::new(Plan::new(&model, &options, &common::stated()).expect("a plan"));
        let spec = HostSpec { arena_bytes: plan.arena.bytes, ..HostSpec::default() };
        let config =
            HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, poison: true, ..HostConfig::default() };
        let device = Box::new(HostDevice::new(&config).expect("a device"));
        let mut engine = Engine::new(Arc::clone(&model), plan, device, EngineOptions::new(0, &model));
        Weights::Random.write(&mut engine, 0, 1).expect("nothing has begun");
        engine.wait_logits(0, &[bytemuck::cast_slice(&ids)]).expect("logits")
    };
    let (single, half) = (logits(DType::F32), logits(DType::Bf16));
    let apart = distance(&half, &single);
    println!("apart by {apart:.1e} of their length");
    // Rounded to 8 bits after each of some 20 ops.
    assert!(apart > 0.0 && apart < 1e-2, "{apart}");
}

/// Half the bytes for weights, and f32 for what is summed up.
#[test]
fn memory_is_what_the_types_say() {
    let small = Small::gpt(64, 2, 2, 16, 0.0);
    let plan = |dtype| {
        let plan = PlanOptions { resident: Some(true), ..PlanOptions::default() };
        small.plan(&TrainOptions { dtype, plan, ..TrainOptions::new(1) }).expect("a plan")
    };
    let (single, half) = (plan(DType::F32), plan(DType::Bf16));
    let bytes = |planned: &(Arc<Model>, Arc<Plan>), what: &str| {
        planned.1.arena_table().iter().find(|row| row.0 == what).map_or(0, |row| row.1)
    };
    // All widths here are multiples of the alignment, so that nothing is lost between tensors.
    let weights = bytes(&single, "weights");
    assert_eq!(bytes(&half, "weights"), weights / 2);
    assert_eq!(bytes(&half, "gradients"), bytes(&single, "gradients"));
    assert_eq!(bytes(&half, "optimizer state"), bytes(&single, "optimizer state") + weights / 2);
}

/// Kernels that ask for scratch get one f64 for each 4096 elements of a tensor, for the shard that has most.
#[test]
fn scratch_of_the_norm_is_in_the_plan() {
    let small = Small::gpt(64, 2, 2, 16, 0.0);
    let plan = PlanOptions { resident: Some(true), cut: Some(vec![0..3, 3..6]), ..PlanOptions::default() };
    let options = TrainOptions { dtype: DType::Bf16, plan, ..TrainOptions::new(1) };
    let mut model = Arc::unwrap_or_clone(small.model(&options));
    let mut planned = |scratch| {
        model.train.scratch = scratch;
        plan_model(&Arc::new(model.clone()), &options, &common::stated()).expect("a plan")
    };
    let (with, without) = (planned(true), planned(false));
    let blocks = |layers: std::ops::Range<usize>| -> u64 {
        let own = model.train.parameters.iter().filter(|p| layers.contains(&p.layers[0]));
        own.map(|p| p.shape.elems().div_ceil(4096) as u64).sum()
    };
    let bytes = align_up(8 * blocks(0..3).max(blocks(3..6)), ALIGNMENT);
    assert!(bytes > ALIGNMENT);
    assert_eq!(with.arena.weight_slots.at[0], without.arena.weight_slots.at[0] + bytes);
}

/// The graph's types: what is added up is wide, the rest is not.
#[test]
fn statistics_and_gradients_of_parameters_are_f32() {
    for small in [Small::gpt(26, 2, 1, 7, 0.1), Small::resnet(&[6], &[1], [9, 9])] {
        let options = TrainOptions { dtype: DType::Bf16, ..TrainOptions::new(1) };
        let graph = &small.model(&options).train;
        let dtype = |value| graph.info(value).dtype;
        assert!(graph.parameters.iter().all(|p| dtype(p.value) == DType::Bf16));
        assert!(graph.states.iter().all(|s| dtype(s.value) == DType::F32));
        assert!(graph.parameter_gradients.iter().all(|g| dtype(g.value) == DType::F32));
        assert!(graph.input_gradients.iter().flatten().all(|&g| dtype(g) == DType::Bf16));
        assert!(graph.layers.iter().filter_map(|l| l.output).all(|v| dtype(v) == DType::Bf16));
        assert_eq!(dtype(graph.loss.expect("it trains")), DType::F32);
        assert_eq!(dtype(graph.logits.expect("it has logits")), DType::Bf16);
    }
}
