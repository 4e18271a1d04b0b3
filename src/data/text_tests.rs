//! Windows cover the text once, and held-out text is never trained on.

use super::*;
use crate::data::{Tokenizer, check_ids};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

fn options(context: usize, batch: usize, valid_fraction: f64) -> TextOptions {
    TextOptions { context, batch, seed: 5, valid_fraction }
}

fn read(paths: &[PathBuf]) -> Arc<Text> {
    Text::read(paths, &Tokenizer::Bytes).unwrap()
}

/// A text in which every pair of bytes tells its place, up to 65536 bytes: a window can be found again.
fn text(len: usize) -> Vec<u8> {
    (0..len).map(|at| if at % 2 == 0 { (at / 2) as u8 } else { (at / 512) as u8 }).collect()
}

/// Opens a text of `len` bytes.
fn opened(len: usize, context: usize, batch: usize, fraction: f64) -> Result<Split<TextSource>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    fs::write(&path, text(len)).unwrap();
    TextSource::open(&read(&[path]), &options(context, batch, fraction))
}

/// The rows of one epoch: ids and labels, in order.
fn rows(source: &mut TextSource, epoch: u64) -> Vec<(Vec<i32>, Vec<i32>)> {
    let (mut batch, mut rows) = (Batch::default(), Vec::new());
    let per_epoch = source.batches_per_epoch();
    for index in epoch * per_epoch..(epoch + 1) * per_epoch {
        source.fill(index, &mut batch).unwrap();
        check_ids(&batch).unwrap();
        let of = |name| batch.get(name).unwrap().as_i32().chunks_exact(source.context).map(<[i32]>::to_vec);
        rows.extend(of(names::INPUT_IDS).zip(of(names::LABELS)));
    }
    rows
}

/// Checks every size that matters for a text of `len` bytes.
fn check(len: usize, context: usize, batch: usize, fraction: f64) {
    let what = format!("{len} bytes, context {context}, batch {batch}, fraction {fraction}");
    let Split { mut train, valid } = opened(len, context, batch, fraction).unwrap();
    let bytes: Vec<i32> = text(len).into_iter().map(i32::from).collect();
    let windows = train.spec().samples.unwrap() as usize;
    assert_eq!(train.batches_per_epoch(), (windows / batch) as u64, "{what}");
    let mut seen = BTreeSet::new();
    for (ids, labels) in rows(&mut train, 1) {
        assert_eq!(ids[1..], labels[..context - 1], "{what}");
        let at = (0..windows).find(|w| {
            !seen.contains(w)
                && bytes[w * context..][..context] == ids
                && bytes[w * context + context] == labels[context - 1]
        });
        seen.insert(at.expect("a window of the text"));
    }
    assert_eq!(seen.len(), windows / batch * batch, "{what}");
    let Some(mut valid) = valid else {
        assert_eq!((fraction, windows), (0.0, (len - 1) / context), "{what}");
        return;
    };
    let held_out = valid.spec().samples.unwrap() as usize;
    assert_eq!(windows + held_out, (len - 2) / context, "{what}");
    let valid_rows = rows(&mut valid, 0);
    assert_eq!(valid_rows.len(), held_out.div_ceil(batch) * batch, "{what}");
    // The token before the first held-out one is the last label of training.
    let first = windows * context + 1;
    for (w, (ids, labels)) in valid_rows.iter().enumerate() {
        if w < held_out {
            assert_eq!(*ids, bytes[first + w * context..][..context], "{what}");
            assert_eq!(*labels, bytes[first + w * context + 1..][..context], "{what}");
        } else {
            assert!(ids.iter().all(|&id| id == 0) && labels.iter().all(|&label| label == IGNORED), "{what}");
        }
    }
    assert_eq!(valid_rows, rows(&mut valid, 3), "{what}");
}

#[test]
fn windows_cover_the_text() {
    for context in [1, 2, 31, 33] {
        for len in [context + 1, 3 * context, 3 * context + 1, 3 * context + 2, 1023, 1024, 1025] {
            check(len, context, 1, 0.0);
        }
    }
    for (len, context, batch, fraction) in [
        (1023, 31, 3, 0.1),
        (1025, 31, 4, 0.5),
        (1024, 33, 5, 0.01),
        (9, 1, 1, 0.9),
        (2049, 1, 33, 0.3),
        (126, 31, 3, 0.2),
    ] {
        check(len, context, batch, fraction);
    }
}

#[test]
fn the_bytes_that_are_needed_suffice_and_one_less_does_not() {
    for (context, batch, fraction) in [(1, 1, 0.0), (31, 3, 0.0), (33, 1, 0.1), (128, 16, 0.1), (7, 5, 0.9)] {
        let message = opened(0, context, batch, fraction).err().expect("too short").to_string();
        let needed: usize =
            message.rsplit(' ').next().unwrap().parse().expect("the message ends with the bytes needed");
        assert!(message.contains("has 0 bytes"), "{message}");
        assert!(opened(needed, context, batch, fraction).is_ok(), "{message}");
        let less = opened(needed - 1, context, batch, fraction).err().expect("too short").to_string();
        assert!(less.contains(&format!("needs at least {needed}")), "{less}");
    }
}

#[test]
fn a_window_of_its_own_validation_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("valid");
    fs::write(&path, text(32 * 5)).unwrap();
    let options = options(32, 3, 0.0);
    let mut source = TextSource::open_valid(&read(std::slice::from_ref(&path)), &options).unwrap();
    assert_eq!((source.spec().samples, source.batches_per_epoch()), (Some(4), 2));
    assert_eq!(rows(&mut source, 0).iter().filter(|(_, labels)| labels[0] != IGNORED).count(), 4);
    fs::write(&path, text(32)).unwrap();
    let short = TextSource::open_valid(&read(&[path]), &options).err().expect("too short").to_string();
    assert!(short.ends_with("valid: the text has 32 bytes; batch 3 of context 32 needs at least 33"), "{short}");
}

#[test]
fn files_are_one_stream() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::write(root.join("b.md"), "def").unwrap();
    fs::write(root.join("a.txt"), "abc").unwrap();
    fs::write(root.join("z.bin"), [255, 0]).unwrap();
    let text = read(&[root.into(), root.join("z.bin")]);
    let mut source = TextSource::open(&text, &options(7, 1, 0.0)).unwrap().train;
    let want: Vec<i32> = b"abcdef".iter().map(|&b| i32::from(b)).chain([255]).collect();
    let rows = rows(&mut source, 0);
    assert_eq!(rows.len(), 1);
    assert_eq!((&rows[0].0, rows[0].1[6]), (&want, 0));
    assert_eq!((source.spec().vocab, source.spec().classes), (Some(256), Some(256)));
}

#[test]
fn sources_share_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    fs::write(&path, text(5000)).unwrap();
    let shared = read(std::slice::from_ref(&path));
    let Split { train: mut a, valid } = TextSource::open(&shared, &options(31, 3, 0.1)).unwrap();
    let Split { train: mut b, .. } = TextSource::open(&shared, &options(64, 2, 0.0)).unwrap();
    assert_eq!(Arc::strong_count(&shared), 4);
    let alone = |options| TextSource::open(&read(std::slice::from_ref(&path)), &options).unwrap();
    assert_eq!(rows(&mut a, 1), rows(&mut alone(options(31, 3, 0.1)).train, 1));
    assert_eq!(rows(&mut b, 1), rows(&mut alone(options(64, 2, 0.0)).train, 1));
    drop((a, b, valid));
    assert_eq!(Arc::strong_count(&shared), 1);
}

#[test]
fn epochs_differ_seeds_differ_and_equal_seeds_do_not() {
    let opened = || opened(40_000, 31, 7, 0.1).unwrap().train;
    let (mut a, mut b) = (opened(), opened());
    let (first, second) = (rows(&mut a, 0), rows(&mut a, 1));
    assert_ne!(first, second);
    assert_eq!((rows(&mut b, 1), rows(&mut b, 0)), (second, first));
}

#[test]
fn bad_options_are_refused() {
    assert!(opened(100, 0, 1, 0.0).err().unwrap().to_string().contains("context"));
    assert!(opened(100, 1, 0, 0.0).err().unwrap().to_string().contains("batch is 0"));
    assert!(opened(100, 1, 1, 1.0).err().unwrap().to_string().contains("fraction"));
    assert!(opened(100, 1, 1, f64::NAN).err().unwrap().to_string().contains("fraction"));
    assert!(opened(100, usize::MAX, 1, 0.5).is_err());
    assert!(opened(100, 1 << 40, 1 << 40, 0.5).is_err());
    assert!(opened(100, 1 << 40, 1, 0.999).err().unwrap().to_string().contains("needs at least"));
    assert!(TextSource::open(&read(&[]), &options(1, 1, 0.0)).err().unwrap().to_string().contains("no file"));
}
