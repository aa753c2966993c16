"""The refusals of a merge that doctor collects, each with the name of a check."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from lora_fx.errors import LoraFxError

UNUSED = "unused keys"
MISSING = "missing keys"
SHAPES = "shapes"
TIED = "tied weights"
BASE = "base"
MERGED = "merged before"
READ_TOO = "other readers"


class MergeRefusal(LoraFxError):
    """A refusal to merge that an option, or other keys, would avoid.

    Args:
        check: The name of the check, one of the constants above.
        keys: The adapter's keys that the refusal is about.
        message: As for every LoraFxError.
        hint: The same.
    """

    def __init__(self, check: str, keys: Iterable[str], message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.check = check
        self.keys = tuple(keys)

    def after(self, lead: str) -> Self:
        """The same refusal with `lead` before its message."""
        return type(self)(self.check, self.keys, f"{lead}: {self.message}", self.hint)
