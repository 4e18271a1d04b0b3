//! A layer and a model of one's own, trained on labels drawn at random from 4 of 32 classes, so the best possible loss
//! is ln 4. Then the model predicts, is saved and read back, and goes on training.
//!
//! Implementing `Network` is all it takes: gradients, placement, spilling and the optimizer follow from the traced
//! graph.

use hydra::base::{DType, Result, Shape};
use hydra::data::{Batch, RandomOptions, RandomSource, Source, names};
use hydra::graph::{Activation, Builder, Graph, Init, Mode, Value, WeightLayout};
use hydra::nn::{Form, InputShape, Inputs, Labels, Network, layers, open_own};
use hydra::train::{Session, StepReport, TrainOptions, Weights, wait_forward};
use std::sync::atomic::AtomicBool;

const INIT: Init = Init::Normal(0.1);
/// The embedding's table: vocabulary and width.
const TABLE: [usize; 2] = [32, 32];

/// A layer of one's own: `x + dropout(W2 gelu(W1 norm(x)))`, x (B, T, C). It only names its parameters and traces its
/// ops.
fn residual_mlp(b: &mut Builder, x: Value, name: &str, hidden: usize) -> Result<Value> {
    let width = b.shape(x).cols();
    let (layout, weight, bias) = (WeightLayout::OutIn, INIT, Some(Init::Constant(0.0)));
    let up = layers::Linear { outputs: hidden, layout, weight, bias, activation: Activation::GeluTanh };
    let down = layers::Linear { outputs: width, activation: Activation::None, ..up };
    let h = layers::layernorm(b, x, &format!("{name}.norm"), 1e-5)?;
    let h = up.trace(b, h, &format!("{name}.up"))?;
    let h = down.trace(b, h, &format!("{name}.down"))?;
    let h = b.dropout(h, 0.1)?;
    b.add(h, x)
}

/// A model of one's own. A cut may fall between any two of its layers.
struct Own;

impl Network for Own {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &[names::INPUT_IDS, names::LABELS])?;
        let [t] = inputs.axes(names::INPUT_IDS)?;
        let mut b = Builder::new(mode, float);
        let ids = inputs.declare(&mut b, names::INPUT_IDS, &[t], true)?.expect("axes() has found it");
        let mut x = b.layer("embedding", |b, _| layers::embedding(b, ids, "embedding", TABLE, INIT))?;
        for name in ["mlp.0", "mlp.1"] {
            x = b.layer(name, |b, _| residual_mlp(b, x, name, 4 * TABLE[1]))?;
        }
        let logits = b.layer("head", |b, _| {
            let table = b.parameter("embedding.weight", TABLE, INIT)?; // used twice, updated once
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
        Labels { shift: false, classes: TABLE[0], vocab: Some(TABLE[0]) }
    }
    fn config(&self) -> serde_json::Value {
        serde_json::json!({ "vocab": TABLE[0], "width": TABLE[1], "depth": 2 })
    }
}

/// Trains the model for sixty steps, and compares its predictions with those of its saved copy.
pub fn main() -> Result<()> {
    let tensors = [names::INPUT_IDS, names::LABELS].map(|name| (name.to_string(), DType::I32, Shape::from([16])));
    let random = RandomOptions { tensors: tensors.to_vec(), vocab: 32, classes: 4, batch: 8, seed: 1 };
    let source = || RandomSource::new(&random);
    let options = TrainOptions { seed: 1, batch: 8, microbatch: 4, ..TrainOptions::new(60) };
    let mut session = Session::start(&Own, Weights::Random, Box::new(source()?), None, options.clone())?;
    let mut losses = Vec::new();
    let mut watch = |report: &StepReport| {
        losses.push(report.result.loss);
        Ok(())
    };
    session.run(&mut watch, &AtomicBool::new(false))?;
    println!("loss {:.3} -> {:.3}; ln 4 is {:.3}", losses[0], losses[59], 4f32.ln());
    assert!(losses[59] < losses[0] - 1.0 && losses[59] > 0.9 * 4f32.ln(), "{losses:?}");

    let mut batch = Batch::default();
    source()?.fill(60, &mut batch)?; // of any size; its labels are not read
    let (shape, logits) = session.wait_forward(&Own, &batch)?;
    let best = |row: &[f32]| (0..row.len()).max_by(|&i, &j| row[i].total_cmp(&row[j])).expect("32 classes");
    println!("logits {shape}; the first position is of class {}", best(&logits[..TABLE[0]]));
    assert!(logits.chunks_exact(TABLE[0]).all(|row| best(row) < 4), "no label was another");

    let dir = std::env::temp_dir().join(format!("hydra-own-model-{}", std::process::id()));
    session.wait_save(&dir, &Form::of(&Own)?, Weights::Random)?;
    let saved = open_own(&dir, Box::new(Own))?; // names, shapes and types are the network's, or it is an error
    let first = Weights::Pretrained(&saved);
    assert!(wait_forward(&Own, first, &batch)?.1 == logits, "the same bits");
    let loss =
        Session::start(&Own, first, Box::new(source()?), None, options)?.wait_step()?.expect("a step").result.loss;
    println!("read back and trained on: loss {loss:.3}");
    assert!(loss < losses[0] - 1.0, "it begins with what was learnt: {loss}");
    std::fs::remove_dir_all(&dir).expect("made above");
    Ok(())
}
