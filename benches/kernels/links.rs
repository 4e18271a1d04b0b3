//! What is not a kernel: copies by pinned memory one way and both ways at once, the time from a task to the next, and
//! the update.

use crate::machine::{COMPUTE, D2H, Fill, H2D, Machine};
use crate::report::{Row, Spread, Unit};
use hydra::base::{DType, Result};
use hydra::device::{AdamwRule, CopySpan, Memory, Segment, Span, Task, Update, UpdateRule};

/// Sizes of the copies that are timed, smallest first; the last is the large one.
fn sizes(largest: u64) -> Vec<u64> {
    [4096, 1 << 16, 1 << 20, 1 << 24].into_iter().filter(|&bytes| bytes < largest).chain([largest]).collect()
}

/// A copy of the first `bytes`, up; or of those behind them, down.
fn copy(lane: u16, bytes: u64) -> Task {
    let offset = if lane == H2D { 0 } else { bytes };
    let host = Span { memory: Memory::Host, offset, bytes };
    let device = Span { memory: Memory::Device(0), offset, bytes };
    let span = if lane == H2D { CopySpan { from: host, to: device } } else { CopySpan { from: device, to: host } };
    Task::Copy(vec![span])
}

/// Copies up and down, alone and at once.
///
/// # Errors
/// When a copy fails.
pub fn copies(machine: &mut Machine, largest: u64, samples: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for bytes in sizes(largest) {
        for (name, lane) in [("host to device", H2D), ("device to host", D2H)] {
            let mut secs = Vec::new();
            for sample in 0..=samples {
                let took = machine.time(lane, copy(lane, bytes))?;
                secs.extend((sample > 0).then_some(took));
            }
            rows.push(Row::of(format!("copy/{name}/{bytes} B"), Unit::Bytes(bytes as f64), Spread::of(secs)));
        }
        let mut secs = Vec::new();
        for sample in 0..=samples {
            for lane in [H2D, D2H] {
                machine.submit(lane, copy(lane, bytes), &[]);
            }
            let (a, b) = (machine.wait()?, machine.wait()?);
            let took = a.end_secs.max(b.end_secs) - a.start_secs.min(b.start_secs);
            secs.extend((sample > 0).then_some(took));
        }
        rows.push(Row::of(format!("copy/both ways/2 x {bytes} B"), Unit::Bytes(2.0 * bytes as f64), Spread::of(secs)));
    }
    Ok(rows)
}

/// From a task's end to the start of one that waits for it: on the same lane, and on others.
///
/// # Errors
/// When a task fails.
pub fn hand_overs(machine: &mut Machine, samples: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let chains = [
        ("compute to compute", [COMPUTE, COMPUTE]),
        ("copy up to compute, and compute to copy up", [H2D, COMPUTE]),
        ("copy up to copy down, and down to up", [H2D, D2H]),
    ];
    for (name, lanes) in chains {
        let mut before = None;
        for i in 0..2 * samples {
            let lane = lanes[i % 2];
            let task = if lane == COMPUTE { machine.small() } else { copy(lane, 4096) };
            before = Some(machine.submit(lane, task, before.as_slice()));
        }
        let mut times = Vec::new();
        for _ in 0..2 * samples {
            let done = machine.wait()?;
            times.push((done.start_secs, done.end_secs));
        }
        let gaps = times.windows(2).map(|w| w[1].0 - w[0].1).collect();
        rows.push(Row::of(format!("hand-over/{name}"), Unit::Nothing, Spread::of(gaps)));
    }
    Ok(rows)
}

/// Elements of each tensor of GPT-2 124M, in its order; or of a few small ones.
fn tensors(tiny: bool) -> Vec<u64> {
    let (c, vocabulary, positions, blocks) = if tiny { (8, 20, 4, 1) } else { (768, 50257, 1024, 12) };
    let mut all = vec![vocabulary * c, positions * c];
    for _ in 0..blocks {
        all.extend([c, c, 3 * c * c, 3 * c, c * c, c, c, c, 4 * c * c, 4 * c, 4 * c * c, c]);
    }
    all.extend([c, c]);
    all
}

/// Bytes of the arena that [`adamw`] wants.
pub fn adamw_bytes(tiny: bool) -> u64 {
    4 * 4 * tensors(tiny).iter().map(|elems| elems.next_multiple_of(16)).sum::<u64>() + 4096
}

/// AdamW over the weights of GPT-2 124M: in f32, and in bf16 with the masters' lower halves.
///
/// # Errors
/// When the update fails.
pub fn adamw(machine: &mut Machine, tiny: bool, bf16: bool, samples: usize) -> Result<Row> {
    let lengths = tensors(tiny);
    let mut offset = 0;
    let segments: Vec<Segment> = lengths
        .iter()
        .enumerate()
        .map(|(i, &elems)| {
            let segment = Segment { offset, elems, decay: true, index: i as u32 };
            // Tensors begin at multiples of 64 bytes in a shard's flat state.
            offset += elems.next_multiple_of(16);
            segment
        })
        .collect();
    let elems = offset;
    let mut end = 0;
    let mut array = |bytes: u64| {
        let span = Span { memory: Memory::Device(0), offset: end, bytes };
        end += bytes.next_multiple_of(256);
        span
    };
    let half = if bf16 { 2 } else { 4 };
    let update = Update {
        rule: UpdateRule::Adamw(AdamwRule {
            update: 10,
            lr: 1e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.1,
        }),
        segments: segments.into(),
        weight: array(half * elems),
        remainder: bf16.then(|| array(2 * elems)),
        moments: [Some(array(4 * elems)), Some(array(4 * elems))],
        gradient: array(4 * elems),
        clip: None,
        gate: array(4),
    };
    for span in
        [update.weight, update.gradient, update.gate].into_iter().chain(update.moments[0]).chain(update.remainder)
    {
        let dtype = if bf16 && span == update.weight { DType::Bf16 } else { DType::F32 };
        machine.fill_spans(Fill::Normal, dtype, span.bytes, std::iter::once(span.offset))?;
    }
    // Second moments are never negative.
    for span in update.moments[1].iter() {
        machine.fill_spans(Fill::Constant(1.0), DType::F32, span.bytes, std::iter::once(span.offset))?;
    }
    let task = Task::Update(Box::new(update));
    let bytes = task.bytes() as f64;
    let mut secs = Vec::new();
    for sample in 0..samples + 2 {
        let took = machine.time(COMPUTE, task.clone())?;
        secs.extend((sample > 1).then_some(took));
    }
    let name = format!("adamw/gpt2_124m/{} parameters", lengths.iter().sum::<u64>());
    Ok(Row { dtype: if bf16 { "bf16" } else { "f32" }.into(), ..Row::of(name, Unit::Bytes(bytes), Spread::of(secs)) })
}
