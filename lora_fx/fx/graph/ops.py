"""The op table of ATen's training IR: which ops multiply by a weight.

A row says where an op's weight and activation operands are and what Kind their shapes make.
Adding an op is one row here and one row in tests/table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from lora_fx.fx.graph.nodes import argument, aten_ops, op_name, overloads, shape_of, value
from lora_fx.inputs import Named
from lora_fx.ir import convolution, einsum, kinds
from lora_fx.ir.einsum import LETTERS, VECTOR, contraction, letters, product
from lora_fx.ir.graph import Axes, Kind

aten = torch.ops.aten
Path = tuple[int, ...]


@dataclass(frozen=True)
class FxOperand:
    """One weight operand of one node.

    Attributes:
        weight: Path to the weight in the node's args: (1,), or (1, 0) inside a list.
        x: Path to the activation.
        kind: The Kind of contraction that their shapes make.
        attrs: What the numpy emitter needs to run the op.
        refusal: Why the operand cannot be adapted; empty where it can.
        allowed: True when the refusal is only a default that `include` overrides.
        gain: The factor by which the op multiplies its product.
        flops: FLOPs of the use, where the shape of the op's result does not tell them.
    """

    weight: Path
    x: Path
    kind: Kind
    attrs: Named = field(default_factory=dict)
    refusal: str = ""
    allowed: bool = False
    gain: float = 1.0
    flops: int | None = None


@dataclass(frozen=True)
class FxOp:
    """One row of the op table.

    Attributes:
        op: The public name of the op, that of the selector `op:NAME`.
        uses: A function from a node to every way in which it may read a weight.
        bias: Position of the argument that is added to the product.
        many: True when several operands of one node may be weights of their own.
        first: True when the product is the first of several results.
    """

    op: str
    uses: Callable[[Node], Iterator[FxOperand]]
    bias: int | None = None
    many: bool = False
    first: bool = False


def pick(node: Node, path: Path) -> Any:
    """The argument at a path into node.args; None if there is none."""
    arg: object = node.args
    for position in path:
        if not isinstance(arg, (tuple, list)) or position >= len(arg):
            return None
        arg = arg[position]
    return arg


def slots(node: Node, operand: Node) -> list[Path]:
    """Every path to an operand in a node's args; empty for one that only a keyword reads."""

    def inside(arg: object, path: Path) -> Iterator[Path]:
        if arg is operand:
            yield path
        if isinstance(arg, (tuple, list)):
            for position, item in enumerate(arg):
                yield from inside(item, (*path, position))

    paths = list(inside(tuple(node.args), ()))
    if operand in node.kwargs.values():
        paths.append((-1,))
    return paths


def _linear(node: Node) -> Iterator[FxOperand]:
    is_matrix = len(shape_of(pick(node, (1,))) or ()) == 2
    refusal = "" if is_matrix else VECTOR
    yield FxOperand((1,), (0,), einsum.linear(), {}, refusal)


def _product(node: Node, at: int) -> Iterator[FxOperand]:
    """A product of the operands at `at` and behind it; before them stands what it is added to."""
    left = shape_of(pick(node, (at,)))
    right = shape_of(pick(node, (at + 1,)))
    if left is None or right is None:
        return
    gain = float(argument(node, "alpha", 1))
    kind, refusal = product(left, right, left=False)
    yield FxOperand((at + 1,), (at,), kind, {}, refusal, gain=gain)
    kind, refusal = product(right, left, left=True)
    yield FxOperand((at,), (at + 1,), kind, {}, refusal, gain=gain)


_matmul = partial(_product, at=0)
_addmm = partial(_product, at=1)


def _einsum(node: Node) -> Iterator[FxOperand]:
    equation = str(node.args[0]).replace(" ", "")
    operands = node.args[1]
    if not isinstance(operands, (tuple, list)):
        return
    terms = letters(equation, [n_axes(operand) for operand in operands])
    yield from _contracted(node, terms, [(1, position) for position in range(len(operands))])


def _addbmm(node: Node) -> Iterator[FxOperand]:
    return _contracted(node, ["bni", "bio", "no"], [(1,), (2,)])


def _inner(node: Node) -> Iterator[FxOperand]:
    left, right = (n_axes(operand) for operand in node.args)
    if left and right:
        yield from _contracted(node, _dotted(left, right, [-1], [-1]), [(0,), (1,)])


def _tensordot(node: Node) -> Iterator[FxOperand]:
    left, right = (n_axes(operand) for operand in node.args[:2])
    terms = _dotted(left, right, argument(node, "dims_self"), argument(node, "dims_other"))
    yield from _contracted(node, terms, [(0,), (1,)])


def n_axes(operand: object) -> int:
    """The number of axes of an operand; 0 if it is not a tensor."""
    return len(shape_of(operand) or ())


def _dotted(
    left_axes: int, right_axes: int, left_dims: Sequence[int], right_dims: Sequence[int]
) -> list[str]:
    """The terms of a sum over pairs of axes of two operands; the other axes stand in order.

    Args:
        left_axes: How many axes the left operand has.
        right_axes: How many the right one has.
        left_dims: The axes of the left operand that are summed over.
        right_dims: The axes of the right operand that they meet.
    """
    left = list(LETTERS[:left_axes])
    right = list(LETTERS[left_axes : left_axes + right_axes])
    for left_dim, right_dim in zip(left_dims, right_dims, strict=True):
        right[right_dim] = left[left_dim]
    summed = set(left) & set(right)
    result = [letter for letter in left + right if letter not in summed]
    return ["".join(left), "".join(right), "".join(result)]


def _contracted(node: Node, terms: list[str], paths: Sequence[Path]) -> Iterator[FxOperand]:
    """The operands of a contraction, each of which may be the weight."""
    gain = float(argument(node, "alpha", 1))
    for position, path in enumerate(paths):
        kind, refusal = contraction(terms, position)
        activation = next((other for other in paths if other != path), path)
        yield FxOperand(path, activation, kind, {}, refusal, gain=gain)


def _conv(node: Node) -> Iterator[FxOperand]:
    groups = int(argument(node, "groups", 1))
    w = shape_of(pick(node, (1,)))
    names = ["stride", "padding", "dilation"]
    kind: Kind
    if "transpose" in op_name(node):
        names.append("output_padding")
        kind = convolution.ConvTranspose(groups)
        depthwise = groups > 1 and w is not None and w[0] == groups
    else:
        kind = convolution.Conv(groups)
        depthwise = groups > 1 and w is not None and w[1] == 1

    attrs = {}
    for name in names:
        setting = argument(node, name)
        attrs[name] = setting if isinstance(setting, str) else tuple(setting)
    refusal = convolution.DEPTHWISE if depthwise else ""
    yield FxOperand((1,), (0,), kind, attrs, refusal, allowed=depthwise)


def _embedding(node: Node) -> Iterator[FxOperand]:
    yield FxOperand((0,), (1,), kinds.Embedding())


def _embedding_bag(node: Node) -> Iterator[FxOperand]:
    mode = ("sum", "mean", "max")[int(argument(node, "mode", 0))]
    yield FxOperand((0,), (1,), kinds.EmbeddingBag(mode))


def _bilinear(node: Node) -> Iterator[FxOperand]:
    yield FxOperand((2,), (0,), kinds.WeightForm("bilinear", Axes((), (0,), (1, 2))))


def _grouped(node: Node) -> Iterator[FxOperand]:
    x = pick(node, (0,))
    if n_axes(x) != 2 or n_axes(pick(node, (1,))) != 3:
        return  # two ragged activations, or a ragged inner axis: no weight
    # torch's kernel wants rows of whole 16 bytes; the fallback of transformers takes any
    rank_multiple = 1
    if op_name(node) != "grouped_mm_fallback":
        rank_multiple = 16 // value(x).dtype.itemsize
    yield FxOperand((1,), (0,), kinds.Grouped(), {"rank_multiple": rank_multiple})


def _recurrent(node: Node) -> Iterator[FxOperand]:
    """The matrices among the parameters of an LSTM, GRU or RNN, and of their cells."""
    slots_of_op = node.target._schema.arguments  # type: ignore[union-attr]
    for position, (slot, arg) in enumerate(zip(slots_of_op, node.args, strict=False)):
        if slot.name in ("w_ih", "w_hh"):
            yield FxOperand((position,), (0,), kinds.RECURRENT)
        elif slot.name == "params":
            for index, parameter in enumerate(arg):  # type: ignore[arg-type]
                if n_axes(parameter) == 2:
                    yield FxOperand((position, index), (0,), kinds.RECURRENT)


MULTIPLYING = ("matmul", "mm", "bmm", "mv")
ADDING = ("addmm", "baddbmm", "addmv")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _table() -> dict[object, FxOp]:
    rows: dict[object, FxOp] = {
        aten.linear.default: FxOp("linear", _linear, bias=2),
        **{getattr(aten, name).default: FxOp(name, _matmul) for name in MULTIPLYING},
        **{getattr(aten, name).default: FxOp(name, _addmm, bias=0) for name in ADDING},
        aten.addbmm.default: FxOp("addbmm", _addbmm, bias=0),
        aten.einsum.default: FxOp("einsum", _einsum, many=True),
        aten.inner.default: FxOp("inner", _inner),
        aten.tensordot.default: FxOp("tensordot", _tensordot),
        aten.embedding.default: FxOp("embedding", _embedding),
        aten.bilinear.default: FxOp("bilinear", _bilinear, bias=3),
        aten._grouped_mm.default: FxOp("grouped_mm", _grouped),
        **overloads(FxOp("embedding_bag", _embedding_bag, first=True), "embedding_bag"),
    }
    for dimensions in (1, 2, 3):
        for name in (f"conv{dimensions}d", f"conv_transpose{dimensions}d"):
            rows |= overloads(FxOp(name, _conv, bias=2), name)
    for net in RECURRENT:
        for name in (net, f"{net}_cell"):
            rows |= overloads(FxOp(name, _recurrent, many=True), name)
    return rows


OPS = _table()
PRODUCTS = aten_ops("matmul mm bmm")
"""Bare products. One of a constant and one parameter is a computed weight."""
COMPUTING = aten_ops("mv inner tensordot addmv addbmm")
"""Products that without an activation are a step of a computed weight, as in spectral_norm."""
DATA_OPS = {aten.scaled_dot_product_attention.default}
"""Matmuls that no row adapts, counted as FLOPs between activations."""
BY_NAME = {
    "transformers::grouped_mm_fallback": FxOp("grouped_mm", _grouped),
    "lora_fx::linear_in": FxOp("linear", _linear, bias=2),
}
"""Ops of libraries that need not be there: not installed, or not imported."""


def row_of(node: Node) -> FxOp | None:
    """The row of a node's op; None where the table has none."""
    if node.op != "call_function":
        return None
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return OPS.get(node.target) or BY_NAME.get(name)
