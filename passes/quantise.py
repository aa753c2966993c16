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
        """Edit the graph and its tree; weights that are already stored as codes are not changed."""
        stored = forms(graph.root)
        found = find(graph)
        unstored = {name: kind for name, kind in self.kinds.items() if name not in stored}
        for name, kind in unstored.items():
            _store(graph, found, name, kind)
        reads_other_codes = graph.read_codes()
        return PassResult(graph, bool(unstored) or reads_other_codes)


def _store(graph: FxGraph, found: Found, name: str, kind: str) -> None:
    """Store one parameter as codes, in the graph's tree.

    Raises:
        LoraFxError: It has no rows, or numbers that are not finite.
    """
    target = _targets_of(found, name)[0]
    are_columns = turned_rows(found, name)
    if are_columns is None:
        raise LoraFxError(
            f"{name}: its layout {list(target.layout.stored)} has no rows to quantise",
            "leave it in float",
        )
    weight = graph.read(name)
    if not np.isfinite(np.asarray(weight, np.float32)).all():
        raise LoraFxError(f"{name}: it holds NaN or infinite numbers", "leave it in float")
    rows = _rows(weight, are_columns, len(target.layout.batch))
    dtype = getattr(torch, target.parameter.dtype)
    put_codes(graph.root, name, quantise(rows, kind), dtype, weight.shape, are_columns)


def _targets_of(found: Found, name: str) -> list[Target]:
    """The targets of a parameter, those out of the default plan too."""
    targets = (*found.targets, *found.optional)
    return [target for target in targets if target.parameter.name == name]


def turned_rows(found: Found, name: str) -> bool | None:
    """Whether the rows of a weight are its columns as it is stored; None where it has no rows.

    A linear layer's [out, in] has them, GPT-2's [in, out] turned, the kernels of a group none.
    """
    answers = {_turned(t) for t in _targets_of(found, name) if t.op != "embedding"}
    if not answers:
        return False
    if len(answers) > 1:
        return None
    return answers.pop()


def _turned(target: Target) -> bool | None:
    """Whether the rows of one target are its columns; see turned_rows."""
    layout = target.layout
    n_batch = len(layout.batch)
    n_axes = len(layout.stored)
    if len(layout.shape) != n_axes or layout.batch != tuple(range(n_batch)):
        return None
    first = n_batch
    following = tuple(range(n_batch + 1, n_axes))
    if layout.out == (first,) and layout.in_ == following:
        return False
    if n_axes == n_batch + 2 and layout.in_ == (first,) and layout.out == following:
        return True
    return None


def _rows(weight: Array, turned: bool, n_batch: int) -> Array:
    """All that is multiplied with one x as a row."""
    if turned:
        transposed = np.ascontiguousarray(np.swapaxes(weight, -1, -2))
        return transposed.reshape(-1, weight.shape[-2])
    return weight.reshape(math.prod(weight.shape[: n_batch + 1]), -1)
