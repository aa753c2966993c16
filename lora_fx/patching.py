"""Temporary replacement of attributes for the duration of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_MISSING = object()


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
