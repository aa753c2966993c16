"""The loaded model's names of a file's tensors: the table of releases, applied to its names.

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
    """A parameter [experts, out, in] of the loaded model that the file stores as single matrices.

    Attributes:
        info: Shape and dtype of the whole; where it lies is where the first matrix does.
        parts: All of its matrices.
    """

    info: TensorInfo
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Loaded:
    """The loaded model's names of a file's tensors, where they are others.

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
    """The parameter names after transformers 5 loads a checkpoint; empty if unknown.

    Args:
        tensors: The checkpoint's tensors.
        config: Its config.json.
    """
    model_type = config.get("model_type")
    parts = renamed_parts(model_type)
    model = {name_in_model(name, parts): name for name in tensors}

    stacks: dict[str, Stack] = {}
    inner_type = text_config(config).get("model_type")
    for row in stacked_experts((model_type, inner_type)):
        stacks |= _stacks(model, tensors, row)
    in_stacks: set[str] = set()
    for stack in stacks.values():
        in_stacks |= {matrix.tensor for matrix in stack.parts}

    names: dict[str, str] = {}
    for name, stored in model.items():
        if name != stored and name not in tensors and stored not in in_stacks:
            names[name] = stored
    return Loaded(names, {name: stack for name, stack in stacks.items() if name not in tensors})


def _stacks(model: Mapping[str, str], tensors: Tensors, row: Stacked) -> dict[str, Stack]:
    """Every stack that is whole: equal shapes, experts from 0 on without a gap."""
    stacks = {}
    for module, by_leaf in _expert_matrices(model).items():
        for leaf, spellings in row.leaves.items():
            for sources in spellings:
                sides = [by_leaf.get(source, {}) for source in sources]
                stack = _stack(sides, tensors)
                if stack is not None:
                    stacks[f"{module}.{leaf}"] = stack
    return stacks


def _expert_matrices(model: Mapping[str, str]) -> dict[str, dict[str, dict[int, str]]]:
    """Module of experts → name of a matrix → expert → the tensor that holds it."""
    matrices: dict[str, dict[str, dict[int, str]]] = {}
    for name, stored in model.items():
        match = _EXPERT_WEIGHT.fullmatch(name)
        if match:
            module, expert, leaf = match.groups()
            by_leaf = matrices.setdefault(module, {})
            by_leaf.setdefault(leaf, {})[int(expert)] = stored
    return matrices


def _stack(sides: list[dict[int, str]], tensors: Tensors) -> Stack | None:
    """The stack of matrices that lie on each other in the order of `sides`; None where it is not.

    Args:
        sides: Expert → tensor, of each matrix of an expert.
        tensors: The checkpoint's.
    """
    experts = range(len(sides[0]))
    if not experts or any(set(side) != set(experts) for side in sides):
        return None
    first = tensors[sides[0][0]]
    parts: list[Part] = []
    rows = 0
    for side in sides:
        shapes = {tensors[name].shape for name in side.values()}
        if len(shapes) != 1:
            return None
        shape = shapes.pop()
        if len(shape) != 2 or shape[1:] != first.shape[1:]:
            return None
        parts += [Part(side[i], i, rows, rows + shape[0]) for i in experts]
        rows += shape[0]
    info = replace(first, shape=(len(experts), rows, first.shape[1]))
    return Stack(info, tuple(sorted(parts, key=lambda part: (part.expert, part.low))))
