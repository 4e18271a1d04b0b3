//! Which earlier tasks a task must wait for, found from the bytes that they touch.
//!
//! Invariant: every byte knows the last task that writes it and the tasks that read it since. A reader waits for the
//! writer, a writer for both, so a slot is never reused, nor a copy started, before its time, whoever forgot to say so.
//! Tasks must be entered in program order.

use crate::device::{Memory, Span};
use std::collections::BTreeMap;

/// A task's number in program order.
pub(super) type TaskId = u64;

#[derive(Debug)]
struct Stretch {
    end: u64,
    writer: Option<TaskId>,
    readers: Vec<TaskId>,
    /// How many of them there were when those that have ended were last left out.
    open: usize,
}

impl Stretch {
    fn new(end: u64, writer: Option<TaskId>, readers: Vec<TaskId>) -> Stretch {
        let open = readers.len();
        Stretch { end, writer, readers, open }
    }

    /// Makes `task` the writer, which waits for the one before and for the readers since.
    fn write(&mut self, task: TaskId, wait: impl FnMut(TaskId)) {
        self.writer.replace(task).into_iter().chain(self.readers.drain(..)).for_each(wait);
        self.open = 0;
    }

    /// Adds a reader, which waits for the writer. Those that have ended are left out whenever there are twice as many as
    /// after the last time, so that many readers of one stretch cost each of them little.
    fn read(&mut self, task: TaskId, done: impl Fn(TaskId) -> bool, wait: impl FnMut(TaskId)) {
        self.writer.into_iter().for_each(wait);
        if self.readers.last() == Some(&task) {
            return;
        }
        if self.readers.len() >= 2 * self.open.max(4) {
            self.readers.retain(|&id| !done(id));
            self.open = self.readers.len();
        }
        self.readers.push(task);
    }
}

/// The last users of every byte.
#[derive(Debug, Default)]
pub(super) struct Hazards {
    /// The host's, the disk's, then each device's.
    memories: Vec<BTreeMap<u64, Stretch>>,
    inside: Vec<u64>,
}

impl Hazards {
    /// Enters a task's access to `span` and adds to `after` the tasks that it must wait for, some of them more than
    /// once, those that `done` says have ended left out.
    pub fn access(
        &mut self,
        span: Span,
        write: bool,
        task: TaskId,
        done: impl Fn(TaskId) -> bool,
        after: &mut Vec<TaskId>,
    ) {
        if span.bytes == 0 {
            return;
        }
        let memory = match span.memory {
            Memory::Host => 0,
            Memory::Disk => 1,
            Memory::Device(device) => 2 + usize::from(device),
        };
        if self.memories.len() <= memory {
            self.memories.resize_with(memory + 1, BTreeMap::new);
        }
        let stretches = &mut self.memories[memory];
        let mut wait = |id: TaskId| {
            if id != task && !done(id) {
                after.push(id);
            }
        };
        // Most tasks touch just the stretches that others before them did.
        if let Some(stretch) = stretches.get_mut(&span.offset).filter(|s| s.end == span.end()) {
            return if write { stretch.write(task, wait) } else { stretch.read(task, &done, wait) };
        }
        split(stretches, span.offset);
        split(stretches, span.end());
        self.inside.clear();
        self.inside.extend(stretches.range(span.offset..span.end()).map(|(&start, _)| start));
        if write {
            let mut first: Option<Stretch> = None;
            for start in &self.inside {
                let mut stretch = stretches.remove(start).expect("listed just above");
                stretch.write(task, &mut wait);
                first = first.or(Some(stretch));
            }
            let whole = first.unwrap_or(Stretch::new(0, Some(task), Vec::new()));
            stretches.insert(span.offset, Stretch { end: span.end(), ..whole });
            return;
        }
        let mut at = span.offset;
        for &start in &self.inside {
            if at < start {
                stretches.insert(at, Stretch::new(start, None, vec![task]));
            }
            let stretch = stretches.get_mut(&start).expect("listed just above");
            stretch.read(task, &done, &mut wait);
            at = stretch.end;
        }
        if at < span.end() {
            stretches.insert(at, Stretch::new(span.end(), None, vec![task]));
        }
    }
}

/// Makes `at` a boundary between stretches.
fn split(stretches: &mut BTreeMap<u64, Stretch>, at: u64) {
    let Some((_, stretch)) = stretches.range_mut(..at).next_back() else { return };
    if stretch.end > at {
        let rest = Stretch::new(stretch.end, stretch.writer, stretch.readers.clone());
        stretch.end = at;
        stretches.insert(at, rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(offset: u64, bytes: u64) -> Span {
        Span { memory: Memory::Host, offset, bytes }
    }

    proptest! {
        /// Against a table that has an entry for every byte.
        #[test]
        fn agrees_with_a_byte_by_byte_table(accesses in prop::collection::vec((0u64..40, 0u64..20, any::<bool>(), any::<bool>()), 1..60)) {
            let mut hazards = Hazards::default();
            let mut writer = [None; 64];
            let mut readers = vec![Vec::new(); 64];
            for (task, &(offset, bytes, write, second)) in accesses.iter().enumerate() {
                let task = task as u64 / if second { 2 } else { 1 };
                let mut want: Vec<u64> = Vec::new();
                for b in offset..offset + bytes {
                    let b = b as usize;
                    want.extend(writer[b]);
                    if write {
                        want.append(&mut readers[b]);
                        writer[b] = Some(task);
                    } else {
                        readers[b].push(task);
                    }
                }
                want.retain(|&t| t != task);
                want.sort_unstable();
                want.dedup();
                let mut got = Vec::new();
                hazards.access(span(offset, bytes), write, task, |_| false, &mut got);
                got.sort_unstable();
                got.dedup();
                prop_assert_eq!(got, want);
            }
        }
    }

    #[test]
    fn memories_are_apart_and_the_past_is_left_out() {
        let mut hazards = Hazards::default();
        let mut after = Vec::new();
        hazards.access(span(0, 8), true, 1, |_| false, &mut after);
        hazards.access(Span { memory: Memory::Device(0), offset: 0, bytes: 8 }, true, 2, |_| false, &mut after);
        assert!(after.is_empty());
        hazards.access(span(4, 8), false, 3, |_| false, &mut after);
        assert_eq!(after, [1]);
        after.clear();
        hazards.access(span(0, 16), true, 4, |id| id == 1, &mut after);
        after.dedup();
        assert_eq!(after, [3]);
    }
}
