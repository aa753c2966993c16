"""Row provenance: which axis of each value holds the rows of a batch, in the inputs' order.

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

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_fx.onnx.graph.ops import MS
from lora_fx.onnx.graph.values import bodies_of, numbers, operand, rank


@dataclass(frozen=True)
class RowAxis:
    """Where a value has its batch rows.

    Attributes:
        axis: The batch axis; None where the value is the same for every row.
        exact: The axis is the batch itself, not the batch times something.
        inner: It is something times the batch, which is innermost in it.
        lost: Why rows cannot be told apart; empty when they can.
    """

    axis: int | None = None
    exact: bool = True
    lost: str = ""
    inner: bool = False


SAME = RowAxis()
States = Mapping[ir.Value, RowAxis]
Rule = Callable[[ir.Node, States, int, str], RowAxis | None]


def _state(node: ir.Node, states: States, slot: int) -> RowAxis:
    value = operand(node, slot)
    return SAME if value is None else states.get(value, SAME)


def _meet(operands: Sequence[tuple[RowAxis, int]]) -> RowAxis | None:
    """Where the result has its rows, by the rows and ranks of operands aligned at their last axis.

    None where they disagree. Their batch axes have one size, so one that is exact makes the others
    exact.
    """
    top = max(r for _, r in operands)
    met = {replace(s, axis=s.axis + top - r) for s, r in operands if s.axis is not None}
    exact = {s for s in met if s.exact} or met
    return exact.pop() if len({s.axis for s in met}) == len(exact) == 1 else None


def _broadcast(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """Operands are aligned at their last axis, and their batch axes have to meet."""
    values = [v for v in node.inputs if v is not None]
    known = [(states.get(v, SAME), r) for v in values if (r := rank(v)) is not None]
    if len(known) < len(values):
        return states.get(values[0], SAME) if len(values) == 1 else None
    return _meet(known)


def _keep(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """The rows are those of the first operand, where no other operand has any."""
    others = (_state(node, states, k) for k in range(1, len(node.inputs)))
    return None if any(s.axis is not None for s in others) else _state(node, states, 0)


def _along(default: int, rows: Rule = _keep) -> Rule:
    """The rule of an op along one axis, which must not be the batch.

    LayerNormalization works along that axis and all that follow.

    Args:
        default: The axis where the node names none.
        rows: Tells where the rows of the operands are.
    """

    def rule(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
        state, r = rows(node, states, i, batch), rank(node.inputs[0])
        if state is None or state.axis is None:
            return state
        axis = node.attributes.get_int("axis", default)
        axis = axis + r if axis < 0 and r is not None else axis
        if axis < -1 or axis == state.axis:
            return None
        inside = "Normalization" in node.op_type and 0 <= axis < state.axis
        return None if inside else state

    return rule


def _reshape(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    state = _state(node, states, 0)
    before, shape = node.inputs[0].shape if node.inputs[0] else None, node.outputs[0].shape
    sizes = numbers(node, "shape", 1) or [] if node.op_type == "Reshape" else []
    copied = {
        j for j, n in enumerate(sizes) if n == 0 and not node.attributes.get_int("allowzero", 0)
    }
    old, new = ([str(d) for d in dims or ()] for dims in (before, shape))
    k = state.axis
    if k is not None and not state.inner and old[:k] == ["1"] * k:  # outermost in memory
        first = next((j for j, d in enumerate(new) if d != "1"), 0)
        kept = state.exact and first == k and k in copied
        return RowAxis(first, kept or new[first : first + 1] == [batch])
    if before is None or shape is None or k is None:
        return None
    both = list(zip(old, new, strict=False))[: k + 1]  # two unknown sizes may differ
    if len(both) == k + 1 and all(a == b != "None" or j in copied for j, (a, b) in enumerate(both)):
        return state
    if "None" in old + new:
        return None
    inside = old[k + 1 :]  # of a row, in memory
    if not (state.exact or state.inner):
        factors = old[k].split("*")
        if batch not in factors:
            return None
        factors.remove(batch)
        inside += factors
    for j in reversed(range(len(new))):
        if new[j] != "1" and _elements(new[j + 1 :]) == _elements(inside):
            whole = (
                batch in new[j].split("*") or new[:j] == ["1"] * j
            )  # and not a part of k · batch
            return RowAxis(j, new[j] == batch, inner=new[j] != batch) if whole else None
    heads = len(new) > k and batch in new[k].split("*") and old[:k] == new[:k]
    return RowAxis(k, exact=False) if heads and state.exact else None


def _elements(sizes: Sequence[str]) -> tuple[int, list[str]]:
    """The product of sizes: of the numbers among their factors, and the symbols."""
    factors = [f for s in sizes for f in s.split("*")]
    symbols = sorted(f for f in factors if not f.isdecimal())
    return math.prod(int(f) for f in factors if f.isdecimal()), symbols


def _transpose(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    state, r = _state(node, states, 0), rank(node.inputs[0])
    perm = node.attributes.get("perm")
    if state.axis is None or (perm is None and r is None):
        return None
    order = list(perm.as_ints()) if perm is not None else list(range(r or 0))[::-1]
    return _moved(node.inputs[0], state, order.index(state.axis), batch)


def _moved(value: ir.Value | None, state: RowAxis, axis: int, batch: str) -> RowAxis | None:
    """The rows at another axis; None where only their place in memory is known, not their axis."""
    sizes = value.shape if value is not None and value.shape is not None else ()
    named = [k for k, n in enumerate(sizes) if batch in str(n).split("*")]
    known = state.exact or axis == state.axis or state.axis in named
    return replace(state, axis=axis) if known else None


def _unsqueeze(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    state, r, axes = _state(node, states, 0), rank(node.inputs[0]), numbers(node, "axes", 1)
    if state.axis is None or r is None or axes is None:
        return None
    total = r + len(axes)
    new = {a % total for a in axes}
    rest = [k for k in range(total) if k not in new]
    return replace(state, axis=rest[state.axis])


def _reduce(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    state, r = _state(node, states, 0), rank(node.inputs[0])
    single = node.op_type in ("ArgMax", "ArgMin")
    axes = [node.attributes.get_int("axis", 0)] if single else numbers(node, "axes", 1)
    if state.axis is None or r is None or not axes:
        return None
    gone = {a % r for a in axes}
    if state.axis in gone:
        return None
    kept = node.op_type != "Squeeze" and node.attributes.get_int("keepdims", 1) != 0
    return state if kept else replace(state, axis=state.axis - sum(a < state.axis for a in gone))


def _beside(name: str, slot: int) -> Rule:
    """The rule of an op along axes that it names: rows stay where none of them is the batch."""

    def rule(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
        state, r, axes = _state(node, states, 0), rank(node.inputs[0]), numbers(node, name, slot)
        return None if axes is None or r is None or state.axis in {a % r for a in axes} else state

    return rule


def _gather(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    data, ids = _state(node, states, 0), _state(node, states, 1)
    r, n = rank(node.inputs[0]), rank(node.inputs[1])
    if r is None or n is None or (data.axis is not None and ids.axis is not None):
        return None
    axis = node.attributes.get_int("axis", 0) % r
    if ids.axis is not None:
        return replace(ids, axis=ids.axis + axis) if axis == 0 or ids.exact else None
    if data.axis is None or axis == data.axis:
        return None
    return replace(data, axis=data.axis + (n - 1 if axis < data.axis else 0))


def _gather_nd(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """Entries of leading axes, or picked by (row number, position), as transformers' masks are."""
    data, ids = _state(node, states, 0), _state(node, states, 1)
    y, x = node.outputs[0], node.inputs[0]
    picks = node.inputs[1].shape if node.inputs[1] else None
    if data.axis is None or picks is None or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    depth = picks[-1]
    if ids.axis is None and isinstance(depth, int) and depth <= data.axis:
        return replace(data, axis=data.axis + len(picks) - 1 - depth)
    if data.axis or ids.axis or data.inner or x is None or not x.shape or not y.shape:
        return None
    now, was = _elements([str(y.shape[0])]), _elements([str(x.shape[0])])
    return data if now == was and batch in was[1] else None


def _expand(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    state, r, after = _state(node, states, 0), rank(node.inputs[0]), rank(node.outputs[0])
    if after is None and node.inputs[1] is not None and node.inputs[1].shape is not None:
        size = node.inputs[1].shape[0]
        after = size if isinstance(size, int) else None
    if state.axis is None or r is None or after is None:
        return None
    axis = state.axis + max(after - r, 0)
    return replace(state, axis=axis) if axis == state.axis or state.exact else None


def _matmul(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    a, b = _state(node, states, 0), _state(node, states, 1)
    ra, rb = rank(node.inputs[0]), rank(node.inputs[1])
    if ra is None or rb is None or ra < 2 or rb < 2:
        return None
    summed = a.axis == ra - 1 or b.axis == rb - 2
    return None if summed else _meet([(a, ra), (b, rb)])


def _front(holds: Callable[[ir.Node, int], bool]) -> Rule:
    """The rule of an op that leaves rows in front, where this holds of it and of a result."""

    def rule(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
        state = _keep(node, states, i, batch)
        return state if state is not None and state.axis == 0 and holds(node, i) else None

    return rule


def _quantised(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """Codes lie as what they are made of; DynamicQuantizeLinear's scale is one for all rows."""
    return _keep(node, states, i, batch) if i == 0 else SAME


def _einsum(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, y = equation.partition("->")
    if not arrow or "." in equation:
        return None
    operands = [(v, states.get(v, SAME)) for v in node.inputs if v is not None]
    terms = zip(left.split(","), operands, strict=False)
    named = [(term[s.axis], v, s) for term, (v, s) in terms if s.axis is not None]
    letters = {(letter, s.exact, s.inner) for letter, _, s in named}
    letter, value, state = named[0]
    if len(letters) != 1 or letter not in y:
        return None
    return _moved(value, state, y.index(letter), batch)


def _pad(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """The rows are those of the data, where nothing is put before or after them."""
    state, pads, r = _keep(node, states, i, batch), numbers(node, "pads", 1), rank(node.inputs[0])
    axes = numbers(node, "axes", 3) if operand(node, 3) is not None else range(r or 0)
    if state is None or state.axis is None or not pads or r is None or axes is None:
        return None
    ends = zip(axes, pads, pads[len(axes) :], strict=False)
    return None if state.axis in {a % r for a, lo, hi in ends if lo or hi} else state


def _recurrent(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """X [length, batch, in] and states [directions, batch, hidden]; batch first in layout 1.

    Y is [length, directions, batch, hidden], and [batch, length, directions, hidden] in layout 1.
    """
    first = node.attributes.get_int("layout", 0) == 1
    beside = {4: 0, 5: 0 if first else 1, 6: 0 if first else 1}  # lengths, first states
    states_beside = [(_state(node, states, slot).axis, axis) for slot, axis in beside.items()]
    state = _state(node, states, 0)
    apart = state.axis == (0 if first else 1) and not state.inner
    if not apart or any(found not in (None, axis) for found, axis in states_beside):
        return None
    if first:
        return state
    return replace(state, axis=2 if i == 0 else 1)


def _reverse_sequence(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """Entries of every row are reversed along the time axis, up to the length of the row."""
    state, lengths = _state(node, states, 0), _state(node, states, 1)
    rows, time = node.attributes.get_int("batch_axis", 1), node.attributes.get_int("time_axis", 0)
    if lengths.axis is not None and state.axis != rows:
        return None
    return None if state.axis == time else state


def _tile(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """Rows stay where they are repeated once."""
    state, times = _keep(node, states, i, batch), numbers(node, "repeats", 1)
    if state is None or state.axis is None:
        return state
    return state if times and state.axis < len(times) and times[state.axis] == 1 else None


def _split_to_sequence(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """Of every tensor of the sequence, where it has its rows."""
    state, r = _keep(node, states, i, batch), rank(node.inputs[0])
    if state is None or state.axis is None or r is None:
        return None
    axis = node.attributes.get_int("axis", 0) % r
    if axis == state.axis:
        return None
    gone = operand(node, 1) is None and not node.attributes.get_int("keepdims", 1)
    return replace(state, axis=state.axis - 1) if gone and axis < state.axis else state


def _of_sequence(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    """The rows of the sequence and of what is put into it, which have to agree."""
    last = {"SequenceAt": 1, "SequenceErase": 1, "SequenceInsert": 2}.get(node.op_type)
    met = {states.get(v, SAME) for v in node.inputs[:last] if v is not None} - {SAME}
    return met.pop() if len(met) == 1 else None


def _concat_from_sequence(node: ir.Node, states: States, i: int, batch: str) -> RowAxis | None:
    state, axis = _state(node, states, 0), node.attributes["axis"].as_int()
    new = node.attributes.get_int("new_axis", 0)
    r = rank(node.outputs[0])
    axis = axis + r if axis < 0 and r is not None else axis
    if state.axis is None or axis < 0:
        return None
    if new:
        return replace(state, axis=state.axis + (axis <= state.axis))
    return None if axis == state.axis else state


_ELEMENTWISE = """Abs Acos Add And Asin Atan BitShift BitwiseAnd BitwiseNot BitwiseOr Cast CastLike
Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid
HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or
Pow PRelu Reciprocal Relu Round Selu Sigmoid Shrink Sign Sin Sinh Softplus Softsign Sqrt Sub Sum
Swish Tan Tanh ThresholdedRelu Where Xor"""
_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
_WINDOWS = """AveragePool BatchNormalization Conv ConvTranspose DepthToSpace GlobalAveragePool
GlobalMaxPool GroupNormalization InstanceNormalization LpPool LRN MaxPool Resize SpaceToDepth"""

_OF_CODES = "MatMulNBits MatMulBnb4 MatMulInteger DynamicQuantizeMatMul MatMulIntegerToFloat"
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _broadcast),
    **{f"Reduce{n}": _reduce for n in _REDUCE.split()},
    **dict.fromkeys(("ArgMax", "ArgMin", "Squeeze"), _reduce),
    **dict.fromkeys(
        (*_WINDOWS.split(), "ConvInteger", "QAttention"), _front(lambda node, i: i == 0)
    ),
    **dict.fromkeys(
        ("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization", "TopK"),
        _along(-1),
    ),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), _quantised),
    **dict.fromkeys(_OF_CODES.split(), _along(-1)),
    "GatherBlockQuantized": _gather,
    **dict.fromkeys(("Concat", "GatherElements", "ScatterElements"), _along(0, _broadcast)),
    **dict.fromkeys(("GRU", "LSTM", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    **dict.fromkeys(
        ("SequenceAt", "SequenceConstruct", "SequenceErase", "SequenceInsert"), _of_sequence
    ),
    "SplitToSequence": _split_to_sequence,
    "ConcatFromSequence": _concat_from_sequence,
    "ReverseSequence": _reverse_sequence,
    "Tile": _tile,
    "CumSum": _beside("axis", 1),
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _front(lambda node, i: node.attributes.get_int("axis", 1) == 1),
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": _front(lambda node, i: not node.attributes.get_int("transA", 0)),
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _beside("axes", 3),
    "Split": _along(0),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def provenance(
    model: ir.Model,
    batch: str,
    read: Collection[ir.Value] = (),
    changed: Collection[ir.Value] | None = None,
) -> dict[ir.Value, RowAxis]:
    """Where every value of the main graph has its rows.

    Args:
        model: The model.
        batch: The symbol of the inputs' dimension 0.
        read: What branches will read. Equal rows, such as the zeros that a recurrent layer begins
            with, are rows from there on.
        changed: What branches will change. Rows are lost where an op mixes these, and not where it
            mixes what no branch changes.
    """
    states: dict[ir.Value, RowAxis] = {}
    reached = set(changed or ())
    for value in model.graph.inputs:
        first = str(value.shape[0]) if value.shape else ""
        states[value] = RowAxis(0) if first == batch else SAME
    for node in model.graph:
        ins = [states.get(v, SAME) for v in node.inputs if v is not None]
        lost = next((s.lost for s in ins if s.lost), "")
        changes = changed is None or any(v in reached for v in _operands(node))
        for i, out in enumerate(node.outputs):
            if node.op_type in ("Shape", "Size", "SequenceLength", "SequenceEmpty"):
                states[out] = SAME
                continue
            if lost:
                states[out] = RowAxis(lost=lost)
            elif bodies_of(node) or any(s.axis is not None for s in ins):
                states[out] = _after(node, states, i, batch)
            else:
                sizes = [str(d) for d in out.shape or ()] if out in read else []
                states[out] = RowAxis(sizes.index(batch)) if batch in sizes else SAME
            if changes:
                reached.add(out)
            elif states[out].lost and out not in reached:
                states[out] = SAME
    return states


def _operands(node: ir.Node) -> Iterator[ir.Value | None]:
    """What an op reads, in its bodies too."""
    yield from node.inputs
    for body in bodies_of(node):
        for inner in body.all_nodes():
            yield from inner.inputs


def _after(node: ir.Node, states: States, i: int, batch: str) -> RowAxis:
    rule = RULES.get(node.op_type) if node.domain in ("", MS) else None
    found = None if rule is None else rule(node, states, i, batch)
    if found is None:
        why = f"{node.op_type} {node.outputs[0].name!r} may mix the rows of the batch"
        return RowAxis(lost=why)
    return found
