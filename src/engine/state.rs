//! What goes in and out of the host's store: batches, weights, moments, losses.

use super::member::Whole;
use super::{EVALUATIONS, Engine};
use crate::base::{DType, Error, IGNORED, Result, Shape};
use crate::device::host::master;
use crate::device::{Attached, CopySpan, Memory, Span};
use crate::graph::{Graph, Input, State};
use crate::trace::What;
use half::bf16;
use std::sync::Arc;

/// A tensor's place in the flat order, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// A weight; of a bf16 one its f32 master.
    Weight,
    /// A moment of the optimizer: 0 the first, 1 the second.
    Moment(usize),
}

/// Why a model's state is neither read nor brought home any more.
const OF_NO_STEP: &str = "the model has ended in the middle of a step, and what that has left is of none";

impl Engine {
    /// Where in the host's store `offset` of a model's part of it lies.
    fn home(&self, model: usize, offset: u64) -> u64 {
        self.members[model].store + offset
    }

    /// Where a parameter is at home, or its moment, and of a bf16 weight the remainder.
    fn at_home(&self, model: usize, what: Stored, parameter: usize) -> (Span, Option<Span>) {
        let site = self.site(model, 0);
        let (host, at) = (&site.plan.host, site.model.layout.parameter[parameter]);
        let elems = site.model.train.parameters[parameter].shape.elems() as u64;
        let float = site.model.train.float.bytes();
        match what {
            Stored::Weight => {
                let weight = site.weights(at, elems * float);
                let remainder = || site.update_state(host.remainders + at, weight.bytes);
                (weight, site.model.has_remainder(parameter).then(remainder))
            }
            Stored::Moment(i) => {
                (site.update_state(host.moments[i] + at * site.model.layout.wide_ratio, elems * 4), None)
            }
        }
    }

    /// Refuses what a model does not have.
    fn check_stored(&self, model: usize, what: Stored, parameter: usize) -> Result<()> {
        let member = &self.members[model];
        let (parameters, moments) = (member.model.train.parameters.len(), member.plan.updates.moments);
        match what {
            _ if parameter >= parameters => {
                Err(Error::bad(format!("parameter {parameter}: the model has {parameters}")))
            }
            Stored::Moment(_) if member.model.train.parameters[parameter].frozen => Err(Error::bad(format!(
                "{}: is frozen and has no moments",
                member.model.train.parameters[parameter].name
            ))),
            Stored::Moment(i) if i >= moments => Err(Error::bad(format!("moment {i}: the plan keeps {moments}"))),
            _ => Ok(()),
        }
    }

    /// Refuses elements that are not as many as a tensor has, or that a model is not at rest for; from then on devices
    /// read what lies at home.
    fn check_written(&mut self, model: usize, name: &str, shape: &Shape, elems: usize) -> Result<()> {
        if shape.elems() != elems {
            return Err(Error::bad(format!("{name}: {elems} elements, its shape is {shape}")));
        }
        let member = &mut self.members[model];
        if !member.at_home || !member.is_at_rest() {
            return Err(Error::bad(format!("{name}: is written before the first step, or after wait_home")));
        }
        member.state_fetched = None;
        for &rings in &member.rings {
            self.rings[rings].forget_model(model, |_| false);
        }
        Ok(())
    }

    /// Refuses to read what is older than what a step has left on a device, and what is of no step: of a model that has
    /// ended before its time. After a failure other lanes may still be writing.
    fn check_read(&self, model: usize, name: &str, least: Whole) -> Result<()> {
        self.check_device()?;
        let member = &self.members[model];
        Err(Error::bad(match (member.whole, least) {
            (Whole::Nothing, _) => format!("{name}: {OF_NO_STEP}"),
            (Whole::Parameters, Whole::All) => {
                format!("{name}: the step whose loss is not finite has changed it, and it is of no step")
            }
            _ if member.at_home => return Ok(()),
            _ => format!("{name}: steps were begun since it was at home; wait_home comes first"),
        }))
    }

    /// Writes a parameter's elements, or its moment's, to where it is at home: before the model's first step, or after
    /// [`Engine::wait_home`].
    ///
    /// # Errors
    /// When there is no such parameter or moment, it has another number of elements, or a step has begun since the
    /// model was at home; when it is at home on the disk, and that fails.
    pub fn write_parameter(&mut self, model: usize, what: Stored, parameter: usize, values: &[f32]) -> Result<()> {
        self.check_stored(model, what, parameter)?;
        let shared = Arc::clone(&self.members[model].model);
        let of = &shared.train.parameters[parameter];
        self.check_written(model, &of.name, &of.shape, values.len())?;
        let (place, remainder) = self.at_home(model, what, parameter);
        if what != Stored::Weight || shared.train.float != DType::Bf16 {
            return self.write_at(place, bytemuck::cast_slice(values));
        }
        let (high, low): (Vec<u16>, Vec<u16>) = values.iter().map(|&x| master::split(x)).unzip();
        self.write_at(place, bytemuck::cast_slice(&high))?;
        remainder.map_or(Ok(()), |remainder| self.write_at(remainder, bytemuck::cast_slice(&low)))
    }

    /// Reads a parameter's elements, or its moment's, from where it is at home.
    ///
    /// # Errors
    /// When there is no such parameter or moment, steps were begun since the last [`Engine::wait_home`], or the model
    /// has ended in the middle of a step; when it is at home on the disk, and that fails.
    pub fn read_parameter(&self, model: usize, what: Stored, parameter: usize) -> Result<Vec<f32>> {
        self.check_stored(model, what, parameter)?;
        self.check_read(model, &self.members[model].model.train.parameters[parameter].name, Whole::Parameters)?;
        let (place, remainder) = self.at_home(model, what, parameter);
        if what != Stored::Weight || self.members[model].model.train.float != DType::Bf16 {
            return self.read_at(place);
        }
        let high = self.read_at::<u16>(place)?;
        match remainder {
            Some(remainder) => {
                Ok(high.into_iter().zip(self.read_at(remainder)?).map(|(high, low)| master::join(high, low)).collect())
            }
            None => Ok(high.into_iter().map(|high| bf16::from_bits(high).to_f32()).collect()),
        }
    }

    fn write_at(&mut self, place: Span, bytes: &[u8]) -> Result<()> {
        debug_assert_eq!(place.bytes, bytes.len() as u64);
        match place.memory {
            Memory::Disk => self.device.write_disk(place.offset, bytes),
            _ => {
                self.device.write_host(place.offset, bytes);
                Ok(())
            }
        }
    }

    fn read_at<T: bytemuck::Pod>(&self, place: Span) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); place.bytes as usize / size_of::<T>()];
        match place.memory {
            Memory::Disk => self.device.read_disk(place.offset, bytemuck::cast_slice_mut(&mut values))?,
            _ => self.device.read_host(place.offset, bytemuck::cast_slice_mut(&mut values)),
        }
        Ok(values)
    }

    /// Elements of a model's part of the host's store.
    fn read<T: bytemuck::Pod>(&self, model: usize, offset: u64, elems: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); elems];
        self.device.read_host(self.home(model, offset), bytemuck::cast_slice_mut(&mut values));
        values
    }

    /// Writes a state's elements into the host's store: before the model's first step, or after [`Engine::wait_home`].
    ///
    /// # Errors
    /// When there is no such state, they are not as many as its shape has, or a step has begun since the model was at
    /// home.
    pub fn write_state(&mut self, model: usize, state: usize, values: &[f32]) -> Result<()> {
        let shared = Arc::clone(&self.members[model].model);
        let of = state_of(&shared.train, state)?;
        self.check_written(model, &of.name, &of.shape, values.len())?;
        let member = &self.members[model];
        let offset = member.store + member.plan.host.states + member.model.layout.state[state];
        self.device.write_host(offset, bytemuck::cast_slice(values));
        Ok(())
    }

    /// Reads a state's elements from the host's store.
    ///
    /// # Errors
    /// When there is no such state, or steps were begun since the last [`Engine::wait_home`]; of a model that has ended
    /// in the middle of a step, or for a loss that is not finite: a forward changes states.
    pub fn read_state(&self, model: usize, state: usize) -> Result<Vec<f32>> {
        let member = &self.members[model];
        let of = state_of(&member.model.train, state)?;
        self.check_read(model, &of.name, Whole::All)?;
        let offset = member.plan.host.states + member.model.layout.state[state];
        Ok(self.read(model, offset, of.shape.elems()))
    }

    /// Waits until nothing of a model runs, and every weight, moment and state of it is at home: in the host's store,
    /// or on the disk. Steps in flight end too, and are told afterwards as ever. Of a model that has ended before its
    /// time, and was told to have, what its last whole step has left comes home.
    ///
    /// # Errors
    /// When a device fails or stalls, or the model ends before its time and nobody was told yet; when it has ended in
    /// the middle of a step, which leaves what is of none.
    pub fn wait_home(&mut self, model: usize) -> Result<()> {
        self.check_whole(model)?;
        self.wait_rest(model)?;
        self.check_whole(model)?;
        if self.members[model].at_home {
            return Ok(());
        }
        self.make_due_updates(model);
        for s in 0..self.members[model].plan.resting_shards() {
            let device = self.members[model].home_of(s).expect("resident state is at home on a device");
            let site = self.site(model, device);
            if !self.rings[site.rings].weights.has(s, site.shard(s)) {
                continue;
            }
            let (plan, shard) = (&site.plan, &site.plan.shards[s].layout);
            let slot = site.map.weight_slots.at[s];
            let copy = |arena: u64, to: Span| CopySpan { from: site.arena(arena, to.bytes), to };
            let (own, states) = (&shard.own, &shard.states);
            let mut copies = vec![
                copy(slot, site.weights(own.start, own.end - own.start)),
                copy(
                    slot + site.map.states_at[s],
                    site.store(plan.host.states + states.start, states.end - states.start),
                ),
            ];
            if self.members[model].state_fetched.is_some() {
                copies.extend(Engine::resident_state(&site, s).map(|(from, to)| CopySpan { from, to }));
            }
            self.copy(&site, What::SpillState, s, None, copies);
        }
        self.wait_rest(model)?;
        self.members[model].at_home = true;
        Ok(())
    }

    /// Refuses a model whose end is still to be told, and one that has none of its state left.
    fn check_whole(&self, model: usize) -> Result<()> {
        self.check_device()?;
        let member = &self.members[model];
        match member.whole {
            _ if !member.over || member.why.is_some() => self.check_running(model),
            Whole::Nothing => Err(Error::bad(OF_NO_STEP)),
            Whole::Parameters | Whole::All => Ok(()),
        }
    }

    /// Waits until nothing of a model runs; what has ended is told afterwards as ever.
    fn wait_rest(&mut self, model: usize) -> Result<()> {
        while !self.members[model].is_at_rest() {
            self.wait_one()?;
        }
        self.check_device()
    }

    /// Copies a minibatch into the staging memory of its step. The step before the last has ended, so nobody reads
    /// there.
    pub(super) fn stage(&mut self, model: usize, step: u64, inputs: &[&[u8]]) -> Result<()> {
        let member = &self.members[model];
        let evaluates = EVALUATIONS.contains(&step);
        let graph = member.model.eval.as_ref().filter(|_| evaluates).unwrap_or(&member.model.train);
        let fault = |what: String| match step {
            _ if evaluates => Error::bad(format!("evaluation: {what}")),
            _ => Error::bad(format!("step {step}: {what}")),
        };
        if inputs.len() != graph.inputs.len() {
            return Err(fault(format!("{} inputs, the model takes {}", inputs.len(), graph.inputs.len())));
        }
        if !self.device.computes() {
            return Ok(());
        }
        for (i, bytes) in inputs.iter().enumerate() {
            let Input { name, value, dtype, .. } = &graph.inputs[i];
            // Floats come as f32 and are rounded on the way, to the nearest, ties to even.
            let ratio = dtype.wide().bytes() / dtype.bytes();
            let want = member.model.microbatches as u64 * graph.bytes(*value) * ratio;
            if bytes.len() as u64 != want {
                return Err(fault(format!("{name} has {} bytes, the model takes {want}", bytes.len())));
            }
            check_range(graph, i, bytes).map_err(fault)?;
        }
        for (i, bytes) in inputs.iter().enumerate() {
            let member = &self.members[model];
            let offset = member.store + member.plan.host.inputs[(step % 2) as usize][i];
            if member.model.train.inputs[i].dtype == DType::Bf16 {
                write_rounded(&mut self.device, offset, bytes);
            } else {
                self.device.write_host(offset, bytes);
            }
        }
        Ok(())
    }

    /// The loss of a step whose results have arrived: the microbatches' shares, added in order in f64.
    pub(super) fn read_loss(&self, model: usize, step: u64) -> f32 {
        self.losses(model, step).fold(0.0, |sum, loss| sum + f64::from(loss)) as f32
    }

    /// Those shares.
    pub(super) fn losses(&self, model: usize, step: u64) -> impl Iterator<Item = f32> {
        let member = &self.members[model];
        let at = self.home(model, member.plan.host.losses[(step % 2) as usize]);
        (0..member.model.microbatches as u64).map(move |m| {
            let mut bytes = [0; 4];
            self.device.read_host(at + 4 * m, &mut bytes);
            f32::from_le_bytes(bytes)
        })
    }

    /// The logits of an evaluation that has ended.
    pub(super) fn read_logits(&self, model: usize) -> Vec<f32> {
        let member = &self.members[model];
        let Some((graph, logits)) = member.model.eval.as_ref().and_then(|g| Some((g, g.logits?))) else {
            return Vec::new();
        };
        let (elems, at) = (graph.info(logits).shape.elems(), member.plan.host.logits);
        match graph.info(logits).dtype {
            DType::Bf16 => {
                self.read::<u16>(model, at, elems).into_iter().map(|x| bf16::from_bits(x).to_f32()).collect()
            }
            _ => self.read(model, at, elems),
        }
    }

    /// The gradient's global norm of a step that has ended: tensors in flat order, in f64.
    pub(super) fn grad_norm(&self, model: usize, step: u64) -> f64 {
        let member = &self.members[model];
        if !self.device.computes() {
            return 0.0;
        }
        let mut sum = 0.0;
        for i in 0..member.model.layout.order.len() as u64 {
            let mut bytes = [0; 8];
            let at = member.plan.host.norms[(step % 2) as usize] + 8 * i;
            self.device.read_host(self.home(model, at), &mut bytes);
            sum += f64::from_le_bytes(bytes);
        }
        sum.sqrt()
    }
}

fn state_of(graph: &Graph, state: usize) -> Result<&State> {
    graph.states.get(state).ok_or_else(|| Error::bad(format!("state {state}: the model has {}", graph.states.len())))
}

/// Refuses integers with which a kernel would read beside a table or a row.
fn check_range(graph: &Graph, input: usize, bytes: &[u8]) -> std::result::Result<(), String> {
    let Some(range) = graph.id_range(input) else { return Ok(()) };
    let ids = bytes.as_chunks::<4>().0.iter().map(|&id| i32::from_ne_bytes(id));
    let Some((at, id)) = ids.enumerate().find(|&(_, id)| !range.contains(id)) else { return Ok(()) };
    let Input { name, shape, .. } = &graph.inputs[input];
    // The first axis is the sample's within the minibatch, not within one of its microbatches.
    let mut whole = shape.clone();
    whole.0.first_mut().into_iter().for_each(|samples| *samples = usize::MAX);
    let or_ignored = if range.or_ignored { format!(", nor {IGNORED}") } else { String::new() };
    Err(format!("{name}: value {id} at {} is not in 0..{}{or_ignored}", whole.position(at), range.below))
}

/// Writes f32 values as bf16 into the host's store, piece by piece, so that nothing is allocated.
fn write_rounded(device: &mut Attached, offset: u64, values: &[u8]) {
    const PIECE: usize = 1024;
    for (i, values) in values.chunks(4 * PIECE).enumerate() {
        let mut piece = [bf16::ZERO; PIECE];
        let values = values.as_chunks::<4>().0;
        piece.iter_mut().zip(values).for_each(|(to, &from)| *to = bf16::from_f32(f32::from_le_bytes(from)));
        let bits = piece.map(bf16::to_bits);
        device.write_host(offset + (2 * PIECE * i) as u64, bytemuck::cast_slice(&bits[..values.len()]));
    }
}
