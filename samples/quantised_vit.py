"""Adapt a ViT with int4 weights to transposed digits; ONNX Runtime computes with the same codes.

`python samples/quantised_vit.py [--quick]` needs `pip install 'lora-fx[samples]'`. Package
registries have no ViT weights, so the sample first trains a small ViT on scikit-learn's upright
digits. Then its linears become frozen int4 codes, and a float adapter learns digits that are
transposed. For comparison, the sample trains the same adapter on the float model.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from sources import digits
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy

import lora_fx
from lora_fx.fx.quantised_parameters import forms, tensors_of
from lora_fx.onnx import Session

quick = "--quick" in sys.argv
first, steps, EACH = (60, 20, 32) if quick else (300, 150, 32)

torch.manual_seed(0)
(images, labels), (held, truth) = digits()
upright, lying = images[:800], images[800:].transpose(1, 2)
held = held.transpose(1, 2)


def pixels(x: torch.Tensor) -> torch.Tensor:
    """[n, 8, 8] of bytes → [n, 1, 8, 8] in -1 … 1."""
    return x[:, None].float() / 127.5 - 1


def batches(
    x: torch.Tensor, y: torch.Tensor, count: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`count` random batches, the same in every run."""
    g = torch.Generator().manual_seed(0)
    picked = [torch.randint(len(x), (EACH,), generator=g) for _ in range(count)]
    return [(pixels(x[i]), y[i]) for i in picked]


def train(
    module: nn.Module, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], lr: float
) -> float:
    """Train the parameters that require grad by AdamW; the last loss."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    loss = torch.tensor(math.nan)
    for x, y in parts:
        optimizer.zero_grad()
        loss = cross_entropy(module.train()(x), y)
        loss.backward()
        optimizer.step()
    module.eval()
    return loss.item()


@torch.no_grad()
def classes(module: nn.Module) -> torch.Tensor:
    """The predicted class of every held-out digit."""
    return module(pixels(held)).argmax(1)


def accuracy(found: torch.Tensor) -> str:
    return f"{(found == truth).float().mean():.3f}"


base = VisionTransformer(
    img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=4
)
train(base, batches(upright, labels[:800], first), 1e-3)
base.requires_grad_(False)
print(f"accuracy of the base on transposed digits: {accuracy(classes(base))}")

example = (pixels(held[:2]),)
made = {
    "float": lora_fx.insert(base, example, rank=8),
    "int4": lora_fx.insert(base, example, rank=8, quantise="int4"),
}
codes = forms(made["int4"])
stored = sum(t.nbytes for name in codes for t in tensors_of(made["int4"], name))
floats = sum(4 * math.prod(code.shape) for code in codes.values())
print(f"{len(codes)} weights: {floats:,} bytes as floats, {stored:,} as int4 codes and scales")
for name, module in made.items():
    start = accuracy(classes(module))
    loss = train(module, batches(lying, labels[800:], steps), 3e-3)
    print(f"{name}: {start} → {accuracy(classes(module))} in {steps} steps, last loss {loss:.3f}")

with tempfile.TemporaryDirectory() as folder:
    path, adapter = Path(folder) / "vit.onnx", made["int4"].adapter()
    print(
        lora_fx.export(
            made["int4"], path, adapters={"lying": adapter}, mode="switch", provider="cpu"
        )
    )
    whole = sum(p.nbytes for p in base.parameters())
    print(f"the file has {path.stat().st_size:,} bytes; the float model's weights have {whole:,}")
    session = Session(path, provider="cpu")
    session.load("lying", Path(folder) / "lying.onnx_adapter")
    (output,) = session.run({"x": pixels(held).numpy()}, adapter="lying").values()
wanted = classes(made["int4"])
same = int((torch.from_numpy(output).argmax(1) == wanted).sum())
print(f"ONNX Runtime and torch predict equal classes for {same} of {len(truth)} images")
