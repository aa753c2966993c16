"""The numbers of the strip at the top of a page, the most telling first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_fx.report.formatting import number, percent, plural, size
from lora_fx.report.rows import Row
from lora_fx.text import JsonView


class Fact(NamedTuple):
    """One number of the strip.

    Attributes:
        label: What it is.
        value: The number.
        beside: What to hold it against.
        ok: Whether it is as it should be; None where nothing says so.
    """

    label: str
    value: str
    beside: str = ""
    ok: bool | None = None


def facts(result: JsonView, rows: list[Row]) -> Iterator[Fact]:
    """The numbers of the strip, the most telling first."""
    yield from _comparisons(result)
    yield from _validation(result)
    yield from _rounding(rows)
    yield from _budget(result)
    if "relative" in result:
        yield Fact("Error of all updates", percent(result["relative"]), "‖Δ − Δ′‖/‖Δ‖")
    if any(row.rank or row.parameters for row in rows):
        yield Fact("Targets", number(len(rows)), _ranks(rows))
    yield from _trained_parameters(result)
    if result.get("adapted_share") is not None:
        yield Fact("Adapted", percent(result["adapted_share"]), "of the weight FLOPs")
    yield from _written(result)


def _comparisons(result: JsonView) -> Iterator[Fact]:
    """What a comparison of files, several merges or a proof came to."""
    if isinstance(result.get("tensors"), int):
        n_different = result["tensors"] - result["equal"]
        yield Fact("Tensors that differ", number(n_different), "", n_different == 0)
    if "merges" in result:
        n_good = sum(bool(merge.get("ok")) for merge in result["merges"])
        count = len(result["merges"])
        yield Fact("Merges", f"{n_good} of {count}", "done", n_good == count)
    parity: list[JsonView] = result.get("parity") or []
    if parity:
        yield _decisive(parity)


def _decisive(parity: Sequence[JsonView]) -> Fact:
    """The comparison that the answer hangs on.

    Of those that failed it is the one that is furthest over its gate. Where all hold it is the
    largest, which is how near the two are: a fold that nearly fills a gate of 1e-6 is not.
    """
    failed = [comparison for comparison in parity if not comparison["ok"]]
    if failed:
        label = "Relative error over its gate"
        decisive = max(failed, key=_share_of_gate)
    else:
        label = "Largest relative error"
        telling = [comparison for comparison in parity if not comparison.get("blank")]
        decisive = max(telling or parity, key=_relative_error)

    beside = f"gate {number(decisive['tol'])}"
    if decisive.get("of"):
        beside += f"; {decisive['of']}"
    beside += f"; {plural(len(parity), 'comparison')}"
    error = "∞" if decisive["rel"] is None else number(decisive["rel"])
    return Fact(label, error, beside, not failed)


def _relative_error(comparison: JsonView) -> float:
    """The error of a comparison; JSON has null for an infinite one."""
    if comparison["rel"] is None:
        return math.inf
    return float(comparison["rel"])


def _share_of_gate(comparison: JsonView) -> float:
    return _relative_error(comparison) / max(float(comparison["tol"]), 1e-30)


def _validation(result: JsonView) -> list[Fact]:
    """What a training came to."""
    validation = result.get("validation")
    if not isinstance(validation, dict) or "losses" not in result:
        return []
    best_step = result.get("best_step")
    last_step = len(result["losses"])
    kept_step = f"step {best_step} of {last_step}"
    best = validation.get(str(best_step))
    if best is None:
        return [Fact("Kept", kept_step, "no validation", False)]
    before = result.get("before")
    if before is None:
        return [Fact("Validation loss", number(float(best)), kept_step)]
    beside = f"before {number(float(before))}; {kept_step}"
    ok: bool | None = best < before
    if ok and best_step == last_step:
        ok = None  # still falling at the last step: more steps would have been better
    return [Fact("Validation loss", number(float(best)), beside, ok)]


def _rounding(rows: list[Row]) -> Iterator[Fact]:
    """What rounding lost of the update that lost most."""
    shares = [row.rounding for row in rows if row.rounding is not None]
    if shares:
        largest = max(shares)
        beside = f"of {len(shares)} tensors"
        yield Fact("Largest rounding loss", percent(largest), beside, largest < 0.1)


def _budget(result: JsonView) -> Iterator[Fact]:
    """How much of a budget was used."""
    if result.get("limit"):
        spent = f"{number(result['used'])} of {number(result['limit'])} {result['unit']}"
        yield Fact("Budget used", percent(result["used"] / result["limit"]), spent)


def _ranks(rows: list[Row]) -> str:
    """The range of the ranks, for people."""
    ranks: set[int] = set()
    for row in rows:
        ranks.update(rank for rank in row.rank if isinstance(rank, int))
    if not ranks:
        return ""
    if len(ranks) == 1:
        return f"rank {min(ranks)}"
    return f"ranks {min(ranks)} to {max(ranks)}"


def _trained_parameters(result: JsonView) -> Iterator[Fact]:
    """How many parameters were trained, and of how many, where that is known."""
    trained = result.get("trained")
    frozen = result.get("frozen")
    if not isinstance(trained, int):
        return
    if isinstance(frozen, int):
        share = percent(trained / max(1, trained + frozen))
        yield Fact("Trained share", share, f"{number(trained)} parameters")
    else:
        yield Fact("Trained", number(trained), "parameters")


def _written(result: JsonView) -> Iterator[Fact]:
    """How many bytes were written."""
    files = (result.get("page") or {}).get("files") or ()
    outputs = [file["bytes"] for file in files if file["of"] == "output"]
    inputs = [file["bytes"] for file in files if file["of"] == "input"]
    if outputs:
        beside = ""
        if inputs:
            beside = f"inputs {size(sum(inputs))}"
        yield Fact("Written", size(sum(outputs)), beside)
