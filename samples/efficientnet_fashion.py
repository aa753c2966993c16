"""Adapt the convolutions of EfficientNet-Lite0 to Fashion-MNIST, and compare with PEFT.

`python samples/efficientnet_fashion.py [--quick] [--digits]` needs `pip install
'lora-fx[samples]'` and Fashion-MNIST from Debian (the error says how to get it). --digits uses
scikit-learn's digits instead. The targets are the first convolution (3 × 3) and all 1 × 1
convolutions; the head is trained whole, and batch norms keep their statistics.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from beside_peft import Batch, train_both
from sources import Labelled, digits, efficientnet, fashion
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import lora_fx
from lora_fx.fx.load import minilm
from lora_fx.onnx.session import open_session

quick = "--quick" in sys.argv
probed, steps, held, size = (200, 3, 100, 64) if quick else (1500, 60, 2000, 64)
EACH = 32
name, (train, test) = (
    ("digits", digits()) if "--digits" in sys.argv else ("Fashion-MNIST", fashion())
)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """[n, h, w] of bytes → [n, 3, size, size] in -1 … 1, the input range of the model."""
    large = interpolate(images[:, None].float(), (size, size), mode="bilinear")
    return (large / 127.5 - 1).expand(-1, 3, -1, -1).contiguous()


def picked(part: Labelled, count: int) -> Labelled:
    """`count` random examples, the same in every run."""
    at = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(0))[:count]
    return part[0][at], part[1][at]


images, labels = picked(train, probed + steps * EACH)
held_images, truth = picked(test, held)
print(f"{name}: {len(images)} images to train on, {held} held out")

# training starts from a frozen network with a fitted linear probe as its head
model = efficientnet(10).requires_grad_(False)


@torch.no_grad()
def features(x: torch.Tensor) -> torch.Tensor:
    """The inputs of the head, [n, 1280]."""
    return model.forward_head(model.forward_features(x), pre_logits=True)


pooled = torch.cat([features(pixels(part)) for part in images[:probed].split(100)]).numpy()
weight, bias, _ = minilm.best_probe(pooled, labels[:probed].tolist(), 10)
model.classifier.weight.copy_(weight)
model.classifier.bias.copy_(bias)


@torch.no_grad()
def classes(module: nn.Module) -> torch.Tensor:
    """The class of every held-out image."""
    return torch.cat([module(pixels(x)).argmax(1) for x in held_images.split(100)])


def accuracy(found: torch.Tensor) -> str:
    return f"{(found == truth).float().mean():.3f}"


before = classes(model)
print(f"linear probe on {probed} images: {accuracy(before)}")

# the default plan takes convolutions where they have most of the FLOPs; depthwise ones are refused,
# because a group of one channel has no low-rank update
example = (pixels(images[:2]),)
found = lora_fx.find(model, example)
print(f"{len(found.targets)} targets; refused: {len(found.refusals)}, {found.refusals[0].reason}")
adapted = lora_fx.insert(model, example, rank=8, exclude="classifier", also_train="classifier")


def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The cross entropy of a batch."""
    return cross_entropy(module(batch["x"]), batch["labels"])


batches = [
    {"x": pixels(x), "labels": y}
    for x, y in zip(images[probed:].split(EACH), labels[probed:].split(EACH), strict=True)
]
both = train_both(model, adapted, batches, loss, lr=1e-3)
print(both)
after, theirs = classes(adapted), classes(both.peft)
print(
    f"accuracy {accuracy(before)} → {accuracy(after)}, PEFT's {accuracy(theirs)}; "
    f"{(after != before).sum()} predictions changed, {(after != theirs).sum()} differ from PEFT's"
)

with tempfile.TemporaryDirectory() as folder:
    print(lora_fx.export(adapted, Path(folder) / "model.onnx", provider="cpu"))
    session = open_session(Path(folder) / "model.onnx", "cpu")
    runtime = [
        torch.from_numpy(session.run({"x": pixels(x).numpy()})["output"]).argmax(1)
        for x in held_images.split(100)
    ]
same = int((torch.cat(runtime) == after).sum())
print(f"ONNX Runtime and torch predict equal classes for {same} of {held} images")
