//! Each family computes what PyTorch computes: logits of the first batch, the loss of the first step.

use super::oracle::{Named, Run, run};
use super::*;
use crate::graph::{Graph, Mode};
use crate::nn::{Pretrained, open, tensors};

/// The stored logits and losses were rounded to f32: each is off by at most 2^-24 of itself.
const TOLERANCE: f64 = 1.2e-7;

/// Runs a case's first batch; labels, where they are taken, are shifted as the data module shifts them.
fn first_batch(case: &str, mode: Mode, with_labels: bool) -> (Pretrained, Graph, Run, Named) {
    let pretrained = open(&fixture(case).join("model")).unwrap();
    let mut named = Named::new();
    for (name, shape) in tensors(pretrained.network.as_ref()).unwrap() {
        let values = pretrained.tensor(&name, &shape).unwrap();
        named.insert(name, values.into_iter().map(f64::from).collect());
    }
    let mut inputs = Vec::new();
    let mut batch = 0;
    for (name, tensor) in tensors_of(case, "batches.safetensors") {
        if name == "labels" && !with_labels {
            continue;
        }
        batch = tensor.axes[1];
        let dtype = if tensor.element == Element::I64 { DType::I32 } else { DType::F32 };
        inputs.push(InputShape::new(name.clone(), &tensor.axes[2..], dtype));
        let len = tensor.axes[1..].iter().product();
        let mut values = tensor.values[..len].to_vec();
        if name == "labels" && pretrained.network.labels().shift {
            for row in values.chunks_mut(tensor.axes[2]) {
                row.rotate_left(1);
                *row.last_mut().unwrap() = -100.0;
            }
        }
        named.insert(name, values);
    }
    let graph = pretrained.network.trace(mode, DType::F64, batch, &inputs).unwrap();
    let ran = run(&graph, &mut named);
    (pretrained, graph, ran, named)
}

fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let squares = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
    (squares(&mut got.iter().zip(want).map(|(g, w)| g - w)) / squares(&mut want.iter().copied())).sqrt()
}

#[test]
fn logits_are_pytorchs() {
    for case in CASES {
        let (_, graph, ran, _) = first_batch(case, Mode::Evaluation, false);
        assert!(graph.loss.is_none());
        let logits = graph.logits.unwrap();
        let want = &tensors_of(case, "expected.safetensors")["logits"];
        assert_eq!(graph.info(logits).shape.axes(), want.axes, "{case}");
        let distance = distance(ran.get(&graph, logits), &want.values);
        assert!(distance < TOLERANCE, "{case}: {distance:e}");
    }
}

#[test]
fn first_losses_are_pytorchs() {
    for case in CASES {
        let (_, graph, ran, named) = first_batch(case, Mode::Training, true);
        let labelled = named["labels"].iter().filter(|&&label| label >= 0.0).count();
        let loss = ran.get(&graph, graph.loss.unwrap())[0] / labelled as f64;
        let want = tensors_of(case, "expected.safetensors")["losses"].values[0];
        assert!(((loss - want) / want).abs() < TOLERANCE, "{case}: {loss} for {want}");
    }
}

/// Running statistics after one batch: moved by the batch's own, with the unbiased variance.
#[test]
fn training_moves_every_running_statistic() {
    let (pretrained, graph, _, named) = first_batch("resnet", Mode::Training, true);
    for state in &graph.states {
        let before = pretrained.tensor(&state.name, &state.shape).unwrap();
        let moved = named[&state.name].iter().zip(&before).filter(|(after, before)| **after != f64::from(**before));
        assert_eq!(moved.count(), before.len(), "{}", state.name);
    }
}
