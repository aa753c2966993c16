"""The inputs at which a captured model is compared, and the sizes that are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lora_fx.compare import (
    shapes_of,
)
from lora_fx.conditions import SizeError
from lora_fx.dtypes import Array
from lora_fx.fx.capture.call import filled, leaf_names, onnx_name
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import has_values, to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Extents, Named


def arrays_of(named: Named) -> dict[str, Array]:
    """The tensors among flattened named arguments, as arrays by ONNX input name."""
    return {
        onnx_name(n): to_numpy(x)
        for n, x in zip(leaf_names(named), tree_leaves(dict(named)), strict=True)
        if isinstance(x, torch.Tensor)
    }


def named_of(example: Named, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """What arrays_of was made of, in the structure of the example and with its constants."""
    first = next(x for x in tree_leaves(dict(example)) if isinstance(x, torch.Tensor))
    device = None if first.is_meta else first.device
    return filled(example, {n: feeds.get(onnx_name(n)) for n in leaf_names(example)}, device)


def feeds_of(
    reference: CapturedModule, arrays: Named | None = None, sizes: Sequence[Extents] | None = None
) -> Iterator[tuple[Named, dict[str, Array], bool]]:
    """(named arguments, {ONNX input: array}, whether it may fail) of every size and the example."""
    seen: set[tuple[tuple[int, ...], ...]] = set()
    captured = reference.captured
    every, sizes = sizes is None, sizes or captured.inputs.checks
    for size in sizes if arrays is None else sizes[:1]:
        named = reference.sample(size, arrays)
        feeds = arrays_of(named)
        shapes = tuple(v.shape for v in feeds.values())
        if shapes in seen:
            continue
        seen.add(shapes)
        if refused := outside(reference, named):
            leave_out(reference, shapes_of(feeds), f"another path: {refused.message}")
            continue
        yield named, feeds, isinstance(size, Mapping)
    if arrays is None and every and is_real(captured.named):
        example = reference._in_own_dtype()
        yield example, arrays_of(example), True


def leave_out(reference: CapturedModule, sizes: Mapping[str, tuple[int, ...]], reason: str) -> None:
    """Note a size that nothing is proven of, for the report."""
    row = {"sizes": {k: list(v) for k, v in sizes.items()}, "reason": reason}
    reference.captured.unproven[str(sizes)] = row


def is_real(named: Named) -> bool:
    """Whether arguments have values: the example of a file, or of a meta model, has none."""
    leaves = (x for x in tree_leaves(dict(named)) if isinstance(x, torch.Tensor))
    return all(has_values(x) for x in leaves)


def outside(reference: CapturedModule, named: Named) -> SizeError | None:
    """Why the graph of the example does not hold at these sizes; None where it does."""
    captured = reference.captured
    traced = captured.traced(False, captured.named, reference.base_dtype)
    return traced.door.refused(tree_leaves(dict(named)))
