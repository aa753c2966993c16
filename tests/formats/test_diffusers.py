"""diffusers files: every spelling of a pair, alphas from tensors and from the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_fx.adapter.adapter import Adapter
from lora_fx.adapter.lowrank import LowRank
from lora_fx.adapter.origin import Origin
from lora_fx.adapter.updates import Dense
from lora_fx.errors import LoraFxError
from lora_fx.formats import diffusers
from lora_fx.formats.io import format_of, load_adapter, save_adapter
from lora_fx.formats.naming import ForeignNames
from lora_fx.ir.layout import plain_layout

Array = np.ndarray[Any, Any]
A = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
B = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
DELTA = B.astype(np.float64) @ A.astype(np.float64)
U = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
T = "text_encoder.text_model.encoder.layers.0.self_attn"


def stored(
    tmp_path: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None = None
) -> Path:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    header = {"format": "pt"}
    if config is not None:
        header["lora_adapter_metadata"] = json.dumps(config)
    save_file(dict(tensors), file, header)
    return file


SPELLINGS = [
    (f"{U}.attn1.to_q.lora_A", f"{U}.attn1.to_q.lora_B", f"{U}.attn1.to_q"),
    (f"{U}.attn1.to_q.lora.down", f"{U}.attn1.to_q.lora.up", f"{U}.attn1.to_q"),
    (
        f"{U}.attn2.processor.to_v_lora.down",
        f"{U}.attn2.processor.to_v_lora.up",
        f"{U}.attn2.to_v",
    ),
    (
        f"{U}.attn1.processor.to_out_lora.down",
        f"{U}.attn1.processor.to_out_lora.up",
        f"{U}.attn1.to_out.0",
    ),
    (
        "mid_block.x.attn1.processor.to_k_lora.down",
        "mid_block.x.attn1.processor.to_k_lora.up",
        "unet.mid_block.x.attn1.to_k",
    ),
    (f"{T}.to_out_lora.down", f"{T}.to_out_lora.up", f"{T}.out_proj"),
    (f"{T}.q_proj.lora_linear_layer.down", f"{T}.q_proj.lora_linear_layer.up", f"{T}.q_proj"),
    ("transformer.blocks.0.ff.lora_A", "transformer.blocks.0.ff.lora_B", "transformer.blocks.0.ff"),
    ("diffusion_model.x.lora_A", "diffusion_model.x.lora_B", "diffusion_model.x"),
]


@pytest.mark.parametrize(("down", "up", "module"), SPELLINGS)
def test_spellings(tmp_path: Path, down: str, up: str, module: str) -> None:
    file = stored(tmp_path, {f"{down}.weight": A, f"{up}.weight": B})
    for path in (file, tmp_path):
        assert format_of(path) == "diffusers"
        adapter = load_adapter(path)
        assert list(adapter) == [f"{module}.weight"]
        assert adapter.names and adapter.names.format == "diffusers"
        np.testing.assert_allclose(adapter.deltas()[f"{module}.weight"], DELTA, rtol=1e-6)


def test_components_convolutions_and_narrow_dtypes(tmp_path: Path) -> None:
    conv = np.ones((4, 3, 3, 2), np.float16), np.ones((8, 4, 1, 1), np.float16)
    tensors = {
        "unet.c.lora_A.weight": conv[0],
        "unet.c.lora_B.weight": conv[1],
        "text_encoder_2.x.lora_A.weight": A,
        "text_encoder_2.x.lora_B.weight": B,
    }
    adapter = load_adapter(stored(tmp_path, tensors))
    assert adapter.names == ForeignNames("diffusers", ("text_encoder_2", "unet"))
    low = adapter.lowrank["unet.c.weight"]
    assert (low.origin.op, low.origin.kernel) == ("conv2d", (3, 2)) and low.a.dtype == np.float32
    np.testing.assert_array_equal(adapter.deltas()["unet.c.weight"], np.full((8, 18), 4.0))


PAIR = {"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B}
CONFIG = {"unet.r": 4, "unet.lora_alpha": 10, "unet.peft_type": "LORA"}


def test_alpha(tmp_path: Path) -> None:
    def scale(tensors: Mapping[str, Array], config: Mapping[str, Any] | None = None) -> float:
        return (
            load_adapter(stored(tmp_path, {**PAIR, **tensors}, config))
            .lowrank["unet.x.weight"]
            .scale
        )

    assert scale({}) == 1.0
    assert scale({"unet.x.alpha": np.array(2.0)}) == 0.5
    assert scale({}, CONFIG) == 2.5
    assert scale({"unet.x.alpha": np.array(10.0)}, CONFIG) == 2.5
    assert scale({}, {**CONFIG, "unet.alpha_pattern": {"x": 6}}) == 1.5
    assert scale({}, {**CONFIG, "unet.use_rslora": True}) == 5.0
    assert scale({}, {"text_encoder.r": 4, "text_encoder.lora_alpha": 10}) == 1.0
    old = {f"{U}.a.processor.to_q_lora.{d}.weight": x for d, x in (("down", A), ("up", B))}
    old[f"{U}.a.processor.to_q_lora.down.weight.alpha"] = np.array(1.0)
    assert load_adapter(stored(tmp_path, old)).lowrank[f"{U}.a.to_q.weight"].scale == 0.25


def test_dora_and_biases(tmp_path: Path) -> None:
    size = np.arange(1, 9, dtype=np.float32)
    extra = {"unet.x.lora_magnitude_vector": size, "unet.x.lora_B.bias": size}
    config = {**CONFIG, "unet.use_dora": True, "unet.lora_bias": True}
    entries = load_adapter(stored(tmp_path, {**PAIR, **extra}, config)).entries
    low, bias = entries["unet.x.weight"], entries["unet.x.bias"]
    assert isinstance(low, LowRank) and isinstance(bias, Dense) and bias.scale == 2.5
    np.testing.assert_array_equal(low.magnitude, size)


def test_files_of_one_model(tmp_path: Path) -> None:
    tensors = {k.removeprefix("unet."): v for k, v in PAIR.items()}
    config = {k.removeprefix("unet."): v for k, v in CONFIG.items()}
    adapter = load_adapter(stored(tmp_path, tensors, config))
    assert adapter.names is None and adapter.lowrank["x.weight"].scale == 2.5


@pytest.mark.parametrize(
    ("tensors", "config", "word"),
    [
        ({"unet.y.lora_A.weight": A}, None, "'unet.y' has A; expected lora_A and lora_B"),
        ({"unet.x.lora_B.weight": B[:, :3]}, None, r"A is \[4, 6\] and B is \[8, 3\]"),
        ({"unet.x.lora.up.weight": B}, None, "a second B of 'unet.x'"),
        ({"unet.x.lora_C.weight": B}, None, "not a name that diffusers writes"),
        ({"unet.x.alpha": np.array(0.0)}, None, "is 0"),
        ({"unet.x.alpha": np.array(2.0)}, CONFIG, "is 2; the header's .* says 10"),
        ({"unet.x.lora_magnitude_vector": B}, None, "expected 8 numbers"),
        ({"unet.x.lora_B.bias": A[0]}, None, "expected 8 numbers"),
        ({}, {**CONFIG, "unet.r": 5}, "rank 4; .* says 5"),
        ({}, {"unet.r": 4}, "lora_alpha is missing"),
        ({}, {**CONFIG, "unet.alora_invocation_tokens": [1]}, "aLoRA"),
        ({}, [1], "a JSON list"),
    ],
)
def test_refused(tmp_path: Path, tensors: Mapping[str, Array], config: Any, word: str) -> None:
    file = stored(tmp_path, {**PAIR, **tensors}, config)
    with pytest.raises(LoraFxError, match=word) as caught:
        diffusers.read(file)
    assert str(file) in caught.value.message


def test_a_pattern_that_matches_nothing_is_noted(tmp_path: Path) -> None:
    config = {**CONFIG, "unet.alpha_pattern": {"gone": 1}}
    (note,) = diffusers.read(stored(tmp_path, PAIR, config)).metadata["notes"]
    assert "alpha_pattern 'gone' matches no module" in note and "its 1 is ignored" in note


# --- writing -------------------------------------------------------------------------------------


def low(**fields: Any) -> LowRank:
    return LowRank(A, B, **{"alpha": 6.0, **fields})


def test_writes_what_diffusers_reads(tmp_path: Path) -> None:
    conv = LowRank(np.ones((2, 27), np.float32), np.ones((8, 2), np.float32), 2.0)
    conv = LowRank(conv.a, conv.b, 2.0, plain_layout((8, 3, 3, 3)), origin=Origin(op="conv2d"))
    entries = {
        "unet.x.weight": low(),
        "unet.c.weight": conv,
        "text_model.fc.weight": low(magnitude=np.ones(8, np.float32)),
    }
    folder = tmp_path / "out"
    notes = save_adapter(Adapter(entries), folder, "diffusers")
    assert any("alpha = rank" in n for n in notes)
    file = folder / "pytorch_lora_weights.safetensors"
    got = load_file(file)
    assert {k: v.shape for k, v in got.items()} == {
        "unet.x.lora_A.weight": (4, 6),
        "unet.x.lora_B.weight": (8, 4),
        "unet.c.lora_A.weight": (2, 3, 3, 3),
        "unet.c.lora_B.weight": (8, 2, 1, 1),
        "text_encoder.text_model.fc.lora_A.weight": (4, 6),
        "text_encoder.text_model.fc.lora_B.weight": (8, 4),
        "text_encoder.text_model.fc.lora_magnitude_vector": (8,),
    }
    with safe_open(file, "np") as f:
        config = json.loads(f.metadata()["lora_adapter_metadata"])
    assert config["text_encoder.use_dora"] is True and config["unet.use_dora"] is False
    assert config["text_encoder.lora_alpha"] == 6 and config["text_encoder.r"] == 4
    assert {config["unet.r"], *config["unet.rank_pattern"].values()} == {2, 4}


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"h.0.fc.weight": low()}, "its key names no component"),
        ({"unet.x.weight": low(), "unet.y.weight": low(variant="rslora")}, "several variants"),
        ({"unet.x.weight": low(), "unet.y.weight": low(magnitude=B[:, 0])}, "without DoRA"),
    ],
)
def test_what_diffusers_cannot_say(tmp_path: Path, entries: Any, word: str) -> None:
    with pytest.raises(LoraFxError, match=word):
        save_adapter(Adapter(entries), tmp_path / "d.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())


def test_one_component_becomes_one_model(tmp_path: Path) -> None:
    save_adapter(load_adapter(stored(tmp_path, PAIR, CONFIG)), tmp_path / "p")
    adapter = load_adapter(tmp_path / "p")
    assert adapter.lowrank["x.weight"].scale == 2.5
    both = {**PAIR, "text_encoder.x.lora_A.weight": A, "text_encoder.x.lora_B.weight": B}
    with pytest.raises(LoraFxError, match="updates of text_encoder, unet") as caught:
        save_adapter(load_adapter(stored(tmp_path, both)), tmp_path / "q")
    assert "--base" in caught.value.hint


def test_starts_that_change_the_base(tmp_path: Path) -> None:
    config = {**CONFIG, "unet.init_lora_weights": "pissa"}
    with pytest.raises(LoraFxError, match="the adapter was initialised with 'pissa'"):
        load_adapter(stored(tmp_path, PAIR, config))
    entry = low(mutated="pissa")
    for name, file in (
        ("diffusers", "d.safetensors"),
        ("kohya", "k.safetensors"),
        ("onnx_adapter", "o.onnx_adapter"),
    ):
        with pytest.raises(LoraFxError, match="a base that pissa changed"):
            save_adapter(Adapter({"unet.x.weight": entry}), tmp_path / file, name)


def test_two_updates_of_one_module(tmp_path: Path) -> None:
    low = LowRank(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32), 2.0)
    entries = {"unet.x.weight": low, "unet.y.weight": replace(low, use="unet.x.weight")}
    with pytest.raises(LoraFxError, match=r"'unet\.y\.weight' would both be 'unet\.x\.weight'"):
        diffusers.write(Adapter(entries), tmp_path / "d")
