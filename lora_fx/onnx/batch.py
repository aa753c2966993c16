"""What batch mode adds to an ONNX graph: its inputs, and branches whose factors differ by row.

For a row b of the batch with the adapter i = ids[b], and x seen as [batch, m, in]:

    last    (x @ A[i]ᵀ) @ B[i]              A [n·r, in]    B [n·r, out]    in is the last axis of x
    middle  B[i] @ (A[i] @ x)               A [n, r, in]   B [n, out, r]   x [batch, in, m]
    lookup  A[i, x] @ B[i]                  A [n, in, r]   B [n, r, out]   x holds row numbers

A convolution is `middle` over the windows of x, which a depthwise convolution with one-hot kernels
lays out. (A convolution with the batch as its groups would need a group count known beforehand.)

An id out of range is a number of the caller's, and what a kernel does with one differs: the CPU's
Gather fails, CUDA's reads zeros, WebGPU's and DirectML's the last adapter. So the ids are checked
once, before anything reads them:

    outside = ids < 0 or ids > n
    i       = 0 where outside, else numbers[ids]      numbers = 0, 1 … n
    y       = NaN where outside, else y               for every output y of floats

A Gather in `numbers` fails where a runtime refuses. Elsewhere such a row is the base's until it
becomes NaN, so that no factor of another adapter is ever read for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array, NumpyDtype, numpy_dtype
from lora_fx.errors import LoraFxError
from lora_fx.ir.convolution import Conv
from lora_fx.ir.einsum import Einsum
from lora_fx.ir.graph import Role, Site
from lora_fx.ir.kinds import Embedding
from lora_fx.onnx.graph.coded_weights import shares_ranges
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.flow import OnnxWeightUse
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.marks import MARK, WAS
from lora_fx.onnx.graph.values import dtype_name, rank, shape_of
from lora_fx.onnx.manifest import IDS
from lora_fx.onnx.row_axis import RowAxis
from lora_fx.onnx.switch import keep_zeros
from lora_fx.targets.keys import base_name

SCALES = "adapter_scales"
REFUSED = "over"
"""The constant `adapter_ids_over`, that every id out of range becomes; `numbers` ends before it."""
NAN = f"{IDS}_nan"
"""How the names of the constants NaN begin."""
WITH_NAN = ("float16", "bfloat16", "float32", "float64")
"""Dtypes of outputs that can hold NaN and that every runtime's Where takes."""
Tables = Sequence[ir.Value]


def batch_symbol(
    model: ir.Model,
    why: str = "",
    hint: str = "capture with a dynamic batch (--dynamic NAME:0=batch)",
) -> str:
    """The symbol of dimension 0 that the inputs share.

    Args:
        model: The model.
        why: Why it may have none, for the error.
        hint: What to do then.

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
        had = f"{had}: {why}" if why else had
        raise LoraFxError(
            f"batch mode needs one dynamic dimension 0 over the inputs; found {had}", hint
        )
    return found.pop()


def add_inputs(graph: OnnxGraph, batch: str, count: int, *, scales: bool) -> RowAdapters:
    """Add `adapter_ids` int64 [batch], and with `scales` also `adapter_scales` float [batch]."""
    inner = graph.model.graph
    taken = {v.name for v in inner.inputs} | set(inner.initializers)

    def added(name: str, dtype: ir.DataType) -> ir.Value:
        if name in taken:
            raise LoraFxError(f"the model has an input {name!r} already", "rename it")
        value = ir.Value(name=name, shape=ir.Shape([batch]), type=ir.TensorType(dtype))
        inner.inputs.append(value)
        return value

    def constant(name: str, value: Array) -> ir.Value:
        return add_initialiser(inner, f"{IDS}_{name}", value, IDS)

    e = graph.emit_first(IDS)
    raw = added(IDS, ir.DataType.INT64)
    weights = added(SCALES, ir.DataType.FLOAT) if scales else None
    zero = constant("zero", np.array(0, np.int64))
    last = constant("last", np.array(count - 1, np.int64))
    outside = e.call("Or", e.call("Less", raw, zero), e.call("Greater", raw, last))

    # Gather counts a negative id from the end, so all of them become one that it refuses.
    refused = e.call("Where", outside, constant(REFUSED, np.array(count, np.int64)), raw)
    seen = e.call("Gather", constant("numbers", np.arange(count)), refused)
    checker = seen.producer()
    assert checker is not None
    checker.name = f"lora_fx: {IDS} out of range, 0 to {count - 1}"  # the runtime's error quotes it
    checked = e.call("Where", outside, zero, seen)
    return RowAdapters(e, checked, count, weights, batch, outside)


def outputs_without_nan(model: ir.Model) -> list[str]:
    """The names of outputs whose dtype has no NaN, or none that every runtime's Where takes."""
    outputs = (y for y in model.graph.outputs if not y.is_graph_input())
    return [str(y.name) for y in outputs if dtype_name(y) not in WITH_NAN]


def guard_outputs(graph: OnnxGraph, outside: ir.Value) -> None:
    """Let rows whose id is out of range be NaN in every output of floats.

    Args:
        graph: The graph, whose outputs have their rows on axis 0.
        outside: Which rows those are, bool [batch].
    """
    inner = graph.model.graph
    guards = _Guards(graph, outside)
    # NaN inside of the model would reach a range over all rows, and outputs of integers.
    early = not shares_ranges(graph.model) and not outputs_without_nan(graph.model)

    for i, y in enumerate(inner.outputs):
        if dtype_name(y) not in WITH_NAN or y.is_graph_input():
            continue
        operands = _deciding(y) if early else []
        for node, slot in operands:
            guards.put(node, slot)
        if not operands:
            made = guards.of(OnnxEmitter(graph, inner[-1], IDS, before=False), y)
            y.metadata_props.setdefault(WAS, str(y.name))
            made.name, y.name = y.name, graph.fresh(f"{y.name}_unguarded")
            inner.outputs[i] = made


class _Guards:
    """Makes Where(outside, NaN, y)."""

    def __init__(self, graph: OnnxGraph, outside: ir.Value) -> None:
        self.graph, self.outside = graph, outside
        self._columns: dict[int, ir.Value] = {1: outside}

    def of(self, e: OnnxEmitter, y: ir.Value) -> ir.Value:
        """What e emits: y, NaN in the rows that are outside."""
        stored, dtype = self.graph.model.graph.initializers, dtype_name(y)
        name = f"{NAN}_{dtype}"
        if name not in stored:
            value = np.array(np.nan, numpy_dtype(dtype))
            add_initialiser(self.graph.model.graph, name, value, IDS)
        made = e.call("Where", self._column(e, y), stored[name], y)
        made.shape, made.type = y.shape, y.type
        return made

    def put(self, node: ir.Node, slot: int) -> None:
        """Let a node read its operand so."""
        x = node.inputs[slot]
        assert x is not None
        if not is_guard(x.producer()):
            e = OnnxEmitter(self.graph, node, IDS, before=True)
            node.replace_input_with(slot, self.of(e, x))

    def _column(self, e: OnnxEmitter, y: ir.Value) -> ir.Value:
        """`outside` as [batch, 1, … 1], with as many axes as y has."""
        r = rank(y)
        if r is None:
            sizes = e.call("Shape", y)
            ones = e.call("Cast", e.call("Equal", sizes, sizes), to=int(ir.DataType.INT64))
            tail = e.call("Slice", ones, self._ints(1), self._ints(np.iinfo(np.int64).max))
            shape = e.call("Concat", self._ints(-1), tail, axis=0)
            return e.call("Reshape", self.outside, shape)
        if r not in self._columns:
            first = self.outside.producer()
            assert first is not None
            beside = OnnxEmitter(self.graph, first, IDS, before=False)
            shape = self._ints(-1, *[1] * (r - 1))
            self._columns[r] = beside.call("Reshape", self.outside, shape)
        return self._columns[r]

    def _ints(self, *values: int) -> ir.Value:
        name = self.graph.fresh(f"{IDS}_const")
        return add_initialiser(self.graph.model.graph, name, np.array(values, np.int64), IDS)


def _deciding(y: ir.Value) -> list[tuple[ir.Node, int]]:
    """Operands before y whose NaN makes all of a row of y NaN, where they are smaller than y.

    A Where over all logits took 8 % of a small language model's run, and one over the keys and
    values 20 % of a step of decoding behind 512 positions. So it stands before the product; and
    before the new keys are put behind those that the caller gave, which go out as they came.
    """
    node, sizes = y.producer(), shape_of(y)
    if node is None or node.domain or sizes is None:
        return []
    if node.op_type == "Add":
        parts = (_deciding(v) for v in node.inputs if v is not None and shape_of(v) == sizes)
        return next(filter(None, parts), [])
    if node.op_type == "MatMul":
        x, w = node.inputs
        same = rank(x) == len(sizes) and dtype_name(x) in WITH_NAN
        return [(node, 0)] if same and _widens(w) else []
    if node.op_type == "Concat" and node.attributes["axis"].as_int() % len(sizes):
        brought = [v is not None and v.is_graph_input() for v in node.inputs]
        known = all(rank(v) == len(sizes) for v in node.inputs)
        return [(node, k) for k, b in enumerate(brought) if not b] if known and any(brought) else []
    return []


def is_guarded(y: ir.Value) -> bool:
    """Whether an output is NaN in the rows that are outside."""
    operands = [node.inputs[slot] for node, slot in _deciding(y)]
    return is_guard(y.producer()) or _guarded(operands)


def brings_input(y: ir.Value) -> bool:
    """Whether a part of an output is an input as it came, so that others alone are guarded."""
    node = y.producer()
    return node is not None and node.op_type == "Concat" and is_guarded(y)


def _guarded(values: Sequence[ir.Value | None]) -> bool:
    return bool(values) and all(v is not None and is_guard(v.producer()) for v in values)


def _widens(w: ir.Value | None) -> bool:
    """Whether w is a stored matrix of floats, at least as wide as high, or a transpose of one."""
    turned = w.producer() if w is not None else None
    source = turned.inputs[0] if turned is not None and turned.op_type == "Transpose" else w
    sizes = shape_of(w)
    if source is None or source.const_value is None or sizes is None or len(sizes) != 2:
        return False
    height, width = sizes
    return isinstance(height, int) and isinstance(width, int) and 0 < height <= width


def is_guard(node: ir.Node | None) -> bool:
    """Whether a node makes NaN of rows."""
    if node is None or node.op_type != "Where" or node.metadata_props.get(MARK) != IDS:
        return False
    nan = node.inputs[1]
    return nan is not None and str(nan.name).startswith(NAN)


def guards_alone(model: ir.Model) -> ir.Model:
    """The nodes that make NaN of rows, as a model of the ids and of what these nodes read."""
    guards = [n for n in model.graph if is_guard(n)]
    begins = [IDS, *(str(n.inputs[2].name) for n in guards if n.inputs[2] is not None)]
    ends = [str(n.outputs[0].name) for n in guards]
    graph = ir.convenience.extract(model.graph, [*dict.fromkeys(begins)], ends)
    return ir.Model(graph, ir_version=model.ir_version)


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
