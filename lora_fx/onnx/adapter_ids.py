"""The input `adapter_ids` of a file of mode batch: which adapter each row has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.onnx.manifest import read_manifest

IDS = "adapter_ids"
"""The input of mode batch that says which adapter each row has."""


@dataclass(frozen=True)
class RowChoice:
    """What the input `adapter_ids` of a file of mode batch may hold.

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
        """The choice that a file's manifest leaves; None where it is of another mode.

        Args:
            text: The manifest, where the file has one.
            shapes: Sizes and symbols of the inputs by name.
        """
        sizes = shapes.get(IDS)
        if text is None or sizes is None or len(sizes) != 1:
            return None
        data = read_manifest(text, "the model")
        names = data.get("adapters")
        if data.get("mode") != "batch" or not isinstance(names, list):
            return None
        rowed = [n for n, s in shapes.items() if n != IDS and s and s[0] == sizes[0]]
        return cls(tuple(map(str, names)), tuple(rowed))

    def check(self, feeds: Mapping[str, Array]) -> None:
        """Raise for ids that are missing, of another dtype or shape, or out of range.

        Raises:
            LoraFxError: The runtime would refuse them, or answer with NaN.
        """
        last = len(self.adapters)
        names = [repr(n) for n in self.adapters]
        shown = ", ".join(names if last <= 4 else [*names[:3], "…", names[-1]])
        hint = f"int64 [batch]: 0 is the base, 1 to {last} are the adapters {shown}"
        if IDS not in feeds:
            raise LoraFxError(f"input {IDS!r} is missing: which adapter has each row?", hint)
        ids = feeds[IDS]
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
            found = ids.dtype if isinstance(ids, np.ndarray) else type(ids).__name__
            raise LoraFxError(f"input {IDS!r} is {found}; expected an array of int64", hint)
        rows = next((feeds[n].shape[0] for n in self.rowed if n in feeds and feeds[n].ndim), None)
        if ids.ndim != 1 or rows not in (None, len(ids)):
            wanted = "[batch]" if rows is None else f"[{rows}], one for each row"
            raise LoraFxError(f"input {IDS!r} is {list(ids.shape)}; expected {wanted}", hint)
        outside = np.flatnonzero((ids < 0) | (ids > last))
        if outside.size:
            row = int(outside[0])
            raise LoraFxError(
                f"input {IDS!r}: row {row} asks for adapter {ids[row]}, which is out of range; "
                f"expected 0 to {last}",
                hint,
            )
