"""Malformed arrays of every format: one error that names the tensor and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.quantised import onnx
from lora_fx.fx.codes import arrays_of
from lora_fx.ir.quantised import NF4, Quantised
from tests.files.quantised.rows import READERS, golden, read

ROWS = {row.name: row for row in golden()}
NF, NESTED = "nf4 float32 64 64", "nf4 float32 64 64 nested"
STATE = "weight.quant_state.bitsandbytes__nf4"
CT, CT_ZERO = "pack-quantized 4 group float32 symmetric", "pack-quantized 4 group bfloat16"
CT8 = next(n for n in ROWS if n.startswith("int-quantized 8 channel"))
CT_FP8 = next(n for n in ROWS if n.startswith("float-quantized 8 channel"))
GPTQ, AWQ = "gptq 4 16 version 2", "awq 16"
INTX = next(n for n in ROWS if n.startswith("IntxUnpackedToInt8Tensor 3 "))
AO_FP8 = next(n for n in ROWS if n.startswith("Float8Tensor"))
AO_NF4 = "NF4Tensor float32"
DQ, DQ_BLOCKS = "DequantizeLinear int8 rows float32", "DequantizeLinear int8 blocks float16"
NBITS, NBITS_ZERO = "MatMulNBits 4 16", "MatMulNBits 4 16 zero points"
BNB4, GATHER = "MatMulBnb4 1 16 33", "GatherBlockQuantized 4 16"
NVFP4, FP8 = "NVFP4 float32", "FP8 32 torch.float32"
GATHER_ZERO = "GatherBlockQuantized 4 16 zero points"


def nan(a: Array) -> Array:
    a = np.array(a)
    a.reshape(-1)[-1] = np.nan
    return a


def infinite(a: Array) -> Array:
    a = np.array(a)
    a.reshape(-1)[0] = np.inf
    return a


def short(a: Array) -> Array:
    return a[:-1]


def empty(a: Array) -> Array:
    return a[:0]


def as_int(a: Array) -> Array:
    return np.ones(a.shape, np.int64)


def flat(a: Array) -> Array:
    return a.reshape(-1)


def put(value: Any) -> Callable[[Array], Array]:
    """The first element becomes this."""

    def change(a: Array) -> Array:
        a = np.array(a)
        a.reshape(-1)[0] = value
        return a

    return change


def state(old: bytes, new: bytes) -> Callable[[Array], Array]:
    def change(a: Array) -> Array:
        assert old in a.tobytes()
        return np.frombuffer(a.tobytes().replace(old, new), np.uint8)

    return change


def gone(a: Array) -> None:
    return None


def to(dtype: Any) -> Callable[[Array], Array]:
    return lambda a: a.astype(dtype)


# row, part, what is done to it, what the message says
TABLE: list[tuple[str, str, Any, str]] = [
    (NF, "weight", short, r"m\.weight.*95 bytes; expected 96 for \[3, 64\]"),
    (NF, "weight", to(np.int64), r"m\.weight.*int64"),
    (NF, "weight", gone, r"m\.weight' is missing"),
    (NF, "weight.absmax", gone, r"absmax' is missing; expected .*\[3\]"),
    (NF, "weight.absmax", short, r"absmax' is float32 \[2\]; expected .*\[3\]"),
    (NF, "weight.absmax", nan, r"m\.weight'.*scale that is not finite"),
    (NF, "weight.absmax", to(np.int32), r"absmax' is int32"),
    (NF, "weight.absmax", to(np.uint8), r"nested scales in blocks of None"),
    (NF, STATE, short, r"bitsandbytes__nf4'.*not valid JSON"),
    (NF, STATE, state(b'"nf4"', b'"fp4"'), r"says 'fp4' in blocks of 64; expected 'nf4'"),
    (NF, STATE, state(b"64, ", b" 0, "), r"blocks of 0"),
    (NF, STATE, state(b"64, ", b'"", '), r"blocks of ''"),
    (NF, STATE, state(b"[3, 64]", b"[3,-64]"), r"the shape \[3, -64\]"),
    (NF, STATE, state(b"[3, 64]", b"[0, 64]"), r"the shape \[0, 64\]"),
    (NF, STATE, state(b"[3, 64]", b"[]"), r"the shape \[\]"),
    (NF, STATE, state(b"[3, 64]", b"[3e9,1]"), r"the shape"),
    (NF, STATE, state(b"[3, 64]", b"[99999999999, 999999999999]"), r"absmax' is float32 \[3\]"),
    (NESTED, "weight.nested_absmax", gone, r"nested_absmax' is missing"),
    (NESTED, "weight.nested_absmax", nan, r"nested_absmax'.*not finite"),
    (NESTED, "weight.nested_absmax", empty, r"nested_absmax' is float32 \[0\]; expected"),
    (NESTED, "weight.nested_quant_map", gone, r"nested_quant_map' is missing"),
    (NESTED, "weight.nested_quant_map", short, r"nested_quant_map' is float32 \[255\].*\[256\]"),
    (NESTED, STATE, state(b'"nested_blocksize": 256', b'"nested_blocksize": 0'), r"blocks of 0"),
    (NESTED, STATE, state(b'"nested_offset"', b'"nested_onset"'), r"offset None"),
    ("int8", "SCB", short, r"m\.SCB' is float32 \[2\]; expected .*\[3\]"),
    ("int8", "SCB", infinite, r"m\.weight' has a scale that is not finite"),
    ("int8", "weight", to(np.uint8), r"m\.weight' is uint8 \[3, 16\]; expected int8 \[any, any\]"),
    ("int8", "weight", empty, r"m\.weight' is int8 \[0, 16\]"),
    (
        "int8",
        "weight_format",
        lambda a: np.array(2, np.uint8),
        r"weight_format' is \[2\], an order",
    ),
    (CT, "weight_packed", short, r"weight_packed' is \[8, 4\] for a weight of \[9, 32\]"),
    (CT, "weight_packed", lambda a: a[:, :-3], r"weight_packed' is \[9, 1\] for a weight"),
    (CT, "weight_packed", to(np.int64), r"weight_packed' is int64"),
    (CT, "weight_shape", gone, r"weight_shape' is missing; expected .*\[2\]"),
    (CT, "weight_shape", put(-9), r"for a weight of \[-9, 32\]"),
    (CT, "weight_shape", lambda a: a * 0, r"for a weight of \[0, 0\]"),
    (CT, "weight_scale", gone, r"weight_scale' is missing"),
    (CT, "weight_scale", short, r"weight_scale' is float32 \[8, 2\]; expected .*\[9, any\]"),
    (CT, "weight_scale", lambda a: np.ones((9, 3), a.dtype), r"weight_scale' has 3 groups"),
    (CT, "weight_scale", nan, r"m\.weight' has a scale that is not finite"),
    (CT, "weight_scale", as_int, r"weight_scale' is int64"),
    (CT, "weight_g_idx", lambda a: np.full(32, 2), r"g_idx' names groups 2 to 2; expected 0 to 1"),
    (CT, "weight_g_idx", lambda a: np.arange(-2, 30), r"g_idx' names groups -2"),
    (CT, "weight_g_idx", lambda a: np.zeros(31, int), r"g_idx' is int64 \[31\]; expected .*\[32\]"),
    (CT, "weight_global_scale", lambda a: np.ones(1), r"weight_global_scale' is there.*NVFP4"),
    (CT_ZERO, "weight_zero_point", short, r"weight_zero_point' is int32 \[1, 2\]; .*\[2, 2\]"),
    (CT_ZERO, "weight_zero_point", to(np.int8), r"m\.weight' has zero points int8 \[2, 2\]"),
    (CT8, "weight", to(np.int16), r"m\.weight' is int16"),
    (CT8, "weight", flat, r"m\.weight' is int8 \[288\]"),
    (CT8, "weight_scale", flat, r"weight_scale' is \w+ \[9\]; expected"),
    (CT_FP8, "weight", nan, r"m\.weight' has a code that is not finite"),
    (CT_FP8, "weight", to(ml_dtypes.float8_e5m2), r"m\.weight' is float8_e5m2"),
    (GPTQ, "qweight", short, r"qweight' is int32 \[3, 32\]; expected int32 \[4, 32\]"),
    (GPTQ, "qweight", empty, r"qweight' is int32 \[0, 32\]"),
    (GPTQ, "qweight", to(np.uint8), r"qweight' is uint8"),
    (GPTQ, "qzeros", gone, r"qzeros' is missing"),
    (GPTQ, "qzeros", short, r"qzeros' is int32 \[1, 4\]; expected int32 \[2, any\]"),
    (GPTQ, "qzeros", lambda a: np.tile(a, 5), r"qzeros' has 20 words for 32 outputs"),
    (GPTQ, "scales", lambda a: a[:, :-1], r"scales' is float16 \[2, 31\]; expected .*\[any, 32\]"),
    (GPTQ, "scales", nan, r"m\.weight' has a scale that is not finite"),
    (GPTQ, "g_idx", put(2), r"g_idx' names groups 0 to 2; expected 0 to 1"),
    (GPTQ, "g_idx", put(-1), r"g_idx' names groups -1 to 1"),
    (
        GPTQ,
        "g_idx",
        lambda a: np.tile(a, 2),
        r"qweight' is int32 \[4, 32\]; expected int32 \[8, 32\]",
    ),
    (AWQ, "qweight", lambda a: a[:, :-1], r"scales' is float16 \[2, 32\]; expected .*\[any, 24\]"),
    (AWQ, "qweight", short, r"scales' has 2 groups; expected a number that divides 31 inputs"),
    (AWQ, "qzeros", gone, r"qzeros' is missing"),
    (AWQ, "qzeros", short, r"qzeros' is int32 \[1, 4\]; expected int32 \[2, 4\]"),
    (AWQ, "scales", infinite, r"m\.weight' has a scale that is not finite"),
    (INTX, "qdata", short, r"m\.weight' has scales float32 \[3, 2\]; expected \[2, 2\]"),
    (INTX, "qdata", to(np.int16), r"m\.weight' has qdata of int16; expected int8 or float8"),
    (INTX, "qdata", empty, r"m\.weight' has codes \[0, 32\]"),
    (INTX, "scale", nan, r"m\.weight' has a scale that is not finite"),
    (INTX, "scale", as_int, r"m\.weight' has scales of int64"),
    (INTX, "zero", lambda a: np.ones((2, 2), np.int8), r"m\.weight' has zero points int8 \[2, 2\]"),
    (INTX, "block_size", lambda a: [0, 16], r"m\.weight' has blocks of \[0, 16\]"),
    (INTX, "block_size", lambda a: [1, 1, 16], r"m\.weight' has blocks of \[1, 1, 16\]"),
    (AO_FP8, "qdata", nan, r"m\.weight' has a code that is not finite"),
    (AO_FP8, "scale", short, r"m\.weight' has scales float32 \[2, 1\]; expected \[3, 1\]"),
    (AO_NF4, "data", short, r"m\.weight' of \[12, 32\] has 191 bytes of uint8"),
    (AO_NF4, "scalers", empty, r"m\.weight' of \[12, 32\] has .* in 0 blocks"),
    (AO_NF4, "factor", put(0), r"factors that are not 0"),
    (AO_NF4, "factor", lambda a: a[:5], r"has 12 scales in 5 blocks"),
    (AO_NF4, "mean", nan, r"m\.weight' has a scale that is not finite"),
    (AO_NF4, "levels", lambda a: a[:3], r"m\.weight' has codes up to 15; expected 3 finite levels"),
    (AO_NF4, "levels", nan, r"m\.weight' has codes up to 15; expected 16 finite levels"),
    (DQ, "x", short, r"m\.weight' has scales float32 \[3\]; expected \[2, 1\]"),
    (DQ, "x", to(np.float32), r"m\.weight' has codes of float32"),
    (DQ, "axis", lambda a: 2, r"m\.weight' of 2 axes has scales along axis 2"),
    (DQ, "axis", lambda a: -3, r"m\.weight' of 2 axes has scales along axis -3"),
    (DQ, "scale", infinite, r"m\.weight' has a scale that is not finite"),
    (DQ, "zero", lambda a: np.ones(2, np.int8), r"m\.weight' has zero points int8 \[2\]"),
    (DQ_BLOCKS, "scale", lambda a: a.T, r"m\.weight' has scales float16 \[1, 3\]"),
    (DQ_BLOCKS, "block", lambda a: -16, r"m\.weight' has blocks of \[1, -16\]"),
    (NBITS, "b", lambda a: a[:, :1], r"m\.weight' has B uint8 \[3, 1, 8\]; expected \[3, 2, 8\]"),
    (NBITS, "b", flat, r"4 bits in blocks of 0"),
    (NBITS, "b", lambda a: a[..., :4], r"4 bits in blocks of 8; expected .* from 16 up"),
    (NBITS, "b", lambda a: np.tile(a, 3), r"4 bits in blocks of 48"),
    (NBITS, "bits", lambda a: 3, r"3 bits"),
    (NBITS, "scale", short, r"m\.weight' has scales float32 \[2, 2\]; expected \[3, 2\]"),
    (NBITS, "scale", nan, r"m\.weight' has a scale that is not finite"),
    (NBITS_ZERO, "zero", short, r"m\.weight' has zero points uint8 \[2, 1\]; expected \[3, 1\]"),
    (
        NBITS_ZERO,
        "zero",
        lambda a: np.full((3, 2), np.nan, "f4"),
        r"a zero point that is not finite",
    ),
    (BNB4, "b", short, r"m\.weight' has B uint8 \[49\]; expected \[50\]"),
    (BNB4, "absmax", short, r"m\.weight' has scales float32 \[6\]; expected \[7\]"),
    (BNB4, "absmax", nan, r"m\.weight' has a scale that is not finite"),
    (BNB4, "quant_type", lambda a: 2, r"m\.weight' has quant_type 2; expected 0, FP4, or 1, NF4"),
    (BNB4, "block", lambda a: 8, r"m\.weight' has 4 bits in blocks of 8"),
    (BNB4, "block", lambda a: 0, r"m\.weight' has 4 bits in blocks of 0"),
    (GATHER, "x", short, r"m\.weight' has scales float32 \[3, 1\]; expected \[2, 1\]"),
    (GATHER, "axis", lambda a: 5, r"m\.weight' of 2 axes has scales along axis 5"),
    (GATHER, "scale", nan, r"m\.weight' has a scale that is not finite"),
    (GATHER, "block", lambda a: 24, r"m\.weight' has 4 bits in blocks of 24"),
    (NVFP4, "weight", to(np.int8), r"m\.weight' is int8"),
    (NVFP4, "weight_scale", short, r"weight_scale' is float8_e4m3fn \[2, 4\]; expected .*\[3, 4\]"),
    (NVFP4, "weight_scale_2", nan, r"m\.weight' has a scale that is not finite"),
    (NVFP4, "weight_scale_2", lambda a: np.ones(3, np.float32), r"scale_2' has several numbers"),
    ("nvfp4-pack-quantized", "weight_global_scale", put(0), r"global_scale' is 0"),
    ("mxfp4-pack-quantized", "weight_scale", gone, r"weight_scale' is missing"),
    ("mxfp4-pack-quantized", "weight_scale", put(255), r"weight_scale' has an exponent of 255"),
    ("gpt-oss float32", "w_blocks", lambda a: a[..., :9], r"m\.w_blocks' is uint8 \[2, 24, 1, 9\]"),
    ("gpt-oss float32", "w_scales", lambda a: a[:1], r"m\.w_scales' is uint8 \[1, 24, 1\]"),
    ("gpt-oss float32", "w_scales", put(255), r"m\.w_scales' has an exponent of 255"),
    ("MXFP8", "weight_scale", lambda a: a[:, :1], r"weight_scale' is uint8 \[3, 1\].*\[3, 2\]"),
    ("MXFP8", "weight", nan, r"m\.weight' has a code that is not finite"),
    (FP8, "weight_scale_inv", lambda a: a[:1], r"scale_inv' is float32 \[1, 1\].*\[2, 1\]"),
    (FP8, "weight_scale_inv", infinite, r"m\.weight' has a scale that is not finite"),
    (FP8, "weight_block_size", lambda a: [0, 32], r"m\.weight' has blocks of \[0, 32\], as conf"),
    (FP8, "weight_block_size", lambda a: [1e30] * 2, r"m\.weight' has blocks of \[1e\+30, 1e"),
    (FP8, "weight_block_size", lambda a: [2**62] * 2, r"weight_scale_inv"),
    (FP8, "weight_block_size", lambda a: [True, 32], r"m\.weight' has blocks of \[True, 32\]"),
    (FP8, "weight_block_size", lambda a: [-32, 32], r"m\.weight' has blocks of \[-32, 32\]"),
    (FP8, "weight_block_size", lambda a: [32.0, 32], r"m\.weight' has blocks of \[32\.0, 32\]"),
    (FP8, "weight_block_size", lambda a: "32", r"m\.weight' has blocks of '32'"),
    (GATHER_ZERO, "zero", short, r"m\.weight' has zero points uint8 \[2, 1\]; expected \[3, 1\]"),
]


@pytest.mark.parametrize(
    ("name", "part", "change", "words"), TABLE, ids=[f"{r[0]}, {r[1]}: {r[3]}" for r in TABLE]
)
def test_one_error_names_the_tensor(name: str, part: str, change: Any, words: str) -> None:
    row = ROWS[name]
    arrays, options = dict(row.arrays), dict(row.options)
    home: dict[str, Any] = options if part in ("block_size", "axis", "bits", "block") else arrays
    home = options if part in ("quant_type", "weight_block_size") else home
    home[part] = change(home.get(part))
    if home[part] is None:
        del home[part]
    read(row)
    with pytest.raises(LoraFxError) as error:
        READERS[row.reader](arrays, options)
    assert re.search(words, error.value.message), error.value.message
    assert "tensor 'm." in error.value.message and error.value.hint


@pytest.mark.parametrize("size", [64, 128, 10**5, 2**31, 2**53, 2**62, 10**30])
def test_a_block_of_any_size_is_one_block(size: int) -> None:
    """Nothing is made as large as a config says that a block is."""
    codes = np.arange(24, dtype=np.float32).reshape(3, 8).astype(ml_dtypes.float8_e4m3fn)
    arrays = {"weight": codes, "weight_scale_inv": np.full((1, 1), 0.5, np.float32)}
    weight = READERS["fp8 blocks"](arrays, {"weight_block_size": [size, size]})
    assert np.array_equal(weight.dequantise(), 0.5 * codes.astype(np.float32))


def test_every_format_has_hostile_rows() -> None:
    assert {ROWS[name].reader for name, *_ in TABLE} == set(READERS)


def test_what_no_operator_holds() -> None:
    scale = np.ones((2, 4), np.float32)
    codes = np.full((2, 64), 7, np.uint8)
    rows: list[tuple[Any, Quantised, str]] = [
        (onnx.as_matmul_nbits, Quantised(codes, scale, None, (1, 16), NF4), "codes uint8"),
        (onnx.as_matmul_nbits, Quantised(codes[0], scale[0], None, (16,)), r"codes uint8 \[64\]"),
        (onnx.as_matmul_nbits, Quantised(codes, scale[0], None, (32,)), r"blocks of \[32\]"),
        (onnx.as_matmul_nbits, Quantised(codes, np.ones((2, 8)), None, (1, 8)), "blocks of 8 inp"),
        (onnx.as_matmul_nbits, Quantised(codes, np.ones((2, 3)), None, (1, 25)), "blocks of 25"),
        (
            onnx.as_matmul_nbits,
            Quantised(codes.astype(np.int32) * 99, scale, None, (1, 16)),
            "codes from 693 to 693",
        ),
        (
            onnx.as_matmul_nbits,
            Quantised(codes * 30, scale, scale / 2, (1, 16)),
            r"zero points from 0\.5 to 0\.5 of codes of 8 bits",
        ),
        (
            onnx.as_matmul_nbits,
            Quantised(codes.view(np.int8), scale, scale / 3, (1, 16)),
            r"zero points from 0\.33",
        ),
    ]
    for to_operator, q, words in rows:
        with pytest.raises(LoraFxError, match=words) as error:
            to_operator("w", q)
        assert "tensor 'w' has" in error.value.message, error.value.message
        assert error.value.hint == "dequantise it"


def test_what_no_tree_holds() -> None:
    scale, codes = np.ones((2, 4), np.float32), np.full((2, 64), 7, np.uint8)
    for q, words in (
        (Quantised(codes, scale, None, (1, 16), NF4 * 2), r"16 levels in blocks of \[1, 16\]"),
        (Quantised(codes, np.ones((2, 64)), None, (1, 1)), "blocks of 1 inputs"),
    ):
        with pytest.raises(LoraFxError, match=words) as error:
            arrays_of("w", q)
        assert error.value.hint
