//! Policies against each other in a toy executor, and each by what it promises.

mod toy;

use super::*;
use crate::base::philox::Sequence;
use toy::{Toy, Unit};

fn random_toy(seed: u64, ratio: f64, shared: bool) -> Toy {
    let mut r = Sequence::new(seed, 77);
    let devices = 2 + r.below(7) as usize;
    let even = std::env::var("EVEN").is_ok();
    let models = if even {
        devices * 3 / 2 + r.below(devices as u64 * 3 / 2 + 1) as usize
    } else {
        devices / 2 + 1 + r.below(2 * devices as u64) as usize
    };
    let mut make = || {
        let shards = if even { 3 + r.below(3) as u16 } else { 2 + r.below(5) as u16 };
        let steps = if even { 5 + r.below(4) } else { 1 + r.below(12) };
        let f = 0.5 + r.uniform();
        let w = ((0.5 + r.uniform()) * 1e6 * ratio * 1.8) as u64;
        let unit = |shard, secs, boundary: f64, updates| Unit {
            shard,
            secs,
            weight_bytes: w,
            boundary_bytes: (boundary * w as f64) as u64,
            updates,
        };
        let mut units = vec![];
        for _ in 0..steps {
            for s in 0..shards - 1 {
                units.push(unit(s, f, 0.1, false));
            }
            units.push(unit(shards - 1, 3.0 * f, 0.1, true));
            for s in (0..shards - 1).rev() {
                units.push(unit(s, 3.0 * f, 0.2, true));
            }
        }
        units
    };
    let models = if std::env::var("SAME").is_ok() {
        let m = make();
        vec![m; models]
    } else {
        (0..models).map(|_| make()).collect()
    };
    let rate = 1e6;
    Toy { models, devices: vec![(1.0, rate); devices], shared_rate: shared.then_some(rate * devices as f64), slots: 2 }
}

#[test]
fn explore() {
    for shared in [false, true] {
        for ratio in [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0] {
            let mut all: Vec<(f64, f64, f64)> = (0..400)
                .map(|seed| {
                    let toy = random_toy(seed, ratio, shared);
                    let a = toy.run(&ShardedLrtf);
                    let b = toy.run(&LocalityLrtf);
                    let f = toy.run(&Fifo);
                    let sum: f64 = toy.models.iter().flatten().map(|u| u.secs).sum();
                    let bound = toy
                        .models
                        .iter()
                        .map(|m| m.iter().map(|u| u.secs).sum::<f64>())
                        .fold(sum / toy.devices.len() as f64, f64::max);
                    let _ = f;
                    (b.makespan / a.makespan, a.makespan / bound, b.h2d_bytes as f64 / a.h2d_bytes as f64)
                })
                .collect();
            {
                let w = all.iter().enumerate().max_by(|a, b| a.1.0.total_cmp(&b.1.0)).unwrap();
                println!("worst seed {} {:?}", w.0, w.1);
            }
            all.sort_by(|a, b| a.0.total_cmp(&b.0));
            let q = |p: f64| all[((all.len() - 1) as f64 * p) as usize].0;
            let med = |f: fn(&(f64, f64, f64)) -> f64| {
                let mut v: Vec<f64> = all.iter().map(f).collect();
                v.sort_by(f64::total_cmp);
                v[v.len() / 2]
            };
            println!(
                "shared {shared} ratio {ratio}: min {:.3} 10% {:.3} median {:.3} 90% {:.3} max {:.3}; lrtf/bound {:.3} bytes {:.3}",
                q(0.0),
                q(0.1),
                q(0.5),
                q(0.9),
                q(1.0),
                med(|x| x.1),
                med(|x| x.2)
            );
        }
    }
}
#[test]
fn one_case() {
    let toy = random_toy(
        std::env::var("SEED").unwrap().parse().unwrap(),
        std::env::var("RATIO").unwrap().parse().unwrap(),
        false,
    );
    for m in &toy.models {
        println!("{:?} units {} R {:.1}", m[0], m.len(), m.iter().map(|u| u.secs).sum::<f64>());
    }
    for p in [&ShardedLrtf as &dyn Policy, &LocalityLrtf] {
        let ran = toy.run(p);
        println!(
            "{} {:.2} of {:.2}",
            p.name(),
            ran.makespan,
            toy.models.iter().flatten().map(|u| u.secs).sum::<f64>() / toy.devices.len() as f64
        );
        for m in 0..toy.models.len() {
            let us: Vec<String> =
                ran.units.iter().filter(|u| usize::from(u.1) == m).map(|u| format!("{}@{:.0}", u.0, u.2)).collect();
            println!("  {m}: {}", us.join(" "));
        }
    }
}
