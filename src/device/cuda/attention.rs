//! Launches of `kernels/attention.cu`.
//!
//! The gradient is three kernels: the row sums of `d_out * out` into scratch, then `d_q` by tiles of queries and `d_k`, `d_v` by tiles
//! of keys. Both make the scores again, so that no sum crosses blocks.

use super::launch::{Launch, Ptr, Queue};
use super::operands::{Operands, pick};
use crate::base::{DType, Error, Result, philox};
use crate::graph::AttentionKind;

/// Queries, keys and columns of a block of `attention.cu`, and its threads.
const TILE: usize = 64;
const THREADS: u32 = 256;
/// Rows whose sums a block of `attention_grad_delta` makes.
const DELTA_ROWS: usize = THREADS as usize / 32;

/// Queues the kernel of `Op::Attention`.
///
/// # Errors
/// When a size is beyond what kernels take, or the device has failed.
pub(super) fn forward(q: &mut Queue, o: &Operands, kind: &AttentionKind) -> Result<()> {
    let inputs = Inputs::new(q, o, kind, 0)?;
    let kernel = pick(inputs.dtype, "attention_forward_f32", "attention_forward_bf16");
    let blocks = inputs.batch * kind.heads * inputs.queries.div_ceil(TILE) * kind.width.div_ceil(TILE);
    q.launch(inputs.arguments(Launch::new(kernel, [blocks, 1, 1], THREADS).ptr(o.output(0)).ptr(o.output(1))))
}

/// Queues the kernels of `Op::AttentionGrad`.
///
/// # Errors
/// As `forward`.
pub(super) fn grad(q: &mut Queue, o: &Operands, kind: &AttentionKind) -> Result<()> {
    let inputs = Inputs::new(q, o, kind, 3)?;
    let (d_out, out, lse, delta) = (o.input(0), o.input(1), o.input(2), o.scratch());
    let [d_q, d_k, d_v] = inputs.thirds(|i| o.output(i));
    let columns = kind.width.div_ceil(TILE);

    let rows = inputs.batch * inputs.queries * kind.heads;
    let kernel = pick(inputs.dtype, "attention_grad_delta_f32", "attention_grad_delta_bf16");
    let launch = Launch::new(kernel, [rows.div_ceil(DELTA_ROWS), 1, 1], THREADS).ptr(delta).ptr(d_out).ptr(out);
    q.launch(launch.bytes(&inputs.sizes, 4))?;

    let kernel = pick(inputs.dtype, "attention_grad_q_f32", "attention_grad_q_bf16");
    let blocks = inputs.batch * kind.heads * inputs.queries.div_ceil(TILE) * columns;
    let launch = Launch::new(kernel, [blocks, 1, 1], THREADS).ptr(d_q);
    q.launch(inputs.arguments(launch.ptr(d_out).ptr(lse).ptr(delta)))?;

    let kernel = pick(inputs.dtype, "attention_grad_kv_f32", "attention_grad_kv_bf16");
    let blocks = inputs.batch * kind.kv_heads * inputs.keys.div_ceil(TILE) * columns;
    let launch = Launch::new(kernel, [blocks, 1, 1], THREADS).ptr(d_k).ptr(d_v);
    q.launch(inputs.arguments(launch.ptr(d_out).ptr(lse).ptr(delta)))
}

/// What every kernel but `delta`'s reads, and the sizes that launches depend on.
struct Inputs {
    dtype: DType,
    packed: bool,
    batch: usize,
    queries: usize,
    keys: usize,
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
        put((1.0 / (1.0 - p) as f32).to_ne_bytes());

        let mut inputs = Inputs {
            dtype,
            packed,
            batch,
            queries,
            keys,
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

    /// The arguments that end every kernel's list.
    fn arguments(&self, launch: Launch) -> Launch {
        let [q, k, v] = self.tensors;
        launch.ptr(q).ptr(k).ptr(v).ptr(self.mask).ptr(self.now).bytes(&self.sizes, 4)
    }
}
