"""What an exported file has to equal: a model as it was, alone or with an adapter in branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Parity
from lora_fx.dtypes import Array

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


class Reference(Protocol):
    """A model whose graph was not rewritten: in torch, or a file in ONNX Runtime."""

    def feeds(self, size: tuple[int, int], seed: int = 0) -> dict[str, Array]:
        """Inputs by their ONNX names, symbols at (batch, other); a user's own where given."""
        ...

    def run(self, adapter: Adapter | None) -> Run:
        """{input: array} → {output: array}, with an adapter's branches."""
        ...

    def own_errors(self, adapter: Adapter | None) -> Mapping[str, float]:
        """Per output, how far rounding alone moves it; empty where that is unknown."""
        ...

    def prove(self, run: Run, adapter: Adapter | None, of: str) -> list[Parity]:
        """Compare at every size; `of` is the word for it in the report."""
        ...
