//! The host device: an arena and three lanes for each device, an arithmetic lane for the host, real copies between
//! separate memories.

use super::affinity::{self, Cores};
use super::cpu_clocks::CpuClocks;
use super::disk::Disk;
use super::lanes::{Lane, Link, Order, Shared, Throttle, wait_join};
use super::memory::{Block, Store};
use super::operands::OpMemory;
use crate::base::{Error, LaneId, LaneKind, Result};
use crate::device::{Completion, Device, DiskSpec, Task, Ticket};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What messages call the store.
const STORE: &str = "the host's store";

/// The longest stretch of patience that passes at once.
const PATIENCE_SLICE: Duration = Duration::from_secs(1);
/// A device whose threads have computed for more than this part of a stretch is at work. A hundredth: a busy machine may
/// give them no more, and what hangs or sleeps takes next to nothing.
const AT_WORK: f64 = 0.01;

/// One device of a [`HostDevice`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostSpec {
    /// Size of the arena: the device's memory.
    pub arena_bytes: u64,
    /// Bandwidth each way, in bytes per second; `None` is as fast as memory goes.
    pub link_bytes_per_sec: Option<f64>,
    /// Cores of this device, its copies and the host's arithmetic included; `None` is all, shared.
    pub threads: Option<usize>,
}

/// What a [`HostDevice`] is made of.
#[derive(Clone, Debug, Default)]
pub struct HostConfig {
    /// The devices.
    pub devices: Vec<HostSpec>,
    /// Size of the host's store.
    pub host_bytes: u64,
    /// Fill arenas with NaN first, so that use of what was never written shows as NaN.
    pub poison: bool,
    /// Bytes per second each way that the links of all devices share; `None` is as fast as memory goes.
    pub shared_bytes_per_sec: Option<f64>,
    /// The disk tier.
    pub disk: Option<DiskSpec>,
    /// Never tell the completion of this lane's n-th task (from 1): for tests of the watchdog.
    pub withhold: Option<(u16, u64)>,
}

/// Devices made of the host's own cores and memory.
pub struct HostDevice {
    lanes: Vec<LaneId>,
    shared: Arc<Shared>,
    orders: Vec<Sender<Order>>,
    submitted: Vec<u64>,
    completions: Receiver<Completion>,
    threads: Vec<JoinHandle<()>>,
    /// Of the lanes' threads and those that they give arithmetic to.
    clocks: Arc<CpuClocks>,
}

impl HostDevice {
    /// Allocates memory and starts the lanes' threads.
    ///
    /// # Errors
    /// When there is not enough memory, or no thread can be started.
    pub fn new(config: &HostConfig) -> Result<HostDevice> {
        let host = Store::new(Block::new(config.host_bytes, STORE)?);
        let (mut arenas, mut op_memory) = (Vec::new(), Vec::new());
        for (i, spec) in config.devices.iter().enumerate() {
            let mut arena = Block::new(spec.arena_bytes, &format!("the arena of device {i}"))?;
            if config.poison {
                arena.poison();
            }
            arenas.push(arena);
            // Grows in the first step of a model that wants it.
            op_memory.push(Mutex::new(OpMemory::new()?));
        }
        let mut lanes = Vec::new();
        for device in 0..config.devices.len() as u16 {
            for kind in [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost] {
                lanes.push(LaneId { device, kind });
            }
        }
        lanes.extend(math_lanes(&config.devices));
        if config.disk.is_some() {
            lanes.extend(DISK_LANES);
        }
        let disk = config.disk.as_ref().map(Disk::new).transpose()?;
        let shared = Arc::new(Shared::new(host, disk, arenas, op_memory, lanes.len(), Instant::now()));
        let (completed, completions) = channel();
        let mut device = HostDevice {
            submitted: vec![0; lanes.len()],
            lanes,
            shared,
            orders: Vec::new(),
            completions,
            threads: Vec::new(),
            clocks: Arc::default(),
        };
        device.start(config, &completed)?;
        Ok(device)
    }

    fn start(&mut self, config: &HostConfig, completed: &Sender<Completion>) -> Result<()> {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let shared_pool =
            config.devices.iter().any(|d| d.threads.is_none()).then(|| pool(all, None, &self.clocks)).transpose()?;
        let mut first = affinity::current();
        let mut pools = Vec::new();
        for spec in &config.devices {
            let cores = spec.threads.map(|n| {
                let cores = Cores { first, count: n.clamp(1, all) };
                first += cores.count;
                cores
            });
            let pool = match (cores, &shared_pool) {
                (Some(cores), _) => pool(cores.count, Some(cores), &self.clocks)?,
                (None, Some(shared)) => Arc::clone(shared),
                (None, None) => unreachable!("a device without cores of its own has the shared pool"),
            };
            pools.push((pool, cores));
        }
        let link = |bytes_per_sec| Arc::new(Mutex::new(Link::new(bytes_per_sec)));
        let shared_links = config.shared_bytes_per_sec.map(|rate| [link(rate), link(rate)]);
        for (index, lane) in self.lanes.clone().into_iter().enumerate() {
            // The host's own arithmetic runs on the first device's cores.
            let device = if lane.is_host() { 0 } else { lane.device as usize };
            let (pool, cores) =
                pools.get(device).cloned().ok_or_else(|| Error::bad("a host device needs at least one device"))?;
            let copies = matches!(lane.kind, LaneKind::HostToDevice | LaneKind::DeviceToHost);
            let on_disk = DISK_LANES.contains(&lane);
            let rate = match &config.disk {
                Some(disk) if on_disk => disk.bytes_per_sec,
                _ => config.devices[device].link_bytes_per_sec.filter(|_| copies),
            };
            let way = usize::from(lane.kind == LaneKind::DeviceToHost);
            let shared_link = shared_links.as_ref().filter(|_| copies).map(|links| Arc::clone(&links[way]));
            let (sender, orders) = channel();
            let lane_body = Lane {
                shared: Arc::clone(&self.shared),
                orders,
                completions: completed.clone(),
                pool: (!copies && !on_disk).then_some(pool),
                scratch: None,
                throttle: Throttle { own: rate.map(Link::new), shared: shared_link },
                withhold: config.withhold.filter(|&(l, _)| l as usize == index).map(|(_, n)| n),
            };
            let clocks = Arc::clone(&self.clocks);
            let thread = std::thread::Builder::new()
                .name(lane.to_string())
                .spawn(move || {
                    clocks.add_this_thread();
                    if let Some(cores) = cores.filter(|_| !on_disk) {
                        affinity::pin(cores);
                    }
                    lane_body.serve();
                })
                .map_err(|e| Error::Device(format!("cannot start the thread of {lane}: {e}")))?;
            self.orders.push(sender);
            self.threads.push(thread);
        }
        Ok(())
    }

    /// One past the last byte of an arena that is no longer the poison that it was filled with: what tasks have
    /// written, whatever they said.
    ///
    /// # Safety
    /// Every task has ended.
    pub unsafe fn unpoisoned_bytes(&self, device: u16) -> u64 {
        // SAFETY: no task runs, by the caller's promise.
        unsafe { self.shared.arenas[device as usize].unpoisoned_bytes() }
    }
}

/// Lanes of the disk tier, which come last.
pub(in crate::device) const DISK_LANES: [LaneId; 2] =
    [LaneId::host(LaneKind::DiskRead), LaneId::host(LaneKind::DiskWrite)];

/// Lanes for the host's arithmetic: of several devices each has one on its own cores, and those without share one, as a
/// single device does.
fn math_lanes(devices: &[HostSpec]) -> Vec<LaneId> {
    if devices.len() == 1 {
        return vec![LaneId::host(LaneKind::HostMath)];
    }
    let own = (0..devices.len()).filter(|&d| devices[d].threads.is_some());
    let mut lanes: Vec<LaneId> = own.map(|d| LaneId::device(d as u16, LaneKind::HostMath)).collect();
    if lanes.len() < devices.len() {
        lanes.push(LaneId::host(LaneKind::HostMath));
    }
    lanes
}

/// A rayon pool of `threads` threads on `cores`, or wherever the system runs them, with their `clocks`.
pub(super) fn pool(threads: usize, cores: Option<Cores>, clocks: &Arc<CpuClocks>) -> Result<Arc<rayon::ThreadPool>> {
    let clocks = Arc::clone(clocks);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("host arithmetic {i}"))
        .start_handler(move |_| {
            clocks.add_this_thread();
            if let Some(cores) = cores {
                affinity::pin(cores);
            }
        })
        .build()
        .map(Arc::new)
        .map_err(|e| Error::Device(format!("cannot start {threads} threads: {e}")))
}

impl Device for HostDevice {
    fn lanes(&self) -> &[LaneId] {
        &self.lanes
    }

    unsafe fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        let number = &mut self.submitted[lane as usize];
        *number += 1;
        let ticket = Ticket { lane, number: *number };
        // A lane that failed has left: its task is never told done, and the executor has the failure already.
        let _ = self.orders[lane as usize].send(Order { ticket, task, after: after.to_vec() });
        ticket
    }

    fn next_completion(&mut self, patience_secs: f64) -> Option<Completion> {
        // No end to patience is as long as a duration goes. It is waited in slices: of a process that was stopped for
        // an hour no more than one has passed, and its lanes were stopped as well.
        let mut left = Duration::try_from_secs_f64(patience_secs.max(0.0)).unwrap_or(Duration::MAX);
        let mut computed_secs = None;
        loop {
            let slice = left.min(PATIENCE_SLICE);
            match self.completions.recv_timeout(slice) {
                Ok(completion) => return Some(completion),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    // What computes is no hang, however long it takes.
                    let now = self.clocks.secs();
                    let is_at_work = |before| now - before > AT_WORK * slice.as_secs_f64();
                    if !computed_secs.replace(now).is_some_and(is_at_work) {
                        left -= slice;
                    }
                }
            }
            if left.is_zero() {
                return None;
            }
        }
    }

    fn now_secs(&self) -> f64 {
        self.shared.start.elapsed().as_secs_f64()
    }

    fn computes(&self) -> bool {
        true
    }

    fn grow_host(&mut self, bytes: u64) -> Result<u64> {
        Ok(self.shared.host.add(Block::new(bytes, STORE)?))
    }

    unsafe fn write_host(&mut self, offset: u64, bytes: &[u8]) {
        // SAFETY: no task touches these bytes now, by the caller's promise.
        unsafe { self.shared.host.slice_mut(offset, bytes.len() as u64) }.copy_from_slice(bytes);
    }

    unsafe fn read_host(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: no task writes these bytes now, by the caller's promise.
        bytes.copy_from_slice(unsafe { self.shared.host.slice(offset, bytes.len() as u64) });
    }

    fn grow_disk(&mut self, bytes: u64) -> Result<u64> {
        self.shared.disk()?.grow(bytes)
    }

    fn write_disk(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.shared.disk()?.write(offset, bytes)
    }

    fn read_disk(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.shared.disk()?.read(offset, bytes)
    }

    fn high_water_bytes(&self, device: u16) -> u64 {
        self.shared.high_water[device as usize].load(Ordering::Relaxed)
    }

    fn arena_bytes(&self, device: u16) -> Option<u64> {
        Some(self.shared.arenas[device as usize].bytes())
    }

    fn host_bytes(&self) -> Option<u64> {
        Some(self.shared.host.bytes())
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        self.shared.stop();
        self.orders.clear();
        // What lanes use is theirs too, so one that hangs may go on.
        wait_join(&mut self.threads);
    }
}
