"""Runs of files with the input adapter_starts, in the proof of an export.

The reference masks an aLoRA by the token ids of a call, and a file by `adapter_starts`: a run of
the file gets the starts of the same ids, behind the past. Outputs and caches of tokens before the
start are compared with a run of the base, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.invocation import NEVER
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.inputs import SIZES, Named
from lora_fx.onnx.manifest import Manifest
from lora_fx.onnx.row_starts import STARTS, Starts
from lora_fx.passes.proofs.invocation_spread import prove_tokens
from lora_fx.passes.proofs.reference import Reference, Run


class StartingFile(Protocol):
    """A written file as a runtime runs it, and its manifest."""

    @property
    def manifest(self) -> Manifest:
        """What it says of its adapters."""

    def run_with(self, adapter: Adapter | None) -> Run:
        """Return a run of the file with an adapter, or of its base."""


def starts_of(adapters: Mapping[str, Adapter], reference: Reference) -> Starts | None:
    """Return what a file's manifest says of starts, once the reference's masks are proven.

    It is None where no adapter is an aLoRA.

    Args:
        adapters: By name.
        reference: The base, which has the token ids.

    Raises:
        LoraFxError: An aLoRA, and a model without token ids, or one with a target whose rows are
            not the tokens in their order.
    """
    invocations = {name: adapter.invocation for name, adapter in adapters.items()}
    invoked = [name for name, tokens in invocations.items() if tokens]
    if not invoked:
        return None
    if not reference.ids:
        raise LoraFxError(
            f"{invoked[0]} is an aLoRA, and the model takes no token ids [batch, tokens]",
            "leave the adapter out",
        )
    for name in invoked:
        prove_tokens(reference, name, adapters[name])
    return Starts(reference.ids, invocations=invocations)


def with_starts(starts: Starts, feeds: Named, adapter: Adapter | None) -> dict[str, Array]:
    """Return the inputs of a run with the starts of its own ids; those of the base are NEVER."""
    rows = len(feeds[starts.ids])
    if adapter is None:
        return {**feeds, STARTS: np.full(rows, NEVER, np.int64)}
    return {**feeds, STARTS: starts.within(feeds, [adapter.invocation] * rows)}


def notes_on_caches(
    file: StartingFile, reference: Reference, adapters: Mapping[str, Adapter]
) -> list[str]:
    """Return a line for each aLoRA with which tokens before its start are not the base's."""
    starts = file.manifest.starts
    if starts is None:
        return []
    notes: list[str] = []
    rows, length = SIZES[0]
    for name, adapter in adapters.items():
        if not adapter.invocation:
            continue
        feeds = reference.feeds((rows, length + len(adapter.invocation)))
        feeds = with_starts(starts, reference.invoked(feeds, adapter), adapter)
        base = file.run_with(None)(feeds)
        outputs = file.run_with(adapter)(feeds)
        for output in sorted(set(changed_before(starts, feeds, outputs, base))):
            notes.append(
                f"{name}: output {output!r} of tokens before the invocation is not the base's to "
                "the bit: the model looks ahead, and no cache of the base's serves the adapter"
            )
    return notes


def changed_before(starts: Starts, feeds: Named, outputs: Named, base: Named) -> Iterator[str]:
    """Yield each output by token that differs from the base's before the start of its row.

    Args:
        starts: What the manifest says.
        feeds: The inputs of both runs, with the starts.
        outputs: Those with the adapter.
        base: Those without.
    """
    batch, length = feeds[starts.ids].shape
    past = starts.past_tokens(feeds)
    for name, array in outputs.items():
        if array.shape[:2] == (batch, length):
            by_token, first = (array, base[name]), past
        elif array.ndim == 4 and array.shape[0] == batch and array.shape[2] == past + length:
            # a cache [batch, heads, tokens, width], past first
            by_token, first = (array.swapaxes(1, 2), base[name].swapaxes(1, 2)), 0
        else:
            continue
        ours, theirs = by_token
        for row, start in enumerate(feeds[STARTS]):
            before = max(0, min(int(start), past + length) - first)
            if ours[row, :before].tobytes() != theirs[row, :before].tobytes():
                yield name
