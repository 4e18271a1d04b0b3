//! The builder's ops, one method each: it checks the inputs' shapes and appends the node.

use super::{AttentionOptions, Builder};
use crate::base::{DType, Error, Result, Shape};
use crate::graph::custom::{CUSTOM_OPERANDS, Custom, CustomOp};
use crate::graph::graph::{Source, Value};
use crate::graph::kinds::{Activation, Init, Mode, WeightLayout};
use crate::graph::op::{AttentionKind, Op, RotaryScaling, Rotation, Window};
use std::sync::Arc;

/// Most elements that one dropout can draw for: four per block of the counter.
const MOST_DRAWS: u128 = 1 << 34;

/// Refuses a dropout over more elements than its counter can number: masks would repeat.
fn expect_draws(what: &str, axes: &[usize]) -> Result<()> {
    let elems = axes.iter().map(|&axis| axis as u128).try_fold(1u128, u128::checked_mul);
    match elems.is_some_and(|elems| elems <= MOST_DRAWS) {
        true => Ok(()),
        false => Err(Error::bad(format!("{what}: over {}, more than 2^34 elements", Shape::new(axes)))),
    }
}

impl Builder {
    /// Rows of `table` (V, C) at `ids` (..) -> (.., C).
    ///
    /// # Errors
    /// When the table is no matrix or the ids are no integers.
    pub fn embedding(&mut self, ids: Value, table: Value) -> Result<Value> {
        self.embedding_padded(ids, table, None)
    }

    /// [`Builder::embedding`], but the gradient of the row of id `padding` is 0, as with torch's `padding_idx`.
    ///
    /// # Errors
    /// When the table is no matrix or has no such row, or the ids are no integers.
    pub fn embedding_padded(&mut self, ids: Value, table: Value, padding: Option<usize>) -> Result<Value> {
        self.expect_dtype("embedding: ids", ids, DType::I32)?;
        let [rows, cols] = self.axes("embedding: table", table)?;
        if let Some(padding) = padding.filter(|&padding| padding >= rows) {
            return Err(Error::bad(format!("embedding: padding is {padding}, the table {rows}x{cols}")));
        }
        let mut shape = self.shape(ids).clone();
        shape.0.push(cols);
        self.one(Op::Embedding { padding }, vec![ids, table], shape)
    }

    /// `x` (B, T, C) plus the first T rows of `table` (P, C).
    ///
    /// # Errors
    /// When T is over P or the widths differ.
    pub fn add_position(&mut self, x: Value, table: Value) -> Result<Value> {
        let [_, t, c] = self.axes("add_position: x", x)?;
        let [p, cols] = self.axes("add_position: table", table)?;
        if t > p || c != cols {
            return Err(Error::bad(format!("add_position: x is {}, the table {p}x{cols}", self.shape(x))));
        }
        let shape = self.shape(x).clone();
        self.one(Op::AddPosition, vec![x, table], shape)
    }

    /// `x` (.., K) times `weight`, plus `bias` (N), through `activation` -> (.., N).
    ///
    /// # Errors
    /// When the sizes do not match.
    pub fn linear(
        &mut self,
        x: Value,
        weight: Value,
        bias: Option<Value>,
        activation: Activation,
        layout: WeightLayout,
    ) -> Result<Value> {
        let [a, b] = self.axes("linear: weight", weight)?;
        let (k, n) = match layout {
            WeightLayout::InOut => (a, b),
            WeightLayout::OutIn => (b, a),
        };
        let mut shape = self.shape(x).clone();
        if shape.0.last() != Some(&k) {
            return Err(Error::bad(format!("linear: x is {shape}, the weight takes {k} and gives {n}")));
        }
        *shape.0.last_mut().expect("checked just above") = n;
        let mut inputs = vec![x, weight];
        if let Some(bias) = bias {
            self.expect_shape("linear: bias", bias, &[n])?;
            inputs.push(bias);
        }
        let mut outputs = vec![shape.clone()];
        if activation != Activation::None {
            outputs.push(shape);
        }
        Ok(self.node(Op::Linear { activation, layout, residual: false }, inputs, outputs)?[0])
    }

    /// An activation as an op of its own.
    ///
    /// # Errors
    /// When `x` is not a floating-point tensor of this layer.
    pub fn activation(&mut self, x: Value, activation: Activation) -> Result<Value> {
        let shape = self.shape(x).clone();
        self.one(Op::Activation(activation), vec![x], shape)
    }

    /// `activation(gate) * up`, of one shape: the op between the products of a gated MLP (Shazeer 2020, "GLU variants
    /// improve Transformer", arXiv:2002.05202).
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn glu(&mut self, gate: Value, up: Value, activation: Activation) -> Result<Value> {
        let shape = self.shape(gate).clone();
        self.expect_shape("glu: up", up, shape.axes())?;
        self.one(Op::Glu(activation), vec![gate, up], shape)
    }

    /// `a + b`, of one shape.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn add(&mut self, a: Value, b: Value) -> Result<Value> {
        let shape = self.shape(a).clone();
        self.expect_shape("add: b", b, shape.axes())?;
        self.one(Op::Add, vec![a, b], shape)
    }

    /// `by * x`.
    ///
    /// # Errors
    /// When `by` is not finite.
    pub fn scale(&mut self, x: Value, by: f64) -> Result<Value> {
        if !by.is_finite() {
            return Err(Error::bad(format!("scale: by is {by}, want a finite number")));
        }
        let shape = self.shape(x).clone();
        self.one(Op::Scale(by), vec![x], shape)
    }

    /// Drops elements of `x` with probability `p` in training; `x` itself otherwise.
    ///
    /// # Errors
    /// When `p` is not in [0, 1).
    pub fn dropout(&mut self, x: Value, p: f64) -> Result<Value> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::bad(format!("dropout: p is {p}, want 0 <= p < 1")));
        }
        if p == 0.0 || self.mode == Mode::Evaluation {
            return Ok(x);
        }
        let shape = self.shape(x).clone();
        expect_draws("dropout", shape.axes())?;
        let stream = self.graph.nodes.len() as u32;
        self.one(Op::Dropout { p, stream }, vec![x], shape)
    }

    /// Layer normalisation over the last axis (Ba, Kiros & Hinton 2016, arXiv:1607.06450).
    ///
    /// # Errors
    /// When weight or bias is not as long as the last axis.
    pub fn layernorm(&mut self, x: Value, weight: Value, bias: Value, epsilon: f64) -> Result<Value> {
        let shape = self.shape(x).clone();
        self.expect_shape("layernorm: weight", weight, &[shape.cols()])?;
        self.expect_shape("layernorm: bias", bias, &[shape.cols()])?;
        let rows = Shape::from([shape.rows()]);
        let outputs = vec![shape, rows.clone(), rows];
        Ok(self.node(Op::LayerNorm { epsilon }, vec![x, weight, bias], outputs)?[0])
    }

    /// Normalisation by the root mean square of the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).
    ///
    /// # Errors
    /// When the weight is not as long as the last axis.
    pub fn rmsnorm(&mut self, x: Value, weight: Value, epsilon: f64) -> Result<Value> {
        let shape = self.shape(x).clone();
        self.expect_shape("rmsnorm: weight", weight, &[shape.cols()])?;
        let rows = Shape::from([shape.rows()]);
        Ok(self.node(Op::RmsNorm { epsilon }, vec![x, weight], vec![shape, rows])?[0])
    }

    /// Rotary position embedding of the first `heads` heads of `width` of each row of `x` (B, T, R); the rest of the
    /// row is copied (Su et al. 2021, arXiv:2104.09864, eq. 34, with Llama's pairs: element i of a head and i +
    /// width/2). For packed qkv, (B, T, (H + 2 Hkv) D), `heads` is H + Hkv.
    ///
    /// # Errors
    /// When `x` does not have three axes, its rows are shorter than the heads, the width is odd, or the base is not
    /// above 0.
    pub fn rotary(&mut self, x: Value, heads: usize, width: usize, base: f64) -> Result<Value> {
        self.rotary_scaled(x, heads, width, base, RotaryScaling::None)
    }

    /// [`Builder::rotary`] with angles scaled for long contexts.
    ///
    /// # Errors
    /// As [`Builder::rotary`], and when a factor is below 1, the limits of turns are not in order, or the stretch is
    /// not above 0.
    pub fn rotary_scaled(
        &mut self,
        x: Value,
        heads: usize,
        width: usize,
        base: f64,
        scaling: RotaryScaling,
    ) -> Result<Value> {
        let [_, _, cols] = self.axes("rotary: x", x)?;
        let shape = self.shape(x).clone();
        if heads.checked_mul(width).is_none_or(|turned| turned > cols) {
            return Err(Error::bad(format!("rotary: x is {shape}, its rows shorter than {heads} heads of {width}")));
        }
        if width % 2 == 1 || !(base > 0.0 && base.is_finite()) {
            return Err(Error::bad(format!("rotary: heads are {width} wide, the base is {base}; want even, above 0")));
        }
        let fits = match scaling {
            RotaryScaling::None => true,
            RotaryScaling::Linear { factor } => factor >= 1.0 && factor.is_finite(),
            RotaryScaling::Llama3 { factor, low, high, .. } => {
                factor >= 1.0 && factor.is_finite() && low > 0.0 && low < high && high.is_finite()
            }
            RotaryScaling::Yarn { factor, low, high, positions, stretch, .. } => {
                let ordered = low > 0.0 && low < high && high.is_finite() && positions > 0 && base > 1.0;
                factor >= 1.0 && factor.is_finite() && ordered && stretch > 0.0 && stretch.is_finite()
            }
        };
        if !fits {
            return Err(Error::bad(format!(
                "rotary: {scaling:?}; want a factor of 1 or more, 0 < low < high, and for YaRN a base above 1, a \
                 position or more and a stretch above 0"
            )));
        }
        self.one(Op::Rotary(Rotation { heads, width, base, scaling, back: false }), vec![x], shape)
    }

    /// Attention on packed `qkv` (B, T, (H + 2 Hkv) D); `mask` (B, T) is 1 where a key may be seen.
    ///
    /// # Errors
    /// When the last axis is not a whole number of heads.
    pub fn attention_packed(&mut self, qkv: Value, mask: Option<Value>, options: AttentionOptions) -> Result<Value> {
        let [b, t, packed] = self.axes("attention: qkv", qkv)?;
        let all = options.kv_heads.checked_mul(2).and_then(|both| both.checked_add(options.heads)).unwrap_or(0);
        if all == 0 || packed % all != 0 {
            return Err(Error::bad(format!(
                "attention: qkv is {}, not a multiple of {} heads + 2 x {}",
                self.shape(qkv),
                options.heads,
                options.kv_heads
            )));
        }
        self.attention_node(vec![qkv], mask, [b, t, t, packed / all], options)
    }

    /// Attention of `q` (B, Tq, H D) over `k`, `v` (B, Tk, Hkv D); `mask` (B, Tk) is 1 where a key may be seen.
    ///
    /// # Errors
    /// When the shapes do not agree.
    pub fn attention(
        &mut self,
        q: Value,
        k: Value,
        v: Value,
        mask: Option<Value>,
        options: AttentionOptions,
    ) -> Result<Value> {
        let [b, tq, c] = self.axes("attention: q", q)?;
        let [_, tk, _] = self.axes("attention: k", k)?;
        if options.heads == 0 || c % options.heads != 0 {
            return Err(Error::bad(format!(
                "attention: q is {}, not a multiple of {} heads",
                self.shape(q),
                options.heads
            )));
        }
        let width = c / options.heads;
        let kv = options.kv_heads.saturating_mul(width);
        self.expect_shape("attention: k", k, &[b, tk, kv])?;
        self.expect_shape("attention: v", v, &[b, tk, kv])?;
        self.attention_node(vec![q, k, v], mask, [b, tq, tk, width], options)
    }

    fn attention_node(
        &mut self,
        mut inputs: Vec<Value>,
        mask: Option<Value>,
        [b, tq, tk, width]: [usize; 4],
        options: AttentionOptions,
    ) -> Result<Value> {
        let AttentionOptions { heads, kv_heads, scale, causal, dropout } = options;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::bad(format!("attention: {heads} query heads do not share {kv_heads} key heads evenly")));
        }
        if width == 0 {
            return Err(Error::bad("attention: heads have no columns"));
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(Error::bad(format!("attention: dropout is {dropout}, want 0 <= p < 1")));
        }
        if dropout > 0.0 && self.mode == Mode::Training {
            expect_draws("attention: dropout", &[b, heads, tq, tk])?;
        }
        if let Some(mask) = mask {
            self.expect_dtype("attention: mask", mask, DType::I32)?;
            self.expect_shape("attention: mask", mask, &[b, tk])?;
        }
        let stream = self.graph.nodes.len() as u32;
        let kind = AttentionKind {
            heads,
            kv_heads,
            width,
            scale: scale.unwrap_or(1.0 / (width as f64).sqrt()),
            causal,
            packed: inputs.len() == 1,
            masked: mask.is_some(),
            dropout: (dropout > 0.0 && self.mode == Mode::Training).then_some((dropout, stream)),
        };
        inputs.extend(mask);
        let outputs = vec![Shape::from([b, tq, heads * width]), Shape::from([b, heads, tq])];
        Ok(self.node(Op::Attention(kind), inputs, outputs)?[0])
    }

    /// Convolution of `x` (N, C, H, W) with `weight` (O, C, kh, kw), plus `bias` (O).
    ///
    /// # Errors
    /// When the channels differ, the stride is 0, or the kernel is larger than the padded image.
    pub fn conv2d(
        &mut self,
        x: Value,
        weight: Value,
        bias: Option<Value>,
        stride: usize,
        padding: usize,
    ) -> Result<Value> {
        let [n, c, h, w] = self.axes("conv2d: x", x)?;
        let [o, wc, kh, kw] = self.axes("conv2d: weight", weight)?;
        let window = Window { kernel: [kh, kw], stride, padding };
        if c != wc {
            return Err(Error::bad(format!("conv2d: x is {}, the weight {}", self.shape(x), self.shape(weight))));
        }
        let [oh, ow] = self.window("conv2d", window, [h, w])?;
        let mut inputs = vec![x, weight];
        if let Some(bias) = bias {
            self.expect_shape("conv2d: bias", bias, &[o])?;
            inputs.push(bias);
        }
        self.one(Op::Conv2d(window), inputs, Shape::from([n, o, oh, ow]))
    }

    /// Batch normalisation over all axes but the second (Ioffe & Szegedy 2015, arXiv:1502.03167), with running
    /// statistics as states. In training a single value per channel is refused, as in torch.
    ///
    /// # Errors
    /// When the sizes do not match, or in training there is only one value per channel.
    pub fn batchnorm(&mut self, x: Value, name: &str, epsilon: f64, momentum: f64) -> Result<Value> {
        let shape = self.shape(x).clone();
        let &[_, channels, ..] = shape.axes() else {
            return Err(Error::bad(format!("batchnorm: x is {shape}, want (N, C, ..)")));
        };
        let count = shape.elems().checked_div(channels).unwrap_or(0);
        let c = [channels];
        let weight = self.parameter(format!("{name}.weight"), c, Init::Constant(1.0))?;
        let bias = self.parameter(format!("{name}.bias"), c, Init::Constant(0.0))?;
        let running_mean = self.state(format!("{name}.running_mean"), c, 0.0)?;
        let running_var = self.state(format!("{name}.running_var"), c, 1.0)?;
        if self.mode == Mode::Evaluation {
            return self.one(Op::BatchNormEval { epsilon }, vec![x, weight, bias, running_mean, running_var], shape);
        }
        if count == 1 {
            return Err(Error::bad(format!(
                "batchnorm {name}: x is {shape}, one value a channel; training needs more"
            )));
        }
        let stat = Shape::from(c);
        let outputs = vec![shape, stat.clone(), stat.clone(), stat];
        let out = self.node(Op::BatchNorm { epsilon }, vec![x, weight, bias], outputs)?;
        self.node(Op::UpdateRunning { momentum, count }, vec![out[1], out[3], running_mean, running_var], vec![])?;
        Ok(out[0])
    }

    /// Maximum of each window.
    ///
    /// # Errors
    /// When the kernel is larger than the padded image, or the padding over half the kernel.
    pub fn max_pool(&mut self, x: Value, kernel: usize, stride: usize, padding: usize) -> Result<Value> {
        let [n, c, h, w] = self.axes("max_pool: x", x)?;
        let window = Window { kernel: [kernel; 2], stride, padding };
        if padding > kernel / 2 {
            return Err(Error::bad(format!("max_pool: padding {padding} is over half of the kernel {kernel}")));
        }
        let [oh, ow] = self.window("max_pool", window, [h, w])?;
        let out = Shape::from([n, c, oh, ow]);
        Ok(self.node(Op::MaxPool(window), vec![x], vec![out.clone(), out])?[0])
    }

    /// Mean of each window.
    ///
    /// # Errors
    /// When the kernel is larger than the padded image, or the padding over half the kernel.
    pub fn avg_pool(&mut self, x: Value, kernel: [usize; 2], stride: usize, padding: usize) -> Result<Value> {
        let [n, c, h, w] = self.axes("avg_pool: x", x)?;
        let window = Window { kernel, stride, padding };
        if padding > kernel[0].min(kernel[1]) / 2 {
            return Err(Error::bad(format!("avg_pool: padding {padding} is over half of the kernel {kernel:?}")));
        }
        let [oh, ow] = self.window("avg_pool", window, [h, w])?;
        self.one(Op::AvgPool(window), vec![x], Shape::from([n, c, oh, ow]))
    }

    /// Mean of each plane: (N, C, H, W) -> (N, C).
    ///
    /// # Errors
    /// When `x` is not an image or has empty planes.
    pub fn global_avg_pool(&mut self, x: Value) -> Result<Value> {
        let [n, c, h, w] = self.axes("global_avg_pool: x", x)?;
        let pooled = self.avg_pool(x, [h, w], 1, 0)?;
        self.reshape(pooled, [n, c])
    }

    /// A custom op.
    ///
    /// # Errors
    /// What its shape rule returns; and in an f64 model, which custom ops do not support, or with more operands than
    /// [`CUSTOM_OPERANDS`].
    pub fn custom(&mut self, op: Arc<dyn CustomOp>, inputs: Vec<Value>) -> Result<Vec<Value>> {
        if self.graph.float == DType::F64 {
            return Err(Error::bad(format!("{}: a custom op computes in f32, this model in f64", op.name())));
        }
        let shapes: Vec<&Shape> = inputs.iter().map(|&v| self.shape(v)).collect();
        let outputs = op.shapes(&shapes)?;
        // Its gradient has all of these and one more as inputs.
        if inputs.len() + outputs.len() >= CUSTOM_OPERANDS || outputs.is_empty() {
            return Err(Error::bad(format!(
                "{}: has {} inputs and {} outputs; there must be an output, and fewer than {CUSTOM_OPERANDS} of both",
                op.name(),
                inputs.len(),
                outputs.len()
            )));
        }
        self.node(Op::Custom(Custom(op)), inputs, outputs)
    }

    /// The same elements with another shape; nothing is computed.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&mut self, x: Value, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        let info = self.graph.info(x);
        let elems = shape.checked_elems()?;
        if info.shape.elems() != elems {
            return Err(Error::bad(format!(
                "reshape: {} has {} elements, {shape} has {elems}",
                info.shape,
                info.shape.elems()
            )));
        }
        let (root, dtype) = (self.graph.root(x), info.dtype);
        Ok(self.value(shape, dtype, Source::View { of: root, first: 0 }))
    }

    /// Shifts row t of each sequence of `x` (B, T, C) to row t + `by` of `rows` -> (B, rows, C); rows that would fall
    /// outside are dropped, and rows to which none is shifted are 0.
    ///
    /// # Errors
    /// When `x` does not have three axes.
    pub fn shift(&mut self, x: Value, by: isize, rows: usize) -> Result<Value> {
        let [b, _, c] = self.axes("shift: x", x)?;
        if by.checked_neg().is_none() {
            return Err(Error::bad(format!("shift: by {by} rows")));
        }
        self.one(Op::Shift { by }, vec![x], Shape::from([b, rows, c]))
    }

    /// `x` with its axes in another order: a view where only axes of size 1 move, else a copy.
    ///
    /// # Errors
    /// When `axes` is not a permutation.
    pub fn transpose(&mut self, x: Value, axes: &[usize]) -> Result<Value> {
        let shape = self.shape(x).clone();
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        if sorted != (0..shape.axes().len()).collect::<Vec<_>>() {
            return Err(Error::bad(format!("transpose: axes {axes:?} do not permute {shape}")));
        }
        let out = Shape(axes.iter().map(|&a| shape.axes()[a]).collect());
        let wide: Vec<usize> = axes.iter().copied().filter(|&a| shape.axes()[a] != 1).collect();
        if wide.is_sorted() {
            return self.reshape(x, out);
        }
        self.one(Op::Transpose { axes: axes.to_vec() }, vec![x], out)
    }
}
