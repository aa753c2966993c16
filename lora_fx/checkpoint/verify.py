"""verify on tensor files: nothing is run, tensors are compared; see `lora_fx.verify`.

MERGED against BASE and adapters: every touched tensor is W + Σ wᵢ·sᵢ·BᵢAᵢ in the dtype that MERGED
has it in, within what fp32 and one rounding allow (see proof.py); all others are the base's bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fx.adapter import Adapter
from lora_fx.checkpoint.folder import Checkpoint, open_checkpoint
from lora_fx.checkpoint.headers import WEIGHTS, file_targets
from lora_fx.checkpoint.match import match, names_of
from lora_fx.checkpoint.merge import cores, given
from lora_fx.checkpoint.osfile import explain
from lora_fx.checkpoint.plan import HOWS, Options, Plan, make_plan
from lora_fx.checkpoint.proof import ROWS, prove
from lora_fx.checkpoint.provenance import history, sample_hash
from lora_fx.checkpoint.quantised import refuse_quantised
from lora_fx.checkpoint.same import unlike
from lora_fx.checkpoint.tied import tie_of
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import is_adapter, load_adapter

AdapterLike = str | os.PathLike[str] | Adapter


_ROW = dict.fromkeys(("key", "what", "ratio", "rel", "max_abs", "elements"))


def is_tensor_file(path: object) -> bool:
    """True for a `.safetensors` file, or a folder of them, that is no adapter."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    path = Path(path)
    if path.suffix == ".safetensors" or path.is_dir():
        return not is_adapter(path)
    return False


def verify_files(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    adapter: AdapterLike | Sequence[AdapterLike | tuple[AdapterLike, float]] | None = None,
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
    try:
        if adapter is None:
            found = sorted(unlike(first.tensors, second.tensors, tol), key=lambda u: -u.rel)
            return _report(len({*first.tensors, *second.tensors}), found)
        notes: list[str] = []
        plan = _plan(first, second, adapter, notes)
        wrong = sorted(prove(plan, first, rows=rows, workers=cores()), key=lambda d: -d.ratio)
    except OSError as error:
        raise explain(error, error.filename or a) from error
    count = len({*first.tensors, *second.tensors, *plan.changes})
    details = {"touched": len(plan.changes), "rows": "all" if rows is None else rows}
    return _report(count, wrong, [*plan.notes, *notes], details)


def _report(
    count: int,
    found: Sequence[Any],
    notes: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Report:
    whole = {
        "tensors": count,
        "equal": count - len({d.tensor for d in found}),
        **(details or {}),
        "differences": [{**_ROW, **d.to_json()} for d in found],
    }
    return Report("verify", not found, warnings=tuple(dict.fromkeys(notes)), details=whole)


def _plan(merged: Checkpoint, base: Checkpoint, adapter: Any, notes: list[str]) -> Plan:
    """What the merge should have done, in the dtypes that it has done it in."""
    parts = given([adapter] if _pair(adapter) else adapter)
    stated = [_pair(x) for x in ([adapter] if _pair(adapter) else _listed(adapter))]
    merges = history(merged)
    here = merges[-1] if merges else {}
    if len(merges) > len(history(base)) + 1:
        notes.append(
            f"{merged.path} went through {len(merges)} merges, each rounded: compare it with what "
            "the last one started from"
        )
    recorded = {m.get("hash"): m.get("weight") for m in here.get("adapters", ())}
    for i, (part, said) in enumerate(zip(parts, stated, strict=True)):
        weight = recorded.get(part.hash)
        if merges and part.hash not in recorded:
            notes.append(f"{merged.path} does not say that {part.where} was merged into it")
        elif isinstance(weight, (int, float)) and not said:
            parts[i] = dataclasses.replace(part, weight=float(weight))
    asked = here.get("options")
    asked = asked if isinstance(asked, dict) else {}
    new = any(k in merged.tensors and k not in base.tensors for p in parts for k in p.adapter.full)
    options = Options(
        how=asked["how"] if asked.get("how") in HOWS else "sum",
        rank=asked["rank"] if isinstance(asked.get("rank"), int) else None,
        allow_unused=asked.get("allow_unused") is True,
        allow_missing=asked.get("allow_missing") is True,
        untie=True,
        add=new,
        again=True,
        any_base=True,
    )
    plan = make_plan(base, parts, options)
    old_base = here.get("base")
    sample = old_base.get("sample") if isinstance(old_base, dict) else None
    old = [(n, base.tensors[n]) for n in plan.changes if n not in plan.added]
    if sample is not None and sample != sample_hash(old):
        notes.append(f"{merged.path} says that it was made from another base than {base.path}")
    changes = {
        name: dataclasses.replace(change, dtype=merged.tensors[name].dtype)
        if name in merged.tensors and {merged.tensors[name].dtype, change.dtype} <= WEIGHTS
        else change
        for name, change in plan.changes.items()
    }
    return dataclasses.replace(plan, changes=changes)


def _pair(adapter: Any) -> bool:
    """True for one (adapter, weight)."""
    return isinstance(adapter, tuple) and len(adapter) == 2 and isinstance(adapter[1], (int, float))


def _listed(adapter: Any) -> list[Any]:
    one = isinstance(adapter, (str, os.PathLike, Adapter))
    return [adapter] if one else list(adapter)


def fits_files(base: str | os.PathLike[str], adapter: AdapterLike) -> Report:
    """Does every key of an adapter have a tensor of its shape in a checkpoint? Nothing is run.

    Raises:
        LoraFxError: One that has not, a layer that the adapter's config has and its file lacks, a
            quantised tensor.
    """
    checkpoint = open_checkpoint(Path(base))
    adapter = adapter if isinstance(adapter, Adapter) else load_adapter(Path(adapter))
    tensors, config = dict(checkpoint.tensors), checkpoint.config()
    tie = tie_of(tensors, config, adapter.entries)
    if tie is not None:
        tensors = tie.known(tensors)
    placed, notes = match(adapter, tensors, config, str(checkpoint.path))
    if not placed:
        raise LoraFxError(
            f"{checkpoint.path}: none of the adapter's keys is in it",
            "is it the adapter of another model?",
        )
    full = adapter.full
    touched = names_of(placed)
    for name in touched:
        if not any(p.tensor == name and p.key in full for p in placed):
            refuse_quantised(name, tensors[name], checkpoint)
    found = file_targets(checkpoint.path).targets
    details: dict[str, Any] = {
        "fits": len(placed) - len(full),
        "whole": len(full),
        "untouched": [t.key for t in found if t.default and t.key not in touched],
    }
    said = (*adapter.metadata.get("notes", ()), *notes)
    return Report("verify", True, (), (), tuple(dict.fromkeys(said)), details)


def lines(report: Report) -> str:
    """The report for people; as any other where nothing was compared as tensors."""
    d = report.details
    if "differences" not in d:
        return str(report)
    touched = f"; {d['touched']} hold the adapters" if "touched" in d else ""
    some = f", {d['rows']} rows of each computed again" if touched else ""
    head = f"verify: {'ok' if report else 'FAILED'}: {d['equal']} of {d['tensors']} tensors are "
    head += f"{'as they should be' if touched else 'equal'}{touched}{some}"
    rows = [f"  {x['key']}: {x['what']}" for x in d["differences"][:20]]
    left = len(d["differences"]) - len(rows)
    rows += [f"  and {left} more"] if left > 0 else []
    return "\n".join([head, *rows, *(f"  warning: {w}" for w in report.warnings)])
