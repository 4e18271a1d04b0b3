//! Tasks that are not done, by number.

use super::{Deadline, End, Tag};
use crate::device::{Task, Ticket};
use crate::engine::hazards::TaskId;
use std::collections::VecDeque;
use std::ops::{Index, IndexMut};

#[derive(Debug)]
pub(super) struct Entry {
    pub lane: u16,
    pub tag: Tag,
    pub deadline: Deadline,
    pub updates: bool,
    pub bytes: u64,
    pub flops: f64,
    /// Until it is submitted.
    pub task: Option<Task>,
    pub ticket: Option<Ticket>,
    pub done: bool,
    /// Its model wants it no more: it ends, without having run, once all that it waits for has.
    pub dropped: bool,
    /// Tasks it waits for.
    pub after: Vec<TaskId>,
    /// Of `after`, those not on a lane yet, and those not done yet.
    pub not_submitted: u32,
    pub not_done: u32,
    /// Tasks that wait for it.
    pub dependents: Vec<TaskId>,
    /// Its number among events, from 1 in order of submission.
    pub event: u64,
    /// Of those that it waited for the last end.
    pub waited: End,
}

/// The tasks from the first that is not done on.
#[derive(Debug, Default)]
pub(super) struct Entries {
    pub first: TaskId,
    pub all: VecDeque<Entry>,
}

impl Entries {
    /// Number of the next one.
    pub fn next_id(&self) -> TaskId {
        self.first + self.all.len() as u64
    }

    /// A task, unless it is done and forgotten.
    pub fn get(&self, id: TaskId) -> Option<&Entry> {
        self.all.get(id.checked_sub(self.first)? as usize)
    }

    pub fn is_done(&self, id: TaskId) -> bool {
        id < self.first || self[id].done
    }

    /// Forgets those before the first that is not done.
    pub fn forget_done(&mut self) {
        while self.all.front().is_some_and(|e| e.done) {
            self.all.pop_front();
            self.first += 1;
        }
    }
}

impl Index<TaskId> for Entries {
    type Output = Entry;

    fn index(&self, id: TaskId) -> &Entry {
        &self.all[(id - self.first) as usize]
    }
}

impl IndexMut<TaskId> for Entries {
    fn index_mut(&mut self, id: TaskId) -> &mut Entry {
        &mut self.all[(id - self.first) as usize]
    }
}
