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
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from lora_fx.fx.symbolic_sizes import ShapeEnv, canonical
from lora_fx.patching import patched

BRANCH, DEMAND, LAYOUT = "branch", "demand", "layout"
UNKNOWN = "the model's arithmetic"


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
