"""verify on tensor files: nothing is run, tensors are compared; see `lora_fx.verify`.

MERGED against BASE and adapters: every touched tensor is W + Σ wᵢ·sᵢ·BᵢAᵢ in the dtype that MERGED
has it in, within what fp32 and one rounding allow (see prove.py); all others are the base's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.file_targets import targets_of
from lora_fx.checkpoint.make_plan import make_plan
from lora_fx.checkpoint.merge import Adapters, cores, read_adapters
from lora_fx.checkpoint.merge_options import LENIENT
from lora_fx.checkpoint.merge_plan import MergePlan, WeightedAdapter
from lora_fx.checkpoint.prove import ROWS, prove
from lora_fx.checkpoint.recorded_merges import Recorded, chain_of
from lora_fx.checkpoint.tensor_differences import unlike
from lora_fx.compare import Report
from lora_fx.errors import explained
from lora_fx.files.checkpoint import PICKLES, open_checkpoint
from lora_fx.files.read import check_unchanged, remembering
from lora_fx.formats.io import AdapterLike, is_adapter, load_adapter
from lora_fx.text import Json


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
            parts = read_adapters(_listed(adapter), base=Path(b))
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
    plan = make_plan(checkpoint, [WeightedAdapter(adapter, 1.0, "the adapter", "")], LENIENT)
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
