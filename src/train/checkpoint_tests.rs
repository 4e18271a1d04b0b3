//! Checkpoints of a tiny model: what is written comes back, and what differs is named.

use super::*;
use crate::base::DType;
use crate::device::sim::CostModel;
use crate::nn::{self, InputShape};
use crate::spill::{Plan, PlanOptions};
use crate::train::{TrainOptions, trace_model};
use std::sync::Arc;

const IDENTITY: Identity = Identity { seed: 7, batch: 2, microbatch: 1 };

fn engine(width: usize) -> Engine {
    engine_of(width, DType::F32)
}

fn engine_of(width: usize, dtype: DType) -> Engine {
    let config = json!({ "n_layer": 1, "n_embd": width, "n_head": 1, "n_positions": 3, "vocab_size": 5 });
    let network = nn::from_config("gpt2", config.as_object().unwrap(), true).unwrap();
    let inputs = ["input_ids", "labels"].map(|name| InputShape::new(name, [3], DType::I32));
    let options = TrainOptions { batch: 2, microbatch: 1, dtype, ..TrainOptions::new(1) };
    let model = Arc::new(trace_model(network.as_ref(), &inputs, &options).unwrap());
    let plan = Arc::new(Plan::new(&model, &PlanOptions::default(), &CostModel::stated(1e11, 2e10, 1e10)).unwrap());
    let spec = crate::device::host::HostSpec { arena_bytes: plan.arena.bytes, ..Default::default() };
    let config =
        crate::device::host::HostConfig { devices: vec![spec], host_bytes: plan.host.bytes, ..Default::default() };
    let device = crate::device::host::HostDevice::new(&config).unwrap();
    let options = crate::engine::EngineOptions::new(0, &model);
    Engine::new(model, plan, Box::new(device), options)
}

/// Every tensor's values, in the file's order.
fn values(engine: &Engine) -> Vec<Vec<u32>> {
    let read = |part| match part {
        Part::Parameter(what, i) => engine.read_parameter(0, what, i),
        Part::State(i) => engine.read_state(0, i),
    };
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect();
    parts(engine.model(0), engine.plan(0).moments).into_iter().map(|(_, _, part)| bits(read(part))).collect()
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
            written.write_parameter(0, what, i, &all);
        }
    }
    write_checkpoint(&path, &written, 0, IDENTITY, 12).unwrap();
    let mut checkpoint = Checkpoint::open(&path).unwrap().expect("it is there");
    assert_eq!(checkpoint.step(), 12);
    checkpoint.check(IDENTITY, &model, 2).unwrap();
    let mut read = engine(3);
    assert_ne!(values(&read), values(&written));
    checkpoint.restore(&mut read, 0).unwrap();
    assert_eq!(values(&read), values(&written));
    // Equal states give equal bytes.
    let again = folder.join("again.safetensors");
    write_checkpoint(&again, &read, 0, IDENTITY, 12).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&again).unwrap());
}

#[test]
fn differences_and_damage_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let (engine, wider) = (engine(3), engine(4));
    write_checkpoint(&path, &engine, 0, IDENTITY, 3).unwrap();
    let open = || Checkpoint::open(&path).unwrap().unwrap();
    let refused = |identity, model: &Model, moments, says: &str| {
        let error = open().check(identity, model, moments).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(says), "{says}: {error}");
    };
    refused(Identity { seed: 8, ..IDENTITY }, engine.model(0), 2, "seed is 7 in the checkpoint, 8 in the job");
    refused(Identity { batch: 4, ..IDENTITY }, engine.model(0), 2, "batch is 2");
    refused(Identity { microbatch: 2, ..IDENTITY }, engine.model(0), 2, "microbatch is 1");
    let half = engine_of(3, DType::Bf16);
    refused(IDENTITY, half.model(0), 2, "dtype is f32 in the checkpoint, bf16 in the job");
    refused(IDENTITY, wider.model(0), 2, "the job's model has 5x4");
    refused(IDENTITY, engine.model(0), 1, "no such tensor");
    write_checkpoint(&path, &wider, 0, IDENTITY, 3).unwrap();
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
