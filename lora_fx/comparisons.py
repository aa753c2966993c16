"""Comparisons of whole-number arithmetic over named sizes, read from texts."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar, cast

from lora_fx.errors import LoraFxError

V = TypeVar("V")
SEARCHED = 4096
"""The largest size that the range of a comparison is looked for at."""


Tree = tuple["str | Tree | int", ...]


BINARY: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add, "Sub": operator.sub, "Mult": operator.mul,
    "FloorDiv": operator.floordiv, "Mod": operator.mod,
    "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
    "Eq": operator.eq, "NotEq": operator.ne, "Or": operator.or_, "And": operator.and_,
}  # fmt: skip


_CALLS: dict[str, Callable[..., int]] = {"min": min, "max": max}


@lru_cache(4096)
def parsed(text: str) -> Tree:
    """The comparison as nested tuples: (op, left, right), names and numbers.

    Raises:
        LoraFxError: It is anything else than a comparison of whole-number arithmetic.
    """
    try:
        tree = _tree(ast.parse(text[:4000], mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = ()
    if not isinstance(tree, tuple) or not tree:
        raise LoraFxError(f"{text[:80]!r} is no condition on sizes", "was the file edited?")
    return tree


def _tree(node: ast.expr) -> str | Tree | int:
    match node:
        case ast.Constant(value) if type(value) is int:
            return value
        case ast.Name(name):
            return name
        case ast.UnaryOp(ast.USub(), operand):
            return ("Sub", 0, _tree(operand))
        case ast.BinOp(left, op, right) if type(op).__name__ in BINARY:
            return (type(op).__name__, _tree(left), _tree(right))
        case ast.Compare(left, [op], [right]) | ast.BoolOp(op, [left, right]):
            return (type(op).__name__, _tree(left), _tree(right))
        case ast.Call(ast.Name(name), [_, *_] as given, []) if name in _CALLS:
            return (name, *(_tree(a) for a in given))
    raise ValueError(ast.dump(node))


@lru_cache(4096)
def bounds_of(text: str) -> tuple[int | None, int | None]:
    """The bounds of one size; where the comparison's form does not tell, every size is tried."""
    tree = parsed(text)
    if len(tree) == 3 and isinstance(tree[1], str) and isinstance(n := tree[2], int):
        low = {"Gt": n + 1, "GtE": n, "Eq": n}.get(str(tree[0]))
        return low, {"Lt": n - 1, "LtE": n, "Eq": n}.get(str(tree[0]))
    (name,) = {x for x in leaves_of(tree) if isinstance(x, str)}
    true = [n for n in range(1, SEARCHED + 1) if built(tree, result_of, {name: n})]
    if not true or true != list(range(true[0], true[-1] + 1)):
        return None, None
    low, high = true[0], true[-1]
    return (low if low > 1 else None), (high if high < SEARCHED else None)


def leaves_of(tree: str | Tree | int) -> Iterator[str | int]:
    """The names and numbers of a comparison."""
    if not isinstance(tree, tuple):
        yield tree
        return
    for t in tree[1:]:
        yield from leaves_of(t)


def built(
    tree: str | Tree | int, make: Callable[[str, Sequence[V]], V], sizes: Mapping[str, V]
) -> V:
    """A comparison in another form; see `Condition.build`."""
    if isinstance(tree, tuple):
        return make(str(tree[0]), [built(t, make, sizes) for t in tree[1:]])
    return sizes[tree] if isinstance(tree, str) else cast("V", tree)


def result_of(op: str, values: Sequence[int]) -> int:
    """What an operation comes to; by 0 it is 0."""
    if op in _CALLS:
        return _CALLS[op](values)
    if op in ("FloorDiv", "Mod") and values[1] == 0:
        return 0
    return BINARY[op](*values)
