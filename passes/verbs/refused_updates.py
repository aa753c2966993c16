"""Refuse an adapter that a graph, or a file of a mode of export, has no place for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Hadamard, Kronecker, ReplacedRows, Rotation, name_of
from lora_fx.adapter.variant import (
    names_taken,
    variant_of,
)
from lora_fx.errors import (
    LoraFxError,
)


def check_kinds(adapter: Adapter, name: str, taker: str, *, reading_weight: bool = True) -> None:
    """Raise for an update that no graph can hold, which the adapter alone tells.

    Args:
        adapter: Bound or not.
        name: What the message calls it.
        taker: What should take it, such as "mode switch".
        reading_weight: A variant that reads W itself is taken.
    """
    for key, entry in adapter.entries.items():
        reads = isinstance(entry, LowRank) and variant_of(entry).reads_weight
        other = isinstance(entry, (Hadamard, Kronecker, Rotation))
        if other or (reads and not reading_weight):
            *names, last = names_taken(reading_weight=reading_weight)
            known = f"{', '.join(names)} and {last}"
            raise LoraFxError(
                f"{name}: {key!r} is {name_of(entry)}; {taker} takes {known}",
                f"lora-fx convert {name} -o OUT --as lora --base MODEL approximates it, and says "
                "how well",
            )


def check_adapters(adapters: Mapping[str, Adapter], mode: str) -> None:
    """Raise for what an adapter holds and a file of a mode has no place for.

    The adapters alone tell, so this comes before a model is captured. Mode switch folds the whole
    tensors of a single adapter into the base.
    """
    for name, adapter in adapters.items():
        check_kinds(adapter, name, f"mode {mode}", reading_weight=mode in ("merged", "train"))
        entries = adapter.entries.items()
        whole = [key for key, entry in entries if isinstance(entry, (Full, Dense, ReplacedRows))]
        alone = mode == "switch" and len(adapters) == 1
        if whole and mode not in ("merged", "train") and not alone:
            raise LoraFxError(
                f"{name}: it holds the whole tensor {whole[0]!r}; mode {mode} has a place for low-"
                "rank updates alone",
                exclude_hint(name, whole),
            )
        if mode == "batch":
            check_rows(adapter, name)


RECURRENT = ("lstm", "gru", "rnn")
"""How the ops of recurrent layers begin."""


def check_rows(adapter: Adapter, name: str) -> None:
    """Raise for updates that a row of mode batch cannot have, as the op in the file tells."""
    kinds = {key: _without_rows(entry) for key, entry in adapter.lowrank.items()}
    refused = [key for key, kind in kinds.items() if kind]
    if refused:
        raise LoraFxError(
            f"{name}: {refused[0]!r} is of {kinds[refused[0]]}; mode batch has no form by row for "
            f"it{f', nor for {len(refused) - 1} more' if len(refused) > 1 else ''}",
            f"{_exclude_command(name, refused)} leaves it out; modes switch and load take it",
        )


def _without_rows(entry: LowRank) -> str:
    """What the weight of an update is, where mode batch has no form for it; empty where it has."""
    if entry.op.startswith("conv_transpose"):
        return "a transposed convolution"
    if entry.op.startswith(RECURRENT):
        return "a recurrent layer"
    if entry.a.ndim > 2:
        return "a grouped convolution" if entry.op.startswith("conv") else "a stack of matrices"
    return ""


def exclude_hint(name: str, keys: Sequence[str]) -> str:
    """How to go on without the whole tensors of an adapter, or with them in the base."""
    return (
        f"{_exclude_command(name, keys)} leaves it out; with --include in its place, OUT holds it "
        "alone, and lora-fx merge puts that into the base"
    )


def _exclude_command(name: str, keys: Sequence[str]) -> str:
    """The command that writes an adapter without some keys."""
    modules = list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", key) for key in keys))
    return f"lora-fx convert {name} -o OUT --exclude {','.join(modules[:8])}"
