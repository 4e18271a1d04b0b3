"""Writes tests/fixtures/{mistral,qwen2,qwen3,yarn}: what PyTorch and transformers make of small models of these families; and
tests/fixtures/low-rank, what peft makes of two that are there.

   python scripts/make_fixtures.py        needs torch, transformers, peft, safetensors; run it at the top of the repository

A case is model/ (config.json, model.safetensors), batches.safetensors (step, batch, token), expected.safetensors (the first
batch's logits, the loss of each AdamW step, `after.*`: the weights after the last) and case.json. Expected numbers are computed
in f64, but for the loss, which transformers takes in f32; a tolerance is twenty times the distance from them at which PyTorch's own run in f32 ends up, or the least given here.

low-rank has a file a model, with adapters `before.*` the first step and `after.*` the last, `losses`, and `merged.*`: the weights
with the adapters in them. Its batches are those of the model's own case."""
import copy, json, pathlib, tempfile
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

OUT, SEED, STEPS = pathlib.Path("tests/fixtures"), 20261130, 6
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.01}
LEAST = {"logits": 2e-6, "losses": 2e-6, "weights": 1e-5}
SIZES = {"num_hidden_layers": 2, "intermediate_size": 76, "max_position_embeddings": 32}


def cases():
    """Name, model, samples a batch, tokens a sample."""
    # As many tokens as the window has: all that a longer window would see.
    yield "mistral", MistralForCausalLM(MistralConfig(vocab_size=71, hidden_size=32, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=19, **SIZES)), 2, 19
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(vocab_size=73, hidden_size=36, num_attention_heads=6,
        num_key_value_heads=2, **SIZES)), 3, 15
    # Heads that are together wider than the model, and a tied head.
    yield "qwen3", Qwen3ForCausalLM(Qwen3Config(vocab_size=79, hidden_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, **SIZES)), 2, 17
    # Of the four pairs of a head the first turns as it did, the last a fourth as fast, the others something between.
    yield "yarn", Qwen2ForCausalLM(Qwen2Config(vocab_size=73, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.2,
                         "original_max_position_embeddings": 16}, **SIZES)), 2, 31


def train(model, ids, dtype):
    """Logits of the first batch, the loss of each step; the model is changed."""
    model.to(dtype)
    with torch.no_grad():
        logits = model(input_ids=ids[0]).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    losses = []
    for step in ids:
        loss = model(input_ids=step, labels=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"logits": logits, "losses": torch.tensor(losses, dtype=torch.float64)}


def train_whole(model, ids, dtype):
    model = copy.deepcopy(model)
    out = train(model, ids, dtype)
    with tempfile.TemporaryDirectory() as folder:     # names as a file has them
        model.save_pretrained(folder)
        weights = load_file(folder + "/model.safetensors")
    return out | {"after." + name: w for name, w in weights.items()}


def adapters(model):
    names = ((name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace(".default", ""): p.detach().clone() for name, p in names}


def low_rank(name, targets, scale, other_way):
    """Trains rank 3 adapters beside the model of a case that is there."""
    folder = OUT / name
    ids = load_file(folder / "batches.safetensors")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=3 * scale, target_modules=targets, lora_dropout=0.0,
                                            fan_in_fan_out=other_way), autocast_adapter_dtype=False)
    with torch.no_grad():                             # B too is not 0: all of it must show from the first loss on
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((0.2 * torch.randn_like(parameter)).float())
    before = adapters(model)
    out = train(model, ids, torch.float64)
    after = adapters(model)
    layers = {key.removesuffix(".lora_A.weight") for key in after if key.endswith(".lora_A.weight")}
    whole = model.merge_and_unload().state_dict()
    tensors = {"losses": out["losses"]} | {"before." + key: value for key, value in before.items()}
    tensors |= {"after." + key: value for key, value in after.items()}
    tensors |= {f"merged.{layer}.weight": whole[layer + ".weight"] for layer in layers}
    tensors = {key: value.float().contiguous() for key, value in tensors.items()}
    (OUT / "low-rank").mkdir(exist_ok=True)
    settings = {"rank": "3", "alpha": str(3 * scale), "targets": json.dumps(targets)}
    save_file(tensors, OUT / "low-rank" / f"{name}.safetensors", metadata=settings)
    print("low-rank", name, len(layers), out["losses"].tolist())


def main():
    torch.manual_seed(SEED)
    for name, model, batch, tokens in cases():
        with torch.no_grad():                         # no bias is 0 and no norm is 1: a tensor in another's place must show
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        ids = torch.randint(0, model.config.vocab_size, (STEPS, batch, tokens))
        want, torch32 = train_whole(model, ids, torch.float64), train_whole(model, ids, torch.float32)
        off = {"logits": 0.0, "losses": 0.0, "weights": 0.0}
        for key, value in want.items():
            kind = "weights" if key.startswith("after.") else key
            off[kind] = max(off[kind], float((torch32[key].double() - value.double()).norm() / value.double().norm()))
        folder = OUT / name
        model.save_pretrained(folder / "model")
        (folder / "model" / "generation_config.json").unlink(missing_ok=True)
        save_file({"input_ids": ids, "labels": ids.clone()}, folder / "batches.safetensors")
        save_file({key: value.float().contiguous() for key, value in want.items()}, folder / "expected.safetensors")
        case = {"kind": "lm", "steps": STEPS, **ADAMW, "losses": want["losses"].tolist(), "pytorch_f32_distance": off,
                "tolerance": {kind: max(20 * found, LEAST[kind]) for kind, found in off.items()}}
        (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
        print(name, off)
    # Products before an activation, before a residual, and whose weights lie the other way around; and one of scale 1.
    low_rank("gpt2", ["c_attn", "c_fc", "c_proj"], 2.5, True)
    low_rank("llama", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"], 1.0, False)


main()
