"""Updates of expert stacks from files that do not say which parameter, or which way round.

PEFT stores an update of a parameter with `in` and `out` but without the parameter's shape. A
stack [E, out, in] is *straight*; a module that PEFT calls `is_transposed` has [E, in, out]. All
stacks of one module lie the same way. `place` takes every reading that fits the base's shapes and
goes on only where all of them agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from lora_fx.adapter.lowrank import Factors, LowRank, Updates
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.layout import Layout, plain_layout

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

    This is no rule of `lora_fx.targets.names`: the file has no name for a stack, and the shapes of
    all updates of a module together say which is which.

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
        if isinstance(entry, LowRank) and entry.origin.op == "experts" and not entry.layout:
            layer = entry.origin.layer
            module = layer.module if layer else ""
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


def _names(module: str, lows: Updates) -> set[str]:
    """Every name that an entry may mean."""
    maybe = (
        {f"{module}.{leaf}" for leaf in low.origin.candidates} or {key} for key, low in lows.items()
    )
    return set[str]().union(*maybe)


def _readings(module: str, lows: Updates, shape_of: Shapes) -> Iterator[Reading]:
    for way in permutations(sorted(_names(module, lows)), len(lows)):
        named = list(zip(lows, lows.values(), way, strict=True))
        if any(not low.origin.candidates and key != name for key, low, name in named):
            continue
        stacked = any(len(shape_of(name) or ()) == 3 for name in way)
        for turned in (False, True) if stacked else (False,):
            if all(_fits(low, name, shape_of(name), turned) for _, low, name in named):
                yield way, turned


def _fits(low: LowRank, name: str, shape: tuple[int, ...] | None, turned: bool) -> bool:
    """True where an update can be one of a parameter of this shape."""
    told: tuple[int, float] | None = (low.rank, low.alpha)
    if candidates := low.origin.candidates:
        told = candidates.get(name.rpartition(".")[2])
    if shape is None or told is None or len(shape) not in (2, 3):
        return False
    rows = low.a.shape[-2] * (low.a.shape[0] if low.a.ndim == 3 else 1)
    out, in_ = low.b.shape[-2], low.a.shape[-1]
    experts = shape[0] if len(shape) == 3 else 1
    sides = (in_, out) if turned and len(shape) == 3 else (out, in_)
    return rows == told[0] * experts and shape[-2:] == sides


def _only(
    module: str, lows: Sequence[LowRank], found: list[Reading], order: Sequence[str] | None
) -> Reading:
    """The one reading, or what to say."""
    if order is not None and len({names for names, _ in found}) > 1:
        at = {name: i for i, name in enumerate(order)}
        # Depth 0 is the outermost, which PEFT wrapped last.
        layers = [low.origin.layer for low in lows]
        depth = [layer.depth if layer else 0 for layer in layers]
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
    if candidates := low.origin.candidates:
        alpha = candidates[name.rpartition(".")[2]][1]
    origin = replace(low.origin, layer=None)
    if len(shape) == 2:
        return replace(low, a=a, b=b, alpha=alpha, layout=plain_layout(shape), origin=origin)
    if a.ndim == 2:
        a, b = unpacked(a, b, len(a) // shape[0])
    out, in_ = ((2,), (1,)) if turned else ((1,), (2,))
    layout = Layout(shape, (0,), out, in_, shape)
    return replace(low, a=a, b=b, alpha=alpha, layout=layout, origin=origin)


def unpacked(a: Array, b: Array, rank: int) -> Factors:
    """Factors [E, r, in] and [E, out, r] from PEFT's [r·E, in] and [out, r·E], expert fastest."""
    stack = a.reshape(-1, rank, a.shape[-1])
    return stack, np.ascontiguousarray(b.reshape(len(b), rank, -1).transpose(2, 0, 1))
