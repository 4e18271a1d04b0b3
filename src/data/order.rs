//! Which samples are in which minibatch: a seeded shuffle per epoch for training, file order for held-out data.

use crate::base::philox::Sequence;
use crate::base::{Error, Result};

/// Keeps shuffles apart from every other use of the run's seed; the epoch is added to it.
const SHUFFLE_STREAM: u64 = 0x5368_0000_0000;

/// A source for training, and one for the held-out data.
pub struct Split<S> {
    /// Reshuffled every epoch.
    pub train: S,
    /// The last samples, in order; `None` where nothing is held out.
    pub valid: Option<S>,
}

/// Maps minibatch numbers to samples.
#[derive(Clone, Debug)]
pub(super) struct Order {
    samples: usize,
    batch: usize,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// `permutation` is that of `epoch`, or none has been made yet.
    Shuffled {
        seed: u64,
        epoch: Option<u64>,
        permutation: Vec<usize>,
    },
    InOrder,
}

impl Order {
    /// Every epoch is a new permutation of `0..samples`, fixed by `seed` and the epoch's number (Fisher & Yates, as in
    /// Knuth, The Art of Computer Programming, vol. 2, algorithm 3.4.2P). A last short minibatch is dropped.
    pub fn shuffled(samples: usize, batch: usize, seed: u64) -> Order {
        Order { samples, batch, kind: Kind::Shuffled { seed, epoch: None, permutation: (0..samples).collect() } }
    }

    /// Every epoch is `0, 1, ..`. The last minibatch is padded, so that each held-out sample counts exactly once.
    pub fn in_order(samples: usize, batch: usize) -> Order {
        Order { samples, batch, kind: Kind::InOrder }
    }

    /// Samples in an epoch.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Minibatches in an epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        match self.kind {
            Kind::Shuffled { .. } => (self.samples / self.batch) as u64,
            Kind::InOrder => self.samples.div_ceil(self.batch) as u64,
        }
    }

    /// The samples of minibatch `index`, which counts over epochs; as many as the minibatch has rows. `None` is a
    /// padding row.
    pub fn rows(&mut self, index: u64) -> impl Iterator<Item = Option<usize>> + '_ {
        // Sources refuse an order without a minibatch; `max` only avoids a division by zero here.
        let per_epoch = self.batches_per_epoch().max(1);
        let (epoch, first) = (index / per_epoch, (index % per_epoch) as usize * self.batch);
        self.shuffle_for(epoch);
        let samples = self.samples;
        let kind = &self.kind;
        (first..first + self.batch).map(move |at| match kind {
            Kind::Shuffled { permutation, .. } => permutation.get(at).copied(),
            Kind::InOrder => (at < samples).then_some(at),
        })
    }

    fn shuffle_for(&mut self, wanted: u64) {
        let Kind::Shuffled { seed, epoch, permutation } = &mut self.kind else { return };
        if *epoch == Some(wanted) {
            return;
        }
        let mut random = Sequence::new(*seed, SHUFFLE_STREAM.wrapping_add(wanted));
        // Starts from the identity, not from the last epoch's order: resuming must not depend on earlier epochs.
        for (at, sample) in permutation.iter_mut().enumerate() {
            *sample = at;
        }
        for last in (1..permutation.len()).rev() {
            permutation.swap(last, random.below(last as u64 + 1) as usize);
        }
        *epoch = Some(wanted);
    }
}

/// How many of `total` samples a fraction holds out: rounded to the nearest, at least one; none where the fraction is
/// 0.
pub(super) fn held_out(total: usize, fraction: f64) -> usize {
    if fraction == 0.0 { 0 } else { ((total as f64 * fraction).round() as usize).clamp(1, total.max(1)) }
}

/// The smallest total that leaves `wanted` samples after [`held_out`].
pub(super) fn smallest_total(wanted: usize, fraction: f64) -> usize {
    let left = |total: usize| total - held_out(total, fraction).min(total);
    let (mut low, mut high) = (0, wanted.max(1));
    while left(high) < wanted && high < usize::MAX / 4 {
        (low, high) = (high, high * 2);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if left(middle) < wanted { low = middle } else { high = middle }
    }
    high
}

/// Checks a fraction of data to hold out.
///
/// # Errors
/// When it is not in `[0, 1)`.
pub(super) fn check_fraction(fraction: f64) -> Result<()> {
    if (0.0..1.0).contains(&fraction) {
        Ok(())
    } else {
        Err(Error::bad(format!("the fraction of held-out data is {fraction}; it must be at least 0 and less than 1")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(order: &mut Order, number: u64) -> Vec<usize> {
        let per_epoch = order.batches_per_epoch();
        (number * per_epoch..(number + 1) * per_epoch)
            .flat_map(|index| order.rows(index).map(|row| row.unwrap()).collect::<Vec<_>>())
            .collect()
    }

    #[test]
    fn every_epoch_is_another_permutation() {
        for (samples, batch) in [(1, 1), (31, 1), (33, 3), (1023, 33)] {
            let mut order = Order::shuffled(samples, batch, 7);
            let epochs: Vec<_> = (0..4).map(|number| epoch(&mut order, number)).collect();
            for one in &epochs {
                let mut sorted = one.clone();
                sorted.sort();
                assert_eq!(sorted, (0..samples).collect::<Vec<_>>(), "{samples} samples, batch {batch}");
            }
            if samples > 1 {
                assert!(epochs.windows(2).all(|pair| pair[0] != pair[1]), "{samples} samples, batch {batch}");
                assert_ne!(epochs[0], (0..samples).collect::<Vec<_>>());
                assert_ne!(epochs[0], epoch(&mut Order::shuffled(samples, batch, 8), 0));
            }
        }
    }

    #[test]
    fn a_short_last_minibatch_is_dropped_and_samples_do_not_repeat() {
        let mut order = Order::shuffled(31, 4, 1);
        assert_eq!(order.batches_per_epoch(), 7);
        let mut seen = epoch(&mut order, 3);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 28);
    }

    #[test]
    fn minibatches_do_not_depend_on_who_was_asked_before() {
        let mut walked = Order::shuffled(33, 5, 3);
        let mut jumped = walked.clone();
        let rows: Vec<Vec<_>> = (0..20).map(|index| walked.rows(index).collect()).collect();
        for index in [19, 0, 7, 6, 13] {
            assert_eq!(jumped.rows(index as u64).collect::<Vec<_>>(), rows[index]);
        }
    }

    /// Over many seeds every sample is first about equally often: 5 values, 5000 draws, 1000 +- 5 sigma (28.3).
    #[test]
    fn shuffles_are_fair() {
        let mut counts = [0; 5];
        for seed in 0..5000 {
            counts[Order::shuffled(5, 1, seed).rows(0).next().unwrap().unwrap()] += 1;
        }
        assert!(counts.iter().all(|&n: &i32| (n - 1000).abs() < 142), "{counts:?}");
    }

    #[test]
    fn held_out_data_is_in_order_and_padded() {
        let mut order = Order::in_order(5, 3);
        assert_eq!(order.batches_per_epoch(), 2);
        assert_eq!(order.rows(0).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
        assert_eq!(order.rows(1).collect::<Vec<_>>(), [Some(3), Some(4), None]);
        assert_eq!(order.rows(2).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
    }

    #[test]
    fn the_smallest_total_is_the_smallest() {
        for fraction in [0.0, 0.001, 0.1, 0.5, 0.9, 0.999] {
            for wanted in [1, 2, 31, 33, 1023] {
                let total = smallest_total(wanted, fraction);
                assert!(total - held_out(total, fraction) >= wanted, "{wanted} of {total}, {fraction}");
                let less = total - 1;
                assert!(less - held_out(less, fraction).min(less) < wanted, "{wanted} of {less}, {fraction}");
            }
        }
        assert_eq!((held_out(100, 0.1), held_out(3, 0.01), held_out(0, 0.0)), (10, 1, 0));
        assert!(check_fraction(1.0).is_err() && check_fraction(f64::NAN).is_err() && check_fraction(-0.1).is_err());
    }
}
