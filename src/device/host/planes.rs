//! Planes of `(N, C, H, W)` tensors: sums over a channel's planes, and writing planes of one channel from several
//! threads.
//!
//! A channel's values lie in N separate runs of memory. Its sum has one fixed order, planes in image order, whatever
//! the threads.

use super::{parallel::simd, real::Real};
use rayon::prelude::*;
use std::{marker::PhantomData, ops::Range};

/// Running sums of a plane sum; part of what the sum's bits depend on.
const LANES: usize = 32;
/// Channels below which one channel's planes are shared by several tasks, and the most parts they are then cut into.
const PARTS: usize = 16;
/// Elements of a run inside a plane, where planes are cut.
const RUN: usize = 16384;
/// Elements of an image that should be read one behind the other, for the memory's sake, and the most channels that are
/// then taken together.
const NEIGHBOURS: usize = 1024;
const BLOCK: usize = 16;

/// A slice that several threads write, each in ranges of its own.
///
/// Invariant: `start` points to `len` elements that stay borrowed mutably for `'a`.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `range`, whose caller promises that no two threads hold overlapping ranges.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Takes the slice for as long as the ranges are in use.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other range that is alive at the same time overlaps this one.
    #[allow(clippy::mut_from_ref)] // the point of the type; the caller's promise makes it sound
    #[inline(always)]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "range {start}+{len} of {} elements", self.len);
        // SAFETY: `start` was just checked to lie inside the slice.
        let first = unsafe { self.start.add(start) };
        // SAFETY: the range lies inside the slice borrowed for 'a, and the caller promises that no other one overlaps
        // it.
        unsafe { std::slice::from_raw_parts_mut(first, len) }
    }
}

/// How the planes of `(batch, channels, positions)` are walked channel by channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planes {
    channels: usize,
    positions: usize,
    /// Runs that a plane is cut into.
    runs_per_plane: usize,
    run: usize,
    run_count: usize,
    runs_per_part: usize,
}

impl Planes {
    /// The walk for these sizes. Tensors of few channels are cut into parts, so that all threads have work.
    pub(crate) fn new(batch: usize, channels: usize, positions: usize) -> Self {
        let run = if channels >= PARTS { positions } else { positions.min(RUN) }.max(1);
        let runs_per_plane = positions.div_ceil(run);
        let run_count = batch * runs_per_plane;
        let parts = if channels >= PARTS { 1 } else { PARTS.div_ceil(channels.max(1)) };
        Planes { channels, positions, runs_per_plane, run, run_count, runs_per_part: run_count.div_ceil(parts).max(1) }
    }

    /// Channels that are taken together: those of small planes, as many as leave work for all threads.
    pub(crate) fn block(&self) -> usize {
        (NEIGHBOURS / self.positions.max(1)).min(self.channels / PARTS).clamp(1, BLOCK)
    }

    fn parts(&self) -> usize {
        self.run_count.div_ceil(self.runs_per_part)
    }

    /// The runs of one part of a channel's planes, numbered.
    #[inline(always)]
    fn runs(&self, part: usize) -> Range<usize> {
        let first = part * self.runs_per_part;
        first..(first + self.runs_per_part).min(self.run_count)
    }

    /// Start and length of a channel's run.
    #[inline(always)]
    fn run_of(&self, run: usize, channel: usize) -> (usize, usize) {
        let (image, run) = (run / self.runs_per_plane, run % self.runs_per_plane);
        let start = run * self.run;
        ((image * self.channels + channel) * self.positions + start, self.run.min(self.positions - start))
    }

    /// Calls `body(index in the block, range)` for every run of a block of channels' planes, parts on several threads.
    pub(crate) fn for_each_run(&self, block: Range<usize>, body: impl Fn(usize, Range<usize>) + Sync) {
        (0..self.parts()).into_par_iter().for_each(|part| {
            simd(
                #[inline(always)]
                || {
                    for run in self.runs(part) {
                        for (index, channel) in block.clone().enumerate() {
                            let (start, len) = self.run_of(run, channel);
                            body(index, start..start + len);
                        }
                    }
                },
            );
        });
    }

    /// The sums over the planes of each channel of a block in f64. `terms` maps a value of `a` and of `b` at the same
    /// place, and the channel's shift, to the `N` addends; `shifts` is asked for an index in the block. Sums behind the
    /// block are 0.
    ///
    /// Inside a part, the element at place `i` of a run goes to running sum `i % 32`; a part's running sums are added
    /// pairwise (`lane[i] + lane[i + width]`, width 16, 8, 4, 2, 1), the parts in order from 0.
    ///
    /// # Panics
    /// When the block has more channels than [`Planes::block`] ever says.
    pub(crate) fn sums<T: Real, const N: usize>(
        &self,
        block: Range<usize>,
        a: &[T],
        b: &[T],
        shifts: impl Fn(usize) -> f64 + Sync,
        terms: impl Fn(T, T, f64) -> [f64; N] + Sync,
    ) -> [[f64; N]; BLOCK] {
        let mut parts = [[[0.0; N]; BLOCK]; PARTS];
        let parts = &mut parts[..self.parts()];
        parts.par_iter_mut().enumerate().for_each(|(part, sums)| {
            simd(
                #[inline(always)]
                || {
                    let mut lanes = [[[0.0; LANES]; N]; BLOCK];
                    for run in self.runs(part) {
                        for (index, channel) in block.clone().enumerate() {
                            let (start, len) = self.run_of(run, channel);
                            let shift = shifts(index);
                            add_run(
                                &mut lanes[index],
                                &a[start..],
                                &b[start..],
                                len,
                                #[inline(always)]
                                |a, b| terms(a, b, shift),
                            );
                        }
                    }
                    for (sums, lanes) in sums.iter_mut().zip(&lanes[..block.len()]) {
                        *sums = lanes.map(lanes_total);
                    }
                },
            );
        });
        let mut total = [[0.0; N]; BLOCK];
        for sums in parts {
            for (total, sum) in total.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
                *total += *sum;
            }
        }
        total
    }
}

/// Adds the terms of the first `len` elements of `a` and `b`.
#[inline(always)]
fn add_run<T: Real, const N: usize>(
    lanes: &mut [[f64; LANES]; N],
    a: &[T],
    b: &[T],
    len: usize,
    terms: impl Fn(T, T) -> [f64; N],
) {
    let (whole, rest) = (len - len % LANES, len % LANES);
    let (a_rows, b_rows) = (a[..whole].as_chunks().0, b[..whole].as_chunks().0);
    add_rows(
        lanes,
        a_rows,
        b_rows,
        #[inline(always)]
        |_, a, b| terms(a, b),
    );
    if rest > 0 {
        // A whole row again, so that it is vectors too: of what follows in memory where there is so much. The lanes
        // past the end add 0.
        let (mut a_copy, mut b_copy) = ([T::ZERO; LANES], [T::ZERO; LANES]);
        let (a, b) = match (a[whole..].first_chunk::<LANES>(), b[whole..].first_chunk::<LANES>()) {
            (Some(a), Some(b)) => (a, b),
            _ => {
                a_copy[..rest].copy_from_slice(&a[whole..len]);
                b_copy[..rest].copy_from_slice(&b[whole..len]);
                (&a_copy, &b_copy)
            }
        };
        add_rows(
            lanes,
            std::slice::from_ref(a),
            std::slice::from_ref(b),
            #[inline(always)]
            |lane, a, b| if lane < rest { terms(a, b) } else { [0.0; N] },
        );
    }
}

/// Adds the terms of whole rows of lanes, for a vector of lanes after the other: of all lanes at once the compiler
/// makes no vectors. `terms` is also given the lane.
#[inline(always)]
fn add_rows<T: Real, const N: usize>(
    lanes: &mut [[f64; LANES]; N],
    a: &[[T; LANES]],
    b: &[[T; LANES]],
    terms: impl Fn(usize, T, T) -> [f64; N],
) {
    const WIDTH: usize = 8;
    for first in (0..LANES).step_by(WIDTH) {
        let mut sums = [[0.0; WIDTH]; N];
        for (sums, lanes) in sums.iter_mut().zip(&*lanes) {
            sums.copy_from_slice(&lanes[first..first + WIDTH]);
        }
        for (a, b) in a.iter().zip(b) {
            for i in 0..WIDTH {
                let terms = terms(first + i, a[first + i], b[first + i]);
                for n in 0..N {
                    sums[n][i] += terms[n];
                }
            }
        }
        for (sums, lanes) in sums.iter().zip(&mut *lanes) {
            lanes[first..first + WIDTH].copy_from_slice(sums);
        }
    }
}

#[inline(always)]
fn lanes_total(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
