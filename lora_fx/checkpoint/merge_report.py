"""The report of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_fx.checkpoint.companions import REPORTS, report_name
from lora_fx.checkpoint.fold_stats import Stats
from lora_fx.checkpoint.int8 import HINT
from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.requantise import in_all
from lora_fx.compare import Report
from lora_fx.files.checkpoint import PICKLES
from lora_fx.text import Json, some, table

GAIN = 0.95
"""Below this share of Δ arriving in the stored dtype a merge warns."""


_MISSED = ("error", "own")


def report_of(plan: MergePlan, stats: Mapping[str, Stats], target: Path) -> Report:
    """The report of a merge that is written to `target`."""
    rows = [c.to_json(stats.get(name)) for name, c in plan.changes.items()]
    warnings = list(plan.notes)
    codes = {n for n in stats if plan.changes[n].int8 is not None}
    anew = {n for n in stats if plan.changes[n].requantised}
    for names, how in (
        (stats.keys() - codes - anew, "rounded, {}: --dtype float16 or float32 keeps more"),
        (codes, "quantised to int8 anew, {}: " + HINT),
        (anew, "quantised anew, {}: --dequantise keeps all of it"),
    ):
        low = [(stats[n].gain, n) for n in names if stats[n].gain < GAIN]
        if low:
            worst = "{1} only {0:.1%}".format(*min(low))
            warnings.append(
                f"{len(low)} of {len(names)} tensors kept less than {GAIN:.0%} of their update "
                f"when {how.format(worst)}"
            )
    warnings += _said(plan)
    details = {**plan.to_json(), "tensors": rows, "base_verified": not plan.unverified}
    kept, noise = in_all(stats[n] for n in anew)
    details["requantised"] = {"kept": kept, "noise": noise} if anew else None
    return Report("merge", True, (), (str(target),), tuple(warnings), details)


def _said(plan: MergePlan) -> Iterator[str]:
    if any(name.endswith(PICKLES) for name in (plan.base.of or plan.base).shards):
        yield f"{plan.base.path}: its weights are pickles; the output's are safetensors"
    left = plan.base.companions()[1]
    if left:
        yield f"not copied, hidden or other copies of the weights: {some(left, 5)}"
    name = report_name(plan)
    if plan.base.path.is_dir() and name != REPORTS[0]:
        kept = f"{REPORTS[0]} is the base's own and is kept"
        yield f"{kept}: the report is {name}" if name else f"{kept}: no report is written"
    config = plan.base.config()
    said_dtype = config.get("dtype") or config.get("torch_dtype")
    if plan.options.dtype and said_dtype not in (None, plan.options.dtype):
        yield (
            f"config.json still says dtype {said_dtype}: transformers rounds to it when it loads, "
            "unless it is told another"
        )
    if plan.tie is not None:
        yield f"untied: {plan.tie.head} is a tensor of its own, as config.json now says"


def report_json(report: Report) -> Json:
    """What report.json holds; no paths, so that equal inputs give equal folders."""
    whole = report.to_json()
    return {k: v for k, v in whole.items() if k not in ("command", "outputs", "parity")}


def lines(report: Report) -> str:
    """The report as a table for people."""
    found = report.details["tensors"]
    found = [r for r in found if r["updates"] != ["dequantised"]]
    more = ("int8 error/‖Δ‖", "own/‖W‖") if any(r["int8"] for r in found) else ()
    more = (*more, "noise") if any(r["requantised"] for r in found) else more
    rows = [("tensor", "update", "‖Δ‖/‖W‖", "unmoved", "gain", *more)]
    for r in found:
        numbers = ["", "", "", *("" for _ in more)]
        if r["gain"] is not None:
            ratio = "∞" if r["ratio"] is None else f"{r['ratio']:.2e}"
            numbers[:3] = [ratio, f"{r['lost']:.1%}", f"{r['gain']:.3f}"]
        if r["int8"]:
            numbers[3:5] = ["" if r["int8"][n] is None else f"{r['int8'][n]:.2e}" for n in _MISSED]
        if r["requantised"] and r["requantised"]["noise"] is not None:
            numbers[-1] = f"{r['requantised']['noise']:.2f}"
        rows.append((r["key"], "; ".join(r["updates"]), *numbers))
    said = [*table([(*r,) for r in rows])]
    if left := len(report.details["tensors"]) - len(found):
        said.append(f"{left} more weights were dequantised")
    if anew := report.details.get("requantised"):
        said.append(f"in all: kept {anew['kept']:.1%} of the update, noise {anew['noise']:.2f}")
    return "\n".join([*said, f"wrote {report.outputs[0]}"])
