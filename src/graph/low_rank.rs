//! Low-rank adapters (Hu et al. 2021, "LoRA", arXiv:2106.09685): a linear layer's weight is frozen, and a product of
//! two narrow matrices is learned in addition to it, y = x W + alpha / r (x A) B.

use super::graph::{Graph, Node, Parameter, Source, Value, ValueInfo};
use super::kinds::{Activation, Init, Mode, WeightLayout};
use super::op::Op;
use crate::base::{DType, Error, Result, Shape};
use serde::{Deserialize, Serialize};

/// Suffixes that name an adapter's matrices after its linear layer.
const ENDS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
/// The end of the name of a linear layer's weight.
const WEIGHT: &str = ".weight";
/// Adapters wider than this are a mistake.
pub const MOST_RANK: usize = 1 << 14;

/// Which linear layers of a model get adapters, and what kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LowRank {
    /// r, the columns of A and rows of B; 1 or more.
    pub rank: usize,
    /// The product A B is scaled by alpha / r.
    pub alpha: f64,
    /// Probability, in training, of dropping an element of A's input.
    pub dropout: f64,
    /// Names of linear layers, or their last parts after a dot: `q_proj` means that of every layer.
    pub targets: Vec<String>,
}

impl LowRank {
    /// The factor of the product A B: alpha / r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Refuses invalid values.
    ///
    /// # Errors
    /// When a number is out of its range, or there are no targets.
    pub fn check(&self) -> Result<()> {
        let &LowRank { rank, alpha, dropout, .. } = self;
        if !(1..=MOST_RANK).contains(&rank) {
            return Err(Error::bad(format!("low rank: rank is {rank}, want 1 to {MOST_RANK}")));
        }
        if !(alpha > 0.0 && alpha <= 1e6) {
            return Err(Error::bad(format!("low rank: alpha is {alpha}, want a number above 0, up to 1e6")));
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(Error::bad(format!("low rank: dropout is {dropout}, want a number from 0 to below 1")));
        }
        if self.targets.is_empty() {
            return Err(Error::bad("low rank: there are no targets"));
        }
        Ok(())
    }
}

/// The names of A (r, K) and B (N, r) of a linear layer.
pub fn adapter_names(layer: &str) -> [String; 2] {
    ENDS.map(|end| format!("{layer}{end}"))
}

/// The linear layer whose A or B has this name.
pub fn adapted_layer(name: &str) -> Option<&str> {
    ENDS.iter().find_map(|end| name.strip_suffix(end))
}

impl Graph {
    /// Gives the linear layers of `low_rank` adapters, and freezes all other parameters. A is initially uniform in plus
    /// or minus 1 / sqrt(K) and B is 0, so the adapted model initially computes the same as before. Call it before
    /// [`super::differentiate`].
    ///
    /// # Errors
    /// As [`LowRank::check`]; when a target is no linear layer's name, or such a layer's weight is also used elsewhere.
    pub fn adapt(&mut self, low_rank: &LowRank, mode: Mode) -> Result<()> {
        low_rank.check()?;
        let names: Vec<Option<String>> = self.nodes.iter().map(|node| self.linear_layer(node)).collect();
        for target in &low_rank.targets {
            if !names.iter().flatten().any(|name| is_of(target, name)) {
                return Err(no_layer(target, names.iter().flatten()));
            }
        }
        self.freeze(|_| true);
        // Each op has a random stream of its own.
        let mut stream = self.nodes.iter().filter_map(|node| stream_of(&node.op)).max().map_or(0, |last| last + 1);
        let nodes = std::mem::take(&mut self.nodes);
        for (node, name) in nodes.into_iter().zip(names) {
            match name.filter(|name| low_rank.targets.iter().any(|target| is_of(target, name))) {
                Some(name) => {
                    let dropped = mode == Mode::Training && low_rank.dropout > 0.0;
                    self.adapt_layer(node, &name, low_rank, dropped.then_some(stream))?;
                    stream += 1;
                }
                None => self.append(node),
            }
        }
        self.forward_nodes = self.nodes.len();
        Ok(())
    }

    /// The name of the linear layer that a node is.
    fn linear_layer(&self, node: &Node) -> Option<String> {
        let Op::Linear { .. } = node.op else { return None };
        let Source::Parameter(weight) = self.info(node.inputs[1]).source else { return None };
        self.parameters[weight].name.strip_suffix(WEIGHT).map(str::to_string)
    }

    /// Appends, in place of a linear layer, the layer with an adapter: u = dropout(x) A, scaled; u B plus the layer's
    /// residual; the layer with this sum as its residual; and its activation as an op of its own.
    fn adapt_layer(&mut self, mut node: Node, name: &str, low_rank: &LowRank, dropped: Option<u32>) -> Result<()> {
        let layer = node.layer;
        let &Op::Linear { activation, layout, residual } = &node.op else { unreachable!("the caller has matched it") };
        let weight = self.parameters.iter().find(|p| p.value == node.inputs[1]).expect("it is one");
        if weight.layers.len() > 1 || self.parameters.iter().any(|p| adapted_layer(&p.name) == Some(name)) {
            return Err(Error::bad(format!("low rank: the weight of {name} is used more than once")));
        }
        let (x, out) = (node.inputs[0], node.outputs[0]);
        let (inputs, shape) = (self.info(x).shape.cols(), self.info(out).shape.clone());
        let [a, b] = adapter_names(name);
        let bound = Init::Uniform(1.0 / (inputs as f64).sqrt());
        let a = self.new_parameter(a, Shape::from([low_rank.rank, inputs]), bound, layer)?;
        let b = self.new_parameter(b, Shape::from([shape.cols(), low_rank.rank]), Init::Constant(0.0), layer)?;
        let mut narrow = self.info(x).shape.clone();
        let x = match dropped {
            Some(stream) => {
                let op = Op::Dropout { p: low_rank.dropout, stream };
                self.append_new(op, vec![x], narrow.clone(), layer)
            }
            None => x,
        };
        *narrow.0.last_mut().expect("it has columns") = low_rank.rank;
        let linear = |residual| Op::Linear { activation: Activation::None, layout: WeightLayout::OutIn, residual };
        let mut h = self.append_new(linear(false), vec![x, a], narrow.clone(), layer);
        if low_rank.scale() != 1.0 {
            h = self.append_new(Op::Scale(low_rank.scale()), vec![h], narrow, layer);
        }
        let before = residual.then(|| node.inputs.pop().expect("a residual is the last input"));
        let beside = self.append_new(linear(residual), [h, b].into_iter().chain(before).collect(), shape, layer);
        node.inputs.push(beside);
        node.op = Op::Linear { activation: Activation::None, layout, residual: true };
        if activation == Activation::None {
            self.append(node);
        } else {
            // The value before the activation was the second output.
            let pre = node.outputs[1];
            node.outputs = vec![pre];
            self.append(node);
            self.append(Node { op: Op::Activation(activation), inputs: vec![pre], outputs: vec![out], layer });
        }
        Ok(())
    }

    fn new_parameter(&mut self, name: String, shape: Shape, init: Init, layer: usize) -> Result<Value> {
        let elems = shape.checked_elems()?;
        if self.parameter_elems().checked_add(elems).is_none_or(|all| all > isize::MAX as usize / 64) {
            return Err(Error::bad(format!("low rank: with {name} the model has more elements than fit in memory")));
        }
        let source = Source::Parameter(self.parameters.len());
        let value = self.new_value(shape.clone(), self.float, source);
        self.parameters.push(Parameter { name, value, shape, init, layers: vec![layer], frozen: false });
        Ok(value)
    }

    fn new_value(&mut self, shape: Shape, dtype: DType, source: Source) -> Value {
        self.values.push(ValueInfo { shape, dtype, source });
        Value(self.values.len() as u32 - 1)
    }

    /// Appends a node whose outputs exist already.
    fn append(&mut self, node: Node) {
        for (output, &value) in node.outputs.iter().enumerate() {
            self.values[value.0 as usize].source = Source::Node { node: self.nodes.len(), output };
        }
        self.nodes.push(node);
    }

    /// Appends a node with a new output of this shape.
    fn append_new(&mut self, op: Op, inputs: Vec<Value>, shape: Shape, layer: usize) -> Value {
        let out = self.new_value(shape, self.float, Source::Node { node: self.nodes.len(), output: 0 });
        self.append(Node { op, inputs, outputs: vec![out], layer });
        out
    }
}

/// Whether a target names this linear layer.
fn is_of(target: &str, name: &str) -> bool {
    name.strip_suffix(target).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn stream_of(op: &Op) -> Option<u32> {
    match op {
        Op::Dropout { stream, .. } => Some(*stream),
        Op::Attention(kind) => kind.dropout.map(|(_, stream)| stream),
        _ => None,
    }
}

fn no_layer<'a>(target: &str, names: impl Iterator<Item = &'a String>) -> Error {
    let mut last: Vec<&str> = Vec::new();
    for name in names {
        let word = name.rsplit('.').next().unwrap_or(name);
        if !last.contains(&word) {
            last.push(word);
        }
    }
    let such = if last.is_empty() { "it has none".to_string() } else { format!("there are {}", last.join(", ")) };
    Error::bad(format!("low rank: no linear layer's name ends with {target:?}; {such}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Builder, differentiate};
    use std::collections::BTreeSet;

    const TANH: Activation = Activation::GeluTanh;

    /// Three layers of 4 columns: a product before an activation, one with a residual, and a head, which has the first
    /// one's weight where it `shares`.
    fn model(mode: Mode, shares: bool) -> Graph {
        let mut b = Builder::new(mode, DType::F32);
        let x = b.input("x", [6, 4], DType::F32).unwrap();
        let linear = |b: &mut Builder, x, name: &str, activation| {
            let weight = b.parameter(format!("{name}.weight"), [4, 4], Init::Normal(1.0))?;
            let bias = b.parameter(format!("{name}.bias"), [4], Init::Normal(1.0))?;
            b.linear(x, weight, Some(bias), activation, WeightLayout::InOut)
        };
        let x = b.layer("0", |b, _| linear(b, x, "a.up", TANH)).unwrap();
        let body = |b: &mut Builder, _: Option<Value>| {
            let y = b.dropout(x, 0.1)?;
            let y = linear(b, y, "a.down", Activation::None)?;
            b.add(y, x)
        };
        b.layer("1", body).unwrap();
        let head = if shares { "a.up" } else { "head" };
        let x = b.layer("2", |b, x| linear(b, x.unwrap(), head, Activation::None)).unwrap();
        let labels = b.input("labels", [6], DType::I32).unwrap();
        b.cross_entropy(x, labels).unwrap();
        b.finish().unwrap()
    }

    fn low_rank(targets: &[&str]) -> LowRank {
        LowRank { rank: 2, alpha: 3.0, dropout: 0.2, targets: targets.iter().map(|t| t.to_string()).collect() }
    }

    fn ops(graph: &Graph) -> Vec<&'static str> {
        graph.nodes[..graph.forward_nodes].iter().map(|node| node.op.name()).collect()
    }

    #[test]
    fn an_adapter_stands_beside_its_layer() {
        let mut graph = model(Mode::Training, false);
        graph.adapt(&low_rank(&["up", "a.down"]), Mode::Training).unwrap();
        let adapter = ["dropout", "linear", "scale", "linear"];
        let up = [&adapter[..], &["linear", "activation"]].concat();
        let down = [&["dropout"], &adapter[..], &["linear"]].concat();
        assert_eq!(ops(&graph), [&up[..], &down, &["linear", "cross_entropy", "loss_sum"]].concat());
        let residual = |n: usize| matches!(graph.nodes[n].op, Op::Linear { residual: true, .. });
        // The product before the activation; the second adapter's last product, with the residual, and the layer's own.
        assert_eq!((0..graph.nodes.len()).filter(|&n| residual(n)).collect::<Vec<_>>(), [4, 10, 11]);
        let streams: BTreeSet<u32> = graph.nodes.iter().filter_map(|node| stream_of(&node.op)).collect();
        assert_eq!(streams.len(), 3);
        let trained: Vec<_> = graph.parameters.iter().filter(|p| !p.frozen).collect();
        let shapes: Vec<_> = trained.iter().map(|p| (p.name.as_str(), p.shape.axes(), &p.layers[..])).collect();
        let want: [(&str, &[usize], &[usize]); 4] = [
            ("a.up.lora_A.weight", &[2, 4], &[0]),
            ("a.up.lora_B.weight", &[4, 2], &[0]),
            ("a.down.lora_A.weight", &[2, 4], &[1]),
            ("a.down.lora_B.weight", &[4, 2], &[1]),
        ];
        assert_eq!(shapes, want);
        assert_eq!((trained[0].init, trained[1].init), (Init::Uniform(0.5), Init::Constant(0.0)));
        for (n, node) in graph.nodes.iter().enumerate() {
            for (output, &value) in node.outputs.iter().enumerate() {
                assert_eq!(graph.info(value).source, Source::Node { node: n, output });
            }
            assert!(node.inputs.iter().all(|&v| graph.producer(v).is_none_or(|from| from < n)), "{n}: {node:?}");
        }
        differentiate(&mut graph).unwrap();
        assert!(!graph.nodes.iter().any(|node| node.op == Op::Zero), "every adapter has a gradient");
        assert_eq!(graph.parameter_gradients.len(), 4);
    }

    #[test]
    fn nothing_is_dropped_in_evaluation_nor_scaled_by_one() {
        let mut graph = model(Mode::Evaluation, false);
        graph.adapt(&LowRank { alpha: 2.0, ..low_rank(&["head"]) }, Mode::Evaluation).unwrap();
        let head = ["linear", "linear", "linear", "cross_entropy", "loss_sum"];
        assert_eq!(ops(&graph), [&["linear", "linear"][..], &head].concat());
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let refused = |low_rank: LowRank, shares: bool, says: &str| {
            let error = model(Mode::Training, shares).adapt(&low_rank, Mode::Training).unwrap_err();
            assert!(matches!(error, Error::BadInput(_)) && error.to_string().contains(says), "{error}");
        };
        refused(low_rank(&["up", "p"]), false, "no linear layer's name ends with \"p\"; there are up, down, head");
        refused(low_rank(&["b.up"]), false, "\"b.up\"");
        refused(low_rank(&["up"]), true, "the weight of a.up is used more than once");
        refused(low_rank(&[]), false, "no targets");
        refused(LowRank { rank: 0, ..low_rank(&["up"]) }, false, "rank is 0");
        refused(LowRank { alpha: f64::NAN, ..low_rank(&["up"]) }, false, "alpha is NaN");
        refused(LowRank { dropout: 1.0, ..low_rank(&["up"]) }, false, "dropout is 1");
    }
}
