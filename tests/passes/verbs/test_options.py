"""What a verb makes of its arguments before it does anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_fx
from lora_fx import Adapter, LoraFxError, LowRank, save_adapter
from lora_fx.passes.verbs.export import opened_adapters

ONE = Adapter({"fc.weight": LowRank(np.ones((2, 3), "f4"), np.ones((5, 2), "f4"), 2.0)})
OTHER = Adapter({"fc.weight": LowRank(np.ones((1, 3), "f4"), np.ones((5, 1), "f4"), 1.0)})


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(ONE, "runs/french")
    save_adapter(OTHER, "german.safetensors")
    save_adapter(OTHER, "old/french")


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("given", "mode", "wanted"),
    [
        (None, "merged", None),
        ("runs/french", "switch", {"french": 2}),
        (Path("runs/french"), "merged", 2),
        (["runs/french", "german.safetensors"], "batch", {"french": 2, "german": 1}),
        ({"a": "runs/french", "b": OTHER}, "switch", {"a": 2, "b": 1}),
        ([ONE, "german.safetensors"], "switch", [2, 1]),
        (ONE, "switch", 2),
    ],
)
def test_adapters_are_named_after_their_paths(given: Any, mode: str, wanted: object) -> None:
    found = opened_adapters(given, mode)
    if isinstance(found, Adapter):
        assert found.lowrank["fc.weight"].rank == wanted
    elif isinstance(found, dict):
        assert {n: a.lowrank["fc.weight"].rank for n, a in found.items()} == wanted
    elif found is None:
        assert wanted is None
    else:
        assert wanted == [a.lowrank["fc.weight"].rank for a in found if isinstance(a, Adapter)]


@pytest.mark.usefixtures("there")
def test_two_adapters_of_one_name_are_refused() -> None:
    with pytest.raises(LoraFxError, match="two adapters are called 'french'") as caught:
        opened_adapters(["runs/french", "old/french"], "switch")
    assert "{name: path" in str(caught.value.hint)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(number: float, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    plan = {"weight": {"rank": 2, "alpha": number}}
    for verb in (lora_fx.insert, lora_fx.attach):
        for given in ({"rank": 2, "alpha": number}, {"plan": plan}):
            with pytest.raises(LoraFxError, match=f"alpha {number} of weight is no finite number"):
                verb(net, (x,), **given)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(LoraFxError, match=f"tol is {number}; expected a finite number, 0 or more"):
        lora_fx.verify(tmp_path / "a.safetensors", tmp_path / "a.safetensors", tol=number)
