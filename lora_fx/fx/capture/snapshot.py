"""Snapshots: what the things that a module's code can reach are at one moment, as tokens.

Blocks of one structure may differ by something that is no part of them: a counter in an object that
all share or in their class, a closure, a global, a default argument, a context variable. Where two
tokens of a thing are equal, nothing that Python holds of it has changed in between. What cannot be
seen into (an iterator), and what tells a block which of the blocks it is (the model itself, `id`),
has a token that equals no other.

Code of libraries is not read, only what their objects hold: a config of transformers is its values.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
LIBRARIES = {"torch", "torchvision", "torchaudio", "transformers", "timm", "numpy", "lora_fx"}
STATEFUL = {
    *("_collections", "_thread", "_threading_local", "_weakrefset", "argparse", "collections"),
    *("dataclasses", "functools", "multiprocessing", "queue", "threading", "types", "weakref"),
}
"""Modules of the standard library whose objects hold what their users put in."""
OWN = {"_parameters", "_buffers", "_modules", "training"}
ASKS_WHO = {"id", "hash", "globals", "_getframe", "currentframe"}
"""Functions whose result tells blocks apart, or reads what no token tells."""
READS_ALL = {"vars", "__dict__"}
"""Names of code that may read any attribute unseen."""
MOST = 20_000
"""Things that one snapshot looks at."""
MOST_BYTES = 1 << 20
"""Of one array that a snapshot reads."""
_SKIPPED = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__"}
_MAKING = {"__init__", "__repr__", "extra_repr", "reset_parameters", "_init_weights"}
"""Methods of modules that no call of one runs."""
Token = object


class Unseen:
    """The token of a thing whose state cannot be told: it equals no other."""

    __slots__ = ()


def held(module: nn.Module) -> dict[str, object]:
    """What a module holds beside its tensors, modules and hooks."""
    found = {k: v for k, v in module.__dict__.items() if k not in OWN and "_hooks" not in k}
    return found | _slots(module)


class Snapshot:
    """Tokens of things at one moment.

    Args:
        around: Ids of the modules that hold blocks, and of the blocks.

    Attributes:
        names: What the code that was met names.
    """

    def __init__(self, around: Iterable[int] = ()) -> None:
        self.names: set[str] = set()
        self._around = around if isinstance(around, frozenset) else frozenset(around)
        self._tokens: dict[int, Token] = {}
        self._alive: list[object] = []  # an id is a thing's own only as long as the thing lives

    def token(self, x: Any) -> Token:
        """What a thing is now."""
        if isinstance(x, PLAIN):
            return (type(x), repr(x)) if isinstance(x, (float, complex)) else (type(x), x)
        known = self._tokens.get(id(x))
        if known is not None:
            return known
        if len(self._alive) == MOST:
            return Unseen()
        self._alive.append(x)
        self._tokens[id(x)] = ("again", id(x))
        try:
            token = self._told(x)
        except Exception:  # a property or a container of the user's that does as it likes
            token = Unseen()
        self._tokens[id(x)] = token
        return token

    def _all(self, things: Iterable[object]) -> Token:
        return tuple(map(self.token, things))

    def _items(self, things: Mapping[Any, Any]) -> Token:
        return tuple((self.token(k), self.token(v)) for k, v in things.items())

    def _told(self, x: Any) -> Token:
        kind = type(x)
        if isinstance(x, torch.Tensor):
            return id(x), None if x.is_inference() else x._version
        if isinstance(x, (list, tuple)):
            return kind, self._all(x), self._items(_attributes(x))
        if isinstance(x, dict):
            return kind, self._items(x), self._items(_attributes(x))
        if isinstance(x, (set, frozenset)):
            return kind, frozenset(map(self.token, x)), self._items(_attributes(x))
        if isinstance(x, nn.Module):
            return self._module(x)
        if isinstance(x, type):
            metaclass = type(x)
            return id(x), self._class(x), () if metaclass is type else self.token(metaclass)
        return id(x), self._code(x) if callable(x) or _is_code(x) else self._thing(x)

    def _module(self, module: nn.Module) -> Token:
        """A module that is none of a block's own."""
        below = list(module.modules())
        if any(id(m) in self._around for m in below):
            return Unseen()  # who has all blocks can tell them apart
        tensors = (t for m in below for t in (*m._parameters.values(), *m._buffers.values()))
        states = [(id(m), m.training, self._items(held(m)), self.token(type(m))) for m in below]
        return id(module), tuple(states), self._all(tensors)

    def _class(self, kind: type) -> Token:
        own = [c for c in kind.__mro__ if not _is_library(c.__module__)]
        skipped = _SKIPPED | _MAKING if issubclass(kind, nn.Module) else _SKIPPED
        parts = [{k: v for k, v in vars(c).items() if k not in skipped} for c in own]
        return tuple(map(self._items, parts))

    def _code(self, x: Any) -> Token:
        """A function, or what stands for one or several."""
        if isinstance(x, FunctionType):
            return self._function(x)
        if isinstance(x, MethodType):
            return self._all((x.__func__, x.__self__))
        if isinstance(x, functools.partial):
            return self._all((x.func, x.args, x.keywords, _attributes(x)))
        if isinstance(x, (staticmethod, classmethod)):
            return self.token(x.__func__)
        if isinstance(x, property):
            return self._all((x.fget, x.fset, x.fdel))
        if isinstance(x, functools.cached_property):
            return self.token(x.func)
        if isinstance(x, (BuiltinFunctionType, MethodWrapperType)):
            owner = x.__self__
            return () if isinstance(owner, (ModuleType, type(None))) else self.token(owner)
        if isinstance(x, functools._lru_cache_wrapper):
            return self.token(x.__wrapped__)
        return self._thing(x)

    def _function(self, x: FunctionType) -> Token:
        wrapped = getattr(x, "__wrapped__", None)
        if _is_library(x.__module__):
            return self.token(wrapped)
        loaded, named = _names(x.__code__)
        self.names |= named
        if loaded & ASKS_WHO or named & ASKS_WHO - {"id", "hash"}:
            return Unseen()
        cells = [_content(cell) for cell in x.__closure__ or ()]
        parts = [x.__defaults__, x.__kwdefaults__, vars(x), cells, wrapped]
        found = {n: x.__globals__[n] for n in sorted(loaded & x.__globals__.keys())}
        imported = {n: sys.modules[n] for n in named & sys.modules.keys()}
        for module in (*found.values(), *imported.values()):
            if isinstance(module, ModuleType) and not _is_library(module.__name__):
                parts += [(n, vars(module)[n]) for n in sorted(named & vars(module).keys())]
        return self._all((*parts, found))

    def _thing(self, x: Any) -> Token:
        kind = type(x)
        if isinstance(x, ModuleType):
            return ()
        numbers = _bytes_of(x)
        if numbers is not None:
            return numbers
        if isinstance(x, ContextVar):
            return self.token(x.get(None))
        if isinstance(x, ReferenceType):
            return self.token(x())
        top = kind.__module__.partition(".")[0]
        standard = top in sys.stdlib_module_names
        if (standard and hasattr(kind, "__next__")) or top == "random":
            return Unseen()
        if top == "torch" or (standard and top not in STATEFUL):
            return ()  # a tensor type, a logger, a pattern
        if standard or _is_library(kind.__module__):
            return self._items(_attributes(x)), self._parts(x)
        if hasattr(kind, "__next__"):
            return Unseen()
        return self._items(_attributes(x)), self._parts(x), self.token(kind)

    def _parts(self, x: Any) -> Token:
        """What a container of a kind of its own holds."""
        return self._all(x) if type(x).__module__ in ("collections", "_collections") else ()


def _bytes_of(x: object) -> Token | None:
    """The numbers of an array of numpy, of a bytearray, of ctypes; None for other things."""
    if isinstance(x, np.ndarray):
        seen = not x.dtype.hasobject and x.nbytes <= MOST_BYTES
        return (x.shape, x.tobytes()) if seen else Unseen()
    try:
        held = memoryview(x)  # type: ignore[arg-type]  # a TypeError is the answer
    except TypeError:
        return None
    return held.tobytes() if held.nbytes <= MOST_BYTES else Unseen()


def _is_library(module: str | None) -> bool:
    top = (module or "").partition(".")[0]
    return top in LIBRARIES or (top in sys.stdlib_module_names and top != "__main__")


def _is_code(x: object) -> bool:
    return isinstance(x, (staticmethod, classmethod, property, functools.cached_property))


def _attributes(x: object) -> dict[str, object]:
    return {**getattr(x, "__dict__", {}), **_slots(x)}


def _slots(x: object) -> dict[str, object]:
    names: list[str] = []
    for kind in type(x).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return {n: getattr(x, n) for n in names if n not in _SKIPPED and hasattr(x, n)}


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None


@functools.lru_cache(4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """(global names, all names and words) of a function's code and of those in it."""
    loaded: set[str] = set()
    named: set[str] = set(code.co_names)
    for part in _codes(code):
        named.update(part.co_names, (c for c in part.co_consts if isinstance(c, str)))
        loaded.update(
            i.argval for i in dis.get_instructions(part) if i.opname.endswith(("_GLOBAL", "_NAME"))
        )
    return frozenset(map(str, loaded)), frozenset(named)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
