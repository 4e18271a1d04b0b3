//! Configs: what is taken, what is refused and in which words, and that nothing makes a trace panic.

use super::*;
use crate::graph::{Activation, Mode, Op, RotaryScaling};
use proptest::prelude::*;
use serde_json::json;

#[test]
fn values_that_are_not_supported_are_named() {
    let gpt2 = |config: Value, parts: &[&str]| {
        let message = refused(strict("gpt2", config), parts);
        assert!(message.starts_with("gpt2 config: "), "{message}");
    };
    gpt2(json!({ "n_embed": 64 }), &["n_embed", "did you mean n_embd?"]);
    gpt2(json!({ "zzzzzzzzzzzz": 64 }), &["zzzzzzzzzzzz", ", only ", "n_layer"]);
    gpt2(json!({ "hidden_size": 64 }), &["hidden_size", "write it as n_embd"]);
    gpt2(json!({ "n_ctx": 64 }), &["n_ctx", "is 64, n_positions 1024"]);
    gpt2(json!({ "n_layer": 0 }), &["n_layer", "from 1 to 1024", "got 0"]);
    gpt2(json!({ "n_layer": -1 }), &["n_layer", "got -1"]);
    gpt2(json!({ "n_layer": 1.5 }), &["n_layer", "got 1.5"]);
    gpt2(json!({ "n_layer": "12" }), &["n_layer", "got \"12\""]);
    gpt2(json!({ "n_layer": null }), &["n_layer", "is null"]);
    gpt2(json!({ "n_layer": 1_000_000 }), &["n_layer", "got 1000000"]);
    gpt2(json!({ "vocab_size": u64::MAX }), &["vocab_size", "18446744073709551615"]);
    gpt2(json!({ "n_embd": 10, "n_head": 3 }), &["n_embd", "10 is no multiple of n_head, 3"]);
    gpt2(json!({ "n_inner": [] }), &["n_inner", "got []"]);
    gpt2(json!({ "activation_function": "mish" }), &["activation_function", "\"mish\"", "gelu_new, gelu"]);
    gpt2(json!({ "activation_function": 1 }), &["activation_function", "1 is not supported"]);
    gpt2(json!({ "resid_pdrop": 1.0 }), &["resid_pdrop", "below 1", "got 1.0"]);
    gpt2(json!({ "attn_pdrop": -0.1 }), &["attn_pdrop"]);
    gpt2(json!({ "embd_pdrop": "0.1" }), &["embd_pdrop"]);
    gpt2(json!({ "layer_norm_epsilon": 0 }), &["layer_norm_epsilon"]);
    gpt2(json!({ "initializer_range": -1 }), &["initializer_range"]);
    gpt2(json!({ "tie_word_embeddings": 1 }), &["tie_word_embeddings", "true or false"]);
    gpt2(json!({ "add_cross_attention": true }), &["add_cross_attention", "not supported"]);
    gpt2(json!({ "model_type": "resnet" }), &["model_type", "resnet", "gpt2"]);
    gpt2(json!({ "n_head": "x".repeat(10_000) }), &["n_head", "..."]);
    let resnet = |config: Value, parts: &[&str]| {
        refused(strict("resnet", config), parts);
    };
    resnet(json!({ "hidden_sizes": [] }), &["hidden_sizes", "1 to 32"]);
    resnet(json!({ "hidden_sizes": [8, 0] }), &["hidden_sizes", "got 0"]);
    resnet(json!({ "hidden_sizes": 8 }), &["hidden_sizes", "a list"]);
    resnet(json!({ "hidden_sizes": [3], "depths": [1] }), &["hidden_sizes", "3 is too few"]);
    resnet(json!({ "depths": [1, 2] }), &["depths", "2 stages, hidden_sizes 4"]);
    resnet(json!({ "depths": [1024, 1, 1, 1] }), &["depths", "1027 blocks"]);
    resnet(json!({ "layer_type": "wide" }), &["layer_type", "\"wide\"", "bottleneck, basic"]);
    resnet(json!({ "hidden_act": "mish" }), &["hidden_act", "\"mish\""]);
    resnet(json!({ "id2label": {} }), &["id2label"]);
    resnet(json!({ "id2label": ["a"] }), &["id2label"]);
    resnet(json!({ "id2label": { "0": "a" }, "num_labels": 2 }), &["num_labels", "is 2", "names 1"]);
    resnet(json!({ "problem_type": "regression" }), &["problem_type", "regression"]);
    resnet(json!({ "depth": [1] }), &["depth", "did you mean depths?"]);
    let bert = |config: Value, parts: &[&str]| {
        refused(strict("bert", config), parts);
    };
    bert(json!({ "n_layer": 3 }), &["n_layer", ", only ", "num_hidden_layers"]);
    bert(json!({ "hidden_size": 100 }), &["hidden_size", "100 is no multiple of num_attention_heads, 12"]);
    bert(json!({ "vocab_size": 31, "pad_token_id": 31 }), &["pad_token_id", "from 0 to 30"]);
    bert(json!({ "is_decoder": true }), &["is_decoder", "not supported"]);
    bert(json!({ "add_cross_attention": true }), &["add_cross_attention", "not supported"]);
    bert(json!({ "tie_word_embeddings": false }), &["tie_word_embeddings", "not supported"]);
    bert(json!({ "position_embedding_type": "relative_key" }), &["position_embedding_type", "only absolute"]);
    bert(json!({ "layer_norm_eps": 0 }), &["layer_norm_eps", "above 0"]);
    let vit = |config: Value, parts: &[&str]| {
        refused(strict("vit", config), parts);
    };
    vit(json!({ "patch_size": 225 }), &["patch_size", "225 is over image_size, 224"]);
    vit(json!({ "image_size": [224, 224] }), &["image_size", "a whole number"]);
    vit(json!({ "num_attention_heads": 7 }), &["hidden_size", "no multiple of num_attention_heads, 7"]);
    vit(json!({ "problem_type": "regression" }), &["problem_type", "regression"]);
    vit(json!({ "num_label": 3 }), &["num_label", "is no key that is known here"]);
    let llama = |config: Value, parts: &[&str]| {
        refused(strict("llama", config), parts);
    };
    llama(json!({ "hidden_size": 100 }), &["hidden_size", "100 is no multiple of num_attention_heads, 32"]);
    llama(json!({ "hidden_size": 96 }), &["head_dim", "is 3", "even"]);
    llama(json!({ "head_dim": 5 }), &["head_dim", "is 5", "even"]);
    llama(json!({ "num_key_value_heads": 5 }), &["num_key_value_heads", "5 do not divide num_attention_heads, 32"]);
    llama(json!({ "pad_token_id": 32000 }), &["pad_token_id", "from 0 to 31999"]);
    llama(json!({ "rope_theta": 0 }), &["rope_theta", "above 0"]);
    llama(json!({ "rope_scaling": [] }), &["rope_scaling", "want an object, got []"]);
    llama(
        json!({ "rope_scaling": { "rope_type": "longrope" } }),
        &["rope_scaling: rope_type", "\"longrope\"", "linear, llama3, yarn"],
    );
    llama(json!({ "rope_scaling": { "type": "dynamic" } }), &["rope_scaling: type", "\"dynamic\""]);
    llama(json!({ "rope_scaling": { "type": "linear" } }), &["rope_scaling: factor", "is missing"]);
    llama(json!({ "rope_scaling": { "type": "linear", "factor": 0.5 } }), &["rope_scaling: factor", "got 0.5"]);
    llama(json!({ "rope_scaling": {}, "rope_parameters": {} }), &["rope_scaling", "rope_parameters is there too"]);
    llama(
        json!({ "rope_parameters": { "rope_thata": 1.0 } }),
        &["rope_parameters: rope_thata", "did you mean rope_theta?"],
    );
    llama(json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } }), &["partial_rotary_factor", "not supported"]);
    let scaling = |key: &str, value: Value| {
        let mut scaling = llama_3_2_scaling();
        scaling[key] = value;
        json!({ "rope_scaling": scaling })
    };
    llama(
        scaling("original_max_position_embeddings", Value::Null),
        &["original_max_position_embeddings", "is missing"],
    );
    llama(scaling("low_freq_factor", json!(4.0)), &["low_freq_factor", "is 4, high_freq_factor 4"]);
    let yarn = |key: &str, value: Value| {
        let mut yarn = yarn_scaling();
        yarn[key] = value;
        json!({ "rope_scaling": yarn })
    };
    llama(yarn("factor", json!(0.5)), &["factor", "got 0.5"]);
    llama(yarn("original_max_position_embeddings", Value::Null), &["original_max_position_embeddings", "is missing"]);
    llama(yarn("beta_fast", json!(1)), &["beta_slow", "is 1, beta_fast 1; want it below"]);
    for factor in [0, -1] {
        llama(yarn("attention_factor", json!(factor)), &["attention_factor", "above 0", &format!("got {factor}")]);
    }
    llama(yarn("rope_theta", json!(1)), &["rope_theta", "is 1; yarn wants it above 1"]);
    llama(yarn("truncate", json!("no")), &["truncate", "true or false"]);
    refused(strict("mistral", json!({ "mlp_bias": true })), &["mlp_bias", "is no key that is known here"]);
    refused(strict("mistral", json!({ "sliding_window": 0 })), &["sliding_window", "from 1 to"]);
    let qwen3 = |config: Value, parts: &[&str]| {
        refused(strict("qwen3", config), parts);
    };
    qwen3(json!({ "head_dim": null }), &["head_dim", "is null"]);
    qwen3(json!({ "num_attention_heads": 16 }), &["num_key_value_heads", "32 do not divide num_attention_heads, 16"]);
    qwen3(json!({ "layer_types": ["full_attention"] }), &["layer_types", "want 32 of"]);
    qwen3(json!({ "num_hidden_layers": 1, "layer_types": ["flat"] }), &["layer_types", "sliding_attention"]);
    let slides = json!({ "num_hidden_layers": 1, "layer_types": ["sliding_attention"] });
    qwen3(slides, &["layer_types", "use_sliding_window is false"]);
    refused(
        strict("gtp2", json!({})),
        &["'gtp2'", "gpt2, llama, mistral, qwen2, qwen3, resnet, bert, vit", "did you mean gpt2?"],
    );
    refused(strict("", json!({})), &["''", "gpt2, llama, mistral, qwen2, qwen3, resnet, bert, vit"]);
}

/// As meta-llama/Llama-3.2-1B has it.
fn llama_3_2_scaling() -> Value {
    json!({ "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3" })
}

/// As Qwen2.5's card advises.
fn yarn_scaling() -> Value {
    json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 })
}

/// Both forms of the rotary angles, read to one network and written so that either transformers reads it.
#[test]
fn llamas_rotary_angles_have_two_forms() {
    let of = |config: Value| {
        let network = strict("llama", config).unwrap();
        let graph = network.trace(Mode::Training, DType::F32, 1, &text(9)).unwrap();
        let rotary =
            graph.nodes.iter().find_map(|n| if let Op::Rotary(r) = n.op { Some((r.base, r.scaling)) } else { None });
        (rotary.unwrap(), network.config())
    };
    let mut newer = llama_3_2_scaling();
    newer["rope_theta"] = json!(500_000.0);
    let one = json!({ "num_hidden_layers": 1 });
    let with = |more: Value| {
        let mut config = object(one.clone());
        config.extend(object(more));
        Value::Object(config)
    };
    let (first, older) = of(with(json!({ "rope_theta": 500_000.0, "rope_scaling": llama_3_2_scaling() })));
    let (second, newer) = of(with(json!({ "rope_parameters": newer })));
    let want = RotaryScaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, positions: 8192 };
    assert_eq!((first, second), ((500_000.0, want), (500_000.0, want)));
    assert_eq!(older["rope_scaling"], llama_3_2_scaling());
    assert!(newer.get("rope_scaling").is_none() && newer.get("rope_theta").is_none());
    let (plain, config) = of(with(json!({ "rope_scaling": null })));
    assert_eq!((plain, &config["rope_theta"]), ((10_000.0, RotaryScaling::None), &json!(10_000.0)));
    let (linear, config) = of(with(json!({ "rope_scaling": { "type": "linear", "factor": 4 } })));
    assert_eq!(linear, (10_000.0, RotaryScaling::Linear { factor: 4.0 }));
    assert_eq!(config["rope_scaling"], json!({ "type": "linear", "factor": 4 }), "as it was given");
    let yarn = |more: Value| {
        let mut yarn = object(yarn_scaling());
        yarn.extend(object(more));
        match of(with(json!({ "rope_scaling": yarn }))).0 {
            (10_000.0, RotaryScaling::Yarn { factor: 4.0, low, high, positions: 32768, whole, stretch }) => {
                (low, high, whole, stretch)
            }
            other => panic!("{other:?}"),
        }
    };
    let sharper = |scale: f64| 1.0 + 0.1 * scale * 4f64.ln();
    let nothing = json!({ "beta_fast": null, "beta_slow": 0, "mscale": 0.7, "attention_factor": null });
    for left_out in [json!({}), nothing] {
        assert_eq!(yarn(left_out), (1.0, 32.0, true, sharper(1.0)));
    }
    let deep = json!({ "mscale": 1.0, "mscale_all_dim": 0.707, "truncate": false, "beta_fast": 64, "beta_slow": 2 });
    assert_eq!(yarn(deep), (2.0, 64.0, false, sharper(1.0) / sharper(0.707)));
    assert_eq!(yarn(json!({ "attention_factor": 1.5 })), (1.0, 32.0, true, 1.5));
    // Four times the first training's context, whatever max_position_embeddings says.
    let scaling = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8 });
    let network = strict("qwen2", with(json!({ "max_position_embeddings": 8, "rope_scaling": scaling }))).unwrap();
    assert!(network.trace(Mode::Training, DType::F32, 1, &text(32)).is_ok());
    refused(network.trace(Mode::Training, DType::F32, 1, &text(33)), &["max_position_embeddings"]);
}

#[test]
fn files_may_hold_more_than_jobs() {
    let more = object(json!({ "embd_drop": 0.1 }));
    assert!(build("gpt2", &more, false).is_ok());
    refused(build("gpt2", &more, true), &["embd_drop", "did you mean embd_pdrop?"]);
    assert!(strict("gpt2", json!({ "n_ctx": 64, "n_positions": 64 })).is_ok());
    // A config.json copied into a job is no mistake.
    for case in CASES {
        let text = std::fs::read_to_string(fixture(case).join("model/config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        strict(config["model_type"].as_str().unwrap(), config.clone()).unwrap();
    }
}

#[test]
fn a_networks_config_describes_it() {
    let configs = [
        ("gpt2", json!({})),
        (
            "gpt2",
            json!({ "n_inner": 7, "activation_function": "gelu", "bos_token_id": 5, "tie_word_embeddings": false }),
        ),
        ("llama", json!({})),
        (
            "llama",
            json!({ "num_key_value_heads": 4, "head_dim": 6, "tie_word_embeddings": true, "mlp_bias": true, "rope_scaling": llama_3_2_scaling() }),
        ),
        ("mistral", json!({})),
        ("mistral", json!({ "sliding_window": null, "num_key_value_heads": null })),
        ("qwen2", json!({})),
        ("qwen3", json!({ "attention_bias": true, "use_sliding_window": true, "sliding_window": 7 })),
        ("bert", json!({})),
        ("bert", json!({ "pad_token_id": null, "hidden_act": "relu", "type_vocab_size": 1 })),
        ("vit", json!({})),
        ("vit", json!({ "num_labels": 7, "qkv_bias": false, "patch_size": 33 })),
        ("resnet", json!({})),
        ("resnet", json!({ "num_labels": 7, "layer_type": "basic", "torch_dtype": "float16" })),
        ("resnet", json!({ "id2label": { "0": "cat", "1": "dog", "2": "cow" }, "architectures": ["ResNetModel"] })),
    ];
    for (family, given) in configs {
        let network = strict(family, given.clone()).unwrap();
        let config = network.config();
        let again = strict(family, config.clone()).unwrap();
        assert_eq!(config, again.config(), "{given}");
        let shapes = |network: &dyn Network| crate::nn::tensors(network).unwrap();
        assert_eq!(shapes(&*network), shapes(&*again), "{given}");
        assert_eq!(network.labels(), again.labels());
        assert_eq!((&config["model_type"], &config["dtype"]), (&json!(family), &json!("float32")));
        assert!(config.get("num_labels").is_none() && config.get("torch_dtype").is_none());
        if family == "vit" {
            assert_eq!(config["id2label"].as_object().unwrap().len(), network.labels().classes);
        }
        if family == "resnet" {
            assert_eq!(config["id2label"].as_object().unwrap().len(), network.labels().classes);
            assert_eq!(config["architectures"], json!(["ResNetForImageClassification"]));
        }
    }
    assert_eq!(strict("resnet", json!({})).unwrap().labels().classes, 2);
    let labels = strict("gpt2", json!({ "vocab_size": 31 })).unwrap().labels();
    assert_eq!(labels, crate::nn::Labels { shift: true, classes: 31, vocab: Some(31) });
}

#[test]
fn settings_are_what_a_family_reads() {
    for (family, read) in [
        ("gpt2", json!({ "n_embd": 8, "n_head": 2, "n_inner": null })),
        ("llama", json!({ "rope_parameters": { "rope_theta": 7.0, "rope_type": "default" }, "pad_token_id": 3 })),
        ("mistral", json!({ "sliding_window": 99 })),
        ("qwen2", json!({ "use_sliding_window": true, "max_window_layers": 3 })),
        ("bert", json!({ "pad_token_id": null, "is_decoder": false })),
        ("vit", json!({ "id2label": { "0": "cat" } })),
        ("resnet", json!({ "layer_type": "basic" })),
    ] {
        let mut given = object(read.clone());
        let rest = [("return_dict", json!(false)), ("task_specific_params", json!({})), ("noise", json!(1))];
        given.extend(rest.iter().map(|(key, value)| (key.to_string(), value.clone())));
        let config = build(family, &given, false).unwrap().config();
        let settings = object(crate::nn::settings(&config));
        assert!(read.as_object().unwrap().iter().all(|(key, value)| settings.get(key) == Some(value)), "{settings:?}");
        let others = ["noise", "return_dict", "task_specific_params", "dtype", "architectures", "model_type"];
        assert!(others.iter().all(|key| config.get(key).is_some() && !settings.contains_key(*key)), "{settings:?}");
        // What is left out of them is left out of the network.
        let left = build(family, &settings, true).unwrap();
        assert_eq!(
            crate::nn::tensors(&*left).unwrap(),
            crate::nn::tensors(&*build(family, &given, false).unwrap()).unwrap()
        );
    }
    let foreign = json!({ "model_type": "abacus", "beads": 10 });
    assert_eq!(crate::nn::settings(&foreign), foreign);
}

/// In transformers `hidden_act` is what follows the stem and the sums; ResNetConvLayer has ReLU unless it is told
/// otherwise, and blocks do not.
#[test]
fn a_resnets_activation_follows_the_stem_and_the_sums() {
    for (layer_type, inner) in [("basic", 1), ("bottleneck", 2)] {
        let config =
            json!({ "hidden_act": "gelu", "layer_type": layer_type, "depths": [2, 1], "hidden_sizes": [8, 16] });
        let network = strict("resnet", config).unwrap();
        let graph = network.trace(Mode::Evaluation, crate::base::DType::F32, 1, &network.inputs()).unwrap();
        let count = |kind| graph.nodes.iter().filter(|node| node.op == Op::Activation(kind)).count();
        assert_eq!((count(Activation::GeluErf), count(Activation::Relu)), (1 + 3, 3 * inner), "{layer_type}");
    }
}

/// What may stand where a value is expected; small numbers most often, so that many configs are taken.
fn hostile() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        8 => (0u64..9).prop_map(|n| json!(n)),
        1 => any::<i64>().prop_map(|n| json!(n)),
        1 => any::<u64>().prop_map(|n| json!(n)),
        1 => any::<f64>().prop_map(|x| json!(x)),
        1 => (0.0f64..1.0).prop_map(|x| json!(x)),
    ];
    let leaf = prop_oneof![
        8 => number,
        1 => any::<bool>().prop_map(|b| json!(b)),
        1 => prop_oneof!["relu", "gelu", "basic", "bottleneck", ".{0,8}"].prop_map(|s| json!(s)),
        1 => Just(Value::Null),
    ];
    prop_oneof![
        5 => leaf.clone(),
        2 => prop::collection::vec(leaf.clone(), 0..5).prop_map(|list| json!(list)),
        1 => prop::collection::hash_map("[0-9]", leaf, 0..3).prop_map(|map| json!(map)),
    ]
}

fn hostile_config(family: &str) -> impl Strategy<Value = Map<String, Value>> + use<> {
    let mut keys: Vec<String> = object(strict(family, json!({})).unwrap().config()).keys().cloned().collect();
    keys.retain(|key| key != "model_type");
    keys.extend(["num_labels".into(), "n_inner".into(), "problem_type".into(), "noise".into()]);
    prop::collection::vec((prop::sample::select(keys), hostile()), 0..6).prop_map(|pairs| pairs.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever a config holds, it is refused as bad input, or traces or is refused by shape.
    #[test]
    fn hostile_configs_do_no_harm(
        (family, config) in prop_oneof![
            hostile_config("gpt2").prop_map(|config| ("gpt2", config)),
            hostile_config("llama").prop_map(|config| ("llama", config)),
            hostile_config("mistral").prop_map(|config| ("mistral", config)),
            hostile_config("qwen3").prop_map(|config| ("qwen3", config)),
            hostile_config("bert").prop_map(|config| ("bert", config)),
            hostile_config("vit").prop_map(|config| ("vit", config)),
            hostile_config("resnet").prop_map(|config| ("resnet", config)),
        ],
        strictly in any::<bool>(),
        size in 1usize..40,
    ) {
        match build(family, &config, strictly) {
            Err(Error::BadInput(message)) => prop_assert!(!message.contains('\n') && message.len() < 1000),
            Err(other) => prop_assert!(false, "{}", other),
            Ok(network) => {
                let inputs =
                    if network.labels().vocab.is_some() { text(size) } else { images([network.inputs()[0].axes[0], size, size]) };
                for mode in [Mode::Training, Mode::Evaluation] {
                    let traced = network.trace(mode, DType::F32, 2, &inputs);
                    prop_assert!(matches!(traced, Ok(_) | Err(Error::BadInput(_))));
                }
                prop_assert!(crate::nn::tensors(&*network).is_ok());
                prop_assert_eq!(&build(family, &object(network.config()), false).unwrap().config(), &network.config());
            }
        }
    }
}
