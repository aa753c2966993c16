"""Snapshots: the state, at one moment, of the things that a module's code can reach, as tokens.

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
"""Modules of the standard library whose objects are containers."""
OWN = {"_parameters", "_buffers", "_modules", "training"}
ASKS_WHO = {"id", "hash", "globals", "_getframe", "currentframe"}
"""Functions that can distinguish blocks, or read state that no token covers."""
READS_ALL = {"vars", "__dict__"}
"""Names of code that may read any attribute unseen."""
MOST = 20_000
"""Things that one snapshot looks at."""
MOST_BYTES = 1 << 20
"""Bytes of one array that a snapshot reads."""
_SKIPPED = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slots__"}
_MAKING = {"__init__", "__repr__", "extra_repr", "reset_parameters", "_init_weights"}
"""Methods of modules that no call of one runs."""
Token = object


class Unseen:
    """The token of an object whose state is unknown: it equals no other token."""

    __slots__ = ()


def attributes_of_module(module: nn.Module) -> dict[str, object]:
    """The attributes of a module, but for its tensors, modules and hooks."""
    attributes = {
        name: attribute
        for name, attribute in module.__dict__.items()
        if name not in OWN and "_hooks" not in name
    }
    return attributes | _slots(module)


class Snapshot:
    """Tokens of things at one moment.

    Args:
        around: Ids of the modules that hold blocks, and of the blocks.

    Attributes:
        names: Names and words in the code that was met.
    """

    def __init__(self, around: Iterable[int] = ()) -> None:
        self.names: set[str] = set()
        self._around = around if isinstance(around, frozenset) else frozenset(around)
        self._tokens: dict[int, Token] = {}
        self._alive: list[object] = []  # an id is a thing's own only as long as the thing lives

    def token(self, thing: Any) -> Token:
        """The token of the present state of a thing."""
        if isinstance(thing, (float, complex)):
            return type(thing), repr(thing)  # NaN equals itself, and 0.0 is not -0.0
        if isinstance(thing, PLAIN):
            return type(thing), thing
        known_token = self._tokens.get(id(thing))
        if known_token is not None:
            return known_token
        if len(self._alive) == MOST:
            return Unseen()
        self._alive.append(thing)
        self._tokens[id(thing)] = ("again", id(thing))  # where it holds itself
        try:
            token = self._new_token(thing)
        except Exception:  # a property or a container of the user's that does as it likes
            token = Unseen()
        self._tokens[id(thing)] = token
        return token

    def _all(self, things: Iterable[object]) -> Token:
        return tuple(map(self.token, things))

    def _items(self, things: Mapping[Any, Any]) -> Token:
        return tuple((self.token(key), self.token(thing)) for key, thing in things.items())

    def _new_token(self, thing: Any) -> Token:
        kind = type(thing)
        if isinstance(thing, torch.Tensor):
            return id(thing), None if thing.is_inference() else thing._version
        if isinstance(thing, (list, tuple)):
            return kind, self._all(thing), self._items(_attributes(thing))
        if isinstance(thing, dict):
            return kind, self._items(thing), self._items(_attributes(thing))
        if isinstance(thing, (set, frozenset)):
            return kind, frozenset(map(self.token, thing)), self._items(_attributes(thing))
        if isinstance(thing, nn.Module):
            return self._module(thing)
        if isinstance(thing, type):
            token_of_class = self._class(thing)
            return id(thing), token_of_class, () if kind is type else self.token(kind)
        if callable(thing) or _is_code(thing):
            return id(thing), self._code(thing)
        return id(thing), self._thing(thing)

    def _module(self, module: nn.Module) -> Token:
        """A module that does not belong to a block."""
        modules = list(module.modules())
        if any(id(m) in self._around for m in modules):
            return Unseen()  # who has all blocks can tell them apart
        states: list[Token] = []
        tensors: list[torch.Tensor | None] = []
        for m in modules:
            attributes = self._items(attributes_of_module(m))
            states.append((id(m), m.training, attributes, self.token(type(m))))
            tensors += [*m._parameters.values(), *m._buffers.values()]
        return id(module), tuple(states), self._all(tensors)

    def _class(self, kind: type) -> Token:
        """The attributes of a class and its bases, without the attributes of library classes."""
        skipped = _SKIPPED
        if issubclass(kind, nn.Module):
            skipped = _SKIPPED | _MAKING
        tokens: list[Token] = []
        for base in kind.__mro__:
            if not _is_library(base.__module__):
                attributes = {k: v for k, v in vars(base).items() if k not in skipped}
                tokens.append(self._items(attributes))
        return tuple(tokens)

    def _code(self, thing: Any) -> Token:
        """A function, or an object that holds one or several."""
        if isinstance(thing, FunctionType):
            return self._function(thing)
        if isinstance(thing, MethodType):
            return self._all((thing.__func__, thing.__self__))
        if isinstance(thing, functools.partial):
            return self._all((thing.func, thing.args, thing.keywords, _attributes(thing)))
        if isinstance(thing, (staticmethod, classmethod)):
            return self.token(thing.__func__)
        if isinstance(thing, property):
            return self._all((thing.fget, thing.fset, thing.fdel))
        if isinstance(thing, functools.cached_property):
            return self.token(thing.func)
        if isinstance(thing, (BuiltinFunctionType, MethodWrapperType)):
            owner = thing.__self__
            if isinstance(owner, (ModuleType, type(None))):
                return ()
            return self.token(owner)
        if isinstance(thing, functools._lru_cache_wrapper):
            return self.token(thing.__wrapped__)
        return self._thing(thing)

    def _function(self, function: FunctionType) -> Token:
        """The values that a user's function holds or names; of a library's, the one it wraps."""
        wrapped = getattr(function, "__wrapped__", None)
        if _is_library(function.__module__):
            return self.token(wrapped)
        global_names, named = _names(function.__code__)
        self.names |= named
        if global_names & ASKS_WHO or named & ASKS_WHO - {"id", "hash"}:
            return Unseen()

        cells = [_content(cell) for cell in function.__closure__ or ()]
        read: list[object] = [
            function.__defaults__,
            function.__kwdefaults__,
            vars(function),
            cells,
            wrapped,
        ]
        globals_read = {
            name: function.__globals__[name]
            for name in sorted(global_names & function.__globals__.keys())
        }
        imported = {name: sys.modules[name] for name in named & sys.modules.keys()}
        for module in (*globals_read.values(), *imported.values()):
            if isinstance(module, ModuleType) and not _is_library(module.__name__):
                attributes = vars(module)
                read += [(name, attributes[name]) for name in sorted(named & attributes.keys())]
        return self._all((*read, globals_read))

    def _thing(self, thing: Any) -> Token:
        """A thing that is no container, module, class or code."""
        kind = type(thing)
        if isinstance(thing, ModuleType):
            return ()
        content = _bytes_of(thing)
        if content is not None:
            return content
        if isinstance(thing, ContextVar):
            return self.token(thing.get(None))
        if isinstance(thing, ReferenceType):
            return self.token(thing())

        package = kind.__module__.partition(".")[0]
        is_standard = package in sys.stdlib_module_names
        is_iterator = hasattr(kind, "__next__")
        if (is_standard and is_iterator) or package == "random":
            return Unseen()
        if package == "torch" or (is_standard and package not in STATEFUL):
            return ()  # a tensor type, a logger, a pattern
        if is_standard or _is_library(kind.__module__):
            return self._items(_attributes(thing)), self._members(thing)
        if is_iterator:
            return Unseen()
        return self._items(_attributes(thing)), self._members(thing), self.token(kind)

    def _members(self, thing: Any) -> Token:
        """The members of a deque, a Counter and their like."""
        if type(thing).__module__ in ("collections", "_collections"):
            return self._all(thing)
        return ()


def _bytes_of(thing: object) -> Token | None:
    """The numbers of an array of numpy, of a bytearray, of ctypes; None for other things."""
    if isinstance(thing, np.ndarray):
        if thing.dtype.hasobject or thing.nbytes > MOST_BYTES:
            return Unseen()
        return thing.shape, thing.tobytes()
    try:
        view = memoryview(thing)  # type: ignore[arg-type]  # a TypeError is the answer
    except TypeError:
        return None
    if view.nbytes > MOST_BYTES:
        return Unseen()
    return view.tobytes()


def _is_library(module: str | None) -> bool:
    package = (module or "").partition(".")[0]
    return package in LIBRARIES or (package in sys.stdlib_module_names and package != "__main__")


def _is_code(thing: object) -> bool:
    """Whether an object holds functions although it cannot be called."""
    return isinstance(thing, (staticmethod, classmethod, property, functools.cached_property))


def _attributes(thing: object) -> dict[str, object]:
    return {**getattr(thing, "__dict__", {}), **_slots(thing)}


def _slots(thing: object) -> dict[str, object]:
    """The attributes of a thing in the slots of its classes."""
    names: list[str] = []
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        if isinstance(slots, str):
            names.append(slots)
        else:
            names += slots
    return {
        name: getattr(thing, name)
        for name in names
        if name not in _SKIPPED and hasattr(thing, name)
    }


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None


@functools.lru_cache(4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """(global names, all names and words) of a function's code and of those in it."""
    global_names: set[str] = set()
    named: set[str] = set(code.co_names)
    for inner in _codes(code):
        named.update(inner.co_names)
        named.update(constant for constant in inner.co_consts if isinstance(constant, str))
        for instruction in dis.get_instructions(inner):
            if instruction.opname.endswith(("_GLOBAL", "_NAME")):
                global_names.add(str(instruction.argval))
    return frozenset(global_names), frozenset(named)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and the code of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
