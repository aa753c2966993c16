"""merge with adapters that PEFT made on models whose names transformers 5 changes when it loads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import lora_fx
from lora_fx.errors import LoraFxError
from tests.checkpoint.made import adapter, factors, read
from tests.checkpoint.test_renaming import MODELS, names_of, saved

GATED = ["gate_proj", "up_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {"target_modules": ["q_proj", "o_proj", "fc1"]}),
    "vit, a head and biases": (
        "vit",
        {"target_modules": ["v_proj", "fc2"], "modules_to_save": ["classifier"],
         "lora_bias": True},
    ),
    "vit, dora": ("vit", {"target_modules": ["k_proj", "fc1"], "use_dora": True}),
    "vit, a pattern": ("vit", {"target_modules": r".*layers\.1\..*(q_proj|fc2)"}),
    "vit, all linears": ("vit", {"target_modules": "all-linear"}),
    "vit, names that are the same": ("vit", {"target_modules": ["projection", "dense"]}),
    "deit": ("deit", {"target_modules": ["q_proj", "fc2"]}),
    "dinov2": ("dinov2", {"target_modules": ["q_proj", "fc1", "o_proj"]}),
    "swin": ("swin", {"target_modules": ["q_proj", "fc1"]}),
    "llava": ("llava", {"target_modules": ["q_proj", "down_proj", "fc1"]}),
    "qwen2_vl": ("qwen2_vl", {"target_modules": ["q_proj", "qkv", "down_proj"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "mixtral, one stack": (
        "mixtral", {"target_modules": [], "target_parameters": STACKS[1:]},
    ),
    "mixtral, as modules": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "mixtral, rslora": (
        "mixtral", {"target_modules": ["w1", "w3"], "use_rslora": True},
    ),
    "mixtral, no experts": ("mixtral", {"target_modules": ["q_proj", "gate_proj"]}),
    "mixtral, all linears": ("mixtral", {"target_modules": "all-linear"}),
    "qwen2_moe": ("qwen2_moe", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "qwen2_moe, up_proj of the shared expert": (
        "qwen2_moe", {"target_modules": ["q_proj", "up_proj"]},
    ),
    "qwen2_moe, a pattern": ("qwen2_moe", {"target_modules": r".*\.(up|down|k)_proj"}),
    "qwen2_moe, all linears": ("qwen2_moe", {"target_modules": "all-linear"}),
    "qwen3_moe, as modules": ("qwen3_moe", {"target_modules": ["q_proj", *GATED]}),
    "olmoe, no experts": ("olmoe", {"target_modules": ["q_proj", "w1"]}),
    "deepseek_v3": ("deepseek_v3", {"target_modules": ["o_proj", *GATED]}),
    "phimoe": ("phimoe", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
    "jamba": (
        "jamba", {"target_modules": ["q_proj", "up_proj"],
                  "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "granitemoe": (
        "granitemoe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
}  # fmt: skip


def tuned(kind: str, base: Path, folder: Path, **fields: Any) -> Path:
    """A trained adapter of PEFT, saved; PEFT's merged model as the file that transformers writes.

    The rank, 3, is none of the sizes.
    """
    cls: Any = getattr(transformers, MODELS[kind][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls.from_pretrained(base)
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **fields))
        for name, p in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(p, std=0.2)
        wrapped.save_pretrained(folder / "adapter")
        merged: Any = wrapped.merge_and_unload()
        merged.save_pretrained(folder / "theirs")
    return folder / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_pefts(case: str, tmp_path: Path) -> None:
    """To one rounding of the sum: the rest of PEFT's arithmetic is in another order."""
    kind, fields = CASES[case]
    base = tmp_path / "base"
    saved(kind, base)
    given = tuned(kind, base, tmp_path, **fields)
    lora_fx.merge(base, given, tmp_path / "out")
    ours, want, before = (read(tmp_path / name) for name in ("out", "theirs", "base"))
    assert set(ours) == set(want) == set(before)
    moved = [n for n in ours if not np.array_equal(want[n], before[n])]
    assert moved
    for name, value in ours.items():
        if name in moved:
            assert not np.array_equal(value, before[name]), name
            scale = np.abs(want[name]).max() * np.finfo(np.float32).eps
            assert np.abs(value - want[name]).max() <= 2 * scale, name
        else:
            assert np.array_equal(value, before[name]), name
    report = lora_fx.doctor(base, given)
    assert report and not any(f["check"] == "patterns" for f in report.details["findings"])
    assert report.details["unused"] == report.details["missing"] == 0


LACKS: dict[str, tuple[str, list[str], str, str]] = {
    "names of the model": (
        "vit", ["q_proj", "fc1"], "vit.layers.1.attention.q_proj",
        "vit.encoder.layer.1.attention.attention.query",
    ),
    "names of the file": (
        "vit", ["query", "intermediate.dense"], "vit.encoder.layer.0.intermediate.dense",
        "vit.encoder.layer.0.intermediate.dense",
    ),
    "experts one by one": (
        "qwen2_moe", ["q_proj", "up_proj"], "model.layers.1.mlp.experts.2.up_proj",
        "model.layers.1.mlp.experts.2.up_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKS)
def test_a_layer_that_is_missing_is_found(case: str, tmp_path: Path) -> None:
    """Under the names that the adapter has; transformers 4 has those of the file."""
    kind, modules, lost, stored = LACKS[case]
    saved(kind, tmp_path / "base")
    base = read(tmp_path / "base")
    loaded = {old: new for new, old in names_of(tmp_path / "base").names.items()}
    pairs = {}
    for name, value in base.items():
        module = (name if case != "names of the model" else loaded.get(name, name))[:-7]
        if name.endswith(".weight") and any(module.endswith(f".{m}") for m in modules):
            pairs[module] = factors(np.random.default_rng(0), value.shape[0], value.shape[1], 3)
    whole = adapter(tmp_path / "whole", pairs, target_modules=modules)
    lora_fx.merge(tmp_path / "base", whole, tmp_path / "out")
    del pairs[lost]
    less = adapter(tmp_path / "less", pairs, target_modules=modules)
    with pytest.raises(
        LoraFxError, match="the adapter's file has no update for it: 1 such"
    ) as caught:
        lora_fx.merge(tmp_path / "base", less, tmp_path / "out2")
    assert repr(stored) in caught.value.message
    assert lora_fx.doctor(tmp_path / "base", less).details["missing"] == 1
