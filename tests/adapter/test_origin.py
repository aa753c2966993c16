"""What a file says of the tensor of an update stands beside the update's numbers."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx import Adapter, LowRank, Origin, load_adapter, save_adapter
from lora_fx.adapter import lowrank, origin
from lora_fx.adapter.origin import FileLayer

A, B = np.ones((2, 3), np.float32), np.ones((5, 2), np.float32)
FACTS: dict[str, Any] = {
    "op": "experts",
    "kernel": (3, 2),
    "tied": True,
    "twins": ("head.weight",),
    "layer": FileLayer("m.experts", 2, "m.experts", 1, {"up": (2, 3.0)}),
}


def test_an_update_has_none_of_its_facts_as_fields() -> None:
    names = {field.name for field in fields(LowRank)}
    assert {field.name for field in fields(Origin)} == FACTS.keys()
    assert not names & FACTS.keys()
    assert not inspect.signature(LowRank).parameters.keys() & FACTS.keys()


def test_updates_that_differ_in_their_origin_are_equal() -> None:
    names = ("alpha", "layout", "variant", "use", "magnitude", "frozen", "variant_tensors")
    plain = LowRank(A, B, 2.0)
    bare = replace(plain, a=np.float32(1), b=np.float32(1))
    assert bare == replace(bare, origin=Origin(**FACTS))
    assert [getattr(plain, n) for n in names] == [2.0, None, "lora", "", None, 0, {}]
    assert plain.origin == Origin() and Origin().candidates == {}


def test_an_empty_origin_is_not_shown() -> None:
    assert "origin" not in repr(LowRank(A, B, 2.0))
    assert "origin=Origin(op='conv2d')" in repr(LowRank(A, B, 2.0, origin=Origin(op="conv2d")))


def test_facts_are_taken_and_shown_by_their_older_names() -> None:
    with pytest.warns(
        FutureWarning, match=r"LowRank\(op=…, kernel=…, .*\) is deprecated: use origin=Origin\(op=…"
    ):
        older = LowRank(A, B, 2.0, **FACTS)
    assert older.origin == Origin(**FACTS)
    shown: Any = older
    for name, value in FACTS.items():
        with pytest.warns(
            FutureWarning, match=f"LowRank.{name} is deprecated: use origin.{name}"
        ) as seen:
            assert getattr(shown, name) == value
        assert seen[0].filename == __file__
    with pytest.warns(FutureWarning, match="origin.candidates"):
        assert shown.candidates == {"up": (2, 3.0)}
    changes: dict[str, Any] = {"op": "linear"}
    with pytest.warns(FutureWarning, match="op=…") as seen:
        changed = replace(older, **changes)
    assert seen[0].filename == __file__
    assert changed.origin == Origin(**{**FACTS, "op": "linear"})
    with pytest.raises(AttributeError, match="'LowRank' object has no attribute 'operation'"):
        _ = shown.operation
    wrong: dict[str, Any] = {"operation": "linear"}
    with pytest.raises(TypeError, match="operation"):
        LowRank(A, B, 2.0, **wrong)


def test_pickles_and_copies() -> None:
    low = LowRank(A, B, 2.0, origin=Origin(**FACTS))
    for again in (pickle.loads(pickle.dumps(low)), copy.deepcopy(low), copy.copy(low)):
        assert again.origin == low.origin
        np.testing.assert_array_equal(again.a, A)


def test_pickles_that_have_the_facts_as_fields() -> None:
    low = LowRank(A, B, 2.0)
    state = {name: value for name, value in vars(low).items() if name != "origin"}
    older = object.__new__(LowRank)
    older.__setstate__({**state, **FACTS})
    assert older.origin == Origin(**FACTS)
    assert vars(older).keys() == vars(low).keys()
    assert lowrank.FileLayer is origin.FileLayer  # such a pickle names it there


def test_facts_come_back_from_files(tmp_path: Path) -> None:
    facts = Origin("embedding", tied=True, twins=("head.weight",))
    adapter = Adapter({"table.weight": LowRank(A, B, 2.0, origin=facts)})
    save_adapter(adapter, tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter").lowrank["table.weight"].origin == facts
