"""The op table of ONNX: which ops multiply by a weight.

A row says where an op's weight and activation operands are and what Kind their shapes make.
Adding an op is one row here and one row in tests/onnx/graph/table.py. Ops of `com.microsoft` are
those that ONNX Runtime's own optimizers write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_fx.ir import kinds
from lora_fx.ir.graph import Axes, Kind
from lora_fx.ir.kinds import VECTOR, Einsum, Shape, WeightForm, contraction, letters, product
from lora_fx.onnx.graph.coded_weights import NO_PLACE, Codes, check_blocks, check_scales

MS = "com.microsoft"
INTEGERS = "the weight is quantised, and {} makes codes of its product: no float to add a branch to"


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


def _matmul(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    first, second = shape(0), shape(1)
    for slot, x, w, left in ((1, first, second, False), (0, second, first, True)):
        if w is not None:
            kind, why = product((0,) * 9 if x is None else x, w, left=left)
            if left and x is None and len(w) == 2:  # a vector, maybe, for which see matmul_left
                kind = WeightForm("linear", Axes((), (0,), (1,)))
            yield OnnxOperand(slot, 1 - slot, kind, why)


LEFT_TURNED = Einsum("...in", "io", "...on", "left")
"""The kind wᵀ [out, in] @ x [..., in, n], with w stored [in, out]."""


def _turned(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A product of two matrices of which each may be read transposed."""
    number, gain = node.attributes.get_int, node.attributes.get_float("alpha", 1.0)
    turns = bool(number("transA", 0)), bool(number("transB", 0))
    if number("transBatchA", 0) or number("transBatchB", 0):  # of FusedMatMul
        turns = True, True
    for slot in (1, 0):
        w, own, other = shape(slot), turns[slot], turns[1 - slot]
        if w is None:
            continue
        if len(w) != 2:
            yield OnnxOperand(slot, 1 - slot, kinds.linear(), VECTOR if len(w) < 2 else "a stack")
        elif other:  # the activation is read transposed: no branch from x as it lies
            out_first = own if slot else not own
            axes = Axes((), (0,), (1,)) if out_first else Axes((), (1,), (0,))
            yield OnnxOperand(slot, 1 - slot, WeightForm("linear", axes), gain=gain)
        elif slot:
            kind: Kind = kinds.linear() if own else kinds.matmul_right()
            yield OnnxOperand(1, 0, kind, gain=gain)
        else:
            yield OnnxOperand(0, 1, LEFT_TURNED if own else kinds.matmul_left(), gain=gain)


def _gemm(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    activated = node.attributes.get_string("activation", "")
    for use in _turned(node, shape):
        if activated and not use.refusal:  # FusedGemm: no place for a sum
            axes = use.kind.axes(shape(use.weight) or ())
            use = replace(use, kind=WeightForm("linear", axes))
        yield use


def _conv(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    w, groups = shape(1), node.attributes.get_int("group", 1)
    turned = node.op_type == "ConvTranspose"
    if w is None:
        return
    if len(w) < 3:
        yield OnnxOperand(1, 0, kinds.Conv(groups), VECTOR)
        return
    lone = groups > 1 and (w[0] == groups if turned else w[1] == 1)
    kind: Kind = kinds.ConvTranspose(groups) if turned else kinds.Conv(groups)
    if node.attributes.get_string("activation", ""):  # FusedConv: it leaves no place for a sum
        kind = WeightForm("conv", kind.axes(w))
    yield OnnxOperand(1, 0, kind, kinds.DEPTHWISE if lone else "", allowed=lone)


def _gather(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    w = shape(0)
    if w is not None and len(w) >= 2:
        axis = node.attributes.get_int("axis", 0)
        why = "" if axis == 0 and len(w) == 2 else "a lookup along another axis than the first"
        yield OnnxOperand(0, 1, kinds.Embedding(), why)


def _einsum(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    written = equation.partition("->")[0].split(",")
    shapes = [shape(i) for i in range(len(node.inputs))]
    if any(s is None and "." in t for s, t in zip(shapes, written, strict=True)):
        why = "the rank of an operand is unknown"
        yield from (OnnxOperand(i, 0, kinds.linear(), why) for i, s in enumerate(shapes) if s)
        return
    terms = letters(
        equation, [len(t if s is None else s) for s, t in zip(shapes, written, strict=True)]
    )
    for i in range(len(shapes)):
        kind, why = contraction(terms, i)
        other = next((j for j in range(len(shapes)) if j != i), i)
        yield OnnxOperand(i, other, kind, why)


def _blocks(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """MatMulNBits and its kin, whose weight is codes of a matrix [out, in] that is read as Wᵀ."""
    number, flat = node.attributes.get_int, node.op_type == "MatMulBnb4"
    n, k, bits = number("N", 0), number("K", 0), number("bits", 4)
    check_blocks(node, n, k, bits, number("block_size", 0), flat=flat)
    why = "" if number("transB", 1) else NO_PLACE.format("a product with W itself (transB 0)")
    codes = Codes(node.op_type, bits)
    yield OnnxOperand(1, 0, kinds.linear(), why, stored=(n, k), codes=codes)


def _gather_blocks(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """A lookup of rows of codes; in bytes there are several codes of four bits or fewer in one."""
    w, codes = shape(0), node.inputs[0]
    if w is None or len(w) < 2 or codes is None:
        return
    number = node.attributes.get_int
    axis, bits = number("gather_axis", 0), number("bits", 4)
    dense = 8 // bits if codes.dtype is ir.DataType.UINT8 and bits in (2, 4) else 1
    w = (*w[:-1], w[-1] * dense)
    check_scales(node, 2, w, number("quantize_axis", 1), number("block_size", 128))
    why = "" if axis == 0 and len(w) == 2 else "a lookup along another axis than the first"
    yield OnnxOperand(0, 1, kinds.Embedding(), why, stored=w, codes=Codes(node.op_type, bits))


def _integer(weight: int = 1, why: str = "", *, scaled: bool = True) -> Uses:
    """A matrix or a convolution's kernel in integers; `scaled` where the result is a float."""

    def uses(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
        w = shape(weight)
        if w is None or len(w) < 2:
            return
        kind: Kind = kinds.matmul_right()
        refusal, allowed = why.format(node.op_type), False
        if "Conv" in node.op_type:
            (conv,) = _conv(node, lambda slot: shape(weight if slot == 1 else slot))
            kind, allowed = conv.kind, conv.allowed and not refusal
            refusal = refusal or conv.refusal
        elif len(w) > 2:
            refusal = refusal or "a stack of matrices in integers"
        codes = Codes(node.op_type, 0, scaled)
        yield OnnxOperand(weight, 0, kind, refusal, allowed, codes=codes)

    return uses


def _inside(*slots: int, kind: Kind | None = None) -> Uses:
    """Weights whose product never leaves the node: it reads W + ΔW of a kind, or else codes."""

    def uses(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
        why, codes = NO_PLACE.format(node.op_type), Codes(node.op_type, 0)
        for slot in slots:
            if kind is not None:
                yield OnnxOperand(slot, 0, kind)
            else:
                yield OnnxOperand(slot, 0, kinds.matmul_right(), why, codes=codes)

    return uses


_GATES = _inside(1, 2, kind=WeightForm("recurrent", Axes((0,), (1,), (2,))))
"""W [directions, gates·hidden, in] and R [directions, gates·hidden, hidden]."""
_QKV = _inside(1, kind=WeightForm("linear", Axes((), (1,), (0,))))
"""q, k and v [in, 3·out] of fused attention in one."""
_TABLES = _inside(2, 3, 4, kind=WeightForm("embedding", Axes((), (1,), (0,))))
OPS: Mapping[tuple[str, str], OnnxOp] = {
    ("", "MatMul"): OnnxOp("matmul", _matmul),
    ("", "Gemm"): OnnxOp("gemm", _gemm, bias=2),
    ("", "Conv"): OnnxOp("conv", _conv, bias=2),
    ("", "ConvTranspose"): OnnxOp("conv_transpose", _conv, bias=2),
    ("", "Gather"): OnnxOp("embedding", _gather),
    ("", "Einsum"): OnnxOp("einsum", _einsum),
    **{("", n): OnnxOp(n.lower(), _GATES, many=True) for n in ("LSTM", "GRU", "RNN")},
    **{(MS, n): OnnxOp("matmul", _turned) for n in ("FusedMatMul", "TransposeMatMul")},
    (MS, "FusedGemm"): OnnxOp("gemm", _gemm, bias=2),
    (MS, "FusedConv"): OnnxOp("conv", _conv, bias=2),
    **{(MS, n): OnnxOp("attention", _QKV, bias=2) for n in ("Attention", "PackedAttention")},
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
    **{(d, "QLinearConv"): OnnxOp("conv", _integer(3, INTEGERS)) for d in ("", MS)},
    (MS, "QAttention"): OnnxOp("attention", _inside(1)),
    (MS, "QEmbedLayerNormalization"): OnnxOp("embedding", _inside(2, 3, 4), many=True),
    (MS, "DynamicQuantizeLSTM"): OnnxOp("lstm", _inside(1, 2), many=True),
    (MS, "QMoE"): OnnxOp("moe", _inside(2, 5, 8), many=True),
    (MS, "MatMulNBitsMlp"): OnnxOp("matmul_nbits", _inside(3, 6), many=True),
    (MS, "MatMulNBitsQkv"): OnnxOp("matmul_nbits", _inside(3, 6, 9), many=True),
}

DATA_OPS = {
    *(("", name) for name in ("MatMul", "Gemm", "Einsum", "Attention")),
    *((MS, name) for name in ("FusedMatMul", "MultiHeadAttention", "GroupQueryAttention")),
}
"""Ops that may be matmuls between activations, which no row adapts."""


def row_of(node: ir.Node) -> OnnxOp | None:
    """The row of a node's op; None where the table has none."""
    return OPS.get((node.domain, node.op_type))
