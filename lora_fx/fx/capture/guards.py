"""What torch.export learnt about sizes: the ranges, equalities and orders that a graph is true for.

torch keeps it in three places: asserts among the nodes, ranges of symbols, and placeholders that
share a symbol. Where a guard came from decides what becomes of it:

branch   Python looked at a size (`if x.shape[1] < 8`): elsewhere another graph is the model
demand   torch checked that two sizes fit: elsewhere the model does not run
layout   a kernel asked for strides or for size 1: mostly of no meaning, so a run decides
"""

from __future__ import annotations

import contextlib
import linecache
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lora_fx.comparisons import BINARY, SEARCHED, parsed
from lora_fx.conditions import Condition, Size, broken, without_implied
from lora_fx.errors import LoraFxError
from lora_fx.fx.graph.nodes import argument, hint, shape_of, value
from lora_fx.fx.symbolic_sizes import ShapeEnv, canonical, python_source
from lora_fx.patching import patched

aten = torch.ops.aten
BRANCH, DEMAND, LAYOUT = "branch", "demand", "layout"
UNKNOWN = "the model's arithmetic"
Shape = list["int | torch.SymInt"]
"""The sizes of a leaf as the export has them."""


@dataclass(frozen=True)
class Guard:
    """One thing that torch learnt: its expression, what asked, and the line that did."""

    expression: Any
    kind: str
    line: str


class GuardLog:
    """The guards of one export, with the lines of code that they came from."""

    def __init__(self) -> None:
        self.guards: dict[str, Guard] = {}

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Within this block every guard of torch is written down.

        torch's deferred asserts name the call of the kernel that came last, not the line that
        asked, so its own log is read; without that log the lines are unknown and nothing else.
        """
        kind: Any = ShapeEnv
        original: Any = getattr(kind, "_log_guard", None)
        if original is None:
            return contextlib.nullcontext()

        def log(env: object, prefix: str, g: object, *args: object, **kwargs: object) -> None:
            if "suppressed" not in prefix:
                found = Guard(g, *_origin(sys._getframe(1)))
                for text in (str(g), canonical(g)):
                    self.guards.setdefault(text, found)
            original(env, prefix, g, *args, **kwargs)

        return patched(kind, _log_guard=log)

    def of(self, text: str) -> Guard:
        """The guard of an expression as torch prints it."""
        return self.guards.get(text, Guard(None, BRANCH, UNKNOWN))

    def of_equal(self, symbols: set[object]) -> Guard:
        """The guard of a line of Python that asked whether such sizes are equal, or a demand."""
        for guard in self.guards.values():
            own: set[object] = getattr(guard.expression, "free_symbols", set())
            equal = getattr(guard.expression, "rel_op", "") == "==" and len(own) > 1
            if guard.kind == BRANCH and equal and own & symbols:
                return guard
        return Guard(None, DEMAND, UNKNOWN)

    def of_bound(self, symbol: object, outside: int) -> Guard:
        """The guard that keeps a symbol from a value."""
        for guard in self.guards.values():
            own = getattr(guard.expression, "free_symbols", None) == {symbol}
            if own and guard.expression.subs(symbol, outside) == False:  # noqa: E712 - sympy's own
                return guard
        return Guard(None, BRANCH, UNKNOWN)


_TORCH = torch.__file__.rpartition("/")[0]
_MACHINERY = ("/fx/experimental/symbolic_shapes.py", "/fx/experimental/sym_node.py",
              "/fx/experimental/recording.py")  # fmt: skip
_OURS = __file__.rpartition("/fx/capture/")[0]


def _origin(frame: FrameType | None) -> tuple[str, str]:
    """What kind of guard it is that a stack of frames made, and the line of the user's code."""
    kind, asked, line = "", False, ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        inside = path.startswith(_TORCH)
        tail = path.removeprefix(_TORCH)
        if inside and tail == "/export/_trace.py":
            break  # what called the exporter is no line of the model's
        if not kind:
            if tail == "/__init__.py" and name in ("_check", "_check_with"):
                kind = DEMAND
            elif tail == "/__init__.py" and name in ("__bool__", "__int__", "__index__"):
                asked = True
            elif tail not in _MACHINERY:
                library = not inside or tail.startswith("/nn/")
                kind = BRANCH if asked and library else LAYOUT
        if kind and not inside and not path.startswith(_OURS):
            code = linecache.getline(path, frame.f_lineno).strip()
            where = f"{path}, line {frame.f_lineno}, in {name}"
            return kind, f"{where}: `{code}`" if code else where
        if kind and inside and tail.startswith("/nn/") and not line:
            line = f"{path}, line {frame.f_lineno}, in {name}"
        frame = frame.f_back
    return kind or LAYOUT, line or UNKNOWN


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
        guard = log.of(_said(node))
        condition = _of_node(node.args[0], places, guard)
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


def _said(node: fx.Node) -> str:
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


def _of_node(test: Any, names: Mapping[fx.Node, str], guard: Guard) -> Condition | None:
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
        if log.of(_said(node)).kind == LAYOUT and _canonical(value(node.args[0])) not in own:
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
