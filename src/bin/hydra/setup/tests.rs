//! What a job says, as a model that is ready has it.

use super::*;
use hydra::base::DType;
use hydra::data::Batch;
use hydra::spill::Recompute;
use hydra::train::{Optimizer, Schedule, TrainOptions};

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
