//! Small networks with random data, for tests that need many short runs.

#[path = "../../examples/06_denoising.rs"]
mod denoising;

use super::{Outcome, difference, finish, gather, gather_of, stated};
use hydra::base::{DType, Result, Shape};
use hydra::data::{Batch, BatchTensor, IGNORED, InputSpec, RandomOptions, RandomSource, Source, labelled, names};
use hydra::device::Device;
use hydra::engine::{Engine, StepInput};
use hydra::graph::{Activation, Builder, CustomOp, Graph, Init, Mode, WeightLayout};
use hydra::nn::{self, InputShape, Inputs, Labels, Network, layers};
use hydra::spill::{Model, Plan, PlanOptions};
use hydra::train::{Optimizer, Session, TrainOptions, Weights, inputs_of, plan_model, trace_model};
use serde_json::{Value, json};
use std::sync::Arc;

/// A network and what its random data look like.
pub struct Small {
    pub network: Box<dyn Network>,
    tensors: Vec<(String, DType, Shape)>,
    vocab: usize,
    classes: usize,
}

fn network(family: &str, config: &Value) -> Box<dyn Network> {
    nn::from_config(family, config).expect("a network")
}

impl Small {
    /// A GPT-2 with a tied head and dropout of all three kinds; labels for every position but those that `Holes` takes
    /// out.
    pub fn gpt(width: usize, heads: usize, layers: usize, context: usize, dropout: f64) -> Small {
        Small::gpt_of(61, width, heads, layers, context, dropout)
    }

    /// The same with a table of so many rows.
    pub fn gpt_of(vocab: usize, width: usize, heads: usize, layers: usize, context: usize, dropout: f64) -> Small {
        let config = json!({
            "vocab_size": vocab, "n_positions": context + 2, "n_embd": width, "n_head": heads, "n_layer": layers,
            "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout,
        });
        let ids = |name: &str| (name.to_string(), DType::I32, Shape::from([context]));
        let tensors = vec![ids(names::INPUT_IDS), ids(names::LABELS)];
        Small { network: network("gpt2", &config), tensors, vocab, classes: vocab }
    }

    /// A Llama with half as many key and value heads as query heads and an untied head.
    pub fn llama(width: usize, heads: usize, layers: usize, context: usize) -> Small {
        let vocab = 61;
        let config = json!({
            "vocab_size": vocab, "max_position_embeddings": context + 2, "hidden_size": width, "num_attention_heads": heads,
            "num_key_value_heads": heads / 2, "num_hidden_layers": layers, "intermediate_size": 2 * width + 6,
        });
        let ids = |name: &str| (name.to_string(), DType::I32, Shape::from([context]));
        let tensors = vec![ids(names::INPUT_IDS), ids(names::LABELS)];
        Small { network: network("llama", &config), tensors, vocab, classes: vocab }
    }

    /// A ResNet of basic blocks, with batch normalization throughout.
    pub fn resnet(sizes: &[usize], depths: &[usize], pixels: [usize; 2]) -> Small {
        let classes = 5;
        let config = json!({
            "num_channels": 3, "embedding_size": sizes[0], "hidden_sizes": sizes, "depths": depths,
            "layer_type": "basic", "num_labels": classes,
        });
        let tensors = vec![
            (names::PIXEL_VALUES.to_string(), DType::F32, Shape::from([3, pixels[0], pixels[1]])),
            (names::LABELS.to_string(), DType::I32, Shape::default()),
        ];
        Small { network: network("resnet", &config), tensors, vocab: 1, classes }
    }

    /// A regression: lines of numbers under mean squared error, of odd widths.
    pub fn denoiser(hidden: usize, depth: usize, points: usize) -> Small {
        let tensors = vec![
            (names::PIXEL_VALUES.to_string(), DType::F32, Shape::from([1, 1, points])),
            (names::LABELS.to_string(), DType::F32, Shape::from([points])),
        ];
        Small { network: Box::new(denoising::Denoiser { hidden, depth }), tensors, vocab: 1, classes: 1 }
    }

    /// An embedding, an op of the test's own over (batch, 7, 12), and a head.
    pub fn with_op(op: Arc<dyn CustomOp>) -> Small {
        let tensors = [names::INPUT_IDS, names::LABELS].map(|n| (n.to_string(), DType::I32, Shape::from([7])));
        Small { network: Box::new(WithOp(op)), tensors: tensors.to_vec(), vocab: 13, classes: 13 }
    }

    /// Random minibatches in which about a fifth of a text's labels are left out, so that microbatches weigh
    /// differently.
    pub fn source(&self, batch: usize, seed: u64) -> Box<dyn Source> {
        let options =
            RandomOptions { tensors: self.tensors.clone(), vocab: self.vocab, classes: self.classes, batch, seed };
        Box::new(Holes { source: RandomSource::new(&options).expect("options in range"), batches: u64::MAX })
    }

    /// Three minibatches to validate on.
    pub fn held_out(&self, batch: usize) -> Box<dyn Source> {
        let options =
            RandomOptions { tensors: self.tensors.clone(), vocab: self.vocab, classes: self.classes, batch, seed: 999 };
        Box::new(Holes { source: RandomSource::new(&options).expect("options in range"), batches: 3 })
    }

    pub fn model(&self, options: &TrainOptions) -> Arc<Model> {
        let inputs = inputs_of(self.source(options.batch, 0).as_ref());
        Arc::new(trace_model(self.network.as_ref(), &inputs, options).expect("a model"))
    }

    pub fn plan(&self, options: &TrainOptions) -> Result<(Arc<Model>, Arc<Plan>)> {
        let model = self.model(options);
        let plan = plan_model(&model, options, &stated())?;
        Ok((model, plan))
    }

    /// A session with random first weights and data.
    pub fn session(&self, planned: (Arc<Model>, Arc<Plan>), options: &TrainOptions) -> Result<Session> {
        let source = self.source(options.batch, options.seed);
        let valid = Some(self.held_out(options.batch));
        Session::new(Weights::Random, planned, source, valid, options.clone())
    }

    /// What is frozen stays as it is, and the others' gradients are those that they have where all is trained: by plain
    /// SGD, the same bits after a step, under the smallest budget too.
    pub fn check_frozen(&self, options: &TrainOptions, frozen: &[&str]) {
        let optimizer = Optimizer::Sgd { lr: 0.05, momentum: 0.0, nesterov: false, weight_decay: 0.0 };
        let whole = TrainOptions { optimizer, ..options.clone() };
        let partly = TrainOptions { frozen: frozen.iter().map(|start| start.to_string()).collect(), ..whole.clone() };
        let mut before = Outcome::default();
        let fresh = self.session(self.plan(&whole).expect("a plan"), &whole).expect("a session");
        gather_of(fresh.engine(), 0, &mut before);
        let [want, got] = [&whole, &partly].map(|options| self.train(options).expect("a run"));
        assert_eq!(got.losses, want.losses, "{frozen:?}");
        let device_budget = Some(self.plan(&partly).expect("a plan").1.smallest_device_bytes);
        let plan = PlanOptions { device_budget, ..partly.plan.clone() };
        let spilled = self.train(&TrainOptions { plan, ..partly }).expect("a run");
        assert_eq!(difference(&spilled, &got), None, "{frozen:?}");
        let mut stayed = 0;
        for (name, bits) in &got.tensors {
            if !frozen.iter().any(|start| name.starts_with(start)) {
                assert!(bits == &want.tensors[name], "{frozen:?}: {name} is another");
                continue;
            }
            // Of a bf16 weight nothing but its upper half is kept; running statistics go on.
            let kept = |first: u32| if options.dtype == DType::Bf16 { (first + 0x8000) & !0xFFFF } else { first };
            let same = bits.iter().zip(&before.tensors[name]).all(|(&now, &first)| now == kept(first));
            assert!(same || name.contains("running"), "{frozen:?}: {name} has changed");
            stayed += 1;
        }
        assert!(stayed > 0 && got.tensors.iter().any(|(name, bits)| bits != &before.tensors[name]), "{frozen:?}");
    }

    /// Trains and validates, and gives everything that was computed.
    pub fn train(&self, options: &TrainOptions) -> Result<Outcome> {
        finish(self.session(self.plan(options)?, options)?)
    }
}

struct WithOp(Arc<dyn CustomOp>);

impl Network for WithOp {
    fn trace(&self, mode: Mode, float: DType, batch: usize, inputs: &[InputShape]) -> Result<Graph> {
        let inputs = Inputs::new(batch, float, inputs, &[names::INPUT_IDS, names::LABELS])?;
        let (mut b, init) = (Builder::new(mode, float), Init::Normal(0.2));
        let ids = inputs.declare(&mut b, names::INPUT_IDS, &[7], true)?.expect("a minibatch has them");
        let x = b.layer("embedding", |b, _| layers::embedding(b, ids, "embedding", [13, 12], init))?;
        let x = b.layer("own", |b, _| Ok(b.custom(Arc::clone(&self.0), vec![x])?[0]))?;
        let logits = b.layer("head", |b, _| {
            let weight = b.parameter("head", [12, 13], init)?;
            b.linear(x, weight, None, Activation::None, WeightLayout::InOut)
        })?;
        if let Some(labels) = inputs.declare(&mut b, names::LABELS, &[7], true)? {
            b.cross_entropy(logits, labels)?;
        }
        b.finish()
    }

    fn inputs(&self) -> Vec<InputShape> {
        vec![InputShape::new(names::INPUT_IDS, [7], DType::I32)]
    }

    fn labels(&self) -> Labels {
        Labels { shift: false, classes: 13, vocab: Some(13) }
    }

    fn config(&self) -> Value {
        json!({})
    }
}

/// An engine on a device of one's own, driven step by step as a session does it.
pub struct Driver {
    pub engine: Engine,
    pub source: Box<dyn Source>,
    pub options: TrainOptions,
    pub batch: Batch,
}

/// The tensors of a minibatch in the order of the graph's inputs.
fn inputs<'a>(model: &Model, batch: &'a Batch) -> Vec<&'a [u8]> {
    model.train.inputs.iter().map(|i| batch.get(&i.name).expect("the batch has it").bytes()).collect()
}

impl Driver {
    /// Fills the store of `device` with the first weights that a session would begin with.
    pub fn new(
        small: &Small,
        (model, plan): (Arc<Model>, Arc<Plan>),
        device: Box<dyn Device>,
        options: &TrainOptions,
    ) -> Driver {
        let engine_options = options.engine_options(&model, &plan);
        let mut engine = Engine::new(Arc::clone(&model), plan, device, engine_options);
        Weights::Random.write(&mut engine, 0, options.seed).expect("nothing has begun");
        let source = small.source(options.batch, options.seed);
        let batch = Batch::zeros(source.spec());
        Driver { engine, source, options: options.clone(), batch }
    }

    /// Begins `step` after `change` has had its way with the data.
    pub fn begin(&mut self, step: u64, change: impl FnOnce(&mut Batch)) -> Result<()> {
        self.source.fill(step, &mut self.batch)?;
        change(&mut self.batch);
        let labels = labelled(&self.batch)?;
        let lr = self.options.schedule.lr(self.options.optimizer.lr(), step, self.options.steps);
        let model = Arc::clone(self.engine.model(0));
        self.engine.begin_step(
            0,
            &StepInput {
                step,
                inputs: inputs(&model, &self.batch),
                loss_scale: 1.0 / labels as f64,
                rule: self.options.optimizer.rule(step, lr),
                clip: self.options.clip,
            },
        )
    }

    /// Runs all steps, two in flight, and evaluates `held_out` in the middle and at the end, as a session does.
    pub fn run(mut self, mut held_out: Box<dyn Source>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut begun = 0;
        let model = Arc::clone(self.engine.model(0));
        for step in 0..self.options.steps {
            while begun < self.options.steps
                && self.engine.steps_in_flight(0) < 2
                && (begun == step || !begun.is_multiple_of(self.options.valid_every))
            {
                self.begin(begun, |_| ())?;
                begun += 1;
            }
            let result = self.engine.wait_step(0)?;
            assert_eq!(result.step, step);
            outcome.losses.push(result.loss.to_bits());
            outcome.norms.push(result.grad_norm.to_bits());
            if (step + 1).is_multiple_of(self.options.valid_every) || step + 1 == self.options.steps {
                self.engine.wait_home(0)?;
                let (mut sum, mut count) = (0.0, 0);
                for index in 0..held_out.batches_per_epoch() {
                    held_out.fill(index, &mut self.batch)?;
                    count += labelled(&self.batch)?;
                    sum += f64::from(self.engine.wait_evaluation(0, &inputs(&model, &self.batch), 1.0)?);
                }
                outcome.valid.push(((sum / count as f64) as f32).to_bits());
            }
        }
        self.engine.wait_home(0)?;
        gather(&self.engine, &mut outcome);
        Ok(outcome)
    }
}

/// Takes some labels out of a random source's texts.
struct Holes {
    source: RandomSource,
    batches: u64,
}

impl Source for Holes {
    fn spec(&self) -> &InputSpec {
        self.source.spec()
    }

    fn fill(&mut self, index: u64, batch: &mut Batch) -> Result<()> {
        self.source.fill(index, batch)?;
        let thinned =
            |t: &&mut BatchTensor| t.name == names::LABELS && t.dtype == DType::I32 && t.shape.axes().len() == 2;
        for tensor in batch.tensors.iter_mut().filter(thinned) {
            let labels = tensor.as_i32_mut();
            // The first third is thinned out most.
            for i in 0..labels.len() {
                let every = if 3 * i < labels.len() { 2 } else { 7 };
                if (i as u64 + index).is_multiple_of(every) {
                    labels[i] = IGNORED;
                }
            }
        }
        Ok(())
    }

    fn batches_per_epoch(&self) -> u64 {
        self.batches
    }
}
