"""The whole page: a string that is one HTML file, which asks for nothing outside itself.

Everything can be read without a script; the script sorts and filters the table. The policy in
the head lets a browser run that script alone, and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lora_fx.report import charts, sections, style
from lora_fx.report.charts import blocks
from lora_fx.report.rows import Row, rows_of
from lora_fx.report.sections import table
from lora_fx.report.text import Json, esc, number, percent, plural, size


def page(result: Json) -> str:
    """The page of a command's JSON object (docs/json.md).

    Args:
        result: With what only a page shows under `page`: `argv`, `versions`, `files` rows of
            {of, path, bytes, sha256}, `adapters` rows of {path, updates: rows of {key, kind, rank,
            alpha, parameters, shape, sigma, norm}}; all may be missing.
    """
    rows = rows_of(result)
    title = f"lora-fx {result.get('command', '')}: {'done' if result.get('ok') else 'no'}"
    what = "tensor" if result.get("command") in ("merge", "verify") else "target"
    count = esc("; ".join(filter(None, [plural(len(rows), what), result.get("effect")])))
    body = [
        verdict(result, rows),
        "<main>",
        sections.warnings(result),
        sections.merges(result),
        sections.section("Training", charts.training(result)),
        sections.parity(result),
        sections.section("Structure", blocks(rows)),
        sections.section("Rounding", charts.rounding(rows)),
        sections.section(
            f"{what.capitalize()}s", f"<p class=count>{count}</p>{table(result, rows)}" * bool(rows)
        ),
        sections.stages(result),
        sections.unhandled(result),
        sections.files(result),
        sections.run(result),
        "</main>",
    ]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_hash(style.SCRIPT)}'"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>{esc(title)}</title><style>{style.CSS}</style></head>\n<body>"
        f"{''.join(body)}\n"
        f'<script type="application/json" id="data">{_data(result)}</script>\n'
        f"<script>{style.SCRIPT}</script></body></html>\n"
    )


def _data(result: Json) -> str:
    """The object as JSON that no HTML parser can take for a tag; ASCII only."""
    text = json.dumps(_plain(result), separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: they are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# The first strip of the page: what was done, whether it holds, and the few numbers that say so.
#
# Nothing is claimed here that the result does not hold: no parity means the page does not say
# equal.


class Fact(NamedTuple):
    """A number, what it is, what to hold it against, and whether it is as it should be."""

    label: str
    value: str
    beside: str = ""
    ok: bool | None = None


def verdict(result: Json, rows: list[Row]) -> str:
    """The strip as HTML."""
    ok = bool(result.get("ok"))
    head, word = _head(result, ok)
    mark = "ok" if ok else "no"
    parts = [
        f'<header class="verdict {mark}">',
        f"<p class=what><b class=badge>{word}</b> lora-fx {esc(result.get('command', ''))}</p>",
        f"<h1>{esc(head)}</h1>",
    ]
    if result.get("hint"):
        parts.append(f"<p class=hint>{esc(result['hint'])}</p>")
    if cells := facts(result, rows):
        parts.append("<dl class=facts>")
        for fact in cells:
            state = "" if fact.ok is None else " class=good" if fact.ok else " class=bad"
            beside = f"<dd class=beside>{esc(fact.beside)}</dd>" if fact.beside else ""
            parts.append(
                f"<div{state}><dt>{esc(fact.label)}</dt>"
                f"<dd class=value>{esc(fact.value)}</dd>{beside}</div>"
            )
        parts.append("</dl>")
    return "".join([*parts, "</header>"])


def _head(result: Json, ok: bool) -> tuple[str, str]:
    """(the sentence, the badge's word)."""
    if not ok:
        differ = "They differ" if result.get("command") == "verify" else "The answer is no"
        return str(result.get("error") or differ), "Differs" if "error" not in result else "Stopped"
    say = _SENTENCES.get(str(result.get("command")))
    return (say(result) if say else "Done"), "Done"


def _insert(r: Json) -> str:
    return f"Untrained branches at {_targets(r)}"


def _train(r: Json) -> str:
    said = str(r.get("verdict") or f"kept step {r.get('best_step')}")
    return f"Trained {_targets(r)}: {said}"


def _merge(r: Json) -> str:
    if not r.get("outputs"):
        return f"Planned: {plural(len(r.get('tensors') or ()), 'tensor')}; nothing was written"
    return f"Merged into {plural(len(r.get('tensors') or ()), 'tensor')}"


def _merge_all(r: Json) -> str:
    return f"{plural(len(r.get('merges') or ()), 'merge')} done"


def _export(r: Json) -> str:
    what = f"ONNX file, mode {r.get('mode', 'merged')}"
    return f"{what}, proven equal to what it came from" if r.get("parity") else what


def _extract(r: Json) -> str:
    return f"Recovered {plural(len(r.get('extracted') or ()), 'update')} from two checkpoints"


def _truncate(r: Json) -> str:
    if "table" in r:
        return f"Losses at {plural(len(r['table']), 'rank')}, of {plural(r['examples'], 'example')}"
    before, after = r.get("parameters_before"), r.get("parameters")
    return f"Truncated from {number(before)} to {number(after)} parameters"


def _plan(r: Json) -> str:
    ranked = [t for t in r.get("targets") or () if t.get("rank")]
    return f"Planned {plural(len(ranked), 'target')} by {r.get('method')} under {r.get('budget')}"


def _convert(r: Json) -> str:
    return f"Converted {plural(r.get('updates') or 0, 'update')} from {r.get('from')} to {r['to']}"


def _verify(r: Json) -> str:
    if "fits" in r:
        return f"The adapter fits: {plural(r['fits'], 'low-rank update')}"
    if "tensors" in r:
        held = " as they should be" if "touched" in r else " equal"
        return f"{number(r['equal'])} of {plural(r['tensors'], 'tensor')} are{held}"
    return "Equal within the gate"


_SENTENCES: dict[str, Callable[[Json], str]] = {
    "insert": _insert,
    "train": _train,
    "merge": _merge,
    "merge-all": _merge_all,
    "export": _export,
    "extract": _extract,
    "truncate": _truncate,
    "plan": _plan,
    "convert": _convert,
    "verify": _verify,
}


def _targets(r: Json) -> str:
    return plural(len(r.get("targets") or ()), "target")


def facts(result: Json, rows: list[Row]) -> list[Fact]:
    """The numbers of the strip, the most telling first."""
    made: list[Fact] = []
    parity: list[dict[str, Any]] = result.get("parity") or []
    if parity:
        worst = max(parity, key=_nearness)
        gate = f"gate {number(worst['tol'])}; {plural(len(parity), 'comparison')}"
        rel = "∞" if worst["rel"] is None else number(worst["rel"])
        made.append(Fact("Largest relative error", rel, gate, all(p["ok"] for p in parity)))
    made += _training(result)
    made += _rounding(rows)
    if result.get("limit"):
        spent = f"{number(result['used'])} of {number(result['limit'])} {result['unit']}"
        made.append(Fact("Budget used", percent(result["used"] / result["limit"]), spent))
    if "relative" in result:
        made.append(Fact("Error of all updates", percent(result["relative"]), "‖Δ − Δ′‖/‖Δ‖"))
    if any(r.rank or r.parameters for r in rows):
        ranks = sorted({r for row in rows for r in row.rank if isinstance(r, int)})
        some = f"rank {ranks[0]}" if len(ranks) == 1 else ""
        some = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else some
        made.append(Fact("Targets", number(len(rows)), some))
    trained, frozen = result.get("trained"), result.get("frozen")
    if isinstance(trained, int) and isinstance(frozen, int):
        share = percent(trained / max(1, trained + frozen))
        made.append(Fact("Trained share", share, f"{number(trained)} parameters"))
    elif isinstance(trained, int):
        made.append(Fact("Trained", number(trained), "parameters"))
    if result.get("adapted_share") is not None:
        made.append(Fact("Adapted", percent(result["adapted_share"]), "of the weight FLOPs"))
    made += _sizes(result)
    if "merges" in result:
        good = sum(bool(m.get("ok")) for m in result["merges"])
        count = len(result["merges"])
        made.insert(0, Fact("Merges", f"{good} of {count}", "done", good == count))
    if isinstance(result.get("tensors"), int):
        wrong = result["tensors"] - result["equal"]
        made.insert(0, Fact("Tensors that differ", number(wrong), "", wrong == 0))
    if said := len(result.get("warnings") or ()):
        made.append(Fact("Warnings", number(said), "listed below"))
    return made


def _nearness(p: Json) -> float:
    return float("inf") if p["rel"] is None else p["rel"] / max(p["tol"], 1e-30)


def _training(result: Json) -> list[Fact]:
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
    return [Fact("Validation loss", number(float(best)), beside, best < before)]


def _rounding(rows: list[Row]) -> list[Fact]:
    lost = [(row.rounding, row.key) for row in rows if row.rounding is not None]
    if not lost:
        return []
    worst = max(lost)[0]
    return [Fact("Largest rounding loss", percent(worst), f"of {len(lost)} tensors", worst < 0.1)]


def _sizes(result: Json) -> list[Fact]:
    added = result.get("page") or {}
    out = [f["bytes"] for f in added.get("files") or () if f["of"] == "output"]
    source = [f["bytes"] for f in added.get("files") or () if f["of"] == "input"]
    if not out:
        return []
    beside = f"inputs {size(sum(source))}" if source else ""
    return [Fact("Written", size(sum(out)), beside)]
