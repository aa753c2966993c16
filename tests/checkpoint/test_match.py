"""Square weights of a model that stores some [out, in] and some [in, out]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_fx
from lora_fx import Adapter, LowRank

N = 12
QUERY = "encoder.layer.0.query.weight"  # Linear
ATTN, PROJ = "decoder.h.0.c_attn.weight", "decoder.h.0.c_proj.weight"  # Conv1D
SHAPES = {QUERY: (N, N), "encoder.layer.0.up.weight": (2 * N, N), ATTN: (N, 3 * N), PROJ: (N, N)}
MIXED = {
    "model_type": "encoder-decoder",
    "encoder": {"model_type": "bert"},
    "decoder": {"model_type": "gpt2"},
}


def low(name: str) -> LowRank:
    rng = np.random.default_rng(len(name))
    shape = SHAPES[name] if ".c_" not in name else SHAPES[name][::-1]
    a, b = rng.standard_normal((2, shape[1])), rng.standard_normal((shape[0], 2))
    return LowRank(a.astype("f4"), b.astype("f4"), 3.0)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("config", [MIXED, {}], ids=["config", "no config"])
@pytest.mark.parametrize(
    "names", [(QUERY, ATTN), (QUERY, PROJ, ATTN), ("encoder.layer.0.up.weight", PROJ), (PROJ,)]
)
def test_each_part_by_its_own_kind(
    names: tuple[str, ...], config: dict[str, Any], flag: bool, tmp_path: Path
) -> None:
    if not config and ATTN not in names:
        pytest.skip("nothing tells")
    base = tmp_path / "base"
    base.mkdir()
    rng = np.random.default_rng(0)
    old = {n: rng.standard_normal(s).astype("f4") for n, s in SHAPES.items()}
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))
    adapter = Adapter({n: low(n) for n in names}, {"fan_in_fan_out": flag})
    if not config and QUERY in names and flag:
        pytest.skip("nothing tells a Linear called query from a Conv1D")
    lora_fx.merge(base, adapter, tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        delta = low(name).matrix()
        want = old[name] + (delta.T if ".c_" in name else delta)
        np.testing.assert_allclose(new[name], want, rtol=1e-6, atol=1e-6, err_msg=name)


# What decides: {name: (stored shape, stored as [in, out])}, and the model_type.
DECIDED: dict[str, tuple[dict[str, tuple[tuple[int, int], bool]], str]] = {
    "the same name elsewhere in the part": (
        {"h.0.mlp.c_proj.weight": ((4 * N, N), True), "h.0.attn.c_proj.weight": ((N, N), True)},
        "",
    ),
    "the other names of its own part": (
        {
            "encoder.c_attn.weight": ((3 * N, N), False),
            "encoder.c_proj.weight": ((N, N), False),
            "decoder.c_attn.weight": ((N, 3 * N), True),
            "decoder.c_proj.weight": ((N, N), True),
        },
        "",
    ),
    "not a layer of the other kind": (
        {"model.up.weight": ((2 * N, N), False), "model.c_proj.weight": ((N, N), True)},
        "gpt2",
    ),
}


@pytest.mark.parametrize("case", DECIDED)
def test_what_decides(case: str, tmp_path: Path) -> None:
    weights, kind = DECIDED[case]
    base = tmp_path / "base"
    base.mkdir()
    rng = np.random.default_rng(0)
    old = {n: rng.standard_normal(s).astype("f4") for n, (s, _) in weights.items()}
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    updates = {}
    for name, (shape, turned) in weights.items():
        out, in_ = shape[::-1] if turned else shape
        a, b = rng.standard_normal((2, in_)), rng.standard_normal((out, 2))
        updates[name] = LowRank(a.astype("f4"), b.astype("f4"), 3.0)
    lora_fx.merge(base, Adapter(updates), tmp_path / "out")
    new = load_file(tmp_path / "out" / "model.safetensors")
    for name, (_, turned) in weights.items():
        delta = updates[name].matrix()
        want = old[name] + (delta.T if turned else delta)
        np.testing.assert_allclose(new[name], want, rtol=1e-6, atol=1e-6, err_msg=name)
