"""doctor's checks that ask the plan of a merge, or what a merge has left."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from lora_fx.adapter.fused import Family, family_of
from lora_fx.adapter.updates import Entry, Rotation
from lora_fx.adapter.variant import variant_of
from lora_fx.checkpoint.findings import ERROR, NOTE, WARNING, Finding, about
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
"""Check → the options of a merge, each of which takes what it finds."""


LENIENT: Json = {names[0]: True for names in TAKEN_BY.values() if len(names) == 1}
"""The options of a merge that takes what one of the checks has found already."""


def _plan(pair: Pair, entries: Mapping[str, Entry], *, lenient: bool = False) -> MergePlan:
    """What merge would do with these entries; `lenient` takes what a check has told already."""
    adapter, options = replace(pair.adapter, entries=entries), pair.options
    options = replace(options, **LENIENT) if lenient else options
    return make_plan(
        pair.base, [WeightedAdapter(adapter, 1.0, str(pair.path), pair.digest)], options
    )


def planned(pair: Pair, told: Collection[str] = ()) -> MergePlan | LoraFxError:
    """The plan of `lora-fx merge`, or why there is none.

    Args:
        pair: The pair.
        told: Keys of which a check has told; the others are planned, as if that were mended.
    """
    if pair.refusal is not None and not told:
        return pair.refusal
    rest = {k: e for k, e in pair.adapter.entries.items() if k not in told}
    try:
        plan = _plan(pair, rest, lenient=bool(told))
        if pair.options.requantise and not pair.options.lossy:
            anew = [(c.codes, c.fold) for c in plan.changes.values() if c.codes and c.fold]
            refuse_loss(sampled(anew), "the output")
    except LoraFxError as error:
        return error
    return plan


def tied(pair: Pair) -> Iterator[Finding]:
    """No update of one use of a tensor that is both embedding and output head."""
    if pair.tie is None:
        return
    sound = {k: e for k, e in pair.adapter.entries.items() if k not in pair.misfits}
    try:
        plan = _plan(pair, sound, lenient=True)
    except LoraFxError:
        return  # another check, or the last, tells
    yield from about(
        plan.one_use,
        f"it is one of two uses of one tensor: {pair.tie.table} is also the output head",
        "an update of both uses, or a base whose head is a tensor of its own",
        "lora-fx merge --untie gives the head a tensor of its own; other tools change both",
    )


def merged(pair: Pair) -> Iterator[Finding]:
    """The adapter is not in the base already."""
    try:
        refuse_again(pair.base.path, history(pair.base), [("it", pair.digest)], again=False)
    except MergeRefusal:
        yield Finding(
            list(pair.adapter.entries),
            "the base's metadata says that this adapter is merged into it",
            "the original base",
            "start from the original; lora-fx merge --again merges it once more",
        )


def added(pair: Pair) -> Iterator[Finding]:
    """Whole tensors that the base lacks, such as a new head."""
    yield from about(
        [k for k in pair.adapter.full if pair.tensor(k) is None],
        "whole tensors that the base has not, such as a new head",
        "tensors of the base",
        "lora-fx merge --add writes them into the output",
    )


def trained(pair: Pair) -> Iterator[Finding]:
    """Updates that are zero: B (or A) was never moved from its start."""
    low = pair.adapter.lowrank.items()
    sums = [(k, e) for k, e in low if not e.mutated and not variant_of(e).reads_weight]
    zero = [k for k, e in sums if e.norm == 0.0]
    turns = ((k, e) for k, e in pair.adapter.entries.items() if isinstance(e, Rotation))
    zero += [k for k, e in turns if not e.turn.any()]
    if not zero:
        return
    whole = len(zero) == len(pair.adapter.entries)
    yield Finding(
        zero,
        "A or B is zero: untrained" + (", and so is every other update" if whole else ""),
        "an update",
        "was the adapter saved before training?" if whole else "did a gradient reach them?",
        ERROR if whole else WARNING,
    )


def served(pair: Pair, server: str) -> Iterator[Finding]:
    """What a program would make of the adapter, by the table of `lora_fx.formats.servers`."""
    types = model_types(pair.base.config())
    family = family_of(types) or Family()
    shapes = {name: array.shape for name, array in pair.raw.tensors.items()}
    found = seen(shapes, pair.raw.config, family)
    for rule, names in verdicts(server, found, family, types):
        what = f"{SERVERS[server]} {rule.outcome} {rule.said} ({rule.source})"
        if rule.outcome == READS:
            yield Finding(names, what, "", "", NOTE)
            continue
        hint = f"lora-fx convert {pair.path} -o OUT --format {server} --base {pair.base.path}"
        hint = "lora-fx merge folds it into its base" if rule.what in STAYS else hint
        yield Finding(names, what, "what it applies as it was trained", hint)
    if not shapes:
        yield Finding(
            [],
            "a file of another format",
            "one of PEFT's",
            f"lora-fx convert {pair.path} -o FOLDER",
        )
