//! Promise 3: after the second step a run allocates nothing. Live bytes are flat, and nothing of 4 KiB or more is
//! allocated on any thread save by the GEMM library, which makes its packing buffers anew; such a request is told from
//! ours by its backtrace.

mod common;

use common::small::Small;
use common::stated;
use hydra::base::{DType, LaneId, LaneKind, Result};
use hydra::data::{Source, Text, TextOptions, TextSource, Tokenizer};
use hydra::engine::Engine;
use hydra::nn;
use hydra::spill::{OnDisk, PlanOptions};
use hydra::trace::{Keep, Recorder, RecorderOptions};
use hydra::train::metrics::{Metrics, Row, StepRow};
use hydra::train::{Observer, Session, StepReport, TrainOptions, Weights, inputs_of, plan_model, trace_model};
use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};
use std::sync::{Arc, Mutex};

/// Requests of at least this many bytes are looked at.
const LARGE_BYTES: usize = 4096;

struct Watching;

static LIVE_BYTES: AtomicIsize = AtomicIsize::new(0);
/// Whether large requests are kept with their backtraces.
static WATCHED: AtomicBool = AtomicBool::new(false);
static LARGE: Mutex<Vec<(usize, Backtrace)>> = Mutex::new(Vec::new());
/// The counters belong to the whole program: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

thread_local! {
    /// Set while this thread takes a backtrace, which allocates too.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Notes one request. What a backtrace itself needs is left out of every count.
fn note(bytes: isize) {
    // A thread that is ending has no thread-local values; what it frees then is counted all the same.
    if INSIDE.try_with(Cell::get).unwrap_or(false) {
        return;
    }
    LIVE_BYTES.fetch_add(bytes, Ordering::Relaxed);
    if bytes >= LARGE_BYTES as isize && WATCHED.load(Ordering::Relaxed) {
        INSIDE.with(|inside| {
            inside.set(true);
            let trace = Backtrace::force_capture();
            LARGE.lock().expect("nothing panics in here").push((bytes as usize, trace));
            inside.set(false);
        });
    }
}

// SAFETY: every call is handed to the system's allocator as it came; the notes have no part in it.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note(-(layout.size() as isize));
        // SAFETY: `pointer` came from `alloc` above, that is from the same allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Steps of a run. Live bytes are read at rest after `FIRST` and after all; large requests are looked at in the two
/// windows, the first from the end of the second step on.
const STEPS: u64 = 120;
const FIRST: u64 = 10;
const WINDOWS: [std::ops::Range<u64>; 2] = [2..8, 100..104];

/// Writes a row of metrics for every step, as the program does, and watches.
struct Watch {
    metrics: Metrics,
    done: u64,
    live: Vec<isize>,
}

impl Observer for Watch {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        let result = &report.result;
        let tokens_per_sec = Some(1.0 / result.secs);
        self.metrics.write(&Row::Step(StepRow { tokens_per_sec, ..StepRow::new(report) }))?;
        self.done = result.step + 1;
        WATCHED.store(WINDOWS.iter().any(|w| w.contains(&self.done)), Ordering::Relaxed);
        Ok(())
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        Ok(())
    }

    fn wants_checkpoint(&mut self) -> bool {
        self.done == FIRST
    }

    fn checkpoint(&mut self, _: u64, _: &Engine, _: usize) -> Result<()> {
        self.live.push(LIVE_BYTES.load(Ordering::Relaxed));
        Ok(())
    }
}

/// Whether it was the GEMM library, or the crate that makes its buffers, that asked: it stands just above the
/// allocator. Deeper frames prove nothing, since a thread that waits inside the library may run any other work of its
/// pool meanwhile.
fn is_of_gemm(trace: &str) -> bool {
    // A vector that grows has other frames there, and a backtrace without symbols none.
    let Some(asked) = trace.split("__rust_alloc").nth(1) else { return false };
    let nearest = asked.lines().filter(|line| line.trim_start().starts_with(|c: char| c.is_ascii_digit())).take(2);
    nearest.into_iter().any(|line| ["dyn_stack::", "gemm_common::", "gemm_f32::"].iter().any(|of| line.contains(of)))
}

/// Runs a session and checks both halves of the promise.
fn check(what: &str, mut session: Session, dir: &Path) {
    let lanes = [LaneKind::Compute, LaneKind::HostToDevice, LaneKind::DeviceToHost].map(|kind| LaneId::device(0, kind));
    let keep = Keep { first: 5, last: 20, total_steps: STEPS };
    let recorder = RecorderOptions::new(keep, lanes.to_vec(), vec!["model".into()]);
    session.engine_mut().record(Recorder::create(&dir.join("trace.json"), recorder).expect("a recorder"));
    let metrics = Metrics::open(&dir.join("metrics.jsonl"), 0).expect("a file");
    let mut watch = Watch { metrics, done: 0, live: Vec::with_capacity(16) };
    LARGE.lock().expect("no panic").clear();
    session.run(&mut watch, &AtomicBool::new(false)).expect("a run");
    WATCHED.store(false, Ordering::Relaxed);

    let &[first, last] = watch.live.as_slice() else { panic!("{what}: at rest {} times", watch.live.len()) };
    // Channels keep a block or two of places for messages, whose number depends on the moment: less than 20 bytes a
    // step.
    assert!(last - first < 2200, "{what}: live bytes grew from {first} to {last} in {} steps", STEPS - FIRST);
    println!("{what}: live bytes {first} and {last}");

    INSIDE.with(|inside| inside.set(true));
    let large = std::mem::take(&mut *LARGE.lock().expect("no panic"));
    let count = large.len();
    let ours: Vec<String> = large
        .iter()
        .map(|(bytes, trace)| (bytes, trace.to_string()))
        .filter(|(_, trace)| !is_of_gemm(trace))
        .map(|(bytes, trace)| format!("{bytes} bytes:\n{trace}"))
        .collect();
    println!("{what}: {count} large requests, {} not the GEMM library's", ours.len());
    assert!(ours.is_empty(), "{what}: {} large requests after the second step, such as {}", ours.len(), ours[0]);
    drop((ours, large));
    INSIDE.with(|inside| inside.set(false));
}

/// Resident; on its way with every boundary tensor; the same with one slot and recomputation, with half of it at rest,
/// and from the disk. In f32, and those that differ in bf16.
fn plans(layers: usize) -> Vec<(&'static str, DType, PlanOptions)> {
    let base = PlanOptions::default();
    let cut: Vec<_> = (0..layers).map(|l| l..l + 1).collect();
    let spilled =
        PlanOptions { resident: Some(false), boundaries_stay: Some(false), cut: Some(cut), ..PlanOptions::default() };
    let resident = PlanOptions { resident: Some(true), ..base };
    vec![
        ("resident", DType::F32, resident.clone()),
        ("spilled", DType::F32, spilled.clone()),
        ("spilled, one slot", DType::F32, PlanOptions { slots: 1, ..spilled.clone() }),
        ("resident", DType::Bf16, resident),
        ("spilled", DType::Bf16, spilled.clone()),
        ("half at rest", DType::Bf16, PlanOptions { resting: Some(layers / 2), ..spilled.clone() }),
        ("on disk", DType::Bf16, PlanOptions { on_disk: Some(OnDisk::Weights), ..spilled }),
    ]
}

#[test]
fn a_gpt_on_text_allocates_nothing_after_the_second_step() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("text");
    std::fs::write(&path, (0..60_000u32).map(|n| (n * 7 % 251) as u8).collect::<Vec<u8>>()).expect("written");
    let config = serde_json::json!({ "vocab_size": 256, "n_positions": 64, "n_embd": 48, "n_head": 3, "n_layer": 2 });
    let network = nn::from_config("gpt2", &config).expect("a network");
    let text = Text::read(&[path], &Tokenizer::Bytes).expect("a text");
    for (what, dtype, plan) in plans(6) {
        let disk = Some(dir.path().into());
        let options =
            TrainOptions { batch: 4, microbatch: 2, clip: Some(1.0), dtype, plan, disk, ..TrainOptions::new(STEPS) };
        let windows = TextOptions { context: 64, batch: 4, seed: 1, valid_fraction: 0.0 };
        let source: Box<dyn Source> = Box::new(TextSource::open(&text, &windows).expect("long enough").train);
        let model = Arc::new(trace_model(network.as_ref(), &inputs_of(source.as_ref()), &options).expect("a model"));
        assert_eq!(model.layers(), 6);
        let plan = plan_model(&model, &options, &stated()).expect("a plan");
        let boundary = model.train.bytes(model.train.layers[0].output.expect("a layer hands its output on"));
        assert!(boundary > 2 * LARGE_BYTES as u64, "a temporary tensor of {boundary} bytes would not be seen");
        let planned = (model, plan);
        let session = Session::new(Weights::Random, planned, source, None, options).expect("a session");
        check(&format!("gpt, {what}, {dtype}"), session, dir.path());
    }
}

#[test]
fn a_resnet_allocates_nothing_after_the_second_step() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().expect("a folder");
    let small = Small::resnet(&[8, 12], &[1, 1], [21, 19]);
    let layers = small.model(&TrainOptions { batch: 2, microbatch: 2, ..TrainOptions::new(1) }).layers();
    for (what, dtype, plan) in plans(layers) {
        let disk = Some(dir.path().into());
        let options = TrainOptions { batch: 6, microbatch: 3, dtype, plan, disk, ..TrainOptions::new(STEPS) };
        let planned = small.plan(&options).expect("a plan");
        let source = small.source(6, 1);
        let session = Session::new(Weights::Random, planned, source, None, options).expect("a session");
        check(&format!("resnet, {what}, {dtype}"), session, dir.path());
    }
}
