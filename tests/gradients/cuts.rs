//! One model under every cut, kept or recomputed, gives the same bits: losses, the accumulator of every use of a
//! parameter, running statistics; over two microbatches, on one thread and on all.

use crate::machine::{Cut, Machine, decode, draw_inputs, draw_weights};
use hydra::base::{DType, Result};
use hydra::graph::{Activation, AttentionOptions, Builder, Graph, Init, Mode, Value, WeightLayout, differentiate};
use std::ops::Range;

/// Runs `graph` whole, then under every cut in each way of keeping, and compares bits.
fn check(graph: Graph) {
    let layers = graph.layers.len();
    let weights = draw_weights(&graph);
    let inputs: Vec<_> = (0..2).map(|m| draw_inputs(&graph, m)).collect();
    let run = |cut: Cut| Machine::new(graph.clone(), cut, 2).run(&weights, &inputs, &[0, 1]);
    let want = run(Cut::whole(layers));
    assert!(want.losses.iter().all(|l| l.is_finite()) && want.losses[0] != want.losses[1]);
    for (parameter, layer, gradient) in &want.gradients {
        let gradient = decode(gradient, graph.float.wide());
        let name = &graph.parameters[*parameter].name;
        assert!(
            gradient.iter().all(|g| g.is_finite()) && gradient.iter().any(|&g| g != 0.0),
            "{name} in layer {layer}: {gradient:?}"
        );
    }
    for mask in 0u32..1 << (layers - 1) {
        let shards = cut(layers, mask);
        for (keep, recompute, threads) in
            [(0, false, None), (!0, false, Some(1)), (0x5555, true, None), (0xAAAA, true, Some(1))]
        {
            let keep = (0..shards.len()).map(|s| keep >> s & 1u32 == 1).collect();
            let cut = Cut { shards: shards.clone(), keep, recompute, threads };
            let got = run(cut.clone());
            assert_eq!(got.losses, want.losses, "{cut:?}: losses");
            assert_eq!(got.states, want.states, "{cut:?}: running statistics");
            for (got, want) in got.gradients.iter().zip(&want.gradients) {
                assert!(got == want, "{cut:?}: the gradient of {} in layer {}", graph.parameters[want.0].name, want.1);
            }
            assert_eq!(got.gradients.len(), want.gradients.len());
        }
    }
}

/// The stretches between the layers after which `mask` has a 1.
fn cut(layers: usize, mask: u32) -> Vec<Range<usize>> {
    let ends = (1..layers).filter(|e| mask >> (e - 1) & 1 == 1).chain([layers]);
    let mut start = 0;
    ends.map(|end| std::mem::replace(&mut start, end)..end).collect()
}

fn parameter(b: &mut Builder, name: &str, shape: &[usize], deviation: f64) -> Result<Value> {
    b.parameter(name, hydra::base::Shape(shape.to_vec()), Init::Normal(deviation))
}

/// A GPT of two blocks whose head shares the embedding's table, with dropout everywhere and a bias that three layers
/// share.
fn gpt(dtype: DType) -> Result<Graph> {
    const B: usize = 2;
    const T: usize = 33;
    const C: usize = 12;
    const V: usize = 31;
    let mut b = Builder::new(Mode::Training, dtype);
    b.layer("embedding", |b, _| {
        let ids = b.input("ids", [B, T], DType::I32)?;
        let (table, positions) = (parameter(b, "table", &[V, C], 0.5)?, parameter(b, "positions", &[40, C], 0.5)?);
        let x = b.embedding(ids, table)?;
        let x = b.add_position(x, positions)?;
        b.dropout(x, 0.1)
    })?;
    for block in 0..2 {
        b.layer(format!("block {block}"), |b, x| {
            let x = x.expect("the embedding comes first");
            let own =
                |b: &mut Builder, name: &str, shape: &[usize]| parameter(b, &format!("{block} {name}"), shape, 0.4);
            let shared = parameter(b, "shared bias", &[C], 0.4)?;
            let mask = b.input("mask", [B, T], DType::I32)?;
            let (scale, qkv, out) = (own(b, "norm 1", &[C])?, own(b, "qkv", &[C, 3 * C])?, own(b, "out", &[C, C])?);
            let n = b.layernorm(x, scale, shared, 1e-5)?;
            let qkv = b.linear(n, qkv, None, Activation::None, WeightLayout::InOut)?;
            let options = AttentionOptions { heads: 3, kv_heads: 3, scale: None, causal: true, dropout: 0.2 };
            let a = b.attention_packed(qkv, Some(mask), options)?;
            let a = b.linear(a, out, Some(shared), Activation::None, WeightLayout::OutIn)?;
            let a = b.dropout(a, 0.1)?;
            let x = b.add(x, a)?;
            let (scale, bias) = (own(b, "norm 2", &[C])?, own(b, "norm 2 bias", &[C])?);
            let (up, up_bias, down) =
                (own(b, "up", &[C, 4 * C])?, own(b, "up bias", &[4 * C])?, own(b, "down", &[4 * C, C])?);
            let n = b.layernorm(x, scale, bias, 1e-5)?;
            let h = b.linear(n, up, Some(up_bias), Activation::GeluTanh, WeightLayout::InOut)?;
            let h = b.linear(h, down, None, Activation::None, WeightLayout::InOut)?;
            let h = b.dropout(h, 0.1)?;
            b.add(x, h)
        })?;
    }
    b.layer("norm", |b, x| {
        let (scale, bias) = (parameter(b, "norm", &[C], 0.4)?, parameter(b, "shared bias", &[C], 0.4)?);
        b.layernorm(x.expect("blocks come first"), scale, bias, 1e-5)
    })?;
    let logits = b.layer("head", |b, x| {
        let table = parameter(b, "table", &[V, C], 0.5)?;
        b.linear(x.expect("the norm comes first"), table, None, Activation::None, WeightLayout::OutIn)
    })?;
    finish(b, logits, &[B, T])
}

/// A CNN with batch normalisation, a residual layer that hands on its own input's activation, pooling, and a boundary
/// that is a view.
fn cnn(dtype: DType) -> Result<Graph> {
    const N: usize = 3;
    let mut b = Builder::new(Mode::Training, dtype);
    b.layer("stem", |b, _| {
        let x = b.input("image", [N, 3, 11, 9], dtype)?;
        let w = parameter(b, "stem", &[5, 3, 3, 3], 0.4)?;
        let x = b.conv2d(x, w, None, 1, 1)?;
        let x = b.batchnorm(x, "stem norm", 1e-5, 0.1)?;
        b.activation(x, Activation::Relu)
    })?;
    b.layer("residual", |b, x| {
        let x = x.expect("the stem comes first");
        let (w, bias) = (parameter(b, "residual", &[5, 5, 3, 3], 0.3)?, parameter(b, "residual bias", &[5], 0.3)?);
        let y = b.conv2d(x, w, Some(bias), 1, 1)?;
        let y = b.batchnorm(y, "residual norm", 1e-5, 0.2)?;
        let y = b.add(y, x)?;
        b.activation(y, Activation::Relu)
    })?;
    b.layer("pool", |b, x| {
        let x = b.max_pool(x.expect("the residual comes first"), 3, 2, 1)?;
        let x = b.avg_pool(x, [2, 2], 1, 0)?;
        let x = b.transpose(x, &[0, 2, 3, 1])?;
        b.reshape(x, [N, 5 * 4 * 5])
    })?;
    let logits = b.layer("head", |b, x| {
        let w = parameter(b, "head", &[7, 5 * 4 * 5], 0.1)?;
        b.linear(x.expect("the pool comes first"), w, None, Activation::None, WeightLayout::OutIn)
    })?;
    finish(b, logits, &[N])
}

fn finish(mut b: Builder, logits: Value, labels: &[usize]) -> Result<Graph> {
    let labels = b.input("labels", hydra::base::Shape(labels.to_vec()), DType::I32)?;
    b.cross_entropy(logits, labels)?;
    let mut graph = b.finish()?;
    differentiate(&mut graph)?;
    Ok(graph)
}

#[test]
fn every_cut_of_a_gpt() {
    [DType::F32, DType::Bf16].into_iter().for_each(|dtype| check(gpt(dtype).unwrap()));
}

#[test]
fn every_cut_of_a_cnn() {
    [DType::F32, DType::Bf16].into_iter().for_each(|dtype| check(cnn(dtype).unwrap()));
}
