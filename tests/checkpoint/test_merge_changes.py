"""Updates that are more than s·BA, and several of one tensor, against their definitions in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_fx import merge
from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import Full, LowRank
from lora_fx.adapter.updates import Dense, Entry, Hadamard, Kronecker, ReplacedRows
from lora_fx.errors import LoraFxError
from tests.checkpoint.made import Array, checkpoint, factors, read

OUT, IN = 24, 36
DTYPES = {"float64": 1e-14, "float32": 4e-6, "bfloat16": 2.0**-8}
"""dtype → largest error, as a share of the largest weight."""


def low(rank: int = 4, seed: int = 0, alpha: float = 6.0, **extra: Any) -> LowRank:
    a, b = factors(np.random.default_rng(seed), OUT, IN, rank)
    return LowRank(a, b, alpha, **extra)


def delta(u: LowRank) -> Array:
    return u.alpha / u.rank * (u.b.astype(np.float64) @ u.a.astype(np.float64))


def merged(tmp_path: Path, base: Array, *entries: Entry, key: str = "m.weight") -> Array:
    file = checkpoint(tmp_path / "base.safetensors", {"m.weight": base})
    given: list[Any] = [Adapter({key: e}) for e in entries]
    merge(file, given, tmp_path / "out.safetensors")
    return read(tmp_path / "out.safetensors")["m.weight"].astype(np.float64)


def weight(dtype: str = "float32", shape: tuple[int, ...] = (OUT, IN)) -> Array:
    value = np.random.default_rng(9).standard_normal(shape)
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dense", "dora"])
def test_by_definition(kind: str, dtype: str, tmp_path: Path) -> None:
    r = np.random.default_rng(1)
    old = weight(dtype)
    entry: Entry = low()
    want = old.astype(np.float64)
    if kind == "lora":
        want = want + delta(low())
    elif kind == "loha":
        u, v = low(3), low(3, 1)
        entry = Hadamard(u.a, u.b, v.a, v.b, 2.0)
        product = (x.b.astype(np.float64) @ x.a.astype(np.float64) for x in (u, v))
        want = want + 2.0 / 3 * np.multiply(*product)
    elif kind == "lokr":
        w1, w2 = (r.standard_normal(s).astype(np.float32) for s in ((4, 6), (6, 6)))
        entry = Kronecker(w1, w2, 1 / 3)
        want = want + 1 / 3 * np.kron(w1.astype(np.float64), w2)
    elif kind == "dense":
        value = r.standard_normal((OUT, IN)).astype(np.float32)
        entry = Dense(value, 1 / 3)
        want = want + 1 / 3 * value.astype(np.float64)
    else:
        magnitude = r.uniform(1, 9, OUT).astype(np.float32)
        entry = low(magnitude=magnitude)
        want = want + delta(low())
        want *= magnitude[:, None].astype(np.float64) / np.linalg.norm(want, axis=1, keepdims=True)
    new = merged(tmp_path, old, entry)
    assert np.abs(new - want).max() <= DTYPES[dtype] * np.abs(want).max()
    assert np.abs(new - old.astype(np.float64)).max() > 0.01


def test_dora_of_a_wide_weight_whose_rows_nearly_cancel(tmp_path: Path) -> None:
    """‖W + ΔW‖ is a thousandth of ‖W‖: the proof has to allow for the factor, no more."""
    r = np.random.default_rng(2)
    a, b = factors(r, 8, 20_000, 2)
    old = (-(b @ a) * (1 + 1e-3 * r.standard_normal((8, 20_000)))).astype(np.float32)
    entry = LowRank(a, b, 2.0, magnitude=np.full(8, 5.0, np.float32))
    want = old + b.astype(np.float64) @ a
    want *= 5.0 / np.linalg.norm(want, axis=1, keepdims=True)
    assert np.abs(merged(tmp_path, old, entry) - want).max() < 1e-3 * np.abs(want).max()


def test_opposite_updates_that_are_much_larger_than_the_weight(tmp_path: Path) -> None:
    old = weight()
    new = merged(tmp_path, old, low(alpha=4e4), low(alpha=-4e4), low(seed=1, alpha=1.0))
    assert np.abs(new - old - delta(low(seed=1, alpha=1.0))).max() < 1e-2


def test_rows_replace_and_the_rest_is_updated(tmp_path: Path) -> None:
    old, rows = weight(), np.ones((2, IN), np.float32)
    new = merged(tmp_path, old, low(), ReplacedRows((3, 20), rows))
    want = old + delta(low())
    want[[3, 20]] = 1.0
    assert np.abs(new - want).max() < 1e-5


@pytest.mark.parametrize("last", [1, 2, 5])
def test_the_last_rows_are_summed_as_the_others(last: int, tmp_path: Path) -> None:
    """Few rows would go through another routine of BLAS, which sums in another order."""
    r = np.random.default_rng(3)
    rows, columns = 16 + last, 4096
    a, b = factors(r, rows, columns, 64)
    old = r.standard_normal((rows, columns)).astype(np.float32)
    file = checkpoint(tmp_path / "base.safetensors", {"m.weight": old})
    merge(file, Adapter({"m.weight": LowRank(a, b, 48.0)}), tmp_path / "out.safetensors")
    want = old + (b[:rows] @ a) * np.float32(0.75)
    assert np.array_equal(read(tmp_path / "out.safetensors")["m.weight"], want)


def test_a_bias_and_an_integer_tensor(tmp_path: Path) -> None:
    bias, steps = weight(shape=(OUT,)), np.arange(4)
    file = checkpoint(tmp_path / "base.safetensors", {"m.bias": bias, "m.steps": steps})
    entries: dict[str, Entry] = {
        "m.bias": Dense(np.ones(OUT, np.float32), 0.5),
        "m.steps": Full(steps * 2),
    }
    merge(file, Adapter(entries), tmp_path / "out.safetensors", dtype="float16")
    out = read(tmp_path / "out.safetensors")
    assert np.array_equal(out["m.bias"], (bias + np.float32(0.5)).astype(np.float16))
    assert out["m.steps"].dtype == np.int64 and np.array_equal(out["m.steps"], steps * 2)


REFUSED: dict[str, tuple[list[Entry], str]] = {
    "DoRA and another": ([low(magnitude=np.ones(OUT, np.float32)), low(seed=1)], "DoRA"),
    "a row twice": (
        [
            ReplacedRows((1,), np.ones((1, IN), np.float32)),
            ReplacedRows((1,), np.zeros((1, IN), np.float32)),
        ],
        "row 1 of 'm.weight' is replaced twice",
    ),
    "whole and updated": ([Full(weight()), low()], "replaces the whole tensor"),
    "whole and not finite": ([Full(np.full((OUT, IN), np.nan, np.float32))], "NaN"),
    "rows that are not there": ([ReplacedRows((OUT,), np.ones((1, IN), np.float32))], "up to 24"),
    "rows of another width": ([ReplacedRows((0,), np.ones((1, IN + 1), np.float32))], r"\[1, 37\]"),
    "no rows": ([ReplacedRows((), np.ones((0, IN + 1), np.float32))], "up to -1"),
    "a magnitude of another length": ([low(magnitude=np.ones(IN, np.float32))], "magnitude"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    entries, text = REFUSED[name]
    with pytest.raises(LoraFxError, match=text) as caught:
        merged(tmp_path, weight(), *entries)
    assert caught.value.hint and [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


def test_no_adapter_to_merge(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "base.safetensors", {"m.weight": weight()})
    for given in ([], ("adapter", 0.5), [("adapter", 1, 2)], [None]):
        with pytest.raises(LoraFxError, match=r"no adapter|is not an Adapter|no such file"):
            merge(file, given, tmp_path / "out")


@pytest.mark.parametrize("how", ["svd", "linear"])
def test_a_mix_drops_nothing(how: str, tmp_path: Path) -> None:
    u, v = low(3), low(3, 1)
    loha = Adapter({"m.weight": Hadamard(u.a, u.b, v.a, v.b, 2.0)})
    file = checkpoint(tmp_path / "base.safetensors", {"m.weight": weight()})
    with pytest.raises(LoraFxError, match="LoHa"):
        merge(file, [loha, Adapter({"m.weight": low()})], tmp_path / "out", how=how)
