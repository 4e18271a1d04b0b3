//! Rows of a matrix inside a larger one, such as q, k and v inside one (rows, 3C) tensor, read and written by many
//! threads.
//!
//! Invariant of [`RowsMut`]: the memory is borrowed for writing for as long as the view lives, the rows are inside it,
//! and no two views of one memory have an element in common.

use super::gemm::Matrix;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows to read: element (r, c) is `data[offset + r * stride + c]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// The memory that the rows are in.
    pub data: &'a [T],
    /// Elements before the first row.
    pub offset: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a, T> Rows<'a, T> {
    /// The rows from `row` and the columns from `col` on, as a matrix.
    pub fn matrix(&self, row: usize, col: usize) -> Matrix<'a, T> {
        let start = (self.offset + row * self.stride + col).min(self.data.len());
        Matrix { data: &self.data[start..], row_stride: self.stride, col_stride: 1 }
    }
}

/// Rows to write, `width` elements each: element (r, c) is `data[offset + r * stride + c]`.
pub struct RowsMut<'a, T> {
    data: *mut T,
    rows: usize,
    offset: usize,
    stride: usize,
    width: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: the view is a mutable borrow of T's, which may move to another thread when T may. Rows are only handed out by
// the unsafe `row`, whose callers promise that no two threads get the same elements.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: as above: a shared view gives access to elements through the unsafe `row` alone.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// A matrix of its own memory: all of `data`, in rows of `width`.
    pub fn whole(data: &'a mut [T], width: usize) -> Self {
        let [rows, _] = Self::split(data, width, [0..width, width..width]);
        rows
    }

    /// Cuts rows of `stride` elements by columns, so that each range of columns is a view of its own.
    ///
    /// # Panics
    /// When the ranges overlap, are out of order, or end after `stride`; or when `data` is not whole rows.
    pub fn split<const N: usize>(data: &'a mut [T], stride: usize, columns: [Range<usize>; N]) -> [Self; N] {
        let mut end = 0;
        for range in &columns {
            assert!(end <= range.start && range.start <= range.end, "columns {columns:?} overlap or are out of order");
            end = range.end;
        }
        assert!(end <= stride, "columns {columns:?} end after the stride of {stride}");
        let rows = data.len().checked_div(stride).unwrap_or(0);
        assert!(rows * stride == data.len(), "{} elements are not rows of {stride}", data.len());
        let data = data.as_mut_ptr();
        columns.map(|range| RowsMut {
            data,
            rows,
            offset: range.start,
            stride,
            width: range.len(),
            memory: PhantomData,
        })
    }

    /// Rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Elements `columns` of row `row`.
    ///
    /// # Safety
    /// While the result lives, nobody else asks this view for any of the same elements.
    ///
    /// # Panics
    /// When they are outside the view.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        assert!(
            row < self.rows && columns.start <= columns.end && columns.end <= self.width,
            "row {row}, columns {columns:?} are outside a view of {} rows of {}",
            self.rows,
            self.width
        );
        let start = self.offset + row * self.stride + columns.start;
        // SAFETY: `split` made sure that `rows` rows of `stride` are inside the memory and that offset + width <=
        // stride.
        let first = unsafe { self.data.add(start) };
        // SAFETY: those elements are inside the memory as above, it is borrowed for writing for 'a, views of one memory
        // are disjoint by `split`, and the caller promises that this view's are not handed out twice.
        unsafe { std::slice::from_raw_parts_mut(first, columns.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_views_cover_their_columns() {
        let mut data = vec![0; 3 * 7];
        let [a, b] = RowsMut::split(&mut data, 7, [0..2, 3..7]);
        assert_eq!([a.rows(), a.width(), b.rows(), b.width()], [3, 2, 3, 4]);
        for row in 0..3 {
            // SAFETY: each row is asked for once and dropped.
            unsafe { a.row(row, 0..2) }.fill(1);
            // SAFETY: as above.
            unsafe { b.row(row, 1..4) }.fill(2);
        }
        assert_eq!(data, [1, 1, 0, 0, 2, 2, 2].repeat(3));
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_views_are_refused() {
        RowsMut::split(&mut [0; 8], 4, [0..3, 2..4]);
    }

    #[test]
    #[should_panic(expected = "outside a view of 2 rows of 2")]
    fn rows_outside_are_refused() {
        let mut data = [0; 8];
        let [_, view] = RowsMut::split(&mut data, 4, [0..1, 2..4]);
        // SAFETY: asked for once.
        unsafe { view.row(1, 1..3) };
    }
}
