//! Matrix products: a safe face on the `gemm` crate.
//!
//! Each element of the result is one sum over k in an order that depends on the shapes and the machine alone: the crate
//! splits tiles of the result over threads, never a sum, so the bits are the same for any number of threads (there is a
//! test).

use super::real::Real;

/// A matrix to read: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    /// The memory that the elements are in.
    pub data: &'a [T],
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Rows after each other, `cols` elements each.
    pub fn rows(data: &'a [T], cols: usize) -> Self {
        Matrix { data, row_stride: cols, col_stride: 1 }
    }

    /// Rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Matrix { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }
}

/// Which threads a product runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// All of the current rayon pool.
    All,
    /// The caller's only: for products inside a parallel loop.
    One,
}

/// Makes this thread take the buffer that the gemm crate keeps for it, as large as the second-level cache. Else the
/// first product that it shares in takes it, and on a busy machine that may be many steps later.
pub fn reserve() {
    // Of whole vectors, adjacent: of others it packs elsewhere.
    const SIZE: usize = 64;
    let (mut out, factor) = (vec![0f32; SIZE * SIZE], vec![0f32; SIZE * SIZE]);
    let factor = Matrix::rows(&factor, SIZE);
    gemm(&mut out, SIZE, factor, factor, [SIZE; 3], false, Threads::One);
}

/// `out (m, n) = a (m, k) b (k, n)`, or `out +=` that with `accumulate`. `out` has rows `out_stride` apart, elements
/// adjacent.
///
/// Without `accumulate` nothing of `out` is read. With k = 0 the product is 0.
///
/// # Panics
/// When a matrix does not fit its memory, or rows of `out` overlap.
pub fn gemm<T: Real>(
    out: &mut [T],
    out_stride: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    [m, n, k]: [usize; 3],
    accumulate: bool,
    threads: Threads,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(m == 1 || out_stride >= n, "gemm: rows of {n} every {out_stride} elements overlap");
    assert_fits("out", out.len(), [m, n], [out_stride, 1]);
    assert_fits("a", a.data.len(), [m, k], [a.row_stride, a.col_stride]);
    assert_fits("b", b.data.len(), [k, n], [b.row_stride, b.col_stride]);
    let parallelism = match threads {
        Threads::All => ::gemm::Parallelism::Rayon(rayon::current_num_threads()),
        Threads::One => ::gemm::Parallelism::None,
    };
    // SAFETY: T is f32 or f64, which the crate has kernels for. The asserts above show that every element of the three
    // matrices is inside its slice, and `out` is borrowed for writing, so it overlaps neither `a` nor `b`.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Panics unless the last element of a matrix of these sizes and strides is below `len`.
fn assert_fits(name: &str, len: usize, sizes: [usize; 2], strides: [usize; 2]) {
    if sizes[0] == 0 || sizes[1] == 0 {
        return;
    }
    let last = (sizes[0] - 1)
        .checked_mul(strides[0])
        .zip((sizes[1] - 1).checked_mul(strides[1]))
        .and_then(|(rows, cols)| rows.checked_add(cols));
    assert!(
        last.is_some_and(|last| last < len) && len <= isize::MAX as usize / 2,
        "gemm: {name} is {len} long, too short for {}x{} with strides {} and {}",
        sizes[0],
        sizes[1],
        strides[0],
        strides[1]
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::host::testing::{assert_close, normal, poison, same_in_all_pools};

    fn naive(a: &[f64], b: &[f64], [m, n, k]: [usize; 3]) -> Vec<f64> {
        (0..m * n).map(|e| (0..k).map(|l| a[e / n * k + l] * b[l * n + e % n]).sum()).collect()
    }

    fn transpose<T: Copy>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
        (0..rows * cols).map(|e| x[e % rows * cols + e / rows]).collect()
    }

    /// All four layouts of the operands, overwriting poison and accumulating, against a plain loop in f64; and the same
    /// bits on 1, 2 and 3 threads and on one thread without the pool.
    fn check<T: Real>([m, n, k]: [usize; 3], tolerance: f64) {
        let (a, b) = (normal::<T>(m * k, 1), normal::<T>(k * n, 2));
        let (a_t, b_t) = (transpose(&a, m, k), transpose(&b, k, n));
        let start = normal::<T>(m * n, 3);
        let wide = |x: &[T]| x.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        let product = naive(&wide(&a), &wide(&b), [m, n, k]);
        let sum: Vec<f64> = product.iter().zip(wide(&start)).map(|(p, s)| p + s).collect();
        let operands = [
            (Matrix::rows(&a, k), Matrix::rows(&b, n)),
            (Matrix::rows(&a_t, m).transposed(), Matrix::rows(&b, n)),
            (Matrix::rows(&a, k), Matrix::rows(&b_t, k).transposed()),
            (Matrix::rows(&a_t, m).transposed(), Matrix::rows(&b_t, k).transposed()),
        ];
        let run = |threads| {
            let mut results = Vec::new();
            for (a, b) in operands {
                let mut out = poison::<T>(m * n);
                gemm(&mut out, n, a, b, [m, n, k], false, threads);
                results.push(out);
                let mut out = start.clone();
                gemm(&mut out, n, a, b, [m, n, k], true, threads);
                results.push(out);
            }
            results
        };
        let results = same_in_all_pools(|| run(Threads::All));
        for (got, one) in results.iter().zip(run(Threads::One)) {
            assert_eq!(
                bytemuck::cast_slice::<T, u8>(got),
                bytemuck::cast_slice::<T, u8>(&one),
                "{m} {n} {k}: one thread"
            );
        }
        for (i, got) in results.iter().enumerate() {
            let want = if i % 2 == 0 { &product } else { &sum };
            assert_close(got, want, tolerance, &format!("{m}x{n}x{k} layout {}", i / 2));
        }
    }

    #[test]
    fn right_and_same_bits_on_any_number_of_threads() {
        let sizes = [1, 2, 7, 33, 129, 384];
        for m in sizes {
            for n in sizes {
                for k in sizes {
                    // The sum of k products of normals, rounded k times: far below 1e-6 of the greatest element's
                    // order.
                    check::<f32>([m, n, k], 1e-5);
                }
            }
        }
        for shape in [[1, 1, 1], [7, 33, 129], [129, 130, 131]] {
            check::<f64>(shape, 1e-13);
        }
    }

    #[test]
    fn empty_sizes() {
        for shape in [[0, 3, 2], [3, 0, 2], [3, 5, 0], [0, 0, 0], [1, 1, 0]] {
            check::<f32>(shape, 0.0);
        }
    }

    #[test]
    fn rows_apart_leave_the_gaps_alone() {
        let (a, b) = (normal::<f32>(6, 1), normal::<f32>(8, 2));
        let mut out = [9.0; 3 * 7];
        gemm(&mut out[..18], 7, Matrix::rows(&a, 2), Matrix::rows(&b, 4), [3, 4, 2], false, Threads::All);
        for (i, x) in out.iter().enumerate() {
            assert_eq!(*x == 9.0, i % 7 >= 4, "{i}");
        }
    }

    #[test]
    #[should_panic(expected = "gemm: b is 7 long, too short for 2x4 with strides 4 and 1")]
    fn short_memory_is_refused() {
        gemm(
            &mut [0f32; 12],
            4,
            Matrix::rows(&[0.0; 6], 2),
            Matrix::rows(&[0.0; 7], 4),
            [3, 4, 2],
            false,
            Threads::All,
        );
    }
}
