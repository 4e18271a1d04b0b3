//! What is checked and counted in a minibatch before a model sees it.

use super::{Batch, BatchTensor, names};
use crate::base::{DType, Error, Result, Shape};

/// The label of a position that has no part in the loss, as in torch's cross-entropy and in transformers.
pub const IGNORED: i32 = -100;

/// What the model can take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Rows of the token embedding: ids must lie below.
    pub vocab: Option<usize>,
    /// Outputs of the last layer (for a language model its vocabulary): labels that are classes must lie below.
    pub classes: Option<usize>,
}

/// Checks that token ids lie in `0..vocab`, labels in `0..classes` or equal [`IGNORED`], and masks hold 0 and 1; that labels which are
/// numbers are finite. Where a limit is not given, nothing is checked from above.
///
/// # Errors
/// When a value is outside; the message names the tensor, the position and the value.
pub fn check_ids(batch: &Batch, limits: Limits) -> Result<()> {
    for tensor in &batch.tensors {
        match tensor.name.as_str() {
            names::INPUT_IDS => check_range(tensor, limits.vocab, false)?,
            names::ATTENTION_MASK => check_range(tensor, Some(2), false)?,
            names::LABELS if tensor.dtype == DType::F32 => check_finite(tensor)?,
            names::LABELS => check_range(tensor, limits.classes, true)?,
            _ => {}
        }
    }
    Ok(())
}

fn check_range(tensor: &BatchTensor, below: Option<usize>, may_be_ignored: bool) -> Result<()> {
    let end = below.map_or(i64::MAX, |n| i64::try_from(n).unwrap_or(i64::MAX));
    let outside = |&value: &i32| {
        let fits = value >= 0 && i64::from(value) < end;
        !(fits || may_be_ignored && value == IGNORED)
    };
    let values = tensor.as_i32();
    let Some(at) = values.iter().position(outside) else { return Ok(()) };
    let upper = below.map_or_else(String::new, |n| n.to_string());
    let or_ignored = if may_be_ignored { ", nor -100" } else { "" };
    Err(Error::bad(format!(
        "{}: value {} at {} is not in 0..{upper}{or_ignored}",
        tensor.name,
        values[at],
        position(&tensor.shape, at)
    )))
}

fn check_finite(tensor: &BatchTensor) -> Result<()> {
    let Some((at, fault)) = not_finite(tensor) else { return Ok(()) };
    Err(Error::bad(format!("{}: value at {}: {fault}", tensor.name, position(&tensor.shape, at))))
}

/// Finds the first element of an `F32` tensor that is infinite or no number.
pub(super) fn not_finite(tensor: &BatchTensor) -> Option<(usize, String)> {
    let at = tensor.as_f32().iter().position(|value| !value.is_finite())?;
    Some((at, format!("{} is not a finite number", tensor.as_f32()[at])))
}

/// Element number `flat` of a row-major tensor, by its coordinates: `(2, 5)`.
pub(super) fn position(shape: &Shape, mut flat: usize) -> String {
    let mut coordinates: Vec<String> = Vec::with_capacity(shape.axes().len());
    for &axis in shape.axes().iter().rev() {
        coordinates.push((flat % axis.max(1)).to_string());
        flat /= axis.max(1);
    }
    coordinates.reverse();
    format!("({})", coordinates.join(", "))
}

/// Counts the labels that have a part in the loss, for each of `microbatches` equal parts of the minibatch in order: classes that are not
/// [`IGNORED`]; of numbers (B, .., C), the targets of a regression, all rows. Their sum is what the minibatch's loss is divided by, known
/// before any forward.
///
/// # Errors
/// When the minibatch has no labels, they are numbers without an axis of columns, or `microbatches` does not divide its samples.
pub fn labelled(batch: &Batch, microbatches: usize) -> Result<Vec<u64>> {
    let Some(labels) = batch.get(names::LABELS) else {
        return Err(Error::bad("the minibatch has no labels to count"));
    };
    let samples = labels.shape.axes().first().copied().unwrap_or(1);
    if microbatches == 0 || samples == 0 || !samples.is_multiple_of(microbatches) {
        return Err(Error::bad(format!("{samples} samples do not divide into {microbatches} microbatches")));
    }
    if labels.dtype == DType::F32 {
        if labels.shape.axes().len() < 2 {
            return Err(Error::bad(format!("labels: are f32 of shape {}, want (B, .., C)", labels.shape)));
        }
        return Ok(vec![(labels.shape.rows() / microbatches) as u64; microbatches]);
    }
    let values = labels.as_i32();
    let count = |part: &[i32]| part.iter().filter(|&&label| label != IGNORED).count() as u64;
    Ok(values.chunks_exact(values.len() / microbatches).map(count).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(shape: Shape, values: &[f32]) -> Batch {
        let mut tensor = BatchTensor::zeros(names::LABELS, DType::F32, shape);
        tensor.as_f32_mut().copy_from_slice(values);
        Batch { tensors: vec![tensor] }
    }

    fn batch(name: &str, shape: Shape, values: &[i32]) -> Batch {
        let mut tensor = BatchTensor::zeros(name, DType::I32, shape);
        tensor.as_i32_mut().copy_from_slice(values);
        Batch { tensors: vec![tensor] }
    }

    /// Checks one tensor under vocab 5 and classes 3; an empty `want` means that it passes.
    #[track_caller]
    fn check(name: &str, values: &[i32], want: &str) {
        let batch = batch(name, Shape::from([values.len() / 3, 3]), values);
        let limits = Limits { vocab: Some(5), classes: Some(3) };
        match check_ids(&batch, limits) {
            Ok(()) => assert_eq!(want, ""),
            Err(e) => assert_eq!(e.to_string(), want),
        }
    }

    #[test]
    fn values_outside_are_named() {
        check(names::INPUT_IDS, &[0, 1, 4, 4, 0, 2], "");
        check(names::INPUT_IDS, &[0, 1, 4, 4, 5, 2], "input_ids: value 5 at (1, 1) is not in 0..5");
        check(names::INPUT_IDS, &[0, 1, -100], "input_ids: value -100 at (0, 2) is not in 0..5");
        check(names::LABELS, &[0, 2, -100], "");
        check(names::LABELS, &[0, 3, -100], "labels: value 3 at (0, 1) is not in 0..3, nor -100");
        check(names::LABELS, &[0, -1, -100], "labels: value -1 at (0, 1) is not in 0..3, nor -100");
        check(names::ATTENTION_MASK, &[0, 1, 2], "attention_mask: value 2 at (0, 2) is not in 0..2");
        check("anything else", &[-1, -2, -3], "");
    }

    #[test]
    fn missing_limits_still_refuse_negatives() {
        let ids = |value| batch(names::INPUT_IDS, Shape::from([1]), &[value]);
        assert!(check_ids(&ids(i32::MAX), Limits::default()).is_ok());
        assert!(check_ids(&ids(i32::MIN), Limits::default()).is_err());
        assert!(check_ids(&ids(i32::MAX), Limits { vocab: Some(usize::MAX), classes: None }).is_ok());
    }

    #[test]
    fn labels_are_counted_per_microbatch() {
        let labels = batch(names::LABELS, Shape::from([4, 2]), &[1, -100, -100, -100, 0, 5, 7, -100]);
        assert_eq!(labelled(&labels, 1).unwrap(), [4]);
        assert_eq!(labelled(&labels, 2).unwrap(), [1, 3]);
        assert_eq!(labelled(&labels, 4).unwrap(), [1, 0, 2, 1]);
        assert!(labelled(&labels, 3).is_err());
        assert!(labelled(&labels, 0).is_err());
        assert!(labelled(&Batch::default(), 1).is_err());
        let flat = batch(names::LABELS, Shape::from([3]), &[1, -100, 2]);
        assert_eq!(labelled(&flat, 3).unwrap(), [1, 0, 1]);
    }

    #[test]
    fn rows_of_numbers_are_all_labelled() {
        let rows = |axes: &[usize], microbatches| {
            let shape = Shape::new(axes);
            let elems = shape.elems();
            labelled(&numbers(shape, &vec![-100.0; elems]), microbatches)
        };
        assert_eq!(rows(&[4, 3], 2).unwrap(), [2, 2]);
        assert_eq!(rows(&[4, 5, 3], 4).unwrap(), [5; 4]);
        assert!(rows(&[4, 3], 3).is_err());
        assert_eq!(rows(&[4], 2).unwrap_err().to_string(), "labels: are f32 of shape 4, want (B, .., C)");
    }

    #[test]
    fn numbers_are_finite() {
        let check = |values| check_ids(&numbers(Shape::from([2, 2]), values), Limits { vocab: None, classes: Some(1) });
        assert!(check(&[-1e30, 0.0, 5.5, 7.0]).is_ok());
        let message = check(&[0.0, 1.0, f32::NAN, 2.0]).unwrap_err().to_string();
        assert_eq!(message, "labels: value at (1, 0): NaN is not a finite number");
    }
}
