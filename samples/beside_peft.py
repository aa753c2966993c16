"""Train a model with lora-fx and with PEFT from the same A and B, on the same batches.

Both train in eval mode with the same optimizer. There, gradients are those of training, and neither
dropout nor the running statistics of a batch norm make a difference.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import lora_fx
from lora_fx.fx.module.adapted import AdaptedModule

Batch = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Beside:
    """The loss before every step, of lora-fx and of PEFT, and PEFT's trained model."""

    ours: list[float]
    theirs: list[float]
    peft: nn.Module

    @property
    def gap(self) -> float:
        """The largest difference between the two losses of a step."""
        return max(abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True))

    def __str__(self) -> str:
        early = Beside(self.ours[:20], self.theirs[:20], self.peft)
        return (
            f"{len(self.ours)} steps: loss {self.ours[0]:.4f} → {self.ours[-1]:.4f}, PEFT's "
            f"{self.theirs[0]:.4f} → {self.theirs[-1]:.4f}; they differ by {early.gap:.1e} or less "
            f"in {len(early.ours)} steps, by {self.gap:.1e} or less in all"
        )


def twin(model: nn.Module, adapted: AdaptedModule) -> nn.Module:
    """A PEFT model of a copy of `model`, with the current adapter of `adapted`."""
    import peft

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora_fx.save_adapter(adapted.adapter(), folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, is_trainable=True)
    return theirs.eval()


def in_nf4(model: nn.Module) -> nn.Module:
    """A copy of a decoder with all linears except the head as NF4 layers of bitsandbytes."""
    import bitsandbytes

    other = copy.deepcopy(model)
    for path, old in list(other.model.named_modules(prefix="model")):
        if isinstance(old, nn.Linear):
            sizes = old.in_features, old.out_features
            layer = bitsandbytes.nn.LinearNF4(*sizes, bias=False, compute_dtype=torch.float32)
            layer.load_state_dict(old.state_dict())
            layer.requires_grad_(False)
            # or the first run in eval mode rounds the scales to bfloat16, on CPUs that have it
            layer.support_avx512bf16_for_cpu = False
            other.set_submodule(path, layer.to("cpu"))
    other.is_loaded_in_4bit = True  # PEFT reads this flag of transformers
    return other


def train(model: nn.Module, batches: Sequence[Batch], loss: Loss, lr: float) -> list[float]:
    """Train by AdamW, one batch a step; lr rises for three steps and then falls to zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 3, (steps - step) / max(1, steps - 2))
    )
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(model.eval(), batch)
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses


def train_both(
    model: nn.Module, adapted: AdaptedModule, batches: Sequence[Batch], loss: Loss, lr: float
) -> Beside:
    """Train `adapted` and a PEFT model of `model` from the same A and B."""
    theirs = twin(model, adapted)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (adapted, theirs)]
    assert counts[0] == counts[1], f"trained parameters: {counts[0]}, PEFT {counts[1]}"
    return Beside(train(adapted, batches, loss, lr), train(theirs, batches, loss, lr), theirs)
