"""Quantised weights of a checkpoint: found by headers, read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.files.checkpoint import open_checkpoint
from lora_fx.files.quantised import weight_parts
from lora_fx.files.quantised.quantised_weight import QuantisedWeight
from lora_fx.files.quantised.read import SIBLINGS, quantised_weights, scheme_of
from lora_fx.files.safetensors import TensorInfo
from lora_fx.files.stored_tensors import stored, stored_bytes
from tests.checkpoint.made import checkpoint
from tests.files.quantised.rows import golden, mark, read

ROWS = {row.name: row for row in golden()}
GPTQ = {"quant_method": "gptq", "bits": 4}
AWQ = {"quant_method": "awq", "bits": 4, "version": "GEMM"}
CT = {"quant_method": "compressed-tensors", "sparsity_config": {}, "transform_config": {}}
# golden row, quantization_config, format, bits, shape, tensors that the headers alone do not tell
TABLE: list[tuple[str, Any, str, int, tuple[int, ...], set[str]]] = [
    (
        "nf4 float32 64 64",
        None,
        "bitsandbytes nf4",
        4,
        (3, 64),
        {"weight.quant_state.bitsandbytes__nf4"},
    ),
    (
        "fp4 float16 64 33 nested",
        {"quant_method": "bitsandbytes"},
        "bitsandbytes fp4",
        4,
        (3, 33),
        {"weight.quant_state.bitsandbytes__fp4"},
    ),
    ("int8", None, "bitsandbytes int8", 8, (3, 16), set()),
    ("gptq 4 16 version 1 in an order", GPTQ, "GPTQ", 4, (32, 32), set()),
    (
        "gptq 3 16 version 2",
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
        "GPTQ",
        3,
        (32, 32),
        set(),
    ),
    (
        "auto-round 8",
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        "GPTQ",
        8,
        (32, 32),
        set(),
    ),
    ("awq 16", AWQ, "AWQ", 4, (32, 32), set()),
    (
        "pack-quantized 4 group bfloat16",
        CT,
        "compressed-tensors packed",
        4,
        (9, 32),
        {"weight_shape"},
    ),
    (
        next(n for n in ROWS if n.startswith("int-quantized 8 channel")),
        CT,
        "compressed-tensors int8",
        8,
        (9, 32),
        set(),
    ),
    (
        next(n for n in ROWS if n.startswith("float-quantized 8 tensor")),
        CT,
        "compressed-tensors fp8",
        8,
        (9, 32),
        set(),
    ),
]


def found(
    folder: Path, tensors: dict[str, Array], config: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, QuantisedWeight], list[str]]:
    """The weights of a folder on disk, and the names of what is read from then on."""
    told = {} if config is None else {"quantization_config": config}
    checkpoint(folder / "base", tensors, config={"model_type": "llama", **told})
    base = open_checkpoint(folder / "base")
    names = {info.start: name for name, info in base.tensors.items()}
    touched: list[str] = []

    def reading(info: TensorInfo, *part: Any) -> Array:
        touched.append(names[info.start])
        return stored(info, *part)

    def reading_bytes(info: TensorInfo, low: int, high: int) -> Array:
        touched.append(names[info.start])
        return stored_bytes(info, low, high)

    monkeypatch.setattr(weight_parts, "stored", reading)
    monkeypatch.setattr(weight_parts, "stored_bytes", reading_bytes)
    return quantised_weights(base.tensors, base.config()), touched


@pytest.mark.parametrize("row", TABLE, ids=lambda r: r[0])
def test_a_weight_is_found_by_its_headers_and_read_on_demand(
    tmp_path: Path, row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, config, form, bits, shape, told = row
    golden_row = ROWS[name]
    tensors = {f"layers.0.q_proj.{n}": a for n, a in golden_row.arrays.items()}
    plain = {"layers.0.norm.weight": np.ones(4, np.float32)}
    weights, touched = found(tmp_path, {**tensors, **plain}, config, monkeypatch)
    assert list(weights) == ["layers.0.q_proj.weight"]
    weight = weights["layers.0.q_proj.weight"]
    assert (weight.format, weight.bits, weight.shape) == (form, bits, shape)
    assert {t.removeprefix("layers.0.q_proj.") for t in touched} == told
    q = weight.read()
    assert mark(q.dequantise(golden_row.want.dtype)) == golden_row.want
    assert np.array_equal(q.codes, read(golden_row).codes)


def test_many_weights_in_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, Array] = {}
    for i in range(3):
        tensors |= {f"{i}.up.{n}": a for n, a in ROWS["awq 16"].arrays.items()}
    tensors["2.down.weight"] = np.ones((4, 4), np.float32)
    weights, touched = found(tmp_path, tensors, AWQ, monkeypatch)
    assert sorted(weights) == ["0.up.weight", "1.up.weight", "2.up.weight"] and not touched
    weights["1.up.weight"].read()
    assert {t[0] for t in touched} == {"1"}


def ones(*shape: int, dtype: Any = np.int32) -> Array:
    return np.ones(shape, dtype)


QZ = {"qweight": ones(4, 32), "qzeros": ones(2, 4), "scales": ones(2, 32, dtype=np.float16)}
FP8 = {"weight": ones(8, 4, dtype=ml_dtypes.float8_e4m3fn)}
UNREAD: dict[str, tuple[dict[str, Array], Any, str]] = {
    "no config": (QZ, None, "GPTQ or AWQ.*config.json does not give its layout"),
    "GPTQ for Marlin": (QZ, GPTQ | {"checkpoint_format": "marlin"}, "GPTQ or AWQ"),
    "AWQ for GEMV": (QZ, AWQ | {"version": "gemv"}, "GPTQ or AWQ"),
    "AutoRound's own": (QZ, {"quant_method": "auto-round"}, "GPTQ or AWQ"),
    "rotated": (
        FP8 | {"weight_scale": ones(1, dtype=np.float32)},
        CT | {"transform_config": {"config_groups": {"u": {}}}},
        "transform_config",
    ),
    "HQQ": ({"W_q": ones(4, 6, dtype=np.uint8)}, {"quant_method": "hqq"}, "HQQ codes"),
    "AQLM": ({"codes": ones(4, 6, dtype=np.int8)}, {"quant_method": "aqlm"}, "AQLM codes"),
    "quanto": ({"weight._data": ones(4, 6, dtype=np.int8)}, None, "optimum-quanto codes"),
    "bitsandbytes, another name": ({"weight.SCB": ones(4, dtype=np.float32)}, None, "bitsandbytes"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_formats_that_are_known_and_not_read(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, config, words = UNREAD[case]
    weights, touched = found(
        tmp_path, {f"m.{n}": a for n, a in tensors.items()}, config, monkeypatch
    )
    assert list(weights) == ["m.weight"] and not touched
    weight = weights["m.weight"]
    assert (weight.bits, weight.shape) == (0, ())
    with pytest.raises(LoraFxError, match=f"'m.weight' is quantised .*{words}"):
        weight.read()


def test_mxfp4_of_a_parameter_that_is_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        "experts.gate_up_proj_blocks": ones(3, 4, 2, 16, dtype=np.uint8),
        "experts.gate_up_proj_scales": ones(3, 4, 2, dtype=np.uint8),
    }
    weights, _ = found(tmp_path, tensors, {"quant_method": "mxfp4"}, monkeypatch)
    assert {n: (w.format, w.shape) for n, w in weights.items()} == {
        "experts.gate_up_proj": ("MXFP4", (3, 64, 4))
    }


MALFORMED: list[tuple[str, Any, str, Callable[[Array], Array], str]] = [
    ("awq 16", GPTQ, "qweight", lambda a: a, r"m\.scales' is float16 \[2, 32\].*\[any, 4\]"),
    ("gptq 4 16 version 2", AWQ, "qweight", lambda a: a, r"m\.scales' is float16.*\[any, 256\]"),
    ("gptq 4 16 version 2", GPTQ, "qzeros", lambda a: a[:1], r"m\.qzeros' is int32 \[1, 4\]"),
    ("int8", None, "SCB", lambda a: a[:2], r"m\.SCB' is float32 \[2\]"),
    ("nf4 float32 64 64", None, "weight.absmax", lambda a: a[:2], r"absmax' is float32 \[2\]"),
]


@pytest.mark.parametrize("row", MALFORMED, ids=lambda r: f"{r[0]} {r[2]}")
def test_headers_that_do_not_fit(tmp_path: Path, row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, config, part, change, words = row
    arrays = dict(ROWS[name].arrays)
    arrays[part] = change(arrays[part])
    with pytest.raises(LoraFxError, match=words):
        found(
            tmp_path,
            {f"m.{n}": np.ascontiguousarray(a) for n, a in arrays.items()},
            config,
            monkeypatch,
        )


def test_the_table_of_siblings() -> None:
    info = TensorInfo("uint8", (1,), Path("x"), 0, 1)
    for part, scheme in SIBLINGS.items():
        assert scheme_of("a.b.weight", {f"a.b.{part}": info}) == scheme
        assert scheme_of("a.c.weight", {f"a.b.{part}": info}) == ""
    assert scheme_of("a.w", {"a.w_blocks": info}).startswith("MXFP4")
