"""A captured torch model as the reference of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.compare import Parity
from lora_fx.dtypes import Array
from lora_fx.fx.capture.capture import Captured
from lora_fx.fx.module.module import CapturedModule, plain
from lora_fx.passes.pipeline import insert
from lora_fx.passes.prove import arrays_of, own_errors, prove, torch_run
from lora_fx.passes.reference import Run


class TorchReference:
    """Adapters are the branches that insert adds.

    Args:
        captured: The base model.
        arrays: A user's inputs by name, instead of sampled ones.
    """

    def __init__(self, captured: Captured, arrays: Mapping[str, Any] | None = None) -> None:
        self.captured, self.arrays = captured, arrays
        self.base = plain(captured)
        self.base.eval()
        self._last: tuple[Adapter | None, CapturedModule] = (None, self.base)

    def feeds(self, size: tuple[int, int], seed: int = 0) -> dict[str, Array]:
        """See Reference."""
        return arrays_of(self.base.sample(size, self.arrays, seed))

    def run(self, adapter: Adapter | None) -> Run:
        """See Reference."""
        return torch_run(self._module(adapter))

    def own_errors(self, adapter: Adapter | None) -> Mapping[str, float]:
        """Fp32 against fp64."""
        return own_errors(self._module(adapter))

    def prove(self, run: Run, adapter: Adapter | None, of: str) -> list[Parity]:
        """See Reference."""
        return prove(run, self._module(adapter), arrays=self.arrays, of=of)

    def _module(self, adapter: Adapter | None) -> CapturedModule:
        if adapter is None:
            return self.base
        if self._last[0] is not adapter:
            module = insert(self.captured, adapter=adapter, dead="allow")
            self._last = (adapter, module.eval())
        return self._last[1]
