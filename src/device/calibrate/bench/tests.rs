//! Measuring, tried on simulated devices whose rates are known, and on the emulated one.

use super::*;
use crate::device::Completion;
use crate::device::sim::{Rate, SimDevice};
#[cfg(feature = "emulator")]
use crate::device::{DeviceSpec, FleetMemory, start_fleet};
use std::sync::{Arc, Mutex};

/// What a lane was given, and when it ran.
#[derive(Default)]
struct Log {
    /// Lane and memory traffic of each task, as submitted.
    tasks: Vec<(LaneId, u64)>,
    /// The tasks: the simulated device knows a program by its address, which must not be another's before the end.
    kept: Vec<Task>,
    /// Lane, start and end, as completed.
    spans: Vec<(LaneId, f64, f64)>,
}

/// A simulated device that keeps a log.
struct Logged(SimDevice, Arc<Mutex<Log>>);

impl Device for Logged {
    fn lanes(&self) -> &[LaneId] {
        self.0.lanes()
    }
    unsafe fn submit(&mut self, lane: u16, task: Task, after: &[Ticket]) -> Ticket {
        self.1.lock().unwrap().tasks.push((self.0.lanes()[usize::from(lane)], task.bytes()));
        self.1.lock().unwrap().kept.push(task.clone());
        // SAFETY: as the caller promises.
        unsafe { self.0.submit(lane, task, after) }
    }
    fn next_completion(&mut self, patience_secs: f64) -> Option<Completion> {
        let done = self.0.next_completion(patience_secs)?;
        let lane = self.0.lanes()[usize::from(done.ticket.lane)];
        self.1.lock().unwrap().spans.push((lane, done.start_secs, done.end_secs));
        Some(done)
    }
    fn now_secs(&self) -> f64 {
        self.0.now_secs()
    }
    fn computes(&self) -> bool {
        false
    }
    fn grow_host(&mut self, bytes: u64) -> Result<u64> {
        self.0.grow_host(bytes)
    }
    fn grow_disk(&mut self, bytes: u64) -> Result<u64> {
        self.0.grow_disk(bytes)
    }
    fn write_disk(&mut self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }
    fn read_disk(&self, _offset: u64, _bytes: &mut [u8]) -> Result<()> {
        Ok(())
    }
    unsafe fn write_host(&mut self, _offset: u64, _bytes: &[u8]) {}
    unsafe fn read_host(&self, _offset: u64, _bytes: &mut [u8]) {}
    fn high_water_bytes(&self, _device: u16) -> u64 {
        0
    }
}

const ELEMS: u64 = 1 << 20;

fn stated(speed: f64) -> CostModel {
    let mut cost = CostModel::stated(speed * 1e12, speed * 1e13, speed * 1e11);
    (cost.op_secs, cost.run_secs, cost.copy_secs) = (1e-7, 2e-7, 3e-7);
    (cost.device_update_bytes_per_sec, cost.host_update_bytes_per_sec) = (speed * 3e11, speed * 2e11);
    cost.device_norm_bytes_per_sec = Some(speed * 1e11);
    cost
}

fn measure(costs: &[CostModel], alike: &[usize], on_host: bool) -> (Vec<CostModel>, Log) {
    let log = Arc::new(Mutex::new(Log::default()));
    let device = Logged(SimDevice::new(costs.to_vec()), Arc::clone(&log));
    let graphs = networks::all().unwrap().into_iter().take(3);
    let networks: Vec<Network> = graphs.map(|graph| Network::new(graph).unwrap()).collect();
    let measured = Bench::new(Box::new(device), alike, ELEMS, false).measure(&networks, on_host).unwrap();
    (measured, Arc::try_unwrap(log).ok().expect("the device is gone").into_inner().unwrap())
}

#[test]
fn a_simulated_device_is_found_to_be_what_it_is() {
    for on_host in [true, false] {
        let costs = [stated(1.0), stated(0.5)];
        let (found, _) = measure(&costs, &[0, 1], on_host);
        for (found, is) in found.iter().zip(&costs) {
            let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-3, "{a} for {b}");
            near(found.run_secs, is.run_secs);
            near(found.op_secs, is.op_secs);
            near(found.copy_secs, is.copy_secs + SMALL_COPY_BYTES as f64 / is.h2d_bytes_per_sec);
            near(found.h2d_bytes_per_sec, is.h2d_bytes_per_sec);
            near(found.d2h_bytes_per_sec, is.d2h_bytes_per_sec);
            near(found.device_update_bytes_per_sec, is.device_update_bytes_per_sec);
            near(found.device_norm_bytes_per_sec.unwrap(), is.device_norm_bytes_per_sec.unwrap());
            near(found.best_flops_per_sec(), is.best_flops_per_sec());
            // A host's arithmetic is its devices' own; that of others' host is the first device's here.
            let of_host = if on_host { is.device_update_bytes_per_sec } else { costs[0].host_update_bytes_per_sec };
            near(found.host_update_bytes_per_sec, of_host);
        }
    }
}

/// Products that may round to tf32 are timed in f32 too, each by itself, and get the rates of both.
#[test]
fn a_graph_that_allows_tf32_is_measured_in_both() {
    let mut is = stated(1.0);
    let products = is.rates.clone().into_iter().filter(|rate| rate.family.is_linear_product());
    is.rates.extend(products.map(|r| Rate { tf32: true, work_per_sec: 3.0 * r.work_per_sec, ..r }));
    let log = Arc::new(Mutex::new(Log::default()));
    let device = Logged(SimDevice::new(vec![is]), Arc::clone(&log));
    let mut graph = networks::all().unwrap().remove(2);
    graph.tf32 = true;
    let networks = [Network::new(graph).unwrap()];
    let measured = Bench::new(Box::new(device), &[0], ELEMS, false).measure(&networks, false).unwrap().remove(0);
    let of = |tf32| measured.rates.iter().filter(move |r| r.family.is_linear_product() && r.tf32 == tf32);
    let sizes = |tf32| of(tf32).map(|r| (r.family, r.sizes)).collect::<Vec<_>>();
    assert_eq!(sizes(true), sizes(false));
    assert!(of(true).count() > 5 && measured.rates.iter().all(|r| !r.tf32 || r.family.is_linear_product()));
    let near = |rate: &Rate, want: f64| assert!((rate.work_per_sec / want - 1.0).abs() < 1e-3, "{rate:?}, {want}");
    of(false).for_each(|rate| near(rate, 1e12));
    of(true).for_each(|rate| near(rate, 3e12));
    // What was launched: each product as often in tf32 as in f32, and nothing else in tf32.
    let launched = |tf32: bool| {
        let runs = log
            .lock()
            .unwrap()
            .kept
            .iter()
            .filter_map(|task| match task {
                Task::Run(run) if run.program.steps.len() == 1 && run.program.tf32 == tf32 => {
                    Some(Arc::clone(&run.program))
                }
                _ => None,
            })
            .collect::<Vec<_>>();
        (runs.iter().filter(|p| p.steps[0].cost.family.is_linear_product()).count(), runs.len())
    };
    let (products, all) = launched(true);
    assert_eq!((products, products), (all, launched(false).0));
    assert!(launched(false).1 > products);
}

#[test]
fn alike_devices_share_what_was_measured() {
    let (found, _) = measure(&[stated(1.0), stated(1.0), stated(2.0)], &[0, 0, 2], true);
    assert_eq!(found[0], found[1]);
    assert!(found[2].best_flops_per_sec() > 1.9 * found[0].best_flops_per_sec());
}

#[test]
fn all_devices_are_at_work_and_not_in_step() {
    const DEVICES: u16 = 3;
    let (_, log) = measure(&[stated(1.0), stated(1.0), stated(1.0)], &[0; DEVICES as usize], true);
    for kind in [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost] {
        let of = |d: u16| {
            let lane = LaneId::device(d, kind);
            let tasks: Vec<u64> = log.tasks.iter().filter(|t| t.0 == lane).map(|t| t.1).collect();
            let spans: Vec<(f64, f64)> = log.spans.iter().filter(|s| s.0 == lane).map(|s| (s.1, s.2)).collect();
            (tasks, spans)
        };
        let (first, first_spans) = of(0);
        for d in 1..DEVICES {
            let (tasks, spans) = of(d);
            let sorted = |mut tasks: Vec<u64>| {
                tasks.sort_unstable();
                tasks
            };
            assert_eq!(tasks != first, kind == LaneKind::Compute, "only rounds begin elsewhere");
            assert_eq!(sorted(tasks), sorted(first.clone()), "each does the same in all");
            // Whatever the first does, this one works too.
            let works = |&(start, end): &(f64, f64)| spans.iter().any(|&(s, e)| s < end && start < e);
            assert!(first_spans.iter().all(works), "{kind:?} of {d}");
        }
    }
}

/// On the emulated device, with its kernels: what is timed as tf32 leaves other bits than what is timed as f32, where
/// that always leaves the same.
#[cfg(feature = "emulator")]
#[test]
fn what_is_timed_as_tf32_runs_in_tf32() {
    let spec = DeviceSpec::Emulated { arch: 80, seed: 1, threads: Some(1) };
    let mut graph = networks::all().unwrap().remove(0);
    (graph.scratch, graph.tf32) = (true, true);
    let network = Network::new(graph).unwrap();
    let arena_bytes = vec![network.arena_bytes.max(LARGE_COPY_BYTES)];
    let memory = FleetMemory { arena_bytes, host_bytes: host_bytes(1, 1 << 10), ..FleetMemory::default() };
    let mut bench = Bench::new(start_fleet(&[spec], memory).unwrap(), &[0], 1 << 10, true);
    let tasks: Vec<Task> = network.tasks(0, 0).collect();
    // Puts numbers into the arena, and the results of ops.
    bench.walk(std::slice::from_ref(&network), false).unwrap();
    let mut output = |of: usize| {
        let out = network.steps[of].outputs[0].clone().expect("a product has an output");
        let offset = network.bases[out.area as usize] + out.offset;
        let from = Span { memory: Memory::Device(0), offset, bytes: out.bytes() };
        let to = Span { memory: Memory::Host, offset: 0, ..from };
        bench.time(LaneKind::Compute, 0.0, |_| vec![tasks[of].clone()]).unwrap();
        bench.time(LaneKind::DeviceToHost, 0.0, |_| vec![Task::Copy(vec![CopySpan { from, to }])]).unwrap();
        let mut bytes = vec![0; out.bytes() as usize];
        bench.device.read_host(0, &mut bytes);
        bytes
    };
    let steps = &network.steps;
    let twins = (0..steps.len()).filter(|&i| steps[i].cost.tf32);
    let like = |i: usize, j: usize| steps[j].outputs == steps[i].outputs && steps[j].inputs == steps[i].inputs;
    let mut compared = 0;
    for tf32 in twins {
        let f32 = (0..tf32).find(|&j| like(tf32, j)).expect("each is timed as f32 before");
        let [first, again, rounded] = [f32, f32, tf32].map(&mut output);
        // One that lies over what it reads is never the same.
        if first == again {
            assert!(rounded != first, "{:?} of {:?} is the same in tf32", steps[tf32].op, steps[tf32].cost.sizes);
            compared += 1;
        }
    }
    assert!(compared > 5, "only {compared} products could be compared");
}

#[test]
fn what_was_interrupted_does_not_count() {
    assert_eq!(usual(vec![3.0, 1.0, 2.0]), 1.5);
    assert_eq!(usual(vec![1.0]), 1.0);
    assert_eq!(usual(vec![0.0, 0.0, 5.0]), 0.0);
}

#[test]
fn gaps_are_between_tasks_in_their_order() {
    assert_eq!(gap(&mut [(7.0, 8.0), (0.0, 1.0), (1.0, 2.0), (4.0, 5.0)]), 2.0);
}
