"""The mask of tokens in an ONNX graph: adapter_starts says from which token on an adapter acts.

    active[b, t] = past + t ≥ adapter_starts[b]

adapter_starts int64 [batch] counts in the row as a whole, so in the key-value cache: what the past
holds comes first, pads are counted. 0 is everywhere, as a LoRA acts; a number beyond the row is
nowhere, and the row is the base's. The input has no default: a run that leaves it out is refused
by every runtime, while a default would be right for some adapters and wrong for others.

Where the mask is false the result of an op is taken as it was, so the base's bits stay: see
lora_fx.passes.insert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lora_fx.errors import LoraFxError
from lora_fx.inputs import PAST
from lora_fx.ir.graph import Site
from lora_fx.onnx.flat_rows import keep_zeros
from lora_fx.onnx.graph.emitter import OnnxEmitter
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import shape_of
from lora_fx.onnx.row_starts import STARTS, Starts

_FLAT = 0
"""Stands for the rank of a result [batch · tokens, out]."""


class StartsMask(OnnxEmitter):
    """The nodes of the mask, before all others; the input is added when it is made.

    Args:
        graph: The graph, edited in place.
        starts: What the manifest will say: the input of token ids, and the adapters' tokens.

    Attributes:
        starts: The same with the input that tells the size of the past, if there is one.

    Raises:
        LoraFxError: The graph has an input `adapter_starts` of its own.
    """

    def __init__(self, graph: OnnxGraph, starts: Starts) -> None:
        super().__init__(graph, graph.emit_first(STARTS).node, STARTS, before=True)
        self.graph = graph
        owner = graph.model.graph
        if STARTS in owner.initializers or any(value.name == STARTS for value in owner.inputs):
            raise LoraFxError(f"the model has an input {STARTS!r} already", "rename this input")
        ids = next(value for value in owner.inputs if value.name == starts.ids)
        assert ids.shape is not None
        self.sizes = [str(size) for size in ids.shape]
        self.starts = _with_past(starts, owner.inputs)
        by_row = ir.Value(
            name=STARTS, shape=ir.Shape([ids.shape[0]]), type=ir.TensorType(ir.DataType.INT64)
        )

        end = self._size(ids, 1)
        begin = self._number(0)
        if self.starts.past:
            past = next(value for value in owner.inputs if value.name == self.starts.past)
            begin = self._size(past, self.starts.past_axis)
            end = self.call("Add", begin, end)
        places = self.call("Range", begin, end, self._number(1))
        column = self.call("Reshape", by_row, self._ints(-1, 1), **keep_zeros(graph))
        # GreaterOrEqual would need opset 12
        is_before = self.call("Less", places, column)
        self._masks = {len(self.sizes): self.call("Not", is_before)}
        owner.inputs.append(by_row)

    def of(self, graph: object, site: Site) -> ir.Value:
        """Return the mask in a shape that broadcasts with the result of a site.

        Raises:
            LoraFxError: The first axes of the result are not batch and tokens.
        """
        assert graph is self.graph
        form = self._form(site)
        if form not in self._masks:
            sizes = (-1, 1) if form == _FLAT else (0, 0, *[1] * (form - 2))
            active = self._masks[len(self.sizes)]
            self._masks[form] = self.call("Reshape", active, self._ints(*sizes))
        return self._masks[form]

    def _form(self, site: Site) -> int:
        """Return the rank of a result that begins with batch and tokens; _FLAT if they are one."""
        sizes = [str(size) for size in shape_of(self.graph.output(site)) or ()]
        batch, tokens = self.sizes
        if len(sizes) > 2 and sizes[:2] == self.sizes:
            return len(sizes)
        if len(sizes) == 2 and sizes[0] in (f"{batch}*{tokens}", f"{tokens}*{batch}"):
            return _FLAT
        result = f"[{', '.join(sizes)}]" if sizes else "of unknown sizes"
        raise LoraFxError(
            f"{site.parameter!r} ({site.op}, node {site.id}): its result is {result}, which does "
            f"not begin with the tokens [{batch}, {tokens}], so an aLoRA cannot be masked there by "
            "token",
            "exclude the target from the adapters",
        )

    def _size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return a size of an input, as a scalar."""
        return self.call("Gather", self.call("Shape", value), self._number(axis))

    def _number(self, number: int) -> ir.Value:
        return self._constant(np.array(number, np.int64))


def _with_past(starts: Starts, inputs: Iterable[ir.Value]) -> Starts:
    """Return the starts with the first input that has the size of the past."""
    for value in inputs:
        sizes = [str(size) for size in value.shape or ()]
        if PAST in sizes:
            return replace(starts, past=str(value.name), past_axis=sizes.index(PAST))
    return starts
