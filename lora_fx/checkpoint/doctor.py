"""doctor: everything that is wrong with a base and an adapter, not only what is found first.

A check is a row of CHECKS: its name, and a function from the Pair to its findings. Only headers
and samples of the base are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_fx.adapter.updates import Entry, name_of
from lora_fx.checkpoint.adapter_file_checks import OF_FILE
from lora_fx.checkpoint.findings import ERROR, NOTE, WARNING, Finding
from lora_fx.checkpoint.merge_options import MergeOptions
from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.missing_layers import absent_of
from lora_fx.checkpoint.pair import Pair, open_pair
from lora_fx.checkpoint.pair_checks import (
    base,
    effect,
    missing,
    model,
    prefix,
    quantised,
    shapes,
    unused,
    values,
    vocabulary,
)
from lora_fx.checkpoint.plan_checks import TAKEN_BY, added, merged, planned, served, tied, trained
from lora_fx.checkpoint.refusal import BASE, MERGED, MISSING, SHAPES, TIED, UNUSED, MergeRefusal
from lora_fx.compare import Report
from lora_fx.errors import LoraFxError, expect_name, expect_path, explained, visible
from lora_fx.files.hub import local
from lora_fx.files.read import trusting
from lora_fx.formats.registry import FORMATS
from lora_fx.formats.servers import SERVERS
from lora_fx.targets.target import base_name
from lora_fx.text import Json, StrPath, some, table

CHECKS = {
    **OF_FILE,
    "model": model,
    "prefix": prefix,
    UNUSED: unused,
    MISSING: missing,
    "vocabulary": vocabulary,
    SHAPES: shapes,
    TIED: tied,
    "quantised base": quantised,
    BASE: base,
    "base values": values,
    MERGED: merged,
    "new tensors": added,
    "training": trained,
    "effect": effect,
}
LAST = "merge"
"""The check that says what no other has: lora-fx merge would take the pair."""

BY_READER = {*OF_FILE, "model"}
"""Checks of the adapter by itself, and whether it is of the base's model: what its reader tells."""
VALUES = ("base values", "training", "effect")
"""Checks of numbers, which a merge sees as it is carried out, and its plan does not."""
SERVED = "server"
"""The check of what a program makes of the adapter, where one is named."""


def doctor(
    base: StrPath,
    adapter: StrPath,
    server: str | None = None,
    *,
    how: str = "sum",
    rank: int | None = None,
    dtype: str | None = None,
    allow_unused: bool = False,
    untie: bool = False,
    add: bool = False,
    again: bool = False,
    allow_missing: bool = False,
    any_base: bool = False,
    other_readers: bool = False,
    trust: bool = False,
    dequantise: bool = False,
    requantise: bool = False,
    lossy: bool = False,
    max_shard_size: int | str | None = None,
) -> Report:
    """What is wrong with a base and an adapter.

    Args:
        base: A Hugging Face folder or a `.safetensors` file.
        adapter: A file or folder that `lora_fx.load_adapter` reads, or would if it were sound.
        server: vllm, sglang or peft: also say what that program would read, misread or drop.
        how: As in `lora_fx.merge`, with which the pair is to be merged; so are those below.
        rank: As there.
        dtype: As there.
        allow_unused: As there.
        untie: As there.
        add: As there.
        again: As there.
        allow_missing: As there.
        any_base: As there.
        other_readers: As there.
        trust: Read pickles, by torch's unpickler that runs no code.
        dequantise: As there.
        requantise: As there.
        lossy: As there.
        max_shard_size: As there.

    Returns:
        A Report that is true where no finding is an error; `details["findings"]` has them all,
        `details["updates"]` rank, scale and ‖ΔW‖/‖W‖ of every update.

    Raises:
        LoraFxError: One of the two cannot be read at all.
    """
    asked = MergeOptions(
        how=how, rank=rank, dtype=dtype, allow_unused=allow_unused, untie=untie, add=add,
        again=again, allow_missing=allow_missing, any_base=any_base,
        other_readers=other_readers, trust=trust, dequantise=dequantise,
        requantise=requantise, lossy=lossy, max_shard_size=max_shard_size,
    )  # fmt: skip
    return examine(base, adapter, asked, server)


def examine(
    base: StrPath, adapter: StrPath, asked: MergeOptions, server: str | None = None
) -> Report:
    """What `doctor` says, with the options of the merge that is meant as an object."""
    for name, path in (("base", base), ("adapter", adapter)):
        expect_path(path, name, "doctor(base, adapter)")
    if server:
        expect_name(server, SERVERS, "no server", f"one of {', '.join(SERVERS)}")
    base, adapter = local(base), local(adapter, files=FORMATS.files_of_folders)
    with explained(base), trusting(asked.trust):
        pair = open_pair(Path(base), Path(adapter), asked)
        findings: list[Finding] = []
        for name, check in CHECKS.items():
            findings += [replace(f, check=name) for f in check(pair)]
        rows = [_update(pair, key, entry) for key, entry in pair.adapter.entries.items()]
        plan = planned(pair)
        findings += _more(pair, findings, plan)
        if isinstance(plan, MergePlan):
            findings = [_taken(f, asked) for f in findings]
        if server:
            findings += [replace(f, check=SERVED) for f in served(pair, server)]
    findings.sort(key=lambda f: (ERROR, WARNING, NOTE).index(f.severity))
    details = {
        "used": sum(r["tensor"] is not None for r in rows),
        "unused": sum(r["tensor"] is None for r in rows),
        "missing": len(absent_of(pair.adapter, pair.rename)),
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
    clear = errors and (pair.refusal is None or BY_READER & {f.check for f in errors})
    if clear and told >= pair.adapter.entries.keys():
        return
    left = planned(pair, told) if clear else plan
    if isinstance(left, MergeRefusal):
        check = left.check if left.check in CHECKS else LAST
        yield Finding(left.keys, left.message, "a pair that can be merged", left.hint, check=check)
    elif isinstance(left, LoraFxError):
        yield Finding([], left.message, "a pair that can be merged", left.hint, check=LAST)


def _taken(finding: Finding, asked: MergeOptions) -> Finding:
    """What merge takes is no error: a note where an option was given for it, else a warning."""
    if finding.severity != ERROR or finding.check in VALUES:
        return finding
    wanted = any(getattr(asked, option) for option in TAKEN_BY.get(finding.check, ()))
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
