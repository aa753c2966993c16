"""Layouts by their published description: codes are packed here in plain Python, and read back."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised import onnx
from lora_fx.files.quantised.awq import awq
from lora_fx.files.quantised.bitsandbytes import four_bits
from lora_fx.files.quantised.compressed_tensors import compressed
from lora_fx.files.quantised.fp4 import mxfp4_stack
from lora_fx.files.quantised.fp8 import fp8_blocks
from lora_fx.files.quantised.gptq import gptq
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.weight_parts import Parts
from lora_fx.fx.codes import arrays_of
from lora_fx.ir.quantised import FP4, NF4, Quantised
from tests.files.quantised import operators
from tests.files.quantised.rows import parts_of
from tests.ir.test_quantised import stream, weights

many = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 9999)


def words(codes: Array, bits: int, width: int = 32) -> Array:
    """Each row in words, the first code in the lowest bits."""
    rows = [stream(row.tolist(), bits, width) for row in codes]
    return np.array(rows, f"uint{width}").view(f"{'u' * (width == 8)}int{width}")


def weight(codes: Array, zero: Array, scale: Array, groups: Array) -> Array:
    """[out, in] from codes [out, in] and numbers [out, groups], in float16."""
    steps = codes.astype(np.float32) - zero[:, groups].astype(np.float32)
    return np.asarray((steps * scale[:, groups].astype(np.float32)).astype(np.float16))


@many
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 90),
    st.integers(1, 70),
    st.sampled_from([1, 2]),
    st.booleans(),
    seeds,
)
def test_gptq(bits: int, length: int, group: int, version: int, order: bool, seed: int) -> None:
    """Inputs that fill no whole word and no whole group, in any order."""
    rng, out = np.random.default_rng(seed), 32
    groups = np.arange(length, dtype=np.int32) // group
    if order:
        rng.shuffle(groups)
    count = int(groups.max()) + 1
    codes = rng.integers(0, 2**bits, (out, length))
    zero = rng.integers(1, 2**bits, (out, count))
    scale = rng.standard_normal((out, count)).astype(np.float16)
    parts = {
        "qweight": words(codes, bits).T,
        "qzeros": words((zero - (version == 1)).T, bits),
        "scales": scale.T,
        "g_idx": groups,
    }
    found = gptq(parts_of("m", parts), version)
    assert (found.bits, found.shape) == (bits, (out, length))
    want, q = weight(codes, zero, scale, groups), found.read()
    assert np.array_equal(q.dequantise("float16"), want)
    assert np.array_equal(q.dequantise("float16", slice(3, 7)), want[3:7])
    assert q.block == (1, min(group, length)), "no scale for each input"
    if not order and length % group == 0 and length * bits % 32 == 0:
        del parts["g_idx"]
        assert np.array_equal(
            gptq(parts_of("m", parts), version).read().dequantise("float16"), want
        )


@many
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), seeds)
def test_awq(eights: int, count: int, group: int, seed: int) -> None:
    rng, out, length = np.random.default_rng(seed), 8 * eights, count * group
    codes, zero = rng.integers(0, 16, (out, length)), rng.integers(0, 16, (out, count))
    scale = rng.standard_normal((out, count)).astype(np.float16)

    def packed(x: Array) -> Array:
        """Outputs 0 2 4 6 1 3 5 7 of each eight."""
        mixed = x.T.reshape(x.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(mixed.reshape(x.shape[1], -1), 4)

    parts = {"qweight": packed(codes), "qzeros": packed(zero), "scales": scale.T}
    found = awq(parts_of("m", parts))
    assert (found.bits, found.shape) == (4, (out, length))
    want = weight(codes, zero, scale, np.arange(length) // group)
    assert np.array_equal(found.read().dequantise("float16"), want)


@many
@given(
    st.integers(2, 8), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.booleans(), seeds
)
def test_compressed_tensors_packed(
    bits: int, out: int, count: int, asymmetric: bool, order: bool, seed: int
) -> None:
    rng, length, half = np.random.default_rng(seed), count * 32, 2 ** (bits - 1)
    groups = np.arange(length, dtype=np.int32) // 32
    if order and count > 1:
        rng.shuffle(groups)
    codes = rng.integers(-half, half, (out, length))
    zero = rng.integers(-half, half, (out, count)) * asymmetric
    scale = rng.standard_normal((out, count)).astype(np.float16)
    parts = {
        "weight_packed": words(codes + half, bits),
        "weight_shape": np.array([out, length]),
        "weight_scale": scale,
        "weight_g_idx": groups if order and count > 1 else np.full(length, -1, np.int32),
    }
    if asymmetric:
        parts["weight_zero_point"] = words((zero + half).T, bits).T
    found = compressed(parts_of("m", parts))
    assert (found.bits, found.shape) == (bits, (out, length))
    want = weight(codes, zero, scale, groups)
    assert np.array_equal(found.read().dequantise("float16"), want)


@many
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.sampled_from([32, 64, 128]),
    st.sampled_from(["nf4", "fp4"]),
    st.booleans(),
    seeds,
)
def test_bitsandbytes(shape: list[int], block: int, kind: str, nested: bool, seed: int) -> None:
    """Shapes of any number of elements, odd ones too; nested blocks of 4 scales."""
    rng, size = np.random.default_rng(seed), int(np.prod(shape))
    codes = rng.integers(0, 16, size)
    count = -(-size // block)
    scale = rng.random(count).astype(np.float32)
    state = f'{{"quant_type": "{kind}", "blocksize": {block}, "shape": {shape}'
    parts = {"weight.absmax": scale}
    if nested:
        inner, table = rng.integers(0, 256, count), rng.random(256).astype(np.float32)
        outer = rng.random(-(-count // 4)).astype(np.float32)
        parts = {
            "weight.absmax": inner.astype(np.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": table,
        }
        state += ', "nested_blocksize": 4, "nested_offset": 0.625'
        scale = table[inner] * outer[np.arange(count) // 4] + np.float32(0.625)
    whole = np.append(codes, [0] * (size % 2))
    parts["weight"] = (whole[::2] * 16 + whole[1::2]).astype(np.uint8)[:, None]
    text = (state + "}").encode()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    found = four_bits(parts_of("m", parts))
    assert (found.bits, found.shape) == (4, tuple(shape))
    levels = NF4 if kind == "nf4" else FP4
    want = (levels[codes] * scale[np.arange(size) // block]).reshape(shape)
    assert np.array_equal(found.read().dequantise(), want)


def test_bitsandbytes_stored_as_another_dtype() -> None:
    codes = np.arange(64, dtype=np.uint8)
    state = b'{"quant_type": "nf4", "blocksize": 64, "shape": [2, 64]}'
    parts = {
        "weight": codes[:, None],
        "weight.absmax": np.ones(2, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }
    plain = four_bits(parts_of("m", parts)).read()
    parts["weight"] = codes.view(np.float16)[:, None]
    assert np.array_equal(four_bits(parts_of("m", parts)).read().codes, plain.codes)


@many
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 64]),
    st.integers(1, 5),
    st.integers(1, 140),
    st.sampled_from(["none", "packed", "floats"]),
    seeds,
)
def test_matmul_nbits(bits: int, block: int, out: int, length: int, kind: str, seed: int) -> None:
    rng, count = np.random.default_rng(seed), -(-length // block)
    codes = rng.integers(0, 2**bits, (out, length))
    scale = rng.standard_normal((out, count)).astype(np.float32)
    zero = np.full((out, count), 2.0 ** (bits - 1), np.float32)
    given_zero = None
    if kind == "packed":
        zero = rng.integers(0, 2**bits, (out, count))
        given_zero = words(zero, bits, 8)
    elif kind == "floats":
        given_zero = zero = (rng.random((out, count)) * 9).astype(np.float32)
    filled = np.pad(codes, ((0, 0), (0, count * block - length)))
    b = words(filled.reshape(-1, block), bits, 8).reshape(out, count, -1)
    q = operators.matmul_nbits("w", b, scale, given_zero, (out, length), bits)
    groups = np.arange(length) // block
    want = (codes.astype(np.float32) - zero[:, groups].astype(np.float32)) * scale[:, groups]
    assert np.array_equal(q.dequantise(), want.astype(np.float32))


@settings(max_examples=300, deadline=None)
@given(weights(), st.integers(1, 4), st.sampled_from([1, 3, 15, 16, 32, 48, 96, 512]), seeds)
def test_a_weight_as_an_operator_is_the_same_or_refused(
    q: Quantised, tall: int, wide: int, seed: int
) -> None:
    """Whatever the codes, blocks and zero points are."""
    if seed % 3:  # codes of few bits, a matrix, and blocks that may fit
        rng = np.random.default_rng(seed)
        shape = (int(rng.integers(1, 5)), int(rng.integers(1, 150)))
        blocks = (-(-shape[0] // tall), -(-shape[1] // wide))
        bits, signed = int(rng.choice([2, 4, 8])), bool(rng.integers(2))
        low = -(2 ** (bits - 1)) * signed
        codes = rng.integers(low, low + 2**bits, shape).astype("int8" if signed else "uint8")
        zeros = rng.integers(low - 2, low + 2**bits + 2, blocks).astype(np.int16)
        zero = [None, zeros, zeros.astype(np.float32) / 2][int(rng.integers(3))]
        scale = rng.standard_normal(blocks).astype(np.float16)
        q = Quantised(codes, scale, zero, (tall, wide))
    try:
        if q.levels is not None:
            kind, block, four = arrays_of("w", q)
            told = int(kind == "nf4")
            again = operators.matmul_bnb4("w", four["codes"], four["scale"], q.shape, told, block)
        else:
            assume(q.unit == 1)  # one factor cannot round twice
            n = onnx.as_matmul_nbits("w", q)
            again = operators.matmul_nbits("w", n.b, n.scales, n.zero_points, q.shape, n.bits)
            assert again.block == (1, n.block_size) and n.block_size in (16, 32, 64, 128)
    except LoraFxError as error:
        assert re.search(r"^w: |(weight|tensor) 'w'", error.message)
        fits = len(q.shape) == len(q.block) == 2 and (q.block[1] % 16 == 0)
        assert not fits or q.zero is not None or q.levels is not None
        return
    assert np.array_equal(again.dequantise(), q.dequantise())


@pytest.mark.parametrize("block", [16, 48, 96, 4096, 80])
def test_a_scale_a_row_and_blocks_of_no_power_of_two(block: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (3, 200)).astype(np.int8)
    codes[0, 0] = -128  # so that 8 bits are needed
    scale = rng.standard_normal((3, -(-200 // block))).astype(np.float32)
    q = Quantised(codes, scale, None, (1, block))
    n = onnx.as_matmul_nbits("w", q)
    assert n.bits == 8 and n.zero_points is None
    assert n.block_size == {16: 16, 48: 16, 96: 32, 4096: 128, 80: 16}[block]
    again = operators.matmul_nbits("w", n.b, n.scales, None, (3, 200), 8)
    assert np.array_equal(again.dequantise(), q.dequantise())


def large() -> dict[str, QuantisedWeight]:
    """Weights of several windows, with numbers at random; what they stand for is tested above."""
    rng = np.random.default_rng(0)

    def ints(*shape: int) -> Array:
        return rng.integers(-(2**31), 2**31, shape).astype(np.int32)

    def scales(*shape: int) -> Array:
        return (rng.random(shape) + 0.5).astype(np.float32)

    def module(**arrays: Array) -> Parts:
        return parts_of("m", arrays)

    state = {"quant_type": "nf4", "blocksize": 64, "shape": [30, 40], "nested_blocksize": 2,
             "nested_offset": 0.25}  # fmt: skip
    nested = module(
        **{
            "weight": rng.integers(0, 256, (600, 1), dtype=np.uint8),
            "weight.absmax": rng.integers(0, 256, 19, dtype=np.uint8),
            "weight.nested_absmax": scales(10),
            "weight.nested_quant_map": scales(256),
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(
                json.dumps(state).encode(), np.uint8
            ),
        }
    )
    fp8_codes = rng.standard_normal((300, 70)).astype(ml_dtypes.float8_e4m3fn)
    made = {
        f"gptq {bits}": gptq(
            module(
                qweight=ints(32 * bits // 32, 96),
                qzeros=ints(2, 96 * bits // 32),
                scales=scales(2, 96),
                g_idx=rng.permutation(np.arange(32) // 16),
            )
        )
        for bits in (2, 3, 4, 8)
    }
    return made | {
        "awq": awq(module(qweight=ints(32, 3), qzeros=ints(2, 3), scales=scales(2, 24))),
        "packed": compressed(
            module(
                weight_packed=ints(70, 4),
                weight_shape=np.array([70, 32]),
                weight_scale=scales(70, 2),
                weight_zero_point=ints(9, 2),
            )
        ),
        "nf4 nested": four_bits(nested),
        "fp8": fp8_blocks(module(weight=fp8_codes, weight_scale_inv=scales(3, 1)), {}),
        "stack": mxfp4_stack(
            module(
                w_blocks=rng.integers(0, 256, (3, 5, 2, 16), dtype=np.uint8),
                w_scales=rng.integers(120, 130, (3, 5, 2), dtype=np.uint8),
            ),
            "w",
        ),
    }


@pytest.mark.parametrize("name", large())
def test_any_rows_are_those_of_the_whole(name: str) -> None:
    weight = large()[name]
    every = weight.read().dequantise().reshape(-1, weight.shape[-1])
    count, rng = len(every), np.random.default_rng(1)
    assert weight.step < count
    spans = [sorted(rng.choice(count + 1, 2, replace=False)) for _ in range(20)]
    for low, high in [(0, count), *spans]:
        assert np.array_equal(weight.rows(int(low), int(high)), every[low:high]), (low, high)
