"""The tensors of a file or folder that an adapter can take.

Only headers are read, and every one strictly (see lora_fx.files.safetensors).
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_fx.checkpoint.tied_names import is_head
from lora_fx.dtypes import FLOATING
from lora_fx.files.checkpoint import tensors
from lora_fx.files.safetensors import Tensors
from lora_fx.ir.graph import Parameter
from lora_fx.ir.layout import plain_layout
from lora_fx.targets.plan import HEAD_ROWS, default_plan
from lora_fx.targets.target import Found, Refusal, Target, role_of

EMPTY = "it is empty: saved under ZeRO-3 or FSDP without gathering the shards?"


_LOOKUP = re.compile(r"(^|\.)(\w*embed(ding)?s?(_tokens|_in)?|wte|wpe|shared)$")


def file_targets(path: str | Path) -> Found:
    """The targets of a file or folder; see `targets_of`."""
    return targets_of(tensors(path))


def targets_of(every: Tensors) -> Found:
    """The targets of tensors without a graph: every float tensor of two or more dimensions.

    Axis 0 is taken as out, the rest as in; roles come from names.
    """
    # An empty one of one axis is what ZeRO-3 leaves of a weight of any shape.
    found = {k: v for k, v in every.items() if len(v.shape) >= 2 or 0 in v.shape}
    tables = [v.shape for k, v in found.items() if _LOOKUP.search(k.removesuffix(".weight"))]
    vocabularies = [(s[0], s[1]) for s in tables if len(s) == 2 and s[0] >= HEAD_ROWS]
    targets, refusals = [], []
    for key, info in found.items():
        if info.dtype not in FLOATING or 0 in info.shape:
            why = EMPTY if 0 in info.shape else f"{info.dtype} is no dtype of plain weights"
            refusals.append(Refusal(key, "tensor", why))
            continue
        layout, name = plain_layout(info.shape), key.removesuffix(".weight")
        role = "head" if is_head(key) else "embedding" if _LOOKUP.search(name) else ""
        role = role or role_of([name], (), layout, vocabularies)
        region = tuple((0, n) for n in info.shape)
        parameter = Parameter(key, info.shape, info.dtype)
        targets.append(Target(key, parameter, region, layout, "tensor", (), role))
    note = "no graph was read: targets come from names and shapes, and their FLOPs are not known"
    return Found(default_plan(targets), tuple(refusals), notes=(note,))
