//! One choice of each built-in policy, over numbers of models and devices: from a model selection on one machine to a
//! thousand of both.
//!
//! Most models are busy on other devices, as in a run, and every choice asks another device. A table at the end has the
//! best and the median time; the aim is under 20 microseconds at (1000, 1000).
//!
//! `cargo bench --bench sched [FILTER]`; with HYDRA_BENCH_QUICK=1 a short run whose numbers are rough.

#[path = "common/asked.rs"]
mod asked;
#[path = "common/samples.rs"]
mod samples;

use criterion::Criterion;
use hydra::base::philox::Sequence;
use hydra::sched::{Claim, DeviceId, DeviceView, LocalityLrtf, ModelId, ModelView, POLICIES, Policy, View};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Models and devices.
const SIZES: [(usize, usize); 3] = [(12, 8), (100, 64), (1000, 1000)];

fn models(count: usize, devices: usize, idle_part: f64) -> Vec<ModelView> {
    let mut numbers = Sequence::new(1, 0);
    let mut model = |id| {
        let device = numbers.below(devices as u64) as DeviceId;
        let remaining_secs = 100.0 * numbers.uniform();
        ModelView {
            claim: if numbers.uniform() < idle_part { Claim::Idle } else { Claim::By(device) },
            remaining_secs,
            remaining_chain_secs: 0.3 * remaining_secs,
            microbatches: 4,
            boundary_ready_secs: 0.2 * numbers.uniform(),
            remaining_bytes: numbers.below(1 << 40),
            shard: numbers.below(16) as u16,
            unit_secs: 0.1 + 0.1 * numbers.uniform(),
            weight_bytes: numbers.below(1 << 30),
            boundary_bytes: (1 << 22) + numbers.below(1 << 24),
            here_bytes: numbers.below(1 << 22),
            leaves_gradients: numbers.below(2) == 0,
            last_device: Some(device),
            ..ModelView::away(id as ModelId)
        }
    };
    (0..count).map(&mut model).collect()
}

fn devices(count: usize, models: &[ModelView]) -> Vec<DeviceView> {
    let mut numbers = Sequence::new(2, 0);
    let mut device = |id| {
        let held = [0; 2].map(|_| &models[numbers.below(models.len() as u64) as usize]);
        DeviceView {
            id: id as DeviceId,
            speed: if numbers.below(2) == 0 { 1.0 } else { 0.5 },
            held: held.map(|model| (model.id, model.shard)).to_vec(),
            claimed: 1,
            busy_secs: 0.2 * numbers.uniform(),
            h2d_bytes_per_sec: 25e9,
            h2d_secs: 0.1 * numbers.uniform(),
            gradients_secs: 0.1 * numbers.uniform(),
        }
    };
    (0..count).map(&mut device).collect()
}

fn main() {
    let quick = asked::quick();
    let counted = if quick { 10 } else { 50 };
    let criterion = Criterion::default().without_plots().sample_size(counted);
    let criterion = if quick {
        criterion.nresamples(100).warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(20))
    } else {
        criterion.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1))
    };
    let mut criterion = criterion.configure_from_args();
    let mut rows = Vec::new();
    for (model_count, device_count) in SIZES {
        // All models idle is the most that a policy has to look at.
        for (what, idle_part) in [("busy", 0.2), ("idle", 1.0)] {
            let models = models(model_count, device_count, idle_part);
            let devices = devices(device_count, &models);
            let built_in = POLICIES.map(|(name, make)| (name, make(1)));
            let pipelines: Box<dyn Policy> = Box::new(LocalityLrtf { pipelines: true, ..LocalityLrtf::default() });
            for (name, policy) in built_in.into_iter().chain([("locality-lrtf pipelining", pipelines)]) {
                let case = format!("{name}/{model_count} models {device_count} devices/{what}");
                let mut samples = Vec::new();
                criterion.bench_function(&case, |bencher| {
                    bencher.iter_custom(|iterations| {
                        let begin = Instant::now();
                        for choices in 0..iterations {
                            let view = View {
                                device: (choices % device_count as u64) as DeviceId,
                                choices,
                                last: Some((choices % model_count as u64) as ModelId),
                                models: &models,
                                devices: &devices,
                                shared_bytes_per_sec: Some(100e9),
                            };
                            _ = black_box(policy.choose(black_box(&view)));
                        }
                        let took = begin.elapsed();
                        samples.push(took.as_secs_f64() / iterations as f64);
                        took
                    });
                });
                samples::drop_warm_up(&mut samples, counted);
                samples.sort_by(f64::total_cmp);
                if let Some(best) = samples.first() {
                    rows.push((case, best * 1e6, samples[samples.len() / 2] * 1e6));
                }
            }
        }
    }
    println!("\n{:<52} {:>12} {:>12}", "one choice", "best us", "median us");
    for (case, best, median) in rows {
        println!("{case:<52} {best:>12.3} {median:>12.3}");
    }
}
