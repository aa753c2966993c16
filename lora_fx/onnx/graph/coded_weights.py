"""Quantised weights in an ONNX graph: their codes, and the values that a branch reads and adds to.

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
from lora_fx.onnx.graph.values import dtype_name

UNSCALED = "its scale is not applied where the weight is used, nor right after"
FOREIGN = "it is multiplied with codes that do not come from a DynamicQuantizeLinear"
NO_PLACE = "the weight is quantised, and {} leaves no place to add a branch to its product"


@dataclass(frozen=True)
class Codes:
    """The meaning of a weight's integers: operator, bits, and whether the scale is applied.

    Attributes:
        format: The operator that decodes them, or `int8 cast` and its like.
        bits: The bits of one code.
        scaled: False while the value has codes' sizes, and the scale is still to come.
    """

    format: str
    bits: int
    scaled: bool = True

    @property
    def no_fold(self) -> str:
        """The reason why nothing can be stored in the weight."""
        return no_fold(f"{self.format}, {self.bits} bits")


QUANTISER = re.compile(r"(_DQ)?_Q[248]$|_Bnb4$|_quantized$")
"""The suffixes that ONNX Runtime's quantisers add to the name of a tensor."""


def dtypes_of_products(model: ir.Model) -> set[str]:
    """Return the dtypes of what MatMulNBits multiplies with codes."""
    products = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    dtypes = {dtype_name(node.inputs[0]) for node in products if node.inputs}
    return {name for name in dtypes if name}


def may_weigh(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor can be a weight: floats, or an integer matrix of at most 32 bits."""
    if tensor.dtype.is_floating_point():
        return True
    return _is_integer_matrix(tensor, most_bits=32)


def narrow(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is a matrix of at most 8-bit integers, which may be codes of a weight."""
    return _is_integer_matrix(tensor, most_bits=8)


def _is_integer_matrix(tensor: ir.TensorProtocol, most_bits: int) -> bool:
    if len(tensor.shape) < 2 or not tensor.dtype.is_integer():
        return False
    return tensor.dtype.bitwidth <= most_bits


def _stored_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape of a stored tensor; None for other values."""
    if value is None or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


def _expect(node: ir.Node, slot: int, shapes: Sequence[tuple[int, ...]], what: str) -> None:
    """Raise if a stored operand has none of these shapes.

    A shape of one axis is met by every operand of as many elements, however it is stored.
    """
    value = node.inputs[slot] if slot < len(node.inputs) else None
    stored_shape = _stored_shape(value)
    if value is None or stored_shape is None:
        return
    if stored_shape in shapes or (math.prod(stored_shape),) in shapes:
        return
    expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    raise damaged(node, f"{what} {value.name!r} are {list(stored_shape)}; expected {expected}")


def damaged(node: ir.Node, what: str) -> LoraFxError:
    """Return the error for codes that do not fit their operator."""
    name = f"{node.op_type} {node.outputs[0].name!r}"
    return LoraFxError(f"{name}: {what}", "quantise the model again: the runtime refuses it too")


def check_blocks(node: ir.Node, n: int, k: int, bits: int, block: int, *, flat: bool) -> None:
    """Raise unless codes and scales of a matrix [n, k] have the operator's sizes.

    Args:
        node: MatMulNBits, whose blocks are parts of rows, or MatMulBnb4.
        n: Rows.
        k: Columns.
        bits: The bits of one code.
        block: Codes that share a scale.
        flat: True where blocks go on from row to row, as those of MatMulBnb4 do.
    """
    if min(n, k) < 1 or block < 1 or bits not in (2, 4, 8):
        raise damaged(node, f"[{n}, {k}] in blocks of {block} and {bits} bits")
    if flat:
        _expect(node, 1, [((n * k + 1) // 2,)], "codes")
        _expect(node, 2, [(-(-n * k // block),)], "scales")
        return
    blocks_in_row = -(-k // block)
    scale_count = n * blocks_in_row
    _expect(node, 1, [(scale_count * (block * bits // 8),)], "codes")
    _expect(node, 2, [(scale_count,)], "scales")
    packed_zero_points = n * -(-blocks_in_row * bits // 8)
    _expect(node, 3, [(packed_zero_points,), (scale_count,)], "zero points")


def check_scales(node: ir.Node, slot: int, shape: tuple[int, ...], axis: int, block: int) -> None:
    """Raise unless scales and zero points of codes have the operator's sizes.

    Args:
        node: DequantizeLinear or GatherBlockQuantized.
        slot: The slot of the scales; that of the zero points is the next.
        shape: The shape of the codes.
        axis: The axis along which scales differ.
        block: Codes that share a scale; 0 for one scale an index of the axis, or one for all.
    """
    if axis < 0:
        axis += len(shape)
    scales_shape = _stored_shape(node.inputs[slot])
    if not 0 <= axis < len(shape):
        raise damaged(node, f"axis {axis} of codes {list(shape)}")

    as_many_axes = scales_shape is not None and len(scales_shape) == len(shape) > 1
    if node.domain or as_many_axes:
        if block < 1:
            raise damaged(node, f"blocks of {block} codes")
        blocks = -(-shape[axis] // block)
        expected: list[tuple[int, ...]] = [(*shape[:axis], blocks, *shape[axis + 1 :])]
    else:
        expected = [(1,), (shape[axis],)]
    _expect(node, slot, expected, "scales")
    if not node.domain:  # packed zero points of the other are as many bytes as the runtime likes
        _expect(node, slot + 1, expected, "zero points")


def quantiser(value: ir.Value | None) -> ir.Node | None:
    """Return the DynamicQuantizeLinear that made these codes; None for other values."""
    if value is None:
        return None
    node = value.producer()
    if node is None or node.op_type != "DynamicQuantizeLinear":
        return None
    if value is not node.outputs[0]:  # the scale, or the zero point
        return None
    return node


@dataclass
class _Unscaled:
    """A product of codes, followed from node to node until its scales are applied.

    Attributes:
        value: The product so far.
        missing: Whose scales are still to come: w's, x's or both.
        x_scale: The scale of the activation, where that is codes too.
        stored: Whether a value is made of stored tensors alone.
    """

    value: ir.Value
    missing: set[str]
    x_scale: ir.Value | None
    stored: Callable[[ir.Value], bool]

    def apply(self, node: ir.Node) -> bool:
        """Continue after a node; return False if the node does not lead to the scaled product."""
        operands = [v for v in node.inputs if v is not self.value and v is not None]
        if node.op_type in ("Mul", "DequantizeLinear"):
            if node.op_type == "DequantizeLinear" and node.inputs[0] is not self.value:
                return False
            scales = set[str]()
            for factor in operands[:1]:  # a DequantizeLinear's second is its zero point
                scales |= self._scales_in(factor)
            if not scales or not scales <= self.missing:
                return False
            self.missing -= scales
        elif node.op_type == "Add":
            for bias in operands:  # in units of the codes
                if bias.dtype != ir.DataType.INT32 or not self.stored(bias):
                    return False
        elif node.op_type == "Sub":
            if not all(map(self.stored, operands)):  # zero points
                return False
        elif node.op_type != "Cast":
            return False
        self.value = node.outputs[0]
        return True

    def _scales_in(self, factor: ir.Value) -> set[str]:
        """Return which scales a factor has: w's, x's or both; empty for another factor."""
        if factor is self.x_scale:
            return {"x"}
        if self.stored(factor):
            return {"w"}
        node = factor.producer()
        if node is None or node.op_type != "Mul":
            return set()
        scales = set[str]()
        for value in node.inputs:
            if value is None:
                continue
            scales_in_value = self._scales_in(value)
            if not scales_in_value:
                return set()
            scales |= scales_in_value
        return scales


def scaled(
    value: ir.Value, x_scale: ir.Value | None, stored: Callable[[ir.Value], bool]
) -> ir.Value | None:
    """Return a product of codes after its scales; None if another node reads it before that.

    Args:
        value: The product, or looked-up codes.
        x_scale: The scale of the activation, where that is codes too.
        stored: Whether a value is made of stored tensors alone.
    """
    missing = {"w"} if x_scale is None else {"w", "x"}
    product = _Unscaled(value, missing, x_scale, stored)
    producer = value.producer()
    graph = None if producer is None else producer.graph
    while product.missing:
        node = _only_reader(product.value)
        if node is None or node.domain or node.graph is not graph:
            return None
        if not product.apply(node):
            return None
    return product.value


def _only_reader(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads a value; None if there are others or it is an output."""
    readers = [use.node for use in value.uses()]
    if len(readers) != 1 or value.is_graph_output():
        return None
    return readers[0]


DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"}
"""Ops that compute the range of their codes from all activations of a run."""


def shares_ranges(model: ir.Model) -> bool:
    """Whether a run computes one range over all rows of a batch, so that rows affect each other."""
    return any(node.op_type in DYNAMIC for node in model.graph.all_nodes())


def rounds_activations(model: ir.Model) -> bool:
    """Whether a run quantises activations, which rounding may change by a whole step."""
    if shares_ranges(model):
        return True
    for node in model.graph.all_nodes():
        if node.op_type == "QuantizeLinear":
            return True
        if node.attributes.get_int("accuracy_level", 0) == 4:
            return True
    return False
