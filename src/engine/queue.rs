//! Tasks between creation and completion: what waits for what, and which task each lane gets next.
//!
//! A compute lane takes its tasks in program order, each as soon as everything it waits for is on a lane, so it is kept
//! a few tasks ahead and no order of issue can deadlock. The other lanes take only what could start at once, and of
//! that what is needed first (earliest deadline): a copy that still waits, put on its lane, would hold up all that
//! become ready before it. They are kept ahead by a task that is ready and needed first of all; any other might stand
//! in the way of a more urgent one that becomes ready in the meantime.

mod entries;
mod lane;
mod stall;

use super::hazards::{Hazards, TaskId};
use crate::base::LaneId;
use crate::device::{Attached, Span, Task, Ticket};
use crate::trace::TaskName;
use entries::{Entries, Entry};
use lane::{LaneQueue, ToCome};

/// When a task's result is needed, or when its input is there: a place in the order of compute tasks.
pub(super) type Deadline = u64;

/// What a task is to the executor, from its creation to its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tag {
    pub name: TaskName,
    /// The work of its model that it belongs to.
    pub serial: u64,
    pub step: u64,
    /// Whether it is the last compute task of a unit.
    pub ends_unit: bool,
}

/// A task with what the executor knows about it.
#[derive(Debug)]
pub(super) struct Order {
    pub lane: u16,
    pub task: Task,
    pub tag: Tag,
    pub deadline: Deadline,
}

/// The end of a task.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    /// The task's number among events, from 1 in order of submission.
    event: u64,
    secs: f64,
}

/// What a finished task was.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finished {
    pub lane: LaneId,
    pub tag: Tag,
    /// It was an update.
    pub updates: bool,
    pub bytes: u64,
    pub flops: f64,
    pub event: u64,
    pub after: u64,
}

/// All tasks that are not done.
#[derive(Debug)]
pub(super) struct Queue {
    entries: Entries,
    lanes: Vec<LaneQueue>,
    hazards: Hazards,
    events: u64,
    tickets: Vec<Ticket>,
    /// The lanes of which something has changed since they were filled last.
    dirty: Vec<u16>,
    /// What the task that is added next waits for.
    after: Vec<TaskId>,
    /// Tasks that are over, and how they ended if they ran, until those that wait for them have been told.
    over: Vec<(TaskId, Option<End>)>,
}

impl Queue {
    pub fn new(lanes: &[LaneId]) -> Self {
        Queue {
            entries: Entries::default(),
            lanes: lanes.iter().map(|&id| LaneQueue::new(id)).collect(),
            hazards: Hazards::default(),
            events: 0,
            tickets: Vec::new(),
            dirty: Vec::new(),
            after: Vec::new(),
            over: Vec::new(),
        }
    }

    /// Makes room for as many tasks at once, so that none is made later.
    pub fn reserve(&mut self, tasks: usize) {
        self.entries.all.reserve(tasks.saturating_sub(self.entries.all.len()));
        self.lanes.iter_mut().for_each(|lane| lane.reserve(tasks));
    }

    /// Number of the next task.
    pub fn next_id(&self) -> TaskId {
        self.entries.next_id()
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.entries.all.is_empty()
    }

    /// Notes that the task which is added next reads or writes `span`.
    pub fn access(&mut self, span: Span, write: bool) {
        let Queue { entries, hazards, after, .. } = self;
        hazards.access(span, write, entries.next_id(), |id| entries.is_done(id), after);
    }

    /// Adds a task, whose accesses have been noted.
    pub fn add(&mut self, order: Order) {
        let id = self.next_id();
        let mut after = std::mem::take(&mut self.after);
        after.sort_unstable();
        after.dedup();
        let mut not_submitted = 0;
        for &dep in &after {
            let entry = &mut self.entries[dep];
            entry.dependents.push(id);
            not_submitted += u32::from(entry.ticket.is_none());
        }
        self.mark_dirty(order.lane);
        let to_come = &mut self.lanes[usize::from(order.lane)].to_come;
        to_come.add((order.deadline, id));
        if after.is_empty() {
            to_come.make_ready((order.deadline, id));
        }
        self.entries.all.push_back(Entry {
            lane: order.lane,
            tag: order.tag,
            deadline: order.deadline,
            updates: matches!(order.task, Task::Update(_)),
            bytes: order.task.bytes(),
            flops: order.task.flops(),
            task: Some(order.task),
            ticket: None,
            done: false,
            dropped: false,
            not_done: after.len() as u32,
            not_submitted,
            after,
            dependents: Vec::new(),
            event: 0,
            waited: End::default(),
        });
    }

    /// Fills every lane from the tasks that may go to it.
    pub fn issue(&mut self, device: &mut Attached) {
        // In the order of lanes, so that a run can be repeated.
        self.dirty.sort_unstable_by(|a, b| b.cmp(a));
        while let Some(lane) = self.dirty.pop() {
            self.lanes[usize::from(lane)].dirty = false;
            while let Some(id) = self.lanes[usize::from(lane)].take_next(&self.entries) {
                self.submit(id, device);
            }
        }
    }

    /// Notes that a lane may take another task.
    fn mark_dirty(&mut self, lane: u16) {
        let queue = &mut self.lanes[usize::from(lane)];
        if !std::mem::replace(&mut queue.dirty, true) {
            self.dirty.push(lane);
        }
    }

    fn submit(&mut self, id: TaskId, device: &mut Attached) {
        self.tickets.clear();
        let open = self.entries[id].after.iter().filter_map(|&dep| self.entries.get(dep)).filter(|e| !e.done);
        self.tickets.extend(open.map(|e| e.ticket.expect("a task is submitted after all that it waits for")));
        self.events += 1;
        let entry = &mut self.entries[id];
        entry.event = self.events;
        let task = entry.task.take().expect("a task is submitted once");
        entry.ticket = Some(device.submit(entry.lane, task, &self.tickets));
        self.lanes[usize::from(entry.lane)].in_flight.push_back(id);
        for i in 0..self.entries[id].dependents.len() {
            let dependent = self.entries[id].dependents[i];
            let entry = &mut self.entries[dependent];
            entry.not_submitted -= 1;
            if entry.not_submitted == 0 {
                let lane = entry.lane;
                self.mark_dirty(lane);
            }
        }
    }

    /// Notes a completion.
    pub fn complete(&mut self, ticket: Ticket, end_secs: f64) -> Finished {
        let lane = &mut self.lanes[usize::from(ticket.lane)];
        let id = lane.in_flight.pop_front().expect("a completion is of a task in flight");
        let entry = &mut self.entries[id];
        assert_eq!(entry.ticket, Some(ticket), "a lane ends its tasks in order");
        entry.done = true;
        let &mut Entry { tag, updates, bytes, flops, event, waited, .. } = entry;
        let end = End { event, secs: end_secs };
        let before = std::mem::replace(&mut lane.last, end);
        let after = if before.secs > waited.secs { before.event } else { waited.event };
        let finished = Finished { lane: lane.id, tag, updates, bytes, flops, event, after };
        self.mark_dirty(ticket.lane);
        self.release_dependents(id, Some(end));
        self.entries.forget_done();
        finished
    }

    /// Tells those that wait for a task that it is over; `end`: it ran. Dropped ones among them may be over with that,
    /// and so on from them.
    fn release_dependents(&mut self, id: TaskId, end: Option<End>) {
        let mut over = std::mem::take(&mut self.over);
        over.push((id, end));
        while let Some((id, end)) = over.pop() {
            for dependent in std::mem::take(&mut self.entries[id].dependents) {
                let entry = &mut self.entries[dependent];
                entry.not_done -= 1;
                match end {
                    Some(end) if end.secs >= entry.waited.secs => entry.waited = end,
                    Some(_) => {}
                    // It was never submitted, and never will be.
                    None => entry.not_submitted -= 1,
                }
                if entry.not_done > 0 || entry.ticket.is_some() {
                    continue;
                }
                if entry.dropped {
                    entry.done = true;
                    over.push((dependent, None));
                    continue;
                }
                let (lane, key) = (entry.lane, (entry.deadline, dependent));
                self.lanes[usize::from(lane)].to_come.make_ready(key);
                self.mark_dirty(lane);
            }
        }
        self.over = over;
    }

    /// Drops a copy that nobody waits for, if it is not on a lane, and gives the work that it belongs to. Where it
    /// waits for nothing but `maker`, which writes what it would copy, it is over at once: whoever writes there next
    /// waits for `maker` too.
    pub fn drop_copy(&mut self, id: TaskId, maker: TaskId) -> Option<u64> {
        let is_idle = |e: &&Entry| e.ticket.is_none() && !e.dropped && !e.done && e.dependents.is_empty();
        let entry = self.entries.get(id).filter(is_idle)?;
        let over = entry.after.iter().all(|&dep| dep == maker || self.entries.is_done(dep));
        let entry = &mut self.entries[id];
        (entry.task, entry.dropped, entry.done) = (None, true, over);
        let (lane, serial, task) = (entry.lane, entry.tag.serial, (entry.deadline, id));
        self.lanes[usize::from(lane)].to_come.remove(task);
        self.mark_dirty(lane);
        self.entries.forget_done();
        Some(serial)
    }

    /// Drops a model's tasks that are not on a lane, of its works from `serial` on, and tells of which work each was.
    pub fn drop_model(&mut self, model: usize, serial: u64, mut told: impl FnMut(u64)) {
        let mut over = Vec::new();
        for (id, entry) in (self.entries.first..).zip(&mut self.entries.all) {
            let is_meant = usize::from(entry.tag.name.model) == model && entry.tag.serial >= serial;
            if !is_meant || entry.ticket.is_some() || entry.dropped {
                continue;
            }
            (entry.task, entry.dropped) = (None, true);
            told(entry.tag.serial);
            if entry.not_done == 0 {
                over.push(id);
            }
        }
        for lane in 0..self.lanes.len() {
            self.lanes[lane].to_come.retain(|id| !self.entries[id].dropped);
            self.mark_dirty(lane as u16);
        }
        for id in over {
            if !std::mem::replace(&mut self.entries[id].done, true) {
                self.release_dependents(id, None);
            }
        }
        self.entries.forget_done();
    }

    /// What a lane has before it: the task that runs, and the first unit after it; nothing runs while the lane's head
    /// waits for what it needs. For lanes that keep program order.
    pub fn ahead(&self, lane: u16) -> (Option<TaskName>, Option<TaskName>) {
        let lane = &self.lanes[usize::from(lane)];
        let ToCome::InOrder(to_come) = &lane.to_come else { return (None, None) };
        let mut entries = lane.in_flight.iter().chain(to_come).filter_map(|&id| self.entries.get(id));
        let Some(head) = entries.next() else { return (None, None) };
        let unit = |e: &Entry| (e.tag.name.model, e.tag.serial, e.tag.name.shard);
        if head.ticket.is_none() || head.not_done > 0 {
            return (None, Some(head.tag.name));
        }
        let next = entries.find(|e| e.tag.name.what.is_unit() && unit(e) != unit(head));
        (Some(head.tag.name), next.map(|e| e.tag.name))
    }
}
