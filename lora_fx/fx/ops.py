"""The op table of ATen's training IR: which ops multiply by a weight.

A row says where an op's weight and activation operands are and what Kind their shapes make.
Adding an op is one row here and one row in tests/table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from lora_fx import kinds
from lora_fx.fx.nodes import Shape, argument, shape_of
from lora_fx.kinds import Kind

aten = torch.ops.aten
Path = tuple[int, ...]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Use:
    """One weight operand of one node: paths into its args, the Kind, and what `like` keeps."""

    weight: Path
    x: Path
    kind: Kind
    attrs: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""


@dataclass(frozen=True)
class Row:
    """op: public name. uses: every way in which a node of this op may read a weight."""

    op: str
    uses: Callable[[Node], Iterator[Use]]
    bias: int | None = None


def pick(node: Node, path: Path) -> Any:
    """The argument at a path into node.args."""
    arg: Any = node.args
    for i in path:
        arg = arg[i] if isinstance(arg, (tuple, list)) and i < len(arg) else None
    return arg


# --- the rows ------------------------------------------------------------------------------------


def _linear(node: Node) -> Iterator[Use]:
    flat = len(shape_of(pick(node, (1,))) or ()) != 2
    yield Use((1,), (0,), kinds.linear(), {}, "the weight has one dimension" if flat else "")


def _matmul(node: Node) -> Iterator[Use]:
    first, second = shape_of(pick(node, (0,))), shape_of(pick(node, (1,)))
    if first is not None and second is not None:
        yield Use((1,), (0,), *_product(first, second, left=False))
        yield Use((0,), (1,), *_product(second, first, left=True))


def _addmm(node: Node) -> Iterator[Use]:
    first, second = shape_of(pick(node, (1,))), shape_of(pick(node, (2,)))
    if first is None or second is None:
        return
    alpha = argument(node, "alpha", 1)
    why = f"alpha = {alpha} scales the product" if alpha != 1 else ""
    yield Use((2,), (1,), *_product(first, second, left=False)[:2], why)
    yield Use((1,), (2,), *_product(second, first, left=True)[:2], why)


def _product(x: Shape, w: Shape, *, left: bool) -> tuple[Kind, Mapping[str, Any], str]:
    """The Kind of x @ w (or w @ x) from the two shapes; why it is refused, or an empty text."""
    none: Mapping[str, Any] = {}
    if len(w) < 2:
        return kinds.matmul_right(), none, "the weight has one dimension"
    lead = w[:-2]
    if not lead:
        kind = kinds.matmul_left(vector=len(x) == 1) if left else kinds.matmul_right()
        return kind, none, ""
    batch = LETTERS[: len(lead)]
    # i, o and n name the matrix axes; LETTERS[:len] reaches i only past eight batch axes
    kind = kinds.matmul_left(batch) if left else kinds.matmul_right(batch)
    inner = tuple(x[-2 - len(lead) : -2])
    fits = len(x) >= len(w) and all(
        isinstance(n, int) and n == m for n, m in zip(inner, lead, strict=True)
    )
    return kind, none, "" if fits else "the weight's leading dimensions are broadcast"


def _einsum(node: Node) -> Iterator[Use]:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (tuple, list)):
        return
    for i in range(len(operands)):
        others = [j for j in range(len(operands)) if j != i]
        if len(others) != 1:
            why = "einsum of one operand" if not others else "einsum of more than two operands"
            yield Use((1, i), (1, others[0] if others else i), kinds.linear(), {}, why)
            continue
        ranks = [len(shape_of(o) or ()) for o in operands]
        terms = letters(equation, ranks)
        x, w, y = terms[others[0]], terms[i], terms[-1]
        why = ""
        if len(set(w)) < len(w) or len(set(x)) < len(x):
            why = "a letter stands twice in one operand"
        elif any(c not in x and c not in y for c in w):
            why = "sums an axis that only the weight has"
        elif all(c in x for c in w) or all(c not in x or c in y for c in w):
            why = "no contraction: nothing of low rank"
        yield Use((1, i), (1, others[0]), kinds.Einsum(x, w, y), {}, why)


def letters(equation: str, ranks: list[int]) -> list[str]:
    """The operands' and the result's letters, with the ellipsis spelled out."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    free = [c for c in LETTERS if c not in equation]
    longest = max(
        (n - len(t.replace("...", "")) for t, n in zip(terms, ranks, strict=True) if "..." in t),
        default=0,
    )
    dots = "".join(free[:longest])
    spelled = []
    for t, n in zip(terms, ranks, strict=True):
        width = n - len(t.replace("...", ""))
        spelled.append(t.replace("...", dots[longest - width :]))
    if arrow:
        result = right.replace("...", dots)
    else:
        every = "".join(terms).replace(".", "")
        result = dots + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    return [*spelled, result]


def _conv(node: Node) -> Iterator[Use]:
    groups = int(argument(node, "groups", 1))
    w = shape_of(pick(node, (1,)))
    names = ("stride", "padding", "dilation")
    attrs = {k: argument(node, k) for k in names}
    attrs = {k: v if isinstance(v, str) else tuple(v) for k, v in attrs.items()}
    depthwise = w is not None and groups > 1 and w[1] == 1
    why = "depthwise: one channel a group leaves nothing of low rank" if depthwise else ""
    yield Use((1,), (0,), kinds.Conv(groups), attrs, why)


def _embedding(node: Node) -> Iterator[Use]:
    yield Use((0,), (1,), kinds.Embedding())


def _lstm(node: Node) -> Iterator[Use]:
    weights = node.args[2]
    if isinstance(weights, (tuple, list)):
        for i, w in enumerate(weights):
            if len(shape_of(w) or ()) == 2:
                yield Use((2, i), (0,), kinds.Recurrent())


OPS: Mapping[Any, Row] = {
    aten.linear.default: Row("linear", _linear, bias=2),
    aten.matmul.default: Row("matmul", _matmul),
    aten.mm.default: Row("mm", _matmul),
    aten.bmm.default: Row("bmm", _matmul),
    aten.addmm.default: Row("addmm", _addmm, bias=0),
    aten.einsum.default: Row("einsum", _einsum),
    aten.conv1d.default: Row("conv1d", _conv, bias=2),
    aten.conv2d.default: Row("conv2d", _conv, bias=2),
    aten.conv3d.default: Row("conv3d", _conv, bias=2),
    aten.conv1d.padding: Row("conv1d", _conv, bias=2),
    aten.conv2d.padding: Row("conv2d", _conv, bias=2),
    aten.conv3d.padding: Row("conv3d", _conv, bias=2),
    aten.embedding.default: Row("embedding", _embedding),
    aten.lstm.input: Row("lstm", _lstm),
}
DATA_OPS = {aten.scaled_dot_product_attention.default, aten.baddbmm.default}
"""Matmuls that no row adapts, counted as FLOPs between activations."""
