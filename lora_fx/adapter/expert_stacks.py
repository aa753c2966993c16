"""Updates of expert stacks from files that record neither the parameter nor the axis order.

PEFT stores an update of a parameter with `in` and `out` but without the parameter's shape. A
stack [E, out, in] is *straight*; a module that PEFT calls `is_transposed` has [E, in, out]. All
stacks of one module lie the same way. `place` takes every reading that fits the base's shapes and
goes on only where all of them agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import numpy as np

from lora_fx.adapter.lowrank import Factors, LowRank, Updates
from lora_fx.adapter.updates import Entry
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, MisfitError
from lora_fx.ir.layout import Layout, plain_layout

Shapes = Callable[[str], tuple[int, ...] | None]


class Reading(NamedTuple):
    """One way to read the updates of a module.

    Attributes:
        names: The parameter of each update.
        turned: True where stacks are [E, in, out].
    """

    names: tuple[str, ...]
    turned: bool


def place(
    entries: Mapping[str, Entry],
    shape_of: Shapes,
    order: Sequence[str] | None = None,
    *,
    turned: bool | None = None,
) -> dict[str, Entry]:
    """The entries with stacks of experts under their own names, each with its Layout.

    This is no rule of `lora_fx.targets.names`: the file has no name for a stack, and the shapes of
    all updates of a module together say which is which. A binder calls this before it matches keys.

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
    for module, lows in _unplaced_by_module(entries).items():
        if not any(shape_of(name) for name in _possible_names(module, lows)):
            continue  # the binder says which names the base lacks
        readings = list(_readings(module, lows, shape_of))
        if turned is not None:
            readings = [reading for reading in readings if reading.turned == turned] or readings
        reading = _only_reading(module, [*lows.values()], readings, order)

        placed: dict[str, tuple[str, Entry]] = {}
        for (key, low), name in zip(lows.items(), reading.names, strict=True):
            shape = shape_of(name)
            assert shape is not None  # _readings saw it
            placed[key] = (name, _placed(low, name, shape, reading.turned))
        # In place, so that the order of the file is kept.
        result = dict(placed.get(key, (key, entry)) for key, entry in result.items())
    return result


def _unplaced_by_module(entries: Mapping[str, Entry]) -> dict[str, dict[str, LowRank]]:
    """The updates of stacks that have no Layout, by the module that holds the stacks."""
    by_module: dict[str, dict[str, LowRank]] = {}
    for key, entry in entries.items():
        if not isinstance(entry, LowRank) or entry.origin.op != "experts" or entry.layout:
            continue
        layer = entry.origin.layer
        module = key.rpartition(".")[0]
        if layer is not None and layer.module:
            module = layer.module
        by_module.setdefault(module, {})[key] = entry
    return by_module


def _possible_names(module: str, lows: Updates) -> set[str]:
    """Every parameter that one of the updates may be of."""
    names: set[str] = set()
    for key, low in lows.items():
        candidates = {f"{module}.{leaf}" for leaf in low.origin.candidates}
        names |= candidates or {key}
    return names


def _readings(module: str, lows: Updates, shape_of: Shapes) -> Iterator[Reading]:
    """Every way to give the updates a parameter each, and stacks one orientation, that fits."""
    for names in permutations(sorted(_possible_names(module, lows)), len(lows)):
        if not _keeps_known_names(lows, names):
            continue
        has_stack = any(len(shape_of(name) or ()) == 3 for name in names)
        orientations = (False, True) if has_stack else (False,)
        for turned in orientations:
            pairs = zip(lows.values(), names, strict=True)
            if all(_fits(low, name, shape_of(name), turned) for low, name in pairs):
                yield Reading(names, turned)


def _keeps_known_names(lows: Updates, names: Sequence[str]) -> bool:
    """True where every update whose key names its parameter is read as one of that."""
    for (key, low), name in zip(lows.items(), names, strict=True):
        if not low.origin.candidates and key != name:
            return False
    return True


def _fits(low: LowRank, name: str, shape: tuple[int, ...] | None, turned: bool) -> bool:
    """True where an update can be one of a parameter of this shape."""
    if shape is None or len(shape) not in (2, 3):
        return False
    rank = low.rank
    candidates = low.origin.candidates
    if candidates:
        leaf = name.rpartition(".")[2]
        if leaf not in candidates:
            return False
        rank, _ = candidates[leaf]

    is_stack = len(shape) == 3
    experts = shape[0] if is_stack else 1
    sides = (low.b.shape[-2], low.a.shape[-1])
    if is_stack and turned:
        sides = sides[::-1]
    ranks_of_all_experts = math.prod(low.a.shape[:-1])  # [E, r, in], or PEFT's [r·E, in]
    return ranks_of_all_experts == rank * experts and shape[-2:] == sides


def _only_reading(
    module: str, lows: Sequence[LowRank], readings: list[Reading], order: Sequence[str] | None
) -> Reading:
    """The only reading; raises LoraFxError if there is none, or more than one."""
    if order is not None and _differ_in_names(readings):
        readings = [reading for reading in readings if _is_as_defined(reading.names, lows, order)]

    shapes = ", ".join(f"A {list(low.a.shape)} and B {list(low.b.shape)}" for low in lows)
    if not readings:
        raise MisfitError(
            f"the updates of the parameters of {module!r} ({shapes}) fit no parameter of the base"
        )
    if _differ_in_names(readings):
        raise LoraFxError(
            f"the updates of the parameters of {module!r} ({shapes}) fit "
            f"{' and '.join(readings[0].names)} in more than one order, and PEFT's file does not "
            "record the order",
            "merge it into its model with PEFT (merge_and_unload)",
        )
    if len(readings) > 1:
        raise LoraFxError(
            f"the experts of {module!r} are square ({shapes}), and PEFT's file does not record "
            "whether they are stored [out, in] or [in, out]",
            "merge it into its model with PEFT (merge_and_unload)",
        )
    return readings[0]


def _differ_in_names(readings: Sequence[Reading]) -> bool:
    return len({reading.names for reading in readings}) > 1


def _is_as_defined(names: Sequence[str], lows: Sequence[LowRank], order: Sequence[str]) -> bool:
    """True where PEFT's layers lie as the module defines its parameters, the first innermost."""
    position = {name: i for i, name in enumerate(order)}
    # Depth 0 is the outermost, which PEFT wrapped last.
    layers = [low.origin.layer for low in lows]
    depths = [layer.depth if layer else 0 for layer in layers]
    by_depth = sorted(zip(depths, names, strict=True), reverse=True)
    innermost_first = [name for _, name in by_depth]
    return innermost_first == sorted(names, key=lambda name: position.get(name, 0))


def _placed(low: LowRank, name: str, shape: tuple[int, ...], turned: bool) -> LowRank:
    """An update with a, b, alpha and Layout of its parameter."""
    alpha = low.alpha
    candidates = low.origin.candidates
    if candidates:
        _, alpha = candidates[name.rpartition(".")[2]]
    origin = replace(low.origin, layer=None)
    if len(shape) == 2:
        return replace(low, alpha=alpha, layout=plain_layout(shape), origin=origin)

    a = low.a
    b = low.b
    if a.ndim == 2:
        a, b = unpacked(a, b, len(a) // shape[0])
    layout = Layout(shape, (0,), (1,), (2,), shape)
    if turned:
        layout = replace(layout, out=(2,), in_=(1,))
    return replace(low, a=a, b=b, alpha=alpha, layout=layout, origin=origin)


def unpacked(a: Array, b: Array, rank: int) -> Factors:
    """Factors [E, r, in] and [E, out, r] from PEFT's [r·E, in] and [out, r·E], expert fastest."""
    stack = a.reshape(-1, rank, a.shape[-1])
    return stack, np.ascontiguousarray(b.reshape(len(b), rank, -1).transpose(2, 0, 1))
