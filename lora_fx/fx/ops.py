"""The op table of ATen's training IR: which ops multiply by a weight, and what keeps one a weight.

A row of OPS says where an op's weight and activation operands are and what Kind their shapes
make. A row of VIEWS turns an op between parameter and operand into View steps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from lora_fx import kinds
from lora_fx.kinds import Kind
from lora_fx.view import Cast, Permute, Reshape, Slice, Step

aten = torch.ops.aten
Path = tuple[int, ...]
Shape = tuple[Any, ...]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def value(node: Any) -> Any:
    """The fake tensor, or tuple of them, that a node stands for."""
    return node.meta.get("val") if isinstance(node, Node) else node


def shape_of(node: Any) -> Shape | None:
    """Sizes of a node's tensor, ints or SymInts; None for anything else."""
    v = value(node)
    return tuple(v.shape) if isinstance(v, torch.Tensor) else None


def hint(size: Any) -> int:
    """A size at the example's sizes."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def numel(shape: Shape) -> int:
    """Number of elements at the example's sizes."""
    n = 1
    for size in shape:
        n *= hint(size)
    return n


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the op's schema, given by position or by keyword."""
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if a.name == name:
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, a.default_value if a.has_default_value() else default)
    return default


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
    yield Use((1,), (0,), kinds.linear())


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
        terms = _letters(equation, ranks)
        x, w, y = terms[others[0]], terms[i], terms[-1]
        why = ""
        if len(set(w)) < len(w) or len(set(x)) < len(x):
            why = "a letter stands twice in one operand"
        elif any(c not in x and c not in y for c in w):
            why = "sums an axis that only the weight has"
        yield Use((1, i), (1, others[0]), kinds.Einsum(x, w, y), {}, why)


def _letters(equation: str, ranks: list[int]) -> list[str]:
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


# --- what keeps a weight a weight ----------------------------------------------------------------


def _static(shape: Shape | None) -> tuple[int, ...] | None:
    return shape if shape is not None and all(isinstance(n, int) for n in shape) else None


def _same(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    return []


def _permute(dims: Callable[[Node, int], tuple[int, ...]]) -> Any:
    def steps(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
        n = len(shape)
        return [Permute(tuple(d % n for d in dims(node, n)))]

    return steps


def _swapped(node: Node, n: int) -> tuple[int, ...]:
    order = list(range(n))
    i, j = int(argument(node, "dim0")) % n, int(argument(node, "dim1")) % n
    order[i], order[j] = order[j], order[i]
    return tuple(order)


def _reshape(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    out = _static(shape_of(node))
    return None if out is None else [Reshape(out)]


def _expand(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    out = _static(shape_of(node))
    return [Reshape(out)] if out is not None and numel(out) == numel(shape) else None


def _cast(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    before, after = value(node.args[0]), value(node)
    return [] if before.dtype == after.dtype else [Cast(dtype_name(after.dtype))]


def _slice(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    axis = int(argument(node, "dim", 0)) % len(shape)
    n, out = shape[axis], _static(shape_of(node))
    start, step = argument(node, "start"), argument(node, "step", 1)
    start = 0 if start is None else start
    if out is None or step != 1 or not isinstance(start, int):
        return None
    start = min(max(start + n if start < 0 else start, 0), n)
    return [Slice(axis, start, start + out[axis])]


def _select(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    axis, i = int(argument(node, "dim", 0)) % len(shape), argument(node, "index")
    if not isinstance(i, int):
        return None
    i %= shape[axis]
    return [Slice(axis, i, i + 1), Reshape(shape[:axis] + shape[axis + 1 :])]


def _item(node: Node, shape: tuple[int, ...]) -> list[Step] | None:
    """getitem of split, chunk or unbind: a slice at the sum of the sizes before it."""
    parent, i = node.args
    if not isinstance(parent, Node) or not isinstance(i, int):
        return None
    axis = int(argument(parent, "dim", 0)) % len(shape)
    if parent.target is aten.unbind.int:
        i %= shape[axis]
        return [Slice(axis, i, i + 1), Reshape(shape[:axis] + shape[axis + 1 :])]
    sizes = [int(v.shape[axis]) for v in value(parent)]
    i %= len(sizes)
    start = sum(sizes[:i])
    return [Slice(axis, start, start + sizes[i])]


SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
}
_reversed = _permute(lambda node, n: tuple(range(n))[::-1])
_last_two = _permute(lambda node, n: (*range(n - 2), n - 1, n - 2))
VIEWS: Mapping[Any, Callable[[Node, tuple[int, ...]], list[Step] | None]] = {
    aten.t.default: _reversed,
    aten.numpy_T.default: _reversed,
    aten.mT.default: _last_two,
    aten.adjoint.default: _last_two,
    aten.transpose.int: _permute(_swapped),
    aten.permute.default: _permute(lambda node, n: tuple(argument(node, "dims"))),
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.narrow.default: lambda node, shape: [
        Slice(
            int(node.args[1]) % len(shape),  # type: ignore[arg-type]
            int(node.args[2]),  # type: ignore[arg-type]
            int(node.args[2]) + int(node.args[3]),  # type: ignore[arg-type]
        )
    ],
    aten.select.int: _select,
    operator.getitem: _item,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.device: _cast,
    aten.to.other: _cast,
    aten.type_as.default: _cast,
    aten._to_copy.default: _cast,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.lift_fresh_copy.default: _same,
}
