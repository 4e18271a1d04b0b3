//! Traces a model: each call checks shapes and appends a node.
//!
//! A builder is in one layer at a time. A value may be used in the layer that computed it and, if it is that layer's
//! output, in the next layer; nothing else crosses a place where a cut may fall. Errors carry the operands.

mod ops;

use super::fuse;
use super::graph::{Graph, Input, Layer, Node, Parameter, Source, State, Value, ValueInfo};
use super::kinds::{Init, Mode};
use super::op::{Op, Window};
use crate::base::{DType, Error, Result, Shape};

/// Builds a [`Graph`] layer by layer.
#[derive(Debug)]
pub struct Builder {
    graph: Graph,
    mode: Mode,
    open: bool,
    /// The layer whose tracing failed: its partial trace stays in the graph, which is then no longer usable.
    failed: Option<String>,
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
    /// An empty model whose weights and activations are `float`: F32, Bf16, or F64 for an oracle.
    pub fn new(mode: Mode, float: DType) -> Self {
        Builder { graph: Graph { float, ..Graph::default() }, mode, open: false, failed: None }
    }

    /// The graph's mode: training or evaluation.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// A value's shape.
    pub fn shape(&self, value: Value) -> &Shape {
        &self.graph.info(value).shape
    }

    /// Traces one layer: `body` receives the previous layer's output (`None` in the first layer) and returns this
    /// layer's.
    ///
    /// # Errors
    /// What `body` returns, and when the layer did not compute its output; after that every further layer, loss and
    /// [`Builder::finish`] is refused.
    pub fn layer(
        &mut self,
        name: impl Into<String>,
        body: impl FnOnce(&mut Builder, Option<Value>) -> Result<Value>,
    ) -> Result<Value> {
        let name = name.into();
        if self.open {
            return Err(Error::bad(format!("layer {name}: a layer inside a layer")));
        }
        self.check_whole(&format!("layer {name}"))?;
        if self.graph.loss.is_some() {
            return Err(Error::bad(format!("layer {name}: comes after the loss")));
        }
        let input = self.graph.layers.last().and_then(|l| l.output);
        self.graph.layers.push(Layer { name: name.clone(), input, output: None });
        self.open = true;
        let output = body(self, input).and_then(|output| self.handed_on(output));
        self.open = false;
        match output {
            Ok(output) => {
                self.graph.layers.last_mut().expect("it was pushed above").output = Some(output);
                Ok(output)
            }
            Err(error) => {
                let error = match error {
                    Error::BadInput(message) => Error::BadInput(format!("layer {name}: {message}")),
                    other => other,
                };
                self.failed = Some(name);
                Err(error)
            }
        }
    }

    /// Checks that the open layer has computed its output, and returns it.
    fn handed_on(&self, output: Value) -> Result<Value> {
        let here = self.graph.layers.len() - 1;
        let made_here = self.graph.producer(output).is_some_and(|n| self.graph.nodes[n].layer == here);
        if made_here { Ok(output) } else { Err(Error::bad("hands on a value that it did not compute")) }
    }

    /// Refuses to go on after a failed layer.
    fn check_whole(&self, what: &str) -> Result<()> {
        match &self.failed {
            Some(failed) => Err(Error::bad(format!("{what}: layer {failed} has failed before"))),
            None => Ok(()),
        }
    }

    /// Appends the loss to the last layer: softmax cross-entropy of `logits` (.., V) with `labels` (..), -100 ignored
    /// (see [`Op::CrossEntropy`]).
    ///
    /// # Errors
    /// When the shapes differ, the logits are not the last layer's output, or there is a loss or a failed layer
    /// already.
    pub fn cross_entropy(&mut self, logits: Value, labels: Value) -> Result<Value> {
        self.expect_last("cross_entropy", logits)?;
        let (x, l) = (self.shape(logits).clone(), self.shape(labels).clone());
        if x.0.is_empty() || x.axes()[..x.axes().len() - 1] != *l.axes() {
            return Err(Error::bad(format!("cross_entropy: logits are {x}, labels {l}; want one label a row")));
        }
        self.expect_dtype("cross_entropy: labels", labels, DType::I32)?;
        let rows = Shape::from([x.rows()]);
        self.loss(Op::CrossEntropy, vec![logits, labels], vec![rows])
    }

    /// Appends the loss to the last layer: mean squared error of `predictions` (.., C) with `targets` (.., C), an input
    /// of the batch (see [`Op::MeanSquaredError`]). Divided by the number of rows, it equals torch's `mse_loss`.
    ///
    /// # Errors
    /// When the shapes differ or have no columns, the targets are not an input, the predictions are not the last
    /// layer's output, or there is a loss or a failed layer already.
    pub fn mean_squared_error(&mut self, predictions: Value, targets: Value) -> Result<Value> {
        self.expect_last("mean_squared_error", predictions)?;
        let (x, t) = (self.shape(predictions), self.shape(targets));
        if x != t || x.0.is_empty() || x.cols() == 0 {
            return Err(Error::bad(format!(
                "mean_squared_error: predictions are {x}, targets {t}; want rows of one size, of a column or more"
            )));
        }
        // Targets have no gradient, and the loss scale counts their rows.
        if !matches!(self.graph.info(targets).source, Source::Input(_)) {
            return Err(Error::bad("mean_squared_error: wants targets as the batch brings them"));
        }
        let rows = Shape::from([x.rows()]);
        self.loss(Op::MeanSquaredError, vec![predictions, targets], vec![rows])
    }

    /// Appends a loss to the last layer, whose output is `inputs[0]`: `op`, whose outputs have these shapes and the
    /// first of which holds the rows' losses, and then the sum of these losses.
    fn loss(&mut self, op: Op, inputs: Vec<Value>, shapes: Vec<Shape>) -> Result<Value> {
        let output = inputs[0];
        self.open = true;
        let losses = self.node(op, inputs, shapes);
        let loss = losses.and_then(|losses| self.node(Op::LossSum, vec![losses[0]], vec![Shape::from([1])]));
        self.open = false;
        let loss = loss?[0];
        self.graph.layers.last_mut().expect("one has handed on the output").output = None;
        self.graph.logits = Some(output);
        self.graph.loss = Some(loss);
        Ok(loss)
    }

    /// The finished forward graph, with residuals fused into the linear layers that they are added to.
    ///
    /// # Errors
    /// When no layer was traced, or one has failed.
    pub fn finish(mut self) -> Result<Graph> {
        self.check_whole("a model")?;
        if self.graph.layers.is_empty() {
            return Err(Error::bad("a model needs at least one layer"));
        }
        self.graph.logits = self.graph.logits.or(self.graph.layers.last().and_then(|l| l.output));
        fuse::residuals(&mut self.graph);
        self.graph.forward_nodes = self.graph.nodes.len();
        Ok(self.graph)
    }

    /// Declares an input tensor of every microbatch; the same name means the same tensor.
    ///
    /// # Errors
    /// When the name already has another shape or type.
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

    /// Declares a trainable tensor of the current layer; the same name in a later layer means the same, shared, tensor.
    ///
    /// # Errors
    /// When the name already has another shape.
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
        let elems = shape.checked_elems()?;
        if self.graph.states.iter().any(|s| s.name == name) {
            return Err(Error::bad(format!("parameter {name}: a state has that name")));
        }
        if self.graph.parameter_elems().checked_add(elems).is_none_or(|all| all > isize::MAX as usize / 64) {
            return Err(Error::bad(format!(
                "parameter {name}: with it the model has more elements than fit in memory"
            )));
        }
        let value = self.value(shape.clone(), self.graph.float, Source::Parameter(self.graph.parameters.len()));
        self.graph.parameters.push(Parameter { name, value, shape, init, layers: vec![here], frozen: false });
        Ok(value)
    }

    /// Declares a running statistic of the current layer, whose elements all start as `start`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn state(&mut self, name: impl Into<String>, shape: impl Into<Shape>, start: f64) -> Result<Value> {
        let (name, shape) = (name.into(), shape.into());
        let layer = self.here(&name)?;
        let is_parameter = self.graph.parameters.iter().any(|p| p.name == name);
        if is_parameter || self.graph.states.iter().any(|s| s.name == name) {
            return Err(Error::bad(format!("state {name}: the name is taken")));
        }
        shape.checked_elems()?;
        let value = self.value(shape.clone(), self.graph.float.wide(), Source::State(self.graph.states.len()));
        self.graph.states.push(State { name, value, shape, start, layer });
        Ok(value)
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
        Ok(self.node(op, inputs, vec![shape])?[0])
    }

    /// Appends a node with outputs of these shapes, whose types are the op's (see [`Op::output_dtype`]).
    fn node(&mut self, op: Op, inputs: Vec<Value>, outputs: Vec<Shape>) -> Result<Vec<Value>> {
        let here = self.here(op.name())?;
        for (i, &input) in inputs.iter().enumerate() {
            let (found, want) = (self.graph.info(input).dtype, op.input_dtype(i, self.graph.float));
            if found != want {
                return Err(Error::bad(format!("{}: operand {i} is {found}, want {want}", op.name())));
            }
            match self.graph.info(self.graph.root(input)).source {
                // A layer that uses a parameter shares it, whether it asked for it by name or not.
                Source::Parameter(p) if self.graph.parameters[p].layers.last() != Some(&here) => {
                    self.graph.parameters[p].layers.push(here);
                }
                Source::State(s) if self.graph.states[s].layer != here => {
                    let name = &self.graph.states[s].name;
                    return Err(Error::bad(format!("{}: state {name} is another layer's", op.name())));
                }
                _ => {}
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
        for shape in &outputs {
            shape.checked_elems()?;
        }
        let node = self.graph.nodes.len();
        let outputs = outputs
            .into_iter()
            .enumerate()
            .map(|(output, shape)| {
                let dtype = op.output_dtype(output, self.graph.float);
                self.value(shape, dtype, Source::Node { node, output })
            })
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

    fn expect_last(&self, loss: &str, output: Value) -> Result<()> {
        self.check_whole(loss)?;
        if self.graph.layers.last().and_then(|l| l.output) != Some(output) || self.graph.loss.is_some() {
            return Err(Error::bad(format!("{loss}: wants the last layer's output, once")));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::kinds::{Activation, WeightLayout};

    /// Used in a later layer by its value alone, a parameter is shared as one that was asked for by name; a state is
    /// its layer's.
    #[test]
    fn a_parameter_is_shared_by_whoever_uses_it() {
        let mut b = Builder::new(Mode::Training, DType::F32);
        let x = b.input("x", [3, 4], DType::F32).unwrap();
        let (mut weight, mut state) = (None, None);
        let h = b.layer("first", |b, _| {
            weight = Some(b.parameter("w", [4, 4], Init::Constant(1.0))?);
            state = Some(b.state("s", [3, 4], 0.0)?);
            b.linear(x, weight.unwrap(), None, Activation::None, WeightLayout::InOut)
        });
        let (h, weight, state) = (h.unwrap(), weight.unwrap(), state.unwrap());
        let y = b.layer("second", |b, _| b.linear(h, weight, None, Activation::None, WeightLayout::InOut)).unwrap();
        assert_eq!(b.graph.parameters[0].layers, [0, 1]);
        let error = b.layer("third", |b, _| b.add(y, state)).unwrap_err().to_string();
        assert_eq!(error, "layer third: add: state s is another layer's");
    }

    /// What there is of a failed layer would be in the graph: its node, and its use of the parameter.
    #[test]
    fn nothing_is_made_after_a_failed_layer() {
        for hands_on in [false, true] {
            let mut b = Builder::new(Mode::Training, DType::F32);
            let x = b.input("x", [3, 4], DType::F32).unwrap();
            let labels = b.input("labels", [3], DType::I32).unwrap();
            let h = b.layer("first", |b, _| {
                b.state("s", [3, 4], 0.0)?;
                let weight = b.parameter("w", [4, 4], Init::Constant(1.0))?;
                b.linear(x, weight, None, Activation::None, WeightLayout::InOut)
            });
            let h = h.unwrap();
            let failed = b.layer("second", |b, _| {
                let weight = b.parameter("w", [4, 4], Init::Constant(1.0))?;
                b.linear(h, weight, None, Activation::None, WeightLayout::InOut)?;
                if hands_on { Ok(x) } else { b.parameter("s", [1], Init::Constant(0.0)) }
            });
            let why = if hands_on {
                "hands on a value that it did not compute"
            } else {
                "parameter s: a state has that name"
            };
            assert_eq!(failed.unwrap_err().to_string(), format!("layer second: {why}"));
            let says = "layer second has failed before";
            let third = b.layer("third", |b, _| b.add(h, x)).unwrap_err().to_string();
            assert_eq!(third, format!("layer third: {says}"));
            assert_eq!(b.cross_entropy(h, labels).unwrap_err().to_string(), format!("cross_entropy: {says}"));
            assert_eq!(b.finish().unwrap_err().to_string(), format!("a model: {says}"));
        }
    }

    /// Sizes whose sums or products wrap, and random numbers that would repeat.
    #[test]
    fn sizes_beyond_all_memory_are_refused() {
        let refused = |axes: &[usize], body: &dyn Fn(&mut Builder, Value) -> Result<Value>, want: &str| {
            let mut b = Builder::new(Mode::Training, DType::F32);
            let x = b.input("x", Shape::new(axes), DType::F32).unwrap();
            let error = b.layer("l", |b, _| body(b, x)).expect_err(want).to_string();
            assert!(error.contains(want), "{error}");
        };
        let image = [1, 1, 5, 5];
        refused(&image, &|b, x| b.max_pool(x, 3, 1, usize::MAX / 2 + 1), "is over half of the kernel");
        refused(&image, &|b, x| b.avg_pool(x, [3, 3], 1, usize::MAX / 2 + 1), "is over half of the kernel");
        let convolved = |b: &mut Builder, x| {
            let weight = b.parameter("w", [1, 1, 3, 3], Init::Constant(0.0))?;
            b.conv2d(x, weight, None, 1, usize::MAX)
        };
        refused(&image, &convolved, "conv2d");
        refused(&[2, 3, 4], &|b, x| b.shift(x, isize::MIN, 3), "shift: by");
        let heads = |kv_heads| AttentionOptions { heads: 1, kv_heads, scale: None, causal: false, dropout: 0.0 };
        refused(&[2, 3, 0], &|b, x| b.attention_packed(x, None, heads(1)), "heads have no columns");
        refused(&[2, 3, 4], &|b, x| b.attention_packed(x, None, heads(usize::MAX)), "not a multiple of");
        refused(&[2, 3, 4], &|b, x| b.attention(x, x, x, None, heads(usize::MAX)), "attention");
        refused(&[1 << 18, (1 << 16) + 1], &|b, x| b.dropout(x, 0.1), "more than 2^34 elements");
        let wide = |b: &mut Builder, x| {
            for name in ["a", "b", "c"] {
                b.parameter(name, [1 << 57], Init::Constant(0.0))?;
            }
            Ok(x)
        };
        refused(&[1], &wide, "with it the model has more elements than fit in memory");
    }

    #[test]
    fn targets_that_do_not_fit_are_named() {
        let refused = |axes: &[usize], targets: fn(&mut Builder, Value) -> Result<Value>, want: &str| {
            let mut b = Builder::new(Mode::Training, DType::Bf16);
            let [x, y] = ["x", "y"].map(|name| b.input(name, Shape::new(axes), DType::Bf16).unwrap());
            let out = b.layer("sum", |b, _| b.add(x, y)).unwrap();
            let targets = targets(&mut b, out).unwrap();
            let found = b.mean_squared_error(out, targets).map_err(|e| e.to_string());
            assert_eq!(found.err().as_deref().unwrap_or(""), want);
        };
        let input = |b: &mut Builder, _: Value| b.input("targets", [4, 3], DType::Bf16);
        refused(&[4, 3], input, "");
        let sizes = "want rows of one size, of a column or more";
        refused(&[3, 4], input, &format!("mean_squared_error: predictions are 3x4, targets 4x3; {sizes}"));
        let empty = |b: &mut Builder, _: Value| b.input("targets", [4, 0], DType::Bf16);
        refused(&[4, 0], empty, &format!("mean_squared_error: predictions are 4x0, targets 4x0; {sizes}"));
        let wide = |b: &mut Builder, _: Value| b.input("targets", [4, 3], DType::F32);
        refused(&[4, 3], wide, "mean_squared_error: operand 1 is f32, want bf16");
        let own = "mean_squared_error: wants targets as the batch brings them";
        refused(&[4, 3], |_, out| Ok(out), own);
        let view = |b: &mut Builder, _: Value| {
            let flat = b.input("targets", [12], DType::Bf16)?;
            b.reshape(flat, [4, 3])
        };
        refused(&[4, 3], view, own);
    }
}
