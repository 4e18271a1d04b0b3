//! Loops over threads and vectors that give the same bits whatever the number of threads.
//!
//! Work is split into chunks whose size depends on shapes alone, each chunk is computed by one thread, and no reduction
//! crosses chunks except in a written order. Threads come from the rayon pool that the caller has installed.

use super::real::Real;
use rayon::prelude::*;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs `body` compiled for the widest vectors of this machine. Everything called inside must be `#[inline(always)]` to
/// be compiled so too, and `body` itself must be small; for more than a few operations use `vector_fn!`.
#[inline(always)]
pub fn simd<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Defines a function whose body is compiled for the widest vectors of this machine, picked when it is called.
///
/// Unlike a closure given to [`simd`], which the compiler leaves out of line when it is large and then compiles for the
/// narrowest vectors, the body is always inlined. So must be what it calls in its loops: functions marked
/// `#[inline(always)]`, such as [`Real`]'s, `for` loops, and closures of a few operations only.
macro_rules! vector_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$($generic:ident: $bound:path),*>($($arg:ident: $type:ty),* $(,)?) $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name<$($generic: $bound),*>($($arg: $type),*) {
            struct Call<Args, $($generic),*>(Args, std::marker::PhantomData<($($generic,)*)>);
            impl<$($generic: $bound),*> pulp::WithSimd for Call<($($type,)*), $($generic),*> {
                type Output = ();
                #[inline(always)]
                fn with_simd<Simd: pulp::Simd>(self, _: Simd) {
                    let ($($arg,)*) = self.0;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Call(($($arg,)*), std::marker::PhantomData::<($($generic,)*)>))
        }
    };
}
pub(crate) use vector_fn;

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

thread_local! {
    /// Scratch buffers that are not in use, the last used on top. u64, because nothing here needs a greater alignment.
    static KEPT: RefCell<Vec<Vec<u64>>> = const { RefCell::new(Vec::new()) };
}

/// The most scratch that any thread has asked for, in words of 8 bytes.
static MOST_SCRATCH: AtomicUsize = AtomicUsize::new(0);

/// The most scratch that any thread has asked for so far, in words of 8 bytes.
pub fn most_scratch() -> usize {
    MOST_SCRATCH.load(Ordering::Relaxed)
}

/// Gives this thread a scratch buffer of at least `words` words of 8 bytes. Which thread meets a size first is the
/// scheduler's luck; called on all of them once a size is known, it keeps later steps from allocating.
pub fn reserve_scratch(words: usize) {
    KEPT.with_borrow_mut(|kept| {
        if kept.is_empty() {
            kept.push(Vec::new());
        }
        let top = kept.last_mut().expect("filled just above");
        top.resize(words.max(top.len()), 0);
    });
}

/// Calls `body` with `len` elements of scratch memory of this thread. What they hold is left from earlier uses: write
/// before you read.
///
/// The memory is kept for the next call, so that a step allocates nothing once every size has been seen. Calls may
/// nest; each level has its own memory. Do not start parallel work inside `body`: the thread could take up another task
/// that asks for scratch, and the kept memory would grow with the luck of the schedule.
pub fn with_scratch<T: bytemuck::Pod, R>(len: usize, body: impl FnOnce(&mut [T]) -> R) -> R {
    let words = (len * size_of::<T>()).div_ceil(8);
    if words > most_scratch() {
        MOST_SCRATCH.fetch_max(words, Ordering::Relaxed);
    }
    let mut buffer = KEPT.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    let result = body(&mut bytemuck::cast_slice_mut::<u64, T>(&mut buffer[..words])[..len]);
    KEPT.with_borrow_mut(|kept| kept.push(buffer));
    result
}

/// Scratch memory that the threads of an op share, kept from op to op, so that a step allocates nothing once every size
/// has been seen.
#[derive(Default)]
pub struct SharedScratch(Vec<u64>);

impl SharedScratch {
    /// `len` elements. What they hold is left from earlier uses: write before you read.
    pub fn take<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        let words = (len * size_of::<T>()).div_ceil(8);
        if self.0.len() < words {
            self.0.resize(words, 0);
        }
        &mut bytemuck::cast_slice_mut::<u64, T>(&mut self.0[..words])[..len]
    }
}

/// Calls `body(i)` for every i below `count`, on all threads.
pub fn for_each_index(count: usize, body: impl Fn(usize) + Sync + Send) {
    (0..count).into_par_iter().with_max_len(1).for_each(body);
}

/// A function of one element, as a type: so it is inlined where a closure may not be.
pub trait Unary<T>: Sync {
    /// Its value; to be marked `#[inline(always)]`.
    fn apply(x: T) -> T;
}

/// A function of two elements, as a type.
pub trait Binary<T>: Sync {
    /// Its value; to be marked `#[inline(always)]`.
    fn apply(a: T, b: T) -> T;
}

/// `out[i] = F(x[i])`, or `F(out[i])` where `x` is `None`.
///
/// # Panics
/// When the lengths differ.
pub fn map<T: Real, F: Unary<T>>(out: &mut [T], x: Option<&[T]>) {
    if let Some(x) = x {
        expect_len("map", "x", x.len(), out.len());
    }
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        let x = x.map(|x| &x[i * CHUNK..][..out.len()]);
        map_chunk::<T, F>(out, x);
    });
}

vector_fn! {
    fn map_chunk<T: Real, F: Unary<T>>(out: &mut [T], x: Option<&[T]>) {
        match x {
            Some(x) => {
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = F::apply(x);
                }
            }
            None => {
                for out in out {
                    *out = F::apply(*out);
                }
            }
        }
    }
}

/// `out[i] = F(a[i], b[i])`, or `F(out[i], b[i])` where `a` is `None`.
///
/// # Panics
/// When the lengths differ.
pub fn zip<T: Real, F: Binary<T>>(out: &mut [T], a: Option<&[T]>, b: &[T]) {
    if let Some(a) = a {
        expect_len("zip", "a", a.len(), out.len());
    }
    expect_len("zip", "b", b.len(), out.len());
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
        let a = a.map(|a| &a[i * CHUNK..][..out.len()]);
        let b = &b[i * CHUNK..][..out.len()];
        zip_chunk::<T, F>(out, a, b);
    });
}

vector_fn! {
    /// [`zip`] on the calling thread.
    pub fn zip_chunk<T: Real, F: Binary<T>>(out: &mut [T], a: Option<&[T]>, b: &[T]) {
        match a {
            Some(a) => {
                for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
                    *out = F::apply(a, b);
                }
            }
            None => {
                for (out, &b) in out.iter_mut().zip(b) {
                    *out = F::apply(*out, b);
                }
            }
        }
    }
}

/// Addition.
pub struct Sum;
impl<T: Real> Binary<T> for Sum {
    #[inline(always)]
    fn apply(a: T, b: T) -> T {
        a + b
    }
}

/// Calls `body(i, i * stride, x[i * stride])` for the first `count` elements that lie `stride` apart.
#[inline(always)]
pub fn for_each_strided<T: Copy>(x: &[T], count: usize, stride: usize, mut body: impl FnMut(usize, u32, T)) {
    match stride {
        1 => x[..count].iter().enumerate().for_each(|(i, &x)| body(i, i as u32, x)),
        2 => {
            // By whole pairs, which become vectors.
            let pairs = x.as_chunks::<2>().0;
            let whole = count.min(pairs.len());
            pairs[..whole].iter().enumerate().for_each(|(i, pair)| body(i, i as u32 * 2, pair[0]));
            (whole..count).for_each(|i| body(i, i as u32 * 2, x[i * 2]));
        }
        _ => {
            let strided = x.iter().step_by(stride).take(count);
            strided.enumerate().for_each(|(i, &x)| body(i, i as u32 * stride as u32, x));
        }
    }
}

/// Checks a length that the caller promised.
///
/// # Panics
/// When `len` is not `want`: a bug of ours, since shapes are checked when a graph is built.
#[inline]
#[track_caller]
pub fn expect_len(op: &str, name: &str, len: usize, want: usize) {
    assert!(len == want, "{op}: {name} is {len} long, want {want}");
}

/// Rows of a chunk of about [`CHUNK`] elements, for ops that treat a row of `cols` as one thing; at least 1.
pub fn rows_per_chunk(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_kept_and_nests() {
        let first = with_scratch::<f32, _>(1023, |outer| {
            outer.fill(1.0);
            let inner = with_scratch::<f64, _>(33, |inner| {
                inner.fill(2.0);
                inner.as_ptr() as usize
            });
            assert!(outer.iter().all(|&x| x == 1.0));
            (outer.as_ptr() as usize, inner)
        });
        let second = with_scratch::<f32, _>(1000, |outer| outer.as_ptr() as usize);
        assert_eq!(first.0, second, "the outer buffer was put back last and is taken first");
        with_scratch::<f32, _>(0, |empty| assert!(empty.is_empty()));
    }

    #[test]
    fn chunks_cover_all() {
        for len in [0, 1, 31, CHUNK, CHUNK + 1, 3 * CHUNK + 7] {
            let mut out = vec![0usize; len];
            for_each_chunk(&mut out, CHUNK, |start, chunk| {
                for (i, x) in chunk.iter_mut().enumerate() {
                    *x += start + i + 1;
                }
            });
            assert!(out.iter().enumerate().all(|(i, &x)| x == i + 1), "{len}");
        }
    }
}
