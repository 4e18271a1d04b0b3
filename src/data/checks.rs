//! Checks and counts on a minibatch before a model sees it.

use super::{Batch, BatchTensor, names};
use crate::base::{DType, Error, IGNORED, Result};

/// Checks that token ids are not negative, that class labels are not negative except for [`IGNORED`], that masks
/// contain only 0 and 1, and that floating-point labels are finite. The upper bounds of ids and labels are the model's
/// to check: [`Graph::id_range`](crate::graph::Graph::id_range).
///
/// # Errors
/// When a value is out of range, ids or a mask are not integers, or a tensor's type or shape does not match its
/// elements; the message names the tensor, the position and the value.
pub fn check_ids(batch: &Batch) -> Result<()> {
    batch.tensors.iter().try_for_each(check_tensor)
}

/// Checks one tensor as [`check_ids`] does all.
pub(crate) fn check_tensor(tensor: &BatchTensor) -> Result<()> {
    tensor.check()?;
    match (tensor.name.as_str(), tensor.dtype) {
        (names::INPUT_IDS | names::ATTENTION_MASK, DType::F32) => {
            Err(Error::bad(format!("{}: is f32, want i32", tensor.name)))
        }
        (names::INPUT_IDS, _) => check_range(tensor, None, false),
        (names::ATTENTION_MASK, _) => check_range(tensor, Some(2), false),
        (names::LABELS, DType::F32) => check_finite(tensor),
        (names::LABELS, _) => check_range(tensor, None, true),
        _ => Ok(()),
    }
}

fn check_range(tensor: &BatchTensor, below: Option<i32>, may_be_ignored: bool) -> Result<()> {
    let is_outside = |&value: &i32| {
        let fits = value >= 0 && below.is_none_or(|below| value < below);
        !(fits || may_be_ignored && value == IGNORED)
    };
    let values = tensor.as_i32();
    let Some(at) = values.iter().position(is_outside) else { return Ok(()) };
    let outside = below.map_or("is below 0".to_string(), |below| format!("is not in 0..{below}"));
    let or_ignored = if may_be_ignored { format!(", and not {IGNORED}") } else { String::new() };
    let (name, position) = (&tensor.name, tensor.shape.position(at));
    Err(Error::bad(format!("{name}: value {} at {position} {outside}{or_ignored}", values[at])))
}

fn check_finite(tensor: &BatchTensor) -> Result<()> {
    let Some((at, fault)) = not_finite(tensor) else { return Ok(()) };
    Err(Error::bad(format!("{}: value at {}: {fault}", tensor.name, tensor.shape.position(at))))
}

/// Finds the first element of an `F32` tensor that is infinite or NaN.
pub(super) fn not_finite(tensor: &BatchTensor) -> Option<(usize, String)> {
    let at = tensor.as_f32().iter().position(|value| !value.is_finite())?;
    Some((at, format!("{} is not a finite number", tensor.as_f32()[at])))
}

/// Counts the labels of a minibatch that contribute to its loss, which is divided by their number: classes that are not
/// [`IGNORED`], or all rows of regression targets (B, .., C). The number is known before any forward.
///
/// # Errors
/// When the minibatch has no labels, they are floating-point without an axis of columns, or their type or shape does
/// not match their elements.
pub fn labelled(batch: &Batch) -> Result<u64> {
    let Some(labels) = batch.get(names::LABELS) else {
        return Err(Error::bad("the minibatch has no labels to count"));
    };
    labels.check()?;
    if labels.dtype == DType::F32 {
        if labels.shape.axes().len() < 2 {
            return Err(Error::bad(format!("labels: are f32 of shape {}, want (B, .., C)", labels.shape)));
        }
        return Ok(labels.shape.rows() as u64);
    }
    Ok(labels.as_i32().iter().filter(|&&label| label != IGNORED).count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Shape;

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

    /// Checks one tensor; an empty `want` means that it passes.
    #[track_caller]
    fn check(name: &str, values: &[i32], want: &str) {
        match check_ids(&batch(name, Shape::from([values.len() / 3, 3]), values)) {
            Ok(()) => assert_eq!(want, ""),
            Err(e) => assert_eq!(e.to_string(), want),
        }
    }

    #[test]
    fn values_outside_are_named() {
        check(names::INPUT_IDS, &[0, 1, i32::MAX, 4, 0, 2], "");
        check(names::INPUT_IDS, &[0, 1, 4, 4, -5, 2], "input_ids: value -5 at (1, 1) is below 0");
        check(names::INPUT_IDS, &[0, 1, -100], "input_ids: value -100 at (0, 2) is below 0");
        check(names::LABELS, &[0, i32::MAX, -100], "");
        check(names::LABELS, &[0, i32::MIN, -100], "labels: value -2147483648 at (0, 1) is below 0, and not -100");
        check(names::LABELS, &[0, -1, -100], "labels: value -1 at (0, 1) is below 0, and not -100");
        check(names::ATTENTION_MASK, &[0, 1, 2], "attention_mask: value 2 at (0, 2) is not in 0..2");
        check("anything else", &[-1, -2, -3], "");
        let floats = BatchTensor::zeros(names::INPUT_IDS, DType::F32, Shape::from([2]));
        let message = check_ids(&Batch { tensors: vec![floats] }).unwrap_err().to_string();
        assert_eq!(message, "input_ids: is f32, want i32");
    }

    #[test]
    fn labels_that_are_not_ignored_are_counted() {
        let of = |axes: &[usize], values: &[i32]| labelled(&batch(names::LABELS, Shape::new(axes), values)).unwrap();
        assert_eq!(of(&[4, 2], &[1, -100, -100, -100, 0, 5, 7, -100]), 4);
        assert_eq!(of(&[3], &[1, -100, 2]), 2);
        assert_eq!(of(&[4, 0], &[]), 0);
        assert_eq!(of(&[0], &[]), 0);
        assert!(labelled(&Batch::default()).is_err());
    }

    #[test]
    fn rows_of_numbers_are_all_labelled() {
        let rows = |axes: &[usize]| {
            let shape = Shape::new(axes);
            let elems = shape.elems();
            labelled(&numbers(shape, &vec![-100.0; elems]))
        };
        assert_eq!(rows(&[4, 3]).unwrap(), 4);
        assert_eq!(rows(&[4, 5, 3]).unwrap(), 20);
        assert_eq!(rows(&[4]).unwrap_err().to_string(), "labels: are f32 of shape 4, want (B, .., C)");
    }

    /// The type and the shape may be written, and the elements are as they were.
    #[test]
    fn a_tensor_that_is_not_what_it_says_is_refused() {
        let refused = |spoil: fn(&mut BatchTensor), want: &str| {
            let mut batch = numbers(Shape::from([2, 2]), &[0.0; 4]);
            spoil(&mut batch.tensors[0]);
            assert_eq!(check_ids(&batch).unwrap_err().to_string(), want);
            assert_eq!(labelled(&batch).unwrap_err().to_string(), want);
        };
        refused(|t| t.dtype = DType::F64, "labels: a minibatch holds f32 or i32, not f64");
        refused(|t| t.dtype = DType::Bf16, "labels: a minibatch holds f32 or i32, not bf16");
        refused(|t| t.shape = Shape::from([2, 3]), "labels: has 4 elements, its shape is 2x3");
    }

    #[test]
    fn numbers_are_finite() {
        let check = |values| check_ids(&numbers(Shape::from([2, 2]), values));
        assert!(check(&[-1e30, 0.0, 5.5, 7.0]).is_ok());
        let message = check(&[0.0, 1.0, f32::NAN, 2.0]).unwrap_err().to_string();
        assert_eq!(message, "labels: value at (1, 0): NaN is not a finite number");
    }
}
