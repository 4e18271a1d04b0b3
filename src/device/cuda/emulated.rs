//! The emulator as a driver: the kernels' own sources compiled for the CPU, behind streams whose order is adversarial.
//!
//! A stream is a queue that runs only while somebody waits, one entry at a time, the stream drawn by seed among those
//! of all GPUs whose head may run. What the caller forgot to order by marks therefore happens in the wrong order sooner
//! or later, and the same seed repeats it.
//! What is queued on one GPU and names another's memory is refused, as a GPU without access to its peers faults.

mod library;

use super::MULTIPROCESSORS_VARIABLE;
use super::driver::{Driver, Facts, Loaded, Mark, Stream, note_launch, one_gpu};
use super::launch::{BoxMapSpec, Launch, Ptr, TensorMap, TensorMapSpec};
use crate::base::philox::Sequence;
use crate::base::{Error, Result};
use crate::graph::Kernels;
use library::{Kernel, Library, Settings};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Held while checked kernels run.
static CHECKED: Mutex<()> = Mutex::new(());

/// What a stream has to do. Marks carry the recording that is meant.
enum Action {
    Launch(Box<Launch>),
    Copy { to: Ptr, from: Ptr, bytes: u64 },
    Fill { to: Ptr, byte: u8, bytes: u64 },
    Confine(Vec<(Ptr, u64)>),
    Record { mark: usize, recording: u64 },
    WaitFor { mark: usize, recording: u64 },
}

/// How often a mark was put on a stream and passed, and when last.
#[derive(Clone, Copy)]
struct MarkState {
    recorded: u64,
    passed: u64,
    at: Instant,
}

/// An allocation, freed when the driver is dropped.
struct Memory {
    start: *mut c_void,
    bytes: usize,
    /// Whose it is; `None` is the host's.
    gpu: Option<usize>,
}

impl Memory {
    /// Device memory is as the last program left it: filled with NaN here. A device's own allocator aligns to 256
    /// bytes.
    fn new(bytes: u64, gpu: Option<usize>) -> Result<Memory> {
        let fill = if gpu.is_some() { 0xFF } else { 0 };
        let mut start = std::ptr::null_mut();
        let size = usize::try_from(bytes).unwrap_or(usize::MAX).max(1);
        // SAFETY: 4096 is a power of two and a multiple of a pointer's size.
        let code = unsafe { libc::posix_memalign(&raw mut start, 4096, size) };
        if code != 0 {
            return Err(Error::Device(format!("cannot allocate {bytes} bytes for an emulated device")));
        }
        // SAFETY: just allocated with this size.
        unsafe { libc::memset(start, fill, size) };
        Ok(Memory { start, bytes: size, gpu })
    }

    fn holds(&self, address: u64) -> bool {
        (self.start as u64..self.start as u64 + self.bytes as u64).contains(&address)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: from posix_memalign, freed once.
        unsafe { libc::free(self.start) };
    }
}

/// GPUs whose kernels run on the CPU.
pub struct Emulated {
    gpus: Vec<Facts>,
    /// The crate's own kernels.
    own: &'static Library,
    /// Embedders', by name.
    others: BTreeMap<&'static str, &'static Library>,
    custom: Loaded,
    /// By whose they are and their names.
    kernels: HashMap<(Option<&'static str>, &'static str), Kernel>,
    streams: Vec<VecDeque<Action>>,
    marks: Vec<MarkState>,
    memory: Vec<Memory>,
    /// What launches on each stream may touch; empty where nothing was said.
    confined: Vec<Vec<(Ptr, u64)>>,
    order: Sequence,
    seed: u32,
    launches: u32,
}

// SAFETY: memory is used through `&mut self` alone, so by one thread at a time.
unsafe impl Send for Emulated {}

impl Emulated {
    /// The kernels of this crate, by name.
    ///
    /// # Errors
    /// When the kernels cannot be loaded.
    pub fn kernels() -> Result<Vec<String>> {
        Ok(Library::built_in()?.names())
    }

    /// What the `ordinal`-th emulated GPU is, of compute capability `arch` (80, 90), unless a test wants another. One
    /// of 80 has as little shared memory as the least of those that run its kernels, of 86, 89 and 120.
    pub fn facts_of(ordinal: usize, arch: u32) -> Facts {
        let (name, memory_bytes, shared_bytes) =
            ("emulated".into(), 1 << 36, if arch < 90 { 99 << 10 } else { 227 << 10 });
        let asked = std::env::var(MULTIPROCESSORS_VARIABLE).ok().map(|v| v.parse().ok().filter(|&number| number > 0));
        let multiprocessors = asked.map_or(4, |number| number.expect("HYDRA_MULTIPROCESSORS is a number from 1"));
        Facts { ordinal, name, arch, multiprocessors, memory_bytes, shared_bytes }
    }

    /// Emulated GPUs, at least one. Seed 0 runs threads, blocks and streams in order; others in an order drawn from the
    /// seed.
    ///
    /// # Errors
    /// When there are none, or the kernels cannot be loaded.
    pub(super) fn of(gpus: Vec<Facts>, seed: u32) -> Result<Emulated> {
        if gpus.is_empty() {
            return Err(Error::bad("no emulated GPU was asked for"));
        }
        Ok(Emulated {
            gpus,
            own: Library::built_in()?,
            others: BTreeMap::new(),
            custom: Loaded::default(),
            kernels: HashMap::new(),
            streams: Vec::new(),
            marks: Vec::new(),
            memory: Vec::new(),
            confined: Vec::new(),
            order: Sequence::new(u64::from(seed), 0),
            seed,
            launches: 0,
        })
    }

    /// The kernel of a launch, and the library that it is of.
    fn kernel(&mut self, launch: &Launch) -> Result<(&'static Library, Kernel)> {
        let Launch { kernel: name, of, .. } = *launch;
        let library = match of {
            None => self.own,
            Some(of) => {
                self.others.get(of).ok_or_else(|| Error::Device(format!("{of}: these kernels are not loaded")))?
            }
        };
        if let Some(&found) = self.kernels.get(&(of, name)) {
            return Ok((library, found));
        }
        let found = library.kernel(name).ok_or_else(|| Error::Device(format!("there is no kernel {name}")))?;
        self.kernels.insert((of, name), found);
        Ok((library, found))
    }

    /// Refuses an address in the memory of another GPU than `gpu`.
    fn check_own(&self, gpu: usize, what: &str, address: u64) -> Result<()> {
        let other = self.memory.iter().find(|m| m.holds(address)).and_then(|m| m.gpu).filter(|&other| other != gpu);
        other.map_or(Ok(()), |other| {
            let (own, other) = (&self.gpus[gpu], &self.gpus[other]);
            Err(Error::Device(format!("{what} on {own} touches memory of {other}")))
        })
    }

    fn may_run(&self, stream: usize) -> bool {
        match self.streams[stream].front() {
            None => false,
            Some(&Action::WaitFor { mark, recording }) => self.marks[mark].passed >= recording,
            Some(_) => true,
        }
    }

    fn run(&mut self, stream: usize, action: Action) -> Result<()> {
        match action {
            Action::Launch(launch) => self.run_confined(stream, &launch)?,
            Action::Copy { to, from, bytes } => {
                // SAFETY: the caller's addresses, within memory of this driver; the two may be the same place but never
                // overlap in part.
                unsafe { libc::memmove(to.0 as *mut c_void, from.0 as *const c_void, bytes as usize) };
            }
            Action::Fill { to, byte, bytes } => {
                // SAFETY: the caller's address, within memory of this driver.
                unsafe { libc::memset(to.0 as *mut c_void, c_int::from(byte), bytes as usize) };
            }
            Action::Confine(regions) => self.confined[stream] = regions,
            Action::Record { mark, recording } => {
                self.marks[mark].passed = recording;
                self.marks[mark].at = Instant::now();
            }
            Action::WaitFor { .. } => {}
        }
        Ok(())
    }

    /// Runs a kernel; with kernels that are checked, only what its op may touch is open to it, and races there are
    /// looked for.
    fn run_confined(&mut self, stream: usize, launch: &Launch) -> Result<()> {
        let (library, _) = self.kernel(launch)?;
        if self.confined[stream].is_empty() || (!library.checks_races && library.sanitizer.is_none()) {
            return self.run_kernel(launch);
        }
        // What is tracked and forbidden is the process's, so one at a time.
        let _turn = CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some([forbid, allow]) = library.sanitizer {
            for memory in self.memory.iter().filter(|m| m.gpu.is_some()) {
                // SAFETY: an allocation of this driver; nothing else runs in it now.
                unsafe { forbid(memory.start, memory.bytes) };
            }
            for &(start, bytes) in &self.confined[stream] {
                // SAFETY: within an allocation of this driver.
                unsafe { allow(start.0 as *const c_void, bytes as usize) };
            }
        }
        for &(start, bytes) in &self.confined[stream] {
            // SAFETY: within an allocation of this driver.
            unsafe { (library.track)(start.0 as *const c_void, bytes as usize) };
        }
        let result = self.run_kernel(launch);
        // SAFETY: nothing runs now.
        unsafe { (library.untrack_all)() };
        if let Some([_, allow]) = library.sanitizer {
            for memory in self.memory.iter().filter(|m| m.gpu.is_some()) {
                // SAFETY: an allocation of this driver.
                unsafe { allow(memory.start, memory.bytes) };
            }
        }
        result
    }

    fn run_kernel(&mut self, launch: &Launch) -> Result<()> {
        let (library, kernel) = self.kernel(launch)?;
        let room = self.gpus.iter().map(|gpu| gpu.shared_bytes).min().unwrap_or(0);
        if launch.shared_bytes > room {
            return Err(Error::Device(format!(
                "{}: {} bytes of shared memory, of {room}",
                launch.kernel, launch.shared_bytes
            )));
        }
        note_launch(self.gpus[0].arch, launch);
        self.launches = self.launches.wrapping_add(1);
        // Small seeds name the orders that find most; the rest are drawn.
        let seed = if self.seed < 2 { self.seed } else { self.seed.wrapping_add(self.launches) | 2 };
        let settings =
            Settings { grid: launch.grid, block: [launch.block, 1, 1], shared_bytes: launch.shared_bytes, seed };
        // SAFETY: the arguments are in the kernel's order and of its types, which the parity tests check by running it,
        // and an embedder of its own promises (`Kernels::new`).
        let code = launch.with_arguments(|arguments| unsafe { kernel(&raw const settings, arguments.as_mut_ptr()) });
        if code == 0 { Ok(()) } else { Err(Error::Device(format!("{}: {}", launch.kernel, library.error()))) }
    }
}

impl Driver for Emulated {
    fn gpus(&self) -> usize {
        self.gpus.len()
    }

    fn facts(&self, gpu: usize) -> &Facts {
        &self.gpus[gpu]
    }

    fn load_once(&mut self, kernels: &Kernels) -> Result<()> {
        let (name, emulated) = (kernels.name(), kernels.emulated());
        if self.custom.has(name, emulated)? {
            return Ok(());
        }
        if emulated.is_empty() {
            return Err(Error::bad(format!("{name}: was not compiled for the emulator")));
        }
        self.others.insert(name, Library::custom(name, emulated)?);
        self.custom.note(name, emulated);
        Ok(())
    }

    fn alloc(&mut self, gpu: usize, bytes: u64) -> Result<Ptr> {
        self.memory.push(Memory::new(bytes, Some(gpu))?);
        Ok(Ptr(self.memory.last().expect("pushed just above").start as u64))
    }

    fn alloc_host(&mut self, bytes: u64) -> Result<*mut u8> {
        self.memory.push(Memory::new(bytes, None)?);
        Ok(self.memory.last().expect("pushed just above").start.cast())
    }

    fn stream(&mut self, gpu: usize) -> Result<Stream> {
        self.streams.push(VecDeque::new());
        self.confined.push(Vec::new());
        Ok(Stream { gpu, number: self.streams.len() - 1 })
    }

    fn launch(&mut self, stream: Stream, launch: &Launch) -> Result<()> {
        self.kernel(launch)?;
        launch.words().try_for_each(|word| self.check_own(stream.gpu, launch.kernel, word))?;
        self.streams[stream.number].push_back(Action::Launch(Box::new(launch.clone())));
        Ok(())
    }

    fn copy(&mut self, stream: Stream, to: Ptr, from: Ptr, bytes: u64) -> Result<()> {
        self.check_own(stream.gpu, "a copy", to.0)?;
        self.check_own(stream.gpu, "a copy", from.0)?;
        self.streams[stream.number].push_back(Action::Copy { to, from, bytes });
        Ok(())
    }

    fn fill(&mut self, stream: Stream, to: Ptr, byte: u8, bytes: u64) -> Result<()> {
        self.check_own(stream.gpu, "a fill", to.0)?;
        self.streams[stream.number].push_back(Action::Fill { to, byte, bytes });
        Ok(())
    }

    fn mark(&mut self, gpu: usize) -> Result<Mark> {
        self.marks.push(MarkState { recorded: 0, passed: 0, at: Instant::now() });
        Ok(Mark { gpu, number: self.marks.len() - 1 })
    }

    fn record(&mut self, mark: Mark, stream: Stream) -> Result<()> {
        one_gpu(mark.gpu, stream.gpu)?;
        let state = &mut self.marks[mark.number];
        state.recorded += 1;
        let recording = state.recorded;
        self.streams[stream.number].push_back(Action::Record { mark: mark.number, recording });
        Ok(())
    }

    fn wait_for(&mut self, stream: Stream, mark: Mark) -> Result<()> {
        let recording = self.marks[mark.number].recorded;
        self.streams[stream.number].push_back(Action::WaitFor { mark: mark.number, recording });
        Ok(())
    }

    fn passed(&mut self, mark: Mark) -> Result<bool> {
        let state = &self.marks[mark.number];
        Ok(state.passed == state.recorded)
    }

    fn confine(&mut self, stream: Stream, regions: &mut dyn Iterator<Item = (Ptr, u64)>) -> Result<()> {
        self.streams[stream.number].push_back(Action::Confine(regions.collect()));
        Ok(())
    }

    fn wait_a_moment(&mut self, idle_secs: f64) -> Result<()> {
        let ready = (0..self.streams.len()).filter(|&s| self.may_run(s)).count();
        if ready == 0 {
            super::back_off(idle_secs);
            return Ok(());
        }
        let drawn = if self.seed == 0 { 0 } else { self.order.below(ready as u64) as usize };
        let stream = (0..self.streams.len()).filter(|&s| self.may_run(s)).nth(drawn).expect("counted just above");
        let action = self.streams[stream].pop_front().expect("its head may run");
        self.run(stream, action)
    }

    fn secs_between(&mut self, from: Mark, to: Mark) -> Result<f64> {
        one_gpu(from.gpu, to.gpu)?;
        let at = |mark: Mark| self.marks[mark.number].at;
        Ok(match at(to).checked_duration_since(at(from)) {
            Some(later) => later.as_secs_f64(),
            None => -at(from).duration_since(at(to)).as_secs_f64(),
        })
    }

    fn tensor_map(&mut self, _gpu: usize, spec: &TensorMapSpec) -> Result<TensorMap> {
        let mut map = TensorMap([0; 128]);
        let library = self.own;
        // SAFETY: writes 128 bytes to the map; the matrix is only named.
        let code = unsafe {
            (library.encode_map)(
                map.0.as_mut_ptr().cast(),
                spec.base.0 as *const c_void,
                spec.elem_bytes,
                spec.rows,
                spec.cols,
                spec.pitch_bytes,
                spec.box_rows,
                spec.box_cols,
                128,
            )
        };
        if code == 0 { Ok(map) } else { Err(Error::Device(format!("tensor map: {}", library.error()))) }
    }

    fn box_map(&mut self, _gpu: usize, spec: &BoxMapSpec) -> Result<TensorMap> {
        let mut map = TensorMap([0; 128]);
        let library = self.own;
        // SAFETY: writes 128 bytes to the map; the tensor is only named, and the arrays have the four axes, three for
        // pitches.
        let code = unsafe {
            (library.encode_box_map)(
                map.0.as_mut_ptr().cast(),
                spec.base.0 as *const c_void,
                2,
                spec.sizes.as_ptr(),
                spec.pitch_bytes.as_ptr(),
                spec.boxed.as_ptr(),
                spec.apart.as_ptr(),
                128,
            )
        };
        if code == 0 { Ok(map) } else { Err(Error::Device(format!("tensor map: {}", library.error()))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_gpus() -> Vec<Facts> {
        vec![Emulated::facts_of(0, 80), Facts { name: "another".into(), ..Emulated::facts_of(1, 80) }]
    }

    #[test]
    fn addresses_of_another_gpu_are_refused() {
        let mut driver = Emulated::of(two_gpus(), 0).expect("an emulator");
        let memory = [driver.alloc(0, 256).expect("memory"), driver.alloc(1, 256).expect("memory")];
        let host = Ptr(driver.alloc_host(256).expect("memory") as u64);
        let stream = [driver.stream(0).expect("a stream"), driver.stream(1).expect("a stream")];
        let add = |acc: Ptr, x: Ptr| Launch::new("optimizer_add", [1, 1, 1], 256).ptr(acc).ptr(x).long(4);
        for (own, other) in [(0, 1), (1, 0)] {
            let (near, far, stream) = (memory[own], memory[other], stream[own]);
            let inside = far.plus(252);
            let checks = [
                driver.copy(stream, near, inside, 4),
                driver.copy(stream, inside, host, 4),
                driver.fill(stream, inside, 0, 4),
                driver.launch(stream, &add(near, inside)),
                driver.launch(stream, &add(inside, near)),
            ];
            for result in checks {
                let error = result.expect_err("another GPU's").to_string();
                let (own, other) = (driver.facts(own).to_string(), driver.facts(other).to_string());
                assert!(error.contains(&format!("on {own} touches memory of {other}")), "{error}");
            }
            driver.copy(stream, near, host, 4).expect("its own and the host's");
            driver.launch(stream, &add(near, host)).expect("its own and the host's");
        }
        let marks = [driver.mark(0).expect("a mark"), driver.mark(1).expect("a mark")];
        assert!(driver.record(marks[0], stream[1]).is_err(), "a mark is its GPU's");
        driver.record(marks[0], stream[0]).expect("a stream");
        driver.record(marks[1], stream[1]).expect("a stream");
        while !(driver.passed(marks[0]).expect("a mark") && driver.passed(marks[1]).expect("a mark")) {
            driver.wait_a_moment(0.0).expect("what is queued runs");
        }
        assert!(driver.secs_between(marks[0], marks[1]).is_err(), "two clocks");
        assert_eq!(driver.secs_between(marks[1], marks[1]).expect("one clock"), 0.0);
    }

    #[test]
    fn kernels_of_one_name_are_those_that_a_launch_means() {
        let mut driver = Emulated::of(two_gpus(), 0).expect("an emulator");
        let stream = driver.stream(0).expect("a stream");
        let launch = |name| Launch::new("optimizer_add", [1, 1, 1], 256).of(name);
        // The crate's kernels once more, as an embedder's.
        // SAFETY: they are launched nowhere.
        let [one, other] = [library::KERNELS, &[0x7F]].map(|image| unsafe { Kernels::new("own", &[], image) });
        assert!(driver.launch(stream, &launch("own")).is_err(), "not loaded yet");
        driver.load_once(&one).expect("a library");
        driver.load_once(&one).expect("it is loaded");
        let error = driver.load_once(&other).expect_err("another library").to_string();
        assert!(error.contains("own: other kernels of this name are loaded"), "{error}");
        let [built_in, own] = [None, Some("own")].map(|of| {
            let mut launch = launch("own");
            launch.of = of;
            driver.kernel(&launch).expect("both have it").1 as usize
        });
        assert_ne!(built_in, own, "each its own code");
    }
}
