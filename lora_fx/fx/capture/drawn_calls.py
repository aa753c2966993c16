"""Calls beyond the example's sizes, at which a graph is compared with its model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from lora_fx.fx.capture.example import sample_call
from lora_fx.fx.trees import tree_map_only
from lora_fx.inputs import BATCH, LARGEST_CUT, Inputs, Named

TIMES = (4, 3, 2)
"""A drawn size in those of the example; the first that the graph and the model take."""
LONGEST = 1024
"""No free size is drawn larger than this, or than the example's."""
MOST_NUMBERS = 2**22
"""Of one input of a drawn call that has more than four times the example's."""
SMALL = 3
"""A free size where the batch is large."""
LARGE = 16.0
"""By what floats are multiplied there: a clip of values shows at large ones only."""
aten = torch.ops.aten
_COMPARES = {
    *(getattr(aten, name).Scalar for name in ("lt", "le", "gt", "ge", "eq", "ne", "rsub")),
    *(getattr(aten, name).Scalar for name in ("remainder", "fmod", "floor_divide")),
    *(getattr(aten, name).default for name in ("clamp", "clamp_min", "clamp_max", "clip")),
    *(getattr(aten, name).default for name in ("hardtanh", "threshold", "tril", "triu")),
    *(aten.floor_divide.default, aten.div.Tensor_mode, aten.sub.Tensor),
    *(aten.full.default, aten.full_like.default),  # for a minimum of two tensors
}


def drawn_calls(
    inputs: Inputs, named: Named, graph: fx.Graph, device: torch.device
) -> list[Iterator[Named]]:
    """Calls beyond the example's sizes: for each of two, what to try one after the other.

    Args:
        inputs: The signature, with the limits and the free sizes of the graph.
        named: The example.
        graph: Whose numbers tell which sizes may matter.
        device: Of the example's tensors.
    """
    example = _example_sizes(inputs)
    most = _most(inputs, example)
    others = {s: n for s, n in example.items() if s != BATCH}
    batch = {s: n for s, n in example.items() if s == BATCH}
    beyond = max((2 * n + 1 for n in _numbers(graph)), default=0)

    def times(sizes: Mapping[str, int], least: int = 0) -> list[dict[str, int]]:
        wanted = ({s: max(k * n, least) for s, n in sizes.items()} for k in TIMES)
        return [{s: min(n, most[s]) for s, n in w.items()} for w in wanted]

    long, wide = times(others, beyond), times(batch)
    if others and batch:
        few = {BATCH: min(batch[BATCH], 2)}
        small = {s: min(n, SMALL) for s, n in others.items()}
        long = [few | sizes for sizes in long]
        wide = [sizes | lengths for lengths in (small, others) for sizes in wide]
    elif example:
        long = long if others else wide
        wide = [{s: n + 1 for s, n in example.items()}]
    seen = {tuple(s.shape for s in inputs.specs)}
    rows = [[sizes for sizes in tried if _is_other(inputs, sizes, seen)] for tried in (long, wide)]
    factors = ((1.0,), (LARGE, 1.0))

    def drawn(seed: int) -> Iterator[Named]:
        for factor in factors[seed]:
            for sizes in rows[seed]:
                yield _scaled(sample_call(inputs, named, sizes, seed, device=device), factor)

    return [drawn(i) for i, row in enumerate(rows) if row]


def _example_sizes(inputs: Inputs) -> dict[str, int]:
    """What the symbols of free sizes are in the example."""
    found: dict[str, int] = {}
    for spec in inputs.specs:
        for d, symbol in spec.dims.items():
            if "+" not in symbol:
                found[symbol] = max(found.get(symbol, 0), spec.shape[d])
    return found


def _most(inputs: Inputs, example: Mapping[str, int]) -> dict[str, int]:
    """The largest value of every symbol."""
    most = {s: max(n, LONGEST) for s, n in example.items()}
    for condition in inputs.conditions:
        _, high = condition.bounds()
        symbol = inputs.symbol(*condition.sizes[0][1:])
        if high is not None and symbol in most:
            most[symbol] = min(most[symbol], high)
    return most


def _numbers(graph: fx.Graph) -> list[int]:
    """Whole numbers that positions may be compared with: windows, clips of distances."""
    operands = (a for n in graph.nodes if n.target in _COMPARES for a in n.args[1:])
    whole = [abs(int(a)) for a in operands if isinstance(a, (int, float)) and a == a // 1]
    return [n for n in whole if 2 * n < LARGEST_CUT]


def _is_other(
    inputs: Inputs, sizes: Mapping[str, int], seen: set[tuple[tuple[int, ...], ...]]
) -> bool:
    """Whether the nearest sizes that the graph takes are new, and not too large to run."""
    found = inputs.sizes(sizes)
    shapes = tuple(found[s.name] for s in inputs.specs)
    numbers = [(math.prod(found[s.name]), math.prod(s.shape)) for s in inputs.specs]
    if shapes in seen or any(n > max(MOST_NUMBERS, TIMES[0] * m) for n, m in numbers):
        return False
    seen.add(shapes)
    return True


def _scaled(named: Named, factor: float) -> Named:
    def times(x: torch.Tensor) -> torch.Tensor:
        return x * factor if x.is_floating_point() else x

    return dict(tree_map_only(torch.Tensor, times, dict(named)))
