"""Teach all-MiniLM-L6-v2 which part of the standard library a docstring comes from.

`python samples/minilm_stdlib.py [--quick]` needs `pip install 'lora-fx[demo]'`. It takes the steps
of `lora-fx demo` in Python: probe, insert, train, fold and export. ONNX Runtime must predict the
same classes.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import torch

import lora_fx
from lora_fx.cli.demo_data import topics
from lora_fx.data import Buckets, Table
from lora_fx.fx.load import minilm
from lora_fx.fx.train.loop import Settings, fit
from lora_fx.onnx.session import open_session

quick = "--quick" in sys.argv
data = topics(400, 150) if quick else topics(5000, 1000)
classes = len(data.names)
print(f"{len(data.train[0])} docstrings; the volumes are {', '.join(data.names)}")

# training starts from a frozen encoder with a fitted linear probe as its head
model = minilm.Classifier(classes).eval().requires_grad_(False)
rows, held = minilm.tokenise(data.train[0]), minilm.tokenise(data.test[0])
truth = np.array(data.test[1])


def scores(module: torch.nn.Module, texts: list[dict[str, list[int]]]) -> np.ndarray:
    """The scores of every text, in eval mode."""

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return minilm.run_all(run, texts)


def features(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean-pooled states of the encoder without an adapter."""
    with torch.no_grad():
        return model.features(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()


pooled = minilm.run_all(features, rows)
weight, bias, _ = minilm.best_probe(pooled, data.train[1], classes)
model.head.weight.copy_(weight)
model.head.bias.copy_(bias)
print(f"linear probe: {(scores(model, held).argmax(1) == truth).mean():.3f}")

# rank-8 branches on every linear of the encoder; the head is trained whole
example = {"input_ids": torch.ones(4, 9, dtype=torch.long)}
example["attention_mask"] = torch.ones_like(example["input_ids"])
print(lora_fx.find(model, (), example))
adapted = lora_fx.insert(model, (), example, rank=8, exclude="head", also_train="head")

labels = np.array(data.train[1])
batches = [
    Table({"input_ids": ids, "attention_mask": mask, "labels": labels[at]}, "labels")
    for at, ids, mask in minilm.batches(rows, minilm.BATCH)
]
report = fit(adapted, Buckets(batches), settings=Settings(steps=16 if quick else 480, lr=minilm.LR))
after = scores(adapted, held)
print(f"after {len(report.losses)} steps: {(after.argmax(1) == truth).mean():.3f}")

with tempfile.TemporaryDirectory() as folder:
    lora_fx.save_adapter(adapted.adapter(), f"{folder}/adapter")
    print(lora_fx.export(adapted, f"{folder}/model.onnx"))
    session = open_session(f"{folder}/model.onnx")
    runtime = minilm.run_all(
        lambda ids, mask: session.run({"input_ids": ids, "attention_mask": mask})["output"], held
    )
same = int((runtime.argmax(1) == after.argmax(1)).sum())
assert same == len(truth)
print(f"ONNX Runtime and torch predict equal classes for {same} of {len(truth)} docstrings")
