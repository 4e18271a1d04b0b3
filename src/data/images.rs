//! Labelled images: MNIST's IDX files (LeCun, Cortes & Burges) and CIFAR-10's binary files (Krizhevsky 2009), gzipped
//! or not.
//!
//! Pixels stay in memory as bytes and become f32 when a minibatch is filled: `(x / 255 - mean) / std`, in f32 and in
//! that order, as torchvision does it.

use super::files::Unpacked;
use super::order::{Order, Split, check_fraction, held_out, smallest_total};
use super::{Batch, IGNORED, InputSpec, Source, names};
use crate::base::{DType, Error, Result, Shape};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// First four bytes of an IDX file: two zeros, 8 for unsigned bytes, the number of axes.
const IDX_IMAGES: u32 = 0x0803;
const IDX_LABELS: u32 = 0x0801;
/// Axes of a CIFAR-10 image: a record is one label and then the red, green and blue planes, row by row.
const CIFAR_AXES: [usize; 3] = [3, 32, 32];
const CIFAR_RECORD_BYTES: usize = 1 + 3 * 32 * 32;
const CIFAR_CLASSES: usize = 10;

/// Which files hold the images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageFiles {
    /// Images (N, H, W) and labels (N) in the IDX format of MNIST; one channel.
    Idx {
        /// The images' file, with magic number 0x803.
        images: PathBuf,
        /// The labels' file, with magic number 0x801.
        labels: PathBuf,
    },
    /// Files of consecutive 3073-byte records; three channels.
    Cifar10 {
        /// The files, read in this order.
        files: Vec<PathBuf>,
    },
}

impl ImageFiles {
    /// What messages call the images as a whole.
    fn name(&self) -> String {
        let first = match self {
            ImageFiles::Idx { images, .. } => Some(images),
            ImageFiles::Cifar10 { files } => files.first(),
        };
        first.map_or_else(|| "CIFAR-10 with no file".to_string(), |path| path.display().to_string())
    }
}

/// Which images, and how they are split and scaled.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageOptions {
    /// Where the images are.
    pub files: ImageFiles,
    /// Samples in a minibatch (B).
    pub batch: usize,
    /// Fixes the order of the images.
    pub seed: u64,
    /// Subtracted from every pixel once it is in `[0, 1]`.
    pub mean: f32,
    /// Divides the difference.
    pub std: f32,
    /// The fraction of the images to hold out, in `[0, 1)`: the last ones, their number rounded, at least one unless
    /// the fraction is 0.
    pub valid_fraction: f64,
}

impl ImageOptions {
    /// Options with one sample a minibatch, seed 0, nothing held out, and pixels scaled to `[-1, 1]`: mean and standard
    /// deviation are 0.5.
    pub fn new(files: ImageFiles) -> ImageOptions {
        ImageOptions { files, batch: 1, seed: 0, mean: 0.5, std: 0.5, valid_fraction: 0.0 }
    }
}

/// All images of the files.
struct Images {
    /// (C, H, W) of each image.
    axes: [usize; 3],
    pixels: Vec<u8>,
    /// One for each image.
    labels: Vec<u8>,
}

/// Makes `pixel_values` (B, C, H, W) and `labels` (B).
pub struct ImageSource {
    images: Arc<Images>,
    /// The image that is sample 0.
    first: usize,
    /// The scaled value of each byte.
    scaled: Box<[f32; 256]>,
    order: Order,
    spec: InputSpec,
}

impl ImageSource {
    /// Reads all images, and holds out the last ones where a fraction is asked for. Held-out images come in order, the
    /// last minibatch padded with rows whose label is [`IGNORED`].
    ///
    /// # Errors
    /// When a file is missing, damaged or of another format, images and labels differ in number, an option is out of
    /// range, or there are fewer images than a minibatch needs.
    pub fn open(options: &ImageOptions) -> Result<Split<ImageSource>> {
        check_fraction(options.valid_fraction)?;
        if !(options.std.is_finite() && options.std > 0.0 && options.mean.is_finite()) {
            return Err(Error::bad(format!(
                "pixels cannot be scaled with mean {} and standard deviation {}",
                options.mean, options.std
            )));
        }
        let name = options.files.name();
        let (images, classes) = match &options.files {
            ImageFiles::Idx { images, labels } => {
                let images = read_idx(images, labels)?;
                let classes = images.labels.iter().max().map(|&label| usize::from(label) + 1);
                (images, classes)
            }
            ImageFiles::Cifar10 { files } => (read_cifar10(files)?, Some(CIFAR_CLASSES)),
        };
        let tensors = vec![
            (names::PIXEL_VALUES.to_string(), DType::F32, Shape::from(images.axes)),
            (names::LABELS.to_string(), DType::I32, Shape::default()),
        ];
        let spec = InputSpec::new(tensors, options.batch).map_err(|e| Error::bad(format!("{name}: {e}")))?;
        let total = images.labels.len();
        let valid = held_out(total, options.valid_fraction).min(total);
        let train = total - valid;
        if train < options.batch {
            let needed = smallest_total(options.batch, options.valid_fraction);
            let beside = if options.valid_fraction > 0.0 { " beside the held-out part" } else { "" };
            return Err(Error::bad(format!(
                "{name}: there are {total} images; batch {}{beside} needs at least {needed}",
                options.batch
            )));
        }
        let images = Arc::new(images);
        let source = |first: usize, order: Order| ImageSource {
            images: Arc::clone(&images),
            first,
            scaled: Box::new(std::array::from_fn(|byte| (byte as f32 / 255.0 - options.mean) / options.std)),
            spec: InputSpec { samples: Some(order.samples() as u64), classes, ..spec.clone() },
            order,
        };
        let held_out = (valid > 0).then(|| source(train, Order::in_order(valid, options.batch)));
        Ok(Split { train: source(0, Order::shuffled(train, options.batch, options.seed)), valid: held_out })
    }
}

fn read_idx(images: &Path, labels: &Path) -> Result<Images> {
    let (image_axes, pixels) = read_idx_file::<3>(images, IDX_IMAGES, "images")?;
    let (label_axes, labels_read) = read_idx_file::<1>(labels, IDX_LABELS, "labels")?;
    if image_axes[0] != label_axes[0] {
        return Err(Error::bad(format!(
            "{} holds {} images, {} holds {} labels",
            images.display(),
            image_axes[0],
            labels.display(),
            label_axes[0]
        )));
    }
    Ok(Images { axes: [1, image_axes[1], image_axes[2]], pixels, labels: labels_read })
}

/// Reads one IDX file of unsigned bytes with `AXES` axes.
fn read_idx_file<const AXES: usize>(path: &Path, magic: u32, what: &str) -> Result<([usize; AXES], Vec<u8>)> {
    let bad = |text: String| Error::bad(format!("{}: {text}", path.display()));
    let mut file = Unpacked::open(path)?;
    let header_bytes = 4 * (AXES as u64 + 1);
    let header = file.take(header_bytes)?;
    let words: Vec<u32> = header.as_chunks::<4>().0.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect();
    if let Some(&found) = words.first().filter(|&&found| found != magic) {
        return Err(bad(format!("begins with {found:#010x}, an IDX file of {what} with {magic:#010x}")));
    }
    if words.len() != AXES + 1 {
        return Err(bad(format!("{} bytes are too few for an IDX file of {what}", header.len())));
    }
    let axes: [usize; AXES] = std::array::from_fn(|axis| words[axis + 1] as usize);
    let shape = Shape::from(axes);
    let elems = shape.checked_elems().map_err(|e| bad(e.to_string()))? as u64;
    if elems > file.most_bytes {
        return Err(bad(format!("states {what} of shape {shape}, more than a file of its length can hold")));
    }
    let values = file.take(elems + 1)?;
    match values.len() as u64 {
        n if n < elems => Err(bad(format!("states {what} of shape {shape}, {elems} bytes, but ends after {n}"))),
        n if n > elems => Err(bad(format!("bytes follow the {what} of shape {shape}"))),
        _ => Ok((axes, values)),
    }
}

fn read_cifar10(files: &[PathBuf]) -> Result<Images> {
    let mut images = Images { axes: CIFAR_AXES, pixels: Vec::new(), labels: Vec::new() };
    for path in files {
        // A valid record may by chance begin like an IDX file; in a file that is also invalid otherwise this is hardly
        // chance.
        let mut is_idx = false;
        let bad = |is_idx: bool, text: String| match is_idx {
            true => Error::bad(format!(
                "{}: is an IDX file of images; labels, the file of its labels, is missing",
                path.display()
            )),
            false => Error::bad(format!("{}: {text}", path.display())),
        };
        let mut file = Unpacked::open(path)?;
        for record in 0usize.. {
            let bytes = file.take(CIFAR_RECORD_BYTES as u64)?;
            is_idx |= record == 0 && bytes.starts_with(&IDX_IMAGES.to_be_bytes());
            let Some((&label, pixels)) = bytes.split_first() else { break };
            if bytes.len() != CIFAR_RECORD_BYTES {
                let found = bytes.len();
                let text = format!("record {record} has {found} bytes, a CIFAR-10 record has {CIFAR_RECORD_BYTES}");
                return Err(bad(is_idx, text));
            }
            if usize::from(label) >= CIFAR_CLASSES {
                return Err(bad(is_idx, format!("record {record}: label {label} is not in 0..{CIFAR_CLASSES}")));
            }
            images.labels.push(label);
            images.pixels.extend_from_slice(pixels);
        }
    }
    Ok(images)
}

impl Source for ImageSource {
    fn spec(&self) -> &InputSpec {
        &self.spec
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        batch.conform(&self.spec);
        let [pixel_values, labels] = batch.tensors.as_mut_slice() else {
            unreachable!("the minibatch has just been made that of a specification with two tensors")
        };
        let pixels_each = self.images.axes.iter().product::<usize>();
        let rows = pixel_values.as_f32_mut().chunks_exact_mut(pixels_each);
        for ((row, label), sample) in rows.zip(labels.as_i32_mut()).zip(self.order.rows(index)) {
            let Some(sample) = sample else {
                row.fill(0.0);
                *label = IGNORED;
                continue;
            };
            let image = self.first + sample;
            *label = i32::from(self.images.labels[image]);
            let bytes = &self.images.pixels[image * pixels_each..(image + 1) * pixels_each];
            for (value, &byte) in row.iter_mut().zip(bytes) {
                *value = self.scaled[usize::from(byte)];
            }
        }
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        self.order.batches_per_epoch()
    }
}

#[cfg(test)]
#[path = "images_tests.rs"]
mod tests;
