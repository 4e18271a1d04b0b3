//! Tests of the attribution: hand-made cases with known answers, and random schedules with what must always hold.

use proptest::prelude::*;

use super::*;
use crate::trace::{TaskName, What};

const GPU: LaneId = LaneId::device(0, LaneKind::Compute);
const UP: LaneId = LaneId::device(0, LaneKind::HostToDevice);
const DOWN: LaneId = LaneId::device(0, LaneKind::DeviceToHost);
const MATH: LaneId = LaneId::host(LaneKind::HostMath);
const READ: LaneId = LaneId::host(LaneKind::DiskRead);

fn event(lane: LaneId, ticket: u64, after: u64, start_secs: f64, end_secs: f64) -> Event {
    let name = TaskName { what: What::Forward, model: 0, shard: 0, microbatch: None };
    Event { lane, name, step: 0, start_secs, end_secs, bytes: 8, flops: 2.0, ticket, after }
}

/// Times in the tables are multiples of 1/2, so that every sum is exact and the parts are compared as they are.
fn check(name: &str, events: &[Event], window: (f64, f64), want: [f64; 6]) {
    assert_eq!(where_time_went(events, window.0, window.1).parts(), want, "{name}");
    let mut backwards = events.to_vec();
    backwards.reverse();
    assert_eq!(where_time_went(&backwards, window.0, window.1).parts(), want, "{name}, in another order");
}

#[test]
fn hand_made_cases() {
    //                                                                          compute h2d  d2h  host disk idle
    check("nothing", &[], (1.0, 3.0), [0.0, 0.0, 0.0, 0.0, 0.0, 2.0]);
    check("empty window", &[event(GPU, 1, 0, 0.0, 1.0)], (2.0, 2.0), [0.0; 6]);
    check("backward window", &[event(GPU, 1, 0, 0.0, 1.0)], (2.0, 1.0), [0.0; 6]);
    check("busy all along", &[event(GPU, 1, 0, 0.0, 9.0)], (1.0, 3.0), [2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let copy_then_run = [event(UP, 1, 0, 0.0, 2.0), event(GPU, 2, 1, 2.0, 5.0)];
    check("a copy not hidden", &copy_then_run, (0.0, 5.0), [3.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    let hidden = [event(GPU, 1, 0, 0.0, 3.0), event(UP, 2, 0, 0.0, 2.0), event(GPU, 3, 1, 3.0, 5.0)];
    check("a copy hidden", &hidden, (0.0, 5.0), [5.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let partly = [event(GPU, 1, 0, 0.0, 3.0), event(UP, 2, 0, 1.0, 4.5), event(GPU, 3, 2, 4.5, 5.0)];
    check("a copy hidden in part", &partly, (0.0, 5.0), [3.5, 1.5, 0.0, 0.0, 0.0, 0.0]);
    let chain = [
        event(GPU, 1, 0, 0.0, 1.0),
        event(DOWN, 2, 1, 1.0, 3.0),
        event(MATH, 3, 2, 3.0, 4.5),
        event(READ, 4, 3, 5.0, 6.0),
        event(UP, 5, 4, 6.0, 8.0),
        event(GPU, 6, 5, 8.5, 10.0),
    ];
    check("a chain with latencies", &chain, (0.0, 10.0), [2.5, 2.0, 2.0, 1.5, 1.0, 1.0]);
    check("the window cuts the chain", &chain, (2.0, 7.0), [0.0, 1.0, 1.0, 1.5, 1.0, 0.5]);
    let tail = [event(GPU, 1, 0, 0.0, 1.0), event(DOWN, 2, 1, 1.0, 2.0), event(MATH, 3, 2, 2.0, 4.0)];
    check("what ends the window", &tail, (0.0, 4.0), [1.0, 0.0, 1.0, 2.0, 0.0, 0.0]);
    check(
        "unknown and circular tickets",
        &[event(UP, 3, 3, 0.0, 1.0), event(GPU, 2, 9, 2.0, 3.0)],
        (0.0, 3.0),
        [1.0, 0.0, 0.0, 0.0, 0.0, 2.0],
    );
    let loops = [event(UP, 5, 6, 0.5, 0.5), event(UP, 6, 5, 0.5, 0.5), event(GPU, 7, 6, 1.0, 2.0)];
    check("a circle ends", &loops, (0.0, 2.0), [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    let broken = [event(GPU, 1, 0, f64::NAN, 1.0), event(GPU, 2, 0, 3.0, 2.0), event(GPU, 3, 0, 0.0, 1.0)];
    check("impossible times", &broken, (0.0, 2.0), [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn several_devices_count_as_one() {
    let other = LaneId::device(1, LaneKind::Compute);
    let parallel = [event(GPU, 1, 0, 0.0, 2.0), event(other, 2, 1, 1.0, 3.0), event(GPU, 3, 0, 4.0, 5.0)];
    check("one works while the other does", &parallel, (0.0, 5.0), [4.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
    let by_turns = [event(GPU, 1, 0, 0.0, 1.0), event(DOWN, 2, 1, 1.0, 2.0), event(other, 3, 2, 2.0, 3.0)];
    check("one hands over to the other", &by_turns, (0.0, 3.0), [2.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
    // What another model's task was it does not know.
    let waits = [event(GPU, 1, 0, 0.0, 1.0), event(GPU, 3, 2, 3.0, 4.0)];
    check("waiting for another model", &waits, (0.0, 4.0), [2.0, 0.0, 0.0, 0.0, 0.0, 2.0]);
}

#[test]
fn sums_and_ceilings() {
    let mut account = StepAccount::new(&[READ, GPU], 2);
    account.add(&event(UP, 1, 0, 0.0, 2.0));
    account.add(&event(UP, 2, 1, 2.0, 4.0));
    account.add(&event(GPU, 3, 2, 4.0, 5.0));
    account.finish_step(0.0, 5.0);
    let sums = account.sums();
    assert_eq!(sums.iter().map(|sum| sum.lane).collect::<Vec<_>>(), [GPU, UP, READ]);
    assert_eq!(sums[1], LaneSum { lane: UP, tasks: 2, busy_secs: 4.0, bytes: 16, flops: 4.0 });
    assert_eq!((sums[1].bytes_per_sec(), sums[2].bytes_per_sec()), (Some(4.0), None));
    let ceilings = Ceilings { flops_per_sec: Some(4.0), h2d_bytes_per_sec: Some(8.0), ..Ceilings::default() };
    assert_eq!(sums.iter().map(|sum| ceilings.of(sum.lane.kind)).collect::<Vec<_>>(), [Some(4.0), Some(8.0), None]);
    assert_eq!(Ceilings { flops_per_sec: Some(0.0), ..ceilings }.of(LaneKind::Compute), None);
    account.finish_step(5.0, 6.0);
    assert!(account.sums().iter().all(|sum| sum.tasks == 0), "a step's sums start anew");
}

/// A schedule in which each task starts once its lane is free and its inputs are there, plus a latency.
fn schedule(draws: &[(u8, u8, u8, u8, u8)]) -> Vec<Event> {
    let lanes =
        [GPU, UP, DOWN, MATH, READ, LaneId::device(1, LaneKind::Compute), LaneId::device(1, LaneKind::HostToDevice)];
    let mut events: Vec<Event> = Vec::new();
    for (ticket, &(lane, secs, latency, back, back2)) in (1..).zip(draws) {
        let lane = lanes[usize::from(lane) % lanes.len()];
        let inputs = [back, back2].map(|back| events.len().checked_sub(usize::from(back) + 1));
        let predecessor = events.iter().rposition(|event| event.lane == lane);
        let waited_for = inputs.into_iter().chain([predecessor]).flatten().map(|i| events[i]);
        let last = waited_for.max_by(|a, b| a.end_secs.total_cmp(&b.end_secs).then(a.ticket.cmp(&b.ticket)));
        let start = last.map_or(0.0, |last| last.end_secs) + f64::from(latency) * 0.013;
        let end = start + f64::from(secs) * 0.1;
        events.push(event(lane, ticket, last.map_or(0, |last| last.ticket), start, end));
    }
    events
}

fn draws() -> impl Strategy<Value = Vec<(u8, u8, u8, u8, u8)>> {
    prop::collection::vec((0u8..7, 0u8..20, 0u8..3, 0u8..12, 0u8..40), 0..120)
}

proptest! {
    #[test]
    fn parts_sum_to_the_window(draws in draws(), cut in 0.0f64..1.0) {
        let events = schedule(&draws);
        let end = events.iter().fold(1.0, |end: f64, event| end.max(event.end_secs));
        for (from, until) in [(0.0, end), (0.0, end * cut), (end * cut, end), (-1.0, end + 1.0)] {
            let bound = where_time_went(&events, from, until);
            // A few hundred additions of numbers below 1000: 1e-9 is far above their rounding.
            prop_assert!((bound.total() - (until - from)).abs() < 1e-9, "{bound:?} in {from}..{until}");
            prop_assert!(bound.parts().iter().all(|&part| part >= -1e-12), "{bound:?}");
        }
    }

    #[test]
    fn compute_is_at_least_the_busy_time_and_without_latency_nothing_idles(draws in draws()) {
        let mut draws = draws;
        draws.iter_mut().for_each(|draw| draw.2 = 0);
        let events = schedule(&draws);
        let end = events.iter().fold(0.0, |end: f64, event| end.max(event.end_secs));
        prop_assume!(end > 0.0);
        let bound = where_time_went(&events, 0.0, end);
        for device in [0, 1].map(|device| LaneId::device(device, LaneKind::Compute)) {
            let busy: f64 = events.iter().filter(|event| event.lane == device).map(Event::secs).sum();
            prop_assert!(bound.compute >= busy - 1e-9, "{:?}, busy {}", bound, busy);
        }
        prop_assert!(bound.idle < 1e-9, "every gap has a task that fills it: {:?}", bound);
    }

    #[test]
    fn event_by_event_and_step_by_step_it_is_the_same(draws in draws(), cut in 0.0f64..1.0) {
        let mut events = schedule(&draws);
        events.sort_by(|a, b| a.end_secs.total_cmp(&b.end_secs));
        let end = events.last().map_or(1.0, |last| last.end_secs);
        let middle = end * cut;
        let lanes: Vec<LaneId> = events.iter().map(|event| event.lane).collect();
        let mut account = StepAccount::new(&lanes, 4);
        let first = events.partition_point(|event| event.end_secs <= middle);
        events[..first].iter().for_each(|event| account.add(event));
        account.finish_step(0.0, middle);
        events[first..].iter().for_each(|event| account.add(event));
        let settled = account.finish_step(middle, end);
        // Tasks that ended before the window's start reach no gap in it, so that forgetting them changes no bit.
        prop_assert_eq!(settled, where_time_went(&events, middle, end));
    }
}

#[test]
fn memory_is_used_again() {
    let mut account = StepAccount::new(&[GPU, UP], 8);
    let mut warm = None;
    for step in 0..100u64 {
        for i in 0..1023 {
            let at = (step * 1023 + i) as f64;
            account.add(&event(if i % 3 == 0 { UP } else { GPU }, step * 1023 + i + 1, step * 1023 + i, at, at + 1.0));
        }
        let bound = account.finish_step(step as f64 * 1023.0, (step + 1) as f64 * 1023.0);
        assert_eq!((bound.h2d, bound.compute), (341.0, 682.0));
        let space = (account.tasks.capacity(), account.compute.capacity(), account.open.capacity());
        assert_eq!(*warm.get_or_insert(space), space, "step {step}");
    }
}
