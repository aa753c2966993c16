"""doctor: everything that is wrong with a base and an adapter, not only what is found first.

A check is a row of CHECKS: its name, the severity of what it finds, and a function from the Pair
to its findings. Only headers and samples of the base are read.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lora_fx.adapter.lowrank import Full
from lora_fx.adapter.updates import name_of
from lora_fx.checkpoint.doctor import checks
from lora_fx.checkpoint.doctor.pair import ERROR, NOTE, WARNING, Finding, Pair, open_pair
from lora_fx.checkpoint.renaming import absent_of
from lora_fx.compare import Report
from lora_fx.files.atomic import explain
from lora_fx.targets.target import base_name
from lora_fx.text import Json, some, table


class Check(NamedTuple):
    """A row of CHECKS."""

    name: str
    severity: str
    function: Callable[[Pair], Iterable[Finding]]


CHECKS = (
    Check("config", ERROR, checks.config),
    Check("alpha", ERROR, checks.scale),
    Check("ranks", ERROR, checks.ranks),
    Check("patterns", ERROR, checks.patterns),
    Check("initialisation", ERROR, checks.start),
    Check("dora", ERROR, checks.dora),
    Check("finite numbers", ERROR, checks.numbers),
    Check("dtypes", ERROR, checks.dtypes),
    Check("empty tensors", ERROR, checks.sizes),
    Check("pairs", ERROR, checks.halves),
    Check("names", ERROR, checks.names),
    Check("target_modules", ERROR, checks.dropped),
    Check("prefix", ERROR, checks.prefix),
    Check("unused keys", ERROR, checks.unused),
    Check("missing keys", ERROR, checks.missing),
    Check("vocabulary", ERROR, checks.vocabulary),
    Check("shapes", ERROR, checks.shapes),
    Check("tied weights", ERROR, checks.tied),
    Check("quantised base", ERROR, checks.quantised),
    Check("base", ERROR, checks.base),
    Check("base values", ERROR, checks.values),
    Check("merged before", ERROR, checks.merged),
    Check("new tensors", ERROR, checks.added),
    Check("training", ERROR, checks.trained),
    Check("effect", WARNING, checks.effect),
)
LAST = Check("merge", ERROR, checks.refused)
"""What nothing else has said; run where no other check finds an error."""


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
    try:
        pair = open_pair(Path(base), Path(adapter))
        findings: list[Finding] = []
        for check in (*CHECKS, LAST):
            if check is LAST and any(f.severity == ERROR for f in findings):
                continue
            findings += [
                dataclasses.replace(f, check=check.name, severity=f.severity or check.severity)
                for f in check.function(pair)
            ]
        rows, no = _updates(pair), checks.refusal(pair)
    except OSError as error:
        raise explain(error, error.filename or base) from error
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
    width = max(len(c.name) for c in CHECKS)
    for check in (*CHECKS, LAST):
        said = counts.get(check.name)
        text.append(f"{check.name:<{width}}  {said[0] if said else 'ok'}")
    for f in d["findings"]:
        text += ["", f"{f['severity']}: {f['check']}: {some(f['keys'])}".removesuffix(": ")]
        for name in ("found", "expected", "hint"):
            label = {"hint": "do"}.get(name, name)
            text += [f"  {label + ':':<10}{f[name]}"] if f[name] else []
    errors, warned = (sum(f["severity"] == s for f in d["findings"]) for s in (ERROR, WARNING))
    verdict = f"healthy; warnings: {warned}" if warned else "healthy"
    text += ["", verdict if report else f"errors: {errors}; do not merge this pair"]
    text += [f"lora-fx merge refuses it: {d['merge']}"] if d["merge"] else []
    return "\n".join(text)


def _number(value: object, form: str) -> str:
    return "" if value is None else format(value, form)
