//! Launches of `kernels/optimizer.cu`: updates, sums of squares, sums of accumulators, and the look for what is not
//! finite.
//!
//! A launch takes the tensors it works on in its arguments, up to [`SEGMENTS`] of them, so nothing is uploaded and
//! nothing is waited for.

use super::elementwise::{THREADS, pointwise};
use super::launch::{Launch, Ptr};
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::{DType, Result};
use crate::device::host::optimizer::{AdamwConstants, AdamwStep, SUM_BLOCK};
use crate::device::{AdamwRule, Norm, Segment, SgdRule, Span, Update, UpdateRule};
use std::sync::Arc;

/// Tensors that one launch takes.
const SEGMENTS: usize = 160;
/// Blocks of [`SUM_BLOCK`] elements that a thread block sums the squares of.
const SUM_WARPS: usize = 8;

/// Tensors of one launch: `Segments` in the kernels.
struct Batch {
    words: Arc<[u64]>,
    count: usize,
    /// Blocks of [`SUM_BLOCK`] elements.
    blocks: usize,
}

/// Cuts `segments` into launches. Blocks are numbered through all of them.
fn batches(segments: &[Segment]) -> impl Iterator<Item = Batch> {
    let mut block = 0;
    segments.chunks(SEGMENTS).map(move |chunk| {
        let first = block;
        // Two fields of 32 bits, as they lie in memory.
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let mut words = vec![0; 1 + 3 * SEGMENTS];
        words[0] = pair(chunk.len() as u32, first as u32);
        for (to, segment) in words[1..].chunks_exact_mut(3).zip(chunk) {
            let tensor = segment.index << 1 | u32::from(segment.decay);
            to.copy_from_slice(&[segment.offset, segment.elems, pair(block as u32, tensor)]);
            block += segment.elems.div_ceil(SUM_BLOCK as u64) as usize;
        }
        Batch { words: words.into(), count: chunk.len(), blocks: block - first }
    })
}

impl Batch {
    /// As the last argument of a launch.
    fn of(&self, launch: Launch) -> Launch {
        launch.large(Arc::clone(&self.words))
    }
}

/// `acc[i] += x[i]` over `elems` floats.
pub(super) fn add(q: &mut Queue, acc: Ptr, x: Ptr, elems: usize) -> Result<()> {
    q.launch(pointwise("optimizer_add", elems, DType::F32).ptr(acc).ptr(x).long(elems))
}

/// Sums of squares by tensor; `at` gives a span's address.
pub(super) fn norm(q: &mut Queue, norm: &Norm, at: &dyn Fn(Span) -> Ptr) -> Result<()> {
    let sums = norm.scratch.map_or(Ptr::NULL, at);
    for batch in batches(&norm.segments) {
        let grid = [batch.blocks.div_ceil(SUM_WARPS), 1, 1];
        let blocks = Launch::new("sum_squares_blocks", grid, 32 * SUM_WARPS as u32).ptr(sums);
        q.launch(batch.of(blocks.ptr(at(norm.gradient)).int(batch.blocks)))?;
        let tensors = Launch::new("sum_squares_tensors", [batch.count, 1, 1], 32);
        q.launch(batch.of(tensors.ptr(at(norm.table)).ptr(sums)))?;
    }
    Ok(())
}

/// An update of a shard's flat state.
pub(super) fn update(q: &mut Queue, update: &Update, at: &dyn Fn(Span) -> Ptr) -> Result<()> {
    let gate = q.passed_on();
    let (table, max_norm) = update.clip.map_or((Ptr::NULL, 0.0), |clip| (at(clip.table), clip.max_norm));
    let tensors = update.clip.map_or(0, |clip| clip.table.bytes / 8) as usize;
    let open = Launch::new("update_gate", [1, 1, 1], 32).ptr(gate).ptr(table).int(tensors).double(max_norm);
    q.launch(open.ptr(at(update.gate)).int((update.gate.bytes / 4) as usize))?;
    let [first, second] = update.moments.map(|moment| moment.map_or(Ptr::NULL, at));
    let (kernels, buffer, numbers) = match update.rule {
        UpdateRule::Adamw(rule) => (["adamw_f32", "adamw_bf16"], first, adamw_numbers(&rule)),
        // Without momentum there is no buffer.
        UpdateRule::Sgd(rule) => {
            let buffer = if rule.momentum == 0.0 { Ptr::NULL } else { first };
            (["sgd_f32", "sgd_bf16"], buffer, sgd_numbers(&rule))
        }
    };
    for batch in batches(&update.segments) {
        let mut launch = Launch::new(kernels[usize::from(update.remainder.is_some())], [batch.blocks, 1, 1], THREADS);
        launch = launch.ptr(at(update.weight));
        if let Some(remainder) = update.remainder {
            launch = launch.ptr(at(remainder));
        }
        launch = launch.ptr(buffer);
        if let UpdateRule::Adamw(_) = update.rule {
            launch = launch.ptr(second);
        }
        launch = launch.ptr(at(update.gradient)).ptr(gate).bytes(&numbers, 4);
        q.launch(batch.of(launch))?;
    }
    Ok(())
}

/// Numbers of a kernel's argument, four bytes each. Padded with zeros: no kernel takes more than [`AdamwRule`]'s.
type Numbers = [u8; 32];

fn numbers(words: impl IntoIterator<Item = u32>) -> Numbers {
    let mut bytes = [0; 32];
    for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// `AdamwNumbers` in the kernels. The gradients' scale comes from the gate instead.
fn adamw_numbers(rule: &AdamwRule) -> Numbers {
    let constants = |decay: f64| -> AdamwConstants<f32> {
        AdamwStep::new(rule.update, rule.lr, rule.betas, rule.epsilon, decay, 1.0).constants()
    };
    let (decayed, plain) = (constants(rule.weight_decay), constants(0.0));
    let floats = [
        decayed.keep,
        plain.keep,
        plain.one_minus_beta1,
        plain.beta2,
        plain.one_minus_beta2,
        plain.root_correction,
        plain.epsilon,
        plain.minus_step_size,
    ];
    numbers(floats.map(f32::to_bits))
}

/// `SgdNumbers` in the kernels.
fn sgd_numbers(rule: &SgdRule) -> Numbers {
    let floats = [rule.weight_decay, -rule.lr, rule.momentum].map(|x| (x as f32).to_bits());
    numbers(floats.into_iter().chain([u32::from(rule.update == 1), u32::from(rule.nesterov)]))
}

/// Looks at output 0 for what is not finite; `q.layer` keeps the lowest `layer` where there is any.
pub(super) fn check_finite(q: &mut Queue, o: &Operands, layer: usize) -> Result<()> {
    let (dtype, cols, pitch) = (o.out_dtype(0), o.out_cols().max(1), o.out_pitch().max(1));
    let elems = o.out_elems(0) / cols * pitch;
    let launch = pointwise(pick(dtype, "finite_check_f32", "finite_check_bf16"), elems, dtype);
    q.launch(launch.ptr(q.layer).ptr(o.output(0)).long(elems).int(cols).int(pitch).int(layer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_the_same_blocks() {
        let source = include_str!("../../../kernels/optimizer.cu");
        for (name, value) in [("BLOCK_ELEMS", SUM_BLOCK), ("SEGMENTS", SEGMENTS), ("SUM_WARPS", SUM_WARPS)] {
            assert!(source.contains(&format!("constexpr int {name} = {value};")), "{name}");
        }
    }

    #[test]
    fn blocks_are_numbered_through_all_launches() {
        let segment =
            |i: u32| Segment { offset: 64 * u64::from(i), elems: 5000 * u64::from(i % 2), decay: i == 3, index: i };
        let segments: Vec<Segment> = (0..SEGMENTS as u32 + 4).map(segment).collect();
        let batches: Vec<Batch> = batches(&segments).collect();
        assert_eq!([batches[0].count, batches[1].count], [SEGMENTS, 4]);
        assert_eq!([batches[0].blocks, batches[1].blocks], [SEGMENTS, 4]);
        // Count and first block; of the fourth tensor start, elements, first block, number and decay.
        assert_eq!([batches[0].words[0], batches[1].words[0]], [SEGMENTS as u64, (SEGMENTS as u64) << 32 | 4]);
        assert_eq!(batches[0].words[10..13], [192, 5000, 7 << 32 | 2]);
    }
}
