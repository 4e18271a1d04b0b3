//! A model under one cut on a host device of its own: memory mapped by hand, tasks one after another.

use crate::serial::Serial;
use half::bf16;
use hydra::base::philox::Sequence;
use hydra::base::{DType, align_up};
use hydra::device::host::HostSpec;
use hydra::device::{CopySpan, DeviceMemory, DeviceSpec, Memory, Run, Scalars, Span, Task};
use hydra::graph::{ALIGNMENT, AREAS, Area, Graph, Init, Kind, ModelLayout, Parameter, Program, ShardLayout};
use std::ops::Range;
use std::sync::Arc;

/// How a model is cut, and what each shard keeps.
#[derive(Clone, Debug)]
pub struct Cut {
    /// The shards' layers.
    pub shards: Vec<Range<usize>>,
    /// For each shard, whether forward leaves what backward needs.
    pub keep: Vec<bool>,
    /// Whether the last shard computes its forward twice.
    pub recompute: bool,
    /// Threads of the device; `None` is all.
    pub threads: Option<usize>,
}

impl Cut {
    /// One shard of `layers` layers.
    pub fn whole(layers: usize) -> Cut {
        Cut { shards: std::iter::once(0..layers).collect(), keep: vec![false], recompute: false, threads: None }
    }
}

/// What a step leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The loss of each microbatch.
    pub losses: Vec<f64>,
    /// The accumulator of each use of a parameter: parameter, layer, bytes.
    pub gradients: Vec<(usize, usize, Vec<u8>)>,
    /// The running statistics, in flat order.
    pub states: Vec<u8>,
}

struct Shard {
    layout: ShardLayout,
    forward: Option<Arc<Program>>,
    backward: Arc<Program>,
    weights: u64,
    gradients: u64,
    states: u64,
    saved: Vec<u64>,
}

/// A model, its programs and its device.
pub struct Machine {
    /// The differentiated graph.
    pub graph: Graph,
    layout: ModelLayout,
    dtype: DType,
    device: Serial,
    shards: Vec<Shard>,
    activations: Vec<Vec<u64>>,
    boundary_gradients: Vec<Vec<u64>>,
    inputs: u64,
    results: u64,
    workspace: u64,
    arena_bytes: u64,
}

/// Hands out bytes one after another, as a bump allocator does, and counts them.
#[derive(Default)]
struct Bump(u64);

impl Bump {
    fn take(&mut self, bytes: u64) -> u64 {
        let at = align_up(self.0, ALIGNMENT);
        self.0 = at + bytes;
        at
    }
}

impl Machine {
    /// Maps an arena for `cut` and as many microbatches, and starts a host device with it.
    pub fn new(graph: Graph, cut: Cut, microbatches: usize) -> Machine {
        let spec = HostSpec { threads: cut.threads, ..Default::default() }.into();
        Machine::on(&spec, graph, cut, microbatches)
    }

    /// The same on any device. A graph that says so is placed for a device whose kernels want scratch in any case.
    pub fn on(spec: &DeviceSpec, mut graph: Graph, cut: Cut, microbatches: usize) -> Machine {
        graph.scratch |= spec.wants_scratch();
        let layout = ModelLayout::new(&graph);
        let dtype = graph.float;
        let mut arena = Bump::default();
        let last = cut.shards.len() - 1;
        let mut shards: Vec<Shard> = Vec::new();
        for (s, layers) in cut.shards.iter().enumerate() {
            let shard = ShardLayout::new(&graph, &layout, layers.clone());
            let program = |kind| Arc::new(Program::new(&graph, &layout, &shard, kind));
            let keep = cut.keep[s];
            let kind = if s == last {
                Kind::Last { recompute: cut.recompute }
            } else {
                Kind::Backward { kept: keep, whole: cut.recompute && !keep }
            };
            let (forward, backward) = ((s < last).then(|| program(Kind::Forward { keep })), program(kind));
            let saved = forward.as_ref().map_or(0, |p| p.bytes(Area::Saved));
            assert!(
                saved >= backward.bytes(Area::Saved),
                "backward reads {} saved bytes of {saved}",
                backward.bytes(Area::Saved)
            );
            shards.push(Shard {
                weights: arena.take(shard.weight_bytes),
                gradients: arena.take(shard.gradient_bytes),
                states: arena.take(shard.states.end - shard.states.start),
                saved: (0..microbatches).map(|_| arena.take(saved)).collect(),
                layout: shard,
                forward,
                backward,
            });
        }
        let mut boundaries = || -> Vec<Vec<u64>> {
            let bytes = |s: usize| {
                graph.bytes(graph.layers[cut.shards[s].end - 1].output.expect("a layer before the last hands on"))
            };
            (0..last).map(|s| (0..microbatches).map(|_| arena.take(bytes(s))).collect()).collect()
        };
        let (activations, boundary_gradients) = (boundaries(), boundaries());
        let most = |area| {
            let programs = shards.iter().flat_map(|s| s.forward.iter().chain([&s.backward]));
            programs.map(|p| p.bytes(area)).max().unwrap_or(0)
        };
        let inputs = arena.take(most(Area::Inputs));
        let results = arena.take(microbatches as u64 * dtype.wide().bytes());
        let workspace = arena.take(most(Area::Workspace));
        let arena_bytes = arena.0;
        let input_bytes: u64 = graph.inputs.iter().map(|i| align_up(graph.bytes(i.value), ALIGNMENT)).sum();
        let gradient_bytes: u64 = shards.iter().map(|s| s.layout.gradient_bytes).sum();
        let memory = DeviceMemory {
            arena_bytes,
            // Poison; weights and states; inputs; a place to read back to. Alignment adds less than a page.
            host_bytes: arena_bytes
                + layout.parameter_bytes
                + layout.state_bytes
                + microbatches as u64 * input_bytes
                + gradient_bytes
                + arena_bytes
                + 4096,
            poison: true,
        };
        let mut device = Serial::start(spec, memory);
        device.write(0, &vec![0xFF; arena_bytes as usize]);
        Machine {
            graph,
            layout,
            dtype,
            device,
            shards,
            activations,
            boundary_gradients,
            inputs,
            results,
            workspace,
            arena_bytes,
        }
    }

    /// One training step on `inputs`, by microbatch and input, from these weights; `numbers` are the microbatches'
    /// numbers, which key the random words. Runs forward, last and backward units in order, each for all microbatches.
    pub fn run(&mut self, weights: &[Vec<f64>], inputs: &[Vec<Vec<u8>>], numbers: &[u32]) -> Outcome {
        let mut host = Bump(self.arena_bytes);
        let weights_at = host.take(self.layout.parameter_bytes);
        let states_at = host.take(self.layout.state_bytes);
        for (p, weight) in weights.iter().enumerate() {
            let bytes = encode(weight, self.dtype);
            self.device.write(weights_at + self.layout.parameter[p], &bytes);
        }
        for s in 0..self.graph.states.len() {
            let state = &self.graph.states[s];
            let bytes = encode(&vec![state.start; state.shape.elems()], self.dtype.wide());
            self.device.write(states_at + self.layout.state[s], &bytes);
        }
        let mut inputs_at = Vec::new();
        for microbatch in inputs {
            let mut places = Vec::new();
            for bytes in microbatch {
                let at = host.take(bytes.len() as u64);
                self.device.write(at, bytes);
                places.push(at);
            }
            inputs_at.push(places);
        }
        let mut up = vec![(0, 0, self.arena_bytes)];
        for shard in &self.shards {
            let ShardLayout { own, states, shared, .. } = &shard.layout;
            up.push((weights_at + own.start, shard.weights, own.end - own.start));
            up.push((states_at + states.start, shard.states, states.end - states.start));
            for (p, to) in shared.iter().filter_map(|u| Some((u.parameter, u.borrowed?))) {
                let bytes = self.graph.bytes(self.graph.parameters[p].value);
                up.push((weights_at + self.layout.parameter[p], shard.weights + to, bytes));
            }
        }
        self.copy(&up, true);
        for s in 0..self.shards.len() - 1 {
            (0..numbers.len()).for_each(|m| self.unit(s, m, numbers[m], &inputs_at[m], true));
        }
        for s in (0..self.shards.len()).rev() {
            (0..numbers.len()).for_each(|m| self.unit(s, m, numbers[m], &inputs_at[m], false));
        }
        self.outcome(numbers.len(), host.take(0))
    }

    fn unit(&mut self, s: usize, microbatch: usize, number: u32, inputs_at: &[u64], forward: bool) {
        let shard = &self.shards[s];
        let program = match &shard.forward {
            Some(program) if forward => Arc::clone(program),
            _ => Arc::clone(&shard.backward),
        };
        let mut bases = [u64::MAX; AREAS];
        let boundary = |of: &[Vec<u64>], at: Option<usize>| at.and_then(|s| of.get(s)).map_or(0, |b| b[microbatch]);
        for (area, base) in [
            (Area::Workspace, self.workspace),
            (Area::Weights, shard.weights),
            (Area::Gradients, shard.gradients),
            (Area::States, shard.states),
            (Area::Saved, shard.saved[microbatch]),
            (Area::ActivationIn, boundary(&self.activations, s.checked_sub(1))),
            (Area::ActivationOut, boundary(&self.activations, Some(s))),
            (Area::GradientIn, boundary(&self.boundary_gradients, Some(s))),
            (Area::GradientOut, boundary(&self.boundary_gradients, s.checked_sub(1))),
            (Area::Inputs, self.inputs),
            (Area::Results, self.results + microbatch as u64 * self.dtype.wide().bytes()),
        ] {
            bases[area as usize] = base;
        }
        let inputs: Vec<_> =
            program.inputs.iter().map(|u| (inputs_at[u.input], self.inputs + u.offset, u.bytes)).collect();
        self.copy(&inputs, true);
        let scalars = Scalars { seed: 11, step: 3, microbatch: number, loss_scale: 0.25, accumulate: microbatch > 0 };
        self.device.wait(0, Task::Run(Box::new(Run { program, device: 0, bases, scalars, check: false })));
    }

    fn outcome(&mut self, microbatches: usize, free: u64) -> Outcome {
        let float = self.dtype.wide().bytes();
        let losses = self.read(self.results, microbatches as u64 * float, free);
        let mut gradients = Vec::new();
        let mut states = Vec::new();
        for s in 0..self.shards.len() {
            let shard = &self.shards[s];
            let (at, bytes) = (shard.gradients, shard.layout.gradient_bytes);
            let (states_at, state_bytes) = (shard.states, shard.layout.states.end - shard.layout.states.start);
            let all = self.read(at, bytes, free);
            states.extend(self.read(states_at, state_bytes, free));
            let layout = &self.shards[s].layout;
            for g in self.graph.parameter_gradients.iter().filter(|g| layout.layers.contains(&g.layer)) {
                let at =
                    layout.gradient(&self.layout, g.parameter, g.layer).expect("each use has an accumulator") as usize;
                let bytes = self.graph.bytes(g.value) as usize;
                gradients.push((g.parameter, g.layer, all[at..at + bytes].to_vec()));
            }
        }
        gradients.sort_by_key(|g| (g.1, g.0));
        // Between states lie the bytes that alignment leaves, which hold poison.
        let spans =
            self.graph.states.iter().enumerate().map(|(i, s)| (self.layout.state[i], self.graph.bytes(s.value)));
        let states = spans.flat_map(|(at, bytes)| states[at as usize..(at + bytes) as usize].to_vec()).collect();
        Outcome { losses: self.decode(&losses), gradients, states }
    }

    fn read(&mut self, at: u64, bytes: u64, host: u64) -> Vec<u8> {
        self.copy(&[(host, at, bytes)], false);
        let mut out = vec![0; bytes as usize];
        self.device.read(host, &mut out);
        out
    }

    /// Copies (host, device, bytes) stretches to the device, or from it.
    fn copy(&mut self, spans: &[(u64, u64, u64)], up: bool) {
        let spans = spans.iter().map(|&(host, device, bytes)| {
            let host = Span { memory: Memory::Host, offset: host, bytes };
            let device = Span { memory: Memory::Device(0), offset: device, bytes };
            if up { CopySpan { from: host, to: device } } else { CopySpan { from: device, to: host } }
        });
        self.device.wait(if up { 1 } else { 2 }, Task::Copy(spans.collect()));
    }

    /// Losses or gradients: floats of the model's wide type.
    pub fn decode(&self, bytes: &[u8]) -> Vec<f64> {
        decode(bytes, self.dtype.wide())
    }
}

/// Floats of type `dtype`.
pub fn decode(bytes: &[u8], dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F64 => bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
    }
}

fn encode(x: &[f64], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F64 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F32 => x.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
        DType::Bf16 => x.iter().flat_map(|&x| bf16::from_f64(x).to_le_bytes()).collect(),
        DType::I32 => x.iter().flat_map(|&x| (x as i32).to_le_bytes()).collect(),
    }
}

/// Numbers that f32 holds exactly, for each parameter: normal with its own standard deviation, and 1 where it starts
/// constant.
pub fn draw_weights(graph: &Graph) -> Vec<Vec<f64>> {
    let draw = |(i, p): (usize, &Parameter)| {
        let mut sequence = Sequence::new(5, i as u64);
        let deviation = if let Init::Normal(deviation) = p.init { deviation } else { 1.0 };
        (0..p.shape.elems()).map(|_| f64::from((deviation * sequence.normal()) as f32)).collect()
    };
    graph.parameters.iter().enumerate().map(draw).collect()
}

/// One microbatch. By the beginning of an input's name: `ids` are 0..7, `labels` 0..5 with every third -100, `mask`
/// hides all keys of the first sequence and some of the others, `tiles` those from the 128th of a sequence's number to
/// the 256th and some others, `lengths` those behind an end that is further on with every sequence; anything else is
/// normal.
pub fn draw_inputs(graph: &Graph, microbatch: u64) -> Vec<Vec<u8>> {
    let mut inputs = Vec::new();
    for (i, input) in graph.inputs.iter().enumerate() {
        let mut sequence = Sequence::new(6 + microbatch, i as u64);
        let (elems, cols) = (input.shape.elems(), input.shape.cols());
        let values: Vec<f64> = (0..elems)
            .map(|e| match input.name.split(' ').next() {
                Some("ids") => sequence.below(7) as f64,
                Some("tokens") => sequence.below(300) as f64,
                Some("labels") if e % 3 == 2 => -100.0,
                Some("labels") => sequence.below(5) as f64,
                Some("unlabelled") => -100.0,
                Some("mask") => f64::from(u8::from(e >= cols && e * 5 % 7 != 2)),
                Some("tiles") => f64::from(u8::from(!(e / cols * 128..256).contains(&(e % cols)) && e * 5 % 7 != 2)),
                Some("lengths") => f64::from(u8::from(e % cols < (e / cols + 1) * cols * cols / elems)),
                _ => f64::from(sequence.normal() as f32),
            })
            .collect();
        inputs.push(encode(&values, input.dtype));
    }
    inputs
}
