//! Traced graphs: names and shapes are the reference files', layers are where cuts may fall, every use has a gradient.

use super::*;
use crate::base::Shape;
use crate::graph::{Activation, Graph, Init, Mode, Op, Source, differentiate};
use serde_json::json;
use std::collections::BTreeSet;

/// A reference case's graph for training, in f32.
fn traced(case: &str) -> Graph {
    let config = std::fs::read_to_string(fixture(case).join("model/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let family = config["model_type"].as_str().unwrap();
    let network = build(family, config.as_object().unwrap(), false).unwrap();
    let axes = network.inputs()[0].axes.clone();
    let inputs = match family {
        "resnet" => images([axes[0], 47, 47]),
        "vit" => images([axes[0], axes[1], axes[2]]),
        _ => text(19),
    };
    network.trace(Mode::Training, DType::F32, 6, &inputs).unwrap()
}

fn names(graph: &Graph) -> Vec<&str> {
    graph.layers.iter().map(|layer| layer.name.as_str()).collect()
}

/// Every use of a parameter has a gradient computed in the layer of the use, and every layer but the first hands one
/// on.
#[track_caller]
fn check_gradients(graph: &mut Graph) {
    differentiate(graph).unwrap();
    let uses: BTreeSet<(usize, usize)> =
        graph.parameters.iter().enumerate().flat_map(|(i, p)| p.layers.iter().map(move |&layer| (i, layer))).collect();
    let gradients: BTreeSet<_> = graph.parameter_gradients.iter().map(|g| (g.parameter, g.layer)).collect();
    assert_eq!(gradients.len(), graph.parameter_gradients.len());
    assert_eq!(uses, gradients);
    for gradient in &graph.parameter_gradients {
        let Source::Node { node, .. } = graph.info(gradient.value).source else { panic!("computed by no node") };
        let name = &graph.parameters[gradient.parameter].name;
        assert_eq!(graph.nodes[node].layer, gradient.layer, "{name}");
        assert_ne!(graph.nodes[node].op, Op::Zero, "{name}");
        // A parameter that is used under another shape has its gradient in that.
        let (found, want) = (&graph.info(gradient.value).shape, &graph.parameters[gradient.parameter].shape);
        let ones = |shape: &Shape| shape.axes().iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
        assert_eq!(ones(found), ones(want), "{name}");
    }
    assert!(graph.input_gradients[0].is_none());
    assert!(graph.input_gradients[1..].iter().all(Option::is_some));
}

#[test]
fn products_of_a_gpt2_take_what_follows_them() {
    // On 8 x 1024 ids in bf16. Dropout lies between a layer and its sum.
    for (dropout, want_residuals) in [(0.0, 24), (0.1, 0)] {
        let config = json!({"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout});
        let network = build("gpt2", config.as_object().unwrap(), false).unwrap();
        let mut graph = network.trace(Mode::Training, DType::Bf16, 8, &text(1024)).unwrap();
        differentiate(&mut graph).unwrap();
        let (mut residuals, mut slopes, mut spared) = (0, 0, 0);
        for node in &graph.nodes {
            let fused = match node.op {
                Op::Linear { residual: true, .. } => &mut residuals,
                Op::LinearGradInput { activation: Activation::GeluTanh, .. } => &mut slopes,
                _ => continue,
            };
            *fused += 1;
            // The product, written and read again.
            spared += 2 * graph.bytes(node.outputs[0]);
        }
        assert_eq!((residuals, slopes), (want_residuals, 12), "dropout {dropout}");
        let tokens = 8 * 1024;
        assert_eq!(spared, 2 * 2 * tokens * (12 * 3072 + want_residuals * 768));
        assert!(!graph.nodes.iter().any(|node| matches!(node.op, Op::ActivationGrad(_))));
    }
}

#[test]
fn names_and_shapes_are_those_of_the_files() {
    for case in CASES {
        let graph = traced(case);
        let parameters = graph.parameters.iter().map(|p| (p.name.clone(), p.shape.0.clone()));
        let states = graph.states.iter().map(|s| (s.name.clone(), s.shape.0.clone()));
        let ours: BTreeMap<_, _> = parameters.chain(states).collect();
        let file = tensors_of(case, "model/model.safetensors").into_iter();
        let theirs: BTreeMap<_, _> =
            file.filter(|(_, t)| t.element == Element::F32).map(|(name, t)| (name, t.axes)).collect();
        assert_eq!(ours, theirs, "{case}");
    }
}

#[test]
fn cuts_fall_between_halves_of_gpt2s_blocks() {
    let mut graph = traced("gpt2");
    let halves = ["embeddings", "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "h.2.attn", "h.2.mlp", "head"];
    assert_eq!(names(&graph), halves);
    for layer in &graph.layers[..7] {
        assert_eq!(graph.info(layer.output.unwrap()).shape.axes(), [6, 19, 32], "{}", layer.name);
    }
    let table = graph.parameters.iter().find(|p| p.name == "transformer.wte.weight").unwrap();
    assert_eq!(table.layers, [0, 7]);
    assert!(graph.parameters.iter().filter(|p| p.name != table.name).all(|p| p.layers.len() == 1));
    check_gradients(&mut graph);
}

#[test]
fn cuts_fall_between_halves_of_llamas_layers() {
    let mut graph = traced("llama");
    let halves = ["embeddings", "layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp", "head"];
    assert_eq!(names(&graph), halves);
    for layer in &graph.layers[..5] {
        assert_eq!(graph.info(layer.output.unwrap()).shape.axes(), [6, 19, 32], "{}", layer.name);
    }
    assert!(graph.parameters.iter().all(|p| p.layers.len() == 1));
    check_gradients(&mut graph);
    // Of a layer's seven products three add to what others of the same input gave; the sums that are left pass by the
    // norms.
    let count = |is: fn(&Op) -> bool| graph.nodes.iter().filter(|node| is(&node.op)).count();
    assert_eq!(count(|op| matches!(op, Op::LinearGradInput { adds: true, .. })), 3 * 2);
    assert_eq!(count(|op| *op == Op::Add), 2 * 2);
}

/// Qwen2's queries, keys and values alone have a bias; each head of Qwen3's queries and keys a norm before it is turned.
#[test]
fn llamas_kin_differ_in_what_they_name() {
    let names = |case: &str| {
        let mut graph = traced(case);
        check_gradients(&mut graph);
        let layer = graph.parameters.iter().filter_map(|p| p.name.strip_prefix("model.layers.1.self_attn."));
        layer.filter(|name| !name.contains("proj.weight")).map(str::to_string).collect::<Vec<_>>()
    };
    assert_eq!(names("mistral"), [""; 0]);
    assert_eq!(names("qwen2"), ["q_proj.bias", "k_proj.bias", "v_proj.bias"]);
    assert_eq!(names("qwen3"), ["q_norm.weight", "k_norm.weight"]);
    let graph = traced("qwen3");
    let turned = graph.nodes.iter().filter(|node| matches!(node.op, Op::Rotary(_)) && node.layer == 1);
    let from =
        |value: crate::graph::Value| graph.nodes.iter().find(|node| node.outputs.contains(&graph.root(value))).unwrap();
    assert!(turned.into_iter().all(|node| matches!(from(node.inputs[0]).op, Op::RmsNorm { .. })));
}

#[test]
fn cuts_fall_between_resnets_blocks() {
    let mut graph = traced("resnet");
    let blocks =
        ["stages.0.layers.0", "stages.1.layers.0", "stages.2.layers.0", "stages.2.layers.1", "stages.3.layers.0"];
    assert_eq!(names(&graph), [&["embedder"][..], &blocks, &["classifier"]].concat());
    check_gradients(&mut graph);
    check_gradients(&mut traced("resnet-basic"));
}

#[test]
fn cuts_fall_between_halves_of_encoders_layers() {
    for (case, last, [b, t, c]) in [("bert", "head", [6, 19, 32]), ("vit", "classifier", [6, 5, 24])] {
        let mut graph = traced(case);
        let halves = ["layer.0.attention", "layer.0.mlp", "layer.1.attention", "layer.1.mlp"];
        assert_eq!(names(&graph), [&["embeddings"][..], &halves, &[last]].concat());
        for layer in &graph.layers[..5] {
            assert_eq!(graph.info(layer.output.unwrap()).shape.axes(), [b, t, c], "{case}: {}", layer.name);
        }
        for p in &graph.parameters {
            let words = p.name == "bert.embeddings.word_embeddings.weight";
            assert_eq!(p.layers.len(), if words { 2 } else { 1 }, "{}", p.name);
        }
        check_gradients(&mut graph);
    }
}

/// Published sizes, by their numbers of parameters.
#[test]
fn defaults_are_the_published_models() {
    let elems = |family: &str, config: Value| {
        let network = strict(family, config).unwrap();
        network.trace(Mode::Evaluation, DType::F32, 1, &network.inputs()).unwrap().parameter_elems()
    };
    assert_eq!(elems("gpt2", json!({})), 124_439_808);
    assert_eq!(elems("gpt2", json!({ "n_embd": 1600, "n_layer": 48, "n_head": 25 })), 1_557_611_200);
    assert_eq!(elems("llama", json!({})), 6_738_415_616);
    let llama_3_8b = json!({ "vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8 });
    assert_eq!(elems("llama", llama_3_8b), 8_030_261_248);
    let llama_3_2_1b = json!({
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": true
    });
    assert_eq!(elems("llama", llama_3_2_1b), 1_235_814_400);
    assert_eq!(elems("mistral", json!({})), 7_241_732_096);
    let qwen2_5_500m = json!({
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": true
    });
    assert_eq!(elems("qwen2", qwen2_5_500m), 494_032_768);
    let qwen3_600m = json!({
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": true
    });
    assert_eq!(elems("qwen3", qwen3_600m), 596_049_920);
    assert_eq!(elems("bert", json!({})), 109_514_298);
    assert_eq!(elems("vit", json!({ "num_labels": 1000 })), 86_567_656);
    assert_eq!(elems("resnet", json!({ "num_labels": 1000 })), 25_557_032);
    let resnet18 = json!({ "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic", "num_labels": 1000 });
    assert_eq!(elems("resnet", resnet18), 11_689_512);
}

#[test]
fn gpt2s_switches_change_the_graph() {
    let small = json!({ "vocab_size": 31, "n_positions": 33, "n_embd": 12, "n_layer": 2, "n_head": 3 });
    let trace = |more: Value, mode| {
        let mut config = object(small.clone());
        config.extend(object(more));
        strict("gpt2", config.into()).unwrap().trace(mode, DType::F32, 1, &text(33)).unwrap()
    };
    let scales = |graph: &Graph| -> Vec<f64> {
        let nodes = graph.nodes.iter();
        nodes.filter_map(|n| if let Op::Attention(kind) = &n.op { Some(kind.scale) } else { None }).collect()
    };
    assert_eq!(scales(&trace(json!({}), Mode::Training)), [0.5, 0.5]);
    assert_eq!(scales(&trace(json!({ "scale_attn_weights": false }), Mode::Training)), [1.0, 1.0]);
    assert_eq!(scales(&trace(json!({ "scale_attn_by_inverse_layer_idx": true }), Mode::Training)), [0.5, 0.25]);
    let count = |graph: &Graph, is: fn(&Op) -> bool| graph.nodes.iter().filter(|n| is(&n.op)).count();
    let dropouts = |op: &Op| matches!(op, Op::Dropout { .. }) || matches!(op, Op::Attention(k) if k.dropout.is_some());
    assert_eq!(count(&trace(json!({}), Mode::Training), dropouts), 1 + 3 * 2);
    assert_eq!(count(&trace(json!({}), Mode::Evaluation), dropouts), 0);
    assert_eq!(count(&trace(json!({ "attn_pdrop": 0.0, "resid_pdrop": 0.0 }), Mode::Training), dropouts), 1);
    // Each draws numbers of its own.
    let stream = |op: &Op| match op {
        Op::Dropout { stream, .. } => Some(*stream),
        Op::Attention(kind) => kind.dropout.map(|(_, stream)| stream),
        _ => None,
    };
    let streams = |graph: &Graph| graph.nodes.iter().filter_map(|n| stream(&n.op)).collect::<BTreeSet<u32>>();
    assert_eq!(streams(&trace(json!({}), Mode::Training)).len(), 1 + 3 * 2);
    let mut untied =
        trace(json!({ "tie_word_embeddings": false, "n_inner": 7, "activation_function": "relu" }), Mode::Training);
    let shape = |name: &str| untied.parameters.iter().find(|p| p.name == name).unwrap().shape.axes().to_vec();
    assert_eq!(shape("lm_head.weight"), [31, 12]);
    assert_eq!(shape("transformer.h.1.mlp.c_fc.weight"), [12, 7]);
    check_gradients(&mut untied);
    let init = |name: &str| untied.parameters.iter().find(|p| p.name == name).unwrap().init;
    assert_eq!(init("transformer.h.1.mlp.c_fc.weight"), Init::Normal(0.02));
    assert_eq!(init("transformer.h.1.mlp.c_proj.weight"), Init::Normal(0.01));
    assert_eq!(init("transformer.h.0.attn.c_proj.weight"), Init::Normal(0.01));
    assert_eq!(init("transformer.h.0.attn.c_proj.bias"), Init::Constant(0.0));
    assert_eq!(init("transformer.ln_f.weight"), Init::Constant(1.0));
}

#[test]
fn llamas_switches_change_the_graph() {
    let small = json!({ "vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 7 });
    let trace = |more: Value| {
        let mut config = object(small.clone());
        config.extend(object(more));
        strict("llama", config.into()).unwrap().trace(Mode::Training, DType::F32, 1, &text(33)).unwrap()
    };
    let shape = |graph: &Graph, name: &str| {
        graph.parameters.iter().find(|p| p.name == name).map(|p| p.shape.axes().to_vec()).unwrap_or_default()
    };
    let attention = |graph: &Graph| {
        let nodes = graph.nodes.iter();
        nodes.filter_map(|n| if let Op::Attention(kind) = &n.op { Some(*kind) } else { None }).next().unwrap()
    };
    let mut plain = trace(json!({}));
    check_gradients(&mut plain);
    assert!(!plain.parameters.iter().any(|p| p.name.ends_with("bias")));
    assert_eq!(shape(&plain, "lm_head.weight"), [31, 12]);
    let kind = attention(&plain);
    assert_eq!((kind.heads, kind.kv_heads, kind.width, kind.scale, kind.dropout), (3, 3, 4, 0.5, None));
    let mut grouped =
        trace(json!({ "num_key_value_heads": 1, "head_dim": 6, "tie_word_embeddings": true, "pad_token_id": 2 }));
    check_gradients(&mut grouped);
    let kind = attention(&grouped);
    assert_eq!((kind.heads, kind.kv_heads, kind.width), (3, 1, 6));
    assert_eq!(shape(&grouped, "model.layers.1.self_attn.q_proj.weight"), [18, 12]);
    assert_eq!(shape(&grouped, "model.layers.1.self_attn.v_proj.weight"), [6, 12]);
    assert_eq!(shape(&grouped, "model.layers.1.self_attn.o_proj.weight"), [12, 18]);
    assert!(shape(&grouped, "lm_head.weight").is_empty());
    assert!(grouped.nodes.iter().any(|n| n.op == Op::Embedding { padding: Some(2) }));
    let biases = |more: Value| trace(more).parameters.iter().filter(|p| p.name.ends_with("bias")).count();
    assert_eq!((biases(json!({ "attention_bias": true })), biases(json!({ "mlp_bias": true }))), (4 * 2, 3 * 2));
    assert_eq!(attention(&trace(json!({ "attention_dropout": 0.1 }))).dropout.unwrap().0, 0.1);
    let gates = |graph: &Graph| {
        graph.nodes.iter().find_map(|n| if let Op::Glu(kind) = n.op { Some(kind) } else { None }).unwrap()
    };
    assert_eq!(gates(&plain), Activation::Silu);
    assert_eq!(gates(&trace(json!({ "hidden_act": "gelu" }))), Activation::GeluErf);
    let init = |name: &str| plain.parameters.iter().find(|p| p.name == name).unwrap().init;
    assert_eq!(init("model.layers.1.mlp.down_proj.weight"), Init::Normal(0.02));
    assert_eq!(init("model.norm.weight"), Init::Constant(1.0));
}

#[test]
fn encoders_switches_change_the_graph() {
    let small = json!({ "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 7 });
    let trace = |family: &str, more: Value, mode| {
        let mut config = object(small.clone());
        config.extend(object(more));
        let network = strict(family, config.into()).unwrap();
        let inputs = if family == "bert" { text(33) } else { images([3, 224, 224]) };
        network.trace(mode, DType::F32, 1, &inputs).unwrap()
    };
    let count = |graph: &Graph, is: fn(&Op) -> bool| graph.nodes.iter().filter(|n| is(&n.op)).count();
    let dropouts = |op: &Op| matches!(op, Op::Dropout { .. }) || matches!(op, Op::Attention(k) if k.dropout.is_some());
    assert_eq!(count(&trace("bert", json!({}), Mode::Training), dropouts), 1 + 3 * 2);
    assert_eq!(count(&trace("bert", json!({}), Mode::Evaluation), dropouts), 0);
    assert_eq!(count(&trace("vit", json!({}), Mode::Training), dropouts), 0);
    assert_eq!(count(&trace("vit", json!({ "hidden_dropout_prob": 0.1 }), Mode::Training), dropouts), 1 + 2 * 2);
    let padding = |graph: &Graph| {
        graph
            .nodes
            .iter()
            .find_map(|n| if let Op::Embedding { padding } = n.op { Some(padding) } else { None })
            .unwrap()
    };
    assert_eq!(padding(&trace("bert", json!({}), Mode::Training)), Some(0));
    assert_eq!(padding(&trace("bert", json!({ "pad_token_id": 7 }), Mode::Training)), Some(7));
    let biases =
        |more: Value| trace("vit", more, Mode::Training).parameters.iter().filter(|p| p.name.ends_with("bias")).count();
    assert_eq!(biases(json!({})) - biases(json!({ "qkv_bias": false })), 3 * 2);
    for mut graph in [trace("bert", json!({}), Mode::Training), trace("vit", json!({}), Mode::Training)] {
        check_gradients(&mut graph);
        let init = |part: &str| graph.parameters.iter().find(|p| p.name.contains(part)).unwrap().init;
        assert_eq!(init("layer.1.output.dense.weight"), Init::Normal(0.02));
        assert_eq!(init("layer.1.output.dense.bias"), Init::Constant(0.0));
        assert_eq!(init("position_embeddings"), Init::Normal(0.02));
    }
}

#[test]
fn resnets_switches_change_the_strides() {
    let strides = |more: Value| -> Vec<usize> {
        let mut config = object(json!({ "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2] }));
        config.extend(object(more));
        let graph = strict("resnet", config.into())
            .unwrap()
            .trace(Mode::Training, DType::F32, 2, &images([3, 33, 31]))
            .unwrap();
        graph.nodes.iter().filter_map(|n| if let Op::Conv2d(w) = &n.op { Some(w.stride) } else { None }).collect()
    };
    // The stem; a block without shortcut; a block with a stride and a shortcut; a block without.
    assert_eq!(strides(json!({})), [2, 1, 1, 1, 1, 2, 1, 2, 1, 1, 1]);
    assert_eq!(strides(json!({ "downsample_in_bottleneck": true })), [2, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1]);
    assert_eq!(strides(json!({ "downsample_in_first_stage": true })), [2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 1, 1]);
    assert_eq!(strides(json!({ "layer_type": "basic" })), [2, 1, 1, 2, 1, 2, 1, 1]);
}

#[test]
fn resnets_start_as_torch_starts_them() {
    let graph = traced("resnet");
    let init = |name: &str| graph.parameters.iter().find(|p| p.name == name).unwrap().init;
    // Variance 2 / (8 channels x 7 x 7), and a bound of 1 / sqrt(40 channels).
    assert_eq!(init("resnet.embedder.embedder.convolution.weight"), Init::Normal((2.0f64 / 392.0).sqrt()));
    assert_eq!(init("resnet.embedder.embedder.normalization.weight"), Init::Constant(1.0));
    assert_eq!(init("resnet.embedder.embedder.normalization.bias"), Init::Constant(0.0));
    assert_eq!(init("classifier.1.weight"), Init::Uniform(40f64.sqrt().recip()));
    assert_eq!(init("classifier.1.bias"), Init::Uniform(40f64.sqrt().recip()));
    assert!(graph.states.iter().all(|s| s.start == if s.name.ends_with("var") { 1.0 } else { 0.0 }));
    // 6 images of 47x47 are 24x24 after the stem's convolution.
    let updates = graph.nodes.iter().find(|n| matches!(n.op, Op::UpdateRunning { .. })).unwrap();
    assert_eq!(updates.op, Op::UpdateRunning { momentum: 0.1, count: 6 * 24 * 24 });
}

/// The largest configs that are taken trace in a moment, and nothing in them overflows.
#[test]
fn the_largest_configs_trace() {
    let wide = json!({ "vocab_size": i32::MAX, "n_positions": 1 << 24, "n_embd": 1 << 20, "n_head": 1 << 20, "n_inner": 1 << 24, "n_layer": 1024,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0 });
    let network = strict("gpt2", wide).unwrap();
    let graph = network.trace(Mode::Training, DType::F64, 1, &network.inputs()).unwrap();
    assert_eq!(graph.layers.len(), 2 + 2 * 1024);
    assert!(graph.parameter_elems() > 1 << 50);
    refused(network.trace(Mode::Training, DType::F64, 1 << 20, &network.inputs()), &["more elements than fit"]);
    let wide = json!({ "vocab_size": i32::MAX, "max_position_embeddings": 1 << 24, "hidden_size": 1 << 20, "num_attention_heads": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 1024 });
    assert_eq!(crate::nn::tensors(&*strict("bert", wide).unwrap()).unwrap().len(), 5 + 1024 * 16 + 5);
    let llama = |layers: usize| json!({ "vocab_size": i32::MAX, "max_position_embeddings": 1 << 24, "hidden_size": 1 << 20, "head_dim": 1 << 12, "num_attention_heads": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": layers });
    assert_eq!(crate::nn::tensors(&*strict("llama", llama(4)).unwrap()).unwrap().len(), 4 * 9 + 3);
    refused(crate::nn::tensors(&*strict("llama", llama(1024)).unwrap()), &["more elements than fit in memory"]);
    let wide = json!({ "image_size": 1 << 16, "patch_size": 1, "num_channels": 1 << 16, "hidden_size": 1 << 20, "num_attention_heads": 1 << 20, "intermediate_size": 1 << 24, "num_hidden_layers": 1024 });
    assert_eq!(crate::nn::tensors(&*strict("vit", wide).unwrap()).unwrap().len(), 4 + 1024 * 16 + 4);
    let (sizes, depths) = ([1 << 16; 32], [32; 32]);
    let wide = json!({ "embedding_size": 1 << 16, "hidden_sizes": sizes, "depths": depths, "layer_type": "basic" });
    assert_eq!(crate::nn::tensors(&*strict("resnet", wide).unwrap()).unwrap().len(), (1024 * 2 + 31 + 1) * 5 + 2);
}

#[test]
fn masks_reach_attention() {
    let one = json!({ "num_hidden_layers": 1 });
    for (family, config) in [("gpt2", json!({ "n_layer": 1 })), ("llama", one.clone()), ("bert", one)] {
        let network = strict(family, config).unwrap();
        let mut inputs = text(5);
        inputs.push(InputShape::new("attention_mask", [5], DType::I32));
        let mut graph = network.trace(Mode::Training, DType::F64, 2, &inputs).unwrap();
        assert!(graph.nodes.iter().any(|n| matches!(&n.op, Op::Attention(kind) if kind.masked)));
        check_gradients(&mut graph);
    }
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let gpt2 = strict("gpt2", json!({ "n_layer": 1, "n_positions": 33 })).unwrap();
    let bert = strict("bert", json!({ "num_hidden_layers": 1, "max_position_embeddings": 33 })).unwrap();
    let vit = strict("vit", json!({ "num_hidden_layers": 1, "image_size": 33 })).unwrap();
    let resnet = strict("resnet", json!({ "depths": [1, 1, 1, 1] })).unwrap();
    let check = |network: &dyn Network, batch, inputs: &[InputShape], parts: &[&str]| {
        refused(network.trace(Mode::Training, DType::F32, batch, inputs), parts);
    };
    check(&*gpt2, 1, &text(34), &["context of 34", "n_positions, 33"]);
    check(&*bert, 1, &text(34), &["context of 34", "max_position_embeddings, 33"]);
    let llama = strict("llama", json!({ "num_hidden_layers": 1, "max_position_embeddings": 33 })).unwrap();
    check(&*llama, 1, &text(34), &["context of 34", "max_position_embeddings, 33"]);
    // Attention within a window is what a shorter context has anyway.
    let windows = [
        ("mistral", json!({}), Some(4096)),
        ("mistral", json!({ "sliding_window": null }), None),
        ("mistral", json!({ "sliding_window": 33 }), Some(33)),
        ("qwen2", json!({ "sliding_window": 33 }), None),
        ("qwen2", json!({ "sliding_window": 33, "use_sliding_window": true }), None),
        ("qwen2", json!({ "sliding_window": 33, "use_sliding_window": true, "max_window_layers": 0 }), Some(33)),
        (
            "qwen3",
            json!({ "sliding_window": 33, "use_sliding_window": true, "layer_types": ["sliding_attention"] }),
            Some(33),
        ),
        ("qwen3", json!({ "use_sliding_window": true, "layer_types": ["full_attention"] }), None),
    ];
    for (family, mut config, window) in windows {
        config["num_hidden_layers"] = json!(1);
        let network = strict(family, config).unwrap();
        let (key, most) = match window {
            Some(window) => ("sliding_window", window),
            None => ("max_position_embeddings", if family == "mistral" { 131_072 } else { 32_768 }),
        };
        assert_eq!(network.inputs()[0].axes, [most]);
        assert!(network.trace(Mode::Training, DType::F32, 1, &text(most)).is_ok());
        check(&*network, 1, &text(most + 1), &[&format!("context of {}", most + 1), &format!("{key}, {most}")]);
    }
    check(&*vit, 2, &images([3, 33, 32]), &["[3, 33, 32]", "image_size: [3, 33, 33]"]);
    let one = strict("vit", json!({ "num_labels": 1, "image_size": 32 })).unwrap();
    check(&*one, 2, &images([3, 32, 32]), &["labels", "regression"]);
    check(&*gpt2, 0, &text(33), &["one sample"]);
    check(&*gpt2, 1, &text(0), &["input_ids", "is 0"]);
    check(&*gpt2, 1, &text(5)[1..], &["input_ids", "missing"]);
    check(&*gpt2, 1, &[text(5), text(5)].concat(), &["input_ids", "twice"]);
    check(&*gpt2, 1, &[InputShape::new("input_id", [5], DType::I32)], &["\"input_id\"", "did you mean input_ids"]);
    check(&*gpt2, 1, &[InputShape::new("input_ids", [5], DType::F32)], &["input_ids: is f32, want i32"]);
    check(&*gpt2, 1, &[InputShape::new("input_ids", [5, 5], DType::I32)], &["5x5", "1 axes"]);
    check(&*gpt2, 1, &[text(5)[0].clone(), text(6)[1].clone()], &["labels", "is 6, want 5"]);
    check(&*gpt2, usize::MAX, &text(33), &["more elements than fit"]);
    check(&*resnet, 2, &images([1, 64, 64]), &["1 channels", "num_channels, 3"]);
    check(&*resnet, 2, &[InputShape::new("pixel_values", [3, 64, 64], DType::I32)], &["is i32, want f32"]);
    check(&*resnet, 2, &images([3, usize::MAX, 64]), &["more elements than fit"]);
    // One value a channel in the last stage: torch refuses it too.
    check(&*resnet, 1, &images([3, 32, 32]), &["stages.3.layers.0", "one value a channel"]);
    let one = strict("resnet", json!({ "num_labels": 1 })).unwrap();
    check(&*one, 2, &images([3, 64, 64]), &["labels", "regression"]);
}
