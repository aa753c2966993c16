"""The op table of ONNX: which ops multiply by a weight.

A row says where an op's weight and activation operands are and what Kind their shapes make.
Adding an op is one row here and one row in tests/onnx/graph/table.py. Ops of `com.microsoft` are
those that ONNX Runtime's own optimizers write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_fx.ir import convolution, einsum, kinds
from lora_fx.ir.einsum import VECTOR, Einsum, Shape, contraction, letters, product
from lora_fx.ir.graph import Axes, Kind
from lora_fx.ir.kinds import WeightForm
from lora_fx.onnx.graph.coded_weights import NO_PLACE, Codes, check_blocks, check_scales

MS = "com.microsoft"
"""The domain of the ops of ONNX Runtime's own."""
INTEGERS = (
    "the weight is quantised, and {} gives codes as its product: there is no float to add a "
    "branch to"
)


@dataclass(frozen=True)
class OnnxOperand:
    """One weight operand of one node.

    Attributes:
        weight: Slot of the weight among the node's operands.
        x: Slot of the activation.
        kind: The Kind of contraction that their shapes make.
        refusal: Why the operand cannot be adapted; empty where it can.
        allowed: True when the refusal is only a default that `include` overrides.
        gain: The factor by which the op multiplies its product.
        stored: Shape of the weight as a matrix, where its stored shape is that of packed codes.
        codes: What the integers are that the op itself takes; their bits are 0 where the tensor's
            dtype tells.
    """

    weight: int
    x: int
    kind: Kind
    refusal: str = ""
    allowed: bool = False
    gain: float = 1.0
    stored: tuple[int, ...] = ()
    codes: Codes | None = None


Shapes = Callable[[int], Shape | None]
"""Gives the shape of the operand in a slot; None where it is unknown."""
Uses = Callable[[ir.Node, Shapes], Iterator[OnnxOperand]]
"""Gives every way in which a node may read a weight."""


@dataclass(frozen=True)
class OnnxOp:
    """One row of the op table.

    Attributes:
        op: The public name of the op, that of the selector `op:NAME`.
        uses: A function from a node to every way in which it may read a weight.
        bias: Slot of the operand that is added to the product.
        many: True when several operands of one node may be weights of their own.
        twin: The op of ONNX that does in floats what this one does with codes of the weight.
        integer: True when x is codes too, made by DynamicQuantizeLinear.
    """

    op: str
    uses: Uses
    bias: int | None = None
    many: bool = False
    twin: str = ""
    integer: bool = False


LINEAR_IN_OUT = WeightForm("linear", Axes((), (1,), (0,)))
"""W + ΔW of a matrix [in, out]."""
LINEAR_OUT_IN = WeightForm("linear", Axes((), (0,), (1,)))
"""W + ΔW of a matrix [out, in]."""
ANY_RANK = (0,) * 9
"""The shape in place of an unknown one: it has more dimensions than any weight."""


def _matmul(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A product of two matrices, or stacks of them, of which either may be the weight."""
    first = shape(0)
    second = shape(1)
    if second is not None:
        x = ANY_RANK if first is None else first
        kind, why = product(x, second, left=False)
        yield OnnxOperand(1, 0, kind, why)
    if first is not None:
        x = ANY_RANK if second is None else second
        kind, why = product(x, first, left=True)
        if second is None and len(first) == 2:  # x is a vector, maybe, for which see matmul_left
            kind = LINEAR_OUT_IN
        yield OnnxOperand(0, 1, kind, why)


LEFT_TURNED = Einsum("...in", "io", "...on", "left")
"""The kind wᵀ [out, in] @ x [..., in, n], with w stored [in, out]."""


def _turned(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A product of two matrices of which each may be read transposed."""
    number = node.attributes.get_int
    gain = node.attributes.get_float("alpha", 1.0)
    is_turned = [bool(number("transA", 0)), bool(number("transB", 0))]
    if number("transBatchA", 0) or number("transBatchB", 0):  # of FusedMatMul
        is_turned = [True, True]

    for slot in (1, 0):
        w = shape(slot)
        if w is None:
            continue
        x_slot = 1 - slot
        if len(w) != 2:
            why = VECTOR if len(w) < 2 else "a stack"
            yield OnnxOperand(slot, x_slot, einsum.linear(), why)
        elif is_turned[x_slot]:  # the activation is read transposed: no branch from x as it lies
            kind = _kind_of_turned_product(slot, is_turned[slot])
            yield OnnxOperand(slot, x_slot, kind, gain=gain)
        else:
            kind = _kind_of_product(slot, is_turned[slot])
            yield OnnxOperand(slot, x_slot, kind, gain=gain)


def _kind_of_turned_product(slot: int, is_turned: bool) -> Kind:
    """The kind of xᵀ @ W or W @ xᵀ, whose weight in `slot` may be transposed as well."""
    out_first = is_turned if slot == 1 else not is_turned
    return LINEAR_OUT_IN if out_first else LINEAR_IN_OUT


def _kind_of_product(slot: int, is_turned: bool) -> Kind:
    """The kind of x @ W or W @ x, whose weight in `slot` may be transposed."""
    if slot == 1:
        return einsum.linear() if is_turned else einsum.matmul_right()
    return LEFT_TURNED if is_turned else einsum.matmul_left()


def _gemm(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A product of two matrices, which FusedGemm also applies an activation to."""
    activated = node.attributes.get_string("activation", "")
    for use in _turned(node, shape):
        if activated and not use.refusal:  # FusedGemm: no place for a sum
            axes = use.kind.axes(shape(use.weight) or ())
            use = replace(use, kind=WeightForm("linear", axes))
        yield use


def _conv(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A convolution with a kernel [out, in / groups, …], or a transposed one."""
    w = shape(1)
    if w is None:
        return
    groups = node.attributes.get_int("group", 1)
    if len(w) < 3:
        yield OnnxOperand(1, 0, convolution.Conv(groups), VECTOR)
        return

    if node.op_type == "ConvTranspose":
        kind: Kind = convolution.ConvTranspose(groups)
        depthwise = groups > 1 and w[0] == groups
    else:
        kind = convolution.Conv(groups)
        depthwise = groups > 1 and w[1] == 1
    if node.attributes.get_string("activation", ""):  # FusedConv: it leaves no place for a sum
        kind = WeightForm("conv", kind.axes(w))
    why = convolution.DEPTHWISE if depthwise else ""
    yield OnnxOperand(1, 0, kind, why, allowed=depthwise)


def _gather(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A lookup of the rows of a table."""
    w = shape(0)
    if w is None or len(w) < 2:
        return
    why = _refusal_of_lookup(w, node.attributes.get_int("axis", 0))
    yield OnnxOperand(0, 1, kinds.Embedding(), why)


def _refusal_of_lookup(table: Shape, axis: int) -> str:
    """The reason why a lookup cannot be adapted; empty for a lookup of rows of a matrix."""
    if axis == 0 and len(table) == 2:
        return ""
    return "a lookup along an axis that is not the first"


def _einsum(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """An einsum, each operand of which may be a weight."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    terms = equation.partition("->")[0].split(",")
    slots = range(len(node.inputs))
    shapes = [shape(slot) for slot in slots]

    ranks = []
    for operand_shape, term in zip(shapes, terms, strict=True):
        if operand_shape is not None:
            ranks.append(len(operand_shape))
        elif "." not in term:
            ranks.append(len(term))
        else:
            yield from _unknown_rank(shapes)
            return

    terms_in_letters = letters(equation, ranks)
    for slot in slots:
        kind, why = contraction(terms_in_letters, slot)
        first_other = next((other for other in slots if other != slot), slot)
        yield OnnxOperand(slot, first_other, kind, why)


def _unknown_rank(shapes: list[Shape | None]) -> Iterator[OnnxOperand]:
    """The operands of an einsum whose letters are unknown, since an ellipsis may be any letters."""
    for slot, shape in enumerate(shapes):
        if shape:
            yield OnnxOperand(slot, 0, einsum.linear(), "the rank of an operand is unknown")


def _blocks(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """MatMulNBits and its kin, whose weight is codes of a matrix [out, in] that is read as Wᵀ."""
    number = node.attributes.get_int
    n = number("N", 0)
    k = number("K", 0)
    bits = number("bits", 4)
    block_size = number("block_size", 0)
    check_blocks(node, n, k, bits, block_size, flat=node.op_type == "MatMulBnb4")
    why = ""
    if not number("transB", 1):
        why = NO_PLACE.format("a product with W itself (transB 0)")
    codes = Codes(node.op_type, bits)
    yield OnnxOperand(1, 0, einsum.linear(), why, stored=(n, k), codes=codes)


def _gather_blocks(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A lookup of rows of codes, of which a byte may hold several of four bits or fewer."""
    w = shape(0)
    codes = node.inputs[0]
    if w is None or len(w) < 2 or codes is None:
        return
    number = node.attributes.get_int
    bits = number("bits", 4)
    codes_in_element = 1
    if codes.dtype is ir.DataType.UINT8 and bits in (2, 4):
        codes_in_element = 8 // bits
    stored = (*w[:-1], w[-1] * codes_in_element)
    check_scales(node, 2, stored, number("quantize_axis", 1), number("block_size", 128))
    why = _refusal_of_lookup(stored, number("gather_axis", 0))
    codes_of_op = Codes(node.op_type, bits)
    yield OnnxOperand(0, 1, kinds.Embedding(), why, stored=stored, codes=codes_of_op)


def _integer(weight: int = 1, why: str = "", *, scaled: bool = True) -> Uses:
    """Uses of a matrix or a convolution's kernel in integers.

    Args:
        weight: Slot of the weight.
        why: Why it cannot be adapted, with {} for the name of the op; empty where it can.
        scaled: Whether the result is a float.
    """

    def uses(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
        w = shape(weight)
        if w is None or len(w) < 2:
            return
        kind: Kind = einsum.matmul_right()
        refusal = why.format(node.op_type)
        allowed = False
        if "Conv" in node.op_type:
            (conv,) = _conv(node, lambda slot: shape(weight if slot == 1 else slot))
            kind = conv.kind
            allowed = conv.allowed and not refusal
            refusal = refusal or conv.refusal
        elif len(w) > 2:
            refusal = refusal or "a stack of matrices in integers"
        codes = Codes(node.op_type, 0, scaled)
        yield OnnxOperand(weight, 0, kind, refusal, allowed, codes=codes)

    return uses


def _inside(*slots: int, kind: Kind | None = None) -> Uses:
    """Weights whose product never leaves the node; it reads W + ΔW of `kind`, or else codes."""

    def uses(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
        why = NO_PLACE.format(node.op_type)
        codes = Codes(node.op_type, 0)
        for slot in slots:
            if kind is not None:
                yield OnnxOperand(slot, 0, kind)
            else:
                yield OnnxOperand(slot, 0, einsum.matmul_right(), why, codes=codes)

    return uses


_GATES = _inside(1, 2, kind=WeightForm("recurrent", Axes((0,), (1,), (2,))))
"""W [directions, gates·hidden, in] and R [directions, gates·hidden, hidden]."""
_QKV = _inside(1, kind=LINEAR_IN_OUT)
"""q, k and v [in, 3·out] of fused attention in one."""
_TABLES = _inside(2, 3, 4, kind=WeightForm("embedding", Axes((), (1,), (0,))))
"""Tables of words, positions and segments, [rows, out]."""
OPS: Mapping[tuple[str, str], OnnxOp] = {
    ("", "MatMul"): OnnxOp("matmul", _matmul),
    ("", "Gemm"): OnnxOp("gemm", _gemm, bias=2),
    ("", "Conv"): OnnxOp("conv", _conv, bias=2),
    ("", "ConvTranspose"): OnnxOp("conv_transpose", _conv, bias=2),
    ("", "Gather"): OnnxOp("embedding", _gather),
    ("", "Einsum"): OnnxOp("einsum", _einsum),
    ("", "LSTM"): OnnxOp("lstm", _GATES, many=True),
    ("", "GRU"): OnnxOp("gru", _GATES, many=True),
    ("", "RNN"): OnnxOp("rnn", _GATES, many=True),
    (MS, "FusedMatMul"): OnnxOp("matmul", _turned),
    (MS, "TransposeMatMul"): OnnxOp("matmul", _turned),
    (MS, "FusedGemm"): OnnxOp("gemm", _gemm, bias=2),
    (MS, "FusedConv"): OnnxOp("conv", _conv, bias=2),
    (MS, "Attention"): OnnxOp("attention", _QKV, bias=2),
    (MS, "PackedAttention"): OnnxOp("attention", _QKV, bias=2),
    (MS, "EmbedLayerNormalization"): OnnxOp("embedding", _TABLES, many=True),
    (MS, "MatMulNBits"): OnnxOp("matmul_nbits", _blocks, bias=5, twin="MatMul"),
    (MS, "MatMulBnb4"): OnnxOp("matmul_bnb4", _blocks, twin="MatMul"),
    (MS, "GatherBlockQuantized"): OnnxOp("embedding", _gather_blocks, twin="Gather"),
    (MS, "DynamicQuantizeMatMul"): OnnxOp("matmul", _integer(), twin="MatMul"),
    (MS, "MatMulIntegerToFloat"): OnnxOp("matmul", _integer(), twin="MatMul", integer=True),
    ("", "MatMulInteger"): OnnxOp("matmul", _integer(scaled=False), twin="MatMul", integer=True),
    ("", "ConvInteger"): OnnxOp("conv", _integer(scaled=False), twin="Conv", integer=True),
    (MS, "QGemm"): OnnxOp("gemm", _integer(3, INTEGERS)),
    ("", "QLinearMatMul"): OnnxOp("matmul", _integer(3, INTEGERS)),
    ("", "QLinearConv"): OnnxOp("conv", _integer(3, INTEGERS)),
    (MS, "QLinearConv"): OnnxOp("conv", _integer(3, INTEGERS)),
    (MS, "QAttention"): OnnxOp("attention", _inside(1)),
    (MS, "QEmbedLayerNormalization"): OnnxOp("embedding", _inside(2, 3, 4), many=True),
    (MS, "DynamicQuantizeLSTM"): OnnxOp("lstm", _inside(1, 2), many=True),
    (MS, "QMoE"): OnnxOp("moe", _inside(2, 5, 8), many=True),
    (MS, "MatMulNBitsMlp"): OnnxOp("matmul_nbits", _inside(3, 6), many=True),
    (MS, "MatMulNBitsQkv"): OnnxOp("matmul_nbits", _inside(3, 6, 9), many=True),
}
"""The rows, by domain and op type."""
DATA_OPS = {
    ("", "MatMul"),
    ("", "Gemm"),
    ("", "Einsum"),
    ("", "Attention"),
    (MS, "FusedMatMul"),
    (MS, "MultiHeadAttention"),
    (MS, "GroupQueryAttention"),
}
"""Ops that may be matmuls between activations, which no row adapts."""


def row_of(node: ir.Node) -> OnnxOp | None:
    """The row of a node's op; None where the table has none."""
    return OPS.get((node.domain, node.op_type))
