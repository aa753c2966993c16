"""quantise: frozen weights as codes, of which an op of the graph makes numbers.

    y = op(x, view(W))        becomes        y = op(x, view(dequantise(codes, scale)))

The codes lie in the tree under the weight's own name, so its key and its targets stay; see
lora_fx.fx.codes for their layout and lora_fx.ir.quantised for how they are chosen. Rows are all
that is multiplied with one x. A weight that is stored as codes already keeps its bytes.

This pass is torch's own: an ONNX file is quantised by ONNX Runtime's tools.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.fx.graph.graph import FxGraph
from lora_fx.fx.quantised_parameters import forms, put_codes
from lora_fx.ir.quantised import quantise
from lora_fx.passes.base import PassResult
from lora_fx.passes.find import find
from lora_fx.targets.found import Found
from lora_fx.targets.target import Target


@dataclass(frozen=True)
class Quantise:
    """Store the parameters of `kinds` as codes, in the graph's tree and for the graph.

    Attributes:
        kinds: Parameter → nf4, int4 or int8.
    """

    kinds: Mapping[str, str]

    def __call__(self, graph: FxGraph) -> PassResult[fx.Node]:
        """Edit the graph and its tree; what is stored as codes already is left alone."""
        held, found = forms(graph.root), find(graph)
        new = {name: kind for name, kind in self.kinds.items() if name not in held}
        for name, kind in new.items():
            target = next(t for t in (*found.targets, *found.optional) if t.parameter.name == name)
            turned = turned_rows(found, name)
            if turned is None:
                raise LoraFxError(
                    f"{name}: its layout {list(target.layout.stored)} has no rows to quantise",
                    "leave it in float",
                )
            weight = graph.read(name)
            if not np.isfinite(np.asarray(weight, np.float32)).all():
                raise LoraFxError(f"{name}: not all of it is finite numbers", "leave it in float")
            q = quantise(_rows(weight, turned, len(target.layout.batch)), kind)
            dtype = getattr(torch, target.parameter.dtype)
            put_codes(graph.root, name, q, dtype, weight.shape, turned)
        read = graph.read_codes()
        return PassResult(graph, bool(new) or read)


def turned_rows(found: Found, name: str) -> bool | None:
    """Whether the rows of a weight are its columns as it is stored; None where it has no rows.

    A linear layer's [out, in] has them, GPT-2's [in, out] turned, the kernels of a group none.
    """
    told = [t for t in (*found.targets, *found.optional) if t.parameter.name == name]
    ways = {_turned(t) for t in told if t.op != "embedding"} or {False}
    return ways.pop() if len(ways) == 1 else None


def _turned(target: Target) -> bool | None:
    layout = target.layout
    lead, count = len(layout.batch), len(layout.stored)
    if len(layout.shape) != count or layout.batch != tuple(range(lead)):
        return None
    out_first = layout.out == (lead,) and layout.in_ == tuple(range(lead + 1, count))
    in_first = (layout.in_, layout.out) == ((count - 2,), (count - 1,)) and lead == count - 2
    return None if not (out_first or in_first) else not out_first


def _rows(weight: Array, turned: bool, lead: int) -> Array:
    """All that is multiplied with one x as a row."""
    if turned:
        return np.ascontiguousarray(np.swapaxes(weight, -1, -2)).reshape(-1, weight.shape[-2])
    return weight.reshape(math.prod(weight.shape[: lead + 1]), -1)
