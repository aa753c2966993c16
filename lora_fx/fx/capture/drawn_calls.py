"""Calls beyond the example's sizes, at which a graph is compared with its model.

A graph whose blocks were copied may be the model's at the example and nowhere else: a window or a
clip of distances shows beyond its own length only. So two calls more are drawn. In one every free
size but the batch is four times the example's; in the other the batch is, the rest is small, and
floats are large. They are nearer where the graph holds only nearer, where the model does not run,
and beyond LONGEST, where a run would take long; a call of more than MOST_NUMBERS has no more than
four times the example's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain

import torch
from torch import fx

from lora_fx.fx.capture.example import sample_call
from lora_fx.fx.trees import tree_map_only
from lora_fx.inputs import BATCH, LARGEST_CUT, Inputs, Named

TIMES = (4, 3, 2)
"""A drawn size is so many times the example's: the first that graph and model take."""
LONGEST = 1024
"""No free size is drawn larger than this, or than the example's."""
MOST_NUMBERS = 2**22
"""Numbers in one input of a drawn call, where that is more than four times the example's."""
SMALL = 3
"""A free size where the batch is large."""
LARGE = 16.0
"""Factor of the floats where the batch is large: a clip of values shows at large ones only."""
aten = torch.ops.aten
_SCALAR_COMPARES = ("lt", "le", "gt", "ge", "eq", "ne", "rsub", "remainder", "fmod", "floor_divide")
_BOUNDED = ("clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "threshold", "tril", "triu")
_COMPARES = {
    *(getattr(aten, name).Scalar for name in _SCALAR_COMPARES),
    *(getattr(aten, name).default for name in _BOUNDED),
    aten.floor_divide.default,
    aten.div.Tensor_mode,
    aten.sub.Tensor,
    aten.full.default,  # for a minimum of two tensors
    aten.full_like.default,
}


def drawn_calls(
    inputs: Inputs, named: Named, graph: fx.Graph, device: torch.device
) -> list[Iterator[Named]]:
    """Calls at sizes other than the example's: two of them, each with variants to try in order.

    Args:
        inputs: The signature, with the limits and the free sizes of the graph.
        named: The example.
        graph: Its numbers tell which sizes may matter.
        device: That of the example's tensors.
    """
    example = _example_sizes(inputs)
    largest = _largest_sizes(inputs, example)
    batch = {symbol: size for symbol, size in example.items() if symbol == BATCH}
    lengths = {symbol: size for symbol, size in example.items() if symbol != BATCH}
    beyond_numbers = max((2 * number + 1 for number in _numbers(graph)), default=0)

    long = _multiples(lengths, largest, beyond_numbers)
    wide = _multiples(batch, largest)
    if lengths and batch:
        few_rows = {BATCH: min(batch[BATCH], 2)}
        small_lengths = {symbol: min(size, SMALL) for symbol, size in lengths.items()}
        long = [few_rows | sizes for sizes in long]
        wide = [*(sizes | small_lengths for sizes in wide), *(sizes | lengths for sizes in wide)]
    elif example:
        if not lengths:
            long = wide
        wide = [{symbol: size + 1 for symbol, size in example.items()}]

    seen_shapes = {tuple(spec.shape for spec in inputs.specs)}
    long = [sizes for sizes in long if _is_other(inputs, sizes, seen_shapes)]
    wide = [sizes for sizes in wide if _is_other(inputs, sizes, seen_shapes)]
    calls: list[Iterator[Named]] = []
    if long:
        draw = partial(sample_call, inputs, named, seed=0, device=device)
        calls.append(draw(sizes) for sizes in long)
    if wide:
        draw_wide = partial(sample_call, inputs, named, seed=1, device=device)
        large = (_multiplied(draw_wide(sizes), LARGE) for sizes in wide)
        ordinary = (draw_wide(sizes) for sizes in wide)
        calls.append(chain(large, ordinary))
    return calls


def _multiples(
    sizes: Mapping[str, int], largest: Mapping[str, int], least: int = 0
) -> list[dict[str, int]]:
    """Sizes several times as large, and no less than `least`: of each of TIMES."""
    multiples: list[dict[str, int]] = []
    for times in TIMES:
        multiple: dict[str, int] = {}
        for symbol, size in sizes.items():
            multiple[symbol] = min(max(times * size, least), largest[symbol])
        multiples.append(multiple)
    return multiples


def _example_sizes(inputs: Inputs) -> dict[str, int]:
    """Symbol of a free size → the example's size."""
    sizes: dict[str, int] = {}
    for spec in inputs.specs:
        for dim, symbol in spec.dims.items():
            if "+" not in symbol:
                sizes[symbol] = max(sizes.get(symbol, 0), spec.shape[dim])
    return sizes


def _largest_sizes(inputs: Inputs, example: Mapping[str, int]) -> dict[str, int]:
    """The largest value that each symbol may take."""
    largest = {symbol: max(size, LONGEST) for symbol, size in example.items()}
    for condition in inputs.conditions:
        _, high = condition.bounds()
        _, name, dim = condition.sizes[0]
        symbol = inputs.symbol(name, dim)
        if high is not None and symbol in largest:
            largest[symbol] = min(largest[symbol], high)
    return largest


def _numbers(graph: fx.Graph) -> list[int]:
    """Whole numbers that positions may be compared with: windows, clips of distances."""
    numbers: list[int] = []
    for node in graph.nodes:
        if node.target not in _COMPARES:
            continue
        for operand in node.args[1:]:
            if isinstance(operand, (int, float)) and operand == operand // 1:
                numbers.append(abs(int(operand)))
    return [number for number in numbers if 2 * number < LARGEST_CUT]


def _is_other(
    inputs: Inputs, sizes: Mapping[str, int], seen_shapes: set[tuple[tuple[int, ...], ...]]
) -> bool:
    """Whether the nearest sizes that the graph takes are new, and not too large to run.

    Args:
        inputs: The signature.
        sizes: The wanted size of each symbol.
        seen_shapes: Those of calls so far; gets these.
    """
    shapes_by_name = inputs.sizes(sizes)
    shapes = tuple(shapes_by_name[spec.name] for spec in inputs.specs)
    if shapes in seen_shapes:
        return False
    for spec, shape in zip(inputs.specs, shapes, strict=True):
        most = max(MOST_NUMBERS, TIMES[0] * math.prod(spec.shape))
        if math.prod(shape) > most:
            return False
    seen_shapes.add(shapes)
    return True


def _multiplied(named: Named, factor: float) -> Named:
    """A call whose floating tensors are multiplied."""

    def times(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * factor if tensor.is_floating_point() else tensor

    return dict(tree_map_only(torch.Tensor, times, dict(named)))
