"""Whole tensors in mode batch: each row of the batch reads the value of its own adapter.

    table [k, …]   the values of a tensor: that of the base first, then each adapter's
    entry [n + 1]  the id of an adapter → its value; adapters that lack the tensor have the base's

What the graph computes of such tensors alone (a transpose, a cast) is computed here, once for each
adapter. Where the result meets the rows of an activation, the rows take their own:

    product        x[b] · table[entry[ids[b]]]
    lookup         a table of all values below each other; ids + rows · entry[ids[b]]
    elementwise    table[entry[ids]], reshaped so that its rows lie where the activation has them
    norm, bias     taken out of the op, and applied behind it as an elementwise product and sum

Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.inputs import Named
from lora_fx.onnx.flat_rows import keep_zeros
from lora_fx.onnx.graph.emitter import OnnxEmitter, add_initialiser
from lora_fx.onnx.graph.graph import OnnxGraph
from lora_fx.onnx.graph.values import (
    bodies_of,
    constant,
    delete_unread,
    operand,
    rank,
    remove_unread,
    shape_of,
)
from lora_fx.onnx.row_adapters import RowAdapters
from lora_fx.onnx.row_axis import SAME, RowAxis

MARK_OF_ROWS = "whole_rows"
"""What the nodes are marked with."""
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu")
SCALED = {"LayerNormalization": -1, "RMSNormalization": -1}
"""Norms whose scale and bias lie along the last axes."""
CHANNELS = ("BatchNormalization", "InstanceNormalization")
"""Norms whose scale and bias lie along axis 1."""
CONVOLUTIONS = ("Conv", "ConvTranspose")
HINT = "leave it out with lora-fx convert ADAPTER -o OUT --exclude NAME, or use mode switch"


@dataclass(frozen=True)
class Replacements:
    """The values of one tensor.

    Attributes:
        name: The initialiser.
        values: The adapters' values in the order of their ids, in the dtype of the graph; None
            where an adapter has the base's.
    """

    name: str
    values: Sequence[Array | None]


def choose_by_row(
    graph: OnnxGraph,
    tensors: Sequence[Replacements],
    adapters: RowAdapters,
    states: MutableMapping[ir.Value, RowAxis],
) -> None:
    """Let every row read the tensors of its adapter.

    Args:
        graph: Edited in place.
        tensors: What adapters replace.
        adapters: The adapter of each row.
        states: Where values have the rows of the batch; values that are added are added here.

    Raises:
        LoraFxError: A use that cannot be computed row by row.
    """
    computed = _computed_of(graph, [tensor.name for tensor in tensors])
    uses = _uses(graph, computed)
    read: dict[ir.Value, None] = {}
    for node, slots in uses:
        read |= dict.fromkeys(_operand(node, slot) for slot in slots)
    values = _values(graph, tensors, list(read))
    names = {value: computed[value] for value in read}
    rewriter = _Rewriter(graph, adapters, states, values, names)
    for node, slots in uses:
        rewriter.rewrite(node, slots)
    for value in read:
        remove_unread(value.producer())
    for tensor in tensors:
        delete_unread(graph.model.graph.initializers.get(tensor.name))
    graph.changed()


def _operand(node: ir.Node, slot: int) -> ir.Value:
    value = node.inputs[slot]
    assert value is not None
    return value


def _computed_of(graph: OnnxGraph, names: Sequence[str]) -> dict[ir.Value, str]:
    """Return what is computed of these tensors and constants alone, with the tensor's name.

    Raises:
        LoraFxError: A tensor that the graph does not have, or that a body reads.
    """
    owner = graph.model.graph
    computed: dict[ir.Value, str] = {}
    for name in names:
        if name not in owner.initializers:
            raise LoraFxError(
                f"{name!r}: an adapter replaces this tensor, which the exported graph does not "
                "have",
                HINT,
            )
        computed[owner.initializers[name]] = name
    for node in owner:
        sources = [computed[value] for value in node.inputs if value in computed]
        if not sources or bodies_of(node):
            continue
        others = [value for value in node.inputs if value is not None and value not in computed]
        if all(constant(value) is not None for value in others):
            computed |= dict.fromkeys(node.outputs, sources[0])
    return computed


def _uses(
    graph: OnnxGraph, computed: Mapping[ir.Value, str]
) -> list[tuple[ir.Node, tuple[int, ...]]]:
    """Return the nodes that read such values beside others, and in which slots.

    Raises:
        LoraFxError: A body reads one, or an output is one.
    """
    owner = graph.model.graph
    uses = []
    for node in owner:
        slots = tuple(slot for slot, value in enumerate(node.inputs) if value in computed)
        if slots and node.outputs[0] not in computed:
            uses.append((node, slots))
    for value, name in computed.items():
        in_body = any(user.graph is not owner for user, _ in value.uses())
        if in_body or value.is_graph_output():
            where = "the body of an If or a Loop reads it" if in_body else "it is an output"
            raise LoraFxError(f"{name!r} is no tensor that rows can choose: {where}", HINT)
    return uses


def _values(
    graph: OnnxGraph, tensors: Sequence[Replacements], read: Sequence[ir.Value]
) -> dict[ir.Value, list[Array]]:
    """Return the value of each operand for the base and for every adapter."""
    base = {tensor.name: graph.read(tensor.name) for tensor in tensors}
    compute = _computation(graph, list(base), [str(value.name) for value in read])
    values: dict[ir.Value, list[Array]] = {value: [] for value in read}
    for number in range(-1, len(tensors[0].values)):
        feeds = dict(base)
        for tensor in tensors:
            replaced = tensor.values[number] if number >= 0 else None
            if replaced is not None:
                feeds[tensor.name] = replaced
        outputs = compute(feeds)
        for value in read:
            values[value].append(outputs[str(value.name)])
    return values


def _computation(
    graph: OnnxGraph, tensors: Sequence[str], wanted: Sequence[str]
) -> Callable[[Named], Named]:
    """Return a function from values of the tensors to what the graph computes of them."""
    computed = [name for name in wanted if name not in tensors]
    if not computed:
        return dict
    from onnx.reference import ReferenceEvaluator

    part = ir.convenience.extract(graph.model.graph, list(tensors), computed)
    part.opset_imports.update(graph.model.opset_imports)
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=graph.model.ir_version)))

    def compute(feeds: Named) -> Named:
        outputs = evaluator.run(computed, dict(feeds))
        arrays = [np.asarray(output) for output in outputs]
        return {**feeds, **dict(zip(computed, arrays, strict=True))}

    return compute


@dataclass
class _Table:
    """The values of an operand without repetitions, and the entry of each adapter."""

    values: Array
    entries: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[Array]) -> _Table:
        """Make the table of the base's value and those of the adapters."""
        different: list[Array] = []
        entries = []
        for value in values:
            entry = next((i for i, one in enumerate(different) if np.array_equal(one, value)), None)
            if entry is None:
                entry = len(different)
                different.append(value)
            entries.append(entry)
        return cls(np.stack(different), tuple(entries))


@dataclass
class _Rewriter:
    """The rewriter of the nodes in which tensors of adapters meet the rows of the batch."""

    graph: OnnxGraph
    adapters: RowAdapters
    states: MutableMapping[ir.Value, RowAxis]
    values: Mapping[ir.Value, Sequence[Array]]
    names: Mapping[ir.Value, str]
    _tables: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    _entries: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)

    def rewrite(self, node: ir.Node, slots: Sequence[int]) -> None:
        """Replace a node by one whose rows read their own values in these slots.

        Raises:
            LoraFxError: The use cannot be computed row by row.
        """
        e = _RowEmitter(self.graph, node, MARK_OF_ROWS, before=True)
        name = self.names[_operand(node, slots[0])]
        op = node.op_type if not node.domain else ""
        if op in ELEMENTWISE and len(slots) == 1 and len(node.inputs) == 2:
            y = self._elementwise(e, node, slots[0])
        elif op == "MatMul" and slots == (1,):
            y = self._product(e, node, _operand(node, 0), _operand(node, 1), transposed=False)
        elif op == "MatMul" and slots == (0,):
            y = self._left_product(e, node)
        elif op == "Gemm" and 0 not in slots and _is_plain(node):
            y = self._gemm(e, node, slots)
        elif op == "Gather" and slots == (0,) and node.attributes.get_int("axis", 0) == 0:
            y = self._lookup(e, node)
        elif op in SCALED and set(slots) <= {1, 2} and len(node.outputs) == 1:
            y = self._norm(e, node, slots, trailing=True)
        elif op in CHANNELS and set(slots) <= {1, 2} and len(node.outputs) == 1:
            y = self._norm(e, node, slots, trailing=False)
        elif op in CONVOLUTIONS and slots == (2,):
            y = self._convolution(e, node)
        else:
            raise self._refused(node, name, "this use cannot be computed row by row")
        self._take_place(node, y)

    def _refused(self, node: ir.Node, name: str, why: str) -> LoraFxError:
        where = f"{node.op_type} {node.outputs[0].name!r}"
        return LoraFxError(
            f"{name!r} is a whole tensor of an adapter, which mode batch cannot choose by row in "
            f"{where}: {why}",
            HINT.replace("NAME", name),
        )

    def _rows(self, node: ir.Node, slot: int, x: ir.Value) -> RowAxis:
        """Return where the rows of an activation are.

        Raises:
            LoraFxError: It has none, or an unknown rank.
        """
        name = self.names[_operand(node, slot)]
        rows = self.states.get(x, SAME)
        if rows.lost:
            raise self._refused(node, name, rows.lost)
        if rows.axis is None:
            raise self._refused(node, name, "its input is the same for every row of the batch")
        if rank(x) is None:
            raise self._refused(node, name, "the number of its input's dimensions is unknown")
        return rows

    def _elementwise(self, e: _RowEmitter, node: ir.Node, slot: int) -> ir.Value:
        """Return op(x, w) where the rows of x have a w each."""
        x = _operand(node, 1 - slot)
        return self._combined(e, node, slot, x, self._rows(node, slot, x), node.op_type)

    def _combined(
        self,
        e: _RowEmitter,
        node: ir.Node,
        slot: int,
        x: ir.Value,
        rows: RowAxis,
        op: str,
        *,
        behind: int = 0,
    ) -> ir.Value:
        """Return x combined by an elementwise op with the values of a slot.

        Args:
            e: An emitter before the node.
            node: The node that reads the tensor.
            slot: Where it reads it.
            x: What the rows have there.
            rows: Where its rows are.
            op: The op.
            behind: How many axes of x follow the last axis of the tensor.
        """
        x_rank = rank(x)
        assert x_rank is not None and rows.axis is not None
        value = _operand(node, slot)
        table = _Table.of(
            [array.reshape(*array.shape, *[1] * behind) for array in self.values[value]]
        )
        name = self.names[value]
        axis = rows.axis
        matrices = x
        if not rows.exact:
            if axis != 0:
                raise self._refused(node, name, "the rows of its input lie beside other sizes")
            matrices = e.split_rows(self.adapters, x, inner=rows.inner)
            axis = 1 if rows.inner else 0
            x_rank += 1
        sizes = table.values.shape[1:]
        padded = (*[1] * (x_rank - len(sizes)), *sizes)
        if len(padded) > x_rank or any(size != 1 for size in padded[: axis + 1]):
            raise self._refused(node, name, "its sizes reach the axis of the rows")
        gathered = self._gathered(e, table, name)
        if axis:
            in_front = [1] * axis
            gathered = e.reshaped(gathered, *in_front, self.adapters.size, *padded[axis + 1 :])
        elif len(sizes) != x_rank - 1:
            # a 0 is the size that the operand has there
            gathered = e.call("Reshape", gathered, e.ints(0, *padded[1:]))
        operands = (matrices, gathered) if slot or op != node.op_type else (gathered, matrices)
        y = e.op_like(op, operands, x)
        y.shape = None
        if not rows.exact:
            y = e.joined_rows(y)
        y.shape = x.shape
        return y

    def _product(
        self, e: _RowEmitter, node: ir.Node, x: ir.Value, w: ir.Value, *, transposed: bool
    ) -> ir.Value:
        """Return x[b] · W[b] in the shape of the product.

        Args:
            e: An emitter before the node.
            node: The product.
            x: Its activation.
            w: The operand for the weight, [in, out].
            transposed: That is [out, in].
        """
        rows = self._rows(node, list(node.inputs).index(w), x)
        name = self.names[w]
        arrays = self.values[w]
        x_rank = rank(x)
        assert x_rank is not None and rows.axis is not None
        if arrays[0].ndim != 2 or rows.axis >= x_rank - 1:
            raise self._refused(node, name, "it is no product of rows with a matrix")
        if not rows.exact and rows.axis != 0:
            raise self._refused(node, name, "the rows of its input lie beside other sizes")
        if transposed:
            arrays = [array.T for array in arrays]
        table = _Table.of(arrays)
        weights = self._gathered(e, table, name)
        in_size, out_size = table.values.shape[1:]
        if rows.exact and rows.axis == 0 and x_rank == 3:
            return e.call("MatMul", x, weights)

        if rows.inner:
            order = [1, 0, 2]
            front = e.reshaped(x, self.adapters.remaining.value, self.adapters.size, in_size)
        else:
            order = [rows.axis, *(axis for axis in range(x_rank) if axis != rows.axis)]
            front = x
        is_first = order[0] == 0
        front = front if is_first else e.call("Transpose", front, perm=order)
        matrices = e.reshaped(front, self.adapters.size, self.adapters.remaining.value, in_size)
        y = e.call("MatMul", matrices, weights)
        y = e.reshaped(y, e.sizes_before_last(front), out_size)
        if not is_first:
            back = [order.index(axis) for axis in range(len(order))]
            y = e.call("Transpose", y, perm=back)
        if rows.inner:
            y = e.reshaped(y, e.sizes_before_last(x), out_size)
        return y

    def _left_product(self, e: _RowEmitter, node: ir.Node) -> ir.Value:
        """Return W[b] · x[b] for x [batch, in, m]."""
        x = _operand(node, 1)
        w = _operand(node, 0)
        rows = self._rows(node, 0, x)
        if rows != RowAxis(0) or rank(x) != 3 or self.values[w][0].ndim != 2:
            raise self._refused(node, self.names[w], "it is no product of rows with a matrix")
        return e.call("MatMul", self._gathered(e, _Table.of(self.values[w]), self.names[w]), x)

    def _gemm(self, e: _RowEmitter, node: ir.Node, slots: Sequence[int]) -> ir.Value:
        """Return x · W + C of a Gemm whose W, C or both the rows have of their own."""
        x = _operand(node, 0)
        rows = self._rows(node, slots[0], x)
        if 1 in slots:
            transposed = bool(node.attributes.get_int("transB", 0))
            y = self._product(e, node, x, _operand(node, 1), transposed=transposed)
        else:
            y = e.again(node, node.inputs[:2])
        y.shape = node.outputs[0].shape
        y.type = node.outputs[0].type
        bias = operand(node, 2)
        if 2 in slots:
            return self._combined(e, node, 2, y, rows, "Add")
        return y if bias is None else e.call("Add", y, bias)

    def _norm(
        self, e: _RowEmitter, node: ir.Node, slots: Sequence[int], *, trailing: bool
    ) -> ir.Value:
        """Return a norm with a scale of ones and no bias, scaled and shifted by each row's own."""
        x = _operand(node, 0)
        rows = self._rows(node, slots[0], x)
        x_rank = rank(x)
        assert x_rank is not None
        behind = 0 if trailing else x_rank - 2
        inputs = list(node.inputs)
        bias = operand(node, 2)
        if 1 in slots:
            ones = np.ones_like(self.values[_operand(node, 1)][0])
            inputs[1] = e.stored("ones", ones)
        if bias is not None:
            if trailing:
                inputs = inputs[:2]
            else:
                size = self.values[_operand(node, slots[0])][0]
                inputs[2] = e.stored("zeros", np.zeros_like(size))
        y = e.again(node, inputs)
        y.shape = node.outputs[0].shape
        if 1 in slots:
            y = self._combined(e, node, 1, y, rows, "Mul", behind=behind)
        if bias is None:
            return y
        if 2 in slots:
            return self._combined(e, node, 2, y, rows, "Add", behind=behind)
        if behind:
            bias = e.reshaped(bias, -1, *[1] * behind)
        return e.call("Add", y, bias)

    def _convolution(self, e: _RowEmitter, node: ir.Node) -> ir.Value:
        """Return a convolution without its bias, and each row's own bias behind it."""
        old = node.outputs[0]
        x_rank = rank(_operand(node, 0))
        if x_rank is None:
            name = self.names[_operand(node, 2)]
            raise self._refused(node, name, "the number of its input's dimensions is unknown")
        rows = self._rows(node, 2, _operand(node, 0))
        y = e.again(node, node.inputs[:2])
        y.shape = old.shape if old.shape is not None else ir.Shape([None] * x_rank)
        return self._combined(e, node, 2, y, rows, "Add", behind=x_rank - 2)

    def _lookup(self, e: _RowEmitter, node: ir.Node) -> ir.Value:
        """Return the rows of each batch row's own table; ids out of range stay out of range."""
        table_value = _operand(node, 0)
        tokens = _operand(node, 1)
        name = self.names[table_value]
        rows = self._rows(node, 0, tokens)
        in_front = (shape_of(tokens) or ())[: rows.axis]
        if rows.inner or any(size != 1 for size in in_front):
            raise self._refused(node, name, "the batch is not the first axis of its ids")
        table = _Table.of(self.values[table_value])
        count, row_count, *rest = table.values.shape
        stacked = table.values.reshape(count * row_count, *rest)
        long_table = self._stored_table(f"{name}.rows", stacked)

        size, remaining = self.adapters.size, self.adapters.remaining.value
        ids = e.call("Cast", tokens, to=int(ir.DataType.INT64))
        ids = e.reshaped(ids, size, remaining)
        zero, height = e.ints(0), e.ints(row_count)
        from_end = e.call("Add", ids, height)
        ids = e.call("Where", e.call("Less", ids, zero), from_end, ids)
        below = e.call("Less", ids, zero)
        above = e.call("Greater", ids, e.ints(row_count - 1))
        outside = e.call("Or", below, above)
        starts = e.call("Mul", self._entry_of_rows(e, table.entries), height)
        starts = e.call("Reshape", starts, e.ints(-1, 1))
        past_all = e.ints(count * row_count)
        picked = e.call("Where", outside, past_all, e.call("Add", ids, starts))
        y = e.call("Gather", long_table, picked)
        shape = e.call("Concat", e.call("Shape", tokens), e.ints(*rest), axis=0)
        return e.call("Reshape", y, shape, **keep_zeros(self.graph))

    def _gathered(self, e: _RowEmitter, table: _Table, name: str) -> ir.Value:
        """Return the value of each row, [batch, …]."""
        stored = self._stored_table(name, table.values)
        gathered = e.call("Gather", stored, self._entry_of_rows(e, table.entries))
        gathered.type = stored.type
        return gathered

    def _stored_table(self, name: str, values: Array) -> ir.Value:
        """Return the initialiser of a table, which uses of equal values share."""
        key = (name, values.shape, values.tobytes())
        if key not in self._tables:
            owner = self.graph.model.graph
            stored_name = f"{name}.batch"
            number = 1
            while stored_name in owner.initializers:
                number += 1
                stored_name = f"{name}.batch_{number}"
            stored = add_initialiser(owner, stored_name, np.ascontiguousarray(values), MARK_OF_ROWS)
            self._tables[key] = stored
        return self._tables[key]

    def _entry_of_rows(self, e: _RowEmitter, entries: tuple[int, ...]) -> ir.Value:
        """Return the entry of each row's adapter, [batch]."""
        if entries == tuple(range(len(entries))):
            return self.adapters.ids
        if entries not in self._entries:
            checked = self.adapters.ids.producer()
            assert checked is not None
            behind = OnnxEmitter(self.graph, checked, MARK_OF_ROWS, before=False)
            stored = e.stored("entries", np.array(entries, np.int64))
            self._entries[entries] = behind.call("Gather", stored, self.adapters.ids)
        return self._entries[entries]

    def _take_place(self, node: ir.Node, y: ir.Value) -> None:
        """Let everything that read a node's result read y; remove the node."""
        old = node.outputs[0]
        y.shape = old.shape
        y.type = old.type
        for user, slot in list(old.uses()):
            user.replace_input_with(slot, y)
        owner = self.graph.model.graph
        for i, output in enumerate(owner.outputs):
            if output is old:
                name = old.name
                old.name = self.graph.fresh(f"{name}_of_base")
                y.name = name
                owner.outputs[i] = y
        self.states[y] = self.states.get(old, SAME)
        remove_unread(node)


class _RowEmitter(OnnxEmitter):
    """The emitter of the nodes that take the place of one node."""

    def ints(self, *values: int) -> ir.Value:
        """Return a constant of integers."""
        return self._ints(*values)

    def stored(self, what: str, value: Array) -> ir.Value:
        """Return a constant."""
        name = self.owner.fresh(f"{self.mark}_{what}")
        return add_initialiser(self.owner.model.graph, name, value, self.mark)

    def again(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Emit a node's op with other operands."""
        copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()))
        y = self._place(copy)
        copy.name = node.name
        y.type = node.outputs[0].type
        return y

    def op_like(self, op: str, operands: Sequence[ir.Value], x: ir.Value) -> ir.Value:
        """Emit an elementwise op whose result has the dtype of x."""
        y = self.call(op, *operands)
        y.type = x.type
        return y

    def reshaped(self, x: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        """Return x in another shape, of numbers and of values of one or more sizes."""
        parts: list[ir.Value] = []
        for size in sizes:
            parts.append(self._ints(size) if isinstance(size, int) else size)
        shape = self.call("Concat", *parts, axis=0)
        y = self.call("Reshape", x, shape, **keep_zeros(self.owner))
        y.type = x.type
        return y

    def split_rows(self, adapters: RowAdapters, x: ir.Value, *, inner: bool) -> ir.Value:
        """Return [batch · k, …] as [batch, k, …]; [k · batch, …] as [k, batch, …]."""
        tail = self.call("Slice", self.call("Shape", x), self._ints(1), self._ints(1 << 31))
        if inner:
            return self.reshaped(x, adapters.remaining.value, adapters.size, tail)
        return self.reshaped(x, adapters.size, adapters.remaining.value, tail)

    def joined_rows(self, y: ir.Value) -> ir.Value:
        """Return a value with its first two axes as one."""
        sizes = self.call("Shape", y)
        first = self.call("Slice", sizes, self._ints(0), self._ints(2))
        tail = self.call("Slice", sizes, self._ints(2), self._ints(1 << 31))
        both = self.call("ReduceProd", first, keepdims=1)
        return self.reshaped(y, both, tail)

    def sizes_before_last(self, x: ir.Value) -> ir.Value:
        """Return the sizes of x without the last."""
        return self.call("Slice", self.call("Shape", x), self._ints(0), self._ints(-1))


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm is x · W + C, with or without W transposed."""
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)
    return alpha == beta == 1.0 and not node.attributes.get_int("transA", 0)
