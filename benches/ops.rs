//! The host's ops over a named table of shapes: small GPT, GPT-2 124M and ResNet-50, forward and gradient.
//!
//! Criterion reports GFLOP/s or GB/s; the table at the end puts each beside the ceiling measured in the same run: a
//! product of 2048 x 2048 x 2048 for arithmetic, a copy of 256 MiB for memory traffic, both on all cores. A tensor that
//! stays in cache may be over the second one. Every multiply-add counts as two operations and every tensor's bytes
//! once, as in `graph::cost`.
//!
//! `cargo bench --bench ops [FILTER]`; with HYDRA_BENCH_QUICK=1 a short run whose numbers are rough.

#[path = "common/asked.rs"]
mod asked;
#[path = "common/samples.rs"]
mod samples;

use criterion::{Criterion, SamplingMode, Throughput};
use hydra::device::host::attention::{self, Inputs, Sizes};
use hydra::device::host::batchnorm::{self, BatchnormSizes};
use hydra::device::host::conv;
use hydra::device::host::gemm::{Matrix, Threads, gemm};
use hydra::device::host::optimizer::{self, AdamwStep};
use hydra::device::host::parallel::SharedScratch;
use hydra::device::host::pool::{self, PoolSizes};
use hydra::device::host::strided::{Rows, RowsMut};
use hydra::device::host::{
    activation, cross_entropy, elementwise, embedding, glu, linear, mean_squared_error, norm, parallel, rotary,
};
use hydra::graph::{Activation, ConvSizes, RotaryScaling, Rotation, WeightLayout, Window};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// What a body does, as a number to divide by its seconds.
#[derive(Clone, Copy)]
enum Work {
    Flop(f64),
    Bytes(f64),
}

/// One row of the table. Its buffers exist only while it is measured.
struct Case {
    name: String,
    work: Work,
    make: Box<dyn Fn() -> Body>,
}

type Body = Box<dyn FnMut()>;

fn case<B: FnMut() + 'static>(name: impl Into<String>, work: Work, make: impl Fn() -> B + 'static) -> Case {
    Case { name: name.into(), work, make: Box::new(move || Box::new(make())) }
}

/// Numbers in -1..1 without a pattern that caches or arithmetic could profit from.
fn values(len: usize) -> Vec<f32> {
    let mut state = len as u32 | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn ids(len: usize, below: usize) -> Vec<i32> {
    values(len).iter().map(|x| ((x + 1.0) * 0.5 * below as f32) as i32 % below as i32).collect()
}

const GEMM_CEILING: &str = "ceiling/gemm 2048x2048x2048";
const COPY_CEILING: &str = "ceiling/copy 256 MiB";

fn ceilings() -> Vec<Case> {
    let n = 2048;
    let product = case(GEMM_CEILING, Work::Flop(2.0 * (n * n * n) as f64), move || {
        let (a, b, mut out) = (values(n * n), values(n * n), vec![0f32; n * n]);
        move || gemm(&mut out, n, Matrix::rows(&a, n), Matrix::rows(&b, n), [n, n, n], false, Threads::All)
    });
    vec![product, copy_case(COPY_CEILING, 1 << 26)]
}

fn copy_case(name: &str, elems: usize) -> Case {
    case(name, Work::Bytes(8.0 * elems as f64), move || {
        let (from, mut to) = (values(elems), vec![0f32; elems]);
        move || parallel::for_each_chunk(&mut to, 1 << 18, |at, to| to.copy_from_slice(&from[at..][..to.len()]))
    })
}

/// Linear layers: name, rows, inputs, outputs, activation, layout.
type LinearShape = (&'static str, usize, usize, usize, Activation, WeightLayout);
const LINEAR: [LinearShape; 8] = [
    ("small_gpt/qkv", 2048, 384, 1152, Activation::None, WeightLayout::InOut),
    ("small_gpt/up", 2048, 384, 1536, Activation::GeluTanh, WeightLayout::InOut),
    ("small_gpt/down", 2048, 1536, 384, Activation::None, WeightLayout::InOut),
    ("small_gpt/head", 2048, 384, 256, Activation::None, WeightLayout::OutIn),
    ("gpt2_124m/qkv", 512, 768, 2304, Activation::None, WeightLayout::InOut),
    ("gpt2_124m/up", 512, 768, 3072, Activation::GeluTanh, WeightLayout::InOut),
    ("gpt2_124m/down", 512, 3072, 768, Activation::None, WeightLayout::InOut),
    ("gpt2_124m/head", 64, 768, 50257, Activation::None, WeightLayout::OutIn),
];

fn linear_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, rows, inputs, outputs, act, layout) in LINEAR {
        let work = Work::Flop(2.0 * (rows * inputs * outputs) as f64);
        cases.push(case(format!("linear/{name}"), work, move || {
            let (x, weight, bias) = (values(rows * inputs), values(inputs * outputs), values(outputs));
            let (mut out, mut pre) = (vec![0f32; rows * outputs], vec![0f32; rows * outputs]);
            move || {
                let pre = (act != Activation::None).then_some(&mut pre[..]);
                linear::forward(&mut out, pre, &x, &weight, Some(&bias), None, act, layout, rows, inputs, outputs);
            }
        }));
        cases.push(case(format!("linear_grad_input/{name}"), work, move || {
            let (d_y, weight, mut d_x) = (values(rows * outputs), values(inputs * outputs), vec![0f32; rows * inputs]);
            move || linear::grad_input(&mut d_x, &d_y, &weight, None, None, layout, rows, inputs, outputs)
        }));
        cases.push(case(format!("linear_grad_weight/{name}"), work, move || {
            let (x, d_y, mut d_w) = (values(rows * inputs), values(rows * outputs), vec![0f32; inputs * outputs]);
            move || linear::grad_weight(&mut d_w, &x, &d_y, true, layout, rows, inputs, outputs)
        }));
    }
    cases
}

/// Causal attention: name, batch, heads, positions, width of a head.
const ATTENTION: [(&str, usize, usize, usize, usize); 2] =
    [("small_gpt", 8, 6, 256, 64), ("gpt2_124m", 1, 12, 1024, 64)];

/// Attention on q, k and v packed in (B T, 3 H D).
fn packed(qkv: &[f32], sizes: Sizes) -> Inputs<'_, f32> {
    let c = sizes.heads * sizes.width;
    let rows = |part: usize| Rows { data: qkv, offset: part * c, stride: 3 * c };
    let scale = (sizes.width as f64).sqrt().recip();
    Inputs { q: rows(0), k: rows(1), v: rows(2), key_mask: None, sizes, scale, causal: true, dropout: None }
}

fn attention_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, batch, heads, t, width) in ATTENTION {
        let c = heads * width;
        let sizes = Sizes { batch, heads, kv_heads: heads, queries: t, keys: t, width };
        // Two products of (T, T, D) a head, of which the causal half is computed; five in the gradient.
        let product = (batch * heads * t * (t + 1) * width) as f64;
        cases.push(case(format!("attention/{name}"), Work::Flop(2.0 * product), move || {
            let (qkv, mut out, mut lse) =
                (values(batch * t * 3 * c), vec![0f32; batch * t * c], vec![0f32; batch * heads * t]);
            move || attention::forward(&mut out, &mut lse, &packed(&qkv, sizes))
        }));
        cases.push(case(format!("attention_grad/{name}"), Work::Flop(5.0 * product), move || {
            let (qkv, d_out) = (values(batch * t * 3 * c), values(batch * t * c));
            let (mut out, mut lse) = (vec![0f32; batch * t * c], vec![0f32; batch * heads * t]);
            attention::forward(&mut out, &mut lse, &packed(&qkv, sizes));
            let mut d_qkv = vec![0f32; qkv.len()];
            move || {
                let [d_q, d_k, d_v] = RowsMut::split(&mut d_qkv, 3 * c, [0..c, c..2 * c, 2 * c..3 * c]);
                attention::backward(d_q, d_k, d_v, &d_out, &out, &lse, &packed(&qkv, sizes));
            }
        }));
    }
    cases
}

/// Rows and columns of the residual path.
const ROWS: [(&str, usize, usize); 2] = [("small_gpt", 2048, 384), ("gpt2_124m", 1024, 768)];
/// Rows and vocabulary.
const LOGITS: [(&str, usize, usize); 2] = [("small_gpt", 2048, 256), ("gpt2_124m", 256, 50257)];
/// Rows, vocabulary and width.
const TABLES: [(&str, usize, usize, usize); 2] = [("small_gpt", 2048, 256, 384), ("gpt2_124m", 1024, 50257, 768)];

fn row_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, rows, cols) in ROWS {
        let elems = rows * cols;
        cases.push(case(format!("layernorm/{name}"), Work::Bytes(8.0 * elems as f64), move || {
            let (x, weight, bias, mut out) = (values(elems), values(cols), values(cols), vec![0f32; elems]);
            let (mut mean, mut rstd) = (vec![0f32; rows], vec![0f32; rows]);
            move || norm::forward(&mut out, &mut mean, &mut rstd, &x, &weight, &bias, rows, cols, 1e-5)
        }));
        cases.push(case(format!("layernorm_grad/{name}"), Work::Bytes(12.0 * elems as f64), move || {
            let (x, d_y, weight, mean, rstd) =
                (values(elems), values(elems), values(cols), values(rows), vec![1f32; rows]);
            let (mut d_x, mut d_w, mut d_b) = (vec![0f32; elems], vec![0f32; cols], vec![0f32; cols]);
            move || norm::grad(&mut d_x, &mut d_w, &mut d_b, &d_y, &x, &weight, &mean, &rstd, true, rows, cols)
        }));
        cases.push(case(format!("rmsnorm/{name}"), Work::Bytes(8.0 * elems as f64), move || {
            let (x, weight, mut out, mut rstd) = (values(elems), values(cols), vec![0f32; elems], vec![0f32; rows]);
            move || norm::rms_forward(&mut out, &mut rstd, &x, &weight, rows, cols, 1e-5)
        }));
        cases.push(case(format!("rmsnorm_grad/{name}"), Work::Bytes(12.0 * elems as f64), move || {
            let (x, d_y, weight, rstd) = (values(elems), values(elems), values(cols), vec![1f32; rows]);
            let (mut d_x, mut d_w) = (vec![0f32; elems], vec![0f32; cols]);
            move || norm::rms_grad(&mut d_x, &mut d_w, &d_y, &x, &weight, &rstd, true, rows, cols)
        }));
        // Queries and keys of packed rows, three times as wide.
        cases.push(case(format!("rotary/{name}"), Work::Bytes(24.0 * elems as f64), move || {
            let (x, mut out) = (values(3 * elems), vec![0f32; 3 * elems]);
            let rotation =
                Rotation { heads: 2 * cols / 64, width: 64, base: 10_000.0, scaling: RotaryScaling::None, back: false };
            move || rotary::turn(&mut out, Some(&x), &rotation, rows, 3 * cols)
        }));
        cases.push(case(format!("add/{name}"), Work::Bytes(12.0 * elems as f64), move || {
            let (a, b, mut out) = (values(elems), values(elems), vec![0f32; elems]);
            move || elementwise::add(&mut out, Some(&a), &b)
        }));
        cases.push(case(format!("glu/{name}"), Work::Bytes(48.0 * elems as f64), move || {
            let (gate, up, mut out) = (values(4 * elems), values(4 * elems), vec![0f32; 4 * elems]);
            move || glu::forward(&mut out, Some(&gate), &up, Activation::Silu)
        }));
        cases.push(case(format!("glu_grad/{name}"), Work::Bytes(80.0 * elems as f64), move || {
            let [d_out, gate, up] = [(); 3].map(|()| values(4 * elems));
            let (mut d_gate, mut d_up) = (vec![0f32; 4 * elems], vec![0f32; 4 * elems]);
            move || glu::grad(&mut d_gate, &mut d_up, Some(&d_out), &gate, &up, Activation::Silu)
        }));
        for act in [Activation::GeluTanh, Activation::GeluErf] {
            let wide = 4 * elems;
            cases.push(case(format!("{act:?}/{name}"), Work::Bytes(8.0 * wide as f64), move || {
                let (x, mut out) = (values(wide), vec![0f32; wide]);
                move || activation::forward(&mut out, Some(&x), act)
            }));
            cases.push(case(format!("{act:?}_grad/{name}"), Work::Bytes(12.0 * wide as f64), move || {
                let (d_y, pre, mut d_x) = (values(wide), values(wide), vec![0f32; wide]);
                move || activation::grad(&mut d_x, Some(&d_y), &pre, act)
            }));
        }
    }
    for (name, rows, cols) in LOGITS {
        let elems = rows * cols;
        cases.push(case(format!("cross_entropy/{name}"), Work::Bytes(4.0 * elems as f64), move || {
            let (logits, labels) = (values(elems), ids(rows, cols));
            let mut losses = vec![0f32; rows];
            move || cross_entropy::forward(&mut losses, &logits, &labels, rows, cols)
        }));
        cases.push(case(format!("cross_entropy_grad/{name}"), Work::Bytes(8.0 * elems as f64), move || {
            let (logits, labels) = (values(elems), ids(rows, cols));
            let (mut losses, mut d) = (vec![0f32; rows], vec![0f32; elems]);
            move || cross_entropy::grad(&mut d, Some(&mut losses), Some(&logits), &labels, 1e-3, rows, cols)
        }));
    }
    // What a ViT-Base's patches show, 64 images.
    let (rows, cols) = (64 * 196, 768);
    cases.push(case("mean_squared_error/vit_base", Work::Bytes(8.0 * (rows * cols) as f64), move || {
        let (x, targets, mut losses) = (values(rows * cols), values(rows * cols), vec![0f32; rows]);
        move || mean_squared_error::forward(&mut losses, &x, &targets, rows, cols)
    }));
    cases.push(case("mean_squared_error_grad/vit_base", Work::Bytes(12.0 * (rows * cols) as f64), move || {
        let (x, targets, mut d) = (values(rows * cols), values(rows * cols), vec![0f32; rows * cols]);
        move || mean_squared_error::grad(&mut d, Some(&x), &targets, 1e-3, cols)
    }));
    for (name, rows, vocab, cols) in TABLES {
        cases.push(case(format!("embedding/{name}"), Work::Bytes(8.0 * (rows * cols) as f64), move || {
            let (ids, table, mut out) = (ids(rows, vocab), values(vocab * cols), vec![0f32; rows * cols]);
            move || embedding::forward(&mut out, &ids, &table, cols)
        }));
        // Overwriting: the whole table is written, and the rows are read.
        let bytes = 4.0 * (rows * cols + vocab * cols) as f64;
        cases.push(case(format!("embedding_grad/{name}"), Work::Bytes(bytes), move || {
            let (ids, d_y, mut d_table) = (ids(rows, vocab), values(rows * cols), vec![0f32; vocab * cols]);
            move || embedding::grad(&mut d_table, &d_y, &ids, None, false, vocab, cols)
        }));
    }
    // A class token's place before ViT-Base's patches.
    let (batch, patches, cols) = (16, 196, 768);
    let elems = batch * (patches + 1) * cols;
    cases.push(case("shift/vit_base", Work::Bytes(8.0 * elems as f64), move || {
        let (x, mut out) = (values(batch * patches * cols), vec![0f32; elems]);
        move || elementwise::shift(&mut out, &x, 1, batch, patches, patches + 1, cols)
    }));
    cases
}

/// ResNet-50's convolutions: name, channels in, side, channels out, kernel, stride.
const CONV: [(&str, usize, usize, usize, usize, usize); 8] = [
    ("stem", 3, 224, 64, 7, 2),
    ("1.reduce", 256, 56, 64, 1, 1),
    ("1.middle", 64, 56, 64, 3, 1),
    ("2.stride", 128, 56, 128, 3, 2),
    ("2.middle", 128, 28, 128, 3, 1),
    ("3.middle", 256, 14, 256, 3, 1),
    ("4.middle", 512, 7, 512, 3, 1),
    ("4.expand", 512, 7, 2048, 1, 1),
];
/// Images in a batch of the convolutional cases.
const IMAGES: usize = 4;

fn image_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, in_channels, side, out_channels, kernel, stride) in CONV {
        let out_side = (side + 2 * (kernel / 2) - kernel) / stride + 1;
        let window = Window { kernel: [kernel, kernel], stride, padding: kernel / 2 };
        let x_axes = [IMAGES, in_channels, side, side];
        let s = ConvSizes::new(&window, &x_axes, &[IMAGES, out_channels, out_side, out_side]);
        let (x, w) = (IMAGES * in_channels * side * side, out_channels * in_channels * kernel * kernel);
        let y = IMAGES * out_channels * out_side * out_side;
        let work = Work::Flop(2.0 * (y * in_channels * kernel * kernel) as f64);
        cases.push(case(format!("conv2d/resnet50/{name}"), work, move || {
            let (x, w, mut y, mut shared) = (values(x), values(w), vec![0f32; y], SharedScratch::default());
            move || conv::forward(&mut y, &x, &w, None, &s, &mut shared)
        }));
        cases.push(case(format!("conv2d_grad_input/resnet50/{name}"), work, move || {
            let (mut x, w, y, mut shared) = (vec![0f32; x], values(w), values(y), SharedScratch::default());
            move || conv::grad_input(&mut x, &y, &w, &s, &mut shared)
        }));
        cases.push(case(format!("conv2d_grad_weight/resnet50/{name}"), work, move || {
            let (x, mut w, y, mut shared) = (values(x), vec![0f32; w], values(y), SharedScratch::default());
            move || conv::grad_weight(&mut w, &y, &x, true, &s, &mut shared)
        }));
    }
    for (name, channels, side) in [("stem", 64, 112), ("1.expand", 256, 56), ("4.expand", 2048, 7)] {
        let sizes = BatchnormSizes { batch: IMAGES, channels, positions: side * side };
        let elems = IMAGES * channels * side * side;
        cases.push(case(format!("batchnorm/resnet50/{name}"), Work::Bytes(8.0 * elems as f64), move || {
            let (x, weight, bias, mut out) = (values(elems), values(channels), values(channels), vec![0f32; elems]);
            let [mut mean, mut var, mut rstd] = [(); 3].map(|()| vec![0f32; channels]);
            move || {
                batchnorm::forward_train(&mut out, &mut mean, &mut var, &mut rstd, &x, &weight, &bias, &sizes, 1e-5);
            }
        }));
        cases.push(case(format!("batchnorm_grad/resnet50/{name}"), Work::Bytes(12.0 * elems as f64), move || {
            let (d_y, x, weight, mean) = (values(elems), values(elems), values(channels), values(channels));
            let (rstd, mut d_x) = (vec![1f32; channels], vec![0f32; elems]);
            let [mut d_w, mut d_b] = [(); 2].map(|()| vec![0f32; channels]);
            move || {
                batchnorm::grad(&mut d_x, &mut d_w, &mut d_b, &d_y, &x, &weight, &mean, &rstd, true, &sizes);
            }
        }));
    }
    let p = PoolSizes {
        planes: IMAGES * 64,
        height: 112,
        width: 112,
        kernel_h: 3,
        kernel_w: 3,
        stride: 2,
        padding: 1,
        out_height: 56,
        out_width: 56,
    };
    let (inside, outside) = (p.planes * 112 * 112, p.planes * 56 * 56);
    let bytes = Work::Bytes(4.0 * (inside + 2 * outside) as f64);
    cases.push(case("max_pool/resnet50/stem", bytes, move || {
        let (x, mut out, mut argmax) = (values(inside), vec![0f32; outside], vec![0i32; outside]);
        move || pool::max_forward(&mut out, &mut argmax, &x, &p)
    }));
    cases.push(case("max_pool_grad/resnet50/stem", bytes, move || {
        let (x, mut out, mut argmax) = (values(inside), vec![0f32; outside], vec![0i32; outside]);
        pool::max_forward(&mut out, &mut argmax, &x, &p);
        let mut d_x = vec![0f32; inside];
        move || pool::max_grad(&mut d_x, &out, &argmax, &p)
    }));
    cases
}

fn state_cases() -> Vec<Case> {
    let len = 1 << 23;
    let adamw = case("adamw/8Mi parameters", Work::Bytes(28.0 * len as f64), move || {
        let (mut w, mut m, mut v, grad) = (values(len), vec![0f32; len], vec![0f32; len], values(len));
        let step = AdamwStep::new(2, 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0);
        move || optimizer::adamw(&mut w, &mut m, &mut v, &grad, &step)
    });
    let squares = case("sum_squares/8Mi gradients", Work::Bytes(4.0 * len as f64), move || {
        let grad = values(len);
        move || _ = black_box(optimizer::sum_squares(&grad))
    });
    vec![adamw, squares, copy_case("copy/4 MiB", 1 << 20), copy_case("copy/32 MiB", 1 << 23)]
}

/// Measures one case in `counted` samples; their best and their median seconds, or `None` when a filter left it out.
fn measure(criterion: &mut Criterion, counted: usize, case: &Case) -> Option<[f64; 2]> {
    let mut samples: Vec<f64> = Vec::new();
    let mut body: Option<Body> = None;
    let mut group = criterion.benchmark_group("ops");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(match case.work {
        Work::Flop(flop) => Throughput::Elements(flop as u64),
        Work::Bytes(bytes) => Throughput::Bytes(bytes as u64),
    });
    group.bench_function(&case.name, |bencher| {
        bencher.iter_custom(|times| {
            let body = body.get_or_insert_with(|| {
                let mut body = (case.make)();
                // The first run faults pages in and fills the threads' scratch memory.
                body();
                body
            });
            let start = Instant::now();
            (0..times).for_each(|_| body());
            let took = start.elapsed();
            samples.push(took.as_secs_f64() / times as f64);
            took
        });
    });
    group.finish();
    samples::drop_warm_up(&mut samples, counted);
    samples.sort_by(f64::total_cmp);
    Some([*samples.first()?, samples[samples.len() / 2]])
}

fn main() {
    let quick = asked::quick();
    let counted = if quick { 10 } else { 20 };
    let criterion = Criterion::default().without_plots().sample_size(counted);
    let criterion = if quick {
        criterion.nresamples(100).warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(20))
    } else {
        criterion.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
    };
    let mut criterion = criterion.configure_from_args();
    let (mut gemm_ceiling, mut copy_ceiling) = (f64::NAN, f64::NAN);
    let mut rows = Vec::new();
    let cases = [ceilings(), linear_cases(), attention_cases(), row_cases(), image_cases(), state_cases()];
    for case in cases.into_iter().flatten() {
        let Some([best, median]) = measure(&mut criterion, counted, &case) else { continue };
        let (Work::Flop(work) | Work::Bytes(work)) = case.work;
        let rate = |secs: f64| work / secs / 1e9;
        match case.name.as_str() {
            // A ceiling is what the machine has done once; the others are judged by what they usually do.
            GEMM_CEILING => gemm_ceiling = rate(best),
            COPY_CEILING => copy_ceiling = rate(best),
            _ => rows.push((rate(median), median, case)),
        }
    }
    if rows.is_empty() {
        println!("\nno op was measured: no name has the filter in it");
        return;
    }
    // A filter may have left the ceilings out.
    let shown = |ceiling: f64| if ceiling.is_nan() { "-".to_string() } else { format!("{ceiling:.1}") };
    println!("\nmeasured ceilings: {} GFLOP/s, {} GB/s", shown(gemm_ceiling), shown(copy_ceiling));
    println!("| op | median | rate | of the ceiling |\n| --- | ---: | ---: | ---: |");
    for (rate, secs, case) in rows {
        let (unit, ceiling) = match case.work {
            Work::Flop(_) => ("GFLOP/s", gemm_ceiling),
            Work::Bytes(_) => ("GB/s", copy_ceiling),
        };
        let share = if ceiling.is_nan() { "-".to_string() } else { format!("{:.0} %", 100.0 * rate / ceiling) };
        println!("| {} | {} | {rate:.1} {unit} | {share} |", case.name, hydra::base::format_secs(secs));
    }
}
