//! Runs a task on this thread and the rayon pool that is installed: programs op by op, copies, sums and updates.

use super::lanes::Shared;
use super::memory::Block;
use super::ops::run_step;
use super::optimizer::{self, AdamwStep, SgdStep};
use super::real::Real;
use crate::base::Result;
use crate::device::{Clip, CopySpan, Memory, Norm, Run, Span, Task, Update, UpdateRule};
use crate::graph::Area;
use std::sync::atomic::Ordering;

/// Runs `task`; with [`Run::check`] gives the first layer whose output is not finite.
pub(super) fn execute(task: &Task, shared: &Shared) -> Result<Option<usize>> {
    match task {
        Task::Run(run) => return Ok(execute_run(run, shared)),
        Task::Copy(spans) => spans.iter().for_each(|span| copy(span, shared)),
        Task::Add(spans) => spans.iter().for_each(|span| {
            let (acc, x) = (floats_mut::<f32>(shared, span.to), floats::<f32>(shared, span.from));
            optimizer::add_assign(acc, x);
        }),
        Task::Norm(norm) => sum_squares(norm, shared),
        Task::Update(update) => execute_update(update, shared),
    }
    Ok(None)
}

fn block(shared: &Shared, memory: Memory) -> &Block {
    match memory {
        Memory::Host => &shared.host,
        Memory::Device(device) => &shared.arenas[device as usize],
    }
}

/// Notes that a task touches `span`.
fn touch(shared: &Shared, span: Span) {
    if let Memory::Device(device) = span.memory
        && span.bytes > 0
    {
        shared.high_water[device as usize].fetch_max(span.end(), Ordering::Relaxed);
    }
}

fn bytes(shared: &Shared, span: Span) -> &[u8] {
    touch(shared, span);
    // SAFETY: the executor orders every writer of these bytes before or after this task by tickets.
    unsafe { block(shared, span.memory).slice(span.offset, span.bytes) }
}

#[expect(clippy::mut_from_ref, reason = "the order of tasks is what makes it exclusive")]
fn bytes_mut(shared: &Shared, span: Span) -> &mut [u8] {
    touch(shared, span);
    // SAFETY: the executor orders every other user of these bytes before or after this task by tickets.
    unsafe { block(shared, span.memory).slice_mut(span.offset, span.bytes) }
}

fn floats<T: Real>(shared: &Shared, span: Span) -> &[T] {
    bytemuck::cast_slice(bytes(shared, span))
}

fn floats_mut<T: Real>(shared: &Shared, span: Span) -> &mut [T] {
    bytemuck::cast_slice_mut(bytes_mut(shared, span))
}

fn copy(span: &CopySpan, shared: &Shared) {
    bytes_mut(shared, span.to).copy_from_slice(bytes(shared, span.from));
}

fn execute_run(run: &Run, shared: &Shared) -> Option<usize> {
    let arena = &shared.arenas[run.device as usize];
    for (area, &bytes) in run.program.area_bytes.iter().enumerate() {
        touch(shared, Span { memory: Memory::Device(run.device), offset: run.bases[area], bytes });
    }
    let float = run.program.steps.iter().flat_map(|s| s.outputs.iter().flatten()).map(|b| b.dtype).next();
    let mut not_finite = None;
    for step in &run.program.steps {
        let result = match float {
            Some(crate::base::DType::F64) => run_step::<f64>(step, arena, &run.bases, &run.scalars, run.check),
            _ => run_step::<f32>(step, arena, &run.bases, &run.scalars, run.check),
        };
        if run.check && step.ends_layer && !result {
            not_finite = not_finite.or(Some(step.layer));
        }
    }
    debug_assert!(run.bases.iter().enumerate().all(|(a, b)| a == Area::Inputs as usize || b % 4 == 0));
    not_finite
}

fn sum_squares(norm: &Norm, shared: &Shared) {
    let gradient = floats::<f32>(shared, norm.gradient);
    for segment in norm.segments.iter() {
        let tensor = &gradient[segment.offset as usize..][..segment.elems as usize];
        let entry = Span { offset: norm.table.offset + 8 * u64::from(segment.index), bytes: 8, ..norm.table };
        bytes_mut(shared, entry).copy_from_slice(&optimizer::sum_squares(tensor).to_le_bytes());
    }
}

/// The factor that clipping multiplies gradients by.
fn clip_factor(clip: Option<Clip>, shared: &Shared) -> f64 {
    let Some(Clip { max_norm, table }) = clip else { return 1.0 };
    let squares = bytes(shared, table).chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes")));
    let norm = squares.fold(0.0, |sum, square| sum + square).sqrt();
    // A NaN norm must reach the weights, so that the next loss shows it: min would hide it.
    let factor = max_norm / (norm + 1e-6);
    if factor >= 1.0 { 1.0 } else { factor }
}

fn execute_update(update: &Update, shared: &Shared) {
    if !floats::<f32>(shared, update.gate).iter().all(|loss| loss.is_finite()) {
        return;
    }
    let grad_scale = clip_factor(update.clip, shared);
    let weight = floats_mut::<f32>(shared, update.weight);
    let gradient = floats::<f32>(shared, update.gradient);
    let mut moments = update.moments.map(|m| m.map(|m| floats_mut::<f32>(shared, m)));
    for segment in update.segments.iter() {
        let range = segment.offset as usize..(segment.offset + segment.elems) as usize;
        let (weight, gradient) = (&mut weight[range.clone()], &gradient[range.clone()]);
        let [first, second] = &mut moments;
        match update.rule {
            UpdateRule::Adamw(rule) => {
                let decay = if segment.decay { rule.weight_decay } else { 0.0 };
                let step = AdamwStep::new(rule.update, rule.lr, rule.betas, rule.epsilon, decay, grad_scale);
                let (Some(m), Some(v)) = (first, second) else { unreachable!("AdamW has two moments") };
                optimizer::adamw(weight, &mut m[range.clone()], &mut v[range], gradient, &step);
            }
            UpdateRule::Sgd(rule) => {
                let step = SgdStep {
                    lr: rule.lr,
                    momentum: rule.momentum,
                    nesterov: rule.nesterov,
                    weight_decay: if segment.decay { rule.weight_decay } else { 0.0 },
                    grad_scale,
                    first: rule.update == 1,
                };
                let buffer = first.as_mut().map_or(&mut [][..], |m| &mut m[range]);
                optimizer::sgd(weight, buffer, gradient, &step);
            }
        }
    }
}
