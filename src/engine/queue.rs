//! Tasks between creation and completion: what waits for what, and which task each lane gets next.
//!
//! A compute lane takes its tasks in program order, each as soon as everything it waits for is on a lane, so it is kept
//! a few tasks ahead and no order of issue can deadlock. The other lanes take only what could start at once, and of
//! that what is needed first (earliest deadline): a copy that still waits, put on its lane, would hold up all that
//! become ready before it. They are kept ahead by a task that is ready and needed first of all; any other might stand
//! in the way of a more urgent one that becomes ready in the meantime.

use super::hazards::{Hazards, TaskId};
use crate::base::{LaneId, LaneKind};
use crate::device::{Attached, Span, Task, Ticket};
use crate::trace::TaskName;
use std::collections::{BTreeSet, VecDeque};

/// When a task's result is needed, or when its input is there: a place in the order of compute tasks.
pub(super) type Deadline = u64;

/// A task with what the executor knows about it.
#[derive(Debug)]
pub(super) struct Order {
    pub lane: u16,
    pub task: Task,
    pub name: TaskName,
    /// The work of its model that it belongs to.
    pub serial: u64,
    pub step: u64,
    pub deadline: Deadline,
    /// Whether it is the last compute task of a unit.
    pub ends_unit: bool,
}

#[derive(Debug)]
struct Entry {
    lane: u16,
    name: TaskName,
    serial: u64,
    step: u64,
    deadline: Deadline,
    ends_unit: bool,
    updates: bool,
    bytes: u64,
    flops: f64,
    /// Until it is submitted.
    task: Option<Task>,
    ticket: Option<Ticket>,
    done: bool,
    /// Its model wants it no more: it ends, without having run, once all that it waits for has.
    dropped: bool,
    /// Tasks it waits for.
    after: Vec<TaskId>,
    /// Of `after`, those not on a lane yet, and those not done yet.
    not_submitted: u32,
    not_done: u32,
    /// Tasks that wait for it.
    dependents: Vec<TaskId>,
    /// Its number among events, from 1 in order of submission.
    event: u64,
    /// The event that it last waited for, and that event's end.
    waited: (u64, f64),
}

#[derive(Debug)]
struct LaneQueue {
    id: LaneId,
    depth: usize,
    /// Created and not submitted, for lanes that keep program order.
    in_order: VecDeque<TaskId>,
    /// Created and not submitted, for lanes that go by deadline.
    waiting: BTreeSet<(Deadline, TaskId)>,
    /// Of those, the ones that could start at once.
    ready: BTreeSet<(Deadline, TaskId)>,
    in_flight: VecDeque<TaskId>,
    last: (u64, f64),
    /// Something has changed since it was filled last.
    dirty: bool,
}

/// What a finished task was.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finished {
    pub lane: LaneId,
    pub name: TaskName,
    pub serial: u64,
    pub ends_unit: bool,
    /// It was an update.
    pub updates: bool,
    pub step: u64,
    pub bytes: u64,
    pub flops: f64,
    pub event: u64,
    pub after: u64,
}

/// All tasks that are not done.
#[derive(Debug)]
pub(super) struct Queue {
    entries: VecDeque<Entry>,
    /// Number of the first of `entries`.
    first: TaskId,
    lanes: Vec<LaneQueue>,
    hazards: Hazards,
    events: u64,
    tickets: Vec<Ticket>,
    /// The lanes for which that is so.
    dirty: Vec<u16>,
    /// What the task that is added next waits for.
    after: Vec<TaskId>,
    /// Tasks that are over, and whether they ran, until those that wait for them have been told.
    over: Vec<(TaskId, Option<(u64, f64)>)>,
}

impl Queue {
    pub fn new(lanes: &[LaneId]) -> Self {
        let lanes = lanes
            .iter()
            .map(|&id| LaneQueue {
                id,
                // Two tasks hide the executor's round trip; arithmetic lanes get one more, since theirs can be short.
                depth: if id.kind == LaneKind::Compute { 3 } else { 2 },
                in_order: VecDeque::new(),
                waiting: BTreeSet::new(),
                ready: BTreeSet::new(),
                in_flight: VecDeque::new(),
                last: (0, 0.0),
                dirty: false,
            })
            .collect();
        Queue {
            entries: VecDeque::new(),
            first: 0,
            lanes,
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
        let more = |len: usize| tasks.saturating_sub(len);
        self.entries.reserve(more(self.entries.len()));
        for lane in &mut self.lanes {
            lane.in_order.reserve(more(lane.in_order.len()));
            lane.in_flight.reserve(more(lane.in_flight.len()).min(lane.depth));
        }
    }

    /// Number of the next task.
    pub fn next_id(&self) -> TaskId {
        self.first + self.entries.len() as u64
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Notes that the task which is added next reads or writes `span`.
    pub fn access(&mut self, span: Span, write: bool) {
        let id = self.next_id();
        let (entries, first) = (&self.entries, self.first);
        let done = |id: TaskId| id < first || entries[(id - first) as usize].done;
        self.hazards.access(span, write, id, done, &mut self.after);
    }

    /// Adds a task, whose accesses have been noted.
    pub fn add(&mut self, order: Order) {
        let id = self.next_id();
        let mut after = std::mem::take(&mut self.after);
        after.sort_unstable();
        after.dedup();
        let mut not_submitted = 0;
        for &dep in &after {
            let entry = &mut self.entries[(dep - self.first) as usize];
            entry.dependents.push(id);
            not_submitted += u32::from(entry.ticket.is_none());
        }
        self.mark_dirty(order.lane);
        let lane = &mut self.lanes[order.lane as usize];
        if lane.id.kind == LaneKind::Compute {
            lane.in_order.push_back(id);
        } else {
            lane.waiting.insert((order.deadline, id));
            if after.is_empty() {
                lane.ready.insert((order.deadline, id));
            }
        }
        self.entries.push_back(Entry {
            lane: order.lane,
            name: order.name,
            serial: order.serial,
            step: order.step,
            deadline: order.deadline,
            ends_unit: order.ends_unit,
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
            waited: (0, 0.0),
        });
    }

    /// Fills every lane from the tasks that may go to it.
    pub fn issue(&mut self, device: &mut Attached) {
        // In the order of lanes, so that a run can be repeated.
        self.dirty.sort_unstable_by(|a, b| b.cmp(a));
        while let Some(lane) = self.dirty.pop() {
            let lane = usize::from(lane);
            self.lanes[lane].dirty = false;
            while self.lanes[lane].in_flight.len() < self.lanes[lane].depth {
                let Some(id) = self.pick(lane) else { break };
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

    fn entry(&self, id: TaskId) -> Option<&Entry> {
        self.entries.get(id.checked_sub(self.first)? as usize)
    }

    fn pick(&mut self, lane: usize) -> Option<TaskId> {
        let queue = &self.lanes[lane];
        if queue.id.kind == LaneKind::Compute {
            let &id = queue.in_order.front()?;
            return (self.entry(id)?.not_submitted == 0).then(|| {
                self.lanes[lane].in_order.pop_front();
                id
            });
        }
        let &chosen = queue.ready.first()?;
        if !queue.in_flight.is_empty() && queue.waiting.first() != Some(&chosen) {
            return None;
        }
        self.lanes[lane].waiting.remove(&chosen);
        self.lanes[lane].ready.remove(&chosen);
        Some(chosen.1)
    }

    fn submit(&mut self, id: TaskId, device: &mut Attached) {
        let at = (id - self.first) as usize;
        let mut tickets = std::mem::take(&mut self.tickets);
        tickets.clear();
        for &dep in &self.entries[at].after {
            if let Some(entry) = self.entry(dep)
                && !entry.done
            {
                tickets.push(entry.ticket.expect("a task is submitted after all that it waits for"));
            }
        }
        self.events += 1;
        let entry = &mut self.entries[at];
        entry.event = self.events;
        let task = entry.task.take().expect("a task is submitted once");
        entry.ticket = Some(device.submit(entry.lane, task, &tickets));
        self.tickets = tickets;
        let lane = entry.lane as usize;
        self.lanes[lane].in_flight.push_back(id);
        for i in 0..self.entries[at].dependents.len() {
            let dependent = self.entries[at].dependents[i];
            let entry = &mut self.entries[(dependent - self.first) as usize];
            entry.not_submitted -= 1;
            if entry.not_submitted == 0 {
                let lane = entry.lane;
                self.mark_dirty(lane);
            }
        }
    }

    /// Notes a completion.
    pub fn complete(&mut self, ticket: Ticket, end_secs: f64) -> Finished {
        let lane = &mut self.lanes[ticket.lane as usize];
        let id = lane.in_flight.pop_front().expect("a completion is of a task in flight");
        let before = lane.last;
        let at = (id - self.first) as usize;
        let entry = &mut self.entries[at];
        assert_eq!(entry.ticket, Some(ticket), "a lane ends its tasks in order");
        entry.done = true;
        lane.last = (entry.event, end_secs);
        let waited = if before.1 > entry.waited.1 { before } else { entry.waited };
        let finished = Finished {
            lane: lane.id,
            name: entry.name,
            serial: entry.serial,
            ends_unit: entry.ends_unit,
            updates: entry.updates,
            step: entry.step,
            bytes: entry.bytes,
            flops: entry.flops,
            event: entry.event,
            after: waited.0,
        };
        self.mark_dirty(ticket.lane);
        self.release_dependents(id, Some((finished.event, end_secs)));
        self.forget_done();
        finished
    }

    /// Tells those that wait for a task that it is over; `event`: it ran. Dropped ones among them may be over with
    /// that, and so on from them.
    fn release_dependents(&mut self, id: TaskId, event: Option<(u64, f64)>) {
        let mut over = std::mem::take(&mut self.over);
        over.push((id, event));
        while let Some((id, event)) = over.pop() {
            let dependents = std::mem::take(&mut self.entries[(id - self.first) as usize].dependents);
            for &dependent in &dependents {
                let entry = &mut self.entries[(dependent - self.first) as usize];
                entry.not_done -= 1;
                match event {
                    Some(event) if event.1 >= entry.waited.1 => entry.waited = event,
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
                let (number, deadline) = (entry.lane, entry.deadline);
                let lane = &mut self.lanes[number as usize];
                if lane.id.kind != LaneKind::Compute {
                    lane.ready.insert((deadline, dependent));
                }
                self.mark_dirty(number);
            }
        }
        self.over = over;
    }

    fn forget_done(&mut self) {
        while self.entries.front().is_some_and(|e| e.done) {
            self.entries.pop_front();
            self.first += 1;
        }
    }

    /// Drops a copy that nobody waits for, if it is not on a lane, and gives the work that it belongs to. Where it
    /// waits for nothing but `maker`, which writes what it would copy, it is over at once: whoever writes there next
    /// waits for `maker` too.
    pub fn drop_copy(&mut self, id: TaskId, maker: TaskId) -> Option<u64> {
        let is_idle = |e: &&Entry| e.ticket.is_none() && !e.dropped && !e.done && e.dependents.is_empty();
        let entry = self.entry(id).filter(is_idle)?;
        let is_open = |&dep: &TaskId| dep != maker && self.entry(dep).is_some_and(|dep| !dep.done);
        let (over, lane, key, serial) =
            (!entry.after.iter().any(is_open), entry.lane, (entry.deadline, id), entry.serial);
        let queue = &mut self.lanes[usize::from(lane)];
        queue.waiting.remove(&key);
        queue.ready.remove(&key);
        self.mark_dirty(lane);
        let entry = &mut self.entries[(id - self.first) as usize];
        (entry.task, entry.dropped, entry.done) = (None, true, over);
        self.forget_done();
        Some(serial)
    }

    /// Drops a model's tasks that are not on a lane, of its works from `serial` on, and tells of which work each was.
    pub fn drop_model(&mut self, model: usize, serial: u64, mut told: impl FnMut(u64)) {
        let first = self.first;
        let mut over = Vec::new();
        for (i, entry) in self.entries.iter_mut().enumerate() {
            let is_meant = usize::from(entry.name.model) == model && entry.serial >= serial;
            if !is_meant || entry.ticket.is_some() || entry.dropped {
                continue;
            }
            (entry.task, entry.dropped) = (None, true);
            told(entry.serial);
            if entry.not_done == 0 {
                over.push(first + i as u64);
            }
        }
        let entries = &self.entries;
        let dropped = |id: TaskId| entries[(id - first) as usize].dropped;
        for lane in &mut self.lanes {
            lane.in_order.retain(|&id| !dropped(id));
            lane.waiting.retain(|&(_, id)| !dropped(id));
            lane.ready.retain(|&(_, id)| !dropped(id));
        }
        (0..self.lanes.len() as u16).for_each(|lane| self.mark_dirty(lane));
        for id in over {
            let entry = &mut self.entries[(id - first) as usize];
            if !entry.done {
                entry.done = true;
                self.release_dependents(id, None);
            }
        }
        self.forget_done();
    }

    /// What a lane has before it: the task that runs, and the first unit after it; nothing runs while the lane's head
    /// waits for what it needs. For lanes that keep program order.
    pub fn ahead(&self, lane: u16) -> (Option<TaskName>, Option<TaskName>) {
        let lane = &self.lanes[usize::from(lane)];
        let mut entries = lane.in_flight.iter().chain(&lane.in_order).filter_map(|&id| self.entry(id));
        let Some(head) = entries.next() else { return (None, None) };
        let unit = |e: &Entry| (e.name.model, e.serial, e.name.shard);
        if head.ticket.is_none() || head.not_done > 0 {
            return (None, Some(head.name));
        }
        let next = entries.find(|e| e.name.what.is_unit() && unit(e) != unit(head));
        (Some(head.name), next.map(|e| e.name))
    }

    /// Who waits for whom, for people: the head of every lane, or else the first task that has not reached it.
    pub fn describe_stall(&self) -> String {
        let mut text = String::new();
        for (number, lane) in self.lanes.iter().enumerate() {
            let next = || {
                let to_come = |e: &&Entry| e.lane as usize == number && e.task.is_some();
                self.entries.iter().find(to_come)
            };
            text += &format!("\n  {}: ", lane.id);
            let Some(entry) = lane.in_flight.front().and_then(|&id| self.entry(id)) else {
                text += &match next().map(|entry| (self.describe(entry), self.waits_for(entry))) {
                    Some((name, Some(others))) => format!("idle; {name} waits for {others}"),
                    Some((name, None)) => format!("idle; {name} is ready"),
                    None => "idle".into(),
                };
                continue;
            };
            text += &match self.waits_for(entry) {
                Some(others) => format!("{} waits for {others}", self.describe(entry)),
                None => format!("{} has not ended", self.describe(entry)),
            };
            let list = |text: &mut String, what: &str, ids: &mut dyn Iterator<Item = TaskId>| {
                let names = self.describe_all(ids.filter_map(|id| self.entry(id)));
                names.into_iter().for_each(|names| *text += &format!("; {what}: {names}"));
            };
            list(&mut text, "behind it on its lane", &mut lane.in_flight.iter().skip(1).copied());
            list(&mut text, "waiting for it", &mut entry.dependents.iter().copied());
        }
        text
    }

    fn describe(&self, entry: &Entry) -> String {
        format!("{} (step {}, {})", entry.name, entry.step, self.lanes[entry.lane as usize].id)
    }

    /// The tasks that one waits for and that are not done; `None` when there are none.
    fn waits_for(&self, entry: &Entry) -> Option<String> {
        self.describe_all(entry.after.iter().filter_map(|&d| self.entry(d)).filter(|e| !e.done))
    }

    fn describe_all<'a>(&self, mut entries: impl Iterator<Item = &'a Entry>) -> Option<String> {
        const MOST: usize = 4;
        let names: Vec<String> = entries.by_ref().take(MOST).map(|e| self.describe(e)).collect();
        let more = match entries.count() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        (!names.is_empty()).then(|| names.join(", ") + &more)
    }
}
