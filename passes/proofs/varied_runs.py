"""Runs of a torch model with adapters that differ in their numbers, on one module.

Branches are inserted once. For the next adapter the factors are written, and where its keys, ranks
and scales are the same nothing else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.dtypes import Array
from lora_fx.fx.module.adapted import AdaptedModule
from lora_fx.fx.module.module import CapturedModule
from lora_fx.fx.tensors import from_numpy
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
    _loaded: Adapter | None = field(default=None, init=False)

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
        module = self.module
        if isinstance(module, AdaptedModule) and self._differs_in_b(adapter):
            self._write_b(module, adapter)
        elif isinstance(module, AdaptedModule) and not adapter.full:
            module.load_adapter(replace(adapter, names=None))
        else:
            module = self.module = self.branched(adapter).eval()
        self._loaded = adapter
        return module

    def _differs_in_b(self, adapter: Adapter) -> bool:
        """Whether an adapter differs from the one in the module in the numbers of some B alone."""
        if self._loaded is None or self._loaded.entries.keys() != adapter.entries.keys():
            return False
        for key, update in adapter.entries.items():
            before = self._loaded.entries[key]
            if update is before:
                continue
            if not isinstance(update, LowRank) or not isinstance(before, LowRank):
                return False
            if update.variant_tensors or update.variant != before.variant or update.frozen:
                return False
            if update.a is not before.a or update.scale != before.scale:
                return False
        return True

    @torch.no_grad()
    def _write_b(self, module: AdaptedModule, adapter: Adapter) -> None:
        """Write each B that differs from that of the adapter in the module."""
        assert self._loaded is not None  # it was compared
        tensors = module.tensors()
        for key, update in adapter.lowrank.items():
            if update.b is not self._loaded.lowrank[key].b:
                tensors[key]["b"].copy_(from_numpy(update.b))


@contextmanager
def with_its_adapter(module: AdaptedModule) -> Iterator[Adapter]:
    """A block that gets the module's adapter, after which the module has it again."""
    adapter = module.adapter()
    try:
        yield adapter
    finally:
        module.load_adapter(adapter)
