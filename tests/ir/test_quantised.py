"""A quantised weight by its definition, element by element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fx.dtypes import Array, numpy_dtype
from lora_fx.ir.bit_packing import packed, unpacked
from lora_fx.ir.quantised import FP4, NF4, Quantised, blocks_in, quantise

DTYPES = ("float32", "bfloat16", "float16")


@st.composite
def weights(draw: st.DrawFn) -> Quantised:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    if draw(st.booleans()):
        block: tuple[int, ...] = (draw(st.integers(1, 40)),)
    else:
        block = tuple(draw(st.integers(1, n + 3)) for n in shape)
    blocks = blocks_in(shape, block)
    scale = rng.standard_normal(blocks).astype(numpy_dtype(draw(st.sampled_from(DTYPES))))
    if draw(st.booleans()):
        codes = rng.integers(0, 16, shape, dtype=np.uint8)
        return Quantised(codes, scale, None, block, draw(st.sampled_from([NF4, FP4])))
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    zero = draw(st.sampled_from([None, "int8", "float32"]))
    zeros = None if zero is None else np.asarray(rng.standard_normal(blocks) * 9).astype(zero)
    return Quantised(codes, scale, zeros, block, None, draw(st.sampled_from([1.0, 1 / 127])))


def by_definition(q: Quantised) -> Array:
    result = np.empty(q.shape, np.float32)
    for i, at in enumerate(np.ndindex(q.shape)):
        if len(q.block) == 1:
            b: Any = i // q.block[0]
        else:
            b = tuple(a // n for a, n in zip(at, q.block, strict=True))
        code = q.codes[at]
        value = np.float32(code if q.levels is None else q.levels[code])
        if q.zero is not None:
            value = value - np.float32(q.zero[b])
        value = value * np.float32(q.scale[b])
        result[at] = value if q.unit == 1 else value * np.float32(q.unit)
    return result


@settings(max_examples=200, deadline=None)
@given(weights(), st.sampled_from(DTYPES), st.data())
def test_dequantised_it_is_its_definition(q: Quantised, dtype: str, data: st.DataObject) -> None:
    want = by_definition(q).astype(numpy_dtype(dtype))
    got = q.dequantise(dtype)
    assert got.dtype == want.dtype and got.tobytes() == want.tobytes()
    start = data.draw(st.integers(0, q.shape[0]))
    stop = data.draw(st.integers(start, q.shape[0]))
    some = q.dequantise(dtype, slice(start, stop))
    assert some.shape == want[start:stop].shape and some.tobytes() == want[start:stop].tobytes()


def stream(codes: list[int], bits: int, width: int, high: bool = False) -> list[int]:
    """Codes in words of `width` bits, by one large number."""
    if high:
        each = width // bits
        codes = codes + [0] * (-len(codes) % each)
        codes = [c for i in range(0, len(codes), each) for c in reversed(codes[i : i + each])]
    whole = sum(c << (i * bits) for i, c in enumerate(codes))
    count = -(-len(codes) * bits // width)
    return [whole >> (i * width) & (2**width - 1) for i in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_codes_come_out_of_words_as_they_went_in(data: st.DataObject) -> None:
    bits = data.draw(st.integers(2, 8))
    width = data.draw(st.sampled_from([8, 32] if 8 % bits == 0 else [32]))
    high = bits in (2, 4, 8) and data.draw(st.booleans())
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    code = st.integers(0, 2**bits - 1)
    codes = [data.draw(st.lists(code, min_size=count, max_size=count)) for _ in range(rows)]
    words = np.array([stream(c, bits, width, high) for c in codes], f"uint{width}")
    if width == 32:
        words = words.view(np.int32)
    assert unpacked(words, bits, high=high)[:, :count].tolist() == codes
    down = unpacked(np.ascontiguousarray(words.T), bits, 0, high=high)[:count]
    assert down.T.tolist() == codes
    if width == 8:
        assert packed(np.array(codes), bits, high=high).tolist() == words.tolist()


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (1, 1)])
def test_quantised_values_are_the_nearest(kind: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    w[0, 0] = 0
    q = quantise(w, kind)
    assert q.scale.shape == blocks_in(q.shape, q.block)
    got = q.dequantise()
    low, high = (0, 16) if kind == "nf4" else (0, 2 ** int(kind[3:]))
    best = np.full(shape, math.inf)
    for code in range(low, high):
        other = Quantised(np.full_like(q.codes, code), q.scale, q.zero, q.block, q.levels)
        best = np.minimum(best, np.abs(other.dequantise() - w))
    assert np.abs(got - w) == pytest.approx(best, rel=1e-6, abs=1e-7)
    again = quantise(got, kind)
    assert again.dequantise() == pytest.approx(got, rel=1e-6, abs=1e-7)


def test_a_weight_of_zeros_stays_one() -> None:
    for kind in ("nf4", "int4", "int8"):
        assert not quantise(np.zeros((2, 70), np.float32), kind).dequantise().any()
