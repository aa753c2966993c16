"""verify on tensor files: nothing is run, tensors are compared; see `lora_fx.verify`.

MERGED against BASE and adapters: every touched tensor is W + Σ wᵢ·sᵢ·BᵢAᵢ in the dtype that MERGED
has it in, within what fp32 and one rounding allow (see prove.py); all others are the base's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.merge import Adapters, cores, given
from lora_fx.checkpoint.merge_plan import (
    HOWS,
    LENIENT,
    Given,
    MergeOptions,
    MergePlan,
    TensorChange,
    make_plan,
)
from lora_fx.checkpoint.model_families import targets_of
from lora_fx.checkpoint.prove import ROWS, prove, unlike
from lora_fx.checkpoint.provenance import history, layout_hash, sample_hash
from lora_fx.checkpoint.write import untied
from lora_fx.compare import Report
from lora_fx.dtypes import FLOATING
from lora_fx.errors import LoraFxError, explained
from lora_fx.files.checkpoint import PICKLES, Checkpoint, open_checkpoint
from lora_fx.files.quantised.dequantise import is_view
from lora_fx.files.run_files import check_unchanged, remembering
from lora_fx.formats.io import AdapterLike, is_adapter, load_adapter
from lora_fx.text import Json, JsonView


def is_tensor_file(path: object) -> TypeGuard[str | os.PathLike[str]]:
    """True for a `.safetensors` file or a pickle, or a folder of them, that is no adapter."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    path = Path(path)
    kinds = (".safetensors", *PICKLES)
    return (path.suffix in kinds or path.is_dir()) and not is_adapter(path)


@remembering()
def verify_files(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    adapter: Adapters | tuple[AdapterLike, float] | None = None,
    *,
    tol: float = 0.0,
    rows: int | None = ROWS,
) -> Report:
    """Compare two checkpoints tensor by tensor; with adapters, check that A is B with them merged.

    Args:
        a: A Hugging Face folder or a `.safetensors` file.
        b: The reference; with adapters, the base.
        adapter: What was merged: paths or Adapters, pairs with a weight. Without one, the weight
            is what A's metadata says of this adapter, else 1.
        tol: Gate on max|a − b| / max|b| of each tensor; 0 asks for equal ones. Not for merges.
        rows: Rows of every touched tensor to compute again; None for all.

    Raises:
        LoraFxError: Files that cannot be read, adapters that cannot be merged into the base.
    """
    first, second = open_checkpoint(Path(a)), open_checkpoint(Path(b))
    plan: MergePlan | None = None
    recorded: Sequence[Recorded] = ()
    notes: Sequence[str] = ()
    with explained(a):
        if adapter is None:
            found = sorted(unlike(first.tensors, second.tensors, tol), key=lambda d: -d.rel)
        else:
            parts = given(_listed(adapter), base=Path(b))
            plan, recorded, notes = chain_of(first, second, parts)
            wrong = prove(plan, first, rows=rows, threads=cores())
            found = sorted(wrong, key=lambda d: -d.ratio)
    check_unchanged()
    names = {*first.tensors, *second.tensors, *(plan.changes if plan else ())}
    details: Json = {"tensors": len(names), "equal": len(names) - len({d.tensor for d in found})}
    if plan is None:
        details["tol"] = tol
    else:
        details["touched"] = len(plan.changes)
        details["rows"] = "all" if rows is None else rows
        details["recorded"] = [r.to_json() for r in recorded]
    details["differences"] = [d.to_json() for d in found]
    ok = not found and all(r.given for r in recorded)
    return Report("verify", ok, warnings=tuple(dict.fromkeys(notes)), details=details)


def _listed(adapter: Any) -> list[AdapterLike | tuple[AdapterLike, float]]:
    """One adapter, or one (adapter, weight), as a list of it."""
    pair = isinstance(adapter, tuple) and len(adapter) == 2 and isinstance(adapter[1], (int, float))
    return [adapter] if pair or isinstance(adapter, (str, os.PathLike, Adapter)) else list(adapter)


def fits_files(base: str | os.PathLike[str], adapter: AdapterLike) -> Report:
    """Does every key of an adapter have a tensor of its shape in a checkpoint? Nothing is run.

    Raises:
        LoraFxError: One that has not, a layer that the adapter's config has and its file lacks, a
            quantised tensor that nothing can be folded into.
    """
    checkpoint = open_checkpoint(Path(base))
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(
            Path(adapter), most=2 * checkpoint.elements, base=Path(base), resolve=False
        )
    plan = make_plan(checkpoint, [Given(adapter, 1.0, "the adapter", "")], LENIENT)
    found = targets_of(checkpoint.tensors).targets
    details: Json = {
        "fits": len(adapter) - len(adapter.full),
        "whole": len(adapter.full),
        "untouched": [t.key for t in found if t.default and t.key not in plan.changes],
    }
    said = (n for n in plan.notes if n not in plan.unverified)
    return Report("verify", True, (), (), tuple(said), details)


def lines(report: Report) -> str:
    """The report for people; as any other where nothing was compared as tensors."""
    d = report.details
    if "differences" not in d:
        return str(report)
    touched = f"; {d['touched']} hold the adapters" if "touched" in d else ""
    some = f", {d['rows']} rows of each computed again" if touched else ""
    head = f"verify: {'ok' if report else 'FAILED'}: {d['equal']} of {d['tensors']} tensors are "
    if touched:
        head += f"as they should be{touched}{some}"
    elif d.get("tol"):
        head += f"equal within {d['tol']:g} of their largest element (--tol)"
    else:
        head += "equal"
    rows = [f"  {x['key']}: {x['what']}" for x in d["differences"][:20]]
    left = len(d["differences"]) - len(rows)
    rows += [f"  and {left} more"] if left > 0 else []
    return "\n".join([head, *rows, *(f"  warning: {w}" for w in report.warnings)])


# What a file's own records say was merged into it, planned again, merge after merge.
#
# Each merge that is recorded after those of the base is a stage: its adapters, weights and options.
# The plan of all stages is the one that `prove` checks: a tensor that several stages change is
# rounded after each.


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
    merged: Checkpoint, base: Checkpoint, given: Sequence[Given]
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
    records: Sequence[JsonView], given: Sequence[Given]
) -> tuple[list[list[Given]], list[Recorded], list[Given]]:
    """The adapters of every record, what is recorded, and adapters that no record has.

    One that is recorded several times and given once is the one of all these records.
    """
    stages: list[list[Given]] = [[] for _ in records]
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
    record: JsonView, parts: Sequence[Given], base: Checkpoint, merged: Checkpoint
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
    given = tuple(g for p in plans for g in p.given)
    return replace(plans[0], given=given, changes=changes, added=added)


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
