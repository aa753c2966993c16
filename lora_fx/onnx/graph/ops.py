"""The op table of ONNX: which ops multiply by a weight.

A row says where an op's weight and activation operands are and what Kind their shapes make.
Adding an op is one row here and one row in tests/onnx/graph/table.py. Ops of `com.microsoft` are
those that ONNX Runtime's own optimizers write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_fx.errors import LoraFxError
from lora_fx.ir import convolution, einsum, kinds
from lora_fx.ir.einsum import VECTOR, Einsum, Shape, contraction, letters, product
from lora_fx.ir.graph import Axes, Kind
from lora_fx.ir.kinds import WeightForm
from lora_fx.ir.quantised import no_fold

# Quantised weights in an ONNX graph: their codes, and where a branch beside one reads and adds.
#
#     x → MatMulNBits → y                                          and its kin
#     x → MatMul(·, DequantizeLinear(codes)) → y                   Gemm, Conv, Gather …
#     x → DynamicQuantizeLinear → MatMulInteger → Cast → Mul → y   the scales are in the Mul
#     x → MatMul(·, Cast(codes)) → Mul → y                         unless a Mul before has the scale
#     ids → Gather(codes) → DequantizeLinear → y
#
# x is what the product reads: behind DequantizeLinear, where activations are codes for a while. y
# is before any QuantizeLinear of the result, which may do an activation's work (a Relu is left out
# where its range starts at 0).


UNSCALED = "its scale is not applied where the weight is used, nor right behind"
FOREIGN = "it is multiplied with codes that no DynamicQuantizeLinear made"
NO_PLACE = "the weight is quantised, and {} leaves no place to add a branch to its product"


@dataclass(frozen=True)
class Codes:
    """What the integers of a weight are.

    Attributes:
        format: The operator that decodes them, or `int8 cast` and its like.
        bits: Of one code.
        scaled: False while the value has codes' sizes, and the scale is still to come.
    """

    format: str
    bits: int
    scaled: bool = True

    @property
    def no_fold(self) -> str:
        """Why nothing can be stored into the weight."""
        return no_fold(f"{self.format}, {self.bits} bits")


QUANTISER = re.compile(r"(_DQ)?_Q[248]$|_Bnb4$|_quantized$")
"""What ONNX Runtime's quantisers add to the name of a tensor."""


def may_weigh(tensor: ir.TensorProtocol) -> bool:
    """True for floats, and for matrices of integers that may hold codes; indices have 64 bits."""
    integers = tensor.dtype.is_integer() and tensor.dtype.bitwidth <= 32
    return tensor.dtype.is_floating_point() or (integers and len(tensor.shape) >= 2)


def narrow(tensor: ir.TensorProtocol) -> bool:
    """True for matrices of so few bits that they may be codes of a weight; indices have more."""
    return len(tensor.shape) >= 2 and (tensor.dtype.is_integer() and tensor.dtype.bitwidth <= 8)


def sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a stored tensor; None for anything else."""
    stored = None if value is None else value.const_value
    return None if stored is None else tuple(stored.shape.numpy())


def _expect(node: ir.Node, slot: int, wanted: Sequence[tuple[int, ...]], what: str) -> None:
    """Raise where a stored operand has none of these shapes; one axis alone is a count."""
    value = node.inputs[slot] if slot < len(node.inputs) else None
    found = sizes(value)
    if value is None or found is None:
        return
    if found not in wanted and (math.prod(found),) not in wanted:
        shapes = " or ".join(str(list(w)) for w in dict.fromkeys(wanted))
        raise damaged(node, f"{what} {value.name!r} are {list(found)}; expected {shapes}")


def damaged(node: ir.Node, what: str) -> LoraFxError:
    """The error for codes that do not fit their operator."""
    name = f"{node.op_type} {node.outputs[0].name!r}"
    return LoraFxError(f"{name}: {what}", "quantise the model again: the runtime refuses it too")


def check_blocks(node: ir.Node, n: int, k: int, bits: int, block: int, *, flat: bool) -> None:
    """Raise unless codes and scales of a matrix [n, k] have the sizes that the operator says.

    Args:
        node: MatMulNBits, whose blocks are parts of rows, or MatMulBnb4.
        n: Rows.
        k: Columns.
        bits: Of one code.
        block: Codes that share a scale.
        flat: Blocks go on from row to row.
    """
    if min(n, k) < 1 or block < 1 or bits not in (2, 4, 8):
        raise damaged(node, f"[{n}, {k}] in blocks of {block} and {bits} bits")
    each = -(-k // block)
    codes, scales = ((n * k + 1) // 2, -(-n * k // block)) if flat else (
        n * each * (block * bits // 8), n * each)  # fmt: skip
    _expect(node, 1, [(codes,)], "codes")
    _expect(node, 2, [(scales,)], "scales")
    if not flat:
        _expect(node, 3, [(n * -(-each * bits // 8),), (scales,)], "zero points")


def check_scales(node: ir.Node, slot: int, shape: tuple[int, ...], axis: int, block: int) -> None:
    """Raise unless the scales in a slot, and the zero points in the next, are of such a tensor.

    Args:
        node: DequantizeLinear or GatherBlockQuantized.
        slot: Of the scales.
        shape: Of the codes, one an element.
        axis: Along which scales differ.
        block: Codes that share one; 0 for one scale an index of the axis, or one for all.
    """
    axis = axis + len(shape) if axis < 0 else axis
    found = sizes(node.inputs[slot])
    if not 0 <= axis < len(shape):
        raise damaged(node, f"axis {axis} of codes {list(shape)}")
    blocked = node.domain or (found is not None and len(found) == len(shape) > 1)
    if blocked and block < 1:
        raise damaged(node, f"blocks of {block} codes")
    wanted: list[tuple[int, ...]] = [(1,), (shape[axis],)]
    if blocked:
        wanted = [(*shape[:axis], -(-shape[axis] // block), *shape[axis + 1 :])]
    _expect(node, slot, wanted, "scales")
    if not node.domain:  # packed zero points of the other are as many bytes as the runtime likes
        _expect(node, slot + 1, wanted, "zero points")


def quantiser(value: ir.Value | None) -> ir.Node | None:
    """The DynamicQuantizeLinear that made codes of a float."""
    node = None if value is None else value.producer()
    known = node is not None and node.op_type == "DynamicQuantizeLinear"
    return node if known and node is not None and value is node.outputs[0] else None


def scaled(
    value: ir.Value, x_scale: ir.Value | None, stored: Callable[[ir.Value], bool]
) -> ir.Value | None:
    """What a product of codes is once it has its scales; None where something else reads it first.

    Args:
        value: The product, or looked-up codes.
        x_scale: The scale of the activation, where that is codes too.
        stored: Whether a value is made of stored tensors alone.
    """
    missing = {"w"} if x_scale is None else {"w", "x"}
    graph = None if (maker := value.producer()) is None else maker.graph
    while missing:
        readers = [u.node for u in value.uses()]
        node = readers[0] if len(readers) == 1 and not value.is_graph_output() else None
        if node is None or node.domain or node.graph is not graph:
            return None
        others = [v for v in node.inputs if v is not value and v is not None]
        if node.op_type in ("Mul", "DequantizeLinear"):
            own = others[:1] if node.op_type == "Mul" else others[:1] * (node.inputs[0] is value)
            got = {s for v in own for s in _scales(v, x_scale, stored)}
            if not got or not got <= missing:
                return None
            missing -= got
        elif node.op_type in ("Add", "Sub"):
            zero_point = node.op_type == "Sub"
            bias = all(v.dtype == ir.DataType.INT32 for v in others)  # in units of the codes
            if not (zero_point or bias) or not all(map(stored, others)):
                return None
        elif node.op_type != "Cast":
            return None
        value = node.outputs[0]
    return value


def _scales(
    value: ir.Value, x_scale: ir.Value | None, stored: Callable[[ir.Value], bool]
) -> set[str]:
    """Whose scales a factor holds: w's, x's or both; empty for another factor."""
    if value is x_scale:
        return {"x"}
    if stored(value):
        return {"w"}
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return set()
    parts = [_scales(v, x_scale, stored) for v in node.inputs if v is not None]
    return set().union(*parts) if all(parts) else set()


DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"}


def shares_ranges(model: ir.Model) -> bool:
    """True where a run takes one range over all rows of a batch, so that they depend on another."""
    return any(n.op_type in DYNAMIC for n in model.graph.all_nodes())


def rounds_activations(model: ir.Model) -> bool:
    """True where a run makes codes of activations, which a rounding may move by a whole step."""
    return shares_ranges(model) or any(
        n.op_type == "QuantizeLinear" or n.attributes.get_int("accuracy_level", 0) == 4
        for n in model.graph.all_nodes()
    )


# The op table.


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
            yield OnnxOperand(slot, 1 - slot, einsum.linear(), VECTOR if len(w) < 2 else "a stack")
        elif other:  # the activation is read transposed: no branch from x as it lies
            out_first = own if slot else not own
            axes = Axes((), (0,), (1,)) if out_first else Axes((), (1,), (0,))
            yield OnnxOperand(slot, 1 - slot, WeightForm("linear", axes), gain=gain)
        elif slot:
            kind: Kind = einsum.linear() if own else einsum.matmul_right()
            yield OnnxOperand(1, 0, kind, gain=gain)
        else:
            yield OnnxOperand(0, 1, LEFT_TURNED if own else einsum.matmul_left(), gain=gain)


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
        yield OnnxOperand(1, 0, convolution.Conv(groups), VECTOR)
        return
    lone = groups > 1 and (w[0] == groups if turned else w[1] == 1)
    kind: Kind = convolution.ConvTranspose(groups) if turned else convolution.Conv(groups)
    if node.attributes.get_string("activation", ""):  # FusedConv: it leaves no place for a sum
        kind = WeightForm("conv", kind.axes(w))
    yield OnnxOperand(1, 0, kind, convolution.DEPTHWISE if lone else "", allowed=lone)


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
        yield from (OnnxOperand(i, 0, einsum.linear(), why) for i, s in enumerate(shapes) if s)
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
    yield OnnxOperand(1, 0, einsum.linear(), why, stored=(n, k), codes=codes)


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
        kind: Kind = einsum.matmul_right()
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
                yield OnnxOperand(slot, 0, einsum.matmul_right(), why, codes=codes)

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
