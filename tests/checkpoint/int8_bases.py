"""Bases whose linear layers are int8, and what a merge into them is, in fp64 by definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoint.made import Array, checkpoint, read

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
BNB, CT = "bitsandbytes", "compressed-tensors"
SCHEMES = (BNB, CT)
SIDES = {Q: (40, 24), DOWN: (24, 56)}
UNIT = {BNB: 127.0, CT: 1.0}
SCALES = {BNB: "SCB", CT: "weight_scale"}


def quantised(weight: Array, scheme: str, dtype: Any = None) -> dict[str, Array]:
    """The tensors of a module, by their last names; rows of zeros are of scale 0, or of eps."""
    largest = np.abs(weight).max(axis=1)
    if scheme == BNB:
        scales = largest.astype(dtype or np.float32)
        steps = scales.astype(np.float64) / 127
        more = {"SCB": scales, "weight_format": np.array(0, np.uint8)}
    else:  # half a code wider, so that -128 occurs
        scales = np.where(largest == 0, 1e-4, largest / 127.5).astype(dtype or ml_dtypes.bfloat16)
        steps = scales.astype(np.float64)
        more = {"weight_scale": scales[:, None]}
    codes = np.rint(weight / np.where(steps == 0, 1, steps)[:, None])
    return {"weight": np.clip(codes, -128, 127).astype(np.int8), **more}


def wide(tensors: dict[str, Array], module: str, scheme: str) -> Array:
    """W of a module in fp64."""
    scales = tensors[f"{module}.{SCALES[scheme]}"].astype(np.float64).reshape(-1, 1)
    return np.asarray(tensors[f"{module}.weight"] * scales / UNIT[scheme])


def weights(seed: int = 0) -> dict[str, Array]:
    """Random W with rows of zeros, of one sign, and of one large value."""
    rng, made = np.random.default_rng(seed), {}
    for module, (out, in_) in SIDES.items():
        w = rng.standard_normal((out, in_)) * 0.05
        w[3], w[5], w[7, 2] = 0.0, -np.abs(w[5]), -1.0
        made[module] = w
    return made


def config(scheme: str) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": scheme,
            "transform_config": {},
            "sparsity_config": {},
        },
    }


def base(
    path: Path, scheme: str, *, shards: int = 1, dtype: Any = None, **change: Any
) -> dict[str, Array]:
    """Write a base, and give its tensors; `change` replaces, adds, or takes away (None) those of
    q_proj by their last names."""
    tensors: dict[str, Array] = {"model.norm.weight": np.ones(24, np.float32)}
    for module, w in weights().items():
        tensors |= {f"{module}.{n}": v for n, v in quantised(w, scheme, dtype).items()}
    tensors |= {f"{Q}.{n}": v for n, v in change.items()}
    tensors = {n: v for n, v in tensors.items() if v is not None}
    checkpoint(path, tensors, shards, config=config(scheme))
    return tensors


def nearest(want: Array, scheme: str, old: Array) -> tuple[Array, Array]:
    """(codes, scales in their dtype) of W + Δ in fp64; `old` are the base's scales."""
    largest = np.abs(want).max(axis=1, keepdims=True)
    exact = largest if scheme == BNB else largest / 127
    scales = np.where(largest == 0, old.reshape(-1, 1), exact.astype(old.dtype))
    steps = scales.astype(np.float64) / UNIT[scheme]
    codes = np.clip(np.rint(want / np.where(steps == 0, 1, steps)), -127, 127)
    return codes.astype(np.int8), scales.reshape(old.shape)


def report(out: Path, key: str) -> dict[str, Any]:
    """The row of report.json."""
    rows = json.loads((out / "report.json").read_text())["tensors"]
    return next(r for r in rows if r["key"] == key)


def moved(path: Path, module: str, name: str, at: tuple[int, ...], by: Any) -> None:
    """Change one element of a tensor of a written folder of one file, and nothing else."""
    file = path / "model.safetensors"
    tensors, raw = read(file), bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start = 8 + size + json.loads(raw[8 : 8 + size])[f"{module}.{name}"]["data_offsets"][0]
    value = tensors[f"{module}.{name}"].copy()
    value[at] += by
    raw[start : start + value.nbytes] = value.tobytes()
    file.write_bytes(raw)
