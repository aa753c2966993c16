"""The numbers of the strip at the top of a page, the most telling first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_fx.report.formatting import number, percent, plural, size
from lora_fx.report.rows import Row
from lora_fx.text import JsonView


class Fact(NamedTuple):
    """A number, what it is, what to hold it against, and whether it is as it should be."""

    label: str
    value: str
    beside: str = ""
    ok: bool | None = None


def facts(result: JsonView, rows: list[Row]) -> Iterator[Fact]:
    """The numbers of the strip, the most telling first."""
    if isinstance(result.get("tensors"), int):
        wrong = result["tensors"] - result["equal"]
        yield Fact("Tensors that differ", number(wrong), "", wrong == 0)
    if "merges" in result:
        good = sum(bool(m.get("ok")) for m in result["merges"])
        count = len(result["merges"])
        yield Fact("Merges", f"{good} of {count}", "done", good == count)
    parity: list[JsonView] = result.get("parity") or []
    if parity:
        yield _decisive(parity)
    yield from _training(result)
    if lost := [row.rounding for row in rows if row.rounding is not None]:
        most, of = max(lost), f"of {len(lost)} tensors"
        yield Fact("Largest rounding loss", percent(most), of, most < 0.1)
    if result.get("limit"):
        spent = f"{number(result['used'])} of {number(result['limit'])} {result['unit']}"
        yield Fact("Budget used", percent(result["used"] / result["limit"]), spent)
    if "relative" in result:
        yield Fact("Error of all updates", percent(result["relative"]), "‖Δ − Δ′‖/‖Δ‖")
    if any(r.rank or r.parameters for r in rows):
        ranks = sorted({r for row in rows for r in row.rank if isinstance(r, int)})
        some = f"rank {ranks[0]}" if len(ranks) == 1 else ""
        some = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else some
        yield Fact("Targets", number(len(rows)), some)
    trained, frozen = result.get("trained"), result.get("frozen")
    if isinstance(trained, int) and isinstance(frozen, int):
        share = percent(trained / max(1, trained + frozen))
        yield Fact("Trained share", share, f"{number(trained)} parameters")
    elif isinstance(trained, int):
        yield Fact("Trained", number(trained), "parameters")
    if result.get("adapted_share") is not None:
        yield Fact("Adapted", percent(result["adapted_share"]), "of the weight FLOPs")
    files = (result.get("page") or {}).get("files") or ()
    out, source = ([f["bytes"] for f in files if f["of"] == of] for of in ("output", "input"))
    if out:
        beside = f"inputs {size(sum(source))}" if source else ""
        yield Fact("Written", size(sum(out)), beside)


def _decisive(parity: Sequence[JsonView]) -> Fact:
    """The comparison that the answer hangs on.

    Of those that failed it is the one that is furthest over its gate. Where all hold it is the
    largest, which is how near the two are: a fold that nearly fills a gate of 1e-6 is not.
    """
    failed = [p for p in parity if not p["ok"]]
    telling = failed or [p for p in parity if not p.get("blank")] or parity
    decisive = max(telling, key=_over_gate if failed else _size)
    of = f"; {decisive['of']}" if decisive.get("of") else ""
    beside = f"gate {number(decisive['tol'])}{of}; {plural(len(parity), 'comparison')}"
    rel = "∞" if decisive["rel"] is None else number(decisive["rel"])
    label = "Relative error over its gate" if failed else "Largest relative error"
    return Fact(label, rel, beside, not failed)


def _size(p: JsonView) -> float:
    return math.inf if p["rel"] is None else float(p["rel"])


def _over_gate(p: JsonView) -> float:
    return _size(p) / max(float(p["tol"]), 1e-30)


def _training(result: JsonView) -> list[Fact]:
    validation = result.get("validation")
    if not isinstance(validation, dict) or "losses" not in result:
        return []
    kept = f"step {result.get('best_step')} of {len(result['losses'])}"
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
