"""The sizes that an export holds for: conditions, fixed sizes, and conditions in doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_fx.conditions import SEARCHED, Condition, Size, broken, parsed, without_implied
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.guards import DEMAND, LAYOUT, UNKNOWN, Guard, GuardLog
from lora_fx.fx.capture.size_nodes import asserted_expression, condition_of
from lora_fx.fx.graph.nodes import hint, shape_of
from lora_fx.fx.symbolic_sizes import python_source

aten = torch.ops.aten
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
Shape = list["int | torch.SymInt"]
"""The sizes of a leaf as the export has them."""


def learn(program: ExportedProgram, graph: fx.Graph, names: Sequence[str], log: GuardLog) -> Learnt:
    """Read what an export learnt about the sizes of its inputs; asserts on sizes leave the graph.

    Args:
        program: The export.
        graph: Its nodes; edited.
        names: The names of the leaves.
        log: The guards of the export; an empty one for a program from a file.
    """
    places = dict(zip(graph.find_nodes(op="placeholder"), names, strict=True))
    sizes: list[Shape | None] = []
    for place in places:
        shape = shape_of(place)
        sizes.append(None if shape is None else list(shape))

    learnt = Learnt(names, sizes, log)
    learnt.find_symbols()
    learnt.read_asserts(graph, places)
    for symbol, bounds in program.range_constraints.items():
        if symbol in learnt.symbols:
            learnt.add_range(symbol, bounds)
    learnt.add_equations()
    learnt.add_squeezed(graph)
    learnt.conditions = without_implied(_distinct(learnt.conditions))
    learnt.fix_only_sizes()
    doubtful = _distinct(learnt.doubtful)
    learnt.doubtful = [doubt for doubt in doubtful if doubt not in learnt.conditions]
    return learnt


@dataclass
class Learnt:
    """The sizes that an export holds for.

    Attributes:
        names: The names of the leaves.
        sizes: For each leaf, the size of each dimension: a number where it is fixed.
        log: The guards of the export.
        symbols: Symbol → the first (leaf, dimension) whose size it is, alone.
        conditions: Conditions that sizes have to satisfy.
        doubtful: Conditions that a run has to decide: see `layout` in guards.py.
        fixed: (leaf, dimension) → the line that fixed it.
    """

    names: Sequence[str]
    sizes: list[Shape | None]
    log: GuardLog
    symbols: dict[object, tuple[int, int]] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)
    doubtful: list[Condition] = field(default_factory=list)
    fixed: dict[tuple[int, int], str] = field(default_factory=dict)

    def find_symbols(self) -> None:
        """Find the first leaf and dimension of each symbol that is a size by itself."""
        for leaf, shape in enumerate(self.sizes):
            for dim, size in enumerate(shape or ()):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self.symbols.setdefault(size.node.expr, (leaf, dim))

    def read_asserts(self, graph: fx.Graph, places: Mapping[fx.Node, str]) -> None:
        """Take the asserts that compare sizes of placeholders out of a graph, as conditions."""
        for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
            guard = self.log.of(asserted_expression(node))
            condition = condition_of(node.args[0], places, guard)
            if condition is not None:
                self.add_condition(condition, guard)
                graph.erase_node(node)

    def add_condition(self, condition: Condition, guard: Guard) -> None:
        """Put a condition among those that hold or those that a run decides; drop an idle one."""
        holds = [condition.holds(dict.fromkeys(condition.about, n)) for n in condition.turns()]
        fails_at_one_only = len(condition.sizes) == 1 and not holds[0] and all(holds[1:])
        if fails_at_one_only:  # one text for it: the two modes of a model ask in different words
            condition = replace(condition, text=f"{condition.sizes[0][0]} != 1")
        if guard.kind == LAYOUT or (fails_at_one_only and not condition.demanded):
            # Kept, "not 1" refuses a batch of 1 that nn.TransformerEncoder takes, and the single
            # token that decoders of transformers run on. Dropped, a model with
            # `if x.shape[0] == 1` is wrong there and says nothing. So a run at size 1 decides.
            self.doubtful.append(condition)
        elif len(condition.sizes) > 1 or not all(holds):
            self.conditions.append(condition)

    def add_range(self, symbol: Any, bounds: Any) -> None:
        """Turn the range of one symbol into conditions, or into a fixed size."""
        low = _number(bounds.lower)
        high = _number(bounds.upper)
        leaf, dim = place = self.symbols[symbol]
        if low is not None and low == high:
            self.fixed[place] = self.log.of_bound(symbol, low + 1).line
            shape = self.sizes[leaf]
            assert shape is not None
            shape[dim] = low
            return

        if low is not None and low > 1:
            guard = self.log.of_bound(symbol, low - 1)
            # torch takes every free size for 2 or more, whatever the model does
            if low != 2 or guard.line != UNKNOWN:
                self._add_bound(f"s0 >= {low}", place, guard)
        if high is not None and high > 1:
            guard = self.log.of_bound(symbol, high + 1)
            self._add_bound(f"s0 <= {high}", place, guard)

    def _add_bound(self, text: str, place: tuple[int, int], guard: Guard) -> None:
        leaf, dim = place
        sizes = (("s0", self.names[leaf], dim),)
        self.add_condition(Condition(text, sizes, guard.line, guard.kind == DEMAND), guard)

    def add_equations(self) -> None:
        """Add the equation of a size that is not free: it equals others, or depends on them."""
        for leaf, shape in enumerate(self.sizes):
            for dim, size in enumerate(shape or ()):
                if not isinstance(size, torch.SymInt):
                    continue
                if self.symbols.get(size.node.expr) == (leaf, dim):
                    continue
                condition = self._equation(leaf, dim, size.node.expr)
                if condition is not None:
                    self.conditions.append(condition)
                elif shape is not None:
                    # what cannot be said cannot be checked: `pinned` says it
                    shape[dim] = hint(size)

    def _equation(self, leaf: int, dim: int, expression: Any) -> Condition | None:
        """The condition that a size equals an expression; None where no text can say it."""
        import sympy  # type: ignore[import-untyped]

        free_symbols = sorted(expression.free_symbols, key=str)
        sizes = [("s0", self.names[leaf], dim)]
        substitutes: dict[object, object] = {}
        try:
            for number, symbol in enumerate(free_symbols, 1):
                symbol_leaf, symbol_dim = self.symbols[symbol]
                sizes.append((f"s{number}", self.names[symbol_leaf], symbol_dim))
                substitutes[symbol] = sympy.Symbol(f"s{number}", integer=True, positive=True)
            text = f"s0 == {python_source(expression.subs(substitutes))}"
            parsed(text)
        except (KeyError, LoraFxError, NotImplementedError, TypeError):
            return None
        guard = self.log.of_equal(expression.free_symbols)
        return Condition(text, tuple(sizes), guard.line, guard.kind == DEMAND)

    def add_squeezed(self, graph: fx.Graph) -> None:
        """Add that a free size that is squeezed is not 1: there the result has another rank."""
        for node in graph.nodes:
            if node.target not in _SQUEEZES:
                continue
            line = _line_of(node)
            for size in _squeezed_sizes(node):
                if isinstance(size, torch.SymInt) and size.node.expr in self.symbols:
                    leaf, dim = self.symbols[size.node.expr]
                    sizes = (("s0", self.names[leaf], dim),)
                    self.conditions.append(Condition("s0 != 1", sizes, line))

    def fix_only_sizes(self) -> None:
        """Fix a size if an equation allows only one value, given the example's other sizes."""
        example_sizes: dict[Size, int] = {}
        for name, shape in zip(self.names, self.sizes, strict=True):
            for dim, size in enumerate(shape or ()):
                example_sizes[name, dim] = hint(size)

        # a size that equals another one moves with it
        equalities = [c for c in self.conditions if _is_equality(c) and not _equates_sizes(c)]
        equations = [c for c in equalities if len(c.sizes) == 1]
        for name, dim in dict.fromkeys(equation.sizes[0][1:] for equation in equations):
            about_size = [c for c in equalities if (name, dim) in c.about]
            possible = _possible_sizes((name, dim), about_size, example_sizes)
            example_size = example_sizes[name, dim]
            leaf = self.names.index(name)
            shape = self.sizes[leaf]
            if shape is None or list(islice(possible, 2)) != [example_size]:
                continue
            shape[dim] = example_size
            solved = [c for c in equations if c in about_size]
            self.fixed[leaf, dim] = solved[0].line
            self.conditions = [c for c in self.conditions if c not in solved]


def _number(end: Any) -> int | None:
    """An end of a range; None if the range has no end."""
    if end.is_Integer and end < 1 << 31:
        return int(end)
    return None


def _squeezed_sizes(node: fx.Node) -> list[int | torch.SymInt]:
    """The sizes that a squeeze may remove; a squeeze without dimensions may remove any."""
    shape = shape_of(node.args[0])
    if not shape:
        return []
    if len(node.args) < 2:
        return list(shape)
    dims: Any = node.args[1]
    if not isinstance(dims, (list, tuple)):
        dims = [dims]
    return [shape[dim] for dim in dims]


def _line_of(node: fx.Node) -> str:
    """The innermost line of code in the stack trace of a node."""
    stack_lines = str(node.meta.get("stack_trace") or UNKNOWN).splitlines()
    file_lines = (line.strip() for line in reversed(stack_lines) if "File " in line)
    return next(file_lines, UNKNOWN).removeprefix("File ").replace('"', "")


def _is_equality(condition: Condition) -> bool:
    return parsed(condition.text)[0] == "Eq"


def _equates_sizes(condition: Condition) -> bool:
    """Whether an equality says of two sizes no more than that they are one."""
    return bool(condition.equal_sizes(dict.fromkeys(condition.about, "n")))


def _possible_sizes(
    size: Size, conditions: Sequence[Condition], example_sizes: Mapping[Size, int]
) -> Iterator[int]:
    """The possible values of a size, given the example's other sizes."""
    for number in range(1, SEARCHED):
        if broken(conditions, {**example_sizes, size: number}) is None:
            yield number


def _distinct(conditions: Sequence[Condition]) -> list[Condition]:
    """Each comparison once, the demanded one of two."""
    preferred: dict[tuple[object, ...], Condition] = {}
    for condition in sorted(conditions, key=lambda condition: not condition.demanded):
        preferred.setdefault((condition.text, condition.sizes), condition)
    return [c for c in conditions if preferred.get((c.text, c.sizes)) is c]
