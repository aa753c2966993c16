"""Merges into int8 weights, against W + s·BA quantised anew in fp64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import lora_fx
from lora_fx.checkpoint import rectangles
from lora_fx.errors import LoraFxError, NoEffectError
from tests.checkpoint.int8_bases import (
    BNB,
    CT,
    DOWN,
    SCALES,
    SCHEMES,
    SIDES,
    UNIT,
    Q,
    base,
    moved,
    nearest,
    quantised,
    report,
    weights,
    wide,
)
from tests.checkpoint.made import Array, adapter, checkpoint, factors, read

RNG = np.random.default_rng(3)
STILL = 11
"""A row of q_proj that the adapters leave as it is."""


def update(path: Path, size: float = 0.03, *, grow: bool = True, **more: Any) -> dict[str, Array]:
    """An adapter of both modules, and its s·BA in fp64."""
    pairs, deltas = {}, {}
    for module, (out, in_) in SIDES.items():
        a, b = factors(np.random.default_rng(5), out, in_, 3, size)
        if module == Q:
            b[STILL] = 0
            b[13] *= 40 if grow else 1  # a row that becomes much larger
        pairs[module] = a, b
        deltas[module] = 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
    adapter(path, pairs, **more)
    return deltas


@pytest.mark.parametrize("dtype", [None, np.float16, np.float32], ids=str)
@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales(scheme: str, shards: int, dtype: Any, tmp_path: Path) -> None:
    old = base(tmp_path / "base", scheme, shards=shards, dtype=dtype)
    homes = {n: f for f in (tmp_path / "base").glob("*.safetensors") for n in read(f)}
    scale = SCALES[scheme]
    assert shards == 1 or homes[f"{Q}.weight"] != homes[f"{Q}.{scale}"], "in two shards"
    deltas = update(tmp_path / "adapter")
    said = lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    new = read(tmp_path / "out")
    changed = {f"{m}.{n}" for m in SIDES for n in ("weight", scale)}
    assert {r["key"] for r in said.details["tensors"]} == changed
    assert {n: (v.dtype, v.shape) for n, v in new.items()} == {
        n: (v.dtype, v.shape) for n, v in old.items()
    }
    assert all(new[n].tobytes() == old[n].tobytes() for n in old.keys() - changed)
    for module in SIDES:
        want = wide(old, module, scheme) + deltas[module]
        codes, scales = nearest(want, scheme, old[f"{module}.{scale}"])
        if module == Q:
            codes[STILL], scales[STILL] = old[f"{Q}.weight"][STILL], old[f"{Q}.{scale}"][STILL]
        have = new[f"{module}.{scale}"]
        # fp32 sums may round a largest value to a neighbour of the exact one's.
        close = np.abs(have.astype(np.float64) / scales.astype(np.float64) - 1)
        assert close.max() <= ml_dtypes.finfo(scales.dtype).eps
        # Exactly the nearest codes of the scales that are there, but where fp32 may meet a tie.
        steps = have.astype(np.float64).reshape(-1, 1) / UNIT[scheme]
        exact = want / steps
        tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-4
        rounded = np.clip(np.rint(exact), -127, 127)
        if module == Q:
            rounded[STILL] = codes[STILL]
        assert tie.mean() < 0.01
        assert (new[f"{module}.weight"] == rounded)[~tie].all()
        assert np.abs(new[f"{module}.weight"] - rounded).max() <= 1
        assert not np.array_equal(new[f"{module}.weight"], old[f"{module}.weight"])
    assert np.abs(new[f"{Q}.weight"][13]).max() == 127
    assert (new[f"{Q}.{scale}"][13] > 3 * old[f"{Q}.{scale}"][13]).all(), "the row has grown"
    assert lora_fx.verify(
        tmp_path / "out", tmp_path / "base", adapter=tmp_path / "adapter", rows=None
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_report_says(scheme: str, tmp_path: Path) -> None:
    old = base(tmp_path / "base", scheme)
    deltas = update(tmp_path / "adapter", grow=False)
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    new = read(tmp_path / "out")
    for module, delta in deltas.items():
        row = report(tmp_path / "out", f"{module}.weight")
        w, there = wide(old, module, scheme), wide(new, module, scheme)
        steps = old[f"{module}.{SCALES[scheme]}"].astype(np.float64) / UNIT[scheme]
        own = np.sqrt((steps**2).sum() * w.shape[1] / 12)
        norm = float(np.linalg.norm(delta))
        assert row["gain"] == pytest.approx(((there - w) * delta).sum() / norm**2, rel=1e-4)
        assert row["ratio"] == pytest.approx(norm / np.linalg.norm(w), rel=1e-4)
        assert row["int8"]["error"] == pytest.approx(np.linalg.norm(w + delta - there) / norm, 1e-4)
        assert row["int8"]["own"] == pytest.approx(own / np.linalg.norm(w), rel=1e-5)
        assert row["int8"]["scheme"] == f"{scheme} int8"
        assert row["int8"]["scales"] == f"{module}.{SCALES[scheme]}"
        assert 0.01 < row["int8"]["error"] < 1 and row["gain"] > 0.95
        # The estimate of the base's own error is near what quantising it has cost.
        truth = weights()[module]
        assert own == pytest.approx(np.linalg.norm(truth - w), rel=0.2)
    scales = report(tmp_path / "out", f"{Q}.{SCALES[scheme]}")
    assert (scales["int8"], scales["gain"]) == (None, None) and Q in scales["updates"][0]


def test_what_people_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_fx.cli import main

    base(tmp_path / "base", BNB)
    update(tmp_path / "weak", 1e-4, grow=False)
    args = ["merge", str(tmp_path / "base"), str(tmp_path / "weak"), "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*args, "--dry-run"])
    assert not stop.value.code and f"new scales of {Q}.weight" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*args, "--dtype", "float32"])
    said = capsys.readouterr()
    assert not stop.value.code
    assert "int8 error/‖Δ‖" in said.out and "own/‖W‖" in said.out
    assert "2 of 2 tensors kept less than 95% of their update when quantised to int8" in said.err
    assert "--dtype float32: 2 int8 tensors stay int8" in said.err
    assert "float16 or float32 keeps more" not in said.err and "unquantised original" in said.err


def test_blocks_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base(tmp_path / "base", CT, shards=3)
    update(tmp_path / "adapter")
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr(rectangles, "BLOCK", 1)  # 16 rows a block
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "parts", threads=3)
    for name, value in read(tmp_path / "whole").items():
        assert value.tobytes() == read(tmp_path / "parts")[name].tobytes(), name
    for key in (f"{Q}.weight", f"{DOWN}.weight"):
        one, other = report(tmp_path / "whole", key), report(tmp_path / "parts", key)
        assert one["int8"]["error"] == pytest.approx(other["int8"]["error"], rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_that_becomes_zero_keeps_its_scale(scheme: str, tmp_path: Path) -> None:
    w = weights()[Q]
    rows = quantised(w, scheme)
    rows["weight"][4] = 0
    rows["weight"][4, 6] = 64
    rows[SCALES[scheme]][4] = 127.0 / 64 if scheme == BNB else 1 / 64
    old = base(tmp_path / "base", scheme, **rows)
    a, b = np.zeros((1, 24), np.float32), np.zeros((40, 1), np.float32)
    a[0, 6], b[4], b[9] = 1.0, -0.5, 0.125
    adapter(tmp_path / "adapter", {Q: (a, b)})
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    new = read(tmp_path / "out")
    assert wide(old, Q, scheme)[4, 6] == 1.0 and not new[f"{Q}.weight"][4].any()
    for row in (3, 4, 5):
        name = f"{Q}.{SCALES[scheme]}"
        assert new[name][row].tobytes() == old[name][row].tobytes()
    assert lora_fx.verify(
        tmp_path / "out", tmp_path / "base", adapter=tmp_path / "adapter", rows=None
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("module", "name", "at", "by"),
    [
        (Q, "weight", (20, 3), 1),
        (Q, "weight", (STILL, 3), -1),
        (DOWN, "weight", (3, 0), 1),
        (Q, "scale", (20,), 0.05),
        (Q, "scale", (13,), -0.05),
        (DOWN, "scale", (7,), np.nan),
        (DOWN, "scale", (0,), np.inf),
    ],
)
def test_verify_finds_what_is_wrong(
    module: str, name: str, at: tuple[int, ...], by: float, scheme: str, tmp_path: Path
) -> None:
    base(tmp_path / "base", scheme)
    update(tmp_path / "adapter")
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    if name == "scale":
        name, at = SCALES[scheme], at if scheme == BNB else (*at, 0)
    moved(tmp_path / "out", module, name, at, by)
    found = lora_fx.verify(
        tmp_path / "out", tmp_path / "base", adapter=tmp_path / "adapter", rows=None
    )
    assert [d["key"] for d in found.details["differences"]] == [f"{module}.weight"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_of_another_scale_are_not_the_merge(scheme: str, tmp_path: Path) -> None:
    """Rounded well, but to a scale that is not that of the row's largest value."""
    old = base(tmp_path / "base", scheme)
    want = wide(old, Q, scheme) + update(tmp_path / "adapter")[Q]
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    new, name = read(tmp_path / "out"), f"{Q}.{SCALES[scheme]}"
    new[name][20] = new[name][20] * 1.03
    step = float(new[name][20].astype(np.float64).reshape(())) / UNIT[scheme]
    new[f"{Q}.weight"][20] = np.rint(want[20] / step)
    checkpoint(tmp_path / "other", new)
    found = lora_fx.verify(
        tmp_path / "other", tmp_path / "base", adapter=tmp_path / "adapter", rows=None
    )
    assert [d["key"] for d in found.details["differences"]] == [f"{Q}.weight"]


def test_scales_of_another_dtype_are_told(tmp_path: Path) -> None:
    base(tmp_path / "base", BNB)
    update(tmp_path / "adapter")
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    new = read(tmp_path / "out")
    checkpoint(tmp_path / "other", new | {f"{Q}.SCB": new[f"{Q}.SCB"].astype(np.float16)})
    found = lora_fx.verify(tmp_path / "other", tmp_path / "base", adapter=tmp_path / "adapter")
    (said,) = found.details["differences"]
    assert said["key"] == f"{Q}.SCB" and "is float16 [40]; expected float32 [40]" in said["what"]


def test_verify_of_an_output_that_is_the_base(tmp_path: Path) -> None:
    base(tmp_path / "base", BNB)
    update(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    found = lora_fx.verify(tmp_path / "out", tmp_path / "base", adapter=tmp_path / "adapter")
    assert {d["key"] for d in found.details["differences"]} == {f"{m}.weight" for m in SIDES}


def test_a_second_merge_and_the_base_are_recorded(tmp_path: Path) -> None:
    base(tmp_path / "base", BNB)
    update(tmp_path / "adapter")
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(LoraFxError, match="already merged into it"):
        lora_fx.merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "twice")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    moved(tmp_path / "other", Q, "SCB", (0,), 1.0)
    found = lora_fx.verify(
        tmp_path / "out", tmp_path / "other", adapter=tmp_path / "adapter", rows=None
    )
    assert not found and any("records another base than" in w for w in found.warnings)


def test_no_effect(tmp_path: Path) -> None:
    base(tmp_path / "base", BNB)
    update(tmp_path / "adapter")
    with pytest.raises(NoEffectError):
        lora_fx.merge(tmp_path / "base", [(tmp_path / "adapter", 0.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dora_is_that_of_the_dequantised_weight(tmp_path: Path) -> None:
    old = base(tmp_path / "base", BNB, weight=RNG.integers(-127, 128, (40, 24)).astype(np.int8),
               SCB=RNG.uniform(0.5, 2, 40).astype(np.float32))  # fmt: skip
    a, b = factors(RNG, 40, 24, 3)
    magnitude = RNG.uniform(1, 3, 40).astype(np.float32)
    adapter(
        tmp_path / "adapter",
        {Q: (a, b)},
        tensors={f"base_model.model.{Q}.lora_magnitude_vector": magnitude},
        use_dora=True,
    )
    lora_fx.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    v = wide(old, Q, BNB) + 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    want = v * (magnitude / np.linalg.norm(v, axis=1))[:, None]
    step = np.abs(want).max(axis=1, keepdims=True) / 127
    assert (np.abs(wide(read(tmp_path / "out"), Q, BNB) - want) <= step * 0.5001).all()
    assert lora_fx.verify(
        tmp_path / "out", tmp_path / "base", adapter=tmp_path / "adapter", rows=None
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_of_two_merges_needs_the_file_between(scheme: str, tmp_path: Path) -> None:
    """The second merge starts from codes of the first: W + Δ₁ + Δ₂ is not what it quantised."""
    base(tmp_path / "base", scheme)
    update(tmp_path / "one", grow=False)
    update(tmp_path / "two", 0.05, grow=False)
    lora_fx.merge(tmp_path / "base", tmp_path / "one", tmp_path / "a")
    lora_fx.merge(tmp_path / "a", tmp_path / "two", tmp_path / "b")
    assert lora_fx.verify(tmp_path / "b", tmp_path / "a", adapter=tmp_path / "two")
    with pytest.raises(LoraFxError, match="quantised to int8 again by one merge") as caught:
        lora_fx.verify(
            tmp_path / "b", tmp_path / "base", adapter=[tmp_path / d for d in ("one", "two")]
        )
    assert "against what it started from" in caught.value.hint
