"""doctor: everything that is wrong with a base and an adapter, not only what is found first.

A check is a row of CHECKS: its name, and a function from the Pair to its findings. Only headers
and samples of the base are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import name_of
from lora_fx.checkpoint.doctor import checks
from lora_fx.checkpoint.doctor.pair import ERROR, NOTE, WARNING, Finding, Pair, open_pair
from lora_fx.checkpoint.renaming import absent_of
from lora_fx.compare import Report
from lora_fx.errors import explained, visible
from lora_fx.targets.target import base_name
from lora_fx.text import Json, some, table

CHECKS: dict[str, Callable[[Pair], Iterable[Finding]]] = {
    "config": checks.config,
    "alpha": checks.scale,
    "ranks": checks.ranks,
    "patterns": checks.patterns,
    "initialisation": checks.start,
    "dora": checks.dora,
    "finite numbers": checks.numbers,
    "dtypes": checks.dtypes,
    "empty tensors": checks.sizes,
    "pairs": checks.halves,
    "names": checks.names,
    "target_modules": checks.dropped,
    "prefix": checks.prefix,
    "unused keys": checks.unused,
    "missing keys": checks.missing,
    "vocabulary": checks.vocabulary,
    "shapes": checks.shapes,
    "tied weights": checks.tied,
    "quantised base": checks.quantised,
    "base": checks.base,
    "base values": checks.values,
    "merged before": checks.merged,
    "new tensors": checks.added,
    "training": checks.trained,
    "effect": checks.effect,
}
LAST = "merge"
"""The check that says what no other has; run where no other finds an error."""


def doctor(base: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> Report:
    """What is wrong with a base and an adapter.

    Args:
        base: A Hugging Face folder or a `.safetensors` file.
        adapter: A file or folder that `lora_fx.load_adapter` reads, or would if it were sound.

    Returns:
        A Report that is true where no finding is an error; `details["findings"]` has them all,
        `details["updates"]` rank, scale and ‖ΔW‖/‖W‖ of every update.

    Raises:
        LoraFxError: One of the two cannot be read at all.
    """
    with explained(base):
        pair = open_pair(Path(base), Path(adapter))
        findings: list[Finding] = []
        for name, check in CHECKS.items():
            findings += [replace(f, check=name) for f in check(pair)]
        if not any(f.severity == ERROR for f in findings):
            findings += [replace(f, check=LAST) for f in checks.refused(pair)]
        rows, no = _updates(pair), checks.refusal(pair)
    findings.sort(key=lambda f: (ERROR, WARNING, NOTE).index(f.severity))
    details = {
        "used": sum(r["tensor"] is not None for r in rows),
        "unused": sum(r["tensor"] is None for r in rows),
        "missing": len(absent_of(pair.adapter, pair.tensors, pair.rename)),
        "findings": [f.to_json() for f in findings],
        "updates": rows,
        "merge": no.message if no is not None else "",
    }
    notes = pair.adapter.metadata.get("notes", ())
    ok = not any(f.severity == ERROR for f in findings)
    return Report("doctor", ok, warnings=tuple(notes), details=details)


def _updates(pair: Pair) -> list[Json]:
    rows = []
    for key, entry in pair.adapter.entries.items():
        low = None if isinstance(entry, Full) else entry
        scale = getattr(low, "scale", None)
        info = pair.tensor(key)
        rows.append(
            {
                "key": key,
                "tensor": _tensor(pair, key) if info is not None else None,
                "kind": name_of(entry),
                "rank": getattr(low, "rank", None),
                "scale": scale if scale is not None and math.isfinite(scale) else None,
                "ratio": pair.ratio(key),
            }
        )
    return rows


def _tensor(pair: Pair, key: str) -> str:
    """The base's tensor of a key; the first one of a stack that it has apart."""
    stack = pair.rename.stack(base_name(key))
    return stack.parts[0].tensor if stack else pair.rename(key)


def lines(report: Report) -> str:
    """The report for people: updates, the checklist, what was found."""
    d = report.details
    rows = [("update", "kind", "rank", "scale", "‖ΔW‖/‖W‖")]
    for r in d["updates"]:
        scale = "?" if r["rank"] and r["scale"] is None else _number(r["scale"], ".6g")
        key = r["key"] if r["tensor"] else f"{r['key']} (not in the base)"
        rows.append((key, r["kind"], _number(r["rank"], "d"), scale, _number(r["ratio"], ".2e")))
    text = [*table([(*r,) for r in rows]), ""]
    counts: dict[str, list[str]] = {}
    for f in d["findings"]:
        counts.setdefault(f["check"], []).append(f["severity"])
    width = max(map(len, CHECKS))
    for name in (*CHECKS, LAST):
        said = counts.get(name)
        text.append(f"{name:<{width}}  {said[0] if said else 'ok'}")
    for f in d["findings"]:
        text += ["", f"{f['severity']}: {f['check']}: {some(f['keys'])}".removesuffix(": ")]
        for name, label in (("found", "found:"), ("expected", "expected:"), ("hint", "do:")):
            text += [f"  {label:<10}{f[name]}"] if f[name] else []
    errors, warned = (sum(f["severity"] == s for f in d["findings"]) for s in (ERROR, WARNING))
    verdict = f"healthy; warnings: {warned}" if warned else "healthy"
    text += ["", verdict if report else f"errors: {errors}; do not merge this pair"]
    text += [f"lora-fx merge refuses it: {d['merge']}"] if d["merge"] else []
    return "\n".join(map(visible, text))


def _number(value: object, form: str) -> str:
    return "" if value is None else format(value, form)
