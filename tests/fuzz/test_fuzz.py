"""A few drawn programs and graphs in every run.

`python -m tests.fuzz 0 1000` runs a thousand programs, with --onnx as many ONNX graphs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.fuzz import check as checks
from tests.fuzz import check_graph as graph_checks
from tests.fuzz.check import check
from tests.fuzz.check_graph import check_graph
from tests.fuzz.graphs import graph
from tests.fuzz.programs import program
from tests.fuzz.shrink import shrink


@pytest.mark.parametrize("seed", [*range(8), 41, 1031])
def test_a_drawn_program_is_right_or_refused_in_words(seed: int) -> None:
    drawn = program(seed)
    verdict = check(drawn, checks.VERBS if seed % 4 == 0 else checks.VERBS[:3])
    assert verdict.wrong == [], drawn.source
    assert verdict.raw == [], drawn.source
    assert verdict.served, drawn.source


def test_a_program_is_its_seed() -> None:
    assert program(5) == program(5)
    assert len({program(n).source for n in range(50)}) == 50


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that is not put in by hand is a difference."""
    monkeypatch.setattr(checks, "_by_hand", lambda model, adapter: model)
    assert check(program(3), ("insert",)).wrong


GRAPHS = (3, 15, 18, 19, 30, 36, 59, 64, 67, 108, 730, 772, 840, 851, 854, *range(2000, 2015))
"""The first are those that something was found with."""


@pytest.mark.parametrize("seed", GRAPHS)
def test_a_drawn_graph_is_right_or_refused_in_words(seed: int) -> None:
    drawn = graph(seed)
    verdict = check_graph(drawn, graph_checks.VERBS[seed % 3 :: 3])
    assert verdict.wrong == [], drawn.source
    assert verdict.raw == [], drawn.source
    assert verdict.unseen == [], drawn.source


@pytest.mark.parametrize(
    ("seed", "verbs"), [(42402, ("switch", "batch")), (42528, ("merge", "switch"))]
)
def test_what_the_graph_by_hand_got_wrong(seed: int, verbs: tuple[str, ...]) -> None:
    """W + ΔW rounded to float16 where nothing stores it; a first product that reads W turned."""
    with tempfile.TemporaryDirectory() as folder:
        checked = graph_checks.Check(graph(seed), Path(folder))
        checked.text.gate[:] = [1e-5]
        verdict = checked.run(verbs)
    assert verdict.wrong == verdict.raw == [], checked.program.source
    assert {*verdict.served, *verdict.partly} == {*verbs}


def test_a_graph_is_its_seed() -> None:
    assert graph(5) == graph(5)
    assert len({graph(n).source for n in range(50)}) == 50


def test_a_wrong_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph by hand without the update is another one; so is a weight that find leaves out."""
    monkeypatch.setattr(graph_checks, "updated", lambda text, adapter: {})
    verdict = check_graph(graph(0), ("merged", "switch", "load"))
    assert {w.split()[0] for w in verdict.wrong} == {"merged", "switch", "load"}


def test_a_failure_shrinks_to_the_lines_that_it_needs() -> None:
    lines = "\n".join(map(str, range(40)))
    assert shrink(lines, lambda s: "7" in s.split() and "31" in s.split()) == "7\n31\n"
