"""What the timing loop runs and in which order, and its arithmetic; never a time."""

from __future__ import annotations

import math
from functools import partial

import pytest

from lora_fx.onnx.timing import bounds, interleave, summary, timed


def test_everything_runs_once_a_round_in_order() -> None:
    calls: list[str] = []

    def note(name: str) -> int:
        calls.append(name)
        return len(calls)

    runs = {n: partial(note, n) for n in "abc"}
    found = interleave(runs, rounds=3, warmup=2, before=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b-c" * 5
    assert found == {"a": [14, 20, 26], "b": [16, 22, 28], "c": [18, 24, 30]}


def test_a_sample_is_the_mean_of_its_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    wall, cpu = iter([10.0, 16.0]), iter([1.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu))
    count: list[int] = []
    one = timed(lambda: count.append(1), repeats=3)
    assert (one.wall, one.cpu, len(count)) == (2.0, 1.0, 3)


def test_ratios_and_bounds() -> None:
    row = summary([2.0, 6.0, 4.0], [2.0, 1.0, 4.0])
    assert (row["median"], row["min"], row["ratio"], row["min_ratio"]) == (4.0, 2.0, 2.0, 2.0)
    assert row["lower"] is None and row["upper"] is None
    assert bounds([1.0] * 5) is None
    # P(2 or fewer of 9 below the median) = 46/512 > 5 %, P(1 or fewer) = 10/512
    assert bounds([9.0, 1, 8, 2, 7, 3, 6, 4, 5]) == (2.0, 8.0)
    # 15 values: P(3 or fewer) = 576/32768, P(4 or fewer) = 1941/32768
    assert sum(math.comb(15, i) for i in range(4)) == 576
    assert bounds([float(i) for i in range(15)]) == (3.0, 11.0)
    six = summary([2.0, 4.0, 2.0, 4.0, 2.0, 4.0], [1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert (six["lower"], six["upper"]) == (2.0, 2.0)  # within rounds, not across
