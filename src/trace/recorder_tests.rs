//! Tests of the recorder and of its file: what is kept, what is counted, what is left after a failure.

use super::*;
use crate::base::LaneKind;
use crate::trace::{TaskName, What, read_trace, sample};

const GPU: LaneId = LaneId::device(0, LaneKind::Compute);
const MATH: LaneId = LaneId::host(LaneKind::HostMath);
const ALL: Keep = Keep { first: u64::MAX, last: 0, total_steps: u64::MAX };

fn event(model: u16, step: u32, i: u64) -> Event {
    let name = TaskName { what: What::Update, model, shard: 1, microbatch: Some(2) };
    let at = f64::from(step) + i as f64 * 1e-3;
    Event { lane: GPU, name, step, start_secs: at, end_secs: at + 1e-3, bytes: 10, flops: 5.0, ticket: i + 1, after: i }
}

fn options(keep: Keep) -> RecorderOptions {
    RecorderOptions::new(keep, vec![MATH, GPU], vec!["a \"name\"".into()])
}

/// Records `events` and returns the summary and the events in the file, after the file has passed as JSON.
fn check(options: RecorderOptions, events: &[Event]) -> (Summary, Vec<Event>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let mut recorder = Recorder::create(&path, options).unwrap();
    events.iter().for_each(|event| recorder.record(event));
    let summary = recorder.finish().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["otherData"]["dropped"], summary.dropped);
    assert_eq!(json["otherData"]["events"], summary.written);
    let rows: Vec<&str> = json["traceEvents"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line["name"] == "thread_name")
        .map(|line| line["args"]["name"].as_str().unwrap())
        .collect();
    for sum in &summary.sums {
        assert_eq!(rows.iter().filter(|row| **row == sum.lane.to_string()).count(), 1, "{} in {rows:?}", sum.lane);
    }
    let read = read_trace(&path).unwrap();
    assert_eq!(read.len() as u64, summary.written);
    (summary, read)
}

fn steps(events: &[Event], model: u16) -> Vec<u32> {
    let mut steps: Vec<u32> = events.iter().filter(|e| e.name.model == model).map(|event| event.step).collect();
    steps.dedup();
    steps
}

#[test]
fn what_is_written_is_read_back() {
    let events = sample::two_steps();
    let (summary, read) = check(options(ALL), &events);
    assert_eq!((summary.written, summary.dropped, summary.displaced), (events.len() as u64, 0, 0));
    for (read, event) in read.iter().zip(&events) {
        // The file holds nanoseconds.
        assert!(
            (read.start_secs - event.start_secs).abs() <= 0.6e-9 && (read.end_secs - event.end_secs).abs() <= 0.6e-9
        );
        assert_eq!(Event { start_secs: event.start_secs, end_secs: event.end_secs, ..*read }, *event);
    }
    for (i, event) in events.iter().enumerate().filter(|(_, event)| event.after > 0) {
        let blocker = event.after as usize - 1;
        assert_eq!(events[blocker].end_secs, event.start_secs);
        assert_eq!(read[blocker].end_secs, read[i].start_secs, "what touched in memory touches in the file");
    }
    let sums = &summary.sums;
    assert_eq!(sums.iter().map(|sum| sum.lane).collect::<Vec<_>>().len(), 4, "two lanes named, two met");
    assert_eq!(sums.iter().map(|sum| sum.tasks).sum::<u64>(), events.len() as u64);
    assert!(sums.windows(2).all(|pair| pair[0].lane < pair[1].lane));
}

#[test]
fn the_args_hold_step_shard_and_rates() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let mut recorder = Recorder::create(&path, options(ALL)).unwrap();
    recorder.record(&Event { bytes: 3_000_000, flops: 2e6, ..event(0, 7, 0) });
    recorder.record(&Event { flops: f64::NAN, start_secs: f64::NAN, end_secs: -1.0, ..event(0, 7, 1) });
    recorder.finish().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let lines: Vec<_> = json["traceEvents"].as_array().unwrap().iter().filter(|line| line["ph"] == "X").collect();
    assert_eq!((&lines[0]["ts"], &lines[0]["dur"]), (&7e6.into(), &1e3.into()));
    let args = &lines[0]["args"];
    assert_eq!((&args["step"], &args["shard"], &args["microbatch"]), (&7.into(), &1.into(), &2.into()));
    assert_eq!((&args["GB/s"], &args["GFLOP/s"], &args["bytes"]), (&3.0.into(), &2.0.into(), &3_000_000.into()));
    assert_eq!((&lines[1]["ts"], &lines[1]["dur"]), (&0.0.into(), &0.0.into()));
    assert_eq!(json["otherData"]["models"][0], "a \"name\"");
}

#[test]
fn first_and_last_steps_are_kept() {
    let run = |models: u16, steps: u32| -> Vec<Event> {
        (0..steps)
            .flat_map(|step| (0..models).flat_map(move |model| (0..3).map(move |i| event(model, step, i))))
            .collect()
    };
    let table: [(&str, Keep, u32, Vec<u32>); 9] = [
        ("none", Keep { first: 0, last: 0, total_steps: 10 }, 10, vec![]),
        ("first", Keep { first: 2, last: 0, total_steps: 10 }, 10, vec![0, 1]),
        ("first and last", Keep { first: 2, last: 3, total_steps: 10 }, 10, vec![0, 1, 7, 8, 9]),
        ("they meet", Keep { first: 5, last: 5, total_steps: 10 }, 10, (0..10).collect()),
        ("they overlap", Keep { first: 9, last: 9, total_steps: 10 }, 10, (0..10).collect()),
        ("ended early", Keep { first: 1, last: 2, total_steps: 10 }, 6, vec![0, 4, 5]),
        ("ended within the last", Keep { first: 1, last: 4, total_steps: 10 }, 8, vec![0, 4, 5, 6, 7]),
        ("total not known", Keep { first: 1, last: 1, total_steps: u64::MAX }, 33, vec![0, 32]),
        ("no steps", Keep { first: 1, last: 1, total_steps: 10 }, 0, vec![]),
    ];
    for (name, keep, ran, want) in table {
        let (summary, mut read) = check(options(keep), &run(1, ran));
        read.sort_by_key(|event| event.step);
        assert_eq!(steps(&read, 0), want, "{name}");
        assert_eq!(read.len(), 3 * want.len(), "{name}: steps are whole and written once");
        assert_eq!((summary.dropped, summary.displaced), (0, 0), "{name}");
        let tasks: u64 = summary.sums.iter().map(|sum| sum.tasks).sum();
        assert_eq!(tasks, 3 * u64::from(ran), "{name}: sums are over all steps");
    }
    // Two models of different lengths: the shorter one's last steps come from the window.
    let mut events = run(2, 10);
    events.retain(|event| event.name.model == 0 || event.step < 5);
    let (_, mut read) = check(options(Keep { first: 1, last: 2, total_steps: 10 }), &events);
    read.sort_by_key(|event| event.step);
    assert_eq!((steps(&read, 0), steps(&read, 1)), (vec![0, 8, 9], vec![0, 3, 4]));
}

#[test]
fn models_that_go_on_or_come_later_have_their_own_first_and_last_steps() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let keep = Keep { first: 2, last: 1, total_steps: 103 };
    let begins = vec![100, 50];
    let mut recorder = Recorder::create(&path, RecorderOptions { begins, ..options(keep) }).unwrap();
    recorder.add_model("second".into(), 60);
    recorder.add_model("third".into(), 200);
    let course = |model: u16, steps: std::ops::Range<u32>| steps.map(move |step| event(model, step, 0));
    let events: Vec<Event> = course(0, 100..103).chain(course(1, 50..60)).chain(course(2, 0..200)).collect();
    events.iter().for_each(|event| recorder.record(event));
    recorder.finish().unwrap();
    let mut read = read_trace(&path).unwrap();
    read.sort_by_key(|event| event.step);
    let of = |model| steps(&read, model);
    // The third is the longest: no step of it is among the last before its last.
    assert_eq!((of(0), of(1), of(2)), (vec![100, 101, 102], vec![50, 51, 59], vec![0, 1, 199]));
    let trace = crate::trace::Trace::read(&path).unwrap();
    assert_eq!(trace.models[1..], ["second", "third"]);
}

#[test]
fn the_window_is_bounded() {
    let keep = Keep { first: 0, last: 4, total_steps: u64::MAX };
    for (window_events, kept) in [(0, 0), (1, 1), (31, 31), (40, 40), (41, 40)] {
        let events: Vec<Event> = (0..1000).flat_map(|step| (0..10).map(move |i| event(0, step, i))).collect();
        let (summary, read) = check(RecorderOptions { window_events, ..options(keep) }, &events);
        assert_eq!(read.len(), kept, "{window_events}");
        assert!(read.iter().all(|event| event.step >= 996));
        assert_eq!(summary.displaced, 40 - kept as u64, "{window_events}: what is missing is counted");
    }
    let mut writer = Writer {
        file: ChromeWriter::create(Path::new("/dev/null"), &[]).unwrap(),
        keep,
        begins: Vec::new(),
        total_steps: Arc::new(AtomicU64::new(keep.total_steps)),
        window: VecDeque::with_capacity(33),
        window_events: 33,
        newest: Vec::new(),
        displaced: VecDeque::new(),
    };
    for step in 0..1023 {
        writer.take(event(0, step, 0));
        assert!(writer.window.len() <= 33 && writer.window.capacity() == 33);
        assert!(writer.displaced.is_empty(), "33 events hold four steps of one");
    }
}

#[test]
fn a_full_ring_drops_and_counts() {
    let events: Vec<Event> = (0..20_000).map(|i| event(0, 0, i)).collect();
    let (summary, read) = check(RecorderOptions { ring_events: 1, ..options(ALL) }, &events);
    // The writer rests after each drain, so that a ring of one cannot take twenty thousand.
    assert!(summary.dropped > 0);
    assert_eq!(summary.written + summary.dropped, 20_000);
    assert!(read.windows(2).all(|pair| pair[0].ticket < pair[1].ticket), "what is left is in order");
    assert_eq!(summary.sums[0].tasks, 20_000, "the sums miss nothing");
}

#[test]
fn a_dropped_recorder_leaves_valid_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.json");
    let mut recorder = Recorder::create(&path, options(Keep { first: 1, last: 1, total_steps: 9 })).unwrap();
    (0..5).for_each(|step| recorder.record(&event(0, step, 0)));
    drop(recorder);
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["otherData"]["events"], 2);
    assert_eq!(steps(&read_trace(&path).unwrap(), 0), [0, 4]);
}

#[test]
fn disks_that_refuse_are_errors() {
    let missing = Recorder::create(Path::new("/nonexistent/trace.json"), options(ALL)).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent/trace.json"), "{missing}");
    let full = Path::new("/dev/full");
    if full.exists() {
        let mut recorder = Recorder::create(full, options(ALL)).unwrap();
        (0..10_000).for_each(|i| recorder.record(&event(0, 0, i)));
        let error = recorder.finish().unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("/dev/full"), "{error}");
        drop(Recorder::create(full, options(ALL)).unwrap());
    }
}
