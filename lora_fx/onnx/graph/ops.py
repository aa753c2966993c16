"""The op table of ONNX: which ops multiply by a weight.

A row says where an op's weight and activation operands are and what Kind their shapes make.
Adding an op is one row here and one row in tests/onnx/graph/table.py. Ops of `com.microsoft` are
those that ONNX Runtime's own optimizers write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from lora_fx.ir import kinds
from lora_fx.ir.graph import Axes, Kind
from lora_fx.ir.kinds import VECTOR, Einsum, Shape, WeightForm, contraction, letters, product

MS = "com.microsoft"
DEPTHWISE = "depthwise: one channel a group leaves nothing of low rank"
QUANTISED = "the weight is quantised ({}): folding would round the update away"


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
    """

    weight: int
    x: int
    kind: Kind
    refusal: str = ""
    allowed: bool = False
    gain: float = 1.0
    stored: tuple[int, ...] = ()


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
        packed: True when the integers of the weight are codes of a matrix.
    """

    op: str
    uses: Uses
    bias: int | None = None
    many: bool = False
    packed: bool = False


def attr(node: ir.Node, name: str, default: object) -> Any:
    """The value of a node's attribute, or the default where it has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value


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


def _turned(
    node: ir.Node, shape: Shapes, turns: tuple[bool, bool], gain: float
) -> Iterator[OnnxOperand]:
    """A product of two matrices of which each may be read transposed."""
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
    turns = bool(attr(node, "transA", 0)), bool(attr(node, "transB", 0))
    for use in _turned(node, shape, turns, float(attr(node, "alpha", 1.0))):
        if attr(node, "activation", "") and not use.refusal:  # FusedGemm: no place for a sum
            axes = use.kind.axes(shape(use.weight) or ())
            use = replace(use, kind=WeightForm("linear", axes))
        yield use


def _fused_matmul(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    turns = bool(attr(node, "transA", 0)), bool(attr(node, "transB", 0))
    if attr(node, "transBatchA", 0) or attr(node, "transBatchB", 0):
        turns = True, True
    yield from _turned(node, shape, turns, float(attr(node, "alpha", 1.0)))


def _conv(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    w, groups, turned = shape(1), int(attr(node, "group", 1)), node.op_type == "ConvTranspose"
    if w is None:
        return
    if len(w) < 3:
        yield OnnxOperand(1, 0, kinds.Conv(groups), VECTOR)
        return
    lone = groups > 1 and (w[0] == groups if turned else w[1] == 1)
    kind: Kind = kinds.ConvTranspose(groups) if turned else kinds.Conv(groups)
    if attr(node, "activation", ""):  # FusedConv: the activation leaves no place for a sum
        kind = WeightForm("conv", kind.axes(w))
    yield OnnxOperand(1, 0, kind, DEPTHWISE if lone else "", allowed=lone)


def _gather(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    w = shape(0)
    if w is not None and len(w) >= 2:
        axis = int(attr(node, "axis", 0))
        why = "" if axis == 0 and len(w) == 2 else "a lookup along another axis than the first"
        yield OnnxOperand(0, 1, kinds.Embedding(), why)


def _einsum(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    equation = str(attr(node, "equation", "")).replace(" ", "")
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


def _recurrent(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """W [directions, gates·hidden, in] and R [directions, gates·hidden, hidden]."""
    for slot in (1, 2):
        yield OnnxOperand(slot, 0, WeightForm("recurrent", Axes((0,), (1,), (2,))))


def _packed_qkv(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """q, k and v [in, 3·out] of fused attention in one; their product never leaves the node."""
    yield OnnxOperand(1, 0, WeightForm("linear", Axes((), (1,), (0,))))


def _embed_layer_norm(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    for slot in (2, 3, 4):
        yield OnnxOperand(slot, 0, WeightForm("embedding", Axes((), (1,), (0,))))


def _blocks(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
    """MatMulNBits and its kin, whose weight is codes of a matrix [out, in] that is read as Wᵀ."""
    n, k, bits = int(attr(node, "N", 0)), int(attr(node, "K", 0)), int(attr(node, "bits", 4))
    yield OnnxOperand(1, 0, kinds.linear(), QUANTISED.format(f"{bits} bits"), True, stored=(n, k))


def _integer(weight: int, *, beside: bool) -> Uses:
    def uses(node: ir.Node, shape: Shapes) -> Iterator[OnnxOperand]:
        w = shape(weight)
        if w is not None and len(w) >= 2:
            why = QUANTISED.format("integers")
            if not beside:
                why += ", and so is what it is multiplied with"
            ok = beside and len(w) == 2
            yield OnnxOperand(weight, 0, kinds.matmul_right(), why, ok)

    return uses


_RECURRENT = {n: OnnxOp(n.lower(), _recurrent, many=True) for n in ("LSTM", "GRU", "RNN")}
OPS: Mapping[tuple[str, str], OnnxOp] = {
    ("", "MatMul"): OnnxOp("matmul", _matmul),
    ("", "Gemm"): OnnxOp("gemm", _gemm, bias=2),
    ("", "Conv"): OnnxOp("conv", _conv, bias=2),
    ("", "ConvTranspose"): OnnxOp("conv_transpose", _conv, bias=2),
    ("", "Gather"): OnnxOp("embedding", _gather),
    ("", "Einsum"): OnnxOp("einsum", _einsum),
    **{("", k): row for k, row in _RECURRENT.items()},
    (MS, "FusedMatMul"): OnnxOp("matmul", _fused_matmul),
    (MS, "TransposeMatMul"): OnnxOp("matmul", _fused_matmul),
    (MS, "FusedGemm"): OnnxOp("gemm", _gemm, bias=2),
    (MS, "FusedConv"): OnnxOp("conv", _conv, bias=2),
    (MS, "Attention"): OnnxOp("attention", _packed_qkv, bias=2),
    (MS, "PackedAttention"): OnnxOp("attention", _packed_qkv, bias=2),
    (MS, "EmbedLayerNormalization"): OnnxOp("embedding", _embed_layer_norm, many=True),
    (MS, "MatMulNBits"): OnnxOp("matmul_nbits", _blocks, bias=5, packed=True),
    (MS, "MatMulBnb4"): OnnxOp("matmul_bnb4", _blocks, packed=True),
    (MS, "DynamicQuantizeMatMul"): OnnxOp("matmul", _integer(1, beside=True), packed=True),
    (MS, "MatMulIntegerToFloat"): OnnxOp("matmul", _integer(1, beside=False), packed=True),
    (MS, "QAttention"): OnnxOp("attention", _integer(1, beside=False), packed=True),
    (MS, "QGemm"): OnnxOp("gemm", _integer(3, beside=False), packed=True),
    (MS, "QLinearConv"): OnnxOp("conv", _integer(3, beside=False), packed=True),
    ("", "MatMulInteger"): OnnxOp("matmul", _integer(1, beside=False), packed=True),
    ("", "ConvInteger"): OnnxOp("conv", _integer(1, beside=False), packed=True),
    ("", "QLinearMatMul"): OnnxOp("matmul", _integer(3, beside=False), packed=True),
    ("", "QLinearConv"): OnnxOp("conv", _integer(3, beside=False), packed=True),
}

DATA_OPS = {("", "Attention"), (MS, "MultiHeadAttention"), (MS, "GroupQueryAttention")}
"""Matmuls between activations, which no row adapts."""


def row_of(node: ir.Node) -> OnnxOp | None:
    """The row of a node's op; None where the table has none."""
    return OPS.get((node.domain, node.op_type))
