"""Temporary replacement of attributes for the duration of a block, by one thread at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_MISSING = object()
_shared_state = threading.RLock()


@contextlib.contextmanager
def patched(thing: Any, **values: object) -> Iterator[None]:
    """A block in which some attributes of an object, a class or a module have other values."""
    # what it inherits stays inherited
    before = {name: vars(thing).get(name, _MISSING) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                delattr(thing, name)
            else:
                setattr(thing, name, value)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A block that no other thread runs meanwhile, as it changes what a process has once.

    torch.export, torch's ONNX exporter and onnxscript work for one thread at a time; so do loggers,
    the filters of warnings and the standard streams. A thread waits here until another is done.
    """
    with _shared_state:
        yield
