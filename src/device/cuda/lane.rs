//! The cuda device's lanes: what waits on one to be queued, and of a stream also what is on it, between which marks.
//!
//! A driver's stream takes about a thousand launches; the next one waits until some have run, and with it would all
//! other streams that this thread feeds. So a program is launched in portions, those of all streams in turn, and a
//! stream that has enough before it gets the next one later.

use super::blocks::Blocks;
use super::clock::GpuClock;
use super::driver::{Driver, Mark, Stream};
use super::launch::Ptr;
use super::operands::Operands;
use super::queue::Queue;
use super::{ops, optimizer};
use crate::base::Result;
use crate::device::{Run, Task, Ticket};
use std::collections::VecDeque;

/// Steps of a portion.
const PORTION: usize = 64;
/// Portions that a stream may have before it: a millisecond's work and more.
const PORTIONS: usize = 6;

/// A task that waits to be queued.
pub(super) struct Held {
    pub(super) ticket: Ticket,
    pub(super) task: Task,
    pub(super) after: Vec<Ticket>,
}

/// A lane of the host's.
#[derive(Default)]
pub(super) struct HostLane {
    pub(super) held: VecDeque<Held>,
    /// Tasks that have been told done.
    pub(super) done: u64,
}

/// A program of which some steps are on its stream.
struct Begun {
    ticket: Ticket,
    run: Box<Run>,
    marks: (Mark, Mark),
    /// The next step.
    next: usize,
}

/// A task that is queued on a stream, whole.
struct Queued {
    number: u64,
    /// At its start and at its end.
    marks: (Mark, Mark),
    /// Whether its block will hold the first layer that is not finite.
    check: bool,
}

/// A task that has ended, on the device's clock.
pub(super) struct Ended {
    pub(super) number: u64,
    pub(super) start_secs: f64,
    pub(super) end_secs: f64,
    /// Where a program was checked and has one.
    pub(super) not_finite_layer: Option<usize>,
}

/// A lane that is a stream.
pub(super) struct StreamLane {
    pub(super) stream: Stream,
    pub(super) held: VecDeque<Held>,
    /// Tasks that have been told done.
    pub(super) done: u64,
    begun: Option<Begun>,
    queued: VecDeque<Queued>,
    free: Vec<(Mark, Mark)>,
    /// At the ends of portions that have not run.
    portions: VecDeque<Mark>,
    free_portions: Vec<Mark>,
    /// When the last task that was told ended.
    ended_secs: f64,
    blocks: Blocks,
}

impl StreamLane {
    /// A stream of a GPU, with blocks for kernels where it `computes`.
    pub(super) fn new(driver: &mut dyn Driver, gpu: usize, computes: bool) -> Result<StreamLane> {
        let blocks = Blocks::new(driver, gpu, computes)?;
        Ok(StreamLane {
            stream: driver.stream(gpu)?,
            held: VecDeque::new(),
            done: 0,
            begun: None,
            queued: VecDeque::new(),
            free: Vec::new(),
            portions: VecDeque::new(),
            free_portions: Vec::new(),
            ended_secs: 0.0,
            blocks,
        })
    }

    /// Whether a task is on the stream whole, or has been.
    pub(super) fn has_queued(&self, number: u64) -> bool {
        self.done + self.queued.len() as u64 >= number
    }

    /// Whether no task can be queued before another has ended.
    pub(super) fn is_full(&self) -> bool {
        self.queued.len() >= self.blocks.len()
    }

    /// The first task that is queued and has not been told done.
    pub(super) fn first_queued(&self) -> Option<u64> {
        self.queued.front().map(|queued| queued.number)
    }

    /// The mark at the end of a task that is queued and has not been told done.
    pub(super) fn end_of(&self, number: u64) -> Mark {
        let queued = self.queued.iter().find(|queued| queued.number == number);
        queued.expect("a ticket that is not done is queued").marks.1
    }

    /// The program of which steps are still to be queued, and the logical device that it runs on.
    pub(super) fn begun(&self) -> Option<(Ticket, u16)> {
        self.begun.as_ref().map(|begun| (begun.ticket, begun.run.device))
    }

    /// What queues a task's kernels.
    pub(super) fn queue<'a>(&'a self, driver: &'a mut dyn Driver, number: u64) -> Queue<'a> {
        Queue::new(driver, self.stream, &self.blocks, number)
    }

    /// Marks a task's start; gives both of its marks.
    pub(super) fn start(&mut self, driver: &mut dyn Driver) -> Result<(Mark, Mark)> {
        let gpu = self.stream.gpu;
        let marks = match self.free.pop() {
            Some(marks) => marks,
            None => (driver.mark(gpu)?, driver.mark(gpu)?),
        };
        driver.record(marks.0, self.stream)?;
        Ok(marks)
    }

    /// Marks a task's end. `check`: its block will hold the first layer that is not finite.
    pub(super) fn end(&mut self, driver: &mut dyn Driver, number: u64, marks: (Mark, Mark), check: bool) -> Result<()> {
        driver.record(marks.1, self.stream)?;
        self.queued.push_back(Queued { number, marks, check });
        Ok(())
    }

    /// Queues what comes before a program's steps.
    pub(super) fn begin(
        &mut self,
        driver: &mut dyn Driver,
        ticket: Ticket,
        run: Box<Run>,
        marks: (Mark, Mark),
    ) -> Result<()> {
        self.queue(driver, ticket.number).begin(&run.scalars, run.check)?;
        self.begun = Some(Begun { ticket, run, marks, next: 0 });
        Ok(())
    }

    /// Queues the next portion of the program that has begun, if there is room for it, and with the last one its end;
    /// tells whether there was room. `arena` is that of the program's device.
    pub(super) fn go_on(&mut self, driver: &mut dyn Driver, arena: Ptr) -> Result<bool> {
        if !self.has_room(driver)? {
            return Ok(false);
        }
        let mut begun = self.begun.take().expect("a program has begun");
        let (run, number) = (&begun.run, begun.ticket.number);
        let (steps, check) = (&run.program.steps, run.check);
        let portion = begun.next..steps.len().min(begun.next + PORTION);
        let ends = portion.end == steps.len();

        let mut queue = self.queue(driver, number);
        queue.tf32 = run.program.tf32;
        queue.resume(check);
        for step in &steps[portion.clone()] {
            let operands = Operands { step, arena, bases: &run.bases };
            queue.confine(&operands)?;
            ops::launch_step(&mut queue, &operands)?;
            if check && step.ends_layer {
                optimizer::check_finite(&mut queue, &operands, step.layer)?;
            }
        }
        queue.release()?;
        if ends && check {
            queue.end_check()?;
        }
        self.end_portion(driver)?;
        if ends {
            self.end(driver, number, begun.marks, check)?;
        } else {
            begun.next = portion.end;
            self.begun = Some(begun);
        }
        Ok(true)
    }

    /// Whether the stream has few enough portions before it for another.
    fn has_room(&mut self, driver: &mut dyn Driver) -> Result<bool> {
        while let Some(&mark) = self.portions.front()
            && driver.passed(mark)?
        {
            self.portions.pop_front();
            self.free_portions.push(mark);
        }
        Ok(self.portions.len() < PORTIONS)
    }

    fn end_portion(&mut self, driver: &mut dyn Driver) -> Result<()> {
        let mark = match self.free_portions.pop() {
            Some(mark) => mark,
            None => driver.mark(self.stream.gpu)?,
        };
        driver.record(mark, self.stream)?;
        self.portions.push_back(mark);
        Ok(())
    }

    /// Takes the first of the queued tasks, if it has ended. `clock` is that of the stream's GPU.
    pub(super) fn next_ended(&mut self, driver: &mut dyn Driver, clock: &GpuClock) -> Result<Option<Ended>> {
        let Some(&Queued { number, marks: (start, end), check }) = self.queued.front() else { return Ok(None) };
        if !driver.passed(end)? {
            return Ok(None);
        }
        self.queued.pop_front();
        self.done = number;
        self.free.push((start, end));
        let not_finite_layer = if check { self.blocks.first_bad_layer(number) } else { None };
        // A zero that was set right must not make a lane seem to run backwards.
        let start_secs = clock.secs(driver, start)?.max(self.ended_secs);
        let end_secs = clock.secs(driver, end)?.max(start_secs);
        self.ended_secs = end_secs;
        Ok(Some(Ended { number, start_secs, end_secs, not_finite_layer }))
    }
}
