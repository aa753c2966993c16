"""Runs of a torch model with adapters that differ in their numbers, on one module.

Branches are inserted once. For the next adapter the factors are written, and where its keys, ranks
and scales are the same nothing else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.dtypes import Array
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.inputs import Named
from lora_fx.passes.proofs.parity import torch_run
from lora_fx.passes.proofs.reference import Run


@dataclass(eq=False)
class VariedRuns:
    """Runs of a base and of adapters on it.

    Attributes:
        base: The base, in eval mode.
        branched: Inserts an adapter's branches.
        module: The module whose factors are written; None until it is needed.
    """

    base: CapturedModule
    branched: Callable[[Adapter], CapturedModule]
    module: CapturedModule | None = None

    def run(self, adapter: Adapter | None) -> Run:
        """Return a run with an adapter, whose factors are written when it runs."""

        def with_adapter(feeds: Mapping[str, Array]) -> dict[str, Array]:
            return torch_run(self._with(adapter))(feeds)

        return with_adapter

    def narrow(self, adapter: Adapter | None, feeds: Named) -> Named | None:
        """Run with products in bfloat16; None where the model cannot."""
        device = next((tensor.device.type for tensor in self.base.parameters()), "cpu")
        try:
            with torch.autocast(device, torch.bfloat16, cache_enabled=False):
                return self.run(adapter)(feeds)
        except (RuntimeError, TypeError, ValueError):  # an op that takes no two dtypes
            return None

    def _with(self, adapter: Adapter | None) -> CapturedModule:
        if adapter is None:
            return self.base
        if isinstance(self.module, AdaptedModule) and not adapter.full:
            self.module.load_adapter(Adapter(adapter.entries))
            return self.module
        self.module = self.branched(adapter).eval()
        return self.module


@contextmanager
def with_its_adapter(module: AdaptedModule) -> Iterator[Adapter]:
    """A block that gets the module's adapter, after which the module has it again."""
    adapter = module.adapter()
    try:
        yield adapter
    finally:
        module.load_adapter(adapter)
