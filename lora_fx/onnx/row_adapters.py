"""How the rows of a batch read their factors: one pair each, or all those in use side by side.

    x [b, m, in] · Aᵀ [g, in, k·r] ⊙ mask [b, 1, k·r] · B [g, k·r, out]

With g = b and k = 1 every row has its own pair: b small products, and b copies of factors. With
g = 1 and k = u, the number of different adapters in this batch, all rows share one product with
all of them, and the mask leaves each row its own: u times the arithmetic, u copies. Which one is
a matter of sizes, so one graph does both, and decides by its inputs: u·(u − 1)·m ≤ 5·b, where m
is the positions of a row. So a batch of one adapter, and steps of a few tokens with a few
adapters, share. Uses of one x (query, key, value) share the product with A too: their tables lie
below each other in one Gather, and the masked product is split.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.graph.graph import OnnxEmitter
from lora_fx.onnx.manifest import IDS

LIMIT = 5
"""Below it sharing is cheaper: there u adapters' products cost what b copies do. Measured on BERT,
256 wide, rank 8, with 4 to 32 rows of 1 to 128 tokens."""
NAME = "adapter_rows"


class RowAdapters(OnnxEmitter):
    """Which adapter each row has, and the nodes that decide, before everything that reads them.

    Args:
        first: What emits before all nodes of the graph, whose inputs the next two are.
        ids: The adapters' numbers, checked, [batch].
        count: How many adapters there are, the base among them.
        scales: Weights by row [batch], where they were asked for.
        batch: The symbol of the batch dimension.
        outside: Which rows ask for an adapter that is none, bool [batch].
    """

    def __init__(
        self,
        first: OnnxEmitter,
        ids: ir.Value,
        count: int,
        scales: ir.Value | None,
        batch: str,
        outside: ir.Value,
    ) -> None:
        super().__init__(first.owner, first.node, NAME, before=True)
        self._made: dict[tuple[object, ...], ir.Value] = {}
        self.products: dict[tuple[object, ...], list[ir.Value]] = {}
        self.ids, self.count, self.scales, self.outside = ids, count, scales, outside
        self.size = size = self.call("Shape", ids)
        (used,) = self.results("Unique", ids, count=1)
        different, one = self.call("Shape", used), self._ints(1)
        pairs = self.call("Mul", different, self.call("Sub", different, one))
        more = self.call("Mul", pairs, self._positions(batch))
        most = self.call("Mul", size, self._ints(LIMIT))
        many = self.call("Greater", more, most)
        begin = self.call("Where", many, different, self._ints(0))
        end = self.call("Where", many, self._ints(np.iinfo(np.int64).max), different)
        self._groups = self.call("Where", many, size, one)
        chosen = self.call("Slice", self.call("Concat", used, ids, axis=0), begin, end)
        self._chosen = self.call("Reshape", chosen, self._shape(-1, 1))
        self._column = self.call("Reshape", ids, self._ints(-1, 1, 1))

    def rows(self, rank: int, tables: int = 1) -> ir.Value:
        """Which rows of tables [n·rank, …] below each other are read: int64 [g, tables·k·rank]."""
        key = ("rows", rank, tables)
        if key not in self._made:
            if tables > 1:
                first = self.call("Reshape", self.rows(rank), self._shape(1, -1))
                starts = np.arange(tables)[:, None] * (self.count * rank)
            else:
                first = self.call("Mul", self._chosen, self._ints(rank))
                starts = np.arange(rank)
            each = self.call("Add", first, self._constant(starts))
            self._made[key] = self.call("Reshape", each, self._shape(-1))
        return self._made[key]

    def mask(self, rank: int, tables: int = 1) -> ir.Value:
        """The mask [b, 1, tables·k·rank]: true at a row's own factors."""
        key = ("mask", rank, tables)
        if key not in self._made:
            owner = self.call("Div", self.rows(rank), self._ints(rank))
            owner = self.call("Reshape", owner, self._shape(1, -1))
            made = self.call("Equal", self._column, owner)
            self._made[key] = self.call("Concat", *[made] * tables, axis=-1) if tables > 1 else made
        return self._made[key]

    def _shape(self, *rest: int) -> ir.Value:
        """[g, *rest] as a shape."""
        key = ("shape", *rest)
        if key not in self._made:
            self._made[key] = self.call("Concat", self._groups, self._ints(*rest), axis=0)
        return self._made[key]

    def _positions(self, batch: str) -> ir.Value:
        """How many positions a row has, as [1].

        They are counted on the tokens, else on the first input without its last axis.
        """
        rows = [v for v in self.owner.model.graph.inputs if v.shape and str(v.shape[0]) == batch]
        tokens = [v for v in rows if v.dtype in (ir.DataType.INT64, ir.DataType.INT32)]
        tokens = [v for v in tokens if v.name != IDS]
        found = (tokens or rows)[0]
        assert found.shape is not None
        end = len(found.shape) - (not tokens)
        if end <= 1:
            return self._ints(1)
        sizes = self.call("Slice", self.call("Shape", found), self._ints(1), self._ints(end))
        return sizes if end == 2 else self.call("ReduceProd", sizes, keepdims=1)

    def _constant(self, value: Array) -> ir.Value:
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._made:
            self._made[key] = super()._constant(value)
        return self._made[key]
