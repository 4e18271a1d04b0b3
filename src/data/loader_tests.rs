//! The loader hands out what the source makes, in order, no further ahead than asked, and always ends.

use super::*;
use crate::base::{DType, Shape};
use crate::data::{RandomOptions, RandomSource, names};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Makes minibatches whose one id is their number, until something happens at `trouble_at`.
struct Counting {
    spec: InputSpec,
    made: Arc<AtomicU64>,
    trouble_at: u64,
    panics: bool,
}

fn counting(trouble_at: u64, panics: bool) -> (Box<dyn Source>, Arc<AtomicU64>) {
    let made = Arc::new(AtomicU64::new(0));
    let spec = InputSpec::new(vec![(names::INPUT_IDS.into(), DType::I32, Shape::from([1]))], 1).unwrap();
    (Box::new(Counting { spec, made: Arc::clone(&made), trouble_at, panics }), made)
}

impl Source for Counting {
    fn spec(&self) -> &InputSpec {
        &self.spec
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        if index == self.trouble_at {
            assert!(!self.panics, "number {index} was too much");
            return Err(Error::bad(format!("number {index} is bad")));
        }
        batch.conform(&self.spec);
        batch.tensors[0].as_i32_mut()[0] = index as i32;
        self.made.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        1000
    }
}

fn id(batch: &Batch) -> i32 {
    batch.tensors[0].as_i32()[0]
}

#[test]
fn minibatches_come_in_order_from_any_start() {
    for (first, ahead) in [(0, 1), (5, 2), (999, 7), (31, 0)] {
        let loader = Loader::start(counting(u64::MAX, false).0, first, ahead).unwrap();
        for index in first..first + 33 {
            let batch = loader.next().unwrap();
            assert_eq!(id(&batch), index as i32);
            loader.recycle(batch);
        }
    }
}

/// Waits until `made` is `want`, then a little longer to see whether it goes on.
fn settles_at(made: &AtomicU64, want: u64) {
    let start = Instant::now();
    while made.load(Ordering::SeqCst) < want {
        assert!(start.elapsed() < Duration::from_secs(30), "only {} were made", made.load(Ordering::SeqCst));
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(made.load(Ordering::SeqCst), want);
}

#[test]
fn it_runs_ahead_as_far_as_asked_and_no_further() {
    for ahead in [1, 2, 5] {
        let (source, made) = counting(u64::MAX, false);
        let loader = Loader::start(source, 0, ahead).unwrap();
        settles_at(&made, ahead as u64);
        let batch = loader.next().unwrap();
        settles_at(&made, ahead as u64 + 1);
        loader.recycle(batch);
        settles_at(&made, ahead as u64 + 1);
    }
}

#[test]
fn buffers_go_round() {
    let loader = Loader::start(counting(u64::MAX, false).0, 0, 2).unwrap();
    let mut places = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let batch = loader.next().unwrap();
        places.insert(batch.tensors[0].bytes().as_ptr() as usize);
        loader.recycle(batch);
    }
    assert!(places.len() <= 3, "{} buffers for two minibatches ahead", places.len());
}

/// Minibatches that never come back, foreign ones and too many of them are all borne.
#[test]
fn buffers_may_be_kept_or_given_too_often() {
    let loader = Loader::start(counting(u64::MAX, false).0, 0, 2).unwrap();
    let kept: Vec<Batch> = (0..33).map(|_| loader.next().unwrap()).collect();
    assert!(kept.iter().enumerate().all(|(index, batch)| id(batch) == index as i32));
    for batch in kept {
        loader.recycle(batch);
    }
    loader.recycle(Batch::default());
    for index in 33..99 {
        let batch = loader.next().unwrap();
        assert_eq!((id(&batch), batch.tensors.len()), (index, 1));
        loader.recycle(Batch::default());
    }
}

#[test]
fn errors_and_panics_arrive_in_their_place() {
    for panics in [false, true] {
        let loader = Loader::start(counting(3, panics).0, 0, 2).unwrap();
        for index in 0..3 {
            assert_eq!(id(&loader.next().unwrap()), index);
        }
        let first = loader.next().unwrap_err();
        if panics {
            let text = first.to_string();
            assert!(text.contains("panicked at minibatch 3: number 3 was too much"), "{text}");
            assert!(matches!(first, Error::Device(_)));
        } else {
            assert!(matches!(&first, Error::BadInput(text) if text == "number 3 is bad"), "{first}");
        }
        assert!(loader.next().unwrap_err().to_string().contains("reported before"));
        loader.recycle(Batch::default());
    }
}

#[test]
fn ids_are_checked() {
    // Numbers that an i32 does not hold come out negative.
    let last = i32::MAX as u64;
    let loader = Loader::start(counting(u64::MAX, false).0, last, 2).unwrap();
    assert_eq!(id(&loader.next().unwrap()), i32::MAX);
    let message = "minibatch 2147483648: input_ids: value -2147483648 at (0, 0) is below 0";
    assert_eq!(loader.next().unwrap_err().to_string(), message);
}

/// Dropped at once, after a pause with the channel full, after errors, and with the reader holding minibatches.
#[test]
fn dropping_ends_the_thread() {
    for round in 0..50u64 {
        let (source, made) = counting(if round % 3 == 0 { 4 } else { u64::MAX }, round % 2 == 0);
        let loader = Loader::start(source, 0, 1 + round as usize % 4).unwrap();
        let held: Vec<_> = (0..round % 6).map(|_| loader.next()).collect();
        if round % 7 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(loader);
        drop(held);
        // The thread has ended, and with it the source's share in the counter.
        assert_eq!(Arc::strong_count(&made), 1);
    }
}

#[test]
fn a_resumed_loader_gives_the_same_bits() {
    let source = || -> Box<dyn Source> {
        let tensors = vec![(names::PIXEL_VALUES.into(), DType::F32, Shape::from([3, 7, 5]))];
        let options = RandomOptions { tensors, vocab: 1, classes: 1, batch: 3, seed: 11 };
        Box::new(RandomSource::new(&options).unwrap())
    };
    let whole = Loader::start(source(), 0, 2).unwrap();
    let all: Vec<Batch> = (0..12).map(|_| whole.next().unwrap()).collect();
    for first in [0, 1, 11] {
        let resumed = Loader::start(source(), first as u64, 3).unwrap();
        for batch in &all[first..] {
            let again = resumed.next().unwrap();
            assert_eq!(again.tensors[0].bytes(), batch.tensors[0].bytes());
            resumed.recycle(again);
        }
    }
}
