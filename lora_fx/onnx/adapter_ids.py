"""The input `adapter_ids` of a file of mode batch: the adapter of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.onnx.manifest import read_manifest

IDS = "adapter_ids"
"""The name of batch mode's input with the adapter of each row."""


@dataclass(frozen=True)
class RowChoice:
    """The valid values of the input `adapter_ids` in a file of mode batch.

    Attributes:
        adapters: Their names, in the order of their ids, 1, 2 …; 0 is the base.
        rowed: The inputs whose dimension 0 is the batch.
    """

    adapters: Sequence[str]
    rowed: Sequence[str]

    @classmethod
    def from_text(
        cls, text: str | None, shapes: Mapping[str, Sequence[object]]
    ) -> RowChoice | None:
        """Return the valid ids from a file's manifest; None for a file of another mode.

        Args:
            text: The manifest, where the file has one.
            shapes: Sizes and symbols of the inputs by name.
        """
        ids_shape = shapes.get(IDS)
        if text is None or ids_shape is None or len(ids_shape) != 1:
            return None
        data = read_manifest(text, "the model")
        names = data.get("adapters")
        if data.get("mode") != "batch" or not isinstance(names, list):
            return None

        batch = ids_shape[0]
        rowed = [
            name for name, shape in shapes.items() if name != IDS and shape and shape[0] == batch
        ]
        return cls(tuple(map(str, names)), tuple(rowed))

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Raise for ids that are missing, of another dtype or shape, or out of range.

        Raises:
            LoraFxError: The runtime would refuse them, or answer with NaN.
        """
        if IDS not in feeds:
            raise LoraFxError(
                f"input {IDS!r} is missing: it sets the adapter of each row", self._hint()
            )

        ids = feeds[IDS]
        if not isinstance(ids, np.ndarray):
            kind = type(ids).__name__
            raise LoraFxError(f"input {IDS!r} is {kind}; expected an array of int64", self._hint())
        if ids.dtype != np.int64:
            raise LoraFxError(
                f"input {IDS!r} is {ids.dtype}; expected an array of int64", self._hint()
            )

        rows = self._row_count(feeds)
        if ids.ndim != 1 or rows not in (None, len(ids)):
            expected = "[batch]"
            if rows is not None:
                expected = f"[{rows}], one for each row"
            raise LoraFxError(
                f"input {IDS!r} is {list(ids.shape)}; expected {expected}", self._hint()
            )

        last = len(self.adapters)
        rows_outside = np.flatnonzero((ids < 0) | (ids > last))
        if rows_outside.size:
            row = int(rows_outside[0])
            raise LoraFxError(
                f"input {IDS!r}: row {row} has adapter {ids[row]}, which is out of range; "
                f"expected 0 to {last}",
                self._hint(),
            )

    def _row_count(self, feeds: Mapping[str, Array]) -> int | None:
        """Return the batch size from another input that has it; None if no input has."""
        for name in self.rowed:
            if name in feeds and feeds[name].ndim:
                return int(feeds[name].shape[0])
        return None

    def _hint(self) -> str:
        """Return a hint with the valid ids, and the names of at most four adapters."""
        names = [repr(name) for name in self.adapters]
        last = len(names)
        if last == 1:
            return f"int64 [batch]: 0 is the base, 1 is the adapter {names[0]}"
        if last > 4:
            names = [*names[:3], "…", names[-1]]
        return f"int64 [batch]: 0 is the base, 1 to {last} are the adapters {', '.join(names)}"
