//! A layer, a model and data of one's own: a residual MLP learns what a token stands for.
//!
//! Implementing `Network` is all it takes: gradients, placement, spilling and the optimizer follow from the traced graph.

use hydra::base::{DType, Result, Shape};
use hydra::data::{Batch, InputSpec, RandomOptions, RandomSource, Source, names};
use hydra::device::host::calibrate;
use hydra::graph::{Activation, Builder, Graph, Init, Mode, Value, WeightLayout};
use hydra::nn::{InputShape, Inputs, Labels, Network, layers};
use hydra::train::{Optimizer, Session, StepReport, TrainOptions, Weights, prepare};
use std::sync::atomic::AtomicBool;

/// A layer of one's own: `x + dropout(W2 gelu(W1 norm(x)))`, x (B, T, C). It names its parameters and traces its ops, no more.
fn residual_mlp(b: &mut Builder, x: Value, name: &str, hidden: usize) -> Result<Value> {
    let linear = |outputs, activation| layers::Linear {
        outputs,
        layout: WeightLayout::OutIn,
        weight: Init::Normal(0.05),
        bias: Some(Init::Constant(0.0)),
        activation,
    };
    let width = b.shape(x).cols();
    let h = layers::layernorm(b, x, &format!("{name}.norm"), 1e-5)?;
    let h = linear(hidden, Activation::GeluTanh).trace(b, h, &format!("{name}.up"))?;
    let h = linear(width, Activation::None).trace(b, h, &format!("{name}.down"))?;
    let h = b.dropout(h, 0.1)?;
    b.add(h, x)
}

/// A model of one's own. A cut may fall between any two of its layers.
struct Own {
    vocab: usize,
    width: usize,
    depth: usize,
}

impl Network for Own {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &[names::INPUT_IDS, names::LABELS])?;
        let [t] = inputs.axes(names::INPUT_IDS)?;
        let mut b = Builder::new(mode, float);
        let ids = inputs.declare(&mut b, names::INPUT_IDS, &[t], true)?.expect("axes() has found it");
        let table = [self.vocab, self.width];
        let mut x = b.layer("embedding", |b, _| layers::embedding(b, ids, "embedding", table, Init::Normal(0.5)))?;
        for i in 0..self.depth {
            x = b.layer(format!("mlp.{i}"), |b, _| residual_mlp(b, x, &format!("mlp.{i}"), 4 * self.width))?;
        }
        // The head is the embedding's own table: used twice, updated once.
        let logits = b.layer("head", |b, _| {
            let table = b.parameter("embedding.weight", table, Init::Normal(0.5))?;
            b.linear(x, table, None, Activation::None, WeightLayout::OutIn)
        })?;
        if let Some(labels) = inputs.declare(&mut b, names::LABELS, &[t], true)? {
            b.cross_entropy(logits, labels)?;
        }
        b.finish()
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new(names::INPUT_IDS, [16], DType::I32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: false, classes: self.vocab, vocab: Some(self.vocab) }
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({ "vocab": self.vocab, "width": self.width, "depth": self.depth })
    }
}

/// Data of one's own: random ids, each of which stands for its successor but one. A minibatch follows from its number alone.
struct SecondNext(RandomSource);

impl Source for SecondNext {
    fn spec(&self) -> &InputSpec {
        self.0.spec()
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        self.0.fill(index, batch)?;
        let vocab = self.0.spec().vocab.expect("random sources know it") as i32;
        let [ids, labels] = &mut batch.tensors[..] else { unreachable!("the two tensors of main") };
        labels.as_i32_mut().iter_mut().zip(ids.as_i32()).for_each(|(label, id)| *label = (id + 2) % vocab);
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        u64::MAX
    }
}

/// Trains the model for sixty steps.
pub fn main() -> Result<()> {
    let network = Own { vocab: 32, width: 32, depth: 3 };
    let tensors = [names::INPUT_IDS, names::LABELS].map(|name| (name.to_string(), DType::I32, Shape::from([16])));
    let random = RandomOptions { tensors: tensors.to_vec(), vocab: 32, classes: 32, batch: 8, seed: 1 };
    let source = SecondNext(RandomSource::new(&random)?);

    let adamw = Optimizer::Adamw {
        lr: 3e-3,
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        weight_decay: 0.01,
        decay_matrices_only: true,
    };
    let options = TrainOptions { seed: 1, batch: 8, microbatch: 4, optimizer: adamw, ..TrainOptions::new(60) };
    let planned = prepare(&network, &source, &options, &calibrate(None)?)?;
    let mut session = Session::new(&network, Weights::Random, planned, Box::new(source), None, options)?;

    let mut losses = Vec::new();
    let mut watch = |report: &StepReport| {
        losses.push(report.result.loss);
        Ok(())
    };
    session.run(&mut watch, &AtomicBool::new(false))?;
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("loss {first:.3} -> {last:.3} in {} steps", losses.len());
    assert!(last < first / 2.0, "the loss went from {first} to {last}");
    Ok(())
}
