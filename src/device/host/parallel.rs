//! Loops over threads and vectors that give the same bits whatever the number of threads.
//!
//! Work is split into chunks whose size depends on shapes alone, each chunk is computed by one thread, and no reduction
//! crosses chunks except in a written order. Threads come from the rayon pool that the caller has installed.

use rayon::prelude::*;

/// Runs `body` compiled for the widest vectors of this machine. Everything called inside must be `#[inline(always)]` to be
/// compiled so too.
#[inline(always)]
pub fn simd<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Elements of a chunk of an elementwise loop: large enough to pay for a task, small enough for the first-level cache.
pub const CHUNK: usize = 8192;

/// Calls `body(start, chunk)` for every chunk of `out`, `chunk_elems` long (the last may be shorter), on all threads.
pub fn for_each_chunk<T: Send>(out: &mut [T], chunk_elems: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    if out.len() <= chunk_elems {
        if !out.is_empty() {
            simd(|| body(0, out));
        }
        return;
    }
    out.par_chunks_mut(chunk_elems).enumerate().for_each(|(i, chunk)| simd(|| body(i * chunk_elems, chunk)));
}
