//! Planes of `(N, C, H, W)` tensors: sums over a channel's planes, and writing planes of one channel from several threads.
//!
//! A channel's values lie in N separate runs of memory. Its sum has one fixed order, planes in image order, whatever the threads.

use super::{parallel::simd, real::Real};
use rayon::prelude::*;
use std::{marker::PhantomData, ops::Range};

/// Running sums of a plane sum; part of what the sum's bits depend on.
const LANES: usize = 32;
/// Channels below which one channel's planes are shared by several tasks, and the most parts they are then cut into.
const PARTS: usize = 16;
/// Elements of a run inside a plane, where planes are cut.
const RUN: usize = 16384;

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
        // SAFETY: the range lies inside the slice borrowed for 'a, and the caller promises that no other one overlaps it.
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
    runs: usize,
    runs_per_part: usize,
}

impl Planes {
    /// The walk for these sizes. Tensors of few channels are cut into parts, so that all threads have work.
    pub(crate) fn new(batch: usize, channels: usize, positions: usize) -> Self {
        let run = if channels >= PARTS { positions } else { positions.min(RUN) }.max(1);
        let runs_per_plane = positions.div_ceil(run);
        let runs = batch * runs_per_plane;
        let parts = if channels >= PARTS { 1 } else { PARTS.div_ceil(channels.max(1)) };
        Planes { channels, positions, runs_per_plane, run, runs, runs_per_part: runs.div_ceil(parts).max(1) }
    }

    fn parts(&self) -> usize {
        self.runs.div_ceil(self.runs_per_part)
    }

    /// The runs of one part of a channel's planes, each as start and length.
    #[inline(always)]
    fn runs(&self, channel: usize, part: usize) -> impl Iterator<Item = (usize, usize)> {
        let first = part * self.runs_per_part;
        let walk = *self;
        (first..(first + self.runs_per_part).min(self.runs)).map(move |run| {
            let (image, run) = (run / walk.runs_per_plane, run % walk.runs_per_plane);
            let start = run * walk.run;
            let len = walk.run.min(walk.positions - start);
            ((image * walk.channels + channel) * walk.positions + start, len)
        })
    }

    /// Calls `body(range)` for every run of a channel's planes, parts on several threads.
    pub(crate) fn for_each_run(&self, channel: usize, body: impl Fn(Range<usize>) + Sync) {
        (0..self.parts()).into_par_iter().for_each(|part| {
            simd(
                #[inline(always)]
                || {
                    for (start, len) in self.runs(channel, part) {
                        body(start..start + len);
                    }
                },
            );
        });
    }

    /// The sums over one channel's planes in f64. `terms` maps a value of `a` and of `b` at the same place to the `N` addends.
    ///
    /// Inside a part, the element at place `i` of a run goes to running sum `i % 32`; a part's running sums are added pairwise
    /// (`lane[i] + lane[i + width]`, width 16, 8, 4, 2, 1), the parts in order from 0.
    pub(crate) fn sums<T: Real, const N: usize>(
        &self,
        channel: usize,
        a: &[T],
        b: &[T],
        terms: impl Fn(T, T) -> [f64; N] + Sync,
    ) -> [f64; N] {
        let mut parts = [[0.0; N]; PARTS];
        let parts = &mut parts[..self.parts()];
        parts.par_iter_mut().enumerate().for_each(|(part, sums)| {
            simd(
                #[inline(always)]
                || {
                    let mut lanes = [[0.0; LANES]; N];
                    for (start, len) in self.runs(channel, part) {
                        add_run(&mut lanes, &a[start..], &b[start..], len, &terms);
                    }
                    *sums = lanes.map(lanes_total);
                },
            );
        });
        let mut total = [0.0; N];
        for sums in parts {
            for (total, sum) in total.iter_mut().zip(sums) {
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
    terms: &impl Fn(T, T) -> [f64; N],
) {
    let (whole, rest) = (len - len % LANES, len % LANES);
    let mut sums = *lanes;
    let (a_rows, b_rows) = (a[..whole].as_chunks::<LANES>().0, b[..whole].as_chunks::<LANES>().0);
    for (a, b) in a_rows.iter().zip(b_rows) {
        for n in 0..N {
            for lane in 0..LANES {
                sums[n][lane] += terms(a[lane], b[lane])[n];
            }
        }
    }
    if rest > 0 {
        // A whole row again, so that it is vectors too: of what follows in memory where there is so much. The lanes past the end add 0.
        let (mut a_copy, mut b_copy) = ([T::ZERO; LANES], [T::ZERO; LANES]);
        let (a, b) = match (a[whole..].first_chunk::<LANES>(), b[whole..].first_chunk::<LANES>()) {
            (Some(a), Some(b)) => (a, b),
            _ => {
                a_copy[..rest].copy_from_slice(&a[whole..len]);
                b_copy[..rest].copy_from_slice(&b[whole..len]);
                (&a_copy, &b_copy)
            }
        };
        for n in 0..N {
            for lane in 0..LANES {
                let addend = terms(a[lane], b[lane])[n];
                sums[n][lane] += if lane < rest { addend } else { 0.0 };
            }
        }
    }
    *lanes = sums;
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
