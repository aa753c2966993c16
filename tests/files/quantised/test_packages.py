"""Every format to the bit, against what its own package made of the same arrays."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from lora_fx.files.quantised import onnx
from lora_fx.fx.codes import arrays_of
from tests.files.quantised import operators
from tests.files.quantised.packages import PACKAGES, rows_of
from tests.files.quantised.rows import READERS, WEIGHTS, Row, golden, mark, parts_of, read

GOLDEN = golden()


def equal(row: Row) -> None:
    """The whole weight, and some of its rows."""
    q = read(row)
    whole = q.dequantise(row.want.dtype)
    assert mark(whole) == row.want, row.name
    some = q.dequantise(row.want.dtype, slice(1, 3))
    assert mark(some) == mark(whole[1:3]), row.name
    if row.reader in WEIGHTS:
        weight = WEIGHTS[row.reader](parts_of("m", row.arrays), row.options)
        every = q.dequantise().reshape(-1, q.shape[-1])
        assert weight.shape == q.shape
        for low, high in ((0, 1), (1, 3), (2, len(every)), (len(every) - 1, len(every))):
            assert np.array_equal(weight.rows(low, high), every[low:high]), (row.name, low)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row.name)
def test_what_the_packages_made_is_read_to_the_bit(row: Row) -> None:
    equal(row)


def test_every_format_has_golden_rows() -> None:
    count = Counter(row.reader for row in GOLDEN)
    assert set(count) == set(READERS)
    assert len({row.want.hash for row in GOLDEN}) == len(GOLDEN)
    dtypes = {row.want.dtype for row in GOLDEN}
    assert dtypes == {"float32", "bfloat16", "float16"}


@pytest.mark.filterwarnings("ignore")  # of the packages, of their own code
@pytest.mark.parametrize("package", PACKAGES)
def test_what_an_installed_package_makes_is_read_to_the_bit(package: str) -> None:
    """Larger weights, of other seeds than the golden ones."""
    pytest.importorskip(package)
    for rows, scale in ((10, 2), (17, 3)):
        count = 0
        for row in rows_of(package, rows, scale):
            equal(row)
            count += 1
        assert count >= 3


CODES = ("weight", "qweight", "weight_packed", "qdata", "data", "x", "b")


def test_one_bit_is_seen() -> None:
    for row in GOLDEN[::7]:
        name = next(n for n in CODES if n in row.arrays)
        raw = bytearray(row.arrays[name].tobytes())
        raw[3] ^= 1  # the first bits of an int32 are lost in float32
        array = np.frombuffer(bytes(raw), row.arrays[name].dtype).reshape(row.arrays[name].shape)
        q = read(row._replace(arrays={**row.arrays, name: array}))
        assert mark(q.dequantise(row.want.dtype)) != row.want, row.name


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row.name)
def test_as_an_operator_it_is_the_same_weight(row: Row) -> None:
    """MatMulNBits and MatMulBnb4 hold what they take to the bit, and say no to the rest."""
    q = read(row)
    if len(q.shape) != 2:
        return
    taken = False
    if q.levels is not None:
        if q.block[0] < 16 or not any(np.array_equal(q.levels, t) for t in operators.QUANT_TYPES):
            return
        kind, block, four = arrays_of("w", q)
        told = int(kind == "nf4")
        again = operators.matmul_bnb4("w", four["codes"], four["scale"], q.shape, told, block)
        taken = True
    elif q.codes.dtype.kind in "iu" and q.codes.dtype.itemsize == 1 and q.block[1] >= 16:
        q = dataclasses.replace(q, order=None)  # which the operator has not, and its caller does
        n = onnx.as_matmul_nbits("w", q)
        again = operators.matmul_nbits("w", n.b, n.scales, n.zero_points, q.shape, n.bits)
        assert again.block[1] == n.block_size
        q = dataclasses.replace(q, scale=q.scale.astype(np.float32) * np.float32(q.unit), unit=1.0)
        taken = True
    if taken:
        assert mark(again.dequantise()) == mark(q.dequantise())
