"""Wrong adapters that PEFT 0.21.2 loads in silence, or nearly so: one row each, all refused.

What only the base can tell (a narrower A, another model of equal shapes, more layers) is the
binder's; here is what the adapter alone shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_fx.dtypes import Array
from lora_fx.errors import LoraFxError
from lora_fx.formats.io import load_adapter

Write = Callable[..., Path]
LEAD = "base_model.model."
A, B = f"{LEAD}m.fc.lora_A.weight", f"{LEAD}m.fc.lora_B.weight"
A2, B2 = f"{LEAD}m.up.lora_A.weight", f"{LEAD}m.up.lora_B.weight"
WIDE, TALL = np.ones((4, 6), np.float32), np.ones((8, 4), np.float32)
BOTH = {"target_modules": ["fc", "up"]}
Case = tuple[dict[str, Any], dict[str, Array | None], tuple[str, ...], str]


def renamed(old: str, new: str) -> dict[str, Array | None]:
    """The two tensors under other names."""
    names = {A: WIDE, B: TALL}
    return {**dict.fromkeys(names), **{k.replace(old, new): v for k, v in names.items()}}


REFUSED: dict[str, Case] = {
    "lora_B missing": ({}, {B: None}, (A, "no partner"), "incomplete"),
    "lora_A missing": ({}, {A: None}, (B, "no partner"), "incomplete"),
    "a tensor of one layer missing": (BOTH, {A2: WIDE}, (A2, B2), "incomplete"),
    "prefix missing": ({}, renamed(LEAD, ""), ("'m.fc.lora_A.weight'",), f"name is '{A}'"),
    "prefix of DataParallel": ({}, renamed(LEAD, "module." + LEAD), ("'module.base",), "'module.'"),
    "half the prefix": ({}, renamed(LEAD, "base_model."), ("'base_model.m.fc",), f"name is '{A}'"),
    "all keys renamed": ({}, renamed("lora_", "adapter_"), ("adapter_A", "not a name"), ""),
    "adapter name left in": ({}, renamed(".weight", ".default.weight"), ("lora_A.default",), ""),
    "extra adapter tensors": ({}, {A2: WIDE, B2: TALL}, (A2, "does not name"), "target_modules"),
    "extra other tensors": ({}, {f"{LEAD}m.scale": WIDE}, ("m.scale", "not a name"), ""),
    "target_modules narrower": (
        {"target_modules": ["up"]},
        {A2: WIDE, B2: TALL},
        (A, "does not name", "PEFT would drop it"),
        "target_modules",
    ),
    "r differs from the file": ({"r": 8}, {}, ("rank 4", "expected 8"), "rank_pattern"),
    "rank_pattern missing": (
        BOTH,
        {A2: WIDE[:2], B2: TALL[:, :2]},
        (A2, "rank 2", "expected 4"),
        "rank_pattern",
    ),
    "A and B of two ranks": ({}, {A: WIDE[:3]}, ("[3, 6]", "[8, 4]"), "same file"),
    "rank_pattern typo that the file shows": (
        {"rank_pattern": {"cf": 4}, "r": 8},
        {},
        (A, "rank 4", "expected 8"),
        "rank_pattern",
    ),
    "lora_alpha missing": ({"lora_alpha": "absent"}, {}, ("lora_alpha is missing",), "add"),
    "NaN": ({}, {A: WIDE * np.float32("nan")}, (A, "NaN"), "diverged"),
    "infinite": ({}, {B: TALL * np.float32("inf")}, (B, "NaN or infinite"), "diverged"),
    "int8 tensors": ({}, {A: WIDE.astype(np.int8)}, (A, "int8"), "fp32"),
    "empty tensors (ZeRO-3)": ({}, {A: np.ones(0, np.float32)}, (A, "[0]"), "ZeRO-3"),
    "empty side (FSDP)": ({}, {A: np.ones((4, 0), np.float32)}, (A, "[4, 0]"), "FSDP"),
    "use_dora on a plain file": ({"use_dora": True}, {}, (A, "no lora_magnitude"), "correct"),
    "DoRA magnitude, flag off": (
        {},
        {f"{LEAD}m.fc.lora_magnitude_vector": TALL[:, 0]},
        ("lora_magnitude_vector", "PEFT would drop it"),
        "use_dora",
    ),
    "DoRA magnitude of another size": (
        {"use_dora": True},
        {f"{LEAD}m.fc.lora_magnitude_vector": TALL[:6, 0]},
        ("lora_magnitude_vector", "[6]", "8 numbers"),
        "same file",
    ),
    "NaN in a DoRA magnitude": (
        {"use_dora": True},
        {f"{LEAD}m.fc.lora_magnitude_vector": TALL[:, 0] * np.float32("nan")},
        ("lora_magnitude_vector", "NaN"),
        "diverged",
    ),
    "lora_bias without biases": ({"lora_bias": True}, {}, ("without a bias",), "lora_bias"),
    "peft_type unknown": ({"peft_type": "FOO"}, {}, ("'FOO'", "expected 'LORA'"), ""),
    "peft_type missing": ({"peft_type": "absent"}, {}, ("None", "expected 'LORA'"), ""),
    "megatron": ({"megatron_config": {"x": 1}, "megatron_core": "os"}, {}, ("Megatron",), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(plain: Write, name: str) -> None:
    config, tensors, words, hint = REFUSED[name]
    with pytest.raises(LoraFxError) as caught:
        load_adapter(plain(config, tensors))
    error = caught.value
    assert error.exit_code == 2 and "\n" not in error.message
    assert "adapter_model.safetensors" in error.message or "adapter_config.json" in error.message
    for word in words:
        assert word in error.message, error.message
    assert hint in error.hint, error.hint


NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown config key": ({"new_field": 1}, "'new_field'"),
    "rank_pattern typo": ({"rank_pattern": {"fd": 4}}, "'fd' matches no module"),
    "alpha_pattern typo": ({"alpha_pattern": {"fd": 4}}, "did you mean fc?"),
    "target_modules wider": (BOTH, "'up', but the file has no tensor for them"),
    "target_parameters wider": ({"target_parameters": ["e.up"]}, "'e.up', but the file"),
}


@pytest.mark.parametrize("name", NOTED)
def test_noted(plain: Write, name: str) -> None:
    """Only the base can tell whether these lose anything; the metadata keeps the names for that."""
    config, word = NOTED[name]
    got = load_adapter(plain(config))
    assert any(word in note for note in got.metadata["notes"])
    assert bool(got.metadata.get("untouched_targets")) == ("wider" in name)


@pytest.mark.parametrize(
    "config",
    [
        {"megatron_core": "os.system"},
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"base_model_name_or_path": "https://example.invalid/model"},
        {"fan_in_fan_out": True},
    ],
    ids=lambda c: next(iter(c)),
)
def test_names_in_a_config_are_never_followed(
    plain: Write, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib
    import socket

    def never(*args: object, **_: object) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(importlib, "import_module", never)
    got = load_adapter(plain(config))
    assert got.lowrank["m.fc.weight"].scale == 2.0
    assert got.metadata.get("fan_in_fan_out", False) == ("fan_in_fan_out" in config)
