"""The optimizer's part of a training step, as operations of a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.adapter.factor_tensors import slots_of
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.variant import variant_of

STATES: Mapping[str, tuple[str, ...]] = {"adamw": ("m", "v"), "sgd": ()}
"""Optimizer → the state that it keeps for a tensor."""


BETAS = (0.9, 0.999)
"""The shares of the moments that AdamW keeps, as torch has them by default."""
EPS = 1e-8
"""The number that AdamW adds to a divisor, as torch has it by default."""


@dataclass(frozen=True)
class Update:
    """The optimizer's part of a step.

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
        tensors: Sequence[Sequence[Tensor]],
        gradients: Sequence[Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> list[Tensor]:
        """The tensors and states of all slots after a step, flat, in their order.

        Args:
            slots: The tensors that are trained.
            tensors: The tensor of every slot, and the states that the optimizer keeps beside it.
            gradients: ∂L of every slot's tensor in the file.
            lr: The learning rate.
            step: Counted from 1.
        """
        gradients = [g * slot.scale for g, slot in zip(gradients, slots, strict=True)]
        if self.clip:
            gradients = self._clipped(gradients)
        # in fp32 1 − 0.999 loses 4 digits, and so does a power whose base the exporter has in fp32
        biases = [1 - torch.exp(step.double() * math.log(beta)) for beta in BETAS]
        first = 1 / biases[0]
        second = 1 / biases[1].sqrt()

        updated: list[Tensor] = []
        for slot, (w, *state), g in zip(slots, tensors, gradients, strict=True):
            rate = lr * slot.rate
            if self.optimizer == "sgd":
                updated.append(w - rate * (g * slot.scale + w * self.weight_decay))
                continue
            m, v = state
            m = m + (g - m) * (1 - BETAS[0])
            v = v * BETAS[1] + g * g * (1 - BETAS[1])
            size = v.sqrt() * second.float() + EPS
            decayed = w * (1 - rate * self.weight_decay)
            updated += [decayed - (rate * slot.scale * first.float()) * m / size, m, v]
        return updated

    def _clipped(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, shortened together to the norm `clip` where they are longer."""
        norm = torch.stack([(g * g).sum() for g in gradients]).sum().sqrt()
        share = self.clip / torch.clamp(norm + 1e-6, min=self.clip)
        return [g * share for g in gradients]


@dataclass(frozen=True)
class Slot:
    """One trained tensor of a step.

    Attributes:
        name: Its name in the file.
        tensor: Its name in the module, where it is laid out [*batch, rank, in] or
            [*batch, out, rank].
        shape: In the file.
        scale: The factor from the module's tensor to the file's.
        rate: The factor of the learning rate.
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
    slots = []
    for key, update in updates.items():
        rates = variant_of(update).rates(1.0)
        scales = (1.0, update.scale)
        for side, name, scale in zip(slots_of(key, update), names[key], scales, strict=True):
            *batch, rows, columns = side.value.shape
            shape = (*batch, columns, rows)
            rate = rates.get(side.field, 1.0)
            slots.append(Slot(name, side.name, shape, scale, rate, side.trained))
    return slots
