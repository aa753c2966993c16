"""What the loaded model calls the tensors of a file: the table of releases, applied to its names.

`lora_fx.checkpoint.releases` has the table. A stack of experts that the file has one by one is a
`Stack`: which tensor holds which rows of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora_fx.checkpoint.releases import Stacked, name_in_model, renamed_parts, stacked_experts
from lora_fx.files.checkpoint import text_config
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.text import JsonView

_EXPERT_WEIGHT = re.compile(r"(.+\.experts)\.(\d{1,9})\.(\w+)\.weight")


@dataclass(frozen=True)
class Part:
    """A matrix of a stack: rows low ≤ i < high of one expert are the whole of a tensor."""

    tensor: str
    expert: int
    low: int
    high: int


@dataclass(frozen=True)
class Stack:
    """A parameter [experts, out, in] of the loaded model whose matrices the file has apart.

    Attributes:
        info: Shape and dtype of the whole; where it lies is where the first matrix does.
        parts: All of its matrices.
    """

    info: TensorInfo
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Loaded:
    """What the loaded model calls the tensors of a file, where it calls them otherwise.

    Attributes:
        names: Name in the model → in the file.
        stacks: Name in the model → its matrices in the file.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        """True for a name that only the loaded model has."""
        return name in self.names or name in self.stacks


def loaded_of(tensors: Tensors, config: JsonView) -> Loaded:
    """The names of the model that transformers 5 makes of a checkpoint; empty where not known.

    Args:
        tensors: The checkpoint's tensors.
        config: Its config.json.
    """
    kind = config.get("model_type")
    inner = text_config(config).get("model_type")
    parts = renamed_parts(kind)
    model = {name_in_model(name, parts): name for name in tensors}
    stacks: dict[str, Stack] = {}
    for row in stacked_experts((kind, inner)):
        stacks |= _stacks(model, tensors, row)
    in_stacks = {part.tensor for stack in stacks.values() for part in stack.parts}
    names = {
        new: old
        for new, old in model.items()
        if new != old and new not in tensors and old not in in_stacks
    }
    return Loaded(names, {name: s for name, s in stacks.items() if name not in tensors})


def _stacks(model: Mapping[str, str], tensors: Tensors, row: Stacked) -> dict[str, Stack]:
    """Every stack that is whole: equal shapes, experts from 0 on without a gap."""
    matrices: dict[str, dict[str, dict[int, str]]] = {}
    for name, stored in model.items():
        match = _EXPERT_WEIGHT.fullmatch(name)
        if match:
            by_leaf = matrices.setdefault(match[1], {})
            by_leaf.setdefault(match[3], {})[int(match[2])] = stored

    result = {}
    for module, by_leaf in matrices.items():
        for leaf, spellings in row.leaves.items():
            for sources in spellings:
                stack = _stack([by_leaf.get(source, {}) for source in sources], tensors)
                if stack is not None:
                    result[f"{module}.{leaf}"] = stack
    return result


def _stack(sides: list[dict[int, str]], tensors: Tensors) -> Stack | None:
    """The stack of matrices that lie on each other in the order of `sides`."""
    experts = range(len(sides[0]))
    if not experts or any(set(side) != set(experts) for side in sides):
        return None
    parts, at = [], 0
    for side in sides:
        shapes = {tensors[name].shape for name in side.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 2:
            return None
        parts += [Part(side[i], i, at, at + shape[0]) for i in experts]
        at += shape[0]
    first = tensors[sides[0][0]]
    if any(tensors[p.tensor].shape[1] != first.shape[1] for p in parts):
        return None
    info = replace(first, shape=(len(experts), at, first.shape[1]))
    return Stack(info, tuple(sorted(parts, key=lambda p: (p.expert, p.low))))
