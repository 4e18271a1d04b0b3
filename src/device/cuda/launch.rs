//! A kernel launch as a value: a name, a grid, arguments in the kernel's order.

use std::sync::Arc;

/// An address in device memory, or in pinned host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ptr(pub u64);

impl Ptr {
    /// Stands for an operand that is not there; kernels see a null pointer.
    pub const NULL: Ptr = Ptr(0);

    /// `bytes` further on.
    pub fn plus(self, bytes: u64) -> Ptr {
        Ptr(self.0 + bytes)
    }
}

/// Bytes that a launch's arguments may take: what every driver since CUDA 1 passes.
const ARGUMENT_BYTES: usize = 4096;
/// Of which so many lie in the launch itself: room for five tensor maps and what goes with them. A launch is built by
/// handing it on from call to call, and each of them may copy it.
const OWN_BYTES: usize = 768;
/// The start of an argument that lies elsewhere.
const ELSEWHERE: u16 = u16::MAX;
/// Arguments that a launch may have.
const ARGUMENTS: usize = 40;
/// Where large arguments start; the largest alignment that one has (a tensor map's).
const ALIGNED: usize = 128;

/// Memory for arguments, aligned for the largest.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Bytes([u8; OWN_BYTES]);

/// A kernel launch. Built by chaining: `Launch::new("add_f32", grid, 256).ptr(out).ptr(a).ptr(b).long(elems)`.
#[derive(Clone)]
pub struct Launch {
    /// The entry point.
    pub kernel: &'static str,
    /// The embedder's kernels that it is of; `None`: the crate's own.
    pub of: Option<&'static str>,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    bytes: Bytes,
    large: Option<Arc<[u64]>>,
    starts: [u16; ARGUMENTS],
    count: usize,
    end: usize,
    /// What does not fit, if anything does not.
    pub(super) fault: Option<&'static str>,
}

impl Launch {
    /// A launch without arguments. A grid with an axis of 0 blocks launches nothing.
    pub fn new(kernel: &'static str, grid: [usize; 3], block: u32) -> Launch {
        let mut launch = Launch {
            kernel,
            of: None,
            grid: [0; 3],
            block,
            shared_bytes: 0,
            bytes: Bytes([0; OWN_BYTES]),
            large: None,
            starts: [0; ARGUMENTS],
            count: 0,
            end: 0,
            fault: None,
        };
        for (axis, (to, from)) in launch.grid.iter_mut().zip(grid).enumerate() {
            // The y and z axes of a grid take 16 bits.
            match u32::try_from(from) {
                Ok(n) if n <= if axis == 0 { i32::MAX as u32 } else { 65_535 } => *to = n,
                _ => launch.fault = Some("more blocks than a grid takes"),
            }
        }
        launch
    }

    /// Of an embedder's kernels.
    pub fn of(mut self, kernels: &'static str) -> Launch {
        self.of = Some(kernels);
        self
    }

    /// With dynamic shared memory.
    pub fn shared(mut self, bytes: u32) -> Launch {
        self.shared_bytes = bytes;
        self
    }

    /// An argument by its bytes: a struct that a kernel takes by value. `align` is a power of two up to 128.
    pub fn bytes(mut self, bytes: &[u8], align: usize) -> Launch {
        debug_assert!(align.is_power_of_two() && align <= ALIGNED);
        let at = self.end.next_multiple_of(align);
        if self.count == ARGUMENTS || at + bytes.len() > OWN_BYTES {
            self.fault = Some("more arguments than a launch takes");
            return self;
        }
        self.bytes.0[at..at + bytes.len()].copy_from_slice(bytes);
        self.starts[self.count] = at as u16;
        self.count += 1;
        self.end = at + bytes.len();
        self
    }

    /// A large argument of alignment 8, by its bytes as words; at most one.
    pub fn large(mut self, words: Arc<[u64]>) -> Launch {
        let bytes = size_of_val(&*words);
        if self.count == ARGUMENTS || self.large.is_some() || self.end.next_multiple_of(8) + bytes > ARGUMENT_BYTES {
            self.fault = Some("more arguments than a launch takes");
            return self;
        }
        self.starts[self.count] = ELSEWHERE;
        self.count += 1;
        self.large = Some(words);
        self
    }

    /// A pointer.
    pub fn ptr(self, ptr: Ptr) -> Launch {
        self.bytes(&ptr.0.to_ne_bytes(), 8)
    }

    /// An `int`: the size of an axis, a flag.
    pub fn int(mut self, value: usize) -> Launch {
        match i32::try_from(value) {
            Ok(value) => self.bytes(&value.to_ne_bytes(), 4),
            Err(_) => {
                self.fault = Some("an axis of 2^31 elements or more");
                self
            }
        }
    }

    /// An `int64_t`: a number of elements.
    pub fn long(self, value: usize) -> Launch {
        self.bytes(&(value as i64).to_ne_bytes(), 8)
    }

    /// A `float`.
    pub fn float(self, value: f32) -> Launch {
        self.bytes(&value.to_ne_bytes(), 4)
    }

    /// A `double`.
    pub fn double(self, value: f64) -> Launch {
        self.bytes(&value.to_ne_bytes(), 8)
    }

    /// A `uint32_t`.
    pub fn word(self, value: u32) -> Launch {
        self.bytes(&value.to_ne_bytes(), 4)
    }

    /// A `const __grid_constant__ CUtensorMap`.
    pub fn map(self, map: &TensorMap) -> Launch {
        self.bytes(&map.0, ALIGNED)
    }

    /// The arguments' bytes as words, among which are all the addresses that the kernel is given: they are aligned.
    #[cfg(feature = "emulator")]
    pub(super) fn words(&self) -> impl Iterator<Item = u64> + '_ {
        let words = self.bytes.0[..self.end].chunks_exact(8);
        let own = words.map(|word| u64::from_ne_bytes(word.try_into().expect("chunks of 8")));
        own.chain(self.large.iter().flat_map(|large| large.iter().copied()))
    }

    /// Addresses of the arguments, as `cuLaunchKernel` takes them, given to `call`.
    pub(super) fn with_arguments<T>(&self, call: impl FnOnce(&mut [*mut std::ffi::c_void]) -> T) -> T {
        let mut addresses = [std::ptr::null_mut(); ARGUMENTS];
        for (address, &start) in addresses.iter_mut().zip(&self.starts[..self.count]) {
            *address = match (&self.large, start) {
                (Some(large), ELSEWHERE) => large.as_ptr().cast_mut().cast(),
                _ => self.bytes.0[start as usize..].as_ptr().cast_mut().cast(),
            };
        }
        call(&mut addresses[..self.count])
    }
}

/// A descriptor for the bulk copy engine (`CUtensorMap`), aligned as CUDA 13 does; what is in it only the driver knows.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
pub struct TensorMap(pub [u8; 128]);

/// A row-major matrix and the box of it that one bulk copy moves, swizzled over 128 bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorMapSpec {
    /// Its first element; a multiple of 16 bytes.
    pub base: Ptr,
    /// Bytes of an element: 2 for bf16, 4 for f32.
    pub elem_bytes: u32,
    /// Rows; what lies outside reads as 0 and is not written.
    pub rows: u64,
    /// Columns, likewise.
    pub cols: u64,
    /// Bytes from a row to the next; a multiple of 16.
    pub pitch_bytes: u64,
    /// Rows of the box.
    pub box_rows: u32,
    /// Columns of the box.
    pub box_cols: u32,
}

/// A bf16 tensor of four axes, the innermost first, and the box of it that one bulk copy moves, swizzled over 128
/// bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BoxMapSpec {
    /// Its first element; a multiple of 16 bytes.
    pub base: Ptr,
    /// Elements along each axis; what lies outside reads as 0.
    pub sizes: [u64; 4],
    /// Bytes from an element to the next along each axis but the innermost; multiples of 16.
    pub pitch_bytes: [u64; 3],
    /// Elements of the tensor that the box spans along each axis, at most 256.
    pub boxed: [u32; 4],
    /// How far those lie apart that are moved, at most 8; 1 for the innermost axis.
    pub apart: [u32; 4],
}
