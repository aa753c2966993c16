"""Largest sizes of a capture's free dimensions, for runtimes that plan memory ahead."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from lora_fx.conditions import Condition
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.trees import tree_leaves
from lora_fx.text import near

ASKED = "largest"
"""What stands for the line of code in a condition that the user asked for."""


def with_largest(captured: Captured, largest: Mapping[str, int]) -> Captured:
    """Return a capture of the example's path that is true up to these sizes only.

    Args:
        captured: It is not changed.
        largest: Symbol of a free dimension (batch, length …) → its largest size.

    Raises:
        LoraFxError: A symbol that no dimension has, a size of 1, which torch takes for a constant,
            or an example that is larger.
    """
    conditions: list[Condition] = []
    free = captured.traced(False, captured.named).door.free(captured.requested)
    for symbol, size in largest.items():
        dimensions: list[tuple[str, int]] = []
        for name, symbols in free.items():
            dimensions += [(name, axis) for axis, other in symbols.items() if other == symbol]
        if dimensions and size < 2:
            raise LoraFxError(
                f"the largest {symbol} is {size}, which leaves it no other size",
                "leave it out, and fix all sizes with --static",
            )
        if not dimensions:
            raise _no_such_dimension(captured, symbol, free)
        for name, dimension in dimensions:
            conditions.append(Condition(f"s0 <= {size}", (("s0", name, dimension),), ASKED, True))

    bounded = copy.copy(captured)
    bounded.tracings = {}
    for key, tracings in captured.tracings.items():
        door = tracings[0].door
        door = replace(door, conditions=(*door.conditions, *conditions))
        bounded.tracings[key] = [replace(tracings[0], door=door, analyses={})]
    bounded.inputs = replace(captured.inputs, conditions=(*captured.inputs.conditions, *conditions))
    bounded._limits_known = False
    bounded.unproven = {}
    # an example that is larger could be none
    bounded.traced(False, bounded.named).door.check(tree_leaves(bounded.named))
    return bounded


def _no_such_dimension(
    captured: Captured, symbol: str, free: Mapping[str, Mapping[int, str]]
) -> LoraFxError:
    """Return the error for a symbol that no free dimension has; a pin may be the reason."""
    for pin in captured.pinned:
        if captured.requested.get(pin.input, {}).get(pin.dim) == symbol:
            return LoraFxError(f"{symbol} has no largest size: {pin}", "leave it out")
    symbols: list[str] = []
    for names in free.values():
        symbols += names.values()
    return LoraFxError(
        f"no dimension that is free has the name {symbol!r}",
        near(symbol, sorted({*symbols}), "name one with --dynamic NAME:0=batch"),
    )
