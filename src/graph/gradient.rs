//! One rule per op: the nodes of its gradient.
//!
//! A rule receives the gradient of the op's first output (`None` for the rows' losses, whose gradient is the loss
//! scale) and contributes one gradient to each input that wants one. Rules compute nothing: they only name ops.

use super::custom::Custom;
use super::differentiate::Sweep;
use super::graph::Value;
use super::kinds::Activation;
use super::op::{Op, Rotation};
use crate::base::{Error, Result, Shape};

/// Emits the gradient of `op`.
pub(super) fn emit(s: &mut Sweep, op: &Op, inputs: &[Value], outputs: &[Value], d_out: Option<Value>) -> Result<()> {
    let shape = |s: &Sweep, v: Value| s.graph.info(v).shape.clone();
    let of_loss = match op {
        Op::CrossEntropy => Some((Op::CrossEntropyGrad, vec![shape(s, inputs[0]), shape(s, outputs[0])])),
        Op::MeanSquaredError => Some((Op::MeanSquaredErrorGrad, vec![shape(s, inputs[0])])),
        _ => None,
    };
    if let Some((gradient, shapes)) = of_loss {
        let d = s.push(gradient, inputs.to_vec(), shapes)[0];
        s.contribute(inputs[0], d);
        return Ok(());
    }
    let Some(d) = d_out else {
        return Err(Error::bad(format!("{}: is no loss; cross_entropy and mean_squared_error are", op.name())));
    };
    match op {
        Op::Embedding { padding } => {
            let table = shape(s, inputs[1]);
            let d_table = s.push_one(Op::EmbeddingGrad { padding: *padding }, vec![d, inputs[0]], table);
            s.contribute(inputs[1], d_table);
        }
        Op::AddPosition => {
            if s.wants(inputs[1]) {
                let table = shape(s, inputs[1]);
                let d_table = s.push_one(Op::AddPositionGrad, vec![d], table);
                s.contribute(inputs[1], d_table);
            }
            s.contribute(inputs[0], d);
        }
        Op::Linear { activation, layout, residual } => {
            let (inputs, residual) = inputs.split_at(inputs.len() - usize::from(*residual));
            residual.iter().for_each(|&v| s.contribute(v, d));
            let d_pre = if *activation == Activation::None {
                d
            } else {
                let of = shape(s, outputs[0]);
                s.push_one(Op::ActivationGrad(*activation), vec![d, outputs[1]], of)
            };
            // Both are parameters, so if one gradient is wanted, so is the other.
            let parameters = &inputs[1..];
            if parameters.iter().any(|&v| s.wants(v)) {
                let shapes = parameters.iter().map(|&v| shape(s, v)).collect();
                let op = Op::LinearGradWeight { layout: *layout, bias: parameters.len() > 1, adds: false };
                let gradients = s.push(op, vec![inputs[0], d_pre], shapes);
                parameters.iter().zip(gradients).for_each(|(&v, g)| s.contribute(v, g));
            }
            if s.wants(inputs[0]) {
                let of = shape(s, inputs[0]);
                let op = Op::LinearGradInput { layout: *layout, activation: Activation::None, adds: false };
                let d_x = s.push_one(op, vec![d_pre, inputs[1]], of);
                s.contribute(inputs[0], d_x);
            }
        }
        Op::Activation(activation) => {
            let of = shape(s, inputs[0]);
            let d_x = s.push_one(Op::ActivationGrad(*activation), vec![d, inputs[0]], of);
            s.contribute(inputs[0], d_x);
        }
        Op::Glu(activation) => {
            let shapes = inputs.iter().map(|&v| shape(s, v)).collect();
            let d_both = s.push(Op::GluGrad(*activation), vec![d, inputs[0], inputs[1]], shapes);
            inputs.iter().zip(d_both).for_each(|(&v, g)| s.contribute(v, g));
        }
        Op::Add => {
            s.contribute(inputs[0], d);
            s.contribute(inputs[1], d);
        }
        Op::Scale(_) | Op::Dropout { .. } => {
            let of = shape(s, inputs[0]);
            let d_x = s.push_one(op.clone(), vec![d], of);
            s.contribute(inputs[0], d_x);
        }
        Op::LayerNorm { .. } => {
            let shapes = inputs.iter().map(|&v| shape(s, v)).collect();
            let d_all = s.push(Op::LayerNormGrad, vec![d, inputs[0], inputs[1], outputs[1], outputs[2]], shapes);
            inputs.iter().zip(d_all).for_each(|(&v, g)| s.contribute(v, g));
        }
        Op::RmsNorm { .. } => {
            let shapes = inputs.iter().map(|&v| shape(s, v)).collect();
            let d_all = s.push(Op::RmsNormGrad, vec![d, inputs[0], inputs[1], outputs[1]], shapes);
            inputs.iter().zip(d_all).for_each(|(&v, g)| s.contribute(v, g));
        }
        Op::Rotary(rotation) => {
            let of = shape(s, inputs[0]);
            let d_x = s.push_one(Op::Rotary(Rotation { back: !rotation.back, ..*rotation }), vec![d], of);
            s.contribute(inputs[0], d_x);
        }
        Op::Attention(kind) => {
            let tensors = if kind.packed { 1 } else { 3 };
            let shapes = inputs[..tensors].iter().map(|&v| shape(s, v)).collect();
            let mut all = vec![d, outputs[0], outputs[1]];
            all.extend_from_slice(inputs);
            let d_all = s.push(Op::AttentionGrad(*kind), all, shapes);
            inputs.iter().zip(d_all).for_each(|(&v, g)| s.contribute(v, g));
        }
        Op::Conv2d(window) => {
            if let Some(&bias) = inputs.get(2).filter(|&&b| s.wants(b)) {
                let of = shape(s, bias);
                let d_bias = s.push_one(Op::Conv2dGradBias, vec![d], of);
                s.contribute(bias, d_bias);
            }
            if s.wants(inputs[1]) {
                let of = shape(s, inputs[1]);
                let d_weight = s.push_one(Op::Conv2dGradWeight(*window), vec![d, inputs[0]], of);
                s.contribute(inputs[1], d_weight);
            }
            if s.wants(inputs[0]) {
                let of = shape(s, inputs[0]);
                let d_x = s.push_one(Op::Conv2dGradInput(*window), vec![d, inputs[1]], of);
                s.contribute(inputs[0], d_x);
            }
        }
        Op::BatchNorm { .. } => {
            let shapes = inputs.iter().map(|&v| shape(s, v)).collect();
            let d_all = s.push(Op::BatchNormGrad, vec![d, inputs[0], inputs[1], outputs[1], outputs[2]], shapes);
            inputs.iter().zip(d_all).for_each(|(&v, g)| s.contribute(v, g));
        }
        Op::MaxPool(window) => {
            let of = shape(s, inputs[0]);
            let d_x = s.push_one(Op::MaxPoolGrad(*window), vec![d, outputs[1]], of);
            s.contribute(inputs[0], d_x);
        }
        Op::AvgPool(window) => {
            let of = shape(s, inputs[0]);
            let d_x = s.push_one(Op::AvgPoolGrad(*window), vec![d], of);
            s.contribute(inputs[0], d_x);
        }
        Op::Transpose { axes } => {
            let mut inverse = vec![0; axes.len()];
            axes.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
            let of: Shape = shape(s, inputs[0]);
            let d_x = s.push_one(Op::Transpose { axes: inverse }, vec![d], of);
            s.contribute(inputs[0], d_x);
        }
        Op::Shift { by } => {
            let of = shape(s, inputs[0]);
            let d_x = s.push_one(Op::Shift { by: -by }, vec![d], of);
            s.contribute(inputs[0], d_x);
        }
        Op::Custom(custom) => {
            let name = custom.0.name();
            let gradient =
                custom.0.gradient().ok_or_else(|| Error::bad(format!("{name}: has no gradient, and one is wanted")))?;
            let mut operands = vec![d];
            operands.extend_from_slice(inputs);
            operands.extend_from_slice(outputs);
            let shapes: Vec<Shape> = inputs.iter().map(|&v| shape(s, v)).collect();
            let said = gradient.shapes(&operands.iter().map(|&v| &s.graph.info(v).shape).collect::<Vec<_>>())?;
            if said != shapes {
                let list = |shapes: &[Shape]| shapes.iter().map(Shape::to_string).collect::<Vec<_>>().join(", ");
                let (said, shapes) = (list(&said), list(&shapes));
                return Err(Error::bad(format!("{name}: its gradient's shapes are {said}, its inputs' {shapes}")));
            }
            let d_all = s.push(Op::Custom(Custom(gradient)), operands, shapes);
            inputs.iter().zip(d_all).for_each(|(&v, g)| s.contribute(v, g));
        }
        Op::Copy => s.contribute(inputs[0], d),
        other => return Err(Error::bad(format!("{}: has no gradient", other.name()))),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::DType;
    use crate::graph::{Builder, CustomOp, Init, Mode, differentiate};
    use std::sync::Arc;

    /// Hands on its first input; its gradient, where it has one, has these shapes.
    #[derive(Debug)]
    struct Odd(Option<Vec<Shape>>);

    #[derive(Debug)]
    struct OddGradient(Vec<Shape>);

    impl CustomOp for Odd {
        fn name(&self) -> &'static str {
            "odd"
        }

        fn shapes(&self, inputs: &[&Shape]) -> Result<Vec<Shape>> {
            Ok(vec![inputs[0].clone()])
        }

        fn host(&self, _: &mut [&mut [f32]], _: &[&[f32]], _: &[&Shape]) {}

        fn gradient(&self) -> Option<Arc<dyn CustomOp>> {
            self.0.clone().map(|shapes| Arc::new(OddGradient(shapes)) as Arc<dyn CustomOp>)
        }
    }

    impl CustomOp for OddGradient {
        fn name(&self) -> &'static str {
            "odd_gradient"
        }

        fn shapes(&self, _: &[&Shape]) -> Result<Vec<Shape>> {
            Ok(self.0.clone())
        }

        fn host(&self, _: &mut [&mut [f32]], _: &[&[f32]], _: &[&Shape]) {}
    }

    #[test]
    fn a_wrong_gradient_is_named_with_its_layer_and_shapes() {
        let check = |gradient: Option<Vec<Shape>>, want: &str| {
            let mut b = Builder::new(Mode::Training, DType::F32);
            let labels = b.input("labels", [2], DType::I32).unwrap();
            let logits = b.layer("middle", |b, _| {
                let weight = b.parameter("weight", [2, 3], Init::Constant(1.0))?;
                let out = b.custom(Arc::new(Odd(gradient)), vec![weight, weight])?[0];
                b.add(out, weight)
            });
            b.cross_entropy(logits.unwrap(), labels).unwrap();
            let mut graph = b.finish().unwrap();
            let found = differentiate(&mut graph).map_err(|e| e.to_string());
            assert_eq!(found.err().as_deref().unwrap_or(""), want);
        };
        let shape = Shape::from([2, 3]);
        check(Some(vec![shape.clone(); 2]), "");
        check(None, "layer middle: odd: has no gradient, and one is wanted");
        let says = "layer middle: odd: its gradient's shapes are";
        check(Some(vec![Shape::from([6]), shape.clone()]), &format!("{says} 6, 2x3, its inputs' 2x3, 2x3"));
        check(Some(vec![shape]), &format!("{says} 2x3, its inputs' 2x3, 2x3"));
    }
}
