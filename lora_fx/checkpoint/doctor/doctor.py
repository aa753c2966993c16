"""doctor: everything that is wrong with a base and an adapter, not only what is found first.

A check is a row of CHECKS: its name, and a function from the Pair to its findings. Only headers
and samples of the base are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_fx.adapter.updates import Entry, name_of
from lora_fx.checkpoint.doctor import checks
from lora_fx.checkpoint.doctor.pair import ERROR, NOTE, WARNING, Finding, Pair, open_pair
from lora_fx.checkpoint.merge_plan import MergeOptions, MergePlan
from lora_fx.checkpoint.renaming import absent_of
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, explained, visible
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
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
    "model": checks.model,
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
"""The check that says what no other has: lora-fx merge would take the pair."""


OF_FILE = {*[*CHECKS][: [*CHECKS].index("prefix")]}
"""Checks of the adapter by itself, and whether it is of the base's model: what its reader tells."""
VALUES = ("base values", "training", "effect")
"""Checks of numbers, which a merge sees as it is carried out, and its plan does not."""
SERVED = "server"
"""The check of what a program makes of the adapter, where one is named."""


def doctor(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    server: str | None = None,
    **options: Any,
) -> Report:
    """What is wrong with a base and an adapter.

    Args:
        base: A Hugging Face folder or a `.safetensors` file.
        adapter: A file or folder that `lora_fx.load_adapter` reads, or would if it were sound.
        server: vllm, sglang or peft: also say what that program would read, misread or drop.
        options: Those of `lora_fx.merge` that the pair is to be merged with, such as
            dequantise=True; trust=True reads pickles.

    Returns:
        A Report that is true where no finding is an error; `details["findings"]` has them all,
        `details["updates"]` rank, scale and ‖ΔW‖/‖W‖ of every update.

    Raises:
        LoraFxError: One of the two cannot be read at all.
    """
    asked = MergeOptions(**options)
    base, adapter = local(base), local(adapter)
    with explained(base), trusting(asked.trust):
        pair = open_pair(Path(base), Path(adapter), asked)
        findings: list[Finding] = []
        for name, check in CHECKS.items():
            findings += [replace(f, check=name) for f in check(pair)]
        rows = [_update(pair, key, entry) for key, entry in pair.adapter.entries.items()]
        plan = checks.planned(pair)
        findings += _more(pair, findings, plan)
        if isinstance(plan, MergePlan):
            findings = [_taken(f, asked) for f in findings]
        if server:
            findings += [replace(f, check=SERVED) for f in checks.served(pair, server)]
    findings.sort(key=lambda f: (ERROR, WARNING, NOTE).index(f.severity))
    details = {
        "used": sum(r["tensor"] is not None for r in rows),
        "unused": sum(r["tensor"] is None for r in rows),
        "missing": len(absent_of(pair.adapter, pair.tensors, pair.rename)),
        "findings": [f.to_json() for f in findings],
        "updates": rows,
        "merge": plan.message if isinstance(plan, LoraFxError) else "",
    }
    notes = [*pair.adapter.metadata.get("notes", ())]
    notes += plan.notes if isinstance(plan, MergePlan) else ()
    notes = [n for n in dict.fromkeys(notes) if not any(f.found in n for f in findings)]
    ok = not any(f.severity == ERROR for f in findings)
    return Report("doctor", ok, warnings=tuple(notes), details=details)


def _more(pair: Pair, findings: list[Finding], plan: MergePlan | LoraFxError) -> Iterator[Finding]:
    """Why merge refuses the pair, or would once what the checks found is mended."""
    errors = [f for f in findings if f.severity == ERROR and f.check not in VALUES]
    told = {k for f in errors for k in f.keys}
    clear = errors and (pair.refusal is None or OF_FILE & {f.check for f in errors})
    if clear and told >= pair.adapter.entries.keys():
        return
    left = checks.planned(pair, told) if clear else plan
    if isinstance(left, LoraFxError):
        yield Finding([], left.message, "a pair that can be merged", left.hint, check=LAST)


def _taken(finding: Finding, asked: MergeOptions) -> Finding:
    """What merge takes is no error: a note where an option of the hint takes it, else a warning."""
    if finding.severity != ERROR or finding.check in VALUES:
        return finding
    on = [f"--{n.replace('_', '-')}" for n, value in vars(asked).items() if value is True]
    wanted = any(option in finding.hint for option in on)
    return replace(finding, severity=NOTE if wanted else WARNING)


def _update(pair: Pair, key: str, entry: Entry) -> Json:
    """One row of `updates[]`; of a stack that the base has apart, the first tensor is named."""
    stack = pair.rename.stack(base_name(key))
    name = stack.parts[0].tensor if stack else pair.rename(key)
    scale = getattr(entry, "scale", None)
    return {
        "key": key,
        "tensor": name if pair.tensor(key) is not None else None,
        "kind": name_of(entry),
        "rank": getattr(entry, "rank", None),
        "scale": scale if scale is not None and math.isfinite(scale) else None,
        "ratio": pair.ratio(key),
    }


def lines(report: Report) -> str:
    """The report for people: updates, the checklist, what was found."""
    d = report.details
    rows = [("update", "kind", "rank", "scale", "‖ΔW‖/‖W‖")]
    for r in d["updates"]:
        scale = "?" if r["rank"] and r["scale"] is None else _number(r["scale"], ".6g")
        key = r["key"] if r["tensor"] else f"{r['key']} (not in the base)"
        rows.append((key, r["kind"], _number(r["rank"], "d"), scale, _number(r["ratio"], ".2e")))
    text = [*table([(*r,) for r in rows])]
    worst: dict[str, str] = {}
    for f in d["findings"]:
        worst.setdefault(f["check"], f["severity"])
        text += ["", f"{f['severity']}: {f['check']}: {some(f['keys'])}".removesuffix(": ")]
        for name, label in (("found", "found:"), ("expected", "expected:"), ("hint", "do:")):
            text += [f"  {label:<10}{f[name]}"] if f[name] else []
    width = max(map(len, CHECKS))
    text += ["", *(f"{name:<{width}}  {worst.get(name, 'ok')}" for name in (*CHECKS, LAST))]
    errors, warned = (sum(f["severity"] == s for f in d["findings"]) for s in (ERROR, WARNING))
    verdict = f"healthy; warnings: {warned}" if warned else "healthy"
    bad = any(f["severity"] == ERROR and f["check"] != SERVED for f in d["findings"])
    advice = "do not merge this pair" if bad else "do not serve it so"
    text += ["", verdict if report else f"errors: {errors}; {advice}"]
    text += [f"lora-fx merge refuses it: {d['merge']}"] if d["merge"] else []
    return "\n".join(map(visible, text))


def _number(value: object, form: str) -> str:
    return "" if value is None else format(value, form)
