"""Adapters trained on the parts of a fused weight, on the whole, and the reverse: both are exact.

    q, k, v apart → one matrix    the update of each is one of a part: ΔW[part] = s·b·a
    one matrix → q, k, v apart    rows of b: ΔW_q = s·b[q]·a, and so on, each with the same a

The names tell which belong together: the same module holds both, and the roles agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lora_fx.adapter.lowrank import Factors, LowRank, alpha_of
from lora_fx.adapter.variant import variant_of
from lora_fx.adapter.variant_protocol import Variant
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
    for roles, pattern in FUSED.items():
        if pattern.search(module):
            return roles
    role = role_by_name(module)
    return (role,) if role else ()


def other_split(key: str, entry: LowRank, found: Found) -> dict[str, LowRank]:
    """The update under the model's keys for the fused weight or its parts; empty if it has none.

    This is no rule of `lora_fx.targets.names`: what a key means here is rows of another tensor, and
    the update has to be cut to them. The first of these that applies decides:

    1. The model's targets are regions of this tensor: each gets its rows of the update.
    2. The update is of one part, and a fused weight in the same module has that part.
    3. The update is of a fused weight, and the module has its parts as weights of their own: each
       gets its rows, in the order of the roles. Rows of QKV may lie in another order.

    Args:
        key: A key that is no target of the model.
        entry: Its update, as a file of PEFT has it: `a` [rank, in], `b` [out, rank].
        found: The model's targets.
    """
    by_region = _by_region(key, entry, found)
    if by_region:
        return by_region

    roles = roles_of(key)
    module = parent(key)
    siblings = [target for target in found.targets if parent(target.parameter.name) == module]
    if len(roles) == 1:
        part = _part_of_fused(roles[0], siblings)
        return {} if part is None else {part: entry}
    if not roles or QKV in key or entry.b.ndim != 2:
        return {}
    return _by_role(roles, entry, siblings)


def _by_region(key: str, entry: LowRank, found: Found) -> dict[str, LowRank]:
    """The rows of an update of a whole tensor, under the keys of the tensor's regions."""
    regions = [target for target in found.targets if target.parameter.name == key]
    if any(target.layout != plain_layout(target.layout.stored) for target in regions):
        return {}
    regions.sort(key=lambda target: target.region[0])
    return _rows_by_target(entry, regions)


def _part_of_fused(role: str, siblings: Iterable[Target]) -> str | None:
    """The key of the part that has a role in a fused weight of the module."""
    for target in siblings:
        for part_role, part_key in target.parts:
            if part_role == role:
                return part_key
    return None


def _by_role(
    roles: Sequence[str], entry: LowRank, siblings: Iterable[Target]
) -> dict[str, LowRank]:
    """The rows of an update of a fused weight, under the keys of the module's split weights."""
    target_by_role = {target.role: target for target in siblings}
    if not all(role in target_by_role for role in roles):
        return {}
    return _rows_by_target(entry, [target_by_role[role] for role in roles])


def _rows_by_target(entry: LowRank, targets: Sequence[Target]) -> dict[str, LowRank]:
    """The update cut into ranges of rows, one for each target; empty unless they cover all rows."""
    sizes = [target.layout.out_size for target in targets]
    if not targets or sum(sizes) != entry.b.shape[0]:
        return {}

    updates = {}
    start = 0
    for target, size in zip(targets, sizes, strict=True):
        updates[target.key] = sliced(entry, np.arange(start, start + size))
        start += size
    return updates


def parent(name: str) -> str:
    """The module that holds the projection of a parameter's name.

    >>> parent("h.0.attn.qkv.weight"), parent("h.0.attn.in_proj_weight")
    ('h.0.attn', 'h.0.attn')
    """
    return name.removesuffix(".weight").rpartition(".")[0]


def sliced(low: LowRank, rows: Array) -> LowRank:
    """The update of some rows, without the ranks that reach none of them."""
    part = variant_of(low).rows(low, rows)
    reaching = part.b.any(axis=0)
    if not reaching.any():  # a b of zeros keeps its ranks
        reaching = np.full(part.rank, True)
    rank = int(reaching.sum())
    return replace(
        part,
        a=part.a[reaching],
        b=np.ascontiguousarray(part.b[:, reaching]),
        alpha=alpha_of(part.scale, rank, part.variant),
        layout=None,
        frozen=0,
        origin=replace(part.origin, layer=None),
    )


def joined(key: str, out: int, pieces: Mapping[str, tuple[LowRank, Array]]) -> LowRank:
    """Updates of different rows of one weight [out, in] as one: B in blocks, unless A is shared.

    Args:
        key: The weight, for messages.
        out: Its rows.
        pieces: Key of each update → the update, and the rows that it is of.

    Raises:
        LoraFxError: They do not fit each other, or only some have lengths of rows, as DoRA has.
    """
    lows = [low for low, _ in pieces.values()]
    # B is stored in units of one scale, so it is that of an update that has one.
    first = next((low for low in lows if low.scale), lows[0])
    scale = first.scale or 1.0
    blocks: list[Factors] = []
    row_lengths: dict[str, Array] = {}
    variant_with_lengths = variant_of(first)
    for name, (low, rows) in pieces.items():
        expected_shape = (len(rows), first.a.shape[1])
        if low.shape != expected_shape:
            raise MisfitError(
                f"the update of {name!r} is {list(low.shape)}, [out, in]; expected "
                f"{list(expected_shape)} for a part of {key!r}"
            )
        b = np.zeros((out, low.rank), np.float32)
        b[rows] = low.b * np.float32(low.scale / scale)
        _add_block(blocks, low.a, b, rows)

        variant = variant_of(low)
        for field, value in variant.beside(low).items():
            variant_with_lengths = variant
            if field not in row_lengths:
                row_lengths[field] = np.full(out, np.nan, np.float32)
            row_lengths[field][rows] = value
    _check_complete(key, out, row_lengths, variant_with_lengths)

    a = np.concatenate([a for a, _ in blocks])
    b = np.concatenate([b for _, b in blocks], axis=1)
    name = first.variant if variant_of(first).peft_type else "lora"
    low = LowRank(a, b, alpha_of(first.scale, len(a), name), variant=name)
    if not row_lengths:
        return low
    return variant_with_lengths.with_values(low, {"a": a, "b": b, **row_lengths})


def _add_block(blocks: list[Factors], a: Array, b: Array, rows: Array) -> None:
    """Add an update of some rows: to the block with the same a, or as a new block."""
    for block_a, block_b in blocks:
        if np.array_equal(block_a, a):
            block_b[rows] += b[rows]
            return
    blocks.append((a, b))


def _check_complete(key: str, out: int, row_lengths: Mapping[str, Array], variant: Variant) -> None:
    """Raise where only some of the rows have a length."""
    for lengths in row_lengths.values():
        count = int(np.isfinite(lengths).sum())
        if count < out:
            raise LoraFxError(
                f"{key!r}: only {count} of its {out} rows have a {variant.title} magnitude; "
                "expected all or none",
                "turn it into plain LoRA first, with --as lora and the base that it was trained on",
            )
