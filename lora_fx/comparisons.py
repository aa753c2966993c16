"""Comparisons of whole-number arithmetic over named sizes, read from texts.

The parser knows numbers, names, + - * // %, min, max, comparisons, `and` and `or`. It runs nothing.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar, cast

from lora_fx.errors import LoraFxError

V = TypeVar("V")
Tree = tuple["str | Tree | int", ...]
"""A comparison, or a part of one: (operation, operand, …), with names and numbers for leaves."""
SEARCHED = 4096
"""The largest size that the range of a comparison is looked for at."""
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
    """What a node of Python's syntax says.

    Raises:
        ValueError: Something that no comparison has.
    """
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
        case ast.Call(ast.Name(name), [_, *_] as arguments, []) if name in _CALLS:
            return (name, *(_tree(argument) for argument in arguments))
    raise ValueError(ast.dump(node))


def leaves_of(tree: str | Tree | int) -> Iterator[str | int]:
    """The names and numbers of a comparison."""
    if not isinstance(tree, tuple):
        yield tree
        return
    for operand in tree[1:]:
        yield from leaves_of(operand)


def built(
    tree: str | Tree | int, make: Callable[[str, Sequence[V]], V], sizes: Mapping[str, V]
) -> V:
    """A comparison in another form, made from its leaves up; see `Condition.build`."""
    if isinstance(tree, tuple):
        operands = [built(operand, make, sizes) for operand in tree[1:]]
        return make(str(tree[0]), operands)
    if isinstance(tree, str):
        return sizes[tree]
    return cast("V", tree)


def result_of(operation: str, values: Sequence[int]) -> int:
    """The number that an operation comes to; a division by 0 comes to 0."""
    if operation in _CALLS:
        return _CALLS[operation](values)
    if operation in ("FloorDiv", "Mod") and values[1] == 0:
        return 0
    return BINARY[operation](*values)


@lru_cache(4096)
def bounds_of(text: str) -> tuple[int | None, int | None]:
    """The (least, largest) number at which a comparison of one size holds.

    Both are None where it holds elsewhere than in one range. A comparison with a number tells its
    bounds by its form. Any other is tried at every size up to SEARCHED, and a bound that lies at an
    end of these is None.
    """
    tree = parsed(text)
    if len(tree) == 3 and isinstance(tree[1], str) and isinstance(tree[2], int):
        return _bounds_by_number(str(tree[0]), tree[2])

    (name,) = {leaf for leaf in leaves_of(tree) if isinstance(leaf, str)}
    holding = [size for size in range(1, SEARCHED + 1) if built(tree, result_of, {name: size})]
    if not holding:
        return None, None
    low = holding[0]
    high = holding[-1]
    if holding != list(range(low, high + 1)):
        return None, None
    return (low if low > 1 else None), (high if high < SEARCHED else None)


def _bounds_by_number(operation: str, number: int) -> tuple[int | None, int | None]:
    """The bounds of a size that is compared with a number."""
    low = {"Gt": number + 1, "GtE": number, "Eq": number}.get(operation)
    high = {"Lt": number - 1, "LtE": number, "Eq": number}.get(operation)
    return low, high
