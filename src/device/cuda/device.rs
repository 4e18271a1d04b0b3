//! The cuda device: three streams a logical device, the host's arithmetic on a thread of its own, one arena each, all on one driver.
//!
//! A task's tickets become waits of its stream, so it is queued as soon as what it waits for is queued; only a task that waits for the
//! host's arithmetic is held back. Its start and end are marks on its stream, and time is read from them alone.

use super::blocks::Blocks;
use super::driver::{Driver, Mark, Stream};
use super::launch::Ptr;
use super::operands::Operands;
use super::queue::Queue;
use super::{ops, optimizer};
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::host::math::{MathConfig, MathLane};
use crate::device::{Completion, Device, Memory, Run, Span, Task, Ticket};
use std::collections::VecDeque;
use std::time::Instant;

/// Marks this far apart are still told apart to a microsecond.
const ZERO_SECS: f64 = 5.0;

/// What a [`CudaDevice`] is made of.
#[derive(Clone, Debug, Default)]
pub struct CudaConfig {
    /// Bytes of the arena of each logical device. All lie on the driver's one GPU.
    pub arenas: Vec<u64>,
    /// Bytes of the host's store, which is pinned.
    pub host_bytes: u64,
    /// Cores for the host's arithmetic; `None` is all.
    pub threads: Option<usize>,
    /// Fill arenas with NaN first, so that use of what was never written shows as NaN.
    pub poison: bool,
    /// Never tell the completion of this lane's n-th task (from 1): for tests of the watchdog.
    pub withhold: Option<(u16, u64)>,
}

/// A task that waits to be queued.
struct Held {
    ticket: Ticket,
    task: Task,
    after: Vec<Ticket>,
}

/// A task that is queued on a stream.
struct Queued {
    number: u64,
    start: Mark,
    end: Mark,
    /// Whether its block will hold the first layer that is not finite.
    check: bool,
}

/// A lane that is a stream.
struct StreamLane {
    stream: Stream,
    held: VecDeque<Held>,
    queued: VecDeque<Queued>,
    /// Tasks that have been told done.
    done: u64,
    free: Vec<(Mark, Mark)>,
    blocks: Blocks,
}

/// GPUs, real or emulated, as devices.
pub struct CudaDevice {
    lanes: Vec<LaneId>,
    /// Before the driver, so that it is dropped first: it reads and writes the driver's pinned memory.
    math: MathLane,
    driver: Box<dyn Driver>,
    streams: Vec<StreamLane>,
    arenas: Vec<Ptr>,
    arena_bytes: Vec<u64>,
    high_water: Vec<u64>,
    /// Pinned memory, each piece with the offset where it begins and its size.
    host: Vec<(u64, Ptr, u64)>,
    math_held: VecDeque<Held>,
    math_running: u64,
    math_done: u64,
    submitted: Vec<u64>,
    ready: VecDeque<Completion>,
    withhold: Option<(u16, u64)>,
    failed: bool,
    /// Passed when the clock stood at `zero_secs`.
    zero: Mark,
    zero_secs: f64,
    /// Recorded, to become the next zero once it is passed.
    next_zero: Option<Mark>,
    /// The zero before, to be recorded again.
    spare: Mark,
    clock: Instant,
}

/// Where a span begins.
fn address(arenas: &[Ptr], host: &[(u64, Ptr, u64)], span: Span) -> Ptr {
    match span.memory {
        Memory::Host => host_address(host, span.offset, span.bytes),
        Memory::Device(device) => arenas[device as usize].plus(span.offset),
    }
}

/// Where `bytes` of host memory from `offset` on begin.
fn host_address(host: &[(u64, Ptr, u64)], offset: u64, bytes: u64) -> Ptr {
    let (base, start, size) = host[host.partition_point(|(base, ..)| *base <= offset) - 1];
    assert!(
        offset + bytes <= base + size,
        "bytes {offset}..{} of host memory that ends at {}",
        offset + bytes,
        base + size
    );
    start.plus(offset - base)
}

impl CudaDevice {
    /// Allocates memory, loads nothing more, and starts the host's arithmetic.
    ///
    /// # Errors
    /// When there is not enough memory, or the device fails.
    pub fn new(mut driver: Box<dyn Driver>, config: &CudaConfig) -> Result<CudaDevice> {
        if config.arenas.is_empty() {
            return Err(Error::bad("a cuda device needs at least one logical device"));
        }
        let wanted: u64 = config.arenas.iter().sum();
        let facts = driver.facts();
        if wanted > facts.memory_bytes {
            let (name, has) = (&facts.name, facts.memory_bytes);
            return Err(Error::Device(format!("{name} has {has} bytes of memory, the arenas need {wanted}")));
        }
        let clock = Instant::now();
        let host = driver.alloc_host(config.host_bytes)?;
        let mut arenas = Vec::new();
        for &bytes in &config.arenas {
            arenas.push(driver.alloc(bytes)?);
        }
        let mut lanes = Vec::new();
        let mut streams = Vec::new();
        for device in 0..config.arenas.len() as u16 {
            for kind in [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost] {
                lanes.push(LaneId { device, kind });
                let blocks = Blocks::new(driver.as_mut(), kind == LaneKind::Compute)?;
                streams.push(StreamLane {
                    stream: driver.stream()?,
                    held: VecDeque::new(),
                    queued: VecDeque::new(),
                    done: 0,
                    free: Vec::new(),
                    blocks,
                });
            }
        }
        let math = lanes.len() as u16;
        lanes.push(LaneId::host(LaneKind::HostMath));
        if config.poison {
            for (&arena, &bytes) in arenas.iter().zip(&config.arenas) {
                driver.fill(streams[0].stream, arena, crate::device::host::POISON, bytes)?;
            }
        }
        let zero = driver.mark()?;
        driver.record(zero, streams[0].stream)?;
        while !driver.passed(zero)? {
            driver.wait_a_moment(0.0)?;
        }
        let zero_secs = clock.elapsed().as_secs_f64();
        let spare = driver.mark()?;
        // SAFETY: pinned memory of exactly this size, aligned to pages, which lives as long as the driver; the math lane is dropped before it.
        let math = unsafe {
            MathLane::new(&MathConfig { lane: math, threads: config.threads, clock }, host, config.host_bytes)?
        };
        Ok(CudaDevice {
            submitted: vec![0; lanes.len()],
            lanes,
            driver,
            streams,
            high_water: vec![0; arenas.len()],
            arenas,
            arena_bytes: config.arenas.clone(),
            host: vec![(0, Ptr(host as u64), config.host_bytes)],
            math,
            math_held: VecDeque::new(),
            math_running: 0,
            math_done: 0,
            ready: VecDeque::new(),
            withhold: config.withhold,
            failed: false,
            zero,
            zero_secs,
            next_zero: None,
            spare,
            clock,
        })
    }

    fn is_math(&self, lane: u16) -> bool {
        lane as usize == self.streams.len()
    }

    /// Whether a ticket's task is done, as far as has been seen.
    fn is_done(&self, ticket: Ticket) -> bool {
        match self.streams.get(ticket.lane as usize) {
            Some(lane) => lane.done >= ticket.number,
            None => self.math_done >= ticket.number,
        }
    }

    /// Queues what can be queued, on every lane. A lane's order is kept.
    fn advance(&mut self) {
        let mut moved = true;
        while moved && !self.failed {
            moved = false;
            for lane in 0..self.streams.len() {
                while let Some(held) = self.streams[lane].held.front() {
                    let queued = |t: &Ticket| match self.streams.get(t.lane as usize) {
                        Some(other) => other.done + other.queued.len() as u64 >= t.number,
                        None => self.math_done >= t.number,
                    };
                    if !held.after.iter().all(queued)
                        || self.streams[lane].queued.len() >= self.streams[lane].blocks.len()
                    {
                        break;
                    }
                    let held = self.streams[lane].held.pop_front().expect("there is a front");
                    moved = true;
                    if let Err(error) = self.queue(lane, &held) {
                        self.fail(held.ticket, error);
                        return;
                    }
                }
            }
            while let Some(held) = self.math_held.front() {
                if !held.after.iter().all(|&t| self.is_done(t)) {
                    break;
                }
                let held = self.math_held.pop_front().expect("there is a front");
                self.math_running += 1;
                self.math.send(held.ticket, held.task);
                moved = true;
            }
        }
    }

    fn fail(&mut self, ticket: Ticket, error: Error) {
        self.failed = true;
        let now = self.now_secs();
        self.ready.push_back(Completion {
            ticket,
            start_secs: now,
            end_secs: now,
            result: Err(error),
            not_finite_layer: None,
        });
    }

    /// Puts a task on its stream, between two marks.
    fn queue(&mut self, lane: usize, held: &Held) -> Result<()> {
        let stream = self.streams[lane].stream;
        for ticket in &held.after {
            let other = &self.streams[ticket.lane as usize % self.streams.len()];
            // Tickets of the same lane, of the host, and of what is done hold by themselves.
            if ticket.lane as usize == lane || self.is_done(*ticket) {
                continue;
            }
            let at = other.queued.iter().find(|q| q.number == ticket.number);
            self.driver.wait_for(stream, at.expect("a ticket that is not done is queued").end)?;
        }
        let (start, end) = match self.streams[lane].free.pop() {
            Some(marks) => marks,
            None => (self.driver.mark()?, self.driver.mark()?),
        };
        self.driver.record(start, stream)?;
        let check = matches!(&held.task, Task::Run(run) if run.check);
        self.execute(lane, held)?;
        self.driver.record(end, stream)?;
        self.streams[lane].queued.push_back(Queued { number: held.ticket.number, start, end, check });
        Ok(())
    }

    fn execute(&mut self, lane: usize, held: &Held) -> Result<()> {
        match &held.task {
            Task::Copy(spans) => {
                for span in spans {
                    let (to, from) = (self.touched(span.to), self.touched(span.from));
                    if span.from.bytes > 0 {
                        self.driver.copy(self.streams[lane].stream, to, from, span.from.bytes)?;
                    }
                }
                Ok(())
            }
            Task::Run(run) => self.run(lane, held.ticket.number, run),
            Task::Add(spans) => {
                for span in spans {
                    let (to, from) = (self.touched(span.to), self.touched(span.from));
                    let mut queue = self.task_queue(lane, held.ticket.number);
                    optimizer::add(&mut queue, to, from, (span.from.bytes / 4) as usize)?;
                }
                Ok(())
            }
            Task::Norm(norm) => {
                let touched = [Some(norm.gradient), Some(norm.table), norm.scratch];
                touched.into_iter().flatten().for_each(|span| self.touch(span));
                let (arenas, host) = (&self.arenas, &self.host);
                let StreamLane { stream, blocks, .. } = &mut self.streams[lane];
                let mut queue = Queue::new(self.driver.as_mut(), *stream, blocks, held.ticket.number);
                optimizer::norm(&mut queue, norm, &|span| address(arenas, host, span))
            }
            Task::Update(update) => {
                let moments = update.moments.iter().flatten().copied();
                let others = [update.weight, update.gradient, update.gate];
                let touched = moments.chain(others).chain(update.clip.map(|c| c.table)).chain(update.remainder);
                touched.for_each(|span| self.touch(span));
                let (arenas, host) = (&self.arenas, &self.host);
                let StreamLane { stream, blocks, .. } = &mut self.streams[lane];
                let mut queue = Queue::new(self.driver.as_mut(), *stream, blocks, held.ticket.number);
                optimizer::update(&mut queue, update, &|span| address(arenas, host, span))
            }
        }
    }

    fn run(&mut self, lane: usize, number: u64, run: &Run) -> Result<()> {
        for (area, &bytes) in run.program.area_bytes.iter().enumerate() {
            self.touch(Span { memory: Memory::Device(run.device), offset: run.bases[area], bytes });
        }
        let arena = self.arenas[run.device as usize];
        let StreamLane { stream, blocks, .. } = &mut self.streams[lane];
        let mut queue = Queue::new(self.driver.as_mut(), *stream, blocks, number);
        queue.tf32 = run.program.tf32;
        queue.begin(&run.scalars, run.check)?;
        for step in &run.program.steps {
            let operands = Operands { step, arena, bases: &run.bases };
            queue.confine(&operands)?;
            ops::launch_step(&mut queue, &operands)?;
            if run.check && step.ends_layer {
                optimizer::check_finite(&mut queue, &operands, step.layer)?;
            }
        }
        queue.release()?;
        if run.check { queue.end_check() } else { Ok(()) }
    }

    fn task_queue(&mut self, lane: usize, number: u64) -> Queue<'_> {
        let StreamLane { stream, blocks, .. } = &mut self.streams[lane];
        Queue::new(self.driver.as_mut(), *stream, blocks, number)
    }

    fn touch(&mut self, span: Span) {
        if let Memory::Device(device) = span.memory
            && span.bytes > 0
        {
            let high = &mut self.high_water[device as usize];
            *high = (*high).max(span.end());
        }
    }

    /// Where a span begins; notes that it is touched.
    fn touched(&mut self, span: Span) -> Ptr {
        self.touch(span);
        if let Memory::Device(device) = span.memory {
            let bytes = self.arena_bytes[device as usize];
            assert!(span.end() <= bytes, "bytes {}..{} of memory of {bytes}", span.offset, span.end());
        }
        address(&self.arenas, &self.host, span)
    }

    /// Moves the zero of time along: the difference of two marks loses digits when they are far apart.
    fn move_zero(&mut self) -> Result<()> {
        match self.next_zero {
            Some(next) if self.driver.passed(next)? => {
                self.zero_secs += self.driver.secs_between(self.zero, next)?;
                self.spare = std::mem::replace(&mut self.zero, next);
                self.next_zero = None;
            }
            None if self.now_secs() - self.zero_secs > ZERO_SECS => {
                self.driver.record(self.spare, self.streams[0].stream)?;
                self.next_zero = Some(self.spare);
            }
            _ => {}
        }
        Ok(())
    }

    /// Moves what has ended to `ready`, in the order of time, device, lane and task.
    fn collect(&mut self) -> Result<()> {
        self.move_zero()?;
        let before = self.ready.len();
        for lane in 0..self.streams.len() {
            while let Some(front) = self.streams[lane].queued.front() {
                if !self.driver.passed(front.end)? {
                    break;
                }
                let Queued { number, start, end, check } =
                    self.streams[lane].queued.pop_front().expect("there is a front");
                let entry = &mut self.streams[lane];
                entry.done = number;
                entry.free.push((start, end));
                let not_finite_layer = if check { entry.blocks.first_bad_layer(number) } else { None };
                if self.withhold == Some((lane as u16, number)) {
                    continue;
                }
                let secs = |driver: &mut dyn Driver, mark| driver.secs_between(self.zero, mark);
                let start_secs = self.zero_secs + secs(self.driver.as_mut(), start)?;
                let end_secs = self.zero_secs + secs(self.driver.as_mut(), end)?;
                let ticket = Ticket { lane: lane as u16, number };
                self.ready.push_back(Completion { ticket, start_secs, end_secs, result: Ok(()), not_finite_layer });
            }
        }
        while let Some(completion) = self.math.ended() {
            self.math_running -= 1;
            if completion.result.is_ok() {
                self.math_done = completion.ticket.number;
            } else {
                self.failed = true;
            }
            if self.withhold != Some((completion.ticket.lane, completion.ticket.number)) {
                self.ready.push_back(completion);
            }
        }
        let new = &mut self.ready.make_contiguous()[before..];
        new.sort_by(|a, b| a.end_secs.total_cmp(&b.end_secs).then(a.ticket.cmp(&b.ticket)));
        Ok(())
    }
}

impl Device for CudaDevice {
    fn lanes(&self) -> &[LaneId] {
        &self.lanes
    }

    fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        let number = &mut self.submitted[lane as usize];
        *number += 1;
        let ticket = Ticket { lane, number: *number };
        let held = Held { ticket, task, after: after.to_vec() };
        if self.is_math(lane) {
            self.math_held.push_back(held);
        } else {
            self.streams[lane as usize].held.push_back(held);
        }
        self.advance();
        ticket
    }

    fn next_completion(&mut self, patience_secs: f64) -> Option<Completion> {
        let began = Instant::now();
        loop {
            if let Some(completion) = self.ready.pop_front() {
                return Some(completion);
            }
            let idle_secs = began.elapsed().as_secs_f64();
            if self.failed || idle_secs > patience_secs {
                return None;
            }
            self.advance();
            let gone = self.driver.wait_a_moment(idle_secs).and_then(|()| self.collect());
            if let Err(error) = gone {
                // The first task that is not done is as near as the driver lets us name it.
                let ticket = self
                    .streams
                    .iter()
                    .enumerate()
                    .find_map(|(lane, l)| l.queued.front().map(|q| Ticket { lane: lane as u16, number: q.number }));
                self.fail(ticket.unwrap_or(Ticket { lane: 0, number: 0 }), error);
            }
        }
    }

    fn now_secs(&self) -> f64 {
        self.clock.elapsed().as_secs_f64()
    }

    fn computes(&self) -> bool {
        true
    }

    fn grow_host(&mut self, bytes: u64) -> Result<u64> {
        let start = self.driver.alloc_host(bytes)?;
        // SAFETY: pinned memory of exactly this size, aligned to pages, which lives as long as the driver; the math lane is dropped before it.
        let base = unsafe { self.math.add(start, bytes) };
        self.host.push((base, Ptr(start as u64), bytes));
        Ok(base)
    }

    fn write_host(&mut self, offset: u64, bytes: &[u8]) {
        let to = host_address(&self.host, offset, bytes.len() as u64).0 as *mut u8;
        // SAFETY: inside the store (`host_address`); no task touches these bytes now, by the trait's contract; the caller's slice is elsewhere.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn read_host(&self, offset: u64, bytes: &mut [u8]) {
        let from = host_address(&self.host, offset, bytes.len() as u64).0 as *const u8;
        // SAFETY: inside the store (`host_address`); no task writes these bytes now, by the trait's contract; the caller's slice is elsewhere.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(from, bytes.len()) };
    }

    fn high_water_bytes(&self, device: u16) -> u64 {
        self.high_water[device as usize]
    }
}
