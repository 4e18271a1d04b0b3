//! One allocation, shared by lanes: the store of the host, or a device's arena.
//!
//! Invariant: two tasks that touch the same byte, one of them writing, are ordered by tickets. The executor derives
//! those tickets from the tasks' own spans (`engine::hazards`); the methods here are unsafe because the compiler cannot
//! see that order.

use crate::base::{Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::{PoisonError, RwLock};

/// Aligned like a page, so that no buffer shares a line with another allocation.
const PAGE: usize = 4096;

/// What untouched memory holds when a test asks for it: a NaN as f32 and as f64, a wild index as i32.
pub const POISON: u8 = 0xFF;

/// Zeroed memory of a fixed size.
#[derive(Debug)]
pub struct Block {
    start: *mut u8,
    bytes: usize,
    /// What is this block's to free, if it is its own.
    owned: Option<(*mut u8, Layout)>,
}

// SAFETY: a block is plain bytes; who may touch which is settled by tickets, as the module says.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// `bytes` zeroed bytes. Those that nobody touches cost no memory: the allocator asks the system for zeroed pages
    /// as long as no alignment is asked of it, so the block is aligned here.
    ///
    /// # Errors
    /// When the system has no such memory.
    pub fn new(bytes: u64, what: &str) -> Result<Block> {
        let refused = || Error::Device(format!("cannot allocate {bytes} bytes for {what}"));
        let bytes = usize::try_from(bytes).map_err(|_| refused())?;
        let with_room = bytes.checked_add(PAGE).ok_or_else(refused)?;
        let layout = Layout::from_size_align(with_room, 1).map_err(|_| refused())?;
        // SAFETY: the layout's size is at least a page.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            return Err(refused());
        }
        // SAFETY: the next multiple of a page is at most a page less one byte away, inside the allocation.
        let start = unsafe { base.add(base.addr().next_multiple_of(PAGE) - base.addr()) };
        Ok(Block { start, bytes, owned: Some((base, layout)) })
    }

    /// A block over memory that somebody else owns.
    ///
    /// # Safety
    /// `start` is page-aligned and good for `bytes` initialised bytes as long as the block lives.
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    pub unsafe fn borrowed(start: *mut u8, bytes: u64) -> Block {
        Block { start, bytes: bytes as usize, owned: None }
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The address of `offset`, with `bytes` after it inside the block.
    ///
    /// # Panics
    /// When the stretch is not inside the block: our own bug.
    pub fn at(&self, offset: u64, bytes: u64) -> *mut u8 {
        let end = offset.checked_add(bytes).expect("a span's end fits in 64 bits");
        assert!(end <= self.bytes as u64, "bytes {offset}..{end} of a block of {}", self.bytes);
        // SAFETY: the offset is at most the block's size, as just checked.
        unsafe { self.start.add(offset as usize) }
    }

    /// The stretch as a slice.
    ///
    /// # Safety
    /// No task that writes there runs while the slice lives.
    pub unsafe fn slice(&self, offset: u64, bytes: u64) -> &[u8] {
        let start = self.at(offset, bytes);
        // SAFETY: inside the block (`at`), initialised (zeroed), and unwritten by the caller's promise.
        unsafe { std::slice::from_raw_parts(start, bytes as usize) }
    }

    /// The stretch as a mutable slice.
    ///
    /// # Safety
    /// No other task touches it while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the order of tasks is what makes it exclusive")]
    pub unsafe fn slice_mut(&self, offset: u64, bytes: u64) -> &mut [u8] {
        let start = self.at(offset, bytes);
        // SAFETY: inside the block (`at`), initialised (zeroed), and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, bytes as usize) }
    }

    /// Fills the block with [`POISON`].
    pub fn poison(&mut self) {
        // SAFETY: `&mut self`, so no lane holds the block yet.
        unsafe { self.slice_mut(0, self.bytes as u64) }.fill(POISON);
    }

    /// One past the last byte that is no longer [`POISON`].
    ///
    /// # Safety
    /// No task runs.
    pub unsafe fn unpoisoned_bytes(&self) -> u64 {
        // SAFETY: no task runs, by the caller's promise.
        let all = unsafe { self.slice(0, self.bytes as u64) };
        all.iter().rposition(|&b| b != POISON).map_or(0, |i| i as u64 + 1)
    }
}

/// The host's store: blocks end to end, to which more may be added while tasks run. No stretch reaches over two.
#[derive(Debug)]
pub struct Store {
    /// Each with the offset where it begins, in order; none is ever taken away.
    blocks: RwLock<Vec<(u64, Block)>>,
}

impl Store {
    /// A store of one block.
    pub fn new(block: Block) -> Store {
        Store { blocks: RwLock::new(vec![(0, block)]) }
    }

    /// Adds a block and gives the offset where it begins.
    pub fn add(&self, block: Block) -> u64 {
        let mut blocks = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        let base = blocks.last().map_or(0, |(base, last)| (base + last.bytes()).next_multiple_of(PAGE as u64));
        blocks.push((base, block));
        base
    }

    /// One past the last byte.
    pub fn bytes(&self) -> u64 {
        let blocks = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
        blocks.last().map_or(0, |(base, last)| base + last.bytes())
    }

    /// The address of `offset`, with `bytes` after it inside one block.
    fn at(&self, offset: u64, bytes: u64) -> *mut u8 {
        let blocks = self.blocks.read().unwrap_or_else(PoisonError::into_inner);
        let (base, block) = &blocks[blocks.partition_point(|(base, _)| *base <= offset) - 1];
        block.at(offset - base, bytes)
    }

    /// The stretch as a slice.
    ///
    /// # Safety
    /// No task that writes there runs while the slice lives.
    pub unsafe fn slice(&self, offset: u64, bytes: u64) -> &[u8] {
        let start = self.at(offset, bytes);
        // SAFETY: inside a block (`at`), which lives as long as the store and does not move; initialised, and unwritten
        // by the caller's promise.
        unsafe { std::slice::from_raw_parts(start, bytes as usize) }
    }

    /// The stretch as a mutable slice.
    ///
    /// # Safety
    /// No other task touches it while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the order of tasks is what makes it exclusive")]
    pub unsafe fn slice_mut(&self, offset: u64, bytes: u64) -> &mut [u8] {
        let start = self.at(offset, bytes);
        // SAFETY: inside a block (`at`), which lives as long as the store and does not move; initialised, and exclusive
        // by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, bytes as usize) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some((base, layout)) = self.owned {
            // SAFETY: allocated by `new` with this layout, and freed once.
            unsafe { dealloc(base, layout) };
        }
    }
}
