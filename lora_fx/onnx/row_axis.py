"""The batch axis of each value, followed through the graph from the inputs.

A walk over the graph takes the batch axis of the inputs through every op that keeps rows apart:

    axis 0, exact   [batch, …]            dimension 0 is the batch
    axis 0, merged  [batch · k, …]        rows were flattened, batch outermost: gpt2, Swin
    axis 0, inner   [k · batch, …]        they were with the batch innermost: MultiheadAttention
    axis k, exact   [.., batch, ..]       behind a Transpose
    axis k, merged  [.., batch · h, ..]   behind one, the batch with the heads
    no axis         the same for every row: tables, masks made from sizes

Where the batch is outermost in memory, any Reshape leaves it so. An op that is not in the table,
or that reads across the batch axis (a sort of rows, a mean over the batch, an expert's Gather),
ends the trail with a reason. The walk is a claim; the export that uses it proves it by running.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_fx.onnx.graph.ops import MS
from lora_fx.onnx.graph.values import bodies_of, made_by, numbers, operand, rank, shape_of


@dataclass(frozen=True)
class RowAxis:
    """The position of the batch rows in a value.

    Attributes:
        axis: The batch axis; None where the value is the same for every row.
        exact: The axis is the batch itself, not the batch times something.
        inner: The axis is something times the batch, which is innermost in memory.
        lost: Why rows cannot be told apart; empty when they can.
    """

    axis: int | None = None
    exact: bool = True
    lost: str = ""
    inner: bool = False


SAME = RowAxis()
States = Mapping[ir.Value, RowAxis]


@dataclass(frozen=True)
class NodeRows:
    """The input of a rule: one node, and the row positions in its operands.

    Attributes:
        node: The node.
        states: Where values have their rows; a value that it lacks is the same for every row.
        result: The number of the output whose rows are asked for.
        batch: The symbol of the batch in shapes.
    """

    node: ir.Node
    states: States
    result: int
    batch: str

    def rows(self, slot: int) -> RowAxis:
        """Return the row position in the operand of a slot."""
        return self.rows_of(operand(self.node, slot))

    def rows_of(self, value: ir.Value | None) -> RowAxis:
        """Return the row position in a value; SAME for an omitted operand."""
        return SAME if value is None else self.states.get(value, SAME)

    def rank(self, slot: int) -> int | None:
        """Return the number of dimensions of an operand; None if it is unknown."""
        return rank(self.node.inputs[slot])


Rule = Callable[[NodeRows], RowAxis | None]
"""A function that returns the row position in one result of a node; None if rows may mix."""


def _aligned(operands: Sequence[tuple[RowAxis, int]]) -> RowAxis | None:
    """Return the row position in a result whose operands are aligned at their last axis.

    The batch axes of all operands have one size, so one exact axis makes the others exact.

    Args:
        operands: The rows and the rank of each.

    Returns:
        The rows; None where the operands disagree.
    """
    highest = max(operand_rank for _, operand_rank in operands)
    aligned = set()
    for rows, operand_rank in operands:
        if rows.axis is not None:
            aligned.add(replace(rows, axis=rows.axis + highest - operand_rank))
    axes = {rows.axis for rows in aligned}
    exact = {rows for rows in aligned if rows.exact}
    candidates = exact or aligned
    if len(axes) != 1 or len(candidates) != 1:
        return None
    return candidates.pop()


def _broadcast(op: NodeRows) -> RowAxis | None:
    """The rule for operands aligned at the last axis, whose batch axes must coincide."""
    values = [value for value in op.node.inputs if value is not None]
    operands = []
    for value in values:
        value_rank = rank(value)
        if value_rank is None:
            # A single operand has no other to be aligned with.
            return op.rows_of(value) if len(values) == 1 else None
        operands.append((op.rows_of(value), value_rank))
    return _aligned(operands)


def _keep(op: NodeRows) -> RowAxis | None:
    """The rule for results with the rows of the first operand, if no other operand has rows."""
    for slot in range(1, len(op.node.inputs)):
        if op.rows(slot).axis is not None:
            return None
    return op.rows(0)


def _along(default: int, operand_rows: Rule = _keep) -> Rule:
    """Return the rule of an op along one axis, which must not be the batch.

    LayerNormalization works along that axis and all that follow.

    Args:
        default: The axis where the node names none.
        operand_rows: The rule that tells where the rows of the operands are.
    """

    def rule(op: NodeRows) -> RowAxis | None:
        rows = operand_rows(op)
        if rows is None or rows.axis is None:
            return rows
        # Of an unknown rank, only the last axis is taken to be no batch.
        axis = _from_front(op.node.attributes.get_int("axis", default), op.rank(0))
        if axis < -1 or axis == rows.axis:
            return None
        if "Normalization" in op.node.op_type and 0 <= axis < rows.axis:
            return None
        return rows

    return rule


def _from_front(axis: int, dims: int | None) -> int:
    """Return an axis counted from the front; a negative one is unchanged if the rank is unknown."""
    if axis < 0 and dims is not None:
        return axis + dims
    return axis


UNKNOWN = "None"
"""The text of a size that the model does not give."""


def _reshape(op: NodeRows) -> RowAxis | None:
    """Return the row position after a Reshape.

    The first of these that applies decides:

    1. The batch is outermost in memory: it stays so, on the first axis that is longer than 1.
    2. The axes up to the batch keep their sizes: the rows stay where they are.
    3. Behind one axis of the result lie as many elements as a row has: that axis ends with the
       batch, and has to be no part of k · batch.
    4. The axes before the batch keep their sizes, and the batch is merged with what follows it.

    Elsewhere rows are cut up, or sizes are unknown.
    """
    rows = op.rows(0)
    if rows.axis is None:
        return None
    before = _size_texts(op.node.inputs[0])
    after = _size_texts(_like_result(op.node))
    copied = _copied_axes(op.node)

    if not rows.inner and _are_ones(before or [], rows.axis):
        return _outermost(rows, after or [], copied, op.batch)
    if before is None or after is None:
        return None
    if _keep_sizes(before, after, rows.axis + 1, copied):
        return rows

    if UNKNOWN in before or UNKNOWN in after:
        return None
    row_sizes = _sizes_of_a_row(rows, before, op.batch)
    if row_sizes is None:
        return None
    axis = _axis_before(after, row_sizes)
    if axis is not None:
        return _innermost(after, axis, op.batch)
    return _merged(rows, before, after, op.batch)


def _like_result(reshape: ir.Node) -> ir.Value | None:
    """Return the result of a Reshape, or the value whose shape it is given by a Shape.

    A group norm goes back to the shape that it had before. Files give no sizes for its result.
    """
    shape = made_by(reshape.inputs[1], "Shape")
    if shape is None:
        return reshape.outputs[0]
    is_of_a_part = shape.attributes.get_int("start", 0) != 0 or "end" in shape.attributes
    return reshape.outputs[0] if is_of_a_part else shape.inputs[0]


def _size_texts(value: ir.Value | None) -> list[str] | None:
    """Return the sizes of a value as texts; None if its rank is unknown."""
    sizes = shape_of(value)
    if sizes is None:
        return None
    return [str(size) for size in sizes]


def _copied_axes(node: ir.Node) -> set[int]:
    """Return the axes of a Reshape's result whose sizes are copied from the input."""
    if node.attributes.get_int("allowzero", 0):
        return set()
    sizes = numbers(node, "shape", 1) or []
    return {axis for axis, size in enumerate(sizes) if size == 0}


def _are_ones(sizes: list[str], count: int) -> bool:
    """Whether the first `count` sizes exist and are all 1."""
    return sizes[:count] == ["1"] * count


def _outermost(rows: RowAxis, after: list[str], copied: set[int], batch: str) -> RowAxis:
    """Return the row position after a Reshape, for a batch that is outermost in memory."""
    first = next((axis for axis, size in enumerate(after) if size != "1"), 0)
    copies_batch = rows.exact and first == rows.axis and first in copied
    names_batch = after[first : first + 1] == [batch]
    return RowAxis(first, copies_batch or names_batch)


def _keep_sizes(before: list[str], after: list[str], count: int, copied: set[int]) -> bool:
    """Whether the first `count` axes keep their sizes; two unknown sizes may differ."""
    if len(before) < count or len(after) < count:
        return False
    for axis in range(count):
        stays = before[axis] == after[axis] and before[axis] != UNKNOWN
        if not stays and axis not in copied:
            return False
    return True


def _sizes_of_a_row(rows: RowAxis, before: list[str], batch: str) -> list[str] | None:
    """Return the sizes inside a row in memory; None if the batch has no name."""
    assert rows.axis is not None
    behind = before[rows.axis + 1 :]
    if rows.exact or rows.inner:
        return behind
    factors = before[rows.axis].split("*")
    if batch not in factors:
        return None
    factors.remove(batch)
    return behind + factors


def _axis_before(sizes: list[str], row_sizes: list[str]) -> int | None:
    """Return the last axis, longer than 1, that is followed by as many elements as a row has."""
    row_elements = _elements(row_sizes)
    for axis in reversed(range(len(sizes))):
        if sizes[axis] != "1" and _elements(sizes[axis + 1 :]) == row_elements:
            return axis
    return None


def _innermost(after: list[str], axis: int, batch: str) -> RowAxis | None:
    """Return the rows of an axis that ends with the batch; None if it may split k · batch."""
    if batch not in after[axis].split("*") and not _are_ones(after, axis):
        return None
    exact = after[axis] == batch
    return RowAxis(axis, exact, inner=not exact)


def _merged(rows: RowAxis, before: list[str], after: list[str], batch: str) -> RowAxis | None:
    """Return the rows if the batch axis becomes batch · h, as before attention heads."""
    axis = rows.axis
    assert axis is not None
    if not rows.exact or len(after) <= axis:
        return None
    if batch in after[axis].split("*") and before[:axis] == after[:axis]:
        return RowAxis(axis, exact=False)
    return None


def _elements(sizes: Sequence[str]) -> tuple[int, list[str]]:
    """Return the product of sizes: the number, and the symbols."""
    product = 1
    symbols = []
    for size in sizes:
        for factor in size.split("*"):
            if factor.isdecimal():
                product *= int(factor)
            else:
                symbols.append(factor)
    return product, sorted(symbols)


def _transpose(op: NodeRows) -> RowAxis | None:
    rows = op.rows(0)
    dims = op.rank(0)
    perm = op.node.attributes.get("perm")
    if rows.axis is None:
        return None
    if perm is not None:
        order = list(perm.as_ints())
    elif dims is not None:
        order = list(reversed(range(dims)))
    else:
        return None
    return _moved(op.node.inputs[0], rows, order.index(rows.axis), op.batch)


def _moved(value: ir.Value | None, rows: RowAxis, axis: int, batch: str) -> RowAxis | None:
    """Return the rows at another axis; None if only their position in memory is known."""
    if not rows.exact and axis != rows.axis:
        sizes = shape_of(value) or ()
        named = [number for number, size in enumerate(sizes) if batch in str(size).split("*")]
        if rows.axis not in named:
            return None
    return replace(rows, axis=axis)


def _unsqueeze(op: NodeRows) -> RowAxis | None:
    rows = op.rows(0)
    dims = op.rank(0)
    axes = numbers(op.node, "axes", 1)
    if rows.axis is None or dims is None or axes is None:
        return None
    total = dims + len(axes)
    inserted = {axis % total for axis in axes}
    input_axes = [axis for axis in range(total) if axis not in inserted]
    return replace(rows, axis=input_axes[rows.axis])


def _reduce(op: NodeRows) -> RowAxis | None:
    """The rule for reduced or removed axes: the batch must not be one of them."""
    rows = op.rows(0)
    dims = op.rank(0)
    if op.node.op_type in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [op.node.attributes.get_int("axis", 0)]
    else:
        axes = numbers(op.node, "axes", 1)
    if rows.axis is None or dims is None or not axes:
        return None
    reduced = {axis % dims for axis in axes}
    if rows.axis in reduced:
        return None
    keeps_axes = op.node.attributes.get_int("keepdims", 1) != 0
    if keeps_axes and op.node.op_type != "Squeeze":
        return rows
    removed_before = sum(axis < rows.axis for axis in reduced)
    return replace(rows, axis=rows.axis - removed_before)


def _beside(name: str, slot: int) -> Rule:
    """Return the rule of an op along named axes: rows stay if the batch is not one of them.

    Args:
        name: The attribute that holds the axes.
        slot: The operand that holds them in later opsets.
    """

    def rule(op: NodeRows) -> RowAxis | None:
        rows = op.rows(0)
        dims = op.rank(0)
        axes = numbers(op.node, name, slot)
        if axes is None or dims is None:
            return None
        if rows.axis in {axis % dims for axis in axes}:
            return None
        return rows

    return rule


def _gather(op: NodeRows) -> RowAxis | None:
    """The rule for Gather: [*data[:axis], *ids, *data[axis + 1:]], with rows in data or ids."""
    data = op.rows(0)
    ids = op.rows(1)
    data_rank = op.rank(0)
    ids_rank = op.rank(1)
    if data_rank is None or ids_rank is None:
        return None
    if data.axis is not None and ids.axis is not None:
        return None
    axis = op.node.attributes.get_int("axis", 0) % data_rank
    if ids.axis is not None:
        if axis > 0 and not ids.exact:
            return None
        return replace(ids, axis=ids.axis + axis)
    if data.axis is None or axis == data.axis:
        return None
    if axis > data.axis:
        return data
    return replace(data, axis=data.axis + ids_rank - 1)


def _gather_nd(op: NodeRows) -> RowAxis | None:
    """The rule for GatherND: leading axes, or (row number, position) as in transformers' masks."""
    data = op.rows(0)
    ids = op.rows(1)
    data_value, ids_value = op.node.inputs
    picks = ids_value.shape if ids_value is not None else None
    if data.axis is None or picks is None or op.node.attributes.get_int("batch_dims", 0) != 0:
        return None
    depth = picks[-1]
    if ids.axis is None and isinstance(depth, int) and depth <= data.axis:
        return replace(data, axis=data.axis + len(picks) - 1 - depth)

    # (row number, position): the result has as many rows as the data
    if data.axis or ids.axis or data.inner:
        return None
    sizes = _size_texts(data_value)
    result_sizes = _size_texts(op.node.outputs[0])
    if not sizes or not result_sizes:
        return None
    row_count = _elements(sizes[:1])
    _, symbols = row_count
    if _elements(result_sizes[:1]) != row_count or op.batch not in symbols:
        return None
    return data


def _expand(op: NodeRows) -> RowAxis | None:
    """The rule for Expand: axes are added in front, or made longer."""
    rows = op.rows(0)
    dims = op.rank(0)
    expanded_dims = _expanded_rank(op.node)
    if rows.axis is None or dims is None or expanded_dims is None:
        return None
    in_front = max(expanded_dims - dims, 0)
    if in_front and rows.inner:
        return None  # [k · batch, …] is only known where it is the first axis
    return replace(rows, axis=rows.axis + in_front)


def _expanded_rank(node: ir.Node) -> int | None:
    """Return the rank of an Expand's result: its declared rank, or the target's length."""
    dims = rank(node.outputs[0])
    if dims is not None:
        return dims
    target_shape = node.inputs[1]
    if target_shape is None or target_shape.shape is None:
        return None
    length = target_shape.shape[0]
    return length if isinstance(length, int) else None


def _matmul(op: NodeRows) -> RowAxis | None:
    """The rule for MatMul: operands align as in _broadcast; the summed axis is not the batch."""
    first = op.rows(0)
    second = op.rows(1)
    first_rank = op.rank(0)
    second_rank = op.rank(1)
    if first_rank is None or second_rank is None or min(first_rank, second_rank) < 2:
        return None
    if first.axis == first_rank - 1 or second.axis == second_rank - 2:
        return None
    return _aligned([(first, first_rank), (second, second_rank)])


def _front(keeps: Callable[[NodeRows], bool]) -> Rule:
    """Return the rule of an op that keeps rows in front, if `keeps` is true for the node."""

    def rule(op: NodeRows) -> RowAxis | None:
        rows = _keep(op)
        if rows is None or rows.axis != 0 or not keeps(op):
            return None
        return rows

    return rule


def _quantised(op: NodeRows) -> RowAxis | None:
    """The rule for quantisers: codes keep the rows, but one dynamic scale mixes all rows."""
    return _keep(op) if op.result == 0 else SAME


def _einsum(op: NodeRows) -> RowAxis | None:
    """The rule for Einsum: the batch has one letter in all operands with rows and the result."""
    equation = op.node.attributes["equation"].as_string().replace(" ", "")
    terms, arrow, result_term = equation.partition("->")
    if not arrow or "." in equation:
        return None
    values = [value for value in op.node.inputs if value is not None]
    named = []
    for term, value in zip(terms.split(","), values, strict=False):
        rows = op.rows_of(value)
        if rows.axis is not None:
            named.append((term[rows.axis], value, rows))
    forms = {(letter, rows.exact, rows.inner) for letter, _, rows in named}
    letter, value, rows = named[0]
    if len(forms) != 1 or letter not in result_term:
        return None
    return _moved(value, rows, result_term.index(letter), op.batch)


def _pad(op: NodeRows) -> RowAxis | None:
    """The rule for Pad: rows stay if nothing is added before or after them."""
    rows = _keep(op)
    pads = numbers(op.node, "pads", 1)
    dims = op.rank(0)
    axes: Sequence[int] | None = range(dims or 0)
    if operand(op.node, 3) is not None:
        axes = numbers(op.node, "axes", 3)
    if rows is None or rows.axis is None or not pads or dims is None or axes is None:
        return None
    padded = set()
    for axis, before, after in zip(axes, pads, pads[len(axes) :], strict=False):
        if before or after:
            padded.add(axis % dims)
    if rows.axis in padded:
        return None
    return rows


def _recurrent(op: NodeRows) -> RowAxis | None:
    """The rule for recurrent ops: X [length, batch, in], states [directions, batch, hidden].

    Y is [length, directions, batch, hidden], and [batch, length, directions, hidden] in layout 1.
    """
    layout = op.node.attributes.get_int("layout", 0)
    batch_axis = 0 if layout == 1 else 1
    rows = op.rows(0)
    if rows.axis != batch_axis or rows.inner:
        return None
    axes = {4: 0, 5: batch_axis, 6: batch_axis}  # of the rows' lengths, and of the first states
    for slot, axis in axes.items():
        if op.rows(slot).axis not in (None, axis):
            return None
    if layout == 1 or op.result > 0:
        return rows
    return replace(rows, axis=2)


def _reverse_sequence(op: NodeRows) -> RowAxis | None:
    """The rule for ReverseSequence: each row is reversed along time, up to the row's length."""
    rows = op.rows(0)
    lengths = op.rows(1)
    batch_axis = op.node.attributes.get_int("batch_axis", 1)
    time_axis = op.node.attributes.get_int("time_axis", 0)
    if lengths.axis is not None and rows.axis != batch_axis:
        return None
    if rows.axis == time_axis:
        return None
    return rows


def _tile(op: NodeRows) -> RowAxis | None:
    """The rule for Tile: rows stay if their axis is repeated once."""
    rows = _keep(op)
    repeats = numbers(op.node, "repeats", 1)
    if rows is None or rows.axis is None:
        return rows
    if not repeats or rows.axis >= len(repeats) or repeats[rows.axis] != 1:
        return None
    return rows


def _split_to_sequence(op: NodeRows) -> RowAxis | None:
    """The rule for SplitToSequence: the rows of every tensor in the sequence."""
    rows = _keep(op)
    dims = op.rank(0)
    if rows is None or rows.axis is None or dims is None:
        return None
    axis = op.node.attributes.get_int("axis", 0) % dims
    if axis == rows.axis:
        return None
    by_ones = operand(op.node, 1) is None
    drops_axis = by_ones and not op.node.attributes.get_int("keepdims", 1)
    if drops_axis and axis < rows.axis:
        return replace(rows, axis=rows.axis - 1)
    return rows


def _of_sequence(op: NodeRows) -> RowAxis | None:
    """The rule for sequence ops: rows of the sequence and of an inserted value must agree."""
    # The last operand of these is a position.
    tensors = {"SequenceAt": 1, "SequenceErase": 1, "SequenceInsert": 2}.get(op.node.op_type)
    states = {op.rows_of(value) for value in op.node.inputs[:tensors]} - {SAME}
    if len(states) != 1:
        return None
    return states.pop()


def _concat_from_sequence(op: NodeRows) -> RowAxis | None:
    rows = op.rows(0)
    axis = _from_front(op.node.attributes["axis"].as_int(), rank(op.node.outputs[0]))
    if rows.axis is None or axis < 0:
        return None
    if op.node.attributes.get_int("new_axis", 0):
        return replace(rows, axis=rows.axis + (axis <= rows.axis))
    if axis == rows.axis:
        return None
    return rows


def _is_first_result(op: NodeRows) -> bool:
    return op.result == 0


def _flattens_behind_rows(op: NodeRows) -> bool:
    return op.node.attributes.get_int("axis", 1) == 1


def _is_untransposed(op: NodeRows) -> bool:
    return not op.node.attributes.get_int("transA", 0)


_ELEMENTWISE = """Abs Acos Add And Asin Atan BitShift BitwiseAnd BitwiseNot BitwiseOr Cast CastLike
Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid
HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or
Pow PRelu Reciprocal Relu Round Selu Sigmoid Shrink Sign Sin Sinh Softplus Softsign Sqrt Sub Sum
Swish Tan Tanh ThresholdedRelu Where Xor"""
_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare ArgMax ArgMin Squeeze"""
_WINDOWS = """AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool
GlobalMaxPool GroupNormalization InstanceNormalization LpPool LRN MaxPool Resize SpaceToDepth
ConvInteger QAttention"""
_LAST_AXIS = """Softmax LogSoftmax Hardmax LayerNormalization RMSNormalization TopK
MatMulNBits MatMulBnb4 MatMulInteger DynamicQuantizeMatMul MatMulIntegerToFloat"""

_OPS: Sequence[tuple[Rule, str]] = (
    (_broadcast, _ELEMENTWISE),
    (_reduce, _REDUCE),
    (_front(_is_first_result), _WINDOWS),
    (_front(_flattens_behind_rows), "Flatten"),
    (_front(_is_untransposed), "Gemm"),
    (_along(-1), _LAST_AXIS),
    (_along(0), "Split"),
    (_along(0, _broadcast), "Concat GatherElements ScatterElements"),
    (_beside("axis", 1), "CumSum"),
    (_beside("axes", 3), "Slice"),
    (_quantised, "QuantizeLinear DequantizeLinear DynamicQuantizeLinear"),
    (_gather, "Gather GatherBlockQuantized"),
    (_gather_nd, "GatherND"),
    (_recurrent, "GRU LSTM RNN DynamicQuantizeLSTM"),
    (_of_sequence, "SequenceAt SequenceConstruct SequenceErase SequenceInsert"),
    (_split_to_sequence, "SplitToSequence"),
    (_concat_from_sequence, "ConcatFromSequence"),
    (_reverse_sequence, "ReverseSequence"),
    (_tile, "Tile"),
    (_einsum, "Einsum"),
    (_expand, "Expand"),
    (_matmul, "MatMul"),
    (_pad, "Pad"),
    (_reshape, "Reshape"),
    (_transpose, "Transpose"),
    (_unsqueeze, "Unsqueeze"),
)
RULES: dict[str, Rule] = {}
for _rule, _names in _OPS:
    RULES.update(dict.fromkeys(_names.split(), _rule))


def provenance(
    model: ir.Model,
    batch: str,
    read: Collection[ir.Value] = (),
    changed: Collection[ir.Value] | None = None,
) -> dict[ir.Value, RowAxis]:
    """Return the row position in every value of the main graph.

    Args:
        model: The model.
        batch: The symbol of the inputs' dimension 0.
        read: What branches will read. Equal rows, such as the zeros that a recurrent layer begins
            with, are rows from there on.
        changed: What branches will change. Rows are lost where an op mixes these, and not where it
            mixes what no branch changes.
    """
    states = {value: _input_rows(value, batch) for value in model.graph.inputs}
    reached = set(changed or ())
    for node in model.graph:
        if node.op_type in ("Shape", "Size", "SequenceLength", "SequenceEmpty"):
            states |= dict.fromkeys(node.outputs, SAME)
            continue
        changes = changed is None or any(value in reached for value in _operands(node))
        for result, value in enumerate(node.outputs):
            rows = _result_rows(node, states, result, batch, read)
            if changes:
                reached.add(value)
            elif rows.lost and value not in reached:
                rows = SAME
            states[value] = rows
    return states


def _input_rows(value: ir.Value, batch: str) -> RowAxis:
    """Return the row position of an input: axis 0 if its symbol is the batch's."""
    if value.shape and str(value.shape[0]) == batch:
        return RowAxis(0)
    return SAME


def _operands(node: ir.Node) -> Iterator[ir.Value | None]:
    """Yield the values that an op reads, also in its bodies."""
    yield from node.inputs
    for body in bodies_of(node):
        for inner in body.all_nodes():
            yield from inner.inputs


def _result_rows(
    node: ir.Node, states: States, result: int, batch: str, read: Collection[ir.Value]
) -> RowAxis:
    """Return the row position in a result of a node, from the positions in its operands."""
    operands = [states.get(value, SAME) for value in node.inputs if value is not None]
    for rows in operands:
        if rows.lost:
            return RowAxis(lost=rows.lost)
    if bodies_of(node) or any(rows.axis is not None for rows in operands):
        return _after(node, states, result, batch)
    value = node.outputs[result]
    if value not in read:
        return SAME
    sizes = _size_texts(value) or []
    return RowAxis(sizes.index(batch)) if batch in sizes else SAME


def _after(node: ir.Node, states: States, result: int, batch: str) -> RowAxis:
    """Return the result's rows by the op's rule; lost if there is none or rows may mix."""
    rows = None
    if node.domain in ("", MS) and node.op_type in RULES:
        rows = RULES[node.op_type](NodeRows(node, states, result, batch))
    if rows is None:
        name = node.outputs[0].name
        return RowAxis(lost=f"{node.op_type} {name!r} may mix the rows of the batch")
    return rows
