"""Values of index arithmetic as formulas of their coordinates, for every size at once.

A mask that a model computes from aranges is a formula of where in it one looks (formulas.py). Two
values with one formula are equal at all sizes. What depends on data, is changed in place, or is
computed by an op without a rule here, has no formula.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from lora_fx.fx.formulas import (
    LOWEST,
    Affine,
    Formula,
    Where,
    causal,
    constant,
    coordinate,
    negated,
    where,
)
from lora_fx.fx.graph.nodes import argument, op_name, shape_of, value

aten = torch.ops.aten
INTEGERS = (torch.int64, torch.int32)


class Formulas:
    """Formulas of a graph's nodes, each worked out when it is asked for.

    Args:
        written: Nodes that some op changes in place: they have none.
    """

    def __init__(self, written: Collection[fx.Node]) -> None:
        self._written = written
        self._known: dict[fx.Node, Formula | None] = {}

    def of(self, node: Any) -> Formula | None:
        """The formula of a node's tensor, or of a number; None where there is none.

        A coordinate along an axis of size 1 is 0, whatever the value is broadcast to.
        """
        if isinstance(node, bool):
            return constant(node)
        if isinstance(node, (int, float)):
            return Affine(node)
        if not isinstance(node, fx.Node) or node.op != "call_function" or node in self._written:
            return None
        if node not in self._known:
            rule, shape = RULES.get(node.target), shape_of(node)
            formula = None if rule is None or shape is None else rule(self, node)
            if formula is not None and shape is not None:
                long = {-1 - n for n, size in enumerate(reversed(shape)) if str(size) != "1"}
                formula = formula.at({axis: coordinate(axis) for axis in long})
            self._known[node] = formula
        return self._known[node]


def _rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())


def _same(f: Formulas, node: fx.Node) -> Formula | None:
    """Expand: an axis is what it was, or was of size 1."""
    source = shape_of(node.args[0]) or ()
    for old, new in zip(reversed(source), reversed(shape_of(node) or ()), strict=False):
        if str(old) not in ("1", str(new)):
            return None
    return f.of(node.args[0])


def _renamed(f: Formulas, node: fx.Node, names: dict[int, int]) -> Formula | None:
    formula = f.of(node.args[0])
    return None if formula is None else formula.at({a: coordinate(b) for a, b in names.items()})


def _unsqueeze(f: Formulas, node: fx.Node) -> Formula | None:
    rank = _rank(node)
    new = int(argument(node, "dim")) % rank - rank
    return _renamed(f, node, {a: a if a > new else a - 1 for a in range(-rank + 1, 0)})


def _transpose(f: Formulas, node: fx.Node) -> Formula | None:
    rank = _rank(node)
    one, two = (int(argument(node, d)) % rank - rank for d in ("dim0", "dim1"))
    return _renamed(f, node, {a: {one: two, two: one}.get(a, a) for a in range(-rank, 0)})


def _slice(f: Formulas, node: fx.Node) -> Formula | None:
    start, rank = argument(node, "start") or 0, _rank(node)
    formula = f.of(node.args[0])
    if formula is None or argument(node, "step") != 1 or not isinstance(start, int) or start < 0:
        return None
    axis = int(argument(node, "dim")) % rank - rank
    places = {a: coordinate(a, start if a == axis else 0) for a in range(-rank, 0)}
    return formula.at(places)


def _index(f: Formulas, node: fx.Node) -> Formula | None:
    """x[i₁, i₂ …] with an index for every axis; a negative one would count from the end."""
    formula, given = f.of(node.args[0]), node.args[1]
    rank = len(shape_of(node.args[0]) or ())
    if formula is None or not isinstance(given, (list, tuple)) or len(given) != rank:
        return None
    places = {}
    for axis, i in zip(range(-rank, 0), given, strict=True):
        place = f.of(i)
        if not isinstance(place, Affine) or place.c < 0 or any(n < 0 for _, n in place.k):
            return None
        places[axis] = place
    return formula.at(places)


def _cast(f: Formulas, node: fx.Node) -> Formula | None:
    """Casts that keep the numbers: a coordinate in a narrow float would be rounded."""
    formula, dtype = f.of(node.args[0]), value(node).dtype
    if isinstance(formula, Where):
        if formula.form == "open":
            return formula if dtype.is_floating_point else None
        return formula.as_("bool" if dtype == torch.bool else "ones")
    if formula is None or dtype == torch.bool:
        return None if formula is None or formula.k else constant(formula.c != 0)
    if dtype in INTEGERS:
        return formula if _whole(formula) else None
    return None if formula.k else formula


def _whole(formula: Affine) -> bool:
    return all(float(n).is_integer() for n in (formula.c, *(n for _, n in formula.k)))


def _arange(f: Formulas, node: fx.Node) -> Formula | None:
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    if not isinstance(start, int) or not isinstance(step, int) or value(node).dtype not in INTEGERS:
        return None
    return coordinate(-1, start, step)


def _filled(f: Formulas, node: fx.Node) -> Formula | None:
    name = op_name(node)
    fill = 1 if "ones" in name else 0 if "zeros" in name else argument(node, "fill_value")
    if not isinstance(fill, (bool, int, float)):
        return None
    return constant(bool(fill)) if value(node).dtype == torch.bool else Affine(float(fill))


def _sum(f: Formulas, node: fx.Node) -> Formula | None:
    first, second = f.of(node.args[0]), f.of(node.args[1])
    if not isinstance(first, Affine) or not isinstance(second, Affine):
        return None
    if argument(node, "alpha", 1) != 1:
        return None
    return first.plus(second, -1 if op_name(node) == "sub" else 1)


def _compare(f: Formulas, node: fx.Node) -> Formula | None:
    first, second, op = f.of(node.args[0]), f.of(node.args[1]), op_name(node)
    if isinstance(first, Where) and first.form == "ones" and second in (Affine(0), Affine(1)):
        truth = first.as_("bool")
        if op not in ("eq", "ne"):
            return None
        return truth if (op == "eq") == (second == Affine(1)) else negated(truth)
    if not isinstance(first, Affine) or not isinstance(second, Affine):
        return None
    gap = first.plus(second, -1)
    if not _whole(gap):
        return None
    if op in ("eq", "ne"):
        return None if gap.k else constant((gap.c == 0) == (op == "eq"))
    gap = gap if op in ("le", "lt") else Affine(0).plus(gap, -1)
    return where({gap if op in ("le", "ge") else gap.plus(Affine(1))})  # a < b is a + 1 ≤ b


def _not(f: Formulas, node: fx.Node) -> Formula | None:
    formula = f.of(node.args[0])
    return negated(formula) if isinstance(formula, Where) and formula.form == "bool" else None


def _and(f: Formulas, node: fx.Node) -> Formula | None:
    both = [f.of(a) for a in node.args[:2]]
    truths = [t for t in both if isinstance(t, Where) and t.form == "bool"]
    if len(truths) < 2:
        return None
    return where(truths[0].every | truths[1].every, any(t.never for t in truths))


def _triangle(f: Formulas, node: fx.Node) -> Formula | None:
    """Tril or triu of a constant; the rest becomes 0 or False."""
    formula, diagonal = f.of(node.args[0]), argument(node, "diagonal", 0)
    if not isinstance(diagonal, int) or _rank(node) < 2:
        return None
    lower = op_name(node) == "tril"
    one = causal(diagonal if lower else diagonal - 1)
    other = negated(one)
    keep, zeros = (one, other) if lower else (other, one)
    if keep is None or zeros is None:
        return None
    if isinstance(formula, Where):
        return keep if formula == constant(True) else None
    if formula == Affine(1):
        return keep.as_("ones")
    if isinstance(formula, Affine) and not formula.k and formula.c <= LOWEST:
        return zeros.as_("open")
    return None


def _choice(f: Formulas, node: fx.Node) -> Formula | None:
    """where(c, 0, −∞), where(c, −∞, 0) and zeros.masked_fill(c, −∞)."""
    parts = [f.of(a) for a in node.args[:3]]
    if len(parts) < 3:
        return None
    if op_name(node) == "masked_fill":
        parts = [parts[1], parts[2], parts[0]]
    truth, one, other = parts
    if not isinstance(truth, Where) or truth.form != "bool":
        return None
    if not isinstance(one, Affine) or not isinstance(other, Affine) or one.k or other.k:
        return None
    if one.c == 0 and other.c <= LOWEST:
        return truth.as_("open")
    opposite = negated(truth)
    if other.c == 0 and one.c <= LOWEST and opposite is not None:
        return opposite.as_("open")
    return None


def _steps(f: Formulas, node: fx.Node) -> Formula | None:
    """Diff along an axis of an affine number; what is put before it must go on with it."""
    formula, before, rank = f.of(node.args[0]), argument(node, "prepend"), _rank(node)
    axis = int(argument(node, "dim", -1)) % rank - rank
    if not isinstance(formula, Affine) or argument(node, "n", 1) != 1:
        return None
    if argument(node, "append") is not None:
        return None
    step = Affine(dict(formula.k).get(axis, 0))
    if before is not None:
        start = f.of(before)
        first = formula.at({a: coordinate(a) for a in range(-rank, 0) if a != axis})
        if str((shape_of(before) or ("",) * rank)[axis]) != "1" or not isinstance(start, Affine):
            return None
        if first.plus(start, -1) != step:
            return None
    return step


def _running(f: Formulas, node: fx.Node) -> Formula | None:
    """A cumulative sum of zeros."""
    return Affine(0) if f.of(node.args[0]) in (Affine(0), constant(False)) else None


def _rows(rule: Any, *names: str) -> dict[Any, Any]:
    """Every overload of these ops."""
    packets = [getattr(aten, name) for name in names]
    return {getattr(p, o): rule for p in packets for o in p.overloads()}


RULES: dict[Any, Any] = {
    **_rows(_arange, "arange"),
    **_rows(_filled, "ones", "zeros", "full", "new_ones", "new_zeros", "new_full"),
    **_rows(_sum, "add", "sub"),
    **_rows(_compare, "le", "lt", "ge", "gt", "eq", "ne"),
    **_rows(_and, "bitwise_and", "logical_and", "__and__"),
    **_rows(_not, "bitwise_not", "logical_not"),
    **_rows(_triangle, "tril", "triu"),
    **_rows(_choice, "where", "masked_fill"),
    **_rows(_cast, "to", "_to_copy"),
    **_rows(_same, "expand", "alias", "clone"),
    **_rows(_unsqueeze, "unsqueeze"),
    aten.transpose.int: _transpose,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.diff.default: _steps,
    aten.cumsum.default: _running,
}
