"""Writes tests/fixtures/{mistral,qwen2,qwen3}: what PyTorch and transformers make of small models of these families.

   python scripts/make_fixtures.py [OUT]        needs torch, transformers, safetensors

A case is model/ (config.json, model.safetensors), batches.safetensors (step, batch, token), expected.safetensors (the first
batch's logits, the loss of each AdamW step, `after.*`: the weights after the last) and case.json. Expected numbers are computed
in f64; a tolerance is twenty times the distance from them at which PyTorch's own run in f32 ends up, or the least given here."""
import copy, json, pathlib, sys, tempfile
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SEED, STEPS = 20261130, 6
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


def train(model, ids, dtype):
    """Logits of the first batch, the loss of each step, the weights after the last."""
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        logits = model(input_ids=ids[0]).logits
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses = []
    for step in ids:
        loss = model(input_ids=step, labels=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with tempfile.TemporaryDirectory() as folder:     # names as a file has them
        model.save_pretrained(folder)
        weights = load_file(folder + "/model.safetensors")
    return {"logits": logits, "losses": torch.tensor(losses, dtype=torch.float64)} | {"after." + name: w for name, w in weights.items()}


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures")
    torch.manual_seed(SEED)
    for name, model, batch, tokens in cases():
        with torch.no_grad():                         # no bias is 0 and no norm is 1: a tensor in another's place must show
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        ids = torch.randint(0, model.config.vocab_size, (STEPS, batch, tokens))
        want, torch32 = train(model, ids, torch.float64), train(model, ids, torch.float32)
        off = {"logits": 0.0, "losses": 0.0, "weights": 0.0}
        for key, value in want.items():
            kind = "weights" if key.startswith("after.") else key
            off[kind] = max(off[kind], float((torch32[key].double() - value.double()).norm() / value.double().norm()))
        folder = out / name
        model.save_pretrained(folder / "model")
        (folder / "model" / "generation_config.json").unlink(missing_ok=True)
        save_file({"input_ids": ids, "labels": ids.clone()}, folder / "batches.safetensors")
        save_file({key: value.float().contiguous() for key, value in want.items()}, folder / "expected.safetensors")
        case = {"kind": "lm", "steps": STEPS, **ADAMW, "losses": want["losses"].tolist(), "pytorch_f32_distance": off,
                "tolerance": {kind: max(20 * found, LEAST[kind]) for kind, found in off.items()}}
        (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
        print(name, off)


main()
