"""Old spellings of options, which still work and warn with the new spelling."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from lora_fx.errors import LoraFxError

T = TypeVar("T")
WRAPPERS = ("contextlib", "dataclasses", "functools")
"""Modules whose frames stand between a decorated function and its caller."""


def _warn_of_keyword(old: str, new: str) -> None:
    warn_caller(f"{old}= is deprecated: use {new}=")


def under_either_name(
    old: str,
    old_value: T | None,
    new: str,
    new_value: T | None,
    tell: Callable[[str, str], None] = _warn_of_keyword,
) -> T | None:
    """The value of an option, given under its name or under the one that it had before.

    Args:
        old: The old name.
        old_value: The value given under the old name; None if none was given.
        new: The new name.
        new_value: The value given under the new name; None if none was given.
        tell: Called with the old and the new name where the old one is used.

    Raises:
        LoraFxError: Both are given.

    Warns:
        FutureWarning: The old name is used, unless `tell` says so in another way.
    """
    if old_value is None:
        return new_value
    if new_value is not None:
        raise LoraFxError(f"{old} and {new} are the same option", f"leave {old} out")
    tell(old, new)
    return old_value


def warn_caller(text: str) -> None:
    """A FutureWarning at the line of the user's code that called into lora_fx."""
    depth = 2  # 1 is this function
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("lora_fx") and module not in WRAPPERS:
            break
        depth += 1
        frame = frame.f_back
    warnings.warn(text, FutureWarning, stacklevel=depth)
