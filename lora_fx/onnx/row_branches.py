"""Branches of batch mode, whose factors differ by row.

For a row b of the batch with the adapter i = ids[b], and x seen as [batch, m, in]:

    last    (x @ A[i]ᵀ) @ B[i]              A [n·r, in]    B [n·r, out]    in is the last axis of x
    middle  B[i] @ (A[i] @ x)               A [n, r, in]   B [n, out, r]   x [batch, in, m]
    lookup  A[i, x] @ B[i]                  A [n, in, r]   B [n, r, out]   x holds row numbers

A convolution is `middle` over the windows of x, which a depthwise convolution with one-hot kernels
lays out. (A convolution with the batch as its groups would need a group count known beforehand.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, NumpyDtype, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.kinds import Conv, Einsum, Embedding
from lora_fx.onnx.flat_rows import keep_zeros
from lora_fx.onnx.graph.flow import OnnxWeightUse, dtype_name, rank, shape_of
from lora_fx.onnx.graph.graph import OnnxEmitter, OnnxGraph
from lora_fx.onnx.row_adapters import RowAdapters
from lora_fx.onnx.row_axis import RowAxis

Tables = Sequence[ir.Value]


def form_of(found: OnnxWeightUse, rows: RowAxis) -> str:
    """The form of a use: last, middle or lookup.

    Raises:
        LoraFxError: Rows cannot be told apart, or the kind of use has no form by row.
    """
    site, kind = found.site, found.site.kind
    where = f"{site.parameter!r} ({site.op}, node {site.id})"
    other = "switch" if site.no_fold else "merged or switch"
    hint = f"exclude the target from the adapters, or use mode {other}"
    x = found.x
    if site.refusal:
        raise LoraFxError(f"{where}: {site.refusal}", hint)
    if rows.lost:
        raise LoraFxError(f"{where}: its rows are not those of the batch: {rows.lost}", hint)
    if rows.axis is None:
        raise LoraFxError(f"{where}: its input is the same for every row of the batch", hint)
    r, front = rank(x), shape_of(x) or ()
    outermost = not rows.inner and all(n == 1 for n in front[: rows.axis])
    if isinstance(kind, Embedding) and outermost:
        return "lookup"
    if isinstance(kind, Conv) and kind.groups == 1 and rows == RowAxis(0):
        return "middle"
    apart = not rows.inner or (rows.axis == 0 and r == 2)
    if isinstance(kind, Einsum) and r is not None and len(site.operand) == 2:
        if kind.form == "right" and r >= 2 and rows.axis < r - 1 and apart:
            return "last"
        if kind.form == "left" and r == 3 and rows == RowAxis(0):
            return "middle"
    raise LoraFxError(f"{where}: batch mode has no form by row for this use", hint)


class BatchEmitter(OnnxEmitter):
    """Emits the nodes of one site's branch."""

    def __init__(self, owner: OnnxGraph, site: Site, own: RowAdapters, rows: RowAxis) -> None:
        e = owner.emit(site)
        super().__init__(owner, e.node, site.id, e.found, before=False)
        self.site, self.own, self.rows = site, own, rows

    def branch(
        self, form: str, x: ir.Value, a: ir.Value, b: ir.Value, y: ir.Value, beside: Tables
    ) -> ir.Value:
        """The low-rank part of y, in its shape; `beside` are A of all uses of this x."""
        if form == "last":
            return self._last(x, b, y, beside, beside.index(a))
        mine = self.call("Gather", b, self.own.ids)
        if form == "lookup":
            return self._shaped(self.call("MatMul", self._scaled(self._rows(x, a)), mine), y)
        if isinstance(self.site.kind, Conv):
            x = self._windows(x)
        t = self.call("MatMul", self.call("Gather", a, self.own.ids), x)
        return self._shaped(self.call("MatMul", mine, self._scaled(t)), y)

    def _last(self, x: ir.Value, b: ir.Value, y: ir.Value, tables: Tables, part: int) -> ir.Value:
        """The delta in the shape of y; rows of x are brought to the front, and those of y back.

        The uses of one x share a product with all their tables A; this one's is number `part`.
        """
        r, axis, plain = rank(x), self.rows.axis, self.rows.exact
        if self.rows.inner:  # [k · batch, in] as [k, batch, in]
            r, axis, plain = 3, 1, True
        assert r is not None and axis is not None
        order = (axis, *(k for k in range(r) if k != axis))
        plain = r == 3 and plain
        low = int(b.shape.numpy()[0]) // self.own.count  # type: ignore[union-attr]
        scope = self.found and self.found.node.graph  # a branch of an If sees nothing of the other
        products = self.own.products.setdefault((scope, x, *tables), [])
        if not products:
            width = self.site.operand[self.site.kind.axes(self.site.operand).in_[0]]
            if self.rows.inner:
                sizes = self.call(
                    "Concat", self._ints(-1), self.own.size, self._ints(width), axis=0
                )
                x = self.call("Reshape", x, sizes)
            first = self.call("Transpose", x, perm=list(order)) if axis else x
            seen = first if plain else self.call("Reshape", first, self._sizes(-1, width))
            several = len(tables) > 1  # the runtime joins initialisers when it loads them
            a = self.call("Concat", *tables, axis=0) if several else tables[0]
            a = self.call("Gather", a, self.own.rows(low, len(tables)))
            t = self.call("MatMul", seen, self.call("Transpose", a, perm=[0, 2, 1]))
            # no product with 0: an Inf of another adapter would be this row's NaN
            zero = self._constant(np.array(0, numpy_dtype(dtype_name(x) or "float32")))
            t = self._scaled(self.call("Where", self.own.mask(low, len(tables)), t, zero), x)
            products += self._split(t, len(tables)) if several else [t]
        delta = self.call("MatMul", products[part], self.call("Gather", b, self.own.rows(low)))
        if not axis:
            return delta if plain else self._shaped(delta, y)
        if not plain:
            sizes = self.call("Gather", self.call("Shape", x), self._ints(*order[:-1]))
            sizes = self.call("Concat", sizes, self._ints(-1), axis=0)
            delta = self.call("Reshape", delta, sizes)
        delta = self.call("Transpose", delta, perm=[order.index(k) for k in range(r)])
        return self._shaped(delta, y) if self.rows.inner else delta

    def _split(self, t: ir.Value, count: int) -> list[ir.Value]:
        """Equal parts along the last axis."""
        more = {"num_outputs": count} if self.owner.model.opset_imports.get("", 0) >= 18 else {}
        return self.results("Split", t, count=count, axis=-1, **more)

    def _sizes(self, *rest: int) -> ir.Value:
        """[batch, *rest] as a shape."""
        return self.call("Concat", self.own.size, self._ints(*rest), axis=0)

    def _shaped(self, delta: ir.Value, y: ir.Value) -> ir.Value:
        shape = self.call("Shape", y)
        return self.call("Reshape", delta, shape, **keep_zeros(self.owner))

    def _scaled(self, t: ir.Value, like: ir.Value | None = None) -> ir.Value:
        """The value t [batch, …, …] times the weight of each row, in the dtype of `like` or t."""
        if self.own.scales is None:
            return t
        factor = self.call("Reshape", self.own.scales, self._ints(-1, 1, 1))
        return self.call("Mul", t, self.op("cast_like", factor, like or t))

    def _rows(self, x: ir.Value, a: ir.Value) -> ir.Value:
        """The rows A[ids[b], x[b, j]] as [batch, m, r], looked up in A as one long table."""
        count = self.site.operand[0]
        flat = self.call("Reshape", a, self._ints(-1, int(a.shape.numpy()[2])))  # type: ignore[union-attr]
        tokens = self.call("Cast", x, to=int(ir.DataType.INT64))
        tokens = self.call("Reshape", tokens, self._sizes(-1))
        tokens = self.call("Mod", tokens, self._ints(count))  # negative ones count from the end
        start = self.call("Mul", self.call("Reshape", self.own.ids, self._ints(-1, 1)),
                           self._ints(count))  # fmt: skip
        return self.call("Gather", flat, self.call("Add", tokens, start))

    def _windows(self, x: ir.Value) -> ir.Value:
        """The windows of x [batch, C, *size] as [batch, C·∏kernel, positions of y]."""
        channels, kernel = self.site.operand[1], self.site.operand[2:]
        size = math.prod(kernel)
        assert self.found is not None
        given = self.found.node.attributes
        stays = set(given.get_ints("strides", (1,))) == {1}
        bare = not any(given.get_ints("pads", ()))
        if not (size == 1 and stays and bare):
            one = np.eye(size, dtype=np.float32).reshape(size, 1, *kernel)
            value = np.tile(one, (channels, *(1 for _ in one.shape[1:])))
            name = f"{self.site.id}_lora_windows"
            dtype = numpy_dtype(dtype_name(x) or "float32")
            w = self.parameter(name, value.astype(dtype), Role.FROZEN)
            own = {**given, "group": channels, "kernel_shape": list(kernel)}
            x = self.call("Conv", x, w, **own)
        return self.call("Reshape", x, self._sizes(channels * size, -1))


def stack(
    updates: Sequence[tuple[Array, Array] | None], form: str, dtype: NumpyDtype
) -> tuple[Array, Array]:
    """Factors [rank, in] and [out, rank] of every adapter, as stacks; entry 0 is zeros.

    Args:
        updates: One entry for each adapter, None where it has no update of this use; the scale is
            in b.
        form: One of the three of the module's docstring.
        dtype: The dtype of the result.
    """
    given = [u for u in updates if u is not None]
    r = max(a.shape[0] for a, _ in given)
    a_all = np.zeros((len(updates) + 1, r, given[0][0].shape[1]), np.float32)
    b_all = np.zeros((len(updates) + 1, given[0][1].shape[0], r), np.float32)
    for i, update in enumerate(updates, 1):
        if update is not None:
            a, b = update
            a_all[i, : a.shape[0]], b_all[i, :, : b.shape[1]] = a, b
    if form == "lookup":
        a_all = a_all.transpose(0, 2, 1)
    if form != "middle":
        b_all = b_all.transpose(0, 2, 1)
    if form == "last":
        a_all, b_all = (v.reshape(-1, v.shape[-1]) for v in (a_all, b_all))
    return tuple(np.ascontiguousarray(v.astype(dtype)) for v in (a_all, b_all))  # type: ignore[return-value]
