//! An op of one's own, with its host body, its kernel and its gradient: squared ReLU, trained in a small network on
//! every available device.
//!
//! The crate knows nothing of this op. Its kernels (`squared_relu.cu`) are compiled like the crate's own: by nvcc into
//! a fatbin, and for the emulator by `kernels/emulator/build.sh`; see `build.rs`, whose lines can be copied to your own
//! build script.

use hydra::base::{DType, Result, Shape};
use hydra::data::{RandomOptions, RandomSource, names};
use hydra::device::{DeviceSpec, why_no_cuda, why_no_emulator};
use hydra::graph::{Activation, Builder, CustomOp, Graph, Init, KernelCall, Kernels, Mode, Number, WeightLayout};
use hydra::nn::{InputShape, Inputs, Labels, Network, layers};
use hydra::train::{Session, StepReport, TrainOptions, Weights, prepare};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[cfg(feature = "cuda")]
const FATBIN: &[u8] = include_bytes!(env!("HYDRA_EXAMPLE_FATBIN"));
#[cfg(not(feature = "cuda"))]
const FATBIN: &[u8] = &[];
#[cfg(feature = "emulator")]
const EMULATED: &[u8] = include_bytes!(env!("HYDRA_EXAMPLE_EMULATED"));
#[cfg(not(feature = "emulator"))]
const EMULATED: &[u8] = &[];

/// out = max(x, 0)^2, or with `grad` its gradient: (d_out, x, out) -> 2 max(x, 0) d_out.
#[derive(Debug)]
struct SquaredRelu {
    grad: bool,
}

impl CustomOp for SquaredRelu {
    fn name(&self) -> &'static str {
        if self.grad { "squared_relu_grad" } else { "squared_relu" }
    }
    fn shapes(&self, inputs: &[&Shape]) -> Result<Vec<Shape>> {
        Ok(vec![inputs[0].clone()])
    }
    fn host(&self, outputs: &mut [&mut [f32]], inputs: &[&[f32]], _: &[&Shape]) {
        for (i, out) in outputs[0].iter_mut().enumerate() {
            *out = match self.grad {
                false => inputs[0][i].max(0.0).powi(2),
                true => 2.0 * inputs[1][i].max(0.0) * inputs[0][i],
            };
        }
    }
    fn kernels(&self) -> Option<Kernels> {
        // SAFETY: each entry point of squared_relu.cu takes its output, its inputs and the number of their elements, as
        // `launch` passes them.
        Some(unsafe { Kernels::new("squared_relu", FATBIN, EMULATED) })
    }
    fn launch(&self, dtype: DType, shapes: &[&Shape], launch: &mut dyn FnMut(&KernelCall)) {
        let kernel = match (self.grad, dtype) {
            (false, DType::Bf16) => "squared_relu_bf16",
            (false, _) => "squared_relu_f32",
            (true, DType::Bf16) => "squared_relu_grad_bf16",
            (true, _) => "squared_relu_grad_f32",
        };
        let n = shapes[0].elems();
        let numbers = &[Number::Long(n as i64)];
        launch(&KernelCall { kernel, grid: [n.div_ceil(256), 1, 1], block: 256, shared_bytes: 0, numbers });
    }
    fn gradient(&self) -> Option<Arc<dyn CustomOp>> {
        (!self.grad).then(|| Arc::new(SquaredRelu { grad: true }) as Arc<dyn CustomOp>)
    }
}

/// Embedding, linear, squared ReLU, head.
struct Own;

impl Network for Own {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &[names::INPUT_IDS, names::LABELS])?;
        let [t] = inputs.axes(names::INPUT_IDS)?;
        let (mut b, init) = (Builder::new(mode, float), Init::Normal(0.2));
        let ids = inputs.declare(&mut b, names::INPUT_IDS, &[t], true)?.expect("axes() has found it");
        let x = b.layer("embedding", |b, _| layers::embedding(b, ids, "embedding", [16, 24], init))?;
        let hidden = b.layer("hidden", |b, _| {
            let weight = b.parameter("hidden", [24, 32], init)?;
            let x = b.linear(x, weight, None, Activation::None, WeightLayout::InOut)?;
            Ok(b.custom(Arc::new(SquaredRelu { grad: false }), vec![x])?[0])
        })?;
        let logits = b.layer("head", |b, _| {
            let weight = b.parameter("head", [32, 16], init)?;
            b.linear(hidden, weight, None, Activation::None, WeightLayout::InOut)
        })?;
        if let Some(labels) = inputs.declare(&mut b, names::LABELS, &[t], true)? {
            b.cross_entropy(logits, labels)?;
        }
        b.finish()
    }
    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new(names::INPUT_IDS, [8], DType::I32)]
    }
    fn labels(&self) -> Labels {
        Labels { shift: false, classes: 16, vocab: Some(16) }
    }
    fn config(&self) -> serde_json::Value {
        serde_json::json!({})
    }
}

/// Losses of twenty steps on a device.
fn train(device: DeviceSpec, dtype: DType) -> Result<Vec<f32>> {
    let tensors = [names::INPUT_IDS, names::LABELS].map(|name| (name.to_string(), DType::I32, Shape::from([8])));
    let random = RandomOptions { tensors: tensors.to_vec(), vocab: 16, classes: 4, batch: 8, seed: 1 };
    let source = Box::new(RandomSource::new(&random)?);
    let options = TrainOptions { seed: 1, batch: 8, microbatch: 4, device, dtype, ..TrainOptions::new(20) };
    let cost = hydra::device::CostModel::stated(1e11, 2e10, 1e10);
    let planned = prepare(&Own, source.as_ref(), &options, &cost)?;
    let mut session = Session::new(Weights::Random, planned, source, None, options)?;
    let mut losses = Vec::new();
    let mut watch = |report: &StepReport| {
        losses.push(report.result.loss);
        Ok(())
    };
    session.run(&mut watch, &AtomicBool::new(false))?;
    Ok(losses)
}

/// Trains on the host, and on the emulator and a GPU where available, and compares the losses.
pub fn main() -> Result<()> {
    let emulated = DeviceSpec::Emulated { arch: 90, seed: 3, threads: None };
    let others = [
        ("emulated", why_no_emulator(), emulated),
        ("cuda", why_no_cuda(), DeviceSpec::Cuda { ordinal: 0, threads: None }),
    ];
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::Bf16, 3e-2)] {
        let host = train(DeviceSpec::default(), dtype)?;
        println!("host     {dtype}: loss {:.4} -> {:.4}", host[0], host[19]);
        assert!(host[19] < host[0], "{host:?}");
        for (name, missing, device) in &others {
            if let Some(why) = missing {
                println!("{name:<8} not here: {why}");
                continue;
            }
            let losses = train(device.clone(), dtype)?;
            println!("{name:<8} {dtype}: loss {:.4} -> {:.4}", losses[0], losses[19]);
            assert!(host.iter().zip(&losses).all(|(a, b)| (a - b).abs() < tolerance), "{host:?} {losses:?}");
        }
    }
    Ok(())
}
