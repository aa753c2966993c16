"""The merges that a file's metadata records, planned again one after the other.

Each merge that is recorded after those of the base is a stage: its adapters, weights and options.
The plan of all stages is the one that `prove` checks: a tensor that several stages change is
rounded after each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lora_fx.checkpoint.companions import untied
from lora_fx.checkpoint.make_plan import make_plan
from lora_fx.checkpoint.merge_plan import MergePlan, WeightedAdapter
from lora_fx.checkpoint.merge_settings import HOWS, LENIENT, MergeOptions
from lora_fx.checkpoint.provenance import history, layout_hash, sample_hash
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.dequantise import is_view
from lora_fx.text import Json, JsonView


@dataclass(frozen=True)
class Recorded:
    """An adapter that a file records: the number of its merge, and the adapter given for it."""

    merge: int
    hash: str
    weight: float | None
    given: str = ""

    def to_json(self) -> Json:
        """A row of `recorded[]` in docs/json.md."""
        return {**vars(self), "given": bool(self.given)}

    def __str__(self) -> str:
        """One line for people."""
        if self.given:
            return f"merge {self.merge}: {self.given}"
        weight = "" if self.weight is None else f" with weight {self.weight:g}"
        return f"merge {self.merge}: an adapter with hash {self.hash[:12]}{weight}, not given"


def chain_of(
    merged: Checkpoint, base: Checkpoint, adapters: Sequence[WeightedAdapter]
) -> tuple[MergePlan, list[Recorded], list[str]]:
    """Plan a file's recorded merges again, in the dtypes that the file has.

    Args:
        merged: The file.
        base: What it is compared with.
        adapters: Those that were merged, in any order.

    Returns:
        The plan of all merges, the recorded adapters, and warnings for the user.

    Raises:
        LoraFxError: An adapter that cannot be merged, or a tensor whose changes by one merge
            depend on those by another, so that the file between them would be needed.
    """
    merges = history(merged)
    merges_of_base = history(base)
    continues_base = merges[: len(merges_of_base)] == merges_of_base
    records = merges[len(merges_of_base) :] if continues_base else merges
    assigned = _assigned(records, adapters)

    notes: list[str] = []
    if merges:
        for adapter in assigned.unrecorded:
            notes.append(f"{merged.path} has no record that {adapter.where} was merged into it")
    notes += _note_of_missing(assigned.recorded, merged)
    plans = _plans(records, assigned, base, merged, notes)
    if not plans:
        make_plan(base, adapters, MergeOptions())  # raises: nothing was given

    has_all_of_first = all(recorded.given for recorded in assigned.recorded if recorded.merge == 1)
    is_of_base = continues_base
    if records:
        first_plan = plans[0] if has_all_of_first else None
        is_of_base = is_of_base and not _other_base(records[0], base, first_plan)
    if not is_of_base:
        notes.append(f"{merged.path} records another base than {base.path}")
    return _joined(plans, merged), assigned.recorded, notes


@dataclass(frozen=True)
class _Assigned:
    """The adapters of each recorded merge.

    Attributes:
        stages: The adapters of every record.
        recorded: What is recorded of adapters.
        unrecorded: Given adapters that are in no record.
    """

    stages: list[list[WeightedAdapter]]
    recorded: list[Recorded]
    unrecorded: list[WeightedAdapter]


def _assigned(records: Sequence[JsonView], adapters: Sequence[WeightedAdapter]) -> _Assigned:
    """Assign adapters to the recorded merges by their hashes.

    One that is recorded several times and given once is the one of all these records.
    """
    stages: list[list[WeightedAdapter]] = [[] for _ in records]
    recorded: list[Recorded] = []
    used: set[int] = set()
    for i, record in enumerate(records):
        for row in record["adapters"]:
            digest = str(row.get("hash"))
            weight = row.get("weight")
            weight = float(weight) if isinstance(weight, (int, float)) else None
            adapter = _adapter_of(digest, adapters, used)
            if adapter is None:
                recorded.append(Recorded(i + 1, digest, weight))
                continue
            used.add(id(adapter))
            recorded.append(Recorded(i + 1, digest, weight, adapter.where))
            if weight is not None and not adapter.stated:
                adapter = replace(adapter, weight=weight)
            stages[i].append(adapter)
    unrecorded = [adapter for adapter in adapters if id(adapter) not in used]
    return _Assigned(stages, recorded, unrecorded)


def _adapter_of(
    digest: str, adapters: Sequence[WeightedAdapter], used: Collection[int]
) -> WeightedAdapter | None:
    """The adapter of a recorded hash; one for several records only where it is given once."""
    candidates = [adapter for adapter in adapters if adapter.hash == digest]
    for adapter in candidates:
        if id(adapter) not in used:
            return adapter
    if len(candidates) != 1:
        return None
    return candidates[0]


def _note_of_missing(recorded: Sequence[Recorded], merged: Checkpoint) -> list[str]:
    """A note about recorded adapters that were not given, if there are any."""
    count = sum(not row.given for row in recorded)
    if not count:
        return []
    return [
        f"{merged.path} records {len(recorded)} merged adapters, and {count} of them were not "
        f"given: {'; '.join(map(str, recorded))}"
    ]


def _plans(
    records: Sequence[JsonView],
    assigned: _Assigned,
    base: Checkpoint,
    merged: Checkpoint,
    notes: list[str],
) -> list[MergePlan]:
    """The plan of every merge, each from what the one before has made; adds notes."""
    plans: list[MergePlan] = []
    stages = [*zip(records, assigned.stages, strict=True), ({}, assigned.unrecorded)]
    for record, adapters in stages:
        if not adapters:
            continue
        plan = make_plan(base, adapters, _options(record, adapters, base, merged))
        if plans and not is_view(base) and is_view(plan.base):
            raise LoraFxError(
                f"{merged.path}: one merge read quantised codes that a later merge turned into "
                "floats",
                "verify each merge against what it started from",
            )
        for note in plan.notes:
            if not plans or note not in plan.unverified:
                notes.append(note)
        plans.append(plan)
        base = _after(plan)
    return plans


def _options(
    record: JsonView, adapters: Sequence[WeightedAdapter], base: Checkpoint, merged: Checkpoint
) -> MergeOptions:
    """The options of a recorded merge, as far as they decide its numbers."""
    recorded = record.get("options")
    if not isinstance(recorded, dict):
        recorded = {}
    options = replace(
        LENIENT,
        allow_unused=recorded.get("allow_unused") is True,
        allow_missing=recorded.get("allow_missing") is True,
        dequantise=recorded.get("dequantise") is True,
        requantise=recorded.get("requantise") is True,
        add=_adds_tensors(adapters, base, merged),
        dtype=record["dtype"] if record.get("dtype") in FLOATING else None,
    )
    if len(adapters) < 2:
        return options
    how = recorded.get("how")
    rank = recorded.get("rank")
    return replace(
        options,
        how=how if how in HOWS else "sum",
        rank=rank if isinstance(rank, int) else None,
    )


def _adds_tensors(
    adapters: Sequence[WeightedAdapter], base: Checkpoint, merged: Checkpoint
) -> bool:
    """Whether a whole tensor of an adapter is in the merged file, and not in the base."""
    for adapter in adapters:
        for key in adapter.adapter.full:
            if key in merged.tensors and key not in base.tensors:
                return True
    return False


def _after(plan: MergePlan) -> Checkpoint:
    """The start of a later merge: its names and config, with the base's values."""
    base = plan.base
    added = {name: plan.changes[name].source for name in plan.added}
    settings = base.settings
    if plan.tie is not None:
        settings = untied(base.config())
    return replace(base, tensors={**base.tensors, **added}, settings=settings)


def _other_base(record: JsonView, base: Checkpoint, plan: MergePlan | None) -> bool:
    """Whether the first merge records that it started from other weights, or another model.

    Args:
        record: What is recorded of it.
        base: The checkpoint that it may have started from.
        plan: The plan of the same merge; None where not all of its adapters are there, and so
            which tensors were sampled is not known.
    """
    recorded = record.get("base")
    if not isinstance(recorded, dict):
        return False
    start = base if plan is None else plan.base
    if recorded.get("layout") not in (None, layout_hash(start.tensors)):
        return True
    if plan is None:
        return False
    return recorded.get("sample") not in (None, sample_hash(plan.replaced_tensors()))


def _joined(plans: Sequence[MergePlan], merged: Checkpoint) -> MergePlan:
    """The plan of several merges as one, in the dtypes that the merged file has."""
    adapters: list[WeightedAdapter] = []
    changes: dict[str, TensorChange] = {}
    added: dict[str, str] = {}
    for plan in plans:
        adapters += plan.adapters
        added |= plan.added
        for name, change in plan.changes.items():
            if name in changes:
                change = _then(changes[name], change, plan, merged)
            changes[name] = change

    for name, change in changes.items():
        info = merged.tensors.get(name)
        if info is None or change.scales_of:
            continue
        if info.dtype in FLOATING and change.dtype in FLOATING:
            changes[name] = replace(change, dtype=info.dtype)
    return replace(plans[0], adapters=tuple(adapters), changes=changes, added=added)


def _then(
    first: TensorChange, second: TensorChange, plan: MergePlan, merged: Checkpoint
) -> TensorChange:
    """Combine two changes of a tensor, the second after the first.

    Raises:
        LoraFxError: The second depends on what the first has made.
    """
    if second.fold is None and not _are_codes(first, second):
        return second
    why = _needs_file_between(first, second)
    if why:
        raise LoraFxError(
            f"{merged.path}: {second.name!r} was {why} by one merge and changed by a later merge; "
            "this cannot be computed without the file between the two",
            "verify each merge against what it started from",
        )
    assert first.fold is not None  # it was replaced whole otherwise
    dtype = first.dtype
    if plan.options.dtype and dtype in FLOATING:
        dtype = plan.options.dtype
    return replace(
        second,
        source=first.source,
        dtype=dtype,
        earlier=(*first.earlier, (first.fold, first.dtype)),
        what=(*first.what, *second.what),
    )


def _are_codes(*changes: TensorChange) -> bool:
    """Whether one of the changes writes new codes or new scales."""
    return any(change.int8 or change.codes or change.scales_of for change in changes)


def _needs_file_between(first: TensorChange, second: TensorChange) -> str:
    """Why the second change needs the file between the two merges: what the first change did.

    Empty where the second can be computed without it.
    """
    if _are_codes(first, second):
        if first.int8 or second.int8:
            return "quantised to int8 again"
        return "quantised again"
    if first.fold is None or second.fold is None:
        return "replaced whole"
    earlier = first.fold.matrix
    later = second.fold.matrix
    if (earlier.rows, earlier.columns) != (later.rows, later.columns):
        return "changed with other axes"
    if any(rectangle.reads_weight or rectangle.mutated for rectangle in later.rectangles):
        return "changed, and then rescaled,"
    return ""
