"""Adapters trained on split projections, on a fused weight, and the reverse: both are exact.

    q, k, v apart → one matrix    the update of each is one of a part: ΔW[part] = s·b·a
    one matrix → q, k, v apart    rows of b: ΔW_q = s·b[q]·a, and so on, each with the same a

The names tell which belong together: the same module holds both, and the roles agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from lora_fx.lowrank import LowRank
from lora_fx.targets.found import Found
from lora_fx.targets.roles import role_by_name
from lora_fx.targets.target import Target

_FUSED = (
    (re.compile(r"(^|\.)(qkv|qkv_proj|Wqkv|c_attn|in_proj|in_proj_weight)$"), ("q", "k", "v")),
    (re.compile(r"(^|\.)(gate_up_proj|gate_up)$"), ("gate", "up")),
)


def other_split(key: str, entry: LowRank, found: Found) -> dict[str, LowRank]:
    """The update under the keys that the model has instead; empty where it has none such.

    Args:
        key: A key that is no target of the model.
        entry: Its update, as a file of PEFT has it: `a` [rank, in], `b` [out, rank].
        found: The model's targets.
    """
    path, role = _parent(key), role_by_name(key.removesuffix(".weight"))
    for t in _beside(found, path):
        for r, part in t.parts:
            if r == role and role:
                return {part: entry}
    for rule, roles in _FUSED:
        if rule.search(key.removesuffix(".weight")) and entry.b.ndim == 2:
            by_role = {t.role: t for t in _beside(found, path)}
            parts = [by_role[r] for r in roles if r in by_role]
            sizes = [t.layout.out_size for t in parts]
            if len(parts) == len(roles) and sum(sizes) == entry.b.shape[0]:
                return dict(_rows(entry, parts, sizes))
    return {}


def _rows(entry: LowRank, parts: list[Target], sizes: list[int]) -> Iterator[tuple[str, LowRank]]:
    start = 0
    for t, n in zip(parts, sizes, strict=True):
        rows = slice(start, start + n)
        size = None if entry.magnitude is None else entry.magnitude[rows]
        yield t.key, replace(entry, b=entry.b[rows], layout=None, magnitude=size)
        start += n


def _beside(found: Found, path: str) -> list[Target]:
    return [t for t in found.targets if _parent(t.parameter.name) == path]


def _parent(name: str) -> str:
    """The module that holds the projection of a parameter's name.

    >>> _parent("h.0.attn.qkv.weight"), _parent("h.0.attn.in_proj_weight")
    ('h.0.attn', 'h.0.attn')
    """
    return name.removesuffix(".weight").rpartition(".")[0]
