"""The signature of a model: symbols of its sizes."""

from __future__ import annotations

from typing import Any

import pytest

from lora_fx.conditions import Condition
from lora_fx.inputs import Input, Inputs


def test_a_condition_is_solved_once_for_the_symbols_of_all_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decoder of n layers has 4·n sizes of a cache, and as many conditions that equate them."""
    specs = tuple(Input(f"x{i}", "float32", (2, 3), {0: f"n{i}"}) for i in range(5))
    conditions = tuple(
        Condition("s0 == s1", (("s0", f"x{i}", 0), ("s1", "x0", 0)), demanded=True)
        for i in range(1, 5)
    )
    solved = 0
    original = Condition.equal_sizes

    def counted(condition: Condition, places: Any) -> Any:
        nonlocal solved
        solved += 1
        return original(condition, places)

    monkeypatch.setattr(Condition, "equal_sizes", counted)
    inputs = Inputs(specs, conditions)
    symbols = {inputs.symbol(spec.name, 0) for spec in inputs.specs}
    assert len(symbols) == 1
    assert solved == 4
    assert all(map(inputs.implied, conditions))
    assert solved == 8  # once more for demands alone
