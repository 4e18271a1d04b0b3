//! The table of cases: each builds one op between parameters and a loss.

use hydra::base::{DType, Result, Shape};
use hydra::graph::{
    Activation, AttentionOptions, Builder, Graph, Init, Mode, RotaryScaling, Value, WeightLayout, differentiate,
    split_loss,
};

/// Classes of the head.
pub const CLASSES: usize = 5;

/// Rows and columns of the head's product that cost no more than one of each.
const TILE: usize = 64;

/// Traces the op under test.
type Trace = Box<dyn Fn(&mut Body) -> Result<Value>>;

/// One op under one shape.
pub struct Case {
    /// The op, then what is special.
    pub name: String,
    /// No parameter has a gradient: nothing reaches the loss.
    pub flat: bool,
    /// Columns of the linear layer that makes the body's output what the loss is of; `None` where there is no such
    /// layer.
    pub head: Option<usize>,
    /// The most rows of logits that are made at a time; the head has a bias then.
    pub loss_rows: Option<usize>,
    loss: Loss,
    body: Trace,
}

/// What a case ends in.
#[derive(Clone, Copy)]
enum Loss {
    /// Cross-entropy with labels of this name.
    CrossEntropy(&'static str),
    /// Mean squared error.
    Squared,
}

/// What a case's body builds with.
pub struct Body<'a> {
    /// The builder, in the first layer.
    pub b: &'a mut Builder,
    computed: bool,
}

impl Body<'_> {
    /// An operand: a parameter, or a sum of two.
    pub fn leaf(&mut self, name: &str, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        let x = self.b.parameter(name, shape.clone(), Init::Normal(1.0))?;
        if !self.computed {
            return Ok(x);
        }
        let y = self.b.parameter(format!("{name} plus"), shape, Init::Normal(1.0))?;
        self.b.add(x, y)
    }
}

impl Case {
    /// The word that the name begins with.
    pub fn family(&self) -> &str {
        self.name.split(' ').next().expect("a split has a first part")
    }

    /// The differentiated graph; with `computed`, operands are sums instead of parameters, so that ops may overwrite
    /// them.
    pub fn graph(&self, dtype: DType, computed: bool) -> Result<Graph> {
        let mut b = Builder::new(Mode::Training, dtype);
        let body = |b: &mut Builder| (self.body)(&mut Body { b, computed });
        b.layer("body", |b, _| body(b))?;
        let logits = b.layer("head", |b, x| {
            let x = x.expect("the body hands on a value");
            let Some(classes) = self.head else {
                let offset = b.parameter("offset", b.shape(x).clone(), Init::Constant(0.0))?;
                return b.add(x, offset);
            };
            let shape = b.shape(x).axes().to_vec();
            let elems: usize = shape.iter().product();
            let mut rows = if shape.len() == 4 { shape[0] } else { Shape(shape).rows() };
            if rows.max(elems.checked_div(rows).unwrap_or(0)) > TILE {
                // As square as it can be, since a product pays for whole tiles.
                rows = (1..=elems.isqrt()).rev().find(|rows| elems.is_multiple_of(*rows)).expect("1 divides all");
            }
            let cols = elems.checked_div(rows).unwrap_or(3);
            let x = b.reshape(x, [rows, cols])?;
            // So small that the softmax does not saturate.
            let w = b.parameter("head", [cols, classes], Init::Normal(1.0 / (cols as f64).sqrt()))?;
            let bias = self.loss_rows.map(|_| b.parameter("head bias", [classes], Init::Normal(1.0))).transpose()?;
            b.linear(x, w, bias, Activation::None, WeightLayout::InOut)
        })?;
        let axes = b.shape(logits).axes().to_vec();
        match self.loss {
            Loss::CrossEntropy(labels) => {
                let labels = b.input(labels, Shape(axes[..axes.len() - 1].to_vec()), DType::I32)?;
                b.cross_entropy(logits, labels)?;
            }
            Loss::Squared => {
                let targets = b.input("targets", Shape(axes), dtype)?;
                b.mean_squared_error(logits, targets)?;
            }
        }
        let mut graph = b.finish()?;
        differentiate(&mut graph)?;
        graph.loss_rows = self.loss_rows;
        split_loss(&mut graph);
        assert_eq!(graph.loss_parts.len() > 1, self.loss_rows.is_some(), "{}", self.name);
        Ok(graph)
    }
}

/// Cases on their way into a list.
#[derive(Default)]
pub struct Table(pub Vec<Case>);

impl Table {
    /// Adds a case; the name's first word is its family.
    pub fn add(&mut self, name: impl Into<String>, body: impl Fn(&mut Body) -> Result<Value> + 'static) -> &mut Case {
        let loss = Loss::CrossEntropy("labels");
        let (name, head, body) = (name.into(), Some(CLASSES), Box::new(body));
        self.0.push(Case { name, flat: false, head, loss_rows: None, loss, body });
        self.0.last_mut().expect("pushed just above")
    }
}

/// Adds cross-entropy over `classes` of a product of (rows, cols), made in parts of at most so many rows.
pub fn cross_entropy_in_parts(t: &mut Table, [rows, cols, classes]: [usize; 3], part: usize) {
    let case = t.add(format!("cross_entropy {rows}x{cols}x{classes} by {part}"), move |s| {
        let (x, y) = (s.leaf("x", [rows, cols])?, s.leaf("y", [rows, cols])?);
        s.b.add(x, y)
    });
    (case.head, case.loss_rows) = (Some(classes), Some(part));
}

/// Adds mean squared error of (rows, cols): of a sum, and of a product, whose rows a device may lay further apart.
pub fn mean_squared_error(t: &mut Table, rows: usize, cols: usize) {
    for (of, head, width) in [("sum", None, cols), ("product", Some(cols), 3)] {
        let case = t.add(format!("mean_squared_error {rows}x{cols} of a {of}"), move |s| {
            let (x, y) = (s.leaf("x", [rows, width])?, s.leaf("y", [rows, width])?);
            s.b.add(x, y)
        });
        (case.head, case.loss) = (head, Loss::Squared);
    }
}

/// Every case.
pub fn all() -> Vec<Case> {
    let mut t = Table::default();
    lookups(&mut t);
    linears(&mut t);
    sharers(&mut t);
    elementwise(&mut t);
    norms(&mut t);
    attentions(&mut t);
    losses(&mut t);
    images(&mut t);
    shapes(&mut t);
    parameters(&mut t);
    t.0
}

fn lookups(t: &mut Table) {
    for (b, len, cols) in [(1, 1, 1), (2, 31, 3), (3, 33, 31), (1, 1023, 2)] {
        t.add(format!("embedding {b}x{len}x{cols}"), move |s| {
            let ids = s.b.input("ids", [b, len], DType::I32)?;
            let table = s.leaf("table", [7, cols])?;
            s.b.embedding(ids, table)
        });
    }
    t.add("embedding of nothing", |s| {
        let ids = s.b.input("ids", [0, 4], DType::I32)?;
        let table = s.leaf("table", [7, 3])?;
        s.b.embedding(ids, table)
    })
    .flat = true;
    for (b, len, cols, table) in [(1, 1, 1, 1), (3, 5, 31, 5), (2, 31, 3, 33), (1, 1023, 2, 1024)] {
        t.add(format!("add_position {b}x{len}x{cols} of {table}"), move |s| {
            let (x, table) = (s.leaf("x", [b, len, cols])?, s.leaf("table", [table, cols])?);
            s.b.add_position(x, table)
        });
    }
}

fn linears(t: &mut Table) {
    for layout in [WeightLayout::InOut, WeightLayout::OutIn] {
        for activation in Activation::ALL {
            for bias in [false, true] {
                for (rows, inputs, outputs) in [(2, 1, 1), (5, 31, 33), (33, 7, 3), (259, 3, 2)] {
                    t.add(
                        format!("linear {rows}x{inputs}x{outputs} {layout:?} {activation:?} bias {bias}"),
                        move |s| linear(s, [rows, inputs, outputs], layout, activation, bias),
                    );
                }
                for sizes in [[2, 1, 1], [5, 31, 33], [33, 7, 3]] {
                    let [rows, inputs, outputs] = sizes;
                    let name = format!("linear {rows}x{inputs}x{outputs} {layout:?}");
                    if activation == Activation::None {
                        t.add(format!("{name} residual bias {bias}"), move |s| residual(s, sizes, layout, bias));
                    } else {
                        t.add(format!("{name} after {activation:?} bias {bias}"), move |s| {
                            after(s, sizes, layout, activation, bias)
                        });
                    }
                }
            }
        }
        t.add(format!("linear {layout:?} residual, no rows"), move |s| residual(s, [0, 3, 4], layout, true)).flat =
            true;
        t.add(format!("linear {layout:?} residual, no inputs"), move |s| residual(s, [4, 0, 3], layout, true));
        t.add(format!("linear {layout:?} after, no outputs"), move |s| {
            after(s, [4, 3, 0], layout, Activation::GeluTanh, true)
        })
        .flat = true;
        t.add(format!("linear {layout:?} no rows"), move |s| {
            linear(s, [0, 3, 4], layout, Activation::GeluTanh, true)
        })
        .flat = true;
        t.add(format!("linear {layout:?} no outputs"), move |s| linear(s, [4, 3, 0], layout, Activation::Relu, true))
            .flat = true;
        t.add(format!("linear {layout:?} no inputs"), move |s| linear(s, [4, 0, 3], layout, Activation::GeluErf, true));
    }
}

pub fn linear(
    s: &mut Body,
    [rows, inputs, outputs]: [usize; 3],
    layout: WeightLayout,
    act: Activation,
    bias: bool,
) -> Result<Value> {
    let x = s.leaf("x", [rows, inputs])?;
    layer(s, x, [inputs, outputs], (layout, act, bias))
}

/// A linear layer on `x`.
fn layer(
    s: &mut Body,
    x: Value,
    [inputs, outputs]: [usize; 2],
    (layout, act, bias): (WeightLayout, Activation, bool),
) -> Result<Value> {
    let shape = if layout == WeightLayout::InOut { [inputs, outputs] } else { [outputs, inputs] };
    let weight = s.leaf("weight", shape)?;
    let bias = if bias { Some(s.leaf("bias", [outputs])?) } else { None };
    s.b.linear(x, weight, bias, act, layout)
}

/// A linear layer to which something is added.
pub fn residual(s: &mut Body, [rows, inputs, outputs]: [usize; 3], layout: WeightLayout, bias: bool) -> Result<Value> {
    let r = s.leaf("residual", [rows, outputs])?;
    let y = linear(s, [rows, inputs, outputs], layout, Activation::None, bias)?;
    s.b.add(r, y)
}

/// A linear layer whose input comes from an activation.
pub fn after(
    s: &mut Body,
    [rows, inputs, outputs]: [usize; 3],
    layout: WeightLayout,
    act: Activation,
    bias: bool,
) -> Result<Value> {
    let x = s.leaf("x", [rows, inputs])?;
    let x = s.b.activation(x, act)?;
    layer(s, x, [inputs, outputs], (layout, Activation::None, bias))
}

/// Layers that read one tensor, whose gradient is a sum of products.
fn sharers(t: &mut Table) {
    for layout in [WeightLayout::InOut, WeightLayout::OutIn] {
        for (rows, inputs, outputs) in [(1, 1, 1), (5, 7, 3), (65, 129, 8)] {
            t.add(format!("linear {layout:?} three of one {rows}x{inputs} to {outputs}"), move |s| {
                let x = s.leaf("x", [rows, inputs])?;
                let x = s.b.activation(x, Activation::None)?;
                let shape = if layout == WeightLayout::InOut { [inputs, outputs] } else { [outputs, inputs] };
                let mut linear = |name: &str| {
                    let weight = s.leaf(name, shape)?;
                    s.b.linear(x, weight, None, Activation::None, layout)
                };
                let (q, k, v) = (linear("q")?, linear("k")?, linear("v")?);
                let (sum, v) = (s.b.add(q, k)?, s.b.activation(v, Activation::GeluTanh)?);
                s.b.add(sum, v)
            });
        }
    }
}

fn elementwise(t: &mut Table) {
    for (rows, cols) in [(1, 1), (3, 31), (31, 33), (1, 1023)] {
        for activation in Activation::ALL {
            t.add(format!("activation {activation:?} {rows}x{cols}"), move |s| {
                // The one number drawn there is below 0.
                let flat = activation == Activation::Relu && rows * cols == 1;
                let x = s.leaf(if flat { "flat x" } else { "x" }, [rows, cols])?;
                let y = s.leaf("y", [rows, cols])?;
                let x = s.b.activation(x, activation)?;
                s.b.add(x, y)
            });
        }
        for activation in Activation::ALL {
            t.add(format!("glu {activation:?} {rows}x{cols}"), move |s| {
                // The one number drawn there is below 0.
                let flat = activation == Activation::Relu && rows * cols == 1;
                let gate = s.leaf(if flat { "flat gate" } else { "gate" }, [rows, cols])?;
                let up = s.leaf(if flat { "flat up" } else { "up" }, [rows, cols])?;
                let y = s.leaf("y", [rows, cols])?;
                let x = s.b.glu(gate, up, activation)?;
                s.b.add(x, y)
            });
        }
        t.add(format!("add {rows}x{cols}"), move |s| {
            let (x, y) = (s.leaf("x", [rows, cols])?, s.leaf("y", [rows, cols])?);
            s.b.add(x, y)
        });
        t.add(format!("add x + x {rows}x{cols}"), move |s| {
            let x = s.leaf("x", [rows, cols])?;
            s.b.add(x, x)
        });
    }
    t.add("add twice the same sum", |s| {
        let (x, y) = (s.leaf("x", [3, 5])?, s.leaf("y", [3, 5])?);
        let z = s.b.add(x, y)?;
        let z = s.b.activation(z, Activation::GeluTanh)?;
        let w = s.b.add(z, y)?;
        s.b.add(w, z)
    });
    t.add("activation of nothing", |s| {
        let x = s.leaf("x", [0, 3])?;
        s.b.activation(x, Activation::Relu)
    })
    .flat = true;
    for (by, rows, cols) in [(2.5, 31, 33), (-0.3, 1, 1023)] {
        t.add(format!("scale {by} {rows}x{cols}"), move |s| {
            let x = s.leaf("x", [rows, cols])?;
            s.b.scale(x, by)
        });
    }
    for (p, rows, cols) in [(0.1, 31, 33), (0.5, 3, 31), (0.9, 1, 1023)] {
        t.add(format!("dropout {p} {rows}x{cols}"), move |s| {
            let x = s.leaf("x", [rows, cols])?;
            s.b.dropout(x, p)
        });
    }
    t.add("dropout twice", |s| {
        let x = s.leaf("x", [31, 5])?;
        let x = s.b.dropout(x, 0.3)?;
        let x = s.b.activation(x, Activation::GeluErf)?;
        s.b.dropout(x, 0.5)
    });
}

fn norms(t: &mut Table) {
    for (rows, cols) in [(2, 1), (1, 2), (3, 31), (31, 33), (2, 1023)] {
        t.add(format!("layernorm {rows}x{cols}"), move |s| {
            // One value is its own mean.
            let flat = if cols == 1 { "flat x" } else { "x" };
            let scale = if cols == 1 { "flat weight" } else { "weight" };
            let (x, weight, bias) = (s.leaf(flat, [rows, cols])?, s.leaf(scale, [cols])?, s.leaf("bias", [cols])?);
            s.b.layernorm(x, weight, bias, 1e-5)
        });
    }
    t.add("layernorm twice with one weight", |s| {
        let (x, weight, bias) = (s.leaf("x", [3, 7])?, s.leaf("weight", [7])?, s.leaf("bias", [7])?);
        let second = s.leaf("second bias", [7])?;
        let x = s.b.layernorm(x, weight, bias, 1e-5)?;
        let x = s.b.activation(x, Activation::GeluTanh)?;
        s.b.layernorm(x, weight, second, 1e-5)
    });
    for (rows, cols) in [(1, 2), (3, 31), (31, 33), (2, 1023)] {
        t.add(format!("rmsnorm {rows}x{cols}"), move |s| {
            let (x, weight) = (s.leaf("x", [rows, cols])?, s.leaf("weight", [cols])?);
            s.b.rmsnorm(x, weight, 1e-5)
        });
    }
    t.add("rmsnorm twice with one weight", |s| {
        let (x, weight) = (s.leaf("x", [3, 7])?, s.leaf("weight", [7])?);
        let x = s.b.rmsnorm(x, weight, 1e-5)?;
        let x = s.b.activation(x, Activation::GeluTanh)?;
        s.b.rmsnorm(x, weight, 1e-5)
    });
    for (b, len, heads, width, rest) in [(1, 1, 1, 2, 0), (2, 5, 1, 2, 1), (1, 31, 3, 6, 5), (2, 33, 2, 16, 16)] {
        t.add(format!("rotary {b}x{len}, {heads} heads of {width} and {rest}"), move |s| {
            let x = s.leaf("x", [b, len, heads * width + rest])?;
            s.b.rotary(x, heads, width, 100.0)
        });
    }
    for scaling in [
        RotaryScaling::Linear { factor: 3.0 },
        RotaryScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, positions: 64 },
        RotaryScaling::Yarn { factor: 4.0, low: 0.3, high: 2.5, positions: 40, whole: false, stretch: 0.9 },
    ] {
        t.add(format!("rotary with {scaling:?}"), move |s| {
            let x = s.leaf("x", [1, 9, 33])?;
            s.b.rotary_scaled(x, 2, 16, 10_000.0, scaling)
        });
    }
    t.add("glu of one tensor with itself", |s| {
        let x = s.leaf("x", [3, 5])?;
        s.b.glu(x, x, Activation::Silu)
    });
    t.add("glu in an MLP", |s| {
        let (x, down) = (s.leaf("x", [4, 6])?, s.leaf("down", [6, 7])?);
        let (gate, up) = (s.leaf("gate", [7, 6])?, s.leaf("up", [7, 6])?);
        let gate = s.b.linear(x, gate, None, Activation::None, WeightLayout::OutIn)?;
        let up = s.b.linear(x, up, None, Activation::None, WeightLayout::OutIn)?;
        let h = s.b.glu(gate, up, Activation::Silu)?;
        let y = s.b.linear(h, down, None, Activation::None, WeightLayout::OutIn)?;
        s.b.add(y, x)
    });
    t.add("rotary of queries and keys before attention", |s| {
        let qkv = s.leaf("qkv", [2, 5, (4 + 2 * 2) * 6])?;
        let qkv = s.b.rotary(qkv, 4 + 2, 6, 10_000.0)?;
        let options = AttentionOptions { heads: 4, kv_heads: 2, scale: None, causal: true, dropout: 0.0 };
        s.b.attention_packed(qkv, None, options)
    });
    for (n, c, h, w) in [(2, 1, 1, 1), (3, 5, 1, 1), (1, 3, 3, 5), (4, 3, 5, 7), (3, 33, 2, 2), (2, 2, 31, 33)] {
        t.add(format!("batchnorm {n}x{c}x{h}x{w}"), move |s| {
            let x = s.leaf("x", [n, c, h, w])?;
            s.b.batchnorm(x, "norm", 1e-3, 0.1)
        });
    }
}

fn attentions(t: &mut Table) {
    for packed in [false, true] {
        for causal in [false, true] {
            for masked in [false, true] {
                for (dropout, b, len, keys, heads, kv_heads, width) in [
                    (0.0, 2, 1, 1, 1, 1, 1),
                    (0.0, 2, 5, 7, 3, 3, 2),
                    (0.3, 2, 7, 5, 4, 2, 3),
                    (0.0, 3, 31, 33, 2, 1, 5),
                    (0.1, 2, 67, 67, 2, 2, 3),
                ] {
                    let keys = if packed { len } else { keys };
                    let name = format!(
                        "attention {b}x{len} on {keys}, {heads} of {kv_heads} heads of {width}, packed {packed}, causal {causal}, masked {masked}, dropout {dropout}"
                    );
                    t.add(name, move |s| {
                        let options = AttentionOptions { heads, kv_heads, scale: None, causal, dropout };
                        let mask = if masked { Some(s.b.input("mask", [b, keys], DType::I32)?) } else { None };
                        // With a single key the weights are 1, whatever q and k are.
                        let lone = if keys == 1 { "flat " } else { "" };
                        if packed {
                            let qkv = s.leaf("qkv", [b, len, (heads + 2 * kv_heads) * width])?;
                            return s.b.attention_packed(qkv, mask, options);
                        }
                        let q = s.leaf(&format!("{lone}q"), [b, len, heads * width])?;
                        let k = s.leaf(&format!("{lone}k"), [b, keys, kv_heads * width])?;
                        let v = s.leaf("v", [b, keys, kv_heads * width])?;
                        s.b.attention(q, k, v, mask, options)
                    });
                }
            }
        }
    }
    t.add("attention on itself", |s| {
        let x = s.leaf("x", [2, 5, 6])?;
        let options = AttentionOptions { heads: 2, kv_heads: 2, scale: Some(0.7), causal: true, dropout: 0.0 };
        s.b.attention(x, x, x, None, options)
    });
}

fn losses(t: &mut Table) {
    for (rows, classes) in [(1, 5), (31, 33), (7, 1023), (1023, 5)] {
        t.add(format!("cross_entropy {rows}x{classes}"), move |s| {
            let (x, y) = (s.leaf("x", [rows, classes])?, s.leaf("y", [rows, classes])?);
            s.b.add(x, y)
        })
        .head = None;
    }
    for (sizes, part) in [([37, 6, 33], 8), ([37, 1, 5], 30), ([64, 3, 7], 16)] {
        cross_entropy_in_parts(t, sizes, part);
    }
    for (rows, cols) in [(1, 1), (9, 31), (31, 33), (5, 1023), (63, 5)] {
        mean_squared_error(t, rows, cols);
    }
    let none = t.add("cross_entropy without labels", |s| {
        let (x, y) = (s.leaf("x", [3, 5])?, s.leaf("y", [3, 5])?);
        s.b.add(x, y)
    });
    (none.flat, none.loss) = (true, Loss::CrossEntropy("unlabelled"));
}

/// Adds a convolution, by the axes of `x` and `weight`.
pub fn conv2d(t: &mut Table, x: [usize; 4], weight: [usize; 4], bias: bool, stride: usize, padding: usize) {
    t.add(format!("conv2d {x:?} with {weight:?} bias {bias} stride {stride} padding {padding}"), move |s| {
        let out = weight[0];
        let (x, weight) = (s.leaf("x", x)?, s.leaf("weight", weight)?);
        let bias = if bias { Some(s.leaf("bias", [out])?) } else { None };
        s.b.conv2d(x, weight, bias, stride, padding)
    });
}

fn images(t: &mut Table) {
    for (x, weight, bias, stride, padding) in [
        ([1, 1, 1, 1], [1, 1, 1, 1], true, 1, 0),
        ([2, 3, 5, 7], [4, 3, 1, 1], false, 1, 0),
        ([2, 3, 5, 7], [4, 3, 3, 3], true, 1, 1),
        ([3, 2, 7, 6], [5, 2, 3, 2], true, 2, 1),
        ([1, 2, 2, 3], [3, 2, 5, 5], true, 1, 2),
        ([2, 1, 3, 3], [2, 1, 5, 7], false, 3, 2),
        ([1, 3, 31, 33], [2, 3, 3, 3], true, 2, 0),
        ([1, 33, 3, 3], [31, 33, 3, 3], false, 1, 1),
        ([3, 2, 5, 5], [2, 2, 1, 1], true, 3, 0),
    ] {
        conv2d(t, x, weight, bias, stride, padding);
    }
    t.add("conv2d of no image", |s| {
        let (x, weight, bias) = (s.leaf("x", [0, 2, 3, 3])?, s.leaf("weight", [3, 2, 2, 2])?, s.leaf("bias", [3])?);
        s.b.conv2d(x, weight, Some(bias), 1, 1)
    })
    .flat = true;
    for (x, kernel, stride, padding) in [
        ([1, 1, 1, 1], 1, 1, 0),
        ([2, 3, 5, 7], 2, 2, 0),
        ([2, 3, 5, 7], 3, 2, 1),
        ([1, 2, 31, 33], 3, 1, 1),
        ([3, 1, 7, 7], 2, 3, 1),
    ] {
        t.add(format!("max_pool {x:?} kernel {kernel} stride {stride} padding {padding}"), move |s| {
            let x = s.leaf("x", x)?;
            s.b.max_pool(x, kernel, stride, padding)
        });
        t.add(format!("avg_pool {x:?} kernel {kernel} stride {stride} padding {padding}"), move |s| {
            let x = s.leaf("x", x)?;
            s.b.avg_pool(x, [kernel, kernel], stride, padding)
        });
    }
    for x in [[1, 1, 1, 1], [2, 3, 5, 7], [3, 33, 1, 31]] {
        t.add(format!("global_avg_pool {x:?}"), move |s| {
            let x = s.leaf("x", x)?;
            s.b.global_avg_pool(x)
        });
    }
}

fn shapes(t: &mut Table) {
    t.add("reshape between ops", |s| {
        let x = s.leaf("x", [3, 4, 5])?;
        let x = s.b.activation(x, Activation::GeluTanh)?;
        let flat = s.b.reshape(x, [6, 10])?;
        let y = s.leaf("y", [6, 10])?;
        s.b.add(flat, y)
    });
    t.add("reshape of a parameter, used under both shapes", |s| {
        let x = s.b.parameter("x", [4, 6], Init::Normal(1.0))?;
        let y = s.leaf("y", [24])?;
        let (flat, y) = (s.b.reshape(x, [24])?, s.b.activation(y, Activation::GeluErf)?);
        let sum = s.b.add(flat, y)?;
        let sum = s.b.reshape(sum, [4, 6])?;
        s.b.linear(sum, x, None, Activation::None, WeightLayout::OutIn)
    });
    t.add("reshape handed on", |s| {
        let (x, y) = (s.leaf("x", [2, 3, 5])?, s.leaf("y", [2, 3, 5])?);
        let sum = s.b.add(x, y)?;
        s.b.reshape(sum, [5, 6])
    });
    for (by, rows) in [(1, 32), (0, 1), (-3, 33), (2, 40), (-31, 3), (5, 0)] {
        t.add(format!("shift by {by} to {rows} rows"), move |s| {
            let x = s.leaf("x", [3, 31, 5])?;
            s.b.shift(x, by, rows)
        })
        .flat = by == -31 || rows == 0;
    }
    t.add("transpose that is a view", |s| {
        let (x, y) = (s.leaf("x", [3, 1, 5])?, s.leaf("y", [3, 1, 5])?);
        let sum = s.b.add(x, y)?;
        s.b.transpose(sum, &[1, 0, 2])
    });
    for (axes, order) in [
        (vec![31, 33], vec![1, 0]),
        (vec![3, 4, 5], vec![2, 0, 1]),
        (vec![2, 3, 4, 5], vec![0, 2, 1, 3]),
        (vec![1, 1023, 2], vec![2, 1, 0]),
    ] {
        t.add(format!("transpose {axes:?} by {order:?}"), move |s| {
            let x = s.leaf("x", Shape(axes.clone()))?;
            s.b.transpose(x, &order)
        });
    }
}

fn parameters(t: &mut Table) {
    t.add("parameter used twice in one layer", |s| {
        let (x, w) = (s.leaf("x", [3, 7])?, s.b.parameter("w", [7, 7], Init::Normal(1.0))?);
        let y = s.b.linear(x, w, None, Activation::GeluTanh, WeightLayout::InOut)?;
        s.b.linear(y, w, None, Activation::None, WeightLayout::OutIn)
    });
    t.add("parameter shared by two layers", |s| {
        let x = s.leaf("x", [3, CLASSES])?;
        let w = s.b.parameter("head", [CLASSES, CLASSES], Init::Normal(1.0))?;
        s.b.linear(x, w, None, Activation::GeluTanh, WeightLayout::OutIn)
    });
    t.add("parameter that the loss does not reach", |s| {
        let x = s.leaf("x", [3, 7])?;
        s.b.parameter("flat unused", [5], Init::Normal(1.0))?;
        let lost = s.b.parameter("flat lost", [3, 7], Init::Normal(1.0))?;
        s.b.activation(lost, Activation::Relu)?;
        s.b.activation(x, Activation::GeluErf)
    });
    t.add("parameter added directly", |s| {
        let (x, p) = (s.leaf("x", [3, 7])?, s.b.parameter("p", [3, 7], Init::Normal(1.0))?);
        s.b.add(x, p)
    });
    t.add("parameter added to another as a bias", |s| {
        let (p, q) = (s.b.parameter("p", [4], Init::Normal(1.0))?, s.b.parameter("q", [4], Init::Normal(1.0))?);
        let (x, w) = (s.leaf("x", [3, 7])?, s.leaf("w", [7, 4])?);
        let bias = s.b.add(p, q)?;
        s.b.linear(x, w, Some(bias), Activation::None, WeightLayout::InOut)
    });
    t.add("parameter used as bias and as norm's bias", |s| {
        let (x, w) = (s.leaf("x", [3, 7])?, s.leaf("w", [7, 4])?);
        let (bias, scale) =
            (s.b.parameter("bias", [4], Init::Normal(1.0))?, s.b.parameter("scale", [4], Init::Normal(1.0))?);
        let y = s.b.linear(x, w, Some(bias), Activation::Relu, WeightLayout::InOut)?;
        s.b.layernorm(y, scale, bias, 1e-5)
    });
    t.add("parameter of no elements", |s| {
        let (x, w) = (s.leaf("x", [3, 0])?, s.leaf("w", [0, 4])?);
        s.b.linear(x, w, None, Activation::None, WeightLayout::InOut)
    })
    .flat = true;
}
