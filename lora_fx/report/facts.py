"""The strip of facts: the most important numbers of a result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_fx.report.html_text import number, percent, plural, size
from lora_fx.report.rows import Row
from lora_fx.text import JsonView


class Fact(NamedTuple):
    """A number, its name, a number to compare it with, and whether it is good."""

    label: str
    value: str
    beside: str = ""
    ok: bool | None = None


def facts(result: JsonView, rows: list[Row]) -> Iterator[Fact]:
    """Yield the numbers of the strip, the most important first."""
    if isinstance(result.get("tensors"), int):
        unequal = result["tensors"] - result["equal"]
        gate = f"by more than {result['tol']:g}" if result.get("tol") else ""
        yield Fact("Tensors that differ", number(unequal), gate, unequal == 0)
    if "merges" in result:
        count = len(result["merges"])
        done = sum(bool(merge.get("ok")) for merge in result["merges"])
        yield Fact("Merges", f"{done} of {count}", "done", done == count)
    yield from _training(result)
    if result.get("verdicts"):
        right = sum(row["verdict"].startswith("right") for row in result["verdicts"])
        count = len(result["verdicts"])
        yield Fact("Right", f"{right} of {count}", "by the probe", right == count or None)
    parity: list[JsonView] = result.get("parity") or []
    if parity:
        yield _decisive(parity)
    rounding = [row.rounding for row in rows if row.rounding is not None]
    if rounding:
        largest = max(rounding)
        beside = f"of {plural(len(rounding), 'tensor')}"
        yield Fact("Largest rounding loss", percent(largest), beside, largest < 0.1)
    if result.get("limit"):
        spent = f"{number(result['used'])} of {number(result['limit'])} {result['unit']}"
        yield Fact("Budget used", percent(result["used"] / result["limit"]), spent)
    if "relative" in result:
        yield Fact("Error of all updates", percent(result["relative"]), "‖Δ − Δ′‖/‖Δ‖")
    if any(row.rank or row.parameters for row in rows):
        yield Fact("Targets", number(len(rows)), _ranks_text(rows))
    yield from _sizes(result)


def _ranks_text(rows: list[Row]) -> str:
    """Return the rank of all rows, or the least and largest; empty if no rank is known."""
    ranks: set[int] = set()
    for row in rows:
        ranks.update(rank for rank in row.rank if isinstance(rank, int))
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f"rank {min(ranks)}"
    return f"ranks {min(ranks)} to {max(ranks)}"


def _sizes(result: JsonView) -> Iterator[Fact]:
    """Yield the numbers of what is trained, adapted and written."""
    trained = result.get("trained")
    frozen = result.get("frozen")
    if isinstance(trained, int) and isinstance(frozen, int):
        share = percent(trained / max(1, trained + frozen))
        yield Fact("Trained share", share, f"{number(trained)} parameters")
    elif isinstance(trained, int):
        yield Fact("Trained", number(trained), "parameters")
    if result.get("adapted_share") is not None:
        yield Fact("Adapted", percent(result["adapted_share"]), "of the weight FLOPs")
    files = (result.get("page") or {}).get("files") or ()
    output_bytes = [file["bytes"] for file in files if file["of"] == "output"]
    input_bytes = [file["bytes"] for file in files if file["of"] == "input"]
    if output_bytes:
        beside = ""
        if input_bytes:
            beside = f"inputs {size(sum(input_bytes))}"
        yield Fact("Written", size(sum(output_bytes)), beside)


def _decisive(parity: Sequence[JsonView]) -> Fact:
    """Return the comparison that decides the answer.

    Of those that failed it is the one that is furthest over its gate. Where all hold it is the
    largest, which is how near the two are: a fold that nearly fills a gate of 1e-6 is not.
    """
    failed = [row for row in parity if not row["ok"]]
    if failed:
        label = "Relative error over its gate"
        decisive = max(failed, key=_over_gate)
    else:
        label = "Largest relative error"
        telling = [row for row in parity if not row.get("blank")] or parity
        decisive = max(telling, key=_error)
    gate = f"gate {number(decisive['tol'])}"
    if decisive.get("of"):
        gate += f"; {decisive['of']}"
    beside = f"{gate}; {plural(len(parity), 'comparison')}"
    relative = "∞" if decisive["rel"] is None else number(decisive["rel"])
    return Fact(label, relative, beside, not failed)


def _error(row: JsonView) -> float:
    if row["rel"] is None:
        return math.inf
    return float(row["rel"])


def _over_gate(row: JsonView) -> float:
    return _error(row) / max(float(row["tol"]), 1e-30)


def _training(result: JsonView) -> list[Fact]:
    """Return the validation loss of the kept step, compared with the loss before training.

    Of a training that goes on, or was stopped, that is the best step so far.
    """
    validation = result.get("validation")
    if not isinstance(validation, dict) or "losses" not in result:
        return []
    run = (result.get("page") or {}).get("run") or {}
    steps = run.get("steps", len(result["losses"]))
    kept = f"step {number(result.get('best_step'))} of {number(steps)}"
    best = validation.get(str(result.get("best_step")))
    if best is None:
        return [Fact("Kept", kept, "no validation", False)]
    before = result.get("before")
    if before is None:
        return [Fact("Validation loss", number(float(best)), kept)]
    beside = f"before {number(float(before))}; {kept}"
    ok: bool | None = best < before
    if ok and result.get("best_step") == len(result["losses"]):
        ok = None  # still falling at the last step: more steps would have been better
    return [Fact("Validation loss", number(float(best)), beside, ok)]
