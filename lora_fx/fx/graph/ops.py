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
    """The argument at a path into node.args; None where there is none."""
    arg: object = node.args
    for i in path:
        arg = arg[i] if isinstance(arg, (tuple, list)) and i < len(arg) else None
    return arg


def slots(node: Node, operand: Node) -> list[Path]:
    """Every path to an operand in a node's args; empty for one that only a keyword reads."""

    def inside(arg: object, path: Path) -> Iterator[Path]:
        if arg is operand:
            yield path
        for i, a in enumerate(arg if isinstance(arg, (tuple, list)) else ()):
            yield from inside(a, (*path, i))

    by_name = [(-1,)] if operand in node.kwargs.values() else []
    return [*inside(tuple(node.args), ()), *by_name]


def _linear(node: Node) -> Iterator[FxOperand]:
    flat = len(shape_of(pick(node, (1,))) or ()) != 2
    yield FxOperand((1,), (0,), einsum.linear(), {}, VECTOR if flat else "")


def _product(node: Node, at: int) -> Iterator[FxOperand]:
    """A product of the operands at `at` and behind it; before them stands what it is added to."""
    first, second = shape_of(pick(node, (at,))), shape_of(pick(node, (at + 1,)))
    if first is None or second is None:
        return
    for w, x, left in ((at + 1, at, False), (at, at + 1, True)):
        kind, why = product(*((second, first) if left else (first, second)), left=left)
        yield FxOperand((w,), (x,), kind, {}, why, gain=float(argument(node, "alpha", 1)))


_matmul = partial(_product, at=0)
_addmm = partial(_product, at=1)


def _einsum(node: Node) -> Iterator[FxOperand]:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (tuple, list)):
        return
    terms = letters(equation, [len(shape_of(o) or ()) for o in operands])
    yield from _contracted(node, terms, [(1, i) for i in range(len(operands))])


def _addbmm(node: Node) -> Iterator[FxOperand]:
    return _contracted(node, ["bni", "bio", "no"], [(1,), (2,)])


def _inner(node: Node) -> Iterator[FxOperand]:
    m, n = (len(shape_of(o) or ()) for o in node.args)
    if m and n:
        yield from _contracted(node, _dotted(m, n, [-1], [-1]), [(0,), (1,)])


def _tensordot(node: Node) -> Iterator[FxOperand]:
    m, n = (len(shape_of(o) or ()) for o in node.args[:2])
    dims = argument(node, "dims_self"), argument(node, "dims_other")
    yield from _contracted(node, _dotted(m, n, *dims), [(0,), (1,)])


def _dotted(m: int, n: int, left: Sequence[int], right: Sequence[int]) -> list[str]:
    """The terms of a sum over pairs of axes of two operands; the other axes stand in order."""
    a, b = list(LETTERS[:m]), list(LETTERS[m : m + n])
    for i, j in zip(left, right, strict=True):
        b[j] = a[i]
    return ["".join(a), "".join(b), "".join(c for c in a + b if not (c in a and c in b))]


def _contracted(node: Node, terms: list[str], paths: Sequence[Path]) -> Iterator[FxOperand]:
    """The operands of a contraction, each of which may be the weight."""
    for i, path in enumerate(paths):
        kind, why = contraction(terms, i)
        other = next((p for p in paths if p != path), path)
        yield FxOperand(path, other, kind, {}, why, gain=float(argument(node, "alpha", 1)))


def _conv(node: Node) -> Iterator[FxOperand]:
    groups, w = int(argument(node, "groups", 1)), shape_of(pick(node, (1,)))
    names, turned = ["stride", "padding", "dilation"], "transpose" in op_name(node)
    names += ["output_padding"] if turned else []
    given = {k: argument(node, k) for k in names}
    attrs = {k: v if isinstance(v, str) else tuple(v) for k, v in given.items()}
    lone = w is not None and groups > 1 and (w[0] == groups if turned else w[1] == 1)
    kind = convolution.ConvTranspose(groups) if turned else convolution.Conv(groups)
    yield FxOperand((1,), (0,), kind, attrs, convolution.DEPTHWISE if lone else "", allowed=lone)


def _embedding(node: Node) -> Iterator[FxOperand]:
    yield FxOperand((0,), (1,), kinds.Embedding())


def _embedding_bag(node: Node) -> Iterator[FxOperand]:
    mode = ("sum", "mean", "max")[int(argument(node, "mode", 0))]
    yield FxOperand((0,), (1,), kinds.EmbeddingBag(mode))


def _bilinear(node: Node) -> Iterator[FxOperand]:
    yield FxOperand((2,), (0,), kinds.WeightForm("bilinear", Axes((), (0,), (1, 2))))


def _grouped(node: Node) -> Iterator[FxOperand]:
    x, w = shape_of(pick(node, (0,))), shape_of(pick(node, (1,)))
    if x is None or w is None or len(x) != 2 or len(w) != 3:
        return  # two ragged activations, or a ragged inner axis: no weight
    # torch's kernel wants rows of whole 16 bytes; the fallback of transformers takes any
    width = value(pick(node, (0,))).dtype.itemsize
    aligned = 1 if op_name(node) == "grouped_mm_fallback" else 16 // width
    yield FxOperand((1,), (0,), kinds.Grouped(), {"rank_multiple": aligned})


def _recurrent(node: Node) -> Iterator[FxOperand]:
    """The matrices among the parameters of an LSTM, GRU or RNN, and of their cells."""
    for i, slot in enumerate(node.target._schema.arguments[: len(node.args)]):  # type: ignore[union-attr]
        if slot.name in ("w_ih", "w_hh"):
            yield FxOperand((i,), (0,), kinds.RECURRENT)
        elif slot.name == "params":
            for j, w in enumerate(node.args[i]):  # type: ignore[arg-type]
                if len(shape_of(w) or ()) == 2:
                    yield FxOperand((i, j), (0,), kinds.RECURRENT)


ADDING = ("addmm", "baddbmm", "addmv")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _table() -> dict[object, FxOp]:
    rows: dict[object, FxOp] = {
        aten.linear.default: FxOp("linear", _linear, bias=2),
        **{getattr(aten, n).default: FxOp(n, _matmul) for n in ("matmul", "mm", "bmm", "mv")},
        **{getattr(aten, n).default: FxOp(n, _addmm, bias=0) for n in ADDING},
        aten.addbmm.default: FxOp("addbmm", _addbmm, bias=0),
        aten.einsum.default: FxOp("einsum", _einsum, many=True),
        aten.inner.default: FxOp("inner", _inner),
        aten.tensordot.default: FxOp("tensordot", _tensordot),
        aten.embedding.default: FxOp("embedding", _embedding),
        aten.bilinear.default: FxOp("bilinear", _bilinear, bias=3),
        aten._grouped_mm.default: FxOp("grouped_mm", _grouped),
        **overloads(FxOp("embedding_bag", _embedding_bag, first=True), "embedding_bag"),
    }
    for name in (f"{conv}{n}d" for conv in ("conv", "conv_transpose") for n in (1, 2, 3)):
        rows |= overloads(FxOp(name, _conv, bias=2), name)
    for name in (f"{net}{cell}" for net in RECURRENT for cell in ("", "_cell")):
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
