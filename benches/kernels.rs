//! The cuda device's kernels over a named table of real models' shapes, forward and gradient, in bf16 and f32: TFLOP/s
//! or GB/s, the share of the roofline that the same run measured, and cuBLAS beside products, in turn with ours (A B A
//! B).
//!
//! A process of its own measures, and where a kernel fails another one goes on after it (`kernels/relay.rs`).
//!
//! Each op runs as in training: a graph, its program, a task on the device; time is read from the device's own marks.
//! Inputs are normal numbers and rotate over more than twice any L2 cache. Beside the ops: copies by pinned memory, the
//! time from a task to the next, AdamW.
//!
//! Not through criterion: its clock is the host's, and it measures one body after another, where ours and the peer's
//! must take turns.
//!
//! `cargo bench --features cuda --bench kernels -- [FILTER ..]`; with `--features peers` cuBLAS is asked too.
//! `HYDRA_BENCH_QUICK=1` takes few samples, `HYDRA_BENCH_JSON=PATH` writes everything as JSON. Without a GPU it says so
//! and exits 0, with `HYDRA_REQUIRE_GPU=1` it exits 1. `HYDRA_BENCH_DEVICE=emulated` walks through it all on the
//! emulator, with shapes of a few elements; its seconds mean nothing.

#[path = "common/asked.rs"]
mod asked;
#[path = "kernels/links.rs"]
mod links;
#[path = "kernels/machine.rs"]
mod machine;
#[path = "kernels/peers.rs"]
mod peers;
#[path = "kernels/relay.rs"]
mod relay;
#[path = "kernels/report.rs"]
mod report;
#[path = "kernels/shapes.rs"]
mod shapes;

use hydra::base::{DType, Error, Result};
use hydra::device::{DeviceSpec, why_no_cuda, why_no_emulator};
use hydra::graph::Work;
use machine::{COMPUTE, Effort, Machine, Prepared};
use peers::{Cublas, Product};
use relay::Said;
use report::{Ceilings, Row, Spread, Unit};
use serde_json::json;
use shapes::Case;
use std::process::ExitCode;

/// Memory that is left for cuBLAS's operands and the context.
const LEFT_FREE: f64 = 0.45;

fn main() -> ExitCode {
    let emulated = std::env::var("HYDRA_BENCH_DEVICE").is_ok_and(|v| v == "emulated");
    if let Some(why) = if emulated { why_no_emulator() } else { why_no_cuda() } {
        println!("kernels: nothing is measured: {why}");
        return if asked::set("HYDRA_REQUIRE_GPU") { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let effort = match (emulated, asked::quick()) {
        (true, _) => Effort::TINY,
        (false, true) => Effort::QUICK,
        (false, false) => Effort::FULL,
    };
    let done = match relay::asked() {
        None => relay::run(),
        Some((from, ceilings)) => measure(emulated, effort, &filters, from, ceilings),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernels: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is known of the device before it starts.
struct Facts {
    /// For the JSON.
    device: serde_json::Value,
    /// Bytes of its memory that are free.
    free_bytes: u64,
    /// Keeps the GPU's context alive while devices come and go: cuBLAS lives in it.
    _context: Option<Box<dyn std::any::Any>>,
}

fn facts(emulated: bool) -> Result<Facts> {
    #[cfg(feature = "cuda")]
    if !emulated {
        let gpu = hydra::device::cuda::Gpu::open(0)?;
        let facts = gpu.facts();
        let device = json!({
            "name": facts.name, "arch": facts.arch, "multiprocessors": facts.multiprocessors, "memory_bytes": facts.memory_bytes,
        });
        let free_bytes = gpu.free_bytes()?;
        return Ok(Facts { device, free_bytes, _context: Some(Box::new(gpu)) });
    }
    match emulated {
        true => Ok(Facts { device: json!({ "name": "emulated" }), free_bytes: 64 << 20, _context: None }),
        false => Err(Error::bad("built without the feature \"cuda\"")),
    }
}

/// Measures the items from number `from` on: the ceilings, the cases, and the others. Ends the process after one that
/// fails.
fn measure(emulated: bool, effort: Effort, filters: &[String], from: usize, ceilings: Ceilings) -> Result<()> {
    let facts = facts(emulated)?;
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()));
    let mut cases = shapes::all(emulated)?;
    cases.retain(|case| wanted(&case.name));
    let room = (facts.free_bytes as f64 * (1.0 - LEFT_FREE)) as u64;
    let mut left_out = Vec::new();
    cases.retain(|case| {
        let bytes = Prepared::new(case, &effort).bytes();
        if bytes > room {
            left_out
                .push(format!("{} in {}, which takes {bytes} bytes of the {room} there are", case.name, case.dtype));
        }
        bytes <= room
    });
    // The copy first: arithmetic is told from memory by it.
    let mut all = vec![
        shapes::ceiling_copy(emulated)?,
        shapes::ceiling_product(DType::Bf16, emulated)?,
        shapes::ceiling_product(DType::F32, emulated)?,
    ];
    let ceiling_count = all.len();
    all.append(&mut cases);
    let needed = all.iter().map(|case| Prepared::new(case, &effort).bytes()).filter(|&b| b <= room);
    let arena_bytes = needed.max().unwrap_or(0).max(2 * effort.copy_bytes).max(links::adamw_bytes(emulated)).min(room);
    let spec = match emulated {
        true => DeviceSpec::Emulated { arch: 90, seed: 0, threads: Some(1) },
        false => DeviceSpec::Cuda { ordinal: 0, threads: None },
    };
    let mut bench = Bench {
        machine: Machine::start(spec, arena_bytes, effort)?,
        // After the device, whose context it shares.
        cublas: if emulated { Err(Error::bad("there is none for the emulator")) } else { Cublas::open() },
        effort,
        arena_bytes,
        ceilings,
    };
    if from == 0 {
        relay::say(Said::Device(&facts.device));
        println!("device: {}", facts.device);
        left_out.iter().for_each(|what| println!("left out: {what}"));
        if let Err(why) = &bench.cublas {
            println!("cuBLAS is not beside: {why}");
        }
        report::print_head();
    }
    for (number, case) in all.iter().enumerate().skip(from) {
        let (name, dtype) = (&case.name, case.dtype.to_string());
        bench.item(number, name, &dtype, |bench| {
            let row = bench.row(case);
            if number < ceiling_count {
                bench.take_ceiling(case, &row);
            }
            Ok(vec![row])
        });
    }
    let others: [(&str, &str, Other); 4] = [
        ("adamw/gpt2_124m", "f32", |bench, emulated| bench.adamw(emulated, false)),
        ("adamw/gpt2_124m", "bf16", |bench, emulated| bench.adamw(emulated, true)),
        ("copy", "", |bench, _| links::copies(&mut bench.machine, bench.effort.copy_bytes, bench.effort.samples)),
        ("hand-over", "", |bench, _| links::hand_overs(&mut bench.machine, bench.effort.samples)),
    ];
    for (at, (name, dtype, rows)) in others.into_iter().enumerate() {
        let number = all.len() + at;
        let of_it = name.split('/').next().expect("a split has a first part");
        if number >= from && wanted(of_it) {
            bench.item(number, name, dtype, |bench| rows(bench, emulated));
        }
    }
    Ok(())
}

/// An item that is no op.
type Other = fn(&mut Bench, bool) -> Result<Vec<Row>>;

struct Bench {
    /// Dropped before the machine, whose context it lives in.
    cublas: Result<Cublas>,
    machine: Machine,
    effort: Effort,
    arena_bytes: u64,
    ceilings: Ceilings,
}

impl Bench {
    /// Measures one item, and prints and tells its rows.
    fn item(&mut self, number: usize, name: &str, dtype: &str, measure: impl FnOnce(&mut Bench) -> Result<Vec<Row>>) {
        relay::say(Said::Item(number, name, dtype));
        let rows = measure(self).unwrap_or_else(|error| vec![Row::failed(name, dtype, error.to_string())]);
        for row in &rows {
            report::print_row(row);
            relay::say(Said::Row(row));
        }
        if rows.iter().any(|row| row.ours.is_err()) {
            relay::fail();
        }
    }

    /// What the row of a ceiling tells all that follow.
    fn take_ceiling(&mut self, case: &Case, row: &Row) {
        let ours = row.ours.as_ref().ok().map(|ours| (ours.median, report::OURS));
        let best = row.peer.map(|peer| (peer.median, report::CUBLAS)).or(ours);
        match (best, row.unit) {
            (Some((secs, _)), Unit::Bytes(bytes)) => self.ceilings.copy_bytes_per_sec = Some(bytes / secs),
            (Some((secs, by)), Unit::Flops(flops)) => {
                let of = usize::from(case.dtype == DType::F32);
                self.ceilings.flops_per_sec[of] = Some(flops / secs);
                self.ceilings.by[of] = by;
            }
            _ => {}
        }
        relay::say(Said::Ceilings(&self.ceilings));
    }

    /// One op, and cuBLAS in turn with it where it is a product.
    fn row(&mut self, case: &Case) -> Row {
        let prepared = Prepared::new(case, &self.effort);
        let cost = prepared.cost;
        let (unit, flops) = match cost.family.work() {
            Work::Flops => (Unit::Flops(cost.flops), cost.flops),
            Work::Bytes => (Unit::Bytes(cost.bytes as f64), 0.0),
        };
        let arithmetic = self.ceilings.flops_per_sec[usize::from(case.dtype == DType::F32)];
        let bound_secs = self.ceilings.copy_bytes_per_sec.and_then(|copy| {
            let memory = cost.bytes as f64 / copy;
            if flops == 0.0 { Some(memory) } else { arithmetic.map(|rate| memory.max(flops / rate)) }
        });
        let (ours, peer) = match self.samples(case, &prepared) {
            Ok((ours, peer)) => (Ok(ours), peer),
            Err(error) => (Err(error.to_string()), None),
        };
        Row {
            name: case.name.clone(),
            dtype: case.dtype.to_string(),
            shapes: case.shapes(),
            unit,
            bound_secs,
            ours,
            peer,
        }
    }

    fn samples(&mut self, case: &Case, prepared: &Prepared) -> Result<(Spread, Option<Spread>)> {
        if prepared.bytes() > self.arena_bytes {
            return Err(Error::Device(format!(
                "needs {} bytes, of which there are {}",
                prepared.bytes(),
                self.arena_bytes
            )));
        }
        self.machine.fill(prepared)?;
        let (task, repeats) = self.machine.sized(prepared)?;
        let product = Product::of(case);
        let mut cublas = match (&mut self.cublas, &product) {
            (Ok(cublas), Some(product)) => match cublas.prepare(product, prepared.sets as usize) {
                Ok(()) => Some(cublas),
                Err(why) => {
                    println!("cuBLAS is not beside {}: {why}", case.name);
                    None
                }
            },
            _ => None,
        };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for sample in 0..self.effort.warm_up + self.effort.samples {
            let a = self.machine.time(COMPUTE, task.clone())? / repeats as f64;
            let b = cublas.as_mut().map(|cublas| cublas.sample(repeats)).transpose()?;
            if sample >= self.effort.warm_up {
                ours.push(a);
                theirs.extend(b);
            }
        }
        Ok((Spread::of(ours), (!theirs.is_empty()).then(|| Spread::of(theirs))))
    }

    fn adamw(&mut self, emulated: bool, bf16: bool) -> Result<Vec<Row>> {
        let mut row = links::adamw(&mut self.machine, emulated, bf16, self.effort.samples)?;
        if let (Unit::Bytes(bytes), Some(copy)) = (row.unit, self.ceilings.copy_bytes_per_sec) {
            row.bound_secs = Some(bytes / copy);
        }
        Ok(vec![row])
    }
}
