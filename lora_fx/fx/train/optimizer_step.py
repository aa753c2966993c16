"""What an optimizer does to the tensors of a training step, as a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import slots_of, variant_of

STATES: Mapping[str, tuple[str, ...]] = {"adamw": ("m", "v"), "sgd": ()}
"""Optimizer → what it keeps beside a tensor."""


BETAS, EPS = (0.9, 0.999), 1e-8
"""Of AdamW, as torch has them by default."""


@dataclass(frozen=True)
class Update:
    """What the optimizer does to the tensors that it is given.

    Attributes:
        optimizer: adamw or sgd.
        weight_decay: As torch.optim has it: of the weight for adamw, of its gradient for sgd.
        clip: The longest gradient, as the norm of all together; 0 clips nothing.
    """

    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0

    def __call__(
        self,
        slots: Sequence[Slot],
        held: Sequence[Sequence[Tensor]],
        gradients: Sequence[Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> list[Tensor]:
        """The tensors and states of all slots after a step, flat, in their order."""
        gradients = [g * s.scale for g, s in zip(gradients, slots, strict=True)]
        if self.clip:
            norm = torch.stack([(g * g).sum() for g in gradients]).sum().sqrt()
            share = self.clip / torch.clamp(norm + 1e-6, min=self.clip)
            gradients = [g * share for g in gradients]
        made: list[Tensor] = []
        # in fp32 1 − 0.999 loses 4 digits, and so does a power whose base the exporter has in fp32
        left = [1 - torch.exp(step.double() * math.log(beta)) for beta in BETAS]
        first, second = 1 / left[0], 1 / left[1].sqrt()
        for slot, (w, *state), g in zip(slots, held, gradients, strict=True):
            rate = lr * slot.rate
            if self.optimizer == "sgd":
                made.append(w - rate * (g * slot.scale + w * self.weight_decay))
                continue
            m, v = state
            m = m + (g - m) * (1 - BETAS[0])
            v = v * BETAS[1] + g * g * (1 - BETAS[1])
            size = v.sqrt() * second.float() + EPS
            kept = w * (1 - rate * self.weight_decay)
            made += [kept - (rate * slot.scale * first.float()) * m / size, m, v]
        return made


@dataclass(frozen=True)
class Slot:
    """One trained tensor of a step.

    Attributes:
        name: Its name in the file.
        tensor: Its name in the module, where it is laid out [*batch, rank, in] or
            [*batch, out, rank].
        shape: In the file.
        scale: What multiplies the module's tensor to make the file's.
        rate: What multiplies the learning rate.
        trained: False for one that stays as it is, A of lora-fa.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    scale: float
    rate: float
    trained: bool


def slots_in(updates: Mapping[str, LowRank], names: Mapping[str, tuple[str, str]]) -> list[Slot]:
    """The slots of updates by key, for the names of their A and B in the file."""
    made = []
    for key, u in updates.items():
        rates = variant_of(u).rates(1.0)
        for held, name, scale in zip(slots_of(key, u), names[key], (1.0, u.scale), strict=True):
            *batch, rows, columns = held.value.shape
            shape = (*batch, columns, rows)
            rate = rates.get(held.field, 1.0)
            made.append(Slot(name, held.name, shape, scale, rate, held.trained))
    return made
