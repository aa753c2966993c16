"""A Llama of 1.5 B parameters is exported and verified in 16 GB: 3 GB in bfloat16, 6 as float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 21, "intermediate_size": 8192, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
MOST = 16e9
"""Bytes that a process may have in memory, pages of its files included."""
TABLE = "int8=embed_tokens"
OPTIONS = {
    "merged": ["first"],
    "cache": ["first", "--cache"],
    "switch": ["first", "second", "--mode", "switch"],
    "int4": ["first", "--mode", "switch", "--quantise", "int4", "--quantise", TABLE],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, and two adapters of every layer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(tie_word_embeddings=True, dtype="bfloat16", **SIZES)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16)
        weights[name] = weight.normal_(0, 0.02) if parameter.ndim > 1 else weight
    (folder / "base").mkdir()
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder / "base")

    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    settings["target_modules"] = ["q_proj", "v_proj", "up_proj", "down_proj"]
    for adapter in ("first", "second"):
        factors = {}
        for name, weight in weights.items():
            if name.split(".")[-2] in settings["target_modules"]:
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                out, width = weight.shape
                factors[f"{stem}.lora_A.weight"] = torch.randn(8, width) / width**0.5
                factors[f"{stem}.lora_B.weight"] = 0.02 * torch.randn(out, 8)
        (folder / adapter).mkdir()
        save_file(factors, folder / adapter / "adapter_model.safetensors", {"format": "pt"})
        (folder / adapter / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def peak_of(folder: Path, *arguments: str) -> int:
    """Run lora-fx in a folder; the most bytes that it had in memory."""
    command = [sys.executable, "-m", "lora_fx.cli", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return 1024 * usage.ru_maxrss


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts in KiB on Linux")
@pytest.mark.parametrize("kind", OPTIONS)
def test_an_export_and_its_verification_fit_in_16_gb(kind: str, folder: Path) -> None:
    target = f"{kind}.onnx"
    given = [*OPTIONS[kind], "-o", target, "--provider", "cpu"]
    assert peak_of(folder, "export", "base", *given) < MOST
    if kind == "merged":
        reference = ["base", "--adapter", "first"]
        assert peak_of(folder, "verify", target, *reference, "--provider", "cpu") < MOST
    for path in folder.glob(f"{target}*"):
        path.unlink()
    for path in folder.glob("*.onnx_adapter"):
        path.unlink()
