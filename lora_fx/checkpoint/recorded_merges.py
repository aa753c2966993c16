"""What a file's own records say was merged into it, planned again, merge after merge.

Each merge that is recorded after those of the base is a stage: its adapters, weights and options.
The plan of all stages is the one that `prove` checks: a tensor that several stages change is
rounded after each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_fx.checkpoint.companions import untied
from lora_fx.checkpoint.make_plan import make_plan
from lora_fx.checkpoint.merge_options import HOWS, LENIENT, MergeOptions
from lora_fx.checkpoint.merge_plan import MergePlan, WeightedAdapter
from lora_fx.checkpoint.provenance import history, layout_hash, sample_hash
from lora_fx.checkpoint.tensor_change import TensorChange
from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import Checkpoint
from lora_fx.files.quantised.dequantise import is_view
from lora_fx.text import Json, JsonView


@dataclass(frozen=True)
class Recorded:
    """An adapter that a file records: in which of its merges, and what was given for it."""

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
        return f"merge {self.merge}: one of hash {self.hash[:12]}{weight}, not given"


def chain_of(
    merged: Checkpoint, base: Checkpoint, given: Sequence[WeightedAdapter]
) -> tuple[MergePlan, list[Recorded], list[str]]:
    """What the merges should have done, in the dtypes that they have done it in.

    Args:
        merged: The file.
        base: What it is compared with.
        given: The adapters, in any order.

    Returns:
        The plan of all merges, what the file records, and what should be said.

    Raises:
        LoraFxError: An adapter that cannot be merged, or a tensor whose changes by one merge
            depend on those by another, so that the file between them would be needed.
    """
    merges, before = history(merged), history(base)
    notes: list[str] = []
    known = merges[: len(before)] == before
    records = merges[len(before) :] if known else merges
    stages, recorded, strange = _assigned(records, given)
    if merges:
        notes += [f"{merged.path} does not say that {g.where} was merged into it" for g in strange]
    if any(not r.given for r in recorded):
        count = sum(not r.given for r in recorded)
        notes.append(
            f"{merged.path} records {len(recorded)} adapters that were merged into it, and {count} "
            f"of them were not given here: {'; '.join(map(str, recorded))}"
        )
    plans: list[MergePlan] = []
    here = base
    for record, parts in [*zip(records, stages, strict=True), ({}, strange)]:
        if not parts:
            continue
        plan = make_plan(here, parts, _options(record, parts, here, merged))
        if plans and not is_view(here) and is_view(plan.base):
            raise LoraFxError(
                f"{merged.path}: codes that one merge found became floats in a later one",
                "verify each merge against what it started from",
            )
        notes += [n for n in plan.notes if not plans or n not in plan.unverified]
        plans.append(plan)
        here = _after(plan)
    if not plans:
        make_plan(base, given, MergeOptions())  # raises: nothing was given
    full = len(records) > 0 and all(r.given for r in recorded if r.merge == 1)
    if not known or (records and _other_base(records[0], base, plans[0] if full else None)):
        notes.append(f"{merged.path} says that it was made from another base than {base.path}")
    return _joined(plans, merged), recorded, notes


def _assigned(
    records: Sequence[JsonView], given: Sequence[WeightedAdapter]
) -> tuple[list[list[WeightedAdapter]], list[Recorded], list[WeightedAdapter]]:
    """The adapters of every record, what is recorded, and adapters that no record has.

    One that is recorded several times and given once is the one of all these records.
    """
    stages: list[list[WeightedAdapter]] = [[] for _ in records]
    recorded: list[Recorded] = []
    used: set[int] = set()
    for i, record in enumerate(records):
        for row in record["adapters"]:
            digest, weight = str(row.get("hash")), row.get("weight")
            weight = float(weight) if isinstance(weight, (int, float)) else None
            same = [g for g in given if g.hash == digest]
            fresh = [g for g in same if id(g) not in used]
            part = next(iter(fresh or same[-1:]), None)
            where = part.where if part is not None and (fresh or len(same) == 1) else ""
            recorded.append(Recorded(i + 1, digest, weight, where))
            if part is not None and where:
                used.add(id(part))
                mine = part.weight if part.stated or weight is None else weight
                stages[i].append(replace(part, weight=mine))
    return stages, recorded, [g for g in given if id(g) not in used]


def _options(
    record: JsonView, parts: Sequence[WeightedAdapter], base: Checkpoint, merged: Checkpoint
) -> MergeOptions:
    asked = record.get("options")
    asked = asked if isinstance(asked, dict) else {}
    new = any(k in merged.tensors and k not in base.tensors for p in parts for k in p.adapter.full)
    mixed = len(parts) > 1
    names = ("allow_unused", "allow_missing", "dequantise", "requantise")
    flags = {name: asked.get(name) is True for name in names}
    return replace(
        LENIENT,
        how=asked["how"] if mixed and asked.get("how") in HOWS else "sum",
        rank=asked["rank"] if mixed and isinstance(asked.get("rank"), int) else None,
        dtype=record["dtype"] if record.get("dtype") in FLOATING else None,
        add=new,
        **flags,
    )


def _after(plan: MergePlan) -> Checkpoint:
    """What a later merge started from: the names and the config; the values are the base's."""
    base = plan.base
    new = {n: plan.changes[n].source for n in plan.added}
    settings = untied(base.config()) if plan.tie is not None else base.settings
    return replace(base, tensors={**base.tensors, **new}, settings=settings)


def _other_base(record: JsonView, base: Checkpoint, plan: MergePlan | None) -> bool:
    """True where the first merge says that it started from other weights, or another model."""
    said = record.get("base")
    said = said if isinstance(said, dict) else {}
    seen = base if plan is None else plan.base
    if said.get("layout") not in (None, layout_hash(seen.tensors)):
        return True
    if plan is None:  # which tensors were sampled is not known
        return False
    old = [(n, plan.base.tensors[n]) for n in plan.changes if n not in plan.added]
    return said.get("sample") not in (None, sample_hash(old))


def _joined(plans: Sequence[MergePlan], merged: Checkpoint) -> MergePlan:
    changes: dict[str, TensorChange] = {}
    added: dict[str, str] = {}
    for plan in plans:
        added |= plan.added
        for name, change in plan.changes.items():
            first = changes.get(name)
            changes[name] = change if first is None else _then(first, change, plan, merged)
    for name, change in changes.items():
        info = merged.tensors.get(name)
        floats = info is not None and {info.dtype, change.dtype} <= {*FLOATING}
        if info is not None and floats and not change.scales_of:
            changes[name] = replace(change, dtype=info.dtype)
    adapters = tuple(g for p in plans for g in p.adapters)
    return replace(plans[0], adapters=adapters, changes=changes, added=added)


def _then(
    first: TensorChange, second: TensorChange, plan: MergePlan, merged: Checkpoint
) -> TensorChange:
    """A tensor after both changes."""
    codes = any(c.int8 or c.codes or c.scales_of for c in (first, second))
    if second.fold is None and not codes:
        return second
    one, two = first.fold, second.fold
    why = ""
    if codes:
        why = "quantised to int8 anew" if first.int8 or second.int8 else "quantised anew"
    elif one is None or two is None:
        why = "replaced whole"
    elif (one.matrix.rows, one.matrix.columns) != (two.matrix.rows, two.matrix.columns):
        why = "seen with other axes"
    elif any(p.reads_weight or p.mutated for p in two.matrix.parts):
        why = "changed, and then rescaled,"
    if one is None or two is None or why:
        raise LoraFxError(
            f"{merged.path}: {second.name!r} was {why} by one merge and changed by a later one, "
            "which cannot be computed without the file between them",
            "verify each merge against what it started from",
        )
    dtype = plan.options.dtype if plan.options.dtype and first.dtype in FLOATING else first.dtype
    earlier = (*first.earlier, (one, first.dtype))
    what = (*first.what, *second.what)
    return replace(second, source=first.source, dtype=dtype, earlier=earlier, what=what)
