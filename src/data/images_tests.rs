//! Images are the files' bytes, scaled; each is seen once an epoch; files of another kind are refused.

use super::*;
use crate::data::check_ids;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use tempfile::TempDir;

const HEIGHT: usize = 3;
const WIDTH: usize = 5;

fn idx(magic: u32, axes: &[u32], values: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(axes.iter().flat_map(|axis| axis.to_be_bytes()));
    bytes.extend_from_slice(values);
    bytes
}

/// Image n is filled with the bytes n, n + 1, ..; its label is n mod 7.
fn pixels(n: usize) -> Vec<u8> {
    (0..HEIGHT * WIDTH).flat_map(|at| [(n + at) as u8]).collect()
}

fn idx_pair(count: usize) -> (Vec<u8>, Vec<u8>) {
    let all: Vec<u8> = (0..count).flat_map(pixels).collect();
    let labels: Vec<u8> = (0..count).map(|n| (n % 7) as u8).collect();
    (idx(0x803, &[count as u32, HEIGHT as u32, WIDTH as u32], &all), idx(0x801, &[count as u32], &labels))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

fn write(files: &[Vec<u8>]) -> (TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..files.len()).map(|n| folder.path().join(format!("file{n}"))).collect();
    paths.iter().zip(files).for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
    (folder, paths)
}

fn open_idx(images: &[u8], labels: &[u8], change: impl Fn(&mut ImageOptions)) -> Result<Split<ImageSource>> {
    let (_folder, paths) = write(&[images.to_vec(), labels.to_vec()]);
    let mut options = ImageOptions::new(ImageFiles::Idx { images: paths[0].clone(), labels: paths[1].clone() });
    change(&mut options);
    ImageSource::open(&options)
}

fn open_cifar(files: &[Vec<u8>], change: impl Fn(&mut ImageOptions)) -> Result<Split<ImageSource>> {
    let (_folder, paths) = write(files);
    let mut options = ImageOptions::new(ImageFiles::Cifar10 { files: paths });
    change(&mut options);
    ImageSource::open(&options)
}

/// The samples of an epoch: pixels and label.
fn samples(source: &mut ImageSource, epoch: u64) -> Vec<(Vec<f32>, i32)> {
    let (mut batch, mut samples) = (Batch::default(), Vec::new());
    let per_epoch = source.batches_per_epoch();
    for index in epoch * per_epoch..(epoch + 1) * per_epoch {
        source.fill(index, &mut batch).unwrap();
        check_ids(&batch).unwrap();
        let labels = batch.get(names::LABELS).unwrap();
        assert!(labels.as_i32().iter().all(|&label| source.spec().classes.is_none_or(|n| label < n as i32)));
        let pixels = batch.get(names::PIXEL_VALUES).unwrap();
        let each = pixels.shape.elems() / pixels.shape.axes()[0];
        samples.extend(pixels.as_f32().chunks_exact(each).map(<[f32]>::to_vec).zip(labels.as_i32().iter().copied()));
    }
    samples
}

fn scaled(bytes: &[u8], mean: f32, std: f32) -> Vec<f32> {
    bytes.iter().map(|&byte| (f32::from(byte) / 255.0 - mean) / std).collect()
}

#[test]
fn idx_images_are_seen_once_an_epoch() {
    for (count, batch, fraction) in [(1, 1, 0.0), (31, 1, 0.0), (33, 4, 0.1), (103, 33, 0.5)] {
        let (images, labels) = idx_pair(count);
        let opened = |images: &[u8], labels: &[u8]| {
            open_idx(images, labels, |o| (o.batch, o.valid_fraction, o.seed) = (batch, fraction, 3)).unwrap()
        };
        let Split { mut train, valid } = opened(&images, &labels);
        let held_out = valid.as_ref().map_or(0, |valid| valid.spec().samples.unwrap() as usize);
        let trained = count - held_out;
        assert_eq!(train.spec().samples, Some(trained as u64));
        assert_eq!(train.spec().tensors[0].2, Shape::from([1, HEIGHT, WIDTH]));
        assert_eq!(train.spec().classes, Some(count.min(7)));
        let mut seen = BTreeSet::new();
        let epoch = samples(&mut train, 2);
        for (values, label) in &epoch {
            let n =
                (0..trained).find(|&n| *values == scaled(&pixels(n), 0.5, 0.5)).expect("an image of the training part");
            assert_eq!(*label, (n % 7) as i32);
            seen.insert(n);
        }
        assert_eq!(seen.len(), trained / batch * batch);
        if trained > 1 {
            assert_ne!(epoch, samples(&mut train, 3));
        }
        if let Some(mut valid) = valid {
            let rows = samples(&mut valid, 0);
            assert_eq!(rows.len(), held_out.div_ceil(batch) * batch);
            for (row, (values, label)) in rows.iter().enumerate() {
                let n = trained + row;
                if row < held_out {
                    assert_eq!((values, *label), (&scaled(&pixels(n), 0.5, 0.5), (n % 7) as i32));
                } else {
                    assert_eq!((values, *label), (&vec![0.0; HEIGHT * WIDTH], IGNORED));
                }
            }
        }
        let mut packed = opened(&gzip(&images), &gzip(&labels)).train;
        assert_eq!(samples(&mut packed, 2), epoch);
    }
}

#[test]
fn pixels_are_scaled_as_asked() {
    let (images, labels) = idx_pair(1);
    let mut plain = open_idx(&images, &labels, |o| (o.mean, o.std) = (0.0, 1.0)).unwrap().train;
    assert_eq!(samples(&mut plain, 0)[0].0, scaled(&pixels(0), 0.0, 1.0));
    let mut usual = open_idx(&images, &labels, |o| (o.mean, o.std) = (0.1307, 0.3081)).unwrap().train;
    assert_eq!(samples(&mut usual, 0)[0].0, scaled(&pixels(0), 0.1307, 0.3081));
    let ends = idx(0x803, &[1, 1, 2], &[0, 255]);
    let mut ends = open_idx(&ends, &labels, |_| {}).unwrap().train;
    assert_eq!(samples(&mut ends, 0)[0].0, [-1.0, 1.0]);
    for (mean, std) in [(0.5, 0.0), (0.5, -1.0), (f32::NAN, 1.0), (0.0, f32::INFINITY)] {
        assert!(open_idx(&images, &labels, |o| (o.mean, o.std) = (mean, std)).is_err());
    }
}

#[test]
fn cifar_records_are_planes() {
    let record = |n: usize| {
        let mut record = vec![(n % 10) as u8];
        record.extend((0..3072).map(|at| (at / 1024 * 50 + at % 32 + n) as u8));
        record
    };
    let file = |range: std::ops::Range<usize>| range.flat_map(record).collect::<Vec<u8>>();
    let files = [file(0..5), gzip(&file(5..9)), file(9..9), file(9..12)];
    let Split { mut train, valid } = open_cifar(&files, |o| (o.batch, o.valid_fraction) = (1, 0.25)).unwrap();
    assert_eq!((train.spec().samples, train.spec().classes), (Some(9), Some(10)));
    assert_eq!(train.spec().tensors[0].2, Shape::from([3, 32, 32]));
    let rows = samples(&mut valid.unwrap(), 0);
    for (row, (values, label)) in rows.iter().enumerate() {
        assert_eq!((values, *label), (&scaled(&record(9 + row)[1..], 0.5, 0.5), ((9 + row) % 10) as i32));
    }
    let labels: BTreeSet<_> = samples(&mut train, 0).into_iter().map(|(_, label)| label).collect();
    assert_eq!(labels.len(), 9);

    let refused = |files: &[Vec<u8>], part: &str| {
        let e = open_cifar(files, |_| {}).err().expect("refused");
        assert!(matches!(&e, Error::BadInput(text) if text.contains(part)), "'{part}' is not in: {e}");
    };
    refused(&[file(0..2), file(0..2)[..3074].to_vec()], "file1: record 1 has 1 bytes");
    refused(&[vec![10; 3073]], "file0: record 0: label 10 is not in 0..10");
    refused(&[idx_pair(3).0], "file0: is an IDX file of images; labels, ");
    refused(&[idx(0x803, &[4, 28, 28], &[81; 4 * 28 * 28])], "file0: is an IDX file of images; labels, ");
    refused(&[], "no file");
    refused(&[vec![]], "there are 0 images");
    refused(&[gzip(&file(0..1))[..30].to_vec()], "damaged gzip");
}

#[test]
fn other_files_are_refused() {
    let (images, labels) = idx_pair(3);
    let refused = |images: &[u8], labels: &[u8], parts: &[&str]| {
        let e = open_idx(images, labels, |o| o.batch = 2).err().expect("refused");
        let Error::BadInput(message) = &e else { panic!("{e}") };
        for part in parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    };
    refused(&labels, &images, &["file0", "begins with 0x00000801", "images with 0x00000803"]);
    refused(&images, &images, &["file1", "begins with 0x00000803"]);
    refused(b"", &labels, &["file0", "0 bytes are too few"]);
    refused(&images[..15], &labels, &["file0", "15 bytes are too few"]);
    refused(&images[..images.len() - 1], &labels, &["file0", "3x3x5"]);
    refused(&gzip(&images[..images.len() - 1]), &labels, &["file0", "45 bytes, but ends after 44"]);
    refused(&[&images[..], b"x"].concat(), &labels, &["file0", "bytes follow"]);
    refused(&images, &[&labels[..], b"x"].concat(), &["file1", "bytes follow"]);
    refused(&images, &idx_pair(4).1, &["holds 3 images", "holds 4 labels"]);
    refused(&idx_pair(1).0, &idx_pair(1).1, &["there are 1 images; batch 2 needs at least 2"]);
    refused(&gzip(&images)[..40], &labels, &["file0", "damaged gzip"]);
    for axes in [[u32::MAX; 3], [1 << 20, 1 << 20, 1], [3, 3, 1 << 16]] {
        refused(&idx(0x803, &axes, &[0; 45]), &labels, &["file0"]);
        refused(&gzip(&idx(0x803, &axes, &[0; 45])), &labels, &["file0"]);
    }
    refused(&idx(0x803, &[3, 0, 5], &[]), &labels, &["axis of 0"]);
    refused(&idx(0x803, &[0, 3, 5], &[]), &idx(0x801, &[0], &[]), &["there are 0 images"]);
}
