//! A lane's tasks: those on it, and those that are to come.

use super::entries::Entries;
use super::{Deadline, End};
use crate::base::{LaneId, LaneKind};
use crate::engine::hazards::TaskId;
use std::collections::{BTreeSet, VecDeque};

#[derive(Debug)]
pub(super) struct LaneQueue {
    pub id: LaneId,
    depth: usize,
    /// Created and not submitted.
    pub to_come: ToCome,
    pub in_flight: VecDeque<TaskId>,
    /// The end of the task that ended last.
    pub last: End,
    /// Something has changed since it was filled last.
    pub dirty: bool,
}

/// Tasks that a lane takes, in the order in which it does.
#[derive(Debug)]
pub(super) enum ToCome {
    /// Program order.
    InOrder(VecDeque<TaskId>),
    /// By deadline: all of them, and those that could start at once.
    ByDeadline { all: BTreeSet<(Deadline, TaskId)>, ready: BTreeSet<(Deadline, TaskId)> },
}

impl LaneQueue {
    pub fn new(id: LaneId) -> LaneQueue {
        // Two tasks hide the executor's round trip; arithmetic lanes get one more, since theirs can be short.
        let (depth, to_come) = match id.kind {
            LaneKind::Compute => (3, ToCome::InOrder(VecDeque::new())),
            _ => (2, ToCome::ByDeadline { all: BTreeSet::new(), ready: BTreeSet::new() }),
        };
        LaneQueue { id, depth, to_come, in_flight: VecDeque::new(), last: End::default(), dirty: false }
    }

    /// Makes room for as many tasks at once.
    pub fn reserve(&mut self, tasks: usize) {
        if let ToCome::InOrder(all) = &mut self.to_come {
            all.reserve(tasks.saturating_sub(all.len()));
        }
        self.in_flight.reserve(tasks.saturating_sub(self.in_flight.len()).min(self.depth));
    }

    /// Takes the task that is to be put on it now.
    pub fn take_next(&mut self, entries: &Entries) -> Option<TaskId> {
        if self.in_flight.len() >= self.depth {
            return None;
        }
        match &mut self.to_come {
            ToCome::InOrder(all) => match entries.get(*all.front()?)?.not_submitted {
                0 => all.pop_front(),
                _ => None,
            },
            ToCome::ByDeadline { all, ready } => {
                let &next = ready.first()?;
                if !self.in_flight.is_empty() && all.first() != Some(&next) {
                    return None;
                }
                all.remove(&next);
                ready.remove(&next);
                Some(next.1)
            }
        }
    }
}

impl ToCome {
    pub fn add(&mut self, task: (Deadline, TaskId)) {
        match self {
            ToCome::InOrder(all) => all.push_back(task.1),
            ToCome::ByDeadline { all, .. } => _ = all.insert(task),
        }
    }

    /// Notes that a task could start at once.
    pub fn make_ready(&mut self, task: (Deadline, TaskId)) {
        if let ToCome::ByDeadline { ready, .. } = self {
            ready.insert(task);
        }
    }

    /// Takes out a task of a lane that goes by deadline.
    pub fn remove(&mut self, task: (Deadline, TaskId)) {
        if let ToCome::ByDeadline { all, ready } = self {
            all.remove(&task);
            ready.remove(&task);
        }
    }

    /// Takes out what is not to be kept.
    pub fn retain(&mut self, keep: impl Fn(TaskId) -> bool) {
        match self {
            ToCome::InOrder(all) => all.retain(|&id| keep(id)),
            ToCome::ByDeadline { all, ready } => {
                [all, ready].into_iter().for_each(|set| set.retain(|&(_, id)| keep(id)))
            }
        }
    }
}
