"""QLoRA: train an adapter on SmolLM2-135M in NF4, export both, and decode in ONNX Runtime.

`python samples/qlora_smollm2.py [--quick]` needs `pip install 'lora-fx[samples]'` and the model's
file (the error says how to get it). If bitsandbytes is installed (`pip install bitsandbytes`), its
layers are the base, and PEFT trains the same adapter on them. Otherwise lora-fx makes the codes,
and there is no column for PEFT. The sample also trains on the float model, which the file's Q4_1
has already rounded. --quick uses the first two of 30 blocks.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from beside_peft import Batch, in_nf4, train, twin
from greedy import greedy
from sources import smollm2
from torch import nn
from torch.nn.functional import cross_entropy

import lora_fx
from lora_fx.cli.demo_data import topics
from lora_fx.fx.quantised_parameters import forms, tensors_of
from lora_fx.onnx import Session

quick = "--quick" in sys.argv
steps, held, new = (3, 1, 8) if quick else (20, 8, 32)
LENGTH, ROWS = 64 if quick else 256, 2

model, tokenizer = smollm2()
model.requires_grad_(False)
model.config.use_cache = False
if quick:
    model.config.num_hidden_layers = 2
    del model.model.layers[2:]
data = topics(6000, 600)


def windows(texts: list[str], count: int) -> torch.Tensor:
    """The first `count` windows of LENGTH tokens."""
    ids = tokenizer("\n\n".join(texts))["input_ids"][: count * LENGTH]
    return torch.tensor(ids).view(count, LENGTH)


texts, test = windows(data.train[0], steps * ROWS), windows(data.test[0], held)
batches = [{"input_ids": x} for x in texts.split(ROWS)]


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of the next tokens."""
    ids = batch["input_ids"]
    return cross_entropy(module(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(module: nn.Module) -> float:
    """The perplexity of the held-out windows."""
    return math.exp(sum(float(loss(module, {"input_ids": x[None]})) for x in test) / len(test))


given, beside = {"input_ids": texts[:ROWS]}, importlib.util.find_spec("bitsandbytes")
base = in_nf4(model) if beside else model
made = {
    "nf4": lora_fx.insert(base, (), given, rank=8, quantise=None if beside else "nf4"),
    "float": lora_fx.insert(model, (), given, rank=8),
}
modules = dict(made, **({"PEFT on nf4": twin(base, made["nf4"])} if beside else {}))
before = {name: perplexity(module) for name, module in modules.items()}
losses = {name: train(module, batches, loss, 1e-3) for name, module in modules.items()}
print("step  " + "  ".join(f"{name:>12}" for name in losses))
for step, row in enumerate(zip(*losses.values(), strict=True)):
    print(f"{step:4}  " + "  ".join(f"{value:12.5f}" for value in row))
for name, module in modules.items():
    print(f"perplexity of {name}: {before[name]:.2f} → {perplexity(module):.2f}")

codes = forms(made["nf4"])
floats = sum(4 * math.prod(code.shape) for code in codes.values())
stored = sum(t.nbytes for name in codes for t in tensors_of(made["nf4"], name))
print(f"{len(codes)} weights: {floats:,} bytes as floats, {stored:,} as codes and scales")

prompts = texts[:ROWS, :24].numpy()
with tempfile.TemporaryDirectory() as folder:
    for name, module in made.items():
        path, adapter = Path(folder) / f"{name}.onnx", module.adapter()
        kept = {"adapters": {f"of_{name}": adapter}, "cache": True, "provider": "cpu"}
        report = lora_fx.export(module, path, mode="switch", **kept)
        size = sum(p.stat().st_size for p in Path(folder).glob(f"{name}.onnx*"))
        session = Session(path, provider="cpu", threads=1)
        session.load("own", adapter)
        runs = SimpleNamespace(session=session.session, run=partial(session.run, adapter="own"))
        greedy(runs, prompts, np.ones_like(prompts), 2)
        start = time.perf_counter()
        tokens = greedy(runs, prompts, np.ones_like(prompts), new)
        speed = ROWS * new / (time.perf_counter() - start)
        with torch.no_grad():
            likeliest = module(input_ids=torch.from_numpy(tokens)).logits.argmax(-1).numpy()
        same = int((likeliest[:, -new - 1 : -1] == tokens[:, -new:]).sum())
        print(f"export of {name}: {'ok' if report else 'not equal'}, {size:,} bytes")
        print(
            f"  {speed:.1f} tokens a second in ONNX Runtime; torch predicts "
            f"the same for {same} of {ROWS * new}"
        )
