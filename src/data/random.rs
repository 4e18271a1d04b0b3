//! Seeded random inputs, for plans, simulations and benchmarks.

use super::{Batch, InputSpec, Source, names};
use crate::base::philox::Sequence;
use crate::base::{DType, Error, Result, Shape};

/// Keeps random inputs apart from every other use of the run's seed; the minibatch's number is added to it.
const RANDOM_STREAM: u64 = 0x5261_0000_0000;

/// The form of random inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomOptions {
    /// Name, element type and shape of each tensor, the shape without the leading axis of samples. The names are those
    /// of [`names`]; `pixel_values` is `F32`, `labels` is either, and the others are `I32`.
    pub tensors: Vec<(String, DType, Shape)>,
    /// Token ids are uniform below this.
    pub vocab: usize,
    /// `I32` labels are uniform below this.
    pub classes: usize,
    /// Samples in a minibatch.
    pub batch: usize,
    /// Fixes every value, together with the minibatch's number.
    pub seed: u64,
}

/// Makes endless random minibatches: ids and class labels are uniform, pixels and floating-point labels standard
/// normal, masks all ones.
pub struct RandomSource {
    spec: InputSpec,
    fills: Vec<Fill>,
    seed: u64,
}

#[derive(Clone, Copy)]
enum Fill {
    Below(u64),
    Ones,
    Normal,
}

impl RandomSource {
    /// Checks the options.
    ///
    /// # Errors
    /// When a tensor is not one that models take or has another element type, `vocab` or `classes` is 0 or more than
    /// 2^31, or a shape is out of range.
    pub fn new(options: &RandomOptions) -> Result<RandomSource> {
        let spec = InputSpec::new(options.tensors.clone(), options.batch)?;
        for (what, n) in [("vocab", options.vocab), ("classes", options.classes)] {
            if n == 0 || n > 1 << 31 {
                return Err(Error::bad(format!("random data: {what} is {n}; it must be in 1..=2^31")));
            }
        }
        let fill = |(name, dtype, _): &(String, DType, Shape)| match (name.as_str(), dtype) {
            (names::INPUT_IDS, DType::I32) => Ok(Fill::Below(options.vocab as u64)),
            (names::LABELS, DType::I32) => Ok(Fill::Below(options.classes as u64)),
            (names::ATTENTION_MASK, DType::I32) => Ok(Fill::Ones),
            (names::PIXEL_VALUES | names::LABELS, DType::F32) => Ok(Fill::Normal),
            _ => Err(Error::bad(format!("random data: no model takes a tensor '{name}' of {dtype}"))),
        };
        let fills = options.tensors.iter().map(fill).collect::<Result<Vec<_>>>()?;
        let spec = InputSpec { vocab: Some(options.vocab), classes: Some(options.classes), ..spec };
        Ok(RandomSource { spec, fills, seed: options.seed })
    }
}

impl Source for RandomSource {
    fn spec(&self) -> &InputSpec {
        &self.spec
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        batch.conform(&self.spec);
        let mut random = Sequence::new(self.seed, RANDOM_STREAM.wrapping_add(index));
        for (tensor, fill) in batch.tensors.iter_mut().zip(&self.fills) {
            match *fill {
                Fill::Below(n) => tensor.as_i32_mut().iter_mut().for_each(|value| *value = random.below(n) as i32),
                Fill::Ones => tensor.as_i32_mut().fill(1),
                Fill::Normal => tensor.as_f32_mut().iter_mut().for_each(|value| *value = random.normal() as f32),
            }
        }
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        u64::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::check_ids;

    fn options() -> RandomOptions {
        let tensor = |name: &str, dtype, shape| (name.to_string(), dtype, shape);
        RandomOptions {
            tensors: vec![
                tensor(names::INPUT_IDS, DType::I32, Shape::from([33])),
                tensor(names::ATTENTION_MASK, DType::I32, Shape::from([33])),
                tensor(names::PIXEL_VALUES, DType::F32, Shape::from([3, 31, 11])),
                tensor(names::LABELS, DType::I32, Shape::default()),
            ],
            vocab: 7,
            classes: 1,
            batch: 5,
            seed: 9,
        }
    }

    #[test]
    fn values_are_in_range_and_depend_on_seed_and_index_alone() {
        let mut source = RandomSource::new(&options()).unwrap();
        let mut at = |index| {
            let mut batch = Batch::default();
            source.fill(index, &mut batch).unwrap();
            batch
        };
        let (far, first) = (at(u64::MAX - 1), at(0));
        assert_eq!((at(u64::MAX - 1), at(0)), (far.clone(), first.clone()));
        assert_ne!(far, first);
        check_ids(&first).unwrap();
        let ids = first.tensors[0].as_i32();
        assert!((0..7).all(|id| ids.contains(&id)) && ids.iter().all(|&id| id < 7));
        assert!(first.tensors[1].as_i32().iter().all(|&mask| mask == 1));
        let pixels = first.tensors[2].as_f32();
        // 5115 draws: the mean's deviation is 0.014, the bound five of them.
        let mean = pixels.iter().map(|&x| f64::from(x)).sum::<f64>() / pixels.len() as f64;
        assert!(mean.abs() < 0.07 && pixels.iter().all(|x| x.is_finite()), "{mean}");
        let mut other = Batch::default();
        RandomSource::new(&RandomOptions { seed: 10, ..options() }).unwrap().fill(0, &mut other).unwrap();
        assert_ne!(other, first);
    }

    #[test]
    fn labels_may_be_numbers() {
        let tensors = vec![(names::LABELS.to_string(), DType::F32, Shape::from([33]))];
        let mut batch = Batch::default();
        RandomSource::new(&RandomOptions { tensors, ..options() }).unwrap().fill(0, &mut batch).unwrap();
        let labels = batch.tensors[0].as_f32();
        assert!(labels.iter().any(|&x| x < 0.0) && labels.iter().any(|x| x.fract() != 0.0), "{labels:?}");
    }

    #[test]
    fn bad_options_are_refused() {
        let refused = |change: fn(&mut RandomOptions)| {
            let mut options = options();
            change(&mut options);
            RandomSource::new(&options).err().expect("refused").to_string()
        };
        assert!(refused(|o| o.vocab = 0).contains("vocab is 0"));
        assert!(refused(|o| o.classes = usize::MAX).contains("classes"));
        assert!(refused(|o| o.batch = 0).contains("batch is 0"));
        assert!(refused(|o| o.tensors[0].1 = DType::F32).contains("'input_ids' of f32"));
        assert!(refused(|o| o.tensors[0].0 = "ids".into()).contains("'ids'"));
        assert!(refused(|o| o.tensors[2].2 = Shape::from([usize::MAX, 3])).contains("pixel_values"));
    }
}
