//! A training loop of your own: a learning rate that follows the losses, and an average of the last weights (Izmailov
//! et al. 2018, arXiv:1803.05407) that is validated and written back, under a budget.
//!
//! `Session` has the usual loop. Below it is the engine, which takes minibatches and updates one at a time.

use hydra::base::{DType, Result, Shape};
use hydra::data::{Batch, BatchTensor, names};
use hydra::device::{DeviceSpec, FleetMemory, calibrate, start_fleet};
use hydra::engine::{Engine, StepInput, Stored};
use hydra::nn::{InputShape, from_config};
use hydra::spill::PlanOptions;
use hydra::train::{TrainOptions, Weights, batch_inputs, plan_model, trace_model};
use std::ops::Range;
use std::sync::Arc;

const STEPS: u64 = 160;
/// Samples, positions, and size of the vocabulary of numbers.
const SIZES: [usize; 3] = [8, 16, 61];
/// First numbers of the sequences for training, and of the held-out ones.
const TRAINED: Range<usize> = 0..49;
const HELD_OUT: Range<usize> = 49..61;
/// A loss is the mean over all positions.
const LOSS_SCALE: f64 = 1.0 / (SIZES[0] * SIZES[1]) as f64;

/// Sequences that count up modulo a prime, each with its own stride, from one of the numbers of `starts`; the label of
/// a position is the number that follows.
fn minibatch(number: u64, starts: Range<usize>) -> Batch {
    let [batch, time, numbers] = SIZES;
    let at = |row: usize, t: usize| {
        let row = number as usize * batch + row;
        let start = starts.start + row * 29 % starts.len();
        ((start + t * (1 + row % 3)) % numbers) as i32
    };
    let tensor = |(name, ahead): (&str, usize)| {
        let mut tensor = BatchTensor::zeros(name, DType::I32, Shape::from([batch, time]));
        let values = (0..batch * time).map(|i| at(i / time, i % time + ahead));
        tensor.as_i32_mut().iter_mut().zip(values).for_each(|(to, value)| *to = value);
        tensor
    };
    Batch { tensors: [(names::INPUT_IDS, 0), (names::LABELS, 1)].map(tensor).to_vec() }
}

/// Reads the weights, which must be in the host's store.
fn read(engine: &Engine) -> Result<Vec<Vec<f32>>> {
    (0..engine.model(0).train.parameters.len()).map(|i| engine.read_parameter(0, Stored::Weight, i)).collect()
}

/// The loss of sequences that no step has seen.
fn validate(engine: &mut Engine) -> Result<f32> {
    let batch = minibatch(0, HELD_OUT);
    let inputs = batch_inputs(&engine.model(0).train, &batch)?;
    engine.wait_evaluation(0, &inputs, LOSS_SCALE)
}

/// Trains, averages and validates.
pub fn main() -> Result<()> {
    let [batch, time, numbers] = SIZES;
    let config = serde_json::json!({ "n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": time, "vocab_size": numbers,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0 });
    let gpt = from_config("gpt2", &config)?;
    let plan = PlanOptions { device_budget: Some(300_000), ..PlanOptions::default() };
    let options = TrainOptions { batch, microbatch: batch / 2, clip: Some(1.0), plan, ..TrainOptions::new(STEPS) };

    let inputs = [names::INPUT_IDS, names::LABELS].map(|name| InputShape::new(name, [time], DType::I32));
    let model = Arc::new(trace_model(gpt.as_ref(), &inputs, &options)?);
    let plan = plan_model(&model, &options, &calibrate(&DeviceSpec::default())?)?;
    let (arena_bytes, host_bytes) = (vec![plan.arena.bytes], plan.host.bytes);
    let memory = FleetMemory { arena_bytes, host_bytes, ..FleetMemory::default() };
    let device = start_fleet(&[DeviceSpec::default()], memory)?;
    let how = options.engine_options(&model, &plan);
    let mut engine = Engine::new(Arc::clone(&model), plan, device, how);
    Weights::Random.write(&mut engine, 0, options.seed)?;

    let (adamw, mut lr) = (options.optimizer, 1e-2);
    // The running average of recent losses, and its minimum so far.
    let (mut recent, mut least, mut patience) = (f32::NAN, f32::INFINITY, 0);
    let (mut first, mut sums, mut averaged) = (f32::NAN, Vec::<Vec<f32>>::new(), 0);
    for step in 0..STEPS {
        let batch = minibatch(step, TRAINED);
        let (inputs, rule) = (batch_inputs(&model.train, &batch)?, adamw.rule(step, lr));
        engine.begin_step(0, &StepInput { step, inputs, loss_scale: LOSS_SCALE, rule, clip: options.clip })?;
        // A step is begun while the one before it runs, so a device never waits for this loop.
        if step == 0 {
            continue;
        }
        let loss = engine.wait_step(0)?.loss;
        first = if step == 1 { loss } else { first };
        recent = if step == 1 { loss } else { 0.9 * recent + 0.1 * loss };
        (least, patience) = if recent < least { (recent, 0) } else { (least, patience + 1) };
        if patience == 5 {
            (lr, patience) = (0.5 * lr, 0);
            println!("step {step}: loss {recent:.3} has stopped falling; learning rate {lr:.1e}");
        }
        if step >= STEPS - 40 && (step + 1).is_multiple_of(8) {
            // Also waits for the step in flight, whose result is reported as usual.
            engine.wait_home(0)?;
            let weights = read(&engine)?;
            sums.resize_with(weights.len(), Vec::new);
            for (sum, weight) in sums.iter_mut().zip(weights) {
                sum.resize(weight.len(), 0.0);
                sum.iter_mut().zip(weight).for_each(|(sum, w)| *sum += w);
            }
            averaged += 1;
        }
    }
    let last = engine.wait_step(0)?.loss;

    let before = validate(&mut engine)?;
    engine.wait_home(0)?;
    for (i, sum) in sums.iter().enumerate() {
        let average: Vec<f32> = sum.iter().map(|sum| sum / averaged as f32).collect();
        engine.write_parameter(0, Stored::Weight, i, &average)?;
    }
    let after = validate(&mut engine)?;
    println!("loss {first:.3} -> {last:.3}; held out {before:.3}, of the average of {averaged} {after:.3}");
    assert!(last < 0.5 * first && after < 0.5 * first, "{first} {last} {after}");
    Ok(())
}
