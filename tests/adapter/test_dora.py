"""The rescaling of DoRA, block by block, against its definition in fp64."""

from __future__ import annotations

import numpy as np
import pytest

from lora_fx.adapter import dora as variant
from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError


def weight() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((7, 11), np.float32), rng.standard_normal(7, np.float32)


def test_rows_get_the_norms_of_the_magnitude() -> None:
    v, magnitude = weight()
    new = variant.factors(magnitude, variant.squares(v), "w")[:, None] * v
    assert new.dtype == np.float32
    wide = v.astype(np.float64)
    want = magnitude[:, None] * wide / np.linalg.norm(wide, axis=1, keepdims=True)
    np.testing.assert_allclose(new, want, rtol=1e-6)


def test_blocks_of_columns_give_the_same_norms() -> None:
    v, magnitude = weight()
    sums = variant.squares(v[:, :4]) + variant.squares(v[:, 4:])
    whole = variant.factors(magnitude, variant.squares(v), "w")
    np.testing.assert_allclose(variant.factors(magnitude, sums, "w"), whole, rtol=1e-7)


def test_what_cannot_be_rescaled() -> None:
    v, magnitude = weight()
    with pytest.raises(LoraFxError, match="6 numbers; the weight has 7 rows"):
        variant.factors(magnitude[:6], variant.squares(v), "w")
    v[2] = 0
    with pytest.raises(LoraFxError, match="w: row 2"):
        variant.factors(magnitude, variant.squares(v), "w")
