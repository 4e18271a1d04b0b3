//! The cuda device: three streams and an arena for each logical device, which lies on one of the driver's GPUs; the
//! host's arithmetic, and the disk tier's lanes, on threads of their own.
//!
//! A task's tickets become waits of its stream, across GPUs too, so it is queued as soon as what it waits for is
//! queued; only a task that waits for the host's lanes is held back. Its start and end are marks on its stream, and
//! time is read from them alone. A task touches its own GPU's arenas and the host's memory: what goes from one GPU to
//! another goes through the host's store, as two tasks.

use super::clock::GpuClock;
use super::driver::Driver;
#[cfg(feature = "emulator")]
use super::driver::Facts;
use super::lane::{Held, HostLane, StreamLane};
use super::launch::Ptr;
use super::memory::{DeviceMemory, LogicalDevice};
use super::optimizer;
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::host::beside::{HostLanes, HostLanesConfig};
use crate::device::{Completion, CopySpan, Device, DiskSpec, Memory, Span, Task, Ticket};
use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::time::Instant;

/// The longest stretch of patience that passes at once.
const PATIENCE_SLICE_SECS: f64 = 1.0;

/// What a [`CudaDevice`] is made of.
#[derive(Clone, Debug, Default)]
pub struct CudaConfig {
    /// The logical devices; several may lie on one GPU.
    pub devices: Vec<LogicalDevice>,
    /// Bytes of the host's store, which is pinned.
    pub host_bytes: u64,
    /// Cores for the host's arithmetic; `None` is all but one, which feeds the GPUs.
    pub threads: Option<usize>,
    /// Fill arenas with NaN first, so that use of what was never written shows as NaN.
    pub poison: bool,
    /// The disk tier.
    pub disk: Option<DiskSpec>,
    /// Never tell the completion of this lane's n-th task (from 1): for tests of the watchdog.
    pub withhold: Option<(u16, u64)>,
}

/// GPUs, real or emulated, as devices.
pub struct CudaDevice {
    lanes: Vec<LaneId>,
    /// Reads and writes the driver's pinned memory.
    beside: HostLanes,
    driver: ManuallyDrop<Box<dyn Driver>>,
    streams: Vec<StreamLane>,
    memory: DeviceMemory,
    /// In the order of [`HostLanes::names`].
    host_lanes: Vec<HostLane>,
    submitted: Vec<u64>,
    ready: VecDeque<Completion>,
    withhold: Option<(u16, u64)>,
    failed: bool,
    /// Of each GPU.
    gpu_clocks: Vec<GpuClock>,
    clock: Instant,
}

/// Refuses stretches of two lengths.
fn same_length(CopySpan { from, to }: &CopySpan) -> Result<()> {
    if from.bytes == to.bytes {
        return Ok(());
    }
    Err(Error::Device(format!("a copy of {} bytes to where {} are meant", from.bytes, to.bytes)))
}

/// Refuses GPUs that do not work together, and arenas that are too large for them.
fn check(driver: &dyn Driver, devices: &[LogicalDevice]) -> Result<()> {
    if devices.is_empty() {
        return Err(Error::bad("a cuda device needs at least one logical device"));
    }
    let first = driver.facts(0);
    for gpu in 0..driver.gpus() {
        let facts = driver.facts(gpu);
        if facts.arch != first.arch {
            return Err(Error::Device(format!(
                "{first} has compute capability {}.{}, {facts} has {}.{}: their kernels differ, so results would depend on which of them ran what; \
                 take GPUs of one (CUDA_VISIBLE_DEVICES says which are seen)",
                first.arch / 10,
                first.arch % 10,
                facts.arch / 10,
                facts.arch % 10,
            )));
        }
        let wanted: u64 = devices.iter().filter(|d| d.gpu == gpu).map(|d| d.arena_bytes).sum();
        if wanted > facts.memory_bytes {
            let has = facts.memory_bytes;
            return Err(Error::Device(format!("{facts} has {has} bytes of memory, the arenas on it need {wanted}")));
        }
    }
    match devices.iter().position(|d| d.gpu >= driver.gpus()) {
        Some(device) => Err(Error::bad(format!("device {device} is to lie on none of the {} GPUs", driver.gpus()))),
        None => Ok(()),
    }
}

impl CudaDevice {
    /// Devices on the GPUs of these numbers, each named once. Loads kernels, allocates memory, and starts the host's
    /// arithmetic.
    ///
    /// # Errors
    /// When a GPU cannot be had, they do not work together or a device is on none of them, there is not enough memory,
    /// or a GPU fails.
    #[cfg(feature = "cuda")]
    pub fn on_gpus(ordinals: &[usize], config: &CudaConfig) -> Result<CudaDevice> {
        CudaDevice::new(Box::new(super::gpus::Gpus::open(ordinals)?), config)
    }

    /// Devices on emulated GPUs. With seed 0 threads, blocks and streams run in order; with others in an order drawn
    /// from the seed.
    ///
    /// # Errors
    /// When there is none, they do not work together or a device is on none of them, there is not enough memory, or a
    /// kernel fails.
    #[cfg(feature = "emulator")]
    pub fn emulated(gpus: Vec<Facts>, seed: u32, config: &CudaConfig) -> Result<CudaDevice> {
        CudaDevice::new(Box::new(super::emulated::Emulated::of(gpus, seed)?), config)
    }

    fn new(mut driver: Box<dyn Driver>, config: &CudaConfig) -> Result<CudaDevice> {
        check(driver.as_ref(), &config.devices)?;
        let clock = Instant::now();
        let host = driver.alloc_host(config.host_bytes)?;
        let memory = DeviceMemory::new(driver.as_mut(), &config.devices, Ptr(host as u64), config.host_bytes)?;
        let mut lanes = Vec::new();
        let mut streams = Vec::new();
        for (device, logical) in config.devices.iter().enumerate() {
            let device = device as u16;
            for kind in [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost] {
                lanes.push(LaneId { device, kind });
                streams.push(StreamLane::new(driver.as_mut(), logical.gpu, kind == LaneKind::Compute)?);
            }
        }
        let mut gpu_clocks = Vec::new();
        for gpu in 0..driver.gpus() {
            let stream = driver.stream(gpu)?;
            if config.poison {
                for (device, logical) in config.devices.iter().enumerate().filter(|(_, logical)| logical.gpu == gpu) {
                    let arena = memory.arena(device as u16);
                    driver.fill(stream, arena, crate::device::host::POISON, logical.arena_bytes)?;
                }
            }
            gpu_clocks.push(GpuClock::new(driver.as_mut(), stream, clock)?);
        }
        let CudaConfig { threads, disk, .. } = config.clone();
        let first = lanes.len() as u16;
        // SAFETY: pinned memory of exactly this size, aligned to pages, which lives as long as the driver; that is
        // dropped only when the lanes have stopped.
        let beside =
            unsafe { HostLanes::new(&HostLanesConfig { first, threads, disk, clock }, host, config.host_bytes)? };
        lanes.extend(beside.names());
        Ok(CudaDevice {
            submitted: vec![0; lanes.len()],
            lanes,
            driver: ManuallyDrop::new(driver),
            streams,
            memory,
            host_lanes: beside.names().iter().map(|_| HostLane::default()).collect(),
            beside,
            ready: VecDeque::new(),
            withhold: config.withhold,
            failed: false,
            gpu_clocks,
            clock,
        })
    }

    /// Whether a ticket's task is done, as far as has been seen.
    fn is_done(&self, ticket: Ticket) -> bool {
        match self.streams.get(ticket.lane as usize) {
            Some(lane) => lane.done >= ticket.number,
            None => self.host_lanes[ticket.lane as usize - self.streams.len()].done >= ticket.number,
        }
    }

    /// Queues what can be queued, on every lane. A lane's order is kept.
    fn advance(&mut self) {
        let mut moved = true;
        while moved && !self.failed {
            moved = false;
            for lane in 0..self.streams.len() {
                match self.advance_stream(lane) {
                    Ok(has) => moved |= has,
                    Err((ticket, error)) => return self.fail(ticket, error),
                }
            }
            for lane in 0..self.host_lanes.len() {
                while let Some(held) = self.host_lanes[lane].held.front() {
                    if !held.after.iter().all(|&t| self.is_done(t)) {
                        break;
                    }
                    let held = self.host_lanes[lane].held.pop_front().expect("there is a front");
                    self.beside.send(lane, held.ticket, held.task);
                    moved = true;
                }
            }
        }
    }

    /// Queues a lane's next portion, or its next task; tells whether there was one that could be queued.
    fn advance_stream(&mut self, lane: usize) -> std::result::Result<bool, (Ticket, Error)> {
        let entry = &mut self.streams[lane];
        if let Some((ticket, device)) = entry.begun() {
            let arena = self.memory.arena(device);
            return entry.go_on(self.driver.as_mut(), arena).map_err(|error| (ticket, error));
        }
        let Some(held) = self.streams[lane].held.front() else { return Ok(false) };
        let queued = |t: &Ticket| match self.streams.get(t.lane as usize) {
            Some(other) => other.has_queued(t.number),
            None => self.is_done(*t),
        };
        if !held.after.iter().all(queued) || self.streams[lane].is_full() {
            return Ok(false);
        }
        let held = self.streams[lane].held.pop_front().expect("there is a front");
        let ticket = held.ticket;
        self.queue(lane, held).map_err(|error| (ticket, error))?;
        Ok(true)
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

    /// Puts a task on its stream, behind what it waits for; of a program the beginning.
    fn queue(&mut self, lane: usize, held: Held) -> Result<()> {
        let Held { ticket, task, after } = held;
        for before in after {
            // Tickets of the same lane, of the host, and of what is done hold by themselves.
            if before.lane as usize == lane || self.is_done(before) {
                continue;
            }
            let end = self.streams[before.lane as usize].end_of(before.number);
            self.driver.wait_for(self.streams[lane].stream, end)?;
        }
        let marks = self.streams[lane].start(self.driver.as_mut())?;
        if let Task::Run(run) = task {
            for (area, &bytes) in run.program.area_bytes.iter().enumerate() {
                self.touch(lane, Span { memory: Memory::Device(run.device), offset: run.bases[area], bytes })?;
            }
            return self.streams[lane].begin(self.driver.as_mut(), ticket, run, marks);
        }
        self.execute(lane, ticket.number, &task)?;
        self.streams[lane].end(self.driver.as_mut(), ticket.number, marks, false)
    }

    fn execute(&mut self, lane: usize, number: u64, task: &Task) -> Result<()> {
        match task {
            Task::Copy(spans) => {
                for span in spans {
                    same_length(span)?;
                    let (to, from) = (self.touched(lane, span.to)?, self.touched(lane, span.from)?);
                    if span.from.bytes > 0 {
                        self.driver.copy(self.streams[lane].stream, to, from, span.from.bytes)?;
                    }
                }
                Ok(())
            }
            Task::Run(_) => unreachable!("a lane queues a program in portions"),
            Task::Add(spans) => {
                for span in spans {
                    same_length(span)?;
                    let (to, from) = (self.touched(lane, span.to)?, self.touched(lane, span.from)?);
                    let mut queue = self.streams[lane].queue(self.driver.as_mut(), number);
                    optimizer::add(&mut queue, to, from, (span.from.bytes / 4) as usize)?;
                }
                Ok(())
            }
            Task::Norm(norm) => {
                let touched = [Some(norm.gradient), Some(norm.table), norm.scratch];
                touched.into_iter().flatten().try_for_each(|span| self.touch(lane, span))?;
                let memory = &self.memory;
                let mut queue = self.streams[lane].queue(self.driver.as_mut(), number);
                optimizer::norm(&mut queue, norm, &|span| memory.address(span))
            }
            Task::Update(update) => {
                let moments = update.moments.iter().flatten().copied();
                let others = [update.weight, update.gradient, update.gate];
                let mut touched = moments.chain(others).chain(update.clip.map(|c| c.table)).chain(update.remainder);
                touched.try_for_each(|span| self.touch(lane, span))?;
                let memory = &self.memory;
                let mut queue = self.streams[lane].queue(self.driver.as_mut(), number);
                optimizer::update(&mut queue, update, &|span| memory.address(span))
            }
        }
    }

    /// Notes that a task of a lane touches a span.
    fn touch(&mut self, lane: usize, span: Span) -> Result<()> {
        self.memory.touch(self.driver.as_ref(), self.streams[lane].stream.gpu, span)
    }

    /// Where a span begins; notes that it is touched.
    fn touched(&mut self, lane: usize, span: Span) -> Result<Ptr> {
        self.touch(lane, span)?;
        Ok(self.memory.address(span))
    }

    /// Moves what has ended to `ready`, in the order of time, device, lane and task.
    fn collect(&mut self) -> Result<()> {
        for clock in &mut self.gpu_clocks {
            clock.move_zero(self.driver.as_mut(), self.clock.elapsed().as_secs_f64())?;
        }
        let before = self.ready.len();
        for (lane, entry) in self.streams.iter_mut().enumerate() {
            let clock = &self.gpu_clocks[entry.stream.gpu];
            while let Some(ended) = entry.next_ended(self.driver.as_mut(), clock)? {
                if self.withhold == Some((lane as u16, ended.number)) {
                    continue;
                }
                self.ready.push_back(Completion {
                    ticket: Ticket { lane: lane as u16, number: ended.number },
                    start_secs: ended.start_secs,
                    end_secs: ended.end_secs,
                    result: Ok(()),
                    not_finite_layer: ended.not_finite_layer,
                });
            }
        }
        while let Some(completion) = self.beside.ended() {
            if completion.result.is_ok() {
                self.host_lanes[completion.ticket.lane as usize - self.streams.len()].done = completion.ticket.number;
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

impl Drop for CudaDevice {
    /// Where a host's lane has a task that does not end, the driver's memory stays, since that task may yet touch it.
    fn drop(&mut self) {
        if self.beside.wait_stop() {
            // SAFETY: dropped here alone, and not used after.
            unsafe { ManuallyDrop::drop(&mut self.driver) };
        }
    }
}

impl Device for CudaDevice {
    fn lanes(&self) -> &[LaneId] {
        &self.lanes
    }

    unsafe fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        let computes = matches!(task, Task::Run(_) | Task::Norm(_) | Task::Update(_) | Task::Add(_));
        let is_stream = (lane as usize) < self.streams.len();
        assert!(
            !is_stream || !computes || self.lanes[lane as usize].kind == LaneKind::Compute,
            "a task with kernels belongs on a compute lane"
        );
        let number = &mut self.submitted[lane as usize];
        *number += 1;
        let ticket = Ticket { lane, number: *number };
        let held = Held { ticket, task, after: after.to_vec() };
        match (lane as usize).checked_sub(self.streams.len()) {
            Some(lane) => self.host_lanes[lane].held.push_back(held),
            None => self.streams[lane as usize].held.push_back(held),
        }
        self.advance();
        ticket
    }

    fn next_completion(&mut self, patience_secs: f64) -> Option<Completion> {
        let (mut idle_secs, mut looked) = (0.0, Instant::now());
        loop {
            if let Some(completion) = self.ready.pop_front() {
                return Some(completion);
            }
            // Of a process that was stopped for an hour no more than a slice has passed.
            let now = Instant::now();
            idle_secs += (now - looked).as_secs_f64().min(PATIENCE_SLICE_SECS);
            looked = now;
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
                    .find_map(|(lane, l)| l.first_queued().map(|number| Ticket { lane: lane as u16, number }));
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
        // SAFETY: pinned memory of exactly this size, aligned to pages, which lives as long as the driver; the host's
        // lanes are dropped before it.
        let base = unsafe { self.beside.add(start, bytes) };
        self.memory.grow(base, Ptr(start as u64), bytes);
        Ok(base)
    }

    unsafe fn write_host(&mut self, offset: u64, bytes: &[u8]) {
        let to = self.memory.host_address(offset, bytes.len() as u64).0 as *mut u8;
        // SAFETY: inside the store (`DeviceMemory::host_address`); no task touches these bytes now, by the caller's
        // promise; the caller's slice is elsewhere.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    unsafe fn read_host(&self, offset: u64, bytes: &mut [u8]) {
        let from = self.memory.host_address(offset, bytes.len() as u64).0 as *const u8;
        // SAFETY: inside the store (`DeviceMemory::host_address`); no task writes these bytes now, by the caller's
        // promise; the caller's slice is elsewhere.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(from, bytes.len()) };
    }

    fn grow_disk(&mut self, bytes: u64) -> Result<u64> {
        self.beside.disk()?.grow(bytes)
    }

    fn write_disk(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.beside.disk()?.write(offset, bytes)
    }

    fn read_disk(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.beside.disk()?.read(offset, bytes)
    }

    fn high_water_bytes(&self, device: u16) -> u64 {
        self.memory.high_water(device)
    }

    fn arena_bytes(&self, device: u16) -> Option<u64> {
        Some(self.memory.arena_bytes(device))
    }

    fn host_bytes(&self) -> Option<u64> {
        Some(self.memory.host_bytes())
    }
}
