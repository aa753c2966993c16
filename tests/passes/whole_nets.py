"""A small model with a tensor of every kind that an adapter may replace, and adapters for it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import lora_fx
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank, draw
from lora_fx.adapter.updates import Dense, Entry, ReplacedRows
from lora_fx.dtypes import Array
from lora_fx.fx.capture.capture import Captured

LORA = "fc.weight"


class Net(nn.Module):
    """A lookup, a product with a parameter, a convolution, a norm and a head, and a twin of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 12)
        self.gain = nn.Parameter(torch.rand(12) + 0.5)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.fc = nn.Linear(10, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)
        self.twin = nn.Linear(16, 5)
        self.twin.load_state_dict(self.head.state_dict())

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv((self.table(ids) * self.gain).transpose(1, 2)).transpose(1, 2)
        x = self.norm(torch.tanh(self.fc(x)))
        return {"y": self.head(x), "twin": self.twin(x)}


class Turned(nn.Module):
    """Rows that were flattened, rows on axis 1, and a head of [batch, width]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 6)
        self.mid = nn.Linear(6, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = self.fc(self.norm(x.flatten(0, 1)))
        behind = self.mid(torch.tanh(flat.unflatten(0, (x.shape[0], x.shape[1]))).transpose(0, 1))
        return {"y": self.head(torch.relu(behind).transpose(0, 1).amax(1))}


class Tied(nn.Module):
    """A table that is looked up, and the head; of 40 rows, so that a file may store it twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 12)
        self.fc = nn.Linear(12, 12)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.head(torch.tanh(self.fc(self.table(ids))))}


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def ids(rows: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 20, (rows, 6))


@functools.cache
def captured(kind: type[nn.Module] = Net) -> Captured:
    example = torch.randn(3, 4, 8) if kind is Turned else torch.tensor(ids())
    return lora_fx.capture(kind().eval(), (example,))


def lora(seed: int, rank: int, key: str = LORA, kind: type[nn.Module] = Net) -> LowRank:
    layout = lora_fx.find(captured(kind))[key].layout
    a, b = draw(key, layout, rank, seed, "probe")
    return LowRank(a, b, 0.75 * rank, layout)


KINDS: Mapping[str, Mapping[str, Entry]] = {
    "head": {"head.weight": Full(numbers(1, 5, 16)), "head.bias": Full(numbers(2, 5))},
    "head without its bias": {"head.weight": Full(numbers(1, 5, 16))},
    "bias of an adapted layer": {"fc.bias": Full(numbers(3, 16))},
    "norm": {"norm.weight": Full(numbers(4, 16)), "norm.bias": Full(numbers(5, 16))},
    "scale of a norm": {"norm.weight": Full(numbers(4, 16))},
    "bias of a norm": {"norm.bias": Full(numbers(5, 16))},
    "parameter of a product": {"gain": Full(numbers(6, 12))},
    "table": {"table.weight": Full(numbers(7, 20, 12))},
    "bias of a convolution": {"conv.bias": Full(numbers(8, 10))},
    "kernel of a convolution": {"conv.weight": Full(numbers(9, 10, 12, 3) / 4)},
    "ΔW of a head": {"head.weight": Dense(numbers(10, 5, 16), 0.5)},
    "Δ of a bias": {"fc.bias": Dense(numbers(11, 16), 2.0)},
    "trained rows": {"table.weight": ReplacedRows((3, 11, 0), numbers(12, 3, 12))},
    "adapted by another": {LORA: Full(numbers(13, 16, 10) / 3)},
}


def adapters_of(kind: str) -> dict[str, Adapter]:
    """Adapters with the tensors beside a LoRA, with them alone, and without them."""
    tensors = KINDS[kind]
    beside = {} if LORA in tensors else {LORA: lora(0, 2)}
    return {
        "beside": Adapter({**beside, **tensors}),
        "lacking": Adapter({LORA: lora(1, 3)}),
        "alone": Adapter(dict(tensors)),
    }


@dataclass
class ByHand:
    """The outputs in float64 of a copy of a model in which an adapter's tensors were written."""

    kind: type[nn.Module] = Net

    def run(self, adapter: Adapter | None, x: Array) -> dict[str, Array]:
        net = copy.deepcopy(self.kind()).eval().double()
        parameters = dict(net.named_parameters())
        with torch.no_grad():
            for key, entry in (adapter.entries if adapter else {}).items():
                parameter = parameters[key]
                if isinstance(entry, LowRank):
                    delta = Adapter({key: entry}).deltas()[key]
                    parameter.add_(torch.tensor(delta))
                elif isinstance(entry, Full):
                    parameter.copy_(torch.tensor(entry.value))
                elif isinstance(entry, Dense):
                    parameter.add_(entry.scale * torch.tensor(entry.value))
                elif isinstance(entry, ReplacedRows):
                    parameter[list(entry.index)] = torch.tensor(entry.value).double()
            inputs = torch.tensor(x)
            outputs: dict[str, Any] = net(inputs.double() if inputs.is_floating_point() else inputs)
        return {name: value.numpy() for name, value in outputs.items()}

    def rows(self, adapters: Sequence[Adapter | None], x: Array) -> dict[str, Array]:
        """Row i with the i-th adapter."""
        outputs = [self.run(adapter, x[i : i + 1]) for i, adapter in enumerate(adapters)]
        return {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}
