"""The report of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_fx.checkpoint.companions import REPORTS, report_name
from lora_fx.checkpoint.fold_stats import SAMPLED, Stats
from lora_fx.checkpoint.int8 import HINT
from lora_fx.checkpoint.merge_plan import MergePlan
from lora_fx.checkpoint.requantise import in_all
from lora_fx.compare import Report
from lora_fx.files.checkpoint import PICKLES
from lora_fx.text import Json, counted, some, table

GAIN = 0.95
"""The share of Δ below which a merge warns about rounding in the stored dtype."""


_INT8_NUMBERS = ("error", "own")


def report_of(plan: MergePlan, stats: Mapping[str, Stats], target: Path) -> Report:
    """The report of a merge that is written to `target`."""
    rows = [change.to_json(stats.get(name)) for name, change in plan.changes.items()]
    requantised = [name for name in stats if plan.changes[name].requantised]
    details = {**plan.to_json(), "tensors": rows, "base_verified": not plan.unverified}
    details["requantised"] = None
    if requantised:
        gain, noise = in_all(stats[name] for name in requantised)
        details["requantised"] = {"kept": gain, "noise": noise}
    warnings = [*plan.notes, *_rounding_warnings(plan, stats), *_output_warnings(plan)]
    return Report("merge", True, (), (str(target),), tuple(warnings), details)


def _rounding_warnings(plan: MergePlan, stats: Mapping[str, Stats]) -> Iterator[str]:
    """Yield warnings on tensors whose dtype or codes keep too little of their updates."""
    rounded: list[str] = []
    int8: list[str] = []
    requantised: list[str] = []
    for name in stats:
        change = plan.changes[name]
        if change.int8 is not None:
            int8.append(name)
        elif change.requantised:
            requantised.append(name)
        else:
            rounded.append(name)
    for names, how, advice in (
        (rounded, "rounded", "pass --dtype float16 or float32 to keep more"),
        (int8, "quantised to int8 again", HINT),
        (requantised, "quantised again", "pass --dequantise to keep all of it"),
    ):
        low = [(stats[name].gain, name) for name in names if stats[name].gain < GAIN]
        if low:
            gain, worst = min(low)
            yield (
                f"{len(low)} of {len(names)} tensors kept less than {GAIN:.0%} of their update "
                f"when {how}; {worst} kept only {gain:.1%}: {advice}"
            )


def _output_warnings(plan: MergePlan) -> Iterator[str]:
    """Yield warnings on unexpected facts about the output's files and config."""
    if any(name.endswith(PICKLES) for name in (plan.base.of or plan.base).shards):
        yield f"{plan.base.path}: its weights are pickles; the output's weights are safetensors"
    _, not_copied = plan.base.companions()
    if not_copied:
        yield f"not copied, hidden files or other copies of the weights: {some(not_copied, 5)}"

    _, why = plan.probe()
    if why:
        yield f"no probe is written: {why}"

    name = report_name(plan)
    if plan.base.path.is_dir() and name != REPORTS[0]:
        stays = f"{REPORTS[0]} belongs to the base and is kept"
        if name:
            yield f"{stays}: the report is {name}"
        else:
            yield f"{stays}: no report is written"

    config = plan.base.config()
    config_dtype = config.get("dtype") or config.get("torch_dtype")
    if plan.options.dtype and config_dtype not in (None, plan.options.dtype):
        yield (
            f"config.json still has dtype {config_dtype}: transformers rounds to it on loading "
            "unless you pass another dtype"
        )
    if plan.tie is not None:
        yield f"untied: {plan.tie.head} is now a separate tensor, and config.json records that"


def report_json(report: Report) -> Json:
    """Return the content of report.json; it has no paths, so equal inputs give equal folders."""
    row = report.to_json()
    for name in ("command", "outputs", "parity"):
        row.pop(name, None)
    return row


def lines(report: Report) -> str:
    """The report as a table for people."""
    tensors = report.details["tensors"]
    updated = [row for row in tensors if row["updates"] != ["dequantised"]]
    has_int8 = any(row["int8"] for row in updated)
    has_requantised = any(row["requantised"] for row in updated)

    head = ["tensor", "update", "‖Δ‖/‖W‖", "unmoved", "gain"]
    if has_int8:
        head += ["int8 error/‖Δ‖", "own/‖W‖"]
    if has_requantised:
        head.append("noise")
    rows = [tuple(head)]
    for row in updated:
        cells = [row["key"], "; ".join(row["updates"]), *_fold_cells(row)]
        if has_int8:
            cells += _int8_cells(row)
        if has_requantised:
            cells.append(_noise_cell(row))
        rows.append(tuple(cells))

    text = table(rows)
    estimated = [row for row in updated if row["measured"] is not None and row["measured"] < 1]
    if estimated:
        text.append(
            f"‖W‖, unmoved and gain of {counted(len(estimated), 'tensor')} are estimated from one "
            f"row in {SAMPLED}"
        )
    dequantised = len(tensors) - len(updated)
    if dequantised:
        text.append(f"{dequantised} more weights were dequantised")
    total = report.details.get("requantised")
    if total:
        text.append(f"in all: kept {total['kept']:.1%} of the update, noise {total['noise']:.2f}")
    text.append(f"wrote {report.outputs[0]}")
    return "\n".join(text)


def _fold_cells(row: Json) -> list[str]:
    """Return the size of a tensor's update and the share kept; empty if it was not folded."""
    if row["gain"] is None:
        return ["", "", ""]
    ratio = "∞" if row["ratio"] is None else f"{row['ratio']:.2e}"
    return [ratio, f"{row['lost']:.1%}", f"{row['gain']:.3f}"]


def _int8_cells(row: Json) -> list[str]:
    """Return the quantisation errors of W + Δ and of W; empty if unknown."""
    if not row["int8"]:
        return ["", ""]
    numbers = [row["int8"][name] for name in _INT8_NUMBERS]
    return ["" if number is None else f"{number:.2e}" for number in numbers]


def _noise_cell(row: Json) -> str:
    """Return the noise of a tensor that was requantised."""
    if not row["requantised"] or row["requantised"]["noise"] is None:
        return ""
    return f"{row['requantised']['noise']:.2f}"
