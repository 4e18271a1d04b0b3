//! What goes in and out of the host's store: batches, weights, moments, losses.

use super::Engine;
use super::queue::Order;
use crate::base::{Error, Result};
use crate::device::{CopySpan, Memory, Span, Task};
use crate::trace::{TaskName, What};

/// A tensor's place in the flat order, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// A weight.
    Weight,
    /// A moment of the optimizer: 0 the first, 1 the second.
    Moment(usize),
}

impl Engine {
    /// Bytes `from` the host's map.
    fn host(&self, offset: u64, bytes: u64) -> Span {
        Span { memory: Memory::Host, offset, bytes }
    }

    fn flat(&self, what: Stored) -> u64 {
        match what {
            Stored::Weight => self.plan.host.weights,
            Stored::Moment(i) => self.plan.host.moments[i],
        }
    }

    /// Writes a parameter's elements, or its moment's, into the host's store. Call it before the first step.
    pub fn write_parameter(&mut self, what: Stored, parameter: usize, values: &[f32]) {
        let offset = self.flat(what) + self.model.layout.parameter[parameter];
        self.device.write_host(offset, bytemuck::cast_slice(values));
    }

    /// Reads a parameter's elements, or its moment's, from the host's store. Call [`Engine::wait_home`] first.
    pub fn read_parameter(&self, what: Stored, parameter: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.model.train.parameters[parameter].shape.elems()];
        let offset = self.flat(what) + self.model.layout.parameter[parameter];
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
        let mut values = vec![0.0; self.model.train.states[state].shape.elems()];
        let offset = self.plan.host.states + self.model.layout.state[state];
        self.device.read_host(offset, bytemuck::cast_slice_mut(&mut values));
        values
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
            if self.rings.moments_fetched {
                for i in 0..plan.moments {
                    copies.push(self.to_home(plan.arena.moments[i][s], plan.host.moments[i] + own.start, bytes));
                }
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
            let want = self.model.microbatches as u64 * graph.bytes(graph.inputs[i].value);
            if bytes.len() as u64 != want {
                return Err(Error::bad(format!(
                    "step {step}: input {} has {} bytes, the model takes {want}",
                    graph.inputs[i].name,
                    bytes.len()
                )));
            }
            self.device.write_host(self.plan.host.inputs[(step % 2) as usize][i], bytes);
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
        let logits = self.model.eval.as_ref().and_then(|g| Some(g.info(g.logits?).shape.elems())).unwrap_or(0);
        let mut values = vec![0.0; logits];
        self.device.read_host(self.plan.host.logits, bytemuck::cast_slice_mut(&mut values));
        values
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
