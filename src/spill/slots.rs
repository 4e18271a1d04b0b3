//! Slots for what visits: how large they are, and which of them a shard may be in.
//!
//! Slots are as large as the largest shard that uses them. Where one shard is much larger than those around it, as the
//! table of a large vocabulary is, it has a slot apart, and the others' are only as large as these.
//!
//! With `count` slots as many neighbours may have theirs at the same time. So among so many neighbours at most one is
//! large, which leaves each shard as many slots around its own visit as equal ones would.

use super::memory::Bump;
use crate::base::align_up;
use crate::graph::ALIGNMENT;
use std::ops::Range;

/// Slots of one kind, by where they are in an arena.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct SlotMap {
    /// Each one's first byte.
    pub at: Vec<u64>,
    /// The slots that a shard may be in, by number.
    pub of: Vec<Range<usize>>,
}

impl SlotMap {
    /// Lays out a slot for each of the first `own` shards, and for the others `count` slots, or fewer if there are fewer
    /// shards, with one more where some are large. `bytes`: of each shard.
    pub(super) fn new(bump: &mut Bump, bytes: &[u64], own: usize, count: usize) -> SlotMap {
        let mut at: Vec<u64> = bytes[..own].iter().map(|&bytes| bump.take(bytes)).collect();
        let mut of: Vec<Range<usize>> = (0..own).map(|s| s..s + 1).collect();
        let visiting = &bytes[own..];
        if visiting.is_empty() {
            return SlotMap { at, of };
        }
        let peaks = (0..visiting.len()).fold(Peaks::default(), |peaks, s| peaks.with_first(&visiting[s..], count));
        let Sizes { large, others, count } = peaks.sizes(visiting, count);
        at.extend(large.map(|bytes| bump.take(bytes)));
        let small = at.len();
        at.extend(bump.take_many(count, others));
        let of_one = |&bytes: &u64| if bytes > others { own..small } else { small..small + count };
        of.extend(visiting.iter().map(of_one));
        SlotMap { at, of }
    }

    /// Lays out `count` slots for any of so many `shards`.
    pub(super) fn for_all(bump: &mut Bump, bytes: u64, shards: usize, count: usize) -> SlotMap {
        SlotMap { at: bump.take_many(count, bytes), of: vec![0..count; shards] }
    }

    /// How many slots there are for all shards but the large ones, of those from `first` on.
    pub fn count_from(&self, first: usize) -> usize {
        self.of[first..].iter().map(Range::len).max().unwrap_or(0)
    }

    /// Whether there is a slot for large shards alone, among those from `first` on.
    pub fn has_large(&self, first: usize) -> bool {
        self.of[first..].windows(2).any(|neighbours| neighbours[0] != neighbours[1])
    }

    /// Whether what a shard's slot holds after its visit stays there until all shards before it have visited, back to
    /// number `first`.
    pub fn stays(&self, shard: usize, first: usize) -> bool {
        self.have_others(first..shard, shard)
    }

    /// Whether what a shard's slot holds after its visit stays there until all shards behind it have visited.
    pub fn returns(&self, shard: usize) -> bool {
        self.have_others(shard + 1..self.of.len(), shard)
    }

    /// Whether so few `shards` share a shard's slots that they find others.
    fn have_others(&self, shards: Range<usize>, shard: usize) -> bool {
        let slots = &self.of[shard];
        slots
            .len()
            .checked_sub(1)
            .is_some_and(|most| self.of[shards].iter().filter(|of| *of == slots).nth(most).is_none())
    }
}

/// Bytes of the slot for large shards, if any are, and of one for the others, and how many of these there are.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    large: Option<u64>,
    others: u64,
    count: usize,
}

impl Sizes {
    fn sum(self) -> u64 {
        let large = self.large.map_or(0, |bytes| align_up(bytes, ALIGNMENT));
        large.saturating_add((self.count as u64).saturating_mul(align_up(self.others, ALIGNMENT)))
    }
}

/// What the sizes of slots depend on, of shards from one on: the largest of them, and the largest size that two of so
/// many neighbours reach.
#[derive(Clone, Copy, Default)]
struct Peaks {
    largest: u64,
    second: u64,
}

impl Peaks {
    /// Those of one shard more, which is the first of `bytes`, with `count` slots.
    fn with_first(self, bytes: &[u64], count: usize) -> Peaks {
        let neighbours = bytes[1..count.clamp(1, bytes.len())].iter();
        let second = neighbours.map(|&other| other.min(bytes[0])).fold(self.second, u64::max);
        Peaks { largest: self.largest.max(bytes[0]), second }
    }

    /// The sizes for shards of so many `bytes` that have these peaks.
    fn sizes(self, bytes: &[u64], count: usize) -> Sizes {
        let Peaks { largest, second } = self;
        let even = Sizes { large: None, others: largest, count: count.min(bytes.len()) };
        if count < 2 || second == largest {
            return even;
        }
        // What takes long to come begins best long before: its slot is not for what is half as large.
        let is_small = |&&bytes: &&u64| bytes <= second || 2 * bytes <= largest;
        let small = bytes.iter().filter(is_small);
        let others = small.clone().copied().max().unwrap_or(0);
        let apart = Sizes { large: Some(largest), others, count: count.min(small.count()) };
        if apart.sum() < even.sum() { apart } else { even }
    }
}

/// The sizes for the shards from each one on, with `count` slots.
fn sizes(bytes: &[u64], count: usize) -> Vec<Sizes> {
    let mut peaks = Peaks::default();
    let of = |first: usize| {
        peaks = peaks.with_first(&bytes[first..], count);
        peaks.sizes(&bytes[first..], count)
    };
    let mut sizes: Vec<Sizes> = (0..bytes.len()).rev().map(of).collect();
    sizes.reverse();
    sizes
}

/// Bytes of the slots of those that visit, by how many shards before them do not. `even`: the slots are equal.
pub(super) fn shared_bytes(bytes: &[u64], count: usize, even: bool) -> Vec<u64> {
    if !even {
        return sizes(bytes, count).into_iter().map(Sizes::sum).collect();
    }
    let mut largest = 0;
    let of = |(others, &this): (usize, &u64)| {
        largest = this.max(largest);
        Sizes { large: None, others: largest, count: count.min(others + 1) }.sum()
    };
    let mut sums: Vec<u64> = bytes.iter().rev().enumerate().map(of).collect();
    sums.reverse();
    sums
}

/// Whether some of those that visit, however many before them do not, have a slot apart.
pub(super) fn has_large(bytes: &[u64], count: usize) -> bool {
    sizes(bytes, count).iter().any(|sizes| sizes.large.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    fn map(kib: &[u64], own: usize, count: usize) -> (SlotMap, u64) {
        let bytes: Vec<u64> = kib.iter().map(|kib| kib * KIB).collect();
        let mut bump = Bump::default();
        let map = SlotMap::new(&mut bump, &bytes, own, count);
        let own_bytes: u64 = bytes[..own].iter().sum();
        assert_eq!(own_bytes + shared_bytes(&bytes, count, false)[own], bump.end);
        let largest = bytes[own..].iter().max().unwrap();
        assert_eq!(shared_bytes(&bytes, count, true)[own], count.min(bytes.len() - own) as u64 * largest);
        assert!(has_large(&bytes[own..], count) || !map.has_large(own));
        (map, bump.end / KIB)
    }

    #[test]
    fn tables_have_a_slot_apart() {
        let (slots, kib) = map(&[50, 4, 6, 4, 50], 0, 2);
        assert_eq!((slots.at, kib), (vec![0, 50 * KIB, 56 * KIB], 62));
        assert_eq!(slots.of, [0..1, 1..3, 1..3, 1..3, 0..1]);
        let (slots, kib) = map(&[50, 4, 6, 4, 50], 1, 2);
        assert_eq!((&slots.of[..2], &slots.of[4], kib), (&[0..1, 2..4][..], &(1..2), 112));
        assert_eq!((slots.count_from(1), slots.has_large(1)), (2, true));
        assert!(map(&[4, 50], 0, 2).0.has_large(0));
        // No more slots than there are shards for them.
        assert_eq!([map(&[4, 50], 0, 2).1, map(&[50, 4, 50], 0, 2).1, map(&[4, 4, 50], 0, 3).1], [54, 54, 58]);
    }

    #[test]
    fn slots_are_equal_where_that_takes_no_more_or_neighbours_are_large() {
        for (kib, own, count, all) in [
            (&[50, 4, 6, 4, 50][..], 0, 1, 50),
            (&[6, 4, 6, 4], 0, 2, 12),
            (&[8, 4, 4, 4], 0, 2, 16),
            (&[50, 50, 4, 4], 0, 2, 100),
            // Nothing is half as large as the largest.
            (&[6, 4, 6, 4, 4], 0, 3, 18),
            // Large ones that are no neighbours, but would be at once in three slots.
            (&[50, 4, 50, 4], 0, 3, 150),
            // One shard alone.
            (&[50, 4], 1, 2, 54),
        ] {
            let (slots, bytes) = map(kib, own, count);
            assert_eq!((bytes, slots.has_large(own)), (all, false), "{kib:?}");
        }
    }

    #[test]
    fn bytes_that_no_number_holds_are_as_many_as_one_does() {
        let bytes = [u64::MAX / 2; 3];
        let mut bump = Bump::default();
        SlotMap::new(&mut bump, &bytes, 0, 3);
        assert_eq!((bump.end, shared_bytes(&bytes, 3, true)[0]), (u64::MAX, u64::MAX));
    }

    /// Of any so many neighbours each can be in a slot of its own.
    #[test]
    fn neighbours_have_as_many_slots_as_with_equal_ones() {
        let kib: Vec<u64> = (0..40).map(|i| 1 + (i * 7919) % 13 + if i % 5 == 0 { 60 } else { 0 }).collect();
        for count in 2..8 {
            let (slots, _) = map(&kib, 0, count);
            assert_eq!(slots.has_large(0), count <= 5);
            for at_once in slots.of.windows(count) {
                let large = at_once.iter().filter(|slots| slots.len() == 1).count();
                assert!(large <= 1 && at_once.iter().all(|slots| slots.len() == 1 || slots.len() == count));
            }
        }
    }

    #[test]
    fn what_stays_is_what_no_later_visit_needs_the_slot_of() {
        let (slots, _) = map(&[50, 4, 6, 4, 50], 0, 2);
        assert_eq!([0, 1, 2, 3, 4].map(|s| slots.stays(s, 0)), [true, true, true, false, false]);
        assert_eq!([0, 1, 2, 3, 4].map(|s| slots.returns(s)), [false, false, true, true, true]);
    }
}
