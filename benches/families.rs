//! Every family's training step on the host device beside PyTorch's eager one, on the same shapes with as many threads,
//! in turn.
//!
//! `cargo bench --bench families`, with names of rows for some of them. `HYDRA_PYTHON` (or `python3`) names a Python
//! with torch; without one only our own times are printed. `HYDRA_BENCH_QUICK=1` takes one round of few steps of one
//! sample, to see that it runs.

use hydra::base::{DType, Result, Shape};
use hydra::data::{Batch, InputSpec, RandomOptions, RandomSource, Source, names};
use hydra::nn::from_config;
use hydra::train::{Optimizer, Session, TrainOptions, Weights};
use serde_json::{Value, json};
use std::process::Command;

/// Steps of a round that do not count.
const WARM: usize = 2;

/// A model of a size that two cores train in about a second a step.
struct Row {
    name: &'static str,
    family: &'static str,
    config: Value,
    /// Samples of a step, in one microbatch.
    batch: usize,
    /// Tokens of a sample, or height and width of an image.
    size: usize,
}

fn rows() -> Vec<Row> {
    let row = |name, family, batch, size, config| Row { name, family, config, batch, size };
    let text = |more: Value| {
        let mut config = json!({ "vocab_size": 8192 });
        let (config_map, more) =
            (config.as_object_mut().expect("an object"), more.as_object().expect("an object").clone());
        config_map.extend(more);
        config
    };
    let wide = json!({
        "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    });
    let gpt = json!({ "n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0 });
    let llama = json!({
        "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    });
    let vit = json!({
        "image_size": 64, "patch_size": 8, "num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
        "num_labels": 10, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    });
    let resnet = |layer_type: &str, depths: [usize; 4], hidden_sizes: [usize; 4]| json!({ "layer_type": layer_type, "depths": depths, "hidden_sizes": hidden_sizes, "embedding_size": 64, "num_labels": 10 });
    vec![
        row("gpt2", "gpt2", 8, 256, text(gpt)),
        row("llama", "llama", 8, 256, text(llama)),
        row("bert", "bert", 16, 128, text(wide)),
        row("vit", "vit", 32, 64, vit),
        row("resnet18", "resnet", 32, 64, resnet("basic", [2, 2, 2, 2], [64, 128, 256, 512])),
        row("resnet50", "resnet", 16, 96, resnet("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048])),
    ]
}

/// A source's first minibatch again and again: drawing numbers takes the threads' time, and PyTorch's clock leaves it
/// out. Buffers that come back hold it still.
struct Ready(RandomSource, Batch);

impl Source for Ready {
    fn spec(&self) -> &InputSpec {
        self.0.spec()
    }

    fn fill(&mut self, _: u64, batch: &mut Batch) -> Result<()> {
        if self.1.tensors.is_empty() {
            self.0.fill(0, &mut self.1)?;
        }
        if batch.tensors.is_empty() {
            batch.clone_from(&self.1);
        }
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        self.0.batches_per_epoch()
    }
}

impl Row {
    /// Seconds of our steps.
    fn ours(&self, steps: usize) -> Result<Vec<f64>> {
        let network = from_config(self.family, &self.config)?;
        let images = self.config.get("num_labels").is_some();
        let (input, labels) = match images {
            true => ((names::PIXEL_VALUES, DType::F32, Shape::from([3, self.size, self.size])), Shape::default()),
            false => ((names::INPUT_IDS, DType::I32, Shape::from([self.size])), Shape::from([self.size])),
        };
        let tensors = vec![(input.0.to_string(), input.1, input.2), (names::LABELS.to_string(), DType::I32, labels)];
        let classes = if images { 10 } else { 8192 };
        let source =
            RandomSource::new(&RandomOptions { tensors, vocab: classes, classes, batch: self.batch, seed: 1 })?;
        let source = Ready(source, Batch::default());
        let optimizer = match images && self.family == "resnet" {
            true => Optimizer::Sgd { lr: 1e-3, momentum: 0.9, nesterov: false, weight_decay: 0.0 },
            false => Optimizer::default(),
        };
        let batch = self.batch;
        let options = TrainOptions { batch, microbatch: batch, optimizer, ..TrainOptions::new(steps as u64) };
        let mut session = Session::start(network.as_ref(), Weights::Random, Box::new(source), None, options)?;
        let mut secs = Vec::new();
        while let Some(step) = session.wait_step()? {
            secs.push(step.result.secs);
        }
        Ok(secs.split_off(WARM.min(secs.len())))
    }

    /// Seconds of PyTorch's steps, in a process of its own; none where there is no torch.
    fn theirs(&self, python: &str, threads: usize, steps: usize) -> Vec<f64> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/families.py");
        let sizes = json!({ "family": self.family, "batch": self.batch, "size": self.size, "threads": threads, "steps": steps });
        let output = Command::new(python).arg(script).arg(sizes.to_string()).arg(self.config.to_string()).output();
        let text = output.ok().filter(|o| o.status.success()).map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        text.map_or(Vec::new(), |text| text.lines().filter_map(|line| line.parse().ok()).skip(WARM).collect())
    }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn main() -> Result<()> {
    let quick = std::env::var("HYDRA_BENCH_QUICK").is_ok_and(|v| !v.is_empty() && v != "0");
    let (rounds, steps) = if quick { (1, WARM + 1) } else { (3, 8) };
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let python = std::env::var("HYDRA_PYTHON").unwrap_or_else(|_| "python3".into());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!("a training step on {threads} threads: medians of {rounds} rounds in turn, {} steps each", steps - WARM);
    for mut row in rows() {
        row.batch = if quick { 1 } else { row.batch };
        if !wanted.is_empty() && !wanted.iter().any(|w| w == row.name) {
            continue;
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.extend(row.ours(steps)?);
            theirs.extend(row.theirs(&python, threads, steps));
        }
        let ours = median(&mut ours).expect("steps were run");
        match median(&mut theirs) {
            Some(theirs) => println!(
                "  {:<10} {:>7.1} ms   PyTorch {:>7.1} ms   PyTorch / ours {:.2}",
                row.name,
                1e3 * ours,
                1e3 * theirs,
                theirs / ours
            ),
            None => println!("  {:<10} {:>7.1} ms   PyTorch: not here ({python} has no torch)", row.name, 1e3 * ours),
        }
    }
    Ok(())
}
