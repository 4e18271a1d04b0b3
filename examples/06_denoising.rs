//! A regression on your own data: a network learns to remove noise from waves, with mean squared error. On a device
//! smaller than its state it ends with the same bits as a run with all the memory it wants.

use hydra::base::philox::Sequence;
use hydra::base::{DType, Result, Shape, format_bytes};
use hydra::data::{Batch, InputSpec, Source, names};
use hydra::device::CostModel;
use hydra::device::{DeviceSpec, calibrate};
use hydra::engine::Stored;
use hydra::graph::{Activation, Builder, Graph, Init, Mode};
use hydra::nn::{InputShape, Inputs, Labels, Network, layers};
use hydra::spill::PlanOptions;
use hydra::train::{Session, StepReport, TrainOptions, Weights, prepare};
use std::sync::atomic::AtomicBool;

/// Noisy waves as images of one line (B, 1, 1, N), and the waves themselves as labels (B, N).
struct Waves {
    spec: InputSpec,
    seed: u64,
}

/// Points of a wave.
const POINTS: usize = 33;

impl Waves {
    fn new(batch: usize, seed: u64) -> Result<Waves> {
        let tensors = vec![
            (names::PIXEL_VALUES.to_string(), DType::F32, Shape::from([1, 1, POINTS])),
            (names::LABELS.to_string(), DType::F32, Shape::from([POINTS])),
        ];
        Ok(Waves { spec: InputSpec::new(tensors, batch)?, seed })
    }
}

impl Source for Waves {
    fn spec(&self) -> &InputSpec {
        &self.spec
    }
    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        batch.conform(&self.spec);
        let mut random = Sequence::new(self.seed, index);
        let [noisy, clean] = &mut batch.tensors[..] else { unreachable!("the spec has two tensors") };
        let rows = noisy.as_f32_mut().chunks_exact_mut(POINTS).zip(clean.as_f32_mut().chunks_exact_mut(POINTS));
        for (noisy, clean) in rows {
            let (phase, turns) = (random.normal(), random.below(3) as f64 + 1.0);
            for (i, (noisy, clean)) in noisy.iter_mut().zip(clean).enumerate() {
                let wave = (phase + turns * i as f64 / POINTS as f64 * std::f64::consts::TAU).sin();
                (*noisy, *clean) = ((wave + 0.5 * random.normal()) as f32, wave as f32);
            }
        }
        Ok(())
    }
    fn batches_per_epoch(&self) -> u64 {
        u64::MAX
    }
}

/// Residual blocks over the points of a line: each adds an MLP's output to its input.
pub struct Denoiser {
    /// Columns of the hidden layers.
    pub hidden: usize,
    /// Blocks.
    pub depth: usize,
}

impl Network for Denoiser {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &[names::PIXEL_VALUES, names::LABELS])?;
        let axes: [usize; 3] = inputs.axes(names::PIXEL_VALUES)?;
        let points = axes.iter().product();
        let mut b = Builder::new(mode, float);
        let pixels = inputs.declare(&mut b, names::PIXEL_VALUES, &axes, false)?.expect("axes() has found it");
        let init = Init::Normal(0.1);
        let (up, down) = (
            layers::Linear::new(self.hidden, init, Activation::GeluTanh),
            layers::Linear::new(points, init, Activation::None),
        );
        let mut x = b.reshape(pixels, [batch, points])?;
        for i in 0..self.depth {
            x = b.layer(format!("block.{i}"), |b, _| {
                let h = up.trace(b, x, &format!("block.{i}.up"))?;
                let h = down.trace(b, h, &format!("block.{i}.down"))?;
                b.add(h, x)
            })?;
        }
        let predicted = b.layer("head", |b, _| down.trace(b, x, "head"))?;
        // Targets are floats like other floating-point inputs, in the model's own type.
        if let Some(clean) = inputs.declare(&mut b, names::LABELS, &[points], false)? {
            b.mean_squared_error(predicted, clean)?;
        }
        b.finish()
    }
    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new(names::PIXEL_VALUES, [1, 1, POINTS], DType::F32)]
    }
    fn labels(&self) -> Labels {
        Labels { shift: false, classes: 1, vocab: None }
    }
    fn config(&self) -> serde_json::Value {
        serde_json::json!({ "hidden": self.hidden, "depth": self.depth })
    }
}

/// Trains and returns the bits of every weight, and the losses.
fn train(network: &Denoiser, options: &TrainOptions, cost: &CostModel) -> Result<(Vec<u32>, Vec<f32>)> {
    let waves = Waves::new(options.batch, options.seed)?;
    let planned = prepare(network, &waves, options, cost)?;
    println!("{} shards, {} on the device", planned.1.shards.len(), format_bytes(planned.1.arena.bytes));
    let mut session = Session::new(Weights::Random, planned, Box::new(waves), None, options.clone())?;
    let mut losses = Vec::new();
    let mut watch = |report: &StepReport| {
        losses.push(report.result.loss);
        Ok(())
    };
    session.run(&mut watch, &AtomicBool::new(false))?;
    let engine = session.engine();
    let mut weights = Vec::new();
    for i in 0..engine.model(0).train.parameters.len() {
        weights.extend(engine.read_parameter(0, Stored::Weight, i)?.into_iter().map(f32::to_bits));
    }
    Ok((weights, losses))
}

/// Trains twice and compares the bits.
pub fn main() -> Result<()> {
    let network = Denoiser { hidden: 128, depth: 4 };
    let cost = calibrate(&DeviceSpec::default())?;
    let stays = PlanOptions { resident: Some(true), ..PlanOptions::default() };
    let resident = TrainOptions { plan: stays, seed: 1, batch: 16, microbatch: 8, ..TrainOptions::new(120) };
    let (weights, losses) = train(&network, &resident, &cost)?;

    // Weights, gradients and AdamW's two moments, 4 bytes each.
    let state_bytes = 16 * weights.len() as u64;
    let plan = PlanOptions { device_budget: Some(state_bytes / 2), ..PlanOptions::default() };
    let spilled = TrainOptions { plan, ..resident };
    let (spilled_weights, spilled_losses) = train(&network, &spilled, &cost)?;

    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let (before, after) = (losses[0], mean(&losses[losses.len() - 10..]));
    println!("mean squared error {before:.3} -> {after:.3}; that of the noise is 0.25");
    assert!(after < 0.25 && before > 2.0 * after, "{losses:?}");
    assert!(weights == spilled_weights && losses == spilled_losses, "a budget must not change a bit");
    println!("the same bits with and without a budget");
    Ok(())
}
