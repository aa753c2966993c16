"""The strict reading of fields of a probe's JSON, which others may have made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError, one_line
from lora_fx.text import JsonView, is_number

T = TypeVar("T")


class StrictFields:
    """Reads fields of these kinds, and refuses others."""

    def __init__(self, where: str, hint: str) -> None:
        """Set what messages call the whole, and the hint for what is damaged."""
        self._where = where
        self._hint = hint

    def _table(
        self,
        data: JsonView,
        name: str,
        read: Callable[[str, Any], T],
        *,
        needed: bool = True,
    ) -> dict[str, T]:
        """Read an object whose values are alike."""
        value = data.get(name, None if needed else {})
        if not isinstance(value, dict):
            raise self._error(name, value, "an object")
        return {key: read(f"{name}.{key}", entry) for key, entry in value.items()}

    def _fields(self, name: str, value: Any) -> JsonView:
        if not isinstance(value, dict):
            raise self._error(name, value, "an object")
        return value

    def _optional(self, fields: JsonView, name: str, count: int) -> Array | None:
        if fields.get(name) is None:
            return None
        return self._values(name, fields[name], count)

    def _values(self, name: str, value: Any, count: int) -> Array:
        return np.array(self._list(name, value, count), np.float64)

    def _list(self, name: str, value: Any, count: int) -> list[float]:
        if not isinstance(value, list) or len(value) != count:
            found = f"{len(value)} numbers" if isinstance(value, list) else value
            raise self._error(name, found, f"{count} numbers")
        return [self._number(name, number) for number in value]

    def _number(self, name: str, value: Any) -> float:
        if not is_number(value) or not math.isfinite(value):
            raise self._error(name, value, "a finite number")
        return value

    def _positive(self, name: str, value: Any) -> float:
        number = self._number(name, value)
        if number <= 0:
            raise self._error(name, value, "a number above 0")
        return number

    def _error(self, name: str, found: object, expected: str) -> LoraFxError:
        found_text = one_line(repr(found), 80)
        return LoraFxError(
            f"{self._where}: {one_line(name, 80)} is {found_text}; expected {expected}", self._hint
        )
