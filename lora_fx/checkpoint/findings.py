"""The findings of doctor's checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_fx.text import Json

ERROR = "error"
WARNING = "warning"
NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """A finding of one of doctor's checks.

    Attributes:
        keys: Keys of the adapter, or names of tensors, that the finding is about.
        found: What is there.
        expected: What should be.
        hint: What to do.
        severity: error: the pair is wrong; warning: look at it; note.
        check: Name of the check.
    """

    keys: Sequence[str]
    found: str
    expected: str
    hint: str
    severity: str = ERROR
    check: str = ""

    def to_json(self) -> Json:
        """One row of `findings[]`."""
        first = {"check": self.check, "severity": self.severity}
        return first | vars(self) | {"keys": list(self.keys)}


def about(keys: Sequence[str], found: str, expected: str, hint: str) -> Iterator[Finding]:
    """One error for all these keys; nothing if there are none."""
    if keys:
        yield Finding(keys, found, expected, hint)
