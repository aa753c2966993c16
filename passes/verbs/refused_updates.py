"""The checks that refuse an adapter that a graph, or a file of an export mode, cannot hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.exact_lora import has_low_rank
from lora_fx.adapter.invocation import refuse_invocation
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.updates import Entry, Hadamard, Kronecker, Rotation, name_of
from lora_fx.adapter.variant import (
    names_taken,
)
from lora_fx.errors import (
    LoraFxError,
)


def check_kinds(adapter: Adapter, name: str, taker: str, *, any_rank: bool = True) -> None:
    """Raise for an update that a graph cannot hold; only the adapter is read.

    Args:
        adapter: Bound or not.
        name: What the message calls it.
        taker: What should take it, such as "mode switch".
        any_rank: A LoHa is taken whatever the rank r² that it has as LoRA.
    """
    for key, entry in adapter.entries.items():
        is_taken = not isinstance(entry, Rotation)
        if isinstance(entry, Hadamard):
            is_taken = any_rank or has_low_rank(entry)
        if isinstance(entry, Kronecker):
            is_taken = has_low_rank(entry)
        if not is_taken:
            *names, last = names_taken(reading_weight=True)
            raise LoraFxError(
                f"{name}: {key!r} is {name_of(entry)}{_why_not_lora(entry)}; {taker} takes "
                f"{', '.join(names)} and {last}",
                plain_hint(name),
            )


def _why_not_lora(entry: Entry) -> str:
    """Return why an update is no LoRA of a low rank; empty where its name says it."""
    if isinstance(entry, Rotation):
        return ", which turns the weight by a matrix of full rank"
    if isinstance(entry, Hadamard):
        return f" of rank {entry.rank}² in a matrix {list(entry.shape)}, which is no low rank"
    if isinstance(entry, Kronecker):
        return f" whose factors have no low rank in a matrix {list(entry.shape)}"
    return ""


def plain_hint(name: str) -> str:
    """Return the hint to approximate an adapter by plain LoRA."""
    return (
        f"run lora-fx convert {name} -o OUT --as lora --rank 16 --base MODEL, which approximates "
        "it and reports the error"
    )


def check_adapters(adapters: Mapping[str, Adapter], mode: str) -> None:
    """Raise for tensors of an adapter that a file of this mode cannot hold.

    Only the adapters are read, so this comes before a model is captured.
    """
    for name, adapter in adapters.items():
        if mode not in ("switch", "batch"):
            refuse_invocation(adapter.invocation, name, f"mode {mode}")
        holds_weights = mode in ("merged", "train")
        if adapter.invocation and adapter.full:
            raise LoraFxError(
                f"{name} is an aLoRA that replaces {min(adapter.full)!r} as a whole, which acts on "
                "every token of every row, those before the invocation too",
                exclude_hint(name, [*adapter.full]),
            )
        check_kinds(adapter, name, f"mode {mode}", any_rank=holds_weights)
        if mode == "batch":
            check_rows(adapter, name)


RECURRENT = ("lstm", "gru", "rnn")
"""The prefixes of the names of recurrent ops."""
STACKED = ("einsum", "grouped_mm")
"""Ops of a stack of matrices in which tokens lie where mode batch has no form for them."""


def check_rows(adapter: Adapter, name: str) -> None:
    """Raise for updates that mode batch cannot choose row by row, by the op in the adapter."""
    refused: dict[str, str] = {}
    for key, entry in adapter.lowrank.items():
        kind = _without_rows(entry)
        if kind:
            refused[key] = kind
    if not refused:
        return
    keys = list(refused)
    others = f" (and {len(keys) - 1} more like it)" if len(keys) > 1 else ""
    raise LoraFxError(
        f"{name}: {keys[0]!r} is the weight of {refused[keys[0]]}, whose updates mode batch cannot "
        f"choose row by row{others}",
        f"run {_exclude_command(name, keys)} to leave it out; modes switch and load take it",
    )


def _without_rows(entry: LowRank) -> str:
    """Return the kind of weight that mode batch does not support; empty if it does."""
    op = entry.origin.op
    if op.startswith(RECURRENT):
        return "a recurrent layer"
    if entry.a.ndim > 2 and op in STACKED:
        return "a stack of matrices"
    return ""


def exclude_hint(name: str, keys: Sequence[str]) -> str:
    """Return the hint to leave out an adapter's whole tensors, or to merge them into the base."""
    return (
        f"run {_exclude_command(name, keys)} to leave it out; run the same command with "
        "--include to write it alone, and lora-fx merge to fold that into the base"
    )


def _exclude_command(name: str, keys: Sequence[str]) -> str:
    """Return the command that writes an adapter without some keys."""
    modules = list(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", key) for key in keys))
    return f"lora-fx convert {name} -o OUT --exclude {','.join(modules[:8])}"
