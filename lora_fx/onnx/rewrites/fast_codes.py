"""MatMulNBits in the form that CUDA's fast kernel takes.

    MatMulNBits(x, codes, scales, zeros) → MatMulNBits(x, codes, scales)

The kernel (fpA_intB; ONNX Runtime's pull requests 24854, 24955 and 29585, used where
ORT_FPA_INTB_GEMM=1 is set) multiplies float16 or bfloat16 with codes of 4 or 8 bits that have no
zero points, in blocks of 32, 64 or 128 of a row, all of them whole, for a multiple of 64 or 32
outputs, and adds no bias. Other products take a slower kernel, which is right too, so they are
named and left as they are.

The rewrite is exact: without zero points, the code of 0 is the middle one, 2^(bits − 1), so zero
points that all are the middle code can go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_fx.onnx.graph.values import constant, delete_unread, operand
from lora_fx.text import some

OUTPUTS = {4: 64, 8: 32}
"""Bits of a code → what the number of outputs must be a multiple of."""
BLOCKS = (32, 64, 128)
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class FastCodes(ir.passes.InPlacePass):
    """A rewrite that drops zero points of products with codes of 4 or 8 bits."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Edit the model in place."""
        changed = False
        for product in _products(model):
            zeros = operand(product, 3)
            if zeros is not None and _are_middle(product, zeros):
                product.replace_input_with(3, None)
                delete_unread(zeros)
                changed = True
        return ir.passes.PassResult(model, changed)


def said_of_slow_codes(model: ir.Model) -> list[str]:
    """Return a line for each condition of the fast kernel that products do not meet.

    Args:
        model: After FastCodes.
    """
    by_reason: dict[str, list[str]] = {}
    for product in _products(model):
        codes = operand(product, 1)
        reason = _slow_because(product)
        if reason and codes is not None:
            by_reason.setdefault(reason, []).append(str(codes.name))
    return [
        f"{some(names)}: CUDA's fast kernel for codes is not used: {reason}"
        for reason, names in by_reason.items()
    ]


def _products(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the products with codes of 4 or 8 bits."""
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulNBits" and _bits(node) in OUTPUTS:
            yield node


def _bits(product: ir.Node) -> int:
    return product.attributes.get_int("bits", 4)


def _are_middle(product: ir.Node, zeros: ir.Value) -> bool:
    """Whether the zero points of all blocks are the middle code.

    Two codes of 4 bits are in a byte. Where a row has an odd number of blocks, the upper half of
    its last byte is no code.
    """
    stored = constant(zeros)
    if stored is None or stored.dtype != np.uint8:
        return False
    if _bits(product) == 8:
        return bool((stored == 0x80).all())
    outputs = product.attributes.get_int("N", 0)
    bytes_of_row = stored.reshape(outputs, -1)
    is_middle = bytes_of_row == 0x88
    if -(-_columns(product) // _block(product)) % 2:
        is_middle[:, -1] = bytes_of_row[:, -1] & 0x0F == 0x08
    return bool(is_middle.all())


def _columns(product: ir.Node) -> int:
    return product.attributes.get_int("K", 0)


def _block(product: ir.Node) -> int:
    return product.attributes.get_int("block_size", 32)


def _slow_because(product: ir.Node) -> str:
    """Return the condition of the fast kernel that a product does not meet; empty for none."""
    x = operand(product, 0)
    if x is None or x.dtype not in HALVES:
        return "it computes in float32; pass --precision float16"
    if operand(product, 3) is not None:
        return "the codes have zero points"
    if operand(product, 4) is not None:
        return "the columns have an order of their own"
    if operand(product, 5) is not None:
        return "the product adds a bias"
    if _block(product) not in BLOCKS:
        return f"blocks of {_block(product)} codes; expected 32, 64 or 128"
    if _columns(product) % _block(product):
        return f"{_columns(product)} inputs are no multiple of the block {_block(product)}"
    outputs = product.attributes.get_int("N", 0)
    multiple = OUTPUTS[_bits(product)]
    if outputs % multiple:
        return f"{outputs} outputs are no multiple of {multiple}"
    return ""
