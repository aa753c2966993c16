"""The starts of an ONNX file: where its adapters begin to act, as its manifest says it.

A file with aLoRA adapters has the input `adapter_starts`. Its manifest has, under `starts`, the
input of token ids, the input whose shape tells how many tokens the past holds, and the invocation
tokens of each adapter that was exported with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_fx.adapter.invocation import NEVER, adapter_starts
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.inputs import Named
from lora_fx.text import Json, JsonView

STARTS = "adapter_starts"
"""The name of the input: int64 [batch], the first place of a row at which its adapter acts."""


@dataclass(frozen=True)
class Starts:
    """What the manifest of a file says of its starts.

    Attributes:
        ids: The input with the token ids [batch, tokens].
        past: The input whose shape has the size of the past; empty in a file without a cache.
        past_axis: The axis of that size.
        invocations: Name of an exported adapter → its tokens; none for a LoRA.
    """

    ids: str
    past: str = ""
    past_axis: int = 0
    invocations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> Json:
        """Return the object under `starts`."""
        invocations = {name: [*tokens] for name, tokens in self.invocations.items()}
        return {
            "ids": self.ids,
            "past": self.past,
            "past_axis": self.past_axis,
            "invocations": invocations,
        }

    @classmethod
    def from_json(cls, row: JsonView) -> Starts:
        """Return what `to_json` wrote; a damaged one raises ValueError, KeyError or TypeError."""
        invocations = {
            str(name): tuple(map(int, tokens)) for name, tokens in row["invocations"].items()
        }
        return cls(str(row["ids"]), str(row["past"]), int(row["past_axis"]), invocations)

    def fit(self, feeds: Named) -> bool:
        """Whether the inputs of a run have what starts are computed from."""
        return self.ids in feeds and (not self.past or self.past in feeds)

    def check(self, feeds: Named) -> None:
        """Raise for starts of a run that are not one int64 for each row.

        A runtime would repeat one start for all rows.
        """
        if self.ids not in feeds:
            return  # a missing input has its own message
        hint = (
            f"pass {STARTS}=lora_fx.onnx.adapter_starts(ids of the whole rows, the adapter's "
            "tokens)"
        )
        rows = len(np.asarray(feeds[self.ids]))
        expected = f"expected int64 [{rows}], a start for each row of {self.ids!r}"
        if STARTS not in feeds:
            raise LoraFxError(f"input {STARTS!r} is missing; {expected}", hint)
        starts = np.asarray(feeds[STARTS])
        if starts.shape != (rows,) or starts.dtype != np.int64:
            found = f"{starts.dtype.name} {[*starts.shape]}"
            raise LoraFxError(f"{STARTS!r} is {found}; {expected}", hint)

    def past_tokens(self, feeds: Named) -> int:
        """Return how many tokens the past of a run holds."""
        return int(np.shape(feeds[self.past])[self.past_axis]) if self.past else 0

    def within(self, feeds: Named, invocations: Sequence[Sequence[int]]) -> Array:
        """Return the starts of rows that are invoked among the ids of this run.

        Args:
            feeds: The inputs of the run.
            invocations: The tokens of each row's adapter; empty for a LoRA.
        """
        ids = np.asarray(feeds[self.ids])
        past = self.past_tokens(feeds)
        starts = np.zeros(len(ids), np.int64)
        for row, tokens in enumerate(invocations):
            start = int(adapter_starts(ids[row], tokens)[0])
            starts[row] = start if start == NEVER or not tokens else past + start
        return starts

    def of_run(self, feeds: Named, invocation: Sequence[int]) -> Array:
        """Return the starts of a run of one adapter, from the ids of its rows.

        Raises:
            LoraFxError: A past hides where the rows were invoked.
        """
        rows = len(np.asarray(feeds[self.ids]))
        if invocation and self.past_tokens(feeds):
            raise LoraFxError(
                f"input {STARTS!r} is missing: the adapter acts from its invocation tokens on, and "
                "with a past the ids of this run do not show where they stand",
                f"pass {STARTS}=lora_fx.onnx.adapter_starts(ids of the whole rows, "
                "session.invocations[name])",
            )
        return self.within(feeds, [invocation] * rows)
