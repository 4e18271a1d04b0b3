//! Traces a model: each call checks shapes and appends a node.
//!
//! A builder is in one layer at a time. A value may be used in the layer that made it and, where it is that layer's output,
//! in the next layer; nothing else crosses a place where a cut may fall. Errors carry the operands.

use super::graph::{Graph, Input, Layer, Node, Parameter, Source, State, Value, ValueInfo};
use super::kinds::{Activation, Init, Mode, WeightLayout};
use super::op::{AttentionKind, Op, Window};
use crate::base::{DType, Error, Result, Shape};

/// Builds a [`Graph`] layer by layer.
#[derive(Debug)]
pub struct Builder {
    graph: Graph,
    float: DType,
    mode: Mode,
    open: bool,
}

/// What attention needs besides its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionOptions {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Multiplies the scores; `None` is 1/sqrt(width).
    pub scale: Option<f64>,
    /// A query sees keys up to its own position.
    pub causal: bool,
    /// Probability of dropping an attention weight.
    pub dropout: f64,
}

impl Builder {
    /// An empty model whose floating-point tensors are `float`: F32, or F64 for an oracle.
    pub fn new(mode: Mode, float: DType) -> Self {
        Builder { graph: Graph::default(), float, mode, open: false }
    }

    /// Whether the graph is for training.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// A value's shape.
    pub fn shape(&self, value: Value) -> &Shape {
        &self.graph.info(value).shape
    }

    /// Traces one layer: `body` gets the previous layer's output (`None` in the first layer) and returns this one's.
    ///
    /// # Errors
    /// What `body` returns, and an output that the layer did not compute.
    pub fn layer(
        &mut self,
        name: impl Into<String>,
        body: impl FnOnce(&mut Builder, Option<Value>) -> Result<Value>,
    ) -> Result<Value> {
        let name = name.into();
        if self.open {
            return Err(Error::bad(format!("layer {name}: a layer inside a layer")));
        }
        if self.graph.loss.is_some() {
            return Err(Error::bad(format!("layer {name}: comes after the loss")));
        }
        let input = self.graph.layers.last().and_then(|l| l.output);
        self.graph.layers.push(Layer { name: name.clone(), input, output: None });
        self.open = true;
        let output = body(self, input).map_err(|e| match e {
            Error::BadInput(message) => Error::BadInput(format!("layer {name}: {message}")),
            other => other,
        });
        self.open = false;
        let output = output?;
        let here = self.graph.layers.len() - 1;
        let made_here = self.graph.producer(output).is_some_and(|n| self.graph.nodes[n].layer == here);
        if !made_here {
            return Err(Error::bad(format!("layer {name}: hands on a value that it did not compute")));
        }
        self.graph.layers[here].output = Some(output);
        Ok(output)
    }

    /// Appends the loss to the last layer: softmax cross-entropy of `logits` (.., V) with `labels` (..), -100 ignored
    /// (see [`Op::CrossEntropy`]).
    ///
    /// # Errors
    /// When the shapes differ, the logits are not the last layer's output, or there is a loss already.
    pub fn cross_entropy(&mut self, logits: Value, labels: Value) -> Result<Value> {
        if self.graph.layers.last().and_then(|l| l.output) != Some(logits) || self.graph.loss.is_some() {
            return Err(Error::bad("cross_entropy: wants the last layer's output, once"));
        }
        let (x, l) = (self.shape(logits).clone(), self.shape(labels).clone());
        if x.0.is_empty() || x.axes()[..x.axes().len() - 1] != *l.axes() {
            return Err(Error::bad(format!("cross_entropy: logits are {x}, labels {l}; want one label a row")));
        }
        self.expect_dtype("cross_entropy: labels", labels, DType::I32)?;
        self.open = true;
        let rows = Shape::from([x.rows()]);
        let one = Shape::from([1]);
        let outputs = self.node(
            Op::CrossEntropy,
            vec![logits, labels],
            vec![(one, self.float), (rows.clone(), self.float), (rows, self.float)],
        );
        self.open = false;
        let outputs = outputs?;
        self.graph.layers.last_mut().expect("the logits are its output").output = None;
        self.graph.logits = Some(logits);
        self.graph.loss = Some(outputs[0]);
        Ok(outputs[0])
    }

    /// The finished forward graph.
    ///
    /// # Errors
    /// When no layer was traced.
    pub fn finish(mut self) -> Result<Graph> {
        if self.graph.layers.is_empty() {
            return Err(Error::bad("a model needs at least one layer"));
        }
        self.graph.logits = self.graph.logits.or(self.graph.layers.last().and_then(|l| l.output));
        self.graph.forward_nodes = self.graph.nodes.len();
        Ok(self.graph)
    }

    /// A tensor that each microbatch brings; the same name is the same tensor.
    ///
    /// # Errors
    /// When the name is taken with another shape or type.
    pub fn input(&mut self, name: &str, shape: impl Into<Shape>, dtype: DType) -> Result<Value> {
        let shape = shape.into();
        if let Some(found) = self.graph.inputs.iter().find(|i| i.name == name) {
            if found.shape != shape || found.dtype != dtype {
                return Err(Error::bad(format!(
                    "input {name}: is {} {}, asked for as {shape} {dtype}",
                    found.shape, found.dtype
                )));
            }
            return Ok(found.value);
        }
        shape.checked_elems()?;
        let value = self.value(shape.clone(), dtype, Source::Input(self.graph.inputs.len()));
        self.graph.inputs.push(Input { name: name.into(), value, shape, dtype });
        Ok(value)
    }

    /// A trainable tensor of the current layer; the same name in a later layer is the same, shared, tensor.
    ///
    /// # Errors
    /// When the name is taken with another shape.
    pub fn parameter(&mut self, name: impl Into<String>, shape: impl Into<Shape>, init: Init) -> Result<Value> {
        let (name, shape) = (name.into(), shape.into());
        let here = self.here(&name)?;
        if let Some(found) = self.graph.parameters.iter_mut().find(|p| p.name == name) {
            if found.shape != shape {
                return Err(Error::bad(format!("parameter {name}: is {}, asked for as {shape}", found.shape)));
            }
            if found.layers.last() != Some(&here) {
                found.layers.push(here);
            }
            return Ok(found.value);
        }
        shape.checked_elems()?;
        let value = self.value(shape.clone(), self.float, Source::Parameter(self.graph.parameters.len()));
        self.graph.parameters.push(Parameter { name, value, shape, init, layers: vec![here] });
        Ok(value)
    }

    /// A running statistic of the current layer, which starts as `start` everywhere.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn state(&mut self, name: impl Into<String>, shape: impl Into<Shape>, start: f64) -> Result<Value> {
        let (name, shape) = (name.into(), shape.into());
        let layer = self.here(&name)?;
        if self.graph.states.iter().any(|s| s.name == name) {
            return Err(Error::bad(format!("state {name}: the name is taken")));
        }
        shape.checked_elems()?;
        let value = self.value(shape.clone(), self.float, Source::State(self.graph.states.len()));
        self.graph.states.push(State { name, value, shape, start, layer });
        Ok(value)
    }

    /// Rows of `table` (V, C) at `ids` (..) -> (.., C).
    ///
    /// # Errors
    /// When the table is no matrix or the ids are no integers.
    pub fn embedding(&mut self, ids: Value, table: Value) -> Result<Value> {
        self.expect_dtype("embedding: ids", ids, DType::I32)?;
        let [_, cols] = self.axes("embedding: table", table)?;
        let mut shape = self.shape(ids).clone();
        shape.0.push(cols);
        self.one(Op::Embedding, vec![ids, table], shape)
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
        let mut outputs = vec![(shape.clone(), self.float)];
        if activation != Activation::None {
            outputs.push((shape, self.float));
        }
        Ok(self.node(Op::Linear { activation, layout }, inputs, outputs)?[0])
    }

    /// An activation on its own.
    ///
    /// # Errors
    /// When `x` is no floating-point tensor of this layer.
    pub fn activation(&mut self, x: Value, activation: Activation) -> Result<Value> {
        let shape = self.shape(x).clone();
        self.one(Op::Activation(activation), vec![x], shape)
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
        let outputs = vec![(shape, self.float), (rows.clone(), self.float), (rows, self.float)];
        Ok(self.node(Op::LayerNorm { epsilon }, vec![x, weight, bias], outputs)?[0])
    }

    /// Attention on packed `qkv` (B, T, (H + 2 Hkv) D); `mask` (B, T) is 1 where a key may be seen.
    ///
    /// # Errors
    /// When the last axis is not a whole number of heads.
    pub fn attention_packed(&mut self, qkv: Value, mask: Option<Value>, options: AttentionOptions) -> Result<Value> {
        let [b, t, packed] = self.axes("attention: qkv", qkv)?;
        let all = options.heads + 2 * options.kv_heads;
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
        self.expect_shape("attention: k", k, &[b, tk, options.kv_heads * width])?;
        self.expect_shape("attention: v", v, &[b, tk, options.kv_heads * width])?;
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
        if !(0.0..1.0).contains(&dropout) {
            return Err(Error::bad(format!("attention: dropout is {dropout}, want 0 <= p < 1")));
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
        let outputs =
            vec![(Shape::from([b, tq, heads * width]), self.float), (Shape::from([b, heads, tq]), self.float)];
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

    /// Batch normalisation over all axes but the second (Ioffe & Szegedy 2015, arXiv:1502.03167), with running statistics as
    /// states. In training one value a channel is refused, as in torch.
    ///
    /// # Errors
    /// When the sizes do not match, or training has one value a channel.
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
        let stat = (Shape::from(c), self.float);
        let outputs = vec![(shape, self.float), stat.clone(), stat.clone(), stat];
        let out = self.node(Op::BatchNorm { epsilon }, vec![x, weight, bias], outputs)?;
        self.node(Op::UpdateRunning { momentum, count }, vec![out[1], out[3], running_mean, running_var], vec![])?;
        Ok(out[0])
    }

    /// Greatest value of each window.
    ///
    /// # Errors
    /// When the kernel is larger than the padded image, or the padding over half the kernel.
    pub fn max_pool(&mut self, x: Value, kernel: usize, stride: usize, padding: usize) -> Result<Value> {
        let [n, c, h, w] = self.axes("max_pool: x", x)?;
        let window = Window { kernel: [kernel; 2], stride, padding };
        if padding * 2 > kernel {
            return Err(Error::bad(format!("max_pool: padding {padding} is over half of the kernel {kernel}")));
        }
        let [oh, ow] = self.window("max_pool", window, [h, w])?;
        let out = Shape::from([n, c, oh, ow]);
        Ok(self.node(Op::MaxPool(window), vec![x], vec![(out.clone(), self.float), (out, DType::I32)])?[0])
    }

    /// Mean of each window.
    ///
    /// # Errors
    /// When the kernel is larger than the padded image, or the padding over half the kernel.
    pub fn avg_pool(&mut self, x: Value, kernel: [usize; 2], stride: usize, padding: usize) -> Result<Value> {
        let [n, c, h, w] = self.axes("avg_pool: x", x)?;
        let window = Window { kernel, stride, padding };
        if padding * 2 > kernel[0].min(kernel[1]) {
            return Err(Error::bad(format!("avg_pool: padding {padding} is over half of the kernel {kernel:?}")));
        }
        let [oh, ow] = self.window("avg_pool", window, [h, w])?;
        self.one(Op::AvgPool(window), vec![x], Shape::from([n, c, oh, ow]))
    }

    /// Mean of each plane: (N, C, H, W) -> (N, C).
    ///
    /// # Errors
    /// When `x` is no image or has empty planes.
    pub fn global_avg_pool(&mut self, x: Value) -> Result<Value> {
        let [n, c, h, w] = self.axes("global_avg_pool: x", x)?;
        let pooled = self.avg_pool(x, [h, w], 1, 0)?;
        self.reshape(pooled, [n, c])
    }

    /// The same elements under another shape; nothing is computed.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&mut self, x: Value, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        let info = self.graph.info(x);
        if info.shape.elems() != shape.elems() {
            return Err(Error::bad(format!(
                "reshape: {} has {} elements, {shape} has {}",
                info.shape,
                info.shape.elems(),
                shape.elems()
            )));
        }
        let (root, dtype) = (self.graph.root(x), info.dtype);
        Ok(self.value(shape, dtype, Source::View(root)))
    }

    /// `x` with its axes in another order: a view where only axes of size 1 move, else a copy.
    ///
    /// # Errors
    /// When `axes` is no permutation.
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

    fn here(&self, what: &str) -> Result<usize> {
        if !self.open {
            return Err(Error::bad(format!("{what}: outside a layer")));
        }
        Ok(self.graph.layers.len() - 1)
    }

    fn value(&mut self, shape: Shape, dtype: DType, source: Source) -> Value {
        self.graph.values.push(ValueInfo { shape, dtype, source });
        Value(self.graph.values.len() as u32 - 1)
    }

    fn one(&mut self, op: Op, inputs: Vec<Value>, shape: Shape) -> Result<Value> {
        let float = self.float;
        Ok(self.node(op, inputs, vec![(shape, float)])?[0])
    }

    fn node(&mut self, op: Op, inputs: Vec<Value>, outputs: Vec<(Shape, DType)>) -> Result<Vec<Value>> {
        let here = self.here(op.name())?;
        for (i, &input) in inputs.iter().enumerate() {
            let (found, want) =
                (self.graph.info(input).dtype, if op.reads_integers(i) { DType::I32 } else { self.float });
            if found != want {
                return Err(Error::bad(format!("{}: operand {i} is {found}, want {want}", op.name())));
            }
            if let Some(node) = self.graph.producer(input) {
                let from = self.graph.nodes[node].layer;
                let handed_on = self.graph.layers[here].input.map(|v| self.graph.root(v));
                if from != here && handed_on != Some(self.graph.root(input)) {
                    return Err(Error::bad(format!(
                        "{}: uses a value of layer {}; a layer sees its input, the batch and parameters alone",
                        op.name(),
                        self.graph.layers[from].name
                    )));
                }
            }
        }
        for (shape, _) in &outputs {
            shape.checked_elems()?;
        }
        let node = self.graph.nodes.len();
        let outputs = outputs
            .into_iter()
            .enumerate()
            .map(|(output, (shape, dtype))| self.value(shape, dtype, Source::Node { node, output }))
            .collect::<Vec<_>>();
        self.graph.nodes.push(Node { op, inputs, outputs: outputs.clone(), layer: here });
        Ok(outputs)
    }

    fn axes<const N: usize>(&self, what: &str, value: Value) -> Result<[usize; N]> {
        let shape = self.shape(value);
        shape.axes().try_into().map_err(|_| Error::bad(format!("{what} is {shape}, want {N} axes")))
    }

    fn expect_shape(&self, what: &str, value: Value, axes: &[usize]) -> Result<()> {
        let shape = self.shape(value);
        if shape.axes() != axes {
            return Err(Error::bad(format!("{what} is {shape}, want {}", Shape(axes.to_vec()))));
        }
        Ok(())
    }

    fn expect_dtype(&self, what: &str, value: Value, dtype: DType) -> Result<()> {
        let found = self.graph.info(value).dtype;
        if found != dtype {
            return Err(Error::bad(format!("{what} are {found}, want {dtype}")));
        }
        Ok(())
    }

    fn window(&self, op: &str, window: Window, [h, w]: [usize; 2]) -> Result<[usize; 2]> {
        let fits = window.stride > 0 && window.kernel.iter().all(|&k| k > 0);
        fits.then(|| window.out(h, w)).flatten().ok_or_else(|| {
            Error::bad(format!(
                "{op}: a {}x{} kernel with stride {} and padding {} does not fit an image of {h}x{w}",
                window.kernel[0], window.kernel[1], window.stride, window.padding
            ))
        })
    }
}
