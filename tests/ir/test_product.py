"""Products in pieces: the same bits where they are used, the same numbers wherever they are not."""

from __future__ import annotations

import numpy as np
import pytest

from lora_fx.ir import factor_product as module
from lora_fx.ir.factor_product import product

CASES = [
    (rows, rank, columns)
    for rows in (16, 17, 31, 32, 250)
    for rank in (1, 3, 16, 33, 128)
    for columns in (16, 2048, 4112, 5632, 5637)
]


def _factors(rows: int, rank: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([rows, rank, columns])
    b = rng.standard_normal((rows, rank)).astype(np.float32)
    return b, rng.standard_normal((rank, columns)).astype(np.float32)


@pytest.mark.parametrize(("rows", "rank", "columns"), CASES)
def test_bits_are_those_of_the_whole_product(rows: int, rank: int, columns: int) -> None:
    b, a = _factors(rows, rank, columns)
    out = np.full((rows, columns), np.nan, np.float32)
    assert product(b, a, out) is out
    np.testing.assert_array_equal(out, b @ a)
    np.testing.assert_array_equal(product(b, a), out)


@pytest.mark.parametrize(("rows", "rank", "columns"), CASES)
def test_pieces_make_up_the_product(
    rows: int, rank: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever BLAS there is: within (r + 1)·u·|B||A| of the product in fp64."""
    monkeypatch.setattr(module, "_small_is_fast", lambda: True)
    monkeypatch.setattr(module, "SMALL", module.ROWS * rank * module._COLUMNS)
    b, a = _factors(rows, rank, columns)
    out = product(b, a, np.full((rows, columns), np.nan, np.float32))
    wide, other = b.astype(np.float64), a.astype(np.float64)
    bound = (rank + 1) * 2.0**-24 * (np.abs(wide) @ np.abs(other))
    assert np.all(np.abs(out - wide @ other) <= bound)


def test_other_dtypes_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_small_is_fast", lambda: True)
    b, a = (x.astype(np.float64) for x in _factors(64, 16, 2048))
    assert product(b, a).dtype == np.float64
    np.testing.assert_array_equal(product(b, a), b @ a)
