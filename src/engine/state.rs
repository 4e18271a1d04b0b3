//! What goes in and out of the host's store: batches, weights, moments, losses.

use super::Engine;
use super::queue::Order;
use crate::base::{DType, Error, Result};
use crate::device::host::master;
use crate::device::{CopySpan, Device, Memory, Span, Task};
use crate::trace::{TaskName, What};
use half::bf16;

/// A tensor's place in the flat order, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// A weight; of a bf16 one its f32 master.
    Weight,
    /// A moment of the optimizer: 0 the first, 1 the second.
    Moment(usize),
}

impl Engine {
    /// Bytes `from` the host's map.
    fn host(&self, offset: u64, bytes: u64) -> Span {
        Span { memory: Memory::Host, offset, bytes }
    }

    /// Writes a parameter's elements, or its moment's, into the host's store. Call it before the first step.
    pub fn write_parameter(&mut self, what: Stored, parameter: usize, values: &[f32]) {
        let (host, at) = (&self.plan.host, self.model.layout.parameter[parameter]);
        match what {
            Stored::Weight if self.model.has_remainders() => {
                let (weights, remainders) = (host.weights + at, host.remainders + at);
                let (high, low): (Vec<u16>, Vec<u16>) = values.iter().map(|&x| master::split(x)).unzip();
                self.device.write_host(weights, bytemuck::cast_slice(&high));
                self.device.write_host(remainders, bytemuck::cast_slice(&low));
            }
            Stored::Weight => self.device.write_host(host.weights + at, bytemuck::cast_slice(values)),
            Stored::Moment(i) => {
                let offset = host.moments[i] + at * self.model.layout.wide_ratio;
                self.device.write_host(offset, bytemuck::cast_slice(values));
            }
        }
    }

    /// Reads a parameter's elements, or its moment's, from the host's store. Call [`Engine::wait_home`] first.
    pub fn read_parameter(&self, what: Stored, parameter: usize) -> Vec<f32> {
        let (host, at) = (&self.plan.host, self.model.layout.parameter[parameter]);
        let elems = self.model.train.parameters[parameter].shape.elems();
        match what {
            Stored::Weight if self.model.has_remainders() => {
                let (high, low) =
                    (self.read::<u16>(host.weights + at, elems), self.read::<u16>(host.remainders + at, elems));
                high.into_iter().zip(low).map(|(high, low)| master::join(high, low)).collect()
            }
            Stored::Weight => self.read(host.weights + at, elems),
            Stored::Moment(i) => self.read(host.moments[i] + at * self.model.layout.wide_ratio, elems),
        }
    }

    /// Elements of the host's store.
    fn read<T: bytemuck::Pod>(&self, offset: u64, elems: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); elems];
        self.device.read_host(offset, bytemuck::cast_slice_mut(&mut values));
        values
    }

    /// Writes a state's elements into the host's store. Call it before the first step.
    pub fn write_state(&mut self, state: usize, values: &[f32]) {
        let offset = self.plan.host.states + self.model.layout.state[state];
        self.device.write_host(offset, bytemuck::cast_slice(values));
    }

    /// Reads a state's elements from the host's store. Call [`Engine::wait_home`] first.
    pub fn read_state(&self, state: usize) -> Vec<f32> {
        let offset = self.plan.host.states + self.model.layout.state[state];
        self.read(offset, self.model.train.states[state].shape.elems())
    }

    /// Waits until every weight, moment and state is in the host's store.
    ///
    /// # Errors
    /// When a task fails or stalls.
    pub fn wait_home(&mut self) -> Result<()> {
        self.wait_idle()?;
        if !self.plan.choice.resident {
            return Ok(());
        }
        let plan = std::sync::Arc::clone(&self.plan);
        for (s, shard) in plan.shards.iter().enumerate() {
            if !self.rings.weights.has(s, s) {
                continue;
            }
            let own = &shard.layout.own;
            let bytes = own.end - own.start;
            let slot = plan.arena.weight_slots[s];
            let mut copies = vec![self.to_home(slot, plan.host.weights + own.start, bytes)];
            let states = &shard.layout.states;
            copies.push(self.to_home(
                slot + plan.arena.states_at[s],
                plan.host.states + states.start,
                states.end - states.start,
            ));
            if self.rings.state_fetched {
                copies.extend(self.update_state(s, own).map(|(from, to)| CopySpan { from, to }));
            }
            copies.retain(|c| c.from.bytes > 0);
            let (reads, writes): (Vec<Span>, Vec<Span>) = copies.iter().map(|c| (c.from, c.to)).unzip();
            let name =
                TaskName { what: What::SpillState, model: self.options.model, shard: s as u16, microbatch: None };
            let order =
                Order { lane: self.lanes.d2h, task: Task::Copy(copies), name, step: u64::MAX, deadline: self.sequence };
            self.queue.add(order, &reads, &writes);
        }
        self.wait_idle()
    }

    fn to_home(&self, arena: u64, host: u64, bytes: u64) -> CopySpan {
        CopySpan { from: Span { memory: Memory::Device(0), offset: arena, bytes }, to: self.host(host, bytes) }
    }

    /// Copies a minibatch into the staging memory of its step. The step before the last has ended, so nobody reads there.
    pub(super) fn stage(&mut self, step: u64, inputs: &[&[u8]]) -> Result<()> {
        let graph = &self.model.train;
        if inputs.len() != graph.inputs.len() {
            return Err(Error::bad(format!(
                "step {step}: {} inputs, the model takes {}",
                inputs.len(),
                graph.inputs.len()
            )));
        }
        if !self.device.computes() {
            return Ok(());
        }
        for (i, bytes) in inputs.iter().enumerate() {
            let dtype = graph.inputs[i].dtype;
            // Floats come as f32 and are rounded on the way, to the nearest, ties to even.
            let ratio = dtype.wide().bytes() / dtype.bytes();
            let want = self.model.microbatches as u64 * graph.bytes(graph.inputs[i].value) * ratio;
            if bytes.len() as u64 != want {
                return Err(Error::bad(format!(
                    "step {step}: input {} has {} bytes, the model takes {want}",
                    graph.inputs[i].name,
                    bytes.len()
                )));
            }
            let offset = self.plan.host.inputs[(step % 2) as usize][i];
            if dtype == DType::Bf16 {
                write_rounded(self.device.as_mut(), offset, bytes);
            } else {
                self.device.write_host(offset, bytes);
            }
        }
        Ok(())
    }

    /// The loss of a step whose results have arrived: the microbatches' shares, added in order in f64.
    pub(super) fn read_loss(&self, step: u64) -> f32 {
        let mut sum = 0.0f64;
        for m in 0..self.model.microbatches as u64 {
            let mut bytes = [0; 4];
            self.device.read_host(self.plan.host.losses[(step % 2) as usize] + 4 * m, &mut bytes);
            sum += f64::from(f32::from_le_bytes(bytes));
        }
        sum as f32
    }

    /// The logits of an evaluation that has ended.
    pub(super) fn read_logits(&self) -> Vec<f32> {
        let Some((graph, logits)) = self.model.eval.as_ref().and_then(|g| Some((g, g.logits?))) else {
            return Vec::new();
        };
        let (elems, at) = (graph.info(logits).shape.elems(), self.plan.host.logits);
        match graph.info(logits).dtype {
            DType::Bf16 => self.read::<u16>(at, elems).into_iter().map(|x| bf16::from_bits(x).to_f32()).collect(),
            _ => self.read(at, elems),
        }
    }

    /// The gradient's global norm of a step that has ended: tensors in flat order, in f64.
    pub(super) fn grad_norm(&self, step: u64) -> f64 {
        let mut sum = 0.0;
        for i in 0..self.model.train.parameters.len() as u64 {
            let mut bytes = [0; 8];
            self.device.read_host(self.plan.host.norms[(step % 2) as usize] + 8 * i, &mut bytes);
            sum += f64::from_le_bytes(bytes);
        }
        sum.sqrt()
    }
}

/// Writes f32 values as bf16 into the host's store, piece by piece, so that nothing is allocated.
fn write_rounded(device: &mut dyn Device, offset: u64, values: &[u8]) {
    const PIECE: usize = 1024;
    for (i, values) in values.chunks(4 * PIECE).enumerate() {
        let mut piece = [bf16::ZERO; PIECE];
        let values = values.as_chunks::<4>().0;
        piece.iter_mut().zip(values).for_each(|(to, &from)| *to = bf16::from_f32(f32::from_le_bytes(from)));
        let bits = piece.map(bf16::to_bits);
        device.write_host(offset + (2 * PIECE * i) as u64, bytemuck::cast_slice(&bits[..values.len()]));
    }
}
