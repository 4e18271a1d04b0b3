//! Fine-tuning: trains a model from a Hugging Face directory, with its first layers frozen, on your own data, and
//! validates it regularly; the best state is kept as a checkpoint, restored at the end, and saved as a directory again.

use hydra::base::{DType, Result};
use hydra::data::{Batch, Source, Text, TextOptions, TextSource, Tokenizer};
use hydra::device::{DeviceSpec, calibrate};
use hydra::graph::Mode;
use hydra::nn::{Form, from_config, init, open, save};
use hydra::spill::PlanOptions;
use hydra::train::{Session, TrainOptions, Weights, prepare, wait_forward};
use std::path::Path;

const CONTEXT: usize = 32;
const BATCH: usize = 8;

/// Makes a directory like one you would download; here a small GPT over bytes with random weights.
fn make_model(dir: &Path) -> Result<()> {
    let config = serde_json::json!({ "n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": CONTEXT, "vocab_size": 256,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0 });
    let gpt = from_config("gpt2", &config)?;
    let form = Form::of(gpt.as_ref())?;
    let graph = gpt.trace(Mode::Training, DType::F32, 1, &gpt.inputs())?;
    save(dir, &form, &mut |name| {
        let (i, parameter) = graph.parameters.iter().enumerate().find(|(_, p)| p.name == name).expect("its own names");
        Ok(init::initial(parameter, i, 1))
    })
}

/// Trains, restores the best state and saves it; returns the held-out loss before and after.
fn fine_tune(from: &Path, text: &Path, to: &Path) -> Result<[f32; 2]> {
    let pretrained = open(from)?;
    let text = Text::read(&[text.to_path_buf()], &Tokenizer::Bytes)?;
    let windows = TextOptions { context: CONTEXT, batch: BATCH, seed: 1, valid_fraction: 0.1 };
    let data = || TextSource::open(&text, &windows);
    let (source, mut held_out) = (data()?.train, data()?.valid.expect("a tenth of the text"));

    // The position embeddings and half of the blocks are frozen: they take memory only for their weights.
    let frozen = ["transformer.wpe", "transformer.h.0.", "transformer.h.1."].map(String::from).to_vec();
    let plan = PlanOptions { device_budget: Some(1_200_000), ..PlanOptions::default() };
    let options =
        TrainOptions { batch: BATCH, microbatch: BATCH / 2, clip: Some(1.0), frozen, plan, ..TrainOptions::new(60) };
    let planned = prepare(pretrained.network.as_ref(), &source, &options, &calibrate(&DeviceSpec::default())?)?;
    let first = Weights::Pretrained(&pretrained);
    let session = |source: TextSource| Session::new(first, planned.clone(), Box::new(source), None, options.clone());

    let checkpoint = to.with_extension("checkpoint");
    let mut training = session(source)?;
    let before = training.wait_evaluation(&mut held_out)?;
    let mut best = before;
    while let Some(step) = training.wait_step()? {
        if (step.result.step + 1).is_multiple_of(20) {
            let loss = training.wait_evaluation(&mut held_out)?;
            println!("step {}: loss {:.3}, held out {loss:.3}", step.result.step, step.result.loss);
            if loss < best {
                best = loss;
                training.wait_checkpoint(&checkpoint)?;
            }
        }
    }
    drop(training);

    let mut kept = session(data()?.train)?;
    kept.resume(&checkpoint)?.expect("a better one was found");
    let after = kept.wait_evaluation(&mut held_out)?;
    assert_eq!(after.to_bits(), best.to_bits(), "a checkpoint holds every bit");
    kept.wait_save(to, &pretrained.form, first)?;
    Ok([before, after])
}

/// Makes a model, fine-tunes it, and checks what it has learned.
pub fn main() -> Result<()> {
    let dir = std::env::temp_dir().join(format!("hydra-fine-tuning-{}", std::process::id()));
    let [from, to, text] = ["model", "tuned", "text"].map(|name| dir.join(name));
    make_model(&from)?;
    std::fs::write(&text, "to be, or not to be: that is the question. ".repeat(200)).expect("a file of 9 KB");
    let [before, after] = fine_tune(&from, &text, &to)?;
    println!("held out {before:.3} -> {after:.3}");
    assert!(after < 0.7 * before, "{before} -> {after}");

    let tuned = open(&to)?;
    let mut batch = Batch::default();
    let windows = TextOptions { context: CONTEXT, batch: 1, seed: 2, valid_fraction: 0.0 };
    let mut source = TextSource::open(&Text::read(&[text], &Tokenizer::Bytes)?, &windows)?.train;
    source.fill(0, &mut batch)?;
    let (shape, logits) = wait_forward(tuned.network.as_ref(), Weights::Pretrained(&tuned), &batch)?;
    println!("logits {shape}, the first {:.3}", logits[0]);
    std::fs::remove_dir_all(&dir).expect("made above");
    Ok(())
}
