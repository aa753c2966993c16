"""The tensors of a file or folder that an adapter can take.

Only headers are read, and every one strictly (see lora_fx.files.safetensors).
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_fx.checkpoint.tied_names import is_head
from lora_fx.dtypes import FLOATING
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import TensorInfo, Tensors
from lora_fx.ir.graph import Parameter
from lora_fx.ir.layout import plain_layout
from lora_fx.targets.found import Found, Refusal
from lora_fx.targets.plan import HEAD_ROWS, default_plan
from lora_fx.targets.target import Target
from lora_fx.targets.target_roles import role_of

EMPTY = "it is empty; it may be a shard that was not gathered when saving under ZeRO-3 or FSDP"


_LOOKUP = re.compile(r"(^|\.)(\w*embed(ding)?s?(_tokens|_in)?|wte|wpe|shared)$")


def file_targets(path: str | Path) -> Found:
    """The targets of a file or folder; see `targets_of`."""
    return targets_of(tensors(path))


def targets_of(every: Tensors) -> Found:
    """The targets of tensors without a graph: every float tensor of two or more dimensions.

    Axis 0 is taken as out, the rest as in; roles come from names.
    """
    # An empty one of one axis is what ZeRO-3 leaves of a weight of any shape.
    weights = {
        name: info for name, info in every.items() if len(info.shape) >= 2 or 0 in info.shape
    }
    vocabularies = _vocabularies(weights)
    targets: list[Target] = []
    refusals: list[Refusal] = []
    for key, info in weights.items():
        if 0 in info.shape:
            refusals.append(Refusal(key, "tensor", EMPTY))
        elif info.dtype not in FLOATING:
            why = f"{info.dtype} is not a dtype of plain weights"
            refusals.append(Refusal(key, "tensor", why))
        else:
            targets.append(_target(key, info, vocabularies))
    note = "no graph was read: targets come from names and shapes, and their FLOPs are unknown"
    return Found(default_plan(targets), tuple(refusals), notes=(note,))


def _vocabularies(weights: Tensors) -> list[tuple[int, int]]:
    """The shapes [rows, width] of the embedding tables of tokens."""
    shapes = []
    for name, info in weights.items():
        if len(info.shape) != 2 or not _LOOKUP.search(name.removesuffix(".weight")):
            continue
        rows, width = info.shape
        if rows >= HEAD_ROWS:
            shapes.append((rows, width))
    return shapes


def _target(key: str, info: TensorInfo, vocabularies: list[tuple[int, int]]) -> Target:
    """The target of a whole tensor."""
    layout = plain_layout(info.shape)
    module = key.removesuffix(".weight")
    if is_head(key):
        role = "head"
    elif _LOOKUP.search(module):
        role = "embedding"
    else:
        role = role_of([module], (), layout, vocabularies)
    region = tuple((0, size) for size in info.shape)
    parameter = Parameter(key, info.shape, info.dtype)
    return Target(key, parameter, region, layout, "tensor", (), role)
