//! Small models, random and regular, and what an engine makes of them on a simulated device.

use hydra::base::DType;
use hydra::device::sim::{CostModel, SimDevice};
use hydra::device::{AdamwRule, SgdRule, UpdateRule};
use hydra::engine::{Engine, EngineOptions, StepInput};
use hydra::graph::{Activation, Builder, Init, Mode, WeightLayout};
use hydra::spill::{Model, Plan};
use hydra::trace::LaneSum;
use std::sync::Arc;

/// Random numbers that a seed repeats (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators":
/// SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A whole number in `low..=high`.
    pub fn whole(&mut self, low: usize, high: usize) -> usize {
        low + (self.bits() % (high - low + 1) as u64) as usize
    }

    /// A number in [0, 1).
    pub fn part(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A factor between `low` and `high`, evenly by its logarithm.
    pub fn factor(&mut self, low: f64, high: f64) -> f64 {
        low * (high / low).powf(self.part())
    }
}

/// Widths of a chain of layers: what goes into each, the hidden widths inside, what comes out.
pub struct Chain {
    /// Rows (R) of a microbatch.
    pub rows: usize,
    pub input: usize,
    /// The linear layers' output widths, layer by layer.
    pub layers: Vec<Vec<usize>>,
    pub microbatches: usize,
}

impl Chain {
    pub fn random(random: &mut Random) -> Chain {
        let width = |random: &mut Random| random.factor(16.0, 2500.0) as usize;
        let layers = random.whole(3, 10);
        Chain {
            rows: random.factor(1.0, 4000.0) as usize,
            input: width(random),
            layers: (0..layers).map(|_| (0..random.whole(1, 3)).map(|_| width(random)).collect()).collect(),
            microbatches: random.whole(1, 4),
        }
    }

    /// Equal layers of one square weight, without a bias.
    pub fn equal(layers: usize, width: usize, rows: usize) -> Chain {
        Chain { rows, input: width, layers: vec![vec![width]; layers], microbatches: 1 }
    }

    /// The model: x (R, input) through linear layers with GELU, and cross-entropy over the last one's width.
    pub fn model(&self) -> Arc<Model> {
        let mut builder = Builder::new(Mode::Training, DType::F32);
        let mut output = None;
        let mut width = self.input;
        for (l, widths) in self.layers.iter().enumerate() {
            let value = builder
                .layer(format!("layer {l}"), |b, before| {
                    let mut x = match before {
                        Some(x) => x,
                        None => b.input("x", [self.rows, self.input], DType::F32)?,
                    };
                    for (i, &out) in widths.iter().enumerate() {
                        let weight = b.parameter(format!("{l}.{i}"), [width, out], Init::Normal(0.02))?;
                        x = b.linear(x, weight, None, Activation::GeluTanh, WeightLayout::InOut)?;
                        width = out;
                    }
                    Ok(x)
                })
                .expect("widths follow each other");
            output = Some(value);
        }
        let labels = builder.input("labels", [self.rows], DType::I32).expect("a new input");
        builder.cross_entropy(output.expect("there are layers"), labels).expect("one label a row");
        Arc::new(Model::new(builder.finish().expect("layers"), None, self.microbatches).expect("a loss"))
    }
}

/// Numbers of an optimizer with this many moments.
pub fn rule(moments: usize, update: u64) -> UpdateRule {
    match moments {
        2 => UpdateRule::Adamw(AdamwRule { update, lr: 1e-3, betas: (0.9, 0.99), epsilon: 1e-8, weight_decay: 0.1 }),
        n => {
            let momentum = if n > 0 { 0.9 } else { 0.0 };
            UpdateRule::Sgd(SgdRule { update, lr: 1e-3, momentum, nesterov: false, weight_decay: 0.0 })
        }
    }
}

/// What a steady step took on a simulated device.
#[derive(Debug, Clone)]
pub struct Steady {
    pub secs: f64,
    /// Busy seconds of each lane in a step.
    pub busy: Vec<LaneSum>,
}

impl Steady {
    /// Bound A: what the busiest lane has to do.
    pub fn busiest_secs(&self) -> f64 {
        self.busy.iter().map(|lane| lane.busy_secs).fold(0.0, f64::max)
    }
}

/// Steps that are run and not measured, and then measured. An even number: host buffers are used in turns of two.
pub const WARM: u64 = 3;
pub const MEASURED: u64 = 4;

/// Runs the engine on the simulated device with two steps in flight, as training does.
pub fn run_simulated(model: &Arc<Model>, plan: &Arc<Plan>, cost: &CostModel, clip: Option<f64>) -> Steady {
    let device = Box::new(SimDevice::new(vec![cost.clone()]));
    let mut engine = Engine::new(Arc::clone(model), Arc::clone(plan), device, EngineOptions::new(0, model));
    let mut steady = Steady { secs: 0.0, busy: Vec::new() };
    let mut begun = 0;
    for step in 0..WARM + MEASURED {
        // The last of them too has a next one beside it.
        while begun <= WARM + MEASURED && engine.steps_in_flight(0) < 2 {
            let inputs = vec![&[][..]; model.train.inputs.len()];
            let rule = rule(plan.updates.moments, begun + 1);
            let input = StepInput { step: begun, inputs, loss_scale: 1.0, rule, clip };
            engine.begin_step(0, &input).expect("fewer than two in flight");
            begun += 1;
        }
        let result = engine.wait_step(0).expect("nothing fails");
        if step < WARM {
            continue;
        }
        steady.secs += result.secs / MEASURED as f64;
        for (i, lane) in engine.step_lane_sums(0).iter().enumerate() {
            match steady.busy.get_mut(i) {
                Some(sum) => sum.busy_secs += lane.busy_secs,
                None => steady.busy.push(*lane),
            }
        }
    }
    for lane in &mut steady.busy {
        lane.busy_secs /= MEASURED as f64;
    }
    steady
}
