//! Predicted against measured seconds of training steps on this machine: how good the cost model is that plans are made
//! with.
//!
//! Run with `cargo bench --no-default-features --bench prediction`. The jobs are a fixed list of single-shard models,
//! each with steps of tens of milliseconds and more: one program (forward, loss, backward) and the update of all its
//! parameters; `HYDRA_BENCH_QUICK=1` takes the first of them. `families` as an argument adds, for each job, where the
//! seconds went by family of ops. Models in several shards are predicted in `training.rs`.

#[path = "common/asked.rs"]
mod asked;

use hydra::base::{DType, Result, Shape, align_up};
use hydra::device::CostModel;
use hydra::device::host::{HostConfig, HostDevice, HostSpec};
use hydra::device::{AdamwRule, CopySpan, Device, Memory, Run, Scalars, Segment, Span, Task, Update, UpdateRule};
use hydra::device::{DeviceSpec, calibrate};
use hydra::graph::{
    ALIGNMENT, AREAS, Activation, Area, AttentionOptions, Builder, Family, Graph, Init, Kind, Mode, ModelLayout,
    Program, ShardLayout, Value, WeightLayout, differentiate,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Steps that are timed, after two that are not. As in calibration the lower quartile counts.
const STEPS: usize = 9;

/// A model to train.
enum Job {
    /// Batch, tokens, width, heads, blocks, vocabulary, dropout.
    Gpt([usize; 6], f64),
    /// Images, side, channels of the first stage, residual blocks a stage; three stages, each with half the side and
    /// twice the channels.
    Images([usize; 4]),
}

const JOBS: [Job; 10] = [
    Job::Gpt([8, 64, 128, 4, 4, 256], 0.0),
    Job::Gpt([8, 128, 128, 4, 4, 256], 0.1),
    Job::Gpt([4, 256, 128, 2, 4, 1000], 0.1),
    Job::Gpt([4, 128, 256, 8, 4, 256], 0.0),
    Job::Gpt([4, 256, 256, 4, 4, 2000], 0.1),
    Job::Gpt([8, 64, 384, 6, 6, 256], 0.1),
    Job::Gpt([4, 128, 512, 8, 4, 5000], 0.0),
    Job::Images([16, 32, 16, 2]),
    Job::Images([8, 32, 32, 2]),
    Job::Images([4, 56, 24, 3]),
];

fn main() {
    if let Err(error) = compare(std::env::args().any(|a| a == "families")) {
        eprintln!("prediction: {error}");
        std::process::exit(1);
    }
}

fn compare(families: bool) -> Result<()> {
    let begin = std::time::Instant::now();
    let cost = calibrate(&DeviceSpec::default())?;
    println!("calibration took {:.2} s; {} rates", begin.elapsed().as_secs_f64(), cost.rates.len());
    println!("{:<44} {:>10} {:>10} {:>8}", "one program and one update", "predicted", "measured", "error");
    let mut errors = Vec::new();
    for job in if asked::quick() { &JOBS[..1] } else { &JOBS[..] } {
        let mut bench = Bench::new(job.graph()?)?;
        let (run, update) = bench.measure()?;
        let predicted = cost.program_secs(&bench.program) + update_secs(&cost, &bench);
        let error = predicted / (run + update) - 1.0;
        errors.push(error.abs());
        println!(
            "{:<44} {:>7.1} ms {:>7.1} ms {:>+7.1}%",
            job.name(),
            1e3 * predicted,
            1e3 * (run + update),
            100.0 * error
        );
        if families {
            bench.families(&cost)?;
            println!("  {:<20} {:>8.2} ms {:>8.2} ms", "update", 1e3 * update_secs(&cost, &bench), 1e3 * update);
            println!("  {:<20} {:>8.2} ms {:>8.2} ms", "program", 1e3 * cost.program_secs(&bench.program), 1e3 * run);
        }
    }
    println!("median absolute error {:.1} %", 100.0 * median(errors));
    Ok(())
}

fn update_secs(cost: &CostModel, bench: &Bench) -> f64 {
    cost.task_secs(&bench.update, hydra::base::LaneKind::Compute) - cost.hand_over_secs
}

/// A model on a device, with its whole state in the arena.
struct Bench {
    device: HostDevice,
    program: Program,
    run: Task,
    update: Task,
    bases: [u64; AREAS],
}

impl Bench {
    fn new(mut graph: Graph) -> Result<Bench> {
        differentiate(&mut graph)?;
        let layout = ModelLayout::new(&graph);
        let shard = ShardLayout::new(&graph, &layout, 0..graph.layers.len());
        let program = Program::new(&graph, &layout, &shard, Kind::Last { recompute: false });
        let mut bases = [0; AREAS];
        let mut end = 0;
        for (base, bytes) in bases.iter_mut().zip(program.area_bytes) {
            *base = align_up(end, ALIGNMENT);
            end = *base + bytes;
        }
        let bytes = layout.parameter_bytes;
        let array = |offset: u64| Span { memory: Memory::Device(0), offset, bytes };
        let moments = [align_up(end, ALIGNMENT), align_up(end, ALIGNMENT) + bytes];
        let arena_bytes = moments[1] + bytes;
        let segment = |p: usize| Segment {
            offset: layout.parameter[p] / 4,
            elems: graph.parameters[p].shape.elems() as u64,
            decay: true,
            index: 0,
        };
        let update = Update {
            rule: UpdateRule::Adamw(AdamwRule {
                update: 9,
                lr: 1e-5,
                betas: (0.9, 0.999),
                epsilon: 1e-8,
                weight_decay: 0.0,
            }),
            segments: layout.order.iter().map(|&p| segment(p)).collect(),
            weight: array(bases[Area::Weights as usize]),
            remainder: None,
            moments: moments.map(|at| Some(array(at))),
            gradient: array(bases[Area::Gradients as usize]),
            clip: None,
            gate: Span { memory: Memory::Device(0), offset: bases[Area::Results as usize], bytes: 4 },
        };
        let mut device = HostDevice::new(&HostConfig {
            devices: vec![HostSpec { arena_bytes, ..Default::default() }],
            host_bytes: arena_bytes,
            poison: true,
            withhold: None,
            ..Default::default()
        })?;
        // Weights are small, moments 0, ids and labels below the smallest number of classes.
        let numbers: Vec<f32> = (0..bytes / 4).map(|i| (i * 7919 % 4099) as f32 / 4e4 - 0.05).collect();
        // SAFETY: nothing is in flight.
        unsafe { device.write_host(bases[Area::Weights as usize], bytemuck::cast_slice(&numbers)) };
        for used in &program.inputs {
            let input: Vec<u8> = match graph.inputs[used.input].dtype {
                DType::I32 => (0..used.bytes as i32 / 4).flat_map(|i| (i * 7919 % 10).to_le_bytes()).collect(),
                _ => (0..used.bytes / 4).flat_map(|i| ((i * 7919 % 4099) as f32 / 4e3).to_le_bytes()).collect(),
            };
            // SAFETY: as above.
            unsafe { device.write_host(bases[Area::Inputs as usize] + used.offset, &input) };
        }
        let all = |memory| Span { memory, offset: 0, bytes: arena_bytes };
        let fill = Task::Copy(vec![CopySpan { from: all(Memory::Host), to: all(Memory::Device(0)) }]);
        let mut bench =
            Bench { run: task(program.clone(), bases), update: Task::Update(Box::new(update)), device, program, bases };
        bench.time(1, fill)?;
        Ok(bench)
    }

    fn time(&mut self, lane: u16, task: Task) -> Result<f64> {
        // SAFETY: nothing else is in flight, and the arena is laid out for these tasks.
        unsafe { self.device.submit(lane, task, &[]) };
        let done = self.device.next_completion(f64::INFINITY).expect("the lane tells of every task");
        done.result?;
        Ok(done.end_secs - done.start_secs)
    }

    /// Seconds of the program and of the update.
    fn measure(&mut self) -> Result<(f64, f64)> {
        let (mut runs, mut updates) = (Vec::new(), Vec::new());
        for step in 0..STEPS + 2 {
            let (run, update) = (self.time(0, self.run.clone())?, self.time(0, self.update.clone())?);
            if step >= 2 {
                runs.push(run);
                updates.push(update);
            }
        }
        Ok((lower_quartile(runs), lower_quartile(updates)))
    }

    /// Prints each family's predicted and measured seconds, the latter op by op.
    fn families(&mut self, cost: &CostModel) -> Result<()> {
        let steps = self.program.steps.clone();
        let mut secs = vec![Vec::new(); steps.len()];
        for _ in 0..STEPS {
            for (step, secs) in steps.iter().zip(&mut secs) {
                let one = Program::of_steps(vec![step.clone()], self.program.area_bytes, Vec::new(), false);
                secs.push(self.time(0, task(one, self.bases))? - cost.run_secs);
            }
        }
        let mut sums: BTreeMap<Family, (f64, f64)> = BTreeMap::new();
        for (step, secs) in steps.iter().zip(secs) {
            let sum = sums.entry(step.cost.family).or_default();
            *sum = (sum.0 + cost.op_secs(&step.cost), sum.1 + lower_quartile(secs));
        }
        for (family, (predicted, measured)) in sums {
            let error = 100.0 * (predicted / measured - 1.0);
            println!(
                "  {:<20} {:>8.2} ms {:>8.2} ms {error:>+7.1}%",
                format!("{family:?}"),
                1e3 * predicted,
                1e3 * measured
            );
        }
        Ok(())
    }
}

fn task(program: Program, bases: [u64; AREAS]) -> Task {
    let scalars = Scalars { seed: 1, step: 0, microbatch: 0, loss_scale: 1e-3, accumulate: false };
    Task::Run(Box::new(Run { program: Arc::new(program), device: 0, bases, scalars, check: false }))
}

fn lower_quartile(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 4]
}

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

impl Job {
    fn name(&self) -> String {
        match self {
            Job::Gpt([b, t, c, h, n, v], p) => format!("gpt {b}x{t} width {c} heads {h} blocks {n} vocab {v} p {p}"),
            Job::Images([n, side, channels, blocks]) => {
                format!("images {n}x{side}x{side} channels {channels} blocks 3x{blocks}")
            }
        }
    }

    fn graph(&self) -> Result<Graph> {
        match *self {
            Job::Gpt(sizes, dropout) => gpt(sizes, dropout),
            Job::Images(sizes) => images(sizes),
        }
    }
}

fn gpt([batch, len, width, heads, blocks, vocabulary]: [usize; 6], p: f64) -> Result<Graph> {
    let mut b = Builder::new(Mode::Training, DType::F32);
    b.layer("embedding", |b, _| {
        let ids = b.input("ids", [batch, len], DType::I32)?;
        let (table, positions) =
            (parameter(b, "table", &[vocabulary, width])?, parameter(b, "positions", &[len, width])?);
        let x = b.embedding(ids, table)?;
        let x = b.add_position(x, positions)?;
        b.dropout(x, p)
    })?;
    for block in 0..blocks {
        b.layer(format!("block {block}"), |b, x| {
            let x = x.expect("the embedding comes first");
            let name = |what: &str| format!("{block} {what}");
            let n = norm(b, x, &name("norm 1"), width)?;
            let qkv = linear(b, n, &name("qkv"), [width, 3 * width], Activation::None)?;
            let options = AttentionOptions { heads, kv_heads: heads, scale: None, causal: true, dropout: p };
            let a = b.attention_packed(qkv, None, options)?;
            let a = linear(b, a, &name("out"), [width, width], Activation::None)?;
            let a = b.dropout(a, p)?;
            let x = b.add(x, a)?;
            let n = norm(b, x, &name("norm 2"), width)?;
            let h = linear(b, n, &name("up"), [width, 4 * width], Activation::GeluTanh)?;
            let h = linear(b, h, &name("down"), [4 * width, width], Activation::None)?;
            let h = b.dropout(h, p)?;
            b.add(x, h)
        })?;
    }
    let logits = b.layer("head", |b, x| {
        let n = norm(b, x.expect("blocks come first"), "norm", width)?;
        let table = parameter(b, "table", &[vocabulary, width])?;
        b.linear(n, table, None, Activation::None, WeightLayout::OutIn)
    })?;
    finish(b, logits, &[batch, len])
}

fn images([batch, side, channels, blocks]: [usize; 4]) -> Result<Graph> {
    let mut b = Builder::new(Mode::Training, DType::F32);
    b.layer("stem", |b, _| {
        let x = b.input("image", [batch, 3, side, side], DType::F32)?;
        let x = convolution(b, x, "stem", [channels, 3, 3, 1])?;
        b.activation(x, Activation::Relu)
    })?;
    for stage in 0..3 {
        for block in 0..blocks {
            b.layer(format!("stage {stage} block {block}"), |b, x| {
                let (x, out) = (x.expect("the stem comes first"), channels << stage);
                let narrows = stage > 0 && block == 0;
                let (from, stride) = if narrows { (out / 2, 2) } else { (out, 1) };
                let name = |what: &str| format!("{stage} {block} {what}");
                let y = convolution(b, x, &name("first"), [out, from, 3, stride])?;
                let y = b.activation(y, Activation::Relu)?;
                let y = convolution(b, y, &name("second"), [out, out, 3, 1])?;
                let x = if narrows { convolution(b, x, &name("short"), [out, from, 1, stride])? } else { x };
                let y = b.add(y, x)?;
                b.activation(y, Activation::Relu)
            })?;
        }
    }
    let logits = b.layer("head", |b, x| {
        let x = b.global_avg_pool(x.expect("stages come first"))?;
        linear(b, x, "head", [4 * channels, 10], Activation::None)
    })?;
    finish(b, logits, &[batch])
}

fn parameter(b: &mut Builder, name: &str, shape: &[usize]) -> Result<Value> {
    b.parameter(name, Shape(shape.to_vec()), Init::Normal(0.02))
}

fn norm(b: &mut Builder, x: Value, name: &str, width: usize) -> Result<Value> {
    let weight = parameter(b, &format!("{name} weight"), &[width])?;
    let bias = parameter(b, &format!("{name} bias"), &[width])?;
    b.layernorm(x, weight, bias, 1e-5)
}

fn linear(
    b: &mut Builder,
    x: Value,
    name: &str,
    [inputs, outputs]: [usize; 2],
    activation: Activation,
) -> Result<Value> {
    let weight = parameter(b, name, &[inputs, outputs])?;
    let bias = parameter(b, &format!("{name} bias"), &[outputs])?;
    b.linear(x, weight, Some(bias), activation, WeightLayout::InOut)
}

fn convolution(b: &mut Builder, x: Value, name: &str, [out, channels, kernel, stride]: [usize; 4]) -> Result<Value> {
    let weight = parameter(b, name, &[out, channels, kernel, kernel])?;
    let x = b.conv2d(x, weight, None, stride, kernel / 2)?;
    b.batchnorm(x, &format!("{name} norm"), 1e-5, 0.1)
}

fn finish(mut b: Builder, logits: Value, labels: &[usize]) -> Result<Graph> {
    let labels = b.input("labels", Shape(labels.to_vec()), DType::I32)?;
    b.cross_entropy(logits, labels)?;
    b.finish()
}
