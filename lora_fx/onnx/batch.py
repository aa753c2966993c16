"""What batch mode adds to an ONNX graph: its inputs, and branches whose factors differ by row.

For a row b of the batch with the adapter i = ids[b], and x seen as [batch, m, in]:

    last    (x @ A[i]ᵀ) @ B[i]              A [n·r, in]    B [n·r, out]    in is the last axis of x
    middle  B[i] @ (A[i] @ x)               A [n, r, in]   B [n, out, r]   x [batch, in, m]
    lookup  A[i, x] @ B[i]                  A [n, in, r]   B [n, r, out]   x holds row numbers

A convolution is `middle` over the windows of x, which a depthwise convolution with one-hot kernels
lays out. (A convolution with the batch as its groups would need a group count known beforehand.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, NumpyDtype, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.kinds import Conv, Einsum, Embedding
from lora_fx.onnx.graph.flow import OnnxWeightUse, dtype_name, rank, shape_of
from lora_fx.onnx.graph.graph import OnnxEmitter, OnnxGraph, add_initialiser
from lora_fx.onnx.row_axis import RowAxis
from lora_fx.onnx.switch import keep_zeros
from lora_fx.targets.target import base_name

SCALES = "adapter_scales"
Tables = Sequence[ir.Value]


def batch_symbol(model: ir.Model) -> str:
    """The symbol of dimension 0 that the inputs share.

    Raises:
        LoraFxError: No input has a dynamic dimension 0, or they differ.
    """
    found = {
        str(v.shape[0])
        for v in model.graph.inputs
        if v.shape is not None and len(v.shape) and isinstance(v.shape[0], ir.SymbolicDim)
    } - {"None"}
    if len(found) != 1:
        had = ", ".join(sorted(found)) or "none"
        raise LoraFxError(
            f"batch mode needs one dynamic dimension 0 over the inputs; found {had}",
            "capture with a dynamic batch (--dynamic NAME:0=batch)",
        )
    return found.pop()


def add_inputs(graph: OnnxGraph, batch: str, count: int, *, scales: bool) -> RowAdapters:
    """Add `adapter_ids` int64 [batch], and with `scales` also `adapter_scales` float [batch].

    Gather counts a negative id from the end; it is turned into one that Gather refuses.
    """
    inner = graph.model.graph
    taken = {v.name for v in inner.inputs} | set(inner.initializers)

    def added(name: str, dtype: ir.DataType) -> ir.Value:
        if name in taken:
            raise LoraFxError(f"the model has an input {name!r} already", "rename it")
        value = ir.Value(name=name, shape=ir.Shape([batch]), type=ir.TensorType(dtype))
        inner.inputs.append(value)
        return value

    e = graph.emit_first(IDS)
    raw = added(IDS, ir.DataType.INT64)
    weights = added(SCALES, ir.DataType.FLOAT) if scales else None
    zero = add_initialiser(inner, f"{IDS}_zero", np.array(0, np.int64), IDS)
    over = add_initialiser(inner, f"{IDS}_over", np.array(count, np.int64), IDS)
    checked = e.call("Where", e.call("Less", raw, zero), over, raw)
    return RowAdapters(e, checked, count, weights, batch)


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


def join_copies(model: ir.Model, names: Iterable[str]) -> None:
    """Store once what has copies that told its uses apart, where the exporter left it as it was.

    Args:
        model: The model, edited in place.
        names: Of the copies, `NAME@USE`.
    """
    stored = model.graph.initializers
    for name in names:
        copy, first = stored[name], stored.get(base_name(name))
        if first is copy or copy.const_value is None:
            continue
        if first is not None and first.const_value is not None:
            ours, theirs = copy.const_value.numpy(), first.const_value.numpy()
            if np.array_equal(ours, theirs):
                copy.replace_all_uses_with(first)
                del stored[name]
                continue
            if ours.ndim != 2 or not np.array_equal(ours.T, theirs):
                continue
            turned = ir.Node("", "Transpose", [copy])  # the exporter turns what one product reads
            turned.outputs[0].name = f"{first.name}_turned"
            turned.outputs[0].shape, turned.outputs[0].type = first.shape, first.type
            model.graph.insert_before(model.graph[0], turned)
            first.replace_all_uses_with(turned.outputs[0])
            del stored[str(first.name)]
        copy.name = base_name(name)


# How the rows of a batch read their factors: one pair each, or all those in use side by side.
#
#     x [b, m, in] · Aᵀ [g, in, k·r] ⊙ mask [b, 1, k·r] · B [g, k·r, out]
#
# With g = b and k = 1 every row has its own pair: b small products, and b copies of factors. With
# g = 1 and k = u, the number of different adapters in this batch, all rows share one product with
# all of them, and the mask leaves each row its own: u times the arithmetic, u copies. Which one is
# a matter of sizes, so one graph does both, and decides by its inputs: u·(u − 1)·m ≤ 5·b, where m
# is the positions of a row. So a batch of one adapter, and steps of a few tokens with a few
# adapters, share. Uses of one x (query, key, value) share the product with A too: their tables lie
# below each other in one Gather, and the masked product is split.


LIMIT = 5
"""Below it sharing is cheaper: there u adapters' products cost what b copies do. Measured on BERT,
256 wide, rank 8, with 4 to 32 rows of 1 to 128 tokens."""
NAME, IDS = "adapter_rows", "adapter_ids"


class RowAdapters(OnnxEmitter):
    """Which adapter each row has, and the nodes that decide, before everything that reads them.

    Args:
        first: What emits before all nodes of the graph, whose inputs the next two are.
        ids: The adapters' numbers, checked, [batch].
        count: How many adapters there are, the base among them.
        scales: Weights by row [batch], where they were asked for.
        batch: The symbol of the batch dimension.
    """

    def __init__(
        self, first: OnnxEmitter, ids: ir.Value, count: int, scales: ir.Value | None, batch: str
    ) -> None:
        super().__init__(first.owner, first.node, NAME, before=True)
        self._made: dict[tuple[object, ...], ir.Value] = {}
        self.products: dict[tuple[object, ...], list[ir.Value]] = {}
        self.ids, self.count, self.scales = ids, count, scales
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
