//! Runs a source ahead of its reader on a thread of its own.
//!
//! Full minibatches come through a bounded channel; used ones go back through another and are refilled. All buffers are
//! allocated at the start: `ahead` full ones and one held by the reader. Invariant: the thread waits for nothing but
//! room in the channel, so dropping the reader's end always ends it.

use super::{Batch, InputSpec, Source, check_ids};
use crate::base::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

/// How many minibatches are made ahead by default: one ready to be taken, one being made.
pub const DEFAULT_AHEAD: usize = 2;

/// Hands out the minibatches of a source, which is run ahead on its own thread.
pub struct Loader {
    spec: InputSpec,
    /// `None` only while being dropped.
    full: Option<Receiver<Result<Batch>>>,
    empty: SyncSender<Batch>,
    /// `None` only while being dropped.
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts at minibatch `first_index`, which counts over epochs, and runs `ahead` minibatches ahead (at least one).
    /// Every minibatch is checked with [`check_ids`].
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(source: Box<dyn Source>, first_index: u64, ahead: usize) -> Result<Loader> {
        let ahead = ahead.max(1);
        let spec = source.spec().clone();
        // The finished minibatch that the thread holds while the channel is full counts as made ahead.
        let (full_in, full) = sync_channel(ahead - 1);
        let (empty, empty_out) = sync_channel(ahead + 1);
        for _ in 0..=ahead {
            // The channel has room for all of them.
            let _ = empty.try_send(Batch::zeros(&spec));
        }
        let thread = Builder::new()
            .name("data".into())
            .spawn(move || run(source, first_index, &full_in, &empty_out))
            .map_err(|e| Error::Io { what: "cannot start the data thread".into(), source: e })?;
        Ok(Loader { spec, full: Some(full), empty, thread: Some(thread) })
    }

    /// What every minibatch looks like.
    pub fn spec(&self) -> &InputSpec {
        &self.spec
    }

    /// Waits for the next minibatch and takes it. Give it back with [`recycle`](Self::recycle) before taking another;
    /// otherwise each one is a new allocation.
    ///
    /// # Errors
    /// When the source fails or panics at this minibatch, or has ended after an earlier failure.
    pub fn next(&self) -> Result<Batch> {
        match self.full.as_ref().map(Receiver::recv) {
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Err(Error::bad("the data has ended with the error that was reported before")),
        }
    }

    /// Gives a minibatch back to be refilled. Never waits; a surplus buffer is freed.
    pub fn recycle(&self, batch: Batch) {
        let _ = self.empty.try_send(batch);
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Drop the channel first: the thread may be waiting for room in it.
        self.full = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the source has been caught and sent; nobody is left to receive another.
            let _ = thread.join();
        }
    }
}

/// The thread: fills and sends until there is an error or no receiver.
fn run(mut source: Box<dyn Source>, first_index: u64, full: &SyncSender<Result<Batch>>, empty: &Receiver<Batch>) {
    let mut index = first_index;
    loop {
        let mut batch = empty.try_recv().unwrap_or_default();
        // The source is not used again after a panic, so its possibly inconsistent state is never seen.
        let filled = catch_unwind(AssertUnwindSafe(|| {
            source.fill(index, &mut batch)?;
            check_ids(&batch).map_err(|e| Error::bad(format!("minibatch {index}: {e}")))
        }))
        .unwrap_or_else(|panic| {
            Err(Error::Device(format!("the data thread panicked at minibatch {index}: {}", panic_text(&*panic))))
        });
        let failed = filled.is_err();
        if full.send(filled.map(|()| batch)).is_err() || failed {
            return;
        }
        index += 1;
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
