"""torchtune's names: the order of rows in q and k against a rotation written out in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.errors import LoraFxError
from lora_fx.files.tensor_files import write_tensors
from lora_fx.formats.io import format_of, load_adapter
from lora_fx.formats.rotary_rows import to_halves

Array = np.ndarray[Any, Any]
HEADS, GROUPS, SIZE, IN, RANK = 3, 2, 6, 10, 2
LLAMA = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
ROWS = {
    "layers.1.attn.q_proj": HEADS * SIZE,
    "layers.1.attn.k_proj": GROUPS * SIZE,
    "layers.1.attn.v_proj": GROUPS * SIZE,
    "layers.1.attn.output_proj": 10,
    "layers.1.mlp.w1": 14,
    "layers.1.mlp.w2": 14,
    "layers.1.mlp.w3": 14,
    "output": 20,
}


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensors(**rows: int) -> dict[str, Array]:
    result = {}
    for i, (module, n) in enumerate({**ROWS, **rows}.items()):
        result[f"{module}.lora_a.weight"] = normal(2 * i, RANK, IN)
        result[f"{module}.lora_b.weight"] = normal(2 * i + 1, n, RANK)
    result["layers.1.attn.q_proj.magnitude"] = normal(99, HEADS * SIZE)
    return result


def stored(
    folder: Path,
    arrays: dict[str, Array] | None = None,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = LLAMA,
) -> Path:
    write_tensors(folder / "adapter_model.safetensors", arrays or tensors(), {})
    fields = {"r": RANK, "lora_alpha": 6, "peft_type": "LORA", **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    if model is not None:
        (folder / "config.json").write_text(json.dumps(model))
    return folder / "adapter_model.safetensors"


def test_names_and_scale(tmp_path: Path) -> None:
    file = stored(tmp_path)
    assert format_of(tmp_path) == "torchtune"
    adapter, given = load_adapter(tmp_path), tensors()
    layer = "model.layers.1."
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
    keys = [*(f"{layer}{n}.weight" for n in names), "lm_head.weight"]
    assert sorted(adapter) == sorted(keys)
    for module, key in zip(ROWS, keys, strict=True):
        low = adapter.lowrank[key]
        assert low.scale == 3.0
        np.testing.assert_array_equal(low.a, given[f"{module}.lora_a.weight"])
        if "q_proj" not in key and "k_proj" not in key:
            np.testing.assert_array_equal(low.b, given[f"{module}.lora_b.weight"])
    assert file.is_file()


def neighbours(x: Array, at: int) -> Array:
    """One head's vector turned as torchtune does: elements 2i and 2i + 1 by the angle of i."""
    out = x.copy()
    for i in range(SIZE // 2):
        angle = at * 10000.0 ** (-2 * i / SIZE)
        c, s = np.cos(angle), np.sin(angle)
        out[2 * i] = x[2 * i] * c - x[2 * i + 1] * s
        out[2 * i + 1] = x[2 * i] * s + x[2 * i + 1] * c
    return out


def halves(x: Array, at: int) -> Array:
    """The same as Hugging Face does: elements i and i + d/2."""
    out, half = x.copy(), SIZE // 2
    for i in range(half):
        angle = at * 10000.0 ** (-2 * i / SIZE)
        c, s = np.cos(angle), np.sin(angle)
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i] * s + x[i + half] * c
    return out


def test_scores_stay_what_they_were(tmp_path: Path) -> None:
    """q·k after the rotation, at positions 3 and 5, by each side's own rotation and rows."""
    stored(tmp_path)
    updates, given = load_adapter(tmp_path).lowrank, tensors()
    x = normal(7, IN).astype(np.float64)
    mine, theirs = {}, {}
    for leaf in ("q_proj", "k_proj"):
        a = given[f"layers.1.attn.{leaf}.lora_a.weight"].astype(np.float64)
        b = given[f"layers.1.attn.{leaf}.lora_b.weight"].astype(np.float64)
        theirs[leaf] = (3.0 * b @ a @ x).reshape(-1, SIZE)
        delta = updates[f"model.layers.1.self_attn.{leaf}.weight"].matrix()
        mine[leaf] = (delta @ x).reshape(-1, SIZE)
    for h in range(HEADS):
        for g in range(GROUPS):
            want = neighbours(theirs["q_proj"][h], 3) @ neighbours(theirs["k_proj"][g], 5)
            got = halves(mine["q_proj"][h], 3) @ halves(mine["k_proj"][g], 5)
            np.testing.assert_allclose(got, want, rtol=1e-9)


def test_rows_and_magnitudes_move_together(tmp_path: Path) -> None:
    stored(tmp_path)
    low, given = load_adapter(tmp_path).lowrank["model.layers.1.self_attn.q_proj.weight"], tensors()
    b, size = (given[f"layers.1.attn.q_proj.{n}"] for n in ("lora_b.weight", "magnitude"))
    assert low.magnitude is not None
    for h in range(HEADS):
        for i in range(SIZE // 2):
            for j in range(2):
                here, there = h * SIZE + j * SIZE // 2 + i, h * SIZE + 2 * i + j
                np.testing.assert_array_equal(low.b[here], b[there])
                assert low.magnitude[here] == size[there]


def test_models_that_pair_halves_keep_their_rows(tmp_path: Path) -> None:
    stored(tmp_path, model={**LLAMA, "model_type": "qwen2"})
    low = load_adapter(tmp_path).lowrank["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(low.b, tensors()["layers.1.attn.k_proj.lora_b.weight"])


def test_heads_of_the_base_model(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "base").mkdir()
    stored(tmp_path / "a", model=None)
    with pytest.raises(LoraFxError, match="needs the number of heads") as caught:
        load_adapter(tmp_path / "a")
    assert "--base" in caught.value.hint
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    low = load_adapter(tmp_path / "a", base=tmp_path / "base").lowrank
    b = tensors()["layers.1.attn.k_proj.lora_b.weight"]
    got = low["model.layers.1.self_attn.k_proj.weight"].b
    np.testing.assert_array_equal(got, to_halves(b, GROUPS))
    assert not np.array_equal(got, b)


@pytest.mark.parametrize(
    ("arrays", "config", "model", "word"),
    [
        ({}, {"r": None}, LLAMA, "r is null"),
        ({}, {"lora_alpha": 0}, LLAMA, "lora_alpha is 0"),
        ({}, {"r": 3}, LLAMA, "rank 2; .* has 3"),
        ({}, {}, {"model_type": "phi3"}, "model_type is 'phi3'"),
        ({}, {}, {**LLAMA, "num_attention_heads": 5}, "18 rows, but .* has 5 heads"),
        ({}, {}, {**LLAMA, "head_dim": 8}, "12 rows, but .* has 2 heads of 8"),
        ({"layers.1.attn.lora_x": normal(0, 2)}, {}, LLAMA, "not a name that torchtune"),
        ({"layers.1.mlp.w9.lora_a.weight": normal(0, 2, 3)}, {}, LLAMA, "has lora_a; expected"),
        ({"layers.1.mlp.w1.lora_b.weight": normal(0, 4, 3)}, {}, LLAMA, r"lora_b \[4, 3\]"),
    ],
)
def test_refused(tmp_path: Path, arrays: Any, config: Any, model: Any, word: str) -> None:
    stored(tmp_path, {**tensors(), **arrays}, config, model)
    with pytest.raises(LoraFxError, match=word):
        load_adapter(tmp_path)


def test_an_unknown_module_and_no_config(tmp_path: Path) -> None:
    pair = {"layers.0.attn.x.lora_a.weight": normal(0, 2, 3)}
    pair["layers.0.attn.x.lora_b.weight"] = normal(1, 4, 2)
    file = stored(tmp_path, pair)
    with pytest.raises(LoraFxError, match="without a known name; known: q_proj"):
        load_adapter(file)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(LoraFxError, match=r"no adapter_config\.json next to it"):
        load_adapter(file)
