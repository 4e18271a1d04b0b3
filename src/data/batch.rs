//! One minibatch in memory, and its description, which is known beforehand.
//!
//! A tensor's elements live in a buffer of 32-bit words: both element types are that wide, so the buffer is aligned for
//! either by construction, and a minibatch can be refilled without a new allocation.

use super::checks::not_finite;
use crate::base::tensorfile::Element;
use crate::base::{DType, Error, Result, Shape};

/// One tensor of a minibatch.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchTensor {
    /// Which input of the model it is, one of [`names`](super::names).
    pub name: String,
    /// `F32` or `I32`.
    pub dtype: DType,
    /// Its axes; the first is the sample within the minibatch.
    pub shape: Shape,
    /// The elements' bits; one word per element of `shape`.
    words: Vec<u32>,
}

impl BatchTensor {
    /// A tensor of zeros.
    ///
    /// # Panics
    /// When `dtype` is neither `F32` nor `I32`.
    pub fn zeros(name: impl Into<String>, dtype: DType, shape: Shape) -> BatchTensor {
        assert!(matches!(dtype, DType::F32 | DType::I32), "a minibatch holds f32 or i32, not {dtype}");
        let words = vec![0; shape.elems()];
        BatchTensor { name: name.into(), dtype, shape, words }
    }

    /// Refuses a type or a shape that does not match the elements: both fields are public, and a source may overwrite
    /// them.
    pub(crate) fn check(&self) -> Result<()> {
        let BatchTensor { name, dtype, shape, words } = self;
        if !matches!(dtype, DType::F32 | DType::I32) {
            return Err(Error::bad(format!("{name}: a minibatch holds f32 or i32, not {dtype}")));
        }
        if shape.checked_elems()? != words.len() {
            return Err(Error::bad(format!("{name}: has {} elements, its shape is {shape}", words.len())));
        }
        Ok(())
    }

    /// The elements of an `F32` tensor, row-major.
    ///
    /// # Panics
    /// When the tensor is not `F32`.
    pub fn as_f32(&self) -> &[f32] {
        assert_eq!(self.dtype, DType::F32, "{} is {}", self.name, self.dtype);
        bytemuck::cast_slice(&self.words)
    }

    /// The elements of an `I32` tensor, row-major.
    ///
    /// # Panics
    /// When the tensor is not `I32`.
    pub fn as_i32(&self) -> &[i32] {
        assert_eq!(self.dtype, DType::I32, "{} is {}", self.name, self.dtype);
        bytemuck::cast_slice(&self.words)
    }

    /// As [`as_f32`](Self::as_f32), for writing.
    ///
    /// # Panics
    /// When the tensor is not `F32`.
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.dtype, DType::F32, "{} is {}", self.name, self.dtype);
        bytemuck::cast_slice_mut(&mut self.words)
    }

    /// As [`as_i32`](Self::as_i32), for writing.
    ///
    /// # Panics
    /// When the tensor is not `I32`.
    pub fn as_i32_mut(&mut self) -> &mut [i32] {
        assert_eq!(self.dtype, DType::I32, "{} is {}", self.name, self.dtype);
        bytemuck::cast_slice_mut(&mut self.words)
    }

    /// The elements' bytes in the machine's byte order, aligned to 4, as copied to a device.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// Fills the tensor with a file's little-endian elements, which `read` writes into the given bytes; 64-bit elements
    /// (`I64`) go through `wide`. Returns the position of the first element that does not fit 32 bits or is not finite,
    /// and what is wrong with it; the elements after it are then unspecified.
    ///
    /// # Errors
    /// What `read` returns.
    ///
    /// # Panics
    /// When `element` is neither the tensor's own type nor, for an `I32` tensor, `I64`.
    pub fn fill_from(
        &mut self,
        element: Element,
        wide: &mut Vec<i64>,
        read: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<Option<(usize, String)>> {
        if element == Element::I64 {
            let narrow = self.as_i32_mut();
            wide.resize(narrow.len().max(wide.len()), 0);
            let wide = &mut wide[..narrow.len()];
            read(bytemuck::cast_slice_mut(wide))?;
            for (at, (wide, narrow)) in wide.iter().zip(narrow).enumerate() {
                let wide = i64::from_le(*wide);
                let Ok(fits) = i32::try_from(wide) else {
                    return Ok(Some((at, format!("{wide} does not fit 32 bits"))));
                };
                *narrow = fits;
            }
            return Ok(None);
        }
        let own = if self.dtype == DType::F32 { Element::F32 } else { Element::I32 };
        assert_eq!(element, own, "{} is {}", self.name, self.dtype);
        read(bytemuck::cast_slice_mut(&mut self.words))?;
        self.words.iter_mut().for_each(|word| *word = u32::from_le(*word));
        Ok(if own == Element::F32 { not_finite(self) } else { None })
    }
}

/// One minibatch. An empty one (`Batch::default()`) is allocated when it is first filled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// The tensors, in the order of the source's [`InputSpec`].
    pub tensors: Vec<BatchTensor>,
}

impl Batch {
    /// Makes a minibatch of zeros as `spec` describes.
    pub fn zeros(spec: &InputSpec) -> Batch {
        let tensor =
            |(name, dtype, shape): &(String, DType, Shape)| BatchTensor::zeros(name, *dtype, spec.batched(shape));
        Batch { tensors: spec.tensors.iter().map(tensor).collect() }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&BatchTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Makes the tensors match `spec`. Allocates only where they do not yet; other tensors keep their elements.
    pub fn conform(&mut self, spec: &InputSpec) {
        let fits = self.tensors.len() == spec.tensors.len()
            && self.tensors.iter().zip(&spec.tensors).all(|(have, (name, dtype, shape))| {
                have.name == *name
                    && have.dtype == *dtype
                    && have.shape.axes().split_first() == Some((&spec.batch, shape.axes()))
            });
        if !fits {
            *self = Batch::zeros(spec);
        }
    }
}

/// A description of a source's minibatches, known before any is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputSpec {
    /// Name, element type and shape of each tensor, the shape without the leading axis of samples.
    pub tensors: Vec<(String, DType, Shape)>,
    /// Samples in a minibatch.
    pub batch: usize,
    /// Samples in one pass over the data; `None` where it never ends.
    pub samples: Option<u64>,
    /// Total number of minibatches; `None` where the data is passed over repeatedly.
    pub batches: Option<u64>,
    /// Token ids are below this; `None` where the source does not know.
    pub vocab: Option<usize>,
    /// Labels are below this; `None` where the source does not know.
    pub classes: Option<usize>,
}

impl InputSpec {
    /// Makes a description with only the tensors and the samples per minibatch known.
    ///
    /// # Errors
    /// When `batch` or an axis is 0, a tensor is neither `F32` nor `I32`, or a minibatch would not fit in memory.
    pub fn new(tensors: Vec<(String, DType, Shape)>, batch: usize) -> Result<InputSpec> {
        if batch == 0 {
            return Err(Error::bad("a minibatch needs at least one sample; batch is 0"));
        }
        let spec = InputSpec { tensors, batch, samples: None, batches: None, vocab: None, classes: None };
        for (name, dtype, shape) in &spec.tensors {
            if !matches!(dtype, DType::F32 | DType::I32) {
                return Err(Error::bad(format!("{name}: a minibatch holds f32 or i32, not {dtype}")));
            }
            if shape.axes().contains(&0) {
                return Err(Error::bad(format!("{name}: shape {shape} has an axis of 0")));
            }
            spec.batched(shape).checked_elems().map_err(|e| Error::bad(format!("{name}: {e}")))?;
        }
        Ok(spec)
    }

    /// The shape of a minibatch whose samples have the shape `sample`.
    pub fn batched(&self, sample: &Shape) -> Shape {
        let mut axes = Vec::with_capacity(sample.axes().len() + 1);
        axes.push(self.batch);
        axes.extend_from_slice(sample.axes());
        Shape::new(axes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::names;

    fn spec(batch: usize) -> Result<InputSpec> {
        InputSpec::new(
            vec![
                (names::INPUT_IDS.into(), DType::I32, Shape::from([31])),
                (names::PIXEL_VALUES.into(), DType::F32, Shape::from([1, 3, 33])),
                (names::LABELS.into(), DType::I32, Shape::default()),
            ],
            batch,
        )
    }

    #[test]
    fn buffers_are_kept_where_they_fit() {
        let three = spec(3).unwrap();
        let mut batch = Batch::default();
        batch.conform(&three);
        assert_eq!(batch.get(names::LABELS).unwrap().shape, Shape::from([3]));
        assert_eq!(batch.get(names::PIXEL_VALUES).unwrap().bytes().len(), 3 * 99 * 4);
        batch.tensors[0].as_i32_mut()[92] = -7;
        let at = batch.tensors[0].bytes().as_ptr();
        batch.conform(&three);
        assert_eq!((batch.tensors[0].bytes().as_ptr(), batch.tensors[0].as_i32()[92]), (at, -7));
        assert_eq!(at as usize % 4, 0);
        batch.conform(&spec(1).unwrap());
        assert_eq!(batch.tensors[0].as_i32(), &[0; 31]);
        assert_eq!(batch.get("no such"), None);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        assert!(spec(0).is_err());
        assert!(spec(usize::MAX / 8).is_err());
        let tensor = |dtype, axes: [usize; 2]| vec![("x".to_string(), dtype, Shape::from(axes))];
        assert!(InputSpec::new(tensor(DType::F64, [1, 1]), 1).is_err());
        assert!(InputSpec::new(tensor(DType::F32, [0, 1]), 1).is_err());
        assert!(InputSpec::new(tensor(DType::F32, [usize::MAX, 2]), 1).is_err());
    }
}
