"""Tokens per second of PyTorch's eager training of a GPT-2 on the CPU: the peer of benches/training.rs.

Usage: python torch_gpt.py LAYERS WIDTH HEADS CONTEXT BATCH THREADS STEPS
Prints one number a step. The model is GPT-2's: pre-norm blocks, tanh GELU, tied head, AdamW over all parameters; no dropout.
"""
import sys, time
import torch
import torch.nn.functional as F
from torch import nn

layers, width, heads, context, batch, threads, steps = map(int, sys.argv[1:8])
torch.set_num_threads(threads)
torch.manual_seed(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, heads, c // heads).transpose(1, 2) for y in self.qkv(self.ln_1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


model = Gpt()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
for step in range(steps):
    ids = torch.randint(0, 256, (batch, context + 1))
    began = time.perf_counter()
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(batch * context / (time.perf_counter() - began), flush=True)
