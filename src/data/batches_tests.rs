//! Ready-made minibatches come back value for value; files that contradict themselves are refused at opening, values
//! that no minibatch may hold when they are read.

use super::*;
use crate::data::check_ids;
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::fs;
use tempfile::TempDir;

/// A tensor to be written: name, type, shape, little-endian bytes.
type Given = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn i64s(name: &'static str, shape: &[usize], values: impl IntoIterator<Item = i64>) -> Given {
    (name, Dtype::I64, shape.to_vec(), values.into_iter().flat_map(i64::to_le_bytes).collect())
}

fn i32s(name: &'static str, shape: &[usize], values: impl IntoIterator<Item = i32>) -> Given {
    (name, Dtype::I32, shape.to_vec(), values.into_iter().flat_map(i32::to_le_bytes).collect())
}

fn f32s(name: &'static str, shape: &[usize], values: impl IntoIterator<Item = f32>) -> Given {
    (name, Dtype::F32, shape.to_vec(), values.into_iter().flat_map(f32::to_le_bytes).collect())
}

fn bytes_of(tensors: &[Given]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).expect("bytes of that shape"))
    });
    serialize(views, None).unwrap()
}

/// Opens these bytes as a file; the folder lives as long as the source needs it.
fn open_bytes(bytes: &[u8], change: impl Fn(&mut BatchesOptions)) -> (TempDir, Result<BatchesSource>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("b.safetensors");
    fs::write(&path, bytes).unwrap();
    let mut options = BatchesOptions { path, batch: None, shift_labels: false };
    change(&mut options);
    let source = BatchesSource::open(&options);
    (folder, source)
}

fn open(tensors: &[Given]) -> (TempDir, Result<BatchesSource>) {
    open_bytes(&bytes_of(tensors), |_| {})
}

fn fill(source: &mut BatchesSource, index: u64) -> Result<Batch> {
    let mut batch = Batch::default();
    source.fill(index, &mut batch).map(|()| batch)
}

/// Checks that opening is refused as bad input naming the file and each of `parts`.
#[track_caller]
fn refused(opened: (TempDir, Result<BatchesSource>), parts: &[&str]) {
    let Err(Error::BadInput(message)) = opened.1 else { panic!("it was not refused as bad input") };
    for part in parts.iter().chain(&["b.safetensors: "]) {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

/// Three steps of two samples of five tokens; ids count up, labels are -100 in every third place.
fn tokens() -> Vec<Given> {
    let labels = (0..30).map(|n| if n % 3 == 0 { -100 } else { n });
    vec![
        i64s("input_ids", &[3, 2, 5], 0..30),
        i32s("attention_mask", &[3, 2, 5], (0..30).map(|n| i32::from(n % 5 != 4))),
        i64s("labels", &[3, 2, 5], labels),
    ]
}

#[test]
fn steps_come_in_order_value_for_value() {
    let (_folder, source) = open(&tokens());
    let mut source = source.unwrap();
    let spec = source.spec().clone();
    assert_eq!((spec.batch, spec.samples, spec.batches, source.batches_per_epoch()), (2, Some(6), Some(3), 3));
    let names: Vec<_> = spec.tensors.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, [names::INPUT_IDS, names::ATTENTION_MASK, names::LABELS]);
    for step in [2, 0, 1] {
        let batch = fill(&mut source, step).unwrap();
        check_ids(&batch).unwrap();
        let first = step as i32 * 10;
        let want: Vec<i32> = (first..first + 10).collect();
        assert_eq!(batch.get("input_ids").unwrap().as_i32(), want);
        assert_eq!(batch.get("attention_mask").unwrap().as_i32(), [1, 1, 1, 1, 0, 1, 1, 1, 1, 0]);
        let want: Vec<i32> = want.into_iter().map(|n| if n % 3 == 0 { IGNORED } else { n }).collect();
        assert_eq!(batch.get("labels").unwrap().as_i32(), want);
        assert_eq!(batch.get("labels").unwrap().shape, Shape::from([2, 5]));
    }
    let past = fill(&mut source, 3).unwrap_err().to_string();
    assert!(past.contains("holds 3 minibatches, number 3 is asked for"), "{past}");
    assert!(fill(&mut source, u64::MAX).is_err());
}

#[test]
fn labels_are_shifted_on_request() {
    let (_folder, source) = open_bytes(&bytes_of(&tokens()), |options| options.shift_labels = true);
    let batch = fill(&mut source.unwrap(), 1).unwrap();
    // Step 1 of the file: 10 11 -100 13 14 | -100 16 17 -100 19.
    assert_eq!(batch.get("labels").unwrap().as_i32(), [11, -100, 13, 14, -100, 16, 17, -100, 19, -100]);
    assert_eq!(batch.get("input_ids").unwrap().as_i32()[0], 10);
    let one = [i64s("input_ids", &[1, 2, 1], [1, 2]), i64s("labels", &[1, 2, 1], [1, 2])];
    let (_folder, source) = open_bytes(&bytes_of(&one), |options| options.shift_labels = true);
    assert_eq!(fill(&mut source.unwrap(), 0).unwrap().get("labels").unwrap().as_i32(), [IGNORED, IGNORED]);
}

#[test]
fn images_and_classes_per_sample() {
    let values: Vec<f32> = (0..2 * 3 * 2 * 3 * 5).map(|n| n as f32 * -0.25).collect();
    let (_folder, source) =
        open(&[f32s("pixel_values", &[2, 3, 2, 3, 5], values.clone()), i64s("labels", &[2, 3], 0..6)]);
    let batch = fill(&mut source.unwrap(), 1).unwrap();
    assert_eq!(batch.get("pixel_values").unwrap().as_f32(), &values[90..]);
    assert_eq!(batch.get("pixel_values").unwrap().shape, Shape::from([3, 2, 3, 5]));
    assert_eq!(batch.get("labels").unwrap().as_i32(), [3, 4, 5]);
    assert_eq!(batch.get("labels").unwrap().shape, Shape::from([3]));
    let (_folder, source) = open(&[i32s("input_ids", &[1, 2, 3], 0..6), i32s("labels", &[1, 2], [1, -100])]);
    assert_eq!(fill(&mut source.unwrap(), 0).unwrap().get("labels").unwrap().as_i32(), [1, -100]);
}

#[test]
fn labels_may_be_numbers() {
    let values: Vec<f32> = (0..12).map(|n| n as f32 * -0.25).collect();
    let labels = |shape: &[usize]| f32s("labels", shape, values.clone());
    let pixels = || f32s("pixel_values", &[2, 3, 1, 1, 1], [0.5; 6]);
    let (_folder, source) = open(&[pixels(), labels(&[2, 3, 2])]);
    let batch = fill(&mut source.unwrap(), 1).unwrap();
    assert_eq!(batch.get("labels").unwrap().as_f32(), &values[6..]);
    assert_eq!(batch.get("labels").unwrap().shape, Shape::from([3, 2]));
    assert!(open(&[pixels(), labels(&[2, 3, 1, 2])]).1.is_ok());
    refused(open(&[pixels(), labels(&[2, 2, 3])]), &["'labels'", "2x2x3 of F32", "2x3 and columns"]);
    let ids = || i64s("input_ids", &[2, 3, 2], 0..12);
    refused(
        open_bytes(&bytes_of(&[ids(), labels(&[2, 3, 2])]), |o| o.shift_labels = true),
        &["'labels'", "F32", "shift"],
    );
    let infinite = f32s("labels", &[1, 1, 2], [1.0, f32::INFINITY]);
    let (_folder, source) = open(&[f32s("pixel_values", &[1, 1, 1, 1, 1], [0.5]), infinite]);
    let message = fill(&mut source.unwrap(), 0).unwrap_err().to_string();
    assert!(message.contains("tensor 'labels': step 0, position (0, 1): inf is not a finite number"), "{message}");
}

#[test]
fn headers_are_read_at_any_alignment() {
    for pad in 0..8 {
        let mut bytes = bytes_of(&tokens());
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        bytes.splice(8 + length as usize..8 + length as usize, vec![b' '; pad]);
        bytes[..8].copy_from_slice(&(length + pad as u64).to_le_bytes());
        let (_folder, source) = open_bytes(&bytes, |_| {});
        assert_eq!(fill(&mut source.unwrap(), 2).unwrap().get("input_ids").unwrap().as_i32()[9], 29);
    }
}

#[test]
fn values_that_no_minibatch_may_hold_are_named() {
    for value in [i64::from(i32::MAX) + 1, i64::MIN, 1 << 32] {
        let ids = (0..12).map(|n| if n == 10 { value } else { n });
        let (_folder, source) = open(&[i64s("input_ids", &[2, 2, 3], ids), i64s("labels", &[2, 2], 0..4)]);
        let mut source = source.unwrap();
        fill(&mut source, 0).unwrap();
        let message = fill(&mut source, 1).unwrap_err().to_string();
        let want = format!("tensor 'input_ids': step 1, position (1, 1): {value} does not fit 32 bits");
        assert!(message.contains(&want), "{message}");
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let pixels = (0..8).map(|n| if n == 6 { value } else { 0.5 });
        let (_folder, source) = open(&[f32s("pixel_values", &[1, 2, 1, 2, 2], pixels), i64s("labels", &[1, 2], 0..2)]);
        let message = fill(&mut source.unwrap(), 0).unwrap_err();
        assert!(matches!(message, Error::BadInput(_)));
        let want = format!("tensor 'pixel_values': step 0, position (1, 0, 1, 0): {value} is not a finite number");
        assert!(message.to_string().contains(&want), "{message}");
    }
}

#[test]
fn tensors_that_do_not_go_together_are_refused() {
    let ids = || i64s("input_ids", &[3, 2, 5], 0..30);
    let labels = || i64s("labels", &[3, 2], 0..6);
    let pixels = || f32s("pixel_values", &[3, 2, 1, 1, 1], [0.0; 6]);
    refused(open(&[]), &["no tensor 'labels'"]);
    refused(open(&[ids()]), &["no tensor 'labels'"]);
    refused(open(&[labels()]), &["neither a tensor 'input_ids' nor 'pixel_values'"]);
    refused(open(&[ids(), pixels(), labels()]), &["both"]);
    refused(open(&[ids(), labels(), i64s("token_type_ids", &[0], [])]), &["'token_type_ids'", "attention_mask"]);
    refused(open(&[i64s("input_ids", &[6, 5], 0..30), labels()]), &["'input_ids'", "6x5", "(step, batch, time)"]);
    refused(open(&[f32s("pixel_values", &[3, 2], [0.0; 6]), labels()]), &["'pixel_values'", "height"]);
    refused(open(&[ids(), i64s("labels", &[2, 3], 0..6)]), &["'labels'", "2x3", "3x2", "3x2x5"]);
    refused(open(&[ids(), i64s("labels", &[3, 2, 4], 0..24)]), &["'labels'", "3x2x4"]);
    refused(open(&[ids(), labels(), i64s("attention_mask", &[3, 2], 0..6)]), &["'attention_mask'", "3x2"]);
    refused(open(&[pixels(), labels(), i64s("attention_mask", &[3, 2], 0..6)]), &["'attention_mask'"]);
    refused(open(&[pixels(), i64s("labels", &[3, 2, 1, 1, 1], 0..6)]), &["'labels'"]);
    refused(open(&[f32s("input_ids", &[3, 2, 1], [0.0; 6]), labels()]), &["'input_ids'", "F32", "I64 or I32"]);
    refused(open(&[ids(), f32s("labels", &[3, 2], [0.0; 6])]), &["'labels'", "F32"]);
    refused(open(&[i64s("pixel_values", &[3, 2, 1, 1, 1], 0..6), labels()]), &["'pixel_values'", "I64", "F32"]);
    refused(open(&[i64s("input_ids", &[0, 2, 5], []), i64s("labels", &[0, 2], [])]), &["'input_ids'", "no step"]);
    refused(open(&[i64s("input_ids", &[3, 0, 5], []), i64s("labels", &[3, 0], [])]), &["batch is 0"]);
    refused(open(&[i64s("input_ids", &[3, 2, 0], []), labels()]), &["input_ids", "axis of 0"]);
    refused(open_bytes(&bytes_of(&[ids(), labels()]), |o| o.batch = Some(3)), &["2 samples", "batch is 3"]);
    refused(open_bytes(&bytes_of(&[ids(), labels()]), |o| o.shift_labels = true), &["'labels'", "shift"]);
    assert!(open_bytes(&bytes_of(&[ids(), labels()]), |o| o.batch = Some(2)).1.is_ok());
    let (folder, missing) = open_bytes(b"", |o| o.path = o.path.with_file_name("none"));
    assert!(matches!(missing, Err(Error::BadInput(message)) if message.contains("none: no such file")));
    drop(folder);
}

#[test]
fn damaged_files_are_refused() {
    let good = bytes_of(&tokens());
    for len in [0, 1, 7, 8, 9, 100, good.len() - 1] {
        refused(open_bytes(&good[..len], |_| {}), &[]);
    }
    refused(open_bytes(&[&good[..], b"x"].concat(), |_| {}), &["1 bytes follow"]);
    let mut long = good.clone();
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(open_bytes(&long, |_| {}), &["header"]);
}

/// The file shrinks after it was opened: the system's fault, not the input's, and no stale values.
#[test]
fn a_file_that_shrinks_is_an_error() {
    let good = bytes_of(&tokens());
    let (folder, source) = open_bytes(&good, |_| {});
    let mut source = source.unwrap();
    fs::write(folder.path().join("b.safetensors"), &good[..good.len() - 60]).unwrap();
    assert!((0..3).any(|step| matches!(fill(&mut source, step), Err(Error::Io { .. }))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever bytes are overwritten, every step is read or refused.
    #[test]
    fn overwritten_files_do_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = bytes_of(&tokens());
        for (at, byte) in &changes {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        let (_folder, source) = open_bytes(&bytes, |_| {});
        match source {
            Ok(mut source) => for step in 0..source.batches_per_epoch() {
                if let Err(e) = fill(&mut source, step) {
                    prop_assert!(matches!(e, Error::BadInput(_)), "{}", e);
                }
            },
            Err(e) => prop_assert!(matches!(e, Error::BadInput(_)), "{}", e),
        }
    }
}
