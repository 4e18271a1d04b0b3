//! Small cases of selection worked out by hand, and properties over random orders of arrival.

use super::*;
use Verdict::GoOn;
use proptest::prelude::*;

fn asha(first: u64, eta: u64) -> Asha {
    Asha::new(Rungs::new(first, eta).unwrap())
}

fn stops(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Stop(_))
}

/// Reports `metrics` of the models 0, 1, 2, ... in this order at the first rung, and gives who goes on.
fn check(eta: u64, metrics: &[f64], want: &[usize]) {
    let mut asha = asha(7, eta);
    let gone_on: Vec<usize> =
        metrics.iter().enumerate().filter(|&(m, &metric)| asha.report(m, 7, metric) == GoOn).map(|(m, _)| m).collect();
    assert_eq!(gone_on, want, "eta {eta}, {metrics:?}");
}

#[test]
fn rungs_are_powers() {
    let rungs = Rungs::new(20, 3).unwrap();
    assert_eq!([19, 20, 21, 40, 60, 180, 540].map(|step| rungs.at(step)), {
        [None, Some(0), None, None, Some(1), Some(2), Some(3)]
    });
    let ones = Rungs::new(1, 2).unwrap();
    assert_eq!(
        [0, 1, 2, 3, 1 << 63, u64::MAX].map(|step| ones.at(step)),
        [None, Some(0), Some(1), None, Some(63), None]
    );
    for (first, eta) in [(0, 3), (1, 0), (1, 1)] {
        assert_eq!(Rungs::new(first, eta).unwrap_err().exit_code(), 2);
    }
}

#[test]
fn the_best_so_far_go_on() {
    // Up to 2 * eta - 1 reports one place is there: only a new best goes on.
    check(3, &[5.0, 6.0, 4.0, 4.5, 3.0], &[0, 2, 4]);
    // The sixth report makes a second place: second best goes on, third best does not.
    check(3, &[1.0, 2.0, 3.0, 4.0, 5.0, 1.5], &[0, 5]);
    check(3, &[1.0, 2.0, 3.0, 4.0, 5.0, 2.5], &[0]);
    check(2, &[1.0, 2.0, 3.0, 1.5], &[0, 3]);
    // In the other order the same models fare otherwise.
    check(2, &[3.0, 2.0, 1.5, 1.0], &[0, 1, 2, 3]);
    check(2, &[], &[]);
    check(9, &[0.0], &[0]);
}

#[test]
fn ties_go_to_the_lower_number_and_nan_is_worst() {
    check(2, &[1.0, 1.0, 1.0], &[0]);
    let mut late = asha(7, 2);
    assert_eq!(late.report(5, 7, 1.0), GoOn);
    assert_eq!(late.report(4, 7, 1.0), GoOn);
    check(2, &[0.0, -0.0], &[0]);
    check(2, &[f64::NAN, f64::NAN], &[]);
    check(2, &[f64::NAN, f64::INFINITY, f64::NAN, f64::INFINITY], &[1, 3]);
    // A NaN is one of those that have reported: with it there are four, and two places.
    check(2, &[1.0, f64::NAN, f64::NAN, 2.0], &[0, 3]);
    assert_eq!(asha(7, 2).report(0, 7, f64::NAN), Verdict::Stop("asha after 7 steps: the loss is no number".into()));
}

#[test]
fn rungs_know_nothing_of_each_other_and_a_report_counts_once() {
    let mut asha = asha(2, 2);
    assert_eq!(asha.report(0, 2, 1.0), GoOn);
    // Between rungs nothing is noted, however bad.
    assert_eq!(asha.report(1, 3, 9.0), GoOn);
    let stop = Verdict::Stop("asha after 2 steps: place 2 of 2, and 1 may go on".into());
    assert_eq!(asha.report(1, 2, 9.0), stop);
    assert_eq!(asha.report(2, 4, 9.0), GoOn);
    // Model 0 repeats its report after a better one has come: it stays with its verdict, and is still one of three.
    assert_eq!(asha.report(2, 2, 0.5), GoOn);
    assert_eq!(asha.report(0, 2, 1.0), GoOn);
    assert_eq!(asha.report(1, 2, 0.0), stop);
    for (model, step, notes) in [(0, 2, false), (1, 2, false), (3, 2, true), (0, 3, false), (0, 4, true), (2, 4, false)]
    {
        assert_eq!(asha.would_note(model, step), notes, "model {model} after {step} steps");
    }
    assert_eq!(
        asha.report(3, 2, 3.0),
        Verdict::Stop("asha after 2 steps: place 3 of 4, and 2 may go on".into()),
        "of 0.5, 1, 3, 9"
    );
}

#[test]
fn patience_counts_evaluations_without_improvement() {
    let mut patience = Patience::new(2);
    for (step, metric) in [(10, 3.0), (20, 3.0), (30, 2.5), (40, f64::NAN)] {
        assert_eq!(patience.report(4, step, metric), GoOn, "{step}");
    }
    // Another model's losses do not matter, and neither does a step that was reported before.
    assert_eq!(patience.report(0, 10, 9.0), GoOn);
    assert_eq!(patience.report(4, 40, 9.0), GoOn);
    for (model, step, notes) in [(4, 30, false), (4, 40, false), (4, 41, true), (0, 20, true), (7, 1, true)] {
        assert_eq!(patience.would_note(model, step), notes, "model {model} after {step} steps");
    }
    let stop = Verdict::Stop("patience: 2 evaluations without improvement on 2.5000 after 30 steps".into());
    assert_eq!(patience.report(4, 50, 2.5), stop);
    assert_eq!(patience.report(4, 50, 1.0), stop);
    // NaN from the start: the first number is an improvement.
    let mut patience = Patience::new(2);
    assert_eq!(patience.report(0, 1, f64::NAN), GoOn);
    assert_eq!(patience.report(0, 2, f64::INFINITY), GoOn);
    assert_eq!(patience.report(0, 3, f64::NAN), GoOn);
    assert!(stops(&patience.report(0, 4, f64::NAN)));
    let mut hasty = Patience::new(0);
    assert_eq!([hasty.report(0, 1, 1.0), hasty.report(0, 2, 0.5)], [GoOn, GoOn]);
    assert!(stops(&hasty.report(0, 3, 0.5)));
}

#[test]
fn survivors_follow_the_table() {
    let rungs = Rungs::new(5, 3).unwrap();
    let survivors = Survivors::new(rungs, vec![vec![0, 2], vec![2]]).unwrap();
    let at = |step| [0, 1, 2, 9].map(|model| stops(&survivors.report(model, step)));
    assert_eq!(at(4), [false; 4]);
    assert_eq!(at(5), [false, true, false, true]);
    assert_eq!(at(15), [true, true, false, true]);
    assert_eq!(at(45), [false; 4]);
    for (table, want) in [
        (vec![vec![]], "rung 0 has no survivor"),
        (vec![vec![1], vec![]], "rung 1 has no survivor"),
        (vec![vec![1, 0, 1]], "rung 0 has model 1 twice"),
        (vec![vec![1], vec![0]], "model 0 survives rung 1 but not rung 0"),
    ] {
        let error = Survivors::new(rungs, table).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(want), "{error}");
    }
}

#[test]
fn a_selection_hands_on() {
    let rungs = Rungs::new(5, 3).unwrap();
    let mut asha = Selection::Asha(Asha::new(rungs));
    let mut patience = Selection::Patience(Patience::new(1));
    let mut survivors = Selection::Survivors(Survivors::new(rungs, vec![vec![1]]).unwrap());
    assert_eq!([5, 10, 15].map(|step| asha.has_rung(step)), [true, false, true]);
    assert_eq!([5, 10, 15].map(|step| survivors.has_rung(step)), [true, false, true]);
    assert_eq!([5, 10, 15].map(|step| patience.has_rung(step)), [false; 3]);
    assert_eq!([asha.report(0, 5, 1.0), patience.report(0, 5, 1.0)], [GoOn, GoOn]);
    assert!(stops(&asha.report(1, 5, 2.0)) && stops(&patience.report(0, 6, 2.0)));
    assert!(stops(&survivors.report(0, 5, f64::NEG_INFINITY)));
    assert_eq!(survivors.report(1, 5, f64::NAN), GoOn);
}

fn metric() -> impl Strategy<Value = f64> {
    prop_oneof![Just(f64::NAN), Just(f64::INFINITY), (0u8..6).prop_map(f64::from), -1e3..1e3f64]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// A verdict is what sorting everyone who has come so far says; repeating all reports changes none and repeats
    /// them.
    #[test]
    fn asha_is_a_sort_of_those_who_came(
        metrics in prop::collection::vec(metric(), 1..40),
        order in any::<prop::sample::Index>(),
        eta in 2u64..6,
        first in 1u64..100,
        rung in 0u32..4,
    ) {
        let step = first * eta.pow(rung);
        let n = metrics.len();
        // Some order of arrival: every so many numbers apart, and backwards where that is even.
        let start = order.index(n);
        let mut models: Vec<usize> = (0..n).map(|i| (start + i) % n).collect();
        if start % 2 == 0 { models.reverse(); }
        let mut asha = asha(first, eta);
        let mut came: Vec<usize> = Vec::new();
        let mut verdicts = Vec::new();
        for &model in &models {
            let verdict = asha.report(model, step, metrics[model]);
            came.push(model);
            let mut sorted = came.clone();
            // By a key of another kind than the code's: NaN made the greatest, zeros alike.
            let key = |m: usize| if metrics[m].is_nan() { (1, 0.0) } else { (0, metrics[m] + 0.0) };
            sorted.sort_by(|&a, &b| key(a).partial_cmp(&key(b)).unwrap().then(a.cmp(&b)));
            let place = sorted.iter().position(|&m| m == model).unwrap();
            let places = std::cmp::max(1, came.len() / eta as usize);
            prop_assert_eq!(verdict == GoOn, place < places && !metrics[model].is_nan());
            verdicts.push(verdict);
        }
        // The best number of all, of equal ones the first by number, has gone on whenever it came.
        let best = (0..n).filter(|&m| !metrics[m].is_nan()).min_by(|&a, &b| metrics[a].partial_cmp(&metrics[b]).unwrap());
        if let Some(best) = best {
            prop_assert_eq!(&verdicts[models.iter().position(|&m| m == best).unwrap()], &GoOn);
        }
        let before = format!("{asha:?}");
        for (&model, verdict) in models.iter().zip(&verdicts) {
            prop_assert_eq!(&asha.report(model, step, metrics[model]), verdict);
        }
        prop_assert_eq!(format!("{asha:?}"), before);
    }

    /// Reports repeated in their order, to a fresh rule, give the same verdicts whatever the mix of models and steps.
    #[test]
    fn a_replay_gives_the_same_verdicts(
        reports in prop::collection::vec((0usize..5, 1u64..30, metric()), 0..60),
        evaluations in 1u64..4,
    ) {
        let rules = [Selection::Asha(asha(2, 2)), Selection::Patience(Patience::new(evaluations))];
        for fresh in rules {
            let (mut once, mut again) = (fresh.clone(), fresh);
            for &(model, step, metric) in &reports {
                let verdict = once.report(model, step, metric);
                prop_assert_eq!(&again.report(model, step, metric), &verdict);
                // At once a second time: as if it had not been said.
                prop_assert_eq!(&again.report(model, step, metric), &verdict);
            }
        }
    }

    /// A model stops at the first evaluation that ends a stretch of so many without a new lowest number.
    #[test]
    fn patience_waits_just_so_long(metrics in prop::collection::vec(metric(), 1..40), evaluations in 1usize..5) {
        let mut patience = Patience::new(evaluations as u64);
        let got = metrics.iter().enumerate().position(|(i, &m)| stops(&patience.report(3, 10 * i as u64 + 10, m)));
        let lowest = |upto: usize| metrics[..upto].iter().copied().filter(|m| !m.is_nan()).fold(f64::NAN, f64::min);
        let improves = |i: usize| metrics[i] < lowest(i) || lowest(i).is_nan() && !metrics[i].is_nan();
        let want = (0..metrics.len()).find(|&i| i + 1 >= evaluations && (i + 1 - evaluations..=i).all(|j| !improves(j)));
        prop_assert_eq!(got, want);
    }
}
