"""Old spellings of options, which go on working and say what they are called now."""

from __future__ import annotations

import warnings
from typing import TypeVar

from lora_fx.errors import LoraFxError

T = TypeVar("T")


def under_either_name(old: str, old_value: T | None, new: str, new_value: T | None) -> T | None:
    """The value of an option, given under its name or under the one that it had before.

    Args:
        old: The name that it had.
        old_value: What is given under that; None is nothing.
        new: The name that it has.
        new_value: What is given under that; None is nothing.

    Raises:
        LoraFxError: Both are given.

    Warns:
        FutureWarning: The old name is used.
    """
    if old_value is None:
        return new_value
    if new_value is not None:
        raise LoraFxError(f"{old} and {new} are one option", f"leave {old} out")
    # the caller of the verb, which calls this function
    warnings.warn(f"{old}= is called {new}= now", FutureWarning, stacklevel=3)
    return old_value
