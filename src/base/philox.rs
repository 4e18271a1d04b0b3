//! Philox4x32-10, a counter-based random number generator (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers:
//! as easy as 1, 2, 3").
//!
//! A number depends only on its coordinates (seed, step, microbatch, op, element), never on earlier draws, so a
//! recomputed dropout repeats itself exactly and any split of the work over threads or shards gives the same bits.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox4x32: four random words for one counter under one key.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

/// The random numbers of one op in one microbatch of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// Step, from 0.
    pub step: u32,
    /// Microbatch within the step, from 0.
    pub microbatch: u32,
    /// The op's number in the whole model's graph.
    pub op: u32,
}

impl Stream {
    /// The four words for elements `4 * block` to `4 * block + 3`; `block` is below 2^32.
    #[inline(always)]
    pub fn words(&self, block: u64) -> [u32; 4] {
        debug_assert!(block < 1 << 32);
        philox([block as u32, self.op, self.microbatch, self.step], [self.seed as u32, (self.seed >> 32) as u32])
    }

    /// The word of one element.
    #[inline(always)]
    pub fn word(&self, element: u64) -> u32 {
        self.words(element / 4)[(element % 4) as usize]
    }
}

/// The smallest word that dropout keeps: a word below it, which has probability `p`, drops its element.
pub fn drop_below(p: f64) -> u32 {
    (p * 4_294_967_296.0).round().clamp(0.0, f64::from(u32::MAX)) as u32
}

/// A seeded sequence of numbers for host work outside ops: initial weights, shuffles, random data.
#[derive(Clone, Debug)]
pub struct Sequence {
    key: [u32; 2],
    stream: u64,
    next: u64,
    left: [u32; 4],
}

impl Sequence {
    /// The sequence numbered `stream` under `seed`; different numbers give independent sequences.
    pub fn new(seed: u64, stream: u64) -> Self {
        Sequence { key: [seed as u32, (seed >> 32) as u32], stream, next: 0, left: [0; 4] }
    }

    /// This sequence, starting at its word number `words`.
    pub fn from_word(&self, words: u64) -> Self {
        let mut later = Sequence { next: words - words % 4, ..self.clone() };
        (0..words % 4).for_each(|_| _ = later.next_u32());
        later
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        let at = (self.next % 4) as usize;
        if at == 0 {
            // The top bit of the last word keeps these apart from the ops' streams, whose steps stay below 2^31.
            let block = self.next / 4;
            let tag = 0x8000_0000 | (self.stream >> 32) as u32;
            self.left = philox([block as u32, (block >> 32) as u32, self.stream as u32, tag], self.key);
        }
        self.next += 1;
        self.left[at]
    }

    /// Uniform in [0, 1), with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        let high = u64::from(self.next_u32() >> 5);
        let low = u64::from(self.next_u32() >> 6);
        ((high << 26) | low) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n, without bias.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "a number below 0 was asked for");
        let zone = u64::MAX - u64::MAX % n;
        loop {
            let word = (u64::from(self.next_u32()) << 32) | u64::from(self.next_u32());
            if word < zone {
                return word % n;
            }
        }
    }

    /// Standard normal, by Box and Muller's transform in f64.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_sequence_can_be_entered_anywhere() {
        let whole = Sequence::new(7, 5);
        for words in [0, 1, 3, 4, 9] {
            let (mut walked, mut entered) = (whole.clone(), whole.from_word(words));
            (0..words).for_each(|_| _ = walked.next_u32());
            assert_eq!([walked.next_u32(), walked.next_u32()], [entered.next_u32(), entered.next_u32()], "{words}");
        }
    }

    #[test]
    fn sequences_are_uniform_and_apart() {
        let mut a = Sequence::new(7, 0);
        let mean = (0..10_000).map(|_| a.uniform()).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let square = (0..10_000).map(|_| a.normal().powi(2)).sum::<f64>() / 10_000.0;
        assert!((square - 1.0).abs() < 0.05, "{square}");
        assert_ne!(Sequence::new(7, 0).next_u32(), Sequence::new(7, 1).next_u32());
        assert!((0..1000).all(|_| a.below(7) < 7));
        assert_eq!(drop_below(0.0), 0);
        assert_eq!(drop_below(0.5), 1 << 31);
    }
}
