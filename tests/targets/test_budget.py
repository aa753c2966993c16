"""Budgets, how they are spent, and plan files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.errors import LoraFxError
from lora_fx.targets.budget import Budget, allocate
from lora_fx.targets.rank_plan import Ranked, RankPlan, read_plan


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_is_kept_and_used(seed: int) -> None:
    """Never exceeded, 98 % used unless every target is full; nothing that still fits is left."""
    rng = np.random.default_rng(seed)
    keys = [f"t{i}" for i in range(int(rng.integers(4, 40)))]
    most = {k: int(rng.integers(1, 65)) for k in keys}
    costs = {k: int(rng.integers(40, 400)) for k in keys}
    gains: dict[str, Any] = {k: np.sort(rng.gamma(0.5, size=most[k]))[::-1] for k in keys}
    gains[keys[0]] *= 0.0
    limit = int(rng.integers(2_000, 200_000))  # from a few ranks up
    ranks = allocate(gains, costs, most, limit)
    used = sum(costs[k] * r for k, r in ranks.items())
    assert list(ranks) == keys and all(0 <= r <= most[k] for k, r in ranks.items())
    full = sum(costs[k] * most[k] for k in keys)
    assert used <= limit
    assert used >= 0.98 * min(limit, full)
    assert not [k for k in keys if ranks[k] < most[k] and costs[k] <= limit - used]


def test_greedy_takes_the_best_gain_per_cost() -> None:
    gains: dict[str, Any] = {"a": np.array([8.0, 1.0]), "b": np.array([9.0, 8.5]), "c": None}
    costs, most = {"a": 1, "b": 2, "c": 4}, {"a": 2, "b": 2, "c": 3}
    # per cost: a 8, 1; b 4.5, 4.25; c has no gain and gets what uniform gives it
    assert allocate(gains, costs, most, 7) == {"a": 1, "b": 1, "c": 1}
    assert allocate(gains, costs, most, 9) == {"a": 1, "b": 2, "c": 1}
    assert allocate({k: gains[k] for k in "ab"}, costs, most, 5) == {"a": 1, "b": 2}


def test_ranks_are_exchanged_where_the_budget_would_stay_empty() -> None:
    """Greedy takes 3 of a, and 2 of 8 elements are left; 1 of a and 1 of b leave none."""
    gains: dict[str, Any] = {"a": np.array([9.0, 8.0, 7.0]), "b": np.array([1.0])}
    assert allocate(gains, {"a": 2, "b": 6}, {"a": 3, "b": 1}, 8) == {"a": 1, "b": 1}
    assert allocate(gains, {"a": 2, "b": 7}, {"a": 3, "b": 1}, 8) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    "text",
    ["params", "params:0", "params:1.5", "rank:8", "flops:-2%", "uniform:2%", "params:nan", ":8"],
)
def test_no_budget(text: str) -> None:
    with pytest.raises(LoraFxError, match="no budget"):
        Budget.of(text)
    assert Budget.of("flops:0.5%").number == 0.5 and Budget.of("params:1e6").unit == "params"


def planned() -> RankPlan:
    rows = Ranked("a.weight", 3, 6.0, 10), Ranked("b.weight[0:4]", 0, 0.0, 20)
    return RankPlan(rows, "kfac", "params:40", "params", 40, "model.py:build", 12)


def test_a_plan_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned().save(path)
    assert read_plan(path) == planned().ranks == {"a.weight": {"rank": 3, "alpha": 6.0}}
    data = json.loads(path.read_text())
    assert data["used"] == 30 and data["targets"]["b.weight[0:4]"] == {"rank": 0, "alpha": 0}
    assert data == planned().to_json()
    with pytest.raises(LoraFxError, match="exists"):
        planned().save(path)
    path.write_text('{"targets": {"a": 3, "b": {"rank": 2, "alpha": 5.5}}}')
    assert read_plan(path) == {"a": {"rank": 3}, "b": {"rank": 2, "alpha": 5.5}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "a JSON list"),
        ('{"targets": []}', "is not a plan"),
        ('{"targets": {"a": 1}, "metod": "kfac"}', "unknown field 'metod'"),
        ('{"targets": {"a": 1}, "limit": "3"}', "limit is '3', expected int"),
        ('{"targets": {"a": 1}, "version": 2}', "format 2; this lora-fx reads formats up to 1"),
        ('{"targets": {"a": 1}, "format": "x"}', "a file of 'x'; expected 'lora-fx plan'"),
        ('{"targets": {"a": 1, "a": 2}}', "'a' appears twice"),
        ('{"targets": {"a": {"alpha": 2}}}', "'a' is {'alpha': 2}"),
        ('{"targets": {"a": {"rank": 2, "alfa": 2}}}', "expected"),
        ('{"targets": {"a": {"rank": 2.5}}}', "rank of 'a' is 2.5"),
        ('{"targets": {"a": -1}}', "rank of 'a' is -1"),
        ('{"targets": {"a": true}}', "'a'"),
        ('{"targets": {"a": {"rank": 2, "alpha": "4"}}}', "alpha of 'a' is '4'"),
        ('{"targets": {"a": {"rank": 2, "alpha": Infinity}}}', "Infinity is not JSON"),
        ('{"targets": {"a": 0}}', "no target has a rank above 0"),
    ],
)
def test_a_wrong_plan_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(LoraFxError) as e:
        read_plan(path)
    assert said in e.value.message and str(path) in e.value.message
    assert "\n" not in e.value.message
