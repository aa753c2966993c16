"""What an export learnt about sizes, sorted into conditions, fixed sizes and doubts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_fx.conditions import SEARCHED, Condition, broken, parsed, without_implied
from lora_fx.errors import LoraFxError
from lora_fx.fx.capture.guards import DEMAND, LAYOUT, UNKNOWN, Guard, GuardLog
from lora_fx.fx.capture.size_nodes import asserted_expression, condition_of
from lora_fx.fx.graph.nodes import hint, shape_of
from lora_fx.fx.symbolic_sizes import python_source

aten = torch.ops.aten

Shape = list["int | torch.SymInt"]
"""The sizes of a leaf as the export has them."""


@dataclass
class Learnt:
    """What an export holds for.

    Attributes:
        names: The names of the leaves.
        sizes: For each leaf, the size of each dimension: a number where it is fixed.
        log: What was written down while the export was made.
        symbols: Symbol → the first (leaf, dimension) that it is alone the size of.
        conditions: What sizes have to satisfy.
        doubtful: What a run has to decide: see `layout` above.
        fixed: (leaf, dimension) → the line that fixed it.
    """

    names: Sequence[str]
    sizes: list[Shape | None]
    log: GuardLog
    symbols: dict[object, tuple[int, int]] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)
    doubtful: list[Condition] = field(default_factory=list)
    fixed: dict[tuple[int, int], str] = field(default_factory=dict)

    def sort(self, condition: Condition, guard: Guard) -> None:
        """Put a condition among those that hold or those that a run decides; drop an idle one."""
        at = [condition.holds(dict.fromkeys(condition.about, n)) for n in condition.turns()]
        only_one = len(condition.sizes) == 1 and not at[0] and all(at[1:])
        if only_one:  # one text for it: the two modes of a model ask in different words
            condition = replace(condition, text=f"{condition.sizes[0][0]} != 1")
        if guard.kind == LAYOUT or (only_one and not condition.demanded):
            # Kept, "not 1" refuses a batch of 1 that nn.TransformerEncoder takes, and the single
            # token that decoders of transformers run on. Dropped, a model with
            # `if x.shape[0] == 1` is wrong there and says nothing. So a run at size 1 decides.
            self.doubtful.append(condition)
        elif len(condition.sizes) > 1 or not all(at):
            self.conditions.append(condition)

    def bound(self, symbol: Any, bounds: Any) -> None:
        """Turn the range of one symbol into conditions, or into a fixed size."""
        ends = (bounds.lower, bounds.upper)
        low, high = (int(n) if n.is_Integer and n < 1 << 31 else None for n in ends)
        i, d = place = self.symbols[symbol]
        if low is not None and low == high:
            self.fixed[place] = self.log.of_bound(symbol, low + 1).line
            shape = self.sizes[i]
            assert shape is not None
            shape[d] = low
            return
        for sign, n, outside in ((">=", low, -1), ("<=", high, 1)):
            if n is not None and n > 1:
                guard = self.log.of_bound(symbol, n + outside)
                if n == 2 and sign == ">=" and guard.line == UNKNOWN:
                    continue  # torch takes every free size for 2 or more, whatever the model does
                sizes = (("s0", self.names[i], d),)
                made = Condition(f"s0 {sign} {n}", sizes, guard.line, guard.kind == DEMAND)
                self.sort(made, guard)

    def shared(self) -> None:
        """Add what binds a size that is not free: it equals another one, or is computed of some."""
        import sympy  # type: ignore[import-untyped]

        symbol = partial(sympy.Symbol, integer=True, positive=True)
        symbols = self.symbols
        for i, shape in enumerate(self.sizes):
            for d, n in enumerate(shape := shape or []):
                if not isinstance(n, torch.SymInt) or symbols.get(n.node.expr) == (i, d):
                    continue
                free = sorted(n.node.expr.free_symbols, key=str)
                own = {s: f"s{k}" for k, s in enumerate(free, 1)}
                try:
                    sizes = [(own[s], self.names[symbols[s][0]], symbols[s][1]) for s in free]
                    right = python_source(n.node.expr.subs({s: symbol(own[s]) for s in free}))
                    parsed(text := f"s0 == {right}")
                except (KeyError, LoraFxError, NotImplementedError, TypeError):
                    shape[d] = hint(n)  # what cannot be said cannot be checked: `pinned` says it
                    continue
                sizes = [("s0", self.names[i], d), *sizes]
                guard = self.log.of_equal(n.node.expr.free_symbols)
                made = Condition(text, tuple(sizes), guard.line, guard.kind == DEMAND)
                self.conditions.append(made)

    def squeezed(self, graph: fx.Graph) -> None:
        """Add that a free size that is squeezed is not 1: there the result has another rank."""
        for node in graph.nodes:
            if node.target not in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
                continue
            shape = shape_of(node.args[0]) or ()
            given: Any = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
            dims = given if isinstance(given, (list, tuple)) else [given]
            line = str(node.meta.get("stack_trace") or UNKNOWN).splitlines()
            where = next((x.strip() for x in reversed(line) if "File " in x), UNKNOWN)
            where = where.removeprefix("File ").replace('"', "")
            for n in (shape[d] for d in dims if shape):
                if isinstance(n, torch.SymInt) and n.node.expr in self.symbols:
                    i, d = self.symbols[n.node.expr]
                    self.conditions.append(Condition("s0 != 1", (("s0", self.names[i], d),), where))

    def only_size(self) -> None:
        """Fix a size that an equation leaves no choice, beside the example's other sizes."""
        example = {
            (n, d): hint(k)
            for n, shape in zip(self.names, self.sizes, strict=True)
            for d, k in enumerate(shape or ())
        }
        equal = [c for c in self.conditions if parsed(c.text)[0] == "Eq"]
        # a size that equals another one moves with it
        equal = [c for c in equal if not c.equal_sizes(dict.fromkeys(c.about, "n"))]
        equations = [c for c in equal if len(c.sizes) == 1]
        for name, d in dict.fromkeys((c.sizes[0][1], c.sizes[0][2]) for c in equations):
            own = [c for c in equal if (name, d) in c.about]
            able = (n for n in range(1, SEARCHED) if broken(own, {**example, (name, d): n}) is None)
            shape = self.sizes[i := self.names.index(name)]
            if shape is not None and list(islice(able, 2)) == [example[name, d]]:
                shape[d] = example[name, d]
                self.fixed[i, d] = next(c.line for c in equations if (name, d) in c.about)
                self.conditions = [c for c in self.conditions if c not in equations or c not in own]


def learn(program: ExportedProgram, graph: fx.Graph, names: Sequence[str], log: GuardLog) -> Learnt:
    """Read what an export learnt about the sizes of its inputs; asserts on sizes leave the graph.

    Args:
        program: The export.
        graph: Its nodes; edited.
        names: The names of the leaves.
        log: What was written down while it was made; an empty one for a program from a file.
    """
    places = dict(zip(graph.find_nodes(op="placeholder"), names, strict=True))
    shapes = [shape_of(place) for place in places]
    found = Learnt(names, [None if shape is None else list(shape) for shape in shapes], log)
    for i, shape in enumerate(shapes):
        for d, n in enumerate(shape or ()):
            if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol:
                found.symbols.setdefault(n.node.expr, (i, d))
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        guard = log.of(asserted_expression(node))
        condition = condition_of(node.args[0], places, guard)
        if condition is not None:
            found.sort(condition, guard)
            graph.erase_node(node)
    for symbol, bounds in program.range_constraints.items():
        if symbol in found.symbols:
            found.bound(symbol, bounds)
    found.shared()
    found.squeezed(graph)
    found.conditions = without_implied(_distinct(found.conditions))
    found.only_size()
    found.doubtful = [c for c in _distinct(found.doubtful) if c not in found.conditions]
    return found


def _distinct(conditions: Sequence[Condition]) -> list[Condition]:
    """Each comparison once, the demanded one of two."""
    result: dict[tuple[object, ...], Condition] = {}
    for c in sorted(conditions, key=lambda c: not c.demanded):
        result.setdefault((c.text, c.sizes), c)
    return [c for c in conditions if result.get((c.text, c.sizes)) is c]
