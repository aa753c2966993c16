"""Whatever entries an adapter holds, writing and reading give them back bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.origin import FileLayer, Origin
from lora_fx.adapter.updates import Dense, Entry, Hadamard, ReplacedRows
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter, save_adapter
from lora_fx.formats.peft import file as peft
from lora_fx.ir.layout import Layout, plain_layout
from tests.formats.merging import same_entries

MODULES = ["a", "h.0.fc", "h.1.fc", "emb", "mha", "moe.experts", "conv"]


def normal(draw: st.DrawFn, *shape: int) -> Array:
    return np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape, np.float32)


def low(draw: st.DrawFn, dora: bool, mutated: str) -> LowRank:
    """An update of any op, bound or not."""
    rank, out, in_ = (draw(st.integers(1, 4)) for _ in range(3))
    op = draw(st.sampled_from(["", "linear", "addmm", "embedding", "conv2d", "bilinear"]))
    layout = None
    width = in_ * 6 if op == "conv2d" else in_
    kernel = (3, 2) if op == "conv2d" else ()
    if draw(st.booleans()):
        turned = Layout((width, out), (), (1,), (0,), (width, out))
        straight = plain_layout((out, in_, 3, 2) if op == "conv2d" else (out, width))
        layout = straight if op == "conv2d" or draw(st.booleans()) else turned
    mutated = mutated if op in ("", "linear") else ""
    magnitude = normal(draw, out) if dora else None
    a, b, alpha = normal(draw, rank, width), normal(draw, out, rank), draw(st.floats(0.1, 99))
    return LowRank(
        a,
        b,
        alpha,
        layout,
        magnitude=magnitude,
        origin=Origin(op=op, kernel=kernel),
        mutated=mutated,
    )


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Entries as a reader or insert gives them."""
    dora, mutated = draw(st.sampled_from([(False, ""), (True, ""), (False, "pissa")]))
    entries: dict[str, Entry] = {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True)):
        kind = draw(st.sampled_from(["low", "low", "rows", "full"]))
        if kind == "low":
            update = low(draw, dora, mutated)
            entries[f"{module}.weight"] = update
            size, scale = len(update.b), draw(st.sampled_from([update.scale, 0.5]))
            what = draw(st.sampled_from(["", "dense", "full"]))
            if what == "dense":
                entries[f"{module}.bias"] = Dense(normal(draw, size), scale)
            elif what == "full":
                entries[f"{module}.bias"] = Full(normal(draw, size))
        elif kind == "rows":
            index = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
            entries[f"{module}.weight"] = ReplacedRows(index, normal(draw, len(index), 3))
        else:
            leaf = draw(st.sampled_from(["weight", "bias", "gain"]))
            entries[f"{module}.{leaf}"] = Full(normal(draw, 4))
    if draw(st.booleans()):
        entries["deep.value"] = Dense(normal(draw, 3, 5), draw(st.floats(0.1, 9)))
    return Adapter(entries)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(adapters(), st.booleans())
def test_any_adapter_survives(tmp_path: Path, adapter: Adapter, single: bool) -> None:
    where = tmp_path / ("x.safetensors" if single else "x")
    try:
        (peft.write_file if single else peft.write)(adapter, where)
    except LoraFxError as error:
        assert "one kind: PEFT has one flag" in str(error)
        return
    same_entries(peft.read(where), adapter)


def stacks(of: int, ranks: tuple[int, ...], *, tied: bool = False) -> dict[str, Entry]:
    """Entries as `peft_stack` reads them."""
    result: dict[str, Entry] = {}
    rng = np.random.default_rng(0)
    for depth, rank in enumerate(ranks):
        lead = "m.experts" + ".base_layer" * depth
        origin = Origin(op="experts", tied=tied, layer=FileLayer(lead, of))
        a = rng.standard_normal((3, rank, 5), np.float32)
        b = rng.standard_normal((3, 7, rank), np.float32)
        result[f"m.experts.p{depth}"] = LowRank(a, b, 3.0, origin=origin)
    return result


@pytest.mark.parametrize(
    ("entries", "seen"),
    [
        (stacks(1, (2,)), True),
        (stacks(2, (4, 5)), True),  # 15 rows are no multiple of 4
        (stacks(2, (4,)), False),  # its partner was taken out
        (stacks(1, (2,), tied=True), False),
    ],
)
def test_stacks_are_written_as_they_were_read(
    tmp_path: Path, entries: dict[str, Entry], seen: bool
) -> None:
    adapter = Adapter(entries)
    notes = peft.write(adapter, tmp_path)
    same_entries(peft.read(tmp_path), adapter)
    assert any("PEFT will not load" in n for n in notes) != seen


def test_what_is_no_lora_is_refused_by_name(tmp_path: Path) -> None:
    one = np.ones((2, 3), np.float32)
    loha = Hadamard(one, one.T, one, one.T, 1.0)
    with pytest.raises(LoraFxError, match=r"'x\.weight' is LoHa"):
        peft.write(Adapter({"x.weight": loha}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_trained_bias_beside_a_change_of_another(tmp_path: Path) -> None:
    """With lora_bias every layer has a bias of B, which is zero beside a trained one."""
    ones = np.ones((1, 1), np.float32)
    trained = Full(np.array([1.5], np.float32))
    changed = Dense(np.array([0.5], np.float32))
    layers: dict[str, Entry] = {
        key: LowRank(ones, ones, 1.0) for key in ("a.weight", "h.0.fc.weight")
    }
    save_adapter(Adapter({**layers, "a.bias": changed, "h.0.fc.bias": trained}), tmp_path / "x")
    read: Any = load_adapter(tmp_path / "x").entries
    assert np.array_equal(read["h.0.fc.bias"].value, trained.value)
    assert np.array_equal(read["a.bias"].value, changed.value)
