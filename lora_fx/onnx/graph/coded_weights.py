"""Quantised weights in an ONNX graph: their codes, and where a branch beside one reads and adds.

    x → MatMulNBits → y                                          and its kin
    x → MatMul(·, DequantizeLinear(codes)) → y                   Gemm, Conv, Gather …
    x → DynamicQuantizeLinear → MatMulInteger → Cast → Mul → y   the scales are in the Mul
    x → MatMul(·, Cast(codes)) → Mul → y                         unless a Mul before has the scale
    ids → Gather(codes) → DequantizeLinear → y

x is what the product reads: behind DequantizeLinear, where activations are codes for a while. y
is before any QuantizeLinear of the result, which may do an activation's work (a Relu is left out
where its range starts at 0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lora_fx.errors import LoraFxError
from lora_fx.ir.quantised import no_fold

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
