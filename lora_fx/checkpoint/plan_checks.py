"""doctor's checks that read the plan of a merge, or the record of earlier merges."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from lora_fx.adapter.expert_families import Family, family_of
from lora_fx.adapter.invocation import refuse_invocation
from lora_fx.adapter.updates import Entry, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.findings import NOTE, WARNING, Finding, about
from lora_fx.checkpoint.make_plan import make_plan
from lora_fx.checkpoint.merge_plan import MergePlan, WeightedAdapter
from lora_fx.checkpoint.pair import Pair
from lora_fx.checkpoint.provenance import history, refuse_again
from lora_fx.checkpoint.refusal import BASE, MERGED, MISSING, READ_TOO, TIED, UNUSED, MergeRefusal
from lora_fx.checkpoint.requantise import refuse_loss, sampled
from lora_fx.checkpoint.storage_order import model_types
from lora_fx.errors import LoraFxError
from lora_fx.formats.servers import READS, SERVERS, STAYS, seen, verdicts
from lora_fx.text import Json

TAKEN_BY: Mapping[str, tuple[str, ...]] = {
    UNUSED: ("allow_unused",),
    MISSING: ("allow_missing",),
    TIED: ("untie",),
    BASE: ("any_base",),
    MERGED: ("again",),
    READ_TOO: ("other_readers",),
    "new tensors": ("add",),
    "quantised base": ("dequantise", "requantise"),
}
"""Check → the merge options that accept the check's finding; each of them is enough."""


LENIENT: Json = {names[0]: True for names in TAKEN_BY.values() if len(names) == 1}
"""Merge options that accept what other checks have already reported."""


def _plan(pair: Pair, entries: Mapping[str, Entry], *, lenient: bool = False) -> MergePlan:
    """Plan a merge of these entries; `lenient` accepts what a check has already reported."""
    adapter = replace(pair.adapter, entries=entries)
    options = replace(pair.options, **LENIENT) if lenient else pair.options
    weighted = WeightedAdapter(adapter, 1.0, str(pair.path), pair.digest)
    return make_plan(pair.base, [weighted], options)


def planned(pair: Pair, reported: Collection[str] = ()) -> MergePlan | LoraFxError:
    """Plan `lora-fx merge`; return the refusal if it cannot be planned.

    Args:
        pair: The pair.
        reported: Keys that a check has already reported; only the other keys are planned.
    """
    if pair.refusal is not None and not reported:
        return pair.refusal
    entries = {key: entry for key, entry in pair.adapter.entries.items() if key not in reported}
    try:
        refuse_invocation(pair.adapter.invocation, str(pair.path), "a merge")
        plan = _plan(pair, entries, lenient=bool(reported))
        if pair.options.requantise and not pair.options.lossy:
            folds = [
                (change.codes, change.fold)
                for change in plan.changes.values()
                if change.codes and change.fold
            ]
            refuse_loss(sampled(folds), "the output")
    except LoraFxError as error:
        return error
    return plan


def tied(pair: Pair) -> Iterator[Finding]:
    """Check that no update is for one use of a tensor that is both embedding and output head."""
    if pair.tie is None:
        return
    fitting = {key: entry for key, entry in pair.adapter.entries.items() if key not in pair.misfits}
    try:
        plan = _plan(pair, fitting, lenient=True)
    except LoraFxError:
        return  # another check, or the last, tells
    yield from about(
        plan.one_use,
        f"the update is for one of two uses of {pair.tie.table}, which is also the output head",
        "an update for both uses, or a base with a separate tensor for the head",
        "run lora-fx merge --untie to give the head a separate tensor; other tools change both "
        "uses",
    )


def merged(pair: Pair) -> Iterator[Finding]:
    """Check that the adapter is not merged into the base already."""
    try:
        refuse_again(pair.base.path, history(pair.base), [("it", pair.digest)], again=False)
    except MergeRefusal:
        yield Finding(
            list(pair.adapter.entries),
            "the base's metadata says that this adapter is already merged into it",
            "the original base",
            "start from the original base; or run lora-fx merge --again to merge the adapter "
            "once more",
        )


def added(pair: Pair) -> Iterator[Finding]:
    """Check for whole tensors that the base lacks, such as a new head."""
    yield from about(
        [key for key in pair.adapter.full if pair.tensor(key) is None],
        "whole tensors that the base does not have, such as a new head",
        "tensors of the base",
        "run lora-fx merge --add to write them into the output",
    )


def trained(pair: Pair) -> Iterator[Finding]:
    """Check for updates that are zero: B (or A) still has its initial value."""
    zero: list[str] = []
    for key, low in pair.adapter.lowrank.items():
        is_added = not low.mutated and not variant_of(low).reads_weight
        if is_added and low.norm == 0.0:
            zero.append(key)
    for key, entry in pair.adapter.entries.items():
        if isinstance(entry, Rotation) and not entry.turn.any():
            zero.append(key)
    if not zero:
        return
    if len(zero) == len(pair.adapter.entries):
        yield Finding(
            zero,
            "A or B is zero in every update: the adapter is untrained",
            "an update",
            "check that the adapter was saved after training",
        )
    else:
        yield Finding(
            zero,
            "A or B is zero: the update is untrained",
            "an update",
            "check that a gradient reached these tensors in training",
            WARNING,
        )


def served(pair: Pair, server: str) -> Iterator[Finding]:
    """Check how a server would read the adapter, with the table in `lora_fx.formats.servers`."""
    types = model_types(pair.base.config())
    family = family_of(types) or Family()
    shapes = {name: array.shape for name, array in pair.raw.tensors.items()}
    facts = seen(shapes, pair.raw.config, family)
    for rule, names in verdicts(server, facts, family, types):
        what = f"{SERVERS[server]} {rule.outcome} {rule.said} ({rule.source})"
        if rule.outcome == READS:
            yield Finding(names, what, "", "", NOTE)
            continue
        hint = f"lora-fx convert {pair.path} -o OUT --format {server} --base {pair.base.path}"
        if rule.what in STAYS:
            hint = "fold the adapter into its base with lora-fx merge"
        yield Finding(names, what, "an adapter that this program applies as it was trained", hint)
    if not shapes:
        yield Finding(
            [],
            "the file is not in PEFT's format",
            "a PEFT adapter",
            f"lora-fx convert {pair.path} -o FOLDER",
        )
