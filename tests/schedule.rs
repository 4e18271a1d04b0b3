//! How near `locality-lrtf` comes to what no schedule can beat, over random workloads on simulated devices, by the
//! executor that trains: the first 300 of them, or as many as `HYDRA_WORKLOADS` says. What the documents say is of
//! 1,000.
//!
//! The distribution is [`Workload::new`]'s. A workload's copies can be hidden where no visit copies for longer, in both
//! directions together, than it computes. What is wanted there is a makespan within 3 % of the bound in the median and
//! 10 % at the 95th percentile; in 99 % of all workloads one that is at most 2 % longer than `sharded-lrtf`'s; and
//! where all copies exceed all arithmetic, one that is 10 % shorter in the median. Wanted of the policy as the program
//! runs it: rehearsed, here for a small part of the seconds that the program takes at most. What the policy reaches
//! without rehearsals is held too.

#[path = "schedule/held.rs"]
mod held;
#[path = "overlap/models.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod models;
#[path = "schedule/picture.rs"]
mod picture;
#[path = "schedule/workload.rs"]
mod workload;

use std::sync::atomic::{AtomicU64, Ordering};
use workload::Workload;

/// How many are looked at.
fn workloads() -> u64 {
    let asked = std::env::var("HYDRA_WORKLOADS").ok();
    asked.map_or(300, |n| n.parse().expect("HYDRA_WORKLOADS is a number"))
}

/// Visits of shards that a workload's rehearsals may simulate: a fifth of a second. The largest workloads are hardly
/// rehearsed then.
const VISITS: u64 = 20_000;

/// What became of a workload.
struct Outcome {
    shape: String,
    /// No visit copies for longer than it computes.
    hideable: bool,
    /// All copies of a direction take longer than all arithmetic.
    exposed: bool,
    /// Rings and slots have room to copy beside the arithmetic, in every model.
    deep: bool,
    /// The gap to the bound, and the makespan over sharded-LRTF's.
    gap: f64,
    ratio: f64,
    /// The same of the rehearsed policy, where they matter.
    rehearsed_gap: f64,
    rehearsed_ratio: f64,
}

fn outcome(seed: u64) -> Outcome {
    let workload = Workload::new(seed);
    let locality = workload.run("locality-lrtf");
    let lrtf = workload.run("sharded-lrtf");
    let gap = locality.bounds.gap(locality.makespan_secs);
    assert!(gap > -1e-9, "{workload}: below the bound by {gap}");
    let (hideable, exposed) = (workload.greatest_ratio() <= 1.0, workload.whole_ratio() > 1.0);
    let ratio = locality.makespan_secs / lrtf.makespan_secs;
    // A rehearsal makes nothing worse, so what is well without is left alone. The bound that is to be neared is that of
    // whole units.
    let rehearsed = match hideable || exposed || ratio > 1.02 {
        true => workload.rehearse(VISITS, !hideable),
        false => locality.makespan_secs,
    };
    let rehearsed_gap = locality.bounds.gap(rehearsed);
    assert!(rehearsed_gap > -1e-9 || !hideable, "{workload}: below the bound by {rehearsed_gap}");
    Outcome {
        hideable,
        exposed,
        deep: workload.is_deep(),
        gap,
        ratio,
        rehearsed_gap,
        rehearsed_ratio: rehearsed / lrtf.makespan_secs,
        shape: format!(
            "{workload}; {:?} {:.4} of {:?}, lrtf {:.4}",
            locality.bounds.greatest, locality.makespan_secs, locality.bounds, lrtf.makespan_secs
        ),
    }
}

/// The outcomes of all workloads, in the order of their seeds.
fn outcomes() -> Vec<Outcome> {
    let (next, workloads) = (AtomicU64::new(0), workloads());
    let worker = || {
        let mut outcomes = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= workloads {
                return outcomes;
            }
            outcomes.push((seed, outcome(seed)));
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
    let mut all: Vec<(u64, Outcome)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("no workload panics")).collect()
    });
    all.sort_by_key(|(seed, _)| *seed);
    all.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Prints the spread of a number over some outcomes, and gives it at some parts of the way.
fn spread(
    what: &str,
    outcomes: &[Outcome],
    of: impl Fn(&Outcome) -> f64,
    among: impl Fn(&Outcome) -> bool,
) -> impl Fn(f64) -> f64 {
    let mut some: Vec<(f64, &Outcome)> = outcomes.iter().filter(|o| among(o)).map(|o| (of(o), o)).collect();
    some.sort_by(|a, b| a.0.total_cmp(&b.0));
    let numbers: Vec<f64> = some.iter().map(|s| s.0).collect();
    let at = move |part: f64| {
        numbers.get(((numbers.len() as f64 * part) as usize).min(numbers.len().max(1) - 1)).copied().unwrap_or(f64::NAN)
    };
    println!(
        "{what}: {} workloads, 5th {:.4}, 25th {:.4}, median {:.4}, 95th {:.4}, 99th {:.4}",
        some.len(),
        at(0.05),
        at(0.25),
        at(0.5),
        at(0.95),
        at(0.99)
    );
    for (number, outcome) in some.iter().rev().take(5) {
        println!("    {number:.4} {}", outcome.shape);
    }
    at
}

#[test]
fn locality_is_near_the_bound_and_not_worse_than_lrtf() {
    let outcomes = outcomes();
    let gap = |o: &Outcome| o.gap;
    let hideable = spread("above the bound, copies can be hidden", &outcomes, gap, |o| o.hideable);
    let deep = spread("  of those, with room to copy beside the arithmetic", &outcomes, gap, |o| o.hideable && o.deep);
    let _ = spread("  of those, without", &outcomes, gap, |o| o.hideable && !o.deep);
    let _ = spread("above the bound, copies show", &outcomes, gap, |o| !o.hideable);
    let ratio = |o: &Outcome| o.ratio;
    let _ = spread("over sharded-lrtf", &outcomes, ratio, |_| true);
    let exposed = spread("over sharded-lrtf, copies exceed arithmetic", &outcomes, ratio, |o| o.exposed);
    let among_all = |part: &dyn Fn(&Outcome) -> f64| {
        outcomes.iter().filter(|o| part(o) <= 1.02).count() as f64 / outcomes.len() as f64
    };
    let (plain, rehearsed) = (among_all(&ratio), among_all(&|o| o.rehearsed_ratio));
    println!("not worse than sharded-lrtf by more than 2 %: {plain:.4} of all, rehearsed {rehearsed:.4}");
    assert!(hideable(0.5) <= 0.03 && hideable(0.95) <= 0.12, "{} {}", hideable(0.5), hideable(0.95));
    assert!(deep(0.95) <= 0.06 && plain >= 0.96 && exposed(0.5) <= 1.0, "{} {plain} {}", deep(0.95), exposed(0.5));

    let hideable = spread("rehearsed, above the bound", &outcomes, |o| o.rehearsed_gap, |o| o.hideable);
    let exposed = spread("rehearsed, over sharded-lrtf", &outcomes, |o| o.rehearsed_ratio, |o| o.exposed);
    assert!(hideable(0.5) <= 0.03 && hideable(0.95) <= 0.10, "{} {}", hideable(0.5), hideable(0.95));
    assert!(rehearsed >= 0.99 && exposed(0.5) <= 0.90, "{rehearsed} {}", exposed(0.5));
}
