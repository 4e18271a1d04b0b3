//! Training in bf16: weights and activations of 16 bits, with f32 masters, statistics, gradients and moments.

mod common;

use common::small::Small;
use common::{Outcome, difference, gather};
use hydra::base::{DType, Error, Result};
use hydra::data::{Source, TextOptions, TextSource, Tokenizer};
use hydra::graph::Mode;
use hydra::nn;
use hydra::spill::PlanOptions;
use hydra::train::{
    Checkpoint, Identity, Observer, Optimizer, Session, StepReport, TrainOptions, Weights, inputs_of, plan_model,
    trace_model, write_checkpoint,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The losses of 50 steps on a text with a pattern.
fn losses(text: &Path, dtype: DType) -> Vec<f32> {
    let config = serde_json::json!({
        "vocab_size": 256, "n_positions": 32, "n_embd": 48, "n_head": 3, "n_layer": 2,
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    });
    let network = nn::from_config("gpt2", config.as_object().expect("an object"), true).expect("a network");
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
    let text = TextOptions {
        paths: vec![text.into()],
        tokenizer: Tokenizer::Bytes,
        context: 32,
        batch: 8,
        seed: 1,
        valid_fraction: 0.0,
    };
    let source: Box<dyn Source> = Box::new(TextSource::open(&text).expect("long enough").train);
    let model = trace_model(network.as_ref(), &inputs_of(source.as_ref()), &options).expect("a model");
    let plan = plan_model(&model, &options, &common::stated()).expect("a plan");
    let planned = (Arc::new(model), Arc::new(plan));
    let mut session =
        Session::new(network.as_ref(), Weights::Random, planned, source, None, options).expect("a session");
    let mut losses = Vec::new();
    let mut observer = |report: &StepReport| {
        losses.push(report.result.loss);
        Ok(())
    };
    session.run(&mut observer, &AtomicBool::new(false)).expect("a run");
    losses
}

/// Within 1 % of it while it falls to a fraction, dropout included, whose random words are the same.
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
    assert!(apart < 1e-2, "f32 {single:?}, bf16 {half:?}");
}

/// Stops a run after some steps, with a checkpoint.
struct StopAt {
    step: u64,
    path: PathBuf,
    identity: Identity,
    stop: Arc<AtomicBool>,
}

impl Observer for StopAt {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.stop.store(report.result.step + 1 >= self.step, Ordering::Relaxed);
        Ok(())
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        Ok(())
    }

    fn checkpoint(&mut self, step: u64, session: &Session) -> Result<()> {
        write_checkpoint(&self.path, session.engine(), self.identity, step)
    }
}

/// A run that is stopped and goes on under another plan, from a checkpoint of the masters, ends in the bits of one that was not.
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
            let identity = Identity { seed: 3, batch: 2 * microbatch, microbatch };
            let path = dir.path().join(format!("{name} {first}.safetensors"));
            let stop = Arc::new(AtomicBool::new(false));
            let mut observer = StopAt { step: 3, path: path.clone(), identity, stop: Arc::clone(&stop) };
            let options = resident(first);
            let mut session = small.session(small.plan(&options).expect("a plan"), &options).expect("a session");
            let ended = session.run(&mut observer, &stop);
            assert!(matches!(ended, Err(Error::Interrupted { .. })), "{ended:?}");
            let options = resident(second);
            let mut session = small.session(small.plan(&options).expect("a plan"), &options).expect("a session");
            let mut checkpoint = Checkpoint::open(&path).expect("it is sound").expect("it is there");
            let model = Arc::clone(session.engine().model());
            checkpoint.check(identity, &model, 2).expect("of the same run");
            checkpoint.restore(session.engine_mut()).expect("restored");
            session.start_at(checkpoint.step(), small.source(options.batch, options.seed)).expect("started");
            session.run(&mut (), &AtomicBool::new(false)).expect("a run");
            let mut got = Outcome { losses: want.losses.clone(), ..Outcome::default() };
            (got.valid, got.norms) = (want.valid.clone(), want.norms.clone());
            gather(session.engine(), &mut got);
            assert_eq!(difference(&got, &want), None, "{name}, resident {first} then {second}");
        }
    }
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
    let bytes = |(model, plan): &(Arc<_>, Arc<hydra::spill::Plan>), what: &str| {
        let _: &Arc<hydra::spill::Model> = model;
        plan.arena_table().iter().find(|row| row.0 == what).map_or(0, |row| row.1)
    };
    // All widths here are multiples of the alignment, so that nothing is lost between tensors.
    let weights = bytes(&single, "weights");
    assert_eq!(bytes(&half, "weights"), weights / 2);
    assert_eq!(bytes(&half, "gradients"), bytes(&single, "gradients"));
    assert_eq!(bytes(&half, "optimizer state"), bytes(&single, "optimizer state") + weights / 2);
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
        let evaluation =
            small.network.trace(Mode::Evaluation, DType::Bf16, 1, &small.network.inputs()).expect("traced");
        assert_eq!(evaluation.float, DType::Bf16);
    }
}
