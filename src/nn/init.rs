//! Initial values of parameters and running statistics.
//!
//! A parameter's numbers depend only on the seed and its place in the model, so any shard can make its own at any time.

use crate::base::philox::Sequence;
use crate::graph::{Init, Parameter, State};
use rayon::prelude::*;

/// Initial values of the parameter numbered `index` in the model, under the run's `seed`.
pub fn initial(parameter: &Parameter, index: usize, seed: u64) -> Vec<f32> {
    let elems = parameter.shape.elems();
    let numbers = Sequence::new(seed, index as u64);
    match parameter.init {
        Init::Constant(value) => vec![value as f32; elems],
        Init::Normal(deviation) => drawn(elems, &numbers, 4, |numbers| deviation * numbers.normal()),
        Init::Uniform(bound) => drawn(elems, &numbers, 2, |numbers| bound * (2.0 * numbers.uniform() - 1.0)),
    }
}

/// Elements that a thread draws at a time.
const CHUNK: usize = 1 << 14;

/// Numbers that take `words` words of the sequence each, drawn by all threads.
fn drawn(elems: usize, numbers: &Sequence, words: u64, draw: impl Fn(&mut Sequence) -> f64 + Sync) -> Vec<f32> {
    let mut out = vec![0.0; elems];
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
        let mut numbers = numbers.from_word((i * CHUNK) as u64 * words);
        chunk.iter_mut().for_each(|x| *x = draw(&mut numbers) as f32);
    });
    out
}

/// Initial values of a running statistic.
pub fn initial_state(state: &State) -> Vec<f32> {
    vec![state.start as f32; state.shape.elems()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Shape;
    use crate::graph::Value;

    fn parameter(elems: usize, init: Init) -> Parameter {
        Parameter {
            name: "w".into(),
            value: Value(0),
            shape: Shape::from([elems]),
            init,
            layers: vec![0],
            frozen: false,
        }
    }

    #[test]
    fn values_follow_the_seed_and_the_place() {
        for elems in [0, 1, 31, 33, 1023] {
            let p = parameter(elems, Init::Normal(0.02));
            let first = initial(&p, 3, 7);
            assert_eq!(first.len(), elems);
            assert_eq!(first, initial(&p, 3, 7));
            if elems > 0 {
                assert_ne!(first, initial(&p, 4, 7));
                assert_ne!(first, initial(&p, 3, 8));
            }
            // A longer tensor of the same place starts with the same numbers.
            assert_eq!(first, initial(&parameter(elems + 5, Init::Normal(0.02)), 3, 7)[..elems]);
        }
    }

    #[test]
    fn values_are_those_of_one_sequence() {
        let elems = 2 * CHUNK + 7;
        let mut numbers = Sequence::new(7, 3);
        let normal: Vec<f32> = (0..elems).map(|_| numbers.normal() as f32).collect();
        assert_eq!(initial(&parameter(elems, Init::Normal(1.0)), 3, 7), normal);
        let mut numbers = Sequence::new(7, 3);
        let uniform: Vec<f32> = (0..elems).map(|_| (2.0 * numbers.uniform() - 1.0) as f32).collect();
        assert_eq!(initial(&parameter(elems, Init::Uniform(1.0)), 3, 7), uniform);
    }

    #[test]
    fn moments_are_those_asked_for() {
        let moments = |v: &[f32]| {
            let n = v.len() as f64;
            let mean = v.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            (mean, (v.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt())
        };
        // 20,000 numbers: the standard error of the mean is deviation / 141, of the deviation about deviation / 200.
        let (mean, deviation) = moments(&initial(&parameter(20_000, Init::Normal(0.02)), 0, 1));
        assert!(mean.abs() < 6e-4 && (deviation - 0.02).abs() < 5e-4, "{mean} {deviation}");
        let uniform = initial(&parameter(20_000, Init::Uniform(0.5)), 0, 1);
        let (mean, deviation) = moments(&uniform);
        assert!(mean.abs() < 0.01 && (deviation - 0.5 / 3f64.sqrt()).abs() < 0.01, "{mean} {deviation}");
        assert!(uniform.iter().all(|x| x.abs() <= 0.5));
        assert_eq!(initial(&parameter(3, Init::Constant(1.0)), 0, 1), [1.0; 3]);
    }
}
