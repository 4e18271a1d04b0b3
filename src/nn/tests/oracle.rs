//! Runs forward graphs in f64 with the plainest loops there are, to hold families against PyTorch without any device.

use crate::graph::{
    Activation, AttentionKind, Graph, Op, RotaryScaling, Rotation, Source, Value, WeightLayout, Window,
};
use std::collections::BTreeMap;

/// Values of a graph's tensors by name: inputs, parameters, running statistics.
pub type Named = BTreeMap<String, Vec<f64>>;

/// Every value after the forward pass. Running statistics in `named` change as a training graph says.
pub struct Run {
    values: Vec<Vec<f64>>,
}

impl Run {
    pub fn get(&self, graph: &Graph, value: Value) -> &[f64] {
        &self.values[graph.root(value).0 as usize]
    }
}

pub fn run(graph: &Graph, named: &mut Named) -> Run {
    let mut run = Run { values: vec![Vec::new(); graph.values.len()] };
    for (i, info) in graph.values.iter().enumerate() {
        let name = match info.source {
            Source::Parameter(p) => &graph.parameters[p].name,
            Source::State(s) => &graph.states[s].name,
            Source::Input(n) => &graph.inputs[n].name,
            _ => continue,
        };
        run.values[i] = named.get(name).unwrap_or_else(|| panic!("{name} has no values")).clone();
        assert_eq!(run.values[i].len(), info.shape.elems(), "{name}");
    }
    for node in &graph.nodes[..graph.forward_nodes] {
        let x: Vec<&[f64]> = node.inputs.iter().map(|&v| run.get(graph, v)).collect();
        let shape = |i: usize| graph.info(node.inputs[i]).shape.axes();
        if let Op::UpdateRunning { momentum, count } = node.op {
            let unbiased = count as f64 / (count as f64 - 1.0);
            let blend = |old: &[f64], new: &[f64], scale: f64| -> Vec<f64> {
                old.iter().zip(new).map(|(o, n)| (1.0 - momentum) * o + momentum * scale * n).collect()
            };
            let updated = [blend(x[2], x[0], 1.0), blend(x[3], x[1], unbiased)];
            for (value, new) in node.inputs[2..].iter().zip(updated) {
                let Source::State(state) = graph.info(*value).source else { panic!("no state") };
                named.insert(graph.states[state].name.clone(), new);
            }
            continue;
        }
        let out = graph.info(node.outputs[0]).shape.axes();
        let outputs = match &node.op {
            Op::Embedding { .. } => {
                let c = shape(1)[1];
                vec![x[0].iter().flat_map(|&id| x[1][id as usize * c..][..c].to_vec()).collect()]
            }
            Op::AddPosition => {
                let sample = shape(0)[1] * shape(0)[2];
                vec![x[0].iter().enumerate().map(|(i, v)| v + x[1][i % sample]).collect()]
            }
            Op::Linear { activation, layout, residual } => {
                let operands = x.len() - usize::from(*residual);
                let (k, n) = (*shape(0).last().unwrap(), *out.last().unwrap());
                let mut pre = Vec::new();
                for row in x[0].chunks(k) {
                    for j in 0..n {
                        let weight = |i: usize| match layout {
                            WeightLayout::InOut => x[1][i * n + j],
                            WeightLayout::OutIn => x[1][j * k + i],
                        };
                        let bias = if operands > 2 { x[2][j] } else { 0.0 };
                        pre.push(bias + (0..k).map(|i| row[i] * weight(i)).sum::<f64>());
                    }
                }
                let mut out: Vec<f64> = pre.iter().map(|&v| activate(*activation, v)).collect();
                for added in &x[operands..] {
                    out.iter_mut().zip(*added).for_each(|(out, v)| *out += v);
                }
                vec![out]
            }
            Op::Glu(activation) => {
                vec![x[0].iter().zip(x[1]).map(|(&gate, up)| activate(*activation, gate) * up).collect()]
            }
            Op::Activation(activation) => vec![x[0].iter().map(|&v| activate(*activation, v)).collect()],
            Op::Add => vec![x[0].iter().zip(x[1]).map(|(a, b)| a + b).collect()],
            Op::Scale(by) => vec![x[0].iter().map(|v| by * v).collect()],
            Op::Transpose { axes } => {
                assert_eq!(axes, &[0, 2, 1], "the families here use no other");
                let &[b, n, m] = shape(0) else { panic!("{} axes", shape(0).len()) };
                let places = (0..b).flat_map(|b| (0..m).flat_map(move |j| (0..n).map(move |i| (b * n + i) * m + j)));
                vec![places.map(|place| x[0][place]).collect()]
            }
            Op::Shift { by } => {
                let mut y = vec![0.0; out.iter().product()];
                let (&[_, t, c], rows) = (shape(0), out[1]) else { panic!("{} axes", shape(0).len()) };
                for (i, value) in x[0].iter().enumerate() {
                    if let Some(to) = (i / c % t).checked_add_signed(*by).filter(|&to| to < rows) {
                        y[(i / c / t * rows + to) * c + i % c] = *value;
                    }
                }
                vec![y]
            }
            Op::LayerNorm { epsilon } => {
                let mut y = Vec::new();
                for row in x[0].chunks(x[1].len()) {
                    let (mean, var) = moments(row.iter().copied());
                    y.extend(
                        row.iter().enumerate().map(|(i, v)| (v - mean) / (var + epsilon).sqrt() * x[1][i] + x[2][i]),
                    );
                }
                vec![y]
            }
            Op::RmsNorm { epsilon } => {
                let rows = x[0].chunks(x[1].len()).map(|row| {
                    let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
                    (row, (mean + epsilon).sqrt().recip())
                });
                vec![rows.flat_map(|(row, r)| row.iter().zip(x[1]).map(move |(v, w)| v * r * w)).collect()]
            }
            Op::Rotary(rotation) => vec![rotary(rotation, x[0], shape(0))],
            Op::Attention(kind) => vec![attention(kind, &x, shape(0))],
            Op::CrossEntropy => {
                let rows = x[0].chunks(x[0].len() / x[1].len()).zip(x[1]);
                let counts = |label: f64| label >= 0.0;
                let loss = |row: &[f64], label: f64| log_sum_exp(row) - row[label as usize];
                vec![rows.map(|(row, &label)| if counts(label) { loss(row, label) } else { 0.0 }).collect()]
            }
            Op::LossSum => vec![vec![x[0].iter().sum()]],
            Op::Conv2d(window) => {
                let mut y = Vec::new();
                let (c, o) = (shape(0)[1], out[1]);
                for n in 0..out[0] {
                    for o in 0..o {
                        slide(*window, shape(0), out, |taps| {
                            let one = |&(at, tap): &(usize, usize), channel: usize| {
                                let plane = shape(0)[2] * shape(0)[3];
                                let taps = window.kernel[0] * window.kernel[1];
                                x[0][(n * c + channel) * plane + at] * x[1][(o * c + channel) * taps + tap]
                            };
                            let bias = x.get(2).map_or(0.0, |bias| bias[o]);
                            y.push(
                                bias + (0..c)
                                    .flat_map(|channel| taps.iter().map(move |t| (t, channel)))
                                    .map(|(t, ch)| one(t, ch))
                                    .sum::<f64>(),
                            );
                        });
                    }
                }
                vec![y]
            }
            Op::MaxPool(window) | Op::AvgPool(window) => {
                let size = (window.kernel[0] * window.kernel[1]) as f64;
                let is_max = matches!(node.op, Op::MaxPool(_));
                let mut y = Vec::new();
                for plane in x[0].chunks(shape(0)[2] * shape(0)[3]) {
                    slide(*window, shape(0), out, |taps| {
                        let values = taps.iter().map(|&(at, _)| plane[at]);
                        y.push(if is_max {
                            values.fold(f64::NEG_INFINITY, f64::max)
                        } else {
                            values.sum::<f64>() / size
                        });
                    });
                }
                vec![y]
            }
            Op::BatchNorm { epsilon } => {
                let (of, channels) = (channel_of(shape(0)), shape(0)[1]);
                let stats: Vec<(f64, f64)> = (0..channels)
                    .map(|c| moments(x[0].iter().enumerate().filter(|(i, _)| of(*i) == c).map(|(_, v)| *v)))
                    .collect();
                let y = x[0].iter().enumerate().map(|(i, v)| {
                    let (mean, var) = stats[of(i)];
                    (v - mean) / (var + epsilon).sqrt() * x[1][of(i)] + x[2][of(i)]
                });
                let rstd = stats.iter().map(|(_, var)| (var + epsilon).sqrt().recip()).collect();
                let (mean, var) = stats.iter().copied().unzip();
                vec![y.collect(), mean, rstd, var]
            }
            Op::BatchNormEval { epsilon } => {
                let of = channel_of(shape(0));
                let y = x[0].iter().enumerate().map(|(i, v)| {
                    let c = of(i);
                    (v - x[3][c]) / (x[4][c] + epsilon).sqrt() * x[1][c] + x[2][c]
                });
                vec![y.collect()]
            }
            other => panic!("{} is not part of these graphs", other.name()),
        };
        for (value, computed) in node.outputs.iter().zip(outputs) {
            assert_eq!(computed.len(), graph.info(*value).shape.elems(), "{}", node.op.name());
            run.values[value.0 as usize] = computed;
        }
    }
    run
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::GeluErf => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// Mean and biased variance.
fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let count = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / count;
    (mean, values.map(|v| (v - mean).powi(2)).sum::<f64>() / count)
}

fn log_sum_exp(row: &[f64]) -> f64 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln()
}

fn channel_of(shape: &[usize]) -> impl Fn(usize) -> usize + use<> {
    let (channels, plane): (usize, usize) = (shape[1], shape[2..].iter().product());
    move |element| element / plane % channels
}

/// Calls `at` for each place of the window with (element of the plane, element of the kernel) of what is inside.
fn slide(window: Window, image: &[usize], out: &[usize], mut at: impl FnMut(&[(usize, usize)])) {
    let [kh, kw] = window.kernel;
    for (oh, ow) in (0..out[2]).flat_map(|oh| (0..out[3]).map(move |ow| (oh, ow))) {
        let inside =
            |o: usize, k: usize, size: usize| (o * window.stride + k).checked_sub(window.padding).filter(|&i| i < size);
        let taps: Vec<(usize, usize)> = (0..kh * kw)
            .filter_map(|tap| {
                let (h, w) = (inside(oh, tap / kw, image[2])?, inside(ow, tap % kw, image[3])?);
                Some((h * image[3] + w, tap))
            })
            .collect();
        at(&taps);
    }
}

/// Heads that fill their rows, turned by complex numbers: with Llama's pairs, element i and i + width/2 are one.
fn rotary(rotation: &Rotation, x: &[f64], shape: &[usize]) -> Vec<f64> {
    let (width, half) = (rotation.width, rotation.width / 2);
    assert!(!rotation.back && shape[2] == rotation.heads * width);
    // How fast a pair turns, and what all are stretched by.
    let (speed, stretch): (Box<dyn Fn(usize) -> f64>, f64) = match rotation.scaling {
        RotaryScaling::None => (Box::new(|_| 1.0), 1.0),
        RotaryScaling::Yarn { factor, low, high, positions, whole: true, stretch } => {
            let pair = |turns: f64| {
                let wave = positions as f64 / (turns * std::f64::consts::TAU);
                width as f64 * wave.ln() / (2.0 * rotation.base.ln())
            };
            let (first, last) = (pair(high).floor().max(0.0), pair(low).ceil().min(width as f64 - 1.0));
            assert!(first < last && last <= half as f64, "some pairs lie between");
            let ramp = move |i: usize| ((i as f64 - first) / (last - first)).clamp(0.0, 1.0);
            (Box::new(move |i| ramp(i) / factor + 1.0 - ramp(i)), stretch)
        }
        other => panic!("{other:?}: the cases here have no such"),
    };
    let value = |i: usize| {
        let (position, of) = (i / shape[2] % shape[1], i % width);
        let (re, im) = (x[i - of + of % half], x[i - of + of % half + half]);
        let angle = position as f64 * speed(of % half) * rotation.base.powf(-((of % half) as f64) / half as f64);
        stretch * if of < half { re * angle.cos() - im * angle.sin() } else { re * angle.sin() + im * angle.cos() }
    };
    (0..x.len()).map(value).collect()
}

/// `x` is qkv packed, or q, k and v, all of as many positions; then perhaps a mask.
fn attention(kind: &AttentionKind, x: &[&[f64]], shape: &[usize]) -> Vec<f64> {
    let AttentionKind { heads, kv_heads, width, scale, causal, packed, masked, dropout } = *kind;
    assert!(dropout.is_none() && (heads == kv_heads || !packed), "the families here use no other");
    let (b, t) = (shape[0], shape[1]);
    let part = |b: usize, t_: usize, which: usize, h: usize| {
        let row = b * t + t_;
        let (of, h) = if which == 0 { (heads, h) } else { (kv_heads, h * kv_heads / heads) };
        match packed {
            true => &x[0][row * 3 * heads * width + (which * heads + h) * width..][..width],
            false => &x[which][row * of * width + h * width..][..width],
        }
    };
    let sees = |b: usize, j: usize| !masked || x[x.len() - 1][b * t + j] != 0.0;
    let mut out = vec![0.0; b * t * heads * width];
    for (b, h, i) in (0..b).flat_map(|b| (0..heads).flat_map(move |h| (0..t).map(move |i| (b, h, i)))) {
        let seen: Vec<usize> = (0..if causal { i + 1 } else { t }).filter(|&j| sees(b, j)).collect();
        let dot = |j: usize| part(b, i, 0, h).iter().zip(part(b, j, 1, h)).map(|(q, k)| q * k).sum::<f64>();
        let scores: Vec<f64> = seen.iter().map(|&j| scale * dot(j)).collect();
        let lse = log_sum_exp(&scores);
        for (&j, score) in seen.iter().zip(scores) {
            for d in 0..width {
                out[((b * t + i) * heads + h) * width + d] += (score - lse).exp() * part(b, j, 2, h)[d];
            }
        }
    }
    out
}
