"""The fold of a block: its numbers, the memory it passes over, and the sample of its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_fx.adapter.lowrank import LowRank
from lora_fx.checkpoint.fold import TensorFold
from lora_fx.checkpoint.fold_stats import SAMPLED, Stats
from lora_fx.checkpoint.merge import merge
from lora_fx.checkpoint.merge_report import lines
from lora_fx.checkpoint.rectangles import Matrix, Rectangle
from lora_fx.checkpoint.stored_rows import Space
from lora_fx.dtypes import all_finite, numpy_dtype
from lora_fx.errors import LoraFxError
from tests.checkpoint.made import Array, adapter, checkpoint, read

ROWS, COLUMNS, RANK = 1024, 1536, 8
FLOATS = ("bfloat16", "float16", "float32", "float64")
Q = "layers.0.q_proj"


class Counted(np.ndarray[Any, Any]):
    """An array that counts the bytes which numpy's functions and ufuncs read and write of it."""

    total = 0

    @staticmethod
    def _plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(Counted._plain, value))
        if isinstance(value, Counted):
            Counted.total += value.nbytes
            return value.view(np.ndarray)
        return value

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = {name: Counted._plain(value) for name, value in options.items()}
        result = getattr(ufunc, method)(*Counted._plain(inputs), **plain)
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: Any) -> Any:
        plain = {name: Counted._plain(value) for name, value in options.items()}
        return function(*Counted._plain(tuple(inputs)), **plain)

    def astype(self, *args: Any, **options: Any) -> Any:
        wide = Counted._plain(self).astype(*args, **options)
        Counted.total += wide.nbytes
        return wide


class CountedSpace(Space):
    """A thread's arrays, counted."""

    def array(self, *args: Any) -> Array:
        return super().array(*args).view(Counted)


def fold_of(rng: np.random.Generator, alpha: float = 1.5 * RANK) -> tuple[TensorFold, LowRank]:
    """The fold of a [ROWS, COLUMNS] weight, and its update."""
    a = rng.standard_normal((RANK, COLUMNS), np.float32) / np.float32(30)
    b = rng.standard_normal((ROWS, RANK), np.float32) * np.float32(0.02)
    low = LowRank(a, b, alpha)
    return TensorFold("w", Matrix(ROWS, COLUMNS, (Rectangle(low, 0, ROWS, 0, COLUMNS),))), low


def weight_of(rng: np.random.Generator, dtype: str) -> Array:
    """A weight in its stored dtype."""
    weight = rng.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)
    return weight.astype(numpy_dtype(dtype))


@pytest.mark.parametrize(
    ("dtype", "most"), [("bfloat16", 36.0), ("float16", 36.0), ("float32", 45.0)]
)
def test_the_bytes_that_a_fold_passes_over(dtype: str, most: float) -> None:
    """An element's product 4, scale 8, sum and rounding 8 (fp32: 12), maxima 4 (8), ‖Δ‖² 8, sample.

    It was 72 (82) when each step was a pass of its own, and all rows were measured.
    """
    rng = np.random.default_rng(0)
    fold, _ = fold_of(rng)
    count = fold.matrix.rows_per_block
    stored = weight_of(rng, dtype)[:count].view(Counted)
    space = CountedSpace()
    fold.block(stored, 0, dtype, space)
    Counted.total = 0
    fold.block(stored, 0, dtype, space)
    assert Counted.total / stored.size <= most


@pytest.mark.parametrize("result", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_a_fold_is_the_sum_rounded_once(stored: str, result: str) -> None:
    rng = np.random.default_rng(1)
    fold, low = fold_of(rng)
    rows = slice(256, 512)
    weight = weight_of(rng, stored)[rows]
    wide = np.dtype(np.float64 if "float64" in (stored, result) else np.float32)
    delta = low.block(0, rows, slice(None), np.empty(weight.shape, wide))
    expected = (weight.astype(wide) + delta).astype(numpy_dtype(result))
    buffer = np.getbufsize()
    folded, _ = fold.block(weight, 256, result, Space())
    assert np.array_equal(folded.view(np.uint8), expected.view(np.uint8))
    assert np.getbufsize() == buffer


def stats_of(stored: Array, result: Array, delta: Array) -> dict[str, float]:
    """The numbers of a report, over all elements in fp64."""
    old, new, exact = (x.astype(np.float64) for x in (stored, result, delta))
    return {
        "ratio": float(np.linalg.norm(exact) / np.linalg.norm(old)),
        "lost": float(np.mean(old == new)),
        "gain": float(np.sum((new - old) * exact) / np.sum(exact**2)),
    }


def blocks(fold: TensorFold, stored: Array) -> tuple[Array, Stats]:
    """All rows of a tensor folded, and their statistics."""
    result = np.empty_like(stored)
    total = Stats()
    for low in range(0, ROWS, fold.matrix.rows_per_block):
        high = min(ROWS, low + fold.matrix.rows_per_block)
        rows, stats = fold.block(stored[low:high], low, stored.dtype.name, Space())
        result[low:high] = rows
        total.add(stats)
    return result, total


def test_a_large_tensor_is_measured_on_one_row_in_13() -> None:
    rng = np.random.default_rng(2)
    fold, low = fold_of(rng, RANK / 50)  # so small an update that bf16 loses a part of it
    stored = weight_of(rng, "bfloat16")
    result, stats = blocks(fold, stored)
    expected = stats_of(stored, result, low.scale * (low.b @ low.a))
    assert stats.elements == stored.size
    assert stats.measured == COLUMNS * len(range(0, ROWS, SAMPLED))
    assert 0.2 < expected["lost"] < 0.9
    assert stats.ratio == pytest.approx(expected["ratio"], rel=0.01)
    assert stats.lost == pytest.approx(expected["lost"], abs=0.02)
    assert stats.gain == pytest.approx(expected["gain"], rel=0.02)
    assert stats.delta == pytest.approx(np.sum((low.scale * (low.b @ low.a)) ** 2), rel=1e-4)


@pytest.mark.parametrize("row", [0, 1, 700])
def test_an_update_of_one_row_is_measured_in_full(row: int) -> None:
    """Whether the row is one of the sample (row 0) or not."""
    rng = np.random.default_rng(3)
    fold, low = fold_of(rng)
    low.b[np.arange(ROWS) != row] *= np.float32(1e-4)
    stored = weight_of(rng, "bfloat16")
    result, stats = blocks(fold, stored)
    expected = stats_of(stored, result, low.scale * (low.b @ low.a))
    assert stats.lost == pytest.approx(expected["lost"], rel=0.02)
    assert stats.gain == pytest.approx(expected["gain"], rel=1e-3)


def test_a_single_changed_row_is_an_effect(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    _, low = fold_of(rng)
    low.b[np.arange(ROWS) != 5] = 0
    checkpoint(tmp_path / "base", {f"{Q}.weight": weight_of(rng, "bfloat16")})
    adapter(tmp_path / "adapter", {Q: (low.a, low.b)})
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    old, new = (read(tmp_path / name)[f"{Q}.weight"] for name in ("base", "out"))
    changed = np.flatnonzero((old.view(np.uint16) != new.view(np.uint16)).any(axis=1))
    (row,) = report.details["tensors"]
    assert list(changed) == [5] and row["lost"] == pytest.approx(np.mean(old == new))


def test_the_report_says_that_it_is_estimated(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    _, low = fold_of(rng)
    weights = {f"{Q}.weight": weight_of(rng, "bfloat16"), "k_proj.weight": np.ones((8, 6), "f4")}
    checkpoint(tmp_path / "base", weights)
    small = np.ones((RANK, 6), np.float32), np.ones((8, RANK), np.float32)
    adapter(tmp_path / "adapter", {Q: (low.a, low.b), "k_proj": small})
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    rows = {row["key"]: row["measured"] for row in report.details["tensors"]}
    assert rows["k_proj.weight"] == 1
    assert rows[f"{Q}.weight"] == pytest.approx(1 / SAMPLED, rel=0.05)
    assert "gain of 1 tensor are estimated from one row in 13" in lines(report)


def set_to(value: float) -> Callable[[Array], None]:
    """An edit of a weight: one element, in a row that no sample holds."""

    def edit(weight: Array) -> None:
        weight[997, 3] = value

    return edit


@pytest.mark.parametrize(
    ("dtype", "edit", "what"),
    [
        ("bfloat16", set_to(np.nan), "the base has nan at row 997, column 3"),
        ("bfloat16", set_to(-np.inf), "the base has -inf at row 997, column 3"),
        ("float32", set_to(np.inf), "the base has inf at row 997, column 3"),
        ("float16", set_to(65504.0), r"float16 cannot hold 6\d+.* at row 997, column 3"),
        ("float64", set_to(-np.nan), "the base has nan at row 997, column 3"),
    ],
)
def test_what_is_no_number_is_found_in_every_row(
    dtype: str, edit: Callable[[Array], None], what: str
) -> None:
    rng = np.random.default_rng(6)
    fold, low = fold_of(rng)
    low.b[997] = 100  # beyond float16 with 65504
    low.a[:, 3] = 1
    stored = weight_of(rng, dtype)
    edit(stored)
    with pytest.raises(LoraFxError, match=what):
        blocks(fold, stored)


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_finite(dtype: str) -> None:
    kind = numpy_dtype(dtype)
    largest = float(ml_dtypes.finfo(kind).max)
    for values in ([], [0.0, -0.0], [largest], [-largest], [largest, -largest, 1.0]):
        array = np.array(values).astype(kind)
        assert all_finite(array)
        for bad in (np.inf, -np.inf, np.nan, -np.nan):
            assert not all_finite(np.append(array, np.array(bad).astype(kind)))
