//! The recorder: takes every event from the executor and never delays it.
//!
//! `record` adds to the sums and puts a copy into a bounded ring; a writer thread drains the ring into the trace file.
//! An event that finds the ring full is counted as dropped; the executor does not wait. Events themselves are kept only
//! for the first and the last steps; since a run may end early (a failure, an early stop), the events of the last steps
//! so far are also held in a bounded window.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::chrome::ChromeWriter;
use super::utilisation::add_to_sums;
use super::{Event, LaneSum};
use crate::base::{Error, LaneId, Result};

/// How long the writer sleeps once the ring is empty. While it sleeps, `record` has no thread to wake and makes no
/// system call.
const REST: Duration = Duration::from_millis(2);

/// Which steps' events are kept; sums are kept for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// This many of each model's first steps.
    pub first: u64,
    /// This many of each model's last steps.
    pub last: u64,
    /// Steps of the longest model; `u64::MAX` where unknown. The last steps of a model that ends earlier are taken from
    /// the window.
    pub total_steps: u64,
}

impl Keep {
    /// Whether the step is written immediately: it is known to be among its model's last steps, or among the first
    /// after `begin`, the step from which the model goes on.
    fn is_certain(&self, step: u64, begin: u64) -> bool {
        step < self.first.saturating_add(begin) || (self.last > 0 && step.saturating_add(self.last) >= self.total_steps)
    }
}

/// How to record.
#[derive(Clone, Debug)]
pub struct RecorderOptions {
    /// The steps whose events are kept.
    pub keep: Keep,
    /// All lanes; each gets a row even if nothing runs on it.
    pub lanes: Vec<LaneId>,
    /// Names of the models, by number, for readers of the file.
    pub models: Vec<String>,
    /// The steps from which models go on, by model number; 0 beyond the list.
    pub begins: Vec<u64>,
    /// Capacity of the ring in events (about 80 bytes each); at least 1.
    pub ring_events: usize,
    /// Capacity in events of the window of last steps, for runs that end early.
    pub window_events: usize,
}

impl RecorderOptions {
    /// Options with a ring and a window for tens of thousands of events, about 8 MB together.
    pub fn new(keep: Keep, lanes: Vec<LaneId>, models: Vec<String>) -> Self {
        RecorderOptions { keep, lanes, models, begins: Vec::new(), ring_events: 1 << 16, window_events: 1 << 15 }
    }
}

/// The summary of a run's recording.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Events in the file.
    pub written: u64,
    /// Events that found the ring full; they are in the sums but not in the file.
    pub dropped: u64,
    /// Events of the last steps of a run that ended early, missing from the file because the window was full.
    pub displaced: u64,
    /// Totals over the whole run, a row per lane, in lane order.
    pub sums: Vec<LaneSum>,
}

/// Takes events from the executor. Dropping it waits for the writer and closes the file, as [`Recorder::finish`] does,
/// but has nowhere to return an error to.
#[derive(Debug)]
pub struct Recorder {
    /// `None` once the ring is closed, which tells the writer to end.
    ring: Option<SyncSender<Event>>,
    writer: Option<JoinHandle<Writer>>,
    path: PathBuf,
    keep: Keep,
    begins: Vec<u64>,
    /// [`Keep::total_steps`], shared with the writer, since a longer model may be added.
    total_steps: Arc<AtomicU64>,
    models: Vec<String>,
    sums: Vec<LaneSum>,
    dropped: u64,
}

impl Recorder {
    /// Creates the trace file at `path` and starts the writer.
    ///
    /// # Errors
    /// When the file cannot be created or the thread cannot be started.
    pub fn create(path: &Path, options: RecorderOptions) -> Result<Self> {
        let RecorderOptions { keep, mut lanes, models, begins, ring_events, window_events } = options;
        lanes.sort_unstable();
        lanes.dedup();
        let file = ChromeWriter::create(path, &lanes).map_err(|e| Error::io("create", path, e))?;
        let window_events = if keep.last == 0 { 0 } else { window_events };
        let total_steps = Arc::new(AtomicU64::new(keep.total_steps));
        let writer = Writer {
            file,
            keep,
            begins: begins.clone(),
            total_steps: Arc::clone(&total_steps),
            window: VecDeque::with_capacity(window_events),
            window_events,
            newest: Vec::with_capacity(models.len().max(16)),
            displaced: VecDeque::with_capacity(64),
        };
        let (ring, events) = sync_channel(ring_events.max(1));
        let thread = std::thread::Builder::new()
            .name("trace writer".into())
            .spawn(move || writer.run(events))
            .map_err(|e| Error::Io { what: "cannot start the trace writer's thread".into(), source: e })?;
        // Room for lanes that were not named, so that an event on one allocates nothing.
        let mut sums = Vec::with_capacity(lanes.len() + 64);
        sums.extend(lanes.iter().map(|&lane| LaneSum::new(lane)));
        let (ring, writer, path) = (Some(ring), Some(thread), path.into());
        Ok(Recorder { ring, writer, path, keep, begins, total_steps, models, sums, dropped: 0 })
    }

    /// Records one event. Neither waits nor allocates; where the ring is full the event is counted as dropped.
    pub fn record(&mut self, event: &Event) {
        add_to_sums(&mut self.sums, event);
        if self.keep.last == 0 && !self.keep.is_certain(u64::from(event.step), begin_of(&self.begins, event)) {
            return;
        }
        // The ring is open until `finish` or `drop`. If the receiving end is closed (the writer panicked), the event is
        // lost in the same way.
        if self.ring.as_ref().is_none_or(|ring| ring.try_send(*event).is_err()) {
            self.dropped += 1;
        }
    }

    /// Adds the name of the next model, which has `steps` steps.
    pub fn add_model(&mut self, name: String, steps: u64) {
        self.models.push(name);
        self.keep.total_steps = self.keep.total_steps.max(steps);
        self.total_steps.store(self.keep.total_steps, Ordering::Relaxed);
    }

    /// Waits until the writer has written what is in the ring, closes the file and returns the summary.
    ///
    /// # Errors
    /// When any write failed, such as on a full disk; the file is then incomplete.
    pub fn finish(mut self) -> Result<Summary> {
        self.close()
    }

    fn close(&mut self) -> Result<Summary> {
        self.ring = None;
        let Some(thread) = self.writer.take() else {
            return Err(Error::bad("the trace is closed already"));
        };
        let writer = thread.join().map_err(|_| Error::Device("the trace writer panicked".into()))?;
        let (written, displaced, dropped) = (writer.file.events(), writer.displaced_events(), self.dropped);
        let closed = writer.file.close(dropped, displaced, &self.sums, &self.models);
        closed.map_err(|e| Error::io("write", &self.path, e))?;
        Ok(Summary { written, dropped, displaced, sums: std::mem::take(&mut self.sums) })
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if self.writer.is_some() {
            // A run that drops its recorder is failing for another reason, which its own error states; if the trace
            // cannot be closed either, the file is incomplete, which `read_trace` can handle.
            let _ = self.close();
        }
    }
}

/// The step from which an event's model goes on.
fn begin_of(begins: &[u64], event: &Event) -> u64 {
    begins.get(usize::from(event.name.model)).copied().unwrap_or(0)
}

/// The receiving end of the ring.
#[derive(Debug)]
struct Writer {
    file: ChromeWriter,
    keep: Keep,
    begins: Vec<u64>,
    total_steps: Arc<AtomicU64>,
    /// Events of steps that will prove to be among the last only if the run ends early; at most `window_events`.
    window: VecDeque<Event>,
    window_events: usize,
    /// The newest step of each model, by number.
    newest: Vec<u32>,
    /// Events that were pushed out of the full window: model, step, how many. Entries of steps that are no longer among
    /// the last are removed.
    displaced: VecDeque<(u16, u32, u64)>,
}

impl Writer {
    /// Waits for events until the ring is closed.
    fn run(mut self, ring: Receiver<Event>) -> Writer {
        while let Ok(event) = ring.recv() {
            self.take(event);
            while let Ok(event) = ring.try_recv() {
                self.take(event);
            }
            self.file.flush();
            std::thread::sleep(REST);
        }
        for event in std::mem::take(&mut self.window) {
            if self.is_among_last(event.name.model, event.step) {
                self.file.event(&event);
            }
        }
        self
    }

    fn take(&mut self, event: Event) {
        let model = usize::from(event.name.model);
        if self.newest.len() <= model {
            self.newest.resize(model + 1, 0);
        }
        self.newest[model] = self.newest[model].max(event.step);
        self.keep.total_steps = self.total_steps.load(Ordering::Relaxed);
        if self.keep.is_certain(u64::from(event.step), begin_of(&self.begins, &event)) {
            return self.file.event(&event);
        }
        let mut displaced = None;
        if self.window.len() == self.window_events {
            displaced = self.window.pop_front().or(Some(event));
        }
        if self.window_events > 0 {
            self.window.push_back(event);
        }
        if let Some(Event { name, step, .. }) = displaced
            && self.is_among_last(name.model, step)
        {
            self.count_displaced(name.model, step);
        }
    }

    fn count_displaced(&mut self, model: u16, step: u32) {
        if let Some(entry) = self.displaced.iter_mut().rev().find(|entry| (entry.0, entry.1) == (model, step)) {
            entry.2 += 1;
            return;
        }
        while self.displaced.front().is_some_and(|&(model, step, _)| !self.is_among_last(model, step)) {
            self.displaced.pop_front();
        }
        self.displaced.push_back((model, step, 1));
    }

    fn displaced_events(&self) -> u64 {
        let missing = self.displaced.iter().filter(|&&(model, step, _)| self.is_among_last(model, step));
        missing.map(|entry| entry.2).sum()
    }

    /// Whether the step is one of its model's last so far. Steps that were written immediately are not in the window,
    /// so none is written twice.
    fn is_among_last(&self, model: u16, step: u32) -> bool {
        u64::from(step).saturating_add(self.keep.last) > u64::from(self.newest[usize::from(model)])
    }
}

#[cfg(test)]
#[path = "recorder_tests.rs"]
mod tests;
