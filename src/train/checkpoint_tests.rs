//! Checkpoints of a tiny model: what is written comes back, and what differs is named.

use super::*;
use crate::base::DType;
use crate::device::sim::CostModel;
use crate::nn::{self, InputShape};
use crate::spill::{Plan, PlanOptions};
use crate::train::{TrainOptions, Weights, trace_model};
use std::sync::Arc;

fn options() -> TrainOptions {
    TrainOptions { seed: 7, batch: 2, microbatch: 1, ..TrainOptions::new(20) }
}

fn engine(width: usize) -> Engine {
    engine_of(width, DType::F32)
}

fn engine_of(width: usize, dtype: DType) -> Engine {
    engine_with(width, &TrainOptions { dtype, ..options() })
}

fn engine_with(width: usize, options: &TrainOptions) -> Engine {
    let config = json!({ "n_layer": 1, "n_embd": width, "n_head": 1, "n_positions": 3, "vocab_size": 5 });
    let network = nn::from_config("gpt2", &config).unwrap();
    let inputs = ["input_ids", "labels"].map(|name| InputShape::new(name, [3], DType::I32));
    let model = Arc::new(trace_model(network.as_ref(), &inputs, options).unwrap());
    let plan = Arc::new(Plan::new(&model, &PlanOptions::default(), &CostModel::stated(1e11, 2e10, 1e10)).unwrap());
    let spec = crate::device::host::HostSpec { arena_bytes: plan.arena.bytes, ..Default::default() };
    let config =
        crate::device::host::HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, ..Default::default() };
    let device = crate::device::host::HostDevice::new(&config).unwrap();
    let options = crate::engine::EngineOptions::new(0, &model);
    Engine::new(model, plan, Box::new(device), options)
}

/// Every tensor's values, in the file's order, and what is frozen.
fn values(engine: &Engine) -> Vec<Vec<u32>> {
    let read = |part| match part {
        Part::Parameter(what, i) => engine.read_parameter(0, what, i).unwrap(),
        Part::State(i) => engine.read_state(0, i).unwrap(),
    };
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect();
    let trained = parts(engine.model(0), engine.plan(0).updates.moments).into_iter().map(|(_, _, part)| part);
    let frozen = engine.model(0).train.parameters.iter().enumerate().filter(|(_, p)| p.frozen);
    trained.chain(frozen.map(|(i, _)| Part::Parameter(Stored::Weight, i))).map(|part| bits(read(part))).collect()
}

#[test]
fn what_is_written_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        comes_back(folder.path(), dtype);
    }
}

fn comes_back(folder: &Path, dtype: DType) {
    let path = folder.join(format!("{dtype}.safetensors"));
    assert!(Checkpoint::open(&path).unwrap().is_none());
    let (engine, mut written) = (|width| engine_of(width, dtype), engine_of(3, dtype));
    let model = Arc::clone(written.model(0));
    for (i, p) in model.train.parameters.iter().enumerate() {
        for (k, what) in [Stored::Weight, Stored::Moment(0), Stored::Moment(1)].into_iter().enumerate() {
            // Awkward values too: what is no number comes back as the same bits.
            let value = |e: usize| [1.0 / 3.0, -0.0, f32::MIN_POSITIVE / 2.0, f32::from_bits(0x7FC0_7001)][e % 4];
            let all: Vec<f32> = (0..p.shape.elems()).map(|e| value(e + i + k)).collect();
            written.write_parameter(0, what, i, &all).unwrap();
        }
    }
    write_checkpoint(&path, &written, 0, &options(), 12).unwrap();
    let mut checkpoint = Checkpoint::open(&path).unwrap().expect("it is there");
    assert_eq!(checkpoint.step(), 12);
    checkpoint.check(&options(), &model).unwrap();
    assert_eq!(checkpoint.changes(&options()), []);
    let mut read = engine(3);
    assert_ne!(values(&read), values(&written));
    checkpoint.restore(&mut read, 0).unwrap();
    assert_eq!(values(&read), values(&written));
    // Equal states give equal bytes.
    let again = folder.join("again.safetensors");
    write_checkpoint(&again, &read, 0, &options(), 12).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&again).unwrap());
}

#[test]
fn what_is_frozen_is_compared_and_not_written_and_another_choice_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let frozen = TrainOptions { frozen: vec!["transformer.w".into()], ..options() };
    for dtype in [DType::F32, DType::Bf16] {
        let frozen = TrainOptions { dtype, ..frozen.clone() };
        let engine = || {
            let mut engine = engine_with(3, &frozen);
            Weights::Random.write(&mut engine, 0, 5).unwrap();
            engine
        };
        let mut written = engine();
        let trained = written.model(0).train.parameters.iter().position(|p| !p.frozen).expect("one");
        let values_of = vec![0.3; written.model(0).train.parameters[trained].shape.elems()];
        written.write_parameter(0, Stored::Weight, trained, &values_of).unwrap();
        write_checkpoint(&path, &written, 0, &frozen, 4).unwrap();
        let mut checkpoint = Checkpoint::open(&path).unwrap().unwrap();
        let named = |name: &str| checkpoint.index.get(name).is_some();
        assert!(!named("weight/transformer.wte.weight") && !named("moment0/transformer.wte.weight"));
        assert!(named("weight/transformer.ln_f.weight") && named("moment0/transformer.ln_f.weight"));
        let mut read = engine();
        assert_ne!(values(&read), values(&written));
        checkpoint.check(&frozen, read.model(0)).unwrap();
        checkpoint.restore(&mut read, 0).unwrap();
        assert_eq!(values(&read), values(&written));
        // Another table of words, by one bit; and none.
        let table = read.model(0).train.parameters.iter().position(|p| p.frozen).expect("one");
        let mut words = read.read_parameter(0, Stored::Weight, table).unwrap();
        words[3] = f32::from_bits(words[3].to_bits() ^ 0x10000);
        read.write_parameter(0, Stored::Weight, table, &words).unwrap();
        for mut other in [read, engine_with(3, &frozen)] {
            let error = checkpoint.restore(&mut other, 0).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().ends_with("than those that it was trained with"));
        }
    }
    write_checkpoint(&path, &engine_with(3, &frozen), 0, &frozen, 4).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap().unwrap();
    let error = checkpoint.check(&options(), engine(3).model(0)).unwrap_err().to_string();
    assert!(error.ends_with("frozen is [\"transformer.w\"] in the checkpoint, [] in the job"), "{error}");
}

fn sgd(momentum: f64) -> Optimizer {
    Optimizer::Sgd { lr: 0.1, momentum, nesterov: false, weight_decay: 0.0 }
}

/// A checkpoint in bytes, with its header changed and its checksum right.
fn with_header(bytes: &[u8], change: impl Fn(&mut Value)) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let header = header.to_string().into_bytes();
    let summed = &bytes[8 + length..bytes.len() - 4];
    let changed = [&(header.len() as u64).to_le_bytes()[..], &header, summed].concat();
    let sum = crc32fast::hash(&changed).to_le_bytes();
    [&changed[..], &sum].concat()
}

#[test]
fn whatever_byte_is_damaged_it_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let engine = engine(3);
    write_checkpoint(&path, &engine, 0, &options(), 3).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let refused = |what: &str| match Checkpoint::open(&path) {
        Err(error) => error,
        Ok(None) => panic!("{what}: no checkpoint"),
        Ok(Some(checkpoint)) => match checkpoint.check(&options(), engine.model(0)) {
            Err(error) => error,
            Ok(()) => panic!("{what}: taken"),
        },
    };
    let mut by_sum = 0;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&path, bytes).unwrap();
        let error = refused(&format!("byte {at}"));
        assert_eq!(error.exit_code(), 2, "byte {at}: {error}");
        by_sum += usize::from(error.to_string().contains("checkpoint.safetensors: is damaged"));
    }
    // The step's number and all weights, at the least.
    assert!(by_sum > 4 * engine.model(0).train.parameter_elems(), "{by_sum}");
    let without = with_header(&whole, |header| _ = header.as_object_mut().unwrap().remove(CHECKSUM));
    std::fs::write(&path, &without[..without.len() - 4]).unwrap();
    assert!(refused("no checksum").to_string().ends_with("has no checksum"));
}

#[test]
fn another_way_to_update_is_told_and_one_without_the_moments_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let engine = engine(3);
    let model = Arc::clone(engine.model(0));
    let adamw = |lr, epsilon, decay_matrices_only| {
        let (betas, weight_decay) = ((0.9, 0.95), 0.01);
        TrainOptions {
            optimizer: Optimizer::Adamw { lr, betas, epsilon, weight_decay, decay_matrices_only },
            ..options()
        }
    };
    let changes = |options: &TrainOptions| -> Vec<(&'static str, String, String)> {
        let checkpoint = Checkpoint::open(&path).unwrap().unwrap();
        checkpoint.check(options, &model).unwrap();
        checkpoint.changes(options).into_iter().map(|c| (c.key, c.was, c.is)).collect()
    };
    let change = |key, was: &str, is: &str| (key, was.to_string(), is.to_string());
    let cosine = TrainOptions { schedule: Schedule::Cosine { warmup: 3, min_lr: 0.0 }, ..adamw(1e-3, 1e-8, false) };
    write_checkpoint(&path, &engine, 0, &cosine, 3).unwrap();
    assert_eq!(changes(&cosine), []);
    let linear = TrainOptions { schedule: Schedule::Linear { warmup: 4, min_lr: 1e-5 }, steps: 21, ..cosine.clone() };
    let want = [
        change("schedule.kind", "cosine", "linear"),
        change("schedule.warmup", "3", "4"),
        change("schedule.min_lr", "0.0", "1e-5"),
        change("steps", "20", "21"),
    ];
    assert_eq!(changes(&linear), want);
    // More steps at a learning rate that stays are no change.
    let constant = TrainOptions { steps: 21, ..adamw(1e-3, 1e-8, false) };
    assert_eq!(changes(&constant), [change("schedule.kind", "cosine", "constant")]);
    let other = TrainOptions { clip: Some(0.5), schedule: cosine.schedule, ..adamw(0.3, 1e-7, true) };
    let want = [
        change("optimizer.lr", "0.001", "0.3"),
        change("optimizer.eps", "1e-8", "1e-7"),
        change("optimizer.decay", "all", "matrices"),
        change("optimizer.clip", "none", "0.5"),
    ];
    assert_eq!(changes(&other), want);
    let torch = TrainOptions { optimizer: Optimizer::default(), ..cosine.clone() };
    assert_eq!(changes(&torch), [change("optimizer.betas", "[0.9, 0.95]", "[0.9, 0.999]")]);

    // One that does not say it is compared by its tensors alone.
    let silent = with_header(&std::fs::read(&path).unwrap(), |header| {
        let metadata = header["__metadata__"].as_object_mut().unwrap();
        metadata.retain(|key, _| !key.contains('.') && key != "steps");
    });
    std::fs::write(&path, silent).unwrap();
    assert_eq!(changes(&other), []);
    let with_momentum = TrainOptions { optimizer: sgd(0.9), ..options() };
    let error = Checkpoint::open(&path).unwrap().unwrap().check(&with_momentum, &model).unwrap_err();
    assert!(error.to_string().contains("no such tensor"), "{error}");

    // Momentum may change, but not come or go.
    write_checkpoint(&path, &engine, 0, &with_momentum, 3).unwrap();
    let refused = |momentum: f64| {
        let options = TrainOptions { optimizer: sgd(momentum), ..options() };
        Checkpoint::open(&path).unwrap().unwrap().check(&options, &model).unwrap_err().to_string()
    };
    assert!(refused(0.0).ends_with("optimizer.momentum is 0.9 in the checkpoint, 0.0 in the job"), "{}", refused(0.0));
    // The engine of the test has two moments, which is as far as this comes.
    assert!(refused(0.8).contains("moment1/"), "{}", refused(0.8));
    let plain = TrainOptions { optimizer: sgd(0.0), ..options() };
    write_checkpoint(&path, &engine, 0, &plain, 3).unwrap();
    assert!(refused(0.8).ends_with("optimizer.momentum is 0.0 in the checkpoint, 0.8 in the job"), "{}", refused(0.8));
}

#[test]
fn differences_and_damage_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let (engine, wider) = (engine(3), engine(4));
    write_checkpoint(&path, &engine, 0, &options(), 3).unwrap();
    let open = || Checkpoint::open(&path).unwrap().unwrap();
    let refused = |options: TrainOptions, model: &Model, says: &str| {
        let error = open().check(&options, model).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(says), "{says}: {error}");
    };
    refused(TrainOptions { seed: 8, ..options() }, engine.model(0), "seed is 7 in the checkpoint, 8 in the job");
    refused(TrainOptions { batch: 4, ..options() }, engine.model(0), "batch is 2");
    refused(TrainOptions { microbatch: 2, ..options() }, engine.model(0), "microbatch is 1");
    let half = engine_of(3, DType::Bf16);
    refused(options(), half.model(0), "dtype is f32 in the checkpoint, bf16 in the job");
    refused(options(), wider.model(0), "the job's model has 5x4");
    let kind = "optimizer.kind is adamw in the checkpoint, sgd in the job";
    refused(TrainOptions { optimizer: sgd(0.9), ..options() }, engine.model(0), kind);
    // Tokenizers are compared where both sides say what they have.
    let cut_by = |words: &str| TrainOptions { tokenizer: Some(words.into()), ..options() };
    open().check(&cut_by("bytes"), engine.model(0)).unwrap();
    write_checkpoint(&path, &engine, 0, &cut_by("runes"), 3).unwrap();
    refused(cut_by("bytes"), engine.model(0), "tokenizer is runes in the checkpoint, bytes in the job");
    for same in [cut_by("runes"), options()] {
        open().check(&same, engine.model(0)).unwrap();
    }
    // So are networks, key by key; and what they are trained on may change.
    let of = |network: &str, text: &str| TrainOptions {
        network: Some(network.into()),
        data: vec![("data.text", text.into())],
        ..options()
    };
    open().check(&of("{}", "9 bytes"), engine.model(0)).unwrap();
    write_checkpoint(&path, &engine, 0, &of(r#"{"n_head":1,"epsilon":1,"n_inner":null,"old":1}"#, "9 bytes"), 3)
        .unwrap();
    refused(of(r#"{"n_head":2}"#, "9 bytes"), engine.model(0), "config.n_head is 1 in the checkpoint, 2 in the job");
    refused(
        of(r#"{"epsilon":1.5}"#, "9 bytes"),
        engine.model(0),
        "config.epsilon is 1 in the checkpoint, 1.5 in the job",
    );
    for same in [of(r#"{"epsilon":1.0,"n_head":1,"n_inner":12,"new":2}"#, "9 bytes"), options()] {
        open().check(&same, engine.model(0)).unwrap();
        assert_eq!(open().changes(&same), []);
    }
    let (key, was, is) = ("data.text", "9 bytes".into(), "8 bytes".into());
    assert_eq!(open().changes(&of("{}", "8 bytes")), [Change { key, was, is }]);
    write_checkpoint(&path, &wider, 0, &options(), 3).unwrap();
    assert!(open().restore(&mut self::engine(3), 0).is_err());
    let whole = std::fs::read(&path).unwrap();
    for bytes in [0, 7, 8, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..bytes]).unwrap();
        assert_eq!(Checkpoint::open(&path).unwrap_err().exit_code(), 2, "{bytes} bytes");
    }
    let other = br#"{"__metadata__":{"format":"pt"}}"#;
    std::fs::write(&path, [&(other.len() as u64).to_le_bytes()[..], other].concat()).unwrap();
    assert!(Checkpoint::open(&path).unwrap_err().to_string().contains("is no checkpoint"));
}
