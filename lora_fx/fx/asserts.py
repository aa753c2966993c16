"""What a capture assumed about sizes: asserts become checks at the door, pinned sizes are named."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.fx.nodes import hint
from lora_fx.inputs import SIZES

aten = torch.ops.aten


@dataclass(frozen=True)
class Pinned:
    """A dimension that was asked to be dynamic and that the model fixed."""

    input: str
    dim: int
    size: int
    op: str

    def to_json(self) -> dict[str, Any]:
        """One row of `pinned[]`."""
        return {"input": self.input, "dim": self.dim, "size": self.size, "op": self.op}

    def __str__(self) -> str:
        """For tables."""
        return f"{self.input} dimension {self.dim} is fixed at {self.size} by {self.op}"


Requested = Mapping[str, Mapping[int, str]]
"""Leaf name → {dimension: symbol name}: what should be dynamic."""


def _size_of(node: Any, places: Sequence[fx.Node]) -> tuple[int, int] | None:
    """(leaf, dim) when a node is the size of an input."""
    if isinstance(node, fx.Node) and node.target is aten.sym_size.int and node.args[0] in places:
        return places.index(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    return None


def door_asserts(
    graph: fx.Graph,
    places: Sequence[fx.Node],
    sizes: list[Any],
    names: Sequence[str],
    requested: Requested,
) -> tuple[list[Pinned], Any, list[tuple[int, int]]]:
    """Turn asserts on input sizes into checks at the door; leave the rest in the graph."""
    pinned: list[Pinned] = []
    same: list[Any] = []
    lone: list[tuple[int, int]] = []
    for node in list(graph.nodes):
        if node.target is not aten._assert_scalar.default:
            continue
        test = node.args[0]
        negated = isinstance(test, fx.Node) and test.target is torch.sym_not
        if negated:
            test = test.args[0]
        if not isinstance(test, fx.Node) or len(test.args) != 2:
            continue
        left, right = (_size_of(a, places) for a in test.args)
        number = next((a for a in test.args if isinstance(a, int)), None)
        one = left or right
        if (test.target is operator.ne) != negated and test.target in (operator.eq, operator.ne):
            if not (one and number == 1):
                continue
            lone.append(one)
        elif negated:
            continue
        elif test.target is operator.eq and left and right:
            same.append((left, right))
        elif test.target is operator.eq and one and number is not None:
            leaf, dim = one
            sizes[leaf][dim] = number
            if dim in requested.get(names[leaf], {}):
                pinned.append(Pinned(names[leaf], dim, number, _line(node)))
        elif test.target in (operator.ge, operator.le) and one and number in (0, 1):
            pass
        elif _decides(test) and len(behind := _sizes_behind(test, places)) == 1:
            # an equation in one size: other solutions may exist, the example's is certain
            ((leaf, dim),) = behind
            sizes[leaf][dim] = hint(sizes[leaf][dim])
            if dim in requested.get(names[leaf], {}):
                pinned.append(Pinned(names[leaf], dim, sizes[leaf][dim], _line(node)))
        else:
            continue
        graph.erase_node(node)
    return pinned, tuple(same), lone


def _decides(test: fx.Node) -> bool:
    """True for an equation that does not hold at the sizes that the checks use."""
    expression = getattr(getattr(test.meta.get("val"), "node", None), "expr", None)
    if test.target is not operator.eq or expression is None or len(expression.free_symbols) != 1:
        return False
    (symbol,) = expression.free_symbols
    return any(expression.subs(symbol, n[1]) == False for n in SIZES)  # noqa: E712 - sympy's own


def _sizes_behind(node: fx.Node, places: Sequence[fx.Node]) -> set[tuple[int, int]]:
    """The input sizes that an expression is made of."""
    found, queue = set(), [node]
    while queue:
        n = queue.pop()
        size = _size_of(n, places)
        if size is not None:
            found.add(size)
        elif n.op == "call_function":
            queue += n.all_input_nodes
        else:
            return set()  # a value, not a size
    return found


def _line(node: fx.Node) -> str:
    """The user's source line that a node came from, else torch's."""
    text = str(node.meta.get("stack_trace") or "").splitlines()
    files = [x.strip().removeprefix("File ").replace('"', "") for x in text if "File " in x]
    theirs = [x for x in files if "/torch/" not in x]
    return next(reversed(theirs or files), "the model's arithmetic")


def who_pinned(program: Any, place: fx.Node, dim: int) -> str:
    """Where the shape environment recorded the guard that fixed a dimension."""
    mode = getattr(place.meta.get("val"), "fake_mode", None)
    env = getattr(mode, "shape_env", None)
    for guard in getattr(env, "guards", None) or []:
        stack = getattr(getattr(guard, "sloc", None), "user_stack", None)
        text = str(guard.expr)
        if stack and text.startswith("Eq(") and text.endswith(f" {place.meta['val'].shape[dim]})"):
            theirs = [f for f in stack if "/torch/" not in f.filename]
            frame = theirs[-1] if theirs else stack[-1]
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return "the model's arithmetic"


def single_sizes(program: Any, sizes: Sequence[Any]) -> dict[tuple[int, int], int]:
    """Input dimensions to which the export left one size only."""
    result = {}
    for i, shape in enumerate(sizes):
        for d, n in enumerate(shape or ()):
            if isinstance(n, torch.SymInt):
                bound = program.range_constraints.get(n.node.expr)
                if bound is not None and bound.lower == bound.upper:
                    result[i, d] = int(bound.lower)
    return result


def upper_bounds(program: Any, sizes: Sequence[Any]) -> dict[tuple[int, int], int]:
    """Upper bounds that the export found for input dimensions."""
    result = {}
    for i, shape in enumerate(sizes):
        for d, n in enumerate(shape or ()):
            if isinstance(n, torch.SymInt):
                bound = program.range_constraints.get(n.node.expr)
                try:
                    result[i, d] = int(bound.upper)
                except (AttributeError, OverflowError, TypeError, ValueError):
                    continue
    return result
