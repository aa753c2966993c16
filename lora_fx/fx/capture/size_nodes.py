"""Nodes of a graph that compare sizes: read as conditions, written, and erased."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lora_fx.conditions import BINARY, Condition, Size
from lora_fx.fx.capture.guards import DEMAND, LAYOUT, Guard, GuardLog
from lora_fx.fx.graph.nodes import argument, shape_of, value
from lora_fx.fx.symbolic_sizes import canonical

aten = torch.ops.aten


def asserted_expression(node: fx.Node) -> str:
    """The expression in the message of an assert."""
    text = str(node.args[1]) if len(node.args) > 1 else ""
    return text.partition("for expression ")[2].rpartition(" on node ")[0]


_SPELLED: dict[object, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//",
    operator.mod: "%", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.eq: "==", operator.ne: "!=", operator.or_: "or", operator.and_: "and",
}  # fmt: skip
_CALLED = {torch.sym_max: "max", torch.sym_min: "min"}
_DECIDES = {*_SPELLED, *_CALLED} - {operator.add, operator.sub, operator.mul}
_NEGATED = {
    "<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "==", "or": "and", "and": "or"
}  # fmt: skip


def condition_of(test: Any, names: Mapping[fx.Node, str], guard: Guard) -> Condition | None:
    """The comparison that an assert's node computes; None where it is not one of sizes."""
    sizes: dict[Size, str] = {}
    try:
        text = _spell(test, names, sizes)[1:-1]
    except (KeyError, AttributeError):
        return None
    if not sizes or len(text) > 4000:
        return None
    rows = tuple((short, name, d) for (name, d), short in sizes.items())
    return Condition(text, rows, guard.line, guard.kind == DEMAND)


def _spell(
    node: Any, names: Mapping[fx.Node, str], sizes: dict[Size, str], negated: bool = False
) -> str:
    """A comparison, or an expression of sizes, as text.

    Raises:
        KeyError: It is made of anything else; so does AttributeError.
    """
    if type(node) is int:
        return str(node)
    if node.target is aten.sym_size.int:
        place, d = node.args
        return sizes.setdefault((names[place], int(d)), f"s{len(sizes)}")
    if node.target is torch.sym_not:
        return _spell(node.args[0], names, sizes, not negated)
    if node.target in _CALLED:
        return f"{_CALLED[node.target]}({', '.join(_spell(a, names, sizes) for a in node.args)})"
    sign = _SPELLED[node.target]
    inner = negated and sign in ("or", "and")
    left, right = (_spell(a, names, sizes, inner) for a in node.args)
    return f"({left} {_NEGATED[sign] if negated else sign} {right})"


def put_asserts(
    graph: fx.Graph, places: Mapping[str, fx.Node], conditions: Sequence[Condition]
) -> None:
    """Write conditions on sizes into a graph, where an export and torch's own loader see them."""
    with graph.inserting_before(list(places.values())[-1].next):
        for c in conditions:
            if all(n in places for _, n, _ in c.sizes):
                sizes = {
                    s: graph.call_function(aten.sym_size.int, (places[n], d)) for s, n, d in c.sizes
                }
                test = c.build(lambda op, xs: graph.call_function(_OPERATORS[op], tuple(xs)), sizes)
                graph.call_function(aten._assert_scalar.default, (test, f"{c}"))


def drop_layout(
    graph: fx.Graph,
    log: GuardLog,
    shapes: Mapping[str, Sequence[Any]],
    conditions: Sequence[Condition],
) -> None:
    """Erase asserts that only a kernel's question about strides left, while a graph was exported.

    What mattered of those of the capture is among its conditions, whose asserts stay: torch has
    some of them in words of its own.

    Args:
        graph: That of the program.
        log: What was written down while it was made.
        shapes: The sizes of its inputs by name, as the program has them.
        conditions: What was written into it.
    """
    own = set[str]()
    for c in conditions:
        sizes = {s: shapes[n][d] for s, n, d in c.sizes if n in shapes}
        if len(sizes) == len(c.sizes):
            own.add(_canonical(c.build(lambda op, xs: _OPERATORS[op](*xs), sizes)))
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        if (
            log.of(asserted_expression(node)).kind == LAYOUT
            and _canonical(value(node.args[0])) not in own
        ):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _canonical(test: Any) -> str:
    """A comparison of symbols as text, one for all its spellings."""
    found = test.node.expr if isinstance(test, torch.SymBool) else test
    return canonical(found)


_OPERATORS: dict[str, Any] = {**BINARY, "min": torch.sym_min, "max": torch.sym_max}


def constants_of(graph: fx.Graph) -> tuple[int, ...]:
    """Numbers that sizes are compared, cut or divided with: proofs try both sides of each."""
    found: set[int] = set()
    for node in graph.nodes:
        if node.target is aten.slice.Tensor:
            shape, d = shape_of(node.args[0]) or (), argument(node, "dim")
            sizes, numbers = shape[d : d + 1 or None], node.args[2:4]
        elif node.target in _DECIDES:
            sizes, numbers = tuple(map(value, node.args)), node.args
        else:
            continue
        if any(isinstance(n, torch.SymInt) for n in sizes):
            found |= {abs(n) for n in numbers if type(n) is int and 1 < abs(n) < 1 << 31}
    return tuple(sorted(found))
