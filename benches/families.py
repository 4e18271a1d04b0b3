"""Training steps of PyTorch on the CPU, eager, of the same models: the peer of families.rs.

Usage: python families.py SIZES CONFIG, both JSON: {"family", "batch", "size", "threads", "steps"} and the keys of config.json.
Prints the seconds of each step. Images lie channels last, which is the faster way on a CPU. Products, attention and norms are those of torch.nn and
scaled_dot_product_attention; the losses and optimizers are torch's.
"""
import json, sys, time
import torch
import torch.nn.functional as F
from torch import nn

sizes, config = json.loads(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(sizes["threads"])
torch.manual_seed(1)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, bias, causal, rotary=None):
        super().__init__()
        self.heads, self.kv_heads, self.causal, self.rotary = heads, kv_heads, causal, rotary
        head = width // heads
        self.split = [heads * head, kv_heads * head, kv_heads * head]
        self.qkv, self.out = nn.Linear(width, sum(self.split), bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x):
        b, t, c = x.shape
        shaped = lambda y, heads: y.view(b, t, heads, -1).transpose(1, 2)
        q, k, v = self.qkv(x).split(self.split, dim=2)
        q, k, v = shaped(q, self.heads), shaped(k, self.kv_heads), shaped(v, self.kv_heads)
        if self.rotary is not None:
            q, k = (y * self.rotary[0] + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * self.rotary[1] for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """Attention, then two products with GELU between; norms before, or after as BERT has them."""

    def __init__(self, width, heads, hidden, causal, approximate="none", norms_first=True):
        super().__init__()
        self.attention = Attention(width, heads, heads, True, causal)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.approximate, self.norms_first = approximate, norms_first

    def forward(self, x):
        mlp = lambda y: self.down(F.gelu(self.up(y), approximate=self.approximate))
        if self.norms_first:
            x = x + self.attention(self.norms[0](x))
            return x + mlp(self.norms[1](x))
        x = self.norms[0](x + self.attention(x))
        return self.norms[1](x + mlp(x))


class LlamaBlock(nn.Module):
    def __init__(self, width, heads, kv_heads, hidden, rotary):
        super().__init__()
        self.attention = Attention(width, heads, kv_heads, False, True, rotary)
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in [(width, hidden), (width, hidden), (hidden, width)])

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Text(nn.Module):
    """Embeddings, blocks, norm, head: GPT-2 and BERT with tied heads, Llama with its own."""

    def __init__(self, family, context):
        super().__init__()
        vocab = config["vocab_size"]
        self.family = family
        if family == "gpt2":
            width, layers, heads = config["n_embd"], config["n_layer"], config["n_head"]
            blocks = [Block(width, heads, 4 * width, True, "tanh") for _ in range(layers)]
        else:
            width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
            hidden = config["intermediate_size"]
            if family == "bert":
                blocks = [Block(width, heads, hidden, False, norms_first=False) for _ in range(layers)]
                self.first, self.types = nn.LayerNorm(width), nn.Embedding(2, width)
                self.transform, self.head_bias = nn.Linear(width, width), nn.Parameter(torch.zeros(vocab))
            else:
                head = width // heads
                angles = torch.arange(context)[:, None] / 10000 ** (torch.arange(0, head, 2) / head)
                rotary = tuple(torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
                blocks = [LlamaBlock(width, heads, config["num_key_value_heads"], hidden, rotary) for _ in range(layers)]
                self.head = nn.Linear(width, vocab, bias=False)
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(context, width) if family != "llama" else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.RMSNorm(width) if family == "llama" else nn.LayerNorm(width)

    def forward(self, ids):
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        if self.family == "bert":
            x = self.first(x + self.types.weight[0])
            x = self.norm(F.gelu(self.transform(self.blocks(x))))
            return x @ self.tokens.weight.T + self.head_bias
        x = self.norm(self.blocks(x))
        return self.head(x) if self.family == "llama" else x @ self.tokens.weight.T


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        places = (config["image_size"] // patch) ** 2 + 1
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first, self.positions = (nn.Parameter(torch.randn(1, n, width) * 0.02) for n in (1, places))
        heads, hidden = config["num_attention_heads"], config["intermediate_size"]
        self.blocks = nn.Sequential(*[Block(width, heads, hidden, False) for _ in range(config["num_hidden_layers"])])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config["num_labels"])

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def convolution(channels, out, kernel, stride=1, activate=True):
    layers = [nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *([nn.ReLU()] if activate else []))


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        if config["layer_type"] == "basic":
            inner = [convolution(channels, out, 3, stride), convolution(out, out, 3, activate=False)]
        else:
            inner = [convolution(channels, out // 4, 1), convolution(out // 4, out // 4, 3, stride), convolution(out // 4, out, 1, activate=False)]
        self.inner = nn.Sequential(*inner)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else convolution(channels, out, 1, stride, activate=False)

    def forward(self, x):
        return F.relu(self.inner(x) + self.shortcut(x))


def resnet():
    channels = config["embedding_size"]
    layers = [convolution(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, (depth, out) in enumerate(zip(config["depths"], config["hidden_sizes"])):
        for i in range(depth):
            layers.append(Residual(channels, out, 2 if stage > 0 and i == 0 else 1))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, config["num_labels"]))


family, batch, size = sizes["family"], sizes["batch"], sizes["size"]
images = "num_labels" in config
model = (resnet() if family == "resnet" else Vit()) if images else Text(family, size)
if images:
    model = model.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) if family == "resnet" else torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(sizes["steps"]):
    if images:
        x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        labels = torch.randint(0, config["num_labels"], (batch,))
    else:
        x, labels = torch.randint(0, config["vocab_size"], (batch, size)), torch.randint(0, config["vocab_size"], (batch * size,))
    began = time.perf_counter()
    loss = F.cross_entropy(model(x).flatten(0, -2), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(time.perf_counter() - began, flush=True)
