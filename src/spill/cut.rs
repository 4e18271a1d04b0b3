//! Where to cut a model into shards: pure functions from per-layer weights to ranges of layers.

use std::ops::Range;

/// Cuts layers of the given weights into exactly `shards` stretches such that the heaviest is as light as can be; among
/// those, each stretch from the front takes as little as it may. `shards` is clamped to 1..=layers.
pub fn balanced(weights: &[f64], shards: usize) -> Vec<Range<usize>> {
    Balanced::new(weights, shards).cut(shards)
}

/// The cuts that [`balanced`] makes into any number of shards up to some, which are found together.
#[derive(Clone, Debug)]
pub struct Balanced {
    /// `[k][i]`: where the first stretch ends when the layers from i on are cut into k.
    first_end: Vec<Vec<usize>>,
    layers: usize,
}

impl Balanced {
    /// For up to `most` shards.
    pub fn new(weights: &[f64], most: usize) -> Balanced {
        let layers = weights.len();
        let most = most.clamp(1, layers.max(1));
        let mut sums = vec![0.0; layers + 1];
        for (i, w) in weights.iter().enumerate() {
            sums[i + 1] = sums[i] + w;
        }
        let mut first_end = vec![vec![layers; layers + 1]; most + 1];
        // The heaviest stretch when the layers from i on are cut into k - 1, and into k.
        let mut before = vec![f64::INFINITY; layers + 1];
        before[layers] = 0.0;
        for (k, first_end) in first_end.iter_mut().enumerate().skip(1) {
            let mut best = vec![f64::INFINITY; layers + 1];
            for i in 0..layers {
                for end in i + 1..=layers - (k - 1).min(layers - i - 1) {
                    let heaviest = (sums[end] - sums[i]).max(before[end]);
                    if heaviest < best[i] {
                        best[i] = heaviest;
                        first_end[i] = end;
                    }
                }
            }
            before = best;
        }
        Balanced { first_end, layers }
    }

    /// The cut into `shards`, which is clamped to what there is.
    pub fn cut(&self, shards: usize) -> Vec<Range<usize>> {
        let mut at = 0;
        let shards = shards.clamp(1, self.first_end.len() - 1);
        let ends = (1..=shards).rev().map(|k| {
            let start = at;
            at = self.first_end[k][at];
            start..at
        });
        let cut = ends.collect();
        debug_assert_eq!(at, self.layers);
        cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_cuts() {
        assert_eq!(balanced(&[1.0, 1.0, 1.0, 1.0], 2), [0..2, 2..4]);
        assert_eq!(balanced(&[5.0, 1.0, 1.0, 1.0], 2), [0..1, 1..4]);
        assert_eq!(balanced(&[1.0, 2.0], 9), [0..1, 1..2]);
    }

    proptest! {
        /// Against every cut there is.
        #[test]
        fn no_cut_is_lighter(weights in prop::collection::vec(0u32..100, 1..9), shards in 1usize..5) {
            let weights: Vec<f64> = weights.into_iter().map(f64::from).collect();
            let shards = shards.min(weights.len());
            let heaviest = |cut: &[Range<usize>]| {
                cut.iter().map(|r| weights[r.clone()].iter().sum::<f64>()).fold(0.0, f64::max)
            };
            let ours = balanced(&weights, shards);
            prop_assert_eq!(ours.len(), shards);
            prop_assert_eq!((ours[0].start, ours[shards - 1].end), (0, weights.len()));
            prop_assert!(ours.iter().all(|r| !r.is_empty()) && ours.windows(2).all(|w| w[0].end == w[1].start));
            for mask in 0u32..1 << (weights.len() - 1) {
                if mask.count_ones() as usize + 1 != shards { continue; }
                let mut cut = Vec::new();
                let mut start = 0;
                for i in 1..=weights.len() {
                    if i == weights.len() || mask >> (i - 1) & 1 == 1 { cut.push(start..i); start = i; }
                }
                prop_assert!(heaviest(&ours) <= heaviest(&cut));
            }
        }
    }
}
