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
from lora_fx.fx.capture.call import leaf_names
from lora_fx.fx.capture.example import filled
from lora_fx.fx.capture.onnx_names import onnx_name
from lora_fx.fx.module.execution import execution_of
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import has_values, to_numpy
from lora_fx.fx.trees import tree_leaves
from lora_fx.inputs import Extents, Named


def arrays_of(named: Named) -> dict[str, Array]:
    """The tensors among flattened named arguments, as arrays by ONNX input name."""
    leaves = zip(leaf_names(named), tree_leaves(dict(named)), strict=True)
    return {
        onnx_name(name): to_numpy(leaf) for name, leaf in leaves if isinstance(leaf, torch.Tensor)
    }


def named_of(example: Named, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """Named arguments of arrays, in the structure of the example and with its constants.

    It is the reverse of arrays_of.
    """
    leaves = tree_leaves(dict(example))
    first = next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    device = None if first.is_meta else first.device
    arrays = {name: feeds.get(onnx_name(name)) for name in leaf_names(example)}
    return filled(example, arrays, device)


def is_real(named: Named) -> bool:
    """Whether arguments have values: the example of a file, or of a meta model, has none."""
    leaves = tree_leaves(dict(named))
    return all(has_values(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


def feeds_of(
    reference: CapturedModule, arrays: Named | None = None, sizes: Sequence[Extents] | None = None
) -> Iterator[tuple[Named, dict[str, Array], bool]]:
    """(named arguments, {ONNX input: array}, whether it may fail) of every size and the example.

    Args:
        reference: The model; it notes the sizes at which its graph does not hold.
        arrays: A user's inputs instead of sampled ones: they are of one size.
        sizes: Instead of those of the capture, and of the example.
    """
    captured = execution_of(reference).captured
    checked_sizes = sizes or captured.inputs.checks
    if arrays is not None:
        checked_sizes = checked_sizes[:1]

    drawn_shapes: set[tuple[tuple[int, ...], ...]] = set()
    for size in checked_sizes:
        named = execution_of(reference).sample(size, arrays)
        feeds = arrays_of(named)
        shapes = tuple(array.shape for array in feeds.values())
        if shapes in drawn_shapes:
            continue
        drawn_shapes.add(shapes)
        refused = outside(reference, named)
        if refused:
            leave_out(
                reference,
                shapes_of(feeds),
                f"the model takes another path there: {refused.message}",
            )
            continue
        # a size by the names of dimensions lies beyond a cut of the model
        yield named, feeds, isinstance(size, Mapping)

    if arrays is None and sizes is None and is_real(captured.named):
        example = execution_of(reference).in_own_dtype()
        yield example, arrays_of(example), True


def outside(reference: CapturedModule, named: Named) -> SizeError | None:
    """The reason why the graph of the example is not valid at these sizes; None if it is."""
    captured = execution_of(reference).captured
    traced = captured.traced(False, captured.named, execution_of(reference).base_dtype)
    return traced.door.refused(tree_leaves(dict(named)))


def leave_out(reference: CapturedModule, sizes: Mapping[str, tuple[int, ...]], reason: str) -> None:
    """Note a size that nothing is proven of, for the report."""
    row = {"sizes": {name: list(shape) for name, shape in sizes.items()}, "reason": reason}
    execution_of(reference).captured.unproven[str(sizes)] = row
