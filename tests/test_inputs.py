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


def test_sums_of_sizes_that_must_be_equal_have_other_sizes_than_the_example() -> None:
    """Joint attention: positions of words and pixels are inputs of their own, as Flux has them."""
    lengths = {"words": 6, "pixels": 64, "word_ids": 6, "pixel_ids": 64}
    specs = tuple(Input(name, "float32", (n, 3), {0: name}) for name, n in lengths.items())
    places = tuple((f"s{i}", name, 0) for i, name in enumerate(lengths))
    condition = Condition("(s0 + s1) == (s2 + s3)", places, "model.py, line 1", True)
    inputs = Inputs(specs, (condition,))
    tried = [inputs.values(size) for size in inputs.checks]
    assert all(values and values["words"] == values["word_ids"] for values in tried)
    assert len({str(values) for values in tried}) == len(inputs.checks)
