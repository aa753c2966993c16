"""verify on tensor files: nothing is run, tensors are compared; see `lora_fx.verify`.

MERGED against BASE and adapters: every touched tensor is W + Σ wᵢ·sᵢ·BᵢAᵢ in the dtype that MERGED
has it in, within what fp32 and one rounding allow (see proof.py); all others are the base's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_fx.adapter.adapter import Adapter
from lora_fx.checkpoint.chain import chain_of
from lora_fx.checkpoint.headers import file_targets
from lora_fx.checkpoint.match import match, names_of
from lora_fx.checkpoint.merge import cores, given
from lora_fx.checkpoint.proof import ROWS, prove
from lora_fx.checkpoint.quantised import stored_as
from lora_fx.checkpoint.same import unlike
from lora_fx.checkpoint.tied import tie_of
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError
from lora_fx.files.atomic import explain
from lora_fx.files.checkpoint import open_checkpoint
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
        every = [adapter] if _pair(adapter) else _listed(adapter)
        chain = chain_of(first, second, given(every), [_pair(x) for x in every])
        plan = chain.plan
        wrong = sorted(prove(plan, first, rows=rows, workers=cores()), key=lambda d: -d.ratio)
    except OSError as error:
        raise explain(error, error.filename or a) from error
    count = len({*first.tensors, *second.tensors, *plan.changes})
    details = {
        "touched": len(plan.changes),
        "rows": "all" if rows is None else rows,
        "recorded": [r.to_json() for r in chain.recorded],
    }
    return _report(count, wrong, chain.notes, details, complete=chain.complete)


def _report(
    count: int,
    found: Sequence[Any],
    notes: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
    *,
    complete: bool = True,
) -> Report:
    whole = {
        "tensors": count,
        "equal": count - len({d.tensor for d in found}),
        **(details or {}),
        "differences": [{**_ROW, **d.to_json()} for d in found],
    }
    ok = not found and complete
    return Report("verify", ok, warnings=tuple(dict.fromkeys(notes)), details=whole)


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
            quantised tensor that nothing can be folded into.
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
            stored_as(name, tensors[name], checkpoint)
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
