//! A device that notes which bytes each task reads and writes and when it ran, and a check that no two tasks were in
//! each other's way.
//!
//! The spans come from what a task is (a program's buffers, a copy's ends, an update's tensors), not from what the
//! executor said when it ordered tasks, so a hazard that the executor forgets shows here.

use hydra::base::LaneId;
use hydra::device::host::HostDevice;
use hydra::device::{Completion, Device, Memory, Span, Task, Ticket};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// One task.
#[derive(Debug)]
struct Record {
    name: String,
    reads: Vec<Span>,
    writes: Vec<Span>,
    start_secs: f64,
    /// Infinite until it has ended.
    end_secs: f64,
}

/// All tasks so far.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<HashMap<Ticket, Record>>>, Arc<Mutex<Option<u64>>>);

impl Log {
    /// One past the last byte that tasks have changed in the arena, poisoned before, of the device that was dropped.
    pub fn unpoisoned_bytes(&self) -> u64 {
        self.1.lock().expect("nobody panics while recording").expect("the device was dropped")
    }

    /// Fails where two tasks overlap in time and in bytes, and one of them writes.
    pub fn check(&self) {
        let log = self.0.lock().expect("nobody panics while recording");
        let mut records: Vec<&Record> = log.values().collect();
        assert!(records.iter().all(|r| r.end_secs.is_finite()), "every task has ended");
        records.sort_by(|a, b| a.start_secs.total_cmp(&b.start_secs));
        let overlap = |a: &Span, b: &Span| a.memory == b.memory && a.offset < b.end() && b.offset < a.end();
        let any = |a: &[Span], b: &[Span]| a.iter().any(|a| b.iter().any(|b| overlap(a, b)));
        let mut together = 0;
        for (i, a) in records.iter().enumerate() {
            for b in records[i + 1..].iter().take_while(|b| b.start_secs < a.end_secs) {
                together += 1;
                let clash = any(&a.writes, &b.writes) || any(&a.writes, &b.reads) || any(&a.reads, &b.writes);
                assert!(!clash, "{} runs beside {}, and one writes what the other touches", a.name, b.name);
            }
        }
        assert!(together > 0, "nothing ran beside anything, so nothing was checked");
    }
}

/// A device whose tasks are noted.
pub struct Recording {
    device: HostDevice,
    log: Log,
}

impl Drop for Recording {
    fn drop(&mut self) {
        // Where a check has failed, that is all there is to say.
        let Ok(log) = self.log.0.lock() else { return };
        if log.values().all(|record| record.end_secs.is_finite()) {
            // SAFETY: every task has ended.
            let bytes = unsafe { self.device.unpoisoned_bytes(0) };
            *self.log.1.lock().expect("nobody panics while recording") = Some(bytes);
        }
    }
}

impl Recording {
    pub fn new(device: HostDevice) -> (Self, Log) {
        let log = Log::default();
        (Recording { device, log: log.clone() }, log)
    }
}

/// What a task reads and writes.
fn spans(task: &Task) -> (Vec<Span>, Vec<Span>) {
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    match task {
        Task::Run(run) => {
            let place = |b: &hydra::graph::Buffer| {
                let offset = run.bases[b.area as usize] + b.offset;
                Span { memory: Memory::Device(run.device), offset, bytes: b.bytes() }
            };
            for step in &run.program.steps {
                reads.extend(step.inputs.iter().map(place));
                writes.extend(step.outputs.iter().flatten().map(place));
            }
        }
        Task::Copy(copies) | Task::Add(copies) => {
            reads.extend(copies.iter().map(|c| c.from));
            writes.extend(copies.iter().map(|c| c.to));
        }
        Task::Norm(norm) => {
            for s in norm.segments.iter() {
                let gradient = norm.gradient;
                reads.push(Span { offset: gradient.offset + 4 * s.offset, bytes: 4 * s.elems, ..gradient });
                writes.push(Span { offset: norm.table.offset + 8 * u64::from(s.index), bytes: 8, ..norm.table });
            }
        }
        Task::Update(update) => {
            reads.push(update.gate);
            reads.extend(update.clip.map(|c| c.table));
            for s in update.segments.iter() {
                let part = |span: Span| Span { offset: span.offset + 4 * s.offset, bytes: 4 * s.elems, ..span };
                reads.push(part(update.gradient));
                writes.push(part(update.weight));
                writes.extend(update.moments.into_iter().flatten().map(part));
            }
        }
    }
    (reads, writes)
}

impl Device for Recording {
    fn lanes(&self) -> &[LaneId] {
        self.device.lanes()
    }

    unsafe fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        let (reads, writes) = spans(&task);
        let kind = match &task {
            Task::Run(_) => "a program",
            Task::Copy(_) => "a copy",
            Task::Add(_) => "a sum",
            Task::Norm(_) => "a norm",
            Task::Update(_) => "an update",
        };
        // SAFETY: as the caller promises.
        let ticket = unsafe { self.device.submit(lane, task, after) };
        let name = format!("{kind} ({} {})", self.device.lanes()[lane as usize], ticket.number);
        let record = Record { name, reads, writes, start_secs: 0.0, end_secs: f64::INFINITY };
        self.log.0.lock().expect("nobody panics while recording").insert(ticket, record);
        ticket
    }

    fn next_completion(&mut self, patience_secs: f64) -> Option<Completion> {
        let completion = self.device.next_completion(patience_secs)?;
        let mut log = self.log.0.lock().expect("nobody panics while recording");
        let record = log.get_mut(&completion.ticket).expect("it was submitted");
        (record.start_secs, record.end_secs) = (completion.start_secs, completion.end_secs);
        drop(log);
        Some(completion)
    }

    fn now_secs(&self) -> f64 {
        self.device.now_secs()
    }

    fn computes(&self) -> bool {
        self.device.computes()
    }

    fn grow_host(&mut self, bytes: u64) -> hydra::base::Result<u64> {
        self.device.grow_host(bytes)
    }

    fn grow_disk(&mut self, bytes: u64) -> hydra::base::Result<u64> {
        self.device.grow_disk(bytes)
    }

    unsafe fn write_host(&mut self, offset: u64, bytes: &[u8]) {
        // SAFETY: as the caller promises.
        unsafe { self.device.write_host(offset, bytes) };
    }

    unsafe fn read_host(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: as the caller promises.
        unsafe { self.device.read_host(offset, bytes) };
    }

    fn write_disk(&mut self, offset: u64, bytes: &[u8]) -> hydra::base::Result<()> {
        self.device.write_disk(offset, bytes)
    }

    fn read_disk(&self, offset: u64, bytes: &mut [u8]) -> hydra::base::Result<()> {
        self.device.read_disk(offset, bytes)
    }

    fn high_water_bytes(&self, device: u16) -> u64 {
        self.device.high_water_bytes(device)
    }
}
