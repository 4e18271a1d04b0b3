//! Predictions: of a session between its steps, and of what it has saved, which is read back for a network of one's
//! own; and what of either is refused.

use super::common::small::Small;
use super::common::{Outcome, difference, gather, gather_of};
use super::{note, options, session};
use hydra::base::{DType, Error, IGNORED, Result, Shape};
use hydra::data::{Batch, BatchTensor, names};
use hydra::graph::LowRank;
use hydra::nn::{Form, Pretrained, open_own};
use hydra::spill::{HomeBudgets, OnDisk, PlanOptions};
use hydra::train::{Session, TrainOptions, Weights, wait_forward};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Shape and bits of logits.
type Logits = (Shape, Vec<u32>);

fn bits((shape, logits): (Shape, Vec<f32>)) -> Logits {
    assert_eq!(shape.elems(), logits.len());
    (shape, logits.into_iter().map(f32::to_bits).collect())
}

/// So many samples of the kind that the network is trained on, labels among their tensors.
fn samples(small: &Small, count: usize) -> Batch {
    let mut batch = Batch::default();
    small.source(count, 77).fill(0, &mut batch).expect("random data");
    batch
}

fn predicted(session: &mut Session, small: &Small, batch: &Batch) -> Logits {
    bits(session.wait_forward(small.network.as_ref(), batch).expect("logits"))
}

/// Saves what a session has trained as one that came from no directory, and reads it back.
fn saved(session: &mut Session, network: Small, dir: &Path) -> Pretrained {
    let form = Form::of(network.network.as_ref()).expect("a form");
    session.wait_save(dir, &form, Weights::Random).expect("saved");
    open_own(dir, network.network).expect("its own tensors")
}

/// Trains, predicts between the steps and at the end, saves, reads back and predicts: the bits of a run of which nobody
/// asks anything, and of the predictions of what is saved. Gives the predictions, before the first step, between and at
/// the end.
fn check(make: fn() -> Small, options: &TrainOptions) -> [Logits; 3] {
    let small = make();
    let want = small.train(options).expect("a run");
    let dir = tempfile::tempdir().expect("a folder");
    // Fewer than a minibatch, and no multiple of a microbatch.
    let batch = samples(&small, 3);
    let mut session = session(&small, options);
    let mut got = Outcome::default();
    let first = predicted(&mut session, &small, &batch);
    note(&mut got, &session.wait_step().expect("a step").expect("of seven"));
    // A second step has begun, and is told afterwards.
    let between = predicted(&mut session, &small, &batch);
    assert_eq!(session.steps_done(), 2);
    let back = saved(&mut session, make(), dir.path());
    let of_saved = |back: &Pretrained| {
        bits(wait_forward(back.network.as_ref(), Weights::Pretrained(back), &batch).expect("logits"))
    };
    assert!(of_saved(&back) == between);
    while let Some(report) = session.wait_step().expect("a step") {
        note(&mut got, &report);
    }
    let last = predicted(&mut session, &small, &batch);
    assert!(of_saved(&saved(&mut session, make(), dir.path())) == last);
    // What was read back before is what it was: its file was replaced, not changed.
    assert!(of_saved(&back) == between);
    assert!(first != between && between != last);
    gather(session.engine(), &mut got);
    got.valid.clone_from(&want.valid);
    assert_eq!(difference(&got, &want), None);
    [first, between, last]
}

/// With whatever plan; resident and spilled ones predict the same.
fn check_plans(make: fn() -> Small, options: &TrainOptions) {
    let folder = tempfile::tempdir().expect("a folder");
    let resident = PlanOptions { resident: Some(true), ..PlanOptions::default() };
    let homes = HomeBudgets { host: None, disk: 1 << 24 };
    let on_disk = PlanOptions { homes, on_disk: Some(OnDisk::Weights), resident: Some(false), ..resident.clone() };
    let want = check(make, options);
    for plan in [resident, on_disk] {
        let disk = Some(folder.path().to_path_buf());
        assert!(check(make, &TrainOptions { plan, disk, ..options.clone() }) == want);
    }
}

#[test]
fn a_session_predicts_what_it_saves() {
    let gpt = || Small::gpt(18, 2, 2, 9, 0.1);
    check_plans(gpt, &options(&gpt(), DType::F32));
    // The tokens' table stays as it is, and in bf16 is rounded.
    let frozen = vec!["transformer.wte".to_string()];
    check(gpt, &TrainOptions { frozen: frozen.clone(), ..options(&gpt(), DType::F32) });
    check(gpt, &TrainOptions { frozen, ..options(&gpt(), DType::Bf16) });
    check(|| Small::denoiser(21, 2, 33), &options(&Small::denoiser(21, 2, 33), DType::F32));
}

/// By running statistics, which a training step changes on its way forward.
#[test]
fn one_with_batchnorm_predicts_by_its_running_statistics() {
    let resnet = || Small::resnet(&[6, 9], &[1, 1], [13, 11]);
    for dtype in [DType::F32, DType::Bf16] {
        check_plans(resnet, &options(&resnet(), dtype));
    }
    // Without them it predicts something else.
    let small = resnet();
    let mut session = session(&small, &options(&small, DType::F32));
    session.run(&mut (), &AtomicBool::new(false)).expect("a run");
    let dir = tempfile::tempdir().expect("a folder");
    let back = saved(&mut session, resnet(), dir.path());
    let fresh = |name: &str, shape: &Shape| {
        let is_state = name.contains("running");
        if is_state { Ok(None) } else { back.tensor(name, shape).map(Some) }
    };
    let batch = samples(&small, 3);
    let of = |weights| bits(wait_forward(small.network.as_ref(), weights, &batch).expect("logits"));
    assert!(of(Weights::Given(&fresh)) != of(Weights::Pretrained(&back)));
    assert!(of(Weights::Pretrained(&back)) == predicted(&mut session, &small, &batch));
}

#[test]
fn adapters_are_in_the_weights_by_which_it_predicts() {
    let gpt = || Small::gpt(18, 2, 2, 9, 0.0);
    let low_rank = LowRank { rank: 3, alpha: 6.0, dropout: 0.1, targets: vec!["c_attn".into(), "c_fc".into()] };
    for dtype in [DType::F32, DType::Bf16] {
        let options = TrainOptions { low_rank: Some(low_rank.clone()), ..options(&gpt(), DType::F32) };
        let device_budget = Some(gpt().plan(&TrainOptions { dtype, ..options.clone() }).expect("a plan").1.arena.bytes);
        let plan = PlanOptions { device_budget, ..PlanOptions::default() };
        check(gpt, &TrainOptions { dtype, plan, ..options });
    }
}

/// The sum of a minibatch's losses by its predictions, and how many positions have a label.
fn loss_of(shape: &Shape, logits: &[f32], labels: &BatchTensor) -> (f64, u64) {
    let rows = logits.chunks_exact(shape.cols());
    if labels.dtype == DType::F32 {
        let off = logits.iter().zip(labels.as_f32()).map(|(&x, &label)| f64::from(x - label).powi(2));
        return (off.sum::<f64>() / shape.cols() as f64, shape.rows() as u64);
    }
    let labelled = rows.zip(labels.as_i32()).filter(|&(_, &label)| label != IGNORED);
    let losses = labelled.map(|(row, &label)| {
        let exponentials = row.iter().map(|&x| f64::from(x).exp());
        exponentials.sum::<f64>().ln() - f64::from(row[label as usize])
    });
    losses.fold((0.0, 0), |(sum, count), loss| (sum + loss, count + 1))
}

/// An evaluation by the session's own engine has the loss of its predictions: with running statistics, beside what is
/// frozen, and with adapters beside the weights instead of in them.
#[test]
fn predictions_have_the_loss_of_an_evaluation() {
    let (gpt, resnet) = (Small::gpt(18, 2, 2, 9, 0.1), Small::resnet(&[6, 9], &[1, 1], [13, 11]));
    let low_rank = LowRank { rank: 3, alpha: 6.0, dropout: 0.1, targets: vec!["c_attn".into(), "c_fc".into()] };
    let beside = TrainOptions { low_rank: Some(low_rank), plan: PlanOptions::default(), ..options(&gpt, DType::F32) };
    let denoiser = Small::denoiser(21, 2, 13);
    for (small, options) in [
        (&gpt, options(&gpt, DType::F32)),
        (&gpt, beside),
        (&resnet, options(&resnet, DType::F32)),
        (&denoiser, options(&denoiser, DType::F32)),
    ] {
        let mut session = session(small, &options);
        session.run(&mut (), &AtomicBool::new(false)).expect("a run");
        let mut held_out = small.held_out(options.batch);
        let valid = f64::from(session.wait_evaluation(held_out.as_mut()).expect("an evaluation"));
        let (mut sum, mut count) = (0.0, 0);
        for index in 0..held_out.batches_per_epoch() {
            let mut batch = Batch::default();
            held_out.fill(index, &mut batch).expect("random data");
            let (shape, logits) = session.wait_forward(small.network.as_ref(), &batch).expect("logits");
            let (loss, labels) = loss_of(&shape, &logits, batch.get(names::LABELS).expect("labels"));
            (sum, count) = (sum + loss, count + labels);
        }
        // Losses of about 1 to 4, each rounded a few times to f32.
        let want = sum / count as f64;
        assert!((valid / want - 1.0).abs() < 2e-6, "{valid}, not {want}");
    }
}

/// Read back, it is trained on as if it had never been away, but for the optimizer's moments: plain SGD has none.
#[test]
fn what_is_saved_is_gone_on_from() {
    let resnet = || Small::resnet(&[6, 9], &[1, 1], [13, 11]);
    let small = resnet();
    let seven = TrainOptions {
        optimizer: super::plain_sgd(0.05),
        schedule: hydra::train::Schedule::Constant,
        plan: PlanOptions::default(),
        ..options(&small, DType::F32)
    };
    let three = TrainOptions { steps: 3, ..seven.clone() };
    let dir = tempfile::tempdir().expect("a folder");
    let run = |session: &mut Session| -> Outcome {
        session.run(&mut (), &AtomicBool::new(false)).expect("a run");
        let mut outcome = Outcome::default();
        gather_of(session.engine(), 0, &mut outcome);
        outcome
    };
    let mut away = session(&small, &three);
    run(&mut away);
    let back = saved(&mut away, resnet(), dir.path());
    // Every microbatch was counted, and is not forgotten.
    assert!(!back.form.counters.is_empty() && back.form.counters.values().all(|&count| count == 3 * 2));
    let network = back.network.as_ref();
    // Its data go on where they were.
    let source = || Box::new(From { source: small.source(seven.batch, seven.seed), first: 3 });
    let four = TrainOptions { steps: 4, ..seven.clone() };
    let planned = hydra::train::prepare(network, source().as_ref(), &four, &super::common::stated()).expect("a plan");
    let mut on = Session::new(Weights::Pretrained(&back), planned, source(), None, four).expect("a session");
    let want = run(&mut session(&small, &seven));
    assert_eq!(difference(&run(&mut on), &want), None);
    let again = tempfile::tempdir().expect("a folder");
    on.wait_save(again.path(), &back.form, Weights::Pretrained(&back)).expect("saved");
    let again = open_own(&again.path().join("model.safetensors"), resnet().network).expect("its own tensors");
    assert!(again.form.counters.values().all(|&count| count == 7 * 2));
}

/// A source's minibatches from one of them on.
struct From {
    source: Box<dyn hydra::data::Source>,
    first: u64,
}

impl hydra::data::Source for From {
    fn spec(&self) -> &hydra::data::InputSpec {
        self.source.spec()
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        self.source.fill(self.first + index, batch)
    }

    fn batches_per_epoch(&self) -> u64 {
        u64::MAX
    }
}

/// Refused, they leave the session as it was.
#[test]
fn batches_that_the_network_does_not_take_are_refused() {
    let gpt = Small::gpt(14, 2, 1, 9, 0.0);
    let resnet = Small::resnet(&[6], &[1], [8, 8]);
    let ids = |axes: &[usize]| BatchTensor::zeros(names::INPUT_IDS, DType::I32, Shape::new(axes));
    let floats = |name: &str, axes: &[usize]| BatchTensor::zeros(name, DType::F32, Shape::new(axes));
    let with = |value: i32| {
        let mut tensor = ids(&[2, 9]);
        tensor.as_i32_mut()[13] = value;
        vec![tensor]
    };
    let labels = BatchTensor::zeros(names::LABELS, DType::I32, Shape::from([2, 9]));
    let pixels = names::PIXEL_VALUES;
    for (small, tensors, says) in [
        (&gpt, with(61), "evaluation: input_ids: value 61 at (1, 4) is not in 0..61"),
        (&gpt, with(-1), "input_ids: value -1 at (1, 4) is below 0"),
        (&gpt, vec![ids(&[2, 12])], "input_ids"),
        (&gpt, vec![ids(&[2, 3, 3])], "input input_ids: a sample is 3x3, want 1 axes"),
        (&gpt, vec![floats(names::INPUT_IDS, &[2, 9])], "input_ids: is f32, want i32"),
        (
            &gpt,
            vec![ids(&[2, 9]), floats(pixels, &[2, 3])],
            "input \"pixel_values\" is not taken, only input_ids, attention_mask, labels",
        ),
        (&gpt, vec![ids(&[0, 9])], "the batch has no sample"),
        (&gpt, vec![labels], "the batch has no sample"),
        (&gpt, vec![], "the batch has no sample"),
        (&resnet, vec![floats(pixels, &[2, 8, 8])], "input pixel_values: a sample is 8x8, want 3 axes"),
        (&resnet, vec![floats(pixels, &[2, 4, 8, 8])], "pixel_values"),
        (
            &resnet,
            vec![floats(pixels, &[2, 3, 8, 8]), floats("more", &[3, 8])],
            "more: shape 3x8 has another batch than 2",
        ),
    ] {
        let mut session = session(small, &options(small, DType::F32));
        let error = session.wait_forward(small.network.as_ref(), &Batch { tensors }).expect_err(says);
        assert!(matches!(error, Error::BadInput(_)));
        assert!(error.to_string().starts_with(says), "{error}");
        assert!(session.wait_step().expect("a step").is_some());
    }
}

/// A network that is not the one trained has other predictions to give than anybody asks for.
#[test]
fn another_network_than_the_sessions_is_refused() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let batch = samples(&small, 2);
    let mut session = session(&small, &options(&small, DType::F32));
    let deep = Small::gpt(14, 2, 2, 9, 0.0);
    let error = session.wait_forward(deep.network.as_ref(), &batch).expect_err("refused").to_string();
    assert_eq!(error, "tensor transformer.h.1.ln_1.weight: the model has no such tensor");
    let wide = Small::gpt(16, 2, 1, 9, 0.0);
    let error = session.wait_forward(wide.network.as_ref(), &batch).expect_err("refused").to_string();
    assert_eq!(error, "tensor transformer.wte.weight: is 61x14 in the model, want 61x16");
    let mut of_deep = super::session(&deep, &options(&deep, DType::F32));
    let error = of_deep.wait_forward(small.network.as_ref(), &batch).expect_err("refused").to_string();
    assert_eq!(error, "tensor transformer.h.1.ln_1.weight: the network has no such tensor, and the model has");
}

#[test]
fn weights_that_have_not_come_predict_nothing() {
    let small = Small::gpt(14, 2, 1, 9, 0.0);
    let options = options(&small, DType::F32);
    let batch = samples(&small, 2);
    let error = wait_forward(small.network.as_ref(), Weights::Later, &batch).expect_err("refused").to_string();
    assert_eq!(error, "the weights are to come from a checkpoint, which a session reads");
    let planned = small.plan(&options).expect("a plan");
    let source = small.source(options.batch, options.seed);
    let mut session = Session::new(Weights::Later, planned, source, None, options).expect("a session");
    let error = session.wait_forward(small.network.as_ref(), &batch).expect_err("refused").to_string();
    assert_eq!(error, "the weights were to come from a checkpoint, and none came");
}

/// Drawn, they are those that a session with that seed begins with.
#[test]
fn weights_of_any_origin_predict() {
    let small = Small::gpt(14, 2, 1, 9, 0.1);
    let options = TrainOptions { seed: 0, ..options(&small, DType::F32) };
    let mut batch = samples(&small, 2);
    // Whatever they are, labels are not looked at.
    let labels = batch.tensors.iter_mut().find(|tensor| tensor.name == names::LABELS).expect("labels");
    labels.as_i32_mut().fill(-7);
    let drawn = bits(wait_forward(small.network.as_ref(), Weights::Random, &batch).expect("logits"));
    assert_eq!(drawn.0, Shape::from([2, 9, 61]));
    assert!(drawn == predicted(&mut session(&small, &options), &small, &batch));
}
