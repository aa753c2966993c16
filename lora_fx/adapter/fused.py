"""Adapters trained on the parts of a fused weight, on the whole, and the reverse: both are exact.

    q, k, v apart → one matrix    the update of each is one of a part: ΔW[part] = s·b·a
    one matrix → q, k, v apart    rows of b: ΔW_q = s·b[q]·a, and so on, each with the same a

The names tell which belong together: the same module holds both, and the roles agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import Factors, LowRank, alpha_of
from lora_fx.adapter.variant import variant_of
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.layout import plain_layout
from lora_fx.targets.found import Found
from lora_fx.targets.target import Target
from lora_fx.targets.target_roles import role_by_name

QKV = "query_key_value"
"""A fused weight whose rows lie otherwise from model to model."""
FUSED = {
    ("q", "k", "v"): re.compile(
        rf"(^|\.)(qkv|qkv_proj|Wqkv|W_pack|c_attn|in_proj|in_proj_weight|{QKV})$"
    ),
    ("gate", "up"): re.compile(r"(^|\.)(gate_up_proj|gate_up)$"),
}
"""The roles of the parts of fused weights with such names."""


def roles_of(name: str) -> tuple[str, ...]:
    """The roles of the parts of a fused weight, or the one of another weight; empty for no role.

    >>> roles_of("h.0.attn.qkv_proj.weight"), roles_of("h.0.attn.q_proj.weight"), roles_of("h.0.ln")
    (('q', 'k', 'v'), ('q',), ())
    """
    module = name.removesuffix(".weight")
    for roles, rule in FUSED.items():
        if rule.search(module):
            return roles
    role = role_by_name(module)
    return (role,) if role else ()


def other_split(key: str, entry: LowRank, found: Found) -> dict[str, LowRank]:
    """The update under the keys that the model has instead; empty where it has none such.

    This is no rule of `lora_fx.targets.names`: what a key means here is rows of another tensor, and
    the update has to be cut to them.

    Args:
        key: A key that is no target of the model.
        entry: Its update, as a file of PEFT has it: `a` [rank, in], `b` [out, rank].
        found: The model's targets.
    """
    whole = [t for t in found.targets if t.parameter.name == key]
    whole.sort(key=lambda t: t.region[0])
    sizes = [t.layout.out_size for t in whole if t.layout == plain_layout(t.layout.stored)]
    if len(sizes) == len(whole) and sizes and sum(sizes) == entry.b.shape[0]:
        return dict(_rows(entry, whole, sizes))
    beside = [t for t in found.targets if parent(t.parameter.name) == parent(key)]
    roles = roles_of(key)
    if len(roles) == 1:
        part = next((part for t in beside for role, part in t.parts if role == roles[0]), None)
        return {} if part is None else {part: entry}
    if roles and QKV not in key and entry.b.ndim == 2:
        by_role = {t.role: t for t in beside}
        parts = [by_role[role] for role in roles if role in by_role]
        sizes = [t.layout.out_size for t in parts]
        if len(parts) == len(roles) and sum(sizes) == entry.b.shape[0]:
            return dict(_rows(entry, parts, sizes))
    return {}


def _rows(entry: LowRank, parts: list[Target], sizes: list[int]) -> Iterator[tuple[str, LowRank]]:
    ends = np.cumsum([0, *sizes])
    for t, low, high in zip(parts, ends[:-1], ends[1:], strict=True):
        yield t.key, sliced(entry, np.arange(low, high))


def parent(name: str) -> str:
    """The module that holds the projection of a parameter's name.

    >>> parent("h.0.attn.qkv.weight"), parent("h.0.attn.in_proj_weight")
    ('h.0.attn', 'h.0.attn')
    """
    return name.removesuffix(".weight").rpartition(".")[0]


def sliced(low: LowRank, rows: Array) -> LowRank:
    """The update of some rows, without the ranks that reach none of them."""
    part = variant_of(low).rows(low, rows)
    kept = part.b.any(axis=0) if part.b.any() else np.full(part.rank, True)
    alpha = alpha_of(part.scale, int(kept.sum()), part.variant)
    a = part.a[kept]
    b = np.ascontiguousarray(part.b[:, kept])
    origin = replace(part.origin, layer=None)
    return replace(part, a=a, b=b, alpha=alpha, layout=None, frozen=0, origin=origin)


def joined(key: str, out: int, pieces: Mapping[str, tuple[LowRank, Array]]) -> LowRank:
    """Updates of different rows of one weight [out, in] as one: B in blocks, unless A is shared.

    Raises:
        LoraFxError: They do not fit each other, or only some have lengths of rows, as DoRA has.
    """
    lows = [low for low, _ in pieces.values()]
    first = next((low for low in lows if low.scale), lows[0])  # the others' B is in units of it
    scale = first.scale or 1.0
    blocks = list[Factors]()
    beside = dict[str, Array]()
    stretched = variant_of(first)
    for name, (low, rows) in pieces.items():
        room = (len(rows), first.a.shape[1])
        if low.shape != room:
            raise MisfitError(
                f"the update of {name!r} is {list(low.shape)}, [out, in]; expected {list(room)}, "
                f"as a part of {key!r}"
            )
        b = np.zeros((out, low.rank), np.float32)
        b[rows] = low.b * np.float32(low.scale / scale)
        variant = variant_of(low)
        for field, value in variant.beside(low).items():
            stretched = variant
            beside.setdefault(field, np.full(out, np.nan, np.float32))[rows] = value
        same = next((one for one in blocks if np.array_equal(one[0], low.a)), None)
        if same is None:
            blocks.append((low.a, b))
        else:
            same[1][rows] += b[rows]
    for value in beside.values():
        count = int(np.isfinite(value).sum())
        if count < out:
            raise LoraFxError(
                f"{key!r}: {count} of its {out} rows have {stretched.title}'s lengths; expected "
                "all or none",
                "make plain LoRA of it first, by --as lora and the base that it was trained on",
            )
    a, b = np.concatenate([a for a, _ in blocks]), np.concatenate([b for _, b in blocks], axis=1)
    name = first.variant if variant_of(first).peft_type else "lora"
    whole = LowRank(a, b, alpha_of(first.scale, len(a), name), variant=name)
    return stretched.with_values(whole, {"a": a, "b": b, **beside}) if beside else whole
