"""Nodes of a graph that compare sizes: reading them as conditions, writing and erasing them."""

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
_SIGNS: dict[object, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
    operator.or_: "or",
    operator.and_: "and",
}
_FUNCTIONS = {torch.sym_max: "max", torch.sym_min: "min"}
_DECIDES = {*_SIGNS, *_FUNCTIONS} - {operator.add, operator.sub, operator.mul}
_NEGATED = {
    "<": ">=",
    "<=": ">",
    ">": "<=",
    ">=": "<",
    "==": "!=",
    "!=": "==",
    "or": "and",
    "and": "or",
}
_OPERATORS: dict[str, Any] = {**BINARY, "min": torch.sym_min, "max": torch.sym_max}
_LONGEST_TEXT = 4000


def asserted_expression(node: fx.Node) -> str:
    """Return the expression in the message of an assert."""
    if len(node.args) < 2:
        return ""
    after_start = str(node.args[1]).partition("for expression ")[2]
    return after_start.rpartition(" on node ")[0]


def condition_of(test: Any, names: Mapping[fx.Node, str], guard: Guard) -> Condition | None:
    """Return the comparison of sizes that an assert's node computes; None for any other node.

    Args:
        test: The node.
        names: Those of the leaves, by their placeholders.
        guard: The guard that the assert came from.
    """
    symbols: dict[Size, str] = {}
    try:
        text = _spell(test, names, symbols)[1:-1]  # without the outer brackets
    except (KeyError, AttributeError):
        return None
    if not symbols or len(text) > _LONGEST_TEXT:
        return None
    sizes = tuple((symbol, name, dim) for (name, dim), symbol in symbols.items())
    return Condition(text, sizes, guard.line, guard.kind == DEMAND)


def _spell(
    node: Any, names: Mapping[fx.Node, str], symbols: dict[Size, str], negated: bool = False
) -> str:
    """Return a comparison, or an expression of sizes, as text.

    Args:
        node: The node that computes it, or a number.
        names: Those of the leaves, by their placeholders.
        symbols: (leaf name, dimension) → the symbol of its size; gets those that are met.
        negated: Spell the opposite of a comparison.

    Raises:
        KeyError: It is made of anything else; so does AttributeError.
    """
    if type(node) is int:
        return str(node)
    if node.target is aten.sym_size.int:
        place, dim = node.args
        return symbols.setdefault((names[place], int(dim)), f"s{len(symbols)}")
    if node.target is torch.sym_not:
        return _spell(node.args[0], names, symbols, not negated)
    if node.target in _FUNCTIONS:
        operands = [_spell(operand, names, symbols) for operand in node.args]
        return f"{_FUNCTIONS[node.target]}({', '.join(operands)})"

    sign = _SIGNS[node.target]
    # not (a or b) is (not a and not b)
    operands_negated = negated and sign in ("or", "and")
    left, right = (_spell(operand, names, symbols, operands_negated) for operand in node.args)
    if negated:
        sign = _NEGATED[sign]
    return f"({left} {sign} {right})"


def put_asserts(
    graph: fx.Graph, places: Mapping[str, fx.Node], conditions: Sequence[Condition]
) -> None:
    """Write conditions on sizes into a graph as asserts, for an export and torch's own loader.

    Args:
        graph: The graph; edited.
        places: Its placeholders by the names of the leaves. A condition on another is left out.
        conditions: Conditions that sizes have to satisfy.
    """

    def compute(op: str, operands: Sequence[Any]) -> fx.Node:
        return graph.call_function(_OPERATORS[op], tuple(operands))

    last_place = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_before(last_place.next):
        for condition in conditions:
            if not all(name in places for _, name, _ in condition.sizes):
                continue
            sizes: dict[str, Any] = {}
            for symbol, name, dim in condition.sizes:
                sizes[symbol] = graph.call_function(aten.sym_size.int, (places[name], dim))
            test = condition.build(compute, sizes)
            graph.call_function(aten._assert_scalar.default, (test, f"{condition}"))


def drop_layout(
    graph: fx.Graph,
    log: GuardLog,
    shapes: Mapping[str, Sequence[Any]],
    conditions: Sequence[Condition],
) -> None:
    """Erase asserts that exist only because a kernel asked about strides during an export.

    Where such a question mattered in the capture it is one of its conditions, whose asserts stay:
    torch has some of them in words of its own.

    Args:
        graph: The graph of the program; edited.
        log: The guards of its export.
        shapes: The sizes of its inputs by name, as the program has them.
        conditions: Conditions that were written into the graph.
    """

    def compute(op: str, operands: Sequence[Any]) -> Any:
        return _OPERATORS[op](*operands)

    written: set[str] = set()
    for condition in conditions:
        if all(name in shapes for _, name, _ in condition.sizes):
            sizes = {symbol: shapes[name][dim] for symbol, name, dim in condition.sizes}
            written.add(_canonical(condition.build(compute, sizes)))

    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        guard = log.of(asserted_expression(node))
        if guard.kind == LAYOUT and _canonical(value(node.args[0])) not in written:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _canonical(test: Any) -> str:
    """Return a comparison of symbols as text, the same for all its spellings."""
    if isinstance(test, torch.SymBool):
        return canonical(test.node.expr)
    return canonical(test)


def constants_of(graph: fx.Graph) -> tuple[int, ...]:
    """Return the numbers that sizes are compared, cut or divided with; proofs try both sides."""
    constants: set[int] = set()
    for node in graph.nodes:
        if node.target is aten.slice.Tensor:
            shape = shape_of(node.args[0]) or ()
            dim = argument(node, "dim")
            sizes = shape[dim : dim + 1 or None]  # of the last dimension too, which is -1
            operands = node.args[2:4]  # start and end
        elif node.target in _DECIDES:
            sizes = tuple(map(value, node.args))
            operands = node.args
        else:
            continue
        if any(isinstance(size, torch.SymInt) for size in sizes):
            constants.update(abs(n) for n in operands if _is_size(n))
    return tuple(sorted(constants))


def _is_size(operand: object) -> bool:
    """Whether an operand is an integer, other than 0 and ±1, that may decide a path by sizes."""
    return type(operand) is int and 1 < abs(operand) < 1 << 31
