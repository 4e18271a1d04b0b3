//! Joined accumulators, norms and updates on the emulator against the host device: every bit.

use crate::serial::Serial;
use hydra::base::philox::Sequence;
use hydra::device::{
    AdamwRule, Clip, CopySpan, DeviceMemory, DeviceSpec, Memory, Norm, Segment, SgdRule, Span, Task, Update,
    UpdateRule, norm_scratch_bytes,
};
use std::sync::Arc;

/// Tensors one after another, each at a multiple of 32 elements: one of one element, one of none, ends of blocks, and
/// more than a launch takes.
fn segments() -> Arc<[Segment]> {
    let sizes = [1u64, 4097, 0, 4096, 9000, 33].into_iter().chain((0..170).map(|i| i % 9));
    let mut offset = 0;
    let place = |(index, elems): (usize, u64)| {
        let segment = Segment { offset, elems, decay: index % 2 == 0, index: index as u32 };
        offset += elems.next_multiple_of(32) + 32;
        segment
    };
    sizes.enumerate().map(place).collect()
}

/// Where everything lies in the arena, and as many bytes of the host's store.
struct Places {
    weight: Span,
    remainder: Span,
    moments: [Span; 2],
    gradient: Span,
    joined: Span,
    losses: Span,
    table: Span,
    scratch: Span,
    all: Span,
}

fn places(segments: &[Segment]) -> Places {
    let last = segments.last().expect("there are some");
    let elems = last.offset + last.elems;
    let mut end = 0u64;
    let mut take = |bytes: u64| {
        let offset = end.next_multiple_of(64);
        end = offset + bytes;
        Span { memory: Memory::Device(0), offset, bytes }
    };
    let [weight, remainder] = [4, 2].map(|bytes| take(bytes * elems));
    let moments = [take(4 * elems), take(4 * elems)];
    let [gradient, joined] = [take(4 * elems), take(4 * elems)];
    let (losses, table, scratch) = (take(4 * 37), take(8 * segments.len() as u64), take(norm_scratch_bytes(segments)));
    Places { weight, remainder, moments, gradient, joined, losses, table, scratch, all: take(0) }
}

struct Case {
    rule: UpdateRule,
    split: bool,
    max_norm: Option<f64>,
    loss: f32,
}

/// What the arena holds after the accumulators are joined, the norm is taken and the weights are updated, scratch
/// aside.
fn run(spec: &DeviceSpec, segments: &Arc<[Segment]>, case: &Case) -> Vec<u8> {
    let p = places(segments);
    let arena_bytes = p.all.offset;
    let memory = DeviceMemory { arena_bytes, host_bytes: arena_bytes, poison: true };
    let mut device = Serial::start(spec, memory);
    let mut sequence = Sequence::new(3, 3);
    let mut start: Vec<u8> = (0..arena_bytes / 4).flat_map(|_| (sequence.normal() as f32).to_le_bytes()).collect();
    start.resize(arena_bytes as usize, 0);
    let mut floats = |span: Span, value: &mut dyn FnMut(u64) -> f32| {
        for i in 0..span.bytes / 4 {
            let at = (span.offset + 4 * i) as usize;
            start[at..at + 4].copy_from_slice(&value(i).to_le_bytes());
        }
    };
    // Second moments are not negative; tensors outside of this shard have their entries in the table.
    floats(p.moments[1], &mut |i| (i % 17) as f32 * 1e-3);
    // Halves of random bits as weights and remainders: any number, or NaN. Not where a moment would keep what is in the
    // NaN, which is the machine's own: without an exponent's highest bit, and no 0, which is no half of a pair whose
    // remainder rounds up.
    if let (true, UpdateRule::Sgd(_)) = (case.split, case.rule) {
        let mut bits = Sequence::new(3, 4);
        floats(p.weight, &mut |_| f32::from_bits((bits.normal() as f32).to_bits() & 0xBFFF_BFFF | 0x0001_0001));
    }
    floats(p.losses, &mut |i| if i == 35 { case.loss } else { 1.5 });
    floats(p.table, &mut |_| 0.0);
    device.write(0, &start);
    let host = Span { memory: Memory::Host, offset: 0, bytes: arena_bytes };
    let arena = Span { memory: Memory::Device(0), ..host };
    device.wait(1, Task::Copy(vec![CopySpan { from: host, to: arena }]));
    device.wait(0, Task::Add(vec![CopySpan { from: p.joined, to: p.gradient }]));
    let scratch = spec.wants_scratch().then_some(p.scratch);
    let norm = Norm { gradient: p.gradient, segments: Arc::clone(segments), table: p.table, scratch };
    device.wait(0, Task::Norm(Box::new(norm)));
    let moments = match case.rule {
        UpdateRule::Adamw(_) => p.moments.map(Some),
        UpdateRule::Sgd(rule) => [(rule.momentum != 0.0).then_some(p.moments[0]), None],
    };
    let update = Update {
        rule: case.rule,
        segments: Arc::clone(segments),
        weight: if case.split { Span { bytes: p.weight.bytes / 2, ..p.weight } } else { p.weight },
        remainder: case.split.then_some(p.remainder),
        moments,
        gradient: p.gradient,
        clip: case.max_norm.map(|max_norm| Clip { max_norm, table: p.table }),
        gate: p.losses,
    };
    device.wait(0, Task::Update(Box::new(update)));
    device.wait(2, Task::Copy(vec![CopySpan { from: arena, to: host }]));
    let mut end = vec![0; p.scratch.offset as usize];
    device.read(0, &mut end);
    end
}

#[test]
fn updates_are_the_hosts_to_the_bit() {
    let adamw = |update| {
        let (betas, epsilon) = ((0.9, 0.95), 1e-8);
        UpdateRule::Adamw(AdamwRule { update, lr: 3e-3, betas, epsilon, weight_decay: 0.1 })
    };
    let sgd = |update, momentum, nesterov| {
        UpdateRule::Sgd(SgdRule { update, lr: 0.05, momentum, nesterov, weight_decay: 0.01 })
    };
    let case = |rule, split, max_norm, loss| Case { rule, split, max_norm, loss };
    let cases = [
        case(adamw(1), false, None, 1.0),
        case(adamw(3), false, Some(0.7), 1.0),
        case(adamw(3), true, Some(1e9), 1.0),
        case(adamw(7), true, Some(0.7), 1.0),
        case(adamw(2), true, Some(0.7), f32::NAN),
        case(sgd(1, 0.9, false), false, Some(0.7), 1.0),
        case(sgd(2, 0.9, true), true, None, 1.0),
        case(sgd(2, 0.9, false), false, None, f32::INFINITY),
        case(sgd(1, 0.0, false), true, Some(0.7), 1.0),
    ];
    let segments = segments();
    for (i, case) in cases.iter().enumerate() {
        let want = run(&DeviceSpec::default(), &segments, case);
        for (device, spec) in crate::devices() {
            if let DeviceSpec::Cuda { .. } = spec {
                println!("update {i}, {device} ..");
            }
            let got = run(&spec, &segments, case);
            let apart = got.iter().zip(&want).position(|(g, w)| g != w);
            assert_eq!(apart, None, "first byte that differs, case {i}, {device}");
        }
    }
    #[cfg(any(feature = "cuda", feature = "emulator"))]
    super::covered::note();
}
