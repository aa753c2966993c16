"""The factors for the rows of a batch: one pair for each row, or all used pairs together.

On a device every row reads its own pair, picked by its id. On the CPU that is one of two ways:

    x [b, m, in] · Aᵀ [g, in, k·r] ⊙ mask [b, 1, k·r] · B [g, k·r, out]

With g = b and k = 1 every row has its own pair: b small products, and b copies of factors. With
g = 1 and k = u, the number of different adapters in this batch, all rows share one product with
all of them, and the mask leaves each row its own: u times the arithmetic, u copies. Which one is
a matter of sizes, so one graph does both, and decides by its inputs: u·(u − 1)·m < 5·b, where m
is the positions of a row. So a batch of one adapter, and steps of a few tokens with a few
adapters, share. Uses of one x (query, key, value) share the product with A too: their tables lie
below each other in one Gather, and the masked product is split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.onnx.adapter_ids import IDS
from lora_fx.onnx.flat_rows import keep_zeros
from lora_fx.onnx.graph.emitter import OnnxEmitter

LIMIT = 5
"""The limit of u·(u − 1)·m / b up to which one shared product is cheaper. Measured on BERT,
256 wide, rank 8, with 4 to 32 rows of 1 to 128 tokens."""
NAME = "adapter_rows"
"""The beginning of these nodes' names."""


@dataclass(eq=False)
class RowAdapters:
    """The adapter of each row.

    Attributes:
        ids: The adapters' numbers, checked, [batch].
        count: How many adapters there are, the base among them.
        scales: Weights by row [batch]; None where the graph has no such input.
        outside: Which rows ask for an adapter that is none, bool [batch].
        size: The number of rows, as a shape [1].
        shared: What rows read together; None in a graph for a device, where each reads its own.
        remaining: The size of an axis that follows from the others.
        products: Products with A by what they are computed of; uses of one value share them.
    """

    ids: ir.Value
    count: int
    scales: ir.Value | None
    outside: ir.Value
    size: ir.Value
    shared: SharedFactors | None
    remaining: RemainingSize
    products: dict[tuple[object, ...], list[ir.Value]] = field(default_factory=dict)


class RemainingSize(OnnxEmitter):
    """The nodes, before all readers, of the size that a Reshape is to compute from the others.

    Args:
        first: The emitter before all nodes of the graph.
        rows: The number of rows, as a shape [1].
    """

    def __init__(self, first: OnnxEmitter, rows: ir.Value) -> None:
        super().__init__(first.owner, first.node, NAME, before=True)
        self.rows = rows

    @cached_property
    def value(self) -> ir.Value:
        """The size as a shape [1]: −1, but 1 in an empty batch, where any number is right."""
        is_empty = self.call("Equal", self.rows, self._ints(0))
        return self.call("Where", is_empty, self._ints(1), self._ints(-1))


class SharedFactors(OnnxEmitter):
    """The nodes, before all readers, that tell which factors rows read, and whether they share.

    Args:
        first: The emitter before all nodes of the graph, whose inputs the next one is.
        ids: The adapters' numbers, checked, [batch].
        count: How many adapters there are, the base among them.
        remaining: The size that follows from the number of rows and others.
        batch: The symbol of the batch dimension.
    """

    def __init__(
        self, first: OnnxEmitter, ids: ir.Value, count: int, remaining: RemainingSize, batch: str
    ) -> None:
        super().__init__(first.owner, first.node, NAME, before=True)
        self._emitted: dict[tuple[object, ...], ir.Value] = {}
        self.count = count
        size = remaining.rows

        # u·(u − 1)·m < 5·b: all read those in use; else every row its own pair. So an empty batch
        # has g = 0 groups: products of 0 rows want 0 pairs or a number more than 1 beside them, and
        # in the runtime's FusedMatMul (1.31) those of 0 columns end the process.
        (used_ids,) = self.results("Unique", ids, count=1)
        used_count = self.call("Shape", used_ids)
        one = self._ints(1)
        pairs = self.call("Mul", used_count, self.call("Sub", used_count, one))
        shared_cost = self.call("Mul", pairs, self._positions(batch))
        copied_cost = self.call("Mul", size, self._ints(LIMIT))
        all_share = self.call("Less", shared_cost, copied_cost)

        everything = np.iinfo(np.int64).max
        # The ids that are read, [g, k, 1]: those of the rows stand behind those in use.
        begin = self.call("Where", all_share, self._ints(0), used_count)
        end = self.call("Where", all_share, used_count, self._ints(everything))
        groups = self.call("Where", all_share, one, size)
        all_of_mask = self._ints(everything, everything)
        self._ends_of_mask = self.call("Where", all_share, all_of_mask, self._ints(1, 1))
        read_ids = self.call("Slice", self.call("Concat", used_ids, ids, axis=0), begin, end)
        shape = self.call("Concat", groups, remaining.value, one, axis=0)
        self._read_ids = self.call("Reshape", read_ids, shape, **keep_zeros(first.owner))
        self._column = self.call("Reshape", ids, self._ints(-1, 1, 1))

    def rows(self, rank: int, tables: int = 1) -> ir.Value:
        """Return the rows to read of stacked tables [n·rank, …]: int64 [g, tables·k·rank]."""
        key = ("rows", rank, tables)
        if key not in self._emitted:
            if tables > 1:
                first_rows = self._rows_behind_one(rank)
                offsets = np.arange(tables)[:, None] * (self.count * rank)
            else:
                first_rows = self.call("Mul", self._read_ids, self._ints(rank))
                offsets = np.arange(rank)
            numbers = self.call("Add", first_rows, self._constant(offsets))
            self._emitted[key] = self.call("Flatten", numbers, axis=1)
        return self._emitted[key]

    def _rows_behind_one(self, rank: int) -> ir.Value:
        """Return `rows` of one table as [g, 1, k·rank]."""
        key = ("rows behind one", rank)
        if key not in self._emitted:
            rows = self.rows(rank)
            if self._opset < 13:
                self._emitted[key] = self.call("Unsqueeze", rows, axes=[1])
            else:
                self._emitted[key] = self.call("Unsqueeze", rows, self._ints(1))
        return self._emitted[key]

    def mask(self, rank: int, tables: int = 1) -> ir.Value:
        """Return the mask [b, 1, tables·k·rank], true at a row's own factors.

        Where every row has its own pair all of it is true, and [1, 1, 1] says so: Where is eight
        times as fast on it, as it need not repeat the mask at every position.
        """
        key = ("mask", rank, tables)
        if key not in self._emitted:
            adapter_ids = self.call("Div", self._rows_behind_one(rank), self._ints(rank))
            mask = self.call("Equal", self._column, adapter_ids)
            if tables > 1:
                mask = self.call("Concat", *[mask] * tables, axis=-1)
            starts = self._ints(0, 0)
            self._emitted[key] = self.call(
                "Slice", mask, starts, self._ends_of_mask, self._ints(0, 2)
            )
        return self._emitted[key]

    def _positions(self, batch: str) -> ir.Value:
        """Return the number of positions of a row, as [1].

        Positions are counted in the tokens, else in the first input without its last axis.
        """
        graph_inputs = self.owner.model.graph.inputs
        inputs = [value for value in graph_inputs if value.shape and str(value.shape[0]) == batch]
        integers = (ir.DataType.INT64, ir.DataType.INT32)
        tokens = [value for value in inputs if value.dtype in integers and value.name != IDS]
        counted = (tokens or inputs)[0]
        assert counted.shape is not None
        end = len(counted.shape)
        if not tokens:
            end -= 1
        if end <= 1:
            return self._ints(1)
        sizes = self.call("Slice", self.call("Shape", counted), self._ints(1), self._ints(end))
        if end == 2:
            return sizes
        return self.call("ReduceProd", sizes, keepdims=1)

    def _constant(self, value: Array) -> ir.Value:
        """Return the initialiser of a value; equal values share one."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._emitted:
            self._emitted[key] = super()._constant(value)
        return self._emitted[key]
