"""How the rows of a batch read their factors: one pair each, or all those in use side by side.

    x [b, m, in] · Aᵀ [g, in, k·r] ⊙ mask [b, 1, k·r] · B [g, k·r, out]

With g = b and k = 1 every row has its own pair: b small products, and b copies of factors. With
g = 1 and k = u, the number of different adapters in this batch, all rows share one product with all
of them, and the mask leaves each row its own: u times the arithmetic, u copies. Which one is a
matter of sizes, so one graph does both, and decides by its inputs: u·(u − 1)·m ≤ 5·b, where m is
the positions of a row. So a batch of one adapter, and steps of a few tokens with a few adapters,
share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import numpy_dtype
from lora_fx.onnx.emitter import add_initialiser
from lora_fx.onnx.flow import MARK
from lora_fx.onnx.graph import OnnxGraph

LIMIT = 5
"""Where b copies cost what the products of u adapters do; measured on BERT, 256 wide, rank 8, with
4 to 32 rows of 1 to 128 tokens."""
NAME, IDS = "adapter_rows", "adapter_ids"


class Choice:
    """The nodes that decide, at the start of a graph, before everything that reads them."""

    def __init__(
        self, graph: OnnxGraph, ids: ir.Value, size: ir.Value, scales: ir.Value | None, batch: str
    ) -> None:
        node = ids.producer()
        assert node is not None
        self._graph, self._last = graph, node
        self._made: dict[tuple[Any, ...], ir.Value] = {}
        unique = ir.node("Unique", [ids], num_outputs=1)
        self._place(unique)
        used = unique.outputs[0]
        count = self._call("Shape", used)
        one = self._ints(1)
        pairs = self._call("Mul", count, self._call("Sub", count, one))
        more = self._call("Mul", pairs, self._positions(batch))
        few = self._call("LessOrEqual", more, self._call("Mul", size, self._ints(LIMIT)))
        begin = self._call("Where", few, self._ints(0), count)
        end = self._call("Where", few, count, self._ints(np.iinfo(np.int64).max))
        self._groups = self._call("Where", few, one, size)
        chosen = self._call("Slice", self._call("Concat", used, ids, axis=0), begin, end)
        self._chosen = self._call("Reshape", chosen, self._shape(-1, 1))
        self._ids, self._scales = self._call("Reshape", ids, self._ints(-1, 1, 1)), scales

    def rows(self, rank: int) -> ir.Value:
        """int64 [g, k·rank]: rows of tables [n·rank, …]."""
        key = ("rows", rank)
        if key not in self._made:
            first = self._call("Mul", self._chosen, self._ints(rank))
            each = self._call("Add", first, self._constant(np.arange(rank)))
            self._made[key] = self._call("Reshape", each, self._shape(-1))
        return self._made[key]

    def mask(self, rank: int, dtype: str | None) -> ir.Value:
        """[b, 1, k·rank]: a row's weight at its own factors, 0 at the others'."""
        key = ("mask", rank, dtype)
        if key not in self._made:
            owner = self._call("Div", self.rows(rank), self._ints(rank))
            owner = self._call("Unsqueeze", owner, self._ints(1))
            made = self._call("Equal", self._ids, owner)
            to = int(ir.DataType.from_numpy(numpy_dtype(dtype or "float32")))
            made = self._call("Cast", made, to=to)
            if self._scales is not None:
                weights = self._call("Reshape", self._scales, self._ints(-1, 1, 1))
                made = self._call("Mul", made, self._call("Cast", weights, to=to))
            self._made[key] = made
        return self._made[key]

    def _shape(self, *rest: int) -> ir.Value:
        """[g, *rest] as a shape."""
        key = ("shape", *rest)
        if key not in self._made:
            self._made[key] = self._call("Concat", self._groups, self._ints(*rest), axis=0)
        return self._made[key]

    def _positions(self, batch: str) -> ir.Value:
        """[1]: positions of a row: of its tokens, else of its first input, less the last axis."""
        rows = [v for v in self._graph.model.graph.inputs if v.shape and str(v.shape[0]) == batch]
        tokens = [v for v in rows if v.dtype in (ir.DataType.INT64, ir.DataType.INT32)]
        tokens = [v for v in tokens if v.name != IDS]
        found = (tokens or rows)[0]
        assert found.shape is not None
        end = len(found.shape) - (not tokens)
        if end <= 1:
            return self._ints(1)
        sizes = self._call("Slice", self._call("Shape", found), self._ints(1), self._ints(end))
        return self._call("ReduceProd", sizes, keepdims=1)

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _constant(self, value: np.ndarray[Any, Any]) -> ir.Value:
        key = (str(value.dtype), *value.tolist())
        if key not in self._made:
            name = self._graph.fresh(NAME)
            self._made[key] = add_initialiser(self._graph.model.graph, name, value, NAME)
        return self._made[key]

    def _call(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        self._place(node)
        return node.outputs[0]

    def _place(self, node: ir.Node) -> None:
        node.metadata_props[MARK] = NAME
        for value in node.outputs:
            value.name = self._graph.fresh(NAME)
        self._graph.model.graph.insert_after(self._last, node)
        self._last = node
        self._graph.changed()
