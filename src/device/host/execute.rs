//! Runs a task on this thread and the rayon pool that is installed: programs op by op, copies, sums and updates.

use super::lanes::Shared;
use super::memory::Block;
use super::operands::{OpMemory, Operands};
use super::ops::run_step;
use super::optimizer::{self, AdamwStep, SgdStep};
use super::{master, widen};
use crate::base::Result;
use crate::device::{Clip, CopySpan, Memory, Norm, Run, Span, Task, Update, UpdateRule};
use crate::graph::Area;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// Runs `task`; with [`Run::check`] gives the first layer whose output is not finite.
pub(super) fn execute(task: &Task, shared: &Shared) -> Result<Option<usize>> {
    match task {
        Task::Run(run) => return execute_run(run, shared),
        Task::Copy(spans) => spans.iter().try_for_each(|span| copy(span, shared))?,
        Task::Add(spans) => spans.iter().for_each(|span| {
            let (acc, x) = (elements_mut::<f32>(shared, span.to), elements::<f32>(shared, span.from));
            optimizer::add_assign(acc, x);
        }),
        Task::Norm(norm) => sum_squares(norm, shared),
        Task::Update(update) => execute_update(update, shared),
    }
    Ok(None)
}

/// Notes that a task touches `span`.
fn touch(shared: &Shared, span: Span) {
    if let Memory::Device(device) = span.memory
        && span.bytes > 0
    {
        shared.high_water[device as usize].fetch_max(span.end(), Ordering::Relaxed);
    }
}

/// Copies alone go from and to the disk.
const ON_DISK: &str = "arithmetic on what lies on the disk";

fn bytes(shared: &Shared, span: Span) -> &[u8] {
    touch(shared, span);
    match span.memory {
        // SAFETY: the executor orders every writer of these bytes before or after this task by tickets.
        Memory::Host => unsafe { shared.host.slice(span.offset, span.bytes) },
        // SAFETY: as above.
        Memory::Device(device) => unsafe { shared.arenas[device as usize].slice(span.offset, span.bytes) },
        Memory::Disk => unreachable!("{ON_DISK}"),
    }
}

#[expect(clippy::mut_from_ref, reason = "the order of tasks is what makes it exclusive")]
fn bytes_mut(shared: &Shared, span: Span) -> &mut [u8] {
    touch(shared, span);
    match span.memory {
        // SAFETY: the executor orders every other user of these bytes before or after this task by tickets.
        Memory::Host => unsafe { shared.host.slice_mut(span.offset, span.bytes) },
        // SAFETY: as above.
        Memory::Device(device) => unsafe { shared.arenas[device as usize].slice_mut(span.offset, span.bytes) },
        Memory::Disk => unreachable!("{ON_DISK}"),
    }
}

fn elements<T: bytemuck::Pod>(shared: &Shared, span: Span) -> &[T] {
    bytemuck::cast_slice(bytes(shared, span))
}

fn elements_mut<T: bytemuck::Pod>(shared: &Shared, span: Span) -> &mut [T] {
    bytemuck::cast_slice_mut(bytes_mut(shared, span))
}

fn copy(span: &CopySpan, shared: &Shared) -> Result<()> {
    let CopySpan { from, to } = *span;
    match (from.memory, to.memory) {
        (Memory::Disk, _) => shared.disk()?.read(from.offset, bytes_mut(shared, to)),
        (_, Memory::Disk) => shared.disk()?.write(to.offset, bytes(shared, from)),
        _ => {
            bytes_mut(shared, to).copy_from_slice(bytes(shared, from));
            Ok(())
        }
    }
}

fn execute_run(run: &Run, shared: &Shared) -> Result<Option<usize>> {
    let arena = &shared.arenas[run.device as usize];
    let mut op_memory = shared.op_memory[run.device as usize].lock().unwrap_or_else(PoisonError::into_inner);
    let OpMemory { wide, scratch } = &mut *op_memory;
    let wide_bytes = widen::program_bytes(&run.program);
    if wide_bytes > wide.bytes() {
        *wide = Block::new(wide_bytes, "f32 copies of bf16 operands")?;
    }
    for (area, &bytes) in run.program.area_bytes.iter().enumerate() {
        touch(shared, Span { memory: Memory::Device(run.device), offset: run.bases[area], bytes });
    }
    let mut not_finite = None;
    for step in &run.program.steps {
        let operands = Operands { step, arena, bases: &run.bases, wide };
        if !run_step(&operands, &run.scalars, run.check, scratch) {
            not_finite = not_finite.or(Some(step.layer));
        }
    }
    debug_assert!(run.bases.iter().enumerate().all(|(a, b)| a == Area::Inputs as usize || b % 4 == 0));
    Ok(not_finite)
}

fn sum_squares(norm: &Norm, shared: &Shared) {
    let gradient = elements::<f32>(shared, norm.gradient);
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

/// The weights of an update.
enum Weights<'a> {
    F32(&'a mut [f32]),
    /// With the lower halves of their masters.
    Bf16(&'a mut [u16], &'a mut [u16]),
}

fn execute_update(update: &Update, shared: &Shared) {
    if !elements::<f32>(shared, update.gate).iter().all(|loss| loss.is_finite()) {
        return;
    }
    let grad_scale = clip_factor(update.clip, shared);
    let mut weights = match update.remainder {
        None => Weights::F32(elements_mut(shared, update.weight)),
        Some(remainder) => Weights::Bf16(elements_mut(shared, update.weight), elements_mut(shared, remainder)),
    };
    let gradient = elements::<f32>(shared, update.gradient);
    let mut moments = update.moments.map(|m| m.map(|m| elements_mut::<f32>(shared, m)));
    for segment in update.segments.iter() {
        let range = segment.offset as usize..(segment.offset + segment.elems) as usize;
        let gradient = &gradient[range.clone()];
        let [first, second] = &mut moments;
        match update.rule {
            UpdateRule::Adamw(rule) => {
                let decay = if segment.decay { rule.weight_decay } else { 0.0 };
                let step = AdamwStep::new(rule.update, rule.lr, rule.betas, rule.epsilon, decay, grad_scale);
                let (Some(m), Some(v)) = (first, second) else { unreachable!("AdamW has two moments") };
                let (m, v) = (&mut m[range.clone()], &mut v[range.clone()]);
                match &mut weights {
                    Weights::F32(weight) => optimizer::adamw(&mut weight[range], m, v, gradient, &step),
                    Weights::Bf16(weight, low) => {
                        master::adamw(&mut weight[range.clone()], &mut low[range], m, v, gradient, &step);
                    }
                }
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
                let buffer = first.as_mut().map_or(&mut [][..], |m| &mut m[range.clone()]);
                match &mut weights {
                    Weights::F32(weight) => optimizer::sgd(&mut weight[range], buffer, gradient, &step),
                    Weights::Bf16(weight, low) => {
                        master::sgd(&mut weight[range.clone()], &mut low[range], buffer, gradient, &step);
                    }
                }
            }
        }
    }
}
