"""The example's signature, and calls of other sizes that are drawn like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.call import leaves_of
from lora_fx.fx.capture.door import Door
from lora_fx.fx.capture.onnx_names import onnx_name
from lora_fx.fx.graph.flow import VIEWS
from lora_fx.fx.graph.nodes import aten_ops, dtype_name, dtype_of, reached, shape_of
from lora_fx.fx.tensors import from_numpy, has_values
from lora_fx.fx.trees import tree_structure, tree_unflatten
from lora_fx.inputs import Extents, Input, Inputs, Named

aten = torch.ops.aten
_PASS = {*VIEWS} | aten_ops(
    "add.Tensor add_.Tensor sub.Tensor masked_fill.Scalar masked_fill_.Scalar where.self cat "
    "new_zeros copy_ clamp"
)


def describe(named: Named) -> Inputs:
    """The signature of an example; integers take their limit from the example for now."""
    specs = []
    for name, x in leaves_of(named):
        if not isinstance(x, torch.Tensor):
            continue
        whole = not x.dtype.is_floating_point and not x.dtype.is_complex
        real = whole and x.numel() and has_values(x)
        high = int(x.max()) + 1 if real and x.dtype != torch.bool else None
        # torch's padding masks are True where a token is left out, those of transformers where not
        fill = int(x.double().mean() >= 0.5) if real else None
        specs.append(Input(name, dtype_name(x.dtype), tuple(x.shape), high=high, fill=fill))
    return Inputs(tuple(specs))


def limits(inputs: Inputs, graph: fx.Graph, door: Door) -> tuple[Input, ...]:
    """The inputs with their limits.

    Integers stay below the rows of the tables that they index, sizes where the graph is true.
    """
    places = zip(door.names, graph.find_nodes(op="placeholder"), strict=True)
    rows = {name: _rows_reached(place) for name, place in places}
    free = door.free({s.name: s.dims for s in inputs.specs})
    return tuple(
        replace(s, high=min(rows.get(s.name, ()), default=s.high), dims=free.get(s.name, s.dims))
        for s in inputs.specs
    )


def _rows_reached(place: fx.Node) -> list[int]:
    """Rows of every lookup table whose ids come from an integer input through id-like ops."""
    if not _is_whole(place):
        return []
    ids = reached([place], lambda n: [u for u in n.users if u.target in _PASS and _is_whole(u)])
    readers = ((u, n) for n in ids for u in n.users if u.target is aten.embedding.default)
    tables = (u.args[0] for u, n in readers if u.args[1] is n)
    return [int(n) for table in tables for n in (shape_of(table) or ())[:1]]


def _is_whole(node: fx.Node) -> bool:
    """True for a tensor of whole numbers or truths."""
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
    """Named arguments of one size: the example's structure and constants, sampled tensors.

    Args:
        inputs: The signature, with the sizes and limits to draw from.
        named: The example, which has the structure and the constants.
        size: What the symbols become: see lora_fx.inputs.
        seed: Draws the numbers.
        arrays: Overrides by input name, from a user's .npz.
        device: Where the tensors go; without it they stay on the CPU.
    """
    drawn = dict(inputs.sample(size, seed))
    spelled = {onnx_name(name): name for name in drawn} | {name: name for name in drawn}
    for k, v in (arrays or {}).items():
        if k not in spelled:
            raise LoraFxError(f"no input is named {k!r}", f"the inputs are {', '.join(drawn)}")
        drawn[spelled[k]] = v
    return filled(named, drawn, device)


def filled(named: Named, arrays: Named, device: torch.device | None = None) -> dict[str, Any]:
    """Named arguments again, their tensors from arrays by the names of the leaves."""
    new = [
        from_numpy(arrays[n]).to(device, x.dtype) if isinstance(x, torch.Tensor) else x
        for n, x in leaves_of(named)
    ]
    return dict(tree_unflatten(new, tree_structure(dict(named))))
