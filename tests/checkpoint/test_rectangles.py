"""Regions of stored tensors as rectangles of rows, and changes in an order that is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_fx.adapter.lowrank import LowRank
from lora_fx.checkpoint.rectangles import Matrix, Rectangle, joined, region, whole
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.ir.layout import Layout, plain_layout

REGIONS = [
    ((6, 4), ((1, 3), (0, 4))),
    ((6, 4), ((1, 3), (2, 4))),
    ((6, 4), ((0, 6), (1, 2))),
    ((3, 4, 5), ((1, 2), (1, 3), (0, 5))),
    ((6, 4, 3, 3), ((2, 5), (0, 4), (0, 3), (0, 3))),
]


def update(layout: Layout) -> LowRank:
    """A seeded update of rank 2."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((*layout.batch_shape, 2, layout.in_size)).astype(np.float32)
    b = rng.standard_normal((*layout.batch_shape, layout.out_size, 2)).astype(np.float32)
    return LowRank(a, b, 2.0, layout)


def deltas(matrix: Matrix, shape: tuple[int, ...]) -> Array:
    """ΔW of a whole tensor by its rectangles."""
    result = np.zeros((matrix.rows, matrix.columns), np.float32)
    for part in matrix.rectangles:
        result[part.top : part.bottom, part.left : part.right] += part.delta(part.top, part.bottom)
    return result.reshape(shape)


@pytest.mark.parametrize(("shape", "bounds"), REGIONS)
def test_a_region_changes_alone(
    shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]
) -> None:
    inner = tuple(high - low for low, high in bounds)
    if len(shape) == 3:
        layout = Layout(inner, (0,), (1,), (2,), inner)
    else:
        layout = plain_layout(inner)
    low = update(layout)
    expected = np.zeros(shape, np.float32)
    place = tuple(slice(*bound) for bound in bounds)
    expected[place] = deltas(whole(inner, low), inner)
    np.testing.assert_array_equal(deltas(region(shape, bounds, low), shape), expected)


def test_a_region_with_gaps_is_refused() -> None:
    low = update(Layout((2, 2, 2), (0,), (1,), (2,), (2, 2, 2)))
    with pytest.raises(LoraFxError, match="is not a rectangle of rows and columns"):
        region((4, 4, 4), ((0, 2), (1, 3), (1, 3)), low)


def test_axes_in_another_order() -> None:
    """[in, out, in], as an einsum has them: ΔW is computed whole."""
    shape = (3, 4, 5)
    low = update(Layout(shape, (), (1,), (0, 2), shape))
    product = (low.b @ low.a).reshape(4, 3, 5)
    expected = np.moveaxis(product, 0, 1) * np.float32(low.scale)
    np.testing.assert_allclose(deltas(whole(shape, low), shape), expected, rtol=1e-6)


def test_changes_of_other_axes_do_not_join() -> None:
    low = update(plain_layout((6, 4)))
    flat = Matrix(math.prod((6, 4)), 1, (Rectangle(low, 0, 6, 0, 1),))
    with pytest.raises(LoraFxError, match="split its axes into rows and columns differently"):
        joined("w", [whole((6, 4), low), flat])
    assert len(joined("w", [whole((6, 4), low), whole((6, 4), low)]).rectangles) == 2
