"""doctor: report every error in a base and an adapter, not only the first one.

A check is a row of CHECKS: its name, and a function from the Pair to its findings. Only headers
and samples of the base are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lora_fx.adapter.updates import Entry, name_of
from lora_fx.checkpoint.adapter_file_checks import OF_FILE
from lora_fx.checkpoint.findings import ERROR, NOTE, WARNING, Finding
from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.merge_settings import MergeOptions
from lora_fx.checkpoint.missing_layers import missing_layers_of
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
from lora_fx.targets.keys import base_name
from lora_fx.text import Json, JsonView, StrPath, some, table

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
"""The last check: lora-fx merge accepts the pair. It reports what no other check has."""

BY_READER = {*OF_FILE, "model"}
"""Checks of the adapter alone, and of its model: these explain why its reader refuses it."""
VALUES = ("base values", "training", "effect")
"""Checks of values, which a merge sees only while it runs, not in its plan."""
SERVED = "server"
"""The check of how a server reads the adapter, if one is named."""


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
    """Report what is wrong with a base and an adapter.

    Args:
        base: A Hugging Face folder or a `.safetensors` file.
        adapter: A file or folder that `lora_fx.load_adapter` reads, or would if it were sound.
        server: vllm, sglang or peft: also report what that program would read, misread or drop.
        how: As in `lora_fx.merge`; the checks assume a merge with this and the following options.
        rank: As in `lora_fx.merge`.
        dtype: As in `lora_fx.merge`.
        allow_unused: As in `lora_fx.merge`.
        untie: As in `lora_fx.merge`.
        add: As in `lora_fx.merge`.
        again: As in `lora_fx.merge`.
        allow_missing: As in `lora_fx.merge`.
        any_base: As in `lora_fx.merge`.
        other_readers: As in `lora_fx.merge`.
        trust: Read pickles, by torch's unpickler that runs no code.
        dequantise: As in `lora_fx.merge`.
        requantise: As in `lora_fx.merge`.
        lossy: As in `lora_fx.merge`.
        max_shard_size: As in `lora_fx.merge`.

    Returns:
        A Report that is true where no finding is an error; `details["findings"]` has them all,
        `details["updates"]` rank, scale and ‖ΔW‖/‖W‖ of every update.

    Raises:
        LoraFxError: One of the two cannot be read at all.
    """
    options = MergeOptions(
        how=how, rank=rank, dtype=dtype, allow_unused=allow_unused, untie=untie, add=add,
        again=again, allow_missing=allow_missing, any_base=any_base,
        other_readers=other_readers, trust=trust, dequantise=dequantise,
        requantise=requantise, lossy=lossy, max_shard_size=max_shard_size,
    )  # fmt: skip
    return examine(base, adapter, options, server)


def examine(
    base: StrPath, adapter: StrPath, options: MergeOptions, server: str | None = None
) -> Report:
    """Carry out `doctor`, with the merge's options as one object."""
    for name, path in (("base", base), ("adapter", adapter)):
        expect_path(path, name, "doctor(base, adapter)")
    if server:
        expect_name(server, SERVERS, "no server", f"one of {', '.join(SERVERS)}")
    base = local(base)
    adapter = local(adapter, files=FORMATS.files_of_folders)
    with explained(base), trusting(options.trust):
        pair = open_pair(Path(base), Path(adapter), options)
        findings: list[Finding] = []
        for name, check in CHECKS.items():
            findings += [replace(finding, check=name) for finding in check(pair)]
        rows = [_update_row(pair, key, entry) for key, entry in pair.adapter.entries.items()]
        plan = planned(pair)
        findings += _merge_findings(pair, findings, plan)
        if isinstance(plan, MergePlan):
            findings = [_accepted(finding, options) for finding in findings]
        if server:
            findings += [replace(finding, check=SERVED) for finding in served(pair, server)]
    findings.sort(key=lambda finding: (ERROR, WARNING, NOTE).index(finding.severity))
    return _report(pair, findings, rows, plan)


def _report(
    pair: Pair, findings: Sequence[Finding], rows: Sequence[Json], plan: MergePlan | LoraFxError
) -> Report:
    """The report of a pair.

    Args:
        pair: The pair.
        findings: Of all checks, errors first.
        rows: One of each update.
        plan: The plan of the merge, or why there is none.
    """
    used = sum(row["tensor"] is not None for row in rows)
    details = {
        "used": used,
        "unused": len(rows) - used,
        "missing": len(missing_layers_of(pair.adapter, pair.rename)),
        "findings": [finding.to_json() for finding in findings],
        "updates": list(rows),
        "merge": plan.message if isinstance(plan, LoraFxError) else "",
    }
    notes = [*pair.adapter.metadata.get("notes", ())]
    if isinstance(plan, MergePlan):
        notes += plan.notes
    warnings = [
        note
        for note in dict.fromkeys(notes)
        if not any(finding.found in note for finding in findings)
    ]
    ok = not any(finding.severity == ERROR for finding in findings)
    return Report("doctor", ok, warnings=tuple(warnings), details=details)


def _merge_findings(
    pair: Pair, findings: Sequence[Finding], plan: MergePlan | LoraFxError
) -> Iterator[Finding]:
    """Why merge refuses the pair, or would refuse it once the other findings are corrected."""
    errors = [
        finding for finding in findings if finding.severity == ERROR and finding.check not in VALUES
    ]
    reported: set[str] = set()
    for finding in errors:
        reported |= set(finding.keys)
    is_explained = pair.refusal is None or any(finding.check in BY_READER for finding in errors)
    if errors and is_explained:
        if reported >= pair.adapter.entries.keys():
            return
        plan = planned(pair, reported)

    expected = "a pair that can be merged"
    if isinstance(plan, MergeRefusal):
        check = plan.check if plan.check in CHECKS else LAST
        yield Finding(plan.keys, plan.message, expected, plan.hint, check=check)
    elif isinstance(plan, LoraFxError):
        yield Finding([], plan.message, expected, plan.hint, check=LAST)


def _accepted(finding: Finding, options: MergeOptions) -> Finding:
    """Lower the severity of a finding that merge accepts.

    It becomes a note where the caller gave the option that accepts it, else a warning.
    """
    if finding.severity != ERROR or finding.check in VALUES:
        return finding
    names = TAKEN_BY.get(finding.check, ())
    is_asked = any(getattr(options, name) for name in names)
    return replace(finding, severity=NOTE if is_asked else WARNING)


def _update_row(pair: Pair, key: str, entry: Entry) -> Json:
    """One row of `updates[]`; for a stack that the base stores as parts, it names the first."""
    stack = pair.rename.stack(base_name(key))
    name = stack.parts[0].tensor if stack else pair.rename(key)
    scale = getattr(entry, "scale", None)
    if scale is not None and not math.isfinite(scale):
        scale = None
    return {
        "key": key,
        "tensor": name if pair.tensor(key) is not None else None,
        "kind": name_of(entry),
        "rank": getattr(entry, "rank", None),
        "scale": scale,
        "ratio": pair.ratio(key),
    }


def lines(report: Report) -> str:
    """The report for people: updates, the checklist, what was found."""
    details = report.details
    text = _update_lines(details["updates"])
    findings = details["findings"]
    worst: dict[str, str] = {}
    for finding in findings:
        worst.setdefault(finding["check"], finding["severity"])
        text += _finding_lines(finding)

    width = max(map(len, CHECKS))
    text.append("")
    for name in (*CHECKS, LAST):
        text.append(f"{name:<{width}}  {worst.get(name, 'ok')}")
    text += ["", _verdict(report)]
    if details["merge"]:
        text.append(f"lora-fx merge refuses this pair: {details['merge']}")
    return "\n".join(map(visible, text))


def _update_lines(updates: Sequence[JsonView]) -> list[str]:
    """The table of updates."""
    rows: list[tuple[str, ...]] = [("update", "kind", "rank", "scale", "‖ΔW‖/‖W‖")]
    for update in updates:
        key = update["key"]
        if not update["tensor"]:
            key = f"{key} (not in the base)"
        scale = _number(update["scale"], ".6g")
        if update["rank"] and update["scale"] is None:
            scale = "?"
        rank = _number(update["rank"], "d")
        rows.append((key, update["kind"], rank, scale, _number(update["ratio"], ".2e")))
    return table(rows)


def _finding_lines(finding: JsonView) -> list[str]:
    """A finding, its parts one below the other."""
    head = f"{finding['severity']}: {finding['check']}: {some(finding['keys'])}"
    text = ["", head.removesuffix(": ")]
    for name, label in (("found", "found:"), ("expected", "expected:"), ("hint", "do:")):
        if finding[name]:
            text.append(f"  {label:<10}{finding[name]}")
    return text


def _verdict(report: Report) -> str:
    """The one line that says whether to merge the pair."""
    findings = report.details["findings"]
    errors = [finding for finding in findings if finding["severity"] == ERROR]
    warnings = sum(finding["severity"] == WARNING for finding in findings)
    if report and warnings:
        return f"healthy; warnings: {warnings}"
    if report:
        return "healthy"
    if any(finding["check"] != SERVED for finding in errors):
        return f"errors: {len(errors)}; do not merge this pair"
    return f"errors: {len(errors)}; do not serve this adapter as it is"


def _number(value: object, form: str) -> str:
    """A number for people; empty if it is unknown."""
    if value is None:
        return ""
    return format(value, form)
