"""Less and less of a failing program: lines are dropped while it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.fuzz.check import Verdict, check
from tests.fuzz.programs import program

Failure = tuple[str, str]
"""wrong or raw, and the verb, with the kind of a raw exception."""


def failures_of(verdict: Verdict) -> set[Failure]:
    """The ways in which a program fails."""
    wrong = {("wrong", re.split(r" at |:", w)[0]) for w in verdict.wrong}
    return wrong | {("raw", ":".join(r.split(":")[:2]).partition(" at ")[0]) for r in verdict.raw}


def shrink(source: str, fails: Callable[[str], bool]) -> str:
    """A source of as few lines as can be that still fails; large parts are dropped first."""
    lines = source.splitlines()
    size = max(1, len(lines) // 2)
    while size:
        start, dropped = 0, False
        while start < len(lines):
            fewer = lines[:start] + lines[start + size :]
            if fewer and fails("\n".join(fewer) + "\n"):
                lines, dropped = fewer, True
            else:
                start += size
        if not dropped or size > 1:
            size //= 2
    return "\n".join(lines) + "\n"


def shrunk(seed: int, onnx: bool) -> str:
    """The source of a seed that fails, made small."""
    drawn: Any = program(seed)
    run: Callable[..., Verdict] = check
    if onnx:
        from tests.fuzz.check_graph import check_graph
        from tests.fuzz.graphs import graph

        drawn, run = graph(seed), check_graph
    one = min(failures_of(run(drawn)))
    verb = re.split("[ :]", one[1])[0]
    verbs = (verb,) if onnx else tuple(dict.fromkeys(("insert", verb)))

    def fails(source: str) -> bool:
        try:
            return one in failures_of(run(replace(drawn, source=source), verbs))
        except Exception:  # no program
            return False

    return f"{one}\n{shrink(drawn.source, fails)}"
