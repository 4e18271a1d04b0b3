//! Checks that a job's parts are compatible: the device with the precision, the network with the data.

use crate::job::model::{Data, Model, ValidPart};
use crate::job::{DeviceKind, Job, Pipeline, Policy};
use hydra::base::{Error, Result};
use hydra::data::names;
use hydra::nn::{self, InputShape, Network};
use hydra::spill::Baseline;

/// Refuses requests that are valid in a job but not supported yet.
///
/// # Errors
/// [`Error::BadInput`] that names the key.
pub fn check_scope(file: &str, job: &Job) -> Result<()> {
    let fault = |at: &str, what: &str| Err(Error::bad(format!("{file}: {at}: {what}")));
    if job.run.pipeline_microbatches.is_some() && job.run.policy != Policy::Lines(Baseline::Gpipe) {
        return fault("run.pipeline_microbatches", "goes with policy = \"gpipe\" only; leave it out");
    }
    if job.run.pipeline == Pipeline::Always {
        let devices: usize = job.devices.iter().map(|d| d.count).sum();
        if job.run.policy != Policy::LOCALITY_LRTF || devices < 2 {
            let what = "\"always\" goes with policy = \"locality-lrtf\" and two devices or more; leave it out";
            return fault("run.pipeline", what);
        }
    }
    if job.host.link.is_some() && !matches!(job.devices[0].kind, DeviceKind::Host | DeviceKind::Sim) {
        return fault("host.link", "is for kind = \"host\" and \"sim\" only; leave it out");
    }
    Ok(())
}

/// Refuses data of a kind that the network cannot train on, or that cannot be split if a part is to be held out;
/// `vocab` is the number of ids of a text's tokenizer. Called before the text is tokenized, which may take long.
pub fn check_data(model: &Model, network: &dyn Network, vocab: Option<usize>) -> Result<()> {
    let is_image = |input: &InputShape| input.name == names::PIXEL_VALUES;
    let fault = |key: &str, what: &str| Err(model.fault(key, what));
    if vocab.is_some() {
        if network.inputs().iter().any(is_image) {
            return fault("data.text", "the model takes images, not text; write images, or batches of them");
        }
        let labels = network.labels();
        if labels.vocab.is_some() && !labels.shift {
            let what = "labels each token by the next one, which is not what the model learns; write batches, or random = true";
            return fault("data.text", what);
        }
        check_fit(model, network, vocab, vocab)?;
    }
    let splits = matches!(model.data, Data::Text { .. } | Data::Images { .. });
    if !splits && model.valid.as_ref().is_some_and(|v| matches!(v.part, ValidPart::Fraction(_))) {
        return fault("valid.fraction", "goes with text and images only; leave valid out");
    }
    let Data::Random { context, image } = &model.data else { return Ok(()) };
    for input in network.inputs() {
        if is_image(&input) && image.is_none() && context.is_some() {
            return fault("data.context", "the model takes images; write image = [3, 224, 224]");
        }
        if !is_image(&input) && image.is_some() {
            return fault("data.image", "the model takes tokens; write context = 128");
        }
    }
    Ok(())
}

/// Refuses data with ids or labels that the network does not take.
pub fn check_fit(model: &Model, network: &dyn Network, vocab: Option<usize>, classes: Option<usize>) -> Result<()> {
    let labels = network.labels();
    let what = match (vocab, labels.vocab, classes) {
        (Some(have), Some(takes), _) if have > takes => {
            format!("its tokens are 0..{have}, the model's vocab_size is {takes}; it must be at least {have}")
        }
        (_, _, Some(have)) if have > labels.classes => {
            format!("its labels are 0..{have}, the model has {} classes", labels.classes)
        }
        _ => return Ok(()),
    };
    Err(model.fault("data", what))
}

/// Refuses prefixes that match no parameter's name.
pub fn check_frozen(model: &Model, network: &dyn Network) -> Result<()> {
    if model.frozen.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = nn::tensors(network)?.into_iter().map(|(name, _)| name).collect();
    let begins = |start: &&String| names.iter().any(|name| name.starts_with(*start));
    let Some(start) = model.frozen.iter().find(|start| !begins(start)) else { return Ok(()) };
    let alike = |name: &&String| name.bytes().zip(start.bytes()).take_while(|(a, b)| a == b).count();
    let such = names.iter().rev().max_by_key(alike).map_or(String::new(), |name| format!("; there is {name}"));
    Err(model.fault("frozen", format!("no parameter's name begins with {start:?}{such}")))
}
