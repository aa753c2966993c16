"""Branches of batch mode, whose factors differ from row to row.

For a row b of the batch with the adapter i = ids[b], and x seen as [batch, m, in]:

    last    (x @ A[i]ᵀ) @ B[i]              A [n·r, in]    B [n·r, out]    in is the last axis of x
    own     (x @ A[i]) @ B[i]               A [n, in, r]   B [n, r, out]   the same, on a device
    middle  B[i] @ (A[i] @ x)               A [n, r, in]   B [n, out, r]   x [batch, in, m]
    spread  the same, then summed           A [n, r, in]   B [n, out, r]   x [batch, in, m]
    stack   (x[e] @ A[i, e]) @ B[i, e]      A [n, e, in, r], B [n, e, r, out], x [e, batch, m, in]
    lookup  A[i, x] @ B[i]                  A [n, in, r]   B [n, r, out]   x holds row numbers

On the CPU, rows of `last` may share one product with several adapters, see row_adapters.py, so its
factors lie below each other. On a device every row picks its own pair.
A convolution is `middle` over the windows of x, which a depthwise convolution with one-hot kernels
lays out; a transposed one is `spread`, whose windows a transposed depthwise convolution with such
kernels sums up. Of a convolution with groups g, A is [n, g, r, in] and B [n, g, out, r]. (A
convolution with the batch as its groups would need a group count known beforehand.)

Factors of rows D [n, out], of DoRA, multiply the base's product: + D[i]·(y − bias). They are [n, g,
out/g] of a convolution with groups, and [n, e, out] of experts. `spread` has no such form: what a
row of its weight gives is summed with what others give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, NumpyDtype, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.ir.convolution import Conv, ConvTranspose
from lora_fx.ir.einsum import Einsum
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.kinds import Embedding
from lora_fx.onnx.flat_rows import keep_zeros
from lora_fx.onnx.graph.emitter import OnnxEmitter
from lora_fx.onnx.graph.flow import OnnxWeightUse
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import dtype_name, rank, shape_of
from lora_fx.onnx.made_for import CPU
from lora_fx.onnx.row_adapters import RowAdapters, SharedFactors
from lora_fx.onnx.row_axis import RowAxis


def form_of(use: OnnxWeightUse, rows: RowAxis, target: str) -> str:
    """Return the form of a use, one of those of the module's docstring.

    Args:
        use: The use of a weight.
        rows: Where its activation has the rows of the batch.
        target: What the file is made for.

    Raises:
        LoraFxError: Rows cannot be told apart, or the kind of use has no form by row.
    """
    site = use.site
    kind = site.kind
    where = f"{site.parameter!r} ({site.op}, node {site.id})"
    modes = "switch" if site.no_fold else "merged or switch"
    hint = f"exclude the target from the adapters, or use mode {modes}"
    if site.refusal:
        raise LoraFxError(f"{where}: {site.refusal}", hint)
    if rows.lost:
        raise LoraFxError(f"{where}: its rows are not those of the batch: {rows.lost}", hint)
    if rows.axis is None:
        raise LoraFxError(f"{where}: its input is the same for every row of the batch", hint)

    if isinstance(kind, Embedding) and _is_outermost(use.x, rows):
        return "lookup"
    if isinstance(kind, Conv) and rows == RowAxis(0):
        return "middle"
    if isinstance(kind, ConvTranspose) and rows == RowAxis(0):
        return "spread"
    if isinstance(kind, Einsum) and kind.form == "right" and _is_stack(site, use.x, rows):
        return "stack"
    if isinstance(kind, Einsum) and len(site.operand) == 2:
        if kind.form == "right" and _comes_to_front(use.x, rows):
            return "last" if target == CPU else "own"
        if kind.form == "left" and rank(use.x) == 3 and rows == RowAxis(0):
            return "middle"
    raise LoraFxError(f"{where}: this use cannot be computed row by row", hint)


def _is_outermost(x: ir.Value, rows: RowAxis) -> bool:
    """Whether the batch is outermost in memory: only axes of size 1 precede it."""
    in_front = (shape_of(x) or ())[: rows.axis]
    return not rows.inner and all(size == 1 for size in in_front)


def _comes_to_front(x: ir.Value, rows: RowAxis) -> bool:
    """Whether the rows of x can be moved to the front; its last axis is the summed one."""
    x_rank = rank(x)
    if x_rank is None or rows.axis is None or rows.axis >= x_rank - 1:
        return False
    return not rows.inner or (rows.axis == 0 and x_rank == 2)


def _is_stack(site: Site, x: ir.Value, rows: RowAxis) -> bool:
    """Whether experts multiply x: [experts, batch · m, in] or [batch, experts, m, in]."""
    if len(site.operand) != 3 or rows.inner:
        return False
    if rank(x) == 3:
        return rows.axis == 1
    return rank(x) == 4 and rows == RowAxis(0)


class BatchEmitter(OnnxEmitter):
    """The emitter of the nodes of one site's branch."""

    def __init__(self, owner: OnnxGraph, site: Site, adapters: RowAdapters, rows: RowAxis) -> None:
        emitter = owner.emit(site)
        super().__init__(owner, emitter.node, site.id, emitter.found, before=False)
        self.site = site
        self.adapters = adapters
        self.rows = rows

    def branch(
        self,
        form: str,
        x: ir.Value,
        a: ir.Value,
        b: ir.Value,
        y: ir.Value,
        tables: Sequence[ir.Value],
    ) -> ir.Value:
        """Return the low-rank part of y, in y's shape.

        Args:
            form: One of those of the module's docstring.
            x: The activation.
            a: The stack of A; see `stack`.
            b: The stack of B.
            y: The base's product.
            tables: The stacks of A of all uses of this x.
        """
        if form in ("last", "own"):
            return self._last(x, b, y, tables, tables.index(a))
        b_of_rows = self.call("Gather", b, self.adapters.ids)
        if form == "lookup":
            low = self._scaled(self._looked_up(x, a))
            return self._shaped(self.call("MatMul", low, b_of_rows), y)
        if form == "stack":
            a_of_rows = self.call("Gather", a, self.adapters.ids)
            return self._stack(x, a_of_rows, b_of_rows, y)
        groups = getattr(self.site.kind, "groups", 1)
        if isinstance(self.site.kind, Conv):
            x = self._windows(x)
        if isinstance(self.site.kind, ConvTranspose):
            x = self._positions(x, groups, self.site.operand[0] // groups)
        a_of_rows = self.call("Gather", a, self.adapters.ids)
        low = self._scaled(self.call("MatMul", a_of_rows, x), axes=3 + (groups > 1))
        delta = self.call("MatMul", b_of_rows, low)
        if form == "spread":
            return self._summed(delta)
        return self._shaped(delta, y)

    def scaled_rows(self, form: str, product: ir.Value, d: ir.Value, y: ir.Value) -> ir.Value:
        """Return D[ids]·product in y's shape.

        Args:
            form: As in `branch`, but for spread.
            product: The base's product, without its bias.
            d: The stack of D, [n, *batch, out].
            y: The base's product, with its bias.
        """
        assert d.shape is not None
        *batch, out = [int(size) for size in d.shape.numpy()[1:]]
        gains = self.call("Gather", d, self.adapters.ids)
        gains = self._scaled(gains, axes=1 + len(batch) + 1)
        size = self.adapters.size
        remaining = self.adapters.remaining.value
        if form == "middle":
            channels = math.prod(batch) * out
            after = [1] * ((rank(y) or 3) - 2)
            return self.call("Mul", product, self._reshaped(gains, size, channels, *after))
        if form == "stack":
            (experts,) = batch
            if rank(y) == 4:
                return self.call("Mul", product, self._reshaped(gains, size, experts, 1, out))
            gains = self.call("Transpose", gains, perm=[1, 0, 2])
            gains = self._reshaped(gains, experts, size, 1, out)
            product = self._reshaped(product, experts, size, remaining, out)
        elif self.rows.inner:
            gains = self._reshaped(gains, 1, size, out)
            product = self._reshaped(product, remaining, size, out)
        elif form == "lookup" or not self.rows.exact:
            gains = self._reshaped(gains, size, 1, out)
            product = self._reshaped(product, size, remaining, out)
        else:
            y_rank = rank(y)
            assert y_rank is not None and self.rows.axis is not None
            between = [1] * (y_rank - 2 - self.rows.axis)
            gains = self._reshaped(gains, *[1] * self.rows.axis, size, *between, out)
            return self.call("Mul", product, gains)
        return self._shaped(self.call("Mul", product, gains), y)

    def _stack(self, x: ir.Value, a: ir.Value, b: ir.Value, y: ir.Value) -> ir.Value:
        """Return the delta of experts, each of which multiplies matrices of its own.

        Args:
            x: The activation, [batch, experts, m, in] or [experts, batch · m, in].
            a: The factor of each row, [batch, experts, in, rank].
            b: The factor of each row, [batch, experts, rank, out].
            y: The base's product.
        """
        behind_experts = rank(x) == 3
        if behind_experts:
            experts, width, _ = self.site.operand
            x = self._reshaped(x, experts, self.adapters.size, self.adapters.remaining.value, width)
            x = self.call("Transpose", x, perm=[1, 0, 2, 3])
        low = self._scaled(self.call("MatMul", x, a), axes=4)
        delta = self.call("MatMul", low, b)
        if behind_experts:
            delta = self.call("Transpose", delta, perm=[1, 0, 2, 3])
        return self._shaped(delta, y)

    def _last(
        self, x: ir.Value, b: ir.Value, y: ir.Value, tables: Sequence[ir.Value], number: int
    ) -> ir.Value:
        """Return the delta in y's shape; rows of x move to the front, and the delta's back.

        Args:
            x: The activation.
            b: The stack of B.
            y: The base's product.
            tables: The stacks of A of all uses of this x, which share a product.
            number: The place of this use's A among them.
        """
        products = self._products(x, tables)
        picked = self.adapters.ids
        if self.adapters.shared:
            picked = self.adapters.shared.rows(self._low_rank(b))
        b_of_rows = self.call("Gather", b, picked)
        delta = self.call("MatMul", products[number], b_of_rows)

        order = self._batch_first(x)
        if order[0] == 0:
            return delta if self._has_matrices(order) else self._shaped(delta, y)
        if not self._has_matrices(order):
            sizes = self.call("Gather", self.call("Shape", x), self._ints(*order[:-1]))
            assert b.shape is not None
            delta = self._reshaped(delta, sizes, int(b.shape.numpy()[-1]))
        back = [order.index(axis) for axis in range(len(order))]
        delta = self.call("Transpose", delta, perm=back)
        return self._shaped(delta, y) if self.rows.inner else delta

    def _batch_first(self, x: ir.Value) -> list[int]:
        """Return the axes of x with the batch first; [k · batch, in] counts as [k, batch, in]."""
        if self.rows.inner:
            return [1, 0, 2]
        x_rank = rank(x)
        batch = self.rows.axis
        assert x_rank is not None and batch is not None
        return [batch, *(axis for axis in range(x_rank) if axis != batch)]

    def _has_matrices(self, order: list[int]) -> bool:
        """Whether x is [batch, m, in] after its axes are reordered."""
        return len(order) == 3 and (self.rows.exact or self.rows.inner)

    def _low_rank(self, table: ir.Value) -> int:
        """Return the rank of factors that lie below each other."""
        assert table.shape is not None
        return int(table.shape.numpy()[0]) // self.adapters.count

    def _products(self, x: ir.Value, tables: Sequence[ir.Value]) -> list[ir.Value]:
        """Return products x · Aᵀ with each table, masked and weighted; uses of one x share them."""
        # A branch of an If sees nothing of the other.
        body = self.found and self.found.node.graph
        products = self.adapters.products.setdefault((body, x, *tables), [])
        if products:
            return products
        order = self._batch_first(x)
        dtype = numpy_dtype(dtype_name(x) or "float32")
        width = self.site.operand[self.site.kind.axes(self.site.operand).in_[0]]
        if self.rows.inner:
            x = self._reshaped(x, self.adapters.remaining.value, self.adapters.size, width)
        matrices = self.call("Transpose", x, perm=order) if order[0] else x
        if not self._has_matrices(order):
            positions = self.adapters.remaining.value
            matrices = self._reshaped(matrices, self.adapters.size, positions, width)

        if self.adapters.shared:
            product = self._shared_product(self.adapters.shared, matrices, tables, dtype)
        else:
            a = self.call("Gather", self._joined(tables, axis=2), self.adapters.ids)
            product = self.call("MatMul", matrices, a)
        product = self._scaled(product, x)
        if len(tables) > 1:
            products += self._split(product, len(tables))
        else:
            products.append(product)
        return products

    def _shared_product(
        self,
        shared: SharedFactors,
        matrices: ir.Value,
        tables: Sequence[ir.Value],
        dtype: NumpyDtype,
    ) -> ir.Value:
        """Return the product of [batch, m, in] with the factors that are read, masked by row."""
        table = self._joined(tables, axis=0)
        low_rank = self._low_rank(tables[0])
        a = self.call("Gather", table, shared.rows(low_rank, len(tables)))
        product = self.call("MatMul", matrices, self.call("Transpose", a, perm=[0, 2, 1]))
        # no product with 0: an Inf of another adapter would be this row's NaN
        zero = self._constant(np.array(0, dtype))
        return self.call("Where", shared.mask(low_rank, len(tables)), product, zero)

    def _joined(self, tables: Sequence[ir.Value], axis: int) -> ir.Value:
        """Return tables as one; the runtime joins initialisers when it loads them."""
        if len(tables) == 1:
            return tables[0]
        return self.call("Concat", *tables, axis=axis)

    def _split(self, value: ir.Value, count: int) -> list[ir.Value]:
        """Split into equal parts along the last axis."""
        attributes = {"axis": -1}
        if self.owner.model.opset_imports.get("", 0) >= 18:
            attributes["num_outputs"] = count
        return self.results("Split", value, count=count, **attributes)

    def _reshaped(self, x: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        """Return x in another shape: numbers, and values of one or more sizes."""
        parts: list[ir.Value] = []
        numbers: list[int] = []
        for size in sizes:
            if isinstance(size, int):
                numbers.append(size)
                continue
            if numbers:
                parts.append(self._ints(*numbers))
                numbers = []
            parts.append(size)
        if numbers:
            parts.append(self._ints(*numbers))
        shape = self.call("Concat", *parts, axis=0)
        return self.call("Reshape", x, shape, **keep_zeros(self.owner))

    def _shaped(self, delta: ir.Value, y: ir.Value) -> ir.Value:
        shape = self.call("Shape", y)
        return self.call("Reshape", delta, shape, **keep_zeros(self.owner))

    def _scaled(self, value: ir.Value, like: ir.Value | None = None, *, axes: int = 3) -> ir.Value:
        """Multiply a value [batch, …] by each row's weight, in the dtype of `like`, if given."""
        if self.adapters.scales is None:
            return value
        column = self._ints(-1, *[1] * (axes - 1))
        factor = self.call("Reshape", self.adapters.scales, column)
        return self.call("Mul", value, self.op("cast_like", factor, like or value))

    def _looked_up(self, x: ir.Value, a: ir.Value) -> ir.Value:
        """Return the rows A[ids[b], x[b, j]] as [batch, m, r], looked up in A as one long table."""
        assert a.shape is not None
        row_count = self.site.operand[0]
        table = self.call("Reshape", a, self._ints(-1, int(a.shape.numpy()[2])))
        tokens = self.call("Cast", x, to=int(ir.DataType.INT64))
        tokens = self._reshaped(tokens, self.adapters.size, self.adapters.remaining.value)
        tokens = self.call("Mod", tokens, self._ints(row_count))  # negative ones count from the end
        ids = self.call("Reshape", self.adapters.ids, self._ints(-1, 1))
        starts = self.call("Mul", ids, self._ints(row_count))
        return self.call("Gather", table, self.call("Add", tokens, starts))

    def _windows(self, x: ir.Value) -> ir.Value:
        """Return the windows of x [batch, C, *size] as [batch, C·∏kernel, positions of y].

        With groups they are [batch, groups, C/groups·∏kernel, positions].
        """
        assert self.found is not None
        kind = self.site.kind
        assert isinstance(kind, Conv)
        of_group, *kernel = self.site.operand[1:]
        channels = of_group * kind.groups
        size = math.prod(kernel)
        attributes = self.found.node.attributes
        has_stride = set(attributes.get_ints("strides", (1,))) != {1}
        has_pads = any(attributes.get_ints("pads", ()))
        if size != 1 or has_stride or has_pads:
            x = self._depthwise("Conv", x, channels, kernel)
        return self._positions(x, kind.groups, of_group * size)

    def _positions(self, x: ir.Value, groups: int, channels: int) -> ir.Value:
        """Return x [batch, groups·channels, *size] with its positions on one axis, the last."""
        width = (groups, channels) if groups > 1 else (channels,)
        return self._reshaped(x, self.adapters.size, *width, self.adapters.remaining.value)

    def _summed(self, delta: ir.Value) -> ir.Value:
        """Return windows [batch, out·∏kernel, positions of x] summed up where they lie in y."""
        use = self.found
        kind = self.site.kind
        assert use is not None and isinstance(kind, ConvTranspose)
        of_group, *kernel = self.site.operand[1:]
        channels = of_group * kind.groups
        sizes_of_x = self.call("Shape", use.x)
        size = self.call("Slice", sizes_of_x, self._ints(2), self._ints(np.iinfo(np.int64).max))
        width = self._ints(channels * math.prod(kernel))
        shape = self.call("Concat", self.adapters.size, width, size, axis=0)
        windows = self.call("Reshape", delta, shape, **keep_zeros(self.owner))
        return self._depthwise("ConvTranspose", windows, channels, kernel)

    def _depthwise(self, op: str, x: ir.Value, channels: int, kernel: Sequence[int]) -> ir.Value:
        """Emit the site's op with a one-hot kernel for each place of a window, in each channel."""
        assert self.found is not None
        size = math.prod(kernel)
        one_hot = np.eye(size, dtype=np.float32).reshape(size, 1, *kernel)
        kernels = np.tile(one_hot, (channels, *(1 for _ in one_hot.shape[1:])))
        dtype = numpy_dtype(dtype_name(x) or dtype_name(self.found.x) or "float32")
        name = f"{self.site.id}_lora_windows"
        w = self.parameter(name, kernels.astype(dtype), Role.FROZEN)
        attributes = self.found.node.attributes
        depthwise = {**attributes, "group": channels, "kernel_shape": list(kernel)}
        return self.call(op, x, w, **depthwise)


def stack_gains(gains: Sequence[Array | None], dtype: NumpyDtype) -> Array:
    """Return the factors of rows of all adapters, [n + 1, *batch, out]; entry 0 is zeros.

    Args:
        gains: One entry for each adapter, None where it has none for this use.
        dtype: The dtype of the result.
    """
    shape = next(of_adapter.shape for of_adapter in gains if of_adapter is not None)
    stacked = np.zeros((len(gains) + 1, *shape), dtype)
    for number, of_adapter in enumerate(gains, 1):
        if of_adapter is not None:
            stacked[number] = of_adapter.astype(dtype)
    return stacked


def stack(
    updates: Sequence[tuple[Array, Array] | None], form: str, dtype: NumpyDtype
) -> tuple[Array, Array]:
    """Return the factors of all adapters as stacks; entry 0 is zeros.

    They are [rank, in] and [out, rank], of experts and groups behind an axis for these.

    Args:
        updates: One entry for each adapter, None where it has no update of this use; the scale is
            in b.
        form: One of those of the module's docstring.
        dtype: The dtype of the result.
    """
    pairs = [update for update in updates if update is not None]
    rank = max(a.shape[-2] for a, _ in pairs)
    first_a, first_b = pairs[0]
    *batch, _, in_size = first_a.shape
    out_size = first_b.shape[-2]
    stack_a = np.zeros((len(updates) + 1, *batch, rank, in_size), np.float32)
    stack_b = np.zeros((len(updates) + 1, *batch, out_size, rank), np.float32)
    for number, update in enumerate(updates, 1):
        if update is not None:
            a, b = update
            stack_a[number, ..., : a.shape[-2], :] = a
            stack_b[number, ..., : b.shape[-1]] = b

    if form in ("lookup", "own", "stack"):
        stack_a = stack_a.swapaxes(-1, -2)
    if form not in ("middle", "spread"):
        stack_b = stack_b.swapaxes(-1, -2)
    if form == "last":
        stack_a = stack_a.reshape(-1, stack_a.shape[-1])
        stack_b = stack_b.reshape(-1, stack_b.shape[-1])
    stack_a = np.ascontiguousarray(stack_a.astype(dtype))
    stack_b = np.ascontiguousarray(stack_b.astype(dtype))
    return stack_a, stack_b
