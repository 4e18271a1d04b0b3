//! Launches of `kernels/attention.cu`, and on tensor cores of `attention_mma.cu`, `attention_mma_grad.cu`,
//! `attention_hopper.cu` and `attention_hopper_grad_*.cu`.
//!
//! The gradient is three kernels: the row sums of `d_out * out` into scratch, then `d_q` by tiles of queries and `d_k`,
//! `d_v` by tiles of keys. Both make the scores again, so that no sum crosses blocks.

mod choice;

use super::launch::{BoxMapSpec, Launch, Ptr, TensorMap, TensorMapSpec};
use super::operands::{Operands, pick};
use super::queue::Queue;
use crate::base::{DType, Error, Result, philox};
use crate::graph::AttentionKind;
use choice::{DELTA_THREADS, HOPPER_BOX, HOPPER_GRAD_TILE, HOPPER_KEYS, HOPPER_QUERIES, Kernel, Path};

/// Rows whose sums a block of `attention_grad_delta` makes.
const DELTA_ROWS: usize = DELTA_THREADS as usize / 32;

/// Queues the kernel of `Op::Attention`.
///
/// # Errors
/// When a size is beyond what kernels take, or the device has failed.
pub(super) fn forward(q: &mut Queue, o: &Operands, kind: &AttentionKind) -> Result<()> {
    let inputs = Inputs::new(q, o, kind, 0)?;
    let path = choice::path(kind, inputs.dtype, inputs.rows(), q.arch());
    let kernel = choice::forward(path, inputs.dtype);
    let mut launch = inputs.launch(&kernel, kind.heads, inputs.queries).ptr(o.output(0)).ptr(o.output(1));
    if let Path::Hopper { .. } = path {
        launch.grid[0] = launch.grid[0].min(q.multiprocessors() as u32);
        let q_map = inputs.sequences(q, 0, inputs.queries, kind.heads, HOPPER_QUERIES)?;
        let k_map = inputs.sequences(q, 1, inputs.keys, kind.kv_heads, HOPPER_KEYS)?;
        let v_map = inputs.sequences(q, 2, inputs.keys, kind.kv_heads, HOPPER_KEYS)?;
        let together = choice::together(kind, inputs.batch * kind.heads, inputs.keys);
        let launch = launch.map(&q_map).map(&k_map).map(&v_map).ptr(inputs.mask).ptr(q.taken());
        return q.launch(launch.int(together).bytes(&inputs.sizes, 4));
    }
    q.launch(inputs.arguments(launch))
}

/// Queues the kernels of `Op::AttentionGrad`.
///
/// # Errors
/// As `forward`.
pub(super) fn grad(q: &mut Queue, o: &Operands, kind: &AttentionKind) -> Result<()> {
    let inputs = Inputs::new(q, o, kind, 3)?;
    let (d_out, out, lse, delta) = (o.input(0), o.input(1), o.input(2), o.scratch());
    let [d_q, d_k, d_v] = inputs.thirds(|i| o.output(i));
    let path = choice::path(kind, inputs.dtype, inputs.rows(), q.arch());

    let rows = inputs.batch * inputs.queries * kind.heads;
    let (kernel, rows_of_block) = match path {
        Path::Hopper { width } => choice::hopper_delta(width),
        _ => (pick(inputs.dtype, "attention_grad_delta_f32", "attention_grad_delta_bf16"), DELTA_ROWS),
    };
    let launch = Launch::new(kernel, [rows.div_ceil(rows_of_block), 1, 1], DELTA_THREADS);
    q.launch(launch.ptr(delta).ptr(d_out).ptr(out).bytes(&inputs.sizes, 4))?;

    let (grad_q, grad_kv) = (choice::grad_q(path, inputs.dtype), choice::grad_kv(path, inputs.dtype));
    let to_q = inputs.launch(&grad_q, kind.heads, inputs.queries).ptr(d_q);
    let to_kv = inputs.launch(&grad_kv, kind.kv_heads, inputs.keys).ptr(d_k).ptr(d_v);
    if let Path::Hopper { .. } = path {
        let [q_map, k_map, v_map] = inputs.maps(q, kind)?;
        let out_pitch = (kind.heads * kind.width * 2) as u64;
        let d_out_map = inputs.map(q, d_out, out_pitch, inputs.rows()[0], kind.heads, HOPPER_GRAD_TILE)?;
        // Of each pass the parts that blocks have taken, and the rows of each head that it streams.
        let group = kind.heads / kind.kv_heads;
        let passes = [
            (to_q, grad_q, rows * 4, kind.heads, inputs.keys),
            (to_kv, grad_kv, (rows + 1) * 4, kind.kv_heads, group * inputs.queries),
        ];
        for (mut launch, kernel, taken, heads, streamed) in passes {
            if choice::makes_several(&kernel) {
                launch.grid[0] = launch.grid[0].min(q.multiprocessors() as u32);
            }
            let together = choice::together(kind, inputs.batch * heads, streamed);
            let launch = launch.ptr(lse).ptr(delta).map(&q_map).map(&d_out_map).map(&k_map).map(&v_map);
            let launch = launch.ptr(inputs.mask).ptr(delta.plus(taken as u64)).int(together);
            q.launch(launch.bytes(&inputs.sizes, 4))?;
        }
        return Ok(());
    }
    for launch in [to_q, to_kv] {
        q.launch(inputs.arguments(launch.ptr(d_out).ptr(lse).ptr(delta)))?;
    }
    Ok(())
}

/// What every kernel but `delta`'s reads, and the sizes that launches depend on.
struct Inputs {
    dtype: DType,
    packed: bool,
    batch: usize,
    width: usize,
    queries: usize,
    keys: usize,
    /// Bytes from a row of q, k and v to the next.
    pitches: [u64; 3],
    /// Bytes before q, k and v in a row of a packed tensor.
    before: [u64; 3],
    tensors: [Ptr; 3],
    mask: Ptr,
    now: Ptr,
    sizes: [u8; SIZES_BYTES],
}

/// Bytes of `AttentionSizes` in `gpu/attention.cuh`: 13 numbers of 4 bytes.
const SIZES_BYTES: usize = 52;

impl Inputs {
    /// Attention's inputs begin at operand `first`.
    fn new(q: &Queue, o: &Operands, kind: &AttentionKind, first: usize) -> Result<Inputs> {
        let AttentionKind { heads, kv_heads, width, packed, .. } = *kind;
        let (axes, dtype) = (o.in_axes(first), o.in_dtype(first));
        let elem_bytes = dtype.bytes();
        let (keys, kv_pitch, mask) =
            if packed { (axes[1], axes[2], first + 1) } else { (o.in_axes(first + 1)[1], kv_heads * width, first + 3) };
        let (batch, queries, q_pitch) = (axes[0], axes[1], axes[2]);
        let before = if packed { [0, heads * width, (heads + kv_heads) * width] } else { [0; 3] };
        let (p, op) = kind.dropout.unwrap_or((0.0, 0));

        let mut sizes = [0; SIZES_BYTES];
        let mut words = sizes.chunks_exact_mut(4);
        let mut put = |word: [u8; 4]| words.next().expect("thirteen numbers").copy_from_slice(&word);
        for size in [batch, heads, kv_heads, queries, keys, width, q_pitch, kv_pitch, usize::from(kind.causal)] {
            let size = i32::try_from(size).map_err(|_| Error::bad("attention: an axis of 2^31 elements or more"))?;
            put(size.to_ne_bytes());
        }
        put((kind.scale as f32).to_ne_bytes());
        put(op.to_ne_bytes());
        put(philox::drop_below(p).to_ne_bytes());
        put(((1.0 / (1.0 - p)) as f32).to_ne_bytes());

        let mut inputs = Inputs {
            dtype,
            packed,
            batch,
            width,
            queries,
            keys,
            pitches: [q_pitch, kv_pitch, kv_pitch].map(|elems| elems as u64 * elem_bytes),
            before: before.map(|elems| elems as u64 * elem_bytes),
            tensors: [Ptr::NULL; 3],
            mask: if kind.masked { o.input(mask) } else { Ptr::NULL },
            now: q.now,
            sizes,
        };
        inputs.tensors = inputs.thirds(|i| o.input(first + i));
        Ok(inputs)
    }

    /// Where q, k and v or their gradients begin, of which `tensor` has the first or all three.
    fn thirds(&self, tensor: impl Fn(usize) -> Ptr) -> [Ptr; 3] {
        [0, 1, 2].map(|i| tensor(if self.packed { 0 } else { i }).plus(self.before[i]))
    }

    /// A launch for `positions` of each of `heads` heads.
    fn launch(&self, kernel: &Kernel, heads: usize, positions: usize) -> Launch {
        let blocks = kernel.blocks(self.batch * heads, positions, self.width);
        Launch::new(kernel.name, [blocks, 1, 1], kernel.threads).shared(kernel.shared_bytes)
    }

    /// All queries and all keys of the batch.
    fn rows(&self) -> [usize; 2] {
        [self.batch * self.queries, self.batch * self.keys]
    }

    /// The descriptor for the bulk copy engine of q, k or v, whose sequences are so long: boxes lie in one sequence,
    /// and what lies past its end is 0.
    fn sequences(&self, q: &mut Queue, i: usize, length: usize, heads: usize, box_rows: usize) -> Result<TensorMap> {
        let sequence_bytes = length as u64 * self.pitches[i];
        q.box_map(&BoxMapSpec {
            base: self.tensors[i],
            sizes: [(heads * self.width) as u64, length as u64, self.batch as u64, 1],
            pitch_bytes: [self.pitches[i], sequence_bytes, sequence_bytes],
            boxed: [HOPPER_BOX as u32, box_rows as u32, 1, 1],
            apart: [1; 4],
        })
    }

    /// Descriptors of q, k and v for the gradient, whose boxes may reach into the next sequence.
    fn maps(&self, q: &mut Queue, kind: &AttentionKind) -> Result<[TensorMap; 3]> {
        let mut map = |i: usize, side: usize, heads: usize| {
            self.map(q, self.tensors[i], self.pitches[i], self.rows()[side], heads, HOPPER_GRAD_TILE)
        };
        Ok([map(0, 0, kind.heads)?, map(1, 1, kind.kv_heads)?, map(2, 1, kind.kv_heads)?])
    }

    /// The descriptor of `rows` rows of `heads` heads.
    fn map(
        &self,
        q: &mut Queue,
        base: Ptr,
        pitch_bytes: u64,
        rows: usize,
        heads: usize,
        box_rows: usize,
    ) -> Result<TensorMap> {
        q.tensor_map(&TensorMapSpec {
            base,
            elem_bytes: 2,
            rows: rows as u64,
            cols: (heads * self.width) as u64,
            pitch_bytes,
            box_rows: box_rows as u32,
            box_cols: HOPPER_BOX as u32,
        })
    }

    /// The arguments that end every kernel's list.
    fn arguments(&self, launch: Launch) -> Launch {
        let [q, k, v] = self.tensors;
        launch.ptr(q).ptr(k).ptr(v).ptr(self.mask).ptr(self.now).bytes(&self.sizes, 4)
    }
}
