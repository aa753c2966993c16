"""verify for tensor files: compares tensors and runs no model; see `lora_fx.verify`.

MERGED against BASE and adapters: every touched tensor is W + Σ wᵢ·sᵢ·BᵢAᵢ in the dtype that MERGED
has it in, within what fp32 and one rounding allow (see prove.py); all others are the base's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.file_targets import targets_of
from lora_fx.checkpoint.make_plan import make_plan
from lora_fx.checkpoint.merge import Adapters, cores, read_adapters
from lora_fx.checkpoint.merge_plan import WeightedAdapter
from lora_fx.checkpoint.merge_settings import LENIENT
from lora_fx.checkpoint.prove import ROWS, prove
from lora_fx.checkpoint.recorded_merges import chain_of
from lora_fx.checkpoint.tensor_differences import Difference, unlike
from lora_fx.compare import Report
from lora_fx.errors import explained, visible
from lora_fx.files.checkpoint import PICKLES, Checkpoint, open_checkpoint
from lora_fx.files.run_files import check_unchanged, remembering
from lora_fx.formats.io import AdapterLike, is_adapter, load_adapter
from lora_fx.progress import stage
from lora_fx.text import Json

_SHOWN = 20
"""The number of differences that are shown to people."""


def is_tensor_file(path: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether this is a `.safetensors` file, a pickle, or a folder of them, and not an adapter."""
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
    """Compare two checkpoints; with adapters, check that A is B with the adapters merged.

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
    first = open_checkpoint(Path(a))
    second = open_checkpoint(Path(b))
    with explained(a):
        if adapter is None:
            report = _compare(first, second, tol)
        else:
            adapters = read_adapters(_listed(adapter), base=Path(b))
            report = _check_merged(first, second, adapters, rows)
    check_unchanged()
    return report


@stage("comparing the tensors")
def _compare(first: Checkpoint, second: Checkpoint, tol: float) -> Report:
    """Return the report of two checkpoints that should be equal."""
    differences = list(unlike(first.tensors, second.tensors, tol))
    differences.sort(key=lambda difference: -difference.rel)
    details = _counts({*first.tensors, *second.tensors}, differences)
    details["tol"] = tol
    details["differences"] = [difference.to_json() for difference in differences]
    return Report("verify", not differences, details=details)


@stage("merging again, and comparing the tensors")
def _check_merged(
    merged: Checkpoint, base: Checkpoint, adapters: Sequence[WeightedAdapter], rows: int | None
) -> Report:
    """Return the report of a checkpoint that should be a base with adapters merged into it."""
    plan, recorded, notes = chain_of(merged, base, adapters)
    differences = list(prove(plan, merged, rows=rows, threads=cores()))
    differences.sort(key=lambda difference: -difference.ratio)
    details = _counts({*merged.tensors, *base.tensors, *plan.changes}, differences)
    details["touched"] = len(plan.changes)
    details["rows"] = "all" if rows is None else rows
    details["recorded"] = [row.to_json() for row in recorded]
    details["differences"] = [difference.to_json() for difference in differences]
    ok = not differences and all(row.given for row in recorded)
    return Report("verify", ok, warnings=tuple(dict.fromkeys(notes)), details=details)


def _counts(names: Collection[str], differences: Sequence[Difference]) -> Json:
    """Return the number of tensors, and of tensors without a difference."""
    different = {difference.tensor for difference in differences}
    return {"tensors": len(names), "equal": len(names) - len(different)}


def _listed(adapter: Any) -> list[AdapterLike | tuple[AdapterLike, float]]:
    """Return a list of adapters; a single adapter or (adapter, weight) becomes its only item."""
    if isinstance(adapter, (str, os.PathLike, Adapter)):
        return [adapter]
    is_pair = isinstance(adapter, tuple) and len(adapter) == 2
    if is_pair and isinstance(adapter[1], (int, float)):
        return [adapter]
    return list(adapter)


def fits_files(base: str | os.PathLike[str], adapter: AdapterLike) -> Report:
    """Check that every adapter key has a checkpoint tensor of its shape; run nothing.

    Raises:
        LoraFxError: A key without such a tensor, a layer that the adapter's config has and its file
            lacks, or a quantised tensor that takes no update.
    """
    checkpoint = open_checkpoint(Path(base))
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(
            Path(adapter), most=2 * checkpoint.elements, base=Path(base), resolve=False
        )
    plan = make_plan(checkpoint, [WeightedAdapter(adapter, 1.0, "the adapter", "")], LENIENT)
    untouched = [
        target.key
        for target in targets_of(checkpoint.tensors).targets
        if target.default and target.key not in plan.changes
    ]
    details: Json = {
        "fits": len(adapter) - len(adapter.full),
        "whole": len(adapter.full),
        "untouched": untouched,
    }
    notes = [note for note in plan.notes if note not in plan.unverified]
    return Report("verify", True, (), (), tuple(notes), details)


def lines(report: Report) -> str:
    """The report for people."""
    details = report.details
    if "verdicts" in details:
        return _lines_of_probe(report)
    if "differences" not in details:
        return str(report)
    head = f"verify: {'ok' if report else 'FAILED'}: "
    are_given = [row["given"] for row in details.get("recorded", ())]
    if False in are_given:
        head += f"{are_given.count(False)} of {len(are_given)} recorded adapters not given; "
    head += f"{details['equal']} of {details['tensors']} tensors are "
    if "touched" in details:
        head += (
            f"as expected; {details['touched']} hold the adapters, with {details['rows']} "
            "rows of each recomputed"
        )
    elif details.get("tol"):
        head += f"equal within {details['tol']:g} of their largest element (--tol)"
    else:
        head += "equal"

    differences = details["differences"]
    text = [head]
    text += [f"  {row['key']}: {row['what']}" for row in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        text.append(f"  and {len(differences) - _SHOWN} more")
    text += [f"  warning: {warning}" for warning in report.warnings]
    return "\n".join(text)


def _lines_of_probe(report: Report) -> str:
    """The verdicts on a file that was run on its own probe, for people."""
    text = [f"verify: {'ok' if report else 'FAILED'}, on {report.details['provider']}"]
    text += [f"  {row['sentence']}" for row in report.details["verdicts"]]
    text += [f"  warning: {warning}" for warning in report.warnings]
    return "\n".join(map(visible, text))
