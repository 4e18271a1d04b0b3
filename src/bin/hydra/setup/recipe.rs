//! A model's data according to its job: how it is opened, and how it is identified.

use crate::job;
use crate::job::model::{Data, ValidPart};
use crate::text::Texts;
use crate::text::tokenizer::FileTokenizer;
use flate2::CrcWriter;
use hydra::base::{DType, Error, Result, Shape};
use hydra::data::{
    BatchesOptions, BatchesSource, ImageFiles, ImageOptions, ImageSource, RandomOptions, RandomSource, Source,
    TextOptions, TextSource, names,
};
use hydra::nn::Network;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of a file of batches or images that are read to identify it: the file may be larger than memory.
const LOOKED_AT: u64 = 64 << 20;

/// The job file's keys for a model's training and validation data.
const KEYS_OF_DATA: [&str; 7] =
    ["data.context", "data.text", "data.batches", "data.images", "valid.fraction", "valid.text", "valid.every"];

/// Training data and held-out data.
pub struct Sources {
    /// Training data.
    pub train: Box<dyn Source>,
    /// Held-out data.
    pub valid: Option<Box<dyn Source>>,
}

/// Everything needed to open a model's data, any number of times.
pub struct Recipe {
    /// What it is trained on.
    pub data: Data,
    /// Its text's tokenizer, if that comes from files.
    pub tokenizer: Option<Arc<FileTokenizer>>,
    /// What it is validated on.
    pub valid: Option<job::Valid>,
    /// Samples of a minibatch.
    pub batch: usize,
    /// The run's seed, for the data's order.
    pub seed: u64,
}

impl Recipe {
    /// The data's identity, by the job file's keys: a checkpoint stores it, so that different data is noticed. The
    /// files have been opened before.
    ///
    /// # Errors
    /// When a file can no longer be read.
    pub fn identity(&self, texts: &Texts) -> Result<Vec<(&'static str, String)>> {
        let none = || "none".to_string();
        let of_text = |paths: &[PathBuf]| -> Result<String> {
            Ok(texts.open(paths, self.tokenizer.as_ref())?.identity().to_string())
        };
        let mut all = KEYS_OF_DATA.map(|_| none());
        let [context, text, batches, images, fraction, held_out, every] = &mut all;
        match &self.data {
            Data::Text { paths, context: tokens, .. } => (*context, *text) = (tokens.to_string(), of_text(paths)?),
            Data::Batches { path } => *batches = of_files([path])?,
            Data::Images { images: paths, labels } => *images = of_files(paths.iter().chain(labels))?,
            Data::Random { context: tokens, .. } => *context = tokens.map_or_else(none, |tokens| tokens.to_string()),
        }
        if let Some(valid) = &self.valid {
            *every = valid.every.to_string();
            match &valid.part {
                ValidPart::Fraction(part) => *fraction = format!("{part:?}"),
                ValidPart::Text(paths) => *held_out = of_text(paths)?,
            }
        }
        Ok(KEYS_OF_DATA.into_iter().zip(all).collect())
    }

    /// Opens the data, from the start.
    ///
    /// # Errors
    /// When a file is missing or faulty.
    pub fn open(&self, network: &dyn Network, texts: &Texts) -> Result<Sources> {
        let (batch, seed) = (self.batch, self.seed);
        let valid_fraction = match self.valid.as_ref().map(|v| &v.part) {
            Some(ValidPart::Fraction(fraction)) => *fraction,
            _ => 0.0,
        };
        match &self.data {
            Data::Text { paths, context, .. } => {
                let text = |paths| texts.open(paths, self.tokenizer.as_ref());
                let options = TextOptions { context: *context, batch, seed, valid_fraction };
                let split = TextSource::open(&text(paths)?, &options)?;
                let valid = match self.valid.as_ref().map(|v| &v.part) {
                    Some(ValidPart::Text(paths)) => Some(TextSource::open_valid(&text(paths)?, &options)?),
                    _ => split.valid,
                };
                Ok(Sources { train: Box::new(split.train), valid: valid.map(|v| Box::new(v) as Box<dyn Source>) })
            }
            Data::Batches { path } => {
                let shift_labels = network.labels().shift;
                let options = BatchesOptions { path: path.clone(), batch: Some(batch), shift_labels };
                Ok(Sources { train: Box::new(BatchesSource::open(&options)?), valid: None })
            }
            Data::Images { images, labels } => {
                let files = match (&images[..], labels) {
                    ([images], Some(labels)) => ImageFiles::Idx { images: images.clone(), labels: labels.clone() },
                    (files, None) => ImageFiles::Cifar10 { files: files.to_vec() },
                    ([_, second, ..], Some(_)) => {
                        let second = Path::new(second).display();
                        return Err(Error::bad(format!("{second}: with labels there is one file of images")));
                    }
                    ([], Some(_)) => return Err(Error::bad("images: no file is named")),
                };
                let options = ImageOptions { batch, seed, valid_fraction, ..ImageOptions::new(files) };
                let split = ImageSource::open(&options)?;
                let valid = split.valid.map(|v| Box::new(v) as Box<dyn Source>);
                Ok(Sources { train: Box::new(split.train), valid })
            }
            Data::Random { context, image } => {
                let source = random(network, *context, *image, batch, seed)?;
                Ok(Sources { train: Box::new(source), valid: None })
            }
        }
    }
}

/// A string that identifies files: their lengths, and a checksum of each one's first [`LOOKED_AT`] bytes.
fn of_files<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Result<String> {
    let (mut bytes, mut sum) = (0, CrcWriter::new(io::sink()));
    for path in paths {
        let refused = |e| Error::io("read", path, e);
        let file = File::open(path).map_err(refused)?;
        bytes += file.metadata().map_err(refused)?.len();
        io::copy(&mut file.take(LOOKED_AT), &mut sum).map_err(refused)?;
    }
    Ok(format!("{bytes} bytes with CRC-32 {:08x}", sum.crc().sum()))
}

/// Random inputs with the network's own sizes, or with `context` tokens, or of size `image`.
fn random(
    network: &dyn Network,
    context: Option<usize>,
    image: Option<[usize; 3]>,
    batch: usize,
    seed: u64,
) -> Result<RandomSource> {
    let labels = network.labels();
    let mut tensors: Vec<(String, DType, Shape)> = Vec::new();
    for input in network.inputs() {
        let axes = match (input.name.as_str(), context, image) {
            (names::PIXEL_VALUES, _, Some(image)) => image.to_vec(),
            // Incompatible combinations have been refused before.
            (names::PIXEL_VALUES, _, None) => input.axes,
            (_, Some(context), _) => vec![context],
            _ => input.axes,
        };
        tensors.push((input.name, input.dtype, Shape::new(axes)));
    }
    let label = match tensors.first() {
        // If the classes are the tokens, each token has a label.
        Some((_, _, shape)) if labels.vocab == Some(labels.classes) => shape.clone(),
        _ => Shape::default(),
    };
    tensors.push((names::LABELS.into(), DType::I32, label));
    let vocab = labels.vocab.unwrap_or(1);
    RandomSource::new(&RandomOptions { tensors, vocab, classes: labels.classes, batch, seed })
}
