"""The proof of a file with adapters to choose from: its base, and each adapter, equal the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.evaluated import BASE_NUMBER, base_number, keys_of_gains
from lora_fx.adapter.lowrank import LowRank, draw
from lora_fx.adapter.scaled_rows import GAINS
from lora_fx.compare import Parity, compare, demand
from lora_fx.errors import NoEffectError
from lora_fx.inputs import SIZES, Named, generator
from lora_fx.ir.layout import Layout
from lora_fx.passes.proofs.reference import Reference, Rerun, Run
from lora_fx.targets.keys import own_use

NO_UPDATE = Adapter({})
"""What stands for the base where A and B have to be given: those of every target are zeros."""
RANK = 4
"""The rank of the random adapter that proves a file without adapters."""
SCALES = (0.5, 0.1, 0.02, 0.004, 0.0008)
"""Scales of the random adapter; the first that changes no output by more than its size is used."""


class SwitchableFile(Protocol):
    """A written file as a runtime runs it with different adapters."""

    @property
    def runtime(self) -> str:
        """The name of what runs it."""

    @property
    def rank(self) -> int:
        """The largest rank that an adapter may have; 0 where any fits."""

    def run_with(self, adapter: Adapter | None) -> Run:
        """Return a run of the file with an adapter, or of its base."""

    def rerun_with(self, adapter: Adapter | None) -> Rerun | None:
        """Return other ways to run the file with an adapter, where there are any."""


def prove_switchable(
    file: SwitchableFile,
    reference: Reference,
    layouts: Mapping[str, Layout],
    adapters: Mapping[str, Adapter],
    warnings: list[str],
    gains: Mapping[str, str],
) -> list[Parity]:
    """Compare the file with the reference: without an adapter, then with each adapter.

    Without adapters a random adapter is used, which has factors of rows for the keys of `gains`,
    which gives the hashes of their weights.
    `warnings` gets a line for each adapter that changes nothing.

    Raises:
        NoEffectError: The outputs differ, or the random adapter changes nothing.
    """
    parity = reference.prove(file.run_with(None), None, "base", file.rerun_with(None))
    longest = max((len(adapter.invocation) for adapter in adapters.values()), default=0)
    rows, length = SIZES[0]
    feeds = reference.feeds((rows, length + longest))
    base = file.run_with(None)(feeds)

    def changes_little(adapter: Adapter) -> bool:
        """Whether no output changes by more than its size."""
        return compare(file.run_with(adapter)(feeds), base, {}, 1.0).ok

    proven = adapters
    if not adapters:
        most = file.rank or RANK
        proven = {"random": _random_adapter(layouts, most, changes_little, gains)}
    for name, adapter in proven.items():
        own_feeds = reference.invoked(feeds, adapter)
        base_of_own = file.run_with(None)(own_feeds) if adapter.invocation else base
        run = file.run_with(adapter)
        if _all_equal(run(own_feeds), base_of_own):
            if not adapters:
                raise NoEffectError(
                    "a random adapter changes nothing in the exported file", "report this model"
                )
            warnings.append(f"the adapter {name!r} changes nothing")
        parity += reference.prove(run, adapter, name, file.rerun_with(adapter))
    demand(parity, f"{file.runtime} differs from the model")
    return parity


def _all_equal(outputs: Named, expected: Named) -> bool:
    return all(np.array_equal(outputs[name], expected[name]) for name in expected)


def _random_adapter(
    layouts: Mapping[str, Layout],
    most: int,
    changes_little: Callable[[Adapter], bool],
    gains: Mapping[str, str],
) -> Adapter:
    """Draw an update of every target: large enough to see, without exploding rounding."""
    for scale in SCALES:
        entries = {}
        for key, layout in layouts.items():
            rank = min(RANK, most, layout.max_rank)
            a, b = draw(key, layout, rank, 0, "probe")
            low = LowRank(a, b, scale * a.shape[-2], layout, use=own_use(key))
            if key in gains:
                drawn = generator(key, 1).uniform(-scale, scale, b.shape[:-1])
                low = replace(low, variant_tensors={GAINS: drawn.astype(np.float32)})
            entries[key] = low
        numbered = keys_of_gains(entries)
        adapter = Adapter(entries, {BASE_NUMBER: base_number(gains, numbered)})
        if changes_little(adapter):
            break
    return adapter
