"""The heading of a page: what was done, and whether it holds.

Without a comparison, no heading says equal or proven.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_fx.report.html_text import number, plural
from lora_fx.text import JsonView

EXACT = 1e-4
"""The widest gate of which "equal" is said: that of float32."""
STOPPED = ("interrupted", "terminated")
"""The states of a training that was stopped."""


def heading(result: JsonView, state: str, error: str) -> str:
    """Return the heading of a result.

    Args:
        result: A command's JSON object.
        state: How the command ended, or that it is running.
        error: Its error; empty without one.
    """
    command = str(result.get("command", ""))
    if state == "running":
        return f"Training {_targets(result)}: {steps(result)}"
    if state in STOPPED:
        return f"Training {_targets(result)}: {state} after {steps(result)}"
    if not result.get("ok"):
        if error:
            return shortened(error)
        if result.get("verdicts"):
            return "The file does not compute what its probe expects"
        return "They differ" if command == "verify" else "The answer is no"
    of_command = _OF_COMMAND.get(command)
    return of_command(result) if of_command else "Done"


def steps(result: JsonView) -> str:
    """Return how far a training came; empty for another result."""
    run = (result.get("page") or {}).get("run")
    if not run:
        return ""
    return f"step {number(run.get('step'))} of {number(run.get('steps'))}"


def shortened(error: str, most: int = 90) -> str:
    """Return an error as a heading: all of a short one, else its start without a leading path.

    >>> shortened("runs/a.safetensors: its keys fit no parameter; expected layers.0.fc", 40)
    'its keys fit no parameter …'
    """
    if len(error) <= most:
        return error
    text = re.sub(r"^\S+: ", "", error)
    ends_of_clauses = [match.start() for match in re.finditer(r"[;,:.] ", text[: most + 1])]
    cut = max(ends_of_clauses, default=0)
    if cut > most / 3:
        return text[:cut] + " …"
    whole_words = text[:most].rpartition(" ")[0]
    return (whole_words or text[:most]) + " …"


def _rows(result: JsonView, field: str) -> Sequence[Any]:
    """Return the rows of a field, which may be missing, or a number alone."""
    rows = result.get(field)
    return rows if isinstance(rows, Sequence) else ()


def _targets(result: JsonView) -> str:
    return plural(len(_rows(result, "targets")), "target")


def _difference(result: JsonView) -> str | None:
    """Return the largest difference of the comparisons; None if all were held to exact gates."""
    rows = _rows(result, "parity")
    if all(row["tol"] <= EXACT for row in rows):
        return None
    return number(max(row["rel"] or 0 for row in rows))


def _train(result: JsonView) -> str:
    verdict = result.get("verdict") or f"kept step {result.get('best_step')}"
    return f"Trained {_targets(result)}: {verdict}"


def _merge(result: JsonView) -> str:
    tensors = plural(len(_rows(result, "tensors")), "tensor")
    if result.get("outputs"):
        return f"Merged into {tensors}"
    return f"Planned: {tensors}; nothing was written"


def _export(result: JsonView) -> str:
    outputs = result.get("outputs") or [""]
    kind = "Program of torch" if str(outputs[0]).endswith(".pt2") else "ONNX file"
    text = f"{kind}, mode {result.get('mode') or 'merged'}"
    if not result.get("parity"):
        return text
    difference = _difference(result)
    relation = "proven equal to" if difference is None else f"within {difference} of"
    return f"{text}, {relation} what it came from"


def _truncate(result: JsonView) -> str:
    if "table" in result:
        ranks = plural(len(result["table"]), "rank")
        return f"Losses at {ranks}, of {plural(result['examples'], 'example')}"
    before, after = number(result["parameters_before"]), number(result["parameters"])
    return f"Truncated from {before} to {after} parameters"


def _plan(result: JsonView) -> str:
    planned = sum(bool(row.get("rank")) for row in _rows(result, "targets"))
    method, budget = result.get("method", ""), result.get("budget", "")
    return f"Planned {plural(planned, 'target')} by {method} under {budget}"


def _convert(result: JsonView) -> str:
    updates = plural(result.get("updates") or 0, "update")
    return f"Converted {updates} from {result.get('from', '')} to {result.get('to', '')}"


def _verify(result: JsonView) -> str:
    if "fits" in result:
        return f"The adapter fits: {plural(result['fits'], 'low-rank update')}"
    if "adapted" in result:
        targets = plural(result["targets"], "target")
        return f"The adapter fits: {number(result['adapted'])} of {targets}"
    if result.get("verdicts"):
        return "The file computes what its probe expects"
    if "tensors" in result:
        relation = "equal"
        if "touched" in result:
            relation = "as expected"
        elif result.get("tol"):
            relation = f"equal within {result['tol']:g} of their largest element"
        tensors = plural(result["tensors"], "tensor")
        return f"{number(result['equal'])} of {tensors} are {relation}"
    difference = _difference(result)
    return "Equal" if difference is None else f"Within {difference} of each other"


_OF_COMMAND: Mapping[str, Callable[[JsonView], str]] = {
    "insert": lambda result: f"Untrained branches at {_targets(result)}",
    "train": _train,
    "merge": _merge,
    "merge-all": lambda result: f"{plural(len(_rows(result, 'merges')), 'merge')} done",
    "export": _export,
    "extract": lambda result: (
        f"Recovered {plural(len(_rows(result, 'extracted')), 'update')} from two checkpoints"
    ),
    "truncate": _truncate,
    "plan": _plan,
    "convert": _convert,
    "verify": _verify,
}
"""What was done, of a command that succeeded."""
