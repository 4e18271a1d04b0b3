//! What the data module allocates: nothing of 4 KiB or more once a loader is warm, and for a hostile file no more than
//! the file's own length allows. Counted by an allocator that watches every request of this program.

use hydra::base::tensorfile::TensorFile;
use hydra::base::{DType, Shape};
use hydra::data::{
    BatchesOptions, BatchesSource, ImageFiles, ImageOptions, ImageSource, Loader, RandomOptions, RandomSource, Source,
    Text, TextOptions, TextSource, Tokenizer, names,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Requests of at least this many bytes are counted.
const LARGE_BYTES: usize = 4096;

struct Watching;

static LARGE: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static HIGH_WATER_BYTES: AtomicUsize = AtomicUsize::new(0);
/// The counters belong to the whole program: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: every call is handed to the system's allocator as it came; the counters have no part in it.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= LARGE_BYTES {
            LARGE.fetch_add(1, Ordering::SeqCst);
        }
        let live = LIVE_BYTES.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        HIGH_WATER_BYTES.fetch_max(live, Ordering::SeqCst);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: `pointer` came from `alloc` above, that is from the same allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Checks that minibatches 5 to 100 of a source, several epochs of it, come without a large allocation.
fn check_steady(what: &str, source: Box<dyn Source>) {
    let limit = source.spec().batches.unwrap_or(100);
    assert!(source.spec().tensors.iter().any(|(_, _, shape)| shape.elems() * source.spec().batch * 4 >= LARGE_BYTES));
    let loader = Loader::start(source, 0, 2).expect("a thread");
    let mut warm = 0;
    for index in 0..limit {
        if index == 5 {
            warm = LARGE.load(Ordering::SeqCst);
        }
        let batch = loader.next().expect("a minibatch");
        loader.recycle(batch);
    }
    assert_eq!(LARGE.load(Ordering::SeqCst) - warm, 0, "large allocations of a warm {what} source");
}

#[test]
fn a_warm_loader_allocates_nothing_large() {
    let _alone = ALONE.lock();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");

    let text: Vec<u8> = (0..200_003u32).map(|n| (n * 7 % 251) as u8).collect();
    std::fs::write(&path, text).expect("written");
    let text = Text::read(std::slice::from_ref(&path), &Tokenizer::Bytes).expect("a text");
    let options = TextOptions { context: 129, batch: 33, seed: 1, valid_fraction: 0.3 };
    let split = TextSource::open(&text, &options).expect("long enough");
    check_steady("text", Box::new(split.train));
    check_steady("held-out text", Box::new(split.valid.expect("asked for")));

    let tensor = |name: &str, dtype, shape: &[usize]| (name.to_string(), dtype, Shape::new(shape));
    let tensors =
        vec![tensor(names::INPUT_IDS, DType::I32, &[513]), tensor(names::PIXEL_VALUES, DType::F32, &[3, 31, 33])];
    let options = RandomOptions { tensors, vocab: 50257, classes: 10, batch: 3, seed: 2 };
    check_steady("random", Box::new(RandomSource::new(&options).expect("in range")));

    let records: Vec<u8> = (0..65usize).flat_map(|n| std::iter::repeat_n((n % 10) as u8, 3073)).collect();
    std::fs::write(&path, records).expect("written");
    let options = ImageOptions { batch: 7, ..ImageOptions::new(ImageFiles::Cifar10 { files: vec![path.clone()] }) };
    check_steady("image", Box::new(ImageSource::open(&options).expect("ten records").train));

    let numbers = |n: usize| (0..n as i64).map(|n| n % 91).flat_map(i64::to_le_bytes).collect::<Vec<u8>>();
    let (ids, labels) = (numbers(40 * 3 * 513), numbers(40 * 3));
    let view = |shape: &[usize], bytes| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::I64, shape.to_vec(), bytes)
            .expect("bytes of that shape")
    };
    let tensors = [("input_ids", view(&[40, 3, 513], &ids)), ("labels", view(&[40, 3], &labels))];
    std::fs::write(&path, safetensors::serialize(tensors, None).expect("serialised")).expect("written");
    let options = BatchesOptions { path, batch: None, shift_labels: false };
    check_steady("ready-made", Box::new(BatchesSource::open(&options).expect("a good file")));
}

/// Checks that parsing `header`, over `data_bytes` of data, never holds more than `times` the file's length.
fn check_parse(header: &str, data_bytes: usize, times: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    let before = LIVE_BYTES.load(Ordering::SeqCst);
    HIGH_WATER_BYTES.store(before, Ordering::SeqCst);
    let read = TensorFile::parse(&bytes, "hostile").is_ok();
    let held = HIGH_WATER_BYTES.load(Ordering::SeqCst) - before;
    assert!(held <= times * bytes.len() + 4096, "{held} bytes held for a file of {} (read: {read})", bytes.len());
}

/// The densest headers: many small tensors, many axes, much text, many fields. An entry of 60 characters costs a few
/// hundred bytes in the two maps that hold it while it is checked, hence the factor.
#[test]
fn hostile_headers_hold_little() {
    const TIMES: usize = 24;
    let _alone = ALONE.lock();
    let many =
        |entry: &dyn Fn(usize) -> String| format!("{{{}}}", (0..20_000).map(entry).collect::<Vec<_>>().join(","));
    check_parse(&many(&|n| format!(r#""{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)), 0, TIMES);
    let axes = format!("[{}]", ["0"; 16].join(","));
    check_parse(&many(&|n| format!(r#""{n}":{{"dtype":"U8","shape":{axes},"data_offsets":[0,0]}}"#)), 0, TIMES);
    let long = format!("[{}]", vec!["0"; 1 << 20].join(","));
    check_parse(&format!(r#"{{"a":{{"dtype":"U8","shape":{long},"data_offsets":[0,0]}}}}"#), 0, TIMES);
    check_parse(&format!(r#"{{"a":{{"dtype":"U8","shape":[],"data_offsets":{long}}}}}"#), 0, TIMES);
    check_parse(&format!(r#"{{"a":{{"more":{long}}}}}"#), 0, TIMES);
    check_parse(&format!(r#"{{"a":{long}}}"#), 0, TIMES);
    let texts = (0..20_000).map(|n| format!(r#""{n}":"""#)).collect::<Vec<_>>().join(",");
    check_parse(&format!(r#"{{"__metadata__":{{{texts}}}}}"#), 0, TIMES);
    check_parse(&"[".repeat(1 << 20), 0, TIMES);
    check_parse(&format!("{{\"{}\":1}}", "a".repeat(1 << 20)), 0, TIMES);
    let huge = [u64::MAX, 1 << 62, 1 << 40];
    for n in huge {
        check_parse(&format!(r#"{{"a":{{"dtype":"U8","shape":[{n}],"data_offsets":[0,{n}]}}}}"#), 9, TIMES);
        check_parse(&format!(r#"{{"a":{{"dtype":"U8","shape":[{n},0],"data_offsets":[0,0]}}}}"#), 0, TIMES);
    }
}
