//! A graph by hand: traces, differentiates and places softmax regression, runs it on the host device, and prints its
//! gradient.
//!
//! This is what the engine does for every shard, in its smallest form: one layer, one program, three tasks.

use hydra::base::{DType, LaneId, LaneKind, Result, align_up};
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::device::{CopySpan, Device, Memory, Run, Scalars, Span, Task, Ticket};
use hydra::graph::{
    ALIGNMENT, AREAS, Activation, Area, Builder, Init, Kind, Mode, ModelLayout, Program, ShardLayout, WeightLayout,
    differentiate,
};
use std::sync::Arc;

/// Traces, differentiates, places and runs three rows of softmax regression.
pub fn main() -> Result<()> {
    // Trace: logits = x W, with x (3, 2) and W (2, 2), and the loss over three labels. Nothing is computed here.
    let mut b = Builder::new(Mode::Training, DType::F32);
    let x = b.input("x", [3, 2], DType::F32)?;
    let labels = b.input("labels", [3], DType::I32)?;
    let logits = b.layer("regression", |b, _| {
        let weight = b.parameter("weight", [2, 2], Init::Constant(0.0))?;
        b.linear(x, weight, None, Activation::None, WeightLayout::InOut)
    })?;
    b.cross_entropy(logits, labels)?;
    let mut graph = b.finish()?;

    // Differentiate: the gradient's ops are added to the same graph.
    differentiate(&mut graph)?;

    // Place: every buffer of the program gets an offset within an area, and we lay the areas end to end.
    let model = ModelLayout::new(&graph);
    let shard = ShardLayout::new(&graph, &model, 0..1);
    let program = Arc::new(Program::new(&graph, &model, &shard, Kind::Last { recompute: false }));
    let (mut bases, mut bytes) = ([0; AREAS], 0);
    for (base, area_bytes) in bases.iter_mut().zip(program.area_bytes) {
        *base = align_up(bytes, ALIGNMENT);
        bytes = *base + area_bytes;
    }
    for step in &program.steps {
        println!("{:<20} {:>4} flop, {:>4} bytes", step.op.name(), step.cost.flops, step.cost.bytes);
    }

    // The host's store is as large as the arena here, so that one offset serves for both.
    let spec = HostSpec { arena_bytes: bytes, ..HostSpec::default() };
    let mut device = HostDevice::new(&HostConfig { devices: vec![spec], host_bytes: bytes, ..HostConfig::default() })?;
    let at = |area: Area| bases[area as usize];
    // SAFETY: no task has been given to the device yet.
    unsafe { device.write_host(at(Area::Weights), &[0; 16]) };
    for used in &program.inputs {
        let (rows, row_labels) = ([1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [0i32, 1, 0]);
        let is_x = graph.inputs[used.input].name == "x";
        let values: &[u8] = if is_x { bytemuck::cast_slice(&rows) } else { bytemuck::cast_slice(&row_labels) };
        // SAFETY: as above.
        unsafe { device.write_host(at(Area::Inputs) + used.offset, values) };
    }

    // Run: a copy in, the program, a copy out, each on its lane and each waiting for the ticket before it.
    let lanes = device.lanes().to_vec();
    let lane = |kind| lanes.iter().position(|&l| l == LaneId::device(0, kind)).expect("a device has its lanes") as u16;
    let all = |memory| Span { memory, offset: 0, bytes };
    let copy = |from, to| Task::Copy(vec![CopySpan { from: all(from), to: all(to) }]);
    let scalars = Scalars { seed: 0, step: 0, microbatch: 0, loss_scale: 1.0 / 3.0, accumulate: false };
    let run = Task::Run(Box::new(Run { program, device: 0, bases, scalars, check: false }));
    let steps = [
        (LaneKind::HostToDevice, copy(Memory::Host, Memory::Device(0))),
        (LaneKind::Compute, run),
        (LaneKind::DeviceToHost, copy(Memory::Device(0), Memory::Host)),
    ];
    let mut before: Option<Ticket> = None;
    for (kind, task) in steps {
        // SAFETY: each waits for the one before it, and the areas lie one after the other, each as large as the program
        // needs.
        before = Some(unsafe { device.submit(lane(kind), task, before.as_slice()) });
    }
    for _ in 0..3 {
        device.next_completion(10.0).expect("three small tasks end within ten seconds").result?;
    }

    let (mut loss, mut gradient) = ([0f32; 1], [0f32; 4]);
    for (area, values) in [(Area::Results, &mut loss[..]), (Area::Gradients, &mut gradient[..])] {
        // SAFETY: all three tasks have ended.
        unsafe { device.read_host(at(area), bytemuck::cast_slice_mut(values)) };
    }
    println!("loss {:.6}, d_weight {gradient:.4?}", loss[0]);

    // By hand: with W = 0 every probability is 1/2, so the loss is ln 2 and d_weight = x^T (1/2 - onehot) / 3.
    let want = [-0.5, 0.5, -2.0 / 3.0, 2.0 / 3.0];
    assert!((loss[0] - std::f32::consts::LN_2).abs() < 1e-6);
    assert!(gradient.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{gradient:?}");
    Ok(())
}
