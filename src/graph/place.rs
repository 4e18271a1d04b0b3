//! Memory placement: gives every buffer an offset before anything runs.
//!
//! A buffer lives from the step that first writes it to the step that last reads it. Two that are alive at the same
//! time never overlap; the peak is the highest byte of any buffer, known exactly.

use crate::base::align_up;

/// Every buffer starts at a multiple of this many bytes: a cache line, and enough for wide loads.
pub const ALIGNMENT: u64 = 64;

/// A buffer and its life, as inclusive steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Size.
    pub bytes: u64,
    /// First step that touches it.
    pub first: usize,
    /// Last step that touches it.
    pub last: usize,
}

/// Offsets for `buffers`, in their order, and the peak in bytes. Places the largest first, each in the smallest gap
/// that holds it.
pub fn place(buffers: &[Lifetime]) -> (Vec<u64>, u64) {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), buffers[i].first, i));
    let mut offsets = vec![0; buffers.len()];
    // The buffers placed so far, from the lowest to the highest.
    let mut placed: Vec<(u64, u64, usize)> = Vec::new();
    let mut peak = 0;
    for i in order {
        let buffer = buffers[i];
        let taken = placed
            .iter()
            .filter(|&&(_, _, j)| buffers[j].first <= buffer.last && buffer.first <= buffers[j].last)
            .map(|&(from, to, _)| (from, to));
        let start = tightest_gap(taken, buffer.bytes);
        let end = start + buffer.bytes;
        offsets[i] = start;
        peak = peak.max(end);
        if buffer.bytes > 0 {
            placed.insert(placed.partition_point(|&other| other < (start, end, i)), (start, end, i));
        }
    }
    (offsets, peak)
}

/// The start of the smallest gap between the sorted ranges `taken` that holds `bytes`; the end of all of them when none
/// does.
fn tightest_gap(taken: impl Iterator<Item = (u64, u64)>, bytes: u64) -> u64 {
    let mut best: Option<(u64, u64)> = None;
    let mut end = 0;
    for (from, to) in taken {
        let start = align_up(end, ALIGNMENT);
        if start + bytes <= from {
            let room = from - start;
            if best.is_none_or(|(smallest, _)| room < smallest) {
                best = Some((room, start));
            }
        }
        end = end.max(to);
    }
    best.map_or(align_up(end, ALIGNMENT), |(_, start)| start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn life(bytes: u64, first: usize, last: usize) -> Lifetime {
        Lifetime { bytes, first, last }
    }

    #[test]
    fn reuses_what_has_died() {
        let (offsets, peak) = place(&[life(100, 0, 1), life(100, 2, 3), life(100, 1, 2)]);
        assert_eq!(offsets, [0, 0, 128]);
        assert_eq!(peak, 228);
        assert_eq!(place(&[]), (vec![], 0));
        assert_eq!(place(&[life(0, 0, 9), life(1, 0, 0)]).1, 1);
    }

    proptest! {
        #[test]
        fn nothing_overlaps(lives in prop::collection::vec((0u64..5000, 0usize..30, 0usize..10), 0..40)) {
            let buffers: Vec<Lifetime> = lives.iter().map(|&(b, f, n)| life(b, f, f + n)).collect();
            let (offsets, peak) = place(&buffers);
            for i in 0..buffers.len() {
                prop_assert!(offsets[i] % ALIGNMENT == 0 && offsets[i] + buffers[i].bytes <= peak);
                for j in 0..i {
                    let (a, b) = (buffers[i], buffers[j]);
                    let together = a.first <= b.last && b.first <= a.last;
                    let apart = offsets[i] + a.bytes <= offsets[j] || offsets[j] + b.bytes <= offsets[i];
                    prop_assert!(!together || apart || a.bytes == 0 || b.bytes == 0);
                }
            }
            // No placement can be below the greatest sum of live bytes.
            let live = (0..40).map(|t| buffers.iter().filter(|b| b.first <= t && t <= b.last).map(|b| b.bytes).sum::<u64>()).max();
            prop_assert!(peak >= live.unwrap_or(0));
        }
    }
}
