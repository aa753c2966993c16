"""Train SmolLM2-135M on docstrings, compare with PEFT, and decode in ONNX Runtime.

`python samples/smollm2_text.py [--quick]` needs `pip install 'lora-fx[samples]'` and the model's
file (the error says how to get it). The texts are the docstrings of the standard library. The ONNX
file has the adapter folded in and a key-value cache.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from beside_peft import Batch, train_both
from greedy import greedy
from sources import smollm2
from torch import nn
from torch.nn.functional import cross_entropy

import lora_fx
from lora_fx.cli.demo_data import topics
from lora_fx.onnx.session import open_session

quick = "--quick" in sys.argv
steps, held, new = (3, 1, 4) if quick else (20, 8, 16)
LENGTH, ROWS = 64 if quick else 256, 2

model, tokenizer = smollm2()
model.requires_grad_(False)
model.config.use_cache = False
data = topics(6000, 600)


def windows(texts: list[str], count: int) -> torch.Tensor:
    """The first `count` windows of LENGTH tokens."""
    ids = tokenizer("\n\n".join(texts))["input_ids"][: count * LENGTH]
    return torch.tensor(ids).view(count, LENGTH)


train, test = windows(data.train[0], steps * ROWS), windows(data.test[0], held)
print(f"{train.numel()} tokens to train on, {test.numel()} held out")


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of the next tokens."""
    ids = batch["input_ids"]
    return cross_entropy(module(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(module: nn.Module) -> float:
    """The perplexity of the held-out windows."""
    losses = [float(loss(module, {"input_ids": x[None]})) for x in test]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def next_tokens(module: nn.Module) -> torch.Tensor:
    """The most likely next token at every held-out position."""
    return torch.cat([module(input_ids=x[None]).logits[0].argmax(-1) for x in test])


@torch.no_grad()
def continued(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Decode greedily without a cache: every step runs the whole sequence."""
    for _ in range(new):
        ids = torch.cat([ids, module(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


before, first = perplexity(model), next_tokens(model)
adapted = lora_fx.insert(model, (), {"input_ids": train[:ROWS]}, rank=8)
batches = [{"input_ids": x} for x in train.split(ROWS)]
both = train_both(model, adapted, batches, loss, lr=1e-3)
print(both)
print(f"perplexity {before:.2f} → {perplexity(adapted):.2f}, PEFT's {perplexity(both.peft):.2f}")
after, theirs = next_tokens(adapted), next_tokens(both.peft)
print(
    f"{(after != first).sum()} predictions changed, {(after != theirs).sum()} differ from PEFT's, "
    f"of {len(after)}"
)

prompts = train[:ROWS, :24]
wanted = continued(adapted, prompts)
with tempfile.TemporaryDirectory() as folder:
    print(lora_fx.export(adapted, Path(folder) / "model.onnx", cache=True, provider="cpu"))
    session = open_session(Path(folder) / "model.onnx", "cpu")
    got = greedy(session, prompts.numpy(), np.ones(prompts.shape, np.int64), new)
print(repr(tokenizer.decode(got[0])))
same = int((got[:, -new:] == wanted[:, -new:].numpy()).sum())
print(f"ONNX Runtime and torch predict equal tokens for {same} of {ROWS * new} positions")
