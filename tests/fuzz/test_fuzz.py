"""A few drawn programs in every run; `python -m tests.fuzz 0 1000` runs a thousand."""

from __future__ import annotations

import pytest

from tests.fuzz import check as checks
from tests.fuzz.check import check
from tests.fuzz.programs import program


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
