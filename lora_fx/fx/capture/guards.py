"""The guards of an export: the conditions on sizes that it assumed, and the lines that caused them.

torch keeps what it learnt in three places: asserts among the nodes, ranges of symbols, and
placeholders that share a symbol. Where a guard came from decides what becomes of it:

branch   Python looked at a size (`if x.shape[1] < 8`): elsewhere another graph is the model
demand   torch checked that two sizes fit: elsewhere the model does not run
layout   a kernel asked for strides or for size 1: mostly of no meaning, so a run decides
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from types import FrameType
from typing import Any

import torch

from lora_fx.fx.symbolic_sizes import ShapeEnv, canonical
from lora_fx.patching import patched

BRANCH = "branch"
DEMAND = "demand"
LAYOUT = "layout"
UNKNOWN = "the model's arithmetic"


@dataclass(frozen=True)
class Guard:
    """One condition that torch learnt: its expression, the op, and the line of code."""

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
                guard = Guard(g, *_origin(sys._getframe(1)))
                for text in (str(g), canonical(g)):
                    self.guards.setdefault(text, guard)
            original(env, prefix, g, *args, **kwargs)

        return patched(kind, _log_guard=log)

    def of(self, text: str) -> Guard:
        """The guard of an expression as torch prints it."""
        return self.guards.get(text, Guard(None, BRANCH, UNKNOWN))

    def of_equal(self, symbols: set[object]) -> Guard:
        """The guard of a line of Python that compared these sizes, or a required condition."""
        for guard in self.guards.values():
            if guard.kind != BRANCH or getattr(guard.expression, "rel_op", "") != "==":
                continue
            compared: set[object] = getattr(guard.expression, "free_symbols", set())
            if len(compared) > 1 and compared & symbols:
                return guard
        return Guard(None, DEMAND, UNKNOWN)

    def of_bound(self, symbol: object, outside: int) -> Guard:
        """The guard that keeps a symbol from a value."""
        for guard in self.guards.values():
            if getattr(guard.expression, "free_symbols", None) != {symbol}:
                continue
            if guard.expression.subs(symbol, outside) == False:  # noqa: E712 - sympy's own
                return guard
        return Guard(None, BRANCH, UNKNOWN)


_TORCH = torch.__file__.rpartition("/")[0]
"""The folder of torch; torchvision is a folder next to it, whose name begins in the same way."""
_MACHINERY = (
    "/fx/experimental/symbolic_shapes.py",
    "/fx/experimental/sym_node.py",
    "/fx/experimental/recording.py",
)
_CHECKS = ("_check", "_check_with")
"""Functions of torch/__init__.py by which code demands something of sizes."""
_QUESTIONS = ("__bool__", "__int__", "__index__")
"""Methods of a symbolic number by which Python looks at it."""
_OURS = __file__.rpartition("/fx/capture/")[0]


def _origin(frame: FrameType | None) -> tuple[str, str]:
    """The kind of the guard that a stack of frames made, and the line of the user's code.

    From the innermost frame outwards, torch's machinery left out, the kind is:
    1. a demand, where a check of torch's comes first;
    2. a branch, where Python looks at a size first, in a library's code or in nn;
    3. a matter of layout otherwise: a kernel of torch's looked.
    """
    frames = _frames_within_export(frame)
    python_asked = False
    for inner in frames:
        path = inner.f_code.co_filename
        name = inner.f_code.co_name
        file_of_torch = _file_of_torch(path)
        if file_of_torch == "/__init__.py" and name in _CHECKS:
            return DEMAND, _line_of_user(inner, frames)
        if file_of_torch == "/__init__.py" and name in _QUESTIONS:
            python_asked = True
        elif file_of_torch not in _MACHINERY:
            is_model_code = file_of_torch == path or file_of_torch.startswith("/nn/")
            kind = BRANCH if python_asked and is_model_code else LAYOUT
            return kind, _line_of_user(inner, frames)
    return LAYOUT, UNKNOWN


def _file_of_torch(path: str) -> str:
    """The path within torch's folder, from its slash on; a path outside of it unchanged."""
    return path.removeprefix(_TORCH) if path.startswith(f"{_TORCH}/") else path


def _frames_within_export(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers up to the exporter; callers of the exporter are not model code."""
    while frame is not None and frame.f_code.co_filename != f"{_TORCH}/export/_trace.py":
        yield frame
        frame = frame.f_back


def _line_of_user(inner: FrameType, outer: Iterator[FrameType]) -> str:
    """The innermost line that is neither torch's nor ours; else the innermost of torch.nn's."""
    line_of_nn = ""
    for frame in chain([inner], outer):
        path = frame.f_code.co_filename
        where = f"{path}, line {frame.f_lineno}, in {frame.f_code.co_name}"
        if _file_of_torch(path) != path:
            if path.startswith(f"{_TORCH}/nn/") and not line_of_nn:
                line_of_nn = where
        elif not path.startswith(_OURS):
            code = linecache.getline(path, frame.f_lineno).strip()
            return f"{where}: `{code}`" if code else where
    return line_of_nn or UNKNOWN
