//! Ratios of whole training runs on the host device, measured side by side: what spilling costs, what a second slot is
//! worth, how good predictions are.
//! `families` has PyTorch beside.
//!
//! `cargo bench --bench training`, with `-- spilling`, `-- double-buffering` or `-- prediction` for a part;
//! `HYDRA_BENCH_QUICK=1` takes smaller shapes and fewer rounds, to see that it runs.

#[path = "common/asked.rs"]
mod asked;

use hydra::base::{DType, Result, Shape, format_bytes};
use hydra::data::{RandomOptions, RandomSource, Source};
use hydra::device::CostModel;
use hydra::device::{DeviceSpec, calibrate};
use hydra::engine::predict;
use hydra::nn::{Network, from_config};
use hydra::spill::{Model, Plan, PlanOptions};
use hydra::trace::Bound;
use hydra::train::{Observer, Session, StepReport, TrainOptions, Weights, inputs_of, plan_model, trace_model};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// A GPT shape.
#[derive(Clone, Copy)]
struct Gpt {
    layers: usize,
    width: usize,
    heads: usize,
    context: usize,
    batch: usize,
}

impl Gpt {
    fn network(&self) -> Box<dyn Network> {
        let config = serde_json::json!({
            "n_layer": self.layers, "n_embd": self.width, "n_head": self.heads, "n_positions": self.context, "vocab_size": 256,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        });
        from_config("gpt2", &config).expect("a sound config")
    }

    fn source(&self) -> Box<dyn Source> {
        let tokens = Shape::from([self.context]);
        let tensors = vec![("input_ids".into(), DType::I32, tokens.clone()), ("labels".into(), DType::I32, tokens)];
        let options = RandomOptions { tensors, vocab: 256, classes: 256, batch: self.batch, seed: 1 };
        Box::new(RandomSource::new(&options).expect("a sound shape"))
    }

    fn tokens(&self) -> f64 {
        (self.batch * self.context) as f64
    }
}

/// One way to run a shape.
struct Way {
    name: &'static str,
    model: Arc<Model>,
    plan: Arc<Plan>,
    options: TrainOptions,
    /// Seconds of each step that counts.
    secs: Vec<f64>,
    /// Busy seconds a step of the busiest lane, for each round.
    bounds: Vec<f64>,
    /// Seconds of all those steps by what bound them.
    bound_by: Bound,
}

/// Step times, without the first `skip`.
struct Times {
    skip: u64,
    secs: Vec<f64>,
    /// Those seconds by what bound them.
    bound: Bound,
}

impl Observer for Times {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        if report.result.step >= self.skip {
            self.secs.push(report.result.secs);
            self.bound.add(&report.result.bound);
        }
        Ok(())
    }

    fn valid(&mut self, _: u64, _: f32, _: f64) -> Result<()> {
        Ok(())
    }
}

fn way(name: &'static str, gpt: Gpt, options: TrainOptions, cost: &CostModel) -> Result<Way> {
    let model = Arc::new(trace_model(gpt.network().as_ref(), &inputs_of(gpt.source().as_ref()), &options)?);
    let plan = plan_model(&model, &options, cost)?;
    Ok(Way { name, model, plan, options, secs: Vec::new(), bounds: Vec::new(), bound_by: Bound::default() })
}

impl Way {
    /// Runs once more, in turn with the other ways.
    fn round(&mut self, gpt: Gpt) -> Result<()> {
        let planned = (Arc::clone(&self.model), Arc::clone(&self.plan));
        let mut session = Session::new(Weights::Random, planned, gpt.source(), None, self.options.clone())?;
        let mut times = Times { skip: 2, secs: Vec::new(), bound: Bound::default() };
        session.run(&mut times, &AtomicBool::new(false))?;
        // All steps count here: the first ones compute as much as the others.
        let steps = self.options.steps as f64;
        self.bounds.push(session.engine().lane_sums().iter().map(|l| l.busy_secs / steps).fold(0.0, f64::max));
        self.secs.extend(times.secs);
        self.bound_by.add(&times.bound);
        Ok(())
    }

    fn bound(&self) -> f64 {
        percentile(&self.bounds, 0.5)
    }

    fn median(&self) -> f64 {
        percentile(&self.secs, 0.5)
    }
}

fn percentile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * at).round() as usize]
}

fn report(ways: &[Way], tokens: f64) {
    println!(
        "  {:<34} {:>6} {:>11} {:>9} {:>9} {:>9} {:>9}",
        "way", "shards", "peak", "median", "p10", "p90", "tokens/s"
    );
    for w in ways {
        println!(
            "  {:<34} {:>6} {:>11} {:>7.1}ms {:>7.1}ms {:>7.1}ms {:>9.0}",
            w.name,
            w.plan.shards.len(),
            format_bytes(w.plan.arena.bytes),
            w.median() * 1e3,
            percentile(&w.secs, 0.1) * 1e3,
            percentile(&w.secs, 0.9) * 1e3,
            tokens / w.median()
        );
    }
}

/// Spilling at a quarter of the resident peak, against resident runs with and without equal recomputation.
fn spilling(gpt: Gpt, rounds: usize, steps: u64, cost: &CostModel) -> Result<()> {
    println!(
        "spilling is cheap: GPT of {} layers, width {}, context {}, batch {}, no clipping, link uncapped",
        gpt.layers, gpt.width, gpt.context, gpt.batch
    );
    let base = TrainOptions { batch: gpt.batch, microbatch: gpt.batch, ..TrainOptions::new(steps) };
    let resident = way("resident", gpt, base.clone(), cost)?;
    let quarter = resident.plan.arena.bytes / 4;
    let with = |plan: PlanOptions| TrainOptions { plan, ..base.clone() };
    let spilled = way(
        "spilled at 25 %",
        gpt,
        with(PlanOptions { device_budget: Some(quarter), ..PlanOptions::default() }),
        cost,
    )?;
    let cut = spilled.plan.shards.iter().map(|s| s.layout.layers.clone()).collect();
    let kept = spilled.plan.shards.iter().map(|s| s.kept).collect();
    let equal = PlanOptions {
        cut: Some(cut),
        kept: Some(kept),
        resident: Some(true),
        boundaries_stay: Some(true),
        ..PlanOptions::default()
    };
    let equal = way("resident, recomputing as much", gpt, with(equal), cost)?;
    let mut ways = [resident, equal, spilled];
    for _ in 0..rounds {
        for w in &mut ways {
            w.round(gpt)?;
        }
    }
    report(&ways, gpt.tokens());
    let [resident, equal, spilled] = &ways;
    println!("  spilled / resident with equal recomputation: {:.3} (want 0.95)", equal.median() / spilled.median());
    println!("  spilled / resident without:                  {:.3}", resident.median() / spilled.median());
    Ok(())
}

/// One slot against two, with the link held so that fetching a shard takes as long as its forward.
fn double_buffering(gpt: Gpt, rounds: usize, steps: u64, cost: &CostModel) -> Result<()> {
    let base = TrainOptions { batch: gpt.batch, microbatch: gpt.batch, ..TrainOptions::new(steps) };
    let probe = way("probe", gpt, base.clone(), cost)?;
    // A shard for each block, embeddings with the first and head with the last.
    let layers = probe.model.layers();
    let mut cut: Vec<_> = (0..gpt.layers).map(|b| 1 + 2 * b..3 + 2 * b).collect();
    cut[0].start = 0;
    cut[gpt.layers - 1].end = layers;
    let options = |slots: usize| PlanOptions {
        cut: Some(cut.clone()),
        resident: Some(false),
        kept: Some(vec![true; cut.len()]),
        slots,
        ..PlanOptions::default()
    };
    let mut free = way("link uncapped", gpt, TrainOptions { plan: options(2), ..base.clone() }, cost)?;
    free.round(gpt)?;
    // Forward's share of what the device computes in a step: nothing is recomputed, and a backward takes about two
    // forwards.
    let forward = free.bound() / 3.0 / cut.len() as f64;
    let bytes = free.plan.shards.iter().map(|s| s.fetch_bytes()).sum::<u64>() as f64 / cut.len() as f64;
    let mut capped = base;
    let link_bytes_per_sec = Some(bytes / forward);
    capped.device = hydra::device::host::HostSpec { link_bytes_per_sec, ..Default::default() }.into();
    println!(
        "double buffering: {} shards of {} on average, link held to {:.0} MB/s so that a fetch takes as long as a forward ({:.1} ms)",
        cut.len(),
        format_bytes(bytes as u64),
        bytes / forward / 1e6,
        forward * 1e3
    );
    let one = way("one slot", gpt, TrainOptions { plan: options(1), ..capped.clone() }, cost)?;
    let two = way("two slots", gpt, TrainOptions { plan: options(2), ..capped }, cost)?;
    let mut ways = [one, two];
    for _ in 0..rounds {
        for w in &mut ways {
            w.round(gpt)?;
        }
    }
    report(&ways, gpt.tokens());
    let [one, two] = &ways;
    println!("  one slot / two slots: {:.2} (want 1.5)", one.median() / two.median());
    let shares = Bound::NAMES.iter().zip(two.bound_by.parts());
    let shares: Vec<String> =
        shares.map(|(name, secs)| format!("{name} {:.1} %", 100.0 * secs / two.bound_by.total())).collect();
    println!("  two slots, bound by: {}", shares.join(", "));
    println!("  two slots, share of A = the busiest lane's seconds: {:.3} (want 0.93)", two.bound() / two.median());
    Ok(())
}

/// Predicted against measured steps of spilled and resident jobs.
fn prediction(jobs: &[(&'static str, Gpt, f64)], steps: u64) -> Result<()> {
    println!("prediction: the executor on a simulated device with this machine's rates, against the host device");
    let mut errors = Vec::new();
    for &(name, gpt, share) in jobs {
        // As `hydra plan` does: measured just before.
        let cost = &calibrate(&DeviceSpec::default())?;
        let base = TrainOptions { batch: gpt.batch, microbatch: gpt.batch, ..TrainOptions::new(steps) };
        let whole = way(name, gpt, base.clone(), cost)?;
        let budget = (whole.plan.arena.bytes as f64 * share) as u64;
        let plan =
            PlanOptions { device_budget: Some(budget.max(whole.plan.smallest_device_bytes)), ..PlanOptions::default() };
        let mut w = way(name, gpt, TrainOptions { plan, ..base }, cost)?;
        let predicted = predict(&w.model, &w.plan, cost)?.step_secs;
        w.round(gpt)?;
        let error = predicted / w.median() - 1.0;
        errors.push(error.abs());
        println!(
            "  {name:<34} {:>3} shards  predicted {:>7.1} ms  measured {:>7.1} ms  {:>+6.1} %",
            w.plan.shards.len(),
            predicted * 1e3,
            w.median() * 1e3,
            error * 100.0
        );
    }
    println!("  median error {:.1} % (want under 15)", percentile(&errors, 0.5) * 100.0);
    Ok(())
}

fn main() -> Result<()> {
    let quick = asked::quick();
    let began = Instant::now();
    let cost = calibrate(&DeviceSpec::default())?;
    let (gpt, rounds, steps) = match quick {
        false => (Gpt { layers: 6, width: 384, heads: 6, context: 256, batch: 8 }, 3, 8),
        true => (Gpt { layers: 3, width: 96, heads: 3, context: 64, batch: 4 }, 1, 4),
    };
    // Names of parts, such as `cargo bench --bench training -- prediction`; none is all.
    let parts: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    if wanted("spilling") {
        spilling(gpt, rounds, steps, &cost)?;
    }
    let deep = match quick {
        false => Gpt { layers: 16, width: 256, heads: 4, context: 128, batch: 8 },
        true => Gpt { layers: 8, width: 64, heads: 2, context: 32, batch: 2 },
    };
    if wanted("double-buffering") {
        double_buffering(deep, rounds, steps, &cost)?;
    }
    let jobs: &[(&'static str, Gpt, f64)] = &[
        ("6 x 384, context 256, resident", gpt, 1.0),
        ("6 x 384, context 256, 50 %", gpt, 0.5),
        ("6 x 384, context 256, 25 %", gpt, 0.25),
        ("4 x 256, context 128, resident", Gpt { layers: 4, width: 256, heads: 4, context: 128, batch: 16 }, 1.0),
        ("4 x 256, context 128, 30 %", Gpt { layers: 4, width: 256, heads: 4, context: 128, batch: 16 }, 0.3),
        ("8 x 128, context 256, 40 %", Gpt { layers: 8, width: 128, heads: 4, context: 256, batch: 8 }, 0.4),
        ("2 x 512, context 64, resident", Gpt { layers: 2, width: 512, heads: 8, context: 64, batch: 16 }, 1.0),
        ("2 x 512, context 64, 50 %", Gpt { layers: 2, width: 512, heads: 8, context: 64, batch: 16 }, 0.5),
    ];
    if wanted("prediction") {
        prediction(if quick { &jobs[..1] } else { jobs }, if quick { 4 } else { 6 })?;
    }
    println!("in {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}
