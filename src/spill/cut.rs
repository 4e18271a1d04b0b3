//! Where to cut a model into shards: pure functions from per-layer weights to ranges of layers.

use std::ops::Range;

/// Cuts layers of the given weights into exactly `shards` stretches such that the heaviest is as light as can be, and
/// the others are as even as that leaves them. `shards` is clamped to 1..=layers.
pub fn balanced(weights: &[f64], shards: usize) -> Vec<Range<usize>> {
    Balanced::new(weights, shards).cut(shards)
}

/// The cuts that [`balanced`] makes into any number of shards up to some.
#[derive(Clone, Debug)]
pub struct Balanced {
    /// Weights of the layers before each, and of all.
    sums: Vec<f64>,
    /// The heaviest stretch of a cut into k.
    heaviest: Vec<f64>,
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
        let mut heaviest = vec![0.0; most + 1];
        // The heaviest stretch when the layers from i on are cut into k - 1, and into k.
        let mut before = vec![f64::INFINITY; layers + 1];
        before[layers] = 0.0;
        for (k, heaviest) in heaviest.iter_mut().enumerate().skip(1) {
            let mut best = vec![f64::INFINITY; layers + 1];
            for i in 0..layers {
                for end in i + 1..=layers - (k - 1).min(layers - i - 1) {
                    best[i] = best[i].min((sums[end] - sums[i]).max(before[end]));
                }
            }
            *heaviest = best[0];
            before = best;
        }
        Balanced { sums, heaviest }
    }

    /// The cut into `shards`, which is clamped to what there is: of those without a heavier stretch than need be the one
    /// with the least sum of squares, for where one layer outweighs all others, as a large table does, they are to be
    /// even too.
    pub fn cut(&self, shards: usize) -> Vec<Range<usize>> {
        let layers = self.sums.len() - 1;
        let shards = shards.clamp(1, self.heaviest.len() - 1);
        let most = self.heaviest[shards];
        // `[k][i]`: where the first stretch ends when the layers from i on are cut into k.
        let mut first_end = vec![vec![layers; layers + 1]; shards + 1];
        let mut before = vec![f64::INFINITY; layers + 1];
        before[layers] = 0.0;
        for (k, first_end) in first_end.iter_mut().enumerate().skip(1) {
            let mut best = vec![f64::INFINITY; layers + 1];
            for i in 0..layers {
                for end in i + 1..=layers {
                    let weight = self.sums[end] - self.sums[i];
                    if weight > most {
                        break;
                    }
                    let squares = weight * weight + before[end];
                    if squares < best[i] {
                        (best[i], first_end[i]) = (squares, end);
                    }
                }
            }
            before = best;
            debug_assert!(k < shards || before[0].is_finite() || layers == 0, "the heaviest is one that there is");
        }
        let mut at = 0;
        let ends = (1..=shards).rev().map(|k| {
            let start = at;
            at = first_end[k][at];
            start..at
        });
        let cut = ends.collect();
        debug_assert_eq!(at, layers);
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
        assert_eq!(balanced(&[0.0, 0.0, 0.0], 2), [0..1, 1..3]);
        // Beside a table that outweighs all layers, and another.
        assert_eq!(balanced(&[9.0, 1.0, 1.0, 1.0, 1.0, 8.0], 4), [0..1, 1..3, 3..5, 5..6]);
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
            let squares = |cut: &[Range<usize>]| {
                cut.iter().map(|r| weights[r.clone()].iter().sum::<f64>().powi(2)).sum::<f64>()
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
                prop_assert!(heaviest(&ours) < heaviest(&cut) || squares(&ours) <= squares(&cut));
            }
        }
    }
}
