"""Adapters trained on split projections, on a fused weight, and the reverse: both are exact.

    q, k, v apart → one matrix    the update of each is one of a part: ΔW[part] = s·b·a
    one matrix → q, k, v apart    rows of b: ΔW_q = s·b[q]·a, and so on, each with the same a

The names tell which belong together: the same module holds both, and the roles agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from lora_fx.adapter.lowrank import LowRank, alpha_of
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.layout import Layout, plain_layout
from lora_fx.targets.target import Found, Target, role_by_name

QKV = "query_key_value"
"""A fused weight whose rows lie otherwise from model to model."""
FUSED = {
    ("q", "k", "v"): re.compile(
        rf"(^|\.)(qkv|qkv_proj|Wqkv|W_pack|c_attn|in_proj|in_proj_weight|{QKV})$"
    ),
    ("gate", "up"): re.compile(r"(^|\.)(gate_up_proj|gate_up)$"),
}
"""The roles of the parts of fused weights with such names."""


def other_split(key: str, entry: LowRank, found: Found) -> dict[str, LowRank]:
    """The update under the keys that the model has instead; empty where it has none such.

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
    path, role = parent(key), role_by_name(key.removesuffix(".weight"))
    for t in _beside(found, path):
        for r, part in t.parts:
            if r == role and role:
                return {part: entry}
    for roles, rule in FUSED.items():
        known = rule.search(key.removesuffix(".weight")) and QKV not in key
        if known and entry.b.ndim == 2:
            by_role = {t.role: t for t in _beside(found, path)}
            parts = [by_role[r] for r in roles if r in by_role]
            sizes = [t.layout.out_size for t in parts]
            if len(parts) == len(roles) and sum(sizes) == entry.b.shape[0]:
                return dict(_rows(entry, parts, sizes))
    return {}


def _rows(entry: LowRank, parts: list[Target], sizes: list[int]) -> Iterator[tuple[str, LowRank]]:
    ends = np.cumsum([0, *sizes])
    for t, low, high in zip(parts, ends[:-1], ends[1:], strict=True):
        yield t.key, sliced(entry, np.arange(low, high))


def _beside(found: Found, path: str) -> list[Target]:
    return [t for t in found.targets if parent(t.parameter.name) == path]


def parent(name: str) -> str:
    """The module that holds the projection of a parameter's name.

    >>> parent("h.0.attn.qkv.weight"), parent("h.0.attn.in_proj_weight")
    ('h.0.attn', 'h.0.attn')
    """
    return name.removesuffix(".weight").rpartition(".")[0]


# Without a model: the algebra alone, by the rows that each part has in the whole.


def sliced(low: LowRank, rows: Array) -> LowRank:
    """The update of some rows, without the ranks that reach none of them."""
    b, size = low.b[rows], low.magnitude
    kept = b.any(axis=0) if b.any() else np.full(low.rank, True)
    alpha = alpha_of(low.scale, int(kept.sum()), low.variant)
    size = None if size is None else size[rows]
    a, b = low.a[kept], np.ascontiguousarray(b[:, kept])
    return replace(low, a=a, b=b, alpha=alpha, magnitude=size, layout=None, frozen=0, layer=None)


def joined(key: str, out: int, pieces: Mapping[str, tuple[LowRank, Array]]) -> LowRank:
    """Updates of different rows of one weight [out, in] as one: B in blocks, unless A is shared.

    Raises:
        LoraFxError: They do not fit each other, or only some have DoRA's lengths of rows.
    """
    lows = [low for low, _ in pieces.values()]
    first = next((low for low in lows if low.scale), lows[0])  # the others' B is in units of it
    scale = first.scale or 1.0
    blocks, size = list[tuple[Array, Array]](), np.full(out, np.nan, np.float32)
    for name, (low, rows) in pieces.items():
        room = (len(rows), first.a.shape[1])
        if low.shape != room:
            raise MisfitError(
                f"the update of {name!r} is {list(low.shape)}, [out, in]; expected {list(room)}, "
                f"as a part of {key!r}"
            )
        b = np.zeros((out, low.rank), np.float32)
        b[rows] = low.b * np.float32(low.scale / scale)
        size[rows] = size[rows] if low.magnitude is None else low.magnitude
        same = next((one for one in blocks if np.array_equal(one[0], low.a)), None)
        if same is None:
            blocks.append((low.a, b))
        else:
            same[1][rows] += b[rows]
    count = int(np.isfinite(size).sum())
    if count not in (0, out):
        raise LoraFxError(
            f"{key!r}: {count} of its {out} rows have DoRA's lengths; expected all or none",
            "make plain LoRA of it first, by --as lora and the base that it was trained on",
        )
    a, b = np.concatenate([a for a, _ in blocks]), np.concatenate([b for _, b in blocks], axis=1)
    alpha = alpha_of(first.scale, len(a), first.variant)
    return LowRank(a, b, alpha, variant=first.variant, magnitude=size if count else None)


# Updates of expert stacks from files that do not say which parameter, or which way round.
#
# PEFT stores an update of a parameter with `in` and `out` but without the parameter's shape. A
# stack [E, out, in] is *straight*; a module that PEFT calls `is_transposed` has [E, in, out]. All
# stacks of one module lie the same way. `place` takes every reading that fits the base's shapes and
# goes on only where all of them agree.


Shapes = Callable[[str], tuple[int, ...] | None]
Reading = tuple[tuple[str, ...], bool]
"""(the parameter of each entry, True where stacks are [E, in, out])."""


def place(
    entries: Mapping[str, Entry],
    shape_of: Shapes,
    order: Sequence[str] | None = None,
    *,
    turned: bool | None = None,
) -> dict[str, Entry]:
    """The entries with stacks of experts under their own names, each with its Layout.

    What a binder does with updates whose op is experts: call this before it matches keys.

    Args:
        entries: The entries of an unbound adapter.
        shape_of: Stored shape of a parameter by the adapter's name for it; None where the base has
            none.
        order: Names in the order in which the model defines them, where that is known; the first
            of two parameters of a module is the innermost in PEFT's file.
        turned: Stacks are [E, in, out] (True) or [E, out, in] (False), where that is known from
            elsewhere; it decides only where the shapes allow both.

    Raises:
        LoraFxError: No reading fits the shapes, or more than one does.
    """
    result = dict(entries)
    modules: dict[str, dict[str, LowRank]] = {}
    for key, entry in entries.items():
        if isinstance(entry, LowRank) and entry.op == "experts" and not entry.layout:
            module = entry.layer.module if entry.layer else ""
            modules.setdefault(module or key.rpartition(".")[0], {})[key] = entry
    for module, lows in modules.items():
        if not any(shape_of(name) for name in _names(module, lows)):
            continue  # the binder says which names the base lacks
        found = list(_readings(module, lows, shape_of))
        if turned is not None:
            found = [reading for reading in found if reading[1] == turned] or found
        names, way = _only(module, [*lows.values()], found, order)
        placed: dict[str, tuple[str, Entry]] = {}
        for (key, low), name in zip(lows.items(), names, strict=True):
            shape = shape_of(name)
            assert shape is not None  # _readings saw it
            placed[key] = (name, _placed(low, name, shape, way))
        # In place, so that the order of the file is kept.
        result = dict(placed.get(k, (k, v)) for k, v in result.items())
    return result


def _names(module: str, lows: Mapping[str, LowRank]) -> set[str]:
    """Every name that an entry may mean."""
    result = set()
    for key, low in lows.items():
        result |= {f"{module}.{p}" for p in low.candidates} or {key}
    return result


def _readings(module: str, lows: Mapping[str, LowRank], shape_of: Shapes) -> Iterator[Reading]:
    for way in permutations(sorted(_names(module, lows)), len(lows)):
        named = list(zip(lows, lows.values(), way, strict=True))
        if any(not low.candidates and key != name for key, low, name in named):
            continue
        stacked = any(len(shape_of(name) or ()) == 3 for name in way)
        for turned in (False, True) if stacked else (False,):
            if all(_fits(low, name, shape_of(name), turned) for _, low, name in named):
                yield way, turned


def _fits(low: LowRank, name: str, shape: tuple[int, ...] | None, turned: bool) -> bool:
    """True where an update can be one of a parameter of this shape."""
    rank = _rank(low, name)
    if shape is None or rank is None or len(shape) not in (2, 3):
        return False
    rows = low.a.shape[-2] * (low.a.shape[0] if low.a.ndim == 3 else 1)
    out, in_ = low.b.shape[-2], low.a.shape[-1]
    experts = shape[0] if len(shape) == 3 else 1
    sides = (in_, out) if turned and len(shape) == 3 else (out, in_)
    return rows == rank * experts and shape[-2:] == sides


def _rank(low: LowRank, name: str) -> int | None:
    if not low.candidates:
        return low.rank
    told = low.candidates.get(name.rpartition(".")[2])
    return None if told is None else told[0]


def _only(
    module: str, lows: Sequence[LowRank], found: list[Reading], order: Sequence[str] | None
) -> Reading:
    """The one reading, or what to say."""
    if order is not None and len({names for names, _ in found}) > 1:
        at = {name: i for i, name in enumerate(order)}
        # Depth 0 is the outermost, which PEFT wrapped last.
        depth = [low.layer.depth if low.layer else 0 for low in lows]
        found = [
            (names, turned)
            for names, turned in found
            if [n for _, n in sorted(zip(depth, names, strict=True), reverse=True)]
            == sorted(names, key=lambda n: at.get(n, 0))
        ]
    shapes = ", ".join(f"A {list(low.a.shape)} and B {list(low.b.shape)}" for low in lows)
    if not found:
        raise MisfitError(
            f"the updates of the parameters of {module!r} ({shapes}) fit no parameter of the base"
        )
    if len({names for names, _ in found}) > 1:
        raise LoraFxError(
            f"the updates of the parameters of {module!r} ({shapes}) fit "
            f"{' and '.join(found[0][0])} in more than one order; PEFT's file does not say which",
            "merge it into its model with PEFT (merge_and_unload)",
        )
    if len(found) > 1:
        raise LoraFxError(
            f"the experts of {module!r} are square ({shapes}); PEFT's file does not say whether "
            "they are stored [out, in] or [in, out]",
            "merge it into its model with PEFT (merge_and_unload)",
        )
    return found[0]


def _placed(low: LowRank, name: str, shape: tuple[int, ...], turned: bool) -> LowRank:
    """An update with a, b, alpha and Layout of its parameter."""
    a, b, alpha = low.a, low.b, low.alpha
    if low.candidates:
        alpha = low.candidates[name.rpartition(".")[2]][1]
    if len(shape) == 2:
        return replace(low, a=a, b=b, alpha=alpha, layout=plain_layout(shape), layer=None)
    experts = shape[0]
    if a.ndim == 2:  # the file's own packing, the expert fastest in B
        a = a.reshape(experts, -1, a.shape[-1])
        b = b.reshape(len(b), -1, experts).transpose(2, 0, 1).copy()
    out, in_ = ((2,), (1,)) if turned else ((1,), (2,))
    layout = Layout(shape, (0,), out, in_, shape)
    return replace(low, a=a, b=b, alpha=alpha, layout=layout, layer=None)
