"""Inputs on the torch side: from example tensors, and the limits that a graph shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.errors import LoraFxError
from lora_fx.fx.calling import leaf_names
from lora_fx.fx.nodes import dtype_name, shape_of, value
from lora_fx.fx.tensors import from_numpy
from lora_fx.fx.views import VIEWS
from lora_fx.inputs import Input, Inputs

aten = torch.ops.aten
_PASS = {
    *VIEWS,
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    aten.where.self,
    aten.cat.default,
    aten.new_zeros.default,
    aten.copy_.default,
    aten.clamp.default,
}


def describe(names: Sequence[str], leaves: Sequence[Any]) -> Inputs:
    """The signature of example leaves; integers take their limit from the example for now."""
    specs = []
    for name, x in zip(names, leaves, strict=True):
        if not isinstance(x, torch.Tensor):
            continue
        whole = not x.dtype.is_floating_point and not x.dtype.is_complex and x.dtype != torch.bool
        real = whole and x.numel() and x.device.type != "meta" and type(x) is torch.Tensor
        high = int(x.max()) + 1 if real else None
        specs.append(Input(name, dtype_name(x.dtype), tuple(x.shape), high=high))
    return Inputs(tuple(specs))


def limits(inputs: Inputs, graph: fx.Graph, root: nn.Module, traced: Any) -> Inputs:
    """Integers bounded by the rows of the tables they index; sizes by what the export found."""
    names = traced.door.names
    places = [n for n in graph.nodes if n.op == "placeholder"]
    high: dict[str, int] = {}
    for name, place in zip(names, places, strict=True):
        rows = _rows_reached(place)
        if rows:
            high[name] = min(rows)
    specs = []
    for s in inputs.specs:
        i = names.index(s.name) if s.name in names else -1
        upper = {d: n for (leaf, d), n in traced.ranges.items() if leaf == i and n < 1 << 30}
        fixed = traced.door.sizes[i] if i >= 0 else None
        dims = {d: n for d, n in s.dims.items() if fixed is None or fixed[d] is None}
        specs.append(replace(s, high=high.get(s.name, s.high), upper=upper, dims=dims))
    return Inputs(tuple(specs))


def _rows_reached(place: fx.Node) -> list[int]:
    """Rows of every lookup table whose ids come from an integer input through id-like ops."""
    ids = value(place)
    if not isinstance(ids, torch.Tensor) or ids.dtype.is_floating_point:
        return []
    rows, todo, seen = [], [place], {place}
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.target is aten.embedding.default and user.args[1] is node:
                shape = shape_of(user.args[0])
                if shape:
                    rows.append(int(shape[0]))
            elif user.target in _PASS and user not in seen:
                v = value(user)
                if isinstance(v, torch.Tensor) and not v.dtype.is_floating_point:
                    seen.add(user)
                    todo.append(user)
    return rows


def sample_call(
    inputs: Inputs,
    named: Mapping[str, Any],
    size: tuple[int, int],
    seed: int = 0,
    arrays: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Named arguments of one size: the example's structure and constants, sampled tensors.

    Args:
        arrays: Overrides by input name, from a user's .npz.
    """
    drawn = dict(inputs.sample(size, seed))
    for k, v in (arrays or {}).items():
        if k not in drawn:
            raise LoraFxError(f"no input is named {k!r}", f"the inputs are {', '.join(drawn)}")
        drawn[k] = v
    leaves, spec = pytree.tree_flatten(dict(named))
    new = []
    for name, leaf in zip(leaf_names(named), leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            t = from_numpy(drawn[name]).to(leaf.dtype)
            new.append(t.to(device) if device is not None else t)
        else:
            new.append(leaf)
    result: dict[str, Any] = pytree.tree_unflatten(new, spec)
    return result
