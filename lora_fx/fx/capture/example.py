"""The example's signature, and random calls of other sizes that resemble the example."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import leaves_of
from lora_fx.fx.capture.door import Door
from lora_fx.fx.capture.onnx_names import onnx_name
from lora_fx.fx.graph.nodes import aten_ops, dtype_name, dtype_of, reached, shape_of
from lora_fx.fx.graph.views import VIEWS
from lora_fx.fx.tensors import from_numpy, has_values, to_numpy
from lora_fx.fx.trees import tree_structure, tree_unflatten
from lora_fx.inputs import Extents, Input, Inputs, Named

aten = torch.ops.aten
_ID_LIKE = {*VIEWS} | aten_ops(
    "add.Tensor add_.Tensor sub.Tensor masked_fill.Scalar masked_fill_.Scalar where.self cat "
    "new_zeros copy_ clamp"
)
"""Ops whose integer results index the same tables as their operands."""


def describe(named: Named) -> Inputs:
    """Return the signature of an example; integer limits come from the example's values."""
    leaves = leaves_of(named)
    return Inputs(tuple(_input(name, x) for name, x in leaves if isinstance(x, torch.Tensor)))


def _input(name: str, tensor: torch.Tensor) -> Input:
    high: int | None = None
    fill: int | None = None
    is_whole = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    if is_whole and tensor.numel() and has_values(tensor):
        if tensor.dtype != torch.bool:
            high = int(tensor.max()) + 1
        # torch's padding masks are True where a token is left out, those of transformers where not
        fill = int(tensor.double().mean() >= 0.5)
    return Input(name, dtype_name(tensor.dtype), tuple(tensor.shape), high=high, fill=fill)


def limits(inputs: Inputs, graph: fx.Graph, door: Door) -> tuple[Input, ...]:
    """Return the inputs with limits from the graph.

    Integers stay below the rows of the tables that they index, sizes where the graph is true.
    """
    places = graph.find_nodes(op="placeholder")
    rows: dict[str, list[int]] = {}
    for name, place in zip(door.names, places, strict=True):
        rows[name] = rows_reached(place)
    free_dims = door.free({spec.name: spec.dims for spec in inputs.specs})

    limited: list[Input] = []
    for spec in inputs.specs:
        high = min(rows.get(spec.name, ()), default=spec.high)
        dims = free_dims.get(spec.name, spec.dims)
        limited.append(replace(spec, high=high, dims=dims))
    return tuple(limited)


def rows_reached(place: fx.Node) -> list[int]:
    """Return the rows of each lookup table whose ids come from an input through id-like ops."""
    if not _is_whole(place):
        return []

    def id_like_users(node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user.target in _ID_LIKE and _is_whole(user)]

    rows: list[int] = []
    for ids in reached([place], id_like_users):
        for lookup in ids.users:
            if lookup.target is aten.embedding.default and lookup.args[1] is ids:
                table_shape = shape_of(lookup.args[0]) or ()
                rows += [int(size) for size in table_shape[:1]]
    return rows


def _is_whole(node: fx.Node) -> bool:
    """True for a tensor of integers or booleans."""
    dtype = dtype_of(node)
    return dtype is not None and not dtype.is_floating_point


def sample_call(
    inputs: Inputs,
    named: Named,
    size: Extents,
    seed: int = 0,
    arrays: Named | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Draw the arguments of one size; structure and constants come from the example.

    Args:
        inputs: The signature, with the sizes and limits to draw from.
        named: The example, which has the structure and the constants.
        size: The sizes of the symbols: see lora_fx.inputs.
        seed: Draws the numbers.
        arrays: Overrides by input name, from a user's .npz.
        device: Where the tensors go; without it they stay on the CPU.
    """
    drawn = dict(inputs.sample(size, seed))
    names_by_spelling = {onnx_name(name): name for name in drawn} | {name: name for name in drawn}
    for spelling, array in (arrays or {}).items():
        if spelling not in names_by_spelling:
            raise LoraFxError(
                f"no input is named {spelling!r}", f"the inputs are {', '.join(drawn)}"
            )
        values = to_numpy(array) if isinstance(array, torch.Tensor) else array
        drawn[names_by_spelling[spelling]] = values
    return filled(named, drawn, device)


def filled(named: Named, arrays: Named, device: torch.device | None = None) -> dict[str, Any]:
    """Rebuild named arguments, with their tensors from arrays by leaf name."""
    leaves: list[Any] = []
    for name, leaf in leaves_of(named):
        if isinstance(leaf, torch.Tensor):
            leaves.append(from_numpy(arrays[name]).to(device, leaf.dtype))
        else:
            leaves.append(leaf)
    return dict(tree_unflatten(leaves, tree_structure(dict(named))))
