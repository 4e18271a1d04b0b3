//! Where tests of single launches run: on an emulated GPU, or on GPU 0 where `HYDRA_KERNEL_TESTS_DEVICE` is `cuda`, as
//! tests/kernels does.

use super::blocks::Blocks;
use super::driver::{Driver, Stream};
use super::launch::Ptr;
use super::queue::Queue;
use crate::base::Result;

/// A GPU with one stream.
pub(super) struct Stand {
    driver: Box<dyn Driver>,
    stream: Stream,
    blocks: Blocks,
}

/// Device memory with a place on the host through which it is written and read.
pub(super) struct Held {
    at: Ptr,
    host: *mut u8,
    bytes: usize,
}

impl Held {
    pub fn ptr(&self) -> Ptr {
        self.at
    }
}

impl Stand {
    /// A GPU for kernels of compute capability `arch`: 90 for Hopper's own. On the emulator things go in the order that
    /// `seed` draws. `None` where what was asked for is not there, or is no Hopper; that is said, and no GPU at all is
    /// a failure where `HYDRA_REQUIRE_GPU` is set.
    pub fn open(arch: u32, seed: u32) -> Option<Stand> {
        let named = std::env::var("HYDRA_KERNEL_TESTS_DEVICE").unwrap_or_default();
        let found = match named.as_str() {
            "cuda" => gpu(arch),
            "" | "emulated" => emulated(arch, seed),
            other => panic!("HYDRA_KERNEL_TESTS_DEVICE is {other:?}, want \"cuda\" or \"emulated\""),
        };
        let mut driver = match found {
            Ok(driver) => driver,
            Err(why) => {
                // Past the test harness, which would keep it to itself.
                use std::io::Write;
                let _ = writeln!(std::io::stderr(), "skipped: {why}");
                return None;
            }
        };
        let stream = driver.stream(0).expect("a stream");
        let blocks = Blocks::new(driver.as_mut(), 0, true).expect("memory");
        Some(Stand { driver, stream, blocks })
    }

    /// Memory with these bytes.
    pub fn hold(&mut self, bytes: &[u8]) -> Held {
        let at = self.driver.alloc(0, bytes.len() as u64).expect("memory");
        let host = self.driver.alloc_host(bytes.len() as u64).expect("memory");
        // SAFETY: allocated just above with as many bytes; nothing else knows of it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host, bytes.len()) };
        let held = Held { at, host, bytes: bytes.len() };
        self.driver.copy(self.stream, at, Ptr(host as u64), bytes.len() as u64).expect("a copy");
        held
    }

    /// Launches and waits until all has run.
    pub fn wait_for(&mut self, what: &str, launch: impl FnOnce(&mut Queue) -> Result<()>) {
        let mut q = Queue::new(self.driver.as_mut(), self.stream, &self.blocks, 0);
        launch(&mut q).unwrap_or_else(|e| panic!("{what}: {e}"));
        let done = self.driver.mark(0).expect("a mark");
        self.driver.record(done, self.stream).expect("a stream");
        while !self.driver.passed(done).unwrap_or_else(|e| panic!("{what}: {e}")) {
            self.driver.wait_a_moment(0.0).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }

    /// What is there now. Waits for the copy.
    pub fn read(&mut self, held: &Held) -> Vec<u8> {
        self.wait_for("a copy", |q| q.copy(Ptr(held.host as u64), held.at, held.bytes as u64));
        // SAFETY: allocated by `hold` with as many bytes, and freed with the driver; the copy into it has ended.
        unsafe { std::slice::from_raw_parts(held.host, held.bytes) }.to_vec()
    }
}

#[cfg(feature = "cuda")]
fn gpu(arch: u32) -> std::result::Result<Box<dyn Driver>, String> {
    if let Some(why) = crate::device::why_no_cuda() {
        let required = std::env::var("HYDRA_REQUIRE_GPU").is_ok_and(|v| !v.is_empty() && v != "0");
        assert!(!required, "{why}, and HYDRA_REQUIRE_GPU is set");
        return Err(why);
    }
    let gpus = super::gpus::Gpus::open(&[0]).expect("the GPU opens");
    let facts = gpus.facts(0);
    if arch == 90 && facts.arch != 90 {
        return Err(format!("{facts} is none of compute capability 9.0"));
    }
    Ok(Box::new(gpus))
}

#[cfg(not(feature = "cuda"))]
fn gpu(_: u32) -> std::result::Result<Box<dyn Driver>, String> {
    Err("this program was built without the feature \"cuda\"".into())
}

#[cfg(feature = "emulator")]
fn emulated(arch: u32, seed: u32) -> std::result::Result<Box<dyn Driver>, String> {
    Ok(Box::new(super::Emulated::of(vec![super::Emulated::facts_of(0, arch)], seed).expect("an emulator")))
}

#[cfg(not(feature = "emulator"))]
fn emulated(_: u32, _: u32) -> std::result::Result<Box<dyn Driver>, String> {
    Err("this program was built without the feature \"emulator\"".into())
}
