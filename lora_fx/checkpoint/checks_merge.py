"""doctor's checks that ask the plan of a merge, or what a merge has left. They yield findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lora_fx.adapter.updates import Entry
from lora_fx.checkpoint.merge_plan import Given, Options, Plan, make_plan
from lora_fx.checkpoint.pair import Finding, Pair
from lora_fx.checkpoint.provenance import history
from lora_fx.errors import LoraFxError

ALLOWED = Options(
    untie=True, again=True, allow_unused=True, allow_missing=True, add=True, any_base=True
)
"""Of a merge that takes what one of the checks has told already."""


def _plan(pair: Pair, options: Options, *, entries: Mapping[str, Entry] | None = None) -> Plan:
    """What merge would do with the pair."""
    adapter = pair.adapter if entries is None else replace(pair.adapter, entries=entries)
    return make_plan(pair.base, [Given(adapter, 1.0, str(pair.path), pair.digest)], options)


def refusal(pair: Pair) -> LoraFxError | None:
    """What `lora-fx merge` without options would say; None where it would merge."""
    if pair.refusal is not None:
        return pair.refusal
    try:
        _plan(pair, Options())
    except LoraFxError as error:
        return error
    return None


def refused(pair: Pair) -> Iterator[Finding]:
    """lora-fx merge would take the pair; what no other check has said."""
    error = refusal(pair)
    if error is not None:
        yield Finding([], error.message, "a pair that can be merged", error.hint)


def tied(pair: Pair) -> Iterator[Finding]:
    """No update of one use of a tensor that is both embedding and output head."""
    if pair.tie is None:
        return
    sound = {k: e for k, e in pair.adapter.entries.items() if k not in pair.misfits}
    try:
        plan = _plan(pair, ALLOWED, entries=sound)
    except LoraFxError:
        return  # another check, or the last, tells
    if plan.one_use:
        yield Finding(
            list(plan.one_use),
            f"it is one of two uses of one tensor: {pair.tie.table} is also the output head",
            "an update of both uses, or a base whose head is a tensor of its own",
            "lora-fx merge --untie gives the head a tensor of its own; other tools change both",
        )


def merged(pair: Pair) -> Iterator[Finding]:
    """The adapter is not in the base already."""
    folded = {a.get("hash") for m in history(pair.base) for a in m["adapters"]}
    if pair.digest in folded:
        yield Finding(
            list(pair.adapter.entries),
            "the base's metadata says that this adapter is merged into it",
            "the original base",
            "start from the original; lora-fx merge --again merges it once more",
        )


def added(pair: Pair) -> Iterator[Finding]:
    """Whole tensors that the base lacks, such as a new head."""
    full = pair.adapter.full
    new = [k for k in full if pair.tensor(k) is None]
    if new:
        yield Finding(
            new,
            "whole tensors that the base has not, such as a new head",
            "tensors of the base",
            "lora-fx merge --add writes them into the output",
        )
